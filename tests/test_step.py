import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe import cli
from qatmoe import step as steps
from qatmoe.config import Config, ModelConfig, OptimConfig, PhaseConfig, QuantConfig, TrainConfig
from qatmoe.errors import UserError
from qatmoe.quant import fake
from qatmoe.run import check_frozen, quant_plan
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
        start = functools.partial(steps.init_state, cfg, jax.random.key(0))
        first = jax.jit(lambda: steps.branch(cfg, plan, start(), quantize=phase.quantize))
        COMPILED[key] = first, jax.jit(step_of(cfg, phase, plan))
    return COMPILED[key]


def step_of(cfg, phase, plan):
    how = {"quantize": phase.quantize, "distill": phase.distill, "freeze": phase.freeze}
    return functools.partial(steps.train_step, cfg=cfg, plan=plan, **how)


def run(cfg, phase, n, state=None, teacher=None):
    first, step = programs(cfg, phase)
    if state is None:
        state = first()
    values = []
    for i in range(n):
        state, metrics = step(state, batch_of(i), teacher, FULL)
        values.append(float(metrics["loss"]))
    return state, values


MUON = dataclasses.replace(CFG, optim=OptimConfig(name="muon", lr=1e-2))


@pytest.mark.parametrize(("cfg", "phase"), [(CFG, PLAIN), (CFG, QAT), (MUON, QAT)], ids=["plain", "qat", "muon"])
def test_loss_falls_and_step_counts(cfg, phase):
    state, values = run(cfg, phase, 25)
    assert int(state.step) == 25
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])


def packed_batch():
    """Rows of one to six documents: micro-batches that count other numbers of targets."""
    begins = np.zeros((4, 18), bool)
    for row, at in enumerate([[], [7], [2, 5, 9, 11, 14], [1, 16]]):
        begins[row, at] = True
    first = np.maximum.accumulate(np.where(begins, np.arange(18), 0), axis=1)
    return batch_of() | {"segments": jnp.asarray(begins.cumsum(1)), "positions": jnp.asarray(np.arange(18) - first)}


def first_gradients(state):
    """{parameter: its clipped gradient, up to a factor}, of a state after one step."""
    return {path.partition("/mu/")[2]: m for path, m in leaves_by_path(state.opt_state).items() if "/mu/" in path}


def accumulating(n):
    """The router's balance terms are means over micro-batches by definition, so they are left out."""
    train = dataclasses.replace(CFG.train, balance_weight=0.0, z_weight=0.0, grad_accum=n)
    return dataclasses.replace(CFG, train=train)


@pytest.mark.parametrize("phase", [PLAIN, QAT], ids=["plain", "qat"])
def test_micro_batches_add_up_to_the_batch(phase):
    """Also where they count other numbers of targets: each is a part of the whole batch's mean."""
    state = programs(accumulating(1), phase)[0]()
    (whole, a), (parts, b) = (programs(accumulating(n), phase)[1](state, packed_batch(), None, FULL) for n in (1, 4))
    for name in ("loss", "ce", "mtp", "grad_norm"):
        assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-5), name
    expected = first_gradients(whole)
    for name, gradient in first_gradients(parts).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-4 * np.abs(expected[name]).max())


@pytest.mark.parametrize("n", [1, 2])
def test_a_bfloat16_step_has_the_gradients_of_a_float32_one(n):
    cfg = accumulating(n)
    half = dataclasses.replace(cfg, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    state = programs(cfg, QAT)[0]()
    expected, found = (first_gradients(programs(c, QAT)[1](state, packed_batch(), None, FULL)[0]) for c in (cfg, half))
    for name in expected:
        a, b = np.asarray(expected[name], np.float64).ravel(), np.asarray(found[name], np.float64).ravel()
        if np.any(a):
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98, name
            assert np.linalg.norm(b) / np.linalg.norm(a) == pytest.approx(1, abs=0.05), name


def test_no_gradient_is_summed_in_bfloat16():
    """Of a token's places in the text, and of an expert's blocks: many terms, of which 16 bits lose a share."""
    quant = QuantConfig(experts="q2_0", embedding="q4_0")
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, dtype="bfloat16"), quant=quant)
    state = jax.eval_shape(programs(cfg, QAT)[0])
    program = str(jax.make_jaxpr(step_of(cfg, QAT, quant_plan(cfg)[0]))(state, batch_of(), None, FULL))
    sums = [line.split(" = ")[0] for line in program.splitlines() if "= scatter-add" in line]
    assert sum(":f32[" in line for line in sums) >= 3  # embedding, gate_up, down
    assert not [line for line in sums if ":bf16[" in line]


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
    kept = steps.branch(CFG, plan, trunk, quantize=True)
    fresh = steps.branch(CFG, plan, trunk, quantize=True, reset_moments=True)
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


def moved(before, after):
    before, after = map(leaves_by_path, (before, after))
    return {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}


@pytest.mark.parametrize(
    ("freeze", "held"),
    [
        ("router", {"model/layers/router/weight", "model/layers/router/bias"}),
        ("^layers/experts", {"model/layers/experts/gate_up", "model/layers/experts/down"}),
        ("^scales/.*down|^(embed|norm)$", {"scales/layers/experts/down", "model/embed", "model/norm"}),
    ],
)
def test_what_a_phase_freezes_stays_to_the_last_bit(freeze, held):
    """Against decay, moments that a branch brings and the balance rule; everything else moves, learned scales too."""
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, n_mtp=0, n_dense_layers=0))
    trained, _ = run(cfg, QAT, 2)
    state, _ = run(cfg, dataclasses.replace(QAT, freeze=freeze), 2, trained)
    paths = set(leaves_by_path(trained.params))
    assert held < paths
    assert moved(trained.params, state.params) == paths - held


def test_frozen_gradients_count_in_no_norm():
    """Clipping would else make the others' steps smaller; an Adam of one step would hide that, its epsilon shows it."""
    optim = OptimConfig(lr=10.0, clip=1e-3, eps=1.0)  # a rate that float32 shows beside 1
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, n_mtp=0, n_dense_layers=0), optim=optim)
    plan, _ = quant_plan(cfg)
    state = steps.init_state(cfg, jax.random.key(0))
    norms, moves = [], []
    for phase in (PLAIN, dataclasses.replace(PLAIN, freeze="^(?!norm$)")):
        after, metrics = jax.jit(step_of(cfg, phase, plan))(state, batch_of(), None, FULL)
        norms.append(float(metrics["grad_norm"]))
        moves.append(float(jnp.linalg.norm(after.params["model"]["norm"] - state.params["model"]["norm"])))
    assert 0 < norms[1] < 0.5 * norms[0]
    assert moves[1] == pytest.approx(moves[0] * norms[0] / norms[1], rel=1e-2)


def test_a_phase_that_freezes_nothing_or_all_is_refused():
    def check(freeze, model=MODEL, **quant):
        phases = {"trunk": PLAIN, "qat": dataclasses.replace(QAT, freeze=freeze)}
        cfg = Config(model=model, quant=QuantConfig(**quant), train=TrainConfig(phases=phases))
        return check_frozen(cfg, quant_plan(cfg)[0])

    found = "phases.qat.freeze='rooter' is found in no parameter's name: .* embed, .*router/.*scales/layers/experts"
    with pytest.raises(UserError, match=found):
        check("rooter")
    with pytest.raises(UserError, match="in no parameter's name: .*layers/N/experts/down"):
        check("^layers/experts", model=dataclasses.replace(MODEL, scan_layers=False))
    (line,) = check("^scales/")
    assert line.startswith("qat freezes 2 of ") and line.endswith(" parameters: scales/layers/experts/down, ...")
    with pytest.raises(UserError, match="found in no parameter's name"):
        check("^scales/", scale="dynamic")
    for every in (".", "^(?!.*router/bias)"):
        with pytest.raises(UserError, match=r"in the names of all \d+ parameters: nothing would be trained"):
            check(every)


@pytest.mark.parametrize("scan", [True, False])
def test_every_router_is_moved_by_its_own_load(scan):
    model = dataclasses.replace(MODEL, n_layers=3, n_mtp=2, scan_layers=scan)
    cfg = dataclasses.replace(CFG, model=model)
    batch = {"tokens": jnp.pad(batch_of()["tokens"], ((0, 0), (0, 1)))}
    first, step = programs(cfg, PLAIN)
    state, metrics = step(first(), batch, None, FULL)
    layers, mtp = state.params["model"]["layers"], state.params["model"]["mtp"]
    if scan:
        bias_NE = np.concatenate([layers["router"]["bias"], mtp["block"]["router"]["bias"]])
    else:
        routers = [layers["0"], layers["1"], mtp["0"]["block"], mtp["1"]["block"]]
        bias_NE = np.stack([r["router"]["bias"] for r in routers])
    load_NE = np.asarray(metrics["load_NE"])
    assert len({tuple(np.sign(row - 0.25)) for row in load_NE}) > 1  # or rows could not be told apart
    np.testing.assert_allclose(bias_NE, cfg.train.bias_rate * np.sign(0.25 - load_NE), atol=1e-9)


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
    state, expected = first, first.params["model"]["head"]
    for i in range(6):  # (1 + step) / (10 + step) reaches a half in the ninth
        state, _ = run(cfg, PLAIN, 1, state)
        decay = (1 + i) / (10 + i)
        expected = decay * expected + (1 - decay) * state.params["model"]["head"]
        np.testing.assert_allclose(state.ema["head"], expected, atol=1e-7)
    late = state._replace(step=jnp.asarray(1000, jnp.int32))
    after, _ = run(cfg, PLAIN, 1, late)
    expected = 0.5 * late.ema["head"] + 0.5 * after.params["model"]["head"]
    np.testing.assert_allclose(after.ema["head"], expected, atol=1e-7)
    assert np.array_equal(steps.eval_weights(cfg, plan, state, quantize=False)["head"], state.ema["head"])


def test_averaged_weights_are_deployed_at_the_scales_of_the_last_step():
    cfg = averaged_and_unbalanced()
    plan, _ = quant_plan(cfg)
    state, _ = run(cfg, QAT, 3)
    weights = leaves_by_path(steps.eval_weights(cfg, plan, state, quantize=True))
    for path, grid in plan.items():
        scale = grid.snap(state.params["scales"][path])
        averaged = leaves_by_path(state.ema)[path]
        np.testing.assert_array_equal(weights[path], grid.decode(grid.nearest(averaged, scale), scale))
        assert np.any(averaged != leaves_by_path(state.params["model"])[path])


def test_distilling_pulls_a_perturbed_model_back_to_its_teacher():
    phase = dataclasses.replace(PLAIN, distill=1.0)
    plan, _ = quant_plan(CFG)
    trunk, _ = run(CFG, PLAIN, 20)
    teacher = trunk.params["model"]
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), teacher)
    state = steps.branch(CFG, plan, trunk._replace(params={"model": moved, "scales": {}}), quantize=False)
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
    state = jax.eval_shape(functools.partial(steps.branch, cfg, plan, quantize=phase.quantize), state)
    batch = {"tokens": jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.data.seq_len + 1), jnp.int32)}
    step = jax.jit(step_of(cfg, phase, plan))
    new, metrics = jax.eval_shape(step, state, batch, None, FULL)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_stops_the_gradient_of_weights_beyond_the_last_level(clip):
    quant = QuantConfig(experts="q4_0", scale="learned", clip_gradient=clip)
    cfg = dataclasses.replace(CFG, quant=quant)
    plan, _ = quant_plan(cfg)
    params = programs(cfg, QAT)[0]().params
    path, key = "layers/experts/down", ("layers", "experts", "down")
    w = params["model"][key[0]][key[1]][key[2]]
    params["model"][key[0]][key[1]][key[2]] = w.at[0, 0, 0, 0].set(100.0)
    _, pull_back = jax.vjp(lambda p: steps.deployed(cfg, plan, p, True), params)
    (gradient,) = pull_back(jax.tree.map(jnp.ones_like, params["model"]))
    through = np.asarray(leaves_by_path(gradient["model"])[path])
    assert through[0, 0, 0, 0] == (0.0 if clip else 1.0)
    assert through[0, 0, 0, 40] == 1.0  # in the next block


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
    larger = {path: 1.1 * s for path, s in scales.items()}
    assert all(float(v) == pytest.approx(0.1, rel=0.01) for v in fake.scale_drift(larger, scales).values())
    for path, error in fake.weight_error(plan, model, scales, rule="search").items():
        w = np.asarray(leaves_by_path(model)[path], np.float64)
        value = plan[path].decode(codes[path], plan[path].snap(scales[path]))
        assert float(error) == pytest.approx(np.sqrt(np.sum((value - w) ** 2) / np.sum(w**2)), rel=1e-4)
