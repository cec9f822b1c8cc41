"""The types of a key/value cache: what attention reads back after a key or a value was stored in one of llama.cpp's.

    f32, bf16   32 or 16 bits a value
    q8_0        8.5 bits: per 32 values d = max|x| / 127, and round(x / d), halves away from zero
    q4_0        4.5 bits: d = m / -8, m the value of largest size (the first of equals), and x / d + 8.5 cut off
    iq4_nl      4.5 bits: the levels nearest to x / (m / -127), then the d of least squared error weighted by x^2

These are the reference rules of ggml-quants.c (`quantize_row_*_ref`), which a cache write follows: scales keep all 11
bits of a float16, unlike those of the training grids, and codes come from the scale before it is rounded to that. On a
CPU the result equals ggml's bit for bit. llama.cpp's kernels differ from its reference where x / d lies within a
rounding error of a boundary (with AVX, q8_0 rounds halves to even; CUDA adds iq4_nl's sums in pairs).

A key is stored after RoPE, blocks run along the head, and a token reads its own key and value back from the cache too
(llama-graph.cpp: `build_attn` stores first and then reads).

Rotation (llama-kv-cache.cpp; on by default there for quantized types): queries and keys are multiplied by an
orthonormal Walsh-Hadamard matrix before keys are stored: their products stay, and outliers are spread over a block.
Its width is the largest 64 * 2^n that divides head_dim for keys, and 64 for values, which are turned as well, and the
mixed values back. Only a quantized K or V is turned, and only where 64 divides head_dim.

Queries: ggml rounds them before it multiplies them with keys, to q8_0 for quantized keys and to bfloat16 for such keys
(ggml-cpu.c: `vec_dot_type`; CUDA's kernel for single tokens takes 8 bits too, those for long prompts do not), and so do
we. With that, scores are those of llama.cpp on a CPU, with flash attention, up to float rounding. Not emulated: flash
attention, which a quantized V needs, takes keys or values of an f32 cache in float16.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS
from qatmoe.quant.pack import join_nibbles, split_nibbles

KINDS = ("f32", "bf16", "q8_0", "q4_0", "iq4_nl")
_PLAIN = {"f32": jnp.float32, "bf16": jnp.bfloat16}
_ROTATED = "+rot"
_ROTATION = 64  # narrowest rotation
_IQ4_NL_ZERO = 1e-15  # blocks below are stored as zeros (ggml-quants.c: GROUP_MAX_EPS)


@dataclasses.dataclass(frozen=True)
class CacheType:
    """How keys and values are stored. Hashable: a static argument of jit."""

    k: str = "f32"
    v: str = "f32"
    rotate: bool = False

    @classmethod
    def parse(cls, text: str, aliases: Mapping[str, str] = MappingProxyType({})) -> "CacheType":
        """Reads "q4_0", "q8_0/q4_0" (keys, values) or either with "+rot"; `str` is the inverse.

        Args:
          aliases: further names of types.

        Raises:
          UserError: an unknown type, or a rotation with nothing quantized.
        """
        kinds = [aliases.get(kind, kind) for kind in text.removesuffix(_ROTATED).split("/")]
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or len(kinds) > 2:
            what = f"has no type {unknown[0]!r}" if unknown else "has more than two types"
            raise UserError(
                f"cache {text!r} {what}: give one of {', '.join([*aliases, *KINDS])}, or two as in q8_0/q4_0 "
                f"(keys/values); {_ROTATED} at the end rotates"
            )
        found = cls(kinds[0], kinds[-1], text.endswith(_ROTATED))
        if found.rotate and not {found.k, found.v} - set(_PLAIN):
            raise UserError(f"cache {text!r}: only q8_0, q4_0 and iq4_nl are rotated; leave {_ROTATED} out")
        return found

    def __str__(self) -> str:
        return (self.k if self.k == self.v else f"{self.k}/{self.v}") + (_ROTATED if self.rotate else "")

    def bytes(self, keys: int, values: int) -> float:
        """Bytes that a layer stores for a token of so many numbers of keys and of values, scales included."""
        return (keys * _bits(self.k) + values * _bits(self.v)) / 8

    def check(self, head_dim: int, name: str = "") -> None:
        """Raises UserError where llama.cpp could not store, or would not rotate, heads of that width.

        Args:
          name: what the user wrote for the type, where that is not its `str`.
        """
        for kind in (self.k, self.v):
            if kind not in _PLAIN and head_dim % GRIDS[kind].block:
                raise UserError(
                    f"cache {name or self}: blocks of {GRIDS[kind].block} values do not divide "
                    f"head_dim={head_dim}; use bf16"
                )
        if self.rotate and head_dim % _ROTATION:
            raise UserError(
                f"cache {name or self}: llama.cpp rotates only where {_ROTATION} divides head_dim, which is "
                f"{head_dim}; leave {_ROTATED} out"
            )


class Stored(NamedTuple):
    """Keys or values as the cache holds them, (..., Dh) values: a pytree whose bytes are those of the type."""

    codes: jax.Array  # the values in their own dtype; uint8 (..., Dh) for q8_0; uint8 (..., Dh / 2), two codes a byte
    scale: jax.Array | None = None  # f16 (..., Dh / 32)


def store(kind: str, x: jax.Array) -> Stored:
    """x (..., Dh) of any float dtype in a cache type. Blocks of 32 must divide Dh (`CacheType.check`)."""
    if kind in _PLAIN:
        return Stored(x.astype(_PLAIN[kind]))
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, GRIDS[kind].block)
    codes, scale_G = {"q8_0": _q8_0, "q4_0": _q4_0, "iq4_nl": _iq4_nl}[kind](blocks)
    codes = codes.astype(jnp.uint8).reshape(x.shape)
    return Stored(codes if kind == "q8_0" else join_nibbles(codes, 16), scale_G.astype(jnp.float16))


def read(kind: str, stored: Stored) -> jax.Array:
    """The values (..., Dh) that `stored` stands for, f32."""
    if stored.scale is None:
        return stored.codes.astype(jnp.float32)
    codes = stored.codes if kind == "q8_0" else split_nibbles(stored.codes, 16)
    return GRIDS[kind].decode(codes, stored.scale.astype(jnp.float32))


def round_kv(cache: CacheType, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values (..., Dh), turned already where the type rotates, as attention reads them back; dtypes stay."""
    return read(cache.k, store(cache.k, k)).astype(k.dtype), read(cache.v, store(cache.v, v)).astype(v.dtype)


def round_queries(cache: CacheType, q: jax.Array) -> jax.Array:
    """Queries (..., Dh) as the stored keys meet them: turned like these, and rounded; the dtype stays."""
    kind = cache.k if cache.k in _PLAIN else "q8_0"
    return read(kind, store(kind, turn_keys(cache, q))).astype(q.dtype)


def turn_keys(cache: CacheType, x: jax.Array) -> jax.Array:
    """Keys (..., Dh) in the rotation that they are stored in, if there is one. Its own inverse."""
    width = x.shape[-1] & -x.shape[-1]  # the largest power of two that divides it, 64 at least: `check`
    return _turn(x, width) if cache.rotate and cache.k not in _PLAIN else x


def turn_values(cache: CacheType, x: jax.Array) -> jax.Array:
    """Values, or what attention mixed of them, (..., Dh): as `turn_keys`."""
    return _turn(x, _ROTATION) if cache.rotate and cache.v not in _PLAIN else x


def _turn(x: jax.Array, width: int) -> jax.Array:
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, width)
    turned = jnp.einsum("...i,io->...o", blocks, _hadamard(width), precision=jax.lax.Precision.HIGHEST)
    return turned.reshape(x.shape).astype(x.dtype)


@functools.cache
def _hadamard(width: int) -> np.ndarray:
    """Sylvester's matrix of a power of two, orthonormal and symmetric, f32."""
    signs = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * (width.bit_length() - 1))
    return (signs / np.sqrt(width)).astype(np.float32)


def _bits(kind: str) -> float:
    """Stored bits of a value."""
    return 8.0 * jnp.dtype(_PLAIN[kind]).itemsize if kind in _PLAIN else GRIDS[kind].bits


# ---- ggml's rules: x (..., G, 32) f32 -> codes of the grid's table, f32 scales (..., G) ------------------------------
#
# Written so that XLA cannot round otherwise than C does. It joins a product and a sum into one operation (FMA), divides
# by a constant by multiplying with its inverse, and takes 1 / (a / b) for b / a; conditions in between keep it from
# seeing the last two.


def _q8_0(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    d_G = _divided(jnp.max(jnp.abs(x), axis=-1), 127.0)
    level = jax.lax.round(x * _inverse(d_G)[..., None], jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    return level.clip(-127, 127) + 128, d_G


def _q4_0(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    d_G = _largest(x) / -8
    return _count(x * _inverse(d_G)[..., None], _q4_0_starts()), d_G


def _iq4_nl(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    levels = np.asarray(GRIDS["iq4_nl"].levels, np.float32)
    largest_G = _largest(x)
    unit = x * _inverse(_divided(largest_G, levels[0]))[..., None]
    codes = _count(unit, (levels[:-1] + levels[1:]) / 2)
    level = jnp.asarray(levels)[codes]
    weighted = x * x * level
    top_G, bottom_G = _sum_in_order(weighted * x), _sum_in_order(weighted * level)
    d_G = jnp.where(bottom_G > 0, top_G / bottom_G, 0.0)
    return codes, jnp.where(jnp.abs(largest_G) < _IQ4_NL_ZERO, 0.0, d_G)


def _divided(x: jax.Array, by: float) -> jax.Array:
    """x / by, correctly rounded."""
    return x / jnp.where(x == x, jnp.float32(by), x)


def _inverse(d_G: jax.Array) -> jax.Array:
    """1 / d, and 0 of 0."""
    return jnp.where(d_G == 0, 0.0, 1.0 / jnp.where(d_G == 0, 1.0, d_G))


def _largest(x: jax.Array) -> jax.Array:
    """The value of largest size in each block, the first of equals, with its sign."""
    first = jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.take_along_axis(x, first, axis=-1)[..., 0]


def _count(x: jax.Array, starts: np.ndarray) -> jax.Array:
    """The code of each x, int32: how many codes' `starts` (ascending, code 0 has none) it reaches."""
    return sum((x >= start).astype(jnp.int32) for start in starts)


@functools.cache
def _q4_0_starts() -> np.ndarray:
    """The smallest f32 x whose f32 sum x + 8.5 reaches 1, 2, .. 15."""
    starts = []
    for code in range(1, 16):
        start = np.float32(code - 8.5)
        while (below := np.nextafter(start, np.float32(-9))) + np.float32(8.5) >= code:
            start = below
        starts.append(start)
    return np.array(starts)


def _sum_in_order(x: jax.Array) -> jax.Array:
    """Sum over the last axis, one after another from the first."""
    return jax.lax.scan(lambda sum_G, x_G: (sum_G + x_G, None), jnp.zeros_like(x[..., 0]), jnp.moveaxis(x, -1, 0))[0]
