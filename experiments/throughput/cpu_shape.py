"""The small shape that MaxText and qatmoe are timed at on a CPU: Mixtral's, 2 layers, 8 experts, 2 active."""

from qatmoe.config import default_config, phase


def get_config():
    """The config."""
    config = default_config()
    config.name = "cpu_shape"
    m = config.model
    m.vocab_size, m.dim, m.n_layers, m.n_dense_layers = 512, 128, 2, 0
    m.n_heads, m.n_kv_heads, m.head_dim, m.qk_norm, m.rotary_fraction = 4, 2, 32, "none", 1.0
    m.n_experts, m.top_k, m.expert_dim, m.n_shared_experts, m.n_mtp = 8, 2, 256, 0, 0
    m.router, m.router_bias, m.capacity_factor = "softmax", False, 1.25
    m.scan_layers = False  # a little faster on a CPU too
    config.data.seq_len = 128
    config.train.batch_size = 8
    config.train.phases.trunk = phase(steps=100)
    return config
