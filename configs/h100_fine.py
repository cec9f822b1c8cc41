"""Fine-grained experts, Qwen3-30B-A3B's layer (128 experts of width 768, 8 active), 5 layers deep.

    python -m qatmoe.train --config configs/h100_fine.py --config.data.source=TEXT

TEXT: your files (README, "Your own run"). Hardware: one H100; compiled for it, 46 GiB at batch 8, and 61.5
with 7 layers (experiments/throughput), not run on one yet.
"""

from configs import h100_1b


def get_config():
    config = h100_1b.get_config()
    config.name = "h100_fine"
    m = config.model
    m.dim, m.n_layers = 2048, 5
    m.n_heads, m.n_kv_heads, m.head_dim = 32, 4, 128
    m.n_experts, m.top_k, m.expert_dim = 128, 8, 768
    return config
