"""The studies of experiments/: their runs, their tables, and what is held against what."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from study_rows import row, runs_of

from experiments import scales
from experiments.fp4_experts.pairs import (
    UNTAUGHT,
    differences_table,
    formats_table,
    goals_table,
    machines_table,
    roundings_table,
    searched_table,
)
from experiments.fp4_experts.study import as_added, get_study
from experiments.iso_memory.study import FIRST, grids_table, pairs_table, same_size_table, seeds_table
from experiments.late_qat_2bit import machines, tables
from experiments.resilience.laws import CONTROL, FULL_TAUGHT, exponents
from experiments.resilience.pairs import growth_table, shares_table, taught_table
from experiments.scales import FULL
from launch import study
from launch.study_tables import Group
from qatmoe.errors import UserError

STUDIES = sorted((ROOT / "experiments").glob("*/study.py"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


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
                assert run.config.train.keep == 1 and not run.config.train.phases["trunk"].save_at
                assert steps == int(at or steps) <= start.phases["trunk"].steps
                assert steps in (*start.phases["trunk"].save_at, start.phases["trunk"].steps)
    made = functions["report"]({scale: [row for stage in stages for row in made_up(stage)]})
    page = (file.parent / "README.md").read_text()
    assert made.tables and all(f"<!-- {name}: " in page for name in made.tables)
    assert not any("nan" in table for table in made.tables.values())
    made.figure.draw_without_rendering()


def test_seeds_that_were_added_count_where_what_is_in_the_way_is_asked_and_nowhere_else():
    functions = study.load(str(ROOT / "experiments/late_qat_2bit/study.py"))
    stages = functions["get_study"]("small", "").stages
    tables = functions["report"]({"small": [row for stage in stages for row in made_up(stage)]}).tables
    (line,) = [line for line in tables["small_in_the_way"].splitlines() if line.startswith("| the best recipe |")]
    assert " | 0 1 2 3 4 5 | " in line
    assert "3 4 5" not in tables["small_goals"] + tables["small_recipes"] + tables["small_differences"]
    assert "| 0 1 2 3 4 5 |" in tables["small_goals_longer"]


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.parent.name)
@pytest.mark.parametrize("seeds", [set(), {0}, {0, 1}], ids=str)
def test_the_studies_can_be_reported_before_all_is_run(file, seeds):
    """Of the first seeds trunks and their own branches are judged, and of the last of them nothing else."""
    functions = study.load(str(file))
    stages = functions["get_study"]("small", "").stages
    rows = []
    for stage in stages:
        first = of_trunks(stage)
        for found in made_up(stage):
            done = found["seed"] in seeds and (first or found["seed"] == 0)
            hidden = {key: found[key] for key in ("stage", "config", "overrides", "seed", "run")} | {
                "failed": "not run"
            }
            rows += [found] if done else [hidden] if hidden not in rows else []
    made = functions["report"]({"small": rows})
    assert made.tables and not any("nan" in table for table in made.tables.values())
    made.figure.draw_without_rendering()


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.parent.name)
def test_the_studies_can_be_reported_where_runs_failed(file):
    """Every sweep of branches in turn with all its seeds; a trunk, and with it the control of all its branches; and of
    each sweep's last run what begins with QAT's weights, as they were not finite."""
    functions = study.load(str(file))
    all_stages = functions["get_study"]("small", "").stages
    stages = [made_up(stage) for stage in all_stages]
    lost = [
        {row["run"] for row in rows} for stage, rows in zip(all_stages, stages, strict=True) if not of_trunks(stage)
    ]
    last = {rows[-1]["run"] for rows in stages}
    for runs in [*lost, {stages[0][-1]["run"]}, None]:
        rows = []
        for whole in itertools.chain(*stages):
            own = {k: whole[k] for k in ("stage", "config", "overrides", "seed", "run")} | {"failed": "diverged"}
            if runs is None and whole["run"] in last and whole["row"].startswith("qat"):
                rows.append(own | {"row": whole["row"]})
            else:
                rows.append(own if runs and whole["run"] in runs else whole)
        made = functions["report"]({"small": list({json.dumps(row): row for row in rows}.values())})
        shown = ("diverged", "its control has no figures", "as runs failed")
        assert any(word in table for table in made.tables.values() for word in shown)
        assert not any("nan" in table for table in made.tables.values())
        made.figure.draw_without_rendering()


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
    found[8, "bf16"] = seeds_of("8 experts, bf16", 4.1, 4.1, bytes=800)
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
    assert f"| Q4_0; Q2_0 | 0.990 |  |  | +0.0200 ({late}) | 1 of 2 seeds |  |" in pairs
    (full,) = (line for line in pairs if line.startswith("| bf16; bf16 |"))
    moved = f"{0.05 - half * 0.1:+.4f} .. +{0.05 + half * 0.1:.4f}"  # -0.1 and 0, less -0.1 and -0.1
    assert full.startswith("| bf16; bf16 | 1.250, 1.500 | -0.1000 (-0.1000 .. -0.1000) | 2 of 2 seeds | -0.0500 (")
    assert full.endswith(f"| 1 of 2 seeds | +0.0500 ({moved}) |")
    found |= {(8, "bf16"): seeds_of("", 4.1, 4.1, 4.1, 4.2), (16, "bf16"): seeds_of("", 4.0, 4.2, 4.1, 4.5)}
    (full,) = (line for line in seeds_table(scales.SMALL, found).splitlines() if line.startswith("| bf16; bf16 |"))
    assert full == "| bf16; bf16 | 0.0000 ±0.0577 | 0.3000 | -0.1500 ±0.0500 |  |"  # seed 3 was added
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
    assert lines[2] == "| mxfp4 | control | 0 1 | +0.50 (+0.50 .. +0.50) | not met | yes |"
    assert lines[3].startswith("| mxfp4, taught | full, taught | 0 1 | +0.26 (-3.00 .. +3.51) | met | no, holds 0.3")
    assert lines[5] == "| q4_0 | control | 0 1 | +0.25 (+0.25 .. +0.25) | met | yes |"
    assert lines[7] == "| q4_0, twice (not run) | full, twice |  |  |  |  |"
    clamped = seeds_of("clamped", 4.0, 4.01)
    found = differences_table(of, [(clamped, of["mxfp4"][UNTAUGHT])]).splitlines()
    changed = "-0.0100 (-0.1371 .. +0.1171) | +0.3000 (+0.3000 .. +0.3000)"
    assert f"| mxfp4, twice | 0 1 | -0.1000 (-0.3541 .. +0.1541) | -0.1200 (-0.3741 .. +0.1341) | {changed} |" in found
    assert "| mxfp4 | 0 1 | +0.0200 (+0.0200 .. +0.0200) |  |  |  |" in found
    assert "| full, taught | 0 1 | -0.1000 (-0.1000 .. -0.1000) |  |  |  |" in found
    assert found[-1].startswith("| clamped | 0 1 | +0.0050 (-0.0585 .. +0.0685) | -0.0150 (")
    formats = formats_table(of).splitlines()
    assert (
        formats[0].endswith("| mxfp4 minus q4_0 |")
        and formats[2] == "| untaught | 0 1 | +0.0100 (+0.0100 .. +0.0100) |"
    )
    assert formats[4] == f"| {twice} |  |  |"
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
    assert best[2] == f"| mxfp4 | 0 1 | onto mxfp4 | {onto}"
    assert best[3].startswith("| mxfp4 | 0 1 | in 4.25 bits | IQ4_XS, imatrix | -0.0100 (")
    gptq = "iq4_nl, gptq | +0.0200 (+0.0200 .. +0.0200) | iq4_nl, gptq | +0.0500 (+0.0500 .. +0.0500)"
    assert [line for line in best if line.startswith("| q4_0 |")] == [f"| q4_0 | 0 1 | in 4.5 bits | {gptq} |"]


def test_what_two_machines_say_is_pooled_run_by_run():
    """Rows of one machine as those of both: its means, differences of the same runs, and intervals of six."""
    rows = json.loads(machines.EARLIER.read_text())
    s = scales.SMALL
    made = machines.machines_tables(s, tables.groups_of(s, rows), rows, rows)
    lines = {line.split(" | ")[0].strip("|* "): line for line in made["machines"].splitlines()}
    assert (
        "| 0.0475 ±0.0014 | 0.0475 ±0.0014 | +0.0475 (+0.0453 .. +0.0497) |  | +0.0230 ("
        in lines["q2_0, learned scales** (the config)"]
    )
    best = lines["rate 0.02, half KL to the control"]
    assert (
        "| 0.0245 ±0.0032 | 0.0245 ±0.0032 | +0.0245 (" in best
        and "| -0.0230 (-0.0262 .. -0.0199) |  | -0.0230 (" in best
    )
    assert (
        "| -0.0230 (-0.0314 .. -0.0147) |  | 0.0853 ±0.0015 | 0.0853 ±0.0015 |" in best
    )  # of three, as on one machine
    shares = made["shares_machines"].splitlines()
    assert shares[2].startswith("| 5 % | 0.0519 ±0.0047 | 0.0519 ±0.0047 | +0.0519 (") and "| +0.0149 (" in shares[2]
    assert shares[4].startswith("| 20 % | 0.0370 ±0.0052 | 0.0370") and shares[4].endswith(") |  |  |")


def test_more_steps_are_held_against_the_configs_seed_by_seed():
    """Their gaps beside those of as many steps as the config has, and roundings of their own controls."""

    def of_run(run, name, loss, **more):
        return Group(name, [row("t", name, 0, loss, run=f"runs/{run}", reference=f"runs/{run}:control", **more)])

    def length(run, control, rounded, best, full):
        rounded = of_run(run, "control/q2_0/search", rounded, kld=0.3)
        best = of_run(run, "qat", best, kld=0.1 if run == "short" else 0.15)
        return tables.Longer(of_run(run, "control", control), [rounded], best, {tables.ALIKE: of_run(run, "f", full)})

    short, long = length("short", 4.0, 4.2, 4.05, 3.99), length("long", 3.9, 4.2, 3.91, 3.88)
    rows = [*short.control.rows, *long.control.rows]
    in_full = [tables.NONE, short.branched[tables.ALIKE]]
    found = tables.Groups(short.control, tables.NONE, short.rounded, short.best, {}, [], in_full)
    way = tables.Way(tables.NONE, short.best, [], {"much longer": long})
    lines = tables.longer_table(found, way, short.best, rows).splitlines()
    assert lines[0] == "| mean (95 % interval), seeds | as long as the config's | much longer |"
    cells = [line.split("|")[3].strip() for line in lines[2:]]
    assert cells[:6] == ["+0.0100, 1", "-0.0400, 1", "+0.3000, 1", "+0.1000, 1", "-0.0200, 1", "-0.0100, 1"]
    assert cells[6:] == ["", "", "+0.0300, 1", "-0.0300, 1", "0.1500, 1", "+0.0500, 1"]
    goals = tables.goals([(of.best, of.rounded) for of in (short, long)] + [(short.best, [])], rows).splitlines()
    assert goals[2:] == [
        "| qat | 0 | 75 % | 1.25 % | 0.33 | control/q2_0/search |",
        "| qat | 0 | 97 % | 0.26 % | 0.50 | control/q2_0/search |",
        "| qat |  |  |  |  |  |",
    ]


def test_fp4_on_two_machines():
    """The seeds as they were added, those of the other machine, and all, each once."""

    def kinds(*losses):
        control = seeds_of("c", *[4.0] * len(losses))
        return {FULL: {UNTAUGHT: control}, "mxfp4": {UNTAUGHT: seeds_of("m", *losses)}}

    before = kinds(4.02, 4.02, 4.02)
    added = [(0, 1, 2), (3, 4)]
    head, _, line = machines_table(kinds(4.01, 4.02, 4.0), before, added).splitlines()
    assert "| seeds 0 1 2 | seeds 3 4 | seeds 0 1 2, before |" in head
    both = "+0.50 (+0.50 .. +0.50) | +0.37 (+0.06 .. +0.69) | not met | no, holds 0.3 |"  # of 0.375, 0.5 and 0.25
    assert line == f"| m | +0.25 (-0.37 .. +0.87) |  | {both}"
    (line,) = machines_table(kinds(4.01, 4.02, 4.0, 4.04, 4.02), before, added).splitlines()[2:]
    assert line.startswith("| m | +0.25 (-0.37 .. +0.87) | +0.75 (-2.43 .. +3.93) | +0.50 (+0.50 .. +0.50) | ")
    assert "| +0.52 (+0.17 .. +0.88) | not met | no, holds 0.3 |" in line


def test_fp4_at_the_best_of_its_rates():
    """Each by its own mean, over the seeds of other rates; what is taught does not count, nor a rate that failed."""
    slow = "untaught, rate 0.1"
    taught = {"taught": seeds_of("t", 3.0, 3.0, 3.0)}
    of = {
        FULL: {UNTAUGHT: seeds_of("c", 4.0, 4.0, 1.0), slow: seeds_of("c, slow", 4.2, 4.0)} | taught,
        "mxfp4": {UNTAUGHT: seeds_of("m", 4.04, 4.04, 1.0), slow: seeds_of("m, slow", 4.02, 4.02)} | taught,
    }
    (line,) = searched_table(of).splitlines()[2:]
    assert line == "| m, slow | c | 0 1 | +0.50 (+0.50 .. +0.50) | not met | yes |  |"
    found = differences_table(of, []).splitlines()
    faster = "-0.0200 (-0.0200 .. -0.0200)"
    assert any(line.startswith("| m, slow | 0 1 | +0.0200 (+0.0200 .. +0.0200) |  | " + faster) for line in found)
    of["mxfp4"]["untaught, rate 9"] = seeds_of("m, fast (seed 1: failed)", 3.0)
    assert searched_table(of).splitlines()[2] == line.removesuffix(" |") + "m, fast (seed 1: failed) |"
    of["mxfp4"][slow] = of[FULL][slow] = Group("slow (not run)", [])
    assert searched_table(of).splitlines()[2].startswith("| m, fast (seed 1: failed) | c | 0 | -25.00 |")
    of["mxfp4"].pop("untaught, rate 9")
    assert searched_table(of).splitlines()[2] == "| m | c |  |  |  |  |  |"


def test_fp4_rates_are_searched_on_seeds_of_the_study():
    s = scales.SMALL
    assert sorted(seed for seeds in as_added(s) for seed in seeds) == sorted(s.on_more_seeds("fp4_experts").seeds)
    searched = [stage for stage in get_study("small", "").stages if stage.sweep.name.endswith("_rates")]
    assert len(searched) == 4
    for stage in searched:
        tried = [(point["train.seed"], point[scales.RATE]) for point in stage.sweep.points]
        assert sorted(tried) == sorted(itertools.product(s.fp4_rate_seeds, s.rates))


def test_a_width_of_less_text_has_the_shape_and_rate_of_the_whole():
    """Rates are searched on the first seed, the best is on every seed, and less text is less of every phase."""
    s = scales.SMALL
    whole, shorter, *taught = s.by_width("^qat$")
    for i, (width, rates, rate) in enumerate(zip(s.widths, s.width_rates, s.best_rates, strict=True)):
        assert min(rates) < rate < max(rates)  # no best one at an edge
        own = [p for p in whole.sweep.points if width.items() <= p.items()]
        searched = {(p["optim.lr"], p["train.seed"]) for p in own}
        assert searched == {(r, 0) for r in rates} | {(rate, seed) for seed in s.seeds}
        assert len(own) == len(searched)
        less = [p for p in shorter.sweep.points if width.items() <= p.items()]
        phases = ("trunk", "control", "qat")
        steps = [(*(p[f"train.phases.{n}.steps"] for n in phases), p["train.phases.trunk.warmup"]) for p in less]
        assert {p["optim.lr"] for p in less} <= {rate}
        assert sorted(steps) == ([(225, 138, 138, 12)] * 3 + [(450, 275, 275, 25)] * 3 if i < s.in_depth else [])
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
