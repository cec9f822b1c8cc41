"""Run by test_parallel.py in a process with eight CPU devices; the last line of its output is the result, as JSON.

losses MESH ...       losses of 20 steps on each mesh (data,fsdp,expert,tensor)
collectives MESH ...  the collectives of the compiled step on each mesh
"""

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qatmoe import hlo
from qatmoe import step as steps
from qatmoe.config import Config, MeshConfig, ModelConfig, OptimConfig, PhaseConfig, QuantConfig, TrainConfig
from qatmoe.mesh import batch_groups, make_mesh, spec
from qatmoe.run import abstract_state, quant_plan

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


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Sequences of a counting rule: something to learn in 20 steps."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, 256, (8, 1)), rng.integers(1, 4, (8, 1))
    return {"tokens": ((start + stride * np.arange(L + 2)) % 256).astype(np.int32)}


@contextlib.contextmanager
def program(sizes: tuple[int, ...]) -> Iterator[tuple[Mesh, Any, Callable[..., Any]]]:
    """The mesh, the abstract first state and the jitted step."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    plan, _ = quant_plan(CFG)
    step = functools.partial(steps.train_step, cfg=CFG, phase=QAT, plan=plan, groups=batch_groups(mesh))
    with jax.set_mesh(mesh):
        yield mesh, abstract_state(CFG, QAT, plan, mesh), jax.jit(step)


@functools.cache
def first_state() -> steps.TrainState:
    """The state before the first step, on one device."""
    return steps.branch(CFG, QAT, quant_plan(CFG)[0], steps.init_state(CFG, jax.random.key(0)))


def losses(sizes: tuple[int, ...]) -> list[float]:
    """Losses of 20 steps."""
    with program(sizes) as (mesh, abstract, step):
        places = jax.tree.map(lambda s: s.sharding, abstract)
        state = jax.device_put(first_state(), places)
        if sizes == (1, 2, 2, 2):  # what is made in place is what was made on one device
            made = jax.jit(first_state.__wrapped__, out_shardings=places)()
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), made, state)
            assert made.params["model"]["layers"]["experts"]["gate_up"].addressable_shards[0].data.shape == (
                2,
                4,
                32,
                64,
            )
        rows = NamedSharding(mesh, spec(("batch", None)))
        found = []
        for i in range(QAT.steps):
            state, metrics = step(state, jax.device_put(batch_of(i), rows), None)
            assert float(metrics["dropped_N"].max()) == 0
            found.append(float(metrics["loss"]))
    return found


def collectives(sizes: tuple[int, ...]) -> list[tuple[str, tuple[str, ...], float, str]]:
    """Every collective, its bytes times how often it runs."""
    with program(sizes) as (mesh, state, step):
        rows = NamedSharding(mesh, spec(("batch", None)))
        batch = {"tokens": jax.ShapeDtypeStruct((8, L + 2), np.int32, sharding=rows)}
        text = step.lower(state, batch, None).compile().as_text()
    return [(c.kind, c.axes, c.sent * c.runs, c.name) for c in hlo.cost(text, mesh.shape).collectives]


if __name__ == "__main__":
    what = {"losses": losses, "collectives": collectives}[sys.argv[1]]
    print(json.dumps({mesh: what(tuple(map(int, mesh.split(",")))) for mesh in sys.argv[2:]}))
