"""Qwen3-235B-A22B: 2-bit QAT of its experts (Q2_0, learned scales) beside a full-precision control.

    python -m qatmoe.import_hf models/Qwen3-235B-A22B --out runs/qwen3_235b
    python -m qatmoe.train --config configs/qwen3_235b_a22b.py --config.data.source=TEXT \
        --config.init_from=runs/qwen3_235b --config.data.tokenizer=runs/qwen3_235b/tokenizer.json

Hardware: a TPU v5p slice of 512 chips (8x8x8), one sequence of 4,096 tokens a chip. Compiled for it, run on none:

    python -m qatmoe.train --config configs/qwen3_235b_a22b.py --compile_only --topology v5p:8x8x8

Memory and the least time of a step: experiments/scaling. On another number of chips set train.batch_size to it (or a
multiple), and train.loss_chunk to 1,024 times it.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "qwen3_235b_a22b"
    m = config.model
    m.vocab_size, m.dim, m.n_layers, m.n_dense_layers = 151_936, 4096, 94, 0
    m.n_heads, m.n_kv_heads, m.head_dim = 64, 4, 128
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 128, 8, 1536, 0, 0
    m.router, m.router_bias, m.rotary_fraction = "softmax", False, 1.0
    m.rope_theta, m.norm_eps = 1e6, 1e-6
    m.capacity_factor = 1.25
    m.dtype, m.remat = "bfloat16", "full"
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, -1, 8
    config.data.seq_len = 4096
    config.train.batch_size = 512
    config.train.loss_chunk = 524_288
    config.optim.lr, config.optim.scale_lr = 1e-5, 1e-6
    config.train.phases.trunk = phase(steps=1)  # the imported weights take its place
    config.train.phases.control = phase(start="trunk", steps=1000, warmup=50, decay=500)
    config.train.phases.qat = phase(start="trunk", steps=1000, warmup=50, decay=500, quantize=True)
    return config
