"""What a training step costs: in full precision beside QAT, by grid, by part, with and without loading data.

    python -m qatmoe.benchmark --config configs/moe_2bit.py [--grids q2_0,mxfp4 | all | none] [--scales learned,dynamic]
        [--rounds 20] [--parts yes] [--data yes] [--json FILE] [--config.key=value ...]

Each QAT step takes turns with the full-precision step, so a machine whose speed drifts slows both alike; its cost is
the median of the ratios of neighbouring steps. Two states are held at a time. Random weights, random tokens, no data
loading; --data adds the same loop over the config's text, --parts the step's parts, each alone.

Model FLOPs are 6 per active weight and token (2 forward, 4 backward) and 6 N B L^2 H Dh for causal attention, whatever
is computed again or on empty rows; a weight is active where a token is multiplied with it, so embeddings count where
they are the head. The ceiling is the best of several square matmuls in model.dtype, measured here.
"""

import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qatmoe import cli, parts
from qatmoe import step as steps
from qatmoe.config import CHOICES, Config, PhaseConfig, QuantConfig
from qatmoe.data import batches
from qatmoe.errors import UserError
from qatmoe.mesh import batch_groups, make_mesh, spec
from qatmoe.model import transformer
from qatmoe.quant.grid import GRIDS, get
from qatmoe.report import environment
from qatmoe.run import abstract_state, check_mesh, quant_plan, train_iterator
from qatmoe.tree import path_of

Row = dict[str, Any]
Batch = dict[str, jax.Array]
WARM_UP = 3  # steps


class Variant:
    """One compiled training step and its state."""

    def __init__(self, name: str, cfg: Config, quantize: bool, batch: Batch, mesh: Mesh):
        self.name, self.batch, self.seconds = name, batch, list[float]()
        phase = PhaseConfig(steps=1, quantize=quantize)
        plan = quant_plan(cfg)[0]
        places = jax.tree.map(lambda s: s.sharding, abstract_state(cfg, phase, plan, mesh))

        def first(key: jax.Array) -> steps.TrainState:
            state = steps.init_state(cfg, key)
            return steps.branch(cfg, phase, plan, state) if quantize else state

        self.state = jax.jit(first, out_shardings=places)(jax.random.key(0))
        step = jax.jit(
            functools.partial(steps.train_step, cfg=cfg, phase=phase, plan=plan, groups=batch_groups(mesh)),
            donate_argnums=0,
        )
        start = time.perf_counter()
        self._step = step.lower(self.state, batch, None).compile()
        self.compile_s = time.perf_counter() - start
        self.dropped = math.nan

    @property
    def peak_bytes(self) -> int | None:
        """Memory of the compiled step on one device: arguments, results that replace none, and temporaries."""
        m = self._step.memory_analysis()
        if m is None:
            return None
        return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes

    def run(self) -> None:
        """One timed step."""
        start = time.perf_counter()
        self.state, values = self._step(self.state, self.batch, None)
        jax.block_until_ready(values)
        self.seconds.append(time.perf_counter() - start)
        self.dropped = float(jnp.mean(values["dropped_N"]))

    def stream(self, source: Iterator[Batch], n: int) -> float:
        """Seconds per step of n steps over a source of batches, the host preparing the next while the device works."""
        for _ in range(WARM_UP):
            self.state, values = self._step(self.state, next(source), None)
        jax.block_until_ready(values)
        start = time.perf_counter()
        for _ in range(n):
            self.state, values = self._step(self.state, next(source), None)
        jax.block_until_ready(values)
        return (time.perf_counter() - start) / n


def active_weights(cfg: Config) -> int:
    """Weights that one token is multiplied with; the head counts once more for each MTP module."""
    m = cfg.model
    n = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(transformer.abstract_params(m)):
        name = path_of(path)
        if name == ("embed" if m.tie_embeddings else "head"):
            n += leaf.size * (1 + m.n_mtp)
        elif "/experts/" in name:
            n += leaf.size * m.top_k // m.n_experts
        elif name != "embed" and not name.endswith(("norm", "bias")):
            n += leaf.size
    return n


def model_flops(cfg: Config) -> float:
    """Model FLOPs of one optimizer step; the module's docstring has the formula."""
    m, B, L = cfg.model, cfg.train.batch_size, cfg.data.seq_len
    attention = 6 * (m.n_layers + m.n_mtp) * B * L**2 * m.n_heads * m.head_dim
    return 6.0 * active_weights(cfg) * B * L + attention


def ceiling(dtype: str) -> float:
    """FLOP/s of the fastest square matmul of three sizes on one device."""
    best = 0.0
    for n in (2048, 4096, 8192) if jax.default_backend() != "cpu" else (512, 1024, 2048):
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
        multiply = jax.jit(lambda a: a @ a)
        jax.block_until_ready(multiply(a))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(multiply(a))
            times.append(time.perf_counter() - start)
        best = max(best, 2 * n**3 / statistics.median(times))
    return best


def measure(cfg: Config, grids: Sequence[str], scales: Sequence[str], rounds: int) -> list[Row]:
    """Times the full-precision step and one QAT step per grid and scale kind; the first row is the baseline."""
    mesh = make_mesh(cfg.mesh)
    check_mesh(cfg, mesh)
    quants = {  # checked before anything is timed
        f"{grid}, {scale} scales": dataclasses.replace(on_grid(cfg.quant, grid), scale=scale)
        for grid in grids
        for scale in scales
    }
    quants = {name: quant for name, quant in quants.items() if fits(dataclasses.replace(cfg, quant=quant), name)}
    batch = random_batch(cfg, mesh)
    base = Variant("full precision", cfg, False, batch, mesh)
    for _ in range(WARM_UP + rounds):
        base.run()
    rows = [_row(cfg, base, base.seconds[WARM_UP:], None)]
    for name, quant in quants.items():
        other = Variant(name, dataclasses.replace(cfg, quant=quant), True, batch, mesh)
        base.seconds.clear()
        for _ in range(WARM_UP + rounds):
            base.run()
            other.run()
        rows.append(_row(cfg, other, other.seconds[WARM_UP:], base.seconds[WARM_UP:]))
        del other  # its state, before the next one's
    return rows


def _row(cfg: Config, variant: Variant, seconds: list[float], beside: list[float] | None) -> Row:
    step_s = statistics.median(seconds)
    ratios = [a / b for a, b in zip(seconds, beside or seconds, strict=True)]
    return {
        "variant": variant.name,
        "step_ms": step_s * 1e3,
        "tokens_per_s": cfg.train.batch_size * cfg.data.seq_len / step_s,
        "model_tflops": model_flops(cfg) / step_s / 1e12,
        "cost": statistics.median(ratios) - 1,
        "cost_quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)[::2]] if len(ratios) > 1 else None,
        "compile_s": variant.compile_s,
        "peak_bytes": variant.peak_bytes,
        "dropped": variant.dropped,
    }


def on_grid(quant: QuantConfig, grid: str) -> QuantConfig:
    """The same families of weights, on another grid."""
    families = ("experts", "gate_up", "down", "shared", "attention", "embedding", "head", "mtp")
    moved: dict[str, Any] = {f: grid for f in families if getattr(quant, f) not in ("none", "same")}
    return dataclasses.replace(quant, **moved)


def fits(cfg: Config, name: str) -> bool:
    """Whether the grids divide the model's rows; says so where they do not."""
    try:
        return bool(quant_plan(cfg)[0])
    except UserError as e:
        print(f"{name}: left out: {e}")
        return False


def random_batch(cfg: Config, mesh: Mesh) -> Batch:
    """Random tokens on their devices."""
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1 + cfg.model.n_mtp)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.model.vocab_size, jnp.int32)
    return {"tokens": jax.device_put(tokens, NamedSharding(mesh, spec(("batch", None))))}


def measure_data(cfg: Config, rounds: int) -> Row:
    """Tokens per second of the full-precision loop over the config's own text, and over one batch again and again."""
    mesh = make_mesh(cfg.mesh)
    data = batches.load_data(cfg.data, cfg.model.vocab_size)
    iterator = train_iterator(cfg, data)
    rows = NamedSharding(mesh, spec(("batch", None)))
    real = ({k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()} for batch in iterator)
    first = next(real)
    variant = Variant("full precision", cfg, False, first, mesh)
    turns: dict[str, list[float]] = {"synthetic": [], "real": []}
    for _ in range(3):
        turns["synthetic"].append(variant.stream(iter(lambda: first, None), rounds))
        turns["real"].append(variant.stream(real, rounds))
    iterator.close()
    per_step = cfg.train.batch_size * cfg.data.seq_len
    speed = {name: per_step / statistics.median(seconds) for name, seconds in turns.items()}
    ratios = [a / b for a, b in zip(turns["synthetic"], turns["real"], strict=True)]
    return {**{f"{k}_tokens_per_s": v for k, v in speed.items()}, "ratio": statistics.median(ratios)}


def table(result: Row) -> str:
    """What was measured, for the terminal."""
    lines = [
        f"{result['config']}: {result['params'] / 1e6:,.1f}M parameters, {result['active'] / 1e6:,.1f}M active; batch "
        f"{result['batch_size']} x {result['seq_len']}; {result['flops_per_step'] / 1e12:.3g} model TFLOP a step; "
        f"matmul ceiling {result['ceiling_tflops']:.3g} TFLOP/s a device; {result['devices']} x {result['device']}",
        f"{'step':<28}{'ms':>9}{'tokens/s':>11}{'TFLOP/s':>9}{'ceiling':>9}{'cost':>8}{'GiB':>7}{'compile s':>11}"
        f"{'dropped':>9}",
    ]
    for r in result["rows"]:
        memory = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
        lines.append(
            f"{r['variant']:<28}{r['step_ms']:>9.1f}{r['tokens_per_s']:>11,.0f}{r['model_tflops']:>9.3g}"
            f"{r['ceiling_share']:>9.1%}{r['cost']:>+8.1%}{memory:>7}{r['compile_s']:>11.1f}{r['dropped']:>9.2%}"
        )
    if result["data"]:
        d = result["data"]
        lines.append(
            f"with its text {d['real_tokens_per_s']:,.0f} tokens/s, without loading "
            f"{d['synthetic_tokens_per_s']:,.0f}: {d['ratio']:.1%}"
        )
    if result["parts"]:
        lines.append(f"{'part, alone, forward and backward':<40}{'ms each':>9}{'times':>7}{'ms':>9}{'of a step':>11}")
        step_ms = result["rows"][0]["step_ms"]
        for p in result["parts"]:
            total = p["ms"] * p["times"]
            lines.append(f"{p['part']:<40}{p['ms']:>9.2f}{p['times']:>7}{total:>9.2f}{total / step_ms:>11.1%}")
    return "\n".join(lines)


def run(cfg: Config, grids: Sequence[str], scales: Sequence[str], rounds: int, with_parts: bool, data: bool) -> Row:
    """Everything that was asked for, as the JSON that --json writes."""
    with jax.set_mesh(make_mesh(cfg.mesh)):
        with_text = measure_data(cfg, rounds) if data else None  # first: its settings may be unusable
        rows = measure(cfg, grids, scales, rounds)
        top = ceiling(cfg.model.dtype)
        for row in rows:
            row["ceiling_share"] = row["model_tflops"] * 1e12 / top / jax.device_count()
        return {
            "config": cfg.name,
            **environment(),
            "params": sum(p.size for p in jax.tree.leaves(transformer.abstract_params(cfg.model))),
            "active": active_weights(cfg),
            "batch_size": cfg.train.batch_size,
            "seq_len": cfg.data.seq_len,
            "flops_per_step": model_flops(cfg),
            "ceiling_tflops": top / 1e12,
            "rows": rows,
            "data": with_text,
            "parts": parts.measure(cfg, rounds) if with_parts else None,
        }


def _choices(given: str, known: Callable[[str], object], name: str) -> list[str]:
    values = [v for v in given.split(",") if v]
    for v in values:
        known(v)
    if not values:
        raise UserError(f"--{name}={given!r}: name at least one")
    return values


def _grids(given: str) -> list[str]:
    if given in ("all", "none"):
        return list(GRIDS) if given == "all" else []
    return _choices(given, get, "grids")


def _known_scale(name: str) -> None:
    if name not in CHOICES["quant.scale"]:
        raise UserError(f"--scales={name}: must be of {', '.join(CHOICES['quant.scale'])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table, writes --json. Exit codes: 0 measured, 2 unusable input."""
    options = {"grids": "", "scales": "learned,dynamic", "rounds": "20", "parts": "no", "data": "no", "json": ""}
    try:
        cfg, given = cli.parse(sys.argv if argv is None else argv, __doc__, options)
        if not given["rounds"].isdigit() or int(given["rounds"]) < 1:
            raise UserError(f"--rounds={given['rounds']}: must be a number of at least 1")
        for name in ("parts", "data"):
            if given[name] not in ("yes", "no"):
                raise UserError(f"--{name}={given[name]}: must be yes or no")
        grids = _grids(given["grids"] or cfg.quant.experts)
        scales = _choices(given["scales"], _known_scale, "scales")
        result = run(cfg, grids, scales, int(given["rounds"]), given["parts"] == "yes", given["data"] == "yes")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(table(result))
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
