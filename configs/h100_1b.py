"""A 1.3B-parameter MoE of the Qwen3-MoE shape (64 experts, 8 active) in 2 bits on one 80 GB GPU.

    python -m qatmoe.train --config configs/h100_1b.py --config.data.source=TEXT

TEXT: your files (README, "Your own run"); the tokenizer is trained on them. The bundled novels are far too little
text for this model and only show that it runs. Hardware: one H100; compiled for it (experiments/throughput), not run
on one yet. Watch the share of dropped rows in TensorBoard; if it does not fall below 0.1 %, raise
model.capacity_factor.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "h100_1b"
    m = config.model
    m.vocab_size, m.dim, m.n_layers, m.n_dense_layers = 32768, 1024, 12, 0
    m.n_heads, m.n_kv_heads, m.head_dim = 16, 8, 64
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 64, 8, 512, 0, 0
    m.tie_embeddings = True
    m.router, m.router_bias, m.rotary_fraction = "softmax", False, 1.0  # Qwen3-MoE: deploys as qwen3moe
    m.capacity_factor = 1.125
    m.expert_block = 256
    m.dtype = "bfloat16"
    m.scan_layers = False  # unrolled layers are much faster than scanned ones on a GPU
    config.data.seq_len = 2048
    config.data.tokenizer = "train"
    config.train.batch_size = 8
    config.train.loss_chunk = 2048
    config.optim.lr = 6e-4
    config.optim.moments_dtype = "bfloat16"  # the first ones; 5 GB less to read and write in every step
    config.train.phases.trunk = phase(steps=20_000, warmup=500)
    config.train.phases.control = phase(start="trunk", steps=5_000, decay=5_000)
    config.train.phases.qat = phase(start="trunk", steps=5_000, decay=5_000, quantize=True)
    return config
