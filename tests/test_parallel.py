"""Every way to split a run over eight devices: the losses of one device, and no collective that should not be there.

Eight forced CPU devices, in processes of their own; one of these tests trains on the meshes, which takes minutes: on
those of one axis and of three and on one of two, and with -m 'slow or every_mesh' on all of two as well.
"""

import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from parallel_program import CFG, PURE, WATCHED, L

from qatmoe.model import moe, transformer

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "parallel_program.py"
ALONE = (1, 1, 1, 1)
FACTORIZATIONS = sorted(s for s in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(s) == 8)
TWO_AXES = {s for s in FACTORIZATIONS if 4 in s} - {(1, 2, 4, 1)}  # 2 x 4 and 4 x 2
MESHES = [pytest.param(s, marks=[pytest.mark.every_mesh] if s in TWO_AXES else []) for s in FACTORIZATIONS]


@pytest.fixture(scope="module")
def trained(quick_env, request):
    """Results by mesh, of those that are asked for, from two processes at a time: compiling takes the time, one core of
    each."""
    env = quick_env | {"JAX_NUM_CPU_DEVICES": "8"}
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {item.callspec.params.get("sizes", ALONE) for item in tests}
    names = [",".join(map(str, sizes)) for sizes in sorted({ALONE, *WATCHED, *asked})]
    start = functools.partial(subprocess.Popen, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    halves = [start([sys.executable, str(PROGRAM), str(i), *names[i::2]]) for i in (0, 1)]
    found = {}
    for child, (out, err) in [(child, child.communicate()) for child in halves]:
        assert child.returncode == 0, out[-2000:] + err[-3000:]
        found |= {tuple(map(int, mesh.split(","))): r for mesh, r in json.loads(out.splitlines()[-1]).items()}
    return found


@pytest.fixture(scope="module")
def losses(trained):
    """Of 20 steps, by mesh."""
    return {mesh: result["losses"] for mesh, result in trained.items()}


def test_one_device_learns(losses):
    alone = losses[ALONE]
    assert len(alone) == 20
    assert alone[-1] < alone[0] - 0.5


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_losses_are_those_of_one_device(losses, sizes):
    """Data, fsdp, expert and tensor axes and every mixture: 20 steps of QAT with learned scales and an MTP module."""
    np.testing.assert_allclose(losses[sizes], losses[ALONE], rtol=1e-5)


# ---- collectives of the compiled step, all in f32; bytes are what a device sends -------------------------------------

RING = 7 / 8  # of an array, that one of eight devices sends when it is gathered or scattered


@pytest.fixture(scope="module")
def collectives(trained):
    """Of the compiled step, by mesh."""
    return {mesh: [Collective(*row) for row in trained[mesh]["collectives"]] for mesh in WATCHED}


class Collective(NamedTuple):
    kind: str
    axes: list[str]
    sent: float
    name: str


def sent(rows, *kinds):
    return sum(row.sent for row in rows if row.kind in kinds)


def weights(*, experts):
    """Bytes of the parameters, of routed experts or of all others."""
    shapes = transformer.param_shapes(CFG.model)
    return sum(4 * math.prod(shape) for path, shape in shapes.items() if ("experts/" in path) == experts)


@pytest.mark.parametrize("axis", PURE)
def test_only_the_axis_that_is_there_is_used(collectives, axis):
    assert all(row.axes == [axis] for row in collectives[PURE[axis]])


def test_data_parallel_only_sums_gradients(collectives):
    rows = collectives[PURE["data"]]
    assert {row.kind for row in rows} == {"all-reduce"}
    tables = 2 * 4 * CFG.model.vocab_size * CFG.model.dim  # embeddings and head: once more for the MTP module
    expected = 2 * RING * (weights(experts=True) + weights(experts=False) + tables)
    np.testing.assert_allclose(sent(rows, "all-reduce"), expected, rtol=0.02)


def test_fsdp_gathers_weights_forward_and_backward_and_sums_gradients_once(collectives):
    rows = collectives[PURE["fsdp"]]
    everything = RING * (weights(experts=True) + weights(experts=False))
    assert 1.2 * everything < sent(rows, "all-gather") < 2 * everything  # the module's need not be gathered again
    assert sent(rows, "all-reduce", "reduce-scatter") < 2.1 * everything  # a CPU has no reduce-scatter
    assert sent(rows, "all-to-all", "collective-permute") < 0.3 * everything  # embeddings, halves


def test_experts_stay_and_their_rows_travel(collectives):
    rows = collectives[PURE["expert"]]
    model = CFG.model
    tokens = 8 * L // 8  # of a device
    row_bytes = 4 * model.n_experts * moe.capacity(tokens, model) * model.dim
    travels = [
        row for row in rows if row.kind == "all-to-all" and row.name.endswith("transpose") and row.sent > row_bytes / 2
    ]
    blocks = model.n_layers - model.n_dense_layers + model.n_mtp
    np.testing.assert_allclose(sent(travels, "all-to-all"), blocks * 4 * RING * row_bytes)  # there, back, twice
    assert sent(rows, "all-gather") < 2.1 * RING * weights(experts=False)


def test_tensor_parallel_gathers_neither_activations_nor_scores(collectives):
    rows = collectives[PURE["tensor"]]
    assert sent(rows, "all-gather") < 0.01 * sent(rows, "all-reduce")


def test_what_the_next_test_looks_for_has_these_names(collectives):
    names = [row.name for sizes in WATCHED for row in collectives[sizes]]
    assert any("gcv" in name for name in names), names


@pytest.mark.parametrize("sizes", WATCHED, ids=lambda s: "x".join(map(str, s)))
def test_neither_the_router_nor_the_chunks_of_the_head_wait_for_other_sequences(collectives, sizes):
    assert collectives[sizes]
    for row in collectives[sizes]:
        assert "top_k" not in row.name, row
        if "gcv" in row.name:  # scores of a chunk: only parts of V meet
            assert set(row.axes) <= {"tensor"}, row
