"""GPTQ: rounding to a grid that makes up, weight by weight, for what it has rounded already. A baseline for QAT.

For inputs x of a matrix, H the sum of x x^T over training text and W the trained weights, the error of what comes out
is tr(D H D^T), D = Q - W. Columns are rounded one after the other; after each, those that are left are moved to where
this error is least, given the columns that are done (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization
for Generative Pre-trained Transformers", equations 2 and 3). Scales are those of least squared error of the weights
(`Grid.search`), chosen before; H gets 1 % of its mean diagonal on the diagonal, as in the paper.

Weights outside of layers (embeddings, head, the projection of an MTP module) are rounded to nearest, first. Then layers
one after the other: each sees the inputs that what is rounded already makes. A routed expert has the H of the tokens
that choose it. Of a model that is split over devices each layer comes to one of them, and goes back rounded. Besides
it there are the H of its planned weights, 4 I^2 bytes a matrix, twice while they are summed, and a few of one matrix.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.convert.llama_numerics import below, block, exact_kinds, products
from qatmoe.errors import UserError
from qatmoe.model.layers import rms_norm
from qatmoe.model.mtp import mtp_input
from qatmoe.quant.grid import Grid
from qatmoe.tree import leaves_by_path, path_of

Params = dict[str, Any]

DAMPING = 0.01  # of the mean of H's diagonal, added to it


def requantize(params: Params, cfg: ModelConfig, paths: Collection[str], grid: Grid, windows_ML: np.ndarray) -> Params:
    """A model with some weights rounded to a grid.

    Args:
      params: unrolled layout, f32.
      paths: of the tensors to round, "layers/0/experts/gate_up"; each (..., out, in), in a multiple of grid.superblock.
      windows_ML: M windows of L token ids of training text, each taken as one document.

    Returns:
      The tree with decoded f32 values on `paths`, all other leaves the same objects.

    Raises:
      UserError: as `solve` raises it.
    """
    rest = [path for path in paths if not path.startswith(("dense_layers/", "layers/")) and "/block/" not in path]
    params = _replaced(params, rest, lambda path, w: grid.quantize(w, grid.search(w)))
    kinds = exact_kinds(params)
    embed, norm = _on_one_device((params["embed"], params["norm"]))
    states = [embed[jnp.asarray(tokens_L, jnp.int32)] for tokens_L in windows_ML]
    for stack in ("dense_layers", "layers"):
        for i in range(len(params.get(stack, {}))):
            own = params[stack][str(i)]
            layer, states = _layer(own, below(kinds, stack), cfg, paths, f"{stack}/{i}/", grid, states)
            params[stack] = params[stack] | {str(i): layer}
    hidden = [rms_norm(x_LD, norm, cfg.norm_eps) for x_LD in states]
    for i in range(cfg.n_mtp):
        module = params["mtp"][str(i)]
        around = _on_one_device({name: leaf for name, leaf in module.items() if name != "block"})
        embedded = [embed[jnp.asarray(tokens_L[1 + i :], jnp.int32)] for tokens_L in windows_ML]
        states = [mtp_input(around, cfg, h[: len(e)], e) for h, e in zip(hidden, embedded, strict=True)]
        own = module["block"]
        layer, states = _layer(own, below(kinds, "mtp/block"), cfg, paths, f"mtp/{i}/block/", grid, states)
        hidden = [rms_norm(x_LD, around["norm"], cfg.norm_eps) for x_LD in states]
        params["mtp"] = params["mtp"] | {str(i): module | {"block": layer}}
    return params


def solve(grid: Grid, w: jax.Array, h: jax.Array, name: str) -> jax.Array:
    """Weights on the grid, f32, for a matrix (R, I) with the sum of products of its inputs (I, I); or for E of them.

    Raises:
      UserError: weights or inputs are not finite, or the products cannot be inverted in f32; it has the tensor's name.
    """
    found, finite = (_solve_each if w.ndim == 3 else _solve)(grid, w, h, grid.search(w))
    if not np.all(finite):
        raise UserError(
            f"GPTQ of {name}: weights or inputs are not finite, or the inputs too much alike to invert their products "
            "in float32; --rows='^(?!.*/gptq$)' leaves out these rows of an audit"
        )
    return found


def _layer(
    layer: Params,
    kinds: tuple[tuple[str, str], ...],
    cfg: ModelConfig,
    paths: Collection[str],
    prefix: str,
    grid: Grid,
    states: list[jax.Array],
) -> tuple[Params, list[jax.Array]]:
    """One layer rounded on the `paths` with its prefix, and what it makes of the states (L, D) of all windows then."""
    here = _on_one_device(layer)
    paths = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    if not paths:
        return layer, [block(here, kinds, cfg, x_LD)[0] for x_LD in states]
    leaves = leaves_by_path(here)
    sums = {path: jnp.zeros((*leaves[path].shape[:-2], *[leaves[path].shape[-1]] * 2)) for path in paths}
    for x_LD in states:
        sums = _summed(sums, here, kinds, cfg, x_LD)
    here = _replaced(here, paths, lambda path, w: solve(grid, w, sums[path], prefix + path))
    rounded = leaves_by_path(here)
    return _replaced(layer, paths, lambda path, _: rounded[path]), [block(here, kinds, cfg, x)[0] for x in states]


def _on_one_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.local_devices()[0])


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _summed(
    sums: dict[str, Any], layer: Params, kinds: tuple[tuple[str, str], ...], cfg: ModelConfig, x_LD: jax.Array
) -> dict[str, jax.Array]:
    """The sums with another window's; of other weights than theirs none are made."""
    seen = block(layer, kinds, cfg, x_LD, products)[1]
    return {path: h + seen[path][0] for path, h in sums.items()}


@functools.partial(jax.jit, static_argnums=0)
def _solve_each(grid: Grid, w_ERI: jax.Array, h_EII: jax.Array, scale_ERG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of experts, one at a time: what one takes is held once."""
    return jax.lax.map(lambda expert: _solve(grid, *expert), (w_ERI, h_EII, scale_ERG))


@functools.partial(jax.jit, static_argnums=0)
def _solve(grid: Grid, w_RI: jax.Array, h_II: jax.Array, scale_RG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded matrix, and whether all that it was made from is finite."""
    size, mean = len(h_II), jnp.mean(jnp.diag(h_II))
    damping = jnp.where(mean > 0, DAMPING * mean, 1.0)  # without inputs: rounding to nearest
    inverse_II = jnp.linalg.inv(h_II + damping * jnp.eye(size))
    # Row j of the upper factor of the inverse says how far an error in column j moves the columns after it.
    upper_II = jnp.linalg.cholesky((inverse_II + inverse_II.T) / 2).T
    scale_RI = jnp.repeat(scale_RG, grid.block, axis=-1)
    column = dataclasses.replace(grid, block=1)

    def step(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left_RI, done_RI = state
        target_R1, scale_R1 = (jax.lax.dynamic_slice_in_dim(a, j, 1, axis=1) for a in (left_RI, scale_RI))
        rounded_R1 = column.quantize(target_R1, scale_R1)
        move_I = jnp.where(jnp.arange(size) > j, upper_II[j] / upper_II[j, j], 0.0)
        left_RI -= (target_R1 - rounded_R1) * move_I
        return left_RI, jax.lax.dynamic_update_slice_in_dim(done_RI, rounded_R1, j, axis=1)

    found_RI = jax.lax.fori_loop(0, size, step, (w_RI, jnp.zeros_like(w_RI)))[1]
    return found_RI, jnp.all(jnp.isfinite(w_RI)) & jnp.all(jnp.isfinite(upper_II))


def _replaced(tree: Params, paths: Collection[str], f: Any) -> Params:
    """The tree with f(path, leaf) on `paths`, lying on the devices as before."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_of(path)
        return jax.device_put(f(name, leaf), leaf.sharding) if name in paths else leaf

    return jax.tree_util.tree_map_with_path(one, tree)
