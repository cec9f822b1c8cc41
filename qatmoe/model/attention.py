"""Causal grouped-query attention with rotary embedding, optional QK-norm and document masking.

Shapes: R query heads of one key/value head, H // K; Q their queries of all tokens, R * L.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qatmoe.config import ModelConfig
from qatmoe.mesh import fitted, spec
from qatmoe.model.cache import CacheType, round_kv, round_queries, turn_keys, turn_values
from qatmoe.model.layers import Param, apply_rope, einsum, linear, norm_param, rms_norm


def attention_params(cfg: ModelConfig, std: float, out_std: float) -> dict[str, Param]:
    """Declares the projections (out, in), their biases and the two norms where the config asks for them."""
    q_width, kv_width = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    params = {
        "q": Param((q_width, cfg.dim), ("heads", None), 0, std),
        "k": Param((kv_width, cfg.dim), ("kv_heads", None), 0, std),
        "v": Param((kv_width, cfg.dim), ("kv_heads", None), 0, std),
        "o": Param((cfg.dim, q_width), (None, "heads"), 0, out_std),
    }
    if cfg.qkv_bias:
        params |= {
            "q_bias": Param((q_width,), ("heads",)),
            "k_bias": Param((kv_width,), ("kv_heads",)),
            "v_bias": Param((kv_width,), ("kv_heads",)),
        }
    if cfg.qk_norm == "head":
        params |= {"q_norm": norm_param(cfg.head_dim), "k_norm": norm_param(cfg.head_dim)}
    if cfg.qk_norm == "full":
        params |= {"q_norm": norm_param(q_width), "k_norm": norm_param(kv_width)}
    return params


def attention(
    params: dict,
    cfg: ModelConfig,
    x_BLD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments_BL: jax.Array | None,
    cache: CacheType | None = None,
) -> jax.Array:
    """Self-attention of one block, (B, L, D) -> (B, L, D) in the dtype of x; scores and softmax in f32.

    rope: cosines and sines from `rope_angles`. segments_BL: int document ids; a token sees earlier tokens of its own
    document only. None means one document per row. cache: keys and values are read back from that type of cache.

    Raises:
      UserError: heads of that width do not fit the cache type.
    """
    q_BLHDh, k_BLKDh, v_BLKDh = queries_keys_values(params, cfg, x_BLD, rope, cache)
    if cache is not None:
        k_BLKDh, v_BLKDh = round_kv(cache, k_BLKDh, v_BLKDh)
    scale = cfg.head_dim**-0.5
    kernel = implementation(cfg, x_BLD.shape[1], jax.default_backend())
    if kernel == "splash":
        mixed_BLHDh = splash(q_BLHDh, k_BLKDh, v_BLKDh, segments_BL, scale)
    elif kernel == "cudnn":
        mask_B1LL = None if segments_BL is None else segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
        mixed_BLHDh = jax.nn.dot_product_attention(
            q_BLHDh, k_BLKDh, v_BLKDh, mask=mask_B1LL, is_causal=True, scale=scale, implementation="cudnn"
        )
    else:
        L = x_BLD.shape[1]
        seen_BLL = jnp.tril(jnp.ones((1, L, L), bool))
        if segments_BL is not None:
            seen_BLL &= segments_BL[:, :, None] == segments_BL[:, None, :]
        mixed_BLHDh = grouped(q_BLHDh, k_BLKDh, v_BLKDh, seen_BLL, scale)
    return output(params, mixed_BLHDh, cache)


def queries_keys_values(
    params: dict,
    cfg: ModelConfig,
    x_BLD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    cache: CacheType | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, L, H, Dh), keys and values (B, L, K, Dh) after norms and RoPE, as the cache wants them.

    Raises:
      UserError: heads of that width do not fit the cache type.
    """
    if cache is not None:
        cache.check(cfg.head_dim)
    B, L, _ = x_BLD.shape
    q_BLF, k_BLF, v_BLF = (_project(params, name, x_BLD) for name in "qkv")
    if cfg.qk_norm == "full":
        q_BLF = rms_norm(q_BLF, params["q_norm"], cfg.norm_eps)
        k_BLF = rms_norm(k_BLF, params["k_norm"], cfg.norm_eps)
    q_BLHDh = q_BLF.reshape(B, L, cfg.n_heads, cfg.head_dim)
    k_BLKDh = k_BLF.reshape(B, L, cfg.n_kv_heads, cfg.head_dim)
    v_BLKDh = v_BLF.reshape(B, L, cfg.n_kv_heads, cfg.head_dim)
    if cfg.qk_norm == "head":
        q_BLHDh = rms_norm(q_BLHDh, params["q_norm"], cfg.norm_eps)
        k_BLKDh = rms_norm(k_BLKDh, params["k_norm"], cfg.norm_eps)
    q_BLHDh, k_BLKDh = apply_rope(q_BLHDh, *rope), apply_rope(k_BLKDh, *rope)
    if cache is None:
        return q_BLHDh, k_BLKDh, v_BLKDh
    return round_queries(cache, q_BLHDh), turn_keys(cache, k_BLKDh), turn_values(cache, v_BLKDh)


def output(params: dict, mixed_BLHDh: jax.Array, cache: CacheType | None = None) -> jax.Array:
    """Mixed values (B, L, H, Dh), turned back, through the output projection -> (B, L, D)."""
    if cache is not None:
        mixed_BLHDh = turn_values(cache, mixed_BLHDh)
    return linear(mixed_BLHDh.reshape(*mixed_BLHDh.shape[:2], -1), params["o"])


def _project(params: dict, name: str, x_BLD: jax.Array) -> jax.Array:
    y_BLF = linear(x_BLD, params[name])
    return y_BLF + params[f"{name}_bias"].astype(y_BLF.dtype) if f"{name}_bias" in params else y_BLF


def grouped(q_BLHDh: jax.Array, k_BSKDh: jax.Array, v_BSKDh: jax.Array, seen_BLS: jax.Array, scale: float) -> jax.Array:
    """Attention of L queries to S keys as two batched matmuls over k/v heads, a group's queries in one matrix.

    seen_BLS: bool (B or 1, L, S), which keys a query sees. On a CPU this takes half the time of
    jax.nn.dot_product_attention, forward and backward, at the default sizes.
    """
    B, L, H, Dh = q_BLHDh.shape
    S, K = k_BSKDh.shape[1:3]
    q_BKQDh = q_BLHDh.reshape(B, L, K, H // K, Dh).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * L, Dh)
    k_BKSDh, v_BKSDh = k_BSKDh.swapaxes(1, 2), v_BSKDh.swapaxes(1, 2)
    scores_BKQS = scale * einsum("bkqd,bksd->bkqs", q_BKQDh, k_BKSDh, preferred_element_type=jnp.float32)
    scores_BKRLS = jnp.where(seen_BLS[:, None, None], scores_BKQS.reshape(B, K, H // K, L, S), -1e30)
    probs_BKQS = jax.nn.softmax(scores_BKRLS, axis=-1).astype(v_BKSDh.dtype).reshape(scores_BKQS.shape)
    mixed_BKQDh = einsum("bkqs,bksd->bkqd", probs_BKQS, v_BKSDh)
    return mixed_BKQDh.reshape(B, K, H // K, L, Dh).transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def splash(
    q_BLHDh: jax.Array,
    k_BLKDh: jax.Array,
    v_BLKDh: jax.Array,
    segments_BL: jax.Array | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by JAX's flash attention for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

    It keeps no scores and passes over blocks that the mask hides. (B, L, H, Dh) in the dtype of v; L a multiple of 128.
    Each device runs it on its own sequences and heads. interpret: run the kernel's arithmetic on any backend.
    """
    # Imported where a TPU's kernel is built: Pallas would make every command start later.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    L, K = k_BLKDh.shape[1:3]
    repeats = q_BLHDh.shape[2] // K
    block = next(size for size in (512, 256, 128) if L % size == 0)
    sizes = splash_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((L, L))] * repeats)

    def local(q_BLHDh: jax.Array, k_BLKDh: jax.Array, v_BLKDh: jax.Array, segments_BL: jax.Array) -> jax.Array:
        kernel = splash_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
        B, _, H, Dh = q_BLHDh.shape
        q_BKRLDh = (q_BLHDh * scale).reshape(B, L, H // repeats, repeats, Dh).transpose(0, 2, 3, 1, 4)
        of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        ids = splash_kernel.SegmentIds(segments_BL, segments_BL)
        mixed_BKRLDh = jax.vmap(of_heads)(q_BKRLDh, k_BLKDh.swapaxes(1, 2), v_BLKDh.swapaxes(1, 2), ids)
        return mixed_BKRLDh.transpose(0, 3, 1, 2, 4).reshape(q_BLHDh.shape)

    if segments_BL is None:
        segments_BL = jnp.zeros(q_BLHDh.shape[:2], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q_BLHDh, k_BLKDh, v_BLKDh, segments_BL)
    heads = fitted(mesh, spec(("batch", None, "kv_heads", None)), k_BLKDh.shape)
    rows = fitted(mesh, spec(("batch", None)), segments_BL.shape)
    on_devices = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return on_devices(q_BLHDh, k_BLKDh, v_BLKDh, segments_BL)


def portable(cfg: ModelConfig) -> ModelConfig:
    """A model for other machines and lengths than it was trained on: with the kernel that fits there.

    Plain attention stays where it was asked for: a machine's other kernels may be what did not work.
    """
    return dataclasses.replace(cfg, attention="xla" if cfg.attention == "xla" else "auto")


def fits_splash(cfg: ModelConfig, length: int) -> bool:
    """Whether `splash` takes them: heads and sequences by 128, and 16-bit inputs, as it multiplies others rounded."""
    return cfg.dtype == "bfloat16" and cfg.head_dim % 128 == 0 and length % 128 == 0


def fits_cudnn(cfg: ModelConfig, length: int) -> bool:
    """Whether cuDNN's flash attention takes them: 16-bit inputs, head dims 8..128 by 8, and even lengths."""
    return cfg.dtype == "bfloat16" and cfg.head_dim % 8 == 0 and cfg.head_dim <= 128 and length % 2 == 0


def implementation(cfg: ModelConfig, length: int, platform: str) -> str:
    """Which kernel runs."""
    if cfg.attention != "auto":
        return cfg.attention
    if platform == "tpu":
        return "splash" if fits_splash(cfg, length) else "xla"
    return "cudnn" if platform == "gpu" and fits_cudnn(cfg, length) else "xla"
