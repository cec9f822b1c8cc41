import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe import gptq
from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS

RNG = np.random.default_rng(0)
MIXED = RNG.standard_normal((256, 256)) + 2 * RNG.standard_normal((256, 1))
X = (RNG.standard_normal((600, 256)) @ MIXED).astype(np.float32)  # inputs with much in common
W = (RNG.standard_normal((8, 256)) * 0.05).astype(np.float32)


def output_error(q, w=W, x=X):
    """How far outputs are off, as a share of them."""
    return float(np.linalg.norm(x @ (q - w).T) / np.linalg.norm(x @ w.T))


def by_least_squares(grid, w, h, scale):
    """GPTQ by its definition: before a column is rounded, the columns that are left make up for the errors so far."""
    h = h.astype(np.float64) + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    column, scale = dataclasses.replace(grid, block=1), np.repeat(scale, grid.block, axis=-1)
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        moved = -np.linalg.solve(h[j:, j:], h[j:, :j] @ (q - w)[:, :j].T.astype(np.float64)).T
        target = (w[:, j] + moved[:, 0]).astype(np.float32)[:, None]
        q[:, j] = column.quantize(target, scale[:, j, None])[:, 0]
    return q


@pytest.mark.parametrize("name", ["q2_0", "q2_k", "mxfp4"])
def test_it_is_the_best_completion_column_by_column(name):
    grid, h = GRIDS[name], X.T @ X
    found = np.asarray(gptq.solve(grid, jnp.asarray(W), jnp.asarray(h), "w"))
    expected = by_least_squares(grid, W, h, np.asarray(grid.search(W)))
    same = found == expected
    assert same[:, :32].all()  # later a weight on the edge of two levels may go either way, and take the rest along
    assert output_error(found) == pytest.approx(output_error(expected), rel=0.05)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_outputs_are_nearer_than_by_nearest_and_weights_on_the_grid(name):
    grid = GRIDS[name]
    found, scale = np.asarray(gptq.solve(grid, jnp.asarray(W), jnp.asarray(X.T @ X), "w")), grid.search(W)
    np.testing.assert_array_equal(grid.quantize(found, scale), found)
    assert output_error(found) < 0.7 * output_error(grid.quantize(W, scale))
    assert np.linalg.norm(found - W) > np.linalg.norm(grid.quantize(W, scale) - W)


@pytest.mark.parametrize("diagonal", [np.zeros(256), RNG.gamma(1.0, 1.0, 256)], ids=["no_inputs", "no_correlation"])
def test_without_correlation_it_is_rounding_to_nearest(diagonal):
    grid = GRIDS["q2_0"]
    found = gptq.solve(grid, jnp.asarray(W), jnp.asarray(np.diag(diagonal), jnp.float32), "w")
    np.testing.assert_array_equal(found, grid.quantize(W, grid.search(W)))


def test_what_is_not_finite_is_refused():
    grid, w, h = GRIDS["q2_0"], jnp.asarray(W), jnp.asarray(X.T @ X)
    for weights, products in ((w.at[1, 2].set(jnp.nan), h), (w, h.at[3, 3].set(jnp.inf)), (w, h.at[3, 3].set(-1e9))):
        with pytest.raises(UserError, match=r"GPTQ of w: weights or inputs are not finite, or .* --rows"):
            gptq.solve(grid, weights, products, "w")
        with pytest.raises(UserError, match="are not finite"):
            gptq.solve(grid, jnp.stack([w, weights]), jnp.stack([h, products]), "w")


def test_experts_are_matrices_of_their_own():
    grid, experts = GRIDS["q2_0"], jnp.stack([jnp.asarray(W), jnp.asarray(W[::-1])])
    products = jnp.stack([jnp.asarray(X.T @ X), jnp.zeros((256, 256))])
    found = gptq.solve(grid, experts, products, "w")
    np.testing.assert_array_equal(found[0], gptq.solve(grid, experts[0], products[0], "w"))
    np.testing.assert_array_equal(found[1], grid.quantize(W[::-1], grid.search(W[::-1])))
