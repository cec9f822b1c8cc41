"""On the grid from the first step, for as many tokens as trunk and branch of configs/h100_study.py: ternary by default.

    python -m qatmoe.train --config configs/h100_study_scratch.py --config.data.source=TEXT

Hardware: one H100.
"""

from configs import h100_study, moe_2bit_scratch


def get_config():
    config = moe_2bit_scratch.from_scratch(h100_study.get_config())
    config.name = "h100_study_scratch"
    return config
