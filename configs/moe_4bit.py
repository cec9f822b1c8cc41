"""The main job with 4-bit experts (Q4_0).

    python -m qatmoe.train --config configs/moe_4bit.py

Hardware: 2 CPU cores, 5 to 12 minutes; one GPU too (not run on one yet). Data: the bundled novels.
"""

from configs import moe_2bit


def get_config():
    config = moe_2bit.get_config()
    config.name = "moe_4bit"
    config.quant.experts = config.quant.shared = "q4_0"
    return config
