"""What only an NVIDIA GPU can show. Deselected where there is none; with one: python -m pytest -m gpu"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from qatmoe import train
from qatmoe.config import ModelConfig
from qatmoe.model import transformer
from qatmoe.model.attention import attention, attention_params
from qatmoe.model.cache import CacheType
from qatmoe.model.layers import rope_angles
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


@pytest.mark.parametrize("documents", [False, True])
def test_cudnns_gradients_are_those_of_the_plain_attention(documents):
    """Position by position; and what a document says changes nothing in another one, to the last bit."""
    B, L = 2, 256
    base = ModelConfig(dim=256, n_heads=4, n_kv_heads=2, head_dim=64, dtype="bfloat16")
    declared = attention_params(base, 0.05, 0.05)
    keys = jax.random.split(jax.random.key(0), len(declared))
    params = {
        n: p.fill + 0.05 * jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, declared.items(), strict=True)
    }
    x, g = (jax.random.normal(jax.random.key(i), (B, L, 256), jnp.bfloat16) for i in (1, 2))
    segments = jnp.broadcast_to(jnp.arange(L) // 50, (B, L)) if documents else None
    rope = rope_angles(jnp.broadcast_to(jnp.arange(L), (B, L)), 64, 1.0, base.rope_theta)
    values, gradients = {}, {}
    for name in ("xla", "cudnn"):
        cfg = dataclasses.replace(base, attention=name)
        of = jax.jit(lambda x, cfg=cfg: attention(params, cfg, x, rope, segments))
        values[name], back = jax.vjp(of, x)
        gradients[name] = back(g)[0]
        if documents:
            np.testing.assert_array_equal(of(x.at[:, :50].add(1.0))[:, 50:], values[name][:, 50:])
    for plain, other in ((found["xla"], found["cudnn"]) for found in (values, gradients)):
        size = np.linalg.norm(np.asarray(plain, np.float32), axis=-1)
        off = np.linalg.norm(np.asarray(plain, np.float32) - np.asarray(other, np.float32), axis=-1)
        assert np.max(off / size) < 0.05


def test_a_run_is_trained_and_goes_on_where_it_was_stopped_in_its_qat_phase(tmp_path):
    """Phases start from donated states; losses agree up to the order of the GPU's sums."""

    def final(workdir):
        steps = [f"--config.train.phases.{name}.steps=4" for name in ("control", "qat")]
        steps += [f"--config.train.phases.{name}.decay=2" for name in ("control", "qat")]
        often = [
            "--config.train.checkpoint_every=2",
            "--config.eval.final_batches=1",
            "--config.train.tensorboard=False",
        ]
        config = f"--config={ROOT}/configs/toy.py"
        assert train.main(["train", config, f"--workdir={workdir}", *steps, *often]) == 0
        return json.loads((workdir / "summary.json").read_text())["loss"]

    whole = final(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "qat" / "4")
    again = final(tmp_path / "run")
    assert again == pytest.approx(whole, abs=0.01)


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
