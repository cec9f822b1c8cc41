"""The trunk of the studies on one H100: 135M parameters, 32 experts, 4 active; trunk, control and 2-bit QAT branch.

    python -m launch.study experiments/late_qat_2bit/study.py --scale h100 --corpus CORPUS

CORPUS: a folder with train*.jsonl* and heldout/{novel,wiki,techdoc,code}.jsonl (experiments/README.md); the tokenizer
is trained on the text. 315 million tokens of trunk, 63 million of a branch. Hardware: one H100; not run on one yet.
"""

from qatmoe.config import default_config, phase


def get_config():
    config = default_config()
    config.name = "h100_study"
    m = config.model
    m.vocab_size, m.dim, m.n_layers, m.n_dense_layers, m.dense_dim = 8192, 512, 9, 1, 1024
    m.n_heads, m.n_kv_heads, m.head_dim = 8, 4, 64
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 32, 4, 256, 1, 1
    m.routed_scale = 2.5
    m.capacity_factor = 1.25
    m.expert_block = 256
    m.dtype = "bfloat16"
    m.scan_layers = False  # unrolled layers are much faster than scanned ones on a GPU
    config.quant.experts = config.quant.shared = "q2_0"
    config.data.seq_len = 512
    config.data.tokenizer = "train"
    config.train.batch_size = 128
    config.train.loss_chunk = 16_384
    config.train.tensorboard = False
    config.eval.every = 240
    config.optim.lr = 3e-3
    config.optim.scale_lr = 3e-5
    config.optim.weight_decay = 0.0
    config.train.phases.trunk = phase(steps=4_800, warmup=200)
    config.train.phases.control = phase(start="trunk", steps=960, decay=960)
    config.train.phases.qat = phase(start="trunk", steps=960, decay=960, quantize=True)
    return config
