"""KLD of a quantized model: this package's figures against llama-perplexity's, on the files that are deployed."""

import re
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXACT, llama_numbers, llama_program

from qatmoe import fidelity
from qatmoe.data import corpus

pytestmark = [pytest.mark.llama_cpp, pytest.mark.slow]

CONTEXT, CHUNKS = 128, 48


def perplexity(model, *options, last=""):
    """What llama-perplexity prints. Its log is written by a thread that is not always done when the program ends: it
    runs again, twice at most, where the line that begins with `last` is missing."""
    command = [llama_program("llama-perplexity"), "-m", str(model), "-c", str(CONTEXT), "-b", str(CONTEXT), "-ngl", "0"]
    for _ in range(3):
        done = subprocess.run(
            [*command, "-t", "2", *EXACT, *map(str, options)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if f"\n{last}" in done.stdout:
            break
    return done.stdout


def stored_tokens(base):
    """The chunks (M, L) in a file of base log-probabilities: "_logits_", L, V and M as int32, then the ids."""
    header = np.fromfile(base, np.int32, 3, offset=8)
    length, _, chunks = header.tolist()
    return np.fromfile(base, np.int32, length * chunks, offset=20).reshape(chunks, length)


def figure(text, name):
    return float(re.search(rf"^{re.escape(name)}\s*:\s*(\S+)", text, re.MULTILINE).group(1).rstrip("%"))


def test_kld_and_top1_are_llama_cpps(llama_models, tmp_path):
    """It scores the second half of each chunk: positions L/2 to L-2. Its base log-probabilities are kept in 16 bits, in
    steps of at most 16 / 65535 nats; the files set no BOS."""
    novel = next(corpus.documents("default", field="data.valid")).text
    (tmp_path / "novel.txt").write_text(novel[100_000 : 100_000 + 8 * CONTEXT * CHUNKS])
    base = tmp_path / "base.bin"
    perplexity(
        llama_models / "control.gguf", "-f", tmp_path / "novel.txt", "--chunks", CHUNKS, "--kl-divergence-base", base
    )
    theirs = perplexity(llama_models / "qat.gguf", "--kl-divergence-base", base, "--kl-divergence", last="Same top p")

    control, tokenizer = llama_numbers(llama_models, "control", "F32")
    qat, _ = llama_numbers(llama_models, "qat", "BF16")
    windows_ML = stored_tokens(base)
    assert windows_ML.shape == (CHUNKS, CONTEXT)
    np.testing.assert_array_equal(windows_ML[:2].ravel(), tokenizer.encode(novel[100_000:102_000])[: 2 * CONTEXT])
    scored = slice(CONTEXT // 2, CONTEXT - 1)
    found = [
        fidelity.token_metrics(
            jnp.asarray(control(ids_L)[scored]), jnp.asarray(qat(ids_L)[scored]), jnp.asarray(ids_L[CONTEXT // 2 + 1 :])
        )
        for ids_L in windows_ML
    ]
    ours = {name: np.concatenate([np.asarray(f[name]) for f in found]).astype(np.float64) for name in found[0]}
    kld = figure(theirs, "Mean    KLD")
    assert kld > 0.005
    print(f"mean KLD {ours['kld'].mean():.6f} here, {kld:.6f} in llama.cpp")
    assert ours["kld"].mean() == pytest.approx(kld, rel=0.05)
    assert np.median(ours["kld"]) == pytest.approx(figure(theirs, "Median  KLD"), rel=0.05)
    assert np.quantile(ours["kld"], 0.99) == pytest.approx(figure(theirs, "99.0%   KLD"), rel=0.05)
    assert 100 * ours["same_top1"].mean() == pytest.approx(figure(theirs, "Same top p"), abs=0.5)
    assert np.exp(ours["nats"].mean()) == pytest.approx(figure(theirs, "Mean PPL(Q)"), rel=0.005)
