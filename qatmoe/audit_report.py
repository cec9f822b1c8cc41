"""An audit's result (audit.json, a list of rows) for people: a terminal table, a model card's table, one picture.

Pure functions of the rows. Rows may be missing: an audit that was stopped, a model without experts, without
llama-cpp-python, or with one phase. A figure that was not measured shows as "-", a panel as "not measured".
"""

import math
import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from qatmoe.errors import UserError
from qatmoe.text_table import aligned

Row = dict[str, Any]

KEYS = frozenset(  # what every row has; figures may be missing
    ("row", "group", "branch", "format", "rule", "bits_per_weight", "joined_rows", "kv", "kv_bits", "reference",
     "tokens", "documents")
)  # fmt: skip
PTQ = ("grid", "ggml")  # groups of rows that round the reference after training
_COLORS = {"grid": "tab:blue", "ggml": "0.35", "qat": "tab:red", "trunk": "tab:green"}
_POINTS = {"grid": ("qatmoe grids", "s", 5), "ggml": ("llama.cpp types", "o", 5), "qat": ("QAT", "*", 16)}
_CYCLE = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan", "tab:pink")


class Label(NamedTuple):
    """A text beside a point of a panel."""

    x: float
    y: float
    text: str
    color: str


# ---- what the rows say -----------------------------------------------------------------------------------------------


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The PTQ rows that no other one beats in both bits and KLD, by bits; of equal ones the first.

    The lower left edge of the reference's roundings, llama.cpp types and grids together.
    """
    found: list[Row] = []
    measured = [r for r in rows if r["group"] in PTQ and _known(r, "kld")]
    for row in sorted(measured, key=lambda r: (r["bits_per_weight"], r["kld"])):
        if not found or row["kld"] < found[-1]["kld"]:
            found.append(row)
    return found


def rivals(rows: Sequence[Row], qat: Row) -> tuple[Row | None, Row | None]:
    """What rounding offers against a QAT row: the best KLD in no more bits, and the fewest bits for no more KLD."""
    edge = frontier(rows)
    same_size = [r for r in edge if r["bits_per_weight"] <= qat["bits_per_weight"]]
    as_good = [r for r in edge if r["kld"] <= qat["kld"]]
    return same_size[-1] if same_size else None, as_good[0] if as_good else None


def _known(row: Row, key: str) -> bool:
    value = row.get(key)
    return value is not None and math.isfinite(value)


def _name(row: Row) -> str:
    """Format and rule, marked where no such file exists: "Q2_K imatrix †4"."""
    return " ".join(part for part in (row["format"], row["rule"]) if part) + _joined(row)


def _joined(row: Row) -> str:
    return f" †{row['joined_rows']}" if row["joined_rows"] > 1 else ""


def _bits(row: Row) -> str:
    """Of what the row rounds: the weights, or the cache."""
    return f"{round(row['kv_bits'] if row['group'] == 'kv' else row['bits_per_weight'], 4):g}"


def _of_group(rows: Sequence[Row], group: str) -> list[Row]:
    return [r for r in rows if r["group"] == group]


def _sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) in the order of the tables; weights by their bits, caches as they were measured."""
    phases = [r for group in ("control", "trunk", "qat") for r in _of_group(rows, group)]
    if phases:
        yield "as deployed", phases
    for group, what in (("grid", "rounded to grids"), ("ggml", "rounded to llama.cpp types"),
                        ("requantized", "rounded again"), ("kv", "with a rounded KV cache")):  # fmt: skip
        for branch in dict.fromkeys(r["branch"] for r in rows if r["group"] == group):
            members = [r for r in rows if r["group"] == group and r["branch"] == branch]
            if group != "kv":
                members.sort(key=lambda r: (r["bits_per_weight"], r["format"].lower(), r["format"], r["rule"]))
            yield f"{branch}, {what}", members


def _headlines(rows: Sequence[Row]) -> list[str]:
    """What each QAT row is worth. Where the best rounding is of joined rows, the best that a file can hold follows."""
    lines, in_files = [], [r for r in rows if r["joined_rows"] == 1]
    for qat in _of_group(rows, "qat"):
        if not _known(qat, "kld"):
            continue
        same_size, as_good = rivals(rows, qat)
        small_file, good_file = rivals(in_files, qat)
        text = f"{qat['branch']}: KLD {_with_error(qat, 'kld')} at {_bits(qat)} bits."
        if same_size:
            text += f" Rounding in no more bits: {_with_error(same_size, 'kld')} ({_name(same_size)})"
            if _joined(same_size):
                text += "; without joined rows "
                text += f"{_with_error(small_file, 'kld')} ({_name(small_file)})" if small_file else "none"
            text += "."
        if as_good:
            text += f" Rounding that is as close takes {_bits(as_good)} bits ({_name(as_good)})"
            if _joined(as_good):
                text += "; without joined rows "
                text += f"{_bits(good_file)} bits ({_name(good_file)})" if good_file else "there is none"
            text += "."
        elif same_size:
            text += " No rounding is as close."
        lines.append(text)
    return lines


def _measured_on(rows: Sequence[Row]) -> str:
    return f"Against {rows[0]['reference']}. Tokens: {rows[0]['tokens']:,}. Documents: {rows[0]['documents']:,}."


# ---- tables ----------------------------------------------------------------------------------------------------------


def _with_error(row: Row, key: str, factor: float = 1.0) -> str:
    """ "0.0123 ±0.0004": four decimals, or six where the value is below a thousandth; percents have two."""
    if not _known(row, key):
        return "-"
    value = factor * row[key]
    digits = 2 if factor != 1.0 else 6 if 0 < abs(value) < 1e-3 else 4
    error = f" ±{factor * row[f'{key}_se']:.{digits}f}" if _known(row, f"{key}_se") else ""
    return f"{value:.{digits}f}{error}"


def _mtp(row: Row) -> str:
    """Accepted drafts by depth: "61.20 ±0.31 / 30.50 ±0.42"."""
    shares = row.get("mtp_acceptance") or []
    errors = row.get("mtp_acceptance_se") or [None] * len(shares)
    depths = [{"share": share, "share_se": error} for share, error in zip(shares, errors, strict=True)]
    return " / ".join(_with_error(depth, "share", 100.0) for depth in depths) or "-"


# Heading -> the cell of a row. Columns in which no row has a number are left out.
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "loss": lambda r: _with_error(r, "loss"),
    "above": lambda r: _with_error(r, "loss_above"),
    "KLD": lambda r: _with_error(r, "kld"),
    "KLD p99": lambda r: _with_error(r, "kld_p99"),
    "of it routing": lambda r: _with_error(r, "kld_routing"),
    "KLD to itself": lambda r: _with_error(r, "kld_own"),
    "same top-1 %": lambda r: _with_error(r, "same_top1", 100.0),
    "same experts %": lambda r: _with_error(r, "expert_agreement", 100.0),
    "drafts %": _mtp,
}
_TERMINAL = ("loss", "above", "KLD", "KLD p99", "KLD to itself", "same top-1 %", "same experts %")
_NOTES = {
    "loss": "loss: nats per token",
    "above": "above: the loss minus the reference's, token by token",
    "KLD": "KLD: KL(reference || row) in nats per token, mean",
    "KLD p99": "KLD p99: the value that 99% of the tokens do not exceed",
    "of it routing": "of it routing: what of the KLD goes away when every token goes to the reference's experts",
    "KLD to itself": "KLD to itself: KL(the branch as deployed || row), the cost of rounding its weights or cache",
    "same top-1 %": "same top-1: share of tokens whose most likely next token is the reference's",
    "same experts %": "same experts: share of tokens and MoE layers whose set of experts is the reference's",
    "drafts %": "drafts: share of greedy drafts of the MTP modules that the model would accept, by depth",
}


def _columns(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(_COLUMNS[name](row) != "-" for row in rows)]


def _notes(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """What the columns and marks mean."""
    caches = ", or per cached value where the KV cache is rounded" if _of_group(rows, "kv") else ""
    notes = [f"bits: per weight of the quantized tensors{caches}, scales included", *(_NOTES[name] for name in columns)]
    notes.append("±: one standard error (bootstrap)")
    rules = {
        "absmax": "absmax: scale by the largest weight of a block",
        "search": "search: scale of least squared error",
        "gptq": "gptq: those scales, and codes by GPTQ on training text",
        "stock": "stock: llama.cpp's quantizer, no importance matrix",
        "imatrix": "imatrix: llama.cpp's quantizer with an importance matrix from training text",
    }
    used = {row["rule"] for row in rows}
    notes += [text for rule, text in rules.items() if rule in used]
    if any(row["joined_rows"] > 1 for row in rows):
        notes.append(
            "†n: n rows of a matrix were joined to fill the type's blocks. It shows what the type's numbers would do; "
            "no GGUF file of that shape exists"
        )
    if frontier(rows):
        notes.append("*: no other rounding after training has as few bits and a smaller KLD")
    return notes


def _marked(row: Row, best: Container[str]) -> str:
    """The name of a row in its section, with the marks that the notes explain."""
    name = row["kv"] if row["group"] == "kv" else _name(row)
    if row["group"] in ("control", "trunk", "qat"):
        name = f"{row['branch']}: {name}"
    return name + (" *" if row["row"] in best else "")


def table(rows: Sequence[Row]) -> str:
    """The audit for the terminal: sections of rows, and under them what the columns mean. No rows: one line."""
    if not rows:
        return "nothing has been measured yet"
    best, columns = {r["row"] for r in frontier(rows)}, _columns(rows, _TERMINAL)
    cells: list[tuple[str, ...]] = [("", "bits", *columns)]
    starts = {}
    for heading, members in _sections(rows):
        starts[len(cells)] = heading
        cells += [(f"  {_marked(r, best)}", _bits(r), *(_COLUMNS[c](r) for c in columns)) for r in members]
    lines = []
    for i, line in enumerate(aligned(cells)):
        if i in starts:
            lines.append(starts[i])
        lines.append(line)
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", _measured_on(rows), *_headlines(rows), *_notes(rows, columns)])


def markdown(rows: Sequence[Row], shown: Container[str] | None = None) -> str:
    """The audit as Markdown for a model card: headlines, the table, its footnotes, and KLD by text where there are
    several. QAT rows are bold.

    Args:
      rows: all that was measured; headlines and the marks of the best roundings are of all of them.
      shown: names of the rows that the table has; all of them unless given.
    """
    if not rows:
        return "Nothing has been measured yet.\n"
    edge, headlines = frontier(rows), _headlines(rows)
    best = {r["row"] for r in edge}
    names: Container[str] = {r["row"] for r in rows} if shown is None else shown
    rows, edge = [r for r in rows if r["row"] in names], [r for r in edge if r["row"] in names]
    columns = _columns(rows, list(_COLUMNS))
    body = []
    for heading, members in _sections(rows):
        for row in members:
            cells = [_escaped(heading), _escaped(_marked(row, best)), _bits(row)]
            cells += [_COLUMNS[c](row) for c in columns]
            body.append([f"**{c}**" for c in cells] if row["group"] == "qat" else cells)
    parts = [
        _escaped(" ".join([_measured_on(rows), *headlines])),
        _grid(["weights", "format", "bits", *columns], body),
        "\n".join(f"- {_escaped(note)}" for note in _notes(rows, columns)),
    ]
    texts = list(rows[0].get("domains") or {})
    if len(texts) > 1:
        listed = [r for group in ("trunk", "qat") for r in _of_group(rows, group)] + edge
        body = [
            [
                _escaped(r["row"]) + _joined(r),
                _bits(r),
                *(_with_error(r["domains"].get(t, {}), "kld") for t in texts),
            ]
            for r in listed
        ]
        parts += ["KLD by text:", _grid(["row", "bits", *map(_escaped, texts)], body)]
    return "\n\n".join(parts) + "\n"


def _grid(header: list[str], body: list[list[str]]) -> str:
    rule = ["---" if name in ("weights", "format", "row") else "---:" for name in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *body])


def _escaped(text: str) -> str:
    """Text as Markdown shows it literally. An underscore between letters needs no escape."""
    return re.sub(r"([\\`*<>|~\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Draws the audit to a PNG: KLD against bits, KLD along the context for each cache, experts chosen by layer.

    Bars are standard errors.

    Raises:
      UserError: `path` cannot be written.
    """
    figure = Figure(figsize=(14, 13), layout="constrained")
    mosaic = figure.subplot_mosaic([["size", "size"], ["cache", "experts"]], height_ratios=[1.6, 1.0])
    labels = _draw_size(mosaic["size"], rows)
    _draw_caches(mosaic["cache"], rows)
    _draw_experts(mosaic["experts"], rows)
    _finish(
        mosaic["size"],
        "What rounding costs, and QAT",
        "bits per weight of the quantized tensors",
        "KLD (nats per token)",
    )
    _finish(
        mosaic["cache"], "KV cache: KLD to the same weights with an exact cache", "position", "KLD (nats per token)"
    )
    by_layer = [r["group"] for r in rows if r.get("expert_agreement_by_layer")]
    unchosen = set(PTQ) & set(by_layer) and not {"qat", "trunk"} & {r["group"] for r in rows}
    _finish(
        mosaic["experts"],
        "Experts chosen as the reference chooses them",
        "MoE layer",
        "share of tokens",
        empty="no branch chosen" if unchosen else "not measured",
    )
    figure.draw_without_rendering()  # places the axes: labels need to know how large they are
    _place(mosaic["size"], labels)
    try:
        figure.savefig(path, dpi=110)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def _draw_size(axes: Axes, rows: Sequence[Row]) -> list[Label]:
    """KLD over bits. Returns the labels to place: the best rule of each format."""
    labels: list[Label] = []
    for group, (title, marker, size) in _POINTS.items():
        shown = [r for r in _of_group(rows, group) if _known(r, "kld") and r["kld"] > 0]
        if not shown:
            continue
        for joined, about, fill in ((False, "", _COLORS[group]), (True, ", rows joined: no such file", "white")):
            some = [r for r in shown if (r["joined_rows"] > 1) == joined]
            if some:
                x, y, error = ([_number(r, k) for r in some] for k in ("bits_per_weight", "kld", "kld_se"))
                look: dict[str, Any] = {
                    "fmt": marker,
                    "color": _COLORS[group],
                    "mfc": fill,
                    "ms": size,
                    "lw": 1,
                    "capsize": 2,
                }
                axes.errorbar(x, y, yerr=error, label=title + about, zorder=3, **look)
        best: dict[str, Row] = {}
        for row in sorted(shown, key=lambda r: r["kld"]):
            best.setdefault(f"{row['branch']} ({row['format']})" if group == "qat" else row["format"], row)
        labels += [Label(r["bits_per_weight"], r["kld"], text, _COLORS[group]) for text, r in best.items()]
    edge = [r for r in frontier(rows) if r["kld"] > 0]
    if edge:
        x, y = ([r[k] for r in edge] for k in ("bits_per_weight", "kld"))
        axes.plot(x, y, color="tab:orange", lw=2, label="best rounding after training", zorder=2)
    for row in _of_group(rows, "trunk") if labels else ():
        if _known(row, "kld") and row["kld"] > 0:
            axes.axhline(row["kld"], color=_COLORS["trunk"], ls=":", lw=1, label=f"{row['branch']} ({row['format']})")
    if labels:
        axes.set_yscale("log")
    return labels


def _draw_caches(axes: Axes, rows: Sequence[Row]) -> None:
    """KLD by position: a color for each cache type, a line style for each branch."""
    caches = _of_group(rows, "kv")
    kinds, branches = (list(dict.fromkeys(r[key] for r in caches)) for key in ("kv", "branch"))
    for row in caches:
        key = "kld" if row["branch"] == row["reference"] else "kld_own"
        spans = [s for s in row.get("by_position") or [] if _known(s, key) and s[key] > 0]
        if spans:
            x = [(s["start"] + s["end"]) / 2 for s in spans]
            y, error = ([_number(s, k) for s in spans] for k in (key, f"{key}_se"))
            color = _CYCLE[kinds.index(row["kv"]) % len(_CYCLE)]
            style = ("-", "--", ":", "-.")[branches.index(row["branch"]) % 4]
            label = f"{row['branch']}, {row['kv']}"
            axes.errorbar(x, y, yerr=error, color=color, ls=style, lw=1.3, capsize=2, label=label)
            axes.set_yscale("log")


def _draw_experts(axes: Axes, rows: Sequence[Row]) -> None:
    """Expert agreement by layer of the phases, and of the roundings that each QAT row competes with."""
    chosen = _of_group(rows, "trunk")
    for qat in [r for r in _of_group(rows, "qat") if _known(r, "kld")]:
        chosen += [qat, *(r for r in rivals(rows, qat) if r)]
    key = "expert_agreement_by_layer"
    for i, row in enumerate({r["row"]: r for r in chosen if r.get(key)}.values()):
        y, error = ([math.nan if v is None else v for v in row[k]] for k in (key, f"{key}_se"))
        color = _COLORS["qat"] if row["group"] == "qat" else _CYCLE[i % len(_CYCLE)]
        label = f"{row['branch']}: {_name(row)}, {_bits(row)} bits"
        axes.errorbar(range(len(y)), y, yerr=error, color=color, marker="o", ms=4, lw=1.3, capsize=2, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _number(row: Row, key: str) -> float:
    """A figure to draw; an unknown standard error has no bar."""
    return row[key] if _known(row, key) else 0.0


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str, empty: str = "not measured") -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.8, ncols=1 if len(axes.get_legend_handles_labels()[0]) < 8 else 2)
    else:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", color="0.5")


def _place(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes labels where they cover neither each other nor points, as near to their points as that allows.

    Greedy, from the top; a label that finds no free place is written beside its point.
    """
    if not labels:
        return
    pixels = axes.figure.dpi / 72  # per point, the unit of offsets and letters
    at_N2 = axes.transData.transform([(label.x, label.y) for label in labels])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at_N2]
    if (legend := axes.get_legend()) is not None:
        box = legend.get_window_extent()
        taken.append(box)
        # It stays there: to look for the best place among all labels, too, is slow, and they keep clear of this one.
        legend.set_loc(tuple(axes.transAxes.inverted().transform((box.x0, box.y0))))
    inside = axes.get_window_extent()
    for i in np.argsort(-at_N2[:, 1], kind="stable"):
        (x, y), label = at_N2[i], labels[i]
        width, height = 4.6 * pixels * len(label.text), 9 * pixels
        places = [Bbox.from_bounds(x + dx, y + dy, width, height) for dx, dy in _around(width, height)]
        fitting = (b for b in places if inside.contains(b.x0, b.y0) and inside.contains(b.x1, b.y1))
        box = next((b for b in fitting if not any(b.overlaps(other) for other in taken)), places[0])
        taken.append(box)
        note = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=((box.x0 + width / 2 - x) / pixels, (box.y0 + height / 2 - y) / pixels),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=label.color,
            arrowprops={"arrowstyle": "-", "color": label.color, "lw": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        note.set_in_layout(False)


def _around(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Lower left corners of a box of that size beside the origin: rings of growing radius, sixteen directions each."""
    for radius in (8.0, 14.0, 22.0, 32.0, 44.0, 58.0, 74.0, 92.0):
        for angle in np.arange(16) * (math.pi / 8):
            yield (
                math.cos(angle) * (radius + width / 2) - width / 2,
                math.sin(angle) * (radius + height / 2) - height / 2,
            )
