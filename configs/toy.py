"""Everything the main job does, in seconds: for a first look, for tests, and to check that a refactoring is one.

    python -m qatmoe.train --config configs/toy.py

Hardware: any, up to 4 devices. Data: the bundled novels. Expected: a finished table in under half a minute; the
losses mean nothing.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "toy"
    config.model.dim = 64
    config.model.n_layers = 3
    config.model.dense_dim = 128
    config.model.n_heads = 2
    config.model.n_kv_heads = 1
    config.model.n_experts = 4
    config.model.expert_dim = 64
    config.data.seq_len = 64
    config.train.batch_size = 4
    config.train.log_every = 5
    config.train.checkpoint_every = 10
    config.eval.every = 10
    config.eval.batches = 2
    config.eval.final_batches = 4
    config.train.phases.trunk = phase(steps=20, warmup=5)
    config.train.phases.control = phase(start="trunk", steps=20, decay=10)
    config.train.phases.qat = phase(start="trunk", steps=20, decay=10, quantize=True)
    return config
