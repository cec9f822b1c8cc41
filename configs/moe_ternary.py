"""The main job with ternary experts (BitNet's levels, deployed as Q2_0).

    python -m qatmoe.train --config configs/moe_ternary.py

Hardware: 2 CPU cores, under 5 minutes; any GPU. Data: the bundled novels. Expected: the README's table.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "moe_ternary"
    config.quant.experts = "ternary"
    config.train.phases.trunk = phase(steps=600, warmup=30)
    config.train.phases.control = phase(start="trunk", steps=300, decay=300)
    config.train.phases.qat = phase(start="trunk", steps=300, decay=300, quantize=True)
    return config
