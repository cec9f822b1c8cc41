import contextlib
import dataclasses
import fcntl
import functools
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dead_workers import pytest_configure, pytest_sessionfinish, pytest_testnodedown  # noqa: F401

from qatmoe import train
from qatmoe.convert import llama_numerics, names
from qatmoe.convert.weights import Branch
from qatmoe.data import corpus, tokenizer
from qatmoe.model import transformer
from qatmoe.run import Run

ROOT = Path(__file__).parent.parent
VOCAB = 290  # of small_tokenizer

pytest.register_assert_rewrite("hf_folders")

# Compiling is most of the tests' time, and on a CPU this code generator of XLA takes a third of what the default one
# does. It is set before jax's first program, for this process and those that it starts. After jax 0.10 there is none
# but the default, and XLA ends a process that names a flag it does not know. Nor is a program cut into parts that are
# compiled side by side: the other core is the other worker's. A choice that is made already stays.
if jax.__version_info__ < (0, 11):
    for _flag in ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"):
        if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# Tracing makes many objects and few cycles; looking for one after every 700 took 4 % of the time.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def config_files():
    return sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Every module empties the process's cache of programs (`forget_programs`); what takes over 0.2 s to compile is
    kept on disk for the next one."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def shared_by_workers(tmp_path_factory) -> Path:
    """A folder that all workers of the session know."""
    place = tmp_path_factory.getbasetemp()
    return place.parent if "PYTEST_XDIST_WORKER" in os.environ else place


@pytest.fixture(scope="session")
def child_env(tmp_path_factory):
    """Environment for programs under test: the CPU, one compilation cache and one data cache for all workers.

    jax writes its cache without a lock: who reads half a file says so on stderr and compiles, for the rest of the
    session where its writer was killed.
    """
    place = shared_by_workers(tmp_path_factory) / "cache"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(place),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def quick_env(child_env):
    """The same for programs whose time is compiling, unless the environment says how to compile."""
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | child_env


@pytest.fixture
def cache(quick_env, monkeypatch):
    """The data cache of those programs, for this process too."""
    monkeypatch.setenv("XDG_CACHE_HOME", quick_env["XDG_CACHE_HOME"])


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program keeps a few memory maps, and a process may have only so many (vm.max_map_count, 65,530 on
    most machines): XLA ends it with a segmentation fault when the programs of all modules are kept."""
    yield
    jax.clear_caches()
    gc.collect()  # what holds programs, and what a module left open: it is blamed for that, and not a later one


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose time is compiling; the arithmetic stays the same up to rounding."""
    with compiled_quickly():
        yield


@contextlib.contextmanager
def compiled_quickly():
    """Compiles with few optimizations in this process too, unless the environment says how to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run of a trunk, a control and a 2-bit branch of two steps, both kept. Copy it before writing into it.

    The worker that needs it first makes it, for all.
    """
    folder = shared_by_workers(tmp_path_factory) / "tiny"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run" / "curves.png").exists():  # a run's last file
            _make_tiny_run(folder)
    return folder / "run"


def _make_tiny_run(folder: Path) -> None:
    text = next(corpus.documents("default", field="data.valid")).text
    (folder / "text.txt").write_text(text[:60_000])
    (folder / "valid.txt").write_text(text[60_000:70_000])
    names = ("trunk", "control", "qat")
    figures = {"loss": 5.0, "loss_se": 0.1, "bits_per_byte": 2.0, "perplexity": 9.0, "tokens": 1.0}
    with compiled_quickly(), pytest.MonkeyPatch.context() as patch:  # only the checkpoints are wanted
        patch.setattr(train, "round_control", lambda run: None)
        patch.setattr(Run, "evaluate", lambda *args, **options: figures)
        code = train.main(
            [
                "train",
                f"--config={ROOT}/configs/toy.py",
                f"--workdir={folder / 'run'}",
                *[f"--config.train.phases.{name}.steps=2" for name in names],
                *[f"--config.train.phases.{name}.{key}=0" for name in names for key in ("warmup", "decay")],
                "--config.train.checkpoint_every=1",
                "--config.train.tensorboard=False",
                "--config.eval.every=0",
                "--config.eval.final_batches=1",
                "--config.optim.lr=0.02",
                f"--config.data.source={folder / 'text.txt'}",
                f"--config.data.valid={folder / 'valid.txt'}",
                f"--config.data.cache_dir={folder / 'cache'}",
            ]
        )
    assert code == 0


@pytest.fixture(scope="session")
def small_tokenizer():
    """Of VOCAB ids."""
    words = ["the expert routes a token", "two bits of every weight", "bench of models 0123"] * 3
    return tokenizer.train(words, VOCAB)


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Hugging Face folders as transformers saves them, to be copied before they are changed."""
    from hf_folders import TINY  # which imports transformers, that few modules need
    from test_huggingface import GLM, QWEN, make

    folder = tmp_path_factory.mktemp("templates")
    make("Qwen3Moe", TINY, folder / "tiny")
    make("Qwen3Moe", QWEN | dict(norm_topk_prob=True), folder / "qwen")
    make("Glm4Moe", GLM, folder / "glm")
    return folder


@pytest.fixture
def tiny(templates, tmp_path):
    """A Hugging Face folder of one layer of two experts, to be changed."""
    return shutil.copytree(templates / "tiny", tmp_path / "model")


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward_scores(cfg, cache, weights, ids_L):
    """Scores (L, V) of one text by the forward pass that evaluation uses."""
    hidden_BLD = transformer.forward(weights, cfg, ids_L[None], train=False, cache=cache).hidden_BLD
    return transformer.logits(weights, cfg, hidden_BLD)[0]


def our_logits(run: Path, ids) -> np.ndarray:
    """The same of a run's last branch as it is deployed, in f32 and the unrolled layout."""
    with Branch(run, rest="F32") as branch:
        weights, cfg = branch.numbers(), dataclasses.replace(branch.model, dtype="float32", scan_layers=False)
    return np.asarray(forward_scores(cfg, None, weights, jnp.asarray(ids)))


# ---- llama.cpp's programs --------------------------------------------------------------------------------------------

EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
_SHORT = {
    "train.phases.trunk.steps": 240,
    "train.phases.control.steps": 60,
    "train.phases.control.decay": 60,
    "train.phases.qat.steps": 60,
    "train.phases.qat.decay": 60,
    "train.tensorboard": False,
    "eval.every": 0,
    "eval.final_batches": 2,
}


def llama_program(name: str) -> str | None:
    """A program of llama.cpp: in the folder $QATMOE_LLAMA_CPP, or on PATH."""
    folder = os.environ.get("QATMOE_LLAMA_CPP")
    return shutil.which(name, path=folder) if folder else shutil.which(name)


def _launch(env: dict[str, str], *args: str) -> None:
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def llama_models(child_env, tmp_path_factory):
    """A run, its control as F32 and its 2-bit branch as GGUF files."""
    folder = tmp_path_factory.mktemp("llama")
    settings = [f"--config.{key}={value}" for key, value in _SHORT.items()]
    config = f"--config={ROOT}/configs/moe_2bit.py"
    _launch(child_env, "-m", "qatmoe.train", config, f"--workdir={folder}/run", *settings)
    for branch, rest in (("control", "F32"), ("qat", "BF16")):
        options = ["--format", "gguf", "--rest", rest, "--branch", branch, "--out", f"{folder}/{branch}.gguf"]
        _launch(child_env, "-m", "qatmoe.export", "--run", f"{folder}/run", *options)
    return folder


def llama_numbers(models: Path, phase: str, rest: str):
    """Scores (L, V) of a list of ids as llama.cpp computes them, and the tokenizer."""
    with Branch(models / "run", phase, rest=rest) as branch:
        weights, cfg, tok = branch.numbers(), branch.model, branch.tokenizer
        kinds = {part.path: branch.storage.type_of(part)[0] for part in names.gguf_parts(cfg, "").values()}
    return lambda ids: np.asarray(llama_numerics.logits(weights, kinds, cfg, jnp.asarray(ids, jnp.int32))), tok


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU, llama.cpp, libtpu or SkyPilot are left out, and counted as deselected, without them; so
    are the meshes that are not asked for."""
    there = {
        "every_mesh": "every_mesh" in config.option.markexpr,
        "gpu": jax.default_backend() == "gpu",
        "skypilot": importlib.util.find_spec("sky") is not None,
        "llama_cpp": all(map(llama_program, ("llama-server", "llama-perplexity"))),
        "tpu_compiler": importlib.util.find_spec("libtpu") is not None,
    }
    needing = [i for i in items if any(i.get_closest_marker(m) and not found for m, found in there.items())]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
