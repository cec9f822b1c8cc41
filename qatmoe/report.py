"""A run's result: the table, summary.json and curves.png, made from metrics.jsonl, plan.json and config.json.

Make them again at any time:  python -m qatmoe.report --run WORKDIR
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qatmoe import cli, metrics
from qatmoe.config import leaves
from qatmoe.errors import UserError
from qatmoe.files import write_atomically
from qatmoe.text_table import aligned

# matplotlib takes nearly as long to import as JAX does, and only the end of a run draws.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

Summary = dict[str, Any]

BRANCHES = ("trunk", "control", "qat")
COLORS = {"trunk": "0.35", "control": "tab:blue", "qat": "tab:red"}
OTHER_COLORS = ("tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan", "tab:pink")


def environment() -> dict[str, Any]:
    """Where a run is trained; goes into plan.json under "environment"."""
    device = jax.devices()[0]
    return {"jax": jax.__version__, "device": device.device_kind, "devices": jax.device_count()}


def write(workdir: str | Path) -> Summary:
    """Makes WORKDIR/summary.json, WORKDIR/curves.png and, where the run keeps TensorBoard's files, its row of HPARAMS.

    Returns the summary. Raises as `summarize` and `curves` do.
    """
    summary = summarize(workdir)
    curves(workdir, Path(workdir) / "curves.png")
    config = _config(workdir)
    if config.get("train", {}).get("tensorboard"):
        results = {f"final/loss_{branch}": v for branch, v in summary["loss"].items() if v is not None}
        if summary["recovered"] is not None:
            results["final/recovered"] = summary["recovered"]
        metrics.hparams(workdir, leaves(config), results)
    return summary


def summarize(workdir: str | Path) -> Summary:
    """The result of a run, also written to WORKDIR/summary.json.

    Keys; null where the run has no such number:

      name, seed               of the config
      loss, perplexity         {trunk, control, ptq, qat, and any other phase}: final validation, nats per token; `ptq`
                               is the better rule on the control
      quantized                phases whose weights are quantized
      loss_se                  standard errors, of the phases that recorded one
      recovered                (ptq - qat) / (ptq - control): share of the PTQ loss that training won back
      ptq_rules                {branch: {rule: loss}}
      mtp                      {phase: {name: loss}} of the MTP heads
      bits_per_weight          {quantized, overall}
      bytes                    {deployed, bf16}
      tokens                   {phase: trained tokens, total}
      tokens_per_s             {phase: median}
      wall_s                   from the first record to the last, pauses included
      jax, device, devices     where it was trained

    Raises:
      UserError: the directory is not a run, one of its files is damaged, or nothing was evaluated in it yet.
    """
    workdir = Path(workdir)
    config, plan = _config(workdir), plan_of(workdir)
    records = metrics.read(workdir)
    finals = {r["phase"]: r for r in records if r["split"] == "final"}  # the last one of each phase
    if not finals:
        raise UserError(f"run {workdir} has no final validation yet: let a phase finish, then report")

    ptq_rules: dict[str, dict[str, float | None]] = {}
    for phase, record in finals.items():
        if phase.startswith("ptq:"):
            _, branch, rule = phase.split(":", 2)
            ptq_rules.setdefault(branch, {})[rule] = _finite(record.get("loss"))
    phases = [p for p in _phases(config, records) if not p.startswith("ptq:")]
    loss: dict[str, float | None] = {
        p: _finite(finals.get(p, {}).get("loss")) for p in dict.fromkeys([*BRANCHES, *phases])
    }
    on_control = [v for v in ptq_rules.get("control", {}).values() if v is not None]
    loss["ptq"] = min(on_control, default=None)

    trained = {p: _last([r for r in records if r["split"] == "train"], p, "tokens") for p in phases}
    times = [r["time"] for r in records]
    totals, where = plan.get("totals", {}), plan.get("environment", {})
    summary: Summary = {
        "name": config.get("name"),
        "seed": config.get("train", {}).get("seed"),
        "loss": loss,
        "perplexity": {k: None if v is None else _exp(v) for k, v in loss.items()},
        "quantized": [p for p, spec in _phase_specs(config).items() if spec.get("quantize")],
        "loss_se": {p: _finite(r["loss_se"]) for p, r in finals.items() if "loss_se" in r},
        "recovered": _recovered(loss["ptq"], loss["qat"], loss["control"]),
        "ptq_rules": ptq_rules,
        "mtp": {p: m for p, r in finals.items() if (m := {k: _finite(v) for k, v in r.items() if k.startswith("mtp")})},
        "bits_per_weight": {
            "quantized": totals.get("bits_per_weight_quantized"),
            "overall": totals.get("bits_per_weight_total"),
        },
        "bytes": {"deployed": totals.get("bytes_total"), "bf16": totals.get("bytes_bf16")},
        "tokens": {p: n for p, n in trained.items() if n is not None}
        | {"total": sum(n for n in trained.values() if n is not None)},
        "tokens_per_s": {p: s for p in phases if (s := _median(records, p, "tokens_per_s")) is not None},
        "wall_s": round(max(times) - min(times), 1),
        **{key: where.get(key) for key in ("jax", "device", "devices")},
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def fill_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Puts each table between the lines `<!-- NAME: command -->` and `<!-- end -->` of a page.

    Raises:
      UserError: the page has no such lines for a name, or more than one pair.
    """
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)"
        literal = lines.replace("\\", "\\\\")
        text, n = re.subn(pattern, rf"\g<1>\n{literal}\n\n\g<2>", text, flags=re.S)
        if n != 1:
            raise UserError(f"{page} has {n} tables `<!-- {name}: command -->` ... `<!-- end -->`; it needs one")
    write_atomically(page, text)


def table(summary: Summary) -> str:
    """The result as a terminal table: one row per phase and PTQ rule. Bits of all weights, and of those on the grid."""
    loss, control = summary["loss"], summary["loss"].get("control")
    bits, size = summary["bits_per_weight"], summary["bytes"]
    rows = [("", "valid loss", "perplexity", "vs control", "bits/weight", "on the grid", "bytes")]

    def add(name: str, value: float | None, quantized: bool) -> None:
        if value is None:
            return
        rows.append(
            (
                name,
                f"{value:.4f}",
                f"{_exp(value) or math.inf:.2f}",
                "-" if control is None or name == "control" else f"{value - control:+.4f}",
                _number(bits["overall"] if quantized else 16.0, ".2f"),
                _number(bits["quantized"], "g") if quantized else "-",
                _size(size["deployed" if quantized else "bf16"]),
            )
        )

    phases = [p for p in loss if p != "ptq"]
    for phase in phases:
        if phase not in summary["quantized"]:
            add(phase, loss[phase], quantized=False)
    for branch, rules in summary["ptq_rules"].items():
        for rule, value in rules.items():
            add(f"PTQ of {branch} ({rule})", value, quantized=True)
    for phase in summary["quantized"]:
        add(phase, loss.get(phase), quantized=True)
    lines = aligned(rows)
    lines.insert(1, "-" * len(lines[0]))
    if summary["recovered"] is not None:
        lines.append(f"QAT recovers {summary['recovered']:.1%} of what PTQ loses against the control.")
    return "\n".join(lines)


def curves(workdir: str | Path, path: str | Path) -> None:
    """Draws the run to a PNG: losses, the branches from close by, the quantizer's health and the experts' load.

    The x axis is optimizer steps along a lineage: a branch begins where the phase it starts from ended.

    Raises:
      UserError: the run has no records, or `path` cannot be written.
    """
    from matplotlib.figure import Figure

    workdir = Path(workdir)
    config, records = _config(workdir), metrics.read(workdir)
    if not records:
        raise UserError(f"run {workdir} has no metrics yet: nothing to draw")
    phases = [p for p in _phases(config, records) if not p.startswith("ptq:")]
    offsets = _offsets(config, records, phases)
    fresh = iter(OTHER_COLORS * len(phases))
    colors = {p: COLORS.get(p) or next(fresh) for p in phases}
    branches = [p for p in phases if _phase_specs(config).get(p, {}).get("start")] or phases
    ptq = [(r["phase"], r["loss"]) for r in records if r["phase"].startswith("ptq:") and r["split"] == "final"]

    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(str(config.get("name", workdir.name)), parse_math=False)  # a name is not TeX
    (whole, close), (quantizer, experts) = figure.subplots(2, 2)
    for phase in phases:
        x, y = _series(records, phase, ("train",), "ce")
        if not x.size:
            x, y = _series(records, phase, ("train",), "loss")
        whole.plot(offsets[phase] + x, _smooth(y), color=colors[phase], lw=1, alpha=0.6)
        x, y = _series(records, phase, ("valid", "final"), "loss")
        for axes in (whole, close):
            axes.plot(offsets[phase] + x, y, color=colors[phase], marker="o", ms=4, lw=1.5, label=phase)
    start = min(offsets[p] for p in branches)
    end = max(offsets[r["phase"]] + r["step"] for r in records if r["phase"] in offsets)
    low, high = _zoom(close, start, end)
    for (name, value), style in zip(ptq, ("--", ":", "-.", (0, (1, 4))) * len(ptq), strict=False):
        label = f"PTQ {name.removeprefix('ptq:').replace(':', ', ')}: {value:.3f}"
        whole.plot([start, end], [value, value], color="black", ls=style, lw=1.2, label=label)
        label += " (above)" if value > high else " (below)" if value < low else ""
        close.plot([start, end], [value, value], color="black", ls=style, lw=1.2, label=label, scaley=False)
    _finish(whole, "Loss: validation (dots), training (thin, smoothed)", "loss (nats per token)")
    _finish(close, "The branches: validation", "loss (nats per token)")

    for phase in phases:
        for key, style, label in (("flip_rate", "-", "codes flipped"), ("weight_error", "--", "weight error")):
            x, y = _series(records, phase, ("health",), key)
            if np.any(y > 0):
                quantizer.plot(offsets[phase] + x, y, color=colors[phase], ls=style, label=f"{phase}: {label}")
                quantizer.set_yscale("log")
    _finish(quantizer, "Quantizer: codes flipped in one step, relative RMS weight error", "share (log scale)")

    dropped = experts.twinx()
    for phase in phases:
        for axes, key, style, label in (
            (experts, "moe/load_max", "-", "load"),
            (dropped, "moe/dropped", ":", "dropped"),
        ):
            x, y = _series(records, phase, ("train",), key)
            if x.size:
                axes.plot(offsets[phase] + x, y, color=colors[phase], ls=style, label=f"{phase}: {label}")
    dropped.set_ylabel("share of routed rows dropped (dotted)")
    dropped.set_ylim(bottom=0)
    dropped.set_visible(bool(dropped.lines))
    _finish(experts, "Experts: load of the fullest", "fullest expert / mean (solid)", also=dropped)
    try:
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def _zoom(axes: "Axes", start: float, end: float) -> tuple[float, float]:
    """Limits the axes to x from `start` to `end` and to the points that lie there; returns the limits of y."""
    points = np.concatenate([line.get_xydata() for line in axes.lines])
    y = points[(points[:, 0] >= start) & np.isfinite(points[:, 1]), 1]
    pad = 0.03 * max(end - start, 1)
    axes.set_xlim(start - pad, end + pad)
    if y.size:
        margin = 0.15 * (np.ptp(y) or 1.0)
        axes.set_ylim(y.min() - margin, y.max() + margin)
    return axes.get_ylim()


def _finish(axes: "Axes", title: str, ylabel: str, also: "Axes | None" = None) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    if also is not None:
        more = also.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    if handles:
        axes.legend(handles, labels, fontsize=8, framealpha=0.8)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.5")


def _series(records: list[metrics.Record], phase: str, splits: tuple[str, ...], key: str) -> tuple[Any, Any]:
    """Steps and values of one metric, in step order; a final validation replaces a sampled one of the same step."""
    points = {
        r["step"]: r[key] for s in splits for r in records if r["phase"] == phase and r["split"] == s and key in r
    }
    steps = sorted(points)
    return np.asarray(steps, float), np.asarray([points[s] for s in steps], float)


def _smooth(y: Any) -> Any:
    """Centred moving average over a fortieth of the points; at the ends over those that there are."""
    half = len(y) // 80
    return np.asarray([np.mean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))])


def _phase_specs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return config.get("train", {}).get("phases", {})


def _phases(config: dict[str, Any], records: list[metrics.Record]) -> list[str]:
    """The phases that recorded something, in the config's order."""
    seen = dict.fromkeys(r["phase"] for r in records)
    return [p for p in _phase_specs(config) if p in seen] + [p for p in seen if p not in _phase_specs(config)]


def _offsets(config: dict[str, Any], records: list[metrics.Record], phases: list[str]) -> dict[str, int]:
    """Steps that lie before each phase on its lineage.

    A phase that config.init_from replaced ended where that checkpoint was taken, whatever its own configuration says.
    """
    specs = _phase_specs(config)
    ends = {name: spec.get("steps", 0) for name, spec in specs.items()}
    ends |= {r["phase"]: r["step"] for r in records if r["split"] == "final"}

    def before(phase: str) -> int:
        parent = specs.get(phase, {}).get("start")
        return before(parent) + ends.get(parent, 0) if parent else 0

    return {p: before(p) for p in phases}


def _recovered(ptq: float | None, qat: float | None, control: float | None) -> float | None:
    if ptq is None or qat is None or control is None or ptq <= control:
        return None  # nothing was lost, so there is no share of it to win back
    return (ptq - qat) / (ptq - control)


def _last(records: list[metrics.Record], phase: str, key: str) -> float | None:
    values = [r[key] for r in records if r["phase"] == phase and key in r]
    return values[-1] if values else None


def _median(records: list[metrics.Record], phase: str, key: str) -> float | None:
    values = [r[key] for r in records if r["phase"] == phase and math.isfinite(r.get(key, math.nan))]
    return statistics.median(values) if values else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(n: float | None) -> str:
    if n is None:
        return "-"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def plan_of(workdir: str | Path) -> dict[str, Any]:
    """What a run's plan.json says; {} where there is none. Raises UserError where it is damaged."""
    file = Path(workdir) / "plan.json"
    if not file.exists():
        return {}
    fix = "remove it, and the run's own command writes it again"
    return _load(file, lambda plan: [plan, plan.get("totals", {}), plan.get("environment", {})], fix)


def _config(workdir: str | Path) -> dict[str, Any]:
    file = Path(workdir) / "config.json"
    if not file.exists():
        raise UserError(f"{file} does not exist: {workdir} is not the directory of a qatmoe run")
    fix = "restore it, or train the run again in another workdir"
    specs = _phase_specs
    return _load(file, lambda config: [config, config.get("train", {}), specs(config), *specs(config).values()], fix)


def _load(file: Path, groups: Callable[[Any], list[Any]], fix: str) -> dict[str, Any]:
    """A JSON file in which `groups` of what it holds must be objects. Raises UserError, with the fix."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = all(isinstance(group, dict) for group in groups(found))
    except (ValueError, AttributeError):  # no JSON; no object where a group is asked for another one
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged: {fix}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point: prints the table, writes summary.json and curves.png."""
    parser = argparse.ArgumentParser(prog="python -m qatmoe.report", description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, metavar="WORKDIR", help="directory of the run")
    run = Path(parser.parse_args(argv).run)
    try:
        print(table(write(run)))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
