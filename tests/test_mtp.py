import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.config import ModelConfig
from qatmoe.model import transformer
from qatmoe.model.mtp import mtp_input
from qatmoe.tree import leaves_by_path

CFG = ModelConfig(
    vocab_size=32, dim=16, n_layers=2, dense_dim=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, expert_dim=8,
    n_mtp=2, init_std=0.2, experts="blocked", expert_block=4,
)  # fmt: skip
L = 8
TOKENS = jax.random.randint(jax.random.key(1), (2, L + 2), 0, 32)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    params = jax.jit(transformer.init_params, static_argnums=0)(CFG, jax.random.key(0))
    # A norm of ones hides whether a state was normed before: RMSNorm of an RMSNorm is itself.
    return params | {"norm": jnp.linspace(0.2, 2.0, 16)}


@jax.jit
def forward(params, tokens):
    return transformer.forward(params, CFG, tokens, train=True)


@jax.jit
def run(params, tokens):
    mtp_tokens = jnp.stack([tokens[:, 1 : L + 1], tokens[:, 2 : L + 2]])
    return transformer.forward(params, CFG, tokens[:, :L], mtp_tokens=mtp_tokens, train=True)


def test_projection_reads_embedding_first_then_hidden():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, embedded = jax.random.normal(keys[0], (1, 3, 16)), jax.random.normal(keys[1], (1, 3, 16))

    def unit(x):
        return np.asarray(x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + CFG.norm_eps))

    params = {"enorm": jnp.full(16, 2.0), "hnorm": jnp.full(16, 3.0), "eh_proj": jax.random.normal(keys[2], (16, 32))}
    expected = np.concatenate([2 * unit(embedded), 3 * unit(hidden)], axis=-1) @ np.asarray(params["eh_proj"]).T
    np.testing.assert_allclose(mtp_input(params, CFG, hidden, embedded), expected, rtol=1e-3, atol=1e-4)


def test_first_module_takes_the_normed_trunk_state_and_the_next_token(params):
    """A module is its block, as a model of one layer has it, on that input."""
    out = run(params, TOKENS)
    embed = params["embed"]
    for i, hidden in enumerate((out.hidden_BLD, out.mtp_hidden[0])):
        module = jax.tree.map(lambda a, i=i: a[i], params["mtp"])
        expected_input = mtp_input(module, CFG, hidden, embed[TOKENS[:, 1 + i : 1 + i + L]])
        block_out = forward(
            {
                "embed": jnp.zeros((2 * L, 16)).at[:].set(expected_input.reshape(-1, 16)),
                "norm": module["norm"],
                "layers": jax.tree.map(lambda a: a[None], module["block"]),
            },
            jnp.arange(2 * L).reshape(2, L),  # a one-layer trunk that reads the module's input as its embeddings
        )
        np.testing.assert_allclose(out.mtp_hidden[i], block_out.hidden_BLD, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changed", [3, 6])
def test_module_sees_exactly_one_token_more_than_the_one_before(params, changed):
    before, after = run(params, TOKENS), run(params, TOKENS.at[:, changed].add(1) % 32)
    pairs = zip((before.hidden_BLD, *before.mtp_hidden), (after.hidden_BLD, *after.mtp_hidden), strict=True)
    for depth, (a, b) in enumerate(pairs):
        first = changed - depth
        np.testing.assert_array_equal(a[:, :first], b[:, :first])
        assert jnp.all(jnp.any(a[:, first] != b[:, first], axis=-1))


def test_modules_leave_the_trunk_alone_and_are_skipped_without_tokens(params):
    out = run(params, TOKENS)
    trunk = forward(params, TOKENS[:, :L])
    np.testing.assert_allclose(trunk.hidden_BLD, out.hidden_BLD, rtol=1e-4, atol=1e-5)
    assert trunk.mtp_hidden == ()
    assert (trunk.aux["load_NE"].shape, out.aux["load_NE"].shape) == ((1, 4), (3, 4))


def test_every_mtp_parameter_gets_a_gradient(params):
    def total(params):
        return sum(jnp.sum(jnp.sin(transformer.logits(params, CFG, h))) for h in run(params, TOKENS).mtp_hidden)

    grads = jax.jit(jax.grad(total))(params)
    for path, leaf in leaves_by_path(grads["mtp"]).items():
        assert jnp.any(leaf != 0) or "bias" in path, path
