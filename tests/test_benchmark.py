import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from configs import h100_1b, moe_2bit, toy
from experiments.throughput import run as gpu
from qatmoe import benchmark
from qatmoe.config import Config, DataConfig, ModelConfig, QuantConfig, TrainConfig, resolve
from qatmoe.errors import UserError

TINY = Config(
    model=ModelConfig(
        vocab_size=10, dim=8, n_layers=2, n_dense_layers=1, dense_dim=12, n_heads=2, n_kv_heads=1, head_dim=4,
        n_experts=4, top_k=2, expert_dim=6, n_shared_experts=1, n_mtp=1,
    ),
    data=DataConfig(seq_len=16),
    train=TrainConfig(batch_size=3),
)  # fmt: skip


def test_active_weights_by_hand():
    attention = 8 * 8 + 2 * 4 * 8 + 8 * 8  # q, k and v, o
    dense, shared, expert, router = 3 * 12 * 8, 3 * 6 * 8, 3 * 6 * 8, 4 * 8
    moe = shared + 2 * expert + router
    trunk = 2 * attention + dense + moe + 10 * 8
    module = attention + moe + 8 * 16 + 10 * 8  # eh_proj, and the head once more
    assert benchmark.active_weights(TINY) == trunk + module


def test_model_flops_by_hand():
    attention = 6 * 3 * 3 * 16**2 * 2 * 4  # three layers, batch 3
    assert benchmark.model_flops(TINY) == 6 * benchmark.active_weights(TINY) * 48 + attention


def test_the_h100_config_counts_as_the_peer_counts_itself():
    cfg = resolve(h100_1b.get_config())
    active = benchmark.active_weights(cfg)
    norms = 12 * (2 * 1024 + 2 * 64) + 1024  # the peer counts them
    params = 32768 * 1024 + 12 * (3 * 1024 * 1024 + 64 * 1024 + 3 * 64 * 1024 * 512) + norms
    expert = 12 * 3 * 64 * 1024 * 512
    assert active + norms == params - expert + expert * 8 // 64


def test_grids_move_all_families_that_are_on_one():
    quant = QuantConfig(experts="q2_0", down="q4_0", shared="q2_0")
    moved = benchmark.on_grid(quant, "mxfp4")
    assert (moved.experts, moved.gate_up, moved.down, moved.shared) == ("mxfp4", "same", "mxfp4", "mxfp4")
    assert (moved.attention, moved.head) == ("none", "none")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, quick_compilation):
    out = tmp_path_factory.mktemp("benchmark") / "result.json"
    flags = ["--grids=q2_0", "--scales=learned", "--rounds=2", "--parts=yes", "--data=yes", f"--json={out}"]
    shrink = ["--config.model.n_layers=2", "--config.model.vocab_size=300", "--config.data.tokenizer=train"]
    code = benchmark.main(["benchmark", f"--config={toy.__file__}", *flags, *shrink])
    return code, json.loads(out.read_text())


def test_what_is_measured_hangs_together(measured, capsys):
    code, result = measured
    assert code == 0
    assert [r["variant"] for r in result["rows"]] == ["full precision", "q2_0, learned scales"]
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)
        assert row["model_tflops"] == pytest.approx(result["flops_per_step"] / row["step_ms"] / 1e9)
        assert row["ceiling_share"] == pytest.approx(row["model_tflops"] / result["ceiling_tflops"])
        assert row["compile_s"] > 0
        assert row["peak_bytes"] > 3 * 4 * result["params"]  # weights and two moments
        assert 0 <= row["dropped"] < 1
    assert result["rows"][0]["cost"] == 0
    assert result["data"]["ratio"] > 0
    parts = {p["part"]: p for p in result["parts"]}
    assert set(parts) == {
        "attention", "router", "dispatch and combine", "expert matmuls", "shared experts", "dense FFN", "head and loss",
        "fake quantization (learned)", "optimizer",
    }  # fmt: skip
    assert (parts["attention"]["times"], parts["router"]["times"], parts["head and loss"]["times"]) == (3, 2, 2)
    assert all(p["ms"] > 0 for p in parts.values())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--grids=q2_1", "unknown grid 'q2_1'; did you mean 'q2_k'?"),
        ("--scales=fixed", "--scales=fixed: must be of learned, dynamic"),
        ("--rounds=0", "--rounds=0: must be a number of at least 1"),
        ("--json=/no/such/folder/x.json", "there is no such folder"),
        ("--parts=maybe", "--parts=maybe: must be yes or no"),
    ],
)
def test_bad_flags_are_named(flag, message, capsys):
    assert benchmark.main(["benchmark", f"--config={moe_2bit.__file__}", flag]) == 2
    assert message in capsys.readouterr().err


def test_what_is_asked_for_is_timed_or_refused(capsys):
    cfg = resolve(moe_2bit.get_config())
    mixed = dataclasses.replace(cfg, quant=dataclasses.replace(cfg.quant, shared="q4_0"))
    own = benchmark.variants(mixed, "", ["learned", "dynamic"])
    assert list(own) == ["q4_0+q2_0, learned scales", "q4_0+q2_0, dynamic scales"]  # the dense layer comes first
    assert own["q4_0+q2_0, dynamic scales"] == dataclasses.replace(mixed.quant, scale="dynamic")
    assert benchmark.variants(cfg, "none", ["learned"]) == {}
    assert list(benchmark.variants(cfg, "mxfp4", ["learned"])) == ["mxfp4, learned scales"]
    with pytest.raises(UserError, match="rows of 128 weights are not whole blocks of 256"):
        benchmark.variants(cfg, "q3_k", ["learned"])
    assert "q3_k, learned scales" not in benchmark.variants(cfg, "all", ["learned"])
    assert "q3_k: left out" in capsys.readouterr().out
    plain = dataclasses.replace(TINY, quant=QuantConfig(experts="none"))
    assert benchmark.variants(plain, "", ["learned"]) == {}
    with pytest.raises(UserError, match="puts no tensor on a grid"):
        benchmark.variants(plain, "q2_0", ["learned"])


def test_the_gpu_benchmark_that_is_killed_keeps_what_was_measured(tmp_path, monkeypatch):
    def peer(batch, *flags):
        if batch == 16:
            raise KeyboardInterrupt
        return {"variant": "new", "batch_size": batch, "tokens_per_s": 9.0, "device": "x"}

    monkeypatch.setattr(gpu, "peer", peer)
    old = [{"variant": "old", "batch_size": b, "tokens_per_s": 1.0, "device": "x"} for b in (8, 16, 32)]
    kept = [measured_on("x", batch, 18.0) for batch in (8, 16, 32)]
    with pytest.raises(KeyboardInterrupt):
        gpu.measure({"peer"}, {"peer": old, "bf16": kept}, tmp_path)
    result = json.loads((tmp_path / "h100.json").read_text())
    found = [(r["variant"], r["batch_size"]) for r in result["rows"]]
    assert found == [("new", 8), ("old", 16), ("old", 32), *[("f", b) for b in (8, 16, 32)]]
    assert result["ratio_to_peer"] == 2.0


def measured_on(device, batch, tokens_per_s):
    rows = [{"variant": "f", "tokens_per_s": tokens_per_s}]
    return {"config": "h100_1b", "batch_size": batch, "device": device, "rows": rows}


def test_a_ratio_to_the_peer_takes_every_batch_size_of_both_on_one_gpu():
    """A batch that did not fit counts as tried; the peer without its compiler does not count."""
    peers = [{"variant": "p", "batch_size": b, "tokens_per_s": 5.0, "device": "x"} for b in (8, 16)]
    peers.append({"variant": "p", "batch_size": 32, "failed": "exit 1: out of memory"})
    found = {"peer": peers, "bf16": [measured_on("x", b, 10.0) for b in (8, 16, 32)]}
    found["eager"] = [{"variant": "e", "batch_size": 8, "tokens_per_s": 99.0, "device": "x"}]
    assert gpu.summary(found)["ratio_to_peer"] == 2.0
    for cut in (
        {"peer": peers[:2]},
        {"bf16": found["bf16"][:1]},
        {"bf16": [measured_on("y", b, 9.0) for b in (8, 16, 32)]},
    ):
        assert gpu.summary(found | cut)["ratio_to_peer"] is None


def test_what_the_gpu_benchmark_times_beside_other_things_stands_in_its_page_once():
    """The full-precision step that grids, parts and data are measured beside is a row of bf16 alone."""
    step = {"step_ms": 10.0, "tokens_per_s": 5.0, "model_tflops": 1.0, "peak_bytes": 2**30, "compile_s": 3.0}
    one = measured_on("x", 8, 5.0) | {"rows": [{"variant": "full precision", "cost": 0.0} | step]}
    other = {"variant": "mxfp4, learned scales", "cost": 0.04} | step
    parts = [{"part": "attention", "ms": 0.5, "times": 4}, {"part": "optimizer", "failed": "memory|full", "times": 1}]
    found = {
        "bf16": [one],
        "mxfp4": [one | {"rows": [*one["rows"], other]}],
        "parts": [one | {"parts": parts}],
        "data": [one | {"data": {"real_tokens_per_s": 4.9, "ratio": 0.98}}],
    }
    page = gpu.table(gpu.summary(found))
    assert page.count("full precision") == 1 and page.count("+4.0%") == 1
    assert "| attention | 0.50 | 4 | 20.0% |\n| optimizer | memory/full | 1 |  |" in page
    assert "h100_1b over its text: 5 tokens/s, 98.0% of those" in page


def test_the_gpu_benchmark_keeps_results_of_its_own_folder_where_the_given_one_has_none(tmp_path, monkeypatch):
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    (home / "README.md").write_text("<!-- gpu: x -->\n<!-- end -->\n")
    row = {"variant": "p", "batch_size": 8, "tokens_per_s": 5.0, "device": "x", "step_ms": 1.0, "model_tflops": 1.0}
    row |= {"peak_bytes": 1, "compile_s": 1.0}
    (home / "h100.json").write_text(json.dumps(gpu.summary({"eager": [row]})))
    monkeypatch.setattr(gpu, "HERE", home)
    monkeypatch.setattr(gpu, "peer", lambda batch, *flags: row | {"batch_size": batch, "variant": "new"})
    monkeypatch.setattr("sys.argv", ["run.py", "--only=peer", f"--out={out}"])
    gpu.main()
    rows = json.loads((out / "h100.json").read_text())["rows"]
    assert [r["variant"] for r in rows] == ["new", "new", "new", "p"]
    assert [r["variant"] for r in json.loads((home / "h100.json").read_text())["rows"]] == ["p"]


def test_rows_of_a_gpu_benchmark_that_failed_are_kept_with_its_reason(tmp_path, monkeypatch):
    def program(*args):
        (file,) = (a.partition("=")[2] for a in args if a.startswith("--json="))
        rows = [{"variant": "full precision", "tokens_per_s": 1.0}]
        Path(file).write_text(json.dumps({"config": "h100_study", "batch_size": 128, "device": "x", "rows": rows}))
        return subprocess.CompletedProcess(args, 124, "", "some log\nError: it took more than 540 s")

    monkeypatch.setattr(gpu, "_python", program)
    gpu.measure({"small"}, {}, tmp_path)
    done, rest = json.loads((tmp_path / "h100.json").read_text())["rows"]
    assert done["variant"] == "full precision"
    assert (rest["variant"], rest["failed"]) == ("small: the rest", "exit 124: Error: it took more than 540 s")
    assert done["config"] == rest["config"] == "h100_study"
    assert [p.name for p in tmp_path.iterdir()] == ["h100.json"]
