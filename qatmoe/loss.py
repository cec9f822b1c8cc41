"""Everything that is minimised: next-token, MTP and distillation terms over a batch, and the router's balance terms.

A batch is a dict of arrays over rows of L + 1 + n_mtp tokens: `tokens` (B, L'), and, when documents are packed with
borders, `segments` and `positions` (B, L'); `mask` (B, L') is 0 at tokens that only pad a validation row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qatmoe.config import Config, ModelConfig
from qatmoe.model import transformer

Batch = dict[str, jax.Array]
Params = dict[str, Any]


class Views(NamedTuple):
    """One batch cut into what the model reads and what it must predict."""

    tokens_BL: jax.Array
    positions_BL: jax.Array | None
    segments_BL: jax.Array | None
    mtp_tokens_MBL: jax.Array | None  # [i][:, t] is token t+1+i, the extra input of MTP module i
    targets: list[jax.Array]  # (B, L) each: token t+1, then token t+2+i for MTP module i
    weights: list[jax.Array]  # (B, L) f32 each: 1 where the target counts


def views(batch: Batch, n_mtp: int) -> Views:
    """Cuts rows of L + 1 + n_mtp tokens. A target counts if it is no padding and lies in its input's own document."""
    tokens = batch["tokens"]
    length = tokens.shape[1] - 1 - n_mtp
    segments, positions = batch.get("segments"), batch.get("positions")
    mask = jnp.asarray(batch.get("mask", jnp.ones_like(tokens)), jnp.float32)
    targets, weights = [], []
    for shift in range(1, n_mtp + 2):
        targets.append(tokens[:, shift : shift + length])
        weight = mask[:, shift : shift + length]
        if segments is not None:
            weight = weight * (segments[:, shift : shift + length] == segments[:, :length])
        weights.append(weight)
    mtp = jnp.stack([tokens[:, 1 + i : 1 + i + length] for i in range(n_mtp)]) if n_mtp else None
    return Views(
        tokens_BL=tokens[:, :length],
        positions_BL=None if positions is None else positions[:, :length],
        segments_BL=None if segments is None else segments[:, :length],
        mtp_tokens_MBL=mtp,
        targets=targets,
        weights=weights,
    )


def cross_entropy(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, (T,) f32."""
    picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_TV, axis=-1) - picked_T


def kl_divergence(teacher_TV: jax.Array, student_TV: jax.Array) -> jax.Array:
    """KL(teacher || student) in nats from logits, (T,) f32."""
    teacher = jax.nn.log_softmax(teacher_TV, axis=-1)
    return jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(student_TV, axis=-1)), axis=-1)


def token_losses(
    params: Params,
    cfg: ModelConfig,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    teacher: tuple[Params, jax.Array] | None = None,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and, with a teacher (its parameters and hidden states), KL per token: two (B, L) f32 arrays.

    `chunk` > 0 holds only (chunk, V) logits at a time and computes them again in the backward pass.
    """
    shape = targets_BL.shape

    def head(hidden_TD: jax.Array, targets_T: jax.Array, teacher_TD: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        logits_TV = transformer.logits(params, cfg, hidden_TD)
        ce_T = cross_entropy(logits_TV, targets_T)
        if teacher is None or teacher_TD is None:
            return ce_T, jnp.zeros_like(ce_T)
        return ce_T, kl_divergence(transformer.logits(teacher[0], cfg, teacher_TD), logits_TV)

    n = targets_BL.size
    flat = (
        hidden_BLD.reshape(n, -1),
        targets_BL.reshape(n),
        None if teacher is None else teacher[1].reshape(n, -1),
    )
    if not chunk or chunk >= n:
        ce_T, kl_T = head(*flat)
    else:
        chunks = jax.tree.map(lambda a: a.reshape(n // chunk, chunk, *a.shape[1:]), flat)
        ce_T, kl_T = jax.lax.map(jax.checkpoint(lambda c: head(*c)), chunks)
    return ce_T.reshape(shape), kl_T.reshape(shape)


def denominators(batch: Batch, n_mtp: int) -> list[jax.Array]:
    """Number of counted targets at each depth; at least 1, so that an empty depth gives loss 0."""
    return [jnp.maximum(jnp.sum(w), 1.0) for w in views(batch, n_mtp).weights]


def training_loss(
    params: Params,
    cfg: Config,
    batch: Batch,
    totals: list[jax.Array],
    *,
    teacher: Params | None = None,
    distill: float = 0.0,
    groups: int = 1,
) -> tuple[jax.Array, dict[str, Any]]:
    """The scalar that is minimised on (a micro-batch of) a batch, and its parts.

    (1 - distill) * CE + distill * KL(teacher || model) + mtp_weight * mean of the MTP modules' CE + balance_weight *
    balance + z_weight * z. Sums over tokens are divided by `totals`, the counts of the WHOLE batch (`denominators`), so
    that micro-batches add up to it; the router terms are means over this micro-batch.

    Returns:
      loss, and aux with scalars `ce`, `kl`, `mtp`, `balance`, `z`, and the router's `load_NE`, `dropped_N`.
    """
    m, t = cfg.model, cfg.train
    v = views(batch, m.n_mtp)
    inputs: dict[str, Any] = {"positions_BL": v.positions_BL, "segments_BL": v.segments_BL, "groups": groups}
    out = transformer.forward(params, m, v.tokens_BL, mtp_tokens=v.mtp_tokens_MBL, train=True, **inputs)
    taught = None
    if teacher is not None:
        taught_out = transformer.forward(teacher, m, v.tokens_BL, mtp_tokens=None, train=False, **inputs)
        taught = (teacher, jax.lax.stop_gradient(taught_out.hidden_BLD))
    ce_BL, kl_BL = token_losses(params, m, out.hidden_BLD, v.targets[0], taught, t.loss_chunk)
    ce = jnp.sum(ce_BL * v.weights[0]) / totals[0]
    kl = jnp.sum(kl_BL * v.weights[0]) / totals[0]
    mtp = jnp.zeros((), jnp.float32)
    for i, hidden_BLD in enumerate(out.mtp_hidden):
        mtp_BL, _ = token_losses(params, m, hidden_BLD, v.targets[1 + i], None, t.loss_chunk)
        mtp += jnp.sum(mtp_BL * v.weights[1 + i]) / totals[1 + i] / m.n_mtp
    share = jnp.sum(v.weights[0]) / totals[0]  # of the whole batch: what this micro-batch's means weigh
    balance, z = out.aux["balance"] * share, out.aux["z"] * share
    loss = (1 - distill) * ce + distill * kl + t.mtp_weight * mtp + t.balance_weight * balance + t.z_weight * z
    aux = {"ce": ce, "kl": kl, "mtp": mtp, "balance": balance, "z": z}
    return loss, aux | {"load_NE": out.aux["load_NE"] * share, "dropped_N": out.aux["dropped_N"] * share}


def evaluation_sums(
    params: Params, cfg: ModelConfig, batch: Batch, chunk: int = 0, groups: int = 1
) -> dict[str, jax.Array]:
    """Summed cross-entropy (nats) and counts per depth and row: `nats` and `count`, (1 + n_mtp, B) f32. Dropless."""
    v = views(batch, cfg.n_mtp)
    out = transformer.forward(
        params,
        cfg,
        v.tokens_BL,
        mtp_tokens=v.mtp_tokens_MBL,
        train=False,
        positions_BL=v.positions_BL,
        segments_BL=v.segments_BL,
        groups=groups,
    )
    nats = []
    for hidden_BLD, targets_BL, weights_BL in zip((out.hidden_BLD, *out.mtp_hidden), v.targets, v.weights, strict=True):
        ce_BL, _ = token_losses(params, cfg, hidden_BLD, targets_BL, None, chunk)
        nats.append(jnp.sum(ce_BL * weights_BL, axis=1))
    return {"nats": jnp.stack(nats), "count": jnp.stack([jnp.sum(w, axis=1) for w in v.weights])}
