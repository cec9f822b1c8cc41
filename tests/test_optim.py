import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe import optim
from qatmoe.config import ModelConfig, OptimConfig, PhaseConfig
from qatmoe.model import transformer
from qatmoe.tree import leaves_by_path

PARAMS = {
    "model": {
        "embed": jnp.ones((8, 4)),
        "norm": jnp.ones(4),
        "layers": {
            "attn": {"q": jax.random.normal(jax.random.key(0), (3, 8, 4))},
            "router": {"bias": jnp.ones((3, 2)), "weight": jnp.ones((3, 2, 4))},
        },
    },
    "scales": {"layers/experts/down": jnp.full((3, 2), 0.05)},
}


@pytest.mark.parametrize("more", [{}, {"qkv_bias": True, "tie_embeddings": True, "n_mtp": 2}], ids=str)
@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_of_every_layout_has_a_group(scan, more):
    model = transformer.abstract_params(ModelConfig(scan_layers=scan, **more))
    labels = optim.labels({"model": model, "scales": {}})
    groups = leaves_by_path(labels)
    assert any(path.endswith("q_bias") for path in groups) == bool(more)
    for path, group in groups.items():
        kind = path.split("/")[-1]
        assert (group == "vector") == kind.endswith(("norm", "_bias")), path
        assert (group == "frozen") == path.endswith("router/bias"), path


def test_a_parameter_without_a_group_is_named():
    with pytest.raises(ValueError, match="model/layers/novel"):
        optim.group_of("model/layers/novel")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_and_rates_by_group(name):
    cfg = OptimConfig(name=name, lr=0.01, scale_lr=0.001, weight_decay=0.5, clip=0.0)
    optimizer = optim.make_optimizer(cfg)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    moved = {path: float(jnp.abs(u).max()) for path, u in leaves_by_path(updates).items()}
    decayed = {path for path, size in moved.items() if size > 0}
    assert decayed == {"model/embed", "model/layers/attn/q", "model/layers/router/weight"}
    np.testing.assert_allclose(updates["model"]["embed"], -0.01 * 0.5, rtol=1e-6)

    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), optimizer.init(PARAMS), zero)
    np.testing.assert_allclose(updates["scales"]["layers/experts/down"], -0.001, rtol=1e-3)
    np.testing.assert_allclose(updates["model"]["norm"], -0.01, rtol=1e-3)
    assert not np.any(updates["model"]["layers"]["router"]["bias"])


def test_muon_updates_are_orthogonal_per_matrix():
    cfg = OptimConfig(name="muon", lr=1.0, weight_decay=0.0, clip=0.0)
    optimizer = optim.make_optimizer(cfg)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    for update, grad in zip(jax.tree.leaves(updates["model"]), jax.tree.leaves(grads["model"]), strict=True):
        assert np.sum(update * grad) <= 0  # downhill; 0 of what is frozen
    for matrix in updates["model"]["layers"]["attn"]["q"]:
        singular = np.linalg.svd(matrix / (0.2 * np.sqrt(8)), compute_uv=False)
        assert np.all((singular > 0.6) & (singular < 1.3)), singular  # five Newton-Schulz steps are approximate


def test_muon_takes_each_experts_matrix_for_itself():
    """(layers, experts, out, in): every matrix's update is that of the matrix alone."""
    optimizer = optim.make_optimizer(OptimConfig(name="muon", lr=1.0, weight_decay=0.0, clip=0.0))

    def update(g):
        params = {"model": {"layers": {"experts": {"down": g}}}}
        return optimizer.update(params, optimizer.init(params), params)[0]["model"]["layers"]["experts"]["down"]

    grads = jax.random.normal(jax.random.key(0), (2, 3, 8, 4)) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    together = update(grads)
    for layer, expert in np.ndindex(2, 3):
        np.testing.assert_allclose(together[layer, expert], update(grads[layer, expert]), rtol=1e-4, atol=1e-5)


def test_adamw_is_what_its_paper_says_with_all_gradients_clipped_as_one():
    """Three steps in numpy f64 (Loshchilov & Hutter 2019, algorithm 2; clipping: Pascanu et al. 2013)."""
    cfg = OptimConfig(lr=0.01, scale_lr=0.02, weight_decay=0.1, clip=0.5, betas=(0.8, 0.95), eps=1e-3)
    optimizer = optim.make_optimizer(cfg)
    params, state = PARAMS, optimizer.init(PARAMS)
    w = {path: np.asarray(p, np.float64) for path, p in leaves_by_path(PARAMS).items()}
    m, v = ({path: 0 * p for path, p in w.items()} for _ in range(2))
    for t in range(1, 4):
        grads = jax.tree.map(lambda p, t=t: jax.random.normal(jax.random.key(100 * t + p.size), p.shape) / t**4, PARAMS)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        g = {path: np.asarray(x, np.float64) for path, x in leaves_by_path(grads).items()}
        norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        assert (norm > cfg.clip) == (t < 3)  # the last gradient is small and stays as it is
        for path in w:
            x = g[path] * min(1, cfg.clip / norm)
            m[path], v[path] = 0.8 * m[path] + 0.2 * x, 0.95 * v[path] + 0.05 * x**2
            step = m[path] / (1 - 0.8**t) / (np.sqrt(v[path] / (1 - 0.95**t)) + cfg.eps)
            group = optim.group_of(path)
            decay = 0.1 * w[path] if group in ("matrix", "table") else 0.0
            w[path] = w[path] - {"scale": 0.02, "frozen": 0.0}.get(group, 0.01) * (step + decay)
    for path, p in leaves_by_path(params).items():
        np.testing.assert_allclose(p, w[path], rtol=2e-5, atol=2e-6, err_msg=path)


def factors(cfg, phase):
    return [optim.schedule(cfg, phase, i) for i in range(phase.steps)]


def test_warmup_stable_decay():
    got = factors(OptimConfig(final_lr=0.1), PhaseConfig(steps=10, warmup=2, decay=4))
    np.testing.assert_allclose(got, [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325], rtol=1e-6)


def test_cosine():
    got = factors(OptimConfig(schedule="cosine"), PhaseConfig(steps=6, warmup=2))
    np.testing.assert_allclose(got, [0.5, 1, 1, 0.853553, 0.5, 0.146447], rtol=1e-5)


def test_a_phase_can_have_its_own_rate():
    assert factors(OptimConfig(lr=0.01), PhaseConfig(steps=2, lr=0.005)) == [0.5, 0.5]


def test_branch_keeps_moments_that_fit():
    optimizer = optim.make_optimizer(OptimConfig(clip=1.0))
    trunk = {"model": PARAMS["model"], "scales": {}}
    _, old = optimizer.update(jax.tree.map(jnp.ones_like, trunk), optimizer.init(trunk), trunk)
    kept = optim.carry_over(optimizer.init(PARAMS), old)
    leaves = leaves_by_path(kept)
    assert any(path.endswith("mu/model/embed") and np.any(leaf) for path, leaf in leaves.items())
    assert all(not np.any(leaf) for path, leaf in leaves.items() if "/mu/scales/" in path)
    counts = {
        path.split("inner_states/")[1].split("/")[0]: int(leaf) for path, leaf in leaves.items() if "count" in path
    }
    assert counts["scale"] == 0 and set(counts.values()) == {0, 1}, counts
    again = optim.carry_over(optimizer.init(PARAMS), optimizer.update(PARAMS, kept, PARAMS)[1])
    again = {path: leaf for path, leaf in leaves_by_path(again).items() if "count" in path}
    assert {int(leaf) for leaf in again.values()} == {1, 2}  # a branch that has scales hands theirs on


def test_new_scales_learn_at_the_rate_that_they_were_given():
    """Adam's first step is its rate, in a trunk's first step as in a branch's."""
    cfg = OptimConfig(scale_lr=1e-3, clip=0.0)
    optimizer = optim.make_optimizer(cfg)
    trunk = {"model": PARAMS["model"], "scales": {}}
    old = optimizer.init(trunk)
    for _ in range(20):
        _, old = optimizer.update(jax.tree.map(jnp.ones_like, trunk), old, trunk)
    state = optim.carry_over(optimizer.init(PARAMS), old)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    for leaf in jax.tree.leaves(updates["scales"]):
        np.testing.assert_allclose(leaf, -1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_dtype(dtype):
    state = optim.make_optimizer(OptimConfig(moments_dtype=dtype)).init(PARAMS)
    moments = {path: s.dtype for path, s in leaves_by_path(state).items() if "/mu/" in path}
    assert set(moments.values()) == {jnp.dtype(dtype)}
