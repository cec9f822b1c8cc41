"""The command that writes text: what it writes, from which weights, and what it refuses."""

import dataclasses
import io
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

from qatmoe import generate, train
from qatmoe.convert.weights import Branch
from qatmoe.data import corpus
from qatmoe.decode import RUNS, Decoder
from qatmoe.decode import generate as draw
from qatmoe.model.cache import CacheType
from qatmoe.run import Run

TEXT = next(corpus.documents("default", field="data.valid")).text
PROMPT = "It was a café"
PHASES = ("trunk", "control", "qat")


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compilation):
    """A run of a trunk and a 2-bit branch of a step each."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text(TEXT[:30_000])
    (folder / "valid.txt").write_text(TEXT[30_000:40_000])
    patch = pytest.MonkeyPatch()  # only the checkpoints are wanted
    patch.setattr(train, "round_control", lambda run: None)
    losses = {"loss": 5.0, "loss_se": 0.1, "bits_per_byte": 2.0, "perplexity": 9.0, "tokens": 1.0}
    patch.setattr(Run, "evaluate", lambda *args, **options: losses)
    code = train.main(
        [
            "train",
            f"--config={ROOT}/configs/toy.py",
            f"--workdir={folder / 'run'}",
            *[f"--config.train.phases.{p}.{key}" for p in PHASES for key in ("steps=1", "warmup=0", "decay=0")],
            "--config.train.tensorboard=False",
            "--config.eval.every=0",
            "--config.optim.lr=0.02",
            "--config.model.head_dim=64",
            f"--config.data.source={folder / 'text.txt'}",
            f"--config.data.valid={folder / 'valid.txt'}",
            f"--config.data.cache_dir={folder / 'cache'}",
        ]
    )
    patch.undo()
    assert code == 0
    return folder / "run"


def write(capsys, run, *options, prompt=PROMPT):
    """(text, lines on stderr) of a call that works."""
    capsys.readouterr()
    assert generate.main([f"--run={run}", f"--prompt={prompt}", "--max_tokens=12", *options]) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()


def by_hand(run, phase="qat", **options):
    """The ids and the text of `decode.generate` from the branch's numbers."""
    with Branch(run, phase, rest="F32") as branch:
        cfg = dataclasses.replace(branch.model, scan_layers=False)
        prompt = branch.tokenizer.encode(PROMPT)
        options = {"max_tokens": 12, "temperature": 0.8} | options
        ids = list(draw(branch.numbers(), cfg, prompt, **options))
        return ids, branch.tokenizer.decode(ids)


def test_writes_what_the_last_branch_draws(run, capsys):
    text, err = write(capsys, run)
    assert text == by_hand(run)[1] + "\n"
    (line,) = err
    speed = r"[\d,]+ tokens/s"
    count = len(Branch(run).tokenizer.encode(PROMPT))
    assert re.fullmatch(rf"qat, cache f32: prefill of {count} tokens {speed}, decode of 11 {speed}", line)
    assert write(capsys, run)[0] == text


def test_options_reach_the_draws(run, capsys):
    options = ["--temperature=2", "--top_k=30", "--top_p=0.9", "--seed=3", "--cache=q8_0/q4_0+rot", "--step=1"]
    cache = CacheType("q8_0", "q4_0", True)
    expected = by_hand(run, temperature=2.0, top_k=30, top_p=0.9, seed=3, cache=cache)[1]
    text, err = write(capsys, run, *options)
    assert text == expected + "\n"
    assert "cache q8_0/q4_0+rot" in err[0]
    assert text != write(capsys, run, *options, "--seed=4")[0]


def test_one_cache_and_one_pass_over_the_prompt(run, capsys, monkeypatch):
    fed, feed = [], Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda self, ids: fed.append((id(self), list(ids))) or feed(self, ids))
    write(capsys, run, "--max_tokens=2", prompt=TEXT[:2000])
    with Branch(run) as branch:
        prompt = branch.tokenizer.encode(TEXT[:2000])
    assert len({decoder for decoder, _ in fed}) == 1
    assert next(ids for _, ids in fed if any(ids)) == list(prompt)
    assert sum(len(ids) for _, ids in fed) <= len(prompt) + 1 + sum(RUNS)


def test_values_that_are_too_large(run, capsys):
    options = ["--temperature=1e-42", "--top_k=99999999999"]
    assert write(capsys, run, *options)[0] == by_hand(run, temperature=0.0)[1] + "\n"
    assert generate.main([f"--run={run}", "--prompt=x", "--max_tokens=2000000000"]) == 2
    warning, line = capsys.readouterr().err.splitlines()
    assert "go beyond" in warning
    assert re.search(r"a cache of 2000000256 tokens in f32 takes [\d,]{15,} bytes .* fewer tokens", line)


def test_branches_write_under_headings(run, capsys):
    text, err = write(capsys, run, "--branch", "trunk", "qat", "--temperature=0")
    trunk, qat = (by_hand(run, phase, temperature=0.0)[1] for phase in ("trunk", "qat"))
    assert text == f"== trunk, step 1 ==\n{trunk}\n== qat, step 1 ==\n{qat}\n"
    assert [line.split(",")[0] for line in err] == ["trunk", "qat"]


def test_prompt_from_the_standard_input(run, capsys, monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    given(f"{PROMPT}\n".encode())
    assert write(capsys, run, prompt="-")[0] == by_hand(run)[1] + "\n"
    given(b"caf\xe9")
    assert "not UTF-8" in refused(capsys, f"--run={run}", "--prompt=-")
    given(b"\n")
    assert "prompt is empty" in refused(capsys, f"--run={run}", "--prompt=-")


def test_stop_strings(run, capsys):
    whole = by_hand(run)[1]
    stop = whole[5:8]
    at = whole.index(stop)
    assert write(capsys, run, "--stop", "never there", stop)[0] == whole[:at] + "\n"


def test_end_tokens_of_an_imported_model_end_the_text(run, capsys, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    ids, _ = by_hand(run)
    end = ids[4]
    origin = {"context": 100, "end_ids": [end], "chat_template": "", "roles": {}}
    (copy / "origin.json").write_text(json.dumps(origin))
    with Branch(run) as branch:
        expected = branch.tokenizer.decode(ids[: ids.index(end)])
    assert write(capsys, copy)[0] == expected + "\n"
    origin["end_ids"] = [ids[0]]
    (copy / "origin.json").write_text(json.dumps(origin))
    assert write(capsys, copy) == ("\n", ["qat, cache f32: the text ended at once"])


def test_more_than_the_context_is_warned_of(run, capsys):
    text, err = write(capsys, run, "--max_tokens=64", "--temperature=0")
    assert len(text) > 20
    assert re.fullmatch(r"warning: \d+ tokens of the prompt and 64 more go beyond the 64 .*", err[0])


def refused(capsys, *args):
    """Exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert generate.main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt="], "prompt is empty"),
        (["--branch", "trunk", "nope"], "'nope'.*trunk, control, qat"),
        (["--step=7"], "7"),
        (["--cache=q5_1"], "'q5_1'.*iq4_nl"),
        (["--temperature=-1"], "temperature=-1.0"),
        (["--top_p=0"], "top_p=0.0"),
        (["--top_p=1.5"], "top_p=1.5"),
        (["--top_k=-2"], "top_k=-2"),
        (["--max_tokens=0"], "max_tokens=0"),
        (["--seed=-5"], "seed=-5"),
        (["--stop", ""], "--stop ''"),
        (["--prompt", "half \ud83d"], "surrogate"),
        (["--run=/nowhere"], "no qatmoe run there"),
    ],
)
def test_unusable_options_are_refused(run, capsys, options, message):
    assert re.search(message, refused(capsys, f"--run={run}", "--prompt=x", *options))


def test_heads_that_the_cache_cannot_hold_are_refused(run, capsys, monkeypatch):
    open_ = generate._open

    def narrow(args, name):
        branch = open_(args, name)
        branch.model = dataclasses.replace(branch.model, head_dim=48)
        return branch

    monkeypatch.setattr(generate, "_open", narrow)
    assert "head_dim=48" in refused(capsys, f"--run={run}", "--prompt=x", "--cache=q4_0")


def test_interrupted(run, capsys, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate.main([f"--run={run}", "--prompt=x"])
    assert capsys.readouterr().out == "\n"
