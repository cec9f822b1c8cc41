"""Ways of rounding a model's weights after training: the baselines that QAT is held against.

Three families. The project's own grids (`quant.grid`), under their two scale rules: "absmax" rounds to nearest,
"search" takes the scale of least squared error; and by rule "gptq", which looks at the inputs of the weights
(`gptq`). The floats of 16 bits that models are shipped in, BF16 and F16, rounded
to nearest, halves to even, as llama.cpp does. And the types of llama.cpp, 1 to 8 bits, by libggml's own quantizers, so
with the bytes that `llama-quantize --pure` would write: rule "stock" without an importance matrix, rule "imatrix" with
one (the files that people share are made so). Types that llama.cpp refuses to write without one have that rule alone.

Bits per weight are those of the type alone; a model's other tensors are not counted.

**Joined rows.** Blocks never cross rows in a file: a type with blocks of 256 needs rows of a multiple of 256. In a
smaller model consecutive rows of one matrix are joined until they fill whole blocks, so that the numerics of the type
can be judged. No GGUF file of such a shape exists, and llama-quantize would fall back to another type; every result
says how many rows were joined (1: such a file exists).

**NVFP4** by libggml is what its encoder makes: a UE4M3 scale per 16 weights, the largest weight at 6, and no factor per
tensor, which llama.cpp reads but does not write (llama-quantize does not offer the type at all; NVFP4 files are
converted from checkpoints). Weights whose scales fall below 2^-6, so blocks with no weight of 0.09, lose precision. The
grid "nvfp4" has the factor.
"""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.convert import llama, llama_numerics
from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS, RULES
from qatmoe.tree import leaves_by_path, path_of

Params = dict[str, Any]
Importance = Mapping[str, np.ndarray]  # path -> mean squared input of each column, f32 (..., I): per matrix, per expert

GRID_RULES = (*RULES, "gptq")
FLOATS = {"BF16": jnp.bfloat16, "F16": np.float16}
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_CHUNK = 1 << 20  # weights that a thread quantizes at a time

# The types of weights in files, by bits. Q8_1 and Q8_K hold activations.
TYPES = (
    "Q1_0", "IQ1_S", "TQ1_0", "IQ1_M", "IQ2_XXS", "TQ2_0", "Q2_0", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K",
    "IQ3_S", "IQ4_XS", "MXFP4", "Q4_0", "Q4_K", "IQ4_NL", "NVFP4", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0",
)  # fmt: skip
# Those whose quantizer ignores an importance matrix (ggml-quants.c); for the others it makes a second format.
_NO_IMPORTANCE = ("Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q8_0")


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of rounding weights."""

    name: str  # a grid ("q2_0") or a type of llama.cpp ("Q2_0", "BF16")
    rule: str  # of a grid "absmax", "search" or "gptq", of a type "stock" or "imatrix"
    bits: float  # per weight, scales included
    block: int  # a row must be a multiple of this

    @property
    def group(self) -> str:
        """ "grid" or "ggml"."""
        return "grid" if self.rule in GRID_RULES else "ggml"


def formats() -> list[Format]:
    """Every grid under each rule, the floats, then every other type of llama.cpp; the last where `llama.installed()`.

    Raises:
      UserError: llama-cpp-python is too old.
    """
    found = [Format(g.name, rule, g.bits, g.superblock) for g in GRIDS.values() for rule in GRID_RULES]
    found += [Format(name, "stock", 16.0, 1) for name in FLOATS]
    for kind in TYPES if llama.installed() else ():
        block, size = llama.traits(kind)
        stock = [] if llama.requires_importance(kind) else ["stock"]
        rules = stock if kind in _NO_IMPORTANCE else [*stock, "imatrix"]
        found += [Format(kind, rule, 8 * size / block, block) for rule in rules]
    return found


def misfit(params: Params, paths: Iterable[str], fmt: Format) -> str:
    """Why a format cannot hold these tensors, "" if it can: some matrix is not whole blocks even with joined rows.

    Rule "gptq" rounds column by column and joins none.
    """
    for path, w in _named(params, paths).items():
        rows, width = w.shape[-2:]
        joined = _joined(width, fmt.block)
        if joined > 1 and fmt.rule == "gptq":
            return f"{path}: {fmt.name} under rule gptq needs rows of a multiple of {fmt.block} weights, not {width}"
        if rows % joined:
            return (
                f"{path}: {fmt.name} needs rows of a multiple of {fmt.block} weights; {joined} rows of {width} would "
                f"have to be joined, which does not divide the {rows} rows of a matrix"
            )
    return ""


def requantize(
    params: Params, paths: Iterable[str], fmt: Format, importance: Importance | None = None
) -> tuple[Params, int]:
    """A model with some weights rounded to a format. Deterministic.

    Args:
      params: nested dict of arrays; they may be split over devices, and each is rounded whole, in the host's memory.
      paths: of the tensors to round, "layers/0/experts/gate_up"; each (..., out, in).
      fmt: of another rule than "gptq", whose function is `gptq.requantize`.
      importance: of every path, broadcast over matrices; needed by rule "imatrix", unused by the others.

    Returns:
      The tree with decoded f32 values on `paths`, where the unrounded ones lie, all other leaves the same objects; and
      how many rows were joined to fill a block, the most of any tensor (module docstring).

    Raises:
      UserError: an unknown path, a tensor that the format cannot hold, a weight that is not finite or, for F16 and
        llama.cpp's types, beyond 65504, no importance of a path under rule "imatrix".
    """
    wanted = _named(params, paths)
    if fault := misfit(params, wanted, fmt):
        raise UserError(fault)
    if fmt.rule == "imatrix" and (missing := [path for path in wanted if path not in (importance or {})]):
        raise UserError(f"{missing[0]}: {fmt.name} under rule imatrix needs its importance, and there is none")
    rounded: dict[str, jax.Array] = {}
    for path, w in wanted.items():
        try:
            values = _round(np.asarray(w, np.float32), fmt, (importance or {}).get(path))
            rounded[path] = jax.device_put(values, w.sharding)
        except ValueError as e:
            raise UserError(f"{path} as {fmt.name}: {e}") from e
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: rounded.get(path_of(path), leaf), params)
    return tree, max((_joined(w.shape[-1], fmt.block) for w in wanted.values()), default=1)


def _round(w: np.ndarray, fmt: Format, importance: np.ndarray | None) -> np.ndarray:
    """One tensor, f32 of the same shape."""
    if not np.isfinite(w).all():
        raise ValueError("a weight is not finite")
    if fmt.name == "F16" and np.abs(w).max(initial=0.0) > 65504:
        raise ValueError(
            "a weight is beyond 65504, the largest of F16 and of the scales of llama.cpp's types; "
            "--rows='^(?!.*/[A-Z])' leaves out all of these rows of an audit"
        )
    if fmt.name in FLOATS:
        return w.astype(FLOATS[fmt.name]).astype(np.float32)
    joined = _joined(w.shape[-1], fmt.block)
    x = w.reshape(*w.shape[:-2], -1, joined * w.shape[-1])
    if fmt.group == "grid":
        grid = GRIDS[fmt.name]
        return grid.quantize(x, grid.scale_of(x, fmt.rule)).reshape(w.shape)
    columns = _columns(importance, w.shape, joined) if importance is not None and fmt.rule == "imatrix" else None
    return _by_libggml(fmt.name, x.reshape(-1, *x.shape[-2:]), columns).reshape(w.shape)


def importance(params: Params, cfg: ModelConfig, windows_ML: np.ndarray, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Mean squared input of each column of the weights on `paths`, as llama-imatrix collects it: f32 (..., I).

    Of routed experts (E, I): over the tokens that chose the expert; the inputs of `down` are its hidden activations
    before the router's weight. Ones where there is nothing to average: an expert that no token chose, and an embedding
    that is only looked up. A tied embedding has the head's.

    Args:
      params: unrolled layout, f32.
      windows_ML: M windows of L token ids of training text, each taken as one document.

    Raises:
      UserError: an unknown path, or one whose weight is multiplied with nothing that is measured.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for tokens_L in windows_ML:
        squares = llama_numerics.squared_inputs(params, cfg, jnp.asarray(tokens_L, jnp.int32))
        for path, (sum_I, count) in squares.items():
            sums[path] = sums.get(path, 0.0) + np.asarray(sum_I, np.float64)
            counts[path] = counts.get(path, 0.0) + np.asarray(count, np.float64)[..., None]
    found = {}
    for path, w in _named(params, paths).items():
        if path == "embed" and not cfg.tie_embeddings:
            found[path] = np.ones(w.shape[-1], np.float32)
        elif path in sums:
            mean = sums[path] / np.maximum(counts[path], 1.0)
            found[path] = np.where(counts[path] > 0, mean, 1.0).astype(np.float32)
        else:
            raise UserError(f"{path}: its inputs are not measured, so it has no importance")
    return found


def _named(params: Params, paths: Iterable[str]) -> dict[str, Any]:
    """{path: array} in the order of `paths`."""
    leaves = leaves_by_path(params)
    wanted = list(paths)
    for path in wanted:
        if path not in leaves or leaves[path].ndim < 2:
            raise UserError(f"the model has no matrix {path!r} (layers are unrolled: layers/0/experts/gate_up)")
    return {path: leaves[path] for path in wanted}


def _joined(width: int, block: int) -> int:
    """Rows of `width` weights that fill whole blocks."""
    return math.lcm(width, block) // width


def _columns(importance: np.ndarray, shape: Sequence[int], joined: int) -> np.ndarray:
    """Importance of each column of each matrix, (matrices, joined * I) f32."""
    per_matrix = np.broadcast_to(np.asarray(importance, np.float32), (*shape[:-2], shape[-1])).reshape(-1, shape[-1])
    return np.tile(per_matrix, (1, joined))


def _by_libggml(kind: str, x_MRI: np.ndarray, columns_MI: np.ndarray | None) -> np.ndarray:
    """M matrices through libggml and back, f32. ctypes lets go of Python's lock, so threads run side by side."""
    matrices, rows, width = x_MRI.shape
    step = max(1, _CHUNK // width)
    jobs = [(m, slice(r, r + step)) for m in range(matrices) for r in range(0, rows, step)]
    out = np.empty_like(x_MRI)

    def one(job: tuple[int, slice]) -> None:
        m, part = job
        column_I = None if columns_MI is None else columns_MI[m]
        out[m, part] = llama.dequantize(kind, llama.quantize(kind, x_MRI[m, part], column_I))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(one, job) for job in jobs]:
            done.result()
    return out
