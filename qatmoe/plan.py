"""How much memory a model takes on the grids that are planned for it, and with how much context it fits.

    python -m qatmoe.plan                                                   every built-in model, in one table
    python -m qatmoe.plan --model qwen3-235b-a22b --experts q2_0 --rest Q8_0 --memory 128GB --cache q8_0
    python -m qatmoe.plan --run runs/moe_2bit                               a run's own shape and grids

It counts the GGUF file that llama.cpp maps into memory, the key/value cache, and a constant for what llama.cpp computes
in. GB are 10^9 bytes, GiB 2^30. Nothing is downloaded and no weights are needed.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from qatmoe import cli
from qatmoe.config import QuantConfig
from qatmoe.convert import gguf, gguf_model, names
from qatmoe.convert.weights import RESTS, Branch
from qatmoe.errors import UserError
from qatmoe.files import check_place, write_atomically
from qatmoe.model.cache import KINDS, CacheType
from qatmoe.quant.grid import get
from qatmoe.quant.plan import KEPT, OTHER, family
from qatmoe.shapes import FAMILIES, SHAPES, Piece, Shape, find, from_model, size, stored
from qatmoe.text_table import aligned

COMPUTE_BUFFERS = 1_000_000_000  # bytes, an assumption. Scores of 512 tokens over 151,936 entries take 0.31 GB of it
WINDOW_EXTRA, WINDOW_STEP = 512, 256  # llama.cpp keeps a window and one batch, rounded up (llama-kv-cache-iswa.cpp)
SIZES = ("16GB", "24GB", "64GB", "128GB")  # without --memory
CONTEXT = 32_768  # tokens, without --context, where the model is made for as many

_GRIDS = ("experts", *FAMILIES, "mtp")  # keys of config.quant, and options
_DESCRIPTION = 31  # bytes that a tensor's description takes beside its shape and the name without "blk.NN."
_FIELDS = 2000  # bytes of the hyper-parameters
_SCALE = {"M": 2, "G": 3, "T": 4}
_LABELS = {KEPT: "norms, routers, biases", OTHER: "projection"}


class Row(NamedTuple):
    """Tensors of one family and type."""

    family: str
    kind: str  # GGUF type
    weights: int
    bytes: int  # in the file, padding included


@dataclasses.dataclass(frozen=True)
class Memory:
    """A model on its grids."""

    shape: Shape
    rows: list[Row]
    metadata: int  # bytes of the file before its tensors
    exact: bool  # whether that is counted or estimated

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return self.metadata + sum(row.bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Over all of the file."""
        return 8 * self.bytes / (self.shape.total + self.shape.mtp)


def of_model(shape: Shape, quant: QuantConfig, *, rest: str = "BF16", ternary: str = "TQ2_0") -> Memory:
    """A built-in model; raises UserError for grids that it cannot have."""
    pieces = stored(shape, quant, rest=rest, ternary=ternary)
    described = sum(piece.number * (_DESCRIPTION + len(piece.name) + 8 * len(piece.shape)) for piece, _ in pieces)
    metadata = described + _FIELDS + round(shape.vocab_size * shape.entry_bytes)
    return Memory(shape, _rows(pieces), metadata, exact=False)


def of_run(branch: Branch) -> Memory:
    """A branch of a run, to the byte as `qatmoe.export --format gguf` writes it. Raises UserError as that does."""
    arch = names.architecture(branch.model, names.GGUF)
    parts = gguf_model.parts(branch.storage, arch)
    tensors = {name: gguf_model.tensor(branch.storage, name, part) for name, part in parts.items()}
    pieces = [
        (Piece(family(part.path), name, tensors[name].shape, mtp=part.path.startswith("mtp/")), tensors[name].kind)
        for name, part in parts.items()
    ]
    total = gguf.file_bytes(gguf_model.metadata(branch, arch), tensors)
    shape = from_model(f"{branch.workdir}, {branch.phase}", branch.model, branch.context, 0.0)
    return Memory(shape, _rows(pieces), total - sum(size(*piece) for piece in pieces), exact=True)


def _rows(pieces: Iterable[tuple[Piece, str]]) -> list[Row]:
    weights: collections.Counter[tuple[str, str]] = collections.Counter()
    taken: collections.Counter[tuple[str, str]] = collections.Counter()
    for piece, kind in pieces:
        label = _LABELS.get(piece.family, piece.family)
        key = (f"mtp: {label}" if piece.mtp else label, kind)
        weights[key] += piece.weights
        taken[key] += size(piece, kind)
    return [Row(*key, weights[key], taken[key]) for key in weights]


# ---- what fits -------------------------------------------------------------------------------------------------------


def cache_bytes(shape: Shape, cache: CacheType, tokens: int) -> int:
    """Bytes of the trunk's cache for one sequence; drafting with MTP modules caches a layer more for each.

    A layer with a window keeps no more than that and a batch of 512 tokens.
    """
    total = 0.0
    for layers, k, v, _, window in shape.caches:
        most = -(-(window + WINDOW_EXTRA) // WINDOW_STEP) * WINDOW_STEP
        total += layers * (min(tokens, most) if window else tokens) * cache.bytes(k, v)
    return round(total)


def per_token(shape: Shape, cache: CacheType) -> int:
    """Bytes that each further token takes, windows being full."""
    most = 1 << 20
    return cache_bytes(shape, cache, most + 1) - cache_bytes(shape, cache, most)


def largest_context(memory: Memory, cache: CacheType, available: int) -> int:
    """The most tokens whose cache fits beside the weights, at most what the model is made for; 0: none."""
    spare = available - memory.bytes - COMPUTE_BUFFERS
    low, high = 0, memory.shape.context
    while low < high:
        middle = (low + high + 1) // 2
        if cache_bytes(memory.shape, cache, middle) <= spare:
            low = middle
        else:
            high = middle - 1
    return low


def parse_memory(text: str) -> int:
    """Bytes of "128GB" (10^9 each), "96GiB" (2^30), "16 GB", "1.5TB"; UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(i?)B\s*", text, re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** _SCALE[match[2].upper()] if match else 0.0
    if not 0 < size < math.inf:
        raise UserError(f"--memory {text!r}: give a number and a unit, as in 128GB (10^9 bytes) or 96GiB (2^30)")
    return round(size)


def parse_cache(text: str, shape: Shape) -> CacheType:
    """A type of `model.cache`, or llama.cpp's default, "f16", which takes what bf16 takes.

    Raises:
      UserError: an unknown type, or one whose blocks do not divide a head.
    """
    cache = _cache_type(text)
    for layers in shape.caches:
        cache.check(layers.head, text)
    return cache


def _cache_type(text: str) -> CacheType:
    return CacheType.parse(text, {"f16": "bf16"})


def summary(memory: Memory, cache: str, context: int, sizes: Sequence[str]) -> dict[str, Any]:
    """What is printed, and written by --json. Sizes in bytes."""
    shape, kind = memory.shape, parse_cache(cache, memory.shape)
    needed = memory.bytes + cache_bytes(shape, kind, context) + COMPUTE_BUFFERS
    return {
        "model": shape.name,
        "architecture": shape.arch,
        "weights": shape.total,
        "weights_active": shape.active,
        "weights_mtp": shape.mtp,
        "families": [row._asdict() for row in memory.rows],
        "metadata_bytes": memory.metadata,
        "metadata_exact": memory.exact,
        "bytes": memory.bytes,
        "bits_per_weight": memory.bits_per_weight,
        "cache": cache,
        "cache_bytes": cache_bytes(shape, kind, context),
        "cache_bytes_per_token": per_token(shape, kind),
        "cache_bytes_per_token_by_type": {k: per_token(shape, CacheType(k, k)) for k in KINDS},
        "context": context,
        "context_limit": shape.context,
        "compute_buffers": COMPUTE_BUFFERS,
        "needed": needed,
        "fits": [
            {
                "memory": text,
                "bytes": parse_memory(text),
                "spare": parse_memory(text) - needed,
                "largest_context": largest_context(memory, kind, parse_memory(text)),
            }
            for text in sizes
        ],
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    """One model for the terminal."""
    mtp = f" and {_weights(result['weights_mtp'])} in MTP modules" if result["weights_mtp"] else ""
    by_type = ", ".join(f"{kind} {n:,}" for kind, n in result["cache_bytes_per_token_by_type"].items())
    lines = [
        f"{result['model']} ({result['architecture']}): {_weights(result['weights'])} weights, "
        f"{_weights(result['weights_active'])} of them used by a token{mtp}",
        "",
        *aligned(_family_rows(result), 2),
        "",
        *aligned(
            [
                ("", "bytes", "GB", "GiB"),
                _both(result["bytes"], "file"),
                _both(result["cache_bytes"], f"cache of {result['context']:,} tokens in {result['cache']}"),
                _both(result["compute_buffers"], "assumed for what llama.cpp computes in"),
                _both(result["needed"], "in all"),
            ]
        ),
        "",
        *aligned(_fit_rows(result), 2),
        "",
        f"cache, bytes for each further token: {by_type}; f16 takes what bf16 does",
    ]
    return "\n".join(lines)


def _family_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    whole = result["bytes"]

    def row(name: str, kind: str, weights: str, taken: int) -> tuple[str, ...]:
        return name, kind, weights, f"{taken:,}", f"{taken / whole:.1%}"

    how = "metadata" if result["metadata_exact"] else "metadata, estimated"
    return [
        ("family", "type", "weights", "bytes", "share"),
        *(row(r["family"], r["kind"], f"{r['weights']:,}", r["bytes"]) for r in result["families"]),
        row(how, "", "", result["metadata_bytes"]),
        row("file", f"{result['bits_per_weight']:.2f} bits", f"{result['weights'] + result['weights_mtp']:,}", whole),
    ]


def _both(n: int, what: str) -> tuple[str, ...]:
    return what, f"{n:,}", f"{n / 1e9:,.2f}", f"{n / 2**30:,.2f}"


def _fit_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("memory", f"with {result['context']:,} tokens", "largest context")]
    for fit in result["fits"]:
        spare = fit["spare"]
        said = f"fits, {_size(spare)} to spare" if spare >= 0 else f"does not fit, {_size(-spare)} short"
        rows.append((fit["memory"], said, _largest(fit, result)))
    return rows


def _largest(fit: dict[str, Any], result: dict[str, Any]) -> str:
    most = fit["largest_context"]
    return "none" if not most else f"{most:,}" + (" (all)" if most == result["context_limit"] else "")


def table(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each model and the head, cells of equal number. A refused model has no numbers."""
    sizes = [fit["memory"] for fit in next(r["fits"] for r in results if "fits" in r)]
    rows: list[tuple[str, ...]] = [("model", "weights", "active", "file", "bits", "cache/token", *sizes)]
    for r in results:
        if "refused" in r:
            rows.append((r["model"], "refused", *[""] * (len(rows[0]) - 2)))
            continue
        cells = (
            _weights(r["weights"]),
            _weights(r["weights_active"]),
            _size(r["bytes"]),
            f"{r['bits_per_weight']:.2f}",
        )
        grown = f"{r['cache_bytes_per_token']:,}"
        rows.append((r["model"], *cells, grown, *(_largest(fit, r) for fit in r["fits"])))
    return rows


def notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the table's reader has to know."""
    cache = next(r["cache"] for r in results if "fits" in r)
    return [
        f"file: metadata estimated; bits: a weight; cache/token: bytes in {cache}; under a memory: the largest context",
        f"that fits beside the weights and {_size(COMPUTE_BUFFERS)} for what llama.cpp computes in",
        "(all): all that the model is made for; none: the weights do not fit. GB are 10^9 bytes.",
        *(f"{r['model']}: {r['refused']}" for r in results if "refused" in r),
    ]


def _weights(n: float) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n / 1e6:.2f} M"


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


# ---- the command -----------------------------------------------------------------------------------------------------


def every(
    quant: QuantConfig, *, rest: str, ternary: str = "TQ2_0", cache: str, sizes: Sequence[str]
) -> list[dict[str, Any]]:
    """`summary` of every built-in model. Grids of weights that a model has not got are left out.

    Where a grid cannot be: {"model", "refused": the reason}. Raises UserError where that is so for all of them.
    """
    results: list[dict[str, Any]] = []
    for shape in SHAPES.values():
        try:
            memory = of_model(shape, _without(shape, quant), rest=rest, ternary=ternary)
            results.append(summary(memory, cache, min(CONTEXT, shape.context), sizes))
        except UserError as e:
            results.append({"model": shape.name, "refused": str(e)})
    if all("refused" in r for r in results):
        raise UserError(results[0]["refused"])
    return results


def _without(shape: Shape, quant: QuantConfig) -> QuantConfig:
    there = {piece.family for piece in shape.pieces} | {"gate_up", "down"}
    absent: dict[str, Any] = {key: "none" for key in FAMILIES if key not in there}
    return dataclasses.replace(quant, **absent | ({} if shape.mtp else {"mtp": "none"}))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 counted, 2 unusable input."""
    args = _parser().parse_args(argv)
    sizes = [args.memory] if args.memory else SIZES
    try:
        _check(args)
        result: Any
        if args.run or args.model:
            memory = _run(args) if args.run else _model(args)
            result = summary(memory, args.cache, _tokens(args.context, memory.shape), sizes)
            said = text(result)
        else:
            result = every(_quant(args), rest=args.rest, ternary=args.ternary or "TQ2_0", cache=args.cache, sizes=sizes)
            said = "\n".join([*aligned(table(result)), "", *notes(result)])
        if args.json:
            write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qatmoe.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help=f"a built-in shape: {', '.join(SHAPES)}")
    parser.add_argument("--run", default="", help="folder of a run, whose shape and grids are counted")
    parser.add_argument("--branch", default="", help="phase of the run; its last one by default")
    for key in _GRIDS:
        default = "; q2_0 by default" if key == "experts" else ""
        parser.add_argument(f"--{key}", default="", help=f"grid, as config.quant.{key}{default}")
    parser.add_argument("--rest", default="BF16", choices=RESTS, help="type of the weights that lie on no grid")
    parser.add_argument("--ternary", default="", help="type of ternary_256: TQ2_0 (default), TQ1_0 or Q2_0")
    parser.add_argument("--drop_mtp", action="store_true", help="leave the MTP modules out")
    parser.add_argument("--memory", default="", help=f"such as 128GB or 96GiB; {', '.join(SIZES)} by default")
    parser.add_argument("--cache", default="f16", help=f"type of the cache: f16, {', '.join(KINDS)}, or keys/values")
    parser.add_argument("--context", type=int, help=f"tokens; {CONTEXT:,} by default, or as many as the model has")
    parser.add_argument("--json", default="", help="file to write all numbers to")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for values that nothing can be done with, and for options that would do nothing."""
    given = [key for key in _GRIDS if getattr(args, key)]
    if args.run and args.model:
        raise UserError("--run and --model: give one of them")
    if args.run and given:
        raise UserError(f"--{given[0]}: a run's grids are its own; leave it out")
    if args.branch and not args.run:
        raise UserError(f"--branch {args.branch}: is for --run; leave it out")
    if args.drop_mtp and not (args.run or args.model):
        raise UserError("--drop_mtp: is for --model and --run; leave it out")
    if args.drop_mtp and args.mtp:
        raise UserError(f"--mtp {args.mtp}: --drop_mtp leaves the MTP modules out; give one of them")
    if args.context is not None and not (args.run or args.model):
        raise UserError(f"--context {args.context}: is for --model and --run; leave it out")
    if args.ternary and not args.run and "ternary_256" not in (getattr(args, key) for key in given):
        raise UserError(f"--ternary {args.ternary}: nothing is on the grid ternary_256; leave it out")
    if args.ternary and args.ternary not in get("ternary_256").gguf:
        raise UserError(f"--ternary {args.ternary!r}: must be one of {', '.join(get('ternary_256').gguf)}")
    for key in given:
        if getattr(args, key) not in ("none", *(["same"] if key in ("gate_up", "down", "mtp") else [])):
            get(getattr(args, key))
    _cache_type(args.cache)
    if args.json:
        check_place(args.json, "--json")
    if args.memory:
        parse_memory(args.memory)


def _quant(args: argparse.Namespace) -> QuantConfig:
    return QuantConfig(**{key: getattr(args, key) for key in _GRIDS if getattr(args, key)})


def _model(args: argparse.Namespace) -> Memory:
    shape = find(args.model)
    if args.drop_mtp:
        if not shape.mtp:
            raise UserError(f"--drop_mtp: {shape.name} has no MTP module here; leave it out")
        shape = dataclasses.replace(shape, pieces=tuple(p for p in shape.pieces if not p.mtp))
    return of_model(shape, _quant(args), rest=args.rest, ternary=args.ternary or "TQ2_0")


def _run(args: argparse.Namespace) -> Memory:
    options = {"rest": args.rest, "ternary": args.ternary or "TQ2_0", "drop_mtp": args.drop_mtp}
    with Branch(args.run, args.branch, **options) as branch:
        if args.ternary and all(grid.name != "ternary_256" for grid in branch.plan.values()):
            raise UserError(f"--ternary {args.ternary}: nothing is on the grid ternary_256; leave it out")
        if args.drop_mtp and not branch.cfg.model.n_mtp:
            raise UserError("--drop_mtp: the run has no MTP module; leave it out")
        return of_run(branch)


def _tokens(context: int | None, shape: Shape) -> int:
    if context is None:
        return min(CONTEXT, shape.context)
    if not 1 <= context <= shape.context:
        raise UserError(f"--context {context}: {shape.name} is made for 1 to {shape.context} tokens")
    return context


if __name__ == "__main__":
    sys.exit(cli.run(main))
