"""Multi-token prediction (DeepSeek-V3 section 2.2, GLM-4.5): extra modules that guess further ahead.

Module i = 0, 1, ... takes the state at t and the embedding of token t+1+i, and predicts token t+2+i.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qatmoe.config import ModelConfig
from qatmoe.model.layers import Param, linear, norm_param, rms_norm


def mtp_params(cfg: ModelConfig, std: float, block: dict) -> dict:
    """Declares one module around a decoder block. Embedding and head are the trunk's."""
    return {
        "enorm": norm_param(cfg.dim),
        "hnorm": norm_param(cfg.dim),
        "eh_proj": Param((cfg.dim, 2 * cfg.dim), (None, None), 0, std),
        "norm": norm_param(cfg.dim),
        "block": block,
    }


def mtp_input(params: dict, cfg: ModelConfig, hidden_BLD: jax.Array, embedded_BLD: jax.Array) -> jax.Array:
    """eh_proj(concat(enorm(embedding of the next token), hnorm(hidden))), (B, L, D) (DeepSeek-V3 eq. 21)."""
    embedded_BLD = rms_norm(embedded_BLD, params["enorm"], cfg.norm_eps)
    hidden_BLD = rms_norm(hidden_BLD, params["hnorm"], cfg.norm_eps)
    return linear(jnp.concatenate([embedded_BLD, hidden_BLD], axis=-1), params["eh_proj"])


def mtp_module(
    params: dict,
    cfg: ModelConfig,
    hidden_BLD: jax.Array,
    embedded_BLD: jax.Array,
    block: Callable[[dict, jax.Array], tuple[jax.Array, dict]],
) -> tuple[jax.Array, dict]:
    """One module: input projection, decoder block, norm.

    hidden_BLD is the state that goes to the head: after the trunk's final norm for module 0, after the previous
    module's `norm` for the others. The DeepSeek-V3 report does not say on which side of the norm it is taken; this is
    the side on which llama.cpp feeds a deployed glm4moe module.
    embedded_BLD at t is the embedding of token t+1+i.

    Returns:
      (B, L, D) after the module's own norm, ready for the head, and the block's auxiliary values.
    """
    x_BLD, aux = block(params["block"], mtp_input(params, cfg, hidden_BLD, embedded_BLD))
    return rms_norm(x_BLD, params["norm"], cfg.norm_eps), aux
