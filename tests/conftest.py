import os
import shutil
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def config_files():
    return sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.fixture(scope="session")
def child_env(tmp_path_factory):
    """Environment for programs under test: the CPU, one compilation cache and one data cache for the session."""
    place = tmp_path_factory.mktemp("cache")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(place),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose time is compiling; the arithmetic stays the same up to rounding."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU or llama-server are left out, and counted as deselected, where there is none."""
    there = {
        "gpu": jax.default_backend() == "gpu",
        "llama_server": bool(shutil.which("llama-server", path=os.environ.get("QATMOE_LLAMA_CPP", os.environ["PATH"]))),
    }
    needing = [i for i in items if any(i.get_closest_marker(m) and not found for m, found in there.items())]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
