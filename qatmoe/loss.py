"""Everything that is minimised: next-token, MTP and distillation terms over a batch, and the router's balance terms.

A batch is a dict of arrays over rows of L + 1 + n_mtp tokens: `tokens` (B, L'), and, when documents are packed with
borders, `segments` and `positions` (B, L'); `mask` (B, L') is 0 at tokens that only pad a validation row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qatmoe.config import Config, ModelConfig
from qatmoe.mesh import constrain, put_back, used
from qatmoe.model import transformer
from qatmoe.model.layers import einsum

Batch = dict[str, jax.Array]
Params = dict[str, Any]
Layout = tuple[tuple[str | None, ...], int]  # of the head, see `transformer.head_layout`


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
    params: Params, cfg: ModelConfig, hidden_BLD: jax.Array, targets_BL: jax.Array, chunk: int = 0, groups: int = 1
) -> jax.Array:
    """Cross-entropy per token, (B, L) f32, for evaluation. `chunk` > 0 holds only (chunk, V) logits at a time."""
    parts = _chunks((hidden_BLD, targets_BL), targets_BL.size, chunk, groups)
    weight_VD = transformer.used_head(params, cfg)

    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_GCD, targets_GC = part
        logits_GCV = constrain(transformer.score(hidden_GCD, weight_VD), ("batch", None, "vocab"))
        return _softmax(logits_GCV, _hits(targets_GC, logits_GCV))[0]

    return jax.lax.map(one, parts).swapaxes(0, 1).reshape(targets_BL.shape)


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
    groups: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over tokens: of (1 - distill) * CE + distill * KL(teacher || model), of CE, and of KL.

    Three f32 scalars, nats; only the first is differentiable, and not in the weights. The gradients with respect to
    hidden states and head are computed beside the loss, from the same logits, so that these are made once and never
    kept: with `chunk` > 0 there are (chunk, V) of them at a time. Their gradient is multiplied in cfg.dtype and summed
    in f32, apart for each of the `groups` that the mesh splits the batch into: devices meet once, after the last chunk.

    teacher: its parameters and hidden states (B, L, D). Gradients go to neither.
    """
    T = targets_BL.size
    flat = _chunks((hidden_BLD, targets_BL, weights_BL, None if teacher is None else teacher[1]), T, chunk, groups)
    head_VD = transformer.head_weight(params, cfg)
    taught = None if teacher is None else (transformer.head_weight(teacher[0], cfg), flat[3])
    return _head_loss(distill, transformer.head_layout(cfg), flat[0], head_VD, flat[1], flat[2], taught)


def _chunks(arrays: Any, n_tokens: int, chunk: int, groups: int) -> Any:
    """(B, L, ...) arrays -> (P, G, C, ...): P chunks of G * C tokens, or one of all where `chunk` is 0 or no less.

    Each chunk has C tokens of every group, so that all devices work on it.
    """
    n = n_tokens // chunk if 0 < chunk < n_tokens else 1

    def cut(a: jax.Array) -> jax.Array:
        a = a.reshape(groups, n, n_tokens // n // groups, *a.shape[2:]).swapaxes(0, 1)
        return constrain(a, (None, "batch", *[None] * (a.ndim - 2)))

    return jax.tree.map(cut, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_loss(
    distill: float,
    layout: Layout,
    hidden_PGCD: jax.Array,
    head_VD: jax.Array,
    targets_PGC: jax.Array,
    weights_PGC: jax.Array,
    taught: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    sums, _ = _scan_head(distill, layout, False, hidden_PGCD, head_VD, targets_PGC, weights_PGC, taught)
    return sums


def _head_forward(distill: float, layout: Layout, *args: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    return _scan_head(distill, layout, True, *args)


def _head_backward(
    distill: float, layout: Layout, saved: tuple[jax.Array, jax.Array], g: Any
) -> tuple[jax.Array | None, ...]:
    # In f32: g rounded to bf16 would be one and the same error in every gradient.
    d_hidden_PGCD, d_head_VD = ((g[0] * d.astype(jnp.float32)).astype(d.dtype) for d in saved)
    return d_hidden_PGCD, d_head_VD, None, None, None


_head_loss.defvjp(_head_forward, _head_backward)


def _scan_head(
    distill: float,
    layout: Layout,
    gradients: bool,
    hidden_PGCD: jax.Array,
    head_VD: jax.Array,
    targets_PGC: jax.Array,
    weights_PGC: jax.Array,
    taught: tuple[jax.Array, jax.Array] | None,
) -> tuple[Any, Any]:
    """The three sums of `head_loss`, and with `gradients` those of the first: of hidden_PGCD and of head_VD."""
    weight_VD = used(head_VD.astype(hidden_PGCD.dtype), *layout)
    taught_VD = None if taught is None else used(taught[0].astype(hidden_PGCD.dtype), *layout)
    scores = lambda h_GCD, w_VD: constrain(transformer.score(h_GCD, w_VD), ("batch", None, "vocab"))  # noqa: E731

    def one(carry: Any, part: Any) -> tuple[Any, jax.Array | None]:
        sums, d_head_GVD = carry
        hidden_GCD, targets_GC, weights_GC, teacher_GCD = part
        logits_GCV = scores(hidden_GCD, weight_VD)
        hits_GCV = _hits(targets_GC, logits_GCV)
        ce_GC, probs_GCV, log_probs_GCV = _softmax(logits_GCV, hits_GCV)
        kl_GC, target_GCV = jnp.zeros_like(ce_GC), None
        if taught_VD is not None:
            teacher_GCV = jax.nn.log_softmax(scores(teacher_GCD, taught_VD), axis=-1)
            target_GCV = jnp.exp(teacher_GCV)
            kl_GC = jnp.sum(target_GCV * (teacher_GCV - log_probs_GCV), axis=-1)
        loss_GC = ce_GC if target_GCV is None else (1 - distill) * ce_GC + distill * kl_GC
        sums = tuple(s + jnp.sum(weights_GC * x_GC) for s, x_GC in zip(sums, (loss_GC, ce_GC, kl_GC), strict=True))
        if not gradients:
            return (sums, d_head_GVD), None
        # d loss / d logits = p - (1 - distill) onehot(target) - distill * teacher's p
        share = 1.0 if target_GCV is None else 1 - distill
        d_GCV = weights_GC[..., None] * probs_GCV - jnp.where(hits_GCV, (share * weights_GC)[..., None], 0.0)
        if target_GCV is not None:
            d_GCV -= distill * weights_GC[..., None] * target_GCV
        d_GCV = d_GCV.astype(hidden_GCD.dtype)
        d_head_GVD += einsum("gcv,gcd->gvd", d_GCV, hidden_GCD, preferred_element_type=jnp.float32)
        return (sums, d_head_GVD), einsum("gcv,vd->gcd", d_GCV, weight_VD)

    zero = jnp.zeros((), jnp.float32)
    shape = (hidden_PGCD.shape[1], *head_VD.shape) if gradients else (1, 1, 1)
    start = (zero, zero, zero), constrain(jnp.zeros(shape, jnp.float32), ("batch", "vocab", None))
    parts = (hidden_PGCD, targets_PGC, weights_PGC, None if taught is None else taught[1])
    (sums, d_head_GVD), d_hidden_PGCD = jax.lax.scan(one, start, parts)
    if not gradients:
        return sums, None
    return sums, (d_hidden_PGCD, put_back(jnp.sum(d_head_GVD, axis=0), *layout).astype(head_VD.dtype))


def _hits(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Where the target is, (..., V) bool: a mask stays on its device where V is split, an index would not."""
    return targets[..., None] == jnp.arange(logits.shape[-1])


def _softmax(logits: jax.Array, hits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p[target] (...,), p (..., V) and log p (..., V), f32."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(shifted)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    log_probs = shifted - jnp.log(total)
    return -jnp.sum(jnp.where(hits, log_probs, 0.0), axis=-1), exp / total, log_probs


def denominators(batch: Batch, n_mtp: int) -> list[jax.Array]:
    """Number of counted targets at each depth, f32 scalars; at least 1, so that an empty depth gives loss 0."""
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
    cut: dict[str, Any] = {"chunk": t.loss_chunk, "groups": groups}
    sums = head_loss(params, m, out.hidden_BLD, v.targets[0], v.weights[0], teacher=taught, distill=distill, **cut)
    main, ce, kl = (s / totals[0] for s in sums)
    mtp = jnp.zeros((), jnp.float32)
    for i, hidden_BLD in enumerate(out.mtp_hidden):
        nats, _, _ = head_loss(params, m, hidden_BLD, v.targets[1 + i], v.weights[1 + i], **cut)
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
        ce_BL = token_losses(params, cfg, hidden_BLD, targets_BL, chunk, groups)
        nats.append(jnp.sum(ce_BL * weights_BL, axis=1))
    return {"nats": jnp.stack(nats), "count": jnp.stack([jnp.sum(w, axis=1) for w in v.weights])}
