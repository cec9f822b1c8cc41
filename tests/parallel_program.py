"""Run by test_parallel.py in a process with eight CPU devices; the last line of its output is the result, as JSON.

losses MESH ...       losses of 20 steps on each mesh (data,fsdp,expert,tensor)
collectives MESH ...  the collectives of the compiled step on each mesh
"""

import functools
import json
import math
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding

from qatmoe import step as steps
from qatmoe.config import Config, MeshConfig, ModelConfig, OptimConfig, PhaseConfig, QuantConfig, TrainConfig
from qatmoe.mesh import batch_groups, make_mesh, spec
from qatmoe.run import abstract_state, quant_plan

QAT = PhaseConfig(steps=20, quantize=True, warmup=5)
# Eight experts with room for every token (no drop, whatever the groups), dims that all axes divide.
CFG = Config(
    model=ModelConfig(
        vocab_size=256, dim=64, n_layers=2, dense_dim=128, init_std=0.1, n_heads=8, n_kv_heads=8, head_dim=8,
        n_experts=8, top_k=2, expert_dim=64, capacity_factor=4.0,
    ),
    quant=QuantConfig(experts="q4_0", attention="none"),
    optim=OptimConfig(lr=5e-4),
    train=TrainConfig(batch_size=8, loss_chunk=64, phases={"qat": QAT}),
)  # fmt: skip
L = 16


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Sequences of a counting rule: something to learn in 20 steps."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, 256, (8, 1)), rng.integers(1, 4, (8, 1))
    return {"tokens": ((start + stride * np.arange(L + 2)) % 256).astype(np.int32)}


def losses(sizes: tuple[int, ...]) -> list[float]:
    """Losses of 20 steps."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    plan, _ = quant_plan(CFG)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda s: s.sharding, abstract_state(CFG, QAT, plan, mesh))
        first = lambda key: steps.branch(CFG, QAT, plan, steps.init_state(CFG, key))  # noqa: E731
        state = jax.jit(first, out_shardings=places)(jax.random.key(0))
        groups = batch_groups(mesh)
        step = jax.jit(functools.partial(steps.train_step, cfg=CFG, phase=QAT, plan=plan, groups=groups))
        found = []
        for i in range(QAT.steps):
            state, metrics = step(state, jax.device_put(batch_of(i), NamedSharding(mesh, spec(("batch", None)))), None)
            assert float(metrics["dropped_N"].max()) == 0
            found.append(float(metrics["loss"]))
    return found


if __name__ == "__main__":
    what = {"losses": losses}[sys.argv[1]]
    print(json.dumps({mesh: what(tuple(map(int, mesh.split(",")))) for mesh in sys.argv[2:]}))
