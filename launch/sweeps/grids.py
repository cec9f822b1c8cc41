"""The main job on every 2- to 4-bit grid that its rows of 64 fit, learned scales beside dynamic ones, three seeds.

    python -m launch.sweep launch/sweeps/grids.py --slots 2

Hardware: any, as many devices a run as divide 16; 21 times what configs/moe_2bit.py takes.
"""

from launch.algebra import chain, product, values, zip_
from launch.points import Sweep

GRIDS = ["q2_0", "ternary", "mxfp4", "nvfp4", "q4_0", "iq4_nl"]


def get_sweep() -> Sweep:
    """The points."""
    learned = zip_(values("quant.experts", GRIDS), values("quant.shared", GRIDS))
    dynamic = product(
        zip_(values("quant.experts", ["q2_0"]), values("quant.shared", ["q2_0"])),
        values("quant.scale", ["dynamic"]),
    )
    points = product(chain(learned, dynamic), values("train.seed", [0, 1, 2]))
    return Sweep(name="grids", config="configs/moe_2bit.py", points=points)
