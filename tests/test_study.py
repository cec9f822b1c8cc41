"""Studies: which runs branch from which, what is judged of them, and the figures over seeds."""

import copy
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from experiments import scales
from experiments.fp4_experts.pairs import UNTAUGHT, differences_table, formats_table, goals_table, roundings_table
from experiments.iso_memory.study import FIRST, grids_table, pairs_table, same_size_table
from experiments.resilience.laws import CONTROL, FULL_TAUGHT, exponents
from experiments.resilience.pairs import growth_table, shares_table, taught_table
from launch import points, study, study_tables, sweep
from launch.algebra import chain, values
from launch.points import Sweep
from launch.study import Stage, Study, beside, branches
from launch.study_tables import Group
from qatmoe import evaluate
from qatmoe.errors import UserError

CONFIG, BRANCH, SCRATCH = (f"configs/moe_2bit{name}.py" for name in ("", "_branch", "_scratch"))
STUDIES = sorted((ROOT / "experiments").glob("*/study.py"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def trunks():
    return Stage(Sweep("trunks", CONFIG, values("train.seed", [0, 1])), "^control$")


def runs_of(stage):
    return points.runs_of(stage.sweep, study.folder_of(stage.sweep))


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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "heldout").mkdir()
    for name in ("train-0.jsonl.xz", *(f"heldout/{name}.jsonl" for name in scales.HELDOUT)):
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.parent.name)
@pytest.mark.parametrize("scale", ["small", "h100"])
def test_the_studies_can_be_run_and_reported(file, scale, corpus):
    """Every point is a run that qatmoe.train accepts, and what a branch starts from and is compared with is trained.
    Every table and the figure can be made from what is judged."""
    functions = study.load(str(file))
    stages = functions["get_study"](scale, str(corpus) if scale == "h100" else "").stages
    trained = {str(run.folder): run.config for s in stages for run in runs_of(s)}
    kept = [f"runs/{s.sweep.name}" for s in stages]
    assert len(set(kept)) == len(kept)
    for stage in stages:
        assert len(stage.references) in (0, len(stage.sweep.points))
        for reference in stage.references:
            folder, _, phase = reference.rpartition(":")
            assert not trained[folder].train.phases[phase].quantize
        for run in runs_of(stage):
            folder, _, at = run.config.init_from.partition(":trunk@")
            if folder:
                steps, start = run.config.train.phases["trunk"].steps, trained[folder].train
                assert steps == int(at or steps) <= start.phases["trunk"].steps
                assert steps % start.checkpoint_every == 0
                assert start.phases["trunk"].steps - steps < start.checkpoint_every * start.keep
    made = functions["report"]({scale: [row for stage in stages for row in made_up(stage)]})
    page = (file.parent / "README.md").read_text()
    assert made.tables and all(f"<!-- {name}: " in page for name in made.tables)
    assert not any("nan" in table for table in made.tables.values())
    made.figure.savefig(io.BytesIO())


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.parent.name)
@pytest.mark.parametrize("seeds", [{0}, {0, 1}], ids=str)
def test_the_studies_can_be_reported_before_all_is_run(file, seeds):
    """Of the first seeds trunks and their own branches are judged, and of the last of them nothing else."""
    functions = study.load(str(file))
    stages = functions["get_study"]("small", "").stages
    rows = []
    for stage in stages:
        first = of_trunks(stage)
        for row in made_up(stage):
            done = row["seed"] in seeds and (first or row["seed"] == 0)
            hidden = {key: row[key] for key in ("stage", "config", "overrides", "seed", "run")} | {"failed": "not run"}
            rows += [row] if done else [hidden] if hidden not in rows else []
    made = functions["report"]({"small": rows})
    assert made.tables and not any("nan" in table for table in made.tables.values())
    made.figure.savefig(io.BytesIO())


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.parent.name)
def test_the_studies_can_be_reported_where_runs_failed(file):
    """Every sweep of branches in turn with all its seeds; then a trunk, and with it the control of all its branches."""
    functions = study.load(str(file))
    all_stages = functions["get_study"]("small", "").stages
    stages = [made_up(stage) for stage in all_stages]
    lost = [
        {row["run"] for row in rows} for stage, rows in zip(all_stages, stages, strict=True) if not of_trunks(stage)
    ]
    for runs in [*lost, {stages[0][-1]["run"]}]:
        rows = [
            {k: row[k] for k in ("stage", "config", "overrides", "seed", "run")} | {"failed": "diverged"}
            if row["run"] in runs
            else row
            for rows in stages
            for row in rows
        ]
        made = functions["report"]({"small": list({json.dumps(row): row for row in rows}.values())})
        shown = ("diverged", "its control failed", "as runs failed")
        assert any(word in table for table in made.tables.values() for word in shown)
        assert not any("nan" in table for table in made.tables.values())
        made.figure.savefig(io.BytesIO())


NAMES = ["trunk", "control", "qat"] + [
    f"control/{n}"
    for n in (
        "q2_0/absmax",
        "q2_0/search",
        "q2_0/gptq",
        "q4_0/search",
        "mxfp4/search",
        "IQ2_XS/imatrix",
        "IQ3_S/imatrix",
    )
]


def of_trunks(stage):
    """Whether its runs train a trunk from random weights, and a control."""
    return not any("init_from" in run.overrides for run in runs_of(stage)) and not stage.references


def made_up(stage):
    """Rows as `judge` makes them, with losses that depend on the run and the branch."""
    rows = []
    for n, run in enumerate(runs_of(stage)):
        reference = (stage.references or (f"{run.folder}:control",) * (n + 1))[n]
        for i, name in enumerate(NAMES):
            if not re.search(stage.judged, name) or name.split("/")[0] not in run.config.train.phases:
                continue
            phase = run.config.train.phases[name.split("/")[0]]
            quantized = 1_000 * run.config.model.n_experts * run.config.model.dim
            figures = {"loss": 4 + 0.01 * n + (0.1 + 1e-8 * quantized) * (i != 1), "tokens": 1000, "steps": 10}
            figures["tokens"] = sum(phase.steps for phase in run.config.train.phases.values())
            if name == "qat":
                figures["steps"] = run.config.train.phases["qat"].steps
            rows.append(
                row(stage.sweep.name, name, run.config.train.seed, figures.pop("loss"), **figures)
                | study._identity(stage, run)
                | {"reference": reference, "rule": name.partition("/")[2], "quantized": quantized, "parameters": 1}
                | {"bytes": 1000 * run.config.model.n_experts, "joined_rows": 4 if "IQ" in name else 1}
                | ({} if phase.quantize or "/" in name else {"format": "f32", "bits_per_weight": 32})
            )
    return rows


def test_the_law_finds_its_exponents():
    """Of one size and of two, where a seed shifts all gaps by a factor; and none where there is no law to find."""
    sizes = [(n, d) for n in (100, 200, 800) for d in (1000, 4000)]
    controls = [row("t", "control", seed, 4.0, run=f"r{n}-{d}-{seed}") for n, d in sizes for seed in (0, 1, 2)]
    groups = [
        Group(f"{n} {d}", [
            row("t", "qat", seed, 4 + (1 + 0.1 * seed) * n**-0.5 * (d / 1000) ** 0.25, quantized=n, tokens=d,
                reference=f"r{n}-{d}-{seed}:control")
            for seed in (0, 1, 2)
        ])
        for n, d in sizes
    ]  # fmt: skip
    one_text = groups[::2]
    np.testing.assert_allclose(exponents(one_text, controls, "quantized"), [[-0.5]] * 3, rtol=1e-9)
    np.testing.assert_allclose(exponents(groups, controls, "quantized", "tokens"), [[-0.5, 0.25]] * 3, rtol=1e-9)
    assert exponents(one_text, controls, "quantized", "tokens") == []
    assert exponents(groups[:1], controls, "quantized") == []
    groups[0].rows[0]["loss"] = 3.9
    assert exponents(groups, controls, "quantized") == []


def test_gaps_are_held_against_each_other_seed_by_seed():
    """Shares, differences where text grows as parameters do, and a teacher's; a size without rows has empty cells."""
    sizes = ((100, 1000), (400, 2000), (400, 4000))
    controls = [row("t", "control", seed, 4.0, run=f"r{n}-{d}-{seed}") for n, d in sizes for seed in (0, 1)]

    def groups(*gaps):
        return [
            Group(f"{n}-{d}", [
                row("t", "x", seed, 4 + gap, quantized=n, tokens=d, reference=f"r{n}-{d}-{seed}:control")
                for seed, gap in enumerate(of_size)
            ])
            for (n, d), of_size in zip(sizes, gaps, strict=True)
        ]  # fmt: skip

    none = (0.0, 0.0)
    cells = {CONTROL: groups(none, none, none), "PTQ": groups((0.2, 0.3), none, (0.4, 0.7))}
    cells["QAT"] = groups((0.05, 0.06), (), (0.1, 0.1))
    shares = shares_table(cells, controls, ("QAT", "PTQ")).splitlines()
    half = 2.5 * 12.706  # of two seeds: Student's factor times half of their difference
    assert shares[2:] == [f"| 100-1000 | +78 % (+{77.5 - half:.0f} .. +{77.5 + half:.0f} %) |", "| 400-2000 |  |",
                          "| 400-4000 | +80 % (+12 .. +148 %) |"]  # fmt: skip
    *_, growth = growth_table(cells, controls).splitlines()
    assert growth.startswith("| 400-4000, beside 100-1000 | x 4 | x 4 | +0.3000 (-0.9706 .. +1.5706) | +0.0450 (")
    assert len(growth_table(cells, controls).splitlines()) == 3  # twice the text is not as much more as four times
    taught = {FULL_TAUGHT: groups((-0.1, -0.1), (), ()), "QAT, taught": groups((0.01, 0.03), (), (0.1, 0.2))}
    lines = taught_table(taught, cells["QAT"], controls).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [*taught, "QAT, taught, minus the gap without a teacher"]
    assert lines[0] == "| full precision, taught | -0.1000 (-0.1000 .. -0.1000) |  |  |"
    assert "| -0.0350 (" in lines[2] and "| +0.0500 (" in lines[2]


def seeds_of(label, *losses, **more):
    """A group of the same trunks' seeds."""
    return Group(label, [row("t", "x", seed, loss, **more) for seed, loss in enumerate(losses)])


def test_models_of_one_size_and_pairs_of_equal_bytes():
    """Differences with intervals, what two kinds gain beside what two others do, and what learned scales did."""
    taught = "taught, rate 0.02"
    of = {"bf16": (4.0, 4.0), "Q4_0": (4.1, 4.1), "Q2_0": (4.2, 4.3), f"Q4_0 {taught}": (4.05, 4.07)}
    of |= {f"Q2_0 {taught}": (4.12, 4.16), f"Q4_0 dynamic {FIRST}": (4.0, 4.2)}
    found = {(16, kind): seeds_of(f"16 experts, {kind}", *losses, bytes=1_000) for kind, losses in of.items()}
    found[32, "bf16"] = seeds_of("32 experts, bf16", 3.9, 4.0, bytes=1_500)
    found[32, "Q2_0"] = seeds_of("32 experts, Q2_0", 4.09, 4.15, bytes=990)
    lines = same_size_table(scales.SMALL, found).splitlines()
    assert lines[0] == "| loss (95 % interval) | 8 experts | 16 experts | 32 experts |"
    half = 12.706 / 2  # of two seeds: Student's factor times half of their difference
    assert f"| Q2_0 minus Q4_0 |  | +0.1500 ({0.15 - half * 0.1:+.4f} .. +{0.15 + half * 0.1:.4f}) |  |" in lines
    gains = f"(Q2_0 {taught} minus Q2_0) minus (Q4_0 {taught} minus Q4_0)"
    assert f"| {gains} |  | -0.0700 (-0.5782 .. +0.4382) |  |" in lines  # -0.08 and -0.14, less -0.05 and -0.03
    assert sum("minus" in line for line in lines) == 11 and not any("ternary" in line for line in lines)
    pairs = pairs_table(scales.SMALL, found).splitlines()
    late = f"{0.02 - half * 0.06:+.4f} .. +{0.02 + half * 0.06:.4f}"
    assert f"| 16 experts, Q4_0; 32 experts, Q2_0 | 0.990 | +0.0200 ({late}) | 1 of 2 seeds |" in pairs
    assert any(line.startswith("| 16 experts, bf16; 32 experts, bf16 | 1.500 | -0.0500 (") for line in pairs)
    health = [{"weight_error": error, "scale_drift": 0.1} for error in (0.7, 0.8)]
    found[16, f"Q4_0 {FIRST}"] = Group("16 experts, learned", [
        row("t", "x", seed, 4.0, health=of, kld=0.2) for seed, of in enumerate(health)
    ])  # fmt: skip
    found[16, f"Q4_0 dynamic {FIRST}"] = seeds_of("16 experts, dynamic", 4.0, 4.0, health={"weight_error": 0.1})
    scales_of = grids_table(found).splitlines()
    assert "| 16 experts, learned | 0.2000 (0.2000 .. 0.2000) | 0.750 ±0.050 | 0.100 ±0.000 |" in scales_of
    assert "| 16 experts, dynamic | 0.1000 (0.1000 .. 0.1000) | 0.100 ±0.000 |  |" in scales_of
    assert not any("bf16 |" in line for line in scales_of[2:])


def test_fp4_is_held_against_what_is_trained_alike_and_the_best_rounding():
    """A goal is settled where an interval is on one side of it; roundings of longer name or more bits count where
    they may, GPTQ's too; a teacher's gain is beside the same grid."""
    taught, twice = "taught", "taught, rate 0.02"
    of = {
        "full": {UNTAUGHT: seeds_of("control", 4.0, 4.0), taught: seeds_of("full, taught", 3.9, 3.9),
                 twice: seeds_of("full, twice", 3.8, 3.9)},
        "mxfp4": {UNTAUGHT: seeds_of("mxfp4", 4.02, 4.02, kld=0.3, bits_per_weight=4.25),
                  taught: seeds_of("mxfp4, taught", 3.9, 3.92, bits_per_weight=4.25),
                  twice: seeds_of("mxfp4, twice", 3.88, 3.92, kld=0.4, bits_per_weight=4.25)},
        "q4_0": {UNTAUGHT: seeds_of("q4_0", 4.01, 4.01, bits_per_weight=4.5),
                 taught: seeds_of("q4_0, taught", 3.9, 3.9), twice: Group("q4_0, twice (not run)", [])},
    }  # fmt: skip
    lines = goals_table(of).splitlines()
    assert lines[2] == "| mxfp4 | control | +0.50 (+0.50 .. +0.50) | not met | yes |"
    assert lines[3].startswith("| mxfp4, taught | full, taught | +0.26 (-3.00 .. +3.51) | met | no, holds 0.3")
    assert lines[5] == "| q4_0 | control | +0.25 (+0.25 .. +0.25) | met | yes |"
    assert lines[7] == "| q4_0, twice (not run) | full, twice |  |  |  |"
    clamped = seeds_of("clamped", 4.0, 4.01)
    found = differences_table(of, [(clamped, of["mxfp4"][UNTAUGHT])]).splitlines()
    changed = "-0.0100 (-0.1371 .. +0.1171) | +0.3000 (+0.3000 .. +0.3000)"
    assert f"| mxfp4, twice | -0.1000 (-0.3541 .. +0.1541) | -0.1200 (-0.3741 .. +0.1341) | {changed} |" in found
    assert "| mxfp4 | +0.0200 (+0.0200 .. +0.0200) |  |  |  |" in found
    assert "| full, taught | -0.1000 (-0.1000 .. -0.1000) |  |  |  |" in found
    assert found[-1].startswith("| clamped | +0.0050 (-0.0585 .. +0.0685) | -0.0150 (")
    formats = formats_table(of).splitlines()
    assert formats[0].endswith("| mxfp4 minus q4_0 |") and formats[2] == "| untaught | +0.0100 (+0.0100 .. +0.0100) |"
    assert formats[4] == f"| {twice} |  |"
    rounded = [
        Group(f"PTQ: {name.replace('/', ', ')}", [
            row("t", f"control/{name}", seed, loss, kld=kld, bits_per_weight=bits) for seed in (0, 1)
        ])
        for name, bits, loss, kld in (("mxfp4/search", 4.25, 4.05, 0.2), ("MXFP4/stock", 4.25, 4.04, 0.25),
                                      ("IQ4_XS/imatrix", 4.25, 4.03, 0.15), ("iq4_nl/gptq", 4.5, 3.99, 0.05))
    ]  # fmt: skip
    best = roundings_table(of, rounded).splitlines()
    none = "+0.1000 (+0.1000 .. +0.1000)"
    onto = f"MXFP4, stock | -0.0200 (-0.0200 .. -0.0200) | mxfp4, search | {none} |"
    assert best[2] == f"| mxfp4 | onto mxfp4 | {onto}"
    assert best[3].startswith("| mxfp4 | in 4.25 bits | IQ4_XS, imatrix | -0.0100 (")
    gptq = "iq4_nl, gptq | +0.0200 (+0.0200 .. +0.0200) | iq4_nl, gptq | +0.0500 (+0.0500 .. +0.0500)"
    assert [line for line in best if line.startswith("| q4_0 |")] == [f"| q4_0 | in 4.5 bits | {gptq} |"]


def test_a_width_of_less_text_has_the_shape_and_rate_of_the_whole():
    """Rates are searched on the first seed, the best is on every seed, and less text is less of every phase."""
    s = scales.SMALL
    whole, shorter, *taught = s.by_width("^qat$")
    for width, rates, rate in zip(s.widths, s.width_rates, s.best_rates, strict=True):
        assert min(rates) < rate < max(rates)  # no best one at an edge
        own = [p for p in whole.sweep.points if width.items() <= p.items()]
        searched = {(p["optim.lr"], p["train.seed"]) for p in own}
        assert searched == {(r, 0) for r in rates} | {(rate, seed) for seed in s.seeds}
        assert len(own) == len(searched)
        less = [p for p in shorter.sweep.points if width.items() <= p.items()]
        phases = ("trunk", "control", "qat")
        steps = [(*(p[f"train.phases.{n}.steps"] for n in phases), p["train.phases.trunk.warmup"]) for p in less]
        assert {p["optim.lr"] for p in less} == {rate}
        assert sorted(steps) == [(225, 138, 138, 12)] * 3 + [(450, 275, 275, 25)] * 3
    phases = runs_of(whole)[0].config.train.phases
    assert [phases[name].steps for name in ("trunk", "control", "qat")] == [900, 550, 550]  # of which they are parts
    assert phases["trunk"].warmup == 50
    assert [stage.sweep.name for stage in taught] == ["small_width_q2_0_taught", "small_width_full_taught"]
    for stage in taught:
        starts = {run.config.init_from: run.config for run in runs_of(stage)}
        best = [run for run in runs_of(whole) if (run.config.model.dim, run.config.optim.lr) in BEST_RATES]
        assert set(starts) == {str(run.folder) for run in best} and len(starts) == 9
        for run in best:
            qat, cfg = starts[str(run.folder)].train.phases["qat"], starts[str(run.folder)]
            assert (qat.teacher, qat.distill, qat.lr) == (":control", 0.5, 2 * run.config.optim.lr)
            assert qat.quantize == ("q2_0" in stage.sweep.name) and qat.steps == run.config.train.phases["qat"].steps
            assert (cfg.model, cfg.train.seed) == (run.config.model, run.config.train.seed)
        assert stage.references == tuple(f"{run.config.init_from}:control" for run in runs_of(stage))


BEST_RATES = {(64, 0.005), (128, 0.005), (192, 0.0025)}


def test_a_corpus_must_be_whole(corpus, tmp_path):
    assert scales.on("h100", f"{corpus}/").common == scales.on("h100", str(corpus)).common
    for name, folder, message in (
        ("h100", "", r"--corpus '': scale h100 needs a folder with train\*.jsonl\*"),
        ("h100", str(tmp_path), "needs a folder with train"),
        ("small", str(corpus), "scale small has its own text"),
        ("big", "", "--scale big: must be small or h100"),
    ):
        with pytest.raises(UserError, match=message):
            scales.on(name, folder)
    shutil.copytree(corpus, tmp_path / "c")
    (tmp_path / "c" / "heldout" / "code.jsonl").unlink()
    with pytest.raises(UserError, match="needs a folder with heldout/code.jsonl"):
        scales.on("h100", str(tmp_path / "c"))


@pytest.mark.parametrize("file", [f for f in STUDIES if list(f.parent.glob("*.json"))], ids=lambda f: f.parent.name)
def test_the_committed_tables_come_from_the_committed_results(file):
    results = {f.stem: json.loads(f.read_text()) for f in sorted(file.parent.glob("*.json"))}
    made = study.load(str(file))["report"](results)
    page = (file.parent / "README.md").read_text()
    assert made.tables and isinstance(made.figure, Figure)
    for name, table in made.tables.items():
        assert f"<!-- {name}: " in page and table in page, name


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
    assert started[-1][0] == ["d"]
    teacher = {"train.phases.qat.distill": 0.5, "train.phases.qat.teacher": f"{runs_of(trunks)[0].folder}:control"}
    taught = Sweep("e", BRANCH, [elsewhere.points[0], elsewhere.points[0] | teacher])
    for known in (False, True):
        monkeypatch.setattr(points, "finished", lambda folder, known=known: known and folder.parent.name == "trunks")
        assert study.train(Study([trunks, Stage(taught)]), options, "/e/") == 1
        assert started[-1][0] == ["e"] * (1 + known)  # without what learns from a trunk that is not finished
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
    old = rows[3] | {"loss": 9.0}
    study.write_results(tmp_path / "r.json", [rows[0] | {"loss": 9.0}, old])
    with pytest.raises(UserError, match="is not finished"):
        study.judge_all(asked, tmp_path / "r.json", False, NOTHING)
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # what was judged is kept
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING)
    *_, failed = json.loads((tmp_path / "r.json").read_text())
    assert failed["failed"].startswith("partial: qat at step 2") and failed["overrides"] == other["overrides"]
    study.write_results(tmp_path / "r.json", [old])
    study.judge_all(asked, tmp_path / "r.json", False, NOTHING, "/t/")
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # its folder is not looked at
    (tmp_path / "r.json").unlink()
    shutil.copy(Path(qat["run"]) / "summary.json", other["run"])
    shutil.move(control["run"], tmp_path / "away")
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["failed"] for r in found] == ["not run", "its control has no last checkpoint"]
    shutil.move(tmp_path / "away", control["run"])
    study.write_results(tmp_path / "r.json", [*rows[:3], old])
    for folder, reason in ((control["run"], study.NO_CONTROL), (other["run"], study.NO_CHECKPOINT)):
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
    study.write_results(
        tmp_path / "r.json", [failed | {"failed": "not run"}, *shorter, shorter[3] | {"run": "x/y-" + old["run"][-10:]}]
    )
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/t/")
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # known by digits, each run once
    before = failed | {"failed": "its loss is not finite", "run": "runs/b/label-" + failed["run"][-10:]}
    study.write_results(tmp_path / "r.json", [*rows[:3], failed | {"failed": "not run"}, before])
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/t/")
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], before | {"run": failed["run"]}]
    study.write_results(tmp_path / "r.json", [*rows[:3], old | {"run": "runs/b/label-0123456789"}])
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/t/")
    assert "1 runs that the study no longer has are left out: runs/b/label-0123456789" in capsys.readouterr().out
    *_, other_config = json.loads((tmp_path / "r.json").read_text())
    assert other_config["failed"] == "not run"  # the same settings of another config file
    summary = Path(control["run"]) / "summary.json"
    text = summary.read_text()
    summary.unlink()
    study.write_results(tmp_path / "r.json", [*rows[:3], old])
    shutil.move(Path(control["run"]) / "checkpoints", tmp_path / "away")
    study.judge_all(asked, tmp_path / "r.json", True, NOTHING, "/b/")
    assert f"{other['run']}: passed over, {study.UNFINISHED_CONTROL}" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text()) == [*rows[:3], old]  # its control is trained again
    shutil.move(tmp_path / "away", Path(control["run"]) / "checkpoints")
    summary.write_text(text)
    study.judge_all(Study((trunk,), tokens=640), tmp_path / "r.json", True, NOTHING)
    assert f"1 runs that the study no longer has are left out: {other['run']}" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text()) == rows[:3]
    group = study_tables.select([*rows[:3], failed], "x", "b")
    assert group == (f"x (seed 0: {failed['failed']})", [])
    assert group.label in study_tables.table([group], [], rows)
    longer = Stage(branch.sweep, branch.judged, (branch.references[0].replace(":control", ":trunk"),))
    with pytest.raises(UserError, match="qat was trained on 1,024 tokens and .*:trunk on 512: give both"):
        judge(asked, longer, False, NOTHING)


# ---- Figures over seeds ----------------------------------------------------------------------------------------------


def row(stage, name, seed, loss, **more):
    run = f"runs/trunk-{seed}"
    usual = {
        "stage": stage, "row": name, "seed": seed, "loss": loss, "run": run, "reference": f"{run}:control", "rule": "",
        "format": "q2_0", "bits_per_weight": 2.25, "kld": 0.1, "same_top1": 0.5, "expert_agreement": 0.75,
        "health": {"flipped": 0.25}, "seconds": 120.0, "joined_rows": 1,
        "domains": {"d": {"bits_per_byte": 1.5}}, "tokens": 1000, "config": "configs/c.py", "overrides": {},
    }  # fmt: skip
    return usual | more


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
    ):
        assert study.main([str(file), "--dry_run", "--only", only, *more]) == 2
        assert message in capsys.readouterr().err
    assert study.main([str(file), "--dry_run", "--only", "ssmall/"]) == 0
    assert "1 runs" in capsys.readouterr().out
    (tmp_path / "broken.py").write_text("def get_study(a, b): 1 / 0\ndef report(r): pass\n")
    assert study.main([str(tmp_path / "broken.py")]) == 2
    (tmp_path / "broken.py").write_text("def (")
    assert study.main([str(tmp_path / "broken.py")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: division by zero" in err[0] and "SyntaxError" in err[1]
    for name in ("a", "b"):
        study.write_results(tmp_path / f"{name}.json", [])
    (tmp_path / "README.md").write_text("<!-- t: x -->\nold\n<!-- end -->\n")
    assert study.main([str(file), "--report"]) == 0
    assert "['a', 'b']" in (tmp_path / "README.md").read_text() and (tmp_path / "figure.png").stat().st_size > 1000
