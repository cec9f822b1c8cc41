import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe import cli
from qatmoe import step as steps
from qatmoe.config import Config, ModelConfig, OptimConfig, PhaseConfig, QuantConfig, TrainConfig
from qatmoe.quant import fake
from qatmoe.run import quant_plan
from qatmoe.tree import leaves_by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = ModelConfig(
    vocab_size=64, dim=64, n_layers=2, dense_dim=64, n_heads=2, n_kv_heads=2, head_dim=16, n_experts=4, expert_dim=64,
    experts="blocked", expert_block=8,
)  # fmt: skip
CFG = Config(model=MODEL, train=TrainConfig(batch_size=4), optim=OptimConfig(lr=1e-2))
PLAIN, QAT = PhaseConfig(steps=50, start="trunk"), PhaseConfig(steps=50, start="trunk", quantize=True)


def batch_of(seed=1, rows=4):
    # A text with structure, so that a few steps lower its loss: each token follows from the one before.
    start = jax.random.randint(jax.random.key(seed), (rows, 1), 0, 64)
    return {"tokens": (start + 5 * jnp.arange(18)[None]) % 64}


COMPILED = {}
FULL = np.float32(1)  # the factor on the learning rates


def programs(cfg, phase):
    """What makes the first state and what steps, compiled once for all tests of a configuration."""
    key = repr((cfg, phase))
    if key not in COMPILED:
        plan, _ = quant_plan(cfg)
        first = jax.jit(lambda: steps.branch(cfg, phase, plan, steps.init_state(cfg, jax.random.key(0))))
        COMPILED[key] = first, jax.jit(step_of(cfg, phase, plan))
    return COMPILED[key]


def step_of(cfg, phase, plan):
    return functools.partial(steps.train_step, cfg=cfg, plan=plan, quantize=phase.quantize, distill=phase.distill)


def run(cfg, phase, n, state=None, teacher=None):
    first, step = programs(cfg, phase)
    if state is None:
        state = first()
    values = []
    for i in range(n):
        state, metrics = step(state, batch_of(i), teacher, FULL)
        values.append(float(metrics["loss"]))
    return state, values


@pytest.mark.parametrize("phase", [PLAIN, QAT], ids=["plain", "qat"])
def test_loss_falls_and_step_counts(phase):
    state, values = run(CFG, phase, 25)
    assert int(state.step) == 25
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])


@pytest.mark.parametrize("phase", [PLAIN, QAT], ids=["plain", "qat"])
def test_micro_batches_add_up_to_the_batch(phase):
    # The router's balance terms are means over micro-batches by definition, so they are left out here.
    train = dataclasses.replace(CFG.train, balance_weight=0.0, z_weight=0.0)
    one = dataclasses.replace(CFG, train=train)
    four = dataclasses.replace(CFG, train=dataclasses.replace(train, grad_accum=4))
    whole, whole_losses = run(one, phase, 3)
    parts, parts_losses = run(four, phase, 3)
    np.testing.assert_allclose(parts_losses, whole_losses, rtol=1e-5)
    if not phase.quantize:  # a code on the edge may flip by the last bit of a sum, and Adam amplifies it
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), parts.params, whole.params)


def test_qat_trains_weights_and_learned_scales_and_only_planned_ones_are_quantized():
    plan, _ = quant_plan(CFG)
    assert set(plan) == {"layers/experts/gate_up", "layers/experts/down"}
    start = programs(CFG, QAT)[0]()
    assert set(start.params["scales"]) == set(plan)
    end, _ = run(CFG, QAT, 5, start)
    for path in plan:
        assert np.any(end.params["scales"][path] != start.params["scales"][path])
    weights = steps.eval_weights(CFG, plan, end, quantize=True)
    assert np.all(weights["head"] == end.params["model"]["head"])
    gate_up = end.params["model"]["layers"]["experts"]["gate_up"]
    assert np.any(gate_up != start.params["model"]["layers"]["experts"]["gate_up"])
    grid = plan["layers/experts/gate_up"]
    scale = grid.snap(end.params["scales"]["layers/experts/gate_up"])
    deployed = grid.decode(grid.nearest(gate_up, scale), scale)
    assert np.array_equal(weights["layers"]["experts"]["gate_up"], deployed)


def test_a_rate_that_throws_scales_below_zero_does_not_end_the_run():
    quant = QuantConfig(experts="mxfp4")
    cfg = dataclasses.replace(CFG, quant=quant, optim=OptimConfig(lr=1e-2, scale_lr=1.0))
    state, values = run(cfg, QAT, 3)
    assert np.isfinite(values).all()
    assert all(np.min(s) == fake.MIN_F16 for s in state.params["scales"].values())  # some were thrown, and are kept


def test_dynamic_scales_have_no_parameters():
    cfg = dataclasses.replace(CFG, quant=QuantConfig(scale="dynamic", dynamic_rule="absmax"))
    state, values = run(cfg, QAT, 5)
    assert state.params["scales"] == {}
    assert np.isfinite(values).all()


def test_branch_keeps_weights_and_moments_unless_told():
    plan, _ = quant_plan(CFG)
    trunk, _ = run(CFG, PLAIN, 3)
    kept = steps.branch(CFG, QAT, plan, trunk)
    fresh = steps.branch(CFG, dataclasses.replace(QAT, reset_moments=True), plan, trunk)
    assert int(kept.step) == int(fresh.step) == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, kept.params["model"], trunk.params["model"]))
    size = lambda state: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(state.opt_state))  # noqa: E731
    assert size(kept) > size(fresh)


def averaged_and_unbalanced():
    """Keeps an average of the weights, and its routers' biases rest: one program for two tests."""
    optim, train = dataclasses.replace(CFG.optim, ema=0.5), dataclasses.replace(CFG.train, bias_rate=0.0)
    return dataclasses.replace(CFG, optim=optim, train=train)


def test_every_update_is_multiplied_by_the_factor():
    first, step = programs(CFG, QAT)
    start = first()
    before = leaves_by_path(start.params)
    ends = [leaves_by_path(step(start, batch_of(), None, f * FULL)[0].params) for f in (1.0, 0.5, 0.0)]
    for name in (n for n in before if not n.endswith("router/bias")):
        whole, half, none = (end[name] - before[name] for end in ends)
        assert np.abs(whole).max() > 1e-6, name
        np.testing.assert_allclose(half, whole / 2, rtol=0.02, atol=1e-7, err_msg=name)
        assert not np.any(none), name


def test_router_bias_moves_towards_balance_and_not_by_gradients():
    state, _ = run(CFG, PLAIN, 1)
    for bias in (
        state.params["model"]["layers"]["router"]["bias"],
        state.params["model"]["mtp"]["block"]["router"]["bias"],
    ):
        assert set(np.unique(np.abs(np.asarray(bias)))) <= {np.float32(0), np.float32(CFG.train.bias_rate)}
        assert np.any(bias != 0)
    state, _ = run(averaged_and_unbalanced(), PLAIN, 2)
    assert not np.any(state.params["model"]["layers"]["router"]["bias"])


def test_scanned_and_unrolled_layers_train_alike():
    unrolled = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, scan_layers=False))
    a, a_losses = run(CFG, QAT, 3)
    b, b_losses = run(unrolled, QAT, 3)
    np.testing.assert_allclose(a_losses, b_losses, rtol=1e-4)
    bias = np.stack([b.params["model"]["layers"][str(i)]["router"]["bias"] for i in range(1)])
    np.testing.assert_array_equal(a.params["model"]["layers"]["router"]["bias"], bias)


def test_ema_follows_the_weights():
    cfg = averaged_and_unbalanced()
    plan, _ = quant_plan(cfg)
    first = programs(cfg, PLAIN)[0]()
    state, _ = run(cfg, PLAIN, 1, first)
    expected = 0.5 * first.params["model"]["head"] + 0.5 * state.params["model"]["head"]
    np.testing.assert_allclose(state.ema["head"], expected, atol=1e-8)
    assert np.array_equal(steps.eval_weights(cfg, plan, state, quantize=False)["head"], state.ema["head"])


def test_distilling_pulls_a_perturbed_model_back_to_its_teacher():
    phase = dataclasses.replace(PLAIN, distill=1.0)
    plan, _ = quant_plan(CFG)
    trunk, _ = run(CFG, PLAIN, 20)
    teacher = trunk.params["model"]
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), teacher)
    state = steps.branch(CFG, phase, plan, trunk._replace(params={"model": moved, "scales": {}}))
    _, step = programs(CFG, phase)
    kl = []
    for i in range(25):
        state, metrics = step(state, batch_of(i), teacher, 0.2 * FULL)
        kl.append(float(metrics["kl"]))
    assert kl[0] > 0.05
    assert np.mean(kl[-5:]) < 0.5 * np.mean(kl[:5])


def test_the_step_of_the_gpu_config_lowers(config_files):
    """1.3 billion parameters, nothing allocated: shapes, plan and program of configs/h100_1b.py fit together."""
    file = next(f for f in config_files if f.stem == "h100_1b")
    cfg, _ = cli.parse(["x", f"--config={file}"], "", {})
    plan, rows = quant_plan(cfg)
    assert 1.2e9 < sum(r["weights"] for r in rows) < 1.4e9
    phase = cfg.train.phases["qat"]
    state = jax.eval_shape(functools.partial(steps.init_state, cfg), jax.random.key(0))
    state = jax.eval_shape(functools.partial(steps.branch, cfg, phase, plan), state)
    batch = {"tokens": jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.data.seq_len + 1), jnp.int32)}
    step = jax.jit(step_of(cfg, phase, plan))
    new, metrics = jax.eval_shape(step, state, batch, None, FULL)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics["loss"].shape == ()


def test_health_functions():
    plan, _ = quant_plan(CFG)
    model = programs(CFG, PLAIN)[0]().params["model"]
    scales = fake.init_scales(plan, model)
    codes = fake.codes_of(plan, model, scales, rule="search")
    assert all(float(v) == 0 for v in fake.flip_rate(codes, codes).values())
    assert all(float(v) == 0 for v in fake.scale_drift(scales, scales).values())
    for path, shares in fake.histogram(plan, codes).items():
        np.testing.assert_allclose(np.sum(shares), 1, rtol=1e-5)
        changed = codes | {path: codes[path].at[..., 0].set((codes[path][..., 0] + 1) % 4)}
        np.testing.assert_allclose(fake.flip_rate(codes, changed)[path], 1 / codes[path].shape[-1], rtol=1e-5)
    assert all(0.2 < float(v) < 0.6 for v in fake.weight_error(plan, model, scales, rule="search").values())
