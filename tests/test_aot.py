import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qatmoe import aot, cli, fit, train
from qatmoe.errors import UserError
from qatmoe.model.transformer import param_shapes
from qatmoe.topology import GIB, parse
from qatmoe.tree import leaves_by_path

ROOT = Path(__file__).parent.parent
SMALL = ["--config.model.n_layers=2", "--config.model.n_mtp=0", "--config.train.batch_size=8"]
MESH = ["--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.mesh.expert=2"]


def plan(env, folder, *args, config="toy"):
    """Runs --compile_only; its exit code, the report and what it printed."""
    out = folder / "report.json"
    command = [sys.executable, "-m", "qatmoe.train", f"--config={ROOT}/configs/{config}.py", "--compile_only", *args]
    done = subprocess.run(
        [*command, f"--json={out}"], env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def on_cpus(child_env, tmp_path_factory):
    """The toy's QAT step on 8 devices of a CPU, from a config whose text does not exist."""
    folder = tmp_path_factory.mktemp("plan")
    text = "--config.data.source=nowhere.txt"
    code, report, text = plan(child_env, folder, "--topology=cpu:8", *SMALL, *MESH, text)
    return code, report, text, folder


def test_a_plan_needs_no_text_and_writes_only_its_report(on_cpus):
    code, report, text, folder = on_cpus
    assert code == 0
    assert [p.name for p in folder.iterdir()] == ["report.json"]
    assert (report["phase"], report["quantized"], report["devices"]) == ("qat", True, 8)
    assert report["mesh"] == {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1}
    assert "toy, phase qat (quantized): 2 layers, batch 8 x 64" in text
    assert "no verdict: a CPU is no measure" in text


def test_memory_by_kind_is_what_the_program_takes(on_cpus):
    """State by shapes and shardings is, with the batch and a few scalars, what the compiler calls arguments."""
    memory = on_cpus[1]["memory"]
    state = sum(memory[k] for k in ("master weights", "learned scales", "optimizer moments", "average of the weights"))
    batch = (64 + 1) * 4
    assert state + batch <= memory["arguments"] < state + batch + 1000
    assert memory["needed"] >= memory["arguments"] + memory["temporaries"]


def test_the_experts_are_exchanged_and_loops_are_counted(on_cpus):
    report = on_cpus[1]
    assert report["unknown_loops"] == 0
    exchanges = [c for c in report["collectives"] if c["kind"] == "all-to-all" and c["axes"] == "expert"]
    assert exchanges and exchanges[0]["runs"] >= 2 * 2  # there and back, forward and backward
    assert any("fsdp" in c["axes"] for c in report["collectives"])
    assert {c["kind"] for c in report["collectives"]} <= set(aot.hlo.KINDS)
    # padded rows of experts and masked halves of attention are computed, and counted by the compiler only
    assert 1 < report["matmul_flops"] / report["model_flops"] < 4


NOT_TO_COMPILE = ("--compile_only=false", "--compile_only=False", "--compile_only=0", "--nocompile_only")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compile_only"], "--topology='': no such machine; the nearest is"),
        (["--compile_only", "--topology=v5p-128"], "the nearest is 'v5p:4x4x4'"),
        (["--compile_only", "--topology=cpu:1", "--phase=qatt"], "--phase='qatt': no such phase; the config has trunk"),
        (["--compile_only", "--topology=cpu:1", "--config.mesh.expert=4"], "a multiple of 4 devices and there are 1"),
        (["--compile_only", "--topology=cpu:4096"], "this process has 1 CPU devices already"),
        (["--compile_only", "--topology=cpu:1", "--json=/nowhere/r.json"], "--json /nowhere/r.json: there is no such"),
        (["--topology=v5p:4x4x4"], "belongs to --compile_only"),
        (["--compile_only=maybe"], "compile_only"),
        *((["--topology=v5p:4x4x4", no], "belongs to --compile_only") for no in NOT_TO_COMPILE),
    ],
)
def test_mistakes_are_one_line(args, message, tmp_path, capsys):
    code = train.main(["train", f"--config={ROOT}/configs/toy.py", f"--workdir={tmp_path / 'run'}", *args])
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(aot.machines.importlib.util, "find_spec", lambda name: None)
    for topology, install in (("v5p:4x4x4", "pip install -e '.[tpu]'"), ("gpu:8", "'jax[cuda12]>=0.11.2'")):
        assert train.main(["train", f"--config={ROOT}/configs/toy.py", "--compile_only", f"--topology={topology}"]) == 2
        assert install in capsys.readouterr().err


def test_a_plugin_that_cannot_compile_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(aot.machines.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert train.main(["train", f"--config={ROOT}/configs/toy.py", "--compile_only", "--topology=gpu:8"]) == 2
    assert "0.11.2 or newer" in capsys.readouterr().err


# ---- verdict and suggestion ------------------------------------------------------------------------------------------


def report(needed, hbm=100 * GIB):
    return {"memory": {"needed": needed, "hbm": hbm}, "fits": needed <= hbm, "head_room": 1 - needed / hbm}


def test_verdict():
    assert aot.verdict(report(75 * GIB)) == "fits: 75.00 of 100.00 GiB, 25% head-room"
    assert aot.verdict(report(101 * GIB + GIB // 2)) == "does not fit, by 1.50 GiB: it takes 101.50 GiB a device"


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.41G) "
            "exceeds available HBM (15.75G).",
            19.41 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.5M of "
         "256.0M hbm.", 512.5 * 2**20),
    ],
)  # fmt: skip
def test_bytes_from_a_refusal(text, needed):
    assert aot.needed_by_error(text) == int(needed)


def test_other_errors_of_the_compiler_are_told():
    with pytest.raises(UserError, match="the step does not compile: INTERNAL: what"):
        aot.needed_by_error("INTERNAL: what\nmore")


@pytest.fixture(scope="module")
def job():
    flags = ["x", f"--config={ROOT}/configs/toy.py", "--config.mesh.data=1", "--config.train.batch_size=8"]
    return aot.make_job(cli.parse(flags, "", {})[0], parse("cpu:1"))


def test_changes_come_cheapest_first(job):
    found = [settings for settings, machine in fit.changes(job) if machine == job.topology]
    assert found[:4] == [{"model.remat": "full"}, *({"train.grad_accum": n} for n in (2, 4, 8))]
    assert found[4] == {"optim.moments_dtype": "bfloat16"}
    assert found[5] == {"model.remat": "full", "train.grad_accum": 2}
    assert found[-1] == {"model.remat": "full", "train.grad_accum": 8, "optim.moments_dtype": "bfloat16"}
    assert {machine.name for _, machine in fit.changes(job)} == {"cpu:1", "cpu:2"}
    for remat, first in (("dots", {"model.remat": "full"}), ("full", {"train.grad_accum": 2})):
        other = dataclasses.replace(job, cfg=fit.changed(job.cfg, {"model.remat": remat}))
        assert next(fit.changes(other))[0] == first


def test_estimates(job):
    """State, decoded weights and gradients stay; the rest goes with the tokens of a micro-batch."""
    known = sum(job.state_bytes().values()) + sum(job.work_bytes().values())
    rest = 1000 * known
    same = fit.estimate(job, known + rest, job)
    assert same == known + rest
    change = lambda **settings: dataclasses.replace(job, cfg=fit.changed(job.cfg, settings))  # noqa: E731
    half = fit.estimate(job, known + rest, change(**{"train.grad_accum": 2}))
    assert half == pytest.approx(known + rest / 2 + job.work_bytes()["gradients"])
    again = fit.estimate(job, known + rest, change(**{"model.remat": "full"}))
    assert again == pytest.approx(known + rest / 2 + 3 * 8 * 64 * 64 * 4)  # 3 layers: a half, and what goes into each
    moments = change(**{"optim.moments_dtype": "bfloat16"})
    assert moments.state_bytes()["optimizer moments"] / job.state_bytes()["optimizer moments"] == pytest.approx(
        0.75, 0.01
    )


def test_state_by_kind(job):
    state, work = job.state_bytes(), job.work_bytes()
    weights = state["master weights"]
    assert 2 * weights < state["optimizer moments"] < 2.1 * weights
    # learned scales of Q2_0, one f32 for 64 weights of the 2 x 4 routed experts (three matrices of 64 x 64 each)
    assert state["learned scales"] == 2 * 4 * 3 * 64 * 64 // 64 * 4
    assert work["decoded weights"] == 2 * 4 * 3 * 64 * 64 * 4  # model.dtype is float32
    assert work["gradients"] == weights


def test_a_suggestion_is_compiled_before_it_is_made(job, monkeypatch):
    known = sum(job.state_bytes().values()) + sum(job.work_bytes().values())
    compiled = []

    def examine(other):
        compiled.append((other.cfg.model.remat, other.cfg.train.grad_accum))
        return report(120 * known if len(compiled) == 1 else 80 * known, hbm=100 * known)

    monkeypatch.setattr(fit, "examine", examine)
    first = report(250 * known, hbm=100 * known)
    # By arithmetic remat leaves half (125), as do two micro-batches: not compiled. Four are, in vain; eight fit.
    assert fit.suggest(job, first) == (
        f"with --config.train.grad_accum=8 it fits: {80 * known / GIB:.2f} GiB, 20% head-room (compiled)"
    )
    assert compiled == [("none", 4), ("none", 8)]


def test_where_nothing_helps(job, monkeypatch):
    hopeless = report(10**15, hbm=1000)
    assert fit.suggest(job, hopeless).startswith("by estimate nothing that is known here would be enough")


def test_a_suggestion_that_does_not_compile_is_passed_over(job, monkeypatch):
    known = sum(job.state_bytes().values()) + sum(job.work_bytes().values())
    found = iter([UserError("the step does not compile: INTERNAL"), report(120 * known, hbm=100 * known)])

    def examine(other):
        one = next(found, report(80 * known, hbm=100 * known))
        if isinstance(one, UserError):
            raise one
        return one

    monkeypatch.setattr(fit, "examine", examine)
    assert "it fits" in fit.suggest(job, report(250 * known, hbm=100 * known))

    def never(other):
        raise UserError("the step does not compile: INTERNAL")

    monkeypatch.setattr(fit, "examine", never)
    vain = fit.suggest(job, report(250 * known, hbm=100 * known))
    assert vain.startswith("not enough, compiled: --config.train.grad_accum=4 (the step does not compile: INTERNAL)")


def test_a_report_is_kept_where_the_search_for_a_suggestion_fails(tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    seen = []

    def suggest(job, result):
        seen.append(json.loads(out.read_text()))
        raise UserError("the search failed")

    monkeypatch.setattr(aot, "examine", lambda job: {"fits": False, "devices": 1})
    monkeypatch.setattr(aot, "table", lambda result: "table")
    monkeypatch.setattr(fit, "suggest", suggest)
    args = ["train", f"--config={ROOT}/configs/toy.py", "--compile_only", "--topology=cpu:1", f"--json={out}"]
    assert train.main(args) == 2
    assert seen == [{"fits": False, "devices": 1}] == [json.loads(out.read_text())]
    monkeypatch.setattr(fit, "suggest", lambda job, result: "larger")
    assert train.main(args) == 1
    assert json.loads(out.read_text())["suggestion"] == "larger"


@pytest.mark.parametrize("last", NOT_TO_COMPILE)
def test_the_last_word_on_compiling_counts(last):
    assert train.asks_to_compile(["--compile_only"]) and train.asks_to_compile([last, "--compile_only=True"])
    assert not train.asks_to_compile(["--compile_only", last]) and not train.asks_to_compile(["--topology=cpu:1"])


def test_what_alters_no_number_comes_before_what_does(job):
    mesh = dataclasses.replace(job.cfg.mesh, data=2)
    on_two = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, mesh=mesh))
    found = [settings for settings, _ in fit.changes(on_two)]
    assert found.index({"mesh.data": 1, "mesh.fsdp": -1}) < found.index({"optim.moments_dtype": "bfloat16"})


# ---- a TPU's compiler ------------------------------------------------------------------------------------------------


@pytest.mark.tpu_compiler
def test_a_step_for_a_tpu(child_env, tmp_path):
    code, found, text = plan(child_env, tmp_path, "--topology=v5e:2x2", "--phase=control", *SMALL, *MESH)
    assert code == 0
    assert (found["device"], found["devices"], found["fits"], found["unknown_loops"]) == ("TPU v5e", 4, True, 0)
    assert found["memory"]["hbm"] == int(15.75 * GIB)
    assert found["seconds"]["step"] >= found["seconds"]["work"] > 0
    assert {"fsdp", "expert"} <= {c["axes"] for c in found["collectives"]}
    assert "step, at least, ms" in text


@pytest.mark.tpu_compiler
def test_a_step_that_does_not_fit_a_tpu(child_env, tmp_path):
    """Scores of 65,536 x 65,536 on one device: the compiler refuses, and says how much it would have taken."""
    long = ["--config.data.seq_len=65536", "--config.train.batch_size=4", "--config.model.n_mtp=0"]
    code, found, text = plan(child_env, tmp_path, "--topology=v5e:2x2", "--nosuggest", *long)
    assert code == 1
    assert not found["fits"]
    assert "does not fit, by" in text


@pytest.mark.tpu_compiler
def test_a_size_that_the_compiler_refuses(child_env, tmp_path):
    command = [sys.executable, "-m", "qatmoe.train", f"--config={ROOT}/configs/toy.py", "--compile_only"]
    done = subprocess.run(
        [*command, "--topology=v5p:3x3x3"], env=child_env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the nearest usual size is 'v5p:2x4x4'" in done.stderr


@pytest.mark.parametrize(("teacher", "dtype"), [("trunk", "float32"), ("run:control", "float32"), ("qat", "bfloat16")])
def test_a_teacher_takes_the_bytes_of_the_phase_it_is(teacher, dtype):
    """Weights as they are evaluated: those of a phase that quantizes are decoded in the type that it computes in."""
    learns = [f"--config.train.phases.control.teacher={teacher}", "--config.train.phases.control.distill=0.5"]
    flags = ["x", f"--config={ROOT}/configs/toy.py", "--config.model.dtype=bfloat16", *learns]
    job = aot.make_job(cli.parse(flags, "", {})[0], parse("cpu:1"), "control")
    found = leaves_by_path(job.teacher)
    assert {path: leaf.shape for path, leaf in found.items()} == param_shapes(job.cfg.model)
    assert found["layers/experts/down"].dtype == dtype
    assert found["embed"].dtype == "float32"
