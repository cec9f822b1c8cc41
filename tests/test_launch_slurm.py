"""Slurm through submitit: the text for sbatch, jobs that run here, and jobs that are stopped and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import submitit
from conftest import ROOT
from submitit.slurm.slurm import _make_sbatch_string

from launch import points, slurm, sweep
from launch.algebra import values
from launch.points import Sweep
from launch.slurm import Options, Train
from qatmoe.config import to_json
from qatmoe.errors import UserError

# submitit leaves its files and processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOY = str(ROOT / "configs" / "toy.py")
LOSSES = {"trunk": 4.2, "control": 4.0, "qat": 4.1, "ptq": 4.3}

# Stands for qatmoe.train: writes who its parent is; at its first start waits for a signal and saves, then finishes.
FAKE = """
import json, os, pathlib, signal, sys, time
folder, config = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(config)
starts = folder / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if len(starts.read_text()) == 1 and sys.argv[3] == "wait":
    stopped = []
    def stop(n, _):
        stopped.append(n)
        signal.signal(n, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    (folder / "parent").write_text(str(os.getppid()))
    while not stopped:
        time.sleep(0.01)
    time.sleep(0.5)
    (folder / "saved").write_text(signal.Signals(stopped[0]).name)
    sys.exit(128 + stopped[0])
rules = {"control": {"absmax": 4.4, "search": 4.3}}
(folder / "summary.json").write_text(json.dumps({"loss": json.loads(sys.argv[-1]), "ptq_rules": rules}))
"""


@pytest.fixture(autouse=True)
def environment(child_env, monkeypatch):
    for key, value in child_env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def runs(tmp_path):
    return points.runs_of(Sweep("s", TOY, values("train.seed", [0, 1])), tmp_path)


def fake(run, *, waits=False):
    loss = json.dumps(LOSSES)
    wait = ["wait"] if waits else []
    return [sys.executable, "-c", FAKE, str(run.folder), to_json(run.config), *wait, loss]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_text_for_sbatch(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")  # srun
    options = Options(
        partition="a100", account="moe", nodes=2, tasks_per_node=8, gpus_per_node=8, minutes=90, setup="source env.sh"
    )
    found = slurm.executor(tmp_path, options, "grids")
    text = _make_sbatch_string(command="RUN", folder=tmp_path, map_count=6, **found._executor.parameters)
    for line in (
        "--array=0-5%6",
        "--partition=a100",
        "--account=moe",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=90",
        "--signal=USR2@180",
        "--job-name=grids",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "--qos" not in text
    assert "\nsource env.sh\n" in text
    assert text.index("source env.sh") < text.index("srun")
    assert found._executor.max_num_timeout == slurm.REQUEUES


def test_jobs_run_and_end_as_their_training_does(runs, tmp_path):
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="debug")
    good = runs[0]
    job = executor.submit(Train(fake(good), str(ROOT)))
    assert job.result() == "done"
    failing = executor.submit(Train([sys.executable, "-c", "raise SystemExit(2)"], str(ROOT)))
    with pytest.raises(RuntimeError, match=r"qatmoe\.train ended with 2"):
        Train(failing.submission().function.command, str(ROOT))()


@pytest.mark.parametrize(("number", "again"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGKILL, False)])
def test_training_that_a_signal_ended_before_it_listened(number, again, monkeypatch):
    raised = []
    monkeypatch.setattr(slurm.signal, "raise_signal", raised.append)
    # What a shell runs in the background inherits that SIGINT is ignored.
    listens = "" if number == signal.SIGKILL else f"signal.signal({int(number)}, signal.SIG_DFL); "
    ends = f"import os, signal; {listens}os.kill(os.getpid(), {int(number)})"
    job = Train([sys.executable, "-c", ends], str(ROOT))
    if again:
        assert job() == "stopped" and raised == [signal.SIGUSR2]
    else:
        with pytest.raises(RuntimeError, match="ended with -9"):
            job()
        assert not raised


@pytest.mark.parametrize("how", ["submitit's signal", "SIGTERM to the training alone", "both"])
def test_a_stopped_job_saves_and_goes_on(how, runs, tmp_path):
    """Both: as Slurm does, which signals every process of a step. Training must save all the same, and once."""
    (run, _) = runs
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Train(fake(run, waits=True), str(ROOT)))
    until((run.folder / "parent").exists)
    until(lambda: (run.folder / "parent").read_text())
    parent = int((run.folder / "parent").read_text())
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=True)
    (child,) = map(int, children.stdout.split())
    if how != "submitit's signal":
        os.kill(child, signal.SIGTERM)
    if how == "both":
        os.kill(child, signal.SIGUSR2)
    if how != "SIGTERM to the training alone":
        os.kill(parent, signal.SIGUSR2)
    assert job.result() == "done"
    assert (run.folder / "starts").read_text() == "xx"
    assert (run.folder / "saved").read_text() in {"submitit's signal": ["SIGINT"], "both": ["SIGINT", "SIGTERM"]}.get(
        how, ["SIGTERM"]
    )
    assert points.finished(run.folder)


def test_a_sweep_is_submitted_once(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(points.Run, "command", property(lambda run: fake(run, waits=True)))
    options = Options(cluster="local", minutes=5)
    jobs = slurm.submit(runs, tmp_path, options, "s")
    assert set(jobs) == {run.name for run in runs}
    for run in runs:
        until((run.folder / "parent").exists)
    busy = {"of": True}  # a LocalJob of another process knows nothing of it: Slurm's does
    monkeypatch.setattr("submitit.local.local.LocalJob.done", lambda self, force_check=False: not busy["of"])
    assert slurm.submit(runs, tmp_path, options, "s") == {}
    assert capsys.readouterr().out.count("queued ") == 2
    for run in runs:
        until(lambda run=run: (run.folder / "parent").read_text())
        os.kill(int((run.folder / "parent").read_text()), signal.SIGUSR2)
    for run in runs:
        until((run.folder / "summary.json").exists)
    assert json.loads((tmp_path / "slurm" / "jobs.json").read_text()) == jobs


def test_a_new_folder_is_made_by_the_start_and_not_by_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(points.Run, "command", property(fake))
    (tmp_path / "sweep.py").write_text(
        "from launch.points import Sweep\ndef get_sweep(): return Sweep('s', 'configs/toy.py', [{}])"
    )
    folder = tmp_path / "d"
    arguments = [str(tmp_path / "sweep.py"), f"--dir={folder}", "--backend=slurm", "--option=cluster=local"]
    assert sweep.main([*arguments, "--dry_run"]) == 0
    assert "missing" in capsys.readouterr().out
    assert not folder.exists()
    assert sweep.main(arguments) == 0
    until(lambda: any(file.stat().st_size for file in folder.glob("run-*/summary.json")))
    (name,) = json.loads((folder / "slurm" / "jobs.json").read_text())
    assert points.finished(folder / name)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}'])
def test_a_damaged_list_of_jobs_is_named(text, runs, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(text)
    with pytest.raises(UserError, match="slurm/jobs.json is damaged: see to it that none of its jobs is in the queue"):
        slurm.submit(runs, tmp_path, Options(cluster="local"), "s")


def test_without_submitit_or_slurm_one_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    file = ROOT / "launch" / "sweeps" / "toys.py"
    arguments = [str(file), f"--dir={tmp_path / 'd'}", "--backend=slurm"]
    assert sweep.main([*arguments, "--option=cluster=nowhere"]) == 2
    assert "--option cluster=nowhere" in capsys.readouterr().err
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert sweep.main(arguments) == 2
    assert 'Could not detect "srun"' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep.main(arguments) == 2
    assert "the slurm backend needs submitit: pip install -e '.[slurm]'" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    with pytest.raises(UserError):
        slurm.executor(tmp_path, Options(), "s")
