"""The memory command: files as they are written, caches by hand, what fits, and what is refused."""

import dataclasses
import importlib.util
import json

import pytest
from conftest import ROOT
from test_gguf_model import GLM, QWEN, make_run

from qatmoe import export, plan, shapes
from qatmoe.config import QuantConfig
from qatmoe.convert.weights import Branch
from qatmoe.data import tokenizer
from qatmoe.errors import UserError
from qatmoe.model.cache import KINDS, CacheType

pytestmark = pytest.mark.usefixtures("quick_compilation")

GB = 10**9
F16 = CacheType("bf16", "bf16")


@pytest.fixture(scope="module")
def bundled():
    return tokenizer.load()


# ---- sizes of files --------------------------------------------------------------------------------------------------

RUNS = {
    "glm4moe, q2_0, shared q4_0, mtp": (GLM, QuantConfig(shared="q4_0", mtp="same"), dict(n_mtp=2)),
    "glm4moe, ternary_256": (GLM, QuantConfig(experts="ternary_256"), dict(expert_dim=256, dim=256)),
    "glm4moe, tied, embedding q8_0": (GLM, QuantConfig(experts="q8_0", embedding="q8_0"), dict(tie_embeddings=True)),
    "qwen3moe, nvfp4": (QWEN, QuantConfig(experts="nvfp4", attention="nvfp4"), dict(scan_layers=False)),
    "qwen3moe, no grid": (QWEN, None, {}),
}
OPTIONS = (("--rest=F32",), ("--rest=BF16",), ("--rest=Q8_0", "--drop_mtp", "--ternary=TQ1_0"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_what_its_file_takes(name, tmp_path, bundled, capsys):
    model, quant, changes = RUNS[name]
    model = dataclasses.replace(model, vocab_size=2048, **{"dim": 64, "expert_dim": 64, "dense_dim": 64} | changes)
    make_run(tmp_path / "run", bundled, model, quant)
    for options in OPTIONS:
        useless = {"--drop_mtp": model.n_mtp == 0, "--ternary=TQ1_0": not (quant and quant.experts == "ternary_256")}
        given = [option for option in options if not useless.get(option)]
        file = tmp_path / f"{len(options)}{options[0]}.gguf"
        assert export.main([f"--run={tmp_path / 'run'}", "--format=gguf", f"--out={file}", *given]) == 0
        assert plan.main([f"--run={tmp_path / 'run'}", f"--json={tmp_path / 'plan.json'}", *given]) == 0
        result = json.loads((tmp_path / "plan.json").read_text())
        assert result["bytes"] == file.stat().st_size
        assert result["metadata_exact"] and result["context_limit"] == 8
        assert result["metadata_bytes"] + sum(row["bytes"] for row in result["families"]) == result["bytes"]
        assert sum(row["weights"] for row in result["families"]) >= result["weights"] + result["weights_mtp"]
        assert f"{file.stat().st_size:,}" in capsys.readouterr().out


def test_the_estimate_for_the_default_model_is_close_to_its_file(tmp_path, bundled):
    model = plan.SHAPES["default"]
    quant = QuantConfig(experts="q2_0", shared="q2_0")
    config = shapes._DEFAULT
    make_run(tmp_path / "run", bundled, config, quant)
    with Branch(tmp_path / "run") as branch:
        exact = plan.of_run(branch)
    estimate = plan.of_model(model, quant)
    assert estimate.rows == exact.rows
    assert estimate.bytes == pytest.approx(exact.bytes, rel=0.001)


def test_bytes_of_a_family_by_hand():
    rows = {
        (r.family, r.kind): r for r in plan.of_model(shapes.find("gpt-oss-120b"), QuantConfig(experts="mxfp4")).rows
    }
    matrix = 36 * 128 * 2880 * 2880
    assert rows["gate_up", "MXFP4"][2:] == (2 * matrix, 2 * matrix // 32 * 17)
    assert rows["down", "MXFP4"][2:] == (matrix, matrix // 32 * 17)
    assert rows["embedding", "BF16"][2:] == (201_088 * 2880, 201_088 * 2880 * 2)


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cache", "expected"),  # bytes a token: layers * 2 * heads * width * bits / 8
    [
        ("qwen3-30b-a3b", "f16", 48 * 2 * 4 * 128 * 2),
        ("qwen3-30b-a3b", "q8_0", 48 * 2 * 4 * 128 * 34 // 32),
        ("qwen3-30b-a3b", "q8_0/q4_0", 48 * 4 * 128 * (34 + 18) // 32),
        ("qwen3-30b-a3b", "q4_0+rot", 48 * 2 * 4 * 128 * 18 // 32),
        ("glm-4.5", "f16", 92 * 2 * 8 * 128 * 2),  # not the MTP module's layer
        ("deepseek-v3", "f16", 61 * 576 * 2),  # one key for all heads, no value
        ("deepseek-v3", "q8_0/f32", 61 * 576 * 34 // 32),
        ("gpt-oss-120b", "f16", 18 * 2 * 8 * 64 * 2),  # the windows are full
    ],
)
def test_cache_of_a_token(name, cache, expected):
    shape = shapes.find(name)
    assert plan.per_token(shape, plan.parse_cache(cache, shape)) == expected


def test_windows_keep_a_batch_more_than_they_look_back():
    shape = shapes.find("gpt-oss-120b")
    layer = 2 * 8 * 64 * 2
    assert plan.cache_bytes(shape, F16, 700) == 36 * 700 * layer
    assert plan.cache_bytes(shape, F16, 10_000) == 18 * (10_000 + 768) * layer  # 128 + 512, in steps of 256


def test_every_type_of_cache_is_listed():
    memory = plan.of_model(shapes.find("olmoe-7b-a1b"), QuantConfig())
    result = plan.summary(memory, "f16", 4096, ["16GB"])
    assert result["cache_bytes_per_token_by_type"].keys() == set(KINDS)
    assert result["cache_bytes_per_token_by_type"]["q4_0"] == 16 * 2 * 2048 * 18 // 32


def test_blocks_that_do_not_divide_a_head_are_refused(tmp_path, bundled):
    make_run(tmp_path / "run", bundled, dataclasses.replace(GLM, vocab_size=2048), None)  # heads of 16
    assert plan.main([f"--run={tmp_path / 'run'}", "--cache=q8_0"]) == 2
    assert plan.main([f"--run={tmp_path / 'run'}", "--cache=bf16"]) == 0


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_the_largest_context_just_fits():
    shape = shapes.find("qwen3-235b-a22b")
    memory = plan.of_model(shape, QuantConfig(), rest="Q8_0")
    least = memory.bytes + plan.COMPUTE_BUFFERS
    a_token = 94 * 2 * 4 * 128 * 2
    assert plan.largest_context(memory, F16, least - 1) == 0
    assert plan.largest_context(memory, F16, least + a_token - 1) == 0
    assert plan.largest_context(memory, F16, least + 1000 * a_token) == 1000
    assert plan.largest_context(memory, F16, 10**15) == 40_960


@pytest.mark.parametrize("name", ["gpt-oss-120b", "glm-4.5-air"])
def test_more_memory_never_means_less_context(name):
    memory = plan.of_model(shapes.find(name), QuantConfig(), rest="Q8_0")
    found = [plan.largest_context(memory, F16, size * GB) for size in range(30, 80)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 131_072
    small = [plan.largest_context(memory, CacheType("q4_0", "q4_0"), size * GB) for size in range(30, 80)]
    assert all(a <= b for a, b in zip(found, small, strict=True)) and small != found


def test_needed_and_spare():
    memory = plan.of_model(shapes.find("gpt-oss-120b"), QuantConfig(experts="mxfp4"), rest="Q8_0")
    result = plan.summary(memory, "f16", 131_072, ["64GB", "80GB"])
    cache = 18 * (131_072 + 768) * 2048
    assert result["cache_bytes"] == cache
    assert result["needed"] == memory.bytes + cache + GB
    assert [fit["spare"] for fit in result["fits"]] == [64 * GB - result["needed"], 80 * GB - result["needed"]]
    assert result["fits"][0]["spare"] < 0 < result["fits"][1]["spare"]
    assert result["fits"][1]["largest_context"] == 131_072
    said = plan.text(result)
    assert "does not fit, " in said and "131,072 (all)" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [("128GB", 128 * GB), ("96GiB", 96 * 2**30), ("16 GB", 16 * GB), ("1.5TB", 1500 * GB), ("512mib", 512 * 2**20)],
)
def test_memory_is_read(text, expected):
    assert plan.parse_memory(text) == expected


@pytest.mark.parametrize(
    "text", ["128", "128G", "GB", "-1GB", "0GB", "12 parsecs", "1e3GB", "1,000GB", "٣GB٣", f"9{0:0400}GB"]
)
def test_memory_that_says_nothing_is_refused(text):
    with pytest.raises(UserError, match="give a number and a unit, as in 128GB"):
        plan.parse_memory(text)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_all_models_in_one_table(capsys, tmp_path):
    assert plan.main(["--experts=q2_k", "--shared=q8_0", "--mtp=q2_k", f"--json={tmp_path / 'all.json'}"]) == 0
    out = capsys.readouterr().out
    results = {r["model"]: r for r in json.loads((tmp_path / "all.json").read_text())}
    assert list(results) == list(shapes.SHAPES)
    refused = {name for name, r in results.items() if "refused" in r}
    assert refused == {"default", "glm-4.5-air", "gpt-oss-120b"}  # rows of 64, 1408 and 2880
    assert "gpt-oss-120b: q2_k needs rows of whole blocks of 256" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["gpt-oss-120b"][1:] == ["refused"]
    assert lines["olmoe-7b-a1b"][1:5] == ["6.92", "B", "1.28", "B"]
    assert [fit["memory"] for fit in results["glm-4.5"]["fits"]] == ["16GB", "24GB", "64GB", "128GB"]
    assert {row["kind"] for row in results["glm-4.5"]["families"] if row["family"] == "shared"} == {"Q8_0"}


def test_the_documentations_tables_are_those_of_today():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "experiments" / "memory" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text()
    for name, settings in module.TABLES.items():
        assert f"<!-- {name}: python experiments/memory/run.py -->\n\n{module.markdown(*settings)}\n\n<!-- end" in page


def test_grids_that_no_model_can_have_are_refused(capsys):
    assert plan.main(["--head=nvfp4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "ignores the scale tensors that nvfp4 needs beside output.weight" in err


def test_one_model(capsys):
    assert plan.main(["--model=glm-4.5-air", "--drop_mtp", "--memory=64GB", "--cache=q8_0", "--context=65536"]) == 0
    out = capsys.readouterr().out
    assert "glm-4.5-air (glm4moe): 106.85 B weights, 13.42 B of them used by a token\n" in out
    assert "65,536 tokens in q8_0" in out and "mtp" not in out and "64GB" in out and "128GB" not in out
    assert plan.main(["--model=glm-4.5-air", "--memory=64GB"]) == 0
    assert "2.38 B in MTP modules" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model=qwen3-235b"], "did you mean 'qwen3-235b-a22b'"),
        (["--experts=q2_1"], "unknown grid 'q2_1'; did you mean"),
        (["--model=default", "--attention=same"], "unknown grid 'same'"),
        (["--model=default", "--memory=lots"], "--memory 'lots': give a number and a unit"),
        (["--model=default", "--cache=q9_9"], "cache 'q9_9' has no type 'q9_9': give one of f16, f32"),
        (["--model=default", "--cache=f16+rot"], "cache 'f16+rot': only"),
        (["--model=default", "--cache=f16/q4_0+rot"], "cache f16/q4_0+rot: llama.cpp rotates only where"),
        (["--model=default", "--context=129"], "--context 129: default is made for 1 to 128 tokens"),
        (["--model=default", "--context=0"], "--context 0"),
        (["--context=64"], "--context 64: is for --model and --run"),
        (["--branch=qat"], "--branch qat: is for --run"),
        (["--drop_mtp"], "--drop_mtp: is for --model and --run"),
        (["--model=gpt-oss-120b", "--drop_mtp"], "has no MTP module"),
        (["--model=glm-4.5", "--drop_mtp", "--mtp=same"], "give one of them"),
        (["--model=default", "--run=runs/x"], "give one of them"),
        (["--run=runs/x", "--experts=q2_0"], "--experts: a run's grids are its own"),
        (["--run=runs/x"], "--run runs/x: no qatmoe run there"),
        (["--ternary=TQ1_0"], "nothing is on the grid ternary_256"),
        (["--experts=ternary_256", "--ternary=TQ9"], "must be one of TQ2_0, TQ1_0, Q2_0"),
        (["--model=qwen3-30b-a3b", "--shared=q8_0"], "has no such weights"),
        (["--json=/dev/null/x"], "--json /dev/null/x: there is no such folder"),
        (["--json=/nowhere/x.json"], "--json /nowhere/x.json: there is no such folder"),
        (["--json=/tmp"], "--json /tmp: is a folder"),
    ],
)
def test_unusable_input_is_one_line(args, said, capsys):
    assert plan.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert said in err
