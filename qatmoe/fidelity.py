"""How far a model is from its reference: figures per token, then means and quantiles with their standard errors.

The reference is the matching model in full precision. KLD is KL(reference || model) over the whole vocabulary in nats,
token by token: a model can keep its perplexity and still say other things.

Standard errors are a bootstrap (Efron 1979) over units: documents, or of one that makes much of its domain runs of
consecutive windows. Units are drawn with replacement within their domain; a resample is a weight per unit, how
often it was drawn, so means are one matrix product and a quantile is a cumulative sum of weights over sorted tokens.
A domain of a single unit is the same in every resample: errors over all domains take it as fixed, its own are unknown.

Shapes: T scored tokens, M windows, U units, R resamples, C figures, Q quantiles, S stretches of sorted tokens.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.loss import Batch, Params, cross_entropy, kl_divergence, views
from qatmoe.mesh import constrain, over_rows
from qatmoe.model import transformer
from qatmoe.model.cache import CacheType

QUANTILES = {"kld_median": 0.5, "kld_p99": 0.99, "kld_p999": 0.999}
RESAMPLES = 400
POSITIONS = 8  # parts of a window

Tokens = dict[str, np.ndarray]


# ---- per token -------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a model made of a batch: all that its figures are computed from."""

    hidden_BLD: jax.Array
    mtp_hidden: tuple[jax.Array, ...]  # per module (B, L, D)
    indices_NTk: jax.Array  # chosen experts of the trunk's MoE layers
    probs_NTE: jax.Array  # their routers' distributions, f32


@functools.partial(jax.jit, static_argnames=("cfg", "cache", "groups"))
def run_model(
    params: Params,
    batch: Batch,
    choices_NTk: jax.Array | None = None,
    *,
    cfg: ModelConfig,
    cache: CacheType | None = None,
    groups: int = 1,
) -> Outcome:
    """One forward pass, dropless. With choices_NTk, the trunk's experts are forced and the MTP modules do not run.

    groups: into how many parts the active mesh splits the batch; what comes back is split in the same way.
    """
    v = views(batch, cfg.n_mtp)
    out = transformer.forward(
        params,
        cfg,
        v.tokens_BL,
        positions_BL=v.positions_BL,
        segments_BL=v.segments_BL,
        mtp_tokens=v.mtp_tokens_MBL if choices_NTk is None else None,
        train=False,
        groups=groups,
        choices_NTk=choices_NTk,
        return_routing=True,
        cache=cache,
    )
    n_moe = cfg.n_layers - cfg.n_dense_layers
    hidden = [constrain(h_BLD, ("batch", None, None)) for h_BLD in (out.hidden_BLD, *out.mtp_hidden)]
    routing = [constrain(out.aux[name][:n_moe], (None, "batch", None)) for name in ("indices_NTk", "probs_NTE")]
    return Outcome(hidden[0], tuple(hidden[1:]), *routing)


def head_of(params: Params) -> Params:
    """The part of the parameters that turns hidden states into scores."""
    return {name: params[name] for name in ("embed", "head") if name in params}


def token_metrics(reference_TV: jax.Array, logits_TV: jax.Array, targets_T: jax.Array) -> dict[str, jax.Array]:
    """Figures of single tokens, (T,) f32 each.

    nats          cross-entropy of the model
    above         that minus the reference's
    kld           KL(reference || model), nats
    same_top1     1 where both have the same best token
    top5_overlap  share of the reference's five best tokens that are among the model's five best
    """
    k = min(5, logits_TV.shape[-1])
    theirs_Tk, ours_Tk = _best(reference_TV, k), _best(logits_TV, k)
    shared_T = jnp.sum(theirs_Tk[:, :, None] == ours_Tk[:, None, :], axis=(1, 2))
    nats_T = cross_entropy(logits_TV, targets_T)
    return {
        "nats": nats_T,
        "above": nats_T - cross_entropy(reference_TV, targets_T),
        "kld": kl_divergence(reference_TV, logits_TV),
        "same_top1": (theirs_Tk[:, 0] == ours_Tk[:, 0]).astype(jnp.float32),
        "top5_overlap": shared_T.astype(jnp.float32) / k,
    }


def same_experts(a_NTk: jax.Array, b_NTk: jax.Array) -> jax.Array:
    """1 where a token goes to the same set of experts, in any order, (N, T) f32."""
    return jnp.all(jnp.sort(a_NTk, axis=-1) == jnp.sort(b_NTk, axis=-1), axis=-1).astype(jnp.float32)


def router_kld(reference_NTE: jax.Array, probs_NTE: jax.Array) -> jax.Array:
    """KL(reference's router || model's) in nats, mean over layers, (T,) f32."""
    tiny = jnp.finfo(jnp.float32).tiny
    ratio_NTE = jnp.log(jnp.maximum(reference_NTE, tiny)) - jnp.log(jnp.maximum(probs_NTE, tiny))
    return jnp.mean(jnp.sum(reference_NTE * ratio_NTE, axis=-1), axis=0)


def acceptance(best_BL: jax.Array, drafts_MBL: jax.Array) -> jax.Array:
    """Whether greedy drafts would be accepted, (M, B, L) f32.

    Position t of module i drafts token t+2+i. It agrees if its best token is the trunk's own best token at position
    t+1+i, which predicts the same token from the same text; both read the true tokens (teacher forcing). Depth n is
    accepted at t if the modules 0..n-1 all agree there. Where t+1+i lies beyond the window the entry is 0 and must not
    be counted.
    """
    length = best_BL.shape[1]
    agree = []
    for i, drafts_BL in enumerate(drafts_MBL):
        later_BL = best_BL[:, 1 + i :]
        agree.append(jnp.pad(drafts_BL[:, : max(0, length - 1 - i)] == later_BL, ((0, 0), (0, min(1 + i, length)))))
    return jnp.cumprod(jnp.stack(agree).astype(jnp.float32), axis=0)


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def compare(
    reference_head: Params,
    reference: Outcome,
    head: Params,
    outcome: Outcome,
    forced_BLD: jax.Array,
    batch: Batch,
    *,
    cfg: ModelConfig,
    chunk: int,
) -> dict[str, jax.Array]:
    """All figures of a batch's tokens, f32.

    Args:
      reference_head, head: from `head_of`; scores are computed again from hidden states.
      chunk: tokens that each device does so for at a time; a divisor of its own.
      forced_BLD: the model's hidden states when its experts are chosen by the reference.

    Returns:
      (B, L): those of `token_metrics`, `kld_experts` (KLD with the experts chosen by the reference), `router_kld`,
      `count` (1 where the target counts); (N, B, L) `agreement`; (n_mtp, B, L) `accepted` and `drafted`, the latter 1
      where a draft counts.
    """
    v = views(batch, cfg.n_mtp)
    B, L = v.tokens_BL.shape

    reference_VD, head_VD = transformer.used_head(reference_head, cfg), transformer.used_head(head, cfg)

    def figures(tokens: tuple[jax.Array, ...], heads: tuple[jax.Array, ...]) -> Any:
        theirs_TD, ours_TD, forced_TD, targets_T = tokens
        reference_VD, head_VD = heads
        reference_TV, logits_TV = transformer.score(theirs_TD, reference_VD), transformer.score(ours_TD, head_VD)
        found = token_metrics(reference_TV, logits_TV, targets_T)
        found["kld_experts"] = kl_divergence(reference_TV, transformer.score(forced_TD, head_VD))
        return found, _best(logits_TV, 1)[:, 0]

    flat = [a.reshape(B * L, -1) for a in (reference.hidden_BLD, outcome.hidden_BLD, forced_BLD)]
    found, best_T = _in_chunks(figures, (*flat, v.targets[0].reshape(-1)), (reference_VD, head_VD), chunk)
    found["router_kld"] = router_kld(reference.probs_NTE, outcome.probs_NTE)
    found = {name: a_T.reshape(B, L) for name, a_T in found.items()}
    found["count"] = v.weights[0]
    found["agreement"] = same_experts(reference.indices_NTk, outcome.indices_NTk).reshape(-1, B, L)
    if cfg.n_mtp:

        def draft(hidden_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
            return _best(transformer.score(hidden_TD, head_VD), 1)[:, 0]

        modules = [h_BLD.reshape(B * L, -1) for h_BLD in outcome.mtp_hidden]
        drafts = [_in_chunks(draft, h_TD, head_VD, chunk).reshape(B, L) for h_TD in modules]
        found["accepted"] = acceptance(best_T.reshape(B, L), jnp.stack(drafts))
        inside_ML = jnp.arange(L) < L - 1 - jnp.arange(cfg.n_mtp)[:, None]
        found["drafted"] = jnp.stack(v.weights[1:]) * inside_ML[:, None]
    return found


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def kld(
    reference_head: Params,
    reference_BLD: jax.Array,
    head: Params,
    hidden_BLD: jax.Array,
    *,
    cfg: ModelConfig,
    chunk: int,
) -> jax.Array:
    """KL(reference || model) in nats from hidden states, (B, L) f32."""

    def of_chunk(tokens: tuple[jax.Array, ...], heads: tuple[jax.Array, ...]) -> jax.Array:
        return kl_divergence(*(transformer.score(h_TD, w_VD) for h_TD, w_VD in zip(tokens, heads, strict=True)))

    flat = tuple(a.reshape(-1, a.shape[-1]) for a in (reference_BLD, hidden_BLD))
    heads = tuple(transformer.used_head(params, cfg) for params in (reference_head, head))
    return _in_chunks(of_chunk, flat, heads, chunk).reshape(hidden_BLD.shape[:2])


def _best(logits_TV: jax.Array, k: int) -> jax.Array:
    """The k best tokens, best first, (T, k). On a CPU faster than argmax; the barrier keeps XLA from merging what
    follows into it, which would sort the whole vocabulary (20 times the time)."""
    return jax.lax.optimization_barrier(jax.lax.top_k(logits_TV, k)[1])


def _in_chunks(f: Callable[[Any, Any], Any], tokens: Any, heads: Any, chunk: int) -> Any:
    """f(tokens, heads) over the tokens, each device's own, `chunk` at a time: scores of all at once would not fit."""

    def own(tokens: Any, heads: Any) -> Any:
        n = jax.tree.leaves(tokens)[0].shape[0]
        if chunk >= n:
            return f(tokens, heads)
        cut = jax.tree.map(lambda a: a.reshape(n // chunk, chunk, *a.shape[1:]), tokens)
        return jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), jax.lax.map(lambda c: f(c, heads), cut))

    return over_rows(own, tokens, heads)


def chunk_size(tokens: int, vocab: int) -> int:
    """How many of a device's tokens have their scores held at once: a divisor. 4 MiB of scores suit a CPU's caches."""
    wanted = max(1, (1 << 20 if jax.default_backend() == "cpu" else 1 << 26) // vocab)
    return max(d for d in range(1, min(tokens, wanted) + 1) if tokens % d == 0)


# ---- over tokens -----------------------------------------------------------------------------------------------------


class Units(NamedTuple):
    """What the bootstrap draws."""

    unit_T: np.ndarray  # int, unit of each token
    domain_U: np.ndarray  # int, domain of each unit; units of a domain lie together


def resample(domain_U: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each unit is drawn in each resample, (R, U) f32; within each domain as many as it has."""
    parts = []
    for domain, count in zip(*np.unique(domain_U, return_counts=True), strict=True):
        rng = np.random.default_rng([seed, int(domain)])
        parts.append(rng.multinomial(count, np.full(count, 1 / count), size=resamples))
    return np.concatenate(parts, axis=1).astype(np.float32)


def ratios(
    numerators_CT: Sequence[np.ndarray], denominators_CT: Sequence[np.ndarray], units: Units, weights_RU: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """sum(numerator) / sum(denominator) over tokens, (C,), and of every resample, (R, C), f64. 0 / 0 is nan."""
    n = len(units.domain_U)
    sums_2UC = np.stack(
        [
            np.stack([np.bincount(units.unit_T, weights=column_T, minlength=n) for column_T in columns], axis=1)
            for columns in (numerators_CT, denominators_CT)
        ]
    )
    top_RC, bottom_RC = weights_RU @ sums_2UC
    top_C, bottom_C = sums_2UC.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return top_C / bottom_C, top_RC / bottom_RC


def quantiles(
    values_T: np.ndarray, units: Units, weights_RU: np.ndarray, shares: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest value that at least a share of the tokens do not exceed, (Q,), and of every resample, (R, Q), f64.

    Sorted tokens are counted by unit in stretches of about sqrt(T), so that a resample needs one product for the
    stretch that a quantile lies in, and its weights one by one only there.
    """
    order = np.argsort(values_T, kind="stable")
    sorted_T, unit_T = values_T[order], units.unit_T[order]
    n, n_units, width = len(values_T), len(units.domain_U), math.isqrt(len(values_T)) + 1
    stretches = -(-n // width)
    count_US = np.bincount(unit_T * stretches + np.arange(n) // width, minlength=n_units * stretches)
    count_US = count_US.reshape(n_units, stretches).astype(np.float64)

    def at(weight_U: np.ndarray) -> np.ndarray:
        seen_S = np.cumsum(weight_U.astype(np.float64) @ count_US)  # whole numbers, exact in f64
        wanted_Q = np.ceil(np.asarray(shares) * seen_S[-1] - 1e-9)
        found = []
        for stretch, wanted in zip(np.searchsorted(seen_S, wanted_Q), wanted_Q, strict=True):
            part = slice(stretch * width, (stretch + 1) * width)
            before = seen_S[stretch - 1] if stretch else 0.0
            seen = np.cumsum(weight_U[unit_T[part]], dtype=np.float64)
            found.append(sorted_T[part][np.searchsorted(seen, wanted - before)])
        return np.asarray(found)

    return at(np.ones(n_units)), np.stack([at(weight_U) for weight_U in weights_RU])


def standard_errors(drawn_RC: np.ndarray) -> np.ndarray:
    """The spread of a figure over resamples, (C,); resamples where it is not finite are left out."""
    drawn_RC = np.where(np.isfinite(drawn_RC), drawn_RC, np.nan)
    defined_C = np.sum(np.isfinite(drawn_RC), axis=0) > 1
    out_C = np.full(drawn_RC.shape[1], np.nan)
    out_C[defined_C] = np.nanstd(drawn_RC[:, defined_C], axis=0, ddof=1)
    return out_C


def summarize(tokens: Tokens, units: Units, weights_RU: np.ndarray, length: int) -> dict[str, Any]:
    """Means, quantiles and standard errors over counted tokens.

    Args:
      tokens: (T,) arrays: those of `compare`, `bytes` (of text per token) and `position` (in its window); (N, T)
        `agreement`; (n_mtp, T) `accepted` and `drafted`; `kld_own` where there is one.
      length: positions in a window.

    Returns:
      {figure: value, figure_se: standard error, ...} in plain numbers. A figure without tokens is null, and so are the
      standard errors where every domain is a single unit.
    """
    ones_T = np.ones(len(units.unit_T))
    columns: dict[Any, tuple[np.ndarray, np.ndarray]] = {
        "loss": (tokens["nats"], ones_T),
        "loss_above": (tokens["above"], ones_T),
        "bits_per_byte": (tokens["nats"] / math.log(2), tokens["bytes"]),
        "expert_agreement": (tokens["agreement"].mean(axis=0), ones_T),
        "kld_routing": (tokens["kld"] - tokens["kld_experts"], ones_T),
    }
    own = ["kld_own"] if "kld_own" in tokens else []
    by_position = {"kld": "kld", "loss": "nats"} | {name: name for name in own}
    for name in ("kld", "same_top1", "top5_overlap", "router_kld", "kld_experts", *own):
        columns[name] = (tokens[name], ones_T)
    columns |= {("agreement", i): (row_T, ones_T) for i, row_T in enumerate(tokens["agreement"])}
    for i, (accepted_T, drafted_T) in enumerate(zip(tokens["accepted"], tokens["drafted"], strict=True)):
        columns["accepted", i] = accepted_T * drafted_T, drafted_T
    for start, end in _parts(length):
        inside_T = ((tokens["position"] >= start) & (tokens["position"] < end)).astype(np.float64)
        columns |= {(name, start): (tokens[of] * inside_T, inside_T) for name, of in by_position.items()}

    value_C, drawn_RC = ratios([n for n, _ in columns.values()], [d for _, d in columns.values()], units, weights_RU)
    known = max(np.unique(units.domain_U, return_counts=True)[1]) > 1
    se_C = standard_errors(drawn_RC) if known else np.full(len(value_C), np.nan)
    value: dict[Any, float | None] = dict(zip(columns, map(_plain, value_C), strict=True))
    se: dict[Any, float | None] = dict(zip(columns, map(_plain, se_C), strict=True))
    loss = list(columns).index("loss")
    with np.errstate(over="ignore"):
        value["perplexity"], perplexity_R1 = _plain(np.exp(value_C[loss])), np.exp(drawn_RC[:, loss : loss + 1])
    se["perplexity"] = _plain(standard_errors(perplexity_R1)[0]) if known else None
    value_Q, drawn_RQ = quantiles(tokens["kld"], units, weights_RU, list(QUANTILES.values()))
    for name, v, s in zip(QUANTILES, value_Q, standard_errors(drawn_RQ), strict=True):
        value[name], se[name] = _plain(v), _plain(s) if known else None

    found: dict[str, Any] = {"tokens": len(units.unit_T)}
    for name in [n for n in value if isinstance(n, str)]:
        found |= {name: value[name], f"{name}_se": se[name]}
    if not own:
        found |= {"kld_own": None, "kld_own_se": None}
    for name, key in (("expert_agreement_by_layer", "agreement"), ("mtp_acceptance", "accepted")):
        members = [n for n in value if isinstance(n, tuple) and n[0] == key]
        found |= {name: [value[n] for n in members], f"{name}_se": [se[n] for n in members]}
    found["by_position"] = [
        {"start": start, "end": end}
        | {k: v for n in by_position for k, v in ((n, value[n, start]), (f"{n}_se", se[n, start]))}
        for start, end in _parts(length)
    ]
    return found


def _parts(length: int) -> list[tuple[int, int]]:
    """A window's positions in at most POSITIONS equal parts, [start, end)."""
    edges = sorted({length * i // POSITIONS for i in range(POSITIONS + 1)})
    return list(itertools.pairwise(edges))


def _plain(x: Any) -> float | None:
    return float(x) if math.isfinite(x) else None
