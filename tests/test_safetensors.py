import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qatmoe.convert.safetensors import DTYPES, INDEX, File, Folder, Tensor, write, write_sharded
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
