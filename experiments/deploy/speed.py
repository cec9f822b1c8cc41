"""How fast is the export of a 1.3B-parameter model, and what memory do export and import take?

    python experiments/deploy/speed.py [--runs DIR]     20 GB of disk, 6 minutes on 2 cores
    python experiments/deploy/speed.py --write          writes the tables from speed.json into docs/deploy.md

Random weights in the shape of configs/h100_1b.py, saved by the training code's own checkpoint; each measurement is a
command in a process of its own, beside a plain copy of the checkpoint in the same run.
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from qatmoe import cli
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import Config, to_json
from qatmoe.data import tokenizer
from qatmoe.model.transformer import abstract_params, param_shapes
from qatmoe.report import fill_tables
from qatmoe.run import quant_plan
from qatmoe.tree import path_of

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "speed.json"
ROUNDS = 3
GRIDS = ("q2_0", "q4_0")
LIMIT = 2 << 30  # of the import: bytes of memory that are not file cache


def make_run(folder: Path, grid: str) -> None:
    """A run whose `qat` phase holds random weights, and scales on `grid`."""
    if (folder / "config.json").exists():
        return
    cfg, _ = cli.parse(["x", f"--config={ROOT}/configs/h100_1b.py", f"--config.quant.experts={grid}"], "", {})
    plan, _ = quant_plan(cfg)
    noise = 0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    scales: dict[str, np.ndarray] = {}

    def weights(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_of(path)
        out = np.resize(np.roll(noise, len(name)), leaf.shape)
        if name in plan:
            scales[name] = np.asarray(jax.jit(plan[name].absmax)(out)) / 2
        return out

    model = jax.tree_util.tree_map_with_path(weights, abstract_params(cfg.model))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.load().json)
    meta = {"config": {}, "data": "", "tokenizer": ""}
    with Checkpoints(folder, "qat") as checkpoints:
        checkpoints.save(1, {"params": {"model": model, "scales": scales}}, {}, meta, final=True, wait=True)
    os.symlink("qat", folder / "checkpoints" / "control")  # the same weights, on no grid
    (folder / "config.json").write_text(to_json(cfg))


def measure(name: str, command: list[str], written: Path, limit: int = 0) -> dict:
    """Runs a module of the project ROUNDS times: seconds (median), bytes written, peak memory."""
    seconds, peaks = [], []
    for _ in range(ROUNDS):
        remove(written)
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None,
        )
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        said = re.search(r" in ([\d.]+) s,", text)
        seconds.append(float(said[1]) if said else time.perf_counter() - started)
        peaks.append(usage.ru_maxrss * 1024)
    files = [written] if written.is_file() else [f for f in written.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    result = {"name": name, "seconds": sorted(seconds)[ROUNDS // 2], "all_seconds": seconds, "bytes": size}
    print(result | {"peak": max(peaks)}, flush=True)
    return result | {"peak_bytes": max(peaks), "limit": limit}


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy(source: Path, out: Path) -> dict:
    """The yardstick: reading and writing the checkpoint's bytes."""
    seconds = []
    for _ in range(ROUNDS):
        remove(out)
        started = time.perf_counter()
        with open(out, "wb") as f:
            for file in sorted(p for p in source.rglob("*") if p.is_file()):
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, f, 1 << 24)
            f.flush()
            os.fsync(f.fileno())
        seconds.append(time.perf_counter() - started)
    size = out.stat().st_size
    remove(out)
    return {"name": "copy of the checkpoint", "seconds": sorted(seconds)[ROUNDS // 2], "bytes": size, "peak_bytes": 0}


def make(runs: Path) -> None:
    """Measures everything."""
    rows = []
    out = runs / "out"
    for grid in GRIDS:
        run = runs / f"1b_{grid}"
        # In a process of its own: a child's peak memory counts what its parent held when it was started.
        subprocess.run([sys.executable, __file__, f"--runs={run}", f"--make={grid}"], cwd=ROOT, check=True)
        if grid == GRIDS[0]:
            rows.append(copy(run / "checkpoints" / "qat" / "1" / "state", out))
            for rest in ("BF16", "F32", "Q8_0"):
                command = export(run, "control", "gguf", out, rest)
                rows.append(measure(f"gguf, {rest}", command, out))
        rows.append(measure(f"gguf, experts {grid}, the rest BF16", export(run, "qat", "gguf", out, "BF16"), out))
        if grid == GRIDS[0]:
            rows.append(measure("safetensors, BF16", export(run, "control", "safetensors", out, "BF16"), out))
            trunk = runs / "imported"
            command = ["qatmoe.import_hf", str(out), "--out", str(trunk)]
            rows.append(measure("import of that folder", command, trunk, LIMIT))
            remove(trunk)
        if grid != GRIDS[0]:
            remove(run)
    cfg, _ = cli.parse(["x", f"--config={ROOT}/configs/h100_1b.py"], "", {})
    largest, total = sizes(cfg)
    result = {"rows": rows, "largest_tensor_bytes": largest, "parameters": total, "cpus": os.cpu_count()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def export(run: Path, branch: str, form: str, out: Path, rest: str) -> list[str]:
    """The export command."""
    return ["qatmoe.export", f"--run={run}", f"--branch={branch}", f"--format={form}", f"--out={out}", f"--rest={rest}"]


def sizes(cfg: Config) -> tuple[int, int]:
    """Bytes of the largest tensor of the checkpoint, and the number of parameters."""
    counts = [math.prod(shape) for shape in param_shapes(cfg.model).values()]
    return 4 * max(counts), sum(counts)


def table(result: dict) -> str:
    """Rows for docs/deploy.md."""
    lines = ["| | written | s | MB/s | peak memory |", "|---|---|---|---|---|"]
    for r in result["rows"]:
        peak = f"{r['peak_bytes'] / 2**30:.2f} GiB" if r["peak_bytes"] else ""
        peak += f" (of which not file cache: below {r['limit'] >> 30} GiB, enforced)" if r.get("limit") else ""
        speed = r["bytes"] / r["seconds"] / 1e6
        lines.append(f"| {r['name']} | {r['bytes'] / 1e9:.2f} GB | {r['seconds']:.1f} | {speed:.0f} | {peak} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{result['parameters']:,} parameters, {4 * result['parameters'] / 1e9:.2f} GB of f32 read; largest tensor "
            f"{result['largest_tensor_bytes'] / 2**30:.2f} GiB; {result['cpus']} cores, median of {ROUNDS}.",
        ]
    )


def write() -> None:
    """Puts the table between its markers in docs/deploy.md."""
    fill_tables(ROOT / "docs" / "deploy.md", {"speed": table(json.loads(RESULTS.read_text()))})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "deploy", help="where the runs lie")
    parser.add_argument("--write", action="store_true", help="only write the table into the documentation")
    parser.add_argument("--make", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_run(options.runs, options.make)
        return
    if not options.write:
        make(options.runs.absolute())
    write()


if __name__ == "__main__":
    main()
