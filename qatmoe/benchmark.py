"""What quantization costs: the optimizer step in full precision beside the same step under QAT, in one process.

    python -m qatmoe.benchmark --config configs/moe_2bit.py [--scales learned,dynamic] [--rounds 20] [--json FILE]

Variants take turns step by step, so a machine whose speed drifts slows all of them alike; the cost is the median of the
ratios of neighbouring steps. Random weights, random tokens, no data loading.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qatmoe import cli
from qatmoe import step as steps
from qatmoe.config import CHOICES, Config, PhaseConfig
from qatmoe.errors import UserError
from qatmoe.mesh import batch_groups, make_mesh, spec
from qatmoe.report import environment
from qatmoe.run import abstract_state, check_mesh, quant_plan

Row = dict[str, Any]


class Variant:
    """One compiled training step and its state."""

    def __init__(self, name: str, cfg: Config, quantize: bool, batch: dict[str, jax.Array]):
        self.name, self.batch = name, batch
        phase = PhaseConfig(steps=1, quantize=quantize)
        mesh = make_mesh(cfg.mesh)
        plan, _ = quant_plan(cfg)
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
        self.seconds: list[float] = []

    def run(self) -> None:
        """One timed step."""
        start = time.perf_counter()
        self.state, values = self._step(self.state, self.batch, None)
        jax.block_until_ready(values)
        self.seconds.append(time.perf_counter() - start)


def measure(cfg: Config, scales: Sequence[str], rounds: int) -> list[Row]:
    """Times the full-precision step and one QAT step per scale kind; the first row is the baseline."""
    mesh = make_mesh(cfg.mesh)
    check_mesh(cfg, mesh)
    length = cfg.data.seq_len + 1 + cfg.model.n_mtp
    tokens = jax.random.randint(jax.random.key(1), (cfg.train.batch_size, length), 0, cfg.model.vocab_size, jnp.int32)
    tokens = jax.device_put(tokens, NamedSharding(mesh, spec(("batch", None))))
    variants = [Variant("full precision", cfg, False, {"tokens": tokens})]
    for scale in scales:
        quant = dataclasses.replace(cfg.quant, scale=scale)
        grid = quant.experts
        variants.append(
            Variant(f"{grid}, {scale} scales", dataclasses.replace(cfg, quant=quant), True, {"tokens": tokens})
        )
    for round_ in range(rounds + 3):
        for v in variants:
            v.run()
            if round_ < 3:  # warm-up
                v.seconds.clear()
    per_step = cfg.train.batch_size * cfg.data.seq_len
    return [
        {
            "variant": v.name,
            "step_ms": statistics.median(v.seconds) * 1e3,
            "tokens_per_s": per_step / statistics.median(v.seconds),
            "cost": statistics.median(a / b for a, b in zip(v.seconds, variants[0].seconds, strict=True)) - 1,
            "compile_s": v.compile_s,
        }
        for v in variants
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table, writes --json."""
    options = {"scales": "learned,dynamic", "rounds": "20", "json": ""}
    try:
        cfg, given = cli.parse(sys.argv if argv is None else argv, __doc__, options)
        if not given["rounds"].isdigit() or int(given["rounds"]) < 1:
            raise UserError(f"--rounds={given['rounds']}: must be a number of at least 1")
        wrong = set(given["scales"].split(",")) - set(CHOICES["quant.scale"])
        if wrong:
            raise UserError(f"--scales={given['scales']}: must be of {', '.join(CHOICES['quant.scale'])}")
        with jax.set_mesh(make_mesh(cfg.mesh)):
            rows = measure(cfg, given["scales"].split(","), int(given["rounds"]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(f"{'step':<24}{'ms':>9}{'tokens/s':>11}{'cost':>9}{'compile s':>11}")
    for r in rows:
        print(
            f"{r['variant']:<24}{r['step_ms']:>9.1f}{r['tokens_per_s']:>11,.0f}{r['cost']:>+9.1%}{r['compile_s']:>11.1f}"
        )
    if given["json"]:
        result = {"config": cfg.name, **environment(), "rows": rows}
        Path(given["json"]).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
