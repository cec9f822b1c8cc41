"""One QAT branch of a finished trunk, and nothing else: for other grids, scales and losses beside the main job's.

    python -m qatmoe.train --config configs/moe_2bit.py
    python -m qatmoe.train --config configs/moe_2bit_branch.py --config.init_from=runs/moe_2bit \
        --config.quant.experts=mxfp4 --config.quant.shared=mxfp4 --workdir runs/mxfp4
    python -m qatmoe.evaluate --run runs/mxfp4 --reference runs/moe_2bit:control

Hardware: 2 CPU cores, under 2 minutes; one GPU too (not tried). Data: the bundled novels, from where the trunk stopped.
"""

from configs import moe_2bit


def get_config():
    config = moe_2bit.get_config()
    config.name = "moe_2bit_branch"
    del config.train.phases["control"]
    return config
