"""What only an NVIDIA GPU can show. Deselected where there is none; with one: python -m pytest -m gpu"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qatmoe.config import ModelConfig
from qatmoe.model import transformer
from qatmoe.model.cache import CacheType
from qatmoe.quant import fake
from qatmoe.quant.grid import GRIDS, RULES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))
def test_the_gpu_chooses_the_codes_and_scales_that_numpy_chooses(grid, rule):
    w = (np.random.default_rng(0).normal(size=(4, 64, 1024)) * 0.03).astype(np.float32)
    with jax.default_device(jax.devices("cpu")[0]):  # the search is JAX's for numpy arrays too
        codes, scale = grid.encode(w, rule)
    there_codes, there_scale = jax.jit(lambda x: grid.encode(x, rule))(jnp.asarray(w))
    np.testing.assert_array_equal(there_scale, scale)
    np.testing.assert_array_equal(there_codes, codes)
    value = jax.jit(lambda x, s: fake.fake_quant(grid, x, s))(jnp.asarray(w), jnp.asarray(scale))
    assert np.max(np.abs(np.asarray(value) - grid.decode(codes, scale))) == 0.0


@pytest.mark.parametrize(("segments", "cache"), [(False, None), (True, None), (False, "q8_0+rot")])
def test_cudnn_attention_agrees_with_the_plain_one(segments, cache):
    base = ModelConfig(dtype="bfloat16", head_dim=64, attention="xla")
    params = transformer.init_params(base, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 256), 0, base.vocab_size)
    ids = jnp.cumsum(tokens % 64 == 0, axis=1) if segments else None
    through = CacheType.parse(cache) if cache else None
    out = {}
    for name in ("xla", "cudnn"):
        cfg = dataclasses.replace(base, attention=name)
        hidden = transformer.forward(params, cfg, tokens, segments_BL=ids, train=False, cache=through).hidden_BLD
        out[name] = np.asarray(hidden, np.float32)
    assert np.mean(np.abs(out["xla"] - out["cudnn"])) < 0.02


def test_dropless_implementations_agree_on_the_gpu():
    base = ModelConfig(dtype="float32", capacity_factor=8.0)
    params = transformer.init_params(base, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, base.vocab_size)
    outs = [
        np.asarray(transformer.forward(params, dataclasses.replace(base, experts=e), tokens, train=True).hidden_BLD)
        for e in ("reference", "dense", "blocked")
    ]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=2e-3)
