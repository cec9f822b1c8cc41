r"""One more QAT branch of smollm2_moe_2bit's trunk, which learns from the same control.

    python -m qatmoe.train --config configs/smollm2_moe_2bit_branch.py --workdir runs/smollm2_moe_2bit_router \
        --config.train.phases.qat.freeze=

Needs smollm2_moe_2bit's run, finished. Hardware: 2 CPU cores and 16 GB of memory, half an hour. Results:
experiments/upcycled.
"""

from configs import smollm2_moe_2bit


def get_config():
    config = smollm2_moe_2bit.get_config()
    config.name = "smollm2_moe_2bit_branch"
    del config.train.phases.control
    config.train.phases.qat.teacher = "runs/smollm2_moe_2bit:control"
    return config
