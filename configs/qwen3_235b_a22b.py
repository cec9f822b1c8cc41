"""Qwen3-235B-A22B: 2-bit QAT of its experts (Q2_0, learned scales) beside a full-precision control.

    python -m qatmoe.import_hf models/Qwen3-235B-A22B --out runs/qwen3_235b
    python -m qatmoe.train --config configs/qwen3_235b_a22b.py --config.data.source=TEXT \
        --config.init_from=runs/qwen3_235b --config.data.tokenizer=runs/qwen3_235b/tokenizer.json

Hardware: a TPU v5p slice of 512 chips (8x8x8), one sequence of 4,096 tokens a chip. Compiled for it, run on none:

    python -m qatmoe.train --config configs/qwen3_235b_a22b.py --compile_only --topology v5p:8x8x8

Memory and the least time of a step: experiments/scaling. On another number of chips set train.batch_size to it (or a
multiple), and train.loss_chunk to 1,024 times it.
"""

from configs import qwen3_30b_a3b


def get_config():
    config = qwen3_30b_a3b.get_config()
    config.name = "qwen3_235b_a22b"
    m = config.model
    m.dim, m.n_layers, m.n_heads, m.expert_dim = 4096, 94, 64, 1536
    config.train.batch_size = 512
    config.train.loss_chunk = 524_288
    return config
