import json
import math
import subprocess
import sys

import matplotlib.image
import pytest

from qatmoe import report
from qatmoe.errors import UserError

PHASES = {
    "trunk": {"steps": 100, "start": "", "quantize": False},
    "control": {"steps": 40, "start": "trunk", "quantize": False},
    "qat": {"steps": 40, "start": "trunk", "quantize": True},
}
TOTALS = {
    "bytes_total": 2_500_000,
    "bits_per_weight_total": 3.5,
    "bits_per_weight_quantized": 2.25,
    "bytes_bf16": 12_000_000,
    "params_total": 6_000_000,
    "params_quantized": 5_000_000,
}


def record(phase, step, split, **values):
    return {"phase": phase, "step": step, "split": split, "time": 1000.0 + step, **values}


def final_records():
    return [
        record("trunk", 100, "final", loss=3.5, loss_se=0.01, mtp1_loss=4.5, tokens=77.0),
        record("control", 40, "final", loss=3.0, loss_se=0.02, tokens=77.0),
        record("ptq:control:absmax", 40, "final", loss=8.0),
        record("ptq:control:search", 40, "final", loss=5.0),
        record("qat", 40, "final", loss=3.2, tokens=77.0),
    ]


def train_records():
    for phase, spec in PHASES.items():
        for step in range(1, spec["steps"] + 1):
            loss = 3 + 5 * math.exp(-(step + (phase != "trunk") * 100) / 30)
            rate = 1000.0 + step
            yield record(phase, step, "train", loss=loss + 0.1, ce=loss, tokens=step * 10.0, tokens_per_s=rate)
            if step % 10 == 0:
                yield record(phase, step, "valid", loss=loss)


def make_run(workdir, records, phases=PHASES, plan=True):
    workdir.mkdir(exist_ok=True)
    config = {"name": "toy", "train": {"seed": 7, "phases": phases}}
    (workdir / "config.json").write_text(json.dumps(config))
    if plan:
        environment = {"jax": "0.10.2", "device": "cpu", "devices": 1}
        (workdir / "plan.json").write_text(json.dumps({"totals": TOTALS, "rows": [], "environment": environment}))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return workdir


def test_numbers_of_a_run(tmp_path):
    run = make_run(tmp_path, [*train_records(), *final_records()])
    summary = report.summarize(run)
    assert summary == json.loads((run / "summary.json").read_text())
    assert (summary["name"], summary["seed"], summary["jax"], summary["device"]) == ("toy", 7, "0.10.2", "cpu")
    assert summary["loss"] == {"trunk": 3.5, "control": 3.0, "ptq": 5.0, "qat": 3.2}
    assert summary["perplexity"]["control"] == pytest.approx(20.0855, abs=1e-4)
    assert summary["loss_se"] == {"trunk": 0.01, "control": 0.02}
    assert summary["recovered"] == pytest.approx(0.9)
    assert summary["ptq_rules"] == {"control": {"absmax": 8.0, "search": 5.0}}
    assert summary["mtp"] == {"trunk": {"mtp1_loss": 4.5}}
    assert summary["bits_per_weight"] == {"quantized": 2.25, "overall": 3.5}
    assert summary["bytes"] == {"deployed": 2_500_000, "bf16": 12_000_000}
    assert summary["tokens"] == {"trunk": 1000, "control": 400, "qat": 400, "total": 1800}
    assert summary["tokens_per_s"]["qat"] == 1020.5
    assert summary["wall_s"] == 99.0


def test_missing_branches_are_null(tmp_path):
    summary = report.summarize(make_run(tmp_path, final_records()[:1], plan=False))
    assert summary["loss"] == {"trunk": 3.5, "control": None, "qat": None, "ptq": None}
    assert summary["recovered"] is None
    assert summary["bytes"] == {"deployed": None, "bf16": None}
    assert report.table(summary).splitlines()[2].split() == ["trunk", "3.5000", "33.12", "-", "16.00", "-", "-"]


def test_a_repeated_final_record_counts_once_and_the_last_wins(tmp_path):
    records = [*final_records(), record("qat", 40, "final", loss=3.4)]
    assert report.summarize(make_run(tmp_path, records))["recovered"] == pytest.approx(0.8)


def test_no_share_of_nothing(tmp_path):
    """A PTQ that loses nothing leaves nothing to recover."""
    records = [*final_records(), record("ptq:control:search", 40, "final", loss=3.0)]
    assert report.summarize(make_run(tmp_path, records))["recovered"] is None


def test_a_diverged_phase_does_not_break_the_report(tmp_path):
    records = [*train_records(), *final_records()[:-1], record("qat", 40, "final", loss=None)]
    run = make_run(tmp_path, records)
    summary = report.write(run)
    assert summary["loss"]["qat"] is None
    assert (run / "curves.png").exists()


def test_table(tmp_path):
    lines = report.table(report.summarize(make_run(tmp_path, final_records()))).splitlines()
    assert len({len(line) for line in lines[:7]}) == 1  # aligned
    rows = {line[:24].strip(): line[24:].split() for line in lines[2:7]}
    assert list(rows) == ["trunk", "control", "PTQ of control (absmax)", "PTQ of control (search)", "qat"]
    assert rows["qat"] == ["3.2000", "24.53", "+0.2000", "3.50", "2.25", "2.50", "MB"]
    assert rows["control"] == ["3.0000", "20.09", "-", "16.00", "-", "12.00", "MB"]
    assert "90.0%" in lines[-1]


def test_other_phases_have_rows_of_their_own(tmp_path):
    phases = PHASES | {"qat_kl": {"steps": 40, "start": "trunk", "quantize": True}}
    records = [*final_records(), record("qat_kl", 40, "final", loss=3.1)]
    summary = report.summarize(make_run(tmp_path, records, phases))
    assert summary["loss"]["qat_kl"] == 3.1
    assert report.table(summary).splitlines()[7].split() == [
        "qat_kl",
        "3.1000",
        "22.20",
        "+0.1000",
        "3.50",
        "2.25",
        "2.50",
        "MB",
    ]


def test_curves_is_a_picture_even_of_a_run_just_begun(tmp_path):
    run = make_run(tmp_path, [record("trunk", 1, "train", loss=8.0)])
    config = json.loads((run / "config.json").read_text()) | {"name": "cost $5_$"}  # no formula, nor a faulty one
    (run / "config.json").write_text(json.dumps(config))
    report.curves(run, run / "curves.png")
    assert matplotlib.image.imread(run / "curves.png").shape[2] == 4


def test_branches_begin_where_their_parent_ends(tmp_path):
    phases = PHASES | {"again": {"steps": 5, "start": "qat"}}
    config = {"train": {"phases": phases}}
    offsets = report._offsets(config, [], list(phases))
    assert offsets == {"trunk": 0, "control": 100, "qat": 100, "again": 140}
    imported = [record("trunk", 70, "final", loss=4.0)]  # from a checkpoint before the end
    assert report._offsets(config, imported, list(phases)) == {"trunk": 0, "control": 70, "qat": 70, "again": 110}


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", [*train_records(), *final_records()])
    command = [sys.executable, "-m", "qatmoe.report", "--run"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True)
    assert "PTQ of control (search)" in done.stdout
    assert (run / "summary.json").exists()
    assert (run / "curves.png").exists()
    failed = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
    assert "not the directory of a qatmoe run" in failed.stderr


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *((file, text) for file in ("config.json", "plan.json") for text in ("{", "[]")),
        ("config.json", '{"train": []}'),
        ("config.json", '{"train": {"phases": 3}}'),
        ("config.json", '{"train": {"phases": {"qat": 3}}}'),
        ("plan.json", '{"totals": []}'),
        ("plan.json", '{"environment": "here"}'),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(file, text, tmp_path, capsys):
    run = make_run(tmp_path, final_records())
    (run / file).write_text(text)
    assert report.main(["--run", str(run)]) == 2
    fix = {"config.json": "restore it", "plan.json": "remove it, and the run's own command writes it again"}[file]
    assert capsys.readouterr().err.startswith(f"error: {run / file} is damaged: {fix}")


def test_what_cannot_be_reported(tmp_path):
    run = make_run(tmp_path, [])
    with pytest.raises(UserError, match="no final validation"):
        report.summarize(run)
    with pytest.raises(UserError, match="no metrics yet"):
        report.curves(run, run / "curves.png")
    make_run(tmp_path, final_records())
    with pytest.raises(UserError, match="No such file"):
        report.curves(run, run / "nowhere/curves.png")
