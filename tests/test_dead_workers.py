"""What becomes of the tests where one of their workers dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DIES = "import os, signal, time\nalone = os.environ['PYTEST_XDIST_WORKER'] == 'gw0'\n"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            DIES + "def test_1(): pass\ndef test_2(): os.kill(os.getpid(), signal.SIGILL)\ndef test_3(): pass",
            "crashed while",
        ),
        (DIES + "if alone: time.sleep(1); os._exit(132)", "crashed and worker restarting disabled"),
    ],
    ids=["in a test", "before the first one"],
)
def test_a_worker_that_dies_fails_the_tests_and_none_waits_for_it(module, said, tmp_path):
    (tmp_path / "test_a.py").write_text(module)
    for name in "bcd":
        (tmp_path / f"test_{name}.py").write_text("def test_1(): pass\ndef test_2(): pass")
    command = [sys.executable, "-m", "pytest", "-p", "dead_workers", "-n", "2", "--dist", "loadfile", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {
        "PYTHONPATH": str(Path(__file__).parent)
    }
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and said in done.stdout
