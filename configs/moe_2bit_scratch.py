"""On the grid from the first step, for as many tokens as the main job's trunk and branch together: ternary by default.

    python -m qatmoe.train --config configs/moe_2bit_scratch.py

Hardware: 2 CPU cores, 4 minutes; one GPU too (not tried). Data: the bundled novels. Its rate and schedule are the main
job's, so it is beside that job's QAT what training from scratch is beside late QAT (experiments/iso_memory).
"""

from configs import moe_2bit
from qatmoe.config import phase


def get_config():
    config = from_scratch(moe_2bit.get_config())
    config.name = "moe_2bit_scratch"
    return config


def from_scratch(config):
    """The config of a trunk and its branches, as one ternary phase of as many steps, with their warmup and decay."""
    config.quant.experts = config.quant.shared = "ternary"
    trunk, branch = config.train.phases.trunk, config.train.phases.qat
    config.train.phases = {
        "qat": phase(steps=trunk.steps + branch.steps, warmup=trunk.warmup, decay=branch.decay, quantize=True)
    }
    return config
