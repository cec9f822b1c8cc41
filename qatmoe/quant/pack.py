"""Codes and scales <-> the bytes of GGUF tensor types (ggml-common.h, ggml-quants.c).

A row of weights is a run of blocks; below, `j` counts the weights of a block, fields stand in file order, float16 and
float32 are little-endian.

    Q2_0    d f16; byte j/4, bits 2(j%4): q                                       (q - 1) d
    TQ2_0   64 bytes: weight 128g + 32l + m in byte 32g + m, bits 2l: q; d f16     (q - 1) d, also for q = 3
    TQ1_0   32 bytes of weights m, m+32, .. m+128; 16 of 160 + (m, m+16, .. m+64); 4 of 240 + (m, m+4, m+8, m+12);
            each ceil(256/243 * sum of t 3^(4-i)), i from 0; d f16                 (t - 1) d
    Q2_K    16 bytes sc | m << 4, one per 16 weights; 64 bytes as TQ2_0: q; d f16; dmin f16       d sc q - dmin m
    Q3_K    32 bytes: weight 128g + 32l + m has its high bit h in byte m, bit 4g + l; 64 bytes as TQ2_0: low bits q;
            12 bytes: scale i < 8 low nibble of byte i, else high nibble of byte i-8, its bits 4-5 in byte 8 + i%4 at
            bit 2(i/4); d f16                                                      d (sc - 32) (q + 4h - 4)
    Q4_0    d f16; byte j: weight j low nibble, j+16 high: q                       (q - 8) d
    IQ4_NL  as Q4_0                                                                T[q] d
    MXFP4   byte e; 16 bytes as Q4_0: E2M1 q                                       E2M1[q] 2^(e - 127)
            e = 255 is NaN (OCP MX 1.0)
    NVFP4   4 bytes UE4M3, one per 16 weights; for each of these 8 bytes: weight j low, j+8 high: q
            and one float32 per (out, in) matrix beside the tensor                 E2M1[q] e4m3 f32
            0x7F is 0, as ggml has it; bytes from 0x80 are no UE4M3 and decode to NaN
    Q8_0    d f16; 32 int8 q                                                       q d
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS, Grid

Array = Any  # writing takes numpy and jax arrays, and gives the same kind; reading is in numpy
Bytes = Any  # uint8


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor as a GGUF file stores it."""

    kind: str  # GGUF type, e.g. "Q2_0"
    data: Bytes  # (..., bytes per row)
    tensor_scale: np.ndarray | None = None  # NVFP4 only: float32 (...,), one per (out, in) matrix


class _Fields(NamedTuple):
    """What the blocks say, before any arithmetic: R blocks."""

    codes: np.ndarray  # (R, weights) uint8, codes of the grid's level table
    scale: np.ndarray  # (R, scales) f32
    offset: np.ndarray | None = None  # (R, scales) f32, subtracted: Q2_K's dmin * m


class _Layout(NamedTuple):
    block: int  # weights
    size: int  # bytes
    levels: tuple[float, ...]
    read: Callable[[Bytes], _Fields]
    write: Callable[[Array, Array], list[Bytes]]  # codes (R, weights), scale (R, scales) -> fields


# ---- nibbles, pairs of bits, trits -----------------------------------------------------------------------------------


def _f16_bytes(d: Array) -> Bytes:
    if isinstance(d, jax.Array):
        return jax.lax.bitcast_convert_type(d.astype(jnp.float16), jnp.uint8).reshape(*d.shape[:-1], -1)
    return np.ascontiguousarray(d.astype("<f2")).view(np.uint8).reshape(*d.shape[:-1], -1)


def _f16(data: Bytes) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def join_nibbles(codes: Array, half: int) -> Bytes:
    """4-bit codes (..., I) uint8 -> (..., I / 2): those of weights j and j + half of every 2 * half share byte j."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2, half)
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:-1], -1)


def split_nibbles(data: Bytes, half: int) -> Array:
    """The inverse of `join_nibbles`, (..., I / 2) -> (..., I)."""
    groups = data.reshape(*data.shape[:-1], -1, 1, half)
    return _xp(data).concatenate([groups & 15, groups >> 4], axis=-2).reshape(*data.shape[:-1], -1)


_PAIR_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def _join_pairs(codes: Array) -> Bytes:
    """Two-bit codes (R, 4, ...) -> (R, ...), the first in the lowest bits."""
    return codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6


def _join_planes(codes: Array) -> Bytes:
    """256 two-bit codes -> 64 bytes, TQ2_0's order."""
    return _join_pairs(codes.reshape(-1, 4, 32)).reshape(len(codes), 64)


def _split_planes(data: Bytes) -> np.ndarray:
    return (data.reshape(len(data), 2, 1, 32) >> _PAIR_SHIFTS[:, None] & 3).reshape(len(data), 256)


_TRIT_RUNS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))  # first weight, trits per byte, bytes
_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


def _join_trits(codes: Array) -> Bytes:
    parts = []
    for start, trits, width in _TRIT_RUNS:
        run = codes[:, start : start + trits * width].reshape(len(codes), trits, width).astype(np.uint32)
        value = (run * _POWERS[:trits, None].astype(np.uint32)).sum(axis=1, dtype=np.uint32)
        parts.append(((value * np.uint32(256) + np.uint32(242)) // np.uint32(243)).astype(np.uint8))
    return _xp(codes).concatenate(parts, axis=1)


def _split_trits(data: Bytes) -> np.ndarray:
    parts, at = [], 0
    for _, trits, width in _TRIT_RUNS:
        run = data[:, at : at + width, None].astype(np.uint16)
        low = run * _POWERS[::-1][:trits] & 255  # times 3^i modulo 256 brings trit i to the top
        parts.append((low * 3 >> 8).astype(np.uint8).swapaxes(1, 2).reshape(len(data), -1))
        at += width
    return np.concatenate(parts, axis=1)


# ---- one pair of functions per layout --------------------------------------------------------------------------------


def _write_q2_0(codes: Array, scale: Array) -> list[Bytes]:
    return [_f16_bytes(scale), _join_pairs(codes.reshape(-1, 4)).reshape(len(codes), 16)]


def _read_q2_0(data: Bytes) -> _Fields:
    codes = (data[:, 2:, None] >> _PAIR_SHIFTS & 3).reshape(len(data), 64)
    return _Fields(codes, _f16(data[:, :2]))


def _write_tq2_0(codes: Array, scale: Array) -> list[Bytes]:
    return [_join_planes(codes), _f16_bytes(scale)]


def _read_tq2_0(data: Bytes) -> _Fields:
    return _Fields(_split_planes(data[:, :64]), _f16(data[:, 64:]))


def _write_tq1_0(codes: Array, scale: Array) -> list[Bytes]:
    return [_join_trits(codes), _f16_bytes(scale)]


def _read_tq1_0(data: Bytes) -> _Fields:
    return _Fields(_split_trits(data[:, :52]), _f16(data[:, 52:]))


def _write_q2_k(codes: Array, scale: Array) -> list[Bytes]:
    grid = GRIDS["q2_k"]
    d = grid.shared_factor(grid.shared_index(scale))[:, :1]
    k = _xp(scale).rint(scale / d).astype(np.uint8)  # a GPU's quotient may be a last bit short
    return [k | k << 4, _join_planes(codes), _f16_bytes(d), _f16_bytes(d * np.float32(1.5))]


def _read_q2_k(data: Bytes) -> _Fields:
    d, dmin = _f16(data[:, 80:82]), _f16(data[:, 82:84])
    return _Fields(_split_planes(data[:, 16:80]), d * (data[:, :16] & 15), dmin * (data[:, :16] >> 4))


def _write_q3_k(codes: Array, scale: Array) -> list[Bytes]:
    grid = GRIDS["q3_k"]
    d = grid.shared_factor(grid.shared_index(scale))[:, :1]
    sc = (_xp(scale).rint(scale / d) + 32).astype(np.uint8)
    nibbles = sc[:, :8] & 15 | (sc[:, 8:] & 15) << 4
    tops = _join_pairs((sc >> 4).reshape(len(sc), 4, 4))
    high = (codes >> 2).reshape(len(codes), 8, 32)
    mask = functools.reduce(operator.or_, (high[:, i] << i for i in range(8)))
    return [mask, _join_planes(codes & 3), nibbles, tops, _f16_bytes(d)]


def _read_q3_k(data: Bytes) -> _Fields:
    high = (data[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(data), 256)
    low = np.concatenate([data[:, 96:104] & 15, data[:, 96:104] >> 4], axis=1)
    top = (data[:, None, 104:108] >> _PAIR_SHIFTS[:, None] & 3).reshape(len(data), 16)
    sc = (low | top << 4).astype(np.float32) - 32
    return _Fields(_split_planes(data[:, 32:96]) | high << 2, _f16(data[:, 108:]) * sc)


def _write_nibbles(codes: Array, scale: Array) -> list[Bytes]:
    return [_f16_bytes(scale), join_nibbles(codes, 16)]


def _read_nibbles(data: Bytes) -> _Fields:
    return _Fields(split_nibbles(data[:, 2:], 16), _f16(data[:, :2]))


def _write_mxfp4(codes: Array, scale: Array) -> list[Bytes]:
    return [(scale.view(np.int32) >> 23).astype(np.uint8), join_nibbles(codes, 16)]  # a float32 has E8M0's exponent


def _read_mxfp4(data: Bytes) -> _Fields:
    return _Fields(split_nibbles(data[:, 1:], 16), _E8M0[data[:, :1]])


def _write_nvfp4(codes: Array, scale: Array) -> list[Bytes]:
    exponent, mantissa = (scale.view(np.int32) >> 23) - 120, scale.view(np.int32) >> 20 & 7
    byte = _xp(scale).where(exponent > 0, exponent << 3 | mantissa, (scale * np.float32(512)).astype(np.int32))
    return [byte.astype(np.uint8), join_nibbles(codes, 8)]


def _read_nvfp4(data: Bytes) -> _Fields:
    return _Fields(split_nibbles(data[:, 4:], 8), _E4M3[data[:, :4]])


def _write_q8_0(codes: Array, scale: Array) -> list[Bytes]:
    return [_f16_bytes(scale), codes ^ 128]  # code = int8 + 128


def _read_q8_0(data: Bytes) -> _Fields:
    return _Fields(data[:, 2:] ^ 128, _f16(data[:, :2]))


def _e4m3_table() -> np.ndarray:
    """Values of the 256 bytes as UE4M3."""
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    table = np.where(exponent == 0, mantissa * 2.0**-9, normal).astype(np.float32)
    table[127] = 0
    return np.concatenate([table, np.full(128, np.nan, np.float32)])


_E4M3 = _e4m3_table()
_E8M0 = np.concatenate([np.ldexp(np.float32(1), np.arange(-127, 128)), [np.nan]]).astype(np.float32)


_TERNARY = (-1.0, 0.0, 1.0, 2.0)  # file code 3 is legal and decodes to +2 d; the ternary grids never choose it
_LAYOUTS: dict[str, _Layout] = {
    "Q2_0": _Layout(64, 18, GRIDS["q2_0"].levels, _read_q2_0, _write_q2_0),
    "TQ2_0": _Layout(256, 66, _TERNARY, _read_tq2_0, _write_tq2_0),
    "TQ1_0": _Layout(256, 54, _TERNARY, _read_tq1_0, _write_tq1_0),
    "Q2_K": _Layout(256, 84, (0.0, 1.0, 2.0, 3.0), _read_q2_k, _write_q2_k),
    "Q3_K": _Layout(256, 110, GRIDS["q3_k"].levels, _read_q3_k, _write_q3_k),
    "Q4_0": _Layout(32, 18, GRIDS["q4_0"].levels, _read_nibbles, _write_nibbles),
    "IQ4_NL": _Layout(32, 18, GRIDS["iq4_nl"].levels, _read_nibbles, _write_nibbles),
    "MXFP4": _Layout(32, 17, GRIDS["mxfp4"].levels, _read_mxfp4, _write_mxfp4),
    "NVFP4": _Layout(64, 36, GRIDS["nvfp4"].levels, _read_nvfp4, _write_nvfp4),
    "Q8_0": _Layout(32, 34, GRIDS["q8_0"].levels, _read_q8_0, _write_q8_0),
}
KINDS = tuple(_LAYOUTS)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def pack(grid: Grid, codes: np.ndarray, scale: np.ndarray, kind: str | None = None) -> Packed:
    """Codes (..., I) and snapped scales (..., G) of a grid as bytes of a GGUF type that holds it (default: the first).

    Raises:
      UserError: the type does not hold the grid, or scales are not on it.
    """
    kind = kind or grid.gguf[0]
    if kind not in grid.gguf:
        raise UserError(f"grid {grid.name} has no exact form in {kind!r}; it has in {', '.join(grid.gguf)}")
    layout = _LAYOUTS[kind]
    codes, scale = np.asarray(codes, np.uint8), np.asarray(scale, np.float32)
    check_scales(grid, scale)
    if codes.shape[-1] % layout.block:
        raise UserError(f"rows of {codes.shape[-1]} weights are not whole blocks of {layout.block}, which {kind} needs")
    if scale.shape != (*codes.shape[:-1], codes.shape[-1] // grid.block):
        raise UserError(
            f"{grid.name}: scales {scale.shape} do not fit codes {codes.shape}, one per {grid.block} weights"
        )
    if codes.max(initial=0) >= len(grid.levels):
        raise UserError(f"{grid.name} has codes 0..{len(grid.levels) - 1}; got {codes.max()}")
    data, tensor_scale = write_blocks(grid, codes, scale, kind)
    return Packed(kind, data, None if tensor_scale is None else np.asarray(tensor_scale))


def check_scales(grid: Grid, scale: np.ndarray) -> None:
    """Raises UserError where scales (..., G) f32 are not on the grid."""
    if not np.isfinite(scale).all():
        raise UserError(f"{grid.name}: a scale is not finite; the weights it came from hold NaN or inf")
    snapped = grid.snap(scale)
    if not np.array_equal(snapped, scale):
        bad = scale[snapped != scale].flat[0]
        raise UserError(f"scale {bad!r} is not on grid {grid.name}: snap scales before packing (Grid.snap)")


def write_blocks(grid: Grid, codes: Array, scale: Array, kind: str) -> tuple[Bytes, Array | None]:
    """What `pack` does once everything is checked; pure, for jax too: bytes, and NVFP4's scale per matrix."""
    layout = _LAYOUTS[kind]
    xp = _xp(codes)
    tensor_scale = None
    if kind == "NVFP4":
        factor = grid.shared_factor(grid.shared_index(scale))
        tensor_scale = factor[..., 0, 0] if factor.ndim > 1 else factor[0]
        scale = scale / factor
    per_block = xp.repeat(scale, grid.block // layout.block, axis=-1) if grid.block > layout.block else scale
    blocks = codes.reshape(-1, layout.block)
    fields = layout.write(blocks, per_block.reshape(len(blocks), -1))
    return xp.concatenate(fields, axis=1).reshape(*codes.shape[:-1], -1), tensor_scale


def _xp(array: Array) -> Any:
    return jnp if isinstance(array, jax.Array) else np


def unpack(grid: Grid, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: codes (..., I) uint8 and scales (..., G) f32.

    Raises:
      UserError: bytes of the wrong length, or a file whose layout of numbers this grid cannot express. (Scales finer
        than those the grid trains are returned as they are.)
    """
    fields = _fields(packed)
    lead, layout = packed.data.shape[:-1], _LAYOUTS[packed.kind]
    codes, scale = fields.codes.reshape(*lead, -1), fields.scale.reshape(*lead, -1)
    if fields.offset is not None and not np.array_equal(fields.offset.reshape(*lead, -1), 1.5 * scale):
        raise UserError(f"{packed.kind} data with dmin m != 1.5 d sc is not on grid {grid.name}")
    if codes.max(initial=0) >= len(grid.levels):
        raise UserError(f"{packed.kind} data with code {codes.max()} is not on grid {grid.name}")
    if grid.block > layout.block:
        stored, scale = scale, scale[..., :: grid.block // layout.block]
        if not np.array_equal(np.repeat(scale, grid.block // layout.block, axis=-1), stored):
            raise UserError(f"{packed.kind} data with more than one scale per {grid.block} is not on grid {grid.name}")
    if packed.tensor_scale is not None:
        scale = scale * _per_matrix(packed.tensor_scale, scale.ndim)
    return codes, scale


def dequantize(packed: Packed) -> np.ndarray:
    """What ggml decodes the bytes to, float32 (..., I); defined for every byte pattern of the right length."""
    fields = _fields(packed)
    layout = _LAYOUTS[packed.kind]
    n_scales = fields.scale.shape[1]
    units = np.asarray(layout.levels, np.float32)[fields.codes].reshape(-1, n_scales, layout.block // n_scales)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf scales are legal bytes
        values = units * fields.scale[..., None]
        if fields.offset is not None:
            values -= fields.offset[..., None]
        values = values.reshape(*packed.data.shape[:-1], -1)
        if packed.tensor_scale is not None:
            values = values * _per_matrix(packed.tensor_scale, values.ndim)
    return values


def _fields(packed: Packed) -> _Fields:
    if packed.kind not in _LAYOUTS:
        raise UserError(f"unknown GGUF type {packed.kind!r}; known: {', '.join(KINDS)}")
    layout = _LAYOUTS[packed.kind]
    if packed.data.dtype != np.uint8 or packed.data.shape[-1] % layout.size:
        raise UserError(
            f"{packed.kind} rows are whole blocks of {layout.size} bytes; got {packed.data.shape[-1]} bytes of "
            f"{packed.data.dtype}"
        )
    with np.errstate(invalid="ignore"):  # NaN and inf scales are legal bytes
        return layout.read(packed.data.reshape(-1, layout.size))


def _per_matrix(tensor_scale: np.ndarray, ndim: int) -> np.ndarray:
    return np.asarray(tensor_scale, np.float32).reshape(*np.shape(tensor_scale), *[1] * min(ndim, 2))
