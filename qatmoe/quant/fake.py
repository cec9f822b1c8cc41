"""Quantization in the forward pass, with gradients: the model computes with the numbers it will be deployed with.

For one block of n weights w with scale s, and s^ = snap(s), u = w / s^, the forward value is exactly the decoded one,

    w^ = level(code) * s^,     code = nearest level to u.

Rounding has no useful derivative. Straight-through, the code follows u: d level / d u := t. In the range [lo, hi] of
the levels t = 1. Outside t = 1 too by default, so that no weight is ever stuck; with `clip` it is 0, the
rule of LSQ, whose code stays where it is. With d u / d w = 1 / s^ and d u / d s^ = -u / s^,

    d w^ / d w  = s^ * t / s^                    = t
    d w^ / d s^ = level + s^ * t * (-u / s^)     = level - t * u

and snap is passed straight through: d s^ / d s := 1. The gradient of a loss with respect to s is the sum over the block
of g * (level - t * u), times 1 / sqrt(n * hi) (Esser et al. 2020, "Learned Step Size Quantization", sections 2.1 and
2.2). There, under SGD, that factor sets the size of a scale's step. Here Adam divides it out: it only sets what scales
weigh in the global norm of `optim.clip`, and against `optim.eps`; `optim.scale_lr` sets their step. With negative s^
all of this holds unchanged: u changes sign with it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qatmoe.quant.grid import MIN_F16, Grid
from qatmoe.quant.plan import Plan
from qatmoe.tree import leaves_by_path, path_of

Params = dict[str, Any]
Scales = dict[str, jax.Array]  # path -> (..., G) f32, as trained: not snapped
Codes = dict[str, jax.Array]  # path -> (..., I) uint8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def fake_quant(grid: Grid, w: jax.Array, scale: jax.Array, clip: bool = False) -> jax.Array:
    """The deployed value of w (..., I) at scale (..., G): f32, bitwise `decode(nearest(w, snap(scale)), snap(scale))`.

    Differentiable in w (straight-through) and in scale (LSQ); see the module's docstring.
    """
    return jnp.where(jnp.isfinite(w), grid.quantize(w, grid.snap(scale)), jnp.nan)  # a broken weight stays visible


def _forward(grid: Grid, w: jax.Array, scale: jax.Array, clip: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return fake_quant(grid, w, scale, clip), (w, scale)


def _backward(grid: Grid, clip: bool, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA keeps the forward pass's comparisons for this one: 3 bytes a weight on a GPU.
    w, scale = jax.lax.optimization_barrier(saved)
    snapped = grid.snap(scale)
    low, high = min(grid.levels[grid.first_code :]), max(grid.levels)
    blocks = (*scale.shape, grid.block)
    value, g_GI = grid.quantize(w, snapped).reshape(blocks), g.reshape(blocks)
    # Multiplying by the inverse: codes are not decided here, so the last bit of u does not matter.
    inverse = jnp.where(snapped == 0, 0.0, 1.0 / snapped)[..., None]
    u = w.reshape(blocks) * inverse
    follows = (u >= low) & (u <= high) if clip else True
    g_scale = jnp.sum(g_GI * (value * inverse - jnp.where(follows, u, 0.0)), axis=-1)
    return jnp.where(follows, g_GI, 0.0).reshape(w.shape), g_scale / math.sqrt(grid.block * high)


fake_quant.defvjp(_forward, _backward)


def dynamic(grid: Grid, w: jax.Array, rule: str, clip: bool = False) -> jax.Array:
    """`fake_quant` at the scale that `rule` ("absmax" or "search") gives the weight as it is now; no gradient to it."""
    return fake_quant(grid, w, jax.lax.stop_gradient(grid.scale_of(jax.lax.stop_gradient(w), rule)), clip)


# ---- whole models ----------------------------------------------------------------------------------------------------


def init_scales(plan: Plan, params: Params) -> Scales:
    """Scales of least squared error for every planned tensor: where learned scales start.

    A block of zeros starts at the smallest scale and not at 0, which no gradient would ever leave.
    """
    scales = {path: plan[path].search(w) for path, w in _planned(plan, params).items()}
    return {path: jnp.where(s == 0, MIN_F16, s) for path, s in scales.items()}


def kept_positive(plan: Plan, scales: Scales) -> Scales:
    """Learned scales after an update: those of grids without a sign stay at the smallest float16 step or above.

    Snapping takes what is at 0 or below as the smallest scale that the format has, by whose inverse the gradient is
    multiplied (2^120 for MXFP4), or as 0, which no gradient would ever leave (Q2_K).
    """
    return {path: s if plan[path].signed else jnp.maximum(s, MIN_F16) for path, s in scales.items()}


def apply(
    plan: Plan, params: Params, scales: Scales, *, rule: str, clip: bool = False, dtype: Any = jnp.float32
) -> Params:
    """`params` with the planned weights replaced by their deployed values, cast to `dtype`; the embedding stays f32.

    A tensor that has a learned scale uses it; the others get the scale that `rule` gives them. An embedding's gradient
    is a sum over all places of a token, which would be made in the type of the table: 16 bits lose a share of it.
    """

    def replace(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
        name = path_of(path)
        if name not in plan:
            return w
        grid = plan[name]
        value = fake_quant(grid, w, scales[name], clip) if name in scales else dynamic(grid, w, rule, clip)
        return value if name == "embed" else value.astype(dtype)

    return jax.tree_util.tree_map_with_path(replace, params)


def deployed_scales(plan: Plan, params: Params, scales: Scales, *, rule: str) -> Scales:
    """The snapped scales that the deployed file stores."""
    return {
        path: plan[path].snap(scales[path]) if path in scales else plan[path].scale_of(w, rule)
        for path, w in _planned(plan, params).items()
    }


def codes_of(plan: Plan, params: Params, scales: Scales, *, rule: str) -> Codes:
    """The codes that the deployed file stores."""
    snapped = deployed_scales(plan, params, scales, rule=rule)
    return {path: plan[path].nearest(w, snapped[path]) for path, w in _planned(plan, params).items()}


def _planned(plan: Plan, params: Params) -> dict[str, jax.Array]:
    return {path: w for path, w in leaves_by_path(params).items() if path in plan}


# ---- health ----------------------------------------------------------------------------------------------------------


def weight_error(plan: Plan, params: Params, scales: Scales, *, rule: str) -> dict[str, jax.Array]:
    """Relative RMS difference between each weight and its deployed value, {path: () f32}."""
    snapped = deployed_scales(plan, params, scales, rule=rule)
    errors = {}
    for path, w in _planned(plan, params).items():
        off = plan[path].quantize(w, snapped[path]) - w
        errors[path] = jnp.sqrt(jnp.sum(off * off) / jnp.maximum(jnp.sum(w * w), 1e-30))
    return errors


def flip_rate(before: Codes, after: Codes) -> dict[str, jax.Array]:
    """Share of codes that differ, {path: () f32}."""
    return {path: jnp.mean(before[path] != after[path], dtype=jnp.float32) for path in after}


def scale_drift(scales: Scales, first: Scales) -> dict[str, jax.Array]:
    """Relative RMS change of learned scales since `first`, {path: () f32}; {} where scales are dynamic."""
    drift = {}
    for path, s in scales.items():
        off = s - first[path]
        drift[path] = jnp.sqrt(jnp.sum(off * off) / jnp.maximum(jnp.sum(first[path] ** 2), 1e-30))
    return drift


def histogram(plan: Plan, codes: Codes) -> dict[str, jax.Array]:
    """Share of each code, {path: (number of levels,) f32}."""
    return {
        path: jnp.stack([jnp.mean(c == code, dtype=jnp.float32) for code in range(len(plan[path].levels))])
        for path, c in codes.items()
    }
