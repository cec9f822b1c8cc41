import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.quant import fake
from qatmoe.quant.grid import GRIDS

ALL = pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))


def case(grid, seed=0):
    """Weights, scales a little off the best, and an incoming gradient."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(2, 3, 512)) * 0.05).astype(np.float32)
    scale = np.asarray(grid.search(w)) * rng.uniform(0.7, 1.3, size=(2, 3, 512 // grid.block)).astype(np.float32)
    return jnp.asarray(w), jnp.asarray(scale), jnp.asarray(rng.normal(size=w.shape).astype(np.float32))


@functools.partial(jax.jit, static_argnums=(0, 4))
def pulled_back(grid, w, scale, g, clip=False):
    _, pull = jax.vjp(lambda w, s: fake.fake_quant(grid, w, s, clip), w, scale)
    return pull(g)


@ALL
def test_forward_is_the_decoded_deployed_value(grid):
    w, scale, _ = case(grid)
    snapped = grid.snap(np.asarray(scale))
    deployed = grid.decode(grid.nearest(np.asarray(w), snapped), snapped)
    for run in (fake.fake_quant, jax.jit(fake.fake_quant, static_argnums=0)):
        assert np.max(np.abs(np.asarray(run(grid, w, scale)) - deployed)) == 0.0


@ALL
@pytest.mark.parametrize("clip", [False, True])
def test_gradients_against_the_derivation_written_as_loops(grid, clip):
    """Module docstring of fake.py: w gets t g, s the sum of g (level - t u) / sqrt(n hi)."""
    w, scale, g = case(grid)
    got_w, got_scale = map(np.asarray, pulled_back(grid, w, scale, g, clip))
    levels, n = np.asarray(grid.levels), grid.block
    low, high = levels[grid.first_code :].min(), levels.max()
    snapped = np.asarray(grid.snap(scale), np.float64)
    codes = np.asarray(grid.nearest(w, grid.snap(scale)))
    w, g = np.asarray(w), np.asarray(g)
    for row in ((0, 0), (1, 2)):
        for block in range(512 // n):
            s, total = snapped[row][block], 0.0
            for j in range(block * n, block * n + n):
                u = float(w[row][j]) / s
                follows = not clip or low <= u <= high
                assert got_w[row][j] == (g[row][j] if follows else 0.0)
                total += float(g[row][j]) * (levels[codes[row][j]] - (u if follows else 0.0))
            np.testing.assert_allclose(got_scale[row][block], total / np.sqrt(n * high), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["q2_0", "ternary", "q4_0", "q8_0"])
def test_scale_gradient_is_the_true_derivative_where_codes_saturate(name):
    """Weights beyond the last level stay there when the scale moves a little: w^ = level s is smooth, and its slope is
    the gradient but for the LSQ factor. Compared with finite differences of the forward pass, snapping far finer."""
    grid = GRIDS[name]
    w = jnp.full((1, grid.block), 1000.0)
    step, s = 2.0**-3, 4.0  # steps that float16 scales of few bits hold exactly
    scale = jnp.full((1, 1), s)
    low, high = (jnp.sum(fake.fake_quant(grid, w, scale + d)) for d in (-step * 4, step * 4))
    slope = (high - low) / (8 * step)
    _, got = pulled_back(grid, w, scale, jnp.ones_like(w), clip=True)
    np.testing.assert_allclose(got[0, 0] * np.sqrt(grid.block * max(grid.levels)), slope, rtol=1e-6)


def test_weights_inside_the_range_move_the_scale_by_their_rounding_error():
    """At fixed codes with u following w (the straight-through surrogate), by finite differences of the surrogate."""
    grid = GRIDS["q4_0"]
    w, scale, g = case(grid, 3)
    snapped = grid.snap(scale)
    codes = grid.nearest(w, snapped)
    blocks = (*scale.shape, grid.block)

    def surrogate(s):
        # level(code) + inside * (u - u at the point): its value there is the forward pass, its slope the STE's.
        u = w.reshape(blocks).astype(jnp.float64) / s[..., None]
        u0 = w.reshape(blocks).astype(jnp.float64) / snapped[..., None].astype(jnp.float64)
        inside = (u0 >= min(grid.levels)) & (u0 <= max(grid.levels))
        level = jnp.asarray(grid.levels)[codes].reshape(blocks)
        return jnp.sum(g.reshape(blocks) * (level + jnp.where(inside, u - u0, 0)) * s[..., None])

    with jax.enable_x64(True):
        at = snapped.astype(jnp.float64)
        probe = jnp.zeros_like(at).at[1, 2, 5].set(1e-7)
        slope = (surrogate(at + probe) - surrogate(at - probe)) / 2e-7
    _, got = pulled_back(grid, w, scale, g, clip=True)
    np.testing.assert_allclose(got[1, 2, 5] * np.sqrt(grid.block * 7), slope, rtol=1e-3)


def test_a_negative_scale_mirrors_the_block():
    grid = GRIDS["q2_0"]
    w, scale, g = case(grid)
    value, mirrored = fake.fake_quant(grid, w, scale), fake.fake_quant(grid, -w, -scale)
    np.testing.assert_array_equal(value, -mirrored)
    (g_w, g_s), (m_w, m_s) = pulled_back(grid, w, scale, g), pulled_back(grid, -w, -scale, -g)
    np.testing.assert_array_equal(g_w, -m_w)
    np.testing.assert_allclose(g_s, -m_s, rtol=1e-5)


@ALL
def test_zero_weights_and_zero_scales_have_finite_gradients(grid):
    w = jnp.zeros((1, 512))
    scale = jnp.zeros((1, 512 // grid.block))
    for grads in pulled_back(grid, w, scale, jnp.ones_like(w)):
        assert np.isfinite(grads).all()


@ALL
def test_dynamic_scales_pass_no_gradient_through_the_scale(grid):
    w, _, g = case(grid)
    _, pull = jax.vjp(lambda w: fake.dynamic(grid, w, "search"), w)
    (got,) = pull(g)
    scale = grid.search(w)
    expected, _ = pulled_back(grid, w, scale, g)
    np.testing.assert_array_equal(got, expected)


def test_learned_scales_find_the_error_minimum():
    """With LSQ's clipping, gradient descent on |w^ - w|^2 over scales alone gets about as far as search does.

    Without it the slope at weights beyond the last level has the other sign: that is why slow scales do better then.
    """
    grid = GRIDS["q2_0"]
    w, _, _ = case(grid)
    best = jnp.mean((grid.quantize(w, grid.search(w)) - w) ** 2)
    scale = grid.search(w) * 1.8
    error = lambda s: jnp.mean((fake.fake_quant(grid, w, s, True) - w) ** 2)  # noqa: E731
    start = error(scale)
    descend = jax.jit(lambda s: s - 200.0 * jax.grad(error)(s))
    for _ in range(400):
        scale = descend(scale)
    assert error(scale) < 0.5 * start
    assert error(scale) < 1.25 * best


@ALL
def test_a_block_that_starts_as_zeros_can_be_learned(grid):
    params = {"w": jnp.zeros((2, 512))}
    scales = fake.init_scales({"w": grid}, params)
    _, g_scale = pulled_back(grid, params["w"] + 1.0, scales["w"], jnp.ones((2, 512)))
    assert np.all(np.abs(scales["w"]) > 0)
    assert np.all(g_scale != 0)


@ALL
def test_what_a_block_of_zeros_decodes_to(grid):
    """docs/formats.md: zeros, but where there is no level 0 and scales are learned. Last, a block beside others."""
    w = case(grid)[0][0, :1].at[0, :256].set(0.0)
    scale = fake.init_scales({"w": grid}, {"w": w})["w"]
    for rule in ("absmax", "search"):
        assert not fake.dynamic(grid, w, rule)[0, :256].any()
    off = {"q2_k": -(2.0**-18), "iq4_nl": 2.0**-17}.get(grid.name, 0.0)
    assert set(np.asarray(fake.fake_quant(grid, w, scale))[0, :256].tolist()) == {off}
    if grid.name == "q2_k":
        w = case(grid)[0][0, :1].at[0, :16].set(0.0)
        scale = fake.init_scales({"w": grid}, {"w": w})["w"]
        d = float(grid.shared_factor(grid.shared_index(scale))[0, 0])
        assert d > 2.0**-12
        assert set(np.asarray(fake.fake_quant(grid, w, scale))[0, :16].tolist()) == {-d / 2}


@ALL
def test_a_learned_scale_that_would_leave_its_range_can_come_back(grid):
    """At 2^-120, to which MXFP4 snaps what is not above 0, a gradient of 1e30 would stop every weight by clipping."""
    w, scale, g = case(grid)
    scale = fake.kept_positive({"w": grid}, {"w": scale.at[0, 0, 0].set(-1e-6)})["w"]
    assert (scale[0, 0, 0] < 0) == grid.signed
    _, g_scale = pulled_back(grid, w, scale, g)
    assert np.all(g_scale != 0) and np.max(np.abs(g_scale)) < 1e6
    assert np.array_equal(scale.ravel()[1:], case(grid)[1].ravel()[1:])  # others are what they were


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_weight_stays_visible_under_a_learned_scale(grid, bad):
    w, scale, _ = case(grid)
    value = fake.fake_quant(grid, w.at[0, 0, 7].set(bad), scale)
    assert np.isnan(value[0, 0, 7])
    assert np.isfinite(value[0, 0, 8:]).all()


def test_apply_replaces_planned_tensors_alone_and_casts():
    params = {"a": {"w": jnp.ones((4, 64)) * 0.1}, "b": jnp.ones((4, 64)) * 0.1}
    plan = {"a/w": GRIDS["ternary"]}
    out = fake.apply(plan, params, fake.init_scales(plan, params), rule="absmax", dtype=jnp.bfloat16)
    assert out["a"]["w"].dtype == jnp.bfloat16
    assert out["b"] is params["b"]
    dynamic = fake.apply(plan, params, {}, rule="absmax")
    np.testing.assert_array_equal(
        dynamic["a"]["w"], GRIDS["ternary"].quantize(params["a"]["w"], GRIDS["ternary"].absmax(params["a"]["w"]))
    )
