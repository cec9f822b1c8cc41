import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.model.layers import apply_rope, ffn, linear, rms_norm, rope_angles, swiglu


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_linear_contracts_the_last_axis_of_the_weight():
    weight = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(linear(jnp.array([[1.0, 10.0, 100.0]]), weight), [[321.0, 10.0]])


def test_rms_norm_gives_unit_mean_square_times_weight():
    y = rms_norm(100 * normal(0, 5, 64), jnp.full(64, 3.0), 1e-6)
    np.testing.assert_allclose(jnp.mean(y**2, axis=-1), 9.0, rtol=1e-4)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = (1 + normal(0, 4, 512) / 8).astype(jnp.bfloat16)
    exact = rms_norm(x.astype(jnp.float32), jnp.ones(512), 1e-6)
    y = rms_norm(x, jnp.ones(512), 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def rotated_score(q, k, q_position, k_position, fraction):
    def turn(x, position):
        return apply_rope(x[None, None, None], *rope_angles(jnp.array([[position]]), x.size, fraction, 100.0))[0, 0, 0]

    return turn(q, q_position) @ turn(k, k_position)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_scores_depend_on_distance_only(fraction):
    q, k = normal(0, 16), normal(1, 16)
    near = rotated_score(q, k, 7, 4, fraction)
    np.testing.assert_allclose(rotated_score(q, k, 107, 104, fraction), near, rtol=1e-4)
    assert abs(rotated_score(q, k, 7, 2, fraction) - near) > 1e-2


def test_partial_rope_turns_the_first_dims_in_half_split_pairs():
    x = jnp.arange(1.0, 9.0)
    y = apply_rope(x[None, None, None], *rope_angles(jnp.array([[1]]), 8, 0.5, 10_000.0))[0, 0, 0]
    np.testing.assert_array_equal(y[4:], x[4:])
    for first, second, angle in ((0, 2, 1.0), (1, 3, 0.01)):  # pairs (i, i + 2); frequencies theta^(-2i/4)
        turned = (x[first] + 1j * x[second]) * np.exp(1j * angle)
        np.testing.assert_allclose([y[first], y[second]], [turned.real, turned.imag], rtol=1e-5)


def test_swiglu_takes_gate_first_and_up_second():
    np.testing.assert_allclose(swiglu(jnp.array([[2.0], [5.0]]), 0.0), [2 / (1 + np.exp(-2.0)) * 5], rtol=1e-6)


def test_swiglu_limit_clamps_gate_from_above_and_up_on_both_sides():
    def silu(g):
        return g / (1 + np.exp(-g))

    gates, ups = np.array([9.0, -9.0, 1.0]), np.array([9.0, -9.0, 2.0])
    clamped = swiglu(jnp.stack([jnp.array(gates), jnp.array(ups)]), 3.0)
    np.testing.assert_allclose(clamped, [silu(3.0) * 3, silu(-9.0) * -3, silu(1.0) * 2], rtol=1e-5)


def test_ffn_is_two_maps_around_swiglu():
    params = {"gate_up": normal(0, 12, 4), "down": normal(1, 4, 6)}
    x = normal(2, 3, 4)
    gate, up = np.split(np.asarray(x) @ np.asarray(params["gate_up"]).T, 2, axis=-1)
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(params["down"]).T
    np.testing.assert_allclose(ffn(params, x, 0.0), expected, rtol=1e-4, atol=1e-5)
