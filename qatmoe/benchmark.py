"""What a training step costs: in full precision beside QAT, by grid, by part, with and without loading data.

    python -m qatmoe.benchmark --config configs/moe_2bit.py [--grids q2_0,mxfp4 | all | none] [--scales learned,dynamic]
        [--rounds 20] [--parts yes] [--data yes] [--json FILE] [--config.key=value ...]

Without --grids the config's own grids are timed; with it each takes the place of all of them. Each QAT step takes turns
with the full-precision step, so a machine whose speed drifts slows both alike; its cost is the median of the ratios of
neighbouring steps. Two states are held at a time. Random weights, one batch of random tokens again and again, no data
loading; --data adds the same loop over the config's text, --parts the step's parts, each alone. A step that does not
fit in memory is a row that says so. `dropped`: share of choices that found no room, the median of the timed steps.

Model FLOPs are 6 per active weight and token (2 forward, 4 backward) and 6 N B L^2 H Dh for causal attention, whatever
is computed again or on empty rows; a weight is active where a token is multiplied with it, so embeddings count where
they are the head. The ceiling is the best of several square matmuls in model.dtype, measured here.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qatmoe import cli, parts
from qatmoe import step as steps
from qatmoe.config import CHOICES, Config, QuantConfig
from qatmoe.data import batches
from qatmoe.errors import UserError
from qatmoe.files import check_place, write_atomically
from qatmoe.mesh import make_mesh, spec
from qatmoe.model import transformer
from qatmoe.model.layers import einsum
from qatmoe.quant.grid import GRIDS, get
from qatmoe.report import environment
from qatmoe.run import abstract_state, check_mesh, jit_step, place, quant_plan, train_iterator

Row = dict[str, Any]
Batch = dict[str, jax.Array]
WARM_UP = 3  # steps
FACTOR = np.float32(1)  # on the learning rates: a schedule's plateau


class Variant:
    """One compiled training step and its state."""

    def __init__(self, name: str, cfg: Config, quantize: bool, batch: Batch, mesh: Mesh):
        self.name, self.batch = name, batch
        self.seconds: list[float] = []
        self.dropped: list[float] = []
        plan = quant_plan(cfg)[0]
        places = jax.tree.map(lambda s: s.sharding, abstract_state(cfg, plan, mesh, quantize=quantize))

        def first(key: jax.Array) -> steps.TrainState:
            state = steps.init_state(cfg, key)
            return steps.branch(cfg, plan, state, quantize=True) if quantize else state

        self.state = jax.jit(first, out_shardings=places)(jax.random.key(0))
        start = time.perf_counter()
        step = jit_step(cfg, plan, mesh, self.state, quantize=quantize, distill=0.0, freeze="")
        self._step = step.lower(self.state, batch, None, FACTOR).compile()
        self.compile_s = time.perf_counter() - start

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
        self.state, values = self._step(self.state, self.batch, None, FACTOR)
        jax.block_until_ready(values)
        self.seconds.append(time.perf_counter() - start)
        self.dropped.append(float(jnp.mean(values["dropped_N"])))

    def stream(self, source: Iterator[Batch], n: int) -> float:
        """Seconds per step of n steps over a source of batches, the host preparing the next while the device works."""
        for _ in range(WARM_UP):
            self.state, values = self._step(self.state, next(source), None, FACTOR)
        jax.block_until_ready(values)
        start = time.perf_counter()
        for _ in range(n):
            self.state, values = self._step(self.state, next(source), None, FACTOR)
        jax.block_until_ready(values)
        return (time.perf_counter() - start) / n


def active_weights(cfg: Config) -> int:
    """Weights that one token is multiplied with; the head counts once more for each MTP module."""
    m = cfg.model
    n = 0
    for name, shape in transformer.param_shapes(m).items():
        size = math.prod(shape)
        if name == ("embed" if m.tie_embeddings else "head"):
            n += size * (1 + m.n_mtp)
        elif "/experts/" in name:
            n += size * m.top_k // m.n_experts
        elif name != "embed" and not name.endswith(("norm", "bias")):
            n += size
    return n


def model_flops(cfg: Config) -> float:
    """Model FLOPs of one optimizer step; the module's docstring has the formula."""
    m, B, L = cfg.model, cfg.train.batch_size, cfg.data.seq_len
    attention = 6 * (m.n_layers + m.n_mtp) * B * L**2 * m.n_heads * m.head_dim
    return 6.0 * active_weights(cfg) * B * L + attention


def ceiling(dtype: str) -> float:
    """FLOP/s of the fastest square matmul of three sizes on one device."""
    square = jax.jit(lambda a: einsum("ij,jk->ik", a, a))
    best = 0.0
    for n in (2048, 4096, 8192) if jax.default_backend() != "cpu" else (512, 1024, 2048):
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
        best = max(best, 2 * n**3 / parts.seconds_of(square, (a,), rounds=10))
    return best


def measure(cfg: Config, quants: dict[str, QuantConfig], rounds: int) -> Iterator[Row]:
    """Times the full-precision step and one QAT step per {name: quantization}; the first row is the baseline."""
    mesh = make_mesh(cfg.mesh)
    batch = random_batch(cfg, mesh)
    base = Variant("full precision", cfg, False, batch, mesh)
    for _ in range(WARM_UP + rounds):
        base.run()
    yield _row(cfg, base, base.seconds[WARM_UP:], None)
    for name, quant in quants.items():
        try:
            yield _beside(base, name, dataclasses.replace(cfg, quant=quant), rounds)
        except jax.errors.JaxRuntimeError as e:  # memory: the other rows are worth having
            yield {"variant": name, "failed": " ".join(str(e).split())[:200]}
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(base.state)):  # donated to a step that failed
            base = Variant(base.name, cfg, False, batch, mesh)


def _beside(base: Variant, name: str, cfg: Config, rounds: int) -> Row:
    """A QAT step in turns with the full-precision one. Its state is gone when this returns."""
    other = Variant(name, cfg, True, base.batch, make_mesh(cfg.mesh))
    base.seconds.clear()
    for _ in range(WARM_UP + rounds):
        base.run()
        other.run()
    return _row(cfg, other, other.seconds[WARM_UP:], base.seconds[WARM_UP:])


def variants(cfg: Config, grids: str, scales: Sequence[str]) -> dict[str, QuantConfig]:
    """{name: quantization} of what --grids and --scales ask for. A grid among `all` that does not fit is left out.

    Raises:
      UserError: an unknown grid, one that was named and does not fit, or one for a config that quantizes nothing.
    """
    if grids == "none":
        return {}
    planned = dict.fromkeys(grid.name for grid in quant_plan(cfg)[0].values())
    if not planned and grids:
        raise UserError(f"--grids={grids}: config.quant puts no tensor on a grid; set config.quant.experts")
    moved = {g: on_grid(cfg.quant, g) for g in (GRIDS if grids == "all" else _listed(grids, "grids"))}
    found = moved or ({"+".join(planned): cfg.quant} if planned else {})
    for name, quant in list(found.items()):
        try:
            quant_plan(dataclasses.replace(cfg, quant=quant))
        except UserError as e:
            if grids != "all":
                raise
            print(f"{name}: left out: {e}")
            del found[name]
    return {f"{n}, {scale} scales": dataclasses.replace(q, scale=scale) for n, q in found.items() for scale in scales}


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
        "dropped": statistics.median(variant.dropped[WARM_UP:]),
    }


def on_grid(quant: QuantConfig, grid: str) -> QuantConfig:
    """The same families of weights, on another grid."""
    families = ("experts", "gate_up", "down", "shared", "attention", "embedding", "head", "mtp")
    moved: dict[str, Any] = {f: grid for f in families if getattr(quant, f) not in ("none", "same")}
    return dataclasses.replace(quant, **moved)


def random_batch(cfg: Config, mesh: Mesh) -> Batch:
    """Random tokens on their devices."""
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1 + cfg.model.n_mtp)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.model.vocab_size, jnp.int32)
    return {"tokens": jax.device_put(tokens, NamedSharding(mesh, spec(("batch", None))))}


def measure_data(cfg: Config, rounds: int) -> Row:
    """Tokens per second of the full-precision loop over the config's own text, and over one batch again and again."""
    mesh = make_mesh(cfg.mesh)
    data = batches.load_data(cfg.data, cfg.model.vocab_size)
    iterator = train_iterator(cfg, mesh, data)
    real = (place(mesh, cfg.train.batch_size, batch) for batch in iterator)
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
        if "failed" in r:
            lines.append(f"{r['variant']:<28} failed: {r['failed'][:80]}")
            continue
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
            if "failed" in p:
                lines.append(f"{p['part']:<40} failed: {p['failed'][:80]}")
                continue
            total = p["ms"] * p["times"]
            lines.append(f"{p['part']:<40}{p['ms']:>9.2f}{p['times']:>7}{total:>9.2f}{total / step_ms:>11.1%}")
    return "\n".join(lines)


def run(cfg: Config, quants: dict[str, QuantConfig], rounds: int, with_parts: bool, data: bool) -> Iterator[Row]:
    """What was asked for, as the JSON that --json writes: after every row and part all that is known."""
    with jax.set_mesh(make_mesh(cfg.mesh)):
        with_text = measure_data(cfg, rounds) if data else None  # first: its settings may be unusable
        top = ceiling(cfg.model.dtype)
        result: Row = {
            "config": cfg.name,
            **environment(),
            "params": sum(map(math.prod, transformer.param_shapes(cfg.model).values())),
            "active": active_weights(cfg),
            "batch_size": cfg.train.batch_size,
            "seq_len": cfg.data.seq_len,
            "flops_per_step": model_flops(cfg),
            "ceiling_tflops": top / 1e12,
            "rows": [],
            "data": with_text,
            "parts": None,
        }
        for row in measure(cfg, quants, rounds):
            if "failed" not in row:
                row["ceiling_share"] = row["model_tflops"] * 1e12 / top / jax.device_count()
            result["rows"].append(row)
            yield result
        if with_parts:
            result["parts"] = []
            for part in parts.measure(cfg, rounds):
                result["parts"].append(part)
                yield result


def _listed(given: str, name: str) -> list[str]:
    """The values between commas; of grids and of kinds of scales they must be known."""
    values = [v for v in given.split(",") if v]
    for v in values:
        if name == "grids":
            get(v)
        elif v not in CHOICES["quant.scale"]:
            raise UserError(f"--scales={v}: must be of {', '.join(CHOICES['quant.scale'])}")
    return values


def _rounds(given: str) -> int:
    if not (given.isascii() and given.isdigit() and int(given) > 0):
        raise UserError(f"--rounds={given}: must be a number of at least 1")
    return int(given)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table, writes --json. Exit codes: 0 measured, 2 unusable input."""
    options = {"grids": "", "scales": "learned,dynamic", "rounds": "20", "parts": "no", "data": "no", "json": ""}
    try:
        cfg, given = cli.parse(sys.argv if argv is None else argv, __doc__, options)
        for name in ("parts", "data"):
            if given[name] not in ("yes", "no"):
                raise UserError(f"--{name}={given[name]}: must be yes or no")
        if given["json"]:
            check_place(given["json"], "--json")
        rounds, scales = _rounds(given["rounds"]), _listed(given["scales"], "scales")
        if not scales:
            raise UserError(f"--scales={given['scales']!r}: name at least one of {', '.join(CHOICES['quant.scale'])}")
        check_mesh(cfg, make_mesh(cfg.mesh))
        quants = variants(cfg, given["grids"], scales)
        for result in run(cfg, quants, rounds, given["parts"] == "yes", given["data"] == "yes"):
            if given["json"]:  # after every row: a long measurement may be cut short
                write_atomically(Path(given["json"]), json.dumps(result, indent=1) + "\n")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
