"""On the grid from the first step, for as many tokens as trunk and branch of configs/h100_study.py: ternary by default.

    python -m qatmoe.train --config configs/h100_study_scratch.py --config.data.source=TEXT

Hardware: one H100.
"""

from configs import h100_study
from qatmoe.config import phase


def get_config():
    config = h100_study.get_config()
    config.name = "h100_study_scratch"
    config.quant.experts = config.quant.shared = "ternary"
    trunk, branch = config.train.phases.trunk, config.train.phases.qat
    config.train.phases = {
        "qat": phase(steps=trunk.steps + branch.steps, warmup=trunk.warmup, decay=branch.decay, quantize=True)
    }
    return config
