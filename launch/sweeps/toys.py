"""Eight toy runs, to try the launcher with: two grids, two learning rates, two seeds.

    python -m launch.sweep launch/sweeps/toys.py --slots 2

Hardware: any, up to 4 devices a run; 8 times what configs/toy.py takes. The losses mean nothing.
"""

from launch.algebra import product, values
from launch.points import Sweep


def get_sweep() -> Sweep:
    """The points."""
    points = product(
        values("quant.experts", ["q2_0", "mxfp4"]),
        values("optim.lr", [0.002, 0.01]),
        values("train.seed", [0, 1]),
    )
    return Sweep(name="toys", config="configs/toy.py", points=points)
