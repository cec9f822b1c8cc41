"""From a sweep file to its runs: every point resolved and named, and how far each run is.

A sweep file is Python and returns data:

    from launch.algebra import product, values
    from launch.points import Sweep

    def get_sweep():
        points = product(values("quant.experts", ["q2_0", "mxfp4"]), values("train.seed", [0, 1]))
        return Sweep(name="grids", config="configs/moe_2bit.py", points=points)

A sweep's folder holds `sweep.json`, what was asked for, a folder for each run (a `--workdir` of qatmoe.train) and
`logs/`. Whether a run is finished is read from its own folder and nowhere else.
"""

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from launch.algebra import Point, Points
from qatmoe import cli, metrics
from qatmoe.config import Config, check_key, default, leaves, resolve, to_json
from qatmoe.errors import UserError
from qatmoe.files import write_atomically
from qatmoe.quant.grid import RULES
from qatmoe.run import check_frozen, quant_plan
from qatmoe.workdir import check_path, differences, is_free

T = TypeVar("T")

LONGEST = 150  # characters of a name's readable part
DIGITS = 10  # of a name's end; two of a thousand runs meet once in two million sweeps
OF_A_RUN = re.compile(rf"^(runs/[^/]+/)[^/:]*-([0-9a-f]{{{DIGITS}}})(?=[:@]|$)")  # of a sweep: its folder, its digits


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file's `get_sweep()` returns: a name, the config file that is varied, and the points."""

    name: str
    config: str
    points: Points

    def __post_init__(self) -> None:
        """Raises UserError where there is no such sweep."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise UserError(f"sweep name={self.name!r}: letters, digits, '_', '.' and '-' make a folder's name")
        if not isinstance(self.config, str):
            raise UserError(f"sweep {self.name}: config={self.config!r}: give the file's path as text")
        if not isinstance(self.points, list):
            raise UserError(f"sweep {self.name}: points is a {type(self.points).__name__}: make it a list of points")
        if not self.points:
            raise UserError(f"sweep {self.name}: has no points: give at least one, {{}} for the config as it is")
        for n, point in enumerate(self.points, start=1):
            if not isinstance(point, dict) or not all(isinstance(key, str) for key in point):
                raise UserError(
                    f"sweep {self.name}: point {n} is no dict of values under names: write {{'dotted.key': value}}"
                )


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a sweep, resolved."""

    name: str
    overrides: Point
    config: Config
    file: str  # the config file
    folder: Path

    def arguments(self, folder: str | Path) -> list[str]:
        """Of `python -m qatmoe.train`, to be run from the repository's root, for a run in `folder`."""
        settings = {"name": self.config.name} | self.overrides
        return [
            f"--config={self.file}",
            f"--workdir={folder}",
            *(f"--config.{key}={_on_command_line(value)}" for key, value in settings.items()),
        ]

    @property
    def command(self) -> list[str]:
        """What trains it, and goes on with it, on this machine."""
        return [sys.executable, "-m", "qatmoe.train", *self.arguments(self.folder)]

    @property
    def short(self) -> str:
        """A name of lower-case letters, digits and '-' that tells it apart: the sweep's, and the run's digits."""
        text = f"{self.config.name.partition('/')[0]}-{self.name[-DIGITS:]}"
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    @property
    def log(self) -> Path:
        """What it prints, where it is run on this machine."""
        return self.folder.parent / "logs" / f"{self.name}.log"


@dataclasses.dataclass(frozen=True)
class State:
    """How far a run is: "done", "running", "partial" or "missing", and in words."""

    kind: str
    text: str


# ---- The file --------------------------------------------------------------------------------------------------------


def load(file: str | Path) -> Sweep:
    """Reads a sweep file.

    Raises:
      UserError: there is no such file, it fails, or it does not return a sweep.
    """
    where = f"sweep {file}"
    sweep = called(where, functions_of(where, file, ["get_sweep"], "launch/sweeps/toys.py")["get_sweep"])
    if not isinstance(sweep, Sweep):
        raise UserError(f"sweep {file}: get_sweep() returns a {type(sweep).__name__}; return a launch.points.Sweep")
    return sweep


def functions_of(where: str, file: str | Path, names: Sequence[str], example: str) -> dict[str, Any]:
    """What a Python file defines. Raises UserError where there is no such file, it fails, or it lacks a name."""
    if not Path(file).is_file():
        raise UserError(f"{where}: no such file")
    found = called(where, lambda: runpy.run_path(str(file)))
    for name in names:
        if name not in found:
            raise UserError(f"{where}: has no {name}(); {example} shows one")
    return found


def called(where: str, function: Callable[[], Any]) -> Any:
    """What a function of such a file returns. Raises UserError, its own or one that tells what it raised."""
    try:
        return function()
    except UserError:
        raise
    except Exception as e:  # whatever the file's own code raised
        raise UserError(f"{where}: {type(e).__name__}: {' '.join(str(e).split())}") from e


def runs_of(sweep: Sweep, folder: Path) -> list[Run]:
    """Resolves every point; nothing is written.

    A run's name is made of the keys that vary, sorted, and ten hex digits of its configuration, so neither the order
    of points nor that of factors changes it, nor a key that the configuration gains with a default later. A run that
    is in the folder under the digits keeps its name when more keys begin to vary, and so does one whose digits change
    then, because a free key is in them only where it varies. A run that starts or learns from another one has that
    run's digits in its own, and not its name.

    Raises:
      UserError: names the point and the key that is wrong, or two points that are the same run.
    """
    base = cli.load(sweep.config, "sweep's config")
    different = varied(sweep.points)
    labels = _labels(different)

    def ignored(key: str) -> bool:
        return key == "name" or (is_free(key) and key not in different)

    found: dict[str, tuple[Point, Config]] = {}
    for n, point in enumerate(sweep.points, start=1):
        where = f"sweep {sweep.name}, point {n} ({_words(point)})"
        cfg = _resolved(base, point, where)
        digits = _digits(json.loads(to_json(cfg)), ignored)
        if digits in found:
            same, other = next((i, p) for i, p in enumerate(sweep.points, start=1) if p is found[digits][0])
            raise UserError(f"{where}: the same run as point {same} ({_words(other)}); remove one")
        # A grid whose blocks do not divide a row is found here, or a pattern that finds no parameter.
        _explained(where, lambda cfg=cfg: check_frozen(cfg, quant_plan(cfg)[0]))
        found[digits] = (point, cfg)
    there = _there(folder, set(found), ignored)
    runs = []
    for digits, (point, cfg) in found.items():
        name = there.get(digits) or _name(point, labels, digits)
        cfg = dataclasses.replace(cfg, name=f"{sweep.name}/{name}")
        runs.append(Run(name, point, cfg, sweep.config, folder / name))
    return runs


def open_folder(sweep: Sweep, runs: Sequence[Run], folder: Path) -> None:
    """Makes the sweep's folder, or enters it again, and writes what is asked for into it.

    Raises:
      UserError: as `check_folder`; or the folder cannot be written.
    """
    check_folder(sweep, folder)
    asked = {
        "name": sweep.name,
        "config": sweep.config,
        "runs": [{"name": run.name, "overrides": run.overrides} for run in runs],
    }
    write_atomically(folder / "sweep.json", json.dumps(asked, indent=1) + "\n")


def check_folder(sweep: Sweep, folder: Path) -> None:
    """Raises UserError where runs cannot be kept in a folder, or it is not empty and holds another sweep, or none."""
    check_path(folder, "sweep's folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --dir")
    if not (folder / "sweep.json").exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no sweep: choose another --dir")
        return
    there = read_folder(folder)
    if there["name"] != sweep.name:
        raise UserError(f"{folder} belongs to sweep {there['name']!r}, not {sweep.name!r}: choose another --dir")
    if Path(there["config"]).absolute() != Path(sweep.config).absolute():
        raise UserError(
            f"{folder} belongs to a sweep of {there['config']}, not {sweep.config}: choose another name or --dir"
        )


def read_folder(folder: Path) -> dict[str, Any]:
    """What FOLDER/sweep.json says. Raises UserError where there is none, or no sweep in it."""
    file = folder / "sweep.json"
    try:
        asked = json.loads(file.read_text(encoding="utf-8"))
        runs = [{"name": run["name"], "overrides": run["overrides"]} for run in asked["runs"]]
        texts = [asked["name"], asked["config"], *(run["name"] for run in runs)]
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(run["overrides"], dict) for run in runs):
            raise TypeError
        return {"name": asked["name"], "config": asked["config"], "runs": runs}
    except OSError as e:
        raise UserError(f"{folder} holds no sweep (sweep.json: {e.strerror}): name the folder of one") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} is damaged: remove it and start the sweep again; finished runs stay finished") from e


# ---- A point ---------------------------------------------------------------------------------------------------------


def _resolved(base: ConfigDict, point: Point, where: str) -> Config:
    """A point's configuration, as its run's own command line makes it of the file's."""
    config, known = copy.deepcopy(base), leaves(base.to_dict())
    for key, value in point.items():
        if key == "name":
            raise UserError(f"{where}: name: runs are named by the sweep; leave it out")
        if key not in known:
            _complete(config, key, known, where)
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        try:
            node[last] = tuple(value) if isinstance(value, list) else value
        except OverflowError as e:  # a whole number for a float
            raise UserError(f"{where}: config.{key}: a number of {len(str(value))} digits is too large") from e
        except (TypeError, ValueError) as e:
            expected = f"expected {type(node[last]).__name__}, got {type(value).__name__}"
            raise UserError(f"{where}: config.{key}={value!r}: {expected}") from e
    return _explained(where, lambda: resolve(config))


def _complete(config: ConfigDict, key: str, known: Mapping[str, Any], where: str) -> None:
    """Gives a key that the file leaves out its default."""
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{where}: {key}: a group of keys; name one, as {inside[0]}")
    try:
        check_key(key)
        cli.complete(config, key)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def _explained(where: str, check: Any) -> Any:
    try:
        return check()
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def _on_command_line(value: Any) -> str:
    """As ml_collections reads an override back: text as it is, anything else as Python writes it."""
    return value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)


def _words(point: Point) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in point.items())


# ---- Names -----------------------------------------------------------------------------------------------------------


def varied(points: Points) -> list[str]:
    """Keys that tell points apart, sorted."""
    keys = {key for point in points for key in point}
    return sorted(k for k in keys if any(k not in p or repr(p[k]) != repr(points[0].get(k)) for p in points))


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """For each key its shortest dotted ending that no other has."""

    def endings(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]

    return {key: next(e for e in endings(key) if sum(e in endings(k) for k in keys) == 1) for key in keys}


def _name(point: Point, labels: Mapping[str, str], digits: str) -> str:
    text = ",".join(f"{labels[key]}={_in_a_name(point[key])}" for key in labels if key in point)
    return f"{text[:LONGEST] or 'run'}-{digits}"


def _in_a_name(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).strip("_")


def _there(folder: Path, asked: set[str], ignored: Callable[[str], bool]) -> dict[str, str]:
    """{digits: name} of the runs in a sweep's folder.

    A run that is under none of the digits that are asked for is known by its own settings: it was started when more or
    fewer free keys varied.
    """
    runs = [path for path in sorted(folder.glob(f"*-{'[0-9a-f]' * DIGITS}")) if path.is_dir()]
    found = {path.name[-DIGITS:]: path.name for path in reversed(runs)}
    for path in runs:
        if path.name[-DIGITS:] not in asked and (path / "config.json").exists():
            with contextlib.suppress(UserError):  # a damaged one is nobody's
                found.setdefault(read_run(path, "config.json", lambda config: _digits(config, ignored)), path.name)
    return found


def _digits(config: Mapping[str, Any], ignored: Callable[[str], bool]) -> str:
    """Ten hex digits of a configuration's keys that have another value than their default."""
    there = leaves(config)
    special = {key: v for key, v in there.items() if not ignored(key) and v != default(key)}
    special |= {key: by_digits(key, value) for key, value in special.items()}
    return hashlib.sha256(json.dumps(special, sort_keys=True).encode()).hexdigest()[:DIGITS]


def by_digits(key: str, value: Any) -> Any:
    """A value, and of one that names another run that run's digits: its name may grow."""
    named = key == "init_from" or key.endswith(".teacher")
    return OF_A_RUN.sub(r"\1\2", value) if named and isinstance(value, str) else value


# ---- How far a run is ------------------------------------------------------------------------------------------------


def state(run: Run) -> State:
    """How far a run is.

    Raises:
      UserError: its folder holds a run with another configuration, or a damaged one.
    """
    if not (run.folder / "config.json").exists():
        return State("missing", "missing")
    found = differences(read_run(run.folder, "config.json", lambda config: config), json.loads(to_json(run.config)))
    differ = {key: pair for key, pair in found.items() if by_digits(key, pair[0]) != by_digits(key, pair[1])}
    if differ:
        key, (there, here) = min(differ.items())
        raise UserError(
            f"{run.folder} holds a run with {key}={there!r}, and the sweep asks for {here!r}: "
            "move that folder away, or choose another --dir"
        )
    return state_of(run.folder)


def state_of(folder: Path) -> State:
    """How far the run in a folder is, by its own configuration. Raises as `read_run`."""
    if finished(folder):
        return State("done", "done")
    if pid := _holder(folder):
        return State("running", f"running (process {pid})")
    if not (folder / "config.json").exists():
        return State("missing", "missing")
    records = [r for r in metrics.read(folder) if not r["phase"].startswith("ptq:")]
    if not records:
        return State("partial", "started")
    last = records[-1]
    phase = read_run(folder, "config.json", lambda config: dict(config["train"]["phases"].get(last["phase"], {})))
    return State("partial", f"partial: {last['phase']} at step {last['step']} of {phase.get('steps', '?')}")


def finished(folder: Path) -> bool:
    """Whether a run has its summary, with every phase and every rounding of the control in it. Raises as `read_run`."""
    if not ((folder / "summary.json").exists() and (folder / "config.json").exists()):
        return False
    quantized = read_run(
        folder, "config.json", lambda c: {name: bool(phase["quantize"]) for name, phase in c["train"]["phases"].items()}
    )
    loss, rules = read_run(
        folder, "summary.json", lambda s: (dict(s["loss"].items()), [set(found) for found in s["ptq_rules"].values()])
    )
    if any(loss.get(name) is None for name in quantized):
        return False
    return len(set(quantized.values())) < 2 or any(set(RULES) <= found for found in rules)


def _holder(folder: Path) -> str:
    """The process that trains a run on this machine; "" if none does."""
    with contextlib.suppress(FileNotFoundError), open(folder / "lock", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f.read().strip() or "unknown"
    return ""


def read_run(folder: Path, name: str, pick: Callable[[Any], T]) -> T:
    """What `pick` takes from the config.json or summary.json of a run. Raises UserError where that is not in it."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError
        return pick(found)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        again = f"make it again: python -m qatmoe.report --run {folder}"
        fix = again if name == "summary.json" else "restore it, or move that run's folder away"
        raise UserError(f"{folder / name} is damaged: {fix}") from e
