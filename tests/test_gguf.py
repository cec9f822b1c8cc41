import math
import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf as other  # llama.cpp's package, to compare with
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES

from qatmoe.convert import gguf
from qatmoe.convert.gguf import Field, Tensor
from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS

FIELDS = {
    "general.architecture": Field("string", "qatmoe-test"),
    "a.uint8": Field("uint8", 255),
    "a.int8": Field("int8", -128),
    "a.uint16": Field("uint16", 65535),
    "a.int16": Field("int16", -32768),
    "a.uint32": Field("uint32", 2**32 - 1),
    "a.int32": Field("int32", -(2**31)),
    "a.float32": Field("float32", 0.1875),
    "a.bool": Field("bool", True),
    "a.uint64": Field("uint64", 2**64 - 1),
    "a.int64": Field("int64", -(2**63)),
    "a.float64": Field("float64", 0.1),
    "s.uint8": Field("uint8", [0, 255]),
    "s.int8": Field("int8", [-128, 127, 0]),
    "s.uint16": Field("uint16", [65535]),
    "s.int16": Field("int16", [-32768, 5]),
    "s.uint32": Field("uint32", [2**32 - 1, 0]),
    "s.int32": Field("int32", [-(2**31), 7]),
    "s.float32": Field("float32", [0.5, -0.25, math.inf]),
    "s.bool": Field("bool", [True, False, True]),
    "s.uint64": Field("uint64", [2**64 - 1]),
    "s.int64": Field("int64", [-(2**63)]),
    "s.float64": Field("float64", [0.1, -math.inf]),
    "tokens": Field("string", ["", "Ġa", "\n", "\0", "语", "🦙", "x" * 300]),
}
# Q8_1, of no file, has float16 sums in ggml and still float32 ones, as it once was, in the package.
KNOWN = [kind for kind in gguf.TYPES if kind in other.GGMLQuantizationType.__members__ and kind != "Q8_1"]
PLAIN = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I8": np.int8,
    "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


def make_tensors(kinds=tuple(gguf.TYPES)):
    """Descriptions and arrays of one tensor of each type, of 1 to 4 axes."""
    rng = np.random.default_rng(0)
    tensors, arrays = {}, {}
    for i, kind in enumerate(kinds):
        block, size = gguf.TYPES[kind].block, gguf.TYPES[kind].size
        lead = (2, 3, 1)[: i % 4]
        tensors[f"blk.{i}.{kind}"] = Tensor(kind, (*lead, 3 * block))
        if kind in PLAIN:
            raw = rng.integers(0, 64, (*lead, 3 * size), np.uint8)  # small bytes: no number is a NaN
            arrays[f"blk.{i}.{kind}"] = raw.view(PLAIN[kind])
        else:
            arrays[f"blk.{i}.{kind}"] = rng.integers(0, 256, (*lead, 3 * size), np.uint8)
    return tensors, arrays


def write(path, fields=FIELDS, kinds=tuple(gguf.TYPES), **options):
    tensors, arrays = make_tensors(kinds)
    gguf.write(path, fields, tensors, arrays.__getitem__, **options)
    return tensors, arrays


def check(path, fields, tensors, arrays):
    """A file read by this module is what was written."""
    with gguf.File(path) as file:
        assert list(file.fields.items()) == list(fields.items())
        assert list(file.tensors.items()) == list(tensors.items())
        for name, array in arrays.items():
            data = file.data(name)
            assert data.dtype == array.dtype and data.shape == array.shape
            assert data.tobytes() == array.tobytes()
            assert path.read_bytes()[file.offset(name) :][: data.nbytes] == array.tobytes()


# Round trips.


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_what_is_written_is_read(tmp_path, alignment):
    tensors, arrays = write(tmp_path / "a.gguf", alignment=alignment)
    added = {} if alignment == 32 else {"general.alignment": Field("uint32", alignment)}
    check(tmp_path / "a.gguf", FIELDS | added, tensors, arrays)
    with gguf.File(tmp_path / "a.gguf") as file:
        assert all(file.offset(name) % alignment == 0 for name in tensors)


def test_python_types_come_back(tmp_path):
    write(tmp_path / "a.gguf")
    with gguf.File(tmp_path / "a.gguf") as file:
        for key, (_, value) in FIELDS.items():
            got = file.fields[key].value
            assert type(got) is type(value), key
            if isinstance(value, list):
                assert [type(v) for v in got] == [type(v) for v in value], key


def test_empty_values(tmp_path):
    fields = {"text": Field("string", "")} | {f"none.{t}": Field(t, []) for t in ["string", "int8", "bool", "float64"]}
    gguf.write(tmp_path / "a.gguf", fields, {}, np.zeros)
    check(tmp_path / "a.gguf", fields, {}, {})
    gguf.write(tmp_path / "b.gguf", {}, {}, np.zeros)
    check(tmp_path / "b.gguf", {}, {}, {})


def test_numbers_that_are_no_numbers(tmp_path):
    fields = {"a": Field("float32", math.nan), "b": Field("float64", [math.nan, math.inf]), "c": Field("float32", 3)}
    gguf.write(tmp_path / "a.gguf", fields, {}, np.zeros)
    with gguf.File(tmp_path / "a.gguf") as file:
        assert math.isnan(file.fields["a"].value) and math.isnan(file.fields["b"].value[0])
        assert file.fields["c"].value == 3.0


def test_a_tensor_is_asked_for_when_it_is_written(tmp_path):
    """In the order of the descriptions, once each; arrays need not be contiguous."""
    tensors, arrays = make_tensors()
    asked = []

    def read(name):
        asked.append(name)
        wide = np.repeat(arrays[name], 2, axis=-1)
        return wide[..., ::2]

    gguf.write(tmp_path / "a.gguf", FIELDS, tensors, read)
    assert asked == list(tensors)
    check(tmp_path / "a.gguf", FIELDS, tensors, arrays)


def test_data_is_a_view_that_outlives_the_file(tmp_path):
    tensors, arrays = write(tmp_path / "a.gguf")
    with gguf.File(tmp_path / "a.gguf") as file:
        views = {name: file.data(name) for name in tensors}
    for name, view in views.items():
        assert not view.flags.owndata and not view.flags.writeable and view.flags.aligned
        assert view.tobytes() == arrays[name].tobytes()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.data(next(iter(tensors)))


def test_the_given_alignment_is_what_the_field_says(tmp_path):
    stale = {"general.alignment": Field("uint32", 64), "x": Field("bool", False)}
    tensors, arrays = write(tmp_path / "a.gguf", fields=stale, kinds=["F32", "Q2_0"])
    check(tmp_path / "a.gguf", {"general.alignment": Field("uint32", 32), "x": stale["x"]}, tensors, arrays)


def test_symbolic_links_are_followed(tmp_path):
    tensors, arrays = write(tmp_path / "a.gguf")
    (tmp_path / "link.gguf").symlink_to("a.gguf")
    check(tmp_path / "link.gguf", FIELDS, tensors, arrays)


def test_vocabularies_are_fast(tmp_path):
    fields = {
        "tokens": Field("string", [f"Ġtoken{i}" for i in range(150_000)]),
        "scores": Field("float32", [float(i) for i in range(150_000)]),
        "types": Field("int32", list(range(150_000))),
    }
    start = time.process_time()
    gguf.write(tmp_path / "a.gguf", fields, {}, np.zeros)
    written = time.process_time()
    with gguf.File(tmp_path / "a.gguf") as file:
        read = time.process_time()
        assert file.fields == fields
    assert written - start < 1
    assert read - written < 1


# Against llama.cpp's package.


def test_types_are_those_of_ggml():
    for kind in KNOWN:
        number = other.GGMLQuantizationType[kind]
        assert gguf.TYPES[kind] == (number, *GGML_QUANT_SIZES[number])
    assert {t.name for t in other.GGMLQuantizationType} == {*KNOWN, "Q8_1"}
    assert gguf.TYPES["Q2_0"] == (42, 64, 18)
    assert {kind for grid in GRIDS.values() for kind in grid.gguf} <= set(gguf.TYPES)


@pytest.mark.parametrize("alignment", [32, 128])
def test_the_package_reads_what_is_written(tmp_path, alignment):
    tensors, arrays = write(tmp_path / "a.gguf", kinds=KNOWN, alignment=alignment)
    reader = other.GGUFReader(tmp_path / "a.gguf")
    assert reader.alignment == alignment
    got = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(got)[: len(FIELDS)] == list(FIELDS)
    for key, field in FIELDS.items():
        assert got[key].types[-1].name == field.type.upper()
        assert (got[key].types[0] is other.GGUFValueType.ARRAY) == isinstance(field.value, list)
        assert got[key].contents() == field.value
    assert [t.name for t in reader.tensors] == list(tensors)
    with gguf.File(tmp_path / "a.gguf") as file:
        for t in reader.tensors:
            assert t.tensor_type.name == tensors[t.name].kind
            assert tuple(t.shape.tolist()[::-1]) == tensors[t.name].shape
            assert t.data_offset == file.offset(t.name)
            assert t.data.tobytes() == arrays[t.name].tobytes()


@pytest.mark.parametrize("alignment", [32, 64])
def test_the_same_bytes_as_the_package_writes(tmp_path, alignment):
    tensors, arrays = write(tmp_path / "ours.gguf", kinds=KNOWN, alignment=alignment)
    writer = other.GGUFWriter(tmp_path / "theirs.gguf", FIELDS["general.architecture"].value)
    for key, (kind, value) in list(FIELDS.items())[1:]:
        number = other.GGUFValueType[kind.upper()]
        if isinstance(value, list):
            writer.add_key_value(key, value, other.GGUFValueType.ARRAY, sub_type=number)
        else:
            writer.add_key_value(key, value, number)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, array in arrays.items():
        kind = tensors[name].kind
        raw = array.view(np.uint8) if kind == "BF16" else array
        writer.add_tensor(name, raw, raw_dtype=other.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


# What is refused in a file. These are put together here, by hand.


def text(s) -> bytes:
    raw = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key, body=b"\4\0\0\0\1\0\0\0") -> bytes:
    return text(key) + body


def tensor(name="w", dims=(32,), kind=0, offset=0, axes=None) -> bytes:
    axes = len(dims) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", axes, *dims, kind, offset)


def build(fields=(), tensors=(), data=b"", *, alignment=32, version=3, counts=None) -> bytes:
    counts = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def align(value, number=4, form="I") -> bytes:
    return field("general.alignment", struct.pack("<I" + form, number, value))


def array(number, count, body=b"") -> bytes:
    return struct.pack("<IIQ", 9, number, count) + body


W = bytes(128)  # one F32 tensor of 32 weights
PAIR = [tensor("a"), tensor("b", offset=128)]
HUGE = 2**63 + 5

BAD = {
    "empty": (b"", "is empty"),
    "four bytes": (b"GGUF", "the version would take 4 bytes"),
    "short magic": (b"GG", "begins with b'GG'"),
    "text": (b"<!DOCTYPE html>", "begins with b'<!DO', so it is not a GGUF file"),
    "pickle": (b"\x80\x04\x95" + bytes(40), "is a pickle"),
    "zip": (b"PK\x03\x04" + bytes(40), "is a zip archive"),
    "version 2": (build(version=2), "is version 2"),
    "version 4": (build(version=4), "is version 4"),
    "version 0": (build(version=0), "is version 0"),
    "big-endian": (build(version=3 << 24), "is big-endian"),
    "no counts": (build()[:8], "the number of tensors"),
    "no field count": (build()[:20], "the number of fields"),
    "many tensors": (build(counts=(HUGE, 0)), f"description of {HUGE} tensors would take"),
    "some more tensors": (build(counts=(2, 0), tensors=[tensor()]), "description of 2 tensors"),
    "many fields": (build(counts=(0, HUGE)), f"list of {HUGE} fields would take"),
    "long key": (build([struct.pack("<Q", HUGE) + bytes(30)]), f"key 0 would take {HUGE} bytes"),
    "empty key": (build([field("")]), "key 0 is empty"),
    "key not UTF-8": (build([field(b"a\xff\xfe")]), "key 0 is not UTF-8"),
    "key twice": (build([field("k"), field("k")]), "key 1, 'k', is there twice"),
    "unknown field type": (build([field("k", struct.pack("<IQ", 13, 0))]), "'k' has the unknown type 13"),
    "unknown item type": (build([field("k", array(77, 1, bytes(8)))]), "'k' has the unknown type 77"),
    "nested array": (build([field("k", array(9, 1, struct.pack("<IQ", 4, 0)))]), "'k' is an array of arrays"),
    "long array": (build([field("k", array(4, 2**61))]), f"'k' would take {2**63} bytes"),
    "long array of bool": (build([field("k", array(7, 1000))]), "'k' would take 1000 bytes"),
    "long array of strings": (build([field("k", array(8, 2**61, text("a")))]), f"'k' would take {2**64} bytes"),
    "long string": (build([field("k", struct.pack("<IQ", 8, 2**40))]), f"'k' would take {2**40} bytes"),
    "value not UTF-8": (build([field("k", struct.pack("<I", 8) + text(b"\xc3"))]), r"'k' is not UTF-8"),
    "token not UTF-8": (build([field("k", array(8, 2, text("a") + text(b"\xed\xa0\x80")))]), "'k' is not UTF-8"),
    "bool 2": (build([field("k", struct.pack("<IB", 7, 2))]), "'k' holds a byte that is neither 0 nor 1"),
    "bools with 255": (build([field("k", array(7, 3, b"\0\1\xff"))]), "'k' holds a byte that is neither 0 nor 1"),
    "alignment 0": (build([align(0)]), "general.alignment is not a uint32 and a power of two"),
    "alignment 1": (build([align(1)]), "general.alignment is not"),
    "alignment 24": (build([align(24)]), "general.alignment is not"),
    "alignment 2^31": (build([align(2**31)]), "general.alignment is not"),
    "alignment uint64": (build([align(32, 10, "Q")]), "general.alignment is not a uint32"),
    "alignment list": (build([field("general.alignment", array(4, 1, bytes(4)))]), "general.alignment is not"),
    "nameless": (build([], [tensor("")], W), "the name of tensor 0 is empty"),
    "name not UTF-8": (build([], [tensor(b"\xff")], W), "the name of tensor 0 is not UTF-8"),
    "name twice": (build([], [tensor("w"), tensor("w", offset=128)], W + W), "'w', is there twice"),
    "no axes": (build([], [tensor(dims=(), offset=0) + bytes(8)], W), "'w' has 0 axes"),
    "five axes": (build([], [tensor(dims=(2,) * 5)], W), "'w' has 5 axes"),
    "many axes": (build([], [tensor(axes=2**32 - 1)], W), "'w' has 4294967295 axes"),
    "empty axis": (build([], [tensor(dims=(32, 0))], W), r"'w' has the shape \(0, 32\)"),
    "huge axis": (build([], [tensor(dims=(2**64 - 1,))], W), "fewer than 2\\^63 weights"),
    "product overflows": (build([], [tensor(dims=(2**32, 2**32))], W), "fewer than 2\\^63 weights"),
    "large": (build([], [tensor(dims=(2**50,))], W), "'w' ends at byte"),
    "unknown type": (build([], [tensor(kind=99)], W), "'w' has the unknown type 99"),
    "removed type": (build([], [tensor(kind=4)], W), "'w' has the unknown type 4"),
    "part of a block": (build([], [tensor(dims=(48,), kind=2)], W), "rows of 48 weights, not whole blocks of 32"),
    "rows split blocks": (build([], [tensor(dims=(16, 2), kind=2)], W), "rows of 16 weights"),
    "no data": (build([], [tensor()]), "'w' ends at byte"),
    "a byte short": (build([], [tensor()], W[:-1]), "'w' ends at byte"),
    "unaligned": (build([], [tensor("a"), tensor("b", offset=129)], W + W + b"0"), "'b' has the offset 129, not"),
    "beyond the file": (build([], [tensor("a"), tensor("b", offset=256)], W + W), "'b' ends at byte"),
    "far beyond": (build([], [tensor("a"), tensor("b", offset=2**64 - 32)], W + W), "'b' ends at byte"),
    "same place": (build([], [tensor("a"), tensor("b")], W), "'b' overlaps"),
    "overlap": (build([], [tensor("a"), tensor("b", offset=96)], W + W), "'b' overlaps the tensor before it"),
    "hole": (build([], [tensor("a"), tensor("b", offset=160)], W + W + W), "'b' leaves a hole: its offset is 160"),
    "hole at the start": (build([], [tensor("a", offset=32)], W + W), "'a' leaves a hole"),
    "other order": (build([], PAIR[::-1], W + W), "'b' leaves a hole"),
    "goes on": (build([], PAIR, W + W + b"0"), "goes on for 1 bytes after its last tensor"),
    "goes on, no tensor": (build([field("k")], [], b"0"), "goes on for .* after its header"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path, case):
    raw, reason = BAD[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=reason) as e:
        gguf.File(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_what_the_refusals_differ_from_is_read(tmp_path):
    """The parts that the refused files above are made of are good."""
    good = {
        "plain": build([field("k")], PAIR, W + W),
        "last padding missing": build([], [tensor("a", dims=(33,))], W + bytes(4)),
        "last padding": build([], [tensor("a", dims=(33,))], W + bytes(32)),
        "no padding after the header": build([field("k")], alignment=1),
        "empty array at the end": build([field("k", array(4, 0))], alignment=1),
        "alignment 64": build([align(64)], [tensor("a"), tensor("b", offset=128)], W + W, alignment=64),
        "four axes": build([], [tensor(dims=(2, 2, 2, 4))], W),
    }
    for case, raw in good.items():
        (tmp_path / "a.gguf").write_bytes(raw)
        with gguf.File(tmp_path / "a.gguf") as file:
            assert all(file.data(name).size for name in file.tensors), case


@pytest.mark.parametrize("cut", range(0, 700, 7))
def test_truncated(tmp_path, cut):
    write(tmp_path / "a.gguf", kinds=["F32", "Q2_0"])
    raw = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(raw[:cut])
    with pytest.raises(UserError, match=r"b\.gguf"):
        gguf.File(tmp_path / "b.gguf")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.gguf: No such file"):
        gguf.File(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="is not a regular file"):
        gguf.File(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        gguf.File(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        gguf.File(Path("/dev/zero"))


def test_long_headers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER", 1 << 20)
    (tmp_path / "a.gguf").write_bytes(build([field("k", array(1, 2 << 20, bytes(2 << 20)))]))
    with pytest.raises(UserError, match="its header is longer than 1 MiB"):
        gguf.File(tmp_path / "a.gguf")


def test_long_names_are_shortened_in_messages(tmp_path):
    (tmp_path / "a.gguf").write_bytes(build([], [tensor("n\n" * 5000, kind=99)], W))
    with pytest.raises(UserError, match="unknown type 99") as e:
        gguf.File(tmp_path / "a.gguf")
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)


# What is refused when writing.

BAD_FIELDS = {
    "unknown type": (Field("uint128", 1), "has the type 'uint128', not one of uint8,"),
    "too large": (Field("uint8", 256), "does not fit into uint8: 256"),
    "too small": (Field("uint32", -1), "does not fit into uint32: -1"),
    "too large in a list": (Field("int16", [1, 40_000]), "does not fit into int16"),
    "overflow": (Field("float32", 1e39), "does not fit into float32"),
    "float for int": (Field("int32", 1.0), "holds a float where its type is int32"),
    "bool for int": (Field("int32", [1, True]), "holds a bool where its type is int32"),
    "int for bool": (Field("bool", 1), "holds a int where its type is bool"),
    "bool for float": (Field("float32", True), "holds a bool where its type is float32"),
    "int for string": (Field("string", ["a", 1]), "holds a int where its type is string"),
    "nested": (Field("int32", [[1], [2]]), "holds a list where its type is int32"),
    "none": (Field("string", None), "holds a NoneType where its type is string"),
    "surrogate": (Field("string", ["\ud800"]), "holds half a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_fields_refused_when_writing(tmp_path, case):
    value, reason = BAD_FIELDS[case]
    with pytest.raises(UserError, match=f"a.gguf: the value of 'some.key' {reason}"):
        gguf.write(tmp_path / "a.gguf", {"some.key": value}, {}, np.zeros)
    assert not list(tmp_path.iterdir())


BAD_TENSORS = {
    "unknown type": ("w", Tensor("Q9_0", (32,)), None, "has the type 'Q9_0'"),
    "no axes": ("w", Tensor("F32", ()), None, r"has the shape \(\)"),
    "five axes": ("w", Tensor("F32", (1,) * 5), None, "not 1 to 4 axes"),
    "empty axis": ("w", Tensor("F32", (0, 4)), None, r"has the shape \(0, 4\)"),
    "part of a block": ("w", Tensor("Q2_0", (2, 32)), None, "rows of 32 weights, not whole blocks of 64"),
    "no name": ("", Tensor("F32", (4,)), None, "a name of 0 bytes"),
    "long name": ("ü" * 32, Tensor("F32", (4,)), None, "a name of 64 bytes: llama.cpp reads 1 to 63"),
    "other type": ("w", Tensor("F32", (4,)), np.zeros(4, np.float64), r"needs float32 \(4,\), not float64 \(4,\)"),
    "bytes for F16": ("w", Tensor("F16", (4,)), np.zeros(8, np.uint8), "needs float16"),
    "F16 for BF16": ("w", Tensor("BF16", (4,)), np.zeros(4, np.float16), "needs bfloat16"),
    "big-endian": ("w", Tensor("F32", (4,)), np.zeros(4, ">f4"), "needs float32"),
    "other shape": ("w", Tensor("F32", (2, 4)), np.zeros((4, 2), np.float32), r"needs float32 \(2, 4\), not"),
    "flat": ("w", Tensor("Q2_0", (2, 64)), np.zeros(36, np.uint8), r"needs uint8 \(2, 18\), not uint8 \(36,\)"),
    "int8": ("w", Tensor("Q8_0", (1, 32)), np.zeros((1, 34), np.int8), r"needs uint8 \(1, 34\), not int8"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_refused_when_writing(tmp_path, case):
    name, description, data, reason = BAD_TENSORS[case]
    with pytest.raises(UserError, match=reason) as e:
        gguf.write(tmp_path / "a.gguf", {}, {name: description}, lambda _: data)
    assert "a.gguf" in str(e.value) and repr(name) in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alignment", [0, -32, 4, 48, 2**21])
def test_alignments_refused_when_writing(tmp_path, alignment):
    with pytest.raises(UserError, match=f"the alignment {alignment} is not a power of two"):
        write(tmp_path / "a.gguf", alignment=alignment)


def test_empty_keys_are_refused_when_writing(tmp_path):
    with pytest.raises(UserError, match="empty key"):
        gguf.write(tmp_path / "a.gguf", {"": Field("bool", True)}, {}, np.zeros)


def test_a_file_is_replaced_only_when_told_and_only_by_a_whole_one(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        write(path)
    tensors, arrays = make_tensors(["F32", "Q2_0"])
    last = list(tensors)[-1]
    with pytest.raises(UserError, match="needs uint8"):
        gguf.write(path, FIELDS, tensors, (arrays | {last: np.zeros(1)}).__getitem__, force=True)
    assert path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    tensors, arrays = write(path, force=True)
    check(path, FIELDS, tensors, arrays)


def test_a_directory_that_is_not_there_is_made(tmp_path):
    write(tmp_path / "none" / "a.gguf")
    assert (tmp_path / "none" / "a.gguf").is_file()
    with pytest.raises(UserError, match="cannot write .*: Not a directory"):
        write(tmp_path / "none" / "a.gguf" / "b.gguf")


# Damage.


def mutate(raw: bytes, rng: np.random.Generator, header: int) -> bytes:
    """One to three random changes, most of them to the header."""
    out = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        end = min(len(out), header if rng.random() < 0.8 else len(out))
        at = int(rng.integers(0, max(1, end - 8)))
        change = rng.integers(0, 6)
        if change == 0:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif change == 1:
            out[at] = int(rng.integers(0, 256))
        elif change == 2:
            del out[at:]
        elif change == 3:
            out[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif change == 4:
            del out[at : at + int(rng.integers(1, 40))]
        else:
            # A count or a length: eight bytes that now say something large or odd.
            values = [0, 1, 2, 9, 31, 255, 4096, 20_000, 2**31, 2**32 + 1, 2**40, 2**63, 2**64 - 1]
            found = out.find(struct.pack("<Q", int(rng.integers(0, 40))), at)
            start = found if found >= 0 else at
            out[start : start + 8] = struct.pack("<Q", values[rng.integers(0, len(values))])
        if len(out) < 16:
            break
    return bytes(out)


def test_mutated_files_are_read_or_refused(tmp_path):
    """1,000 damaged files: no other exception, no view beyond the file, no time or memory that a length asks for."""
    fields = FIELDS | {"tokens": Field("string", [f"tok{i}" for i in range(300)]), "list": Field("int32", [7] * 500)}
    tensors, _ = write(tmp_path / "good.gguf", fields)
    with gguf.File(tmp_path / "good.gguf") as file:
        header = file.offset(next(iter(tensors)))
    raw = (tmp_path / "good.gguf").read_bytes()
    assert 15_000 < len(raw) < 40_000
    rng = np.random.default_rng(0)
    refused, path = 0, tmp_path / "bad.gguf"
    tracemalloc.start()
    try:
        for i in range(1000):
            path.write_bytes(mutate(raw, rng, header))
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()
            message = None
            try:
                with gguf.File(path) as file:
                    assert sum(file.data(name).nbytes for name in file.tensors) <= path.stat().st_size
                    assert sum(int(file.data(name).view(np.uint8).sum()) for name in file.tensors) >= 0
            except UserError as e:
                refused += 1
                message = str(e)
            assert message is None or (str(path) in message and "\n" not in message and len(message) < 1000)
            assert tracemalloc.get_traced_memory()[1] - before < 2 << 20, i
            assert time.process_time() - start < 1, i
    finally:
        tracemalloc.stop()
    assert 300 < refused < 1000  # a flipped bit of a weight or of a value is no damage to the container
