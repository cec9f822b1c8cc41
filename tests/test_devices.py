"""An audit and tasks on four devices: the figures of one, with a quarter of the weights on each."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qatmoe.convert.weights import Branch

PROGRAM = Path(__file__).parent / "devices_program.py"
COMPILED = Path(__file__).parent / "devices_compiled.py"
FIGURES = {"loss": 1e-5, "kld": 1e-6, "kld_own": 1e-6, "kld_experts": 1e-6, "router_kld": 1e-6, "kld_p99": 1e-5}  # nats
SHARES = ("same_top1", "top5_overlap", "expert_agreement")


@pytest.fixture(scope="module")
def computed(tiny_run, quick_env, tmp_path_factory):
    """By number of devices: what the program and the audit wrote, file by file. Both at a time, each on a core."""
    place = tmp_path_factory.mktemp("devices")
    children = {}

    def start(core, count, times):
        shutil.copytree(tiny_run, run := place / f"run_{count}_{times}")
        (out := place / f"out_{count}_{times}").mkdir()
        # One program after another: a CPU's devices share threads, which programs would take from each other.
        env = quick_env | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}
        program = [sys.executable, str(PROGRAM), str(core), str(run), str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children[count] = subprocess.Popen(program, env=env, text=True, **pipes), run, out

    for core, count in enumerate((1, 4)):
        start(core, count, 1)
    found = {}
    for core, count in enumerate((1, 4)):
        said, err = children[count][0].communicate()
        if "Termination timeout for" in err:  # XLA's: now and then one of a CPU's devices does not come to a collective
            start(core, count, 2)
            said, err = children[count][0].communicate()
        child, run, out = children[count]
        assert child.returncode == 0, said[-2000:] + err[-6000:]
        files = [run / "audit.json", run / "audit.fingerprint.json", out / "tasks.json", out / "lies.json"]
        found[count] = {file.stem: json.loads(file.read_text()) for file in files}
    return found


def test_rows_of_an_audit_are_those_of_one_device(computed):
    """As deployed, rounded to a grid, by GPTQ, with an importance matrix, with a rounded cache."""
    one, four = (computed[n]["audit"] for n in (1, 4))
    names = ["control", "control/q2_0/gptq", "control/Q4_0/imatrix", "trunk", "qat", "qat/q2_0/search", "qat/kv/q4_0"]
    assert [row["row"] for row in four] == [row["row"] for row in one] == names
    gptq, other = (rows.pop(1) for rows in (one, four))  # a code that a last bit turns over takes its row along
    assert other["kld"] == pytest.approx(gptq["kld"], rel=0.05)
    for expected, row in zip(one, four, strict=True):
        for name, tolerance in FIGURES.items():
            close = None if expected[name] is None else pytest.approx(expected[name], abs=tolerance, rel=0)
            assert row[name] == close, (row["row"], name)
        for name in SHARES:  # two tokens of 2,048 may be as near to a tie as rounding
            assert row[name] == pytest.approx(expected[name], abs=1e-3), (row["row"], name)
        assert row["tokens"] == expected["tokens"]


def test_rows_say_that_several_devices_computed_them(computed):
    one, four = (computed[n]["audit.fingerprint"] for n in (1, 4))
    assert four == one | {"devices": 4} and "devices" not in one


def test_log_likelihoods_and_text_are_those_of_one_device(computed):
    one, four = (computed[n]["tasks"]["rows"] for n in (1, 4))
    assert [(r["branch"], r["task"], r["metric"]) for r in four] == [(r["branch"], r["task"], r["metric"]) for r in one]
    of_text = [(a, b) for a, b in zip(one, four, strict=True) if a["task"] == "novel"]
    assert len(of_text) >= 4
    for expected, row in of_text:
        assert row["value"] == pytest.approx(expected["value"], rel=1e-6), (row["branch"], row["metric"])
    assert computed[4]["lies"]["text"] == computed[1]["lies"]["text"] != ""


def test_each_device_holds_a_quarter_of_the_same_weights(computed):
    one, four = (computed[n]["lies"] for n in (1, 4))
    assert (one["devices"], four["devices"]) == (1, 4)
    assert four["digest"] == one["digest"]
    small = {path for path, part in four["weights"].items() if part == 1}
    assert all(path.endswith(("norm", "router/bias")) for path in small), small
    assert {part for path, part in four["weights"].items() if path not in small} == {0.25}
    assert set(four["rounded"].values()) == {0.25}  # a rounded tensor lies as the one it was made from


def test_each_device_has_a_quarter_of_the_windows_and_of_what_comes_of_them(computed):
    assert set(computed[4]["lies"]["windows"]) == {0.25}


def test_no_more_than_a_layer_of_a_parameter_comes_to_a_device_at_a_time(tiny_run, monkeypatch):
    put, shapes = jax.device_put, []
    monkeypatch.setattr(
        jax, "device_put", lambda x, *args, **options: shapes.append(x.shape) or put(x, *args, **options)
    )
    with Branch(tiny_run, "qat", rest="F32") as branch:
        stacked = (
            branch.model.n_layers - branch.model.n_dense_layers,
            *branch.numbers()["layers"]["0"]["experts"]["down"].shape,
        )
    assert stacked[1:] in shapes and stacked not in shapes
    assert max(map(len, shapes)) < len(stacked)


@pytest.mark.tpu_compiler
def test_layers_are_gathered_one_after_another(child_env):
    """Five layers take hardly more to work in than one: no two are there, gathered, at the same time."""
    done = subprocess.run([sys.executable, COMPILED], env=child_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, five = json.loads(done.stdout.splitlines()[-1]).values()
    layer = 2 * 24 * 3 * 512 * 1024  # experts in bfloat16
    assert layer < one and five < one + layer / 2
