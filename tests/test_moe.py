import dataclasses
import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.config import ModelConfig
from qatmoe.errors import UserError
from qatmoe.model import moe
from qatmoe.model.layers import swiglu
from qatmoe.model.moe import capacity, expert_ffn

T, D, E, K, F = 24, 8, 4, 2, 6
CFG = ModelConfig(dim=D, n_experts=E, top_k=K, expert_dim=F, capacity_factor=E / K, expert_block=4, swiglu_limit=1.0)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def inputs(seed=0, skew=0.0):
    keys = jax.random.split(jax.random.key(seed), 5)
    scores = jax.random.normal(keys[0], (T, E)).at[:, 1].add(skew)
    return {
        "x": jax.random.normal(keys[1], (T, D)),
        "weights": jax.nn.softmax(jax.random.normal(keys[2], (T, K))),
        "gate_up": jax.random.normal(keys[3], (E, 2 * F, D)),
        "down": jax.random.normal(keys[4], (E, D, F)),
    }, jax.lax.top_k(scores, K)[1]


@functools.partial(jax.jit, static_argnums=(2, 3, 4), static_argnames=("cfg", "groups"))
def run(arrays, indices, implementation, cfg=CFG, groups=1):
    return expert_ffn(
        arrays["x"], arrays["weights"], indices, arrays["gate_up"], arrays["down"], cfg, implementation, groups
    )


def by_hand(arrays, indices, limit=1.0):
    a = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
    out = np.zeros((T, D))
    for t in range(T):
        for j in range(K):
            e = int(indices[t, j])
            gate, up = np.split(a["gate_up"][e] @ a["x"][t], 2)
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            out[t] += a["weights"][t, j] * (a["down"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


CASES = [("reference", 1), ("dense", 1), ("dense", 3), ("blocked", 1), ("blocked", 3), ("ragged", 1), ("gathered", 1)]


@pytest.mark.parametrize(("implementation", "groups"), CASES)
@pytest.mark.parametrize("skew", [0.0, 100.0])
def test_values_against_a_loop_over_tokens(implementation, groups, skew):
    arrays, indices = inputs(skew=skew)  # 100: one expert gets every token; another may get none
    y, dropped = run(arrays, indices, implementation, groups=groups)
    np.testing.assert_allclose(y, by_hand(arrays, indices), rtol=1e-4, atol=1e-5)
    assert dropped == 0


@pytest.mark.parametrize(("implementation", "groups"), CASES[1:])
def test_gradients_against_autodiff_of_the_reference(implementation, groups):
    arrays, indices = inputs(skew=1.0)
    direction = jax.random.normal(jax.random.key(9), (T, D))

    def grads(implementation, groups):
        return jax.jit(jax.grad(lambda a: jnp.sum(run(a, indices, implementation, groups=groups)[0] * direction)))(
            arrays
        )

    expected, actual = grads("reference", 1), grads(implementation, groups)
    for name in arrays:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_gradients_of_dropped_choices_are_zero_and_the_rest_are_right():
    """Against finite differences of the dropping function itself, which is smooth for a fixed choice of experts."""
    arrays, indices = inputs(skew=100.0)
    cfg = dataclasses.replace(CFG, capacity_factor=1.0, swiglu_limit=0.0)
    direction = jax.random.normal(jax.random.key(9), (T, D))
    loss = jax.jit(lambda arrays: jnp.sum(run(arrays, indices, "dense", cfg)[0] * direction))
    grads = jax.jit(jax.grad(loss))(arrays)
    assert run(arrays, indices, "dense", cfg)[1] > 0
    for i, name in enumerate(arrays):
        move = jax.random.normal(jax.random.key(20 + i), arrays[name].shape)
        ahead, behind = (loss(arrays | {name: arrays[name] + s * 1e-2 * move}) for s in (1, -1))
        np.testing.assert_allclose(jnp.sum(grads[name] * move), (ahead - behind) / 2e-2, rtol=2e-2, atol=2e-2)
    late = jnp.arange(T) >= capacity(T, cfg)
    assert not jnp.any(jnp.where(late[:, None] & (indices == 1), grads["weights"], 0.0))


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000])
def test_ranks_against_a_loop(count):
    experts = np.random.default_rng(count).integers(0, 3, count) * 2  # experts 1, 3 and 5 get nothing
    seen, expected = dict.fromkeys(range(6), 0), []
    for e in experts:
        expected.append(seen[int(e)])
        seen[int(e)] += 1
    np.testing.assert_array_equal(moe._ranks(jnp.asarray(experts), 6), expected)


@pytest.mark.parametrize("limit", [0.0, 1.003])  # not a bf16: autodiff halves gradients at the clamp itself
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gate_has_the_gradient_of_autodiff(dtype, limit):
    """Below and beyond the clamp, in gate and up, on either side."""
    gate_up = (3 * jax.random.normal(jax.random.key(0), (5, 8, 2, F))).astype(dtype)
    weights, g = jax.random.uniform(jax.random.key(1), (5, 8)), jax.random.normal(jax.random.key(2), (5, 8, F))

    def plain(gate_up, weights):
        return swiglu(gate_up, limit) * weights[..., None]

    expected = jax.vjp(plain, gate_up.astype(jnp.float32), weights)[1](g.astype(dtype).astype(jnp.float32))
    actual = jax.vjp(lambda a, w: moe._gated(a, w, limit), gate_up, weights)[1](g.astype(dtype))
    assert actual[0].dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2])
def test_choices_over_capacity_are_dropped_late_tokens_first(groups):
    indices = jnp.tile(jnp.array([[1, 2]]), (T, 1))  # two experts get everything, T/groups tokens each
    cfg = dataclasses.replace(CFG, capacity_factor=16 * E / (T * K) if groups == 1 else 8 * E / (T // 2 * K))
    kept = 16 if groups == 1 else 8
    assert capacity(T // groups, cfg) == kept
    arrays, _ = inputs()
    y, dropped = run(arrays, indices, "dense", cfg, groups)
    whole = by_hand(arrays, indices)
    position = np.arange(T) % (T // groups)
    np.testing.assert_allclose(y[position < kept], whole[position < kept], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[position >= kept], 0)
    assert dropped == pytest.approx(1 - kept / (T // groups))


def test_capacity_is_a_multiple_of_eight_and_never_more_than_the_tokens():
    def at(tokens, factor):
        return capacity(tokens, dataclasses.replace(CFG, capacity_factor=factor))

    assert (at(1024, 1.0), at(1024, 1.25), at(1024, 1.001), at(1024, 100.0), at(4, 1.0)) == (512, 640, 520, 1024, 4)


@pytest.mark.parametrize("implementation", ["dense", "blocked", "ragged", "gathered"])
def test_bfloat16_stays_near_float32(implementation):
    arrays, indices = inputs()
    half = arrays | {"x": arrays["x"].astype(jnp.bfloat16)}
    y = run(half, indices, implementation)[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), by_hand(arrays, indices), rtol=0.1, atol=0.1)


def test_no_gradient_is_a_scatter_of_rows():
    arrays, indices = inputs()
    grad = jax.grad(lambda arrays: jnp.sum(run(arrays, indices, "dense")[0]))
    lines = [line for line in str(jax.make_jaxpr(grad)(arrays)).splitlines() if "= scatter" in line]
    assert lines  # the map from rows to choices, of integers
    assert not [line for line in lines if ":f32[" in line]


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="groups=5"):
        run(*inputs(), "dense", groups=5)


EXPERT_PARALLEL = """
    import jax, jax.numpy as jnp, numpy as np
    from qatmoe.config import MeshConfig, ModelConfig
    from jax.sharding import NamedSharding
    from qatmoe.mesh import fitted, make_mesh, spec
    from qatmoe.model import transformer

    cfg = ModelConfig(vocab_size=32, dim=16, n_layers=2, dense_dim=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4,
                      expert_dim=8, capacity_factor=1.0, init_std=0.2, expert_block=4)
    tokens = jax.random.randint(jax.random.key(1), (8, 18), 0, 32)

    def loss(params, tokens, train=True):
        out = transformer.forward(params, cfg, tokens[:, :16], mtp_tokens=tokens[None, :, 1:17], train=train, groups=8)
        scores = [transformer.logits(params, cfg, hidden) for hidden in (out.hidden_BLD, *out.mtp_hidden)]
        return sum(jnp.sum(jnp.sin(s)) for s in scores), out.aux

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    evaluate = jax.jit(lambda params, tokens: loss(params, tokens, train=False)[0])
    params = jax.jit(transformer.init_params, static_argnums=0)(cfg, jax.random.key(0))
    expected = jax.tree.map(np.asarray, step(params, tokens))
    expected_eval = float(evaluate(params, tokens))
    assert expected[0][1]["dropped_N"].max() > 0
    for mesh_cfg in (MeshConfig(data=2, expert=4), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)):
        mesh = make_mesh(mesh_cfg)
        with jax.set_mesh(mesh):
            specs = transformer.kept_specs(cfg)
            places = jax.tree.map(lambda p, s: NamedSharding(mesh, fitted(mesh, s, p.shape)), params, specs)
            placed = jax.device_put(params, places)
            rows = jax.device_put(tokens, NamedSharding(mesh, spec(("batch", None))))
            compiled = step.lower(placed, rows).compile()
            actual = jax.tree.map(np.asarray, compiled(placed, rows))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), actual, expected)
            print("all-to-all" in compiled.as_text(), end=" ")
            if mesh_cfg.expert == 4:
                np.testing.assert_allclose(float(evaluate(placed, rows)), expected_eval, rtol=1e-4, atol=1e-3)
"""


def test_one_device_and_eight_give_the_same_step(quick_env):
    """Expert, data, fsdp and tensor parallel, values and gradients, in a process of its own with eight devices."""
    env = quick_env | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXPERT_PARALLEL)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True", "True"]  # rows do travel by all-to-all
