"""SkyPilot tasks and JobSets: what is in them, their shell text run here, and SkyPilot's own reading of them."""

import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from launch import cloud, points, sweep
from launch.algebra import product, values
from launch.cloud import JobSetOptions, SkyOptions
from launch.points import Sweep
from qatmoe import cli
from qatmoe.errors import UserError

POINTS = product(values("quant.experts", ["q2_0", "mxfp4"]), values("data.source", ["a 'b'/*.txt"]))
SWEEP = Sweep("My_sweep", "configs/toy.py", POINTS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return points.runs_of(SWEEP, tmp_path)[0]


def executed(script, env, tmp_path):
    """Runs a script with a `python` that writes its arguments down; returns the exit code and the arguments."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    fake.chmod(0o755)
    command = ["bash", "-ec", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=env | {"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=False
    )
    return done.returncode, (tmp_path / "arguments").read_text().splitlines()


def check_arguments(arguments, run):
    assert arguments[:2] == ["-m", "qatmoe.train"]
    cfg, given = cli.parse(
        ["x", *[a for a in arguments[2:] if not a.startswith(("--coord", "--process"))]], "", {"workdir": ""}
    )
    assert cfg == run.config
    assert given["workdir"] == f"/runs/My_sweep/{run.name}"


def test_what_a_run_starts_and_learns_from_is_where_runs_are_mounted(run, tmp_path):
    point = {"init_from": "runs/trunks/seed=0:trunk", "train.phases.qat.distill": 0.5}
    point |= {"train.phases.qat.teacher": "runs/trunks/seed=0:control", "train.phases.qat.start": "trunk"}
    asked = Sweep("branches", "configs/moe_2bit_branch.py", [point])
    (run,) = points.runs_of(asked, Path("runs/branches"))
    script = cloud.sky_task(run, asked, SkyOptions("tpu-v5e-8", "gs://b"))["run"]
    code, arguments = executed(script, {"SKYPILOT_NODE_RANK": "1"}, tmp_path)
    assert code == 0
    assert (tmp_path / "runs").readlink() == Path("/runs")
    assert executed(script, {"SKYPILOT_NODE_RANK": "1"}, tmp_path)[0] == 0  # a restart finds the link
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    assert executed(script, {"SKYPILOT_NODE_RANK": "1"}, tmp_path)[0] == 2
    assert cli.parse(["x", *arguments[2:]], "", {"workdir": ""})[0] == run.config  # as it is named at home


def test_a_config_file_among_the_runs_is_there_too(tmp_path, monkeypatch):
    """As an import writes one."""
    monkeypatch.chdir(tmp_path)
    for config in ("configs/toy.py", "runs/olmoe/qat.py"):
        Path(config).parent.mkdir(parents=True)
        shutil.copy(ROOT / "configs" / "toy.py", config)
        asked = Sweep("s", config, [{}])
        (run,) = points.runs_of(asked, Path("runs/s"))
        script = cloud.sky_task(run, asked, SkyOptions("tpu-v5e-8", "gs://b"))["run"]
        assert ("ln -s /runs runs" in script) == config.startswith("runs")


def test_a_tpu_task(run, tmp_path):
    task = yaml.safe_load(cloud.to_yaml(cloud.sky_task(run, SWEEP, SkyOptions("tpu-v5e-16", "gs://b", infra="gcp"))))
    assert task["resources"] == {
        "accelerators": "tpu-v5e-16",
        "use_spot": True,
        "infra": "gcp",
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [130, 143]},
    }
    assert task["file_mounts"] == {"/runs": {"source": "gs://b", "mode": "MOUNT"}}
    assert (task["num_nodes"], task["workdir"]) == (1, ".")
    assert task["setup"] == "pip install -e '.[tpu]'"
    assert task["name"] == f"my-sweep-{run.name[-10:]}"
    code, arguments = executed(task["run"], {"SKYPILOT_NODE_RANK": "1"}, tmp_path)
    assert code == 0
    check_arguments(arguments, run)
    assert not any(a.startswith("--coordinator") for a in arguments)  # the hosts of a slice know each other


def test_gpu_nodes_are_told_about_each_other(run, tmp_path):
    task = cloud.sky_task(run, SWEEP, SkyOptions("H100:8", "s3://b", nodes=2, setup="true"))
    assert (task["num_nodes"], task["setup"]) == (2, "true")
    env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    code, arguments = executed(task["run"], env, tmp_path)
    assert code == 0
    check_arguments(arguments, run)
    assert arguments[-3:] == ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"]


def test_a_signal_reaches_training_and_its_exit_code_the_launcher(run, tmp_path):
    """Of a container the signal goes to its first process alone."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ntrap 'exit 143' TERM\ntouch {tmp_path}/up\nfor i in $(seq 600); do sleep 0.05; done\n")
    fake.chmod(0o755)
    for script in (
        cloud.sky_task(run, SWEEP, SkyOptions("tpu-v5e-16", "gs://b"))["run"],
        container(cloud.jobset(run, SWEEP, JobSetOptions("i", "c")))["args"][0],
    ):
        (tmp_path / "up").unlink(missing_ok=True)
        process = subprocess.Popen(["bash", "-ec", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143


def container(spec):
    pod = spec["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]


def test_a_jobset(run, tmp_path):
    options = JobSetOptions("gcr.io/p/q:1", "runs", topology="4x8", slices=2, restarts=7, spot=True)
    spec = yaml.safe_load(cloud.to_yaml(cloud.jobset(run, SWEEP, options)))
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    rule = {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert spec["spec"]["failurePolicy"] == {"maxRestarts": 7, "rules": [{"name": "stopped"} | rule]}
    (job,) = spec["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    assert {k: job["template"]["spec"][k] for k in ("parallelism", "completions", "backoffLimit")} == {
        "parallelism": 8,
        "completions": 8,
        "backoffLimit": 0,
    }
    codes, disruption = job["template"]["spec"]["podFailurePolicy"]["rules"]
    own = {"containerName": container(spec)["name"], "operator": "In", "values": [130, 143]}
    assert codes == {"action": "FailJob", "onExitCodes": own}
    assert disruption == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["restartPolicy"] == "Never"
    assert container(spec)["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    check_arguments(executed(container(spec)["args"][0], {"JOB_COMPLETION_INDEX": "3"}, tmp_path)[1], run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda run: cloud.sky_task(run, SWEEP, SkyOptions("H100", "b")),
            "--option bucket=b: expected a bucket's address",
        ),
        (lambda run: cloud.sky_task(run, SWEEP, SkyOptions("tpu-v5e-8", "gs://b", nodes=2)), "a TPU slice is one node"),
        (lambda run: cloud.jobset(run, SWEEP, JobSetOptions("i", "c", topology="16")), "topology=16: expected chips"),
        (lambda run: cloud.jobset(run, SWEEP, JobSetOptions("i", "c", topology="0x4")), "topology=0x4: expected chips"),
        (lambda run: cloud.jobset(run, SWEEP, JobSetOptions("i", "c", chips=3)), "chips=3: does not divide the 16"),
    ],
)
def test_wrong_options(make, message, run):
    with pytest.raises(UserError, match=message):
        make(run)


def test_files_and_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["launch/sweeps/toys.py", f"--dir={tmp_path / 'd'}", "--backend=skypilot"]
    assert sweep.main([*arguments, "--option=accelerators=tpu-v5e-8", "--option=bucket=gs://b"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 8
    for command in commands:
        assert command[:4] == ["sky", "jobs", "launch", "-y"]
        with open(command[-1]) as f:
            assert yaml.safe_load(f)["name"] == command[5]
    file = tmp_path / "sweep.py"
    file.write_text(
        "from launch.points import Sweep\n"
        f"def get_sweep(): return Sweep(name='toys', config='{ROOT}/configs/toy.py', points=[{{}}])"
    )
    assert sweep.main([str(file), *arguments[1:], "--option=accelerators=tpu-v5e-8", "--option=bucket=gs://b"]) == 2
    assert "must lie inside the repository, named from its root" in capsys.readouterr().err


@pytest.mark.skypilot
@pytest.mark.filterwarnings("ignore")  # of its dependencies
@pytest.mark.parametrize("options", [SkyOptions("tpu-v5e-16", "gs://b"), SkyOptions("H100:8", "s3://b", nodes=2)])
def test_skypilot_reads_it(options, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    import sky

    file = tmp_path / "task.yaml"
    file.write_text(cloud.to_yaml(cloud.sky_task(run, SWEEP, options)))
    task = sky.Task.from_yaml(str(file))
    (resources,) = task.resources
    assert resources.use_spot
    assert dict(resources.accelerators) == {options.accelerators.partition(":")[0]: 8 if options.nodes == 2 else 1}
    assert task.num_nodes == options.nodes
    assert list(task.storage_mounts) == ["/runs"]
    assert task.run == yaml.safe_load(file.read_text())["run"]
    file.write_text(file.read_text().replace("num_nodes", "num_nodez"))
    with pytest.raises(ValueError, match="num_nodes"):
        sky.Task.from_yaml(str(file))
