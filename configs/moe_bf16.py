"""The control alone: the trunk and its decay, computed in bfloat16, nothing quantized.

    python -m qatmoe.train --config configs/moe_bf16.py

Hardware: 2 CPU cores, 5 to 12 minutes; one GPU too (not tried). Data: the bundled novels. Expected: the control's
loss of configs/moe_2bit.py, within the noise of seeds.
"""

from configs import moe_2bit


def get_config():
    config = moe_2bit.get_config()
    config.name = "moe_bf16"
    config.model.dtype = "bfloat16"
    config.quant.experts = config.quant.shared = "none"
    del config.train.phases.qat
    return config
