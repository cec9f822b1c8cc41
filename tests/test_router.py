import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.config import ModelConfig
from qatmoe.model import router
from qatmoe.model.router import update_bias

CFG = ModelConfig(dim=6, n_experts=6, top_k=2, router="sigmoid")

route = jax.jit(router.route, static_argnums=1)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def with_logits(cfg, logits_TE, bias=None):
    """Routing of tokens whose logits are given: the router's matrix is the identity."""
    params = {"weight": jnp.eye(6), "bias": jnp.zeros(6) if bias is None else jnp.asarray(bias)}
    return route(params, cfg, jnp.asarray(logits_TE, jnp.float32))


def logits(tokens=40, seed=0):
    return jax.random.normal(jax.random.key(seed), (tokens, 6))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_weights_are_the_renormalised_scores_of_the_best(kind):
    x = np.array([[2.0, -1.0, 0.5, 3.0, 0.0, -3.0]])
    scores = np.exp(x) / np.exp(x).sum() if kind == "softmax" else 1 / (1 + np.exp(-x))
    out = with_logits(dataclasses.replace(CFG, router=kind), x)
    np.testing.assert_array_equal(out.indices_Tk, [[3, 0]])
    np.testing.assert_allclose(out.weights_Tk, scores[:, [3, 0]] / scores[:, [3, 0]].sum(), rtol=1e-5)
    raw = with_logits(dataclasses.replace(CFG, router=kind, norm_topk=False, routed_scale=2.5), x)
    np.testing.assert_allclose(raw.weights_Tk, 2.5 * scores[:, [3, 0]], rtol=1e-5)


def test_bias_changes_the_choice_and_not_the_weights():
    x = np.array([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    out = with_logits(dataclasses.replace(CFG, norm_topk=False), x, bias=[0, 0, 0, 0, 0, 10.0])
    np.testing.assert_array_equal(out.indices_Tk, [[5, 0]])
    np.testing.assert_allclose(out.weights_Tk, 1 / (1 + np.exp([[2.0, -2.0]])), rtol=1e-5)


def test_bias_gets_no_gradient_and_the_router_does():
    def total(params):
        out = route(params, CFG, logits())
        return jnp.sum(out.weights_Tk[:, 0] ** 2) + out.balance + out.z

    grads = jax.grad(total)({"weight": jnp.eye(6), "bias": jnp.full(6, 0.1)})
    assert not jnp.any(grads["bias"])
    assert jnp.all(jnp.any(grads["weight"] != 0, axis=-1))


def test_load_counts_assignments():
    out = with_logits(CFG, logits())
    counts = np.bincount(np.asarray(out.indices_Tk).ravel(), minlength=6)
    np.testing.assert_allclose(out.load_E, counts / 80, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_balance_is_one_when_even_and_more_when_not(kind):
    cfg = dataclasses.replace(CFG, router=kind)
    turns = np.stack([np.roll([2.0, 2.0, 0, 0, 0, 0], i) for i in range(6)])  # every expert equally often
    assert with_logits(cfg, turns).balance == pytest.approx(1.0, abs=1e-5)
    assert with_logits(cfg, np.repeat(turns[:1], 6, axis=0)).balance > 1.2


def test_balance_gradient_lowers_the_overloaded_expert():
    skewed = logits().at[:, 2].add(2.0)
    grad_TE = jax.grad(lambda x: with_logits(CFG, x).balance)(skewed)
    assert jnp.mean(grad_TE, axis=0)[2] == jnp.max(jnp.mean(grad_TE, axis=0)) > 0


def test_z_loss_is_the_mean_squared_logsumexp():
    x = np.asarray(logits())
    assert with_logits(CFG, x).z == pytest.approx(np.mean(np.log(np.exp(x).sum(-1)) ** 2), rel=1e-5)


def test_router_runs_in_float32_on_bfloat16_activations():
    x = logits().astype(jnp.bfloat16)
    params = {"weight": jax.random.normal(jax.random.key(1), (6, 6)), "bias": jnp.zeros(6)}
    np.testing.assert_array_equal(
        route(params, CFG, x).weights_Tk, route(params, CFG, x.astype(jnp.float32)).weights_Tk
    )


def test_update_bias_raises_the_idle_and_lowers_the_busy():
    new = update_bias(jnp.zeros((2, 4)), jnp.array([[0.4, 0.1, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]), 0.01)
    np.testing.assert_allclose(new, [[-0.01, 0.01, 0, 0], [0, 0, 0, 0]], atol=1e-9)


def test_updating_the_bias_evens_out_a_skewed_router():
    x = logits(400).at[:, 0].add(1.5)
    bias = jnp.zeros(6)
    before = with_logits(CFG, x).load_E
    for _ in range(60):
        bias = update_bias(bias, with_logits(CFG, x, bias).load_E, 0.02)
    assert jnp.max(before) > 0.3
    assert jnp.max(with_logits(CFG, x, bias).load_E) < 0.2
