"""Runs of a sweep as files for other launchers: SkyPilot tasks (clouds) and Kubernetes JobSets (GKE's TPU slices).

Only text is made here; neither SkyPilot nor kubectl is needed for it. A run's folder lies in a bucket or on a volume
that is mounted at /runs, and every start is the same command, which goes on from the last checkpoint.

Training that a signal stops saves and ends with 130 or 143. Both launchers start it again then, and do not count that
among the failures that they allow.
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.options import at_least
from launch.points import Run, Sweep
from qatmoe.errors import UserError
from qatmoe.files import write_atomically
from qatmoe.run import STOPPED

MOUNT = "/runs"
PORT = 8476  # of jax.distributed's coordinator, where SkyPilot starts several nodes

# Of a JobSet: what fails a job for the reason PodFailurePolicy, and what the set does about that reason.
DISRUPTIONS = [
    {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": list(STOPPED)}},
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]
UNCOUNTED = {
    "name": "stopped",
    "action": "RestartJobSetAndIgnoreMaxRestarts",
    "onJobFailureReasons": ["PodFailurePolicy"],
}


@dataclasses.dataclass(frozen=True)
class SkyOptions:
    """`--option` of the skypilot backend."""

    accelerators: str  # as SkyPilot names them: "tpu-v5e-16", "H100:8"
    bucket: str  # gs://... or s3://..., mounted at /runs
    infra: str = ""  # "gcp", "aws/us-east-1", "k8s"; "" = the cheapest that has them
    nodes: int = at_least(1, default=1)  # GPU machines that train one run together; a TPU slice is one node
    spot: bool = True
    restarts: int = at_least(0, default=3)  # after failures; preemptions and stops by a signal are not counted
    setup: str = ""  # instead of pip install


@dataclasses.dataclass(frozen=True)
class JobSetOptions:
    """`--option` of the jobset backend."""

    image: str  # a container with the repository in its working directory and the extra `tpu` installed
    claim: str  # a PersistentVolumeClaim (ReadWriteMany) for the runs
    accelerator: str = "tpu-v5-lite-podslice"  # label cloud.google.com/gke-tpu-accelerator
    topology: str = "4x4"  # chips of a slice
    chips: int = at_least(1, default=4)  # of one host
    slices: int = at_least(1, default=1)
    restarts: int = at_least(0, default=100)  # after failures; a pod's disruptions and stops by a signal not counted
    spot: bool = False


def sky_task(run: Run, sweep: Sweep, options: SkyOptions) -> dict[str, Any]:
    """A SkyPilot task as a dict, in the form of its YAML. Raises UserError where the run needs files from elsewhere."""
    tpu = options.accelerators.startswith("tpu")
    if not re.fullmatch(r"[a-z0-9]+://.+", options.bucket):
        raise UserError(f"--option bucket={options.bucket}: expected a bucket's address, as gs://NAME")
    if tpu and options.nodes > 1:
        raise UserError(f"--option nodes={options.nodes}: a TPU slice is one node; choose a larger slice")
    there = f"{MOUNT}/{sweep.name}/{run.name}"
    command = _command(run, there)
    if options.nodes > 1:
        address = f'"$(echo "$SKYPILOT_NODE_IPS" | head -n1):{PORT}"'
        command += f' --coordinator={address} --processes="$SKYPILOT_NUM_NODES" --process="$SKYPILOT_NODE_RANK"'
    resources: dict[str, Any] = {"accelerators": options.accelerators, "use_spot": options.spot}
    if options.infra:
        resources["infra"] = options.infra
    resources["job_recovery"] = {"max_restarts_on_errors": options.restarts, "recover_on_exit_codes": list(STOPPED)}
    return {
        "name": run.short,
        "resources": resources,
        "num_nodes": options.nodes,
        "workdir": ".",
        "file_mounts": {MOUNT: {"source": options.bucket, "mode": "MOUNT"}},
        "setup": options.setup or f"pip install -e '.[{'tpu' if tpu else 'gpu'}]'",
        "run": f"set -e\n{command}\n",
    }


def jobset(run: Run, sweep: Sweep, options: JobSetOptions) -> dict[str, Any]:
    """A JobSet as a dict, in the form of its YAML.

    GKE tells the pods of a slice about each other (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES), from which jax.distributed
    finds its processes; MEGASCALE_* does so for several slices. Any failed pod restarts the whole set, uncounted where
    its node was taken away or training was told to stop.

    Raises:
      UserError: the topology is no product of chips, or not of whole hosts.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology):
        raise UserError(f"--option topology={options.topology}: expected chips along each axis, as 4x4 or 2x2x4")
    count = math.prod(map(int, options.topology.split("x")))
    if count % options.chips:
        raise UserError(
            f"--option chips={options.chips}: does not divide the {count} of topology={options.topology}; lower it"
        )
    there = f"{MOUNT}/{sweep.name}/{run.name}"
    selector = {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "train",
        "image": options.image,
        "command": ["bash", "-ec"],
        "args": [f"{_command(run, there)}\n"],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": options.chips}},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,  # to save in
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}],
    }
    hosts = count // options.chips
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": DISRUPTIONS},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": run.short,
            "annotations": {
                "qatmoe/run": f"{sweep.name}/{run.name}",
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": options.restarts, "rules": [UNCOUNTED]},
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def write_sky(runs: Sequence[Run], sweep: Sweep, folder: Path, options: SkyOptions) -> list[str]:
    """Writes FOLDER/skypilot/RUN.yaml for each run; returns the commands that start them."""
    return [
        f"sky jobs launch -y -n {run.short} {shlex.quote(str(_write(folder / 'skypilot', run, task)))}"
        for run, task in [(run, sky_task(run, sweep, options)) for run in runs]
    ]


def write_jobsets(runs: Sequence[Run], sweep: Sweep, folder: Path, options: JobSetOptions) -> list[str]:
    """Writes FOLDER/jobset/RUN.yaml for each run; returns the commands that start them."""
    return [
        f"kubectl apply -f {shlex.quote(str(_write(folder / 'jobset', run, spec)))}"
        for run, spec in [(run, jobset(run, sweep, options)) for run in runs]
    ]


def _command(run: Run, there: str) -> str:
    if Path(run.file).is_absolute():
        raise UserError(f"sweep's config {run.file}: must lie inside the repository, named from its root")
    # In place of the shell, which as a container's first process would keep SIGTERM from training.
    train = "exec " + shlex.join(["python", "-m", "qatmoe.train", *run.arguments(there)])
    data, phases = run.config.data, run.config.train.phases.values()
    teachers = [phase.teacher for phase in phases]
    named = [run.file, run.config.init_from, data.source, data.valid, data.tokenizer, *teachers]
    if not any(Path(name).parts[:1] == ("runs",) for name in named):
        return train
    # What a run is made of is named as here, runs/SWEEP/NAME, so that its settings are the same at home.
    hidden = "error: runs is a folder here and hides the mounted one: leave it out of the image or the work folder"
    check = f"test -L runs || ! test -e runs || {{ echo '{hidden}' >&2; exit 2; }}"
    return f"{check}\ntest -L runs || ln -s {MOUNT} runs\n{train}"


class _Dumper(yaml.SafeDumper):
    """YAML with shell scripts as they are, and not in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never `&id001`."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(content: dict[str, Any]) -> str:
    """As YAML, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=10_000)


def _write(folder: Path, run: Run, content: dict[str, Any]) -> Path:
    file = folder / f"{run.name}.yaml"
    write_atomically(file, to_yaml(content))
    return file
