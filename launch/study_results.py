"""The results of a study, SCALE.json: a row for everything that was judged, and how a run is entered among them.

Every run of the study has its place there: its rows, or one row that says why it has none.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import points
from qatmoe.errors import UserError
from qatmoe.files import write_atomically

Row = dict[str, Any]

# Why a run that may have been judged cannot be: its rows stay.
NOT_RUN, NO_CHECKPOINT = "not run", "it has no last checkpoint"
NO_CONTROL, UNFINISHED_CONTROL = "its control has no last checkpoint", "its control is not finished"
OTHER_TRUNK = "the trunk that it began with was trained again"
GONE = (NOT_RUN, NO_CONTROL, UNFINISHED_CONTROL, NO_CHECKPOINT, OTHER_TRUNK)
OTHER_CONTROL = "its rows are beside another training of its control"
SAME_LOSS = 1e-4  # nats: two trainings differ by more; that two audits of one, on two devices, do not is not measured
IDENTITY = ("stage", "config", "overrides", "seed", "run")  # of a row: which run it is of


def enter(
    file: Path, every: Mapping[tuple[str, str], Row], own: tuple[str, str] | None = None, new: Sequence[Row] = ()
) -> None:
    """Puts a run's rows into the results.

    That a run is not here to be judged does not replace what was found when it was. But rows of other runs that were
    judged beside another training of its control, or are that, go: losses would be compared with the wrong one.

    Args:
      file: SCALE.json, which need not exist.
      every: {(sweep, folder): the keys IDENTITY} of every run of the study, in its order.
      own: which of them `new` is of; without it the file gets a place for each.
      new: its rows, or one that says why it has none.
    """
    rows = known(file, every)
    here = any(row.get("failed") not in GONE for row in new)
    if own and (here or all(row.get("failed") in GONE for row in rows.get(own, ()))):
        outdated = sorted(_outdated(rows, own, new) & every.keys())
        rows |= {key: [every[key] | {"failed": OTHER_CONTROL}] for key in outdated} | {own: list(new)}
        if outdated:
            runs = ", ".join(run for _, run in outdated)
            print(
                f"{own[1]}: the loss of a control is another one now (it was trained again, or judged elsewhere or on "
                f"other text), and rows beside the other one are left out: {runs}"
            )
    write_results(file, [row for own, run in every.items() for row in rows.get(own) or [run | {"failed": NOT_RUN}]])


def _outdated(
    rows: Mapping[tuple[str, str], Sequence[Row]], own: tuple[str, str], new: Sequence[Row]
) -> set[tuple[str, str]]:
    """The other runs that have, or were judged beside, another training of what `new` has or was judged beside."""
    judged = [row for row in new if "failed" not in row]
    now = {row["reference"]: control_loss(row) for row in judged} | losses(judged)

    def differs(name: str, loss: float | None) -> bool:
        return other_loss(now.get(name), loss)

    return {
        key
        for key, found in rows.items()
        for row in found
        if key != own and "failed" not in row
        if differs(row["reference"], control_loss(row)) or differs(f"{row['run']}:{row['row']}", row["loss"])
    }


def control_loss(row: Row) -> float | None:
    """The loss of the control that a row was judged beside; None where that was not finite, or nothing says it."""
    above = row.get("loss_above")
    return None if above is None else row["loss"] - above


def other_loss(one: float | None, other: float | None) -> bool:
    """Whether two losses are known, and not those of one training."""
    return one is not None and other is not None and abs(one - other) > SAME_LOSS


def losses(rows: Iterable[Row]) -> dict[str, float]:
    """{RUN:ROW, as references name it: loss} of the rows that have figures."""
    return {f"{row['run']}:{row['row']}": row["loss"] for row in rows if "failed" not in row}


def known(file: Path, every: Mapping[tuple[str, str], Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of a file by stage and run, under the names that runs have now: a name may change, its digits do not."""
    now_called = {_digits(own): own for own in every}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in read_results(file) if file.exists() else []:
        found.setdefault((row["stage"], row["run"]), []).append(row)
    kept: dict[tuple[str, str], list[Row]] = {}
    now = {}
    # A merged file may have a run under two names: what was judged counts, then how it failed, then today's name.
    for before, rows in sorted(found.items(), key=lambda item: (*_worth(item[1]), item[0] not in every)):
        own = before if before in every else now_called.get(_digits(before), before)
        now[before[1]] = own[1]
        kept.setdefault(own, [row | {key: every[own][key] for key in IDENTITY if own in every} for row in rows])
    for row in itertools.chain(*kept.values()):
        if "reference" in row:
            folder, _, phase = row["reference"].rpartition(":")
            row["reference"] = f"{now.get(folder, folder)}:{phase}"
    return kept


def _worth(rows: Sequence[Row]) -> tuple[bool, bool]:
    """Sorts a run's rows: those with figures, then those that say how it failed, then those of one that is not here."""
    return not has_figures(rows), all(row.get("failed") in GONE for row in rows)


def _digits(own: tuple[str, str]) -> tuple[str, str]:
    stage, run = own
    return stage, run[-points.DIGITS :]


def has_figures(rows: Sequence[Row]) -> bool:
    """Whether a run was judged."""
    return any("failed" not in row for row in rows)


def write_results(file: Path, rows: Sequence[Row]) -> None:
    """One line a row, so that a change shows what changed."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_atomically(file, f"[\n{lines}\n]\n")


def read_results(file: Path) -> list[Row]:
    """Raises UserError for a damaged file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file} is not JSON: restore it; what it holds cannot be made again without the runs") from e
