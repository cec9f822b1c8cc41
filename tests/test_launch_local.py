"""The local queue: with small commands, and with a real sweep that loses a run and is finished by the same command."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from launch import local
from launch.local import Queue, Slot, Task, slots
from qatmoe import metrics
from qatmoe.errors import UserError

FREE = [Slot("one", {})]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(local, "POLL_S", 0.01)


def task(tmp_path, name, script):
    """A shell script that is done when it has made the file ok_NAME."""
    return Task(
        name, ["sh", "-c", script], tmp_path / f"{name}.log", functools.partial((tmp_path / f"ok_{name}").exists)
    )


def run(tasks, places=FREE, **options):
    queue = Queue(tasks, places, **{"backoff_s": 0.01} | options)
    outcomes = queue.run()
    return queue, {o.task.name: o for o in outcomes}


def test_all_are_run_and_one_failure_does_not_stop_the_others(tmp_path):
    tasks = [
        task(tmp_path, "a", f"echo hello; touch {tmp_path}/ok_a"),
        task(tmp_path, "b", "echo working; echo error: no such key >&2; exit 2"),
        task(tmp_path, "c", f"touch {tmp_path}/ok_c"),
    ]
    _, outcomes = run(tasks)
    assert {n: o.kind for n, o in outcomes.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert outcomes["b"].why == "exit code 2: error: no such key"
    assert outcomes["b"].starts == 1  # it would say the same again
    assert (tmp_path / "a.log").read_text().splitlines()[1:] == ["hello"]


def test_what_was_stopped_or_killed_goes_on(tmp_path):
    count = f"echo x >> {tmp_path}/n; n=$(wc -l < {tmp_path}/n);"
    script = f"{count} [ $n = 1 ] && exit 143; [ $n = 2 ] && exit 130; [ $n = 3 ] && kill -9 $$"
    _, outcomes = run([task(tmp_path, "a", f"{script}; touch {tmp_path}/ok_a")], restarts=3)
    assert (outcomes["a"].kind, outcomes["a"].starts) == ("done", 4)
    log = (tmp_path / "a.log").read_text()
    assert re.findall(r"--- start (\d), one:", log) == ["1", "2", "3", "4"]


def test_what_ends_with_0_and_is_not_finished_would_end_so_again(tmp_path):
    _, outcomes = run([task(tmp_path, "a", "echo said")])
    assert (outcomes["a"].kind, outcomes["a"].starts, outcomes["a"].why) == ("failed", 1, "exit code 0: said")


def test_restarts_end_and_wait_longer_each_time(tmp_path, capsys):
    _, outcomes = run([task(tmp_path, "a", "kill -9 $$")], restarts=2)
    assert (outcomes["a"].kind, outcomes["a"].starts) == ("failed", 3)
    assert outcomes["a"].why.startswith("killed by SIGKILL, after 3 starts")
    assert re.findall(r"in (\S+) s: killed by SIGKILL", capsys.readouterr().out) == ["0.01", "0.02"]


def test_a_restart_does_not_hold_up_the_others(tmp_path):
    again = task(tmp_path, "again", f"[ -e {tmp_path}/ok_b ] && touch {tmp_path}/ok_again; exit 143")
    _, outcomes = run([again, task(tmp_path, "b", f"touch {tmp_path}/ok_b")], backoff_s=0.5)
    assert [o.kind for o in outcomes.values()] == ["done", "done"]
    assert outcomes["again"].starts == 2


def test_slots_run_side_by_side_and_with_their_environment(tmp_path):
    meet = "touch {0}/here_{1}; until [ -e {0}/here_{2} ]; do sleep 0.01; done; echo $PLACE > {0}/ok_{1}"
    tasks = [task(tmp_path, a, meet.format(tmp_path, a, b)) for a, b in (("a", "b"), ("b", "a"))]
    _, outcomes = run(tasks, [Slot("0", {"PLACE": "zero"}), Slot("1", {"PLACE": "one"})])
    assert [o.kind for o in outcomes.values()] == ["done", "done"]
    assert {(tmp_path / f"ok_{n}").read_text() for n in "ab"} == {"zero\n", "one\n"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_a_slot_has_its_cores_and_the_queue_keeps_its_own(tmp_path):
    mine = os.sched_getaffinity(0)
    core = min(mine)
    script = f"{sys.executable} -S -c 'import os; print(os.sched_getaffinity(0))' > {tmp_path}/ok_a"
    run([task(tmp_path, "a", script)], [Slot("0", {}, frozenset({core}))])
    assert (tmp_path / "ok_a").read_text().strip() == str({core})
    assert os.sched_getaffinity(0) == mine


STOPS = """
import functools, pathlib, sys
from launch import local
from launch.local import Queue, Slot, Task
folder = pathlib.Path(sys.argv[1])
save = "trap 'echo saved; exit 143' TERM; touch {0}/up; while true; do sleep 0.05; done".format(folder)
tasks = [Task(n, ["sh", "-c", save], folder / f"{n}.log", (folder / f"ok_{n}").exists) for n in "ab"]
queue = Queue(tasks, [Slot("0", {})])
outcomes = queue.run()
print([(o.task.name, o.kind) for o in outcomes], queue.signal)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(number, child_env, tmp_path):
    command = [sys.executable, "-c", STOPS, str(tmp_path)]
    process = subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == f"[('a', 'stopped')] {number.value}"  # b was not started
    assert (tmp_path / "a.log").read_text().splitlines()[-1] == "saved"
    assert "once more to stop them at once" in err


def test_two_queues_in_one_folder(tmp_path):
    with (
        local.locked(tmp_path),
        pytest.raises(UserError, match="in use by another launch.sweep"),
        local.locked(tmp_path),
    ):
        pass
    with local.locked(tmp_path):
        pass


# ---- Slots -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerators(monkeypatch):
    """Sets what this machine has."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    files = {}
    monkeypatch.setattr(local, "_numbers", lambda folder, pattern: files.get((folder, pattern.partition("(")[0]), []))
    return files


def test_gpus_are_divided(accelerators, monkeypatch):
    accelerators["/dev", "nvidia"] = list("01234567")
    assert [s.env for s in slots(2)] == [{"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}]
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert slots(1)[0].env == {}
    with pytest.raises(UserError, match="--slots 3: does not divide the 8 GPUs"):
        slots(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert all(slot.cores for slot in slots(2))  # none is visible: cores are divided
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert [s.env for s in slots(2)] == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "6"}]


def test_gpus_are_shared_evenly(accelerators, monkeypatch):
    accelerators["/dev", "nvidia"] = list("35")  # of a machine with more, of which a container sees two
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert [s.env for s in slots(4)] == [{"CUDA_VISIBLE_DEVICES": d} | own for d in "0101"]
    with pytest.raises(UserError, match="--slots 5: does not divide the 2 GPUs"):
        slots(5)


def test_tpu_chips_are_divided(accelerators):
    accelerators["/dev/vfio", ""] = list("0123")
    assert slots(2)[1].env == {
        "TPU_VISIBLE_CHIPS": "2,3",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }


def test_cores_are_divided(accelerators, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert [s.cores for s in slots(2)] == [{0, 5}, {2}]
    assert [s.env for s in [*slots(1), *slots(2)]] == [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}] * 3
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    assert [s.env for s in [*slots(1), *slots(2)]] == [{}] * 3
    assert [s.cores for s in slots(4)] == [{0}, {2}, {5}, {0}]
    accelerators["/dev", "nvidia"] = ["0"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert len(slots(2)[0].cores) == 2


# ---- With training ---------------------------------------------------------------------------------------------------

SWEEP = """
from launch.algebra import product, values
from launch.points import Sweep
SHORT = {{f"train.phases.{{n}}.steps": 4 for n in ("trunk", "control", "qat")}}
SHORT |= {{f"train.phases.{{n}}.{{k}}": 0 for n in ("trunk", "control", "qat") for k in ("warmup", "decay")}}
SHORT |= {{"train.log_every": 1, "train.checkpoint_every": 2, "eval.every": 0, "eval.final_batches": 1}}
SHORT |= {{"model.n_layers": 2, "model.n_mtp": 0, "train.batch_size": 2, "data.seq_len": 32}}
def get_sweep():
    points = product(values("train.seed", [0, 1, 2]), [SHORT])
    return Sweep(name="small", config="{root}/configs/toy.py", points=points)
"""


def launch(env, *args):
    command = [sys.executable, "-m", "launch.sweep", *map(str, args)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def small(quick_env, tmp_path_factory):
    """A sweep of 3 runs with one that was killed in its second phase and finished by the same command, and what both
    commands printed. The killer waits beside it for the run's first record of the phase `control`."""
    place = tmp_path_factory.mktemp("sweep")
    file, folder = place / "small.py", place / "small"
    file.write_text(SWEEP.format(root=ROOT))
    arguments = [file, f"--dir={folder}", "--slots=2", "--restarts=0"]
    killer = """
import os, pathlib, signal, sys, time
while True:
    for f in pathlib.Path(sys.argv[1]).glob("seed=2-*/metrics.jsonl"):
        if '"control"' in f.read_text():
            os.kill(int((f.parent / "lock").read_text()), signal.SIGKILL)
            sys.exit()
    time.sleep(0.005)
"""
    with subprocess.Popen([sys.executable, "-c", killer, str(folder)]) as process:
        first = launch(quick_env, *arguments)
        process.kill()
    listed = launch(quick_env, *arguments, "--dry_run")
    second = launch(quick_env, *arguments)
    return folder, first, listed, second


def runs(folder):
    return {r["name"]: folder / r["name"] for r in json.loads((folder / "sweep.json").read_text())["runs"]}


def test_a_sweep_with_a_killed_run_is_finished_by_the_same_command(small):
    folder, first, listed, second = small
    (victim,) = (n for n in runs(folder) if "seed=2" in n)
    assert first.returncode == 1, first.stderr
    assert re.search(rf"failed: {re.escape(victim)}: killed by SIGKILL", first.stderr)
    assert first.stdout.count("\ndone ") == 2
    assert listed.stdout.count("  done\n") == 2
    assert re.search(rf"{re.escape(victim)}  partial: (control|qat) at step \d of 4", listed.stdout)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("start ") == 1


def test_nothing_was_repeated(small):
    folder = small[0]
    for name, path in runs(folder).items():
        killed = "seed=2" in name
        starts = re.findall(r"^--- start", (folder / "logs" / f"{name}.log").read_text(), flags=re.M)
        assert len(starts) == 1 + killed
        records = [(r["phase"], r["step"]) for r in metrics.read(path) if r["split"] == "train"]
        assert records == [(phase, n) for phase in ("trunk", "control", "qat") for n in (1, 2, 3, 4)]
        times = [r["time"] for r in metrics.read(path)]
        assert times == sorted(times)
    checkpoints = sorted(p.parent.name for p in folder.glob("*/checkpoints/trunk/4"))
    assert len(checkpoints) == 3


def test_the_collected_table(small, child_env):
    folder = small[0]
    command = [sys.executable, "-m", "launch.collect", str(folder)]
    done = subprocess.run(command, env=child_env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs are finished" in done.stdout
    rows = json.loads((folder / "results.json").read_text())
    assert [r["train.seed"] for r in rows] == [0, 1, 2]
    for row in rows:
        summary = json.loads((folder / row["run"] / "summary.json").read_text())
        assert row["loss_qat"] == summary["loss"]["qat"]
        assert summary["name"] == f"small/{row['run']}"
    assert len({r["loss_control"] for r in rows}) == 3


def test_every_run_is_a_row_of_hparams(small):
    """As the plugin reads them: a session of each run, with what varies and the final losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    folder = small[0]
    found = {}
    for name, path in runs(folder).items():
        events = EventAccumulator(str(path / "tb" / "hparams")).Reload()
        content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
        data = plugin_data_pb2.HParamsPluginData.FromString(content)
        found[name] = data.session_start_info.hparams["train.seed"].number_value
        loss = json.loads((path / "summary.json").read_text())["loss"]["qat"]
        assert events.Scalars("final/loss_qat")[0].value == pytest.approx(loss)
    assert sorted(found.values()) == [0, 1, 2]
