"""llama.cpp and its tensor library, through the optional package llama-cpp-python (extra `deploy`)."""

import ctypes
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qatmoe.convert.gguf import TYPES
from qatmoe.errors import UserError


def installed() -> str:
    """Version of llama-cpp-python, "" where it is not installed or does not load."""
    try:
        importlib.import_module("llama_cpp")
        return importlib.metadata.version("llama_cpp_python")
    except (ImportError, OSError, RuntimeError, importlib.metadata.PackageNotFoundError):
        return ""


class _Traits(ctypes.Structure):
    """The head of ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def _ggml() -> Any:
    llama_cpp = importlib.import_module("llama_cpp")
    folder = Path(llama_cpp.llama_cpp._base_path)
    library = next(iter(sorted(folder.glob("*ggml-base.*"))), None)
    if library is None:
        raise UserError(f"{folder} has no ggml-base library: reinstall llama-cpp-python")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_init.restype = None
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    # type, weights, bytes, first weight, rows, weights of a row, importance of each column (or null)
    size, address = ctypes.c_int64, ctypes.c_void_p
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, size, size, size, address]
    return ggml


def traits(kind: str) -> tuple[int, int]:
    """(weights, bytes) of a block of a type, by libggml's own table.

    Raises:
      UserError: the library is older than the type.
    """
    return _traits(kind).blck_size, _traits(kind).type_size


def _traits(kind: str) -> Any:
    found = _ggml().ggml_get_type_traits(TYPES[kind].id).contents
    if (found.blck_size, found.type_size) != (TYPES[kind].block, TYPES[kind].size):
        raise UserError(f"this llama-cpp-python does not know {kind} as it is written here: install 0.3.36 or newer")
    return found


def dequantize(kind: str, data: np.ndarray) -> np.ndarray:
    """What libggml decodes bytes (..., bytes per row) of a block type to: f32 (..., I)."""
    block, size = traits(kind)
    data = np.ascontiguousarray(data)
    out = np.empty((*data.shape[:-1], data.shape[-1] // size * block), np.float32)
    _traits(kind).to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def requires_importance(kind: str) -> bool:
    """Whether llama.cpp refuses to quantize to this type without an importance matrix."""
    return bool(_ggml().ggml_quantize_requires_imatrix(TYPES[kind].id))


def quantize(kind: str, weights_RI: np.ndarray, importance_I: np.ndarray | None = None) -> np.ndarray:
    """The bytes that libggml's own quantizer makes of rows: uint8 (R, bytes per row).

    Rows do not affect each other, and calls may run side by side. The first call for a codebook type builds its tables:
    1 to 10 s, once per process.

    Args:
      weights_RI: f32, I a multiple of the type's block.
      importance_I: f32, how much the squared error of each column counts (an "imatrix").

    Raises:
      ValueError: I is not a multiple of the block, a weight is not a number up to 65504 (at some of these libggml ends
        the process), or the type needs an importance matrix and there is none.
    """
    block, size = traits(kind)
    R, I = weights_RI.shape  # noqa: E741 (the README's name)
    weights_RI = np.ascontiguousarray(weights_RI, np.float32)
    columns = None if importance_I is None else np.ascontiguousarray(importance_I, np.float32)
    if I % block:
        raise ValueError(f"rows of {I} weights are not whole blocks of {block}")
    if not (abs(weights_RI) <= 65504).all():  # so written, NaN is caught
        raise ValueError("a weight is not a number from -65504 to 65504, the range of its scales")
    if columns is None and requires_importance(kind):
        raise ValueError(f"{kind} needs an importance matrix")
    if columns is not None and not (columns.shape == (I,) and np.isfinite(columns).all() and (columns >= 0).all()):
        raise ValueError(f"importance must be {I} finite numbers from 0")
    _ggml().ggml_quantize_init(TYPES[kind].id)
    out = np.empty((R, I // block * size), np.uint8)
    address = None if columns is None else columns.ctypes.data
    written = _ggml().ggml_quantize_chunk(TYPES[kind].id, weights_RI.ctypes.data, out.ctypes.data, 0, R, I, address)
    if written != out.nbytes:
        raise ValueError(f"libggml wrote {written} bytes of {kind} instead of {out.nbytes}")
    return out


def logits(path: Path, windows_ML: np.ndarray) -> Iterator[np.ndarray]:
    """llama.cpp's scores (L, V) f32 for each of M windows of L tokens, on the CPU.

    The cache is f32 and flash attention off: the defaults round keys and values to 16 bits.

    Raises:
      UserError: llama.cpp refuses the file.
    """
    llama_cpp = importlib.import_module("llama_cpp")
    length = windows_ML.shape[1]
    try:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=length,
            n_batch=length,
            n_ubatch=length,
            n_gpu_layers=0,
            logits_all=True,
            type_k=0,
            type_v=0,
            flash_attn=False,
            verbose=False,
        )
    except (ValueError, RuntimeError) as e:
        raise UserError(f"llama.cpp does not load {path}: {e}") from e
    try:
        for tokens_L in windows_ML:
            model.reset()
            model.eval(tokens_L.tolist())
            yield np.array(model.scores[:length])
    finally:
        model.close()
