"""One QAT branch of a finished trunk of configs/h100_study.py, and nothing else.

    python -m qatmoe.train --config configs/h100_study_branch.py --config.init_from=RUN --config.quant.experts=mxfp4 ...

Hardware: one H100. Data: the trunk's, from where it stopped. experiments/scales.py names the runs that use it.
"""

from configs import h100_study


def get_config():
    config = h100_study.get_config()
    config.name = "h100_study_branch"
    del config.train.phases["control"]
    return config
