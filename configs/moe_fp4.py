"""The main job with FP4 experts (MXFP4, the format of the experts of gpt-oss and DeepSeek-V4).

    python -m qatmoe.train --config configs/moe_fp4.py

Hardware: 2 CPU cores, 5 to 12 minutes; one GPU too (not run on one yet). Data: the bundled novels.
"""

from configs import moe_2bit


def get_config():
    config = moe_2bit.get_config()
    config.name = "moe_fp4"
    config.quant.experts = config.quant.shared = "mxfp4"
    return config
