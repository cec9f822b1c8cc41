"""Files and folders that are refused, and what hostile ones can do."""

import json
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from test_safetensors import ENTRY, assert_same, folder_refused, make_arrays, put, refused, save, save_sharded

from qatmoe.convert.safetensors import INDEX, MAX_JSON, File, Folder
from qatmoe.errors import UserError


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
