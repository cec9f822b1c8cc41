"""The table and the plot of a sweep."""

import csv
import json

import pytest
from conftest import ROOT
from test_sweep import LOSSES, leave

from launch import collect, points
from launch.algebra import chain, product, values
from launch.points import Sweep

POINTS = chain(
    product(values("optim.lr", [0.01, 1e-4]), values("train.seed", [0, 1])),
    values("optim.weight_decay", [0.5]),
)


@pytest.fixture
def runs(tmp_path):
    """Five runs: two are finished, one is under way, two are missing."""
    of = Sweep("s", str(ROOT / "configs" / "toy.py"), POINTS)
    runs = points.runs_of(of, tmp_path)
    points.open_folder(of, runs, tmp_path)
    leave(runs[0], steps=20, losses=LOSSES | {"extra": 3.9})
    leave(runs[1], steps=7)
    leave(runs[4], steps=20, losses=LOSSES | {"ptq": None})
    return runs


def test_table_and_missing_runs(runs, tmp_path, capsys):
    assert collect.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "2 of 5 runs are finished" in out
    assert f"partial: qat at step 7 of 20: {runs[1].name}\n" in out
    assert f"missing: {runs[2].name}\nmissing: {runs[3].name}\n" in out

    lines = (tmp_path / "results.md").read_text().splitlines()
    heading = "optim.lr | train.seed | loss_trunk | loss_control | loss_qat | loss_ptq | loss_extra | recovered | "
    heading += "bits_per_weight | tokens | wall_s | optim.weight_decay"
    assert lines[0] == f"| {heading} |"
    assert lines[2] == "| 0.01 | 0 | 4.2000 | 4.0000 | 4.1000 | 4.3000 | 3.9000 | 50.0% | 2.25 | 1,000 | 12 | - |"
    assert lines[3] == "| - | 0 | 4.2000 | 4.0000 | 4.1000 | - | - | 50.0% | 2.25 | 1,000 | 12 | 0.5 |"
    assert len(lines) == 4

    rows = json.loads((tmp_path / "results.json").read_text())
    assert [r["run"] for r in rows] == [runs[0].name, runs[4].name]
    assert rows[0]["loss_extra"] == 3.9
    with open(tmp_path / "results.csv") as f:
        table = list(csv.DictReader(f))
    assert (table[0]["optim.lr"], table[0]["loss_ptq"], table[1]["loss_ptq"]) == ("0.01", "4.3", "")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_again_when_all_are_finished(runs, tmp_path):
    for run in runs:
        leave(run, steps=20, losses=LOSSES)
    leave(runs[1], steps=20, losses=LOSSES | {"control": 4.02})
    assert collect.main([str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[7] == ""  # after five runs the means of the two pairs that differ in their seed alone
    assert lines[8].startswith("| optim.lr | seeds | loss_trunk | loss_control |") and len(lines) == 12
    assert lines[10].startswith("| 0.01 | 2 | 4.2000 ±0.0000 | 4.0100 ±0.0100 | 4.1000 ±0.0000 |")


def test_a_seed_that_the_config_gives_counts_as_one(tmp_path):
    of = Sweep("s", str(ROOT / "configs" / "toy.py"), [{}, {"train.seed": 1}, {"train.seed": 2}])
    runs = points.runs_of(of, tmp_path)
    points.open_folder(of, runs, tmp_path)
    for run in runs:
        leave(run, steps=20, losses=LOSSES)
    (mean,) = collect.over_seeds(collect.rows_of(tmp_path)[0])
    assert mean["seeds"] == 3


def test_nothing_is_finished_yet(tmp_path, capsys):
    of = Sweep("s", str(ROOT / "configs" / "toy.py"), POINTS)
    points.open_folder(of, points.runs_of(of, tmp_path), tmp_path)
    assert collect.main([str(tmp_path)]) == 1
    assert "0 of 5 runs are finished" in capsys.readouterr().out
    assert not (tmp_path / "results.csv").exists()


def test_a_folder_that_is_no_sweep(tmp_path, capsys):
    assert collect.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere holds no sweep (sweep.json: No such file or directory)" in capsys.readouterr().err


def test_a_damaged_run_is_named(runs, tmp_path, capsys):
    summary = json.loads((runs[0].folder / "summary.json").read_text())
    for damaged in ({}, summary | {"tokens": {}}, summary | {"bits_per_weight": 3}):
        (runs[0].folder / "summary.json").write_text(json.dumps(damaged))
        assert collect.main([str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{runs[0].name}/summary.json is damaged: make it again" in line


def test_branches_of_each_seeds_trunk_are_of_one_mean():
    rows = [
        {"run": f"{i}", "init_from": f"runs/t/seed={i}-abc{at}", "train.seed": i, "loss_qat": 4.0 + i}
        for at in ("", ":trunk@720", "@360")
        for i in (0, 1)
    ]
    rows = [row | {"bits_per_weight": 2.25} for row in rows]
    assert [(m["seeds"], m["loss_qat"]) for m in collect.over_seeds(rows)] == [(2, "4.5000 ±0.5000")] * 3
    twice = [row | {"init_from": f"runs/{trunk}"} for trunk in "ab" for row in rows[:2]]
    assert collect.over_seeds(twice) == []


def test_teachers_that_are_runs_of_each_seed_are_of_one_mean():
    key = "train.phases.qat.teacher"

    def means(*teachers):
        rows = [{key: t, "train.seed": seed, "loss_qat": 4.0 + seed, "bits_per_weight": 2.25} for seed, t in teachers]
        return [(m[key], m["seeds"]) for m in collect.over_seeds(rows)]

    own, wide = ([(i, f"runs/t/{name}seed={i}-01234567{i:02}:control") for i in (0, 1, 10)] for name in ("", "dim=2,"))
    assert means(*own, *wide) == [("runs/t/seed=*:control", 3), ("runs/t/dim=2,seed=*:control", 3)]
    above = [(i, ":control") for i in (0, 1, 10)]
    assert means(*own, *above, *((i, None) for i in (0, 1))) == [
        ("runs/t/seed=*:control", 3),
        (":control", 3),
        (None, 2),
    ]
    shared = [(i, own[0][1]) for i in (0, 1, 10)]
    assert means(*shared) == [(own[0][1], 3)]
    others = [(0, "runs/t/lr=1-0123456789:qat"), (1, "runs/t/lr=2-1123456789:qat"), (2, own[0][1]), (3, own[1][1])]
    assert means(*others) == []  # no seed's own: where some runs of a sweep are missing, these would be mixed
