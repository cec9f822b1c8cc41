"""Studies: which runs branch from which, what is judged of them, and the figures over seeds."""

import copy
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from study_rows import row, runs_of

from launch import points, study, study_results, study_tables, sweep
from launch.algebra import chain, values
from launch.points import Sweep
from launch.study import Stage, Study, beside, branches
from launch.study_tables import Group
from qatmoe import evaluate
from qatmoe.checkpoint import Checkpoints
from qatmoe.convert.weights import NotFinite
from qatmoe.errors import UserError

CONFIG, BRANCH, SCRATCH = (f"configs/moe_2bit{name}.py" for name in ("", "_branch", "_scratch"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def trunks():
    return Stage(Sweep("trunks", CONFIG, values("train.seed", [0, 1])), "^control$")


# ---- Stages ----------------------------------------------------------------------------------------------------------


def test_every_variant_branches_from_every_trunk(trunks):
    variants = chain(values("quant.scale", ["dynamic"]), values("quant.signed", [False]))
    found, starts = branches(trunks, "b", BRANCH, variants), [str(run.folder) for run in runs_of(trunks)]
    assert [(p["init_from"], p["train.seed"]) for p in found.sweep.points] == [*zip(starts, [0, 1], strict=True)] * 2
    assert found.references == tuple(f"{s}:control" for s in starts) * 2
    for run in runs_of(found):
        assert list(run.config.train.phases) == ["trunk", "qat"]


def test_a_branch_may_start_earlier_and_bring_its_own_control(trunks):
    found = branches(trunks, "b", CONFIG, [{"init_from": ":trunk@250"}], at={"train.seed": 1})
    assert [p["init_from"] for p in found.sweep.points] == [f"{runs_of(trunks)[1].folder}:trunk@250"]
    assert found.references == ()


def test_from_random_weights_beside_a_trunk(trunks):
    found = beside(trunks, "s", SCRATCH, values("model.dim", [128]))
    assert [run.config.init_from for run in runs_of(found)] == ["", ""]
    assert found.references == tuple(f"{run.folder}:control" for run in runs_of(trunks))


# ---- Training and judging --------------------------------------------------------------------------------------------


def test_what_starts_from_others_waits_for_them(trunks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "folder_of", lambda asked: tmp_path / asked.name)
    started = []

    def run_locally(runs, places, restarts):
        started.append(([run.folder.parent.name for run in runs], len(places), restarts))
        for run in runs:
            finished.add(run.folder)
        return code

    finished, code = set(), 1
    monkeypatch.setattr(sweep, "run_locally", run_locally)
    monkeypatch.setattr(points, "finished", lambda folder: folder in finished)
    some = [branches(trunks, name, BRANCH, values("quant.scale", ["dynamic"])) for name in ("b", "c")]
    asked = Study([some[0], trunks, some[1]])
    options = sweep.parse(["file", "--slots", "2", "--restarts", "0"])
    assert study.train(asked, options) == 1
    assert started == [(["trunks"] * 2, 2, 0)]  # a run failed: nothing starts from it
    code, started[:] = 0, []
    finished.clear()
    assert study.train(asked, options) == 0
    assert started == [(["trunks"] * 2, 2, 0), (["b"] * 2 + ["c"] * 2, 2, 0)]
    started[:] = []
    finished -= {folder for folder in finished if folder.parent.name != "trunks"}
    assert study.train(asked, options, r"/b/.*seed=0") == 0
    assert started == [(["b"], 2, 0)]
    elsewhere = Sweep("d", BRANCH, [{"init_from": "an/import", "train.seed": 0}])  # not the study's to wait for
    started[:] = []
    assert study.train(Study([trunks, Stage(elsewhere)]), options) == 0
    assert started[-1][0] == ["trunks"] * 2 + ["d"]
    teacher = {"train.phases.qat.distill": 0.5, "train.phases.qat.teacher": f"{runs_of(trunks)[0].folder}:control"}
    taught_by_b = teacher | {"train.phases.qat.teacher": f"{runs_of(some[0])[0].folder}:qat"}
    finished.clear()
    started[:] = []
    third = Stage(Sweep("f", BRANCH, [elsewhere.points[0] | taught_by_b]))
    assert study.train(Study([third, *asked.stages]), options) == 0
    assert [names for names, *_ in started] == [["trunks"] * 2, ["b"] * 2 + ["c"] * 2, ["f"]]
    own = runs_of(third)[0].folder
    own.mkdir(parents=True)  # so that it keeps its name
    third.sweep.points.append({"init_from": str(own)})
    with pytest.raises(UserError, match="^f: each waits for runs of these"):
        study.train(Study([third, *asked.stages]), options)
    taught = Sweep("e", BRANCH, [elsewhere.points[0], elsewhere.points[0] | teacher])
    for known in (False, True):
        monkeypatch.setattr(points, "finished", lambda folder, known=known: known and folder.parent.name == "trunks")
        assert study.train(Study([trunks, Stage(taught)]), options, "/e/") == 1
        assert started[-1][0] == ["e"] * (1 + known)  # without what learns from a trunk that is not finished
        missing = f"They start or learn from {runs_of(trunks)[0].folder}, which --only /e/ leaves out."
        assert (missing in capsys.readouterr().err) == (not known)
    seed_1 = runs_of(trunks)[1].folder
    monkeypatch.setattr(points, "finished", lambda folder: folder in finished and folder != seed_1)
    finished.clear()
    started[:] = []
    assert study.train(asked, options, partial=True) == 1
    assert [names for names, *_ in started] == [["trunks"] * 2, ["b", "c"]]  # from the trunk that was trained
    monkeypatch.setattr(points, "finished", lambda folder: False)
    assert study.train(asked, options) == 1
    assert "2 runs are not finished. The same command continues." in capsys.readouterr().err


def test_another_backend_too_is_given_only_what_can_start(trunks, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "folder_of", lambda asked: tmp_path / asked.name)
    seed_0 = runs_of(trunks)[0].folder
    monkeypatch.setattr(points, "finished", lambda folder: folder == seed_0)
    monkeypatch.setattr(sweep.slurm, "executor", lambda *_: None)
    submitted = []
    monkeypatch.setattr(sweep.slurm, "submit", lambda runs, *_: submitted.append(runs) or {})
    asked = Study([trunks, branches(trunks, "b", BRANCH, values("quant.scale", ["dynamic"]))])
    assert study.train(asked, sweep.parse(["file", "--backend", "slurm"]), partial=True) == 1
    queued, branched = submitted
    assert {run.folder.parent.name for run in queued} == {"trunks"}
    assert [run.config.init_from for run in branched] == [str(seed_0)]


def NOTHING(where):
    """A check that never stops."""


def judge(asked, stage, *args):
    """All rows of a stage."""
    return [row for _, rows, _ in study.judge(asked, stage, *args) for row in rows]


@pytest.mark.usefixtures("quick_compilation")
def test_a_branch_whose_weights_are_not_finite_is_named_and_ends_nothing(tiny_stages, tmp_path, monkeypatch, capsys):
    """As one whose loss is not finite: the other branches of its run are judged, and those of other runs."""
    trunks, _ = tiny_stages
    asked, asked_for = Study(tiny_stages, tokens=640), []
    diverged = str(runs_of(trunks)[0].folder)
    real = study.evaluate.evaluate

    def evaluate(found, mesh, rows, *args):
        asked_for.append([row.name for row in rows])
        if any(row.branch == "qat" for row in rows) and str(found.workdir) == diverged:
            raise NotFinite("layers/experts/down holds NaN or inf")
        return real(found, mesh, rows, *args)

    results, broken = [tmp_path / name for name in ("whole.json", "broken.json")]
    study.judge_all(asked, results, False, NOTHING)
    whole = json.loads(results.read_text())
    monkeypatch.setattr(study.evaluate, "evaluate", evaluate)
    study.judge_all(asked, broken, False, NOTHING)
    some = json.loads(broken.read_text())
    ours = [row for row in whole if row["stage"] == "t" and row["branch"] == "qat"]
    assert ours and [row for row in some if "failed" not in row] == [row for row in whole if row not in ours]
    lost = [row for row in some if "failed" in row]
    assert [(row["row"], row["run"], row["failed"]) for row in lost] == [
        (row["row"], row["run"], "layers/experts/down holds NaN or inf") for row in ours
    ]
    said = capsys.readouterr().out
    assert said.count("layers/experts/down holds NaN or inf: a model that diverged") == 1
    asked_for.clear()
    assert judge(asked, dataclasses.replace(trunks, judged="^qat$"), False, NOTHING) == lost
    assert asked_for == [["qat"]]  # it is not looked at twice


@pytest.fixture
def tiny_stages(tiny_run, tmp_path, monkeypatch):
    """A trunk's run and a branch's, finished: copies of one run, as far as this goes."""
    monkeypatch.setattr(study, "folder_of", lambda asked: tmp_path / asked.name)
    monkeypatch.setattr(evaluate, "CALIBRATION", 640)
    trunk = Stage(Sweep("t", "configs/toy.py", [{"train.seed": 0}]), "^(control|qat)$|^control/q2_0/search$")
    branch = Stage(Sweep("b", "configs/toy.py", [{"train.seed": 0, "optim.lr": 0.5}]), "^qat$")
    made = [run.folder for stage in (trunk, branch) for run in runs_of(stage)]
    for folder in made:
        shutil.copytree(tiny_run, folder)
        phases = json.loads((folder / "config.json").read_text())["train"]["phases"]
        summary = {"loss": dict.fromkeys(phases, 1.0), "device": "cpu", "jax": "0", "ptq_rules": {"control": {}}}
        summary["ptq_rules"]["control"] = {"absmax": 1.0, "search": 1.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    health = {"phase": "qat", "step": 2, "split": "health", "time": 0.0, "flip_rate": 0.5, "flipped": None}
    with open(made[1] / "metrics.jsonl", "a") as f:
        f.write(json.dumps(health | {"weight_error": 0.25}) + "\n")
    return trunk, Stage(branch.sweep, branch.judged, (f"{made[0]}:control",))


@pytest.mark.usefixtures("quick_compilation")
def test_what_is_kept_of_a_judged_branch(tiny_stages, tmp_path, monkeypatch, capsys):
    trunk, branch = tiny_stages
    asked = Study((trunk, branch), tokens=640)
    rows = [*judge(asked, trunk, False, NOTHING), *judge(asked, branch, False, NOTHING)]
    assert [(r["stage"], r["row"]) for r in rows] == [
        ("t", "control"), ("t", "control/q2_0/search"), ("t", "qat"), ("b", "qat")
    ]  # fmt: skip
    control, rounded, qat, other = rows
    assert {r["reference"] for r in rows} == {f"{control['run']}:control"}
    assert abs(control["kld"]) < 1e-6 < rounded["kld"]
    assert other["kld"] == pytest.approx(qat["kld"], rel=1e-5)  # the same weights in two runs
    assert other["overrides"] == {"train.seed": 0, "optim.lr": 0.5} and other["run"] != qat["run"]
    assert (control["tokens"], qat["bits_per_weight"]) == (4 * 4 * 64, 2.25)
    assert list(control["domains"]) == ["valid"] and control["bytes"] > qat["bytes"] > 0 and rounded["bytes"] is None
    assert "train.keep" not in qat["overrides"] and qat["seconds"] > 0
    assert 0 < qat["health"]["flipped"] < 1  # at its end: that run was not validated on the way
    assert control["health"] == {}
    assert other["health"] == {"flip_rate": 0.5, "flipped": None, "weight_error": 0.25, "scale_drift": None}
    monkeypatch.setattr(evaluate.Bench, "judge", lambda *_: pytest.fail("judged twice"))
    assert judge(asked, branch, False, NOTHING) == rows[3:]
    study.judge_all(asked, tmp_path / "r.json", False, NOTHING)
    assert json.loads((tmp_path / "r.json").read_text()) == rows
    (Path(other["run"]) / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        judge(asked, branch, False, NOTHING)
    old = rows[3] | {"kld": 9.0}
    study_results.write_results(tmp_path / "r.json", [rows[0] | {"kld": 9.0}, old])
    with pytest.raises(UserError, match="is not finished"):
        study.judge_all(asked, tmp_path / "r.json", False, NOTHING)
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # what was judged is kept
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING)
    *_, failed = json.loads((tmp_path / "r.json").read_text())
    assert failed["failed"].startswith("partial: qat at step 2") and failed["overrides"] == other["overrides"]
    study_results.write_results(tmp_path / "r.json", [old])
    study.judge_all(asked, tmp_path / "r.json", False, NOTHING, "/t/")
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # its folder is not looked at
    (tmp_path / "r.json").unlink()
    shutil.copy(Path(qat["run"]) / "summary.json", other["run"])
    shutil.move(control["run"], tmp_path / "away")
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["failed"] for r in found] == ["not run", "its control has no last checkpoint"]
    shutil.move(tmp_path / "away", control["run"])
    study_results.write_results(tmp_path / "r.json", [*rows[:3], old])
    for folder, reason in ((control["run"], study_results.NO_CONTROL), (other["run"], study_results.NO_CHECKPOINT)):
        shutil.move(Path(folder) / "checkpoints", tmp_path / "away")
        with pytest.raises(UserError, match=f"{other['run']}: {reason} here.*: bring it back"):
            judge(asked, branch, False, NOTHING)
        capsys.readouterr()
        study.judge_all(asked, tmp_path / "r.json", True, NOTHING)
        assert f"{other['run']}: passed over, {reason}" in capsys.readouterr().out
        assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]
        shutil.move(tmp_path / "away", Path(folder) / "checkpoints")
    shorter = [
        copy.deepcopy(r)
        | {key: re.sub(r"/[^/]+-(\w{10})(:|$)", r"/label-\1\2", r[key]) for key in ("run", "reference")}
        for r in [*rows[:3], old]
    ]
    assert all("/label-" in r["run"] and "/label-" in r["reference"] for r in shorter)
    del shorter[0]["overrides"]["train.seed"]  # its default
    study_results.write_results(
        tmp_path / "r.json", [failed | {"failed": "not run"}, *shorter, shorter[3] | {"run": "x/y-" + old["run"][-10:]}]
    )
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/t/")
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # known by digits, each run once
    before = failed | {"failed": "its loss is not finite", "run": "runs/b/label-" + failed["run"][-10:]}
    study_results.write_results(tmp_path / "r.json", [*rows[:3], failed | {"failed": "not run"}, before])
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/t/")
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], before | {"run": failed["run"]}]
    study_results.write_results(tmp_path / "r.json", [*rows[:3], old | {"run": "runs/b/label-0123456789"}])
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/t/")
    assert "1 runs that the study no longer has are left out: runs/b/label-0123456789" in capsys.readouterr().out
    *_, other_config = json.loads((tmp_path / "r.json").read_text())
    assert other_config["failed"] == "not run"  # the same settings of another config file
    summary = Path(control["run"]) / "summary.json"
    text = summary.read_text()
    summary.unlink()
    study_results.write_results(tmp_path / "r.json", [*rows[:3], old])
    shutil.move(Path(control["run"]) / "checkpoints", tmp_path / "away")
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/b/")
    assert f"{other['run']}: passed over, {study_results.UNFINISHED_CONTROL}" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # its control is trained again
    shutil.move(tmp_path / "away", Path(control["run"]) / "checkpoints")
    summary.write_text(text)
    study.judge_all(Study((trunk,), tokens=640), tmp_path / "r.json", True, NOTHING)
    assert f"1 runs that the study no longer has are left out: {other['run']}" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text()) == rows[:3]
    group = study_tables.select([*rows[:3], failed], "x", "b")
    assert group == (f"x (seed 0: {failed['failed']})", [])
    assert group.label in study_tables.table([group], [], rows)
    several = [*rows[:3], failed, failed | {"seed": 1}, failed | {"seed": 2, "failed": "not run"}]
    both = study_tables.select(several, "x", "b")
    assert both.label == f"x (seed 0 1: {failed['failed']}) (seed 2: not run)"
    longer = Stage(branch.sweep, branch.judged, (branch.references[0].replace(":control", ":trunk"),))
    with pytest.raises(UserError, match="qat was trained on 1,024 tokens and .*:trunk on 512: give both"):
        judge(asked, longer, False, NOTHING)


@pytest.mark.usefixtures("quick_compilation")
def test_a_branch_of_a_trunk_that_was_trained_again_is_not_compared_with_it(tiny_stages, tmp_path, capsys):
    """Its row stays, which was judged beside the control of before."""
    trunk, branch = tiny_stages
    points = [branch.sweep.points[0] | {"init_from": str(runs_of(trunk)[0].folder)}]
    began = dataclasses.replace(branch, sweep=dataclasses.replace(branch.sweep, points=points))
    (run,) = runs_of(began)
    shutil.move(runs_of(branch)[0].folder, run.folder)
    asked = Study((trunk, began), tokens=640)
    study.judge_all(asked, tmp_path / "r.json", False, NOTHING)
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [r["row"] for r in rows] == ["control", "control/q2_0/search", "qat", "qat"]
    with Checkpoints(run.folder, "trunk") as checkpoints:
        step = checkpoints.latest()
        meta = checkpoints.meta(step)
        arrays = checkpoints.read(meta, list(meta["tensors"]))
        arrays["params/model/norm"][0] *= 1.5
        shutil.rmtree(checkpoints.path(step))
        checkpoints.save(step, arrays, {}, {}, final=True, wait=True)
    with pytest.raises(UserError, match=f"{run.folder}: the trunk that it began with was trained again: delete it"):
        judge(asked, began, False, NOTHING)
    capsys.readouterr()
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING)
    assert f"{run.folder}: passed over, the trunk that it began with was trained again" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text()) == rows
    largest = max(checkpoints.path(step).rglob("*"), key=lambda f: f.stat().st_size * f.is_file())
    largest.write_bytes(b"")
    assert [r["row"] for r in judge(asked, began, False, NOTHING)] == ["qat"]  # nothing is known of it then
    shutil.rmtree(run.folder / "checkpoints" / "trunk")
    assert [r["row"] for r in judge(asked, began, False, NOTHING)] == ["qat"]


def test_rows_beside_another_training_of_a_control_are_left_out(tmp_path, capsys):
    """Where a trunk is trained again, and where a branch of such a one is judged; not for the noise of an audit."""
    file = tmp_path / "r.json"

    def of(stage, run, loss, above=0.0, trunk="runs/t0"):
        name = "qat" if stage == "b" else "control"
        return row(stage, name, 0, loss, run=run, reference=f"{trunk}:control", loss_above=above)

    control, other_control = of("t", "runs/t0", 4.0), of("t", "runs/t1", 4.5, trunk="runs/t1")
    first, second = of("b", "runs/b0", 4.1, 0.1), of("b", "runs/b1", 4.2, 0.2)
    other = of("b", "runs/b2", 4.6, 0.1, trunk="runs/t1")
    before = [control, other_control, first, second, other]
    every = {(r["stage"], r["run"]): {key: r[key] for key in study_results.IDENTITY} for r in before}
    gone = study_results.OTHER_CONTROL

    def entered(*entries):
        study_results.write_results(file, before)
        for new in entries:
            study_results.enter(file, every, (new["stage"], new["run"]), [new])
        assert ("the loss of a control is another one now" in capsys.readouterr().out) == (gone in file.read_text())
        return [r.get("failed", r.get("loss")) for r in json.loads(file.read_text())]

    assert entered(control | {"loss": 4.02}) == [4.02, 4.5, gone, gone, 4.6]
    assert entered(first | {"loss": 4.12}) == [gone, 4.5, 4.12, gone, 4.6]  # beside a control of 4.02
    assert entered(first | {"loss": 4.12, "loss_above": 0.12001}) == [4.0, 4.5, 4.12, 4.2, 4.6]
    assert entered(control | {"loss": 4.00001}) == [4.00001, 4.5, 4.1, 4.2, 4.6]
    under_way = every["t", "runs/t0"] | {"failed": "trunk at step 5"}
    assert entered(under_way, control | {"loss": 4.02}) == [4.02, 4.5, gone, gone, 4.6]
    assert entered(under_way, control) == [4.0, 4.5, 4.1, 4.2, 4.6]
    before[0] = control | {"loss": 4.02}  # a merged file: the branches are of the other training
    assert entered(control) == [4.0, 4.5, 4.1, 4.2, 4.6]
    assert study_tables.select([before[0], first], "x", "b") == (f"x (seed 0: {gone})", [])
    before[0], unknown = control, first | {"loss_above": None}  # the control's loss was not finite where it was judged
    assert entered(unknown) == [4.0, 4.5, 4.1, 4.2, 4.6]
    before[2] = unknown
    assert entered(control | {"loss": 4.02}) == [4.02, 4.5, 4.1, gone, 4.6]


# ---- Figures over seeds ----------------------------------------------------------------------------------------------


ROWS = [
    *(row("t", "control", seed, loss, format="f32", health={}) for seed, loss in enumerate((4.0, 3.9))),
    *(row("t", "control/q2_0/search", seed, loss, rule="search") for seed, loss in enumerate((4.2, 4.2))),
    *(row("t", "qat", seed, loss) for seed, loss in enumerate((4.1, 3.96))),
    *(row("r", "qat", 0, loss, overrides={"optim.lr": lr}) for lr, loss in ((0.1, 5.0), (0.2, 6.0))),
]


def test_differences_are_to_the_control_of_the_same_seed():
    qat, ptq = (study_tables.select(ROWS, "x", "t", row=name) for name in ("qat", "control/q2_0/search"))
    assert study_tables.above_control(qat, ROWS) == pytest.approx([0.1, 0.06])
    assert study_tables.recovered(qat, [ptq], ROWS) == pytest.approx([0.5, 0.8])
    worse = Group("worse", [r | {"loss": 9.0} for r in ptq.rows])
    assert study_tables.recovered(qat, [worse, ptq], ROWS) == pytest.approx([0.5, 0.8])  # the best rounding counts


def test_selecting_by_overrides():
    assert study_tables.select(ROWS, "x", "r", **{"optim.lr": 0.2}).rows[0]["loss"] == 6.0
    with pytest.raises(UserError, match="more than one row of a seed 'qat' of r"):
        study_tables.select(ROWS, "x", "r")
    with pytest.raises(UserError, match=r"no row 'qat' of r with {'optim.lr': 0.3}"):
        study_tables.select(ROWS, "x", "r", **{"optim.lr": 0.3})


def test_means_and_standard_errors():
    assert study_tables.mean_se([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(study_tables.mean_se([5.0])[1])
    assert study_tables.with_se([1.0, 2.0, 3.0], ".2f") == "2.00 ±0.58"
    assert study_tables.with_se([1.0]) == "1.0000"


def test_the_table():
    control, ptq, qat = (
        study_tables.select(ROWS, name, "t", row=name) for name in ("control", "control/q2_0/search", "qat")
    )
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in
             study_tables.table([control, ptq, qat], [ptq], ROWS).splitlines()]  # fmt: skip
    found = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    assert [f["above control"] for f in found] == ["", "0.2500 ±0.0500", "0.0800 ±0.0200"]
    assert [f["recovered"] for f in found] == ["", "", "65 ±15 %"]
    assert [f["codes changed %"] for f in found] == ["", "25.0 ±0.0", "25.0 ±0.0"]
    assert [f["minutes"] for f in found] == ["2.0", "", "2.0"]
    assert found[2] | {"config": "c", "seeds": "0 1", "bits": "2.25", "tokens": "1,000"} == found[2]


def test_roundings_are_found_and_ordered():
    usual = {"rule": "imatrix", "bits_per_weight": 2.0625, "joined_rows": 4}
    more = [row("t", "control/IQ2_XXS/imatrix", seed, 4.1, **usual) for seed in (0, 1)]
    found = study_tables.roundings([*ROWS, *more], "t", "^control/(q2_0|IQ2)")
    assert [g.label for g in found] == ["PTQ: IQ2_XXS, imatrix †4", "PTQ: q2_0, search"]


# ---- The command -----------------------------------------------------------------------------------------------------

FILE = """
from launch.study import *
from launch.points import Sweep
def get_study(scale, corpus):
    return Study([Stage(Sweep("s" + scale, "configs/toy.py", [{"train.seed": 3}]))])
def report(results):
    figure = Figure()
    return Report({"t": str(sorted(results))}, figure)
"""


def test_gpus_are_shared_in_pieces_by_the_audits_alone(tmp_path, monkeypatch):
    """The runs, which inherit the environment, have them for themselves."""
    (tmp_path / "study.py").write_text(FILE)
    name, found = "XLA_PYTHON_CLIENT_PREALLOCATE", []
    monkeypatch.setenv(name, "")  # so that it is as before afterwards
    monkeypatch.delenv(name)
    monkeypatch.setattr(study, "train", lambda *_: found.append(study.os.environ.get(name)) or 0)
    monkeypatch.setattr(study, "judge_all", lambda *_: found.append(study.os.environ.get(name)))
    assert study.main([str(tmp_path / "study.py")]) == 2  # there is nothing to report on
    assert found == [None, "false"]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "study.py"
    assert study.main([str(file)]) == 2
    file.write_text("def get_study(): pass")
    assert study.main([str(file)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].endswith("no such file") and "has no report()" in err[1]
    file.write_text(FILE)
    assert study.main([str(file), "--dry_run", "--scale", "big"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "1 runs, 15,360 tokens"
    assert "missing" in out and "--config.train.seed=3" in out and not Path("runs/sbig").exists()
    assert study.main([str(file), "--report"]) == 2
    assert "has no results yet" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("[")
    assert study.main([str(file), "--report"]) == 2
    assert study.main([str(file), "--dir", "x"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "a.json is not JSON" in err[0] and "--dir x: the runs of a study lie under runs/" in err[1]
    for only, more, message in (
        ("(", [], "--only (: not a regular expression"),
        ("nowhere", [], "--only nowhere: found in no run's folder"),
        ("small", ["--backend", "slurm"], "--only small: belongs to the local backend"),
        ("", ["--slots", "0"], "--slots 0: at least 1"),
        ("", ["--backend", "slurm", "--option", "typo=1"], "--option typo=1: no such option"),
    ):
        assert study.main([str(file), "--dry_run", "--only", only, *more]) == 2
        out, err = capsys.readouterr()
        assert message in err and not out
    assert study.main([str(file), "--dry_run", "--only", "ssmall/"]) == 0
    assert "1 runs" in capsys.readouterr().out
    (tmp_path / "broken.py").write_text("def get_study(a, b): 1 / 0\ndef report(r): pass\n")
    assert study.main([str(tmp_path / "broken.py")]) == 2
    (tmp_path / "broken.py").write_text("def (")
    assert study.main([str(tmp_path / "broken.py")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: division by zero" in err[0] and "SyntaxError" in err[1]
    for name in ("a", "b"):
        study_results.write_results(tmp_path / f"{name}.json", [])
    (tmp_path / "README.md").write_text("<!-- t: x -->\nold\n<!-- end -->\n")
    assert study.main([str(file), "--report"]) == 0
    assert "['a', 'b']" in (tmp_path / "README.md").read_text() and (tmp_path / "figure.png").stat().st_size > 1000
