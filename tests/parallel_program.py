"""Run by test_parallel.py in a process with eight CPU devices; the last line of its output is the result, as JSON.

CORE MESH ...    what training on each mesh (data,fsdp,expert,tensor) is: {mesh: {losses, collectives}}

It keeps to one core, the CORE-th of those that it may use: the threads of eight devices spin while they wait for each
other, and would take the second core from another such process.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qatmoe import hlo
from qatmoe import step as steps
from qatmoe.config import Config, MeshConfig, ModelConfig, OptimConfig, PhaseConfig, QuantConfig, TrainConfig
from qatmoe.mesh import make_mesh, spec
from qatmoe.model.transformer import stack_layers
from qatmoe.optim import schedule
from qatmoe.run import abstract_state, jit_eval_weights, jit_rounding, jit_step, quant_plan

QAT = PhaseConfig(steps=20, quantize=True, warmup=5)
# Eight experts with room for every token (no drop, whatever the groups), dims that all axes divide. A large eps: where
# a gradient is nothing but rounding, Adam would divide it by itself, and a code or a choice of experts flip with it.
CFG = Config(
    model=ModelConfig(
        vocab_size=256, dim=64, n_layers=3, dense_dim=128, init_std=0.1, n_heads=8, n_kv_heads=8, head_dim=8,
        n_experts=8, top_k=2, expert_dim=64, capacity_factor=4.0,
    ),
    quant=QuantConfig(experts="q4_0", attention="none"),
    optim=OptimConfig(lr=1e-3, eps=1e-3),
    train=TrainConfig(batch_size=8, loss_chunk=64, phases={"qat": QAT}),
)  # fmt: skip
L = 16
PURE = {"data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "expert": (1, 1, 8, 1), "tensor": (1, 1, 1, 8)}
WATCHED = [*PURE.values(), (1, 2, 2, 2)]  # meshes whose collectives are looked at


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Sequences of a counting rule: something to learn in 20 steps."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, 256, (8, 1)), rng.integers(1, 4, (8, 1))
    return {"tokens": ((start + stride * np.arange(L + 2)) % 256).astype(np.int32)}


@functools.cache
def first_state() -> steps.TrainState:
    """The state before the first step, on one device."""
    return jax.jit(make_state)()


def make_state() -> steps.TrainState:
    """The state before the first step."""
    return steps.branch(CFG, quant_plan(CFG)[0], steps.init_state(CFG, jax.random.key(0)), quantize=True)


def train(sizes: tuple[int, ...]) -> dict[str, Any]:
    """`losses` of 20 steps and, of the meshes where they are looked at, the step's `collectives`.

    Of each: kind, axes, bytes sent times how often it runs, and name.
    """
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    plan, _ = quant_plan(CFG)
    first = jax.tree.map(jnp.copy, first_state())  # the step writes over it
    with jax.set_mesh(mesh):
        abstract = abstract_state(CFG, plan, mesh, quantize=True)
        places = jax.tree.map(lambda s: s.sharding, abstract)
        state = jax.device_put(first, places)
        if sizes == (1, 2, 2, 2):  # what is made in place is what was made on one device
            made = jax.jit(make_state, out_shardings=places)()
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), made, state)
            unrolled = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, scan_layers=False))
            draw = functools.partial(steps.init_state, unrolled)
            apart = steps.state_shardings(unrolled, mesh, jax.eval_shape(draw, jax.random.key(0)))
            model = stack_layers(jax.jit(draw, out_shardings=apart)(jax.random.key(0)).params["model"])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), model, first.params["model"])
            shard = made.params["model"]["layers"]["experts"]["gate_up"].addressable_shards[0]
            assert shard.data.shape == (2, 4, 32, 64)
            model = state.params["model"]  # and what is evaluated lies as it does
            on_grid = jit_eval_weights(CFG, plan, abstract, quantize=True)(state)
            for shown in (on_grid, jit_rounding(plan, model, "search")(model)):
                same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), shown, model)
                assert all(jax.tree.leaves(same)), same
        rows = NamedSharding(mesh, spec(("batch", None)))
        batch = {"tokens": jax.ShapeDtypeStruct((8, L + 2), np.int32, sharding=rows)}
        step = jit_step(CFG, plan, mesh, abstract, quantize=True, distill=0.0, freeze="")
        step = step.lower(abstract, batch, None, np.float32(1)).compile()
        found = []
        for i in range(QAT.steps):
            factor = np.float32(schedule(CFG.optim, QAT, i))
            state, metrics = step(state, jax.device_put(batch_of(i), rows), None, factor)
            assert np.asarray(metrics["dropped_N"]).max() == 0
            found.append(float(metrics["loss"]))
        moved = hlo.cost(step.as_text(), mesh.shape).collectives if sizes in WATCHED else []
    return {"losses": found, "collectives": [(c.kind, c.axes, c.sent * c.runs, c.name) for c in moved]}


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(sys.argv[1]) % len(cores)]})
    print(json.dumps({mesh: train(tuple(map(int, mesh.split(",")))) for mesh in sys.argv[2:]}))
