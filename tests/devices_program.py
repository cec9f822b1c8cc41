"""Run by test_devices.py: an audit, tasks and text of a run's branch on as many CPU devices as the process has.

CORE RUN OUT    writes RUN's audit there, and into OUT: tasks.json; lies.json, how weights and windows lie on the
                devices, and a text that the branch wrote

It keeps to one core, the CORE-th of those that it may use, as parallel_program.py does.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance

from qatmoe import audit_report, evaluate, fidelity, requantize, tasks
from qatmoe.audit import open_run
from qatmoe.convert.weights import Branch
from qatmoe.data import cloze
from qatmoe.harness import Model
from qatmoe.mesh import batch_groups, local_mesh
from qatmoe.requantize import Format
from qatmoe.run import place
from qatmoe.tree import leaves_by_path

ROWS = "^(control|trunk|qat)$|^qat/q2_0/search$|^control/(Q4_0/imatrix|q2_0/gptq)$|^qat/kv/q4_0$"


def main(run: Path, out: Path) -> None:
    """Everything, one after another."""
    evaluate.CALIBRATION = 640
    audit_report.plot = lambda *_: None
    assert evaluate.main([f"--run={run}", f"--rows={ROWS}", "--tokens=2048"]) == 0
    cloze.chapters = lambda text: [text[1000:1600], text[3000:3900], text[9000:9300]]
    options = ["--branch", "control", "qat", "--limit=6", "--context=64", f"--json={out / 'tasks.json'}"]
    assert tasks.main([f"--run={run}", *options]) == 0
    (out / "lies.json").write_text(json.dumps(lies(run)))


def lies(run: Path) -> dict[str, Any]:
    """Of the deployed branch: `text` that it writes; the `digest` of its weights; by name, the share of an array that
    a device holds: `weights`, those that were `rounded`, and what comes of `windows`."""
    audit, _ = open_run(run)
    mesh = local_mesh()
    with Branch(run, "qat", rest="F32") as branch:
        params, tok = branch.numbers(mesh), branch.tokenizer
    model = Model(params, audit.model, mesh, tok, 64)
    request = Instance("generate_until", {}, ("She had been looking at him", {"max_gen_toks": 8}), 0)
    rounded, _ = requantize.requantize(params, audit.plan, Format("q4_0", "absmax", 4.5, 32))
    tokens = np.arange(8 * 66, dtype=np.int32).reshape(8, 66)
    with jax.set_mesh(mesh):
        batch = place(mesh, 8, {"tokens": tokens})
        outcome = fidelity.run_model(params, batch, cfg=audit.model, groups=batch_groups(mesh))
    numbers = b"".join(np.asarray(w).tobytes() for w in jax.tree.leaves(params))
    return {
        "devices": mesh.size,
        "text": model.generate_until([request])[0],
        "digest": hashlib.sha256(numbers).hexdigest(),
        "weights": {path: share(w) for path, w in leaves_by_path(params).items()},
        "rounded": {path: share(leaves_by_path(rounded)[path]) for path in audit.plan},
        "windows": [share(a) for a in jax.tree.leaves((batch, outcome))],
    }


def share(array: jax.Array) -> float:
    """The largest part of an array that one device holds."""
    return max(shard.data.size for shard in array.addressable_shards) / array.size


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(sys.argv[1]) % len(cores)]})
    main(*map(Path, sys.argv[2:]))
