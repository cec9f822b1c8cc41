"""The main job with 4-bit experts (Q4_0).

    python -m qatmoe.train --config configs/moe_4bit.py

Hardware: 2 CPU cores, under 5 minutes; any GPU. Data: the bundled novels. Expected: the README's table.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "moe_4bit"
    config.quant.experts = "q4_0"
    config.train.phases.trunk = phase(steps=600, warmup=30)
    config.train.phases.control = phase(start="trunk", steps=300, decay=300)
    config.train.phases.qat = phase(start="trunk", steps=300, decay=300, quantize=True)
    return config
