"""The control alone, computed in bfloat16: the trunk and its decay, nothing quantized.

    python -m qatmoe.train --config configs/moe_bf16.py

Hardware: any; on a CPU bfloat16 is about half as fast as the float32 that the other small configs compute in.
Data: the bundled novels. Expected: the control's loss of configs/moe_2bit.py, within the noise of seeds.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "moe_bf16"
    config.model.dtype = "bfloat16"
    config.quant.experts = "none"
    config.train.phases.trunk = phase(steps=600, warmup=30)
    config.train.phases.control = phase(start="trunk", steps=300, decay=300)
    return config
