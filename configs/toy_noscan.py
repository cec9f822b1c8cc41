"""The toy with its layers unrolled: with JAX_DISABLE_JIT=1 every array of a step can be printed.

    python -m qatmoe.train --config configs/toy_noscan.py

Hardware: any, up to 4 devices. Data: the bundled novels. Expected: the losses of configs/toy.py up to rounding.
"""

from configs import toy


def get_config():
    config = toy.get_config()
    config.name = "toy_noscan"
    config.model.scan_layers = False
    return config
