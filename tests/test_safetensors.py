import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qatmoe.convert.safetensors import DTYPES, INDEX, MAX_JSON, File, Folder, Tensor, write, write_sharded
from qatmoe.errors import UserError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def make_arrays(seed=0, shape=(3, 5)):
    """An array of each type, and some of odd shapes; names that a careless sort or JSON writer gets wrong."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        raw = rng.integers(0, 2 if name == "BOOL" else 256, (*shape, dtype.itemsize), dtype=np.uint8)
        arrays[f"layers.{i % 7}.{name}"] = raw.view(dtype).reshape(shape)
    arrays['Ünïcode "quoted" \\ \n\t\x01\x7f 模型'] = np.arange(3, dtype=np.float16)
    arrays["zero"] = np.zeros((2, 0, 4), np.float32)
    arrays["scalar"] = np.array(7, np.int64)
    arrays["a"] = np.arange(6, dtype=np.uint8)
    arrays["B"] = np.ones(1, ml_dtypes.bfloat16)
    return arrays


def load_reference(path):
    """What the reference library finds in a file; its numpy interface cannot make all of the types."""
    found = safetensors.deserialize(path.read_bytes())
    return {name: np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in found}


def describe(arrays):
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: Tensor(names[a.dtype], a.shape) for name, a in arrays.items()}


def save(path, arrays, **options):
    write(path, describe(arrays), arrays.__getitem__, **options)


def save_sharded(folder, arrays, shard_bytes):
    return write_sharded(folder, describe(arrays), arrays.__getitem__, shard_bytes=shard_bytes)


def assert_same(got, want):
    """Bit for bit: there are NaNs among them."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def put(path, header, data=b"", length=None):
    """A file of any header (bytes, or an object to be written as JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        File(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def folder_refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        Folder(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


# Round trips, and the reference library.


def test_what_is_written_is_read_again(tmp_path):
    arrays = make_arrays()
    save(tmp_path / "a.safetensors", arrays, metadata={"format": "pt", "a": "ü\n"})
    with File(tmp_path / "a.safetensors") as f:
        assert f.metadata == {"format": "pt", "a": "ü\n"}
        assert f.tensors == describe(arrays)
        for name, array in arrays.items():
            assert_same(f.read(name), array)
            assert not f.read(name).flags.writeable


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {'a"b': "ü\\ \n\x02"}])
def test_the_bytes_are_those_of_the_reference(tmp_path, metadata):
    arrays = make_arrays()
    save(tmp_path / "ours.safetensors", arrays, metadata=metadata)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("n", range(1, 12))
def test_the_padding_is_that_of_the_reference(tmp_path, n):
    arrays = {"x" * n: np.arange(n, dtype=np.float32)}
    save(tmp_path / "ours.safetensors", arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_reference_reads_what_is_written_and_the_reverse(tmp_path):
    arrays = make_arrays()
    save(tmp_path / "ours.safetensors", arrays)
    theirs = load_reference(tmp_path / "ours.safetensors")
    assert theirs.keys() == arrays.keys()
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    with File(tmp_path / "theirs.safetensors") as f:
        assert f.metadata == {} and f.tensors == describe(arrays)
        for name, array in arrays.items():
            assert_same(f.read(name), array)
            assert_same(theirs[name], array)


def test_an_empty_model(tmp_path):
    save(tmp_path / "a.safetensors", {}, metadata=None)
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.numpy.save({})
    with File(tmp_path / "a.safetensors") as f:
        assert f.tensors == {}
    assert save_sharded(tmp_path / "m", {}, 10) == [tmp_path / "m/model.safetensors"]
    with Folder(tmp_path / "m") as f:
        assert f.tensors == {}


def test_tensors_are_listed_in_the_order_of_their_data_and_need_no_alignment(tmp_path):
    header = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
    }
    put(tmp_path / "a.safetensors", header, b"\5" + np.array([1.5, -2], "<f4").tobytes())
    with File(tmp_path / "a.safetensors") as f:
        assert list(f.tensors) == ["a", "b"]
        assert f.read("b").tolist() == [1.5, -2] and f.read("a").tolist() == [5]


def test_a_view_outlives_the_file(tmp_path):
    arrays = make_arrays()
    save(tmp_path / "a.safetensors", arrays)
    with File(tmp_path / "a.safetensors") as f:
        view = f.read("a")
    assert_same(view, arrays["a"])
    with pytest.raises(ValueError, match="closed"):
        f.read("a")


def test_a_file_can_be_written_over_while_it_is_read(tmp_path):
    arrays = make_arrays()
    save(tmp_path / "a.safetensors", arrays)
    with File(tmp_path / "a.safetensors") as f:
        write(tmp_path / "a.safetensors", f.tensors, f.read, metadata=f.metadata, force=True)
        assert_same(f.read("scalar"), arrays["scalar"])
    with File(tmp_path / "a.safetensors") as f:
        assert_same(f.read("scalar"), arrays["scalar"])


def test_shards(tmp_path):
    arrays = make_arrays()
    paths = save_sharded(tmp_path, arrays, 200)
    count = len(paths) - 1
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert count > 3 and [p.name for p in paths] == [*names, INDEX]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values())}
    assert list(dict.fromkeys(index["weight_map"][name] for name in arrays)) == names  # in the given order
    merged = {}
    for name in names:
        merged |= (part := load_reference(tmp_path / name))
        assert sum(a.nbytes for a in part.values()) <= 200 or len(part) == 1
        assert {n for n, shard in index["weight_map"].items() if shard == name} == part.keys()
    with Folder(tmp_path) as f:
        assert f.tensors == describe(arrays)
        for name, array in [*arrays.items(), *reversed(arrays.items())]:
            assert_same(f.read(name), array)
            assert_same(merged[name], array)


def test_a_model_that_fits_is_one_file(tmp_path):
    arrays = make_arrays()
    total = sum(a.nbytes for a in arrays.values())
    assert save_sharded(tmp_path / "new" / "folder", arrays, total) == [tmp_path / "new/folder/model.safetensors"]
    assert len(save_sharded(tmp_path / "b", arrays, total - 1)) == 3
    with Folder(tmp_path / "new/folder") as f:
        assert f.tensors == describe(arrays)
        assert_same(f.read("a"), arrays["a"])


def test_one_tensor_is_asked_for_at_a_time_in_the_given_order(tmp_path):
    arrays = {f"t{i:02}": Tensor("F32", (1 << 18,)) for i in reversed(range(40))}
    asked = []

    def read(name):
        asked.append(name)
        return np.full(1 << 18, len(asked), np.float32)

    tracemalloc.start()
    try:
        write(tmp_path / "a.safetensors", arrays, read)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with File(tmp_path / "a.safetensors") as file:  # in the order of names; each has its own value
        assert [file.read(name)[0] for name in sorted(arrays)] == list(range(40, 0, -1))
    assert asked == list(arrays) and peak < 2.5 * 2**20  # one MiB each, of 40


# Writing what cannot be written.


@pytest.mark.parametrize(
    "array", [np.zeros(3, np.float32), np.zeros((2, 2), np.float16), np.zeros(2, ">f4"), np.zeros(2, np.int32)]
)
def test_another_array_than_announced_is_refused(tmp_path, array):
    with pytest.raises(ValueError, match="'x' is .* not F32"):
        write(tmp_path / "a.safetensors", {"x": Tensor("F32", (2,))}, lambda name: array)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("x", Tensor("F33", (2,)), "unknown dtype 'F33'"),
        ("x", Tensor("F32", (-1,)), "non-negative"),
        ("__metadata__", Tensor("F32", (0,)), "__metadata__"),
        ("\ud800", Tensor("F32", (0,)), "utf-8"),
    ],
)
def test_a_tensor_that_no_file_can_hold_is_refused(tmp_path, name, tensor, match):
    with pytest.raises(UserError, match=match):
        write(tmp_path / "a.safetensors", {name: tensor}, lambda name: np.zeros(0, np.float32))
    with pytest.raises(UserError, match="__metadata__ is"):
        write(tmp_path / "a.safetensors", {}, lambda name: np.zeros(0), metadata={"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(tmp_path):
    arrays = make_arrays()
    save(tmp_path / "model.safetensors", arrays)
    with pytest.raises(UserError, match="exists"):
        save(tmp_path / "model.safetensors", arrays)
    for shard_bytes in 1, 10**9:
        with pytest.raises(UserError, match="model.safetensors exists"):
            save_sharded(tmp_path, arrays, shard_bytes)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/model.safetensors: Not a directory"):
        save_sharded(tmp_path / "file", arrays, 10**9)


def test_shards_of_a_failed_write_are_removed(tmp_path):
    arrays = make_arrays()

    def read(name):
        if name == "a":
            raise RuntimeError("no more")
        return arrays[name]

    with pytest.raises(RuntimeError, match="no more"):
        write_sharded(tmp_path, describe(arrays), read, shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


# Reading what is no safetensors file.


def test_absent_tensors_are_named(tmp_path):
    save_sharded(tmp_path, make_arrays(), 10**9)
    with File(tmp_path / "model.safetensors") as f, pytest.raises(UserError, match="no tensor 'lm_head'"):
        f.read("lm_head")
    with Folder(tmp_path) as f, pytest.raises(UserError, match="no tensor 'lm_head'"):
        f.read("lm_head")


def test_missing_files(tmp_path):
    refused(tmp_path / "a.safetensors", "No such file")
    folder_refused(tmp_path / "nowhere", "No such file")
    folder_refused(tmp_path, "holds neither model.safetensors nor")
    (tmp_path / "file").touch()
    folder_refused(tmp_path / "file", "Not a directory")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "A.BIN"])
def test_a_folder_of_pickles_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "config.json").write_text("{}")
    folder_refused(tmp_path, f"'{name}' is a pickle, which can run code when read; convert it to safetensors")
    refused(tmp_path / name, "is a pickle")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Bomb(), {}, {"a": 1}, [], [1], None])
def test_a_pickle_called_safetensors_is_refused(tmp_path, monkeypatch, protocol, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(value, protocol))
    obvious = protocol >= 2 or isinstance(value, Bomb | dict)  # an old pickle may begin like anything
    folder_refused(tmp_path, "is a pickle" if obvious else "pickle|truncated|header")
    assert not (tmp_path / "unpickled").exists()


def test_a_zip_called_safetensors_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps({}))
    folder_refused(tmp_path, "model.safetensors is a pickle")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path, length):
    put(tmp_path / "a.safetensors", json.dumps({"x": ENTRY}).encode().ljust(length), bytes(8))
    assert (tmp_path / "a.safetensors").read_bytes()[:2] == bytes([0x80, length >> 8])
    with File(tmp_path / "a.safetensors") as f:
        assert f.read("x").tolist() == [0, 0]


def test_truncated_files(tmp_path):
    save(tmp_path / "a.safetensors", make_arrays())
    data = (tmp_path / "a.safetensors").read_bytes()
    for length in [*range(10), 100, len(data) // 2, len(data) - 100, len(data) - 1]:
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        refused(tmp_path / "a.safetensors", "truncated|malformed JSON" if length == 8 else "truncated")


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (50, "truncated"),
        (MAX_JSON, "truncated"),
        (MAX_JSON + 1, "over 100000000"),
        (2**63, "over 100000000"),
        (2**64 - 1, "over 100000000"),
    ],
)
def test_headers_longer_than_the_file(tmp_path, length, match):
    refused(put(tmp_path / "a.safetensors", b"{}", b" " * 40, length=length), match)


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = put(tmp_path / "a.safetensors", b"{}", length=MAX_JSON + 1)
    os.truncate(path, MAX_JSON + 100)
    refused(path, "over 100000000")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"", "malformed JSON"),
        (b"        ", "malformed JSON"),
        (b"{", "malformed JSON"),
        (b"{} {}", "malformed JSON"),
        (b"{}\0", "malformed JSON"),
        (b"\xef\xbb\xbf{}", "malformed JSON"),
        ("{}".encode("utf-16"), "malformed JSON"),
        (b'{"\xff": 1}', "malformed JSON: 'utf-8' codec"),
        (b'{"\\ud800": 1}', "malformed JSON: .*surrogates"),
        (b'{"__metadata__": {"a": "\\udc80"}}', "malformed JSON: .*surrogates"),
        (b"[" * 100_000, "malformed JSON: .*recursion"),
        (b'{"a":' * 100_000, "malformed JSON: .*recursion"),
        (b"9" * 5000, "malformed JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'"a"', "not an object"),
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        (b'{"x": {"dtype": "F32", "dtype": "F32"}}', "'dtype' is there twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' is there twice"),
    ],
)
def test_headers_that_are_no_json_object(tmp_path, header, match):
    refused(put(tmp_path / "a.safetensors", header), match)


@pytest.mark.parametrize("metadata", [None, 1, [], "a", {"a": 1}, {"a": None}, {"a": {}}])
def test_metadata_that_are_no_strings(tmp_path, metadata):
    refused(put(tmp_path / "a.safetensors", {"__metadata__": metadata}), "__metadata__ is .* not an object of strings")


@pytest.mark.parametrize("entry", [None, 1, [], "a", {}, {"dtype": "F32"}, ENTRY | {"more": 1}])
def test_entries_of_other_fields(tmp_path, entry):
    refused(put(tmp_path / "a.safetensors", {"x": entry}, bytes(8)), "'x': .* is not an object of dtype, shape and")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "F33"}, "unknown dtype 'F33'"),
        ({"dtype": "F4"}, "unknown dtype 'F4'"),
        ({"dtype": "f32"}, "unknown dtype 'f32'"),
        ({"dtype": None}, "unknown dtype None"),
        ({"dtype": ["F32"]}, r"unknown dtype \['F32'\]"),
        ({"dtype": "F" * 10_000_000}, "unknown dtype 'FFF"),
        ({"shape": 2}, "shape 2 is not a list of non-negative integers"),
        ({"shape": None}, "shape None is not"),
        ({"shape": {"0": 2}}, "shape {'0': 2} is not"),
        ({"shape": [-2]}, "shape .-2. is not"),
        ({"shape": [-1, -2]}, "shape .-1, -2. is not"),
        ({"shape": [2.0]}, "shape .2.0. is not"),
        ({"shape": [2, True]}, "shape .2, True. is not"),
        ({"shape": ["2"]}, "shape .'2'. is not"),
        ({"shape": [[2]]}, "is not a list of"),
        ({"shape": [float("inf")]}, "is not a list of"),
        ({"shape": [float("nan")]}, "is not a list of"),
        ({"shape": [2**62, 2**62]}, "too large"),
        ({"shape": [2**61]}, "too large"),
        ({"shape": [0, 2**62]}, "too large"),
        ({"shape": [2**64 + 2]}, "too large"),
        ({"shape": [10**4000] * 60}, "too large"),
        ({"shape": [1] * 65 + [2]}, "too large"),
        ({"shape": [3]}, "are not 12 bytes"),
        ({"shape": []}, "are not 4 bytes"),
        ({"shape": [0]}, "are not 0 bytes"),
        ({"dtype": "F64"}, "are not 16 bytes"),
        ({"data_offsets": None}, "not two non-negative integers"),
        ({"data_offsets": [0]}, "not two non-negative integers"),
        ({"data_offsets": [0, 8, 8]}, "not two non-negative integers"),
        ({"data_offsets": [-8, 0]}, "not two non-negative integers"),
        ({"data_offsets": [False, 8]}, "not two non-negative integers"),
        ({"data_offsets": [0, 8.0]}, "not two non-negative integers"),
        ({"data_offsets": ["0", "8"]}, "not two non-negative integers"),
        ({"data_offsets": [8, 0]}, "are not 8 bytes"),
        ({"data_offsets": [0, 7]}, "are not 8 bytes"),
        ({"data_offsets": [1, 9]}, "beyond the 8 bytes of data: truncated"),
        ({"data_offsets": [2**64, 2**64 + 8]}, "beyond the 8 bytes"),
    ],
)
def test_fields_that_cannot_be(tmp_path, change, match):
    refused(put(tmp_path / "a.safetensors", {"x": ENTRY | change}, bytes(8)), f"'x': .*{match}")


@pytest.mark.parametrize(
    ("spans", "size", "match"),
    [
        ([(0, 8), (4, 12)], 12, "overlaps the tensor before it"),
        ([(0, 8), (0, 8)], 8, "overlaps"),
        ([(0, 8), (4, 4)], 8, "overlaps"),
        ([(1, 9)], 9, "leaves a hole at byte 0"),
        ([(0, 8), (12, 20)], 20, "leaves a hole at byte 8"),
        ([(0, 8), (9, 9)], 9, "leaves a hole at byte 8"),
        ([(0, 8)], 9, "1 bytes too many after the last tensor"),
        ([], 1, "1 bytes too many"),
    ],
)
def test_data_must_be_used_exactly_once(tmp_path, spans, size, match):
    header = {str(i): {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(spans)}
    refused(put(tmp_path / "a.safetensors", header, bytes(size)), match)


def test_a_hostile_name_stays_on_one_short_line(tmp_path):
    name = "a\n\x1b[31m" + "b" * 100_000
    refused(put(tmp_path / "a.safetensors", {name: {}}), r"tensor 'a\\n\\x1b\[31mb")


# What is not a file of the folder.


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    folder_refused(tmp_path, "model.safetensors is not a regular file")
    os.rename(tmp_path / "model.safetensors", tmp_path / INDEX)
    folder_refused(tmp_path, "index.json is not a regular file")
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    os.mkfifo(tmp_path / "a.safetensors")
    folder_refused(tmp_path, "a.safetensors is not a regular file")
    (tmp_path / "model.safetensors").mkdir()
    folder_refused(tmp_path, "model.safetensors is not a regular file")
    with pytest.raises(UserError, match="/dev/zero is not a regular file"):
        File("/dev/zero")


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "b.safetensors"])
def test_symlinks_out_of_the_folder_are_refused(tmp_path, name):
    model = tmp_path / "repo" / "snapshots" / "abc"
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "repo/blobs/deeper").mkdir(parents=True)
    for folder in model, elsewhere:
        folder.mkdir(parents=True)
        put(folder / "b.safetensors", {"x": ENTRY}, bytes(8))
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors"}}))
    Folder(model).close()
    put(elsewhere / "model.safetensors", {"x": ENTRY}, bytes(8))
    link = model / name
    source = elsewhere / name
    nested = tmp_path / "repo/blobs/deeper/f"
    nested.write_bytes(source.read_bytes())
    out = tmp_path / "repo/blobs/out"
    out.symlink_to(source)
    for target in source, nested, out, os.path.relpath(source, model), "loop", "/dev/zero", tmp_path / "none":
        link.unlink(missing_ok=True)
        link.symlink_to(link if target == "loop" else target)
        folder_refused(model, f"{name} is a symlink to|{name}: cannot be read: Too many levels")
    link.unlink()
    link.symlink_to("../../blobs/none")
    folder_refused(model, "No such file")


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path):
    blobs, model = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    model.mkdir(parents=True)
    arrays = make_arrays()
    for i, path in enumerate(save_sharded(tmp_path / "m", arrays, 200)):
        os.rename(path, blobs / str(i))
        (model / path.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "mine").symlink_to(model)  # the user's own link to the folder
    for path in model, tmp_path / "mine":
        with Folder(path) as f:
            for name, array in arrays.items():
                assert_same(f.read(name), array)
    os.remove(blobs / "0")
    os.mkfifo(blobs / "0")
    folder_refused(model, "is not a regular file")


# The index.


@pytest.mark.parametrize(
    "name",
    [
        *["../model/a.safetensors", "..", ".", "", "/etc/passwd", "/a.safetensors", "b/a.safetensors", "a.bin"],
        *["b\\a.safetensors", "a\0.safetensors", "a\n.safetensors", None, 1, ["a.safetensors"], {}],
    ],
)
def test_shards_must_be_plain_names(tmp_path, name):
    model = tmp_path / "model"
    (model / "b").mkdir(parents=True)
    for path in model / "a.safetensors", model / "b" / "a.safetensors":
        put(path, {"x": ENTRY}, bytes(8))
    (model / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    folder_refused(model, "index.json: tensor 'x' is in .*, not the plain name")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("", "malformed JSON"),
        ("[]", "not an object"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": []}', r"weight_map is \[\]"),
        ('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}', "'x' is there twice"),
        ('{"weight_map": {"x": "\\ud800.safetensors"}}', "surrogates"),
        ("[" * 100_000, "recursion"),
        (b"\xff", "utf-8"),
        ('{"weight_map": {"x": "none.safetensors"}}', "none.safetensors: cannot be read: No such file"),
        (json.dumps({"weight_map": {"x": "x" * 300 + ".safetensors"}}), "File name too long"),
        ('{"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}', "a.safetensors: .* differ on 'y', 1 in all"),
        ('{"weight_map": {"y": "a.safetensors"}}', "a.safetensors: .* differ on 'x', 2 in all"),
        ('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}', "b.safetensors: .* differ on 'x'"),
    ],
)
def test_bad_indices(tmp_path, index, match):
    for name in "a.safetensors", "b.safetensors":
        put(tmp_path / name, {"x": ENTRY}, bytes(8))
    (tmp_path / INDEX).write_bytes(index if isinstance(index, bytes) else index.encode())
    folder_refused(tmp_path, match)


def test_an_index_over_the_limit_is_not_read(tmp_path):
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, MAX_JSON + 1)
    tracemalloc.start()
    try:
        folder_refused(tmp_path, "index of 100000001 bytes, over 100000000, is too large")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_shard_that_changes_later_is_refused(tmp_path):
    arrays = make_arrays()
    save_sharded(tmp_path, arrays, 10**9)
    with Folder(tmp_path) as f:
        save(tmp_path / "model.safetensors", arrays | {"a": np.zeros(7, np.uint8)}, force=True)
        with pytest.raises(UserError, match="model.safetensors was changed while it was read"):
            f.read("a")


# Memory, and anything else.


def test_reading_does_not_load_the_file(tmp_path):
    size = 200_000_000
    header = {
        "big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "x": {"dtype": "BF16", "shape": [2], "data_offsets": [size, size + 4]},
    }
    path = put(tmp_path / "model.safetensors", header)
    os.truncate(path, path.stat().st_size + size + 4)  # takes no space
    tracemalloc.start()
    try:
        with File(path) as f, Folder(tmp_path) as folder:
            for it in f, folder:
                assert it.read("x").astype(np.float32).tolist() == [0, 0]
                assert it.read("big")[::1000000].sum() == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


NASTY = [
    *[
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        7,
        8,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**100,
        1.0,
        1e400,
        "",
        "F32",
    ],
    *["F16", "U8", "BOOL", "X9", "..", "/etc/passwd", "a" * 5000, [], [0], [0, 0], [0, 8], [8, 0], [-1, 1], [[[]]], {}],
    *[{"a": 1}, [2**62, 4], [0, 2**63], [1] * 100, "model-00001-of-00002.safetensors", "b/../a.safetensors"],
]


def edit_json(rng, value, nasty=NASTY, names=("", "x", "__metadata__", "dtype"), leaf=0.15, drop=0.1):
    """Changes one thing at a random depth of a JSON value; returns the new value."""
    if not isinstance(value, dict | list) or not value or rng.random() < leaf:
        return rng.choice(nasty)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return value[:i] + [edit_json(rng, value[i], nasty, names, leaf, drop)] + value[i + 1 :]
    key = rng.choice(list(value))
    what = rng.random()
    if what < drop:
        return {k: v for k, v in value.items() if k != key}
    if what < 0.2:
        return {(rng.choice(names) if k == key else k): v for k, v in value.items()}
    return value | {key: edit_json(rng, value[key], nasty, names, leaf, drop)}


def mutate(rng, data, is_index):
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(rng.choice([16, 600, len(data)]))
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        return data
    if kind == 1:
        return data[: rng.randrange(rng.choice([16, 600, len(data)]))]
    if kind == 2:
        at = rng.randrange(rng.choice([16, 600, len(data)]))
        new = rng.choice([rng.randbytes(rng.randrange(1, 9)), data[:at], b"[" * 3000, b'"', b"\0" * 8, b"1", b"-"])
        return data[:at] + new + data[at:]
    if is_index:
        return json.dumps(edit_json(rng, json.loads(data))).encode()
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(edit_json(rng, json.loads(data[8 : 8 + length]))).encode()
    if kind == 4:
        length = rng.choice([len(text)] * 5 + [0, len(text) - 1, len(text) + 1, len(data), 2**32, 2**64 - 1])
    else:
        length = len(text)
    return struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def read_all(path):
    """None, or why the file or folder was refused; it is read completely, or nothing of it."""
    try:
        f = Folder(path) if path.is_dir() else File(path)
    except UserError as e:
        return str(e)
    with f:
        for name, (dtype, shape) in f.tensors.items():
            array = f.read(name)
            assert array.dtype == DTYPES[dtype] and array.shape == shape
            array.tobytes()
    return None


@pytest.mark.parametrize("sharded", [False, True])
def test_mutated_files_are_read_or_refused(tmp_path, sharded):
    paths = save_sharded(tmp_path, make_arrays(shape=(10, 12)), 5000 if sharded else 10**9)
    assert len(paths) == (3 if sharded else 1)
    good = {path: path.read_bytes() for path in paths}
    rng = random.Random(sharded)
    refusals = 0
    tracemalloc.start()
    try:
        for _ in range(500):
            path = paths[-1] if sharded and rng.random() < 0.4 else rng.choice(paths)
            path.write_bytes(mutate(rng, good[path], path.name == INDEX))
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
            why = read_all(tmp_path if sharded else path)
            refusals += why is not None
            assert why is None or (str(tmp_path) in why and "\n" not in why)
            assert time.monotonic() - began < 2
            assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
            path.write_bytes(good[path])
    finally:
        tracemalloc.stop()
    assert 250 < refusals < 480
