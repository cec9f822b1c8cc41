"""Everything that is minimised: next-token, MTP and distillation terms over a batch, and the router's balance terms.

A batch is a dict of arrays over rows of L + 1 + n_mtp tokens: `tokens` (B, L'), and, when documents are packed with
borders, `segments` and `positions` (B, L'); `mask` (B, L') is 0 at tokens that only pad a validation row.
"""

import functools
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
    params: Params, cfg: ModelConfig, hidden_BLD: jax.Array, targets_BL: jax.Array, chunk: int = 0
) -> jax.Array:
    """Cross-entropy per token, (B, L) f32, for evaluation. `chunk` > 0 holds only (chunk, V) logits at a time."""
    hidden_NCD, targets_NC = _chunks((hidden_BLD, targets_BL), targets_BL.size, chunk)
    nats_NC = jax.lax.map(
        lambda c: cross_entropy(transformer.logits(params, cfg, c[0]), c[1]), (hidden_NCD, targets_NC)
    )
    return nats_NC.T.reshape(targets_BL.shape)


def head_loss(
    params: Params,
    cfg: ModelConfig,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    teacher: tuple[Params, jax.Array] | None = None,
    distill: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over tokens: of (1 - distill) * CE + distill * KL(teacher || model), of CE, and of KL.

    Three f32 scalars, nats; only the first is differentiable, and not in the weights. The gradients with respect to
    hidden states and head are computed beside the loss, from the same logits, so that these are made once and never
    kept: with `chunk` > 0 there are (chunk, V) of them at a time. Their gradient is multiplied in cfg.dtype and summed
    in f32.

    teacher: its parameters and hidden states (B, L, D). Gradients go to neither.
    """
    T = targets_BL.size
    flat = _chunks((hidden_BLD, targets_BL, weights_BL, None if teacher is None else teacher[1]), T, chunk)
    head_VD = transformer.head_weight(params, cfg)
    taught = None if teacher is None else (transformer.head_weight(teacher[0], cfg), flat[3])
    return _head_loss(distill, flat[0], head_VD, flat[1], flat[2], taught)


def _chunks(arrays: Any, n_tokens: int, chunk: int) -> Any:
    """(B, L, ...) arrays -> (N, C, ...): N chunks of C tokens, or one of all where `chunk` is 0 or no less.

    Chunk i has tokens i, N + i, 2N + i, ...: where devices hold a run of tokens each, all of them work on every chunk.
    """
    n = n_tokens // chunk if 0 < chunk < n_tokens else 1
    return jax.tree.map(lambda a: a.reshape(n_tokens // n, n, *a.shape[2:]).swapaxes(0, 1), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(
    distill: float,
    hidden_NCD: jax.Array,
    head_VD: jax.Array,
    targets_NC: jax.Array,
    weights_NC: jax.Array,
    taught: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    sums, _ = _scan_head(distill, False, hidden_NCD, head_VD, targets_NC, weights_NC, taught)
    return sums


def _head_forward(distill: float, *args: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    return _scan_head(distill, True, *args)


def _head_backward(distill: float, saved: tuple[jax.Array, jax.Array], g: Any) -> tuple[jax.Array | None, ...]:
    # In f32: g rounded to bf16 would be one and the same error in every gradient.
    d_hidden_NCD, d_head_VD = ((g[0] * d.astype(jnp.float32)).astype(d.dtype) for d in saved)
    return d_hidden_NCD, d_head_VD, None, None, None


_head_loss.defvjp(_head_forward, _head_backward)


def _scan_head(
    distill: float,
    gradients: bool,
    hidden_NCD: jax.Array,
    head_VD: jax.Array,
    targets_NC: jax.Array,
    weights_NC: jax.Array,
    taught: tuple[jax.Array, jax.Array] | None,
) -> tuple[Any, Any]:
    """The three sums of `head_loss`, and with `gradients` those of the first: of hidden_NCD and of head_VD."""
    weight_VD = head_VD.astype(hidden_NCD.dtype)

    def one(carry: Any, part: Any) -> tuple[Any, jax.Array | None]:
        sums, d_head_VD = carry
        hidden_CD, targets_C, weights_C, teacher_CD = part
        logits_CV = transformer.score(hidden_CD, weight_VD)
        ce_C, probs_CV, log_probs_CV = _softmax(logits_CV, targets_C)
        kl_C, target_CV = jnp.zeros_like(ce_C), None
        if taught is not None:
            teacher_CV = jax.nn.log_softmax(transformer.score(teacher_CD, taught[0]), axis=-1)
            target_CV = jnp.exp(teacher_CV)
            kl_C = jnp.sum(target_CV * (teacher_CV - log_probs_CV), axis=-1)
        loss_C = ce_C if taught is None else (1 - distill) * ce_C + distill * kl_C
        sums = tuple(s + jnp.sum(weights_C * x_C) for s, x_C in zip(sums, (loss_C, ce_C, kl_C), strict=True))
        if not gradients:
            return (sums, d_head_VD), None
        # d loss / d logits = p - (1 - distill) onehot(target) - distill * teacher's p
        share = 1.0 if target_CV is None else 1 - distill
        hit_CV = targets_C[:, None] == jnp.arange(logits_CV.shape[1])
        d_CV = weights_C[:, None] * probs_CV - jnp.where(hit_CV, (share * weights_C)[:, None], 0.0)
        if target_CV is not None:
            d_CV -= distill * weights_C[:, None] * target_CV
        d_CV = d_CV.astype(hidden_CD.dtype)
        d_head_VD += jnp.einsum("cv,cd->vd", d_CV, hidden_CD, preferred_element_type=jnp.float32)
        return (sums, d_head_VD), jnp.einsum("cv,vd->cd", d_CV, weight_VD)

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, zero), jnp.zeros(head_VD.shape if gradients else (), jnp.float32)
    parts = (hidden_NCD, targets_NC, weights_NC, None if taught is None else taught[1])
    (sums, d_head_VD), d_hidden_NCD = jax.lax.scan(one, start, parts)
    return sums, (d_hidden_NCD, d_head_VD.astype(head_VD.dtype)) if gradients else None


def _softmax(logits_CV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p[target] (C,), p (C, V) and log p (C, V), f32."""
    shifted_CV = logits_CV - jnp.max(logits_CV, axis=-1, keepdims=True)
    exp_CV = jnp.exp(shifted_CV)
    sum_C1 = jnp.sum(exp_CV, axis=-1, keepdims=True)
    log_probs_CV = shifted_CV - jnp.log(sum_C1)
    ce_C = -jnp.take_along_axis(log_probs_CV, targets_C[:, None], axis=-1)[:, 0]
    return ce_C, exp_CV / sum_C1, log_probs_CV


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
    sums = head_loss(
        params, m, out.hidden_BLD, v.targets[0], v.weights[0], teacher=taught, distill=distill, chunk=t.loss_chunk
    )
    main, ce, kl = (s / totals[0] for s in sums)
    mtp = jnp.zeros((), jnp.float32)
    for i, hidden_BLD in enumerate(out.mtp_hidden):
        nats, _, _ = head_loss(params, m, hidden_BLD, v.targets[1 + i], v.weights[1 + i], chunk=t.loss_chunk)
        mtp += nats / totals[1 + i] / m.n_mtp
    share = jnp.sum(v.weights[0]) / totals[0]  # of the whole batch: what this micro-batch's means weigh
    balance, z = out.aux["balance"] * share, out.aux["z"] * share
    loss = main + t.mtp_weight * mtp + t.balance_weight * balance + t.z_weight * z
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
        ce_BL = token_losses(params, cfg, hidden_BLD, targets_BL, chunk)
        nats.append(jnp.sum(ce_BL * weights_BL, axis=1))
    return {"nats": jnp.stack(nats), "count": jnp.stack([jnp.sum(w, axis=1) for w in v.weights])}
