"""The main job at three seeds: the trunks of the studies of recipes at the small scale, runs/small_trunks."""

from experiments import scales
from launch.points import Sweep


def get_sweep() -> Sweep:
    """One point a seed."""
    return scales.get("small").trunks("").sweep
