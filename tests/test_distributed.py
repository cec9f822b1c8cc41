"""Several processes on this machine: the numbers of one, whatever dies, stops, or is started wrongly."""

import os
import signal
import socket
import subprocess
import sys
import time
import types
from typing import NamedTuple

import numpy as np
import pytest

from qatmoe import distributed, metrics, train
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import resolve, to_json
from qatmoe.errors import UserError
from qatmoe.workdir import open_workdir

CONFIG = """
from qatmoe.config import default_config, phase

def get_config():
    config = default_config()
    config.model.update(dim=64, n_layers=1, n_dense_layers=0, n_heads=2, n_kv_heads=2, head_dim=16)
    config.model.update(n_experts=4, expert_dim=64, n_shared_experts=0, n_mtp=0)
    config.data.seq_len = 32
    config.train.update(log_every=1, checkpoint_every=5, tensorboard=False)
    config.eval.update(every=10, batches=2, final_batches=2)
    config.train.phases.trunk = phase(steps=20, warmup=5, quantize=True)
    return config
"""

# Trains, and before the n-th batch sends itself a signal; each batch takes as long as is asked for.
TRAIN = """
import os, sys, time
from qatmoe import run, train
number, at, pause, count, real = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), 0, run.Run.place
def place(self, batch):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), number)
    time.sleep(pause)
    return real(self, batch)
run.Run.place = place
sys.exit(train.main(["train", *sys.argv[4:]]))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(env, count, devices, args_of, *, slurm=False):
    """Starts `count` processes with so many devices each; `args_of(process)` are an interpreter's arguments.

    They are introduced by flags, or by the variables that srun sets.
    """
    env = env | {"JAX_NUM_CPU_DEVICES": str(devices)}
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for i in range(count):
        place = ["--coordinator", address, "--processes", str(count), "--process", str(i)]
        args = [sys.executable, *args_of(i), *(place if count > 1 and not slurm else [])]
        more = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
            "JAX_COORDINATOR_PORT": address.partition(":")[2],
        }
        task = env | (more if slurm else {})
        processes.append(subprocess.Popen(args, env=task, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return processes


class Ended(NamedTuple):
    codes: list[int]
    out: list[str]
    err: list[str]
    apart: float  # seconds between the first end and the last


def end(processes, timeout=200):
    """Waits for all."""
    deadline = time.monotonic() + timeout
    try:
        while all(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        first = time.monotonic()
        out, err = zip(*[p.communicate(timeout=timeout) for p in processes], strict=True)
    finally:
        for p in processes:
            p.kill()
    return Ended([p.returncode for p in processes], out, err, time.monotonic() - first)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def job(quick_env, config):
    """Trains on processes x devices; `killer=(process, signal, before which batch)`, not under `slurm`."""

    def job(workdir, count, devices, *more, killer=(-1, 0, 0), pause=0.0, slurm=False):
        def args(i):
            number, at = killer[1:] if i == killer[0] else (0, 0)
            job = [f"--config={config}", f"--workdir={workdir}", *more]
            return ["-m", "qatmoe.train", *job] if slurm else ["-c", TRAIN, str(int(number)), str(at), str(pause), *job]

        return end(start(quick_env, count, devices, args, slurm=slurm))

    return job


def losses(workdir):
    """{(split, step): loss} of a run, each record once."""
    records = [r for r in metrics.read(workdir) if "loss" in r]
    found = {(r["split"], r["step"]): r["loss"] for r in records}
    assert len(found) == len(records)
    return found


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended = job(workdir, 1, 4)
    assert ended.codes == [0], ended.err
    return workdir


@pytest.fixture(scope="module")
def whole(finished):
    """Its losses."""
    assert len([split for split, _ in losses(finished) if split == "train"]) == 20
    return losses(finished)


@pytest.mark.parametrize(("count", "slurm"), [(2, False), (4, False), (2, True)], ids=["2", "4", "2_under_srun"])
def test_processes_give_the_numbers_of_one(whole, job, tmp_path, count, slurm):
    codes, out, err, _ = job(tmp_path / "run", count, 4 // count, slurm=slurm)
    assert codes == [0] * count, err
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)
    assert f"4 cpu in {count} processes (mesh data 4" in out[0]
    assert "valid loss" in out[0]
    assert "trunk 20/20" in err[0]
    for i in range(1, count):  # process 0 speaks for all
        assert "trunk" not in out[i] and "trunk" not in err[i]


def test_a_teacher_teaches_the_same_on_two_processes(finished, job, tmp_path):
    """Each holds half of every expert of both models. In Adam a large eps: see parallel_program.py."""
    changed = {"teacher": f"{finished}:trunk", "distill": 0.5, "steps": 3, "warmup": 0}
    more = ["--config.optim.eps=1e-3", *(f"--config.train.phases.trunk.{key}={v}" for key, v in changed.items())]
    for count in (1, 2):
        codes, _, err, _ = job(tmp_path / str(count), count, 1, f"--config.mesh.tensor={count}", *more)
        assert codes == [0] * count, err
    alone, halves = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert halves == pytest.approx(alone, rel=1e-5)
    taught = [r for r in metrics.read(tmp_path / "2") if r["split"] == "train"]
    assert len(taught) == 3
    for r in taught:
        assert r["kl"] > 0.01
        assert r["loss"] == pytest.approx(0.5 * (r["ce"] + r["kl"]) + 1e-3 * r["balance"] + 1e-4 * r["z"], rel=1e-5)


def test_killed_stopped_and_continued_on_other_processes_and_meshes(whole, job, tmp_path):
    workdir = tmp_path / "run"
    ended = job(workdir, 2, 2, killer=(1, signal.SIGKILL, 8), pause=0.1)
    assert ended.codes[1] == -signal.SIGKILL
    assert ended.codes[0] != 0
    assert "another process of the run has died" in ended.err[0]
    assert "goes on from the last checkpoint" in ended.err[0]
    assert ended.apart < 60
    with Checkpoints(workdir, "trunk") as checkpoints:
        assert checkpoints.steps() == [5]

    # On this mesh two processes at a time hold the same rows.
    codes, out, err, _ = job(workdir, 4, 1, "--config.mesh.tensor=2", killer=(2, signal.SIGINT, 3), pause=0.25)
    assert codes == [143, 143, 143, 143], err
    assert all("SIGTERM: stopped after step" in e and "which is saved" in e for e in err)
    assert "goes on from mesh {'data': 4" in out[0]
    assert "other tokens may be dropped" in out[0]
    with Checkpoints(workdir, "trunk") as checkpoints:
        stopped = checkpoints.latest()
    assert 5 < stopped < 20

    codes, out, err, _ = job(workdir, 1, 4)
    assert codes == [0], err
    assert losses(workdir) == pytest.approx(whole, rel=1e-5)  # no batch twice, none left out


@pytest.mark.parametrize(
    ("slurm", "wrong", "message"),
    [
        (True, "--config.model.dimm=3", "config.model.dimm: no such key; did you mean config.model.dim?"),
        (False, "--config.train.seed=5", 'another configuration than process 0: "seed": 5, here, "seed": 0, there'),
    ],
)
def test_what_is_wrong_in_one_process_ends_both(slurm, wrong, message, config, quick_env, tmp_path):
    job = ["-m", "qatmoe.train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    codes, _, err, _ = end(start(quick_env, 2, 1, lambda i: [*job, *[wrong] * i], slurm=slurm))
    assert codes == [2, 2], err
    assert all(f"error: process 1: {message}" in e for e in err)
    assert not (tmp_path / "run").exists()


# Saves and restores below a path of this process's own.
MOUNTED = """
import sys, jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qatmoe import distributed
from qatmoe.checkpoint import Checkpoints
rest, place = distributed.flags(sys.argv)
with distributed.joined(place, detect=False):
    split = NamedSharding(Mesh(np.asarray(jax.devices()), ("x",)), PartitionSpec("x"))
    w = jax.jit(lambda: jnp.arange(8.0), out_shardings=split)()
    with Checkpoints(rest[1], "trunk") as checkpoints:
        checkpoints.save(1, {"w": w}, {}, {}, wait=True)
        checkpoints.save(2, {"w": w + 1}, {}, {}, wait=True)
        found = checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)})[0]["w"]
    assert all((shard.data == np.arange(1.0, 9.0)[shard.index]).all() for shard in found.addressable_shards)
"""


def test_hosts_may_see_the_shared_folder_at_different_places(quick_env, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").symlink_to("0")
    codes, _, err, _ = end(start(quick_env, 2, 1, lambda i: ["-c", MOUNTED, str(tmp_path / str(i) / "run")]))
    assert codes == [0, 0], err
    with Checkpoints(tmp_path / "0" / "run", "trunk") as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.latest_good() == 2


def test_a_folder_in_use_is_refused_by_both(job, config, tmp_path):
    with open_workdir(tmp_path, "{}"):
        codes, _, err, _ = job(tmp_path, 2, 1)
    assert codes == [2, 2], err
    assert all(f"in use by process {os.getpid()}" in e for e in err)


# Places a batch whose rows lie in no order on the processes, and agrees.
PLACED = """
import sys, types, numpy as np, jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from qatmoe import distributed, mesh, run
from qatmoe.errors import UserError
rest, place = distributed.flags(sys.argv)
with distributed.joined(place, detect=False):
    me = jax.process_index()
    d = jax.devices()
    for order, shape, held in (
        ([0, 2, 1, 3], (4, 1, 1, 1), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ([3, 1, 2, 0], (2, 1, 2, 1), [[2, 3, 6, 7], [0, 1, 4, 5]]),
        ([0, 2, 1, 3], (2, 1, 1, 2), [list(range(8))] * 2),
    ):
        m = Mesh(np.asarray([d[i] for i in order]).reshape(shape), mesh.AXES)
        rows = run.local_rows(m, 8)
        assert rows.tolist() == held[me], rows
        whole = np.arange(24).reshape(8, 3)
        cfg = types.SimpleNamespace(train=types.SimpleNamespace(batch_size=8))
        r = run.Run(cfg, None, m, None, None, {}, None, None)
        got = multihost_utils.process_allgather(r.place({"tokens": whole[rows]})["tokens"], tiled=True)
        assert (got == whole).all(), got
    assert distributed.from_first({"a": me}) == {"a": 0}
    distributed.require_same("text", "equal")
    try:
        distributed.require_same("text", f"same\\n{me}")
    except UserError as e:
        sys.stderr.write(str(e))
    if me == 1:
        raise UserError("alone")
    distributed.barrier("never")
"""


def test_rows_follow_from_the_mesh_and_a_lone_error_ends_all(quick_env):
    codes, _, err, _ = end(start(quick_env, 2, 2, lambda i: ["-c", PLACED]))
    assert codes[1] == 2, err
    assert codes[0] not in (0, 2), err
    assert "error: process 1 of 2: alone" in err[1]
    assert "another process of the run has died" in err[0]
    assert all("process 1: another text than process 0: 1 here, 0 there" in e for e in err)


# ---- How processes are introduced ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--coordinator", "a:1"], "--processes and --process missing"),
        (["--processes", "2"], "--coordinator and --process missing"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "--process 2: must be from 0 to 1"),
        (["--coordinator", "a:1", "--processes", "0", "--process", "0"], "--processes 0"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "must be HOST:PORT"),
        (["--coordinator", "a..b:123", "--processes", "2", "--process", "1"], "'a..b:123': must be HOST:PORT"),
        (["--coordinator", "a:99999", "--processes", "2", "--process", "0"], "must be HOST:PORT"),
        (["--coordinator", "a:1", "--processes", "two", "--process", "0"], "--processes: invalid int value: 'two'"),
    ],
)
def test_flags_that_cannot_be(args, message, capsys):
    assert train.main(["train", *args]) == 2
    assert message in capsys.readouterr().err


def test_flags_are_taken_out_of_the_command_line():
    line = ["train", "--config", "a.py", "--process=1", "--config.mesh.data=2", "--processes", "2"]
    rest, place = distributed.flags([*line, "--coordinator", "[::1]:80"])
    assert rest == ["train", "--config", "a.py", "--config.mesh.data=2"]
    assert place == distributed.Place("[::1]:80", 2, 1)
    assert distributed.flags(["train", "--processes", "1"])[1] == distributed.Place(processes=1)


def test_a_coordinator_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "START_S", 0.5)
    address = f"127.0.0.1:{free_port()}"
    assert train.main(["train", "--coordinator", address, "--processes", "2", "--process", "1"]) == 2
    err = capsys.readouterr().err
    assert f"--coordinator {address} cannot be reached (Connection refused): start process 0 there" in err


def test_processes_that_do_not_come_are_waited_for_a_while_only(quick_env):
    code = "import sys; from qatmoe import distributed, train; distributed.START_S = 2; train.main(sys.argv)"
    args = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "0"]
    p = subprocess.Popen([sys.executable, "-c", code, *args], env=quick_env, stderr=subprocess.PIPE, text=True)
    codes, _, err, _ = end([p])
    assert codes != [0]
    assert "process 0 of 2: not all processes came to" in err[0]
    assert "within 2 s" in err[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out", "did not come in time"),
        ("Gloo all-reduce failed: Connection reset by peer", "has died"),
    ],
)
def test_a_slow_process_is_not_called_dead(error, message, monkeypatch, capsys):
    monkeypatch.setattr(distributed.os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        distributed._leave(RuntimeError(error), "process 0 of 2")
    assert f"error: process 0 of 2: another process of the run {message} ({error})" in capsys.readouterr().err


def test_what_orbax_makes_of_a_missed_process_is_one_line(monkeypatch, capsys):
    """Of which orbax says only that it waited too long."""
    monkeypatch.setattr(distributed.os, "_exit", sys.exit)
    late = TimeoutError("Timed out while waiting for a barrier.")
    late.__cause__ = distributed.jax.errors.JaxRuntimeError("UNAVAILABLE: task 1 is gone")
    with pytest.raises(SystemExit, match="1"):
        distributed._leave(late, "process 0 of 2")
    said = "another process of the run was waited for in vain (UNAVAILABLE: task 1 is gone)"
    assert f"error: process 0 of 2: {said}; {distributed.CONTINUE}" in capsys.readouterr().err
    never = distributed.jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key: x")
    with pytest.raises(SystemExit, match="1"):
        distributed._leave(never, "process 0 of 2")
    assert "was waited for in vain (DEADLINE_EXCEEDED: GetKeyValue()" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):  # what has nothing to do with other processes is shown as it is
        distributed._leave(distributed.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"), "process 0 of 2")
    assert "another process" not in capsys.readouterr().err


def test_every_process_sees_that_one_has_fewer_devices(monkeypatch):
    owners = [0, 1, 1, 2, 2, 2]  # process 1 has a third of them, as it should
    monkeypatch.setattr(distributed.jax, "devices", lambda: [types.SimpleNamespace(process_index=i) for i in owners])
    with pytest.raises(UserError, match="process 2 has 3 devices and process 0 1: give each") as error:
        distributed._check_devices()
    assert error.value.together
    owners[:] = [0, 0, 1, 1]
    distributed._check_devices()


def test_one_process_agrees_with_itself():
    with pytest.raises(UserError, match="mine"), distributed.together():
        raise UserError("mine")
    assert distributed.first()
    assert distributed.from_first(np.pi) == np.pi
    distributed.require_same("text", "a")
    distributed.barrier("here")


def test_the_mesh_may_change_when_a_run_goes_on(tmp_path):
    open_workdir(tmp_path, to_json(resolve({"train": {"phases": {"a": {"steps": 1}}}, "mesh": {"data": 2}}))).close()
    open_workdir(tmp_path, to_json(resolve({"train": {"phases": {"a": {"steps": 1}}}, "mesh": {"fsdp": 2}}))).close()
