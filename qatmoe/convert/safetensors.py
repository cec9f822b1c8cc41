"""Reading and writing safetensors files, and Hugging Face model folders made of them.

A file is the length of its header in 8 bytes, little-endian; the header, {name: {"dtype", "shape", "data_offsets":
[start, end]}, "__metadata__": {str: str}} in JSON; and the tensors' data, row-major and little-endian.

A model from the internet is untrusted input: the whole header is checked before anything is read by it, and files that
run code when read (pickles) are refused. Files are mapped, not loaded, and written one tensor at a time, so that a
model may be larger than memory. A mapped file must not be shortened by others while it is in use.
"""

import collections
import contextlib
import json
import math
import mmap
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from qatmoe.errors import UserError
from qatmoe.files import atomic_file, write_atomically, write_behind

# In the order in which a file holds them: by alignment, so that every tensor is aligned, then as the reference does.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "C64": np.dtype("<c8"),
    "F32": np.dtype("<f4"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 100_000_000  # bytes of a header or an index; the reference has the same limit on headers
METADATA: Mapping[str, str] = {"format": "pt"}  # without it, Transformers refuses a file

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Protocols 2 to 5, a zip (what torch.save writes), and the usual beginnings of protocols 0 and 1.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|\([dlit]p|[\]})]q|c[\w.]+\n[\w.]+\n")
_IS_PICKLE = "is a pickle, which can run code when read; convert it to safetensors"

_short = reprlib.Repr()  # for what a message quotes from a file: on one line, and not the whole of a long value
_short.maxstring = _short.maxlong = 80
_shown = _short.repr


class Tensor(NamedTuple):
    """What a header says of a tensor: the name of its type in `DTYPES`, and its shape."""

    dtype: str
    shape: tuple[int, ...]


Tensors = Mapping[str, Tensor]
Read = Callable[[str], np.ndarray]


class File(contextlib.AbstractContextManager["File"]):
    """One .safetensors file, memory-mapped, its tensors in their order there; UserError if it is not well-formed."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        with open_regular(self.path) as f:
            size = os.fstat(f.fileno()).st_size
            header = _read_header(self.path, f, size)
            begin = 8 + len(header)
            self.metadata, self.tensors, starts = _parse_header(self.path, header, size - begin)
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = {name: begin + start for name, start in zip(self.tensors, starts, strict=True)}

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, valid also after `close`; unaligned where the file's writer left it so.

        Shape and dtype are those of `tensors`. Raises UserError where there is no such one, ValueError after `close`.
        """
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {_shown(name)}; choose a model of the expected architecture")
        dtype, shape = DTYPES[self.tensors[name].dtype], self.tensors[name].shape
        if 0 in shape:  # frombuffer takes no empty ones
            return np.frombuffer(b"\0" * dtype.itemsize, dtype)[:0].reshape(shape)
        return np.frombuffer(self._map, dtype, math.prod(shape), self._starts[name]).reshape(shape)

    def close(self) -> None:
        """Lets go of the file. It is unmapped when the last view of it is gone, for a view must stay valid."""
        self._map = None


class Folder(contextlib.AbstractContextManager["Folder"]):
    """A Hugging Face model folder: model.safetensors, or else model.safetensors.index.json and the shards it names.

    Its `tensors` are listed shard by shard: reading in this order opens each once. UserError if a file of it is bad.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.tensors: dict[str, Tensor] = {}
        self._shard_of: dict[str, str] = {}
        self._file: File | None = None
        for shard, indexed in _shards(self.path).items():
            with File(self.path / shard) as file:
                if differ := sorted(indexed ^ file.tensors.keys()) if indexed else []:
                    raise _bad(file.path, f"{INDEX} and this shard differ on {_shown(differ[0])}, {len(differ)} in all")
                self.tensors |= file.tensors
                self._shard_of |= dict.fromkeys(file.tensors, shard)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, name: str) -> np.ndarray:
        """As `File.read`; opens the tensor's shard, after closing the one that was open, if that is another.

        Raises UserError also where the shard is not what it was when the folder was opened.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {_shown(name)}; choose a model of the expected architecture")
        path = self.path / self._shard_of[name]
        if self._file is None or self._file.path != path:
            self._file = File(path)
        if self._file.tensors.get(name) != self.tensors[name]:
            raise UserError(f"{path} was changed while it was read: start again when nothing writes to it")
        return self._file.read(name)

    def close(self) -> None:
        """Lets go of the shard that is open; views of it stay valid."""
        self._file = None


def _bad(where: Path | str, why: str) -> UserError:
    return UserError(f"{where}: {why}; download or write it again")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file; the Hugging Face cache may link it from REPO/snapshots/REVISION to REPO/blobs/HASH.

    Any other link is refused: a downloaded folder must not choose what is read from elsewhere.

    Raises:
      UserError: another link, no regular file, or one that cannot be read.
    """
    try:
        target = str(path)
        if path.is_symlink():
            repo = Path(os.path.realpath(path.parent)).parent.parent
            target = os.path.realpath(path)
            if Path(target).parent != repo / "blobs":
                raise UserError(f"{path} is a symlink to {target!r}, outside its folder: copy the file itself there")
        # Not opened at all if it is something else: a FIFO would block, and a device may do anything.
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise UserError(f"{path} is not a regular file; put the file itself there")
        with os.fdopen(os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as f:
            yield f
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}; download the whole model, or correct the path") from e


def _shards(folder: Path) -> dict[str, set[str]]:
    """{file name: the tensors it must hold; an empty set where no index says so}."""
    try:
        names = set(os.listdir(folder))
    except OSError as e:
        raise UserError(f"{folder}: {e.strerror}; give the path of a model's folder") from e
    if SINGLE in names:
        return {SINGLE: set()}
    if INDEX in names:
        return _read_index(folder / INDEX)
    if pickles := sorted(name for name in names if name.lower().endswith(_PICKLE_SUFFIXES)):
        raise UserError(f"{folder}: {_shown(pickles[0])} {_IS_PICKLE}")
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a safetensors model")


def _read_index(path: Path) -> dict[str, set[str]]:
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_JSON:
            raise _bad(path, f"an index of {size} bytes, over {MAX_JSON}, is too large")
        where = _parse_json(path, f.read(size)).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise _bad(path, f"weight_map is {_shown(where)}, not an object that names each tensor's file")
    shards: dict[str, set[str]] = {}
    for name, shard in where.items():
        is_name = isinstance(shard, str) and shard.isprintable() and not {"/", "\\"} & set(shard)
        if not is_name or not shard.endswith(".safetensors"):
            raise _bad(path, f"tensor {_shown(name)} is in {_shown(shard)}, not the plain name of a .safetensors file")
        shards.setdefault(shard, set()).add(name)
    return shards


def _read_header(path: Path, f: BinaryIO, size: int) -> bytes:
    head = f.read(80)
    length = int.from_bytes(head[:8], "little")
    # A header of 0x280 bytes begins as a pickle does; what follows its length tells them apart.
    if _PICKLE.match(head) and (head[8:9] != b"{" or length > min(size, MAX_JSON)):
        raise UserError(f"{path} {_IS_PICKLE}")
    if length > MAX_JSON:
        raise _bad(path, f"not a safetensors file: its header would be {length} bytes long, over {MAX_JSON}")
    if size < 8 + length:
        raise _bad(path, f"truncated: {size} bytes, less than the length ({length}) and the header take")
    f.seek(8)
    return f.read(length)


def _parse_header(path: Path, text: bytes, data_size: int) -> tuple[dict[str, str], dict[str, Tensor], list[int]]:
    """The metadata, the tensors in the order of their data, and where in the data each begins."""
    header = _parse_json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, f"__metadata__ is {_shown(metadata)}, not an object of strings")
    found: list[tuple[list[int], str, Tensor]] = []
    for name, entry in header.items():
        where = f"{path}: tensor {_shown(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _bad(where, f"{_shown(entry)} is not an object of dtype, shape and data_offsets")
        nbytes = _nbytes(where, entry["dtype"], entry["shape"])
        span, offsets = entry["data_offsets"], f"data_offsets {_shown(entry['data_offsets'])}"
        if not _is_naturals(span) or len(span) != 2:
            raise _bad(where, f"{offsets} are not two non-negative integers")
        if span[1] > data_size:
            raise _bad(where, f"{offsets} reach beyond the {data_size} bytes of data: truncated")
        if span[1] - span[0] != nbytes:
            raise _bad(where, f"{offsets} are not {nbytes} bytes, as its dtype and shape are")
        found.append((span, name, Tensor(entry["dtype"], tuple(entry["shape"]))))
    found.sort()
    end = 0
    for span, name, _ in found:
        if span[0] != end:
            what = "overlaps the tensor before it" if span[0] < end else f"leaves a hole at byte {end}"
            raise _bad(path, f"tensor {_shown(name)}: data_offsets {_shown(span)}: {what}")
        end = span[1]
    if end != data_size:
        raise _bad(path, f"{data_size - end} bytes too many after the last tensor, a hole")
    return metadata, {name: tensor for _, name, tensor in found}, [span[0] for span, _, _ in found]


def _nbytes(where: str, dtype: Any, shape: Any) -> int:
    """Bytes of a tensor's data; UserError where there can be no such tensor."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(where, f"unknown dtype {_shown(dtype)}, none of {', '.join(DTYPES)}")
    if not _is_naturals(shape):
        raise _bad(where, f"shape {_shown(shape)} is not a list of non-negative integers")
    # An empty tensor, too, must have a shape that numpy can make: 64 dimensions, and a product without the 0.
    if len(shape) > 64 or math.prod(n or 1 for n in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise _bad(where, f"shape {_shown(shape)} is too large")
    return math.prod(shape) * DTYPES[dtype].itemsize


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)  # True is no int here


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise _bad(path, f"malformed JSON: {e}") from e
    if not isinstance(value, dict):
        raise _bad(path, "malformed: its JSON is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Raises, as it should, at half of a surrogate pair, which an escape can be: it could not be written again.
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode("utf-8")
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {_shown(twice)} is there twice")
    return found


def write(
    path: Path, tensors: Tensors, read: Read, *, metadata: Mapping[str, str] | None = METADATA, force: bool = False
) -> None:
    """Writes one file, byte for byte as the reference library does.

    Asks `read` for one tensor at a time, in the order of `tensors`, and lets go of it before the next; the
    file's own order is by dtype as in `DTYPES`, then by name. Metadata None is left out; keys of it are sorted.

    Raises:
      UserError: something is at `path` and `force` is off, it cannot be written, or a file cannot hold such tensors.
      ValueError: `read` returned another type or shape.
    """
    sizes = _sizes(path, tensors)  # checks their types
    order = sorted(tensors, key=lambda name: (list(DTYPES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        starts[name], end = end, end + sizes[name]
        offsets = [starts[name], end]
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    _parse_header(path, text, end)  # what is written can be read
    with atomic_file(path, force=force) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            f.seek(8 + len(text) + starts[name])
            f.write(_bytes_of(name, tensor, np.asarray(read(name))))
            write_behind(f)


def _sizes(path: Path, tensors: Tensors) -> dict[str, int]:
    return {name: _nbytes(f"{path}: tensor {_shown(name)}", t.dtype, list(t.shape)) for name, t in tensors.items()}


def _bytes_of(name: str, tensor: Tensor, array: np.ndarray) -> memoryview:
    if array.dtype != DTYPES[tensor.dtype] or array.shape != tuple(tensor.shape):
        raise ValueError(f"tensor {name!r} is {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # numpy exports no buffer of ml_dtypes' types


def write_sharded(folder: Path, tensors: Tensors, read: Read, *, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Writes a model folder: model.safetensors if that takes at most `shard_bytes` of data, else shards and an index.

    Tensors go to shards in the given order, and a shard is larger than `shard_bytes` only where one tensor is. The
    index is written last; the files are returned in this order. When anything fails, what was written is removed.

    Raises as `write`, and UserError where the folder holds model files already or cannot be written.
    """
    folder = Path(folder)
    sizes = _sizes(folder, tensors)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + sizes[name] > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += sizes[name]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = dict(zip(names if len(shards) > 1 else [SINGLE], shards, strict=True))
    if there := sorted(folder.glob("model*.safetensors*")):
        raise UserError(f"{there[0]} exists, part of another model: choose an empty directory")
    with contextlib.suppress(OSError):  # writing the first file says why
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        for file, shard in files.items():
            write(folder / file, shard, read)
            undo.callback((folder / file).unlink)
        if len(files) > 1:
            weight_map = {name: file for file, shard in files.items() for name in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        undo.pop_all()
    return [folder / file for file in ([*files, INDEX] if len(files) > 1 else files)]
