"""The training step of a config, compiled for a machine that is not there: does it fit, and how long would it take?

    python -m qatmoe.train --config C --compile_only --topology v5p:4x4x8 [--phase qat] [--nosuggest] [--json FILE]

What is compiled is the very step that `phases.loop` runs, with its state's shapes and shardings. No text is read, and
nothing is written but the report. docs/scaling.md explains it line by line.
"""

import dataclasses
import functools
import importlib.metadata
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qatmoe import hlo, roofline
from qatmoe import step as steps
from qatmoe import topology as machines
from qatmoe.benchmark import model_flops
from qatmoe.config import Config
from qatmoe.errors import UserError
from qatmoe.mesh import AXES, make_mesh, spec
from qatmoe.model.attention import implementation
from qatmoe.run import abstract_state, check_mesh, jit_step, quant_plan
from qatmoe.text_table import aligned
from qatmoe.topology import GIB, Topology
from qatmoe.tree import leaves_by_path

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to compile."""

    cfg: Config
    phase: str
    topology: Topology
    mesh: Mesh

    @functools.cached_property
    def state(self) -> steps.TrainState:
        """Shapes and shardings of the state."""
        return abstract_state(self.cfg, self._plan, self.mesh, quantize=self.cfg.train.phases[self.phase].quantize)

    @functools.cached_property
    def _plan(self) -> Any:
        return quant_plan(self.cfg)[0]

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a batch, as `data.batches` makes them."""
        cfg = self.cfg
        shape = (cfg.train.batch_size, cfg.data.seq_len + 1 + cfg.model.n_mtp)
        rows = NamedSharding(self.mesh, spec(("batch", None)))
        names = ("tokens", "segments", "positions") if cfg.data.packing == "segments" else ("tokens",)
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in names}

    @property
    def teacher(self) -> Any:
        """Shapes and shardings of the weights that a phase is distilled from; None without."""
        phase = self.cfg.train.phases[self.phase]
        if not phase.distill:
            return None
        own = phase.own_teacher  # another run's is taken to be in full precision
        quantize = bool(own) and self.cfg.train.phases[own].quantize
        state = abstract_state(self.cfg, self._plan, self.mesh, quantize=quantize)
        weights = jax.eval_shape(lambda s: steps.eval_weights(self.cfg, self._plan, s, quantize), state)
        place = lambda w, p: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=p.sharding)  # noqa: E731
        return jax.tree.map(place, weights, state.params["model"])

    def compile(self) -> jax.stages.Compiled:
        """The step for the machine. Raises jax.errors.JaxRuntimeError, where it does not fit."""
        phase = self.cfg.train.phases[self.phase]
        state, quantize, distill, freeze = self.state, phase.quantize, phase.distill, phase.freeze
        step = jit_step(self.cfg, self._plan, self.mesh, state, quantize=quantize, distill=distill, freeze=freeze)
        with jax.set_mesh(self.mesh):
            return step.lower(self.state, self.batch, self.teacher, np.float32(1)).compile()

    # ---- bytes on one device, by arithmetic ----

    def state_bytes(self) -> dict[str, int]:
        """Bytes that one device holds between steps, by kind."""
        return {
            "master weights": _held(self.state.params["model"]),
            "learned scales": _held(self.state.params["scales"]),
            "optimizer moments": _held(self.state.opt_state),
            "average of the weights": _held(self.state.ema),
        }

    def work_bytes(self) -> dict[str, int]:
        """Bytes of what every step makes of the weights, were all of it alive at once: decoded weights, gradients."""
        model = self.state.params["model"]
        planned = [w for path, w in leaves_by_path(model).items() if path in self._plan]
        quantize = self.cfg.train.phases[self.phase].quantize
        shrink = 4 // jnp.dtype(self.cfg.model.dtype).itemsize
        return {"decoded weights": _held(planned) // shrink if quantize else 0, "gradients": _held(model)}


def _held(tree: Any) -> int:
    """Bytes of one device's parts of a tree."""
    return sum(s.dtype.itemsize * math.prod(s.sharding.shard_shape(s.shape)) for s in jax.tree.leaves(tree))


def make_job(cfg: Config, topology: Topology, phase: str = "") -> Job:
    """Checks everything that can be wrong before anything is compiled.

    Raises:
      UserError: an unknown phase, or a mesh or batch that does not fit the topology.
    """
    phases = cfg.train.phases
    quantizing = [name for name, p in phases.items() if p.quantize]
    phase = phase or (quantizing or list(phases))[0]
    if phase not in phases:
        raise UserError(f"--phase={phase!r}: no such phase; the config has {', '.join(phases)}")
    described = machines.devices(topology)
    try:
        mesh = make_mesh(cfg.mesh, described)
    except UserError as e:
        raise UserError(f"--topology={topology.name} ({topology.size} devices): {e}") from e
    check_mesh(cfg, mesh)
    # The step would ask which backend JAX runs on, and that is a CPU here.
    platform = mesh.devices.flat[0].platform
    kernel = implementation(cfg.model, cfg.data.seq_len, "gpu" if platform == "cuda" else platform)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=kernel))
    return Job(cfg, phase, topology, mesh)


# ---- the report ------------------------------------------------------------------------------------------------------


def examine(job: Job) -> Report:
    """Compiles a job and reads everything off it; a step that does not fit has no times and no collectives."""
    cfg, chip = job.cfg, job.topology.chip
    start = time.perf_counter()
    report: Report = {
        "config": cfg.name,
        "phase": job.phase,
        "quantized": cfg.train.phases[job.phase].quantize,
        "topology": job.topology.name,
        "device": chip.name if chip else "CPU",
        "devices": job.topology.size,
        "mesh": dict(job.mesh.shape),
        "layers": cfg.model.n_layers,
        "batch_size": cfg.train.batch_size,
        "grad_accum": cfg.train.grad_accum,
        "seq_len": cfg.data.seq_len,
        "compiler": _compiler(job.topology),
        "memory": {**job.state_bytes(), **job.work_bytes()},
    }
    try:
        program = job.compile()
    except jax.errors.JaxRuntimeError as e:
        report["memory"]["needed"] = needed_by_error(str(e))
    else:
        _read_memory(report["memory"], program)
        _read_cost(report, job, program)
    report["compile_s"] = time.perf_counter() - start
    if chip:
        report["memory"]["hbm"] = chip.hbm
        report["fits"] = report["memory"]["needed"] <= chip.hbm
        report["head_room"] = 1 - report["memory"]["needed"] / chip.hbm
    return report


def needed_by_error(text: str) -> int:
    """Bytes that a program would take, from the compiler's refusal. Raises UserError: it failed for another reason."""
    found = re.search(r"(?:temporaries \(|Used )(\d+(?:\.\d+)?)([KMGT])", text)
    if "RESOURCE_EXHAUSTED" not in text or not found:
        raise UserError(f"the step does not compile: {text.splitlines()[0][:300]}")
    return int(float(found.group(1)) * 2 ** (10 * " KMGT".index(found.group(2))))


def _read_memory(memory: dict[str, int], program: jax.stages.Compiled) -> None:
    """needed: the compiler's peak (which it holds against the HBM), and the program itself."""
    m = program.memory_analysis()
    assert m is not None
    new = m.output_size_in_bytes - m.alias_size_in_bytes
    peak = m.peak_memory_in_bytes or m.argument_size_in_bytes + new + m.temp_size_in_bytes
    memory["arguments"] = m.argument_size_in_bytes
    memory["temporaries"] = peak - m.argument_size_in_bytes
    memory["program"] = m.generated_code_size_in_bytes
    memory["needed"] = peak + m.generated_code_size_in_bytes


def _read_cost(report: Report, job: Job, program: jax.stages.Compiled) -> None:
    cost = hlo.cost(program.as_text() or "", dict(job.mesh.shape))
    devices = job.topology.size
    flat = list(job.mesh.devices.flat)
    spans = roofline.spans_of(cost, job.topology, flat)
    report |= {
        "matmul_flops": cost.flops,
        "model_flops": model_flops(job.cfg) / devices,
        "memory_bytes": cost.bytes,
        "unknown_loops": cost.unknown_loops,
        "collectives": roofline.collective_rows(cost, job.topology.chip, spans),
    }
    if job.topology.chip:
        t = roofline.step_time(cost, job.topology.chip, spans)
        tokens = job.cfg.train.batch_size * job.cfg.data.seq_len / devices
        report["seconds"] = t._asdict()
        report["exposed_share"] = t.exposed
        report["tokens_per_s_per_device"] = tokens / t.step
        report["mfu"] = report["model_flops"] / job.topology.chip.flops / t.step


def _compiler(topology: Topology) -> str:
    package = {"cpu": "jaxlib", "gpu": "jax-cuda12-pjrt"}.get(topology.kind, "libtpu")
    return f"jax {jax.__version__}, {package} {importlib.metadata.version(package)}"


def table(r: Report) -> str:
    """A report for the terminal."""
    mesh = " x ".join(f"{axis} {r['mesh'][axis]}" for axis in AXES)
    what = "quantized" if r["quantized"] else "full precision"
    lines = [
        f"{r['config']}, phase {r['phase']} ({what}): {r['layers']} layers, batch {r['batch_size']} x {r['seq_len']}"
        f"{' in ' + str(r['grad_accum']) + ' parts' if r['grad_accum'] > 1 else ''}",
        f"{r['topology']}: {r['devices']} x {r['device']}, mesh {mesh}",
        f"compiled, not run, in {r['compile_s']:.0f} s by {r['compiler']}",
        "",
        *aligned(_memory_rows(r["memory"])),
    ]
    if "matmul_flops" in r:
        lines += ["", *aligned(_time_rows(r)), "", *aligned(_collective_rows(r))]
        if r["unknown_loops"]:
            lines.append(f"{r['unknown_loops']} loops have an unknown number of turns and are counted once")
    return "\n".join([*lines, "", verdict(r)])


def verdict(r: Report) -> str:
    """Whether it fits, in one line."""
    needed = r["memory"]["needed"] / GIB
    if "fits" not in r:
        return f"no verdict: a CPU is no measure of an accelerator's memory and time ({needed:.2f} GiB a device here)"
    if r["fits"]:
        return f"fits: {needed:.2f} of {r['memory']['hbm'] / GIB:.2f} GiB, {r['head_room']:.0%} head-room"
    return f"does not fit, by {needed - r['memory']['hbm'] / GIB:.2f} GiB: it takes {needed:.2f} GiB a device"


def _memory_rows(memory: dict[str, int]) -> list[list[str]]:
    rows = [["memory of a device", ""]]
    for name, value in memory.items():
        if name in ("decoded weights", "gradients"):
            name = f"  {name}, were all alive at once"
        if value:
            rows.append([name, _size(value)])
    return rows


def _size(n: float) -> str:
    unit, name = (GIB, "GiB") if n >= GIB / 10 else (2**20, "MiB") if n >= 2**20 / 10 else (2**10, "KiB")
    return f"{n / unit:.2f} {name}"


def _time_rows(r: Report) -> list[list[str]]:
    rows = [
        ["a device and step", ""],
        ["GFLOP of matmuls, compiled", f"{r['matmul_flops'] / 1e9:,.1f}"],
        ["GFLOP of the model (6 per active weight and token)", f"{r['model_flops'] / 1e9:,.1f}"],
        ["main memory read and written", _size(r["memory_bytes"])],
    ]
    if "seconds" in r:
        t = r["seconds"]
        rows += [
            ["matmuls at peak, ms", f"{1e3 * t['matmul']:.1f}"],
            ["memory at peak, ms", f"{1e3 * t['memory']:.1f}"],
            ["each kernel at the slower of both, ms", f"{1e3 * t['work']:.1f}"],
            ["collectives beside other work, ms", f"{1e3 * t['overlapped']:.1f}"],
            ["collectives that are waited for, ms", f"{1e3 * t['waiting']:.1f}"],
            ["step, at least, ms", f"{1e3 * t['step']:.1f}"],
            ["waiting for collectives", f"{r['exposed_share']:.0%}"],
            ["model FLOPs of the peak, at most", f"{r['mfu']:.0%}"],
            ["tokens/s a device, at most", f"{r['tokens_per_s_per_device']:,.0f}"],
        ]
    return rows


def _collective_rows(r: Report) -> list[list[str]]:
    rows = [["collective", "over", "devices", "times", "sent", "beside work", "ms"]]
    for c in r["collectives"]:
        beside = c["overlapped_bytes"] / c["sent_bytes"] if c["sent_bytes"] else 0.0
        ms = f"{1e3 * c['seconds']:.1f}" if "seconds" in r else "-"
        rows.append(
            [c["kind"], c["axes"], str(c["devices"]), str(c["runs"]), _size(c["sent_bytes"]), f"{beside:.0%}", ms]
        )
    return rows
