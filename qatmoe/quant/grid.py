"""The definition of each grid: which weights a deployment format can hold, and how to choose them.

Every format is described by one model: `weight = levels[code] * scale`, with one effective scale per
`block` consecutive weights of the last axis (the contraction axis). A weight has shape (..., I), its
codes (..., I) uint8, its scales (..., G) float32 with G = I / block. What distinguishes the formats is
the level table and the set of scales that can be stored; `Grid.snap` projects onto that set.

Scales are kept coarser than the format could store, so that decoded weights are exact in float32 and,
where `bf16_exact` says so, in bfloat16 (8 significant bits) too:

q2_0, ternary  float16 d with 8 significant bits; levels -1, 0, 1, 2 add none.
q4_0           float16 d with 5 significant bits; the codes -8..7 need 3 more. Next to the full 11 bits this
               raises the squared error of Gaussian weights by half a percent.
iq4_nl, q8_0   float16 d with 8 significant bits; 7-bit levels make products of 15 bits: exact in float32 only.
q2_k           d * k per 16 weights, k = 1..15, d = {1, 1.5} * 2^e per 256 (stored: scale k, min k, dmin = 1.5 d).
               Numerators reach 3 * 15 * 3 = 135 < 256.
q3_k           d * k per 16 weights, 1 <= |k| <= 31, d = 2^e per 256. Numerators reach 31 * 3 = 93.
mxfp4          2^e (E8M0).
nvfp4          E4M3 times one power of two per (out, in) matrix: 2-bit times 4-bit significands.

float16 scales stay within [2^-17, 65504]: down to 2^-17 a float16, subnormals included, still has 8
significant bits. Larger weights are clipped, smaller ones round to the nearest level of the smallest
scale. A block of zeros decodes to zeros: where a level 0 exists by that level, elsewhere (q2_k, iq4_nl)
by scale 0, which both rules choose and `snap` keeps. Learned scales start at 2^-17 there and not at 0
(`fake.init_scales`): then it decodes to 2^-17 in iq4_nl, to -d / 2 in q2_k, -2^-18 where d is smallest.
NaN and inf give NaN scales, so they reach the loss instead of vanishing.

All choices are made by comparisons of exactly representable products and by integer sums, so that numpy,
jax on any device, jitted or not, agree bit for bit. Byte layouts are in `pack`.
"""

import dataclasses
import difflib
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.errors import UserError

Array = Any  # a numpy or a jax array; results are of the same kind as the arguments

MIN_F16 = 2.0**-17
RULES = ("absmax", "search")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _xp(*arrays: Array) -> Any:
    """jax.numpy if any argument is a jax array, else numpy."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _floor_log2(x: Array) -> Array:
    """floor(log2(x)) as int32 for x >= 0, from the exponent bits; -127 for zero and subnormals."""
    return (x.view(np.int32) >> 23) - 127


def _pow2(exponent: Array) -> Array:
    """2**exponent as float32, exact (exp2 is not, on every backend); exponents are clipped to normals."""
    return ((exponent.clip(-126, 127) + 127) << 23).astype(np.int32).view(np.float32)


def _round_significand(x: Array, bits: int) -> Array:
    """Round float32 to `bits` significant bits, ties to even."""
    drop = 24 - bits
    raw = x.view(np.int32)
    return ((raw + ((1 << (drop - 1)) - 1) + ((raw >> drop) & 1)) & ~((1 << drop) - 1)).view(np.float32)


def _weights(w: Array) -> Array:
    """w as float32, subnormals as 0: XLA on a CPU takes them for 0 in comparisons and numpy does not."""
    xp = _xp(w)
    x = xp.asarray(w, np.float32)
    return xp.where(abs(x) < np.float32(2.0**-126), np.float32(0.0), x)


@dataclasses.dataclass(frozen=True)
class Grid:
    """One grid. Compare by value; usable as a static argument of jit.

    Arrays are numpy or jax; weights are taken as float32. Methods that need whole rows expect the last
    axis to be a multiple of `superblock` (the plan checks it with a readable error).
    """

    name: str
    levels: tuple[float, ...]  # code -> value in units of the scale; the code is what the format stores
    block: int  # weights per effective scale
    superblock: int  # a row must be a multiple of this
    bits: float  # stored bits per weight, scales included
    gguf: tuple[str, ...]  # GGUF types that hold it bit for bit; the first is the default
    scales: str  # "f16", "e8m0", or with a factor shared by several blocks "q2_k", "q3_k", "nvfp4"
    absmax_level: float  # level that the absmax rule gives to the largest weight of a block
    search_range: tuple[float, float, int]  # searched |scale|, relative to absmax: from, to, steps
    search_levels: tuple[float, ...]  # levels the largest weight may have; enough to refind any grid point
    signed: bool = False  # the scale may be negative (it turns an asymmetric level table around)
    scale_bits: int = 8  # significant bits of a float16 scale
    first_code: int = 0  # codes below are valid in files but never chosen
    bf16_exact: bool = True  # decoded weights are exact in bfloat16

    def unsigned(self) -> "Grid":
        """The same format with scales that are never negative; itself where they never are.

        The largest weight of a block then lies on the largest level, and what is below the lowest one is clipped.
        """
        if not self.signed:
            return self
        sizes = sorted({abs(level) for level in self.search_levels}, reverse=True)
        return dataclasses.replace(
            self, signed=False, absmax_level=float(max(self.levels)), search_levels=tuple(map(float, sizes))
        )

    # ---- scales -------------------------------------------------------------------------------

    def snap(self, scale: Array) -> Array:
        """Nearest storable effective scales. Idempotent; shape (..., G), float32.

        Grids whose blocks share a factor derive it from the largest scale that shares it: 16 blocks of a
        row for q2_k and q3_k, a whole (out, in) matrix for nvfp4.
        """
        scale = _xp(scale).asarray(scale, np.float32)
        return self._round(scale, self.shared_index(scale))

    def shared_index(self, scale: Array) -> Array | None:
        """Index of the factor shared between blocks, int32 of the shape of `scale`; None if there is none.

        The thresholds lie half-way between the values that the largest scale can take on either side, which
        is what makes `snap` idempotent. `shared_factor` turns an index into the factor. Scales that are NaN are left
        out of account: a broken block does not alter its neighbours.
        """
        if self.scales in ("f16", "e8m0"):
            return None
        xp = _xp(scale)
        top = self._group_max(xp.where(xp.isnan(scale), np.float32(0.0), abs(scale)))
        if self.scales == "q2_k":  # index 2e is the factor 2^e, 2e + 1 is 1.5 * 2^e
            e = _floor_log2(top) - 3
            index = 2 * e - 1 + (top > 11.5 * _pow2(e)) + (top > 14.25 * _pow2(e))
            return index.astype(np.int32).clip(-34, 30)
        shift, largest, bound = (4, 31.0, (-17, 15)) if self.scales == "q3_k" else (8, 448.0, (-100, 100))
        e = _floor_log2(top) - shift
        return (e + (top > largest * _pow2(e))).astype(np.int32).clip(*bound)

    def shared_factor(self, index: Array) -> Array:
        """The factor d (q2_k, q3_k) or the matrix scale (nvfp4) of an index from `shared_index`."""
        if self.scales != "q2_k":
            return _pow2(index)
        return _pow2(index >> 1) * _xp(index).where(index & 1, np.float32(1.5), np.float32(1.0))

    def _round(self, scale: Array, index: Array) -> Array:
        """Nearest storable scale, given the shared factor's index (None for grids without one)."""
        xp = _xp(scale)
        size = abs(scale) if self.signed else xp.maximum(scale, np.float32(0.0))
        if self.scales == "f16":
            largest = (2.0 - 2.0 ** (1 - self.scale_bits)) * 2.0**15
            out = _round_significand(size.clip(MIN_F16, largest), self.scale_bits)
        elif self.scales == "e8m0":
            raw = size.clip(2.0**-120, 2.0**125).view(np.int32)
            exponent = (raw >> 23) - 127 + ((raw & 0x7FFFFF) > 0x3504F3)  # up from sqrt(2), the middle in log
            out = _pow2(exponent.clip(-120, 125))  # from 2^-120 midpoints between levels are normal numbers
        elif self.scales == "nvfp4":
            unit = (size * _pow2(-index)).clip(2.0**-9, 448.0)
            fine = xp.rint(unit * 512.0) * np.float32(2.0**-9)  # E4M3 subnormals
            out = xp.where(unit < 2.0**-6, fine, _round_significand(unit, 4)) * _pow2(index)
        elif self.scales == "q3_k":
            out = xp.rint((size * _pow2(-index)).clip(1.0, 31.0)) * _pow2(index)
        else:
            odd = (index & 1) == 1
            unit = size * _pow2(-(index >> 1)) * xp.where(odd, np.float32(2 / 3), np.float32(1.0))
            largest = xp.where(odd, np.float32(15.0), np.float32(14.0))
            out = xp.minimum(xp.rint(xp.maximum(unit, np.float32(1.0))), largest) * self.shared_factor(index)
        if 0.0 not in self.levels:
            out = xp.where(size == 0, np.float32(0.0), out)
        if self.signed:
            out = xp.where(scale < 0, -out, out)
        return xp.where(xp.isnan(scale), scale, out)

    def _group_max(self, x: Array) -> Array:
        """Maximum over the blocks that share a factor, broadcast back to the shape (..., G)."""
        return self._per_group(x, lambda a, axis: a.max(axis, keepdims=True))

    def _per_group(self, x: Array, reduce: Any) -> Array:
        xp = _xp(x)
        if self.scales == "nvfp4":
            return xp.broadcast_to(reduce(x, tuple(range(max(x.ndim - 2, 0), x.ndim))), x.shape)
        grouped = x.reshape(*x.shape[:-1], -1, self.superblock // self.block)
        return xp.broadcast_to(reduce(grouped, -1), grouped.shape).reshape(x.shape)

    # ---- codes --------------------------------------------------------------------------------

    def nearest(self, w: Array, scale: Array) -> Array:
        """Codes of the levels nearest to w: uint8 of the shape of w. `scale` is taken as it is (snap it first).

        A weight half-way between two levels goes to the one with the smaller level value.
        """
        table = np.arange(len(self.levels), dtype=np.uint8)
        return self._assign(w, scale, table)

    def quantize(self, w: Array, scale: Array) -> Array:
        """decode(nearest(w, scale), scale) without the codes: float32 of the shape of w."""
        table = np.asarray(self.levels, np.float32)
        return self._scaled(self._assign(w, scale, table), scale)

    def decode(self, codes: Array, scale: Array) -> Array:
        """levels[codes] * scale: float32 of the shape of codes. Exact for snapped scales."""
        table = _xp(codes).asarray(self.levels, np.float32)
        return self._scaled(table[codes], scale)

    def _scaled(self, unit: Array, scale: Array) -> Array:
        return (self._blocks(unit) * scale[..., None]).reshape(unit.shape)

    def _blocks(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.block, self.block)

    @functools.cached_property
    def _order(self) -> list[int]:
        """Usable codes by ascending level, one code per level."""
        chosen = {self.levels[c]: c for c in reversed(range(self.first_code, len(self.levels)))}
        return [chosen[level] for level in sorted(chosen)]

    def _assign(self, w: Array, scale: Array, table: np.ndarray) -> Array:
        """table[code of the nearest level], elementwise.

        Compares w with midpoint * scale, which is exact, instead of rounding w / scale, which is not the same
        number on every backend.
        """
        xp = _xp(w, scale)
        x = self._blocks(_weights(w))
        s = scale[..., None]
        if self.signed:
            x, s = xp.where(s < 0, -x, x), abs(s)
        if len(self.levels) > 4 and set(np.diff(self.levels)) == {1.0}:
            level = self._nearest_integer(x, s)
            out = level if table.dtype == np.float32 else (level - self.levels[0]).astype(table.dtype)
            return out.reshape(w.shape)
        out = xp.full(x.shape, table[self._order[0]])
        for low, high in itertools.pairwise(self._order):
            middle = np.float32((self.levels[low] + self.levels[high]) / 2)
            out = xp.where(x > middle * s, table[high], out)
        return out.reshape(w.shape)

    def _nearest_integer(self, x: Array, s: Array) -> Array:
        """The chain of comparisons for consecutive integers: a guess by division, corrected exactly."""
        xp = _xp(x)
        low, high = self.levels[self.first_code], self.levels[-1]
        guess = xp.rint((x / s).clip(low, high))
        guess = guess + (x > (guess + 0.5) * s) - (x <= (guess - 0.5) * s)
        return guess.clip(low, high)

    # ---- choosing scales ----------------------------------------------------------------------

    def absmax(self, w: Array) -> Array:
        """Scales that give the largest weight of each block the level `absmax_level`: (..., G), snapped.

        The rule of the format's usual quantizer: OCP's exponent for mxfp4, the signed maximum for signed
        scales. Quantizing its own result changes nothing, except in q3_k blocks with |k| = 3, in nvfp4 blocks whose
        E4M3 scale is subnormal, and where weights are so small that the smallest storable scale is too large for them.
        """
        x = self._blocks(_weights(w))
        return self._checked(x, self.snap(self._anchor(self._unbroken(x)) * np.float32(1 / self.absmax_level)))

    def search(self, w: Array) -> Array:
        """Scales of least squared error among a fixed set of candidates: (..., G), snapped.

        Candidates: those that put the largest weight on a level, so that a point of the grid is found again
        with error 0, and a geometric range around absmax; both signs where the scale is signed; for q2_k and
        q3_k under several shared factors. Loops over candidates, so memory stays at a few arrays of the size
        of w. numpy arguments are computed by jax.
        """
        if isinstance(w, jax.Array):
            return _search(self, w)
        return np.asarray(_search(self, jnp.asarray(w, jnp.float32)))

    def scale_of(self, w: Array, rule: str) -> Array:
        """Snapped scales of w, (..., width // block), by "absmax" or "search". Raises UserError for another rule."""
        if rule not in RULES:
            raise UserError(f"unknown scale rule {rule!r}; use one of {', '.join(RULES)}")
        return self.absmax(w) if rule == "absmax" else self.search(w)

    def encode(self, w: Array, rule: str = "search") -> tuple[Array, Array]:
        """(codes, scale) of w under a scale rule."""
        scale = self.scale_of(w, rule)
        return self.nearest(w, scale), scale

    def _anchor(self, x: Array) -> Array:
        """What candidate scales are multiples of: the largest weight of each block, with its sign if that matters."""
        if self.scales == "e8m0":
            return _pow2(_floor_log2(abs(x).max(-1)))
        if self.signed:
            high, low = x.max(-1), x.min(-1)
            return _xp(x).where(high >= -low, high, low)
        return abs(x).max(-1)

    def _unbroken(self, x: Array) -> Array:
        """x, with zeros for blocks that hold NaN or inf, so that these do not reach blocks that share their factor."""
        xp = _xp(x)
        return xp.where(xp.isfinite(abs(x).max(-1, keepdims=True)), x, np.float32(0.0))

    def _checked(self, x: Array, scale: Array) -> Array:
        """NaN scales for blocks that hold NaN or inf."""
        xp = _xp(x)
        return xp.where(xp.isfinite(abs(x).max(-1)), scale, np.float32(np.nan))

    @functools.cached_property
    def _multipliers(self) -> np.ndarray:
        """Candidate scales as multiples of the anchor, largest magnitude first.

        Largest first matters for shared factors: among equally good scales the largest keeps the factor.
        """
        low, high, steps = self.search_range
        around = np.geomspace(low, high, steps) / abs(self.absmax_level) if steps else np.zeros(0)
        if self.signed:
            around = np.concatenate([around, -around])
        exact = 1.0 / np.asarray(self.search_levels, np.float64)
        both = np.concatenate([exact, around]).astype(np.float32)
        return both[np.argsort(-abs(both), kind="stable")]

    def _error(self, x: Array, scale: Array, inverse: Array) -> Array:
        """Squared error of each block as int32, in units that depend only on `inverse`: (..., G).

        Integer sums do not depend on the order of summation; rounding up keeps 0 for exact blocks alone.
        """
        weight = 2.0 ** (26 - int(np.log2(self.block)))
        off = (x - self.quantize(x.reshape(*x.shape[:-2], -1), scale).reshape(x.shape)) * inverse[..., None]
        return jnp.ceil(jnp.minimum(off * off, 16.0) * weight).astype(jnp.int32).sum(-1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _search(grid: Grid, w: jax.Array) -> jax.Array:
    blocks = grid._blocks(_weights(w))
    x = grid._unbroken(blocks)
    size = abs(x).max(-1)
    anchor = grid._anchor(x)
    multipliers = jnp.asarray(grid._multipliers)

    def best_scales(index: jax.Array | None) -> jax.Array:
        inverse = _pow2(-_floor_log2(size))

        def try_candidate(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            scale = grid._round(anchor * multipliers[i], index)
            error = grid._error(x, scale, inverse)
            return jnp.where(error < best[0], error, best[0]), jnp.where(error < best[0], scale, best[1])

        start = jnp.full(size.shape, np.iinfo(np.int32).max), jnp.zeros_like(size)
        return jax.lax.fori_loop(0, len(grid._multipliers), try_candidate, start)[1]

    base = grid.shared_index(size * np.float32(1 / abs(grid.absmax_level)))
    if base is None:
        return grid._checked(blocks, best_scales(None))
    inverse = _pow2(-_floor_log2(grid._group_max(size)))
    offsets = jnp.asarray(_SHARED_OFFSETS[grid.scales])

    def try_factor(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale = grid.snap(best_scales(base + offsets[i]))  # snapped: judged as it will be stored
        error = grid._error(x, scale, inverse).astype(jnp.float32)
        error = grid._per_group(error, lambda a, axis: a.sum(axis, keepdims=True))
        return jnp.where(error < best[0], error, best[0]), jnp.where(error < best[0], scale, best[1])

    start = jnp.full(size.shape, jnp.inf), jnp.zeros_like(size)
    return grid._checked(blocks, jax.lax.fori_loop(0, len(offsets), try_factor, start)[1])


# Shared factors tried by `search`, as steps of the index from the one that absmax would take.
_SHARED_OFFSETS = {
    "q2_k": np.arange(-2, 5, dtype=np.int32),
    "q3_k": np.arange(-1, 3, dtype=np.int32),
    "nvfp4": np.arange(0, 3, dtype=np.int32),
}
_FP4 = (*_E2M1, *(-v if v else v for v in _E2M1))
_TERNARY: dict[str, Any] = {
    "levels": (-1.0, 0.0, 1.0),
    "scales": "f16",
    "absmax_level": 1.0,
    "search_range": (0.2, 1.0, 24),
    "search_levels": (1.0,),
}

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid(
            name="q2_0",
            levels=(-1.0, 0.0, 1.0, 2.0),
            block=64,
            superblock=64,
            bits=2.25,
            gguf=("Q2_0",),
            scales="f16",
            signed=True,
            absmax_level=2.0,
            search_range=(0.24, 1.6, 24),
            search_levels=(2.0, 1.0, -1.0),
        ),
        Grid(name="ternary", block=64, superblock=64, bits=2.25, gguf=("Q2_0",), **_TERNARY),
        Grid(name="ternary_256", block=256, superblock=256, bits=2.0625, gguf=("TQ2_0", "TQ1_0", "Q2_0"), **_TERNARY),
        Grid(
            name="q2_k",
            levels=(-1.5, -0.5, 0.5, 1.5),
            block=16,
            superblock=256,
            bits=2.625,
            gguf=("Q2_K",),
            scales="q2_k",
            absmax_level=1.5,
            search_range=(0.4, 1.1, 12),
            search_levels=(1.5, 0.5),
        ),
        Grid(
            name="q3_k",
            levels=tuple(float(q) for q in range(-4, 4)),
            block=16,
            superblock=256,
            bits=3.4375,
            gguf=("Q3_K",),
            scales="q3_k",
            signed=True,
            absmax_level=-4.0,
            search_range=(0.7, 1.35, 8),
            search_levels=(-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0),
        ),
        Grid(
            name="q4_0",
            levels=tuple(float(q) for q in range(-8, 8)),
            block=32,
            superblock=32,
            bits=4.5,
            gguf=("Q4_0",),
            scales="f16",
            scale_bits=5,
            signed=True,
            absmax_level=-8.0,
            search_range=(0.7, 1.15, 8),
            search_levels=(-8.0, -7.0, -6.0, -5.0, -4.0, 4.0, 5.0, 6.0, 7.0),
        ),
        Grid(
            name="iq4_nl",
            levels=tuple(float(v) for v in _IQ4_NL),
            block=32,
            superblock=32,
            bits=4.5,
            gguf=("IQ4_NL",),
            scales="f16",
            signed=True,
            absmax_level=-127.0,
            search_range=(0.7, 1.15, 10),
            search_levels=tuple(float(v) for v in _IQ4_NL),
            bf16_exact=False,
        ),
        Grid(
            name="mxfp4",
            levels=_FP4,
            block=32,
            superblock=32,
            bits=4.25,
            gguf=("MXFP4",),
            scales="e8m0",
            absmax_level=4.0,
            search_range=(1.0, 1.0, 0),
            search_levels=(2.0, 4.0, 8.0),
        ),
        Grid(
            name="nvfp4",
            levels=_FP4,
            block=16,
            superblock=64,
            bits=4.5,
            gguf=("NVFP4",),
            scales="nvfp4",
            absmax_level=6.0,
            search_range=(0.7, 1.5, 8),
            search_levels=_E2M1[1:],
        ),
        Grid(
            name="q8_0",
            levels=tuple(float(q) for q in range(-128, 128)),
            block=32,
            superblock=32,
            bits=8.5,
            gguf=("Q8_0",),
            scales="f16",
            absmax_level=127.0,
            search_range=(1.0, 1.0, 0),
            search_levels=tuple(float(q) for q in range(64, 128)),
            first_code=1,  # -128 is legal in a file, but no quantizer emits it and some kernels negate codes
            bf16_exact=False,
        ),
    )
}


def get(name: str) -> Grid:
    """The grid of that name; UserError with the closest name and the whole list otherwise."""
    if name not in GRIDS:
        close = difflib.get_close_matches(str(name), GRIDS, 1, 0.5)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(f"unknown grid {name!r}{hint} Grids: {', '.join(GRIDS)}, or 'none'")
    return GRIDS[name]
