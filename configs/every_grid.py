"""A small model that every grid fits: rows of 256, and Qwen3-MoE's shape, whose scale tensors (NVFP4) llama.cpp reads.

    python -m qatmoe.train --config configs/every_grid.py --config.quant.experts=q3_k --config.quant.attention=q3_k

Used by experiments/deploy. Hardware: 2 CPU cores, a minute and a half. Data: the bundled novels.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "every_grid"
    m = config.model
    m.dim, m.n_layers, m.n_dense_layers = 256, 2, 0
    m.n_heads, m.n_kv_heads, m.head_dim = 8, 4, 32
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 4, 2, 256, 0, 0
    m.router, m.router_bias, m.rotary_fraction = "softmax", False, 1.0
    config.quant.experts = config.quant.attention = "q2_0"
    config.data.seq_len = 128
    config.train.batch_size = 8
    config.train.checkpoint_every = 300
    config.eval.every = 0
    config.eval.final_batches = 32
    config.optim.lr = 3e-3
    config.train.phases.trunk = phase(steps=400, warmup=50)
    config.train.phases.qat = phase(start="trunk", steps=80, decay=80, quantize=True)
    return config
