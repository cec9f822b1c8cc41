"""The main job with the best recipe of late 2-bit QAT found so far: it also learns from the finished control.

    python -m qatmoe.train --config configs/moe_2bit_taught.py

Half of the loss is the KL to the control's scores, at twice the rate (experiments/late_qat_2bit). Hardware: 2 CPU
cores, 6 to 14 minutes; one GPU too (not run on one yet). Data: the bundled novels.
"""

from configs import moe_2bit


def get_config():
    config = moe_2bit.get_config()
    config.name = "moe_2bit_taught"
    qat = config.train.phases.qat
    qat.teacher, qat.distill, qat.lr = "control", 0.5, 0.02
    return config
