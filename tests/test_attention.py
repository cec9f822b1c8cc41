import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.config import ModelConfig
from qatmoe.model.attention import attention, attention_params, grouped, implementation, splash
from qatmoe.model.layers import rope_angles

CFG = ModelConfig(dim=16, n_heads=4, n_kv_heads=2, head_dim=8)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_params(cfg, seed=0):
    declared = attention_params(cfg, 0.3, 0.3)
    keys = jax.random.split(jax.random.key(seed), len(declared))
    return {
        name: p.fill + 0.3 * jax.random.normal(key, p.shape)
        for key, (name, p) in zip(keys, declared.items(), strict=True)
    }


@functools.partial(jax.jit, static_argnums=1)
def run(params, cfg, x_BLD, segments_BL=None, positions_BL=None):
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])
    rope = rope_angles(positions_BL, cfg.head_dim, cfg.rotary_fraction, cfg.rope_theta)
    return attention(params, cfg, x_BLD, rope, segments_BL)


def inputs(length, seed=1):
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


def test_agrees_with_jax():
    """Scores, scale, mask and grouping against jax.nn.dot_product_attention, with no rotation and no norms."""
    cfg = dataclasses.replace(CFG, qk_norm="none")
    params, x = make_params(cfg), inputs(6)
    q, k, v = (jnp.einsum("bli,oi->blo", x, params[n]).reshape(2, 6, h, 8) for n, h in (("q", 4), ("k", 2), ("v", 2)))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(2, 6, 32)
    expected = jnp.einsum("bli,oi->blo", mixed, params["o"])
    still = jnp.zeros((2, 6), int)
    np.testing.assert_allclose(run(params, cfg, x, positions_BL=still), expected, rtol=1e-4, atol=1e-5)


def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values():
    full = dataclasses.replace(CFG, n_kv_heads=4)
    params, x = make_params(CFG), inputs(7)

    def repeat(w):
        return jnp.repeat(w.reshape(2, 8, 16), 2, axis=0).reshape(32, 16)

    expected = run(params | {"k": repeat(params["k"]), "v": repeat(params["v"])}, full, x)
    np.testing.assert_allclose(run(params, CFG, x), expected, rtol=1e-4, atol=1e-5)


def test_qk_norm_takes_out_the_size_of_queries_and_keys():
    params, x = make_params(CFG), inputs(6)
    larger = params | {"q": 50 * params["q"], "k": 50 * params["k"]}
    np.testing.assert_allclose(run(larger, CFG, x), run(params, CFG, x), rtol=1e-3, atol=1e-4)
    plain = dataclasses.replace(CFG, qk_norm="none")
    assert jnp.max(jnp.abs(run(larger, plain, x) - run(params, plain, x))) > 1e-2
    assert not {"q_norm", "k_norm"} & set(attention_params(plain, 1.0, 1.0))


def test_documents_in_one_row_do_not_see_each_other():
    params, x = make_params(CFG), inputs(9)
    packed = run(params, CFG, x, segments_BL=jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2))
    apart = jnp.concatenate([run(params, CFG, x[:, :4]), run(params, CFG, x[:, 4:])], axis=1)
    np.testing.assert_allclose(packed, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, [0, 0, 1, 1, 1, 1]])
def test_is_causal(segments):
    params, x = make_params(CFG), inputs(6)
    segments_BL = None if segments is None else jnp.array([segments] * 2)
    before = run(params, CFG, x, segments_BL)
    after = run(params, CFG, x.at[:, 4].add(1.0), segments_BL)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert jnp.all(jnp.any(before[:, 4:] != after[:, 4:], axis=-1))


@pytest.mark.parametrize(
    ("platform", "changed", "length", "kernel"),
    [
        ("gpu", {}, 256, "cudnn"),
        ("gpu", {"dtype": "float32"}, 256, "xla"),
        ("gpu", {"head_dim": 136}, 256, "xla"),
        ("gpu", {}, 255, "xla"),
        ("tpu", {}, 256, "splash"),
        ("tpu", {"dtype": "float32"}, 256, "xla"),
        ("tpu", {"head_dim": 64}, 256, "xla"),
        ("tpu", {}, 192, "xla"),
        ("cpu", {}, 256, "xla"),
        ("cpu", {"attention": "splash"}, 256, "splash"),
    ],
)
def test_the_machines_own_kernel_runs_what_it_can(platform, changed, length, kernel):
    cfg = dataclasses.replace(CFG, **{"dtype": "bfloat16", "head_dim": 128} | changed)
    assert implementation(cfg, length, platform) == kernel


@pytest.mark.parametrize("documents", [False, True])
def test_the_kernel_for_tpus_computes_what_the_plain_one_does(documents):
    """In Pallas's interpreter: values and gradients, grouped heads, with and without borders between documents."""
    B, L, H, K, Dh = 2, 256, 4, 2, 128
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, L, H, Dh), (B, L, K, Dh), (B, L, K, Dh), (B, L, H, Dh))
    q, k, v, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.broadcast_to(jnp.arange(L) // 100, (B, L)) if documents else None
    seen = jnp.tril(jnp.ones((1, L, L), bool))
    if documents:
        seen = seen & (segments[:, :, None] == segments[:, None, :])

    plain, back = jax.vjp(lambda *a: grouped(*a, seen, Dh**-0.5), q, k, v)
    kernel, kernel_back = jax.vjp(lambda *a: splash(*a, segments, Dh**-0.5, interpret=True), q, k, v)
    np.testing.assert_allclose(kernel, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(kernel_back(g), back(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
