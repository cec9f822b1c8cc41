"""Which tensor is trained and deployed on which grid, and what that covers.

A rule is a pattern over parameter paths and the key of `config.quant` that names its grid. The router and the norms
have no rule: they are never quantized. Nothing is silent: a grid whose rule matches no tensor, or whose block does not
divide a row, is an error, and the coverage table lists every tensor of the model.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from qatmoe.config import ModelConfig, QuantConfig
from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS, Grid, get
from qatmoe.text_table import aligned

Plan = dict[str, Grid]  # path of a weight -> its grid, in the order of the parameters
Shapes = Mapping[str, tuple[int, ...]]
Row = dict[str, Any]

# Paths of the trunk; an optional layer number stands there when layers are not stacked.
_LAYERS = r"^(dense_layers|layers)/(\d+/)?"
_MTP = r"^mtp/(\d+/)?block/"
RULES: tuple[tuple[str, str], ...] = (
    ("gate_up", _LAYERS + r"experts/gate_up$"),
    ("down", _LAYERS + r"experts/down$"),
    ("shared", _LAYERS + r"(shared|ffn)/(gate_up|down)$"),
    ("attention", _LAYERS + r"attn/[qkvo]$"),
    ("embedding", r"^embed$"),
    ("head", r"^head$"),
)
MTP_RULES: tuple[tuple[str, str], ...] = (
    ("gate_up", _MTP + r"experts/gate_up$"),
    ("down", _MTP + r"experts/down$"),
    ("shared", _MTP + r"shared/(gate_up|down)$"),
    ("attention", _MTP + r"attn/[qkvo]$"),
)
_KEPT_F32 = re.compile(r"norm$|bias$|router/weight$")  # as llama.cpp stores them
KEPT, OTHER = "kept", "other"


def family(path: str) -> str:
    """The key of a parameter's rule; without one, KEPT for norms, biases and routers, which stay in f32, else OTHER."""
    for key, pattern in (*RULES, *MTP_RULES):
        if re.search(pattern, path):
            return key
    return KEPT if _KEPT_F32.search(path) else OTHER


def make_plan(shapes: Shapes, model: ModelConfig, quant: QuantConfig) -> Plan:
    """Assigns a grid to every tensor that a rule names.

    Args:
      shapes: path -> shape of every parameter; the last axis is the contraction axis.
      model: tells whether embeddings are tied.
      quant: the grids.

    Raises:
      UserError: an unknown grid, a grid that no tensor gets, or a row that is not a whole number of blocks.
    """
    wanted = _grids(model, quant)
    plan: Plan = {}
    used = set()
    for path, shape in shapes.items():
        for key, pattern, grid in wanted:
            if re.search(pattern, path):
                _check_row(path, shape, grid)
                plan[path] = grid
                used.add(key)
    for key, grid_name in [(key, grid.name) for key, _, grid in wanted] + [("mtp", quant.mtp)]:
        if key not in used and grid_name != "none":
            raise UserError(f"config.quant.{key}={grid_name!r} matches no tensor of this model; set it to 'none'")
    return plan


def _grids(model: ModelConfig, quant: QuantConfig) -> list[tuple[str, str, Grid]]:
    """(config key, path pattern, grid) of every rule that is on."""
    for key in ("experts", "mtp", *dict(RULES)):
        _check_name(key, getattr(quant, key))
    names = {key: getattr(quant, key) for key, _ in RULES}
    for key in ("gate_up", "down"):
        names[key] = quant.experts if names[key] == "same" else names[key]
    if model.tie_embeddings:
        if names["head"] not in ("none", names["embedding"]):
            raise UserError(
                f"config.quant.head={names['head']!r}: the head is the embedding (model.tie_embeddings); set "
                "quant.embedding and leave quant.head at 'none'"
            )
        names["head"] = "none"
    wanted = [(key, pattern, names[key]) for key, pattern in RULES]
    if quant.mtp != "none":
        experts = {"gate_up": quant.mtp, "down": quant.mtp} if quant.mtp != "same" else {}
        wanted += [("mtp", pattern, experts.get(key, names[key])) for key, pattern in MTP_RULES]
    grids = [(key, pattern, get(name)) for key, pattern, name in wanted if name != "none"]
    return grids if quant.signed else [(key, pattern, grid.unsigned()) for key, pattern, grid in grids]


def _check_name(key: str, name: str) -> None:
    if name == "none" or (name == "same" and key in ("gate_up", "down", "mtp")):
        return
    try:
        get(name)
    except UserError as e:
        raise UserError(f"config.quant.{key}: {e}") from e


def _check_row(path: str, shape: tuple[int, ...], grid: Grid) -> None:
    if shape[-1] % grid.superblock:
        wide = {"ffn/down": "model.dense_dim", "attn/o": "model.n_heads * model.head_dim"}
        keys = next((key for part, key in wide.items() if part in path), "model.dim and model.expert_dim")
        fits = ", ".join(name for name, other in GRIDS.items() if shape[-1] % other.superblock == 0)
        raise UserError(
            f"{path}: rows of {shape[-1]} weights are not whole blocks of {grid.superblock}, which {grid.name} needs; "
            f"choose {keys} as multiples of {grid.superblock}, or another grid (of such rows: {fits or 'none'})"
        )


# ---- coverage --------------------------------------------------------------------------------------------------------


def coverage(plan: Plan, shapes: Shapes) -> list[Row]:
    """One row per tensor of the model, as it would be deployed: planned ones on their grid, norms and routers in f32,
    the rest in bf16.

    Keys: tensor, shape, grid, block, bits_per_weight, weights, bytes, share (of all bytes), bf16_exact.
    """
    rows: list[Row] = []
    for path, shape in shapes.items():
        grid = plan.get(path)
        kept = "f32" if _KEPT_F32.search(path) else "bf16"
        bits = grid.bits if grid else {"f32": 32.0, "bf16": 16.0}[kept]
        n = math.prod(shape)
        rows.append(
            {
                "tensor": path,
                "shape": list(shape),
                "grid": grid.name if grid else kept,
                "block": grid.block if grid else None,
                "bits_per_weight": bits,
                "weights": n,
                "bytes": math.ceil(n * bits / 8),
                "bf16_exact": grid.bf16_exact if grid else kept == "bf16",
            }
        )
    total = sum(row["bytes"] for row in rows)
    return [row | {"share": row["bytes"] / total} for row in rows]


def totals(rows: list[Row]) -> dict[str, Any]:
    """Sums of a coverage table: bytes, weights, and mean bits per weight over all and over the quantized ones."""
    quantized = [row for row in rows if row["block"]]
    n, n_quantized = sum(r["weights"] for r in rows), sum(r["weights"] for r in quantized)
    size, size_quantized = sum(r["bytes"] for r in rows), sum(r["bytes"] for r in quantized)
    return {
        "params_total": n,
        "params_quantized": n_quantized,
        "bytes_total": size,
        "bytes_bf16": sum(r["weights"] * (4 if r["grid"] == "f32" else 2) for r in rows),
        "bits_per_weight_total": 8 * size / n,
        "bits_per_weight_quantized": 8 * size_quantized / n_quantized if quantized else None,
    }


def format_coverage(rows: list[Row]) -> str:
    """The table for the terminal, with its totals in the last line."""
    cells = [("tensor", "shape", "grid", "block", "bits", "bytes", "share")]
    cells += [
        (
            row["tensor"],
            "x".join(map(str, row["shape"])),
            row["grid"],
            str(row["block"] or ""),
            f"{row['bits_per_weight']:g}",
            f"{row['bytes']:,}",
            f"{row['share']:.1%}",
        )
        for row in rows
    ]
    lines = aligned(cells, 3)
    t = totals(rows)
    quantized = f" at {t['bits_per_weight_quantized']:.3g} bits" if t["params_quantized"] else ""
    lines.append(
        f"{t['params_quantized'] / t['params_total']:.1%} of {t['params_total']:,} weights quantized{quantized}; "
        f"{t['bits_per_weight_total']:.2f} bits per weight in all, {t['bytes_total']:,} bytes "
        f"({t['bytes_bf16']:,} in bf16)"
    )
    return "\n".join(lines)
