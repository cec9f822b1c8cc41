"""The router: which experts a token goes to, with what weight, and what keeps the load even. All in f32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qatmoe.config import ModelConfig
from qatmoe.mesh import over_rows
from qatmoe.model.layers import Param, einsum, weighted


class Routing(NamedTuple):
    """One layer's routing decision and its losses."""

    weights_Tk: jax.Array  # f32, factor on each chosen expert's output
    indices_Tk: jax.Array  # int32, chosen experts, best first
    probs_TE: jax.Array  # f32, scores normalised to sum 1 per token; the selection bias is not in them
    load_E: jax.Array  # f32, share of all T*k assignments that each expert got; sums to 1
    balance: jax.Array  # f32 scalar, 1 when the load is even, E when one expert takes everything (k=1)
    z: jax.Array  # f32 scalar


def router_params(cfg: ModelConfig, std: float) -> dict[str, Param]:
    """Declares the router matrix (E, D) and, with router_bias, the selection bias (E,)."""
    params = {"weight": Param((cfg.n_experts, cfg.dim), (None, None), 1, std)}
    if cfg.router_bias:
        params["bias"] = Param((cfg.n_experts,), (None,))
    return params


def route(params: dict, cfg: ModelConfig, x_TD: jax.Array, choices_Tk: jax.Array | None = None) -> Routing:
    """Chooses top_k experts per token, or takes the given choices; the weights are always from the token's own scores.

    "softmax": scores are softmax(logits) (Qwen3-MoE, OLMoE). "sigmoid": scores are sigmoid(logits), each expert on its
    own (DeepSeek-V3 eq. 15, GLM-4.5). The bias is added for the selection only and gets no gradient; the weights are
    the chosen experts' own scores, renormalised to sum 1 with norm_topk, times routed_scale.

    balance is E * sum_i f_i P_i over the tokens of one call: a micro-batch, on all devices. f is the load and P the
    mean score normalised per token (Switch Transformer eq. 4; DeepSeek-V3 eq. 17-20). z is the mean of
    logsumexp(logits)^2 (ST-MoE eq. 5).
    """
    # In f32 whatever cfg.dtype is: rounded operands would flip close choices.
    logits_TE = weighted(einsum("td,ed->te", x_TD.astype(jnp.float32), params["weight"].astype(jnp.float32)))
    if cfg.router == "softmax":
        scores_TE = probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    else:
        scores_TE = jax.nn.sigmoid(logits_TE)
        probs_TE = scores_TE / (jnp.sum(scores_TE, axis=-1, keepdims=True) + 1e-20)

    selection_TE = jax.lax.stop_gradient(scores_TE)
    if cfg.router_bias:
        selection_TE += jax.lax.stop_gradient(params["bias"])
    indices_Tk = _top_k(selection_TE, cfg.top_k) if choices_Tk is None else choices_Tk
    # A masked sum and not a gather: the gradient of a gather is a scatter, slow on GPU and TPU.
    chosen_TkE = indices_Tk[..., None] == jnp.arange(cfg.n_experts)
    weights_Tk = jnp.sum(jnp.where(chosen_TkE, scores_TE[:, None, :], 0.0), axis=-1)
    if cfg.norm_topk:
        weights_Tk /= jnp.sum(weights_Tk, axis=-1, keepdims=True) + 1e-20

    load_E = jnp.mean(chosen_TkE, axis=(0, 1), dtype=jnp.float32)
    return Routing(
        weights_Tk=weights_Tk * cfg.routed_scale,
        indices_Tk=indices_Tk,
        probs_TE=probs_TE,
        load_E=load_E,
        balance=cfg.n_experts * jnp.sum(load_E * jnp.mean(probs_TE, axis=0)),
        z=jnp.mean(jnp.square(jax.nn.logsumexp(logits_TE, axis=-1))),
    )


def _top_k(scores_TE: jax.Array, k: int) -> jax.Array:
    """The k best experts of each token, best first. On its own device: XLA's partitioner would gather all scores."""
    return over_rows(lambda scores_TE, _: jax.lax.top_k(scores_TE, k)[1], scores_TE)


def update_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Moves the selection bias towards an even load: up by rate where load is below its mean, down where above.

    bias and load are (..., E), f32. Auxiliary-loss-free balancing (Wang et al. 2024; DeepSeek-V3 section 2.1.2).
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
