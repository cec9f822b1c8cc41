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
    return ggml


def dequantize(kind: str, data: np.ndarray) -> np.ndarray:
    """What libggml decodes bytes (..., bytes per row) of a block type to: f32 (..., I)."""
    traits = _ggml().ggml_get_type_traits(TYPES[kind].id).contents
    if (traits.blck_size, traits.type_size) != (TYPES[kind].block, TYPES[kind].size):
        raise UserError(f"this llama-cpp-python does not know {kind} as it is written here: install 0.3.36 or newer")
    data = np.ascontiguousarray(data)
    out = np.empty((*data.shape[:-1], data.shape[-1] // TYPES[kind].size * TYPES[kind].block), np.float32)
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
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
