"""Random damage to a model's files: they are read or refused, at once and in little memory."""

import json
import random
import shutil
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
import transformers
from test_safetensors import make_arrays, save_sharded

from qatmoe.checkpoint import Checkpoints
from qatmoe.convert.hf_import import import_folder
from qatmoe.convert.safetensors import DTYPES, INDEX, File, Folder
from qatmoe.errors import UserError

NASTY = [
    *[None, True, False, -1, 0, 1, 2, 3, 7, 8, 2**24, 2**24 + 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64],
    *[10**100, 1.0, -0.5, 1e400, float("nan"), "", "F32", "F16", "BF16", "U8", "I64", "BOOL", "X9", "..", "a" * 5000],
    *["/etc/passwd", "b/../a.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    *["default", "yarn", "olmoe", "glm4_moe", "dots1", "deepseek_v3"],
    *[[], [0], [0, 0], [0, 8], [8, 0], [-1, 1], [[[]]], [2**62, 4], [0, 2**63], [1] * 100, {}, {"a": 1}],
]
NAMES = ["", "x", "dtype", "__metadata__", "lm_head.weight"]


def edit_json(rng, value):
    """Changes one thing at a random depth of a JSON value; returns the new value."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(NASTY)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return value[:i] + [edit_json(rng, value[i])] + value[i + 1 :]
    key = rng.choice(list(value))
    what = rng.random()
    if what < 0.1:
        return {k: v for k, v in value.items() if k != key}
    if what < 0.2:
        return {(rng.choice(NAMES) if k == key else k): v for k, v in value.items()}
    return value | {key: edit_json(rng, value[key])}


def edit_bytes(rng, data):
    """Cuts, inserts or flips bits, most often in the header."""
    at = rng.randrange(rng.choice([16, 600, len(data)]))
    kind = rng.randrange(3)
    if kind == 0:
        return data[:at]
    if kind == 1:
        new = rng.choice([rng.randbytes(rng.randrange(1, 9)), b"[" * 3000, b'"', b"\0" * 8, b"1", b"-", data[:at]])
        return data[:at] + new + data[at:]
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(rng.choice([16, 600, len(data)])) % len(data)
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data


def mutate(rng, name, data):
    """Damages the bytes of a file, its JSON, or the JSON of its safetensors header."""
    if rng.random() < 0.5:
        return edit_bytes(rng, data)
    if name.endswith(".json"):
        return json.dumps(edit_json(rng, json.loads(data))).encode()
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(edit_json(rng, json.loads(data[8 : 8 + length]))).encode()
    wrong = rng.choice([0, len(text) - 1, len(text) + 1, len(data), 2**32, 2**64 - 1])
    said = wrong if rng.random() < 0.2 else len(text)
    return struct.pack("<Q", said) + text + data[8 + length :]


@pytest.fixture
def counted():
    """Memory is, from here on."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def why_refused(load, source, room):
    """What the UserError of load(source) says, or "". Nothing else, within two seconds and `room` bytes."""
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
    why = ""
    try:
        load(source)
    except UserError as e:
        why = str(e)
        assert why and "\n" not in why and len(why) < 20_000
    assert time.monotonic() - began < 2
    assert tracemalloc.get_traced_memory()[1] - before < room
    return why


def read_all(path):
    """Reads a file or a folder completely; it is refused when it is opened or not at all."""
    with Folder(path) if path.is_dir() else File(path) as f:
        for name, (dtype, shape) in f.tensors.items():
            try:
                array = f.read(name)
            except UserError as e:
                raise AssertionError(f"{name} of an open file is refused") from e
            assert array.dtype == DTYPES[dtype] and array.shape == shape
            array.tobytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_files_are_read_or_refused(sharded, tmp_path, counted):
    paths = save_sharded(tmp_path, make_arrays(shape=(10, 12)), 5000 if sharded else 10**9)
    assert len(paths) == (3 if sharded else 1)
    assert sharded == (paths[-1].name == INDEX)
    good = {path: path.read_bytes() for path in paths}
    rng = random.Random(sharded)
    refusals = 0
    for _ in range(500):
        path = paths[-1] if sharded and rng.random() < 0.4 else rng.choice(paths)
        path.write_bytes(mutate(rng, path.name, good[path]))
        why = why_refused(read_all, tmp_path if sharded else path, room=1_000_000)
        assert not why or str(tmp_path) in why
        refusals += why != ""
        path.write_bytes(good[path])
    assert 250 < refusals < 480


@pytest.mark.parametrize("sharded", [False, True])
def test_folders_are_imported_or_refused(sharded, templates, tmp_path, monkeypatch, counted):
    """The memory is beside the buffer for config.json, and nothing is left of what was refused.

    Flipped bits of weights that stay finite are another model, not a broken one. Writing checkpoints is orbax's work,
    and only tried with the undamaged model: here the parts are read, as it would, and let go.
    """
    folder = tmp_path / "model"
    if sharded:
        model = transformers.AutoModelForCausalLM.from_pretrained(templates / "tiny", dtype=torch.float32)
        model.save_pretrained(folder, max_shard_size="12KB")
        shutil.copy(templates / "tiny" / "tokenizer.json", folder)
    else:
        shutil.copytree(templates / "tiny", folder)
    good = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "generation_config.json"}
    assert len(good) == (5 if sharded else 3)
    import_folder(folder, tmp_path / "whole")

    def consume(self, step, parts, meta):
        json.dumps(meta)
        for part in parts:
            assert all(np.isfinite(a).all() for a in part.values())

    monkeypatch.setattr(Checkpoints, "save_weights", consume)
    rng = random.Random(sharded)
    refusals = 0
    for _ in range(500):
        for name in rng.sample(sorted(good), rng.choice([1, 1, 1, 2])):
            (folder / name).write_bytes(mutate(rng, name, good[name]))
        if why_refused(lambda source: import_folder(source, tmp_path / "run"), folder, room=8_000_000):
            refusals += 1
            assert not (tmp_path / "run").exists()
        else:
            shutil.rmtree(tmp_path / "run")
        assert {p.name for p in tmp_path.iterdir()} == {"model", "whole"}
        for name, data in good.items():
            (folder / name).write_bytes(data)
    assert 250 < refusals < 480
