import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS, MIN_F16, RULES, get

ALL = pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))
ISSUE_GRIDS = {"q2_0", "ternary", "q2_k", "q3_k", "q4_0", "iq4_nl", "mxfp4", "nvfp4", "q8_0"}


@st.composite
def blocks(draw):
    """Rows of 512 weights at any size: Gaussian, sparse, constant, one outlier, zeros, subnormal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    w = rng.normal(size=(2, 512)) * 2.0 ** draw(st.integers(-12, 8))
    kind = draw(st.sampled_from(["plain", "sparse", "constant", "outlier", "zeros", "tiny"]))
    if kind == "sparse":
        w *= rng.random(w.shape) < 0.1
    elif kind == "constant":
        w = np.full_like(w, w[0, 0])
    elif kind == "outlier":
        w[:, 17] *= 100
    elif kind == "zeros":
        w[0] = 0
    elif kind == "tiny":
        w[0, :256] = 1e-42
    return w.astype(np.float32)


def decoded(grid, w, rule):
    codes, scale = grid.encode(w, rule)
    return grid.decode(codes, scale)


def test_the_grids_that_are_promised_exist():
    assert set(GRIDS) >= ISSUE_GRIDS
    with pytest.raises(UserError, match="did you mean 'q4_0'"):
        get("q4_o")


@ALL
def test_bits_are_what_a_block_of_its_gguf_type_takes(grid):
    block_bytes = {"Q2_0": (64, 18), "TQ2_0": (256, 66), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_0": (32, 18)} | {
        "IQ4_NL": (32, 18), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q8_0": (32, 34)
    }  # fmt: skip
    weights, size = block_bytes[grid.gguf[0]]
    assert grid.bits == 8 * size / weights


@ALL
@settings(deadline=None, max_examples=15)
@given(w=blocks())
def test_encoding_a_decoded_weight_again_changes_nothing(grid, w):
    once = decoded(grid, w, "search")
    np.testing.assert_array_equal(decoded(grid, once, "search"), once)


@pytest.mark.parametrize("name", ["q2_0", "ternary", "q4_0", "iq4_nl", "mxfp4", "q8_0"])
@settings(deadline=None, max_examples=15)
@given(w=blocks())
def test_absmax_is_idempotent_where_its_docstring_says_so(name, w):
    w[np.abs(w) < 2.0**-10] = 0
    once = decoded(GRIDS[name], w, "absmax")
    np.testing.assert_array_equal(decoded(GRIDS[name], once, "absmax"), once)


@ALL
@settings(deadline=None, max_examples=15)
@given(w=blocks(), rule=st.sampled_from(RULES))
def test_snap_is_idempotent_and_scales_are_snapped(grid, w, rule):
    scale = grid.scale_of(w, rule)
    np.testing.assert_array_equal(grid.snap(scale), scale)
    jittered = scale * np.float32(1.234)
    np.testing.assert_array_equal(grid.snap(grid.snap(jittered)), grid.snap(jittered))


@ALL
@settings(deadline=None, max_examples=10)
@given(w=blocks(), rule=st.sampled_from(RULES))
def test_numpy_jax_and_jit_agree_bit_for_bit(grid, w, rule):
    codes, scale = grid.encode(w, rule)
    for run in (lambda x: grid.encode(x, rule), jax.jit(lambda x: grid.encode(x, rule))):
        there_codes, there_scale = run(jnp.asarray(w))
        np.testing.assert_array_equal(there_codes, codes)
        np.testing.assert_array_equal(there_scale, scale)
        np.testing.assert_array_equal(grid.decode(there_codes, there_scale), grid.decode(codes, scale))


@ALL
@settings(deadline=None, max_examples=15)
@given(w=blocks())
def test_decoded_weights_are_exact_in_the_dtypes_that_are_promised(grid, w):
    value = decoded(grid, w, "search")
    exact = np.float64(np.asarray(grid.levels)[grid.encode(w)[0]]) * np.repeat(
        np.float64(grid.search(w)), grid.block, -1
    )
    np.testing.assert_array_equal(value, exact)
    if grid.bf16_exact:
        np.testing.assert_array_equal(np.asarray(jnp.asarray(value, jnp.bfloat16), np.float32), value)


@ALL
def test_nearest_is_nearest(grid):
    w = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    scale = grid.search(w)
    levels = np.asarray(grid.levels[grid.first_code :])
    spread = np.repeat(scale, grid.block, axis=-1)
    best = np.min(np.abs(levels * spread[..., None].astype(np.float64) - w[..., None]), axis=-1)
    np.testing.assert_allclose(np.abs(grid.decode(grid.nearest(w, scale), scale) - w), best, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(grid.quantize(w, scale), grid.decode(grid.nearest(w, scale), scale))


@ALL
def test_search_is_no_worse_than_absmax(grid):
    w = np.random.default_rng(1).normal(size=(16, 1024)).astype(np.float32) * 0.03
    error = {rule: np.sum((decoded(grid, w, rule) - w) ** 2) for rule in RULES}
    assert error["search"] <= error["absmax"] * 1.0001
    if grid.bits < 3:  # at few levels the largest weight is a bad guide
        assert error["search"] < 0.8 * error["absmax"]


# Relative RMS error on Gaussian weights, error-minimising scales. Lloyd-Max bounds for one scale in all:
# 3 levels 0.437, 4 levels 0.343, 8 levels 0.186; per-block scales may be a little better or worse.
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ternary", 0.42, 0.45), ("q2_0", 0.33, 0.37), ("q2_k", 0.29, 0.34), ("q3_k", 0.13, 0.16), ("q4_0", 0.07, 0.09),
        ("iq4_nl", 0.065, 0.08), ("mxfp4", 0.10, 0.12), ("nvfp4", 0.075, 0.09), ("q8_0", 0.003, 0.006),
    ],
)  # fmt: skip
def test_error_on_gaussian_weights(name, low, high):
    w = np.random.default_rng(2).normal(size=(64, 1024)).astype(np.float32) * 0.02
    error = np.sqrt(np.mean((decoded(GRIDS[name], w, "search") - w) ** 2)) / 0.02
    assert low < error < high


def test_the_sign_of_the_scale_is_free():
    """A block with one large negative weight takes {-2, -1, 0, 1} s: the level table turned around."""
    w = np.zeros((1, 64), np.float32)
    w[0, :3] = [-2.0, 1.0, -1.0]
    codes, scale = GRIDS["q2_0"].encode(w)
    assert scale[0, 0] == -1.0
    np.testing.assert_array_equal(GRIDS["q2_0"].decode(codes, scale), w)


@ALL
@pytest.mark.parametrize("rule", RULES)
def test_zero_blocks_decode_to_zero(grid, rule):
    w = np.random.default_rng(3).normal(size=(2, 512)).astype(np.float32)
    w[0] = 0
    w[1, :256] = 0
    value = decoded(grid, w, rule)
    assert not value[0].any()
    assert not value[1, :256].any()
    assert value[1, 256:].any()


@ALL
@pytest.mark.parametrize("rule", RULES)
def test_subnormal_and_tiny_blocks_stay_finite_and_small(grid, rule):
    for size in (1e-45, 1e-40, 1e-30, 1e-10):
        value = decoded(grid, np.full((1, 512), size, np.float32), rule)
        assert np.isfinite(value).all()
        assert np.abs(value).max() <= max(size * 1.5, 8 * MIN_F16)


@ALL
@pytest.mark.parametrize("rule", RULES)
def test_huge_blocks_are_clipped_to_the_largest_value_of_the_format(grid, rule):
    value = decoded(grid, np.full((1, 512), 3e38, np.float32), rule)
    assert np.isfinite(value).all()
    assert value.min() > 2.0**15


@ALL
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_not_hidden(grid, rule, bad):
    w = np.random.default_rng(4).normal(size=(1, 512)).astype(np.float32)
    w[0, 5] = bad
    scale = grid.scale_of(w, rule)
    assert np.isnan(scale[0, 0])
    assert np.isnan(grid.quantize(w, scale)[0, :16]).any()


@ALL
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_block_is_a_block_of_zeros_to_those_that_share_its_factor(grid, rule, bad):
    """When their scales are chosen, and when these are snapped once more, as the forward pass does."""
    w = np.random.default_rng(4).normal(size=(2, 512)).astype(np.float32)
    w[0, : grid.block] = 0
    expected = grid.scale_of(w, rule)
    w[0, 5] = bad
    scale = grid.scale_of(w, rule)
    for found in (scale, grid.snap(scale), grid.snap(jnp.asarray(scale))):
        assert np.isnan(found[0, 0])
        np.testing.assert_array_equal(np.ravel(found)[1:], np.ravel(expected)[1:])


def test_five_significant_bits_cost_q4_0_little():
    """The price of exactness in bfloat16, as grid.py states it: half a percent of the squared error."""
    w = np.random.default_rng(5).normal(size=(256, 1024)).astype(np.float32) * 0.02
    error = {}
    for bits in (5, 11):
        grid = dataclasses.replace(GRIDS["q4_0"], scale_bits=bits)
        error[bits] = np.sum((decoded(grid, w, "search") - w) ** 2)
    assert 1.0 <= error[5] / error[11] < 1.007


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.signed])
@settings(deadline=None, max_examples=10)
@given(w=blocks(), rule=st.sampled_from(RULES))
def test_unsigned_scales_are_never_negative_and_find_their_own_points_again(name, w, rule):
    grid = GRIDS[name].unsigned()
    codes, scale = grid.encode(w, rule)
    assert np.all(scale >= 0)
    once = grid.decode(codes, scale)
    np.testing.assert_array_equal(decoded(grid, once, "search"), once)
    assert np.sum((w - once) ** 2, dtype=np.float64) < np.sum(w**2, dtype=np.float64) or not np.any(once)


def test_unsigned_changes_nothing_where_scales_have_no_sign():
    assert [name for name, grid in GRIDS.items() if grid.unsigned() != grid] == ["q2_0", "q3_k", "q4_0", "iq4_nl"]
