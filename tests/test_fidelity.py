"""Every figure of an audit against one computed by hand, in numpy's float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe import fidelity
from qatmoe.config import ModelConfig
from qatmoe.fidelity import Outcome, Units
from qatmoe.model import transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = ModelConfig(
    vocab_size=32, dim=16, n_layers=3, dense_dim=24, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=4, expert_dim=8,
    init_std=0.3, expert_block=4, n_mtp=2, scan_layers=False,
)  # fmt: skip
B, L = 2, 8


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def single(values):
    """One unit a token, all of one domain."""
    return Units(np.arange(len(values)), np.zeros(len(values), int))


# ---- per token -------------------------------------------------------------------------------------------------------


def test_token_metrics_by_hand():
    reference = [[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0], [0.0, 3.0, 1.0, 2.0, -1.0, -2.0, 0.5]]
    model = [[1.0, 2.0, 0.0, -1.0, -4.0, -3.0, -2.0], [0.0, 3.0, 1.0, 2.0, -1.0, -2.0, 0.5]]
    targets = [0, 3]
    found = {
        k: np.asarray(v) for k, v in fidelity.token_metrics(*map(jnp.asarray, (reference, model, targets))).items()
    }
    p, q = log_softmax(reference), log_softmax(model)
    np.testing.assert_allclose(found["nats"], [-q[0, 0], -q[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(found["above"], [p[0, 0] - q[0, 0], 0.0], rtol=1e-6)
    np.testing.assert_allclose(found["kld"], np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found["same_top1"], [0.0, 1.0])
    # Best five 0 1 2 3 4 and 1 0 2 3 6: four in common, in whatever order.
    np.testing.assert_allclose(found["top5_overlap"], [4 / 5, 1.0])


def test_kld_is_of_the_reference_to_the_model_and_not_the_reverse():
    reference, model = jnp.log(jnp.asarray([[0.5, 0.5]])), jnp.log(jnp.asarray([[0.9, 0.1]]))
    found = fidelity.token_metrics(reference, model, jnp.asarray([0]))
    assert float(found["kld"][0]) == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rel=1e-5)


def test_sets_of_experts_are_compared_in_any_order():
    a = jnp.asarray([[[0, 1], [2, 3], [1, 3]], [[0, 2], [1, 2], [3, 0]]])
    b = jnp.asarray([[[1, 0], [2, 1], [1, 3]], [[2, 0], [2, 1], [0, 1]]])
    np.testing.assert_array_equal(fidelity.same_experts(a, b), [[1, 0, 1], [1, 1, 0]])


def test_router_kld_by_hand():
    p = np.asarray([[[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]], [[0.3, 0.3, 0.4], [0.5, 0.5, 0.0]]])
    q = np.asarray([[[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]], [[0.3, 0.3, 0.4], [0.25, 0.5, 0.25]]])
    first = [0.7 * np.log(7 / 6) + 0.2 * np.log(2 / 3), np.log(2)]
    second = [0.0, 0.5 * np.log(2)]
    expected = (np.asarray(first) + second) / 2
    found = fidelity.router_kld(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_acceptance_of_a_hand_made_sequence():
    """Module 0 at t against the trunk at t+1, module 1 at t against the trunk at t+2, and only after module 0."""
    best = jnp.asarray([[10, 11, 12, 13, 14]])
    drafts = jnp.asarray([[[11, 12, 99, 14, 14]], [[12, 99, 14, 13, 14]]])
    first = [1, 1, 0, 1, 0]  # the last has no later position in the window
    second = [1, 0, 0, 0, 0]  # at 2 module 1 agrees (14) but module 0 did not
    np.testing.assert_array_equal(fidelity.acceptance(best, drafts)[:, 0], [first, second])


# ---- of models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return jax.jit(transformer.init_params, static_argnums=0)(CFG, jax.random.key(0))


def batch(mask=None):
    tokens = jax.random.randint(jax.random.key(1), (B, L + 1 + CFG.n_mtp), 0, CFG.vocab_size)
    return {"tokens": tokens} if mask is None else {"tokens": tokens, "mask": jnp.asarray(mask)}


def compared(reference, model, given=None, chunk=4):
    """Figures of a model beside a reference, and its outcome."""
    given = batch() if given is None else given
    theirs, ours = (fidelity.run_model(p, given, cfg=CFG) for p in (reference, model))
    forced = fidelity.run_model(model, given, theirs.indices_NTk, cfg=CFG)
    assert forced.mtp_hidden == ()
    heads = [fidelity.head_of(p) for p in (reference, model)]
    found = fidelity.compare(heads[0], theirs, heads[1], ours, forced.hidden_BLD, given, cfg=CFG, chunk=chunk)
    return {k: np.asarray(v) for k, v in found.items()}, theirs, ours


def changed(params, wanted, scale=0.5):
    """The model with noise on the leaves whose path has a name in it."""

    def leaf(path, a):
        name = jax.tree_util.keystr(path)
        key = jax.random.key(len(name) + sum(map(ord, name)))
        return a + scale * jax.random.normal(key, a.shape) if wanted in name else a

    return jax.tree_util.tree_map_with_path(leaf, params)


def test_a_model_is_itself(params):
    found, outcome, _ = compared(params, params)
    for name in ("kld", "kld_experts", "router_kld"):
        assert np.abs(found[name]).max() < 1e-6, name
    for name in ("same_top1", "top5_overlap", "agreement"):
        assert np.all(found[name] == 1.0), name
    head = fidelity.head_of(params)
    own = fidelity.kld(head, outcome.hidden_BLD, head, outcome.hidden_BLD, cfg=CFG, chunk=4)
    assert np.abs(own).max() < 1e-6


def test_the_whole_comparison_against_float64(params):
    other = changed(params, "experts", 0.2)
    found, theirs, ours = compared(params, other)
    scores = [
        np.asarray(o.hidden_BLD, np.float64) @ np.asarray(p["head"], np.float64).T
        for o, p in ((theirs, params), (ours, other))
    ]
    p, q = map(log_softmax, scores)
    np.testing.assert_allclose(found["kld"], np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-3, atol=1e-6)
    assert found["kld"].mean() > 1e-3
    tokens = np.asarray(batch()["tokens"])
    nats = -np.take_along_axis(q, tokens[:, 1 : L + 1, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["nats"], nats, rtol=1e-5)
    np.testing.assert_array_equal(found["same_top1"], p.argmax(-1) == q.argmax(-1))
    best = q.argmax(-1)
    drafts = [(np.asarray(h, np.float64) @ np.asarray(other["head"], np.float64).T).argmax(-1) for h in ours.mtp_hidden]
    np.testing.assert_array_equal(found["accepted"], fidelity.acceptance(jnp.asarray(best), jnp.asarray(drafts)))
    np.testing.assert_array_equal(found["drafted"][:, 0], [[1] * 7 + [0], [1] * 6 + [0, 0]])
    for chunk in (1, 16):
        again = compared(params, other, chunk=chunk)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), again, found)


def test_padding_counts_nowhere(params):
    mask = np.ones((B, L + 1 + CFG.n_mtp), np.int32)
    mask[1, 5:] = 0  # targets of positions 4 and later
    found, _, _ = compared(params, params, batch(mask))
    np.testing.assert_array_equal(found["count"], [[1] * 8, [1] * 4 + [0] * 4])
    np.testing.assert_array_equal(found["drafted"][:, 1], [[1] * 3 + [0] * 5, [1] * 2 + [0] * 6])


def test_acceptance_at_depth_two_of_hand_made_hidden_states():
    """One hot hidden states under a head of ones on the diagonal: the best tokens are written down.

    Module 0 at t is held against the trunk at t+1, module 1 against the trunk at t+2. The second row ends earlier: its
    tokens from position 5 on are padding.
    """
    cfg = dataclasses.replace(CFG, vocab_size=16)
    best = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    first = [[2, 3, 9, 5, 0], [7, 8, 9, 10, 0]]  # wrong at 2 of the first row
    second = [[3, 9, 5, 0, 0], [8, 9, 10, 0, 0]]  # wrong at 1 of the first row; right at 2, where module 0 is not
    hidden, *mtp_hidden = (jax.nn.one_hot(jnp.asarray(ids), 16) for ids in (best, first, second))
    routing = jnp.zeros((2, 10, CFG.top_k), int), jnp.full((2, 10, CFG.n_experts), 1 / CFG.n_experts)
    outcome = Outcome(hidden, tuple(mtp_hidden), *routing)
    mask = np.ones((2, 5 + 1 + 2), np.int32)
    mask[1, 5:] = 0
    given = {"tokens": jnp.zeros((2, 8), jnp.int32), "mask": jnp.asarray(mask)}
    head = {"embed": jnp.eye(16), "head": jnp.eye(16)}
    found = fidelity.compare(head, outcome, head, outcome, hidden, given, cfg=cfg, chunk=5)
    counted = np.asarray(found["accepted"] * found["drafted"])
    np.testing.assert_array_equal(found["drafted"][0], [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(found["drafted"][1], [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(counted[0], [[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(counted[1], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])


def test_another_router_alone_is_all_routing(params):
    """With one normalised expert a token its weight is 1 under any router: only the choice differs."""
    even = dataclasses.replace(CFG, norm_topk=True, top_k=1)
    given = batch()
    other = changed(params, "router", 1.0)
    theirs, ours = (fidelity.run_model(p, given, cfg=even) for p in (params, other))
    forced = fidelity.run_model(other, given, theirs.indices_NTk, cfg=even)
    head = fidelity.head_of(params)
    found = fidelity.compare(head, theirs, head, ours, forced.hidden_BLD, given, cfg=even, chunk=4)
    assert np.mean(found["agreement"]) < 0.8
    assert np.mean(found["kld"]) > 1e-4
    assert np.mean(found["kld_experts"]) < 1e-3 * np.mean(found["kld"])


def test_other_experts_in_the_last_layer_are_all_experts(params):
    """No router comes after them, so forcing the reference's choices changes nothing."""
    found, theirs, ours = compared(params, changed(params, "['layers']['1']['experts']", 0.3))
    np.testing.assert_array_equal(theirs.indices_NTk, ours.indices_NTk)
    np.testing.assert_array_equal(found["kld_experts"], found["kld"])
    assert np.mean(found["kld"]) > 1e-4


def test_chunks_divide_the_tokens(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert fidelity.chunk_size(8192, 2048) == 512
    assert fidelity.chunk_size(7 * 251, 2048) == 251
    assert fidelity.chunk_size(10, 1 << 30) == 1


# ---- over tokens -----------------------------------------------------------------------------------------------------


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).normal(size=997)
    shares = [0.1, 0.5, 0.99, 0.999]
    ours, _ = fidelity.quantiles(values, single(values), np.ones((1, 997), np.float32), shares)
    np.testing.assert_array_equal(ours, np.quantile(values, shares, method="inverted_cdf"))


def test_quantiles_of_a_resample_are_those_of_the_repeated_tokens():
    rng = np.random.default_rng(1)
    values, unit_T = rng.normal(size=60), rng.integers(0, 7, 60)
    units = Units(unit_T, np.zeros(7, int))
    weights_RU = fidelity.resample(units.domain_U, 5)
    _, drawn = fidelity.quantiles(values, units, weights_RU, [0.5, 0.9])
    for weights_U, found in zip(weights_RU, drawn, strict=True):
        repeated = np.repeat(values, weights_U[unit_T].astype(int))
        np.testing.assert_array_equal(found, np.quantile(repeated, [0.5, 0.9], method="inverted_cdf"))


def test_standard_error_of_a_mean_of_independent_units():
    values = np.random.default_rng(3).normal(size=500)
    weights_RU = fidelity.resample(np.zeros(500, int), 4000)
    mean, drawn = fidelity.ratios([values], [np.ones(500)], single(values), weights_RU)
    assert mean[0] == pytest.approx(values.mean())
    assert fidelity.standard_errors(drawn)[0] == pytest.approx(values.std(ddof=1) / np.sqrt(500), rel=0.05)


def test_standard_error_of_a_median_of_independent_units():
    """sqrt(pi / 2) times that of the mean, for normal values."""
    values = np.random.default_rng(4).normal(size=2001)
    weights_RU = fidelity.resample(np.zeros(2001, int), 1000)
    _, drawn = fidelity.quantiles(values, single(values), weights_RU, [0.5])
    assert fidelity.standard_errors(drawn)[0] == pytest.approx(np.sqrt(np.pi / 2 / 2001), rel=0.15)


def test_tokens_of_one_document_are_not_independent():
    """Ten equal tokens a document: the error is that of 100 values, not of 1,000."""
    of_document = np.random.default_rng(5).normal(size=100)
    values, units = np.repeat(of_document, 10), Units(np.repeat(np.arange(100), 10), np.zeros(100, int))
    weights_RU = fidelity.resample(units.domain_U, 2000)
    _, drawn = fidelity.ratios([values], [np.ones(1000)], units, weights_RU)
    assert fidelity.standard_errors(drawn)[0] == pytest.approx(of_document.std(ddof=1) / 10, rel=0.1)


def test_domains_keep_their_share_in_every_resample():
    weights_RU = fidelity.resample(np.asarray([0] * 3 + [1] * 5), 50)
    assert np.all(weights_RU[:, :3].sum(axis=1) == 3) and np.all(weights_RU[:, 3:].sum(axis=1) == 5)
    np.testing.assert_array_equal(weights_RU, fidelity.resample(np.asarray([0] * 3 + [1] * 5), 50))
    np.testing.assert_array_equal(weights_RU[:, :3], fidelity.resample(np.zeros(3, int), 50))


def tokens_by_hand():
    """Two units of two tokens in windows of two positions."""
    return {
        "nats": np.asarray([1.0, 2.0, 3.0, 6.0]),
        "above": np.asarray([0.1, -0.1, 0.2, 0.6]),
        "kld": np.asarray([0.1, 0.2, 0.3, 0.8]),
        "kld_experts": np.asarray([0.1, 0.1, 0.2, 0.4]),
        "router_kld": np.asarray([0.0, 0.0, 0.2, 0.2]),
        "same_top1": np.asarray([1.0, 1.0, 1.0, 0.0]),
        "top5_overlap": np.asarray([1.0, 0.8, 0.6, 0.4]),
        "agreement": np.asarray([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]),
        "accepted": np.asarray([[1.0, 0.0, 1.0, 0.0]]),
        "drafted": np.asarray([[1.0, 0.0, 1.0, 1.0]]),
        "bytes": np.full(4, 4.0),
        "position": np.asarray([0, 1, 0, 1]),
    }


def test_a_summary_by_hand():
    units = Units(np.asarray([0, 0, 1, 1]), np.asarray([0, 0]))
    found = fidelity.summarize(tokens_by_hand(), units, np.asarray([[1, 1], [2, 0], [0, 2]], np.float32), 2)
    expected = dict(
        tokens=4, loss=3.0, loss_above=0.2, perplexity=np.exp(3.0), bits_per_byte=3 / np.log(2) / 4, kld=0.35,
        kld_median=0.2, kld_p99=0.8, kld_p999=0.8, same_top1=0.75, top5_overlap=0.7, expert_agreement=0.625,
        router_kld=0.1, kld_experts=0.2, kld_routing=0.15,
    )  # fmt: skip
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-6)
    assert found["kld_own"] is None
    assert found["expert_agreement_by_layer"] == pytest.approx([0.5, 0.75])
    assert found["mtp_acceptance"] == pytest.approx([2 / 3])
    # Resamples: both units, the first twice, the second twice.
    assert found["loss_se"] == pytest.approx(np.std([3.0, 1.5, 4.5], ddof=1))
    assert found["loss_above_se"] == pytest.approx(np.std([0.2, 0.0, 0.4], ddof=1))
    assert found["perplexity_se"] == pytest.approx(np.std(np.exp([3.0, 1.5, 4.5]), ddof=1))
    assert found["kld_routing_se"] == pytest.approx(np.std([0.15, 0.05, 0.25], ddof=1), rel=1e-5)
    assert found["kld_median_se"] == pytest.approx(np.std([0.2, 0.1, 0.3], ddof=1), rel=1e-6)
    assert found["mtp_acceptance_se"] == pytest.approx([np.std([2 / 3, 1.0, 0.5], ddof=1)])
    assert found["expert_agreement_by_layer_se"] == pytest.approx([np.std([0.5, 1, 0], ddof=1), np.std([0.75, 1, 0.5], ddof=1)])  # fmt: skip  # noqa: E501
    first, second = found["by_position"]
    assert (first["start"], first["end"], second["start"], second["end"]) == (0, 1, 1, 2)
    assert (first["kld"], second["kld"]) == pytest.approx((0.2, 0.5))
    assert (first["loss"], second["loss"]) == pytest.approx((2.0, 4.0))
    assert first["loss_se"] == pytest.approx(np.std([2.0, 1.0, 3.0], ddof=1))


def test_every_figure_has_an_error_beside_it():
    units = Units(np.asarray([0, 0, 1, 1]), np.asarray([0, 0]))
    found = fidelity.summarize(tokens_by_hand() | {"kld_own": np.zeros(4)}, units, np.ones((3, 2), np.float32), 2)
    plain = set(found) - {"tokens", "by_position"}
    assert {f"{n}_se" for n in plain if not n.endswith("_se")} == {n for n in plain if n.endswith("_se")}
    assert found["kld_own"] == 0.0


def test_a_domain_of_a_single_unit_is_fixed():
    tokens, units = tokens_by_hand(), Units(np.asarray([0, 1, 2, 2]), np.asarray([0, 0, 1]))
    weights_RU = np.asarray([[1, 1, 1], [2, 0, 1], [0, 2, 1]], np.float32)
    found = fidelity.summarize(tokens, units, weights_RU, 2)
    assert found["loss_se"] == pytest.approx(np.std([12 / 4, 11 / 4, 13 / 4], ddof=1))
    assert found["kld_median_se"] is not None and found["perplexity_se"] is not None


def test_what_cannot_be_known_is_null():
    """A single unit has no spread; a part of the window without tokens has no mean."""
    tokens = tokens_by_hand() | {"position": np.zeros(4, int)}
    found = fidelity.summarize(tokens, Units(np.zeros(4, int), np.zeros(1, int)), np.ones((3, 1), np.float32), 2)
    assert found["loss"] == 3.0 and found["loss_se"] is None and found["kld_median_se"] is None
    assert found["by_position"][1]["kld"] is None


def test_an_outcome_holds_the_trunks_layers_alone(params):
    out = fidelity.run_model(params, batch(), cfg=CFG)
    assert isinstance(out, Outcome)
    assert out.indices_NTk.shape == (2, B * L, CFG.top_k) and out.probs_NTE.shape == (2, B * L, CFG.n_experts)
    assert [h.shape for h in out.mtp_hidden] == [(B, L, CFG.dim)] * 2
