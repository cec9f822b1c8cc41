"""The results of a sweep: a table and a plot of the runs that are finished, means over seeds, and what is not finished.

    python -m launch.collect runs/SWEEP

prints the table and writes it into the sweep's folder as results.md, results.csv and results.json, and results.png. It
may be run at any time.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from launch import points
from launch.study_tables import with_se
from qatmoe import cli
from qatmoe.errors import UserError
from qatmoe.files import write_atomically
from qatmoe.report import COLORS, OTHER_COLORS
from qatmoe.text_table import aligned, markdown

Row = dict[str, Any]

MARKERS = {"trunk": "|", "control": "o", "ptq": "x", "qat": "D"}


def rows_of(folder: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """A row for each finished run, and (name, state) of the others.

    A row has "run", each key that varies, "loss_BRANCH" (nats per token, final validation; "ptq" is the control rounded
    by the better rule), "recovered" (share of what PTQ loses against the control that QAT won back), "bits_per_weight"
    (of the quantized weights), "tokens" trained and "wall_s". A number that a run does not have is None.

    Raises:
      UserError: the folder holds no sweep, or one with a damaged run.
    """
    asked = points.read_folder(folder)
    rows, others = [], []
    varied = points.varied([run["overrides"] for run in asked["runs"]])
    for run in asked["runs"]:
        state = points.state_of(folder / run["name"])
        if state.kind != "done":
            others.append((run["name"], state.text))
            continue
        # Where a point leaves the seed to the config, it is a seed all the same.
        own = {SEED: points.read_run(folder / run["name"], "config.json", lambda config: config["train"]["seed"])}
        settings = {key: run["overrides"].get(key, own.get(key)) for key in varied}
        rows.append({"run": run["name"]} | settings | points.read_run(folder / run["name"], "summary.json", _results))
    return rows, others


def _results(summary: dict[str, Any]) -> Row:
    return {f"loss_{branch}": loss for branch, loss in summary["loss"].items()} | {
        "recovered": summary["recovered"],
        "bits_per_weight": summary["bits_per_weight"]["quantized"],
        "tokens": summary["tokens"]["total"],
        "wall_s": summary["wall_s"],
    }


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns in which at least one row has something, in the order of the first rows that have them."""
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A heading and rows of text; the name of a run is left out, as what varies is in columns of its own."""
    keys = [key for key in columns(rows) if key != "run"] or ["run"]
    return [keys, *[[_text(key, row.get(key)) for key in keys] for row in rows]]


SEED = "train.seed"


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Runs that differ in their seed alone, as one row: "seeds" is how many, losses and `recovered` their mean and its
    standard error as text; [] where no two runs do. A figure that one of them lacks is None. The runs that they start
    and learn from may be those of their seeds. Runs of which two have the same seed, as branches of several trunks
    have, are left out.
    """
    figures = [key for key in columns(rows) if key.startswith("loss_") or key == "recovered"]
    results = {*figures, "run", SEED, "init_from", "tokens", "wall_s", "bits_per_weight"}
    rows = [row | {key: _of_any_seed(row, key, rows) for key in row if key.endswith(".teacher")} for row in rows]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(SEED) is not None:
            # A seed's branches start from that seed's trunk, all at the same phase and step.
            start = re.findall(r"(?::\w+)?(?:@\d+)?$", str(row.get("init_from")))[0]
            same = [(k, v) for k, v in sorted(row.items()) if k not in results]
            groups.setdefault(repr((start, same)), []).append(row)
    means = []
    for group in groups.values():
        # A seed that is there twice: runs of several trunks, which are no seeds of each other.
        if len(group) < 2 or len({row[SEED] for row in group}) < len(group):
            continue
        mean: Row = {key: value for key, value in group[0].items() if key not in results} | {"seeds": len(group)}
        for key in figures:
            values = [row.get(key) for row in group]
            form = ".1%" if key == "recovered" else ".4f"
            mean[key] = None if None in values else with_se([v for v in values if v is not None], form)
        means.append(mean | {"bits_per_weight": group[0]["bits_per_weight"]})
    return means


def _of_any_seed(row: Row, key: str, rows: Sequence[Row]) -> Any:
    """A row's teacher; where that is a run of the row's own seed, and no other seed learns from it, as seed=*."""
    teacher = row[key]
    if any(other[key] == teacher and other.get(SEED) != row.get(SEED) for other in rows if key in other):
        return teacher
    own = rf"\bseed={row.get(SEED)}\b([^/:]*)-[0-9a-f]+(?=:)"
    return re.sub(own, r"seed=*\1", teacher) if isinstance(teacher, str) else teacher


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key.startswith("loss_"):
        return f"{value:.4f}"
    if key == "recovered":
        return f"{value:.1%}"
    if key == "tokens":
        return f"{value:,.0f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """The table of all runs, and, where runs differ in their seed alone, that of means over seeds."""
    means = over_seeds(rows)
    return [table(rows), table(means)] if means else [table(rows)]


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the losses of every run on a line of its own to a PNG. Raises UserError where it cannot be written."""
    branches = [key.removeprefix("loss_") for key in columns(rows) if key.startswith("loss_")]
    fresh = iter(OTHER_COLORS * len(branches))
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for branch in branches:
        found = [(row[f"loss_{branch}"], y) for y, row in enumerate(rows) if row.get(f"loss_{branch}") is not None]
        color = "black" if branch == "ptq" else COLORS.get(branch) or next(fresh)
        x, y = zip(*found, strict=True)
        axes.scatter(x, y, color=color, marker=MARKERS.get(branch, "s"), label=branch, zorder=3)
    axes.set_yticks(range(len(rows)), [row["run"].rpartition("-")[0] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def write(folder: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """Makes the four files, where a run is finished; returns as `rows_of`. Raises as `rows_of` and `plot`."""
    rows, others = rows_of(folder)
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns(rows), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(folder / "results.csv", text.getvalue())
        write_atomically(folder / "results.json", json.dumps(rows, indent=1) + "\n")
        write_atomically(folder / "results.md", "\n\n".join(markdown(t) for t in tables(rows)) + "\n")
        plot(rows, points.read_folder(folder)["name"], folder / "results.png")
    return rows, others


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 all runs are finished, 1 some are not, 2 unusable input."""
    parser = argparse.ArgumentParser(prog="python -m launch.collect", description="Collect the results of a sweep.")
    parser.add_argument("folder", help="the sweep's folder, as runs/toys")
    folder = Path(parser.parse_args(argv).folder)
    try:
        rows, others = write(folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    if rows:
        print("\n\n".join("\n".join(aligned(t)) for t in tables(rows)))
        print(f"{folder}/results.md  results.csv  results.json  results.png")
    print(f"{len(rows)} of {len(rows) + len(others)} runs are finished")
    for name, state in others:
        print(f"{state}: {name}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
