"""The training step compiled for an H100 on a machine without one: memory, compile time, traffic of its kernels.

    python -m experiments.throughput.compile            compiles, writes compiled.json and the table of the README
    python -m experiments.throughput.compile --write    writes the table of the README from compiled.json

Needs an environment with `pip install -e . 'jax[cuda12]==0.11.2'` (Python 3.12 or newer); no GPU, no CUDA driver. XLA
compiles for a description of the chip, without trying kernels on it (no autotuning, no split-K). The figures are the
compiler's: bytes and FLOPs are XLA's count over all kernels (it does not see into cuDNN's attention and counts a loop's
body once), memory is what its buffers take. They say how a change moves the program, and what fits; they are no times.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Without trying kernels no backend takes a product that is split along its contraction axis: none is split.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_experimental_force_split_k=1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from configs import h100_1b, h100_fine, h100_study
from qatmoe import step as steps
from qatmoe.benchmark import model_flops, on_grid
from qatmoe.config import Config, resolve
from qatmoe.report import fill_tables
from qatmoe.run import quant_plan
from qatmoe.topology import H100

HERE = Path(__file__).parent


def compiled(cfg: Config, quantize: bool, distill: float, device: jax.Device) -> dict[str, Any]:
    """A training step. The state is what it is given: a teacher's weights count in it."""
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="cudnn"))
    plan = quant_plan(cfg)[0]
    shapes = jax.eval_shape(functools.partial(steps.init_state, cfg), jax.random.key(0))
    if quantize:
        shapes = jax.eval_shape(functools.partial(steps.branch, cfg, plan, quantize=True), shapes)
    state = placed(shapes, device)
    rows = (cfg.train.batch_size, cfg.data.seq_len + 1 + cfg.model.n_mtp)
    batch = placed({"tokens": jax.ShapeDtypeStruct(rows, jnp.int32)}, device)
    teacher = state.params["model"] if distill else None
    step = jax.jit(
        functools.partial(steps.train_step, cfg=cfg, plan=plan, quantize=quantize, distill=distill), donate_argnums=0
    )
    return {"model_tflop": model_flops(cfg) / 1e12, **measured(step, state, batch, teacher, np.float32(1))}


def first_state(cfg: Config, device: jax.Device) -> dict[str, Any]:
    """What a run begins with: weights, drawn, and zeros."""
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), device)
    return measured(jax.jit(functools.partial(steps.init_state, cfg)), key)


def placed(shapes: Any, device: jax.Device) -> Any:
    """Arrays' shapes, on a device."""
    place = SingleDeviceSharding(device)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)


def measured(function: Any, *arguments: Any) -> dict[str, float]:
    """Compiles a jitted function and reads off what the compiler says of it."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return {
        "compile_s": seconds,
        "state_gib": max(memory.argument_size_in_bytes, memory.output_size_in_bytes) / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        **traffic(program),
    }


def traffic(program: Any) -> dict[str, float]:
    """Gigabytes that all kernels read and write, and matmul TFLOPs, by XLA's own count over the compiled module."""
    from jax._src.lib import xla_client  # the public cost_analysis needs a device

    (module,) = program.runtime_executable().hlo_modules()
    cost = xla_client._xla.hlo_module_cost_analysis(xla_client.make_cpu_client(), module)
    return {"gb_moved": cost["bytes accessed"] / 1e9, "tflop": cost["flops"] / 1e12}


def variants(big: Config, fine: Config, small: Config) -> list[tuple[str, Config, bool, float]]:
    """Steps: (name, config, quantize, distill)."""

    def sized(cfg: Config, batch: int) -> Config:
        return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=batch))

    def on(cfg: Config, grid: str, scale: str = "learned") -> Config:
        return dataclasses.replace(cfg, quant=dataclasses.replace(on_grid(cfg.quant, grid), scale=scale))

    def model(cfg: Config, **fields: Any) -> Config:
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **fields))

    f32_moments = dataclasses.replace(big, optim=dataclasses.replace(big.optim, moments_dtype="float32"))
    whole = f"{small.name}, batch {small.train.batch_size}"
    return [
        *((f"{big.name}, batch {b}", sized(big, b), False, 0.0) for b in (8, 16, 32)),
        (f"{big.name}, batch 32, remat full", model(sized(big, 32), remat="full"), False, 0.0),
        (f"{big.name}, batch 8, scanned layers", model(big, scan_layers=True), False, 0.0),
        (f"{big.name}, batch 8, capacity 1.25", model(big, capacity_factor=1.25), False, 0.0),
        (f"{big.name}, batch 8, f32 moments", f32_moments, False, 0.0),
        *(
            (f"{big.name}, batch 8, {g}, learned scales", on(big, g), True, 0.0)
            for g in ("q2_0", "q2_k", "q4_0", "mxfp4")
        ),
        (f"{big.name}, batch 8, q2_0, learned scales, half KL to a teacher", on(big, "q2_0"), True, 0.5),
        (f"{big.name}, batch 8, q2_0, dynamic scales", on(big, "q2_0", "dynamic"), True, 0.0),
        *((f"{fine.name}, batch 8, {n} layers", model(fine, n_layers=n), False, 0.0) for n in (5, 7)),
        (whole, small, False, 0.0),
        (f"{whole}, q2_0, learned scales", small, True, 0.0),
        (f"{whole}, q2_0, learned scales, half KL to a teacher", small, True, 0.5),
    ]


def measure() -> dict[str, Any]:
    """Compiles every variant; one that does not fit is a row too."""
    topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    device, configs = topology.devices[0], [resolve(c.get_config()) for c in (h100_1b, h100_fine, h100_study)]
    wanted = [(name, functools.partial(compiled, *step, device)) for name, *step in variants(*configs)]
    wanted += [(f"{cfg.name}, first state", functools.partial(first_state, cfg, device)) for cfg in configs]
    rows = []
    for name, compile_it in wanted:
        try:
            row = compile_it()
        except jax.errors.JaxRuntimeError as e:
            row = {"failed": str(e).splitlines()[0][:200]}
        rows.append({"variant": name, **row})
        print(rows[-1], flush=True)
    return {"jax": jax.__version__, "device": "compiled for NVIDIA H100 80GB HBM3, run nowhere", "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| program | state GiB | temporary | peak | GB moved | TFLOP | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        if "failed" in r:
            lines.append(f"| {r['variant']} | does not compile: {r['failed'].partition(' for HLO')[0]} | | | | | |")
            continue
        lines.append(
            f"| {r['variant']} | {r['state_gib']:.1f} | {r['temporary_gib']:.1f} | {r['peak_gib']:.1f} | "
            f"{r['gb_moved']:.0f} | {r['tflop']:.1f} | {r['compile_s']:.0f} |"
        )
    lines.append(f"\nBy XLA of jax {result['jax']}, {result['device']}.")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="only write the README's table from compiled.json")
    if not parser.parse_args().write:
        (HERE / "compiled.json").write_text(json.dumps(measure(), indent=1) + "\n")
    fill_tables(HERE / "README.md", {"compiled": table(json.loads((HERE / "compiled.json").read_text()))})


if __name__ == "__main__":
    main()
