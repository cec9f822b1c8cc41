"""Codes and scales -> the tensors of Hugging Face's quantized checkpoints, in numpy.

Layouts as compressed-tensors 0.20 (compressors/pack_quantized, mxfp4, nvfp4) reads them. The module NAME of an (out,
in) weight gets the tensors NAME.SUFFIX:

    pack-quantized        weight_packed        int32 (out, in * B / 32): weight i is bits B i .. B i + B - 1 of its row,
                                               lowest first, running on from word to word; stored is int + 2^(B-1)
                          weight_scale         bfloat16 or float32 (out, in / group)
                          weight_shape         int64 (2,): out, in                         int * scale
    mxfp4-pack-quantized  weight_packed        uint8 (out, in / 2): weight 2j in the low nibble of byte j: E2M1
                          weight_scale         uint8 (out, in / 32): E8M0, bias 127        E2M1 * 2^(scale - 127)
    nvfp4-pack-quantized  weight_packed        as mxfp4
                          weight_scale         float8_e4m3fn (out, in / 16)
                          weight_global_scale  float32 (1,)                                E2M1 * (scale / global)

Signed integers hold more grids than it seems: q2_0's levels -1, 0, 1, 2 are the ints 1, 0, -1, -2 under the negated
scale, and q2_k's half-integers are the odd ints under half the scale. iq4_nl's table is no multiple of 4-bit integers.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS, Grid


class Packed(NamedTuple):
    """One matrix as a checkpoint stores it."""

    tensors: dict[str, np.ndarray]  # suffix of the module's name -> tensor: "weight_packed", "weight_scale", ...


class _Ints(NamedTuple):
    """How a grid is written in symmetric integers: int = level / unit, stored scale = scale * unit."""

    bits: int
    unit: float  # a power of two, so that neither product rounds


_INTS = {
    "q2_0": _Ints(2, -1.0),
    "ternary": _Ints(2, 1.0),
    "ternary_256": _Ints(2, 1.0),
    "q2_k": _Ints(3, 0.5),
    "q3_k": _Ints(3, 1.0),
    "q4_0": _Ints(4, 1.0),
    "q8_0": _Ints(8, 1.0),
}
FORMATS: dict[str, str] = {
    **dict.fromkeys(_INTS, "pack-quantized"),
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
_THIRD = {"pack-quantized": ("weight_shape",), "nvfp4-pack-quantized": ("weight_global_scale",)}
_E2M1 = np.asarray(GRIDS["mxfp4"].levels, np.float32)  # value of a nibble; nvfp4 has the same table


# ---- bits ------------------------------------------------------------------------------------------------------------


def _to_words(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (out, in) below 2^bits -> int32 (out, in * bits / 32), without gaps, lowest bits first."""
    planes = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(len(values), -1), axis=-1, bitorder="little").view("<i4")


def _from_words(words: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `_to_words`: the first `width` values of every row, uint8 (out, width)."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    planes = np.unpackbits(data, axis=-1, count=width * bits, bitorder="little")
    return np.packbits(planes.reshape(len(words), width, bits), axis=-1, bitorder="little")[..., 0]


def _to_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 (..., in) below 16 -> uint8 (..., in / 2), the even weight in the low nibble."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _from_nibbles(data: np.ndarray) -> np.ndarray:
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def _to_e8m0(scale: np.ndarray) -> np.ndarray:
    """Powers of two from 2^-127 as their biased exponents, uint8."""
    return (np.frexp(scale)[1] + 126).astype(np.uint8)  # frexp: scale = 2^(exponent - 1)


# ---- one matrix ------------------------------------------------------------------------------------------------------


def pack(grid: Grid, codes: np.ndarray, scale: np.ndarray) -> Packed:
    """The tensors of one matrix: codes (out, in) uint8 and snapped scales (out, in / grid.block) f32.

    Raises:
      UserError: no format holds the grid; shapes that do not fit each other; codes the grid does not have; scales that
        are not on the grid or that the format would round.
    """
    form = _format(grid)
    codes, scale = _checked(grid, codes, scale)
    if codes.ndim != 2:
        raise UserError(f"{grid.name}: pack takes one (out, in) matrix, got codes {codes.shape}; pack experts apart")
    if form == "mxfp4-pack-quantized":
        return Packed({"weight_packed": _to_nibbles(codes), "weight_scale": _to_e8m0(scale)})
    if form == "nvfp4-pack-quantized":
        factor = grid.shared_factor(grid.shared_index(scale))[0, 0]  # one for the whole matrix
        tensors = {
            "weight_packed": _to_nibbles(codes),
            "weight_scale": _exactly(grid, scale / factor, ml_dtypes.float8_e4m3fn),
            "weight_global_scale": np.array([1 / factor], np.float32),
        }
        return Packed(tensors)
    ints = _INTS[grid.name]
    stored = (np.asarray(grid.levels) / ints.unit + 2 ** (ints.bits - 1)).astype(np.uint8)
    tensors = {
        "weight_packed": _to_words(stored[codes], ints.bits),
        "weight_scale": _exactly(grid, scale * np.float32(ints.unit), _int_scale_dtype(grid)),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    return Packed(tensors)


def dequantize(grid: Grid, packed: Packed) -> np.ndarray:
    """What the format says the tensors mean: float32 (out, in). Of the grid only the name is used.

    Raises:
      UserError: no format holds the grid, or a tensor of its format is missing.
    """
    form, tensors = _format(grid), packed.tensors
    needed = ("weight_packed", "weight_scale", *_THIRD.get(form, ()))
    if missing := [name for name in needed if name not in tensors]:
        raise UserError(f"{grid.name}: {form} needs the tensor {missing[0]}; got {', '.join(tensors) or 'none'}")
    scale = tensors["weight_scale"]
    if form == "pack-quantized":
        bits = _INTS[grid.name].bits
        stored = _from_words(tensors["weight_packed"], bits, int(tensors["weight_shape"][1]))
        units = stored.astype(np.float32) - 2 ** (bits - 1)
        factors = scale.astype(np.float32)
    else:
        units = _E2M1[_from_nibbles(tensors["weight_packed"])]
        if form == "mxfp4-pack-quantized":
            factors = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
        else:
            factors = scale.astype(np.float32) / tensors["weight_global_scale"]
    return (units.reshape(*scale.shape, -1) * factors[..., None]).reshape(units.shape)


def _format(grid: Grid, module: str = "this matrix") -> str:
    if grid.name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{module}: compressed-tensors has no exact form of grid {grid.name}; it has of {known}")
    return FORMATS[grid.name]


def _checked(grid: Grid, codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arguments as numpy arrays of at least two axes, the scales on the grid; UserError otherwise."""
    codes, scale = np.asarray(codes), np.asarray(scale, np.float32)
    if codes.dtype != np.uint8:
        raise UserError(f"{grid.name}: codes are uint8, got {codes.dtype}")
    if codes.ndim < 2 or not codes.size or codes.shape[-1] % grid.superblock:
        raise UserError(f"{grid.name}: codes are (..., out, in), in a multiple of {grid.superblock}; got {codes.shape}")
    if scale.shape != (*codes.shape[:-1], codes.shape[-1] // grid.block):
        raise UserError(f"{grid.name}: scales {scale.shape} do not fit codes {codes.shape}, one per {grid.block} codes")
    if codes.max() >= len(grid.levels):
        raise UserError(f"{grid.name} has codes 0..{len(grid.levels) - 1}; got {codes.max()}")
    if not np.isfinite(scale).all():
        raise UserError(f"{grid.name}: a scale is not finite; the weights it came from hold NaN or inf")
    if not np.array_equal(grid.snap(scale), scale):
        bad = scale[grid.snap(scale) != scale].flat[0]
        raise UserError(f"scale {bad!r} is not on grid {grid.name}: snap scales before packing (Grid.snap)")
    return codes, scale


def _exactly(grid: Grid, scale: np.ndarray, dtype: type) -> np.ndarray:
    """The scales in the dtype of the file; UserError if one would be rounded."""
    out: np.ndarray = scale.astype(dtype)
    wrong = out.astype(np.float32) != scale
    if wrong.any():
        bad = scale[wrong].flat[0]
        raise UserError(f"{grid.name}: scale {bad!r} is not exact in {np.dtype(dtype).name}; use coarser scales")
    return out


def _int_scale_dtype(grid: Grid) -> type:
    """Readers multiply in the dtype of the scale, so it has to hold the product, not only the scale."""
    return ml_dtypes.bfloat16 if grid.bf16_exact else np.float32


# ---- config.json -----------------------------------------------------------------------------------------------------


def config(grids: Mapping[str, Grid], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json (compressed_tensors.quantization.QuantizationConfig).

    Args:
      grids: name of each quantized module ("model.layers.0.mlp.experts.3.up_proj") -> its grid.
      ignore: modules that stay as they are, by name, class or "re:" pattern.

    Targets are exact: a pattern lists the layers and experts it stands for, so a module that is in neither argument is
    not taken for a quantized one. Grids stored alike (ternary, q2_0) share a group. Groups with routed experts come
    first, because transformers 5.23 decodes all routed experts by the first group that names experts.

    Raises:
      UserError: no format holds a grid; nothing is quantized; a module is in both arguments.
    """
    if not grids:
        raise UserError("no module is quantized: leave quantization_config out of config.json")
    groups: dict[tuple[Any, ...], list[str]] = collections.defaultdict(list)
    for name, grid in grids.items():
        if any(re.match(i[3:], name) if i.startswith("re:") else i == name for i in ignore):
            raise UserError(f"{name} has grid {grid.name} and is in ignore, which wins; take it out of one of them")
        groups[(_format(grid, name), *scheme(grid))].append(name)
    ordered = sorted(groups.items(), key=lambda item: not any(".experts." in name for name in item[1]))
    forms = list(dict.fromkeys(form for (form, *_), _ in ordered))
    return {
        "quant_method": "compressed-tensors",
        "format": forms[0] if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": _targets(names), "weights": dict(args), "format": form}
            for i, ((form, *args), names) in enumerate(ordered)
        },
        "ignore": list(ignore),
    }


def scheme(grid: Grid) -> tuple[tuple[str, Any], ...]:
    """compressed_tensors.quantization.QuantizationArgs of the weights, as items: grids that share them look alike."""
    ints = _INTS.get(grid.name)
    scale_dtype = {"mxfp4": "uint8", "nvfp4": "float8_e4m3fn"}.get(grid.name) or np.dtype(_int_scale_dtype(grid)).name
    args = {
        "num_bits": ints.bits if ints else 4,
        "type": "int" if ints else "float",
        "symmetric": True,
        "strategy": "tensor_group" if grid.name == "nvfp4" else "group",
        "group_size": grid.block,
        "dynamic": False,
        "scale_dtype": f"torch.{scale_dtype}",
    }
    return tuple(args.items())


def _targets(names: Iterable[str]) -> list[str]:
    """Names or "re:" patterns that match these names and no others."""
    targets: list[str] = []
    families: dict[tuple[str, ...], list[tuple[str, ...]]] = collections.defaultdict(list)
    for name in names:
        parts = name.split(".")
        numbers = tuple(part for part in parts if part.isdecimal())
        if numbers:
            frame = tuple("" if part.isdecimal() else re.escape(part) for part in parts)  # "" marks a number's place
            families[frame].append(numbers)
        else:
            targets.append(name)
    for frame, rows in families.items():
        for product in _products(rows):
            choices = iter(product)
            targets.append("re:" + r"\.".join(part or _either(next(choices)) for part in frame) + "$")
    return targets


def _either(numbers: Iterable[str]) -> str:
    ordered = sorted(numbers, key=int)
    return ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"


def _products(rows: Iterable[tuple[str, ...]]) -> list[list[list[str]]]:
    """Rows of numbers, all equally long, as a few products of sets that cover these rows and no others."""
    tails: dict[str, set[tuple[str, ...]]] = collections.defaultdict(set)
    for row in rows:
        tails[row[0]].add(row[1:])
    firsts: dict[frozenset[tuple[str, ...]], list[str]] = collections.defaultdict(list)
    for first, rest in tails.items():
        firsts[frozenset(rest)].append(first)
    return [
        [same, *product]
        for rest, same in firsts.items()
        for product in (_products(sorted(rest)) if rest != {()} else [[]])
    ]
