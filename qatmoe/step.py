"""The training state and the pure functions on it: initialise, take one step, evaluate one batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qatmoe import loss as losses
from qatmoe.config import Config
from qatmoe.mesh import constrain, fitted
from qatmoe.model import router, transformer
from qatmoe.optim import carry_over, is_frozen, make_optimizer
from qatmoe.quant import fake
from qatmoe.quant.plan import Plan
from qatmoe.tree import leaves_by_path, path_of

Params = dict[str, Any]


class TrainState(NamedTuple):
    """All that a phase carries from step to step (the data iterator aside)."""

    step: jax.Array  # () i32, optimizer steps taken in this phase
    params: Params  # {"model": tree of f32 weights, "scales": {path: f32 learned scales}, empty if none}
    opt_state: Any
    ema: Params  # average of params["model"], or {} when optim.ema is 0


def init_state(cfg: Config, key: jax.Array) -> TrainState:
    """Random weights and fresh moments. key: a typed PRNG key."""
    return state_of(cfg, transformer.init_params(cfg.model, key))


def state_of(cfg: Config, model: Params) -> TrainState:
    """The state before the first step of training these weights."""
    params = {"model": model, "scales": {}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(cfg.optim).init(params),
        ema=model if cfg.optim.ema else {},
    )


def branch(cfg: Config, plan: Plan, parent: TrainState, *, quantize: bool, reset_moments: bool = False) -> TrainState:
    """The first state of a phase that starts from `parent`: step 0, scales by least squared error if it quantizes."""
    learned = quantize and cfg.quant.scale == "learned"
    model = parent.params["model"]
    scales = (parent.params["scales"] or fake.init_scales(plan, model)) if learned else {}
    params = {"model": model, "scales": scales}
    fresh = make_optimizer(cfg.optim).init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=fresh if reset_moments else carry_over(fresh, parent.opt_state),
        ema=model if cfg.optim.ema else {},
    )


def deployed(cfg: Config, plan: Plan, params: Params, quantize: bool) -> Params:
    """The weights a forward pass uses: the planned ones replaced by their decoded deployed values when `quantize`.

    Differentiable: straight-through to the weights, LSQ to learned scales.
    """
    if not quantize:
        return params["model"]
    quant, dtype = cfg.quant, jnp.dtype(cfg.model.dtype)
    return fake.apply(
        plan, params["model"], params["scales"], rule=quant.dynamic_rule, clip=quant.clip_gradient, dtype=dtype
    )


def train_step(
    state: TrainState,
    batch: losses.Batch,
    teacher: Params | None,
    factor: jax.Array | np.float32,
    *,
    cfg: Config,
    plan: Plan,
    quantize: bool,
    distill: float,
    freeze: str,
    groups: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step.

    Args:
      batch: (B, L') arrays.
      teacher: weights for distillation, or None.
      factor: () f32 on every learning rate, from `optim.schedule`. An input, so that phases that differ in their
        schedule alone are one program.
      quantize: whether planned weights are used as they would be deployed.
      distill: weight of the KL to the teacher; cross-entropy has the rest.
      freeze: as PhaseConfig has it. What it finds counts in no norm of gradients either; moments fade.

    The quantized weights are computed once, whatever the number of micro-batches: gradients are summed at them and
    pulled back through the quantizer once.
    """
    weights, pull_back = jax.vjp(lambda p: deployed(cfg, plan, p, quantize), state.params)
    totals = losses.denominators(batch, cfg.model.n_mtp)

    def micro_grads(micro: losses.Batch) -> tuple[Params, tuple[jax.Array, dict[str, Any]]]:
        loss_of = lambda w: losses.training_loss(  # noqa: E731
            w, cfg, micro, totals, teacher=teacher, distill=distill, groups=groups
        )
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(weights)
        return grads, (loss, aux)

    grads, (loss, aux) = _accumulate(micro_grads, batch, cfg.train.grad_accum, groups)
    (grads,) = pull_back(grads)
    grads = _without_frozen(grads, freeze)
    updates, opt_state = make_optimizer(cfg.optim).update(grads, state.opt_state, state.params)
    updates = _without_frozen(updates, freeze)  # of moments and decay
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: u * factor, updates))
    params["scales"] = fake.kept_positive(plan, params["scales"])
    params["model"] = _move_router_bias(params["model"], aux["load_NE"], cfg, freeze)
    decay = _ema_decay(cfg.optim.ema, state.step)
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params["model"]) if state.ema else {}
    metrics = {k: v for k, v in aux.items() if k != "load_NE"} | {
        "loss": loss,
        "load_NE": aux["load_NE"],
        "grad_norm": optax.tree.norm(grads),
        "lr": factor * cfg.optim.lr,
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def _ema_decay(asked: float, step: jax.Array) -> jax.Array:
    """Decay of the average after `step` steps of the phase: less at first, or a short phase's average were its start.

    min(asked, (1 + step) / (10 + step)), the rule of tf.train.ExponentialMovingAverage's num_updates.
    """
    return jnp.minimum(asked, (1 + step) / (10 + step))


def _accumulate(micro_grads: Any, batch: losses.Batch, n: int, groups: int) -> Any:
    """Sums gradients and metrics over n micro-batches in float32, then casts to their own dtypes.

    Each micro-batch takes equally many rows from every group, so no row changes device.
    """
    if n == 1:
        return micro_grads(batch)

    def cut(a: jax.Array) -> jax.Array:
        rest = a.shape[1:]
        parts = a.reshape(groups, n, a.shape[0] // n // groups, *rest).swapaxes(0, 1)
        return constrain(parts.reshape(n, a.shape[0] // n, *rest), (None, "batch", *[None] * len(rest)))

    micros = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(micro_grads, jax.tree.map(lambda a: a[0], micros))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    sums, _ = jax.lax.scan(lambda c, m: (jax.tree.map(jnp.add, c, micro_grads(m)), None), zeros, micros)
    return jax.tree.map(lambda s, total: total.astype(s.dtype), shapes, sums)


def _without_frozen(tree: Params, freeze: str) -> Params:
    """Gradients or updates, with zeros for what a phase freezes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if is_frozen(path_of(path), freeze) else x, tree
    )


def _move_router_bias(model: Params, load_NE: jax.Array, cfg: Config, freeze: str) -> Params:
    """Applies the balance rule to every router's selection bias; rows of load_NE are MoE layers, then MTP modules."""
    if not cfg.model.router_bias or not cfg.train.bias_rate:
        return model
    n_moe = cfg.model.n_layers - cfg.model.n_dense_layers

    def move(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_of(path)
        if not name.endswith("router/bias") or is_frozen(name, freeze):
            return leaf
        rows = load_NE[n_moe:] if name.startswith("mtp/") else load_NE[:n_moe]
        if leaf.ndim == 1:  # unrolled layers: "layers/3/router/bias"
            rows = rows[int(name.split("/")[1])]
        return router.update_bias(leaf, rows, cfg.train.bias_rate)

    return jax.tree_util.tree_map_with_path(move, model)


def eval_weights(cfg: Config, plan: Plan, state: TrainState, quantize: bool) -> Params:
    """The weights that evaluation uses: the EMA if kept, quantized as they would be deployed.

    Averaged weights are put on the grid at the learned scales of the last step; scales are not averaged. A scale that
    changed its sign, and turned its block's levels around with it, would average to a size that neither sign had. Which
    of the two is better was not measured.
    """
    return deployed(cfg, plan, {**state.params, "model": state.ema or state.params["model"]}, quantize)


def state_shardings(cfg: Config, mesh: Mesh, abstract: TrainState) -> TrainState:
    """Shardings for a state: parameters as they are kept; moments, scales and EMA lie as their parameter does."""
    by_path = leaves_by_path(transformer.kept_specs(cfg.model))

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = path_of(path).split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if name in by_path and len(by_path[name]) == len(leaf.shape):
                return NamedSharding(mesh, fitted(mesh, by_path[name], leaf.shape))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract)
