"""The main job: a small MoE trunk, then late-stage 2-bit QAT of its experts beside a full-precision control.

    python -m qatmoe.train --config configs/moe_2bit.py

Routed and shared experts and the FFN of the leading dense layer lie on Q2_0 (2.25 bits per weight). Hardware: 2 CPU
cores, 5 to 12 minutes; one GPU too (not run on one yet). Data: the bundled novels. Expected: the table in the README.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "moe_2bit"
    m = config.model
    m.dim, m.n_layers, m.n_dense_layers, m.dense_dim = 64, 3, 1, 128
    m.n_heads, m.n_kv_heads, m.head_dim = 2, 1, 32
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts = 8, 2, 64, 1
    m.routed_scale = 2.5
    m.init_std = 0.08
    m.capacity_factor = 1.5
    config.quant.experts = config.quant.shared = "q2_0"
    config.data.seq_len = 128
    config.train.batch_size = 16
    config.train.checkpoint_every = 250
    config.eval.every = 150
    config.optim.lr = 0.01
    config.optim.scale_lr = 3e-5
    config.optim.weight_decay = 0.0
    config.train.phases.trunk = phase(steps=900, warmup=50)
    config.train.phases.control = phase(start="trunk", steps=550, decay=550)
    config.train.phases.qat = phase(start="trunk", steps=550, decay=550, quantize=True)
    return config
