"""Sweeps as data: their algebra, the names of runs, how far they are, and mistakes."""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from launch import options, points, slurm, sweep
from launch.algebra import chain, product, values, zip_
from launch.cloud import JobSetOptions, SkyOptions
from launch.points import Sweep
from qatmoe import cli
from qatmoe.config import to_json
from qatmoe.errors import UserError
from qatmoe.workdir import open_workdir

TOY = str(ROOT / "configs" / "toy.py")
FILE = """
from launch.algebra import *
from launch.points import Sweep
def get_sweep():
    return Sweep(name={name!r}, config={config!r}, points={points})
"""


def runs_of(of, folder, name="s"):
    return points.runs_of(Sweep(name, TOY, of), folder)


def names(of, folder):
    return {run.name for run in runs_of(of, folder)}


# ---- The algebra -----------------------------------------------------------------------------------------------------


def test_algebra():
    a, b = values("a", [1, 2]), values("b", [3, 4])
    assert product(a, b) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert zip_(a, b) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert chain(a, b) == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}]
    assert product(chain(zip_(a, b), values("c", [0])), values("d", [7])) == [
        {"a": 1, "b": 3, "d": 7},
        {"a": 2, "b": 4, "d": 7},
        {"c": 0, "d": 7},
    ]
    assert product() == [{}]
    assert (a, b) == (values("a", [1, 2]), values("b", [3, 4]))  # nothing was changed


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (lambda: zip_(values("a", [1]), values("b", [1, 2])), "zip_ of unequal lengths: a has 1, b has 2"),
        (lambda: values("a", []), r"values\('a', \[\]\): a sweep over no values"),
        (lambda: product(values("a", [1]), values("a", [2])), "product: a is in two factors"),
        (lambda: zip_(values("a", [1]), values("a", [2])), "zip_: a is in two factors"),
    ],
)
def test_mistakes_in_the_algebra(expression, message):
    with pytest.raises(UserError, match=message):
        expression()


# ---- Names -----------------------------------------------------------------------------------------------------------

GRID = product(values("optim.lr", [0.01, 1e-4]), values("quant.experts", ["q2_0", "mxfp4"]))


def test_names_are_these(tmp_path):
    """A change here gives every sweep that is under way new names: its runs would be trained again."""
    assert names(GRID, tmp_path) == {
        "lr=0.01,experts=q2_0-d0ed31e964",
        "lr=0.01,experts=mxfp4-d963bf6a4f",
        "lr=0.0001,experts=q2_0-3bfe148f6f",
        "lr=0.0001,experts=mxfp4-cbb4e623ad",
    }


def test_order_does_not_change_names(tmp_path):
    other = product(values("quant.experts", ["mxfp4", "q2_0"]), values("optim.lr", [1e-4, 0.01]))
    assert names(other[::-1], tmp_path) == names(GRID, tmp_path)


def test_what_does_not_vary_is_not_in_the_name_but_in_the_digits(tmp_path):
    (one,) = names([{"optim.lr": 0.01, "train.seed": 3}], tmp_path)
    (other,) = names([{"optim.lr": 0.01, "train.seed": 4}], tmp_path)
    assert one.startswith("run-")
    assert one != other


def test_where_data_is_cached_does_not_change_names_unless_it_varies(tmp_path):
    seeds = values("train.seed", [0, 1])
    assert names(product(seeds, values("data.cache_dir", ["/x"])), tmp_path) == names(seeds, tmp_path)
    assert len(names(values("train.profile_step", [0, 1]), tmp_path)) == 2


def test_keys_with_one_last_part_are_told_apart(tmp_path):
    phases = ("train.phases.control.lr", "train.phases.qat.lr")
    (name, *_) = runs_of(product(*(values(key, [0.001, 0.002]) for key in phases)), tmp_path)
    assert name.name.startswith("control.lr=0.001,qat.lr=0.001-")


def test_values_become_parts_of_file_names(tmp_path):
    (run, _) = runs_of(values("data.source", ["../a text/*.txt", "x"]), tmp_path)
    assert run.name.startswith("source=.._a_text_.txt-")
    (run, _) = runs_of(values("data.source", ["long/" * 100, "x"]), tmp_path)
    assert len(run.name) < 200


def test_digits_hold_those_of_the_run_that_it_starts_from_and_not_its_name(tmp_path):
    def digits(start, teacher="runs/a/x-0123456789:control"):
        point = {"init_from": start, "train.phases.qat.distill": 0.5, "train.phases.qat.teacher": teacher}
        return runs_of([point], tmp_path)[0].name[-10:]

    one = digits("runs/a/lr=1-abcdef0123:trunk@20")
    assert digits("runs/a/lr=1,seed=0-abcdef0123:trunk@20") == one
    assert digits("runs/a/lr=1-abcdef0123:trunk@20", "runs/a/y-0123456789:control") == one
    starts = ["runs/a/lr=1-abcdef0124:trunk@20", "runs/b/lr=1-abcdef0123:trunk@20", "runs/a/lr=1-abcdef0123:trunk@30"]
    other_teacher = digits("runs/a/lr=1-abcdef0123:trunk@20", "runs/a/x-0123456780:control")
    assert len({one, *map(digits, starts), other_teacher}) == 5


def test_a_run_keeps_its_name_when_more_keys_vary(tmp_path):
    (first, _) = runs_of(values("train.seed", [0, 1]), tmp_path)
    first.folder.mkdir()
    grown = runs_of(product(values("train.seed", [0, 1]), values("optim.lr", [0.002, 0.003])), tmp_path)
    assert first.name in {run.name for run in grown}  # 0.002 is the default
    assert any("lr=0.003" in run.name for run in grown)


def test_a_run_keeps_its_name_whatever_of_it_is_saved(tmp_path):
    seeds = values("train.seed", [0, 1])
    one, _ = runs_of(seeds, tmp_path)
    other, last = runs_of(product(seeds, [{"train.phases.trunk.save_at": [1, 2]}]), tmp_path)
    assert one.name == other.name != last.name and other.config.train.phases["trunk"].save_at == (1, 2)
    leave(one)
    assert points.state(other).kind == "partial"  # and not another run's folder


def test_a_run_keeps_its_name_when_a_key_that_did_not_count_begins_to_vary(tmp_path):
    """Of the points that have its digits without that key, the one with its value is that run."""

    def grown(points):
        return {
            (p["data.prefetch"], p.get("train.keep")): run.name
            for p, run in zip(points, runs_of(points, tmp_path), strict=True)
        }

    (first,) = runs_of([{"data.prefetch": 4, "train.seed": 1}], tmp_path)
    leave(first)
    wider = product(values("data.prefetch", [8, 4]), [{"train.seed": 1}])
    names = grown(wider)
    assert names[4, None] == first.name and names[8, None].startswith("prefetch=8-")
    leave(runs_of(wider, tmp_path)[0])
    assert grown(wider) == names
    widest = grown(product(wider, values("train.keep", [2, 3])))
    assert len(set(widest.values())) == 4 and set(names.values()) < set(widest.values())
    # Under the digits themselves lies the run of the default, whatever it was started with.
    names = [run.name for run in runs_of([{"train.seed": 1}, {"data.prefetch": 4, "train.seed": 1}], tmp_path)]
    assert names[0] == first.name and names[1].startswith("prefetch=4-")


def test_a_run_keeps_its_name_when_a_key_that_did_not_count_no_longer_varies(tmp_path):
    kept, _ = runs_of(product(values("data.prefetch", [8, 4]), [{"train.seed": 1}]), tmp_path)
    leave(kept)
    damaged = tmp_path / f"other-{'0' * points.DIGITS}"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    (run,) = runs_of([{"data.prefetch": 8, "train.seed": 1}], tmp_path)
    assert run.name == kept.name


def test_the_command_is_the_resolved_run(tmp_path):
    of = [
        {
            "quant.experts": "mxfp4",
            "optim.betas": [0.8, 0.9],
            "optim.lr": 1e-05,
            "train.tensorboard": False,
            "train.phases.qat.steps": 17,
            "train.phases.trunk.save_at": (3,),
            "data.source": "a b,c=d/*.txt",
            "optim.clip": 2,
        }
    ]
    (run,) = runs_of(of, tmp_path)
    words = shlex.split(shlex.join(run.command))[3:]
    cfg, given = cli.parse(["x", *words], "", {"workdir": ""})
    assert cfg == run.config
    assert given["workdir"] == str(tmp_path / run.name)
    assert cfg.name == f"s/{run.name}"


@pytest.mark.parametrize("returned", ["config", "config.to_dict()"])
def test_a_config_file_is_to_a_sweep_what_it_is_to_its_runs(returned, tmp_path):
    """Also where two keys are one number, and where it leaves keys of a phase out."""
    (tmp_path / "c.py").write_text(
        "from ml_collections import FieldReference\nfrom qatmoe.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.expert_dim = config.model.dim = FieldReference(64)\n"
        "    config.train.phases = {'trunk': {'steps': 5}}\n"
        f"    return {returned}\n"
    )
    point = {"model.dim": 128, "train.phases.trunk.warmup": 1}
    (run,) = points.runs_of(Sweep("s", str(tmp_path / "c.py"), [point]), tmp_path)
    assert cli.parse(["x", *run.arguments("w")], "", {"workdir": ""})[0] == run.config
    assert run.config.model.expert_dim == (128 if returned == "config" else 64)
    assert run.config.train.phases["trunk"].warmup == 1


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (
            [{"quant.expert": "q2_0"}],
            r"point 1 \(quant.expert='q2_0'\): config.quant.expert: no such key; did you mean config.quant.experts\?",
        ),
        ([{"optim": 3}], "optim: a group of keys; name one, as optim\\."),
        ([{"train.phases.tunk.steps": 3}], "there is no phase 'tunk'; the file has control, qat, trunk"),
        ([{"optim.lr": 10**400}], "config.optim.lr: a number of 401 digits is too large"),
        ([{}, {"optim.lr": "fast"}], r"point 2 \(optim.lr='fast'\): config.optim.lr='fast': expected float, got str"),
        ([{"model.n_kv_heads": 3}], "n_kv_heads=3 must divide"),
        ([{"model.dim": 48}], r"point 1 \(model.dim=48\): .*block"),
        ([{"optim.lr": 0.002}, {}], r"point 2 \(\): the same run as point 1 \(optim.lr=0.002\)"),
        ([{"name": "x"}], "runs are named by the sweep"),
    ],
)
def test_a_wrong_point_is_named(of, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        runs_of(of, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("def get_sweep(:\n", "SyntaxError"),
        ("x = 1", r"has no get_sweep\(\)"),
        ("def get_sweep():\n    return {}['nothing']", "KeyError: 'nothing'"),
        ("def get_sweep():\n    return []", "returns a list; return a launch.points.Sweep"),
        (FILE.format(name="a b", config=TOY, points=[{}]), "name='a b': letters, digits"),
        (FILE.format(name=3, config=TOY, points=[{}]), "name=3: letters, digits"),
        (
            "from pathlib import *\n" + FILE.format(name="a", config=Path(TOY), points=[{}]),
            "give the file's path as text",
        ),
        (FILE.format(name="a", config=TOY, points=[]), "has no points"),
        (FILE.format(name="a", config=TOY, points="[{}, ('train.seed', 1)]"), "point 2 is no dict"),
        (FILE.format(name="a", config=TOY, points=[{1: 2}]), "point 1 is no dict of values under names"),
        (FILE.format(name="a", config=TOY, points={"train.seed": 1}), "points is a dict: make it a list"),
        (
            FILE.format(name="a", config="nowhere.py", points=[{}]),
            "sweep's config nowhere.py: no such file",
        ),
        (FILE.format(name="a", config=TOY, points="zip_(values('a', [1]), values('b', []))"), "over no values"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "sweep.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        points.runs_of(points.load(file), tmp_path)
    assert "\n" not in str(error.value)
    assert sweep.main([str(file), f"--dir={tmp_path / 'd'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "d").exists()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(FILE.format(name="mine", config=TOY, points="values('train.seed', [0, 1])"))
    return path


def test_a_folder_of_another_sweep_is_refused(file, tmp_path, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "notes").write_text("")
    assert sweep.main([str(file), f"--dir={folder}"]) == 2
    assert "is not empty and holds no sweep: choose another --dir" in capsys.readouterr().err
    (folder / "sweep.json").write_text(json.dumps({"name": "other", "config": TOY, "runs": []}))
    assert sweep.main([str(file), f"--dir={folder}", "--dry_run"]) == 2
    assert "belongs to sweep 'other', not 'mine'" in capsys.readouterr().err
    (folder / "sweep.json").write_text(json.dumps({"name": "mine", "config": "configs/other.py", "runs": []}))
    assert sweep.main([str(file), f"--dir={folder}", "--dry_run"]) == 2
    assert f"belongs to a sweep of configs/other.py, not {TOY}: choose another name" in capsys.readouterr().err
    asked = {"name": "mine", "config": TOY}
    runs = [3, [3], {"name": "a"}, [{"name": 3, "overrides": {}}], [{"name": "a", "overrides": []}]]
    for damaged in (
        "{",
        "[]",
        json.dumps(asked | {"config": 3, "runs": []}),
        *(json.dumps(asked | {"runs": r}) for r in runs),
    ):
        (folder / "sweep.json").write_text(damaged)
        assert sweep.main([str(file), f"--dir={folder}"]) == 2
        assert "sweep.json is damaged: remove it" in capsys.readouterr().err
    assert sweep.main([str(file), f"--dir={file}"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_folder_in_which_no_run_could_save_is_refused_before_it_is_made(file, tmp_path, capsys):
    for dry_run in ([], ["--dry_run"]):
        assert sweep.main([str(file), f"--dir={tmp_path / 'a*b'}", *dry_run]) == 2
        out, err = capsys.readouterr()
        assert "a*b': checkpoints cannot be written below a folder with '*' in its name" in err and not out
    assert not (tmp_path / "a*b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots=0"], "--slots 0: at least 1"),
        (["--restarts=-1"], "--restarts -1: must be at least 0"),
        (["--backend=slurm", "--slots=2"], "--slots 2: belongs to the local backend; give --option parallel=N"),
        (["--backend=slurm", "--restarts=2"], "--restarts 2: belongs to the local backend; slurm has nothing like it"),
        (["--backend=jobset", "--slots=2"], "--slots 2: belongs to the local backend; jobset has nothing like it"),
        (["--backend=skypilot", "--restarts=2"], "belongs to the local backend; give --option restarts=N"),
        (["--option=x=1"], "--option x=1: the local backend has none"),
        (["--backend=slurm", "--option=node=2"], "--option node=2: no such option; did you mean nodes?"),
        (["--backend=slurm", "--option=nodes=two"], "--option nodes=two: expected int"),
        (["--backend=slurm", "--option=nodes"], "--option nodes: expected key=value"),
        (["--backend=skypilot", "--option=bucket=gs://b"], "this backend needs --option accelerators="),
        (["--backend=skypilot", "--option=accelerators="], "--option accelerators=: must not be empty"),
        (["--backend=skypilot", "--option=nodes=0"], "--option nodes=0: must be at least 1"),
        (["--backend=skypilot", "--option=restarts=-3"], "--option restarts=-3: must be at least 0"),
        (["--backend=jobset", "--option=image= "], "--option image= : must not be empty"),
        (["--backend=jobset", "--option=accelerator="], "--option accelerator=: must not be empty"),
        (["--backend=jobset", "--option=slices=0"], "--option slices=0: must be at least 1"),
        (["--backend=jobset", "--option=chips=0"], "--option chips=0: must be at least 1"),
        (["--backend=slurm", "--option=minutes=-5"], "--option minutes=-5: must be at least 1"),
        (["--backend=slurm", "--option=minutes=3"], "--option save_s=180: must be less than the 180 s of minutes=3"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(options, message, file, tmp_path, capsys):
    for dry_run in ([], ["--dry_run"]):
        assert sweep.main([str(file), f"--dir={tmp_path / 'd'}", *options, *dry_run]) == 2
        out, err = capsys.readouterr()
        assert message in err and not out
    assert not (tmp_path / "d").exists()


def test_a_dry_run_with_the_options_of_a_backend_writes_nothing(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file.write_text(file.read_text().replace(TOY, "configs/toy.py"))
    for given in (
        ["--slots=2"],
        ["--backend=skypilot", "--option=accelerators=H100:8", "--option=bucket=gs://b"],
        ["--backend=jobset", "--option=image=i", "--option=claim=c"],
        ["--backend=slurm", "--option=minutes=60"],  # also where there is no Slurm
    ):
        assert sweep.main([str(file), f"--dir={tmp_path / 'd'}", *given, "--dry_run"]) == 0
        assert capsys.readouterr().out.count("missing") == 2
        assert not (tmp_path / "d").exists()


def test_all_numbers_among_options_have_a_range_and_defaults_are_allowed():
    for cls, needed in (
        (slurm.Options, []),
        (SkyOptions, ["accelerators=a", "bucket=b"]),
        (JobSetOptions, ["image=i", "claim=c"]),
    ):
        numbers = [f for f in dataclasses.fields(cls) if f.type is int]
        assert numbers
        defaults = [f"{f.name}={f.default}" for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
        assert options.read(cls, [*needed, *defaults]) == options.read(cls, needed)
        for field in numbers:
            with pytest.raises(UserError, match=f"--option {field.name}=-1: must be at least [01]"):
                options.read(cls, [*needed, f"{field.name}=-1"])


# ---- How far runs are ------------------------------------------------------------------------------------------------


def leave(run, *, steps=0, losses=None, rules=("absmax", "search")):
    """What a run of the toy that came so far leaves in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(to_json(run.config))
    lines = [{"phase": "qat", "step": n, "split": "train", "time": 0.0} for n in range(1, steps + 1)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if losses:
        summary = {
            "loss": losses,
            "ptq_rules": {"control": dict.fromkeys(rules, 4.0)},
            "recovered": 0.5,
            "bits_per_weight": {"quantized": 2.25},
            "tokens": {"total": 1000},
            "wall_s": 12.0,
        }
        (run.folder / "summary.json").write_text(json.dumps(summary))


LOSSES = {"trunk": 4.2, "control": 4.0, "qat": 4.1, "ptq": 4.3}


def test_states_and_dry_run(file, tmp_path, capsys):
    folder = tmp_path / "d"
    first, second = runs_of(values("train.seed", [0, 1]), folder, "mine")
    assert points.state(first).text == "missing"
    assert sweep.main([str(file), f"--dir={folder}", "--dry_run"]) == 0
    assert capsys.readouterr().out.count("missing") == 2
    assert not folder.exists()

    leave(first)
    assert points.state(first) == points.State("partial", "started")
    leave(first, steps=3)
    assert points.state(first) == points.State("partial", "partial: qat at step 3 of 20")
    leave(first, steps=20, losses=LOSSES | {"qat": None})  # a report that was asked for in the middle
    assert points.state(first).kind == "partial"
    leave(first, steps=20, losses=LOSSES, rules=["absmax"])
    assert points.state(first).kind == "partial"
    leave(first, steps=20, losses=LOSSES)
    assert points.state(first).kind == "done"
    leave(second, steps=2)
    (folder / "sweep.json").write_text(json.dumps({"name": "mine", "config": TOY, "runs": []}))
    assert sweep.main([str(file), f"--dir={folder}", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{first.name}  done"
    assert lines[1].strip() == "train.seed=0"
    assert shlex.split(lines[2]) == ["python", *first.command[1:]]
    assert lines[3] == f"{second.name}  partial: qat at step 2 of 20"


def test_a_run_that_another_process_trains_is_left_alone(file, tmp_path, capsys):
    folder = tmp_path / "d"
    first, second = runs_of(values("train.seed", [0, 1]), folder, "mine")
    leave(first, steps=3)
    leave(second, steps=20, losses=LOSSES)
    (folder / "sweep.json").write_text(json.dumps({"name": "mine", "config": TOY, "runs": []}))
    with open_workdir(first.folder, to_json(first.config)):
        assert points.state(first) == points.State("running", f"running (process {os.getpid()})")
        assert sweep.main([str(file), f"--dir={folder}"]) == 0
    assert "nothing to start" in capsys.readouterr().out
    assert points.state(first).kind == "partial"


def test_a_folder_with_another_run_is_not_that_run(tmp_path):
    first, second = runs_of(values("train.seed", [0, 1]), tmp_path)
    leave(dataclasses.replace(first, config=second.config), losses=LOSSES)
    with pytest.raises(UserError, match="holds a run with name="):
        points.state(first)
    leave(dataclasses.replace(first, config=dataclasses.replace(second.config, name=first.config.name)))
    with pytest.raises(UserError, match="holds a run with train.seed=1, and the sweep asks for 0"):
        points.state(first)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"train": 3, "loss": 3}', '{"train": {"phases": {"qat": 3}}, "loss": {}}']
)
def test_a_damaged_file_of_a_run_is_named(text, tmp_path):
    (run, _) = runs_of(values("train.seed", [0, 1]), tmp_path / "d", "mine")
    for name, fix in (("summary.json", "make it again: python -m qatmoe.report"), ("config.json", "restore it")):
        leave(run, losses=LOSSES)
        (run.folder / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is damaged: {fix}"):
            points.state_of(run.folder)


def test_the_sweeps_that_are_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "launch" / "sweeps").glob("[a-z]*.py")):
        found = points.load(path)
        assert found.name == path.stem
        assert len(points.runs_of(found, tmp_path)) == len(found.points)
