"""GLM-4.5-Air with its MTP module: 2-bit QAT of all its experts (Q2_0, learned scales) beside a full-precision control.

    python -m qatmoe.import_hf models/GLM-4.5-Air --out runs/glm_air
    python -m qatmoe.train --config configs/glm_4_5_air.py --config.data.source=TEXT \
        --config.init_from=runs/glm_air --config.data.tokenizer=runs/glm_air/tokenizer.json

Hardware: a TPU v5p slice of 256 chips (4x8x8), one sequence of 4,096 tokens a chip. Compiled for it, run on none:

    python -m qatmoe.train --config configs/glm_4_5_air.py --compile_only --topology v5p:4x8x8

Memory and the least time of a step: experiments/scaling. On another number of chips set train.batch_size to it (or a
multiple), and train.loss_chunk to 1,024 times it.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "glm_4_5_air"
    m = config.model
    m.vocab_size, m.dim, m.n_layers, m.n_dense_layers = 151_552, 4096, 46, 1
    m.n_heads, m.n_kv_heads, m.head_dim = 96, 8, 128
    m.dense_dim, m.qk_norm, m.qkv_bias = 10_944, "none", True
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 128, 8, 1408, 1, 1
    m.rope_theta = 1e6
    m.capacity_factor = 1.25
    m.dtype, m.remat = "bfloat16", "full"
    config.quant.shared, config.quant.mtp = "q2_0", "same"
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, -1, 8
    config.data.seq_len = 4096
    config.train.batch_size = 256
    config.train.bias_rate = 0.0  # the model's router is balanced: its selection biases stay
    config.train.loss_chunk = 262_144
    config.optim.lr, config.optim.scale_lr = 1e-5, 1e-6
    config.train.phases.trunk = phase(steps=1)  # the imported weights take its place
    config.train.phases.control = phase(start="trunk", steps=1000, warmup=50, decay=500)
    config.train.phases.qat = phase(start="trunk", steps=1000, warmup=50, decay=500, quantize=True)
    return config
