"""Folders that the import command refuses, what hostile ones can do, and what is there already."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hf_folders import INDEX, ONE, configure, load, refused, store

from qatmoe import import_hf
from qatmoe.checkpoint import Checkpoints
from qatmoe.convert.weights import read_origin

DOTS = {"model_type": "dots1", "rope_parameters": ..., "partial_rotary_factor": ...}


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("tiny", {"model_type": "deepseek_v3"}, "its attention is MLA"),
        ("tiny", {"model_type": "mixtral"}, "model_type='mixtral' cannot be imported"),
        ("tiny", {"model_type": ...}, "model_type=None"),
        ("tiny", {"model_type": ["qwen3_moe"]}, "model_type=['qwen3_moe']"),
        ("tiny", {"model_type": {"a": 1}}, "model_type={'a': 1}"),
        ("glm", {"kv_lora_rank": 512}, "kv_lora_rank=512"),
        ("tiny", {"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window=True"),
        ("tiny", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("tiny", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("tiny", {"rope_parameters": ["default"]}, "rope_parameters=['default'] is not an object"),
        ("tiny", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("glm", {"n_group": 2}, "n_group=2"),
        ("tiny", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("tiny", {"layer_types": 5}, "layer_types=5"),
        ("tiny", {"layer_types": {"full_attention": 1}}, "layer_types={'full_attention': 1}"),
        ("tiny", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "per kind of layer"),
        ("glm", DOTS | {"sliding_window": 4, "max_window_layers": 1}, "max_window_layers=1"),
        ("glm", {"model_type": "dots1"}, "partial_rotary_factor=0.5 is set"),
        ("tiny", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is set"),
        ("glm", {"topk_group": 4}, "topk_group=4"),
        ("tiny", {"attention_bias": True}, "attention_bias=True"),
        ("tiny", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("tiny", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("tiny", {"mlp_only_layers": [1]}, "mlp_only_layers=[1]"),
        ("tiny", {"mlp_only_layers": [0]}, "n_dense_layers=1 leaves no MoE layer"),
        ("tiny", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("tiny", {"vocab_size": 289}, "the tokenizer has 290 tokens"),
        ("tiny", {"hidden_size": 16}, "shape (300, 8), and config.json says (300, 16)"),
        ("tiny", {"hidden_size": "8"}, "hidden_size='8'"),
        ("tiny", {"hidden_size": 8.0}, "hidden_size=8.0"),
        ("tiny", {"hidden_size": True}, "hidden_size=True"),
        ("tiny", {"hidden_size": -8}, "hidden_size=-8"),
        ("tiny", {"hidden_size": ...}, "has no hidden_size"),
        ("tiny", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("tiny", {"num_attention_heads": 3, "num_key_value_heads": 2}, "n_kv_heads=2 must divide n_heads=3"),
        ("tiny", {"num_experts_per_tok": 3}, "top_k=3 is more than n_experts=2"),
        ("tiny", {"head_dim": 5}, "it must be an even number"),
        ("tiny", {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ("tiny", {"rope_theta": -1, "rope_parameters": ...}, "rope_theta=-1"),
        ("tiny", {"rope_theta": 10**4000, "rope_parameters": ...}, "rope_theta=1000"),
        ("tiny", {"hidden_size": 10**4000}, "hidden_size=1000"),
        ("tiny", {"num_hidden_layers": 10**6}, "1000000 layers"),
        ("tiny", {"num_experts": 10**6, "num_local_experts": ...}, "1000000 experts"),
        ("tiny", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ("glm", {"num_nextn_predict_layers": 10**6, "num_mtp_layers": ...}, "layers"),
        ("glm", {"n_shared_experts": 10**6}, "shape"),
        ("glm", {"first_k_dense_replace": 3}, "n_dense_layers=3 leaves no MoE layer"),
    ],
    ids=lambda v: json.dumps({k: None if w is ... else w for k, w in v.items()}) if isinstance(v, dict) else None,
)
def test_configs_that_are_refused(which, changes, message, templates, tmp_path, capsys):
    folder = shutil.copytree(templates / which, tmp_path / "model")
    configure(folder, **changes)
    tracemalloc.start()
    began = time.monotonic()
    try:
        line = refused(capsys, folder, tmp_path / "run")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 3
    assert message in line


def test_more_dense_layers_than_layers(templates, tmp_path, child_env):
    """In a process of its own: names for a million layers take gigabytes and minutes."""
    folder = shutil.copytree(templates / "glm", tmp_path / "model")
    configure(folder, first_k_dense_replace=10**6)
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 16000000; exec {sys.executable} -m qatmoe.import_hf {folder} --out {tmp_path}/run"],
        env=child_env,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2, done.stderr[-300:]
    assert len(done.stderr.splitlines()) == 1 and "dense" in done.stderr


def test_a_config_takes_as_much_memory_as_it_is_long(tiny, tmp_path, capsys):
    configure(tiny, model_type="mixtral")
    tracemalloc.start()
    try:
        refused(capsys, tiny, tmp_path / "run")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", ONE])
def test_missing_files_are_named(name, tiny, tmp_path, capsys):
    (tiny / name).unlink()
    assert name in refused(capsys, tiny, tmp_path / "run")


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, tmp_path / "file", tmp_path / "run")


def drop(arrays, name):
    return {k: v for k, v in arrays.items() if k != name}


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
NORM = "model.norm.weight"
BROKEN = {
    "another shape": (lambda a: a | {EXPERT: a[EXPERT].T.copy()}, EXPERT),
    "one row less": (lambda a: a | {"lm_head.weight": a["lm_head.weight"][:-1]}, "lm_head.weight"),
    "flat": (lambda a: a | {EXPERT: a[EXPERT].reshape(-1)}, EXPERT),
    "a scalar": (lambda a: a | {NORM: np.float32(1)[None].reshape(())}, NORM),
    "no such expert": (lambda a: drop(a, EXPERT), EXPERT),
    "no norm": (lambda a: drop(a, NORM), NORM),
    "an unknown tensor": (lambda a: a | {"model.layers.0.mlp.weight": a[NORM]}, "model.layers.0.mlp.weight"),
    "one expert more": (
        lambda a: a | {EXPERT.replace(".1.", ".2."): a[EXPERT]},
        "model.layers.0.mlp.experts.2.up_proj.weight",
    ),
    "one layer more": (lambda a: a | {"model.layers.1.input_layernorm.weight": a[NORM]}, "model.layers.1"),
    "float8": (lambda a: a | {EXPERT: a[EXPERT].astype(ml_dtypes.float8_e4m3fn)}, "F8_E4M3"),
    "int8": (lambda a: a | {EXPERT: a[EXPERT].astype(np.int8)}, "I8"),
    "float64": (lambda a: a | {EXPERT: a[EXPERT].astype(np.float64)}, "F64"),
    "NaN": (lambda a: a | {NORM: a[NORM] * np.float32(np.nan)}, "norm"),
    "one inf": (lambda a: a | {EXPERT: np.where(np.arange(8) == 3, np.float32(-np.inf), a[EXPERT])}, "experts/gate_up"),
    "two types": (lambda a: a | {EXPERT: a[EXPERT].astype(np.float16)}, "mixes F16, F32"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_tensors_that_are_not_what_the_config_says(what, tiny, tmp_path, capsys):
    change, message = BROKEN[what]
    store(tiny, change(load(tiny)))
    assert message in refused(capsys, tiny, tmp_path / "run")


def test_a_missing_shard_is_named(templates, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(templates / "tiny", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    shutil.copy(templates / "tiny" / "tokenizer.json", tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(capsys, tmp_path / "model", tmp_path / "run")


def test_a_pipe_does_not_hang(templates, tmp_path, child_env):
    children = {}
    for name in ("config.json", "tokenizer.json", ONE):
        folder = shutil.copytree(templates / "tiny", tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        command = [sys.executable, "-m", "qatmoe.import_hf", folder, "--out", tmp_path / "run"]
        children[name] = subprocess.Popen(command, env=child_env, stderr=subprocess.PIPE, text=True)
    for name, child in children.items():
        _, err = child.communicate(timeout=60)
        assert child.returncode == 2, err
        assert err.startswith("error: ") and name in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [b"[]", b"null", b"3", b'"qwen3_moe"', b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"\0" * 100,
     b'{"model_type": "qwen3_moe", "hidden_size": ' + b"9" * 5000 + b"}", b"{} {}"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_config_files_that_are_no_config(text, tiny, tmp_path, capsys):
    (tiny / "config.json").write_bytes(text)
    assert "config.json" in refused(capsys, tiny, tmp_path / "run")


@pytest.mark.parametrize("text", [b"[]", b"{}", b"", b"[" * 100_000, b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_tokenizer_files_that_are_none(text, tiny, tmp_path, capsys):
    (tiny / "tokenizer.json").write_bytes(text)
    assert "tokenizer.json" in refused(capsys, tiny, tmp_path / "run")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["QATMOE_TEST_MARKER"],)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", ONE, INDEX, "config.json", "tokenizer.json"])
def test_pickles_are_never_read(name, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QATMOE_TEST_MARKER", str(tmp_path / "marker"))
    (tiny / ONE).unlink()
    (tiny / name).write_bytes(pickle.dumps(Bomb()))
    assert name in refused(capsys, tiny, tmp_path / "run")
    assert not (tmp_path / "marker").exists()
    pickle.loads((tiny / name).read_bytes())  # it would have worked
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "..", "", "a\\b.safetensors", "linked.safetensors"]
)
def test_an_index_cannot_reach_outside_the_folder(shard, tiny, tmp_path, capsys):
    secret = tmp_path / "secret.safetensors"
    (tiny / ONE).rename(secret)
    (tiny / "linked.safetensors").symlink_to(secret)
    names = list(safetensors.numpy.load_file(secret))
    (tiny / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    line = refused(capsys, tiny, tmp_path / "run")
    assert "symlink" in line if shard.startswith("linked") else "plain name" in line


BESIDE = ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", BESIDE)
def test_no_file_is_read_from_outside_the_folder(name, tiny, tmp_path, capsys):
    """What is read comes into the run, and into what is exported from it."""
    secret = tmp_path / "secret"
    (tiny / name).touch()
    (tiny / name).rename(secret)
    if not secret.stat().st_size:
        secret.write_text("{}")
    (tiny / name).symlink_to(secret)
    assert f"{name} is a symlink to" in refused(capsys, tiny, tmp_path / "run")
    secret.unlink()
    assert f"{name} is a symlink to" in refused(capsys, tiny, tmp_path / "run")  # nor whether it is there


def test_the_links_of_the_hugging_face_cache_are_followed(tiny, tmp_path):
    (tiny / "tokenizer_config.json").write_text("{}")
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tiny / "chat_template.jinja").write_bytes(b"a\r\nb")
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(tiny.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert {*BESIDE, ONE} <= {p.name for p in snapshot.iterdir()}
    assert import_hf.main([str(snapshot), f"--out={tmp_path / 'run'}"]) == 0
    origin = read_origin(tmp_path / "run")
    assert (origin.chat_template, origin.end_ids) == ("a\nb", (7,))


HALF = "half of a surrogate pair"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": [True, 3]}, "eos_token_id=[True, 3]"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id='x'"),
        ("generation_config.json", {"eos_token_id": [3, 4.0]}, "eos_token_id=[3, 4.0]"),
        ("tokenizer_config.json", {"chat_template": "a\ud800"}, f"chat_template holds {HALF}"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "\udc00"}]}, HALF),
        ("tokenizer_config.json", {"bos_token": {"content": "\ud800"}}, f"bos_token holds {HALF}"),
    ],
)
def test_settings_that_no_run_can_keep(name, content, message, tiny, tmp_path, capsys):
    (tiny / name).write_text(json.dumps(content))
    line = refused(capsys, tiny, tmp_path / "run")
    assert name in line and message in line


def test_a_context_that_is_no_number_is_unknown(tiny, tmp_path):
    configure(tiny, max_position_embeddings=True)
    assert import_hf.main([str(tiny), f"--out={tmp_path / 'run'}"]) == 0
    assert read_origin(tmp_path / "run").context == 0


def test_what_is_there_is_replaced_only_when_told(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("")
    assert "neither a model nor a run" in refused(capsys, tiny, run, "--force")
    (run / "config.json").write_text("{}")
    assert f"{run} exists" in refused(capsys, tiny, run)
    assert {p.name for p in run.iterdir()} == {"config.json", "precious"}
    (run / "metrics.jsonl").write_text("")
    assert f"{run} is a run that was trained" in refused(capsys, tiny, run, "--force")
    (run / "metrics.jsonl").unlink()
    (tiny / "config.json").rename(tiny / "kept.json")
    refused(capsys, tiny, run, "--force")
    assert {p.name for p in run.iterdir()} == {"config.json", "precious"}
    (tiny / "kept.json").rename(tiny / "config.json")
    assert import_hf.main([str(tiny), f"--out={run}", "--force"]) == 0
    assert not (run / "precious").exists() and (run / "qat.py").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "run"}


def test_the_model_is_not_replaced_by_its_own_import(tiny, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    for out in (tiny, tmp_path / "model" / ".." / "model", tiny.parent):
        capsys.readouterr()
        assert import_hf.main([str(tiny), f"--out={out}", "--force"]) == 2
        assert "error: " in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in tiny.iterdir()} == before


@pytest.mark.parametrize("name", ['it"s', "tab\there", "new\nline", "{braces}", "caf\u00e9", "'''", '"""'])
def test_a_run_of_any_name(name, tiny, tmp_path):
    """The name is written into qat.py and must still be a program that says the same."""
    run = tmp_path / name
    assert import_hf.main([str(tiny), f"--out={run}"]) == 0
    scope = {"__file__": str(run / "qat.py"), "__name__": "config"}
    exec(compile((run / "qat.py").read_text(encoding="utf-8"), "qat.py", "exec"), scope)
    config = scope["get_config"]()
    assert config.init_from == str(run.resolve())
    assert config.name == f"{name}_qat"


def test_a_folder_whose_checkpoint_would_lack_its_weights(tiny, tmp_path, capsys):
    said = refused(capsys, tiny, tmp_path / "olmoe[7b]")
    assert "--out" in said and "with '[' in its name" in said


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_weights", full)
        assert "No space left on device" in refused(capsys, tiny, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_commit", full)
        assert "No space left on device" in refused(capsys, tiny, tmp_path / "run")
