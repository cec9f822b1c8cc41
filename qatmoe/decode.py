"""Text from a model, a token at a time: keys and values are kept in a cache of the types of `model.cache`.

A `Decoder` holds one sequence. Tokens are fed in runs of a few lengths, so that at most that many programs are
compiled: a prompt is padded up to such a run; its padding is seen by no token and overwritten by the next ones. Every
token attends to the whole cache behind a mask, so what comes out is `transformer.forward(..., cache=...)` up to float
rounding. MTP modules are not used.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.errors import UserError
from qatmoe.model import transformer
from qatmoe.model.attention import grouped, output, queries_keys_values
from qatmoe.model.cache import CacheType, Stored, read, store
from qatmoe.model.layers import rms_norm, rope_angles

RUNS = (1, 16, 64, 256)  # tokens per call
_LAYERS = ("dense_layers", "layers")

Memory = list[tuple[Stored, Stored]]  # keys and values of every layer, each (1, S, K, Dh) values


class Decoder:
    """One sequence: its cache, and the scores of what comes next.

    Attributes: `length` (tokens that the cache has room for), `used` (tokens in it), `cache`.
    """

    def __init__(self, params: dict[str, Any], cfg: ModelConfig, length: int, cache: CacheType | None = None):
        """Allocates the cache: cfg.n_layers * length * `cache.bytes` of a layer's keys and values.

        Args:
          params: f32, in the layout of cfg.scan_layers; quantized weights decoded.
          length: tokens to make room for; rounded up to a multiple of the longest run.
          cache: how keys and values are stored; f32 by default.

        Raises:
          UserError: heads of cfg.head_dim do not fit the cache type, or the cache does not fit into memory.
        """
        self.cache = cache or CacheType()
        self.cache.check(cfg.head_dim)
        self._params = transformer.unstack_layers(params) if cfg.scan_layers else params
        self._cfg = cfg
        self.length = -(-max(length, 1) // RUNS[-1]) * RUNS[-1]
        self.used = 0
        width = cfg.n_kv_heads * cfg.head_dim
        needed = round(cfg.n_layers * self.length * self.cache.bytes(width, width))
        if needed > (there := _device_bytes()):
            raise UserError(
                f"a cache of {self.length} tokens in {self.cache} takes {needed:,} bytes and there are {there:,}: "
                "give fewer tokens, or a smaller type of cache"
            )
        values = jax.ShapeDtypeStruct((1, self.length, cfg.n_kv_heads, cfg.head_dim), jnp.float32)
        self._memory: Memory = [
            (_empty(self.cache.k, values), _empty(self.cache.v, values)) for _ in range(cfg.n_layers)
        ]

    def feed(self, ids: Sequence[int] | np.ndarray) -> jax.Array:
        """Takes in the next tokens, one at least; scores (V,) f32 of the token after the last of them.

        Raises:
          UserError: no tokens, ids outside of the vocabulary, or more tokens than there is room for.
        """
        ids = checked_ids(ids, self._cfg)
        if self.used + len(ids) > self.length:
            raise UserError(f"{self.used + len(ids)} tokens do not fit a cache of {self.length}: give a larger length")
        for run, count in self._runs(len(ids)):
            padded = np.zeros((1, run), np.int32)
            padded[0, :count], ids = ids[:count], ids[count:]
            scores_V, self._memory = _feed(
                self._params, self._memory, padded, self.used, count - 1, self._cfg, self.cache
            )
            self.used += count
        return scores_V

    def warm_up(self, count: int, use: Callable[[jax.Array], Any] = jax.block_until_ready) -> None:
        """Compiles what takes in `count` tokens and then single ones; the cache is empty before and after.

        Args:
          use: is called with scores, to compile what the caller makes of them too.
        """
        for run in sorted({1, *(run for run, _ in self._runs(count))}):
            use(self.feed(np.zeros(run, np.int32)))
            self.used = 0

    def _runs(self, count: int) -> Iterator[tuple[int, int]]:
        """Lengths of the runs that `count` tokens are fed in, and how many of them each holds."""
        at = self.used
        while count:
            fitting = [run for run in RUNS if at + run <= self.length]
            run = min((r for r in fitting if r >= count), default=fitting[-1])
            yield run, min(run, count)
            at, count = at + min(run, count), count - min(run, count)


@functools.partial(jax.jit, static_argnums=(5, 6), donate_argnums=1)
def _feed(
    params: dict[str, Any],
    memory: Memory,
    tokens_BL: jax.Array,
    start: jax.Array,
    last: jax.Array,
    cfg: ModelConfig,
    cache: CacheType,
) -> tuple[jax.Array, Memory]:
    """Writes tokens (1, L) at start, start + 1, ..; the scores (V,) after token `last` of them, and the cache."""
    L, S = tokens_BL.shape[1], memory[0][0].codes.shape[1]
    positions_BL = start + jnp.arange(L)[None]
    rope = rope_angles(positions_BL, cfg.head_dim, cfg.rotary_fraction, cfg.rope_theta)
    seen_BLS = jnp.arange(S) <= positions_BL[..., None]
    implementation = "gathered" if L == 1 else transformer.eval_experts(cfg, 1)
    written: Memory = []

    def attend(attn: dict[str, Any], x_BLD: jax.Array) -> jax.Array:
        q_BLHDh, *new = queries_keys_values(attn, cfg, x_BLD, rope, cache)
        kinds, old = (cache.k, cache.v), memory[len(written)]
        k, v = (_write(kind, a, b, start) for kind, a, b in zip(kinds, old, new, strict=True))
        written.append((k, v))
        k_BSKDh, v_BSKDh = (read(kind, a).astype(x_BLD.dtype) for kind, a in zip(kinds, (k, v), strict=True))
        mixed_BLHDh = grouped(q_BLHDh, k_BSKDh, v_BSKDh, seen_BLS, cfg.head_dim**-0.5)
        return output(attn, mixed_BLHDh, cache)

    x_BLD = params["embed"][tokens_BL].astype(jnp.dtype(cfg.dtype))
    for stack in _LAYERS:
        for i in range(len(params.get(stack, {}))):
            x_BLD, _ = transformer.block(params[stack][str(i)], cfg, x_BLD, attend, implementation)
    hidden_D = rms_norm(x_BLD[0, last], params["norm"], cfg.norm_eps)
    return transformer.logits(params, cfg, hidden_D), written


def _device_bytes() -> int:
    """Memory of the device in bytes, free or not: a GPU's own, or that of the machine."""
    found = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return found or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _empty(kind: str, values: jax.ShapeDtypeStruct) -> Stored:
    """Room for values in a cache type."""
    shapes = jax.eval_shape(functools.partial(store, kind), values)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _write(kind: str, old: Stored, x_BLKDh: jax.Array, start: jax.Array) -> Stored:
    """`old` with the tokens x from position `start` on."""
    return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=1), old, store(kind, x_BLKDh)
    )


# ---- choosing tokens -------------------------------------------------------------------------------------------------


@jax.jit
def probabilities(scores_V: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """The distribution (V,) f32 that tokens are drawn from.

    In transformers' order: scores are divided by the temperature (> 0), then the top_k most probable tokens are kept
    (0: all), then of these the fewest whose probabilities, renormalised, reach top_p (the one that crosses it is kept;
    1: all). Of equal scores the lower ids come first.
    """
    smallest = jnp.finfo(jnp.float32).tiny  # less than that counts as 0, and 0 / 0 is NaN
    scores_V = (scores_V - jnp.max(scores_V)) / jnp.maximum(temperature, smallest)  # no largest score overflows
    order_V = jnp.argsort(-scores_V, stable=True)
    rank_V = jnp.arange(scores_V.size)
    scores_V = jnp.where((top_k == 0) | (rank_V < top_k), scores_V[order_V], -jnp.inf)
    probs_V = jax.nn.softmax(scores_V)
    before_V = jnp.cumsum(probs_V) - probs_V
    kept_V = jnp.where((rank_V == 0) | (before_V < top_p) | (top_p >= 1), probs_V, 0.0)
    return jnp.zeros_like(kept_V).at[order_V].set(kept_V / jnp.sum(kept_V))


@jax.jit
def _draw(key: jax.Array, scores_V: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    return jax.random.categorical(key, jnp.log(probabilities(scores_V, temperature, top_k, top_p)))


def generate(
    params: dict[str, Any],
    cfg: ModelConfig,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    cache: CacheType | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    warm_up: bool = False,
) -> Iterator[int]:
    """Continues a prompt; yields each new token as soon as it is chosen.

    Args:
      params, cfg, cache: as for `Decoder`.
      max_tokens: tokens to yield at most.
      temperature: 0 takes the most probable token; `probabilities` says what the next three do.
      seed: of the draws; the same arguments give the same tokens.
      stop_ids: tokens that end the text; they are not yielded.
      warm_up: whether everything is compiled before this returns, for who takes the time of the tokens.

    Raises:
      UserError: an unusable argument, at once and not at the first token.
    """
    ids = checked_ids(prompt_ids, cfg)
    check_sampling(max_tokens, temperature, top_k, top_p, seed)
    decoder = Decoder(params, cfg, len(ids) + max_tokens, cache)
    key, top_k = jax.random.key(seed), min(top_k, cfg.vocab_size)

    def choose(scores_V: jax.Array, i: int = 0) -> int:
        if temperature == 0:
            return int(jnp.argmax(scores_V))
        return int(_draw(jax.random.fold_in(key, i), scores_V, temperature, top_k, top_p))

    if warm_up:
        decoder.warm_up(len(ids), choose)
    return _tokens(decoder, ids, max_tokens, choose, frozenset(stop_ids))


def _tokens(
    decoder: Decoder,
    ids: np.ndarray,
    max_tokens: int,
    choose: Callable[[jax.Array, int], int],
    stop_ids: frozenset[int],
) -> Iterator[int]:
    for i in range(max_tokens):
        token = choose(decoder.feed(ids), i)
        if token in stop_ids:
            return
        yield token
        ids = np.array([token])


def stream_text(
    tokens: Iterable[int],
    decode: Callable[[list[int]], str],
    prompt_ids: Sequence[int] | np.ndarray,
    stop: Sequence[str],
) -> Iterator[str]:
    """The text of tokens piece by piece, as soon as later tokens cannot change it.

    Held back are characters whose bytes are not all there yet, and what may be the beginning of a stop string. The text
    ends before the first stop string in it.

    Args:
      decode: ids to text, where unfinished characters become U+FFFD (`Tokenizer.decode`).
      prompt_ids: what comes before; some tokenizers write a token differently at the beginning of a text.
    """
    ids = [int(i) for i in prompt_ids]
    start, end = max(0, len(ids) - 8), len(ids)  # a stretch whose text is known, to tell what the next tokens add to it
    held = ""
    for token in tokens:
        ids.append(token)
        known, text = decode(ids[start:end]), decode(ids[start:])
        if text.endswith("\ufffd"):
            continue
        held += text[len(known) :]
        start, end = end, len(ids)
        safe, stopped = _safe(held, stop)
        if safe:
            yield held[:safe]
        if stopped:
            return
        held = held[safe:]
    held += decode(ids[start:])[len(decode(ids[start:end])) :]
    safe, stopped = _safe(held, stop)
    if rest := held[:safe] if stopped else held:
        yield rest


def _safe(text: str, stop: Sequence[str]) -> tuple[int, bool]:
    """How many characters of `text` no stop string can take back, and whether one begins there."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    if found:
        return min(found), True
    begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return len(text) - max(begun, default=0), False


def checked_ids(ids: Sequence[int] | np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Token ids as int32. Raises UserError if there are none, or ids that the model has no row for."""
    array = np.asarray(ids, np.int64)
    if not array.size:
        raise UserError("the prompt is empty: give one token at least")
    if array.min() < 0 or array.max() >= cfg.vocab_size:
        bad = next(int(i) for i in array if not 0 <= i < cfg.vocab_size)
        raise UserError(f"token {bad} is outside of the model's vocabulary of {cfg.vocab_size}")
    return array.astype(np.int32)


def check_sampling(max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises UserError for values that no token can be drawn with."""
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be 0 (the most probable token) or more")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be more than 0 and at most 1")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed={seed}: must be from 0 to {(1 << 32) - 1}")
