"""The forward pass as llama.cpp computes it on a CPU, with its rounding of activations.

ggml multiplies a quantized weight with activations that it first rounds to 8 bits, in blocks along the contraction axis
(ggml-cpu.c: `vec_dot_type`):

    Q8_0  per 32: d = f16(max|x| / 127), q = round(x 127 / max|x|)           Q2_0, Q4_0, IQ4_NL, MXFP4, NVFP4, Q8_0
    Q8_K  per 256: q = min(round(-127 x / m), 127), m the x of largest |x|   TQ1_0, TQ2_0, Q2_K, Q3_K
    F16, BF16                                                                weights of that type

With these roundings the two programs differ by float rounding alone, except where that moves a value across a rounding
boundary. Written for clarity: every expert sees every token; the model is `model.transformer`'s.

Every matmul here also reports a statistic of its inputs: their squares, of which llama.cpp's importance matrices
(imatrix) are made, or all their products.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qatmoe.config import ModelConfig
from qatmoe.model.layers import apply_rope, halves, rms_norm, rope_angles, swiglu
from qatmoe.model.mtp import mtp_input
from qatmoe.model.router import route
from qatmoe.tree import leaves_by_path

Tree = Mapping[str, Any]
Kinds = Mapping[str, str]  # path within a block, or "embed", "head" -> GGUF type
Statistic = tuple[jax.Array, jax.Array]  # sum over tokens of what inputs give, and how many tokens these are
Measure = Callable[[jax.Array, jax.Array | None], Statistic]  # of inputs (L, I) of the chosen tokens (L,), or of all
Seen = dict[str, Statistic]  # path of a weight -> statistic of its inputs; of routed experts with a leading E

_Q8_K = ("TQ1_0", "TQ2_0", "Q2_K", "Q3_K")


def round_activations(x: jax.Array, kind: str) -> jax.Array:
    """x (..., I) f32 as a weight of a type meets it, f32."""
    if kind == "F32":
        return x
    if kind in ("F16", "BF16"):
        return x.astype(jnp.float16 if kind == "F16" else jnp.bfloat16).astype(jnp.float32)
    blocks = x.reshape(*x.shape[:-1], -1, 256 if kind in _Q8_K else 32)
    size = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    safe = jnp.where(size == 0, 1.0, size)
    if kind in _Q8_K:
        first = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
        inverse = -127.0 / jnp.where(size == 0, 1.0, jnp.take_along_axis(blocks, first, axis=-1))
        out = jnp.minimum(jnp.rint(inverse * blocks), 127.0) * (1.0 / inverse)
    else:
        out = jnp.rint(blocks * (127.0 / safe)) * (size / 127.0).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(size == 0, 0.0, out).reshape(x.shape)


def logits(params: Tree, kinds: Kinds, cfg: ModelConfig, tokens_L: jax.Array) -> jax.Array:
    """Scores (L, V) f32 of the next token.

    Args:
      params: unrolled layout, f32, as decoded from the file.
      kinds: {path without a layer number: type} of every weight; all "F32" leaves activations as they are.
    """
    x_LD, _ = _trunk(params, kinds, cfg, tokens_L)
    name = "embed" if cfg.tie_embeddings else "head"
    return _head(params["norm"], params[name], kinds[name], cfg, x_LD)


def squared_inputs(params: Tree, cfg: ModelConfig, tokens_L: jax.Array) -> Seen:
    """What each matmul of the trunk and of the MTP modules was given, with activations as they are.

    Routed experts: sums (E, I) over the tokens that chose the expert, and their number (E,); the inputs of `down` are
    the expert's hidden activations before the router's weight. Others: (I,) and (). The head's, which a tied embedding
    shares, is the trunk's last state. An MTP module sees the tokens that have a successor.

    Args:
      params: unrolled layout, f32.
    """
    exact = exact_kinds(params)
    x_LD, seen = _trunk(params, exact, cfg, tokens_L)
    hidden_LD = rms_norm(x_LD, params["norm"], cfg.norm_eps)
    seen["embed" if cfg.tie_embeddings else "head"] = squares(hidden_LD, None)
    for i in range(cfg.n_mtp):
        module = params["mtp"][str(i)]
        embedded_LD = params["embed"][tokens_L[1 + i :]]
        x_LD = mtp_input(module, cfg, hidden_LD[: len(embedded_LD)], embedded_LD)
        x_LD, own = block(module["block"], below(exact, "mtp/block"), cfg, x_LD)
        hidden_LD = rms_norm(x_LD, module["norm"], cfg.norm_eps)
        seen |= {f"mtp/{i}/block/{name}": own[name] for name in own}
    return seen


def exact_kinds(params: Tree) -> Kinds:
    """Kinds that leave activations as they are."""
    paths = (path.split("/") for path in leaves_by_path(params))
    return {"/".join(key for key in path if not key.isdigit()): "F32" for path in paths}


def _trunk(params: Tree, kinds: Kinds, cfg: ModelConfig, tokens_L: jax.Array) -> tuple[jax.Array, Seen]:
    """The state (L, D) before the last norm."""
    x_LD = params["embed"][tokens_L]
    seen: Seen = {}
    for stack in ("dense_layers", "layers"):
        for i in range(len(params.get(stack, {}))):
            x_LD, own = block(params[stack][str(i)], below(kinds, stack), cfg, x_LD)
            seen |= {f"{stack}/{i}/{name}": own[name] for name in own}
    return x_LD, seen


def below(kinds: Kinds, prefix: str) -> tuple[tuple[str, str], ...]:
    """The kinds of a block, as jit wants them: hashable."""
    return tuple(sorted((p.removeprefix(f"{prefix}/"), k) for p, k in kinds.items() if p.startswith(f"{prefix}/")))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _head(norm: jax.Array, weight: jax.Array, kind: str, cfg: ModelConfig, x_LD: jax.Array) -> jax.Array:
    return _linear(rms_norm(x_LD, norm, cfg.norm_eps), weight, kind)


def squares(x_LI: jax.Array, chosen_L: jax.Array | None) -> Statistic:
    """Sums (I,) of squared inputs over tokens, and how many these are, ()."""
    chosen_L = _chosen(x_LI, chosen_L)
    return jnp.sum(jnp.square(x_LI) * chosen_L[:, None], axis=0), jnp.sum(chosen_L)


def products(x_LI: jax.Array, chosen_L: jax.Array | None) -> Statistic:
    """Sums (I, I) of products of inputs over tokens, and how many these are, ()."""
    chosen_L = _chosen(x_LI, chosen_L)
    return _matmul("li,lj->ij", x_LI * chosen_L[:, None], x_LI), jnp.sum(chosen_L)


def _chosen(x_LI: jax.Array, chosen_L: jax.Array | None) -> jax.Array:
    return jnp.ones(len(x_LI)) if chosen_L is None else chosen_L.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def block(
    layer: Tree, own: tuple[tuple[str, str], ...], cfg: ModelConfig, x_LD: jax.Array, measure: Measure = squares
) -> tuple[jax.Array, Seen]:
    """One layer, (L, D) -> (L, D), and what `measure` makes of the inputs of each of its weights.

    Args:
      layer: its weights, f32.
      own: their kinds, from `below`.
      measure: `squares` or `products`.
    """
    kinds = dict(own)
    y_LD, seen = _attention(layer["attn"], kinds, cfg, rms_norm(x_LD, layer["attn_norm"], cfg.norm_eps), measure)
    x_LD += y_LD
    normed_LD = rms_norm(x_LD, layer["ffn_norm"], cfg.norm_eps)
    if "ffn" in layer:
        y_LD, also = _ffn(layer["ffn"], "ffn", kinds, cfg, normed_LD, measure)
    else:
        y_LD, also = _experts(layer, kinds, cfg, normed_LD, measure)
    if "shared" in layer:
        shared_LD, shared = _ffn(layer["shared"], "shared", kinds, cfg, normed_LD, measure)
        y_LD, also = y_LD + shared_LD, also | shared
    return x_LD + y_LD, seen | also


def _matmul(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _linear(x: jax.Array, weight: jax.Array, kind: str) -> jax.Array:
    return _matmul("...i,oi->...o", round_activations(x, kind), weight)


def _ffn(
    params: Tree, name: str, kinds: Kinds, cfg: ModelConfig, x_LD: jax.Array, measure: Measure
) -> tuple[jax.Array, Seen]:
    hidden_LF = swiglu(halves(_linear(x_LD, params["gate_up"], kinds[f"{name}/gate_up"])), cfg.swiglu_limit)
    seen = {f"{name}/gate_up": measure(x_LD, None), f"{name}/down": measure(hidden_LF, None)}
    return _linear(hidden_LF, params["down"], kinds[f"{name}/down"]), seen


def _attention(
    params: Tree, kinds: Kinds, cfg: ModelConfig, x_LD: jax.Array, measure: Measure
) -> tuple[jax.Array, Seen]:
    L = len(x_LD)
    q_LF, k_LF, v_LF = (_linear(x_LD, params[n], kinds[f"attn/{n}"]) + params.get(f"{n}_bias", 0.0) for n in "qkv")
    if cfg.qk_norm == "full":
        q_LF, k_LF = (rms_norm(a, params[f"{n}_norm"], cfg.norm_eps) for n, a in (("q", q_LF), ("k", k_LF)))
    q_LHDh = q_LF.reshape(1, L, cfg.n_heads, cfg.head_dim)
    k_LKDh, v_LKDh = (a.reshape(1, L, cfg.n_kv_heads, cfg.head_dim) for a in (k_LF, v_LF))
    if cfg.qk_norm == "head":
        q_LHDh, k_LKDh = (rms_norm(a, params[f"{n}_norm"], cfg.norm_eps) for n, a in (("q", q_LHDh), ("k", k_LKDh)))
    rope = rope_angles(jnp.arange(L)[None], cfg.head_dim, cfg.rotary_fraction, cfg.rope_theta)
    q_LHDh, k_LKDh = apply_rope(q_LHDh, *rope), apply_rope(k_LKDh, *rope)
    with jax.default_matmul_precision("highest"):
        mixed = jax.nn.dot_product_attention(q_LHDh, k_LKDh, v_LKDh, is_causal=True, scale=cfg.head_dim**-0.5)
    mixed_LF = mixed.reshape(L, -1)
    seen = {f"attn/{n}": measure(x_LD, None) for n in "qkv"} | {"attn/o": measure(mixed_LF, None)}
    return _linear(mixed_LF, params["o"], kinds["attn/o"]), seen


def _experts(layer: Tree, kinds: Kinds, cfg: ModelConfig, x_LD: jax.Array, measure: Measure) -> tuple[jax.Array, Seen]:
    """Routed experts; llama.cpp applies the router's weights after the down projection."""
    routing = route(layer["router"], cfg, x_LD)
    chosen_LkE = routing.indices_Tk[..., None] == jnp.arange(cfg.n_experts)
    weights_LE = jnp.sum(jnp.where(chosen_LkE, routing.weights_Tk[..., None], 0.0), axis=1)

    def one(y_LD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, Seen]:
        gate_up_FD, down_DF, weight_L, chosen_L = expert
        hidden_LF = swiglu(halves(_linear(x_LD, gate_up_FD, kinds["experts/gate_up"])), cfg.swiglu_limit)
        seen = {"experts/gate_up": measure(x_LD, chosen_L), "experts/down": measure(hidden_LF, chosen_L)}
        return y_LD + weight_L[:, None] * _linear(hidden_LF, down_DF, kinds["experts/down"]), seen

    chosen_EL = jnp.any(chosen_LkE, axis=1).T
    experts = (layer["experts"]["gate_up"], layer["experts"]["down"], weights_LE.T, chosen_EL)
    return jax.lax.scan(one, jnp.zeros_like(x_LD), experts)
