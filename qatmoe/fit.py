"""What would make a step fit that does not: the cheapest change first, estimated by arithmetic, then compiled.

In this order, each alone and then with those before it: recompute layers in the backward pass (a third more FLOPs);
smaller micro-batches (more passes over the weights); the mesh's data axis added to fsdp (more gathering); first moments
in bfloat16 (the only one that alters what is trained); the next larger machines.

The estimate: state, decoded weights and gradients by shape, and the rest of what the compiler asked for scaled with the
tokens of a micro-batch, or, for recomputation, divided by the layers plus one (too little where remat was "dots", of
which a part is computed again already: what is compiled decides).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from qatmoe.aot import Job, Report, examine, make_job
from qatmoe.config import Config
from qatmoe.errors import UserError
from qatmoe.mesh import batch_groups
from qatmoe.topology import GIB, Topology

Settings = dict[str, Any]  # key of the config -> value

ROOM = 0.97  # an estimate has to leave this much free before it is worth a compilation
TRIES = 3  # compilations


def suggest(job: Job, report: Report) -> str:
    """The cheapest change that makes a step fit, or what was tried in vain, in one line."""
    tried: list[str] = []  # in vain
    hbm = report["memory"]["hbm"]
    for settings, machine in changes(job):
        try:
            other = make_job(changed(job.cfg, settings), machine, job.phase)
        except UserError:  # the mesh or the batch does not fit it
            continue
        if estimate(job, report["memory"]["needed"], other) > ROOM * hbm:
            continue
        what = _flags(settings, machine, job.topology)
        try:
            found = examine(other)
        except UserError as e:
            tried.append(f"{what} ({e})")
        else:
            needed = found["memory"]["needed"] / GIB
            if found["fits"]:
                return f"with {what} it fits: {needed:.2f} GiB, {found['head_room']:.0%} head-room (compiled)"
            tried.append(f"{what} ({needed:.2f} GiB)")
        if len(tried) == TRIES:
            break
    if tried:
        return f"not enough, compiled: {'; '.join(tried)}"
    return "by estimate nothing that is known here would be enough: a smaller model, or devices with more memory"


def changes(job: Job) -> Iterator[tuple[Settings, Topology]]:
    """Every change alone, then each with all that come before it, then larger machines without and with all of them."""
    cfg = job.cfg
    single: list[Settings] = []
    if cfg.model.remat != "full":
        single.append({"model.remat": "full"})
    parts = [n * cfg.train.grad_accum for n in (2, 4, 8)]
    single += [{"train.grad_accum": n} for n in parts if cfg.train.batch_size % n == 0]
    if cfg.mesh.data != 1:
        single.append({"mesh.data": 1, "mesh.fsdp": -1})
    if cfg.optim.moments_dtype == "float32":
        single.append({"optim.moments_dtype": "bfloat16"})
    together: list[Settings] = [{}]
    for settings in single:
        together.append(together[-1] | settings)
    yield from ((settings, job.topology) for settings in (*single, *together[2:]))
    for machine in job.topology.larger():
        yield from ((settings, machine) for settings in ({}, together[-1]))


def changed(cfg: Config, settings: Settings) -> Config:
    """The config with other values."""
    for key, value in settings.items():
        group, name = key.split(".")
        cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **{name: value})})
    return cfg


def _flags(settings: Settings, machine: Topology, before: Topology) -> str:
    """What to type for a change."""
    flags = [f"--topology={machine.name}"] if machine != before else []
    return " ".join([*flags, *(f"--config.{key}={value}" for key, value in settings.items())])


def estimate(job: Job, needed: int, other: Job) -> float:
    """Bytes that `other` would need, from those that `job` needs."""
    m = job.cfg.model
    rest = max(needed - _known(job), 0) * _tokens(other) / _tokens(job)
    if other.cfg.model.remat != m.remat:
        kept = m.n_layers * _tokens(other) * m.dim * jnp.dtype(m.dtype).itemsize  # what goes into each layer
        rest = rest * 2 / (m.n_layers + 1) + kept
    sums = other.work_bytes()["gradients"] if other.cfg.train.grad_accum > 1 and job.cfg.train.grad_accum == 1 else 0
    return _known(other) + rest + sums


def _known(job: Job) -> int:
    return sum(job.state_bytes().values()) + sum(job.work_bytes().values())


def _tokens(job: Job) -> float:
    """Of a micro-batch, on one device."""
    t = job.cfg.train
    return t.batch_size / t.grad_accum * job.cfg.data.seq_len / batch_groups(job.mesh)
