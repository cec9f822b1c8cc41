"""Where a training step's time goes: each part compiled and timed alone, forward and backward, at the config's shapes.

Alone, a part cannot share a pass over memory with its neighbours, so the parts need not add up to the step; what they
leave is norms, residual sums, embedding and what XLA overlaps. Each runs the whole batch on one device. The quantizer
is that of the config.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qatmoe import loss as losses
from qatmoe import step as steps
from qatmoe.config import Config
from qatmoe.model import moe, router, transformer
from qatmoe.model.attention import attention
from qatmoe.model.layers import ffn, rope_angles
from qatmoe.optim import make_optimizer
from qatmoe.run import quant_plan
from qatmoe.tree import leaves_by_path

Part = dict[str, Any]


def measure(cfg: Config, rounds: int) -> Iterator[Part]:
    """One row per part: `part`, `ms` (median of one call), `times` (calls in a step).

    Each is yielded when it is measured. A part that does not fit in memory alone has `failed`, the reason, for `ms`.
    """
    m = dataclasses.replace(cfg.model, scan_layers=False)
    n_moe = m.n_layers - m.n_dense_layers + m.n_mtp
    depth = m.n_layers + m.n_mtp
    micro = dataclasses.replace(cfg, model=m)
    found: list[tuple[str, int, Callable[[], Call]]] = [
        ("attention", depth, lambda: _attention(micro)),
        ("router", n_moe, lambda: _router(micro)),
    ]
    if m.experts == "dense":
        found.append(("dispatch and combine", n_moe, lambda: _dispatch(micro)))
        found.append(("expert matmuls", n_moe, lambda: _matmuls(micro)))
    else:
        found.append((f"experts ({m.experts}), dispatch included", n_moe, lambda: _experts(micro)))
    if m.n_shared_experts:
        found.append(("shared experts", n_moe, lambda: _ffn(micro, "layers", "shared")))
    if m.n_dense_layers:
        found.append(("dense FFN", m.n_dense_layers, lambda: _ffn(micro, "dense_layers", "ffn")))
    found.append(("head and loss", 1 + m.n_mtp, lambda: _head(micro)))
    for part, times, make in found:
        yield _row(part, times * cfg.train.grad_accum, functools.partial(_seconds, make, rounds))
    if quant_plan(cfg)[0]:
        name = f"fake quantization ({cfg.quant.scale})"
        yield _row(name, 1, functools.partial(_seconds, lambda: _quantize(cfg), rounds))
    yield _row("optimizer", 1, functools.partial(_optimizer_seconds, cfg, rounds))


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _row(part: str, times: int, seconds: Callable[[], float]) -> Part:
    try:
        return {"part": part, "ms": seconds() * 1e3, "times": times}
    except jax.errors.JaxRuntimeError as e:  # memory: the other parts are worth having
        return {"part": part, "failed": " ".join(str(e).split())[:200], "times": times}


def _seconds(make: Callable[[], Call], rounds: int) -> float:
    call, args = make()
    return seconds_of(jax.jit(call).lower(*args).compile(), args, rounds)


def seconds_of(call: Callable[..., Any], args: tuple[Any, ...], rounds: int) -> float:
    """Seconds of a call, median of `rounds` after two more.

    An accelerator is given several calls at once: what starting one and waiting for it takes is not the call's.
    """
    calls = 1 if jax.default_backend() == "cpu" else 10
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        for _ in range(calls):
            out = None  # its memory is the next result's
            out = call(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[2:])


def _with_gradients(f: Callable[..., jax.Array], n: int) -> Callable[..., Any]:
    """f's value and its gradients with respect to the first n arguments, at a gradient of ones."""

    def both(*args: Any) -> Any:
        out, pull_back = jax.vjp(lambda *floats: f(*floats, *args[n:]), *args[:n])
        return out, pull_back(jnp.ones_like(out))

    return both


def _tokens(cfg: Config) -> int:
    return cfg.train.micro_batch * cfg.data.seq_len


def _activations(cfg: Config, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(2), shape, jnp.dtype(cfg.model.dtype))


def _layer(cfg: Config, stack: str, name: str) -> Any:
    """The parameters `name` of one layer of a stack."""
    declared = transformer.param_tree(cfg.model)[stack]["0"][name]
    keys = jax.random.key(3)
    return jax.tree.map(lambda p: p.fill + p.std * jax.random.normal(keys, p.shape, jnp.float32), declared)


def _attention(cfg: Config) -> Call:
    m, B, L = cfg.model, cfg.train.micro_batch, cfg.data.seq_len
    rope = rope_angles(jnp.broadcast_to(jnp.arange(L), (B, L)), m.head_dim, m.rotary_fraction, m.rope_theta)
    f = _with_gradients(lambda params, x_BLD, rope: attention(params, m, x_BLD, rope, None), 2)
    return f, (_layer(cfg, "layers", "attn"), _activations(cfg, B, L, m.dim), rope)


def _router(cfg: Config) -> Call:
    f = _with_gradients(lambda params, x_TD: router.route(params, cfg.model, x_TD).weights_Tk, 2)
    return f, (_layer(cfg, "layers", "router"), _activations(cfg, _tokens(cfg), cfg.model.dim))


def _routed(cfg: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens (1, T, D) and how the router of a fresh layer sends them."""
    x_TD = _activations(cfg, _tokens(cfg), cfg.model.dim)
    routing = jax.jit(lambda p, x: router.route(p, cfg.model, x))(_layer(cfg, "layers", "router"), x_TD)
    return x_TD[None], routing.weights_Tk[None], routing.indices_Tk[None]


def _dispatch(cfg: Config) -> Call:
    def there_and_back(x_GTD: jax.Array, weights_GTk: jax.Array, indices_GTk: jax.Array) -> jax.Array:
        x_EGCD, weights_EGC, rows = moe.dispatch(x_GTD, weights_GTk, indices_GTk, cfg.model)
        return moe.combine(x_EGCD * weights_EGC[..., None].astype(x_EGCD.dtype), rows)

    return _with_gradients(there_and_back, 2), _routed(cfg)


def _matmuls(cfg: Config) -> Call:
    m = cfg.model
    experts = _layer(cfg, "layers", "experts")
    rows = (m.n_experts, 1, moe.capacity(_tokens(cfg), m))
    f = _with_gradients(lambda x, w, gate_up, down: moe.expert_matmuls(x, w, gate_up, down, m.swiglu_limit), 4)
    weights_EGC = jnp.full(rows, 1 / m.top_k, jnp.float32)
    return f, (_activations(cfg, *rows, m.dim), weights_EGC, experts["gate_up"], experts["down"])


def _experts(cfg: Config) -> Call:
    x_GTD, weights_GTk, indices_GTk = _routed(cfg)
    experts = _layer(cfg, "layers", "experts")

    def f(x_TD: Any, weights_Tk: Any, gate_up: Any, down: Any, indices_Tk: Any) -> jax.Array:
        return moe.expert_ffn(x_TD, weights_Tk, indices_Tk, gate_up, down, cfg.model, cfg.model.experts)[0]

    return _with_gradients(f, 4), (x_GTD[0], weights_GTk[0], experts["gate_up"], experts["down"], indices_GTk[0])


def _ffn(cfg: Config, stack: str, name: str) -> Call:
    f = _with_gradients(lambda params, x_TD: ffn(params, x_TD, cfg.model.swiglu_limit), 2)
    return f, (_layer(cfg, stack, name), _activations(cfg, _tokens(cfg), cfg.model.dim))


def _head(cfg: Config) -> Call:
    m, B, L = cfg.model, cfg.train.micro_batch, cfg.data.seq_len
    name = "embed" if m.tie_embeddings else "head"
    weight_VD = m.init_std * jax.random.normal(jax.random.key(4), (m.vocab_size, m.dim), jnp.float32)
    targets_BL = jax.random.randint(jax.random.key(5), (B, L), 0, m.vocab_size)

    def f(weight_VD: jax.Array, hidden_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
        weights_BL = jnp.ones(targets_BL.shape, jnp.float32)
        return losses.head_loss({name: weight_VD}, m, hidden_BLD, targets_BL, weights_BL, chunk=cfg.train.loss_chunk)[0]

    return _with_gradients(f, 2), (weight_VD, _activations(cfg, B, L, m.dim), targets_BL)


def _quantize(cfg: Config) -> Call:
    """The deployed values of all planned weights, and the gradients through them."""
    plan = quant_plan(cfg)[0]
    first = jax.jit(lambda k: steps.branch(cfg, plan, steps.init_state(cfg, k), quantize=True))
    state = first(jax.random.key(0))

    def both(params: Any, gradients: Any) -> Any:
        values, pull_back = jax.vjp(lambda p: steps.deployed(cfg, plan, p, True), params)
        return {path: v for path, v in leaves_by_path(values).items() if path in plan}, pull_back(gradients)

    shapes = jax.eval_shape(lambda p: steps.deployed(cfg, plan, p, True), state.params)
    return both, (state.params, jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes))


def _optimizer_seconds(cfg: Config, rounds: int) -> float:
    """The update of all weights in place, their gradients bf16 or f32 as the step makes them."""
    optimizer = make_optimizer(cfg.optim)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)
        return optax.apply_updates(params, updates), state

    params = {"model": jax.jit(functools.partial(transformer.init_params, cfg.model))(jax.random.key(0)), "scales": {}}
    state = jax.jit(optimizer.init)(params)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, jnp.dtype(cfg.model.dtype)), params)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    held = [params, state]  # one call's results are the next one's arguments, in the same memory
    del params, state

    def again() -> list[Any]:
        held[:] = compiled(*held, grads)
        return held

    return seconds_of(again, (), rounds)
