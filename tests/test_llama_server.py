"""A trained model in llama-server: the text it generates, alone and with its MTP module drafting."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import EXACT, llama_numbers, llama_program

pytestmark = [pytest.mark.llama_cpp, pytest.mark.slow]

PROMPTS = ["It was the", "The old man said that", '"I do not know,"']
N_PREDICT, N_CHECKED = 48, 24


@contextlib.contextmanager
def served(model: Path, *options: str):
    """The address of a llama-server that is ready; it is gone afterwards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = model.with_suffix(f".{port}.log")
    command = [llama_program("llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "512"]
    command += ["-np", "1", "-t", "2", "-ngl", "0", "--offline", *options]
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not healthy(url):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as e:  # 503 while it loads
        e.close()
        return False
    except OSError:
        return False


def generate(url: str, prompt: str) -> dict:
    body = dict(
        prompt=prompt,
        n_predict=N_PREDICT,
        temperature=0,
        top_k=1,
        cache_prompt=False,
        ignore_eos=True,
        return_tokens=True,
    )
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_drafts_of_the_mtp_module_are_accepted_and_change_no_text(llama_models):
    with served(llama_models / "qat.gguf", *EXACT) as url:
        plain = [generate(url, prompt) for prompt in PROMPTS]
    with served(llama_models / "qat.gguf", *EXACT, "--spec-type", "draft-mtp", "--spec-draft-n-max", "2") as url:
        drafted = [generate(url, prompt) for prompt in PROMPTS]
    for before, after in zip(plain, drafted, strict=True):
        assert "draft_n" not in before["timings"]
        assert after["timings"]["draft_n_accepted"] > 0
        assert after["content"] == before["content"]
        assert after["tokens_predicted"] == N_PREDICT


def test_the_text_in_full_precision_is_what_jax_continues(llama_models):
    with served(llama_models / "control.gguf", *EXACT) as url:
        theirs = [generate(url, prompt) for prompt in PROMPTS]
    scores_LV, tok = llama_numbers(llama_models, "control", "F32")
    for prompt, answer in zip(PROMPTS, theirs, strict=True):
        start = tok.encode(prompt).tolist()
        ids = start + [0] * N_CHECKED  # of one length: no token sees those after it
        for at in range(len(start), len(ids)):
            ids[at] = int(scores_LV(ids)[at - 1].argmax())
        ours = ids[len(start) :]
        assert answer["tokens"][:N_CHECKED] == ours
        assert answer["content"].startswith(tok.decode(ours).rstrip("\ufffd"))


def test_every_token_on_the_grid_is_the_best_or_as_good_for_jax(llama_models):
    """A rounding of activations that falls the other way may swap two tokens of nearly the same score."""
    with served(llama_models / "qat.gguf", *EXACT) as url:
        theirs = [generate(url, prompt) for prompt in PROMPTS]
    scores_LV, tok = llama_numbers(llama_models, "qat", "BF16")
    short_of_best = []
    for prompt, answer in zip(PROMPTS, theirs, strict=True):
        start = tok.encode(prompt).tolist()
        scores = scores_LV(start + answer["tokens"])[len(start) - 1 : -1]
        short_of_best += (scores.max(axis=-1) - np.take_along_axis(scores, np.c_[answer["tokens"]], 1)[:, 0]).tolist()
    assert len(short_of_best) == len(PROMPTS) * N_PREDICT
    assert max(short_of_best) < 0.05
    assert np.mean(np.equal(short_of_best, 0)) > 0.95
