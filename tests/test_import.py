"""The import command: what becomes of a Hugging Face folder."""

import dataclasses
import functools
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hf_folders import TINY, config_of, configure, load, refused, store
from test_huggingface import QWEN, make

from launch import points
from launch.points import Sweep
from qatmoe import export, import_hf, metrics, train
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import resolve
from qatmoe.convert import gguf, hf_config, huggingface_model, names
from qatmoe.convert.hf_import import import_folder
from qatmoe.convert.safetensors import Tensor, write_sharded
from qatmoe.convert.weights import Branch, read_origin
from qatmoe.data import corpus, tokenizer
from qatmoe.model import transformer

TEXT = next(corpus.documents("default", field="data.valid")).text


def saved(run):
    """{path: array} of a run's checkpoint in the types that it has there."""
    with Checkpoints(run, "trunk") as checkpoints:
        meta = checkpoints.meta(0)
        assert meta["trained_tokens"] == 0
        wanted = {n: jax.ShapeDtypeStruct(tuple(s), jnp.dtype(d)) for n, (d, s) in meta["tensors"].items()}
        return {n: np.asarray(a) for n, a in checkpoints.arrays(meta, wanted).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), name


# ---- what is imported ------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_what_comes_next(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert import_hf.main([str(tiny), "--out", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{run}: 1 layers, 2 experts, 0 MTP modules",
        f"next: python -m qatmoe.train --config {run}/qat.py --workdir {run}_qat --config.data.source=TEXT",
    ]
    assert err == ""
    assert {p.name for p in run.iterdir()} == {"checkpoints", "config.json", "origin.json", "qat.py", "tokenizer.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"model", "run"}
    assert export.main([f"--run={run}", "--format=gguf", f"--out={tmp_path / 'out.gguf'}"]) == 0


def test_what_comes_next_is_a_command_also_where_the_folder_has_a_space(tiny, tmp_path, capsys):
    run = tmp_path / "my run"
    assert import_hf.main([str(tiny), "--out", f"{run}/"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert command[3:7] == ["--config", f"{run}/qat.py", "--workdir", f"{run}_qat"]


def test_runs_of_it_have_the_same_settings_where_the_folder_of_runs_lies_elsewhere(tiny, tmp_path, monkeypatch):
    """As a cloud has it: brought home, its runs are those that the sweep asks for."""
    (tmp_path / "there" / "runs").mkdir(parents=True)
    assert import_hf.main([str(tiny), "--out", str(tmp_path / "there" / "runs" / "imported")]) == 0
    shutil.copytree(tmp_path / "there", tmp_path / "home")
    no_grid = {"quant.experts": "none", "quant.shared": "none", "train.phases.qat.quantize": False}
    found = []
    for place in ("there", "home"):
        monkeypatch.chdir(tmp_path / place)
        asked = Sweep("s", "runs/imported/qat.py", [{"data.source": "default"} | no_grid])
        (run,) = points.runs_of(asked, Path("runs/s"))
        found.append((run.name, run.config.init_from, run.config.data.tokenizer))
    assert found[0] == found[1]
    assert found[0][1:] == ("runs/imported", "runs/imported/tokenizer.json")


def test_what_the_folder_says_of_the_models_use_comes_back(tiny, tmp_path):
    """Its context, what ends a turn, its chat template: through a run that starts from it, to both kinds of file."""
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    (tiny / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    said = {"eos_token": "B", "bos_token": {"content": "A"}, "pad_token": "no such token", "unk_token": None}
    (tiny / "tokenizer_config.json").write_text(json.dumps(said))
    import_folder(tiny, tmp_path / "run")
    cfg = resolve(json.loads((tmp_path / "run" / "config.json").read_text()))
    train.keep_origin(dataclasses.replace(cfg, init_from=str(tmp_path / "run")), tmp_path / "run")  # its own: kept
    (tmp_path / "next").mkdir()
    train.keep_origin(dataclasses.replace(cfg, init_from=str(tmp_path / "run")), tmp_path / "next")
    train.keep_origin(dataclasses.replace(cfg, init_from=str(tmp_path / "gone")), tmp_path)  # what began there goes on
    assert (tmp_path / "next" / "origin.json").read_text() == (tmp_path / "run" / "origin.json").read_text()
    for form in ("gguf", "safetensors"):
        assert export.main([f"--run={tmp_path / 'run'}", f"--format={form}", f"--out={tmp_path / form}"]) == 0
    with gguf.File(tmp_path / "gguf") as file:
        assert file.fields["qwen3moe.context_length"].value == 4096
        assert file.fields["tokenizer.ggml.eos_token_id"].value == 7
        assert file.fields["tokenizer.ggml.eot_token_id"].value == 0
        assert file.fields["tokenizer.chat_template"].value == "{{ messages[0].content }}!"
        begins = tokenizer.load(str(tiny / "tokenizer.json")).id_of("A")
        assert file.fields["tokenizer.ggml.bos_token_id"].value == begins
        assert not file.fields["tokenizer.ggml.add_bos_token"].value  # the tokenizer adds none
    written = json.loads((tmp_path / "safetensors" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["eos_token_id"]) == (4096, [7, 0])
    assert (written["bos_token_id"], written["pad_token_id"]) == (begins, None)
    assert (tmp_path / "safetensors" / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"
    written = json.loads((tmp_path / "safetensors" / "tokenizer_config.json").read_text())
    assert (written["eos_token"], written["bos_token"]) == ("B", "A")
    assert not {"pad_token", "unk_token"} & written.keys()


def test_named_templates_and_an_end_that_only_the_tokenizer_names(tiny, tmp_path):
    """As older folders have them: of several templates the default one, and what ends a text as a token's text."""
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token_id"}))
    (tiny / "generation_config.json").unlink(missing_ok=True)
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tiny / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates, "eos_token": "B"}))
    import_folder(tiny, tmp_path / "run")
    origin = read_origin(tmp_path / "run")
    end = tokenizer.load(str(tiny / "tokenizer.json")).id_of("B")
    assert (origin.chat_template, origin.end_ids, dict(origin.roles)) == ("plain", (end,), {"eos": end})


def test_the_first_phase_is_not_quantized(trunk, child_env, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", child_env["XDG_CACHE_HOME"])
    _, folder = trunk
    args = [f"--config={folder / 'run' / 'qat.py'}", f"--workdir={tmp_path / 'qat'}", *SHORT, *sources(folder)]
    assert train.main(["train", *args, "--config.train.phases.trunk.quantize=True"]) == 2
    assert "trunk.quantize is on, and config.init_from replaces that phase" in capsys.readouterr().err
    assert not (tmp_path / "qat").exists()


def test_shards_are_the_same_model(templates, tmp_path):
    """Also where an expert's tensors lie in several of them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(templates / "qwen", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    shutil.copy(templates / "qwen" / "tokenizer.json", tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 5
    assert import_folder(tmp_path / "model", tmp_path / "a") == import_folder(templates / "qwen", tmp_path / "b")
    assert_same(saved(tmp_path / "a"), saved(tmp_path / "b"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_type(dtype, tmp_path):
    make("Qwen3Moe", TINY, tmp_path / "model", dtype)
    import_folder(tmp_path / "model", tmp_path / "run")
    arrays, theirs = saved(tmp_path / "run"), load(tmp_path / "model")
    kind = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}[dtype]
    assert {a.dtype for a in arrays.values()} == {np.dtype(kind)}
    names = [f"model.layers.0.mlp.experts.1.{half}_proj.weight" for half in ("gate", "up")]
    both = np.concatenate([theirs[name] for name in names])
    assert arrays["params/model/layers/0/experts/gate_up"][1].tobytes() == both.tobytes()
    assert arrays["params/model/embed"].tobytes() == theirs["model.embed_tokens.weight"].tobytes()
    with Branch(tmp_path / "run") as branch:
        assert branch.model.dtype == ("bfloat16" if dtype == torch.bfloat16 else "float32")


OLD_AND_NEW = [
    ({"rope_theta": 5000.0, "rope_parameters": ...}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000}}),
    ({"num_experts": 6, "num_local_experts": ...}, {"num_experts": ..., "num_local_experts": 6}),
    ({"torch_dtype": "float32", "dtype": ...}, {"dtype": "float32", "torch_dtype": ...}),
    ({"rope_scaling": None}, {"rope_scaling": ...}),
    ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
]
GLM_OLD_AND_NEW = [
    ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": ..., "num_mtp_layers": 1}),
    ({"n_routed_experts": 6}, {"n_routed_experts": ..., "num_local_experts": 6}),
    (
        {"partial_rotary_factor": 0.5, "rope_theta": 9000.0, "rope_parameters": ...},
        {"rope_parameters": {"rope_theta": 9000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    ),
    ({"partial_rotary_factor": ...}, {"partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(
    ("which", "old", "new"),
    [("qwen", *pair) for pair in OLD_AND_NEW] + [("glm", *pair) for pair in GLM_OLD_AND_NEW],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v,
)
def test_old_and_new_spellings(which, old, new, templates):
    raw = config_of(templates / which)

    def read(changes):
        return hf_config.read({k: v for k, v in (raw | changes).items() if v is not ...}, "config.json")

    assert read(old) == read(new)


def test_a_vocabulary_padded_beyond_the_tokenizer(templates, tmp_path):
    """The templates' tokenizers have 290 tokens; rows up to vocab_size stay in the model and in the exports."""
    model = import_folder(templates / "tiny", tmp_path / "run")
    assert model.vocab_size == 300
    with Branch(tmp_path / "run", rest="F32") as branch:
        assert branch.tokenizer.vocab_size == 290
        np.testing.assert_array_equal(branch.numbers()["embed"], load(templates / "tiny")["model.embed_tokens.weight"])
        huggingface_model.write(branch, tmp_path / "out", packed=False, force=False)
    assert load(tmp_path / "out")["lm_head.weight"].shape == (300, 8)


def test_a_tied_model_may_repeat_its_head_but_not_have_another(tmp_path, capsys):
    make("Qwen3Moe", TINY | dict(tie_word_embeddings=True), tmp_path / "model")
    arrays = load(tmp_path / "model")
    assert "lm_head.weight" not in arrays
    assert import_folder(tmp_path / "model", tmp_path / "a").tie_embeddings
    store(tmp_path / "model", arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    import_folder(tmp_path / "model", tmp_path / "b")
    assert_same(saved(tmp_path / "a"), saved(tmp_path / "b"))
    store(tmp_path / "model", arrays | {"lm_head.weight": -arrays["model.embed_tokens.weight"]})
    line = refused(capsys, tmp_path / "model", tmp_path / "c")
    assert "lm_head.weight differs from model.embed_tokens.weight" in line


# ---- MTP modules -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mtp(templates, tmp_path):
    """A model of two layers and an MTP module: the third layer, and random tensors around it."""
    folder = shutil.copytree(templates / "glm", tmp_path / "model")
    configure(folder, num_hidden_layers=2, num_nextn_predict_layers=1, num_mtp_layers=..., layer_types=...)
    rng = np.random.default_rng(3)
    arrays = load(folder)
    draw = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)  # noqa: E731
    extra = {"eh_proj": draw(48, 96), "enorm": 1 + draw(48), "hnorm": 1 + draw(48), "shared_head.norm": 1 + draw(48)}
    store(folder, arrays | {f"model.layers.2.{name}.weight": array for name, array in extra.items()})
    return folder


def repeat(folder, scale=1):
    """Adds the copies that published checkpoints have."""
    arrays = load(folder)
    copies = {
        "model.layers.2.embed_tokens.weight": arrays["model.embed_tokens.weight"] * np.float32(scale),
        "model.layers.2.shared_head.head.weight": arrays["lm_head.weight"],
    }
    store(folder, arrays | copies)


@pytest.mark.parametrize("repeated", [False, True])
def test_mtp_modules_come_in_and_go_out(repeated, mtp, tmp_path, capsys):
    theirs = load(mtp)
    if repeated:
        repeat(mtp)
    assert import_hf.main([str(mtp), f"--out={tmp_path / 'run'}"]) == 0
    assert "2 layers, 6 experts, 1 MTP modules" in capsys.readouterr().out
    with Branch(tmp_path / "run", rest="F32") as branch:
        module = branch.numbers()["mtp"]["0"]
        for ours, name in {
            "eh_proj": "eh_proj",
            "enorm": "enorm",
            "hnorm": "hnorm",
            "norm": "shared_head.norm",
        }.items():
            np.testing.assert_array_equal(module[ours], theirs[f"model.layers.2.{name}.weight"])
        np.testing.assert_array_equal(module["block"]["attn"]["q"], theirs["model.layers.2.self_attn.q_proj.weight"])
    options = ["--rest=F32", "--verify", "--verify_tokens=64"]
    assert (
        export.main([f"--run={tmp_path / 'run'}", "--format=safetensors", f"--out={tmp_path / 'out'}", *options]) == 0
    )
    assert_same(load(tmp_path / "out"), theirs)
    again = hf_config.read(config_of(tmp_path / "out"), "")
    assert again == hf_config.read(config_of(mtp), "")


def test_an_imported_mtp_module_computes_what_that_of_transformers_does(mtp, tmp_path):
    import_folder(mtp, tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(mtp, dtype=torch.float32, attn_implementation="eager")
    module = transformers.modeling_layers.MtpModel
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]
    theirs = module.from_pretrained(model.eval()).eval()
    ids = np.random.default_rng(1).integers(0, 290, 17)
    with torch.no_grad():
        states = model.model(torch.tensor(ids[None, :-1])).last_hidden_state
        out = theirs.forward_layer(0, states, torch.arange(16)[None], None, input_ids=torch.tensor(ids[None, 1:]))
    with Branch(tmp_path / "run", rest="F32") as branch:
        weights, cfg = branch.numbers(), branch.model
    forward = jax.jit(functools.partial(transformer.forward, cfg=cfg, train=False))
    ours = forward(weights, tokens_BL=jnp.asarray(ids[None, :-1]), mtp_tokens=jnp.asarray(ids[None, None, 1:]))
    np.testing.assert_allclose(ours.mtp_hidden[0], out.numpy(), atol=1e-4, rtol=0)


def test_copies_that_differ_are_refused_and_dropped_with_their_module(mtp, tmp_path, capsys):
    repeat(mtp, 1.5)
    line = refused(capsys, mtp, tmp_path / "run")
    assert "model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight" in line
    assert "--drop_mtp" in line
    assert import_hf.main([str(mtp), f"--out={tmp_path / 'run'}", "--drop_mtp"]) == 0
    assert "0 MTP modules" in capsys.readouterr().out
    assert not [name for name in saved(tmp_path / "run") if "/mtp/" in name]


# ---- an imported run is a trunk --------------------------------------------------------------------------------------

SHORT = [
    "--config.data.seq_len=32",
    "--config.train.batch_size=2",
    "--config.eval.every=0",
    "--config.eval.final_batches=0",
    "--config.train.tensorboard=False",
    *[f"--config.train.phases.{name}.{key}=0" for name in ("control", "qat") for key in ("warmup", "decay")],
    *[f"--config.train.phases.{name}.steps=2" for name in ("control", "qat")],
]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A model of transformers whose widths are whole blocks of Q2_0, and the run that it becomes."""
    folder = tmp_path_factory.mktemp("trunk")
    shape = QWEN | dict(hidden_size=64, num_hidden_layers=2, moe_intermediate_size=64)
    model = make("Qwen3Moe", shape | dict(norm_topk_prob=True), folder / "model")
    assert import_hf.main([str(folder / "model"), f"--out={folder / 'run'}"]) == 0
    (folder / "text.txt").write_text(TEXT[:20_000])
    (folder / "valid.txt").write_text(TEXT[20_000:20_600])
    return model, folder


def sources(folder):
    return [f"--config.data.source={folder / 'text.txt'}", f"--config.data.valid={folder / 'valid.txt'}"]


def trunk_loss(workdir):
    (final,) = [r for r in metrics.read(workdir) if r["phase"] == "trunk" and r["split"] == "final"]
    return final["loss"], final["tokens"]


def transformers_loss(model, folder):
    """Next-token loss over rows of 32 targets, as validation cuts the text: each row begins at the token that the one
    before it predicted last."""
    tok = tokenizer.load(str(folder / "run" / "tokenizer.json"))
    ids = [*tok.encode((folder / "valid.txt").read_text()).tolist(), tok.end_id]
    nats = []
    for start in range(0, len(ids) - 1, 32):
        row = torch.tensor([ids[start : start + 33]])
        with torch.no_grad():
            logits = model(row[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").tolist()
    return np.mean(nats), len(nats)


def test_qat_of_an_imported_model(trunk, quick_env, tmp_path, capsys):
    """End to end, as the import command says to go on; then the 2-bit branch is deployed."""
    model, folder = trunk
    command = [
        sys.executable,
        "-m",
        "qatmoe.train",
        "--config",
        folder / "run" / "qat.py",
        "--workdir",
        tmp_path / "qat",
    ]
    done = subprocess.run(
        [*command, *SHORT, *sources(folder)], env=quick_env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    loss, count = trunk_loss(tmp_path / "qat")
    theirs, there = transformers_loss(model, folder)
    assert count == there
    assert abs(loss - theirs) < 1e-4
    options = ["--verify", "--verify_tokens=64"]
    assert export.main([f"--run={tmp_path / 'qat'}", "--format=gguf", f"--out={tmp_path / 'out'}", *options]) == 0
    out = capsys.readouterr().out
    assert "phase qat, step 2 of" in out and "Q2_0" in out and "FAILED" not in out


class TrunkIsDone(Exception):
    pass


def test_unrolled_layers_have_the_same_trunk_loss(trunk, child_env, tmp_path, monkeypatch, quick_compilation):
    model, folder = trunk
    real = train.run_phase

    def only_trunk(run, name):
        real(run, name)
        raise TrunkIsDone

    monkeypatch.setattr(train, "run_phase", only_trunk)
    monkeypatch.setenv("XDG_CACHE_HOME", child_env["XDG_CACHE_HOME"])
    for scan in (False, True):
        args = [f"--config={folder / 'run' / 'qat.py'}", f"--workdir={tmp_path / str(scan)}"]
        with pytest.raises(TrunkIsDone):
            train.main(["train", *args, *SHORT, *sources(folder), f"--config.model.scan_layers={scan}"])
    theirs, _ = transformers_loss(model, folder)
    for scan in (False, True):
        assert abs(trunk_loss(tmp_path / str(scan))[0] - theirs) < 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("dim=128", "embed is [320, 64] there and [320, 128] here"),
        ("n_layers=1", "it has params/model/layers/1/"),
        ("n_layers=3", "layers/2/"),
        ("n_dense_layers=1", "dense_layers/0/"),
        ("expert_dim=128", "layers/0/experts"),
        ("n_experts=4", "layers/0/experts"),
        ("n_mtp=1", "mtp/0/"),
        ("tie_embeddings=True", "it has params/model/head"),
        ("qk_norm=none", "it has params/model/"),
    ],
)
@pytest.mark.parametrize("scan", [True, False])
def test_another_architecture_is_refused_by_name(change, named, scan, trunk, child_env, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", child_env["XDG_CACHE_HOME"])
    _, folder = trunk
    args = [f"--config={folder / 'run' / 'qat.py'}", f"--workdir={tmp_path / 'qat'}", *SHORT, *sources(folder)]
    assert train.main(["train", *args, f"--config.model.scan_layers={scan}", f"--config.model.{change}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "is of another architecture" in lines[0] and named in lines[0] and "qat.py" in lines[0]
    assert not (tmp_path / "qat").exists()


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = """
import pathlib, sys, threading, time
from qatmoe.checkpoint import Checkpoints
from qatmoe.convert import hf_import
import jax
jax.numpy.zeros(1).block_until_ready()
def anonymous():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
hf_import._PART_BYTES = 1 << 25
hf_import.import_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
print(peak - before)
"""


def test_a_large_model_is_never_in_memory(child_env, tmp_path):
    """With parts of 32 MB. With the 256 MB of the product the peak was 578 MB for these 405 MB, 2.2 parts."""
    config = QWEN | dict(model_type="qwen3_moe", hidden_size=512, num_hidden_layers=8, num_experts=16, vocab_size=512,
                         moe_intermediate_size=1024, norm_topk_prob=True)  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.train(["two bits of every weight"] * 3, 260).save(folder / "tokenizer.json")
    _, model = hf_config.read(config, "")
    shapes = {n: names.shape_of(model, part) for n, part in names.huggingface_parts(model, "qwen3_moe").items()}
    tensors = {name: Tensor("BF16", shape) for name, shape in shapes.items()}
    block = np.random.default_rng(0).standard_normal(2**20).astype(ml_dtypes.bfloat16)
    write_sharded(folder, tensors, lambda n: block[: math.prod(shapes[n])].reshape(shapes[n]), shard_bytes=100_000_000)
    size = 2 * sum(map(math.prod, shapes.values()))
    assert size > 400_000_000 and len(list(folder.glob("model-*"))) == 5
    done = subprocess.run(
        [sys.executable, "-c", LARGE, folder, tmp_path / "run"],
        env=child_env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)
    assert growth < 0.6 * size
