"""Expert computation: tokens are copied into rows that lie with their experts, multiplied, and summed back.

Every fast implementation is the same three moves, and differs only in where an expert's rows lie:

    dense    C rows for each expert; one batched matmul; tokens over the capacity C are dropped
    blocked  rows sorted by expert, each expert's padded to whole blocks; one batched matmul over blocks; dropless
    ragged   rows sorted by expert; jax.lax.ragged_dot; dropless

dense is the fastest on a CPU and is expected to suit a GPU, ragged a TPU; neither was measured there.

For a token or a few, as in decoding, "gathered" moves the weights of its own experts to each token; dropless.

Rows are gathered in both directions of differentiation: each token knows its rows and each row its token, so no
row's gradient is a scatter-add. The router's weight is multiplied into the expert's inner activation, before `down`:
down(w * h) = w * down(h), and the weight's gradient then needs no second look at the output rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qatmoe.config import ModelConfig
from qatmoe.errors import UserError
from qatmoe.mesh import constrain
from qatmoe.model.layers import Param, einsum, halves, precision, swiglu, used_halves, weighted


class Rows(NamedTuple):
    """The two-way map between the T*k choices of tokens and the R rows of experts; out-of-range means none."""

    choice_R: jax.Array  # int32, flat choice t*k + j that lies in each row; T*k for an empty row
    token_R: jax.Array  # int32, its token t; T for an empty row
    row_Tk: jax.Array  # int32, row of each choice; R for a dropped one


def expert_params(cfg: ModelConfig, std: float, out_std: float) -> dict[str, Param]:
    """Declares the routed experts: gate_up (E, 2F, D), gate first, and down (E, D, F)."""
    E, F, D = cfg.n_experts, cfg.expert_dim, cfg.dim
    return {
        "gate_up": Param((E, 2 * F, D), ("experts", "mlp", None), 1, std),
        "down": Param((E, D, F), ("experts", None, "mlp"), 1, out_std),
    }


def expert_ffn(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    indices_Tk: jax.Array,
    gate_up_EFD: jax.Array,
    down_EDF: jax.Array,
    cfg: ModelConfig,
    implementation: str,
    groups: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum over each token's chosen experts.

    Matmuls run in the dtype of x; SwiGLU, router weights and the sum over experts in f32. `groups` cuts the tokens
    into equal runs that are dispatched on their own, one or more per device: the capacity of "dense" then holds per
    group and expert, and rows travel to their experts by all-to-all. The other implementations give the same numbers
    for any `groups`; "blocked" keeps each group's rows on its device and brings the weights to them.

    Returns:
      (T, D) in the dtype of x, and the fraction of the T*k choices that were dropped (f32 scalar, 0 if dropless).

    Raises:
      UserError: groups does not divide T.
    """
    T, D = x_TD.shape
    if T % groups:
        raise UserError(f"groups={groups} does not divide the {T} tokens of a batch: change batch_size or seq_len")
    weights_Tk = weights_Tk.astype(jnp.float32)
    if implementation == "reference":
        return _reference(x_TD, weights_Tk, indices_Tk, gate_up_EFD, down_EDF, cfg), jnp.zeros((), jnp.float32)
    if implementation == "ragged":
        return _ragged(x_TD, weights_Tk, indices_Tk, gate_up_EFD, down_EDF, cfg), jnp.zeros((), jnp.float32)
    if implementation == "gathered":
        return _gathered(x_TD, weights_Tk, indices_Tk, gate_up_EFD, down_EDF, cfg), jnp.zeros((), jnp.float32)
    run = {"dense": _dense, "blocked": _blocked}[implementation]
    x_GTD, weights_GTk, indices_GTk = (
        constrain(a.reshape(groups, T // groups, -1), ("batch", None, None)) for a in (x_TD, weights_Tk, indices_Tk)
    )
    y_GTD, dropped = run(x_GTD, weights_GTk, indices_GTk, gate_up_EFD, down_EDF, cfg)
    return constrain(y_GTD, ("batch", None, None)).reshape(T, D), dropped


def capacity(tokens: int, cfg: ModelConfig) -> int:
    """Rows per expert of "dense" for a group of `tokens`: rounded up to 8, at most `tokens`."""
    even_share = tokens * cfg.top_k / cfg.n_experts
    return min(tokens, -8 * int(-cfg.capacity_factor * even_share // 8))


def _dense(
    x_GTD: jax.Array,
    weights_GTk: jax.Array,
    indices_GTk: jax.Array,
    gate_up_EFD: jax.Array,
    down_EDF: jax.Array,
    cfg: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    x_EGCD, weights_EGC, rows = dispatch(x_GTD, weights_GTk, indices_GTk, cfg)
    y_EGCD = expert_matmuls(x_EGCD, weights_EGC, gate_up_EFD, down_EDF, cfg.swiglu_limit)
    dropped = jnp.mean(rows.row_Tk == rows.choice_R.shape[-1], dtype=jnp.float32)
    return combine(y_EGCD, rows), dropped


def dispatch(
    x_GTD: jax.Array, weights_GTk: jax.Array, indices_GTk: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array, Rows]:
    """Tokens to the C rows of each expert, empty ones zero: (E, G, C, D), weights (E, G, C) f32, and the map back."""
    G, T, D = x_GTD.shape
    E, C = cfg.n_experts, capacity(T, cfg)
    starts_E = jnp.arange(E) * C
    rows = jax.vmap(lambda indices_Tk: _place(indices_Tk, starts_E, C, E * C, E))(indices_GTk)
    x_GECD = jax.vmap(_to_rows)(x_GTD, rows).reshape(G, E, C, D)
    weights_GEC = jax.vmap(_weights_to_rows)(weights_GTk, rows).reshape(G, E, C)
    # Pinning both sides makes the exchange one all-to-all over the expert axis. Experts lead, so that the matmul's
    # batch axis is already where the backends want it.
    x_EGCD = constrain(constrain(x_GECD, ("batch", None, None, None)).swapaxes(0, 1), ("experts", "group", None, None))
    weights_EGC = constrain(constrain(weights_GEC, ("batch", None, None)).swapaxes(0, 1), ("experts", "group", None))
    return x_EGCD, weights_EGC, rows


def expert_matmuls(
    x_EGCD: jax.Array, weights_EGC: jax.Array, gate_up_EFD: jax.Array, down_EDF: jax.Array, limit: float
) -> jax.Array:
    """Each expert's FFN on its own rows, times the rows' weights: (E, G, C, D) in the dtype of x."""
    E, G, C, D = x_EGCD.shape
    # One axis of rows: with two, XLA on a CPU transposes for the weights' gradient, a quarter of the whole time.
    x_ERD = x_EGCD.reshape(E, G * C, D)
    gate_up_E2FD = used_halves(gate_up_EFD.astype(x_EGCD.dtype), "experts")
    gate_up_ER2F = weighted(einsum("erd,ehfd->erhf", x_ERD, gate_up_E2FD))
    hidden_ERF = _gated(gate_up_ER2F, weights_EGC.reshape(E, G * C), limit)
    return einsum("erf,edf->erd", hidden_ERF, down_EDF.astype(x_EGCD.dtype)).reshape(E, G, C, D)


def combine(y_EGCD: jax.Array, rows: Rows) -> jax.Array:
    """Rows of experts back to their tokens, summed: (G, T, D). The way back of `dispatch`."""
    E, G, C, D = y_EGCD.shape
    y_GECD = constrain(constrain(y_EGCD, ("experts", "group", None, None)).swapaxes(0, 1), ("batch", None, None, None))
    return jax.vmap(_from_rows)(y_GECD.reshape(G, E * C, D), rows)


def _blocked(
    x_GTD: jax.Array,
    weights_GTk: jax.Array,
    indices_GTk: jax.Array,
    gate_up_EFD: jax.Array,
    down_EDF: jax.Array,
    cfg: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    _, T, D = x_GTD.shape
    E, block = cfg.n_experts, cfg.expert_block
    gate_up_EFD = constrain(gate_up_EFD.astype(x_GTD.dtype), (None, "mlp", None))
    down_EDF = constrain(down_EDF.astype(x_GTD.dtype), (None, None, "mlp"))
    n_blocks = (T * cfg.top_k + E * (block - 1)) // block  # the most that E partly filled runs of blocks can need

    def one_group(x_TD: jax.Array, weights_Tk: jax.Array, indices_Tk: jax.Array) -> jax.Array:
        blocks_E = -(-jnp.bincount(indices_Tk.reshape(-1), length=E) // block)
        ends_E = jnp.cumsum(blocks_E)
        rows = _place(indices_Tk, (ends_E - blocks_E) * block, T, n_blocks * block, E)
        expert_P = jnp.minimum(jnp.searchsorted(ends_E, jnp.arange(n_blocks), side="right"), E - 1)
        x_PCD = _to_rows(x_TD, rows).reshape(n_blocks, block, D)
        weights_PC = _weights_to_rows(weights_Tk, rows).reshape(n_blocks, block)
        gate_up_PCF = weighted(einsum("pcd,pfd->pcf", x_PCD, _of_blocks(gate_up_EFD, expert_P)))
        hidden_PCF = _gated(halves(gate_up_PCF), weights_PC, cfg.swiglu_limit)
        y_PCD = einsum("pcf,pdf->pcd", hidden_PCF, _of_blocks(down_EDF, expert_P))
        return _from_rows(y_PCD.reshape(-1, D), rows)

    return jax.vmap(one_group)(x_GTD, weights_GTk, indices_GTk), jnp.zeros((), jnp.float32)


@jax.custom_vjp
def _of_blocks(weights: jax.Array, expert_P: jax.Array) -> jax.Array:
    """The matrix of each block's expert, (E, out, in) -> (P, out, in). Gradients of a group are summed in f32."""
    return weights[expert_P]


def _of_blocks_forward(weights: jax.Array, expert_P: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return weights[expert_P], (expert_P, jnp.zeros((weights.shape[0], 0), weights.dtype))


def _of_blocks_backward(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, None]:
    expert_P, like_E0 = saved
    sums = jax.ops.segment_sum(d.astype(jnp.float32), expert_P, like_E0.shape[0], indices_are_sorted=True)
    return sums.astype(like_E0.dtype), None


_of_blocks.defvjp(_of_blocks_forward, _of_blocks_backward)


def _ragged(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    indices_Tk: jax.Array,
    gate_up_EFD: jax.Array,
    down_EDF: jax.Array,
    cfg: ModelConfig,
) -> jax.Array:
    T = x_TD.shape[0]
    counts_E = jnp.bincount(indices_Tk.reshape(-1), length=cfg.n_experts)
    rows = _place(indices_Tk, jnp.cumsum(counts_E) - counts_E, T, T * cfg.top_k, cfg.n_experts)
    gate_up_EDF = gate_up_EFD.astype(x_TD.dtype).swapaxes(1, 2)
    down_EFD = down_EDF.astype(x_TD.dtype).swapaxes(1, 2)
    gate_up_RF = weighted(jax.lax.ragged_dot(_to_rows(x_TD, rows), gate_up_EDF, counts_E, precision=precision(x_TD)))
    hidden_RF = _gated(halves(gate_up_RF), _weights_to_rows(weights_Tk, rows), cfg.swiglu_limit)
    y_RD = jax.lax.ragged_dot(hidden_RF, down_EFD, counts_E, precision=precision(hidden_RF))
    return _from_rows(y_RD, rows)


def _gathered(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    indices_Tk: jax.Array,
    gate_up_EFD: jax.Array,
    down_EDF: jax.Array,
    cfg: ModelConfig,
) -> jax.Array:
    gate_up_TkF = einsum("td,tkfd->tkf", x_TD, gate_up_EFD[indices_Tk].astype(x_TD.dtype))
    hidden_TkF = _gated(halves(gate_up_TkF), weights_Tk, cfg.swiglu_limit)
    y_TkD = einsum("tkf,tkdf->tkd", hidden_TkF, down_EDF[indices_Tk].astype(x_TD.dtype))
    return jnp.sum(y_TkD, axis=1, dtype=jnp.float32).astype(x_TD.dtype)


def _reference(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    indices_Tk: jax.Array,
    gate_up_EFD: jax.Array,
    down_EDF: jax.Array,
    cfg: ModelConfig,
) -> jax.Array:
    """Every expert on every token, then the weighted sum: the definition the others are tested against."""
    chosen_TkE = indices_Tk[..., None] == jnp.arange(cfg.n_experts)
    weights_TE = jnp.sum(jnp.where(chosen_TkE, weights_Tk[..., None], 0.0), axis=1)
    gate_up_TEF = weighted(einsum("td,efd->tef", x_TD, gate_up_EFD.astype(x_TD.dtype)))
    hidden_TEF = swiglu(halves(gate_up_TEF), cfg.swiglu_limit).astype(x_TD.dtype)
    y_TED = einsum("tef,edf->ted", hidden_TEF, down_EDF.astype(x_TD.dtype))
    return einsum("ted,te->td", y_TED.astype(jnp.float32), weights_TE).astype(x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated(gate_up: jax.Array, weights: jax.Array, limit: float) -> jax.Array:
    """swiglu(gate_up) * weights[..., None], (..., 2, F) and (...,) -> (..., F), computed in f32, in gate_up's dtype.

    Its backward pass is written out because it is bound by memory: it keeps gate_up and nothing in f32.
    """
    return (swiglu(gate_up, limit) * weights[..., None]).astype(gate_up.dtype)


def _gated_forward(gate_up: jax.Array, weights: jax.Array, limit: float) -> tuple[jax.Array, Any]:
    return _gated(gate_up, weights, limit), (gate_up, weights)


def _gated_backward(limit: float, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate_up, weights = saved
    d_weights = jnp.sum(g.astype(jnp.float32) * swiglu(gate_up, limit), axis=-1)
    # Both halves from one expression over (..., 2, F): two expressions and a concatenation are two passes on a GPU.
    shape = gate_up.shape
    gate, up = (jnp.broadcast_to(gate_up[..., i : i + 1, :].astype(jnp.float32), shape) for i in (0, 1))
    clamped_gate, clamped_up = (jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)) if limit > 0 else (gate, up)
    sigmoid = jax.nn.sigmoid(clamped_gate)
    d_gate = jnp.where(gate == clamped_gate, clamped_up * sigmoid * (1 + clamped_gate * (1 - sigmoid)), 0.0)
    d_up = jnp.where(up == clamped_up, clamped_gate * sigmoid, 0.0)
    slope = jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2) == 0, d_gate, d_up)
    d_gate_up = jnp.broadcast_to(g[..., None, :].astype(jnp.float32), shape) * weights[..., None, None] * slope
    return d_gate_up.astype(gate_up.dtype), d_weights


_gated.defvjp(_gated_forward, _gated_backward)


def _place(indices_Tk: jax.Array, starts_E: jax.Array, limit: int, n_rows: int, n_experts: int) -> Rows:
    """Gives every choice a row: its expert's first row plus its rank among that expert's tokens.

    Ranks follow the order of tokens, so a later token never pushes out an earlier one and the model stays causal even
    where it drops. Choices of rank >= limit are dropped.
    """
    expert_A = indices_Tk.reshape(-1)
    rank_A = _ranks(expert_A, n_experts)
    row_A = jnp.where(rank_A < limit, starts_E[expert_A] + rank_A, n_rows).astype(jnp.int32)
    choices_A = jnp.arange(expert_A.size, dtype=jnp.int32)
    choice_R = jnp.full(n_rows, expert_A.size, jnp.int32).at[row_A].set(choices_A, mode="drop", unique_indices=True)
    return Rows(choice_R, choice_R // indices_Tk.shape[1], row_A.reshape(indices_Tk.shape))


def _ranks(expert_A: jax.Array, n_experts: int, chunk: int = 128) -> jax.Array:
    """How many earlier choices went to the same expert, (A,) int32.

    Counted in chunks by a triangular matmul: a cumulative sum over all choices is slow on accelerators, and exact f32
    products of 0 and 1 are not, in any precision they multiply in.
    """
    padding = -expert_A.size % chunk
    onehot_PCE = (
        jnp.pad(expert_A, (0, padding), constant_values=n_experts).reshape(-1, chunk, 1) == jnp.arange(n_experts)
    ).astype(jnp.float32)
    earlier_CC = jnp.tril(jnp.ones((chunk, chunk), jnp.float32), -1)
    within_PCE = jnp.einsum("cd,nde->nce", earlier_CC, onehot_PCE)
    total_PE = jnp.sum(onehot_PCE, axis=1)
    before_PE = jnp.cumsum(total_PE, axis=0) - total_PE
    rank_PC = jnp.sum((within_PCE + before_PE[:, None]) * onehot_PCE, axis=-1)
    return rank_PC.reshape(-1)[: expert_A.size].astype(jnp.int32)


def _copy(x_TD: jax.Array, rows: Rows) -> jax.Array:
    """(T, D) -> (R, D): each row takes its token; empty rows are zero."""
    return x_TD.at[rows.token_R].get(mode="fill", fill_value=0)


def _sum(y_RD: jax.Array, rows: Rows) -> jax.Array:
    """(R, D) -> (T, D): each token sums its rows in f32; dropped choices add nothing. The transpose of `_copy`."""
    chosen_TkD = y_RD.at[rows.row_Tk].get(mode="fill", fill_value=0)
    return jnp.sum(chosen_TkD, axis=1, dtype=jnp.float32).astype(y_RD.dtype)


_to_rows = jax.custom_vjp(_copy)
_to_rows.defvjp(lambda x_TD, rows: (_copy(x_TD, rows), rows), lambda rows, dy_RD: (_sum(dy_RD, rows), None))

_from_rows = jax.custom_vjp(_sum)
_from_rows.defvjp(lambda y_RD, rows: (_sum(y_RD, rows), rows), lambda rows, dy_TD: (_copy(dy_TD, rows), None))


@jax.custom_vjp
def _weights_to_rows(weights_Tk: jax.Array, rows: Rows) -> jax.Array:
    """(T, k) -> (R,): each row takes its choice's weight; empty rows are zero."""
    return weights_Tk.reshape(-1).at[rows.choice_R].get(mode="fill", fill_value=0)


_weights_to_rows.defvjp(
    lambda weights_Tk, rows: (_weights_to_rows(weights_Tk, rows), rows),
    lambda rows, dw_R: (dw_R.at[rows.row_Tk].get(mode="fill", fill_value=0), None),
)
