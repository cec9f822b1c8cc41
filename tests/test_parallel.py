"""Every way to split a run over eight devices: the losses of one device, and no collective that should not be there.

Eight forced CPU devices, in processes of their own.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parent / "parallel_program.py"
FACTORIZATIONS = sorted(s for s in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(s) == 8)


def run(child_env, *args):
    env = child_env | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # its time is compiling
    }
    done = subprocess.run([sys.executable, str(PROGRAM), *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def losses(child_env):
    """Of 20 steps, by mesh; one device first."""
    meshes = [(1, 1, 1, 1), *FACTORIZATIONS]
    return run(child_env, "losses", *(",".join(map(str, m)) for m in meshes))


def test_one_device_learns(losses):
    alone = losses["1,1,1,1"]
    assert len(alone) == 20
    assert alone[-1] < alone[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", FACTORIZATIONS, ids=lambda s: "x".join(map(str, s)))
def test_losses_are_those_of_one_device(losses, sizes):
    """Data, fsdp, expert and tensor axes and every mixture: 20 steps of QAT with learned scales and an MTP module."""
    np.testing.assert_allclose(losses[",".join(map(str, sizes))], losses["1,1,1,1"], rtol=1e-5)
