"""How many tokens a checkpoint was trained on, also where its run began at another run's."""

import json
import re
import shutil
import zlib

import pytest

from qatmoe import audit, train
from qatmoe.checkpoint import Checkpoints, trained_tokens
from qatmoe.data import corpus
from qatmoe.run import Run

CONFIG = """
from qatmoe.config import default_config, phase

def get_config():
    config = default_config()
    config.model.update(dim=64, n_layers=1, n_dense_layers=0, n_heads=2, n_kv_heads=2, head_dim=16)
    config.model.update(n_experts=4, expert_dim=64, n_shared_experts=0, n_mtp=0)
    config.data.seq_len = 32
    config.train.update(batch_size=4, log_every=1, checkpoint_every=1, tensorboard=False)
    config.eval.update(every=10, batches=1, final_batches=1)
    config.train.phases.trunk = phase(steps=5)
    config.train.phases.control = phase(start="trunk", steps=3)
    return config
"""
STEP = 4 * 32  # tokens, of the configuration as it stands


@pytest.fixture(scope="module")
def job(quick_compilation, tmp_path_factory):
    """Trains in a folder; gives the tokens of each phase, as an audit has them."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "small.py").write_text(CONFIG)
    text = next(corpus.documents("default", field="data.valid")).text
    (folder / "text.txt").write_text(text[:60_000])
    data = [f"--config.data.source={folder}/text.txt", f"--config.data.cache_dir={folder}/cache"]

    def job(workdir, *more):
        assert train.main(["train", f"--config={folder}/small.py", f"--workdir={workdir}", *data, *more]) == 0
        return audit.open_run(workdir)[0].trained_tokens

    figures = {"loss": 5.0, "loss_se": 0.1, "bits_per_byte": 2.0, "perplexity": 9.0, "tokens": 1.0}
    with pytest.MonkeyPatch.context() as patch:  # only the checkpoints are wanted
        patch.setattr(train, "round_control", lambda run: None)
        patch.setattr(Run, "evaluate", lambda *args, **options: figures)
        yield job


@pytest.fixture(scope="module")
def chain(job, tmp_path_factory):
    """Three runs: `first`, `second` from its control with twice the batch, `third` from that one's; and the tokens."""
    folder = tmp_path_factory.mktemp("chain")
    found = [
        job(folder / "first"),
        job(folder / "second", f"--config.init_from={folder}/first:control", "--config.train.batch_size=8"),
        job(folder / "third", f"--config.init_from={folder}/second:control@2"),
    ]
    return folder, found


@pytest.fixture
def copy(chain, tmp_path):
    """The first run, to be changed."""
    return shutil.copytree(chain[0] / "first", tmp_path / "first")


def forget(workdir):
    """Takes the figures out of all checkpoints, as if they had been saved before there were any."""
    for step in (workdir / "checkpoints").glob("*/*"):
        meta, manifest = (json.loads((step / name).read_text()) for name in ("meta.json", "manifest.json"))
        del meta["trained_tokens"]
        text = json.dumps(meta).encode()
        (step / "meta.json").write_bytes(text)
        manifest["files"]["meta.json"] = [len(text), zlib.crc32(text)]
        (step / "manifest.json").write_text(json.dumps(manifest))


def test_what_runs_before_were_trained_on_counts(chain):
    assert chain[1] == [
        {"trunk": 5 * STEP, "control": 8 * STEP},
        {"trunk": 8 * STEP, "control": (8 + 3 * 2) * STEP},
        {"trunk": (8 + 2 * 2) * STEP, "control": (8 + 2 * 2 + 3) * STEP},
    ]


@pytest.mark.parametrize("old", [False, True], ids=["said", "of before"])
def test_a_phase_that_goes_on_keeps_its_count(old, job, copy):
    with Checkpoints(copy, "control") as checkpoints:
        assert checkpoints.steps() == [2, 3]
        shutil.rmtree(checkpoints.path(3))
    if old:
        forget(copy)
    assert trained_tokens(copy, "control", 2) == 7 * STEP
    assert job(copy) == {"trunk": 5 * STEP, "control": 8 * STEP}
    with Checkpoints(copy, "control") as checkpoints:
        assert checkpoints.said(3)["trained_tokens"] == 8 * STEP


def test_checkpoints_of_before_are_counted_by_their_run(chain, job, copy, tmp_path):
    forget(copy)
    assert audit.open_run(copy)[0].trained_tokens == {"trunk": 5 * STEP, "control": 8 * STEP}
    other = ["--config.train.batch_size=8", "--config.train.phases.control.steps=1"]
    begun = job(tmp_path / "begun", f"--config.init_from={copy}:control@2", *other)
    assert begun == {"trunk": 7 * STEP, "control": (7 + 2) * STEP}
    shutil.rmtree(copy / "checkpoints" / "trunk")  # what is gone had the steps of the configuration
    assert audit.open_run(copy)[0].trained_tokens == {"control": 8 * STEP}


def test_a_run_says_how_often_its_longest_branch_sees_the_text(chain, job, tmp_path, capsys):
    """Of a run that starts at another one's phase what it trains itself counts."""
    for options, steps in (((), 5 + 3), ((f"--config.init_from={chain[0]}/first",), 3)):
        job(tmp_path / f"{steps} steps", *options)
        said = capsys.readouterr().out
        train_tokens = int(re.search(r"text: ([\d,]+) tokens to train on", said)[1].replace(",", ""))
        passes = round(steps * STEP / train_tokens, 2)
        assert (
            0 < passes < 1 and f"longest branch: {steps * STEP:,} tokens, {passes:.2f} passes over the text\n" in said
        )
