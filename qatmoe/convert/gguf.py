"""GGUF version 3, the container of llama.cpp's models, read and written a tensor at a time.

All numbers are little-endian; a string is its length in bytes (uint64) and UTF-8.

    "GGUF"  uint32 version 3  uint64 tensors  uint64 fields
    field:  string key  uint32 type  value         value: a number, a byte 0 or 1, a string, or, of type 9,
                                                   uint32 type of the items  uint64 count  items
    tensor: string name  uint32 number of axes  uint64 length of each, the contraction axis first
            uint32 type  uint64 offset from the start of the data
    padding to a multiple of the alignment, where the data starts: the tensors in the same order, each so padded

Read is what llama.cpp reads and nothing else: tensors that overlap, are out of order or have gaps between them are
refused, and so is a file that goes on after the last one. Every count and length is compared with the bytes that are
left before anything of that size is made.
"""

import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from qatmoe.errors import UserError
from qatmoe.files import atomic_file, write_behind

MAX_HEADER = 128 << 20  # bytes before the data; vocabularies and merges take 20 MB
MAX_NAME = 63  # bytes of a tensor's name that llama.cpp reads
_ALIGNMENTS = [1 << n for n in range(3, 21)]  # the specification asks for a multiple of 8
_ALIGNMENT_KEY = "general.alignment"
_ARRAY = 9  # the field type of a list


class Type(NamedTuple):
    """How ggml stores the weights of a tensor."""

    id: int
    block: int  # weights per block
    size: int  # bytes per block


class Tensor(NamedTuple):
    """What a file says of a tensor."""

    kind: str  # a key of TYPES
    shape: tuple[int, ...]  # weights, not bytes; the last axis is the contraction axis, ggml's ne0


class Field(NamedTuple):
    """A value of a file's metadata. A list is an array of `type`."""

    type: str
    value: Any  # a str, bool, int or float, or a list of one of them


# From enum ggml_type (ggml.h) and the structs of ggml-common.h: id, weights and bytes of a block.
TYPES: dict[str, Type] = {
    "F32": Type(0, 1, 4), "F16": Type(1, 1, 2), "BF16": Type(30, 1, 2), "F64": Type(28, 1, 8),
    "I8": Type(24, 1, 1), "I16": Type(25, 1, 2), "I32": Type(26, 1, 4), "I64": Type(27, 1, 8),
    "Q1_0": Type(41, 128, 18), "Q2_0": Type(42, 64, 18), "Q4_0": Type(2, 32, 18), "Q4_1": Type(3, 32, 20),
    "Q5_0": Type(6, 32, 22), "Q5_1": Type(7, 32, 24), "Q8_0": Type(8, 32, 34), "Q8_1": Type(9, 32, 36),
    "Q2_K": Type(10, 256, 84), "Q3_K": Type(11, 256, 110), "Q4_K": Type(12, 256, 144), "Q5_K": Type(13, 256, 176),
    "Q6_K": Type(14, 256, 210), "Q8_K": Type(15, 256, 292), "TQ1_0": Type(34, 256, 54), "TQ2_0": Type(35, 256, 66),
    "IQ1_S": Type(19, 256, 50), "IQ1_M": Type(29, 256, 56), "IQ2_XXS": Type(16, 256, 66), "IQ2_XS": Type(17, 256, 74),
    "IQ2_S": Type(22, 256, 82), "IQ3_XXS": Type(18, 256, 98), "IQ3_S": Type(21, 256, 110), "IQ4_XS": Type(23, 256, 136),
    "IQ4_NL": Type(20, 32, 18), "MXFP4": Type(39, 32, 17), "NVFP4": Type(40, 64, 36),
}  # fmt: skip
_KINDS = {t.id: kind for kind, t in TYPES.items()}

# Types whose elements numpy has; all others are bytes to it.
_PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip

# Number in the file; format of one item, the same for `struct` and numpy; what it is in Python.
_FIELDS: dict[str, tuple[int, str, tuple[type, ...]]] = {
    "uint8": (0, "B", (int,)), "int8": (1, "b", (int,)), "uint16": (2, "H", (int,)), "int16": (3, "h", (int,)),
    "uint32": (4, "I", (int,)), "int32": (5, "i", (int,)), "uint64": (10, "Q", (int,)), "int64": (11, "q", (int,)),
    "float32": (6, "f", (float, int)), "float64": (12, "d", (float, int)), "bool": (7, "?", (bool,)),
    "string": (8, "", (str,)),
}  # fmt: skip
_FIELD_NAMES = {number: name for name, (number, _, _) in _FIELDS.items()}


def _stored(tensor: Tensor) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape and bytes of the array that holds a tensor: its weights for a plain type, else uint8."""
    t, dtype = TYPES[tensor.kind], _PLAIN.get(tensor.kind, np.dtype(np.uint8))
    shape = (*tensor.shape[:-1], tensor.shape[-1] // t.block * (t.size // dtype.itemsize))
    return dtype, shape, math.prod(shape) * dtype.itemsize


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _shown(text: str) -> str:
    """A name from a file for a message: on one line and not long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _shape_fault(shape: tuple[int, ...], kind: str) -> str | None:
    """What is wrong with the shape of a tensor."""
    if not (1 <= len(shape) <= 4 and min(shape) >= 1 and math.prod(shape) < 2**63):
        return f"has the shape {shape}, not 1 to 4 axes of one weight or more and fewer than 2^63 weights"
    if shape[-1] % TYPES[kind].block:
        return f"has rows of {shape[-1]} weights, not whole blocks of {TYPES[kind].block} as {kind} has"
    return None


class _Header:
    """A place in the part of a file before its tensors. What the bytes left cannot hold is refused unread."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data = path, data
        self.at, self.end = 0, min(len(data), MAX_HEADER)

    def refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path} is not a sound GGUF file: {reason}; download or convert it again")

    def need(self, count: int, size: int, what: str) -> None:
        """Refuses `count` items of `size` or more bytes where fewer bytes are left."""
        if count * size > self.end - self.at:
            if self.end < len(self.data):
                self.refuse(f"its header is longer than {MAX_HEADER >> 20} MiB (at {what})")
            self.refuse(f"{what} would take {count * size} bytes where the file has {self.end - self.at} left")

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.need(1, size, what)
        self.at += size
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def text(self, what: str) -> str:
        length = self.number("<Q", what)
        self.need(length, 1, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            self.refuse(f"{what} is not UTF-8: {raw[e.start : e.start + 8]!r} at its byte {e.start}")

    def name(self, what: str, taken: Container[str]) -> str:
        name = self.text(what)
        if not name:
            self.refuse(f"{what} is empty")
        if name in taken:
            self.refuse(f"{what}, {_shown(name)}, is there twice")
        return name

    def items(self, form: str, count: int, what: str) -> list[Any]:
        """Values of a field; `form` as in _FIELDS."""
        self.need(count, struct.calcsize("<" + form) or 8, what)  # of strings the lengths alone
        if not form:
            return [self.text(what) for _ in range(count)]
        items = np.frombuffer(self.data, "<" + form, count, self.at)
        self.at += items.nbytes
        if form == "?" and items.view(np.uint8).max(initial=0) > 1:
            self.refuse(f"{what} holds a byte that is neither 0 nor 1 as a truth value")
        return items.tolist()


def _map(path: Path) -> mmap.mmap:
    """A file's bytes, read from disk where they are touched."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its other end
            raise UserError(f"{path} is not a regular file: give the path of a GGUF file")
        with open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size == 0:
                raise UserError(f"{path} is empty: download or convert it again")
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; give the path of a GGUF file") from e


def _read_preamble(header: _Header) -> tuple[int, int]:
    """The numbers of tensors and fields, after checking what the file is."""
    start = header.data[:4]
    if start != b"GGUF":
        what = f"begins with {start!r}, so it is"
        if start == b"PK\x03\x04":
            what = "is a zip archive (as PyTorch saves),"
        elif start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            what = "is a pickle,"
        raise UserError(f"{header.path} {what} not a GGUF file: give the path of one")
    header.at = 4
    version = header.number("<I", "the version")
    if version != 3:
        what = "is big-endian" if version and version & 0xFFFF == 0 else f"is version {version}"
        raise UserError(f"{header.path} {what}, not little-endian version 3: convert it again with a current llama.cpp")
    tensors = header.number("<Q", "the number of tensors")
    fields = header.number("<Q", "the number of fields")
    header.need(tensors, 33, f"the description of {tensors} tensors")  # with a name of one letter and one axis
    header.need(fields, 14, f"the list of {fields} fields")  # with a key of one letter and a value of one byte
    return tensors, fields


def _read_fields(header: _Header, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for i in range(count):
        key = header.name(f"key {i}", fields)
        what = f"the value of {_shown(key)}"
        number = header.number("<I", what)
        if is_list := number == _ARRAY:
            number = header.number("<I", what)
        if number not in _FIELD_NAMES:
            nested = is_list and number == _ARRAY
            header.refuse(f"{what} is an array of arrays" if nested else f"{what} has the unknown type {number}")
        name = _FIELD_NAMES[number]
        items = header.items(_FIELDS[name][1], header.number("<Q", what) if is_list else 1, what)
        fields[key] = Field(name, items if is_list else items[0])
    return fields


def _read_tensors(header: _Header, count: int) -> dict[str, tuple[Tensor, int]]:
    """Descriptions of the tensors, and where each begins in the data."""
    tensors: dict[str, tuple[Tensor, int]] = {}
    for i in range(count):
        name = header.name(f"the name of tensor {i}", tensors)
        what = f"tensor {_shown(name)}"
        axes = header.number("<I", what)
        if not 1 <= axes <= 4:
            header.refuse(f"{what} has {axes} axes, not 1 to 4")
        shape = tuple(header.number("<Q", what) for _ in range(axes))[::-1]
        number = header.number("<I", what)
        if number not in _KINDS:
            header.refuse(f"{what} has the unknown type {number}")
        if (fault := _shape_fault(shape, _KINDS[number])) is not None:
            header.refuse(f"{what} {fault}")
        tensors[name] = Tensor(_KINDS[number], shape), header.number("<Q", what)
    return tensors


def _check_places(header: _Header, fields: dict[str, Field], tensors: dict[str, tuple[Tensor, int]]) -> int:
    """Refuses tensors that are not one after the other and all within the file; returns where the data starts."""
    kind, alignment = fields.get(_ALIGNMENT_KEY, ("uint32", 32))
    if kind != "uint32" or alignment not in _ALIGNMENTS:
        header.refuse(f"{_ALIGNMENT_KEY} is not a uint32 and a power of two from 8 to 2^20")
    file_size, start = len(header.data), _padded(header.at, alignment)
    end, expected = header.at, 0  # from the start of the file; from the start of the data
    for name, (tensor, offset) in tensors.items():
        what, size = f"tensor {_shown(name)}", _stored(tensor)[2]
        if offset % alignment:
            header.refuse(f"{what} has the offset {offset}, not a multiple of the alignment {alignment}")
        if start + offset + size > file_size:
            header.refuse(f"{what} ends at byte {start + offset + size} and the file at {file_size}")
        if offset != expected:
            fault = "overlaps the tensor before it" if offset < expected else "leaves a hole"
            header.refuse(f"{what} {fault}: its offset is {offset} and should be {expected}")
        end = start + offset + size
        expected = _padded(offset + size, alignment)
    if file_size > _padded(end, alignment):
        header.refuse(f"it goes on for {file_size - end} bytes after its {'last tensor' if tensors else 'header'}")
    return start


class File:
    """A GGUF file, memory-mapped: metadata is read at once, a tensor where it is looked at.

    `fields` and `tensors` are in file order. Arrays from `data` outlive `close`; the file must not be cut short.
    """

    def __init__(self, path: Path):
        """Opens and checks a file.

        Raises:
          UserError: there is no such file, it is not GGUF version 3, or it is damaged.
        """
        data = _map(path)
        header = _Header(path, data)
        tensor_count, field_count = _read_preamble(header)
        self.fields = _read_fields(header, field_count)
        tensors = _read_tensors(header, tensor_count)
        start = _check_places(header, self.fields, tensors)
        self.tensors = {name: tensor for name, (tensor, _) in tensors.items()}
        self._offsets = {name: start + offset for name, (_, offset) in tensors.items()}
        self._bytes: np.ndarray | None = np.frombuffer(data, np.uint8)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def data(self, name: str) -> np.ndarray:
        """A tensor as it is in the file, read-only and not copied: uint8 (..., bytes per row) for a block type."""
        if self._bytes is None:
            raise ValueError("the file is closed")
        dtype, shape, nbytes = _stored(self.tensors[name])
        start = self._offsets[name]
        return self._bytes[start : start + nbytes].view(dtype).reshape(shape)

    def offset(self, name: str) -> int:
        """Where a tensor begins, in bytes from the start of the file."""
        return self._offsets[name]

    def close(self) -> None:
        """Lets go of the file; it is unmapped when the last array from `data` is gone."""
        self._bytes = None


def _text_bytes(text: str, what: str) -> bytes:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what} holds half a surrogate pair, which UTF-8 has no bytes for") from None
    return struct.pack("<Q", len(raw)) + raw


def _field_bytes(key: str, field: Field, what: str) -> bytes:
    if not key:
        raise UserError(f"{what} has an empty key")
    if field.type not in _FIELDS:
        raise UserError(f"{what} has the type {field.type!r}, not one of {', '.join(_FIELDS)}")
    number, form, python = _FIELDS[field.type]
    is_list = isinstance(field.value, list)
    values = field.value if is_list else [field.value]
    for found in set(map(type, values)):
        if not issubclass(found, python) or (found is bool) != (field.type == "bool"):
            raise UserError(f"{what} holds a {found.__name__} where its type is {field.type}")
    try:
        body = struct.pack(f"<{len(values)}{form}", *values) if form else b"".join(_text_bytes(v, what) for v in values)
    except (struct.error, OverflowError):
        raise UserError(f"{what} does not fit into {field.type}: {str(field.value)[:80]}") from None
    prefix = struct.pack("<IIQ", _ARRAY, number, len(values)) if is_list else struct.pack("<I", number)
    return _text_bytes(key, what) + prefix + body


def _tensor_bytes(name: str, tensor: Tensor, offset: int, what: str) -> bytes:
    if tensor.kind not in TYPES:
        raise UserError(f"{what} has the type {tensor.kind!r}, not one of {', '.join(TYPES)}")
    if (fault := _shape_fault(tensor.shape, tensor.kind)) is not None:
        raise UserError(f"{what} {fault}")
    raw = _text_bytes(name, what)
    if not 1 <= len(raw) - 8 <= MAX_NAME:
        raise UserError(f"{what} has a name of {len(raw) - 8} bytes: llama.cpp reads 1 to {MAX_NAME}")
    axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
    return raw + axes + struct.pack("<IQ", TYPES[tensor.kind].id, offset)


def _header_bytes(path: Path, fields: Mapping[str, Field], tensors: Mapping[str, Tensor], alignment: int) -> bytes:
    """All that comes before the data, padded."""
    if alignment not in _ALIGNMENTS:
        raise UserError(f"cannot write {path}: the alignment {alignment} is not a power of two from 8 to 2^20")
    all_fields = dict(fields)
    if alignment != 32 or _ALIGNMENT_KEY in fields:
        all_fields[_ALIGNMENT_KEY] = Field("uint32", alignment)
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(all_fields))]
    for key, field in all_fields.items():
        parts.append(_field_bytes(key, field, f"cannot write {path}: the value of {_shown(key)}"))
    offset = 0
    for name, tensor in tensors.items():
        parts.append(_tensor_bytes(name, tensor, offset, f"cannot write {path}: tensor {_shown(name)}"))
        offset = _padded(offset + _stored(tensor)[2], alignment)
    size = sum(map(len, parts))
    return b"".join(parts) + bytes(_padded(size, alignment) - size)


def data_bytes(tensor: Tensor, alignment: int = 32) -> int:
    """Bytes that a tensor's data takes in a file, padding included."""
    return _padded(_stored(tensor)[2], alignment)


def file_bytes(fields: Mapping[str, Field], tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write` makes. Raises UserError as `write` does, before any weights are there."""
    header = _header_bytes(Path("model.gguf"), fields, tensors, 32)
    return len(header) + sum(map(data_bytes, tensors.values()))


def write(
    path: Path,
    fields: Mapping[str, Field],
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray],
    *,
    alignment: int = 32,
    force: bool = False,
) -> None:
    """Writes a file, holding one tensor at a time.

    Args:
      fields: metadata in file order, as `tensors` are.
      read: gives a tensor by name, called once for each and in this order: uint8 (..., bytes per row) for a block
        type, an array of the type itself (float32, float16, bfloat16, ...) for a plain one.
      alignment: bytes, a power of two. The field `general.alignment` is set to it, and added where it is not 32.
      force: replaces a file at `path`.

    Raises:
      UserError: a value is not of its type, an array is not what its description says, or the file cannot be written.
        What was at `path` is untouched.
    """
    header = _header_bytes(path, fields, tensors, alignment)
    with atomic_file(path, force=force) as f:
        f.write(header)
        for name, tensor in tensors.items():
            array, (dtype, shape, _) = read(name), _stored(tensor)
            if array.shape != shape or array.dtype != dtype:
                found = f"not {array.dtype} {array.shape}"
                raise UserError(f"cannot write {path}: {tensor.kind} {_shown(name)} needs {dtype} {shape}, {found}")
            data = np.ascontiguousarray(array).view(np.uint8)  # bfloat16 has no buffer that `write` takes
            f.write(data.data)
            f.write(bytes(_padded(data.nbytes, alignment) - data.nbytes))
            write_behind(f)
