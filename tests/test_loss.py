import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe import loss
from qatmoe.config import Config, ModelConfig, TrainConfig
from qatmoe.model import transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = ModelConfig(
    vocab_size=64, dim=32, n_layers=2, dense_dim=32, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=4, expert_dim=32,
    experts="blocked", n_mtp=2,
)  # fmt: skip
CFG = Config(model=MODEL, train=TrainConfig(mtp_weight=0.3, balance_weight=0.01, z_weight=0.001))


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(MODEL, jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("chunk", "distill"))
def training_loss(params, batch, teacher=None, distill=0.0, chunk=0):
    cfg = dataclasses.replace(CFG, train=dataclasses.replace(CFG.train, loss_chunk=chunk))
    return loss.training_loss(params, cfg, batch, loss.denominators(batch, 2), teacher=teacher, distill=distill)


def batch_of(rows=4, length=16, seed=1):
    shape = (rows, length + 1 + MODEL.n_mtp)
    return {"tokens": jax.random.randint(jax.random.key(seed), shape, 0, MODEL.vocab_size)}


def test_views_shift_targets_right():
    tokens = jnp.arange(2 * 9).reshape(2, 9)
    v = loss.views({"tokens": tokens}, n_mtp=2)
    assert v.tokens_BL.tolist() == tokens[:, :6].tolist()
    for depth, target in enumerate(v.targets):
        assert target.tolist() == (v.tokens_BL + 1 + depth).tolist()
    for i in range(2):
        assert v.mtp_tokens_MBL[i].tolist() == (v.tokens_BL + 1 + i).tolist()


def test_targets_in_another_document_or_in_padding_do_not_count():
    batch = {
        "tokens": jnp.arange(8)[None],
        "segments": jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
        "mask": jnp.array([[1, 1, 1, 1, 1, 1, 1, 0]]),
    }
    v = loss.views(batch, n_mtp=1)
    assert v.weights[0].tolist() == [[1, 1, 0, 1, 1, 1]]
    assert v.weights[1].tolist() == [[1, 0, 0, 1, 1, 0]]


def test_cross_entropy_and_kl_against_numpy():
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    teacher = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    targets = np.array([0, 3, 6, 2, 2])
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (teacher, logits))
    np.testing.assert_allclose(loss.cross_entropy(logits, targets), -np.log(q[np.arange(5), targets]), rtol=1e-5)
    np.testing.assert_allclose(loss.kl_divergence(teacher, logits), (p * np.log(p / q)).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss.kl_divergence(logits, logits), 0, atol=1e-6)


def test_chunks_give_the_same_loss_and_gradient(params):
    def value(params, chunk):
        return training_loss(params, batch_of(), teacher=params, distill=0.5, chunk=chunk)[0]

    whole, whole_grad = jax.jit(jax.value_and_grad(functools.partial(value, chunk=0)))(params)
    cut, cut_grad = jax.jit(jax.value_and_grad(functools.partial(value, chunk=16)))(params)
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cut_grad, whole_grad)


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize(("distill", "taught"), [(0.0, False), (0.3, True), (1.0, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradients_made_beside_the_loss_are_those_of_autodiff(tied, distill, taught, chunk):
    cfg = dataclasses.replace(MODEL, tie_embeddings=tied)
    keys = jax.random.split(jax.random.key(7), 6)
    name = "embed" if tied else "head"
    weight, hidden = jax.random.normal(keys[0], (64, 32)), jax.random.normal(keys[1], (2, 16, 32))
    teacher = ({name: jax.random.normal(keys[2], (64, 32))}, jax.random.normal(keys[3], (2, 16, 32)))
    targets = jax.random.randint(keys[4], (2, 16), 0, 64)
    weights = jnp.where(jnp.arange(16) % 3 == 0, 0.0, jax.random.uniform(keys[5], (2, 16)))

    def plain(weight, hidden):
        logits = (hidden @ weight.T).reshape(-1, 64)
        ce = loss.cross_entropy(logits, targets.reshape(-1))
        kl = loss.kl_divergence((teacher[1] @ teacher[0][name].T).reshape(-1, 64), logits)
        each = (1 - distill) * ce + distill * kl if taught else ce
        return 2.5 * jnp.sum(each * weights.reshape(-1))

    def made(weight, hidden):
        options = {"teacher": teacher if taught else None, "distill": distill, "chunk": chunk}
        return 2.5 * loss.head_loss({name: weight}, cfg, hidden, targets, weights, **options)[0]

    value, grads = jax.jit(jax.value_and_grad(made, (0, 1)))(weight, hidden)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(weight, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_the_scale_of_the_loss_is_not_rounded_in_bfloat16():
    """1 / tokens rounded to bf16 would be one error in all gradients: their mean must be that of f32."""
    hidden, weight = jax.random.normal(jax.random.key(0), (2, 64, 32)), jax.random.normal(jax.random.key(1), (64, 32))
    targets = jax.random.randint(jax.random.key(2), (2, 64), 0, 64)

    def grad(dtype):
        def value(hidden):
            return loss.head_loss({"head": weight}, MODEL, hidden, targets, jnp.ones((2, 64)))[0] / 13.7

        return jax.jit(jax.grad(value))(hidden.astype(dtype)).astype(jnp.float32)

    half, whole = grad(jnp.bfloat16), grad(jnp.float32)
    assert abs(float(jnp.sum(half * whole) / jnp.sum(whole * whole)) - 1) < 1e-3


def test_the_parts_add_up_and_mtp_is_not_silently_zero(params):
    total, aux = training_loss(params, batch_of())
    assert float(aux["mtp"]) > 1.0  # two untrained modules: about log(64)
    assert float(aux["kl"]) == 0.0
    expected = aux["ce"] + 0.3 * aux["mtp"] + 0.01 * aux["balance"] + 0.001 * aux["z"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_mtp_loss_reaches_the_trunk_and_the_modules(params):
    grads = jax.jit(jax.grad(lambda params: training_loss(params, batch_of())[1]["mtp"]))(params)
    for name in ("eh_proj", "enorm", "hnorm", "norm"):
        assert float(jnp.abs(grads["mtp"][name]).max()) > 0, name
    assert float(jnp.abs(grads["layers"]["experts"]["down"]).max()) > 0


def test_distilling_from_itself_adds_nothing(params):
    plain = training_loss(params, batch_of())[1]
    taught = training_loss(params, batch_of(), teacher=params, distill=1.0)
    np.testing.assert_allclose(taught[1]["kl"], 0, atol=1e-6)
    np.testing.assert_allclose(taught[0], 0.3 * plain["mtp"] + 0.01 * plain["balance"] + 0.001 * plain["z"], rtol=1e-5)


def test_documents_packed_into_a_row_are_worth_what_they_are_alone(params):
    """Attention, MTP inputs, targets, the teacher's hidden states and counts stay inside each document."""
    tokens = batch_of(1)["tokens"]
    lengths = [9, 7, 3]  # the last one is no input's document, so that the others' targets end where they end alone
    assert sum(lengths) == tokens.shape[1]
    ids, positions = np.repeat([0, 1, 2], lengths)[None], np.concatenate([np.arange(n) for n in lengths])[None]
    packed = {"tokens": tokens, "segments": jnp.asarray(ids), "positions": jnp.asarray(positions)}
    alone = []
    for start, n in ((0, 9), (9, 7)):
        mask = (jnp.arange(tokens.shape[1]) < n)[None]
        alone.append({"tokens": jnp.where(mask, jnp.roll(tokens, -start, axis=1), 5), "mask": mask})
    sums = [loss.evaluation_sums(params, MODEL, batch) for batch in (packed, *alone)]
    assert [s["count"][:, 0].tolist() for s in sums] == [[14, 12, 10], [8, 7, 6], [6, 5, 4]]
    np.testing.assert_allclose(sums[0]["nats"], sums[1]["nats"] + sums[2]["nats"], rtol=1e-5)

    teacher = jax.tree.map(lambda p: 1.1 * p, params)
    train = dataclasses.replace(CFG.train, balance_weight=0.0, z_weight=0.0)
    cfg, totals = dataclasses.replace(CFG, train=train), loss.denominators(packed, MODEL.n_mtp)
    of = jax.value_and_grad(lambda p, b: loss.training_loss(p, cfg, b, totals, teacher=teacher, distill=0.5)[0])
    (whole, gradient), *parts = (of(params, batch) for batch in (packed, *alone))
    assert float(whole) == pytest.approx(sum(float(value) for value, _ in parts), rel=1e-5)
    summed = jax.tree.map(jnp.add, *(g for _, g in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, summed)


def test_evaluation_sums_count_what_is_not_padding(params):
    batch = batch_of(rows=3)
    sums = jax.jit(functools.partial(loss.evaluation_sums, cfg=MODEL))
    whole = sums(params, batch=batch)
    mask = jnp.ones_like(batch["tokens"]).at[2].set(0)
    part = sums(params, batch=batch | {"mask": mask})
    assert part["count"].tolist() == [[16.0, 16.0, 0.0]] * 3
    np.testing.assert_allclose(part["nats"][:, :2], whole["nats"][:, :2], rtol=1e-5)
    assert part["nats"][:, 2].tolist() == [0.0] * 3
