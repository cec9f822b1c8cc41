import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qatmoe.config import ModelConfig
from qatmoe.mesh import AXES
from qatmoe.model import transformer
from qatmoe.tree import leaves_by_path

CFG = ModelConfig(
    vocab_size=32, dim=16, n_layers=3, dense_dim=24, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=4, expert_dim=8,
    init_std=0.2, capacity_factor=2.0, expert_block=4,
)  # fmt: skip
L = 8
TOKENS = jax.random.randint(jax.random.key(1), (2, L + 1), 0, 32)


init_params = jax.jit(transformer.init_params, static_argnums=0)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    return init_params(CFG, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=1, static_argnames=("mtp", "train", "return_routing"))
def forward(params, cfg, tokens=TOKENS, mtp=True, train=True, return_routing=False, **kwargs):
    mtp_tokens = tokens[None, :, 1:] if mtp else None
    return transformer.forward(
        params, cfg, tokens[:, :-1], mtp_tokens=mtp_tokens, train=train, return_routing=return_routing, **kwargs
    )


@functools.partial(jax.jit, static_argnums=1)
def loss_and_grads(params, cfg):
    def loss(params):
        out = forward(params, cfg)
        total = sum(jnp.sum(jnp.sin(transformer.logits(params, cfg, h))) for h in (out.hidden_BLD, *out.mtp_hidden))
        return total + out.aux["balance"] + out.aux["z"]

    return jax.value_and_grad(loss)(params)


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), a, b)


# ---- parameters ----


@pytest.mark.parametrize("scan", [True, False])
def test_abstract_parameters_and_axes_describe_the_real_ones(scan):
    cfg = dataclasses.replace(CFG, scan_layers=scan)
    real = init_params(cfg, jax.random.key(0))
    described = jax.tree.map(lambda a: (a.shape, a.dtype), transformer.abstract_params(cfg))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), real) == described
    for array, parts in zip(jax.tree.leaves(real), jax.tree.leaves(transformer.kept_specs(cfg)), strict=True):
        assert len(parts) == array.ndim


def test_layout(params):
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(params).items()}
    block = {
        "attn_norm": (16,), "attn/q": (32, 16), "attn/k": (16, 16), "attn/v": (16, 16), "attn/o": (16, 32),
        "attn/q_norm": (8,), "attn/k_norm": (8,), "ffn_norm": (16,),
    }  # fmt: skip
    dense = block | {"ffn/gate_up": (48, 16), "ffn/down": (16, 24)}
    moe = block | {
        "router/weight": (4, 16), "router/bias": (4,), "experts/gate_up": (4, 16, 16), "experts/down": (4, 16, 8),
        "shared/gate_up": (16, 16), "shared/down": (16, 8),
    }  # fmt: skip
    assert shapes == (
        {"embed": (32, 16), "head": (32, 16), "norm": (16,)}
        | {f"dense_layers/{k}": (1, *v) for k, v in dense.items()}
        | {f"layers/{k}": (2, *v) for k, v in moe.items()}
        | {f"mtp/block/{k}": (1, *v) for k, v in moe.items()}
        | {"mtp/enorm": (1, 16), "mtp/hnorm": (1, 16), "mtp/eh_proj": (1, 16, 32), "mtp/norm": (1, 16)}
    )


def test_what_is_switched_off_has_no_parameters():
    cfg = dataclasses.replace(
        CFG, tie_embeddings=True, n_mtp=0, n_dense_layers=0, n_shared_experts=0, router_bias=False, qk_norm="none"
    )
    tree = transformer.abstract_params(cfg)
    assert set(tree) == {"embed", "norm", "layers"}
    assert set(tree["layers"]) == {"attn_norm", "attn", "ffn_norm", "router", "experts"}
    assert set(tree["layers"]["attn"]) == {"q", "k", "v", "o"}
    assert set(tree["layers"]["router"]) == {"weight"}
    out = forward(init_params(cfg, jax.random.key(0)), cfg, mtp=False)
    assert jnp.all(jnp.isfinite(out.hidden_BLD))


def test_initial_sizes():
    params = init_params(dataclasses.replace(CFG, dim=64, init_std=0.02), jax.random.key(0))
    block = params["layers"]
    for wide in (params["embed"], block["attn"]["q"], block["experts"]["gate_up"]):
        assert jnp.std(wide) == pytest.approx(0.02, rel=0.1)
    for into_residual in (block["attn"]["o"], block["experts"]["down"], block["shared"]["down"]):
        assert jnp.std(into_residual) == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert jnp.all(block["attn_norm"] == 1)
    assert not jnp.any(block["router"]["bias"])
    assert not jnp.array_equal(block["attn"]["q"][0], block["attn"]["q"][1])


@pytest.mark.parametrize("scan", [True, False])
def test_a_weight_is_drawn_by_its_path_and_layer_alone(scan):
    """So a run starts from the same numbers whatever else its model has, and however its layers lie."""
    found = init_params(dataclasses.replace(CFG, scan_layers=scan), jax.random.key(5))
    draw = lambda key, shape: 0.2 * np.asarray(jax.random.normal(key, shape))  # noqa: E731
    key_of = lambda path: jax.random.fold_in(jax.random.key(5), zlib.crc32(path.encode()))  # noqa: E731
    np.testing.assert_allclose(found["embed"], draw(key_of("embed"), (32, 16)), rtol=1e-6)
    for i in range(2):  # MoE layers
        layer = jax.tree.map(lambda a, i=i: a[i], found["layers"]) if scan else found["layers"][str(i)]
        for path, shape in (("attn/q", (32, 16)), ("experts/gate_up", (4, 16, 16))):
            got = leaves_by_path(layer)[path]
            want = draw(jax.random.fold_in(key_of(f"layers/{path}"), i), shape)
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_layouts_start_equal_and_convert_into_each_other(params):
    unrolled = init_params(dataclasses.replace(CFG, scan_layers=False), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, transformer.unstack_layers(params), unrolled)
    jax.tree.map(np.testing.assert_array_equal, transformer.stack_layers(unrolled), params)


def test_module_holds_the_same_model():
    model = transformer.Transformer(CFG, rngs=nnx.Rngs(0))
    params = model.pure_params()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, transformer.abstract_params(CFG))
    expected = transformer.logits(params, CFG, forward(params, CFG, mtp=False, train=False).hidden_BLD)
    np.testing.assert_allclose(jax.jit(lambda tokens: model(tokens))(TOKENS[:, :L]), expected, rtol=1e-4, atol=1e-4)


# ---- forward pass ----


def test_scan_equals_loop(params):
    loop = dataclasses.replace(CFG, scan_layers=False)
    value, grads = loss_and_grads(params, CFG)
    loop_value, loop_grads = loss_and_grads(transformer.unstack_layers(params), loop)
    assert value == pytest.approx(float(loop_value), rel=1e-5)
    assert_trees_close(grads, transformer.stack_layers(loop_grads))
    aux = forward(params, CFG, return_routing=True).aux
    loop_aux = forward(transformer.unstack_layers(params), loop, return_routing=True).aux
    assert_trees_close(aux, loop_aux)


def test_remat_changes_nothing(params):
    configs = [dataclasses.replace(CFG, remat=remat) for remat in ("none", "dots", "full")]
    kept, *again = [loss_and_grads(params, cfg) for cfg in configs]
    for found in again:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(kept), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    matmuls = [
        str(jax.make_jaxpr(loss_and_grads, static_argnums=1)(params, cfg)).count("dot_general") for cfg in configs
    ]
    assert matmuls[0] < matmuls[1] < matmuls[2]  # it does compute again


@pytest.mark.parametrize("experts", ["dense", "blocked"])
def test_remat_takes_less_memory_the_more_is_computed_again(experts):
    wide = dataclasses.replace(CFG, n_layers=5, dim=32, expert_dim=32, n_mtp=0, experts=experts)
    params = transformer.abstract_params(wide)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def loss(params, tokens, cfg):
        return jnp.sum(jnp.sin(transformer.forward(params, cfg, tokens, train=True).hidden_BLD))

    taken = []
    for remat in ("none", "dots", "full"):
        gradient = jax.jit(jax.grad(functools.partial(loss, cfg=dataclasses.replace(wide, remat=remat))))
        taken.append(gradient.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes)
    assert taken[0] > 1.5 * taken[1] > 1.5 * taken[2]


def test_of_layers_that_keep_their_dots_nothing_else_is_kept(capsys):
    """Neither the scores of attention nor, where parameters are split over devices, gathered weights."""
    cfg = dataclasses.replace(CFG, n_layers=2, n_dense_layers=0, n_mtp=0, scan_layers=False, remat="dots")
    params, tokens = transformer.abstract_params(cfg), jax.ShapeDtypeStruct((4, L), jnp.int32)
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)  # as a Mesh of devices has them
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 2, 1, 1), AXES, axis_types=auto)):
        jax.ad_checkpoint.print_saved_residuals(
            lambda p, t: jnp.sum(transformer.forward(p, cfg, t, train=True, groups=2).hidden_BLD), params, tokens
        )
    kept = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    dots = [line for line in kept if "named 'dot'" in line]
    # Queries, keys, values, attention's output, router, gate and up of the routed experts and of the shared one.
    assert len(dots) == 2 * 7
    inside = [line for line in kept if "attention.py" in line or "moe.py" in line or "router.py" in line]
    assert not inside
    assert sum("sharding_constraint" in line for line in kept) == 1  # the embeddings that go in


@pytest.mark.parametrize("experts", ["blocked", "ragged", "reference"])
def test_expert_implementations_agree(params, experts):
    other = forward(params, dataclasses.replace(CFG, experts=experts))
    assert_trees_close(other, forward(params, CFG))


@pytest.mark.parametrize("capacity_factor", [2.0, 0.5])
def test_later_tokens_change_nothing_before_them(params, capacity_factor):
    """Also where tokens are dropped: a later token never takes an earlier one's room."""
    cfg = dataclasses.replace(CFG, capacity_factor=capacity_factor)
    long = jax.random.randint(jax.random.key(3), (1, 33), 0, 32)
    before = forward(params, cfg, long, mtp=False)
    after = forward(params, cfg, long.at[:, 5].add(1) % 32, mtp=False)
    assert bool(jnp.any(before.aux["dropped_N"] > 0)) == (capacity_factor < 1)
    np.testing.assert_array_equal(before.hidden_BLD[:, :5], after.hidden_BLD[:, :5])
    assert jnp.all(jnp.any(before.hidden_BLD[:, 5:] != after.hidden_BLD[:, 5:], axis=-1))


def test_packed_documents_equal_documents_alone(params):
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    kwargs = {"mtp": False, "train": False}
    packed = forward(params, CFG, segments_BL=segments, positions_BL=positions, **kwargs).hidden_BLD
    alone = [forward(params, CFG, part, **kwargs).hidden_BLD for part in (TOKENS[:, :4], TOKENS[:, 3:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), rtol=1e-3, atol=1e-4)


def test_evaluation_drops_nothing(params):
    tight = dataclasses.replace(CFG, capacity_factor=0.25)
    trained, evaluated = forward(params, tight), forward(params, tight, train=False)
    assert jnp.all(trained.aux["dropped_N"] > 0)
    assert not jnp.any(evaluated.aux["dropped_N"])
    np.testing.assert_allclose(evaluated.hidden_BLD, forward(params, CFG).hidden_BLD, rtol=1e-3, atol=1e-4)


def test_auxiliary_values_cover_every_moe_layer(params):
    aux = forward(params, CFG, return_routing=True).aux
    assert aux["load_NE"].shape == (3, 4)  # two MoE layers and one module
    assert aux["indices_NTk"].shape == (3, 2 * L, 2)
    np.testing.assert_allclose(jnp.sum(aux["load_NE"], axis=-1), 1.0, rtol=1e-5)
    counts = jax.vmap(lambda i: jnp.bincount(i.ravel(), length=4))(aux["indices_NTk"])
    np.testing.assert_allclose(aux["load_NE"], counts / (2 * L * 2), rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_its_own_choices_forced_change_no_bit(params, scan):
    cfg = dataclasses.replace(CFG, scan_layers=scan)
    tree = params if scan else transformer.unstack_layers(params)
    plain = forward(tree, cfg, train=False, return_routing=True)
    forced = forward(tree, cfg, train=False, return_routing=True, choices_NTk=plain.aux["indices_NTk"])
    jax.tree.map(np.testing.assert_array_equal, forced, plain)
    np.testing.assert_allclose(jnp.sum(plain.aux["probs_NTE"], axis=-1), 1.0, rtol=1e-5)


def test_forced_choices_are_the_ones_that_compute(params):
    """Every token to experts 0 and 1: as if the selection bias had sent it there; in the modules too."""
    there = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (3, 2 * L, 2))
    forced = forward(params, CFG, train=False, return_routing=True, choices_NTk=there)
    biased = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[..., :2].add(100.0) if path[-1].key == "bias" else leaf, params
    )
    expected = forward(biased, CFG, train=False, return_routing=True)
    np.testing.assert_array_equal(forced.aux["load_NE"], expected.aux["load_NE"])
    assert_trees_close((forced.hidden_BLD, forced.mtp_hidden), (expected.hidden_BLD, expected.mtp_hidden))


def test_every_parameter_but_the_bias_gets_a_gradient(params):
    _, grads = loss_and_grads(params, CFG)
    for path, leaf in leaves_by_path(grads).items():
        assert bool(jnp.any(leaf != 0)) != path.endswith("router/bias"), path


def test_bfloat16_computes_in_bfloat16_from_float32_weights(params):
    half = dataclasses.replace(CFG, dtype="bfloat16")
    out = forward(params, half)
    scores = transformer.logits(params, half, out.hidden_BLD)
    assert (out.hidden_BLD.dtype, scores.dtype, out.aux["load_NE"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    _, grads = jax.eval_shape(functools.partial(loss_and_grads, cfg=half), params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    exact = transformer.logits(params, CFG, forward(params, CFG).hidden_BLD)
    assert jnp.corrcoef(scores.ravel(), exact.ravel())[0, 1] > 0.99


def products(jaxpr):
    """(type of the first operand, precision) of every product in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            yield eqn.invars[0].aval.dtype.name, eqn.params["precision"]
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("experts", ["dense", "blocked", "ragged"])
def test_float32_is_multiplied_in_float32(params, experts):
    """Unasked, GPUs and TPUs would round the operands. Ranks of tokens are products of 0 and 1, exact anyway."""
    cfg = dataclasses.replace(CFG, experts=experts, capacity_factor=2.0)
    exact = {jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2}
    found = list(products(jax.make_jaxpr(functools.partial(loss_and_grads, cfg=cfg))(params).jaxpr))
    assert [kind for kind, precision in found if precision in exact] == ["float32"] * (len(found) - 2)
    assert len(found) > 90


def test_forward_leaves_its_callers_parameters_alone(params):
    unrolled = transformer.unstack_layers(params)
    before = {path: (id(leaf), leaf.dtype) for path, leaf in leaves_by_path(unrolled).items()}
    cfg = dataclasses.replace(CFG, scan_layers=False, dtype="bfloat16")
    transformer.forward(unrolled, cfg, TOKENS[:, :-1], mtp_tokens=TOKENS[None, :, 1:], train=True)  # not jitted
    assert {path: (id(leaf), leaf.dtype) for path, leaf in leaves_by_path(unrolled).items()} == before


def test_logits_of_chunks_are_chunks_of_logits(params):
    hidden = jax.random.normal(jax.random.key(2), (2, 6, 16))
    whole = transformer.logits(params, CFG, hidden)
    np.testing.assert_allclose(transformer.logits(params, CFG, hidden[1, 2:5]), whole[1, 2:5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole[0, 0], np.asarray(params["head"]) @ np.asarray(hidden[0, 0]), rtol=1e-4, atol=1e-5)


# ---- one block, written out in numpy ----


def numpy_block(p, x_LD, cfg):
    """A MoE block of one sequence in float64: loops over heads, positions and experts."""

    def norm(x, w):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + cfg.norm_eps) * w

    def silu(x):
        return x / (1 + np.exp(-x))

    def glu(x, gate_up, down):
        return (silu(x @ gate_up[: len(gate_up) // 2].T) * (x @ gate_up[len(gate_up) // 2 :].T)) @ down.T

    n_pairs = int(cfg.head_dim * cfg.rotary_fraction) // 2

    def turn(x, position):
        x = x.copy()
        for i in range(n_pairs):
            angle = position * cfg.rope_theta ** (-i / n_pairs)
            a, b = x[i], x[i + n_pairs]
            x[i], x[i + n_pairs] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return x

    y = norm(x_LD, p["attn_norm"])

    def heads(w, n):
        return (y @ w.T).reshape(len(y), n, cfg.head_dim)

    q, k, v = (
        heads(p["attn"]["q"], cfg.n_heads),
        heads(p["attn"]["k"], cfg.n_kv_heads),
        heads(p["attn"]["v"], cfg.n_kv_heads),
    )
    mixed = np.zeros_like(q)
    for h in range(cfg.n_heads):
        kv = h // (cfg.n_heads // cfg.n_kv_heads)
        for t in range(len(y)):
            q_t = turn(norm(q[t, h], p["attn"]["q_norm"]), t)
            scores = np.array([q_t @ turn(norm(k[s, kv], p["attn"]["k_norm"]), s) for s in range(t + 1)])
            weights = np.exp(scores / np.sqrt(cfg.head_dim))
            mixed[t, h] = weights / weights.sum() @ v[: t + 1, kv]
    x_LD = x_LD + mixed.reshape(len(y), -1) @ p["attn"]["o"].T

    y = norm(x_LD, p["ffn_norm"])
    out = glu(y, p["shared"]["gate_up"], p["shared"]["down"])
    for t in range(len(y)):
        scores = 1 / (1 + np.exp(-(p["router"]["weight"] @ y[t])))
        chosen = np.argsort(-(scores + p["router"]["bias"]))[: cfg.top_k]
        for e in chosen:
            expert = glu(y[t], p["experts"]["gate_up"][e], p["experts"]["down"][e])
            out[t] += cfg.routed_scale * scores[e] / scores[chosen].sum() * expert
    return norm(x_LD + out, np.ones(cfg.dim))


def test_one_block_against_numpy(params):
    cfg = dataclasses.replace(CFG, n_layers=1, n_dense_layers=0, n_mtp=0, routed_scale=1.5)
    block = jax.tree.map(lambda a: a[0], params["layers"])
    keys = iter(jax.random.split(jax.random.key(5), 10))
    block["router"]["bias"] = 0.2 * jax.random.normal(next(keys), (4,))
    for tree, name in ((block, "attn_norm"), (block, "ffn_norm"), (block["attn"], "q_norm"), (block["attn"], "k_norm")):
        tree[name] = 1 + 0.3 * jax.random.normal(next(keys), tree[name].shape)
    model = {"embed": params["embed"], "norm": jnp.ones(16), "layers": jax.tree.map(lambda a: a[None], block)}
    hidden = forward(model, cfg, TOKENS[:1], mtp=False).hidden_BLD[0]
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), block)
    expected = numpy_block(exact, np.asarray(params["embed"], np.float64)[TOKENS[0, :L]], cfg)
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-4)
