"""The main job with ternary experts (BitNet's levels, deployed as Q2_0).

    python -m qatmoe.train --config configs/moe_ternary.py

Hardware: 2 CPU cores, 5 to 12 minutes; one GPU too (not run on one yet). Data: the bundled novels.
"""

from configs import moe_2bit


def get_config():
    config = moe_2bit.get_config()
    config.name = "moe_ternary"
    config.quant.experts = config.quant.shared = "ternary"
    return config
