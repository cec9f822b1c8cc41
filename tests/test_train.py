"""The main job as a user meets it: finished, killed anywhere, stopped, continued and branched from."""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_metrics import Terminal, tensorboard_of

from configs import toy
from qatmoe import cli, metrics, phases, train
from qatmoe import loss as losses
from qatmoe import run as run_lib
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import resolve
from qatmoe.data import batches, corpus
from qatmoe.errors import RunError, UserError
from qatmoe.mesh import make_mesh
from qatmoe.run import abstract_state, quant_plan, valid_batches
from qatmoe.tree import path_of

SHORT = [
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.eval.every=3",
    "--config.eval.batches=1",
    "--config.eval.final_batches=1",
    "--config.train.phases.trunk.steps=6",
    "--config.train.phases.control.steps=4",
    "--config.train.phases.control.decay=2",
    "--config.train.phases.qat.steps=4",
    "--config.train.phases.qat.decay=2",
]

# Runs the job and kills it, as `kill -9` would, at the n-th time it comes to a point.
KILLER = """
import os, signal, sys
from qatmoe import checkpoint, metrics, phases, train
point, count = sys.argv[1], int(sys.argv[2])
owner, name = {
    "record": (metrics.Metrics, "write"),
    "inside a save": (checkpoint.Checkpoints, "_commit"),
    "phase change": (phases, "first_state"),
    "final validation": (phases, "evaluated"),
}[point]
real = getattr(owner, name)
def deadly(*args, **kwargs):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, deadly)
sys.exit(train.main(["train", *sys.argv[3:]]))
"""


def arguments(workdir, *more, curves=False):
    """Of the job; curves for TensorBoard take as long to import, where torch is installed, as JAX does."""
    kept = f"--config.train.tensorboard={curves}"
    return [f"--config={ROOT}/configs/toy.py", f"--workdir={workdir}", *SHORT, kept, *more]


def launch(env, *args):
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=False, timeout=300)


def numbers(workdir):
    """Every record of a run, without what a clock put there."""
    return [{k: v for k, v in r.items() if k not in ("time", "tokens_per_s", "step_s")} for r in metrics.read(workdir)]


def by_place(records):
    return sorted(records, key=lambda r: (r["phase"], r["step"], r["split"]))


@pytest.fixture(scope="session")
def whole(quick_env, tmp_path_factory):
    """An uninterrupted run and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = launch(quick_env | {"JAX_LOG_COMPILES": "1"}, "-m", "qatmoe.train", *arguments(workdir, curves=True))
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_every_step_has_the_rate_of_its_phases_schedule(whole):
    lr = json.loads((whole[0] / "config.json").read_text())["optim"]["lr"]
    found = {(r["phase"], r["step"]): r["lr"] / lr for r in metrics.read(whole[0]) if r["split"] == "train"}
    expected = {"trunk": [0.2, 0.4, 0.6, 0.8, 1, 1], "control": [1, 1, 1, 0.5], "qat": [1, 1, 1, 0.5]}
    for phase, factors in expected.items():
        assert [found[phase, 1 + i] for i in range(len(factors))] == pytest.approx(factors), phase


def test_phases_with_the_same_arithmetic_are_one_program(whole):
    """Trunk and control differ in their schedule, an input of the step; the 2-bit branch is another program."""
    assert len(re.findall(r"Compiling jit\(train_step\)", whole[1].stderr)) == 2


def test_a_run_leaves_what_it_promises(whole):
    workdir, done = whole
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary["loss"]) >= {"trunk", "control", "ptq", "qat"}
    assert all(3 < v < 9 for v in summary["loss"].values())
    assert summary["loss"]["ptq"] == min(summary["ptq_rules"]["control"].values())
    assert summary["bits_per_weight"]["quantized"] == 2.25
    assert summary["tokens"]["total"] == (6 + 4 + 4) * 4 * 64
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    tags = tensorboard_of(workdir, "qat").Tags()
    experts = {f"load/layer_{layer}/expert_{e}" for layer in range(3) for e in range(4)}  # two layers and the module
    grids = {f"/layers/experts/{name}" for name in ("gate_up", "down")}
    health = {f"health/{name}" for name in ("flip_rate", "flipped", "scale_drift", "weight_error")}
    assert set(tags["scalars"]) >= {"loss/train", "loss/valid", "moe/dropped", *experts, *health}
    assert set(tags["scalars"]) >= {f"health/code_{i}{grid}" for i in range(4) for grid in grids}
    assert set(tags["scalars"]) >= {name + grid for name in health for grid in grids}
    assert set(tags["histograms"]) == {f"moe/load/layer_{layer}" for layer in range(3)}
    assert not [r for r in metrics.read(workdir) if r["split"] == "train" and any("expert_" in name for name in r)]
    loads = [r for r in metrics.read(workdir) if r["split"] == "load"]
    assert [(r["phase"], r["step"]) for r in loads] == [
        *(("trunk", n) for n in (3, 6)), *((name, n) for name in ("control", "qat") for n in (3, 4))
    ]  # fmt: skip
    assert all(sum(r[f"layer_0/expert_{e}"] for e in range(4)) == pytest.approx(4) for r in loads)
    plan = json.loads((workdir / "plan.json").read_text())
    assert {r["tensor"] for r in plan["rows"] if r["grid"] == "q2_0"} == {
        "layers/experts/gate_up",
        "layers/experts/down",
    }
    assert "layers/experts/gate_up" in done.stdout  # the coverage table
    for row in ("trunk", "control", "PTQ", "qat"):
        assert row in done.stdout.split("valid loss")[1]
    for record in metrics.read(workdir):
        if record["split"] == "train":
            assert record["step_s"] * record["tokens_per_s"] == pytest.approx(4 * 64)
            assert not any(name.startswith("memory/") for name in record)  # a CPU does not count
    health = [r for r in metrics.read(workdir) if r["split"] == "health"]
    assert health
    assert all(r["weight_error"] > 0 for r in health)


def test_killed_anywhere_the_same_command_ends_at_the_same_numbers(whole, quick_env, tmp_path):
    """Before and inside a save, between phases, and before the final validation of the trunk and of a branch."""
    workdir = tmp_path / "killed"
    job = arguments(workdir, curves=True)
    of_trunk, of_branch = ("final validation", 1), ("final validation", 2)
    for point, count in (
        ("record", 3), of_trunk, ("inside a save", 1), ("phase change", 1), of_branch, ("inside a save", 2)
    ):  # fmt: skip
        done = launch(quick_env, "-c", KILLER, point, str(count), *job)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = launch(quick_env, "-m", "qatmoe.train", *job)
    assert done.returncode == 0, done.stderr
    assert by_place(numbers(workdir)) == by_place(numbers(whole[0]))
    summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, whole[0])]
    assert summaries[0]["loss"] == summaries[1]["loss"]


# One MoE layer, on its grid from the first step: more of them take XLA's optimizations minutes.
ON_THE_GRID = """
from configs import toy
from qatmoe.config import phase
def get_config():
    config = toy.get_config()
    config.model.update(n_layers=1, n_dense_layers=0, n_shared_experts=0, n_mtp=0)
    config.train.phases = {"qat": phase(steps=20, warmup=5, quantize=True)}
    return config
"""


@pytest.mark.slow
def test_killed_as_users_compile(child_env, tmp_path):
    """With all of XLA's optimizations, which the other tests do without: every number to the last bit."""
    env = child_env | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    (tmp_path / "grid.py").write_text(ON_THE_GRID)
    kept = ["--config.train.log_every=1", "--config.train.tensorboard=False"]
    job = [[f"--config={tmp_path}/grid.py", f"--workdir={tmp_path / name}", *kept] for name in ("whole", "killed")]
    for args in (["-m", "qatmoe.train", *job[0]], ["-c", KILLER, "inside a save", "2", *job[1]]):
        assert launch(env, *args).returncode in (0, -signal.SIGKILL)
    assert not (tmp_path / "killed" / "summary.json").exists()
    done = launch(env, "-m", "qatmoe.train", *job[1])
    assert done.returncode == 0, done.stderr
    assert by_place(numbers(tmp_path / "killed")) == by_place(numbers(tmp_path / "whole"))
    assert len(numbers(tmp_path / "whole")) > 20


def test_sigterm_saves_says_how_to_go_on_and_exits_143(whole, quick_env, tmp_path):
    workdir = tmp_path / "stopped"
    args = [sys.executable, "-m", "qatmoe.train", *arguments(workdir)]
    process = subprocess.Popen(args, env=quick_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not metrics.read(workdir) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 143, err
    assert "SIGTERM" in err
    assert "The same command continues" in err
    reached = len(metrics.read(workdir))
    # What goes on is traced, which changes no number.
    done = launch(quick_env, *args[1:], "--config.train.profile_step=2", "--config.train.profile_steps=2")
    assert done.returncode == 0, done.stderr
    assert len(metrics.read(workdir)) > reached
    assert by_place(numbers(workdir)) == by_place(numbers(whole[0]))
    for phase in ("control", "qat"):
        (trace,) = (workdir / "tb" / phase / "plugins" / "profile").glob("*/*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
        assert set(map(int, steps)) == {2, 3}


def test_a_signal_in_the_middle_of_a_validation_loses_nothing(whole, quick_env, tmp_path):
    workdir = tmp_path / "evaluating"
    code = KILLER.replace("signal.SIGKILL", "signal.SIGTERM").replace(
        '"final validation": (phases, "evaluated")', '"validation": (run.Run, "evaluate")'
    )
    code = code.replace("import checkpoint, metrics, phases, train", "import checkpoint, metrics, phases, run, train")
    done = launch(quick_env, "-c", code, "validation", "1", *arguments(workdir))
    assert done.returncode == 143, done.stderr
    assert "SIGTERM: stopped after step 3 of 6 of phase trunk, which is saved" in done.stderr
    done = launch(quick_env, "-m", "qatmoe.train", *arguments(workdir))
    assert done.returncode == 0, done.stderr
    assert by_place(numbers(workdir)) == by_place(numbers(whole[0]))


def test_a_run_that_is_stopped_before_its_first_step_keeps_the_checkpoint_it_came_from(
    whole, cache, tmp_path, monkeypatch, capsys
):
    """To write it again it would have to be moved away first, and a kill then would leave none."""
    shutil.copytree(whole[0], tmp_path / "run")
    for phase, step in (("trunk", 6), ("control", 4), ("control", 2), ("qat", 4), ("qat", 2)):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / phase / str(step))
    kept = tmp_path / "run" / "checkpoints" / "trunk" / "4"
    before, loop = kept.stat().st_ino, phases.loop

    def stopped(run, *args):
        run.stop.signal = signal.SIGTERM
        return loop(run, *args)

    closed = []
    monkeypatch.setattr(batches.TrainIterator, "close", lambda iterator: closed.append(iterator))
    monkeypatch.setattr(phases, "loop", stopped)
    assert train.main(["train", *arguments(tmp_path / "run")]) == 143
    assert len(closed) == 1  # its thread would go on as long as the process
    assert "stopped after step 4 of 6 of phase trunk, which is saved" in capsys.readouterr().err
    assert kept.stat().st_ino == before


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 5), (signal.SIGTERM, 165)], ids=["split", "encode"])
def test_a_signal_while_text_is_read_ends_it_there_and_leaves_nothing(number, at, tmp_path, monkeypatch, capsys):
    """40 documents are read once to hold some out, once to train a tokenizer, and both again, with what is held out
    between, to encode them."""
    lines = [f"{i}: once upon a time there was a whale, and it sang in the cold sea" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    count, real = 0, corpus.documents

    def documents(*args, **kwargs):
        nonlocal count
        for document in real(*args, **kwargs):
            count += 1
            if count == at:
                os.kill(os.getpid(), number)
            yield document

    monkeypatch.setattr(corpus, "documents", documents)
    settings = [f"source={tmp_path}/a.jsonl", "tokenizer=train", f"cache_dir={tmp_path}/cache", "valid_fraction=0.2"]
    job = [f"--config={ROOT}/configs/toy.py", f"--workdir={tmp_path}/run", "--config.model.vocab_size=280"]
    assert train.main(["train", *job, *(f"--config.data.{setting}" for setting in settings)]) == 128 + number
    assert count == at
    assert f"{number.name}: stopped while the text was read, before anything was trained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert all(p.name.startswith("tokenizer-") for p in (tmp_path / "cache").iterdir())


def test_a_finished_run_is_passed_over(whole, quick_env, tmp_path):
    """And says where it was trained, not where its report was made again."""
    shutil.copytree(whole[0], tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    plan["environment"] |= {"device": "another machine", "mesh": {"data": 8}}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    done = launch(quick_env, "-m", "qatmoe.train", *arguments(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "goes on from mesh" not in done.stdout
    assert numbers(tmp_path / "run") == numbers(whole[0])
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == plan
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == "another machine"


# The toy, and phases that learn from the run's own QAT and from phases of the run that init_from names.
TAUGHT = """
from configs import toy
from qatmoe.config import phase
def get_config():
    config = toy.get_config()
    for name, start, teacher in (
        ("own", "trunk", "qat"), ("theirs", "trunk", ":qat"), ("itself", "control", ":control")
    ):
        config.train.phases[name] = phase(steps=4, start=start, distill=1.0, teacher=teacher)
    config.train.phases.theirs.save_at = (1,)
    config.train.phases.itself.freeze = "router"
    return config
"""


@pytest.fixture(scope="module")
def branched(whole, quick_env, tmp_path_factory):
    """A folder: `run`, `source` whose trunk it begins at, `killed` as it once was; and the job's arguments."""
    folder = tmp_path_factory.mktemp("branched")
    (folder / "taught.py").write_text(TAUGHT)
    shutil.copytree(whole[0], folder / "source")
    job = [f"--config={folder}/taught.py", f"--config.init_from={folder}/source@6", *arguments("")[2:]]
    # Saves: one of the trunk, two of each phase, and `theirs` is the third that is trained, with one save more.
    done = launch(quick_env, "-c", KILLER, "inside a save", "8", *job, f"--workdir={folder}/run")
    assert done.returncode == -signal.SIGKILL, done.stderr
    shutil.copytree(folder / "run", folder / "killed")
    done = launch(quick_env, "-m", "qatmoe.train", *job, f"--workdir={folder}/run")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder, job


def test_branching_from_another_runs_checkpoint(whole, branched):
    workdir = branched[0] / "run"
    branches = [r for r in numbers(whole[0]) if r["phase"] in ("control", "qat")]
    assert by_place(r for r in numbers(workdir) if r["phase"] in ("control", "qat")) == by_place(branches)
    assert not [r for r in metrics.read(workdir) if r["phase"] == "trunk" and r["split"] == "train"]


def test_a_phase_learns_from_a_finished_phase_of_its_own_or_another_run(branched):
    """The other run's teacher through a kill and its own without one; both are 2-bit branches of the same numbers."""
    with Checkpoints(branched[0] / "killed", "theirs") as checkpoints:
        assert checkpoints.steps() == [1, 2]
    steps = {(r["phase"], r["step"]): r for r in numbers(branched[0] / "run") if r["split"] == "train"}
    figures = {name: [(steps[name, n]["loss"], steps[name, n]["kl"]) for n in range(1, 5)] for name, _ in steps}
    assert figures["theirs"] == figures["own"]
    assert figures["theirs"][0][1] > 1e-2
    weights = json.loads((branched[0] / "run" / "config.json").read_text())["train"]
    for r in (r for (phase, _), r in steps.items() if phase == "theirs"):  # all of them: the KL has the weight 1
        rest = sum(weights[f"{name}_weight"] * r[name] for name in ("mtp", "balance", "z"))
        assert r["loss"] == pytest.approx(r["kl"] + rest, rel=1e-5)
    assert abs(figures["itself"][0][1]) < 1e-6  # it starts as its teacher


def test_what_a_phase_of_a_run_freezes_is_its_start_s(branched):
    run = branched[0] / "run"
    with Checkpoints(run, "control") as control, Checkpoints(run, "itself") as itself:
        metas = [c.meta(c.latest()) for c in (control, itself)]
        names = [name for name in metas[0]["tensors"] if name.startswith("params/")]
        before, after = (c.read(meta, names) for c, meta in zip((control, itself), metas, strict=True))
    assert {name for name in names if np.array_equal(before[name], after[name])} == {
        name for name in names if "router" in name
    }
    said = (branched[0] / "said").read_text()
    assert f"itself freezes 4 of {len(names)} parameters: layers/router/bias, ..." in said


def test_steps_that_others_branch_off_from_are_saved_and_stay(branched):
    """keep is 2 there, and every second step is saved: of `theirs` the first is one more, and its run was killed."""
    assert json.loads((branched[0] / "run" / "config.json").read_text())["train"]["keep"] == 2
    for phase, expected in (("own", [2, 4]), ("theirs", [1, 2, 4])):
        with Checkpoints(branched[0] / "run", phase) as checkpoints:
            assert checkpoints.steps() == expected


def test_a_finished_phase_says_which_steps_it_did_not_save(branched, monkeypatch, capsys):
    """And a run refuses one that it has passed, before it does anything."""
    run = branched[0] / "run"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    cfg = json.loads((run / "config.json").read_text())
    cfg["train"]["phases"]["own"]["save_at"] = [1, 2, 4]
    phases.check_save_at(resolve(cfg), run)
    assert capsys.readouterr().out.endswith("run has finished own and has no checkpoint of step 1\n")
    cfg["train"]["phases"]["own"]["steps"] = 6
    monkeypatch.setattr(phases, "finished", lambda *_: False)
    with pytest.raises(UserError, match="own.save_at=.* has passed step 1"):
        train.train(resolve(cfg), run, run_lib.Stop())
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*")}


def test_a_phase_goes_on_only_with_the_teacher_that_it_began_with(branched, capsys, cache):
    """It leaves no teacher: nothing after it starts from `source`."""
    folder, job = branched
    teacher = folder / "source" / "checkpoints" / "qat" / "4"
    shutil.rmtree(teacher)
    shutil.copytree(folder / "source" / "checkpoints" / "control" / "4", teacher)
    code, line = fails(capsys, *job, f"--workdir={folder}/killed")
    assert (code, "teacher=':qat' is not what theirs has learned from in its first 2 steps" in line) == (2, True)
    shutil.rmtree(teacher.parent)
    code, line = fails(capsys, *job, f"--workdir={folder}/killed")
    assert (code, "has no checkpoint of phase 'qat'" in line) == (2, True)
    cfg, _ = cli.parse(["x", *job], "", {})
    data = batches.load_data(cfg.data, cfg.model.vocab_size)
    phases.check_teachers(cfg, folder / "run", data)  # which is finished: it needs none


@pytest.mark.parametrize(
    ("teacher", "more", "message"),
    [
        ("/no/run:control", [], "/no/run has no checkpoint of phase 'control'"),
        ("WHOLE:control", ["--config.model.top_k=1"], "model.top_k is 2 there and 1 here"),
        ("WHOLE:control", ["--config.model.scan_layers=False"], "model.scan_layers is True there and False here"),
        ("UNFINISHED:control", [], "stands at step 2: finish it first"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teacher, more, message, whole, capsys, tmp_path, cache):
    shutil.copytree(whole[0] / "checkpoints" / "control", tmp_path / "part" / "checkpoints" / "control")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "control" / "4")
    teacher = teacher.replace("WHOLE", str(whole[0])).replace("UNFINISHED", str(tmp_path / "part"))
    given = [f"--config.train.phases.qat.teacher={teacher}", "--config.train.phases.qat.distill=0.5"]
    code, line = fails(capsys, *arguments(tmp_path / "run", *given, *more))
    assert code == 2
    assert line.startswith(f"error: config.train.phases.qat.teacher={teacher!r}")
    assert message in line
    assert not (tmp_path / "run").exists()


def fails(capsys, *args):
    """Runs the job in this process; returns its exit code and its one line on stderr."""
    code = train.main(["train", *args])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return code, lines[0]


def test_another_configs_folder_is_not_written_over(whole, capsys, cache):
    before = {p: p.stat().st_mtime_ns for p in whole[0].rglob("*") if p.is_file() and p.name != "lock"}
    code, line = fails(capsys, *arguments(whole[0], "--config.optim.lr=0.5"))
    assert code == 2
    assert "optim.lr" in line
    assert {p: p.stat().st_mtime_ns for p in whole[0].rglob("*") if p.is_file() and p.name != "lock"} == before


def test_a_finished_run_is_not_given_another_text(whole, capsys, cache, tmp_path):
    """It would keep its weights and lose the tokenizer that they know, or compare branches on two texts."""
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a fine day, and she said so. " * 60)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["source"] = str(tmp_path / "text")  # as if that had been what it was trained on, before it changed
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json")}
    code, line = fails(capsys, *arguments(tmp_path / "run", f"--config.data.source={tmp_path / 'text'}"))
    assert code == 2
    assert "trained on other text" in line and str(tmp_path / "run") in line
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json")} == before


def test_validation_is_cut_as_training_is(cache):
    """The same rows, and never more of them on the devices than a micro-batch has."""
    cfg = resolve(toy.get_config())
    data, mesh = batches.load_data(cfg.data, cfg.model.vocab_size), make_mesh(cfg.mesh, jax.devices()[:1])
    whole = list(valid_batches(cfg, mesh, data, 3))
    cut = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, grad_accum=2))
    parts = list(valid_batches(cut, mesh, data, 3))
    assert {len(batch["tokens"]) for batch in parts} == {cfg.train.batch_size // 2}
    tokens = [np.concatenate([batch["tokens"] for batch in found]) for found in (whole, parts)]
    np.testing.assert_array_equal(*tokens)


def test_final_figures_are_made_of_all_tokens_and_roundings_of_rounded_weights(whole, cache):
    """In numpy, from each row's nats: mean, error of a ratio over rows, bits; PTQ of weights encoded here."""
    cfg = resolve(json.loads((whole[0] / "config.json").read_text()))
    data, mesh = batches.load_data(cfg.data, cfg.model.vocab_size), make_mesh(cfg.mesh, jax.devices()[:1])
    plan, _ = quant_plan(cfg)
    with Checkpoints(whole[0], "control") as checkpoints:
        model = checkpoints.restore_latest(abstract_state(cfg, plan, mesh, quantize=False))[0].params["model"]
    final = {r["phase"]: r for r in numbers(whole[0]) if r["split"] == "final"}
    (batch,) = valid_batches(cfg, mesh, data, 1)
    sums_of = jax.jit(functools.partial(losses.evaluation_sums, cfg=cfg.model))
    found = {}
    for name, rule in (("control", ""), ("ptq:control:absmax", "absmax"), ("ptq:control:search", "search")):

        def deployed(path, w, rule=rule):
            grid = plan.get(path_of(path)) if rule else None
            return grid.decode(*grid.encode(np.asarray(w), rule)) if grid else w

        sums = sums_of(jax.tree_util.tree_map_with_path(deployed, model), batch=batch)
        nats, count = (np.asarray(sums[key], np.float64) for key in ("nats", "count"))
        loss, mtp = nats.sum(1) / count.sum(1)
        n = len(nats[0])
        se = np.sqrt(n / (n - 1) * np.sum((nats[0] - loss * count[0]) ** 2)) / count[0].sum()
        expected = {"loss": loss, "loss_se": se, "mtp1_loss": mtp, "perplexity": np.exp(loss), "tokens": count[0].sum()}
        expected["bits_per_byte"] = loss / np.log(2) / data.valid.bytes_per_token
        for key, value in expected.items():
            close = 1e-4 if key == "loss_se" else 1e-6  # a small difference of sums in f32
            assert final[name][key] == pytest.approx(value, rel=close), (name, key)
        found[name] = loss
    assert min(abs(a - b) for a, b in itertools.combinations(found.values(), 2)) > 2e-5, found


def test_the_error_of_a_loss_is_that_of_a_mean_over_independent_rows(monkeypatch):
    """Rows of equally many tokens: the standard deviation of their losses by sqrt(n). One row says nothing of it."""
    data = types.SimpleNamespace(valid=types.SimpleNamespace(bytes_per_token=4.0))
    run = types.SimpleNamespace(cfg=resolve(toy.get_config()), mesh=None, data=data, _evaluate_batch=lambda _, b: b)
    rows = np.asarray([3.0, 5.0, 4.5, 4.0, 6.0], np.float32)
    monkeypatch.setattr(run_lib, "place", lambda mesh, n, batch: batch)
    for n in (5, 2, 1):
        cuts = [{"nats": 8 * rows[None, at], "count": np.full((1, 1), 8.0, np.float32)} for at in np.arange(n)[:, None]]
        cuts.append({key: np.zeros((1, 2), np.float32) for key in ("nats", "count")})  # padding
        monkeypatch.setattr(run_lib, "valid_batches", lambda *_, cuts=cuts: iter(cuts))
        found = run_lib.Run.evaluate(run, {}, 0)
        assert found["loss"] == pytest.approx(rows[:n].mean())
        expected = rows[:n].std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
        assert found["loss_se"] == pytest.approx(expected, nan_ok=True)


def test_a_progress_line_ends_before_an_error_is_told(monkeypatch):
    """Else the error would stand on the bar's line."""
    out = Terminal()
    monkeypatch.setattr(metrics.sys, "stderr", out)
    run = types.SimpleNamespace(cfg=resolve(toy.get_config()), workdir="runs/toy")
    checkpoints = types.SimpleNamespace(wait=lambda: None, steps=list)
    with pytest.raises(RunError, match="step 1: loss=nan"), phases.Log(run, "qat", 0, checkpoints) as log:  # noqa: PT012
        log.step(1, {"loss": np.float32(np.nan), "grad_norm": np.float32(1)})
        assert not out.getvalue().endswith("\n")
        log.step(2, {})
    assert out.getvalue().endswith("\n")


def test_another_optimizer_takes_the_weights_alone(whole, quick_env, capsys, cache, tmp_path):
    """Other moments are no other architecture; an average is begun anew in every phase, so it says nothing of them."""

    (tmp_path / "plain.py").write_text(
        "from configs import toy\ndef get_config():\n    config = toy.get_config()\n"
        "    del config.train.phases.qat\n    return config\n"
    )

    def finals(name, *changed, source=whole[0]):
        _, *rest = arguments(tmp_path / name, f"--config.init_from={source}", *changed)
        job = [f"--config={tmp_path / 'plain.py'}", *(argument for argument in rest if "phases.qat" not in argument)]
        done = launch(quick_env, "-m", "qatmoe.train", *job)
        assert done.returncode == 0, done.stderr
        return {r["phase"]: r for r in numbers(tmp_path / name) if r["split"] == "final"}

    other = [f"--config.init_from={whole[0]}", "--config.optim.clip=0.0"]
    code, line = fails(capsys, *arguments(tmp_path / "run", *other))
    assert code == 2
    assert "its optimizer keeps other moments" in line and "phases.control.reset_moments=True" in line
    assert not (tmp_path / "run").exists()
    there = {r["phase"]: r for r in numbers(whole[0]) if r["split"] == "final"}
    reset = ["--config.train.phases.control.reset_moments=True"]
    for found in (finals("clip", "--config.optim.clip=0.0", *reset), finals("ema", "--config.optim.ema=0.9")):
        assert (found["trunk"]["loss"], found["trunk"]["step"]) == (there["trunk"]["loss"], there["trunk"]["step"])
        assert found["control"]["loss"] != there["control"]["loss"]
    averaged = {r["phase"]: r["loss"] for r in numbers(tmp_path / "ema") if r["split"] == "final"}
    both = ["--config.optim.ema=0.9", "--config.optim.clip=0.0", *reset]
    found = finals("both", *both, source=f"{tmp_path / 'ema'}:control")  # the average is taken all the same
    assert found["trunk"]["loss"] == pytest.approx(averaged["control"], rel=1e-6)
    raw = [r["loss"] for r in numbers(tmp_path / "ema") if r["phase"] == "control" and r["split"] == "train"]
    assert raw == [r["loss"] for r in numbers(whole[0]) if r["phase"] == "control" and r["split"] == "train"]


def test_an_unfinished_trunk_is_branched_from_only_by_its_step(branched, capsys, cache, tmp_path):
    shutil.copytree(branched[0] / "source", tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "checkpoints" / "trunk" / "6")
    code, line = fails(capsys, *arguments(tmp_path / "run", f"--config.init_from={tmp_path / 'source'}"))
    assert code == 2
    assert f"{tmp_path / 'source'}@4" in line and "not finished" in line
    assert not (tmp_path / "run").exists()


def test_what_init_from_replaces_is_not_a_matter_of_names(whole, capsys, tmp_path, cache):
    """Phases of a config come sorted by name, and another one that starts from nothing might be the first of them."""
    (tmp_path / "two.py").write_text(
        "from configs import toy\nfrom qatmoe.config import phase\ndef get_config():\n    config = toy.get_config()\n"
        "    config.train.phases.baseline = phase(steps=5)\n    return config\n"
    )
    job = [f"--config={tmp_path}/two.py", *arguments(tmp_path / "run")[1:], f"--config.init_from={whole[0]}"]
    code, line = fails(capsys, *job)
    assert code == 2
    assert "all start from nothing" in line and "baseline" in line
    assert not (tmp_path / "run").exists()


def test_what_init_from_computed_otherwise_is_said(whole, capsys, tmp_path, cache):
    (tmp_path / "file").write_text("")
    changed = [f"--config.init_from={whole[0]}", "--config.model.rope_theta=5000.0", "--config.model.remat=full"]
    assert train.main(["train", *arguments(tmp_path / "file" / "run", *changed)]) == 2  # no folder
    said = [line for line in capsys.readouterr().out.splitlines() if "was trained with" in line]
    assert said == [f"{whole[0]} was trained with model.rope_theta=10000.0, and this run has 5000.0"]


def test_checkpoints_of_another_architecture_are_refused_by_name(whole, capsys, tmp_path, cache):
    changed = ["--config.model.expert_dim=128", f"--config.init_from={whole[0]}"]
    code, line = fails(capsys, *arguments(tmp_path / "run", *changed))
    assert code == 2
    assert "experts" in line
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_its_checkpoints_intact(quick_env, tmp_path):
    workdir = tmp_path / "nan"
    more = ["--config.optim.lr=1e30", "--config.train.phases.trunk.warmup=0", "--config.train.checkpoint_every=1"]
    done = launch(quick_env, "-m", "qatmoe.train", *arguments(workdir, *more))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "optim.lr" in line
    assert "Intact checkpoints of this phase: [1]" in line
    assert Checkpoints(workdir, "trunk").latest_good() == 1
    assert not [r for r in metrics.read(workdir) if r["phase"] == "control"]
