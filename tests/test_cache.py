"""Cache types: ggml's own bytes and values, the rotation, and what attention does with them."""

import ctypes
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from ml_dtypes import bfloat16

from qatmoe.config import ModelConfig
from qatmoe.convert import llama
from qatmoe.convert.gguf import TYPES
from qatmoe.errors import UserError
from qatmoe.model import transformer
from qatmoe.model.attention import attention, attention_params, queries_keys_values
from qatmoe.model.cache import KINDS, CacheType, Stored, read, round_kv, store, turn_keys, turn_values
from qatmoe.model.layers import rope_angles

QUANTIZED = ("q8_0", "q4_0", "iq4_nl")
RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((4096, 64)).astype(np.float32)
DATA = {
    "normal": NORMAL,
    "outliers": NORMAL * np.exp(2 * RNG.standard_normal(NORMAL.shape)).astype(np.float32),
    "halves": np.rint(NORMAL * 20).astype(np.float32) / 2,  # x / d often half-way between two codes
    "one size": np.sign(NORMAL),  # the sign of the scale is that of the first
    "tiny": NORMAL * np.float32(1e-9),  # float16 scales are 0 or subnormal
    "below": NORMAL * np.float32(1e-16),  # where iq4_nl gives up
    "zeros": np.zeros((2, 64), np.float32),
}


class Traits(ctypes.Structure):
    """ggml_type_traits with the rule that a cache write uses."""

    _fields_ = (
        *llama._Traits._fields_,
        ("from_float_ref", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def ggml_bytes(kind, x):
    """libggml's blocks of x, (..., blocks, bytes)."""
    traits = llama._ggml().ggml_get_type_traits(TYPES[kind.upper()].id)
    traits = ctypes.cast(traits, ctypes.POINTER(Traits)).contents
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((*x.shape[:-1], x.shape[-1] // traits.blck_size, traits.type_size), np.uint8)
    traits.from_float_ref(x.ctypes.data, out.ctypes.data, x.size)
    return out


def ggml(kind, x):
    """x (..., Dh) through libggml's quantizer and back."""
    if kind in ("f32", "bf16"):
        return np.asarray(x, np.float32).astype(bfloat16 if kind == "bf16" else np.float32).astype(np.float32)
    data = ggml_bytes(kind, x)
    return llama.dequantize(kind.upper(), data.reshape(*x.shape[:-1], -1))


@functools.partial(jax.jit, static_argnums=0)
def there_and_back(kind, x):
    stored = store(kind, x)
    return stored, read(kind, stored)


# ---- values and bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_libggml(kind, name):
    np.testing.assert_array_equal(there_and_back(kind, DATA[name])[1], ggml(kind, DATA[name]))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_bytes_are_those_of_libggml(kind):
    stored, _ = there_and_back(kind, NORMAL)
    theirs = ggml_bytes(kind, NORMAL)
    np.testing.assert_array_equal(np.asarray(stored.scale), theirs[..., :2].copy().view(np.float16)[..., 0])
    codes = np.asarray(stored.codes).reshape(len(NORMAL), 2, -1)
    np.testing.assert_array_equal(codes ^ 128 if kind == "q8_0" else codes, theirs[..., 2:])


def test_a_block_by_hand():
    """4 at first and zeros with a 1 and a -0.3: d = 4 / -8 is negative, and x / d + 8.5 is cut off."""
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = 4.0, 1.0, -0.3
    stored, back = there_and_back("q4_0", x)
    assert (float(stored.scale[0, 0]), stored.codes.shape) == (-0.5, (1, 16))
    assert (stored.codes[0, :4] & 15).tolist() == [0, 6, 9, 8]  # -8 + 8.5, -2 + 8.5, 0.6 + 8.5, 0 + 8.5
    assert back[0, :4].tolist() == [4.0, 1.0, -0.5, 0.0]
    assert there_and_back("q8_0", np.full((1, 32), 254.0))[1].tolist() == [[254.0] * 32]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_the_type_says(kind):
    cache = CacheType(kind, kind)
    one = store(kind, jnp.ones((5, 2, 64)))
    assert sum(a.nbytes for a in jax.tree.leaves(one)) * 2 == 5 * cache.bytes(128, 128)
    assert cache.bytes(4, 4) == {"f32": 32, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5, "iq4_nl": 4.5}[kind]


def test_keys_and_values_have_types_of_their_own():
    cache = CacheType("q8_0", "q4_0")
    k, v = (np.asarray(a) for a in round_kv(cache, jnp.asarray(NORMAL), jnp.asarray(NORMAL)))
    np.testing.assert_array_equal(k, ggml("q8_0", NORMAL))
    np.testing.assert_array_equal(v, ggml("q4_0", NORMAL))
    assert cache.bytes(64, 64) == (8.5 + 4.5) * 64 / 8
    assert round_kv(cache, *(jnp.ones((2, 32), jnp.bfloat16),) * 2)[0].dtype == jnp.bfloat16


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("f32", CacheType()),
        ("q4_0", CacheType("q4_0", "q4_0")),
        ("q8_0/q4_0", CacheType("q8_0", "q4_0")),
        ("iq4_nl+rot", CacheType("iq4_nl", "iq4_nl", True)),
        ("bf16/q8_0+rot", CacheType("bf16", "q8_0", True)),
    ],
)
def test_names(text, cache):
    assert CacheType.parse(text) == cache
    assert str(cache) == text


@pytest.mark.parametrize("text", ["", "q5_0", "q4_0/", "q4_0/q4_0/q4_0", "q4_0+rotate", "+rot", "Q4_0"])
def test_unknown_names_are_refused(text):
    with pytest.raises(UserError, match="give one of f32, bf16, q8_0, q4_0, iq4_nl"):
        CacheType.parse(text)


@pytest.mark.parametrize("text", ["f32+rot", "bf16/f32+rot"])
def test_a_rotation_of_nothing_is_refused(text):
    with pytest.raises(UserError, match="leave \\+rot out"):
        CacheType.parse(text)


@pytest.mark.parametrize(("text", "head_dim"), [("q8_0", 48), ("f32/q4_0", 16), ("q4_0+rot", 32), ("q4_0+rot", 96)])
def test_heads_that_do_not_fit_are_refused(text, head_dim):
    with pytest.raises(UserError, match=f"head_dim.*{head_dim}"):
        CacheType.parse(text).check(head_dim)


@pytest.mark.parametrize(("text", "head_dim"), [("f32", 7), ("bf16", 48), ("q4_0", 96), ("q4_0+rot", 192)])
def test_heads_that_fit(text, head_dim):
    CacheType.parse(text).check(head_dim)


# ---- rotation --------------------------------------------------------------------------------------------------------

ROTATED = CacheType.parse("q4_0+rot")


def by_hand(x, width):
    """Blocks of the last axis times scipy's Hadamard matrix over the root of its width, in f64."""
    matrix = scipy.linalg.hadamard(width) / np.sqrt(width)
    return (np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, width) @ matrix).reshape(x.shape)


@pytest.mark.parametrize(("head_dim", "of_keys"), [(64, 64), (128, 128), (192, 64), (256, 256)])
def test_rotation_is_an_orthonormal_hadamard_matrix_of_llama_cpps_width(head_dim, of_keys):
    x = jax.random.normal(jax.random.key(0), (5, head_dim))
    np.testing.assert_allclose(turn_keys(ROTATED, x), by_hand(x, of_keys), atol=1e-5)
    np.testing.assert_allclose(turn_values(ROTATED, x), by_hand(x, 64), atol=1e-5)
    for turn in (turn_keys, turn_values):
        np.testing.assert_allclose(turn(ROTATED, turn(ROTATED, x)), x, atol=1e-5)
    q, k = x[:2], x[2:]
    np.testing.assert_allclose(turn_keys(ROTATED, q) @ turn_keys(ROTATED, k).T, q @ k.T, atol=1e-4)


def test_only_what_is_quantized_is_rotated():
    x = jax.random.normal(jax.random.key(0), (2, 64))
    for turn, turns in ((turn_keys, "q8_0/f32+rot"), (turn_values, "bf16/q8_0+rot")):
        assert jnp.any(turn(CacheType.parse(turns), x) != x)
        other = "bf16/q8_0+rot" if turn is turn_keys else "q8_0/f32+rot"
        np.testing.assert_array_equal(turn(CacheType.parse(other), x), x)
        np.testing.assert_array_equal(turn(CacheType.parse("q4_0"), x), x)


def test_rotation_spreads_outliers():
    """One value of 40 among standard normal ones: 4 bits lose less of them after the rotation."""
    x = jnp.asarray(NORMAL).at[:, 3].set(40.0)
    plain = round_kv(ROTATED, x, x)[0] - x
    turned = turn_keys(ROTATED, round_kv(ROTATED, turn_keys(ROTATED, x), x)[0]) - x
    assert jnp.mean(turned**2) < 0.5 * jnp.mean(plain**2)


# ---- attention and the model -----------------------------------------------------------------------------------------

CFG = ModelConfig(
    vocab_size=32, dim=16, n_layers=2, dense_dim=24, n_heads=4, n_kv_heads=2, head_dim=64, n_experts=4, expert_dim=8,
    init_std=0.2, expert_block=4, n_mtp=0,
)  # fmt: skip
TYPES_TESTED = ("f32", "bf16", "q8_0", "q4_0+rot", "iq4_nl/q8_0", "bf16/q4_0+rot")


@pytest.fixture(scope="module")
def attended():
    keys = iter(jax.random.split(jax.random.key(0), 20))
    declared = attention_params(CFG, 0.3, 0.3)
    params = {n: p.fill + 0.3 * jax.random.normal(next(keys), p.shape) for n, p in declared.items()}
    x_BLD = jax.random.normal(next(keys), (2, 7, 16))
    rope = rope_angles(jnp.broadcast_to(jnp.arange(7), (2, 7)), 64, CFG.rotary_fraction, CFG.rope_theta)
    return params, x_BLD, rope


@pytest.mark.parametrize("name", TYPES_TESTED)
def test_attention_reads_what_libggml_stored(attended, name):
    """Keys after RoPE, every token's own included, and queries through libggml; turned and turned back by hand."""
    params, x_BLD, rope = attended
    cache = CacheType.parse(name)
    got = jax.jit(attention, static_argnums=(1, 5))(params, CFG, x_BLD, rope, None, cache)
    q, k, v = jax.jit(queries_keys_values, static_argnums=1)(params, CFG, x_BLD, rope)

    def stored(kind, x, turned=cache.rotate):
        turned = turned and kind in QUANTIZED
        back = ggml(kind, np.asarray(by_hand(x, 64) if turned else x, np.float32))
        return jnp.asarray(by_hand(back, 64) if turned else back, jnp.float32)

    q = stored("q8_0", q, cache.rotate) if cache.k in QUANTIZED else stored(cache.k, q)
    mixed = jax.nn.dot_product_attention(q, stored(cache.k, k), stored(cache.v, v), is_causal=True)
    expected = mixed.reshape(2, 7, -1) @ params["o"].T
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_one_token_reads_its_own_value_from_the_cache(attended):
    params, x_BLD, rope = attended
    one, rope = x_BLD[:, :1], tuple(a[:, :1] for a in rope)
    got = attention(params, CFG, one, rope, None, CacheType("f32", "q4_0"))
    v = queries_keys_values(params, CFG, one, rope)[2]
    repeated = jnp.repeat(ggml("q4_0", np.asarray(v)), 2, axis=2)  # two heads share a value
    np.testing.assert_allclose(got, repeated.reshape(2, 1, -1) @ params["o"].T, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick_compilation")
def test_forward_through_a_cache():
    params = jax.jit(transformer.init_params, static_argnums=0)(CFG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def hidden(cache, cfg=CFG):
        return transformer.forward(params, cfg, tokens, train=False, cache=cache).hidden_BLD

    plain = hidden(None)
    np.testing.assert_array_equal(hidden(CacheType()), plain)
    errors = [float(jnp.mean((hidden(CacheType.parse(t)) - plain) ** 2)) for t in ("q8_0", "q4_0")]
    assert 0 < errors[0] < 0.1 * errors[1]
    half = hidden(CacheType.parse("q8_0+rot"), dataclasses.replace(CFG, dtype="bfloat16"))
    assert half.dtype == jnp.bfloat16
    assert jnp.corrcoef(half.ravel(), plain.ravel())[0, 1] > 0.99
    with pytest.raises(UserError, match="head_dim=8"):
        transformer.forward(params, dataclasses.replace(CFG, head_dim=8), tokens, train=False, cache=ROTATED)


def test_stored_is_a_pytree_without_empty_scales():
    assert len(jax.tree.leaves(Stored(jnp.ones(3)))) == 1
