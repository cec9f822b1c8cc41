"""The audit of the default run: table and plot of the main README, the whole table of docs/audit.md.

    python experiments/audit/run.py [--runs DIR]    trains configs/moe_2bit.py if need be, audits, scores tasks; then
                                                    caches, on a model whose heads llama.cpp rotates
    python experiments/audit/run.py --write         writes the tables from what lies beside this file

Needs the extras `deploy` (llama.cpp's types) and `eval` (tasks). The audit alone is one command:
python -m qatmoe.evaluate --run runs/moe_2bit
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from qatmoe.audit_report import markdown, rivals
from qatmoe.report import fill_tables

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'moe_2bit.py'}"
CACHED = {  # a model for caches: heads of 64, which llama.cpp rotates, windows of 512, half the steps
    "name": "moe_2bit_cache",
    "model.head_dim": 64,
    "data.seq_len": 512,
    "train.batch_size": 4,
    "train.phases.trunk.steps": 450,
    **{f"train.phases.{phase}.{key}": 275 for phase in ("control", "qat") for key in ("steps", "decay")},
}
BRANCHES = ("control", "qat")
AGAIN = ("Q4_0", "Q2_0")  # conversions of the QAT model


def run(*args: str) -> None:
    """Runs a module of the project from its root; stops everything if it fails."""
    subprocess.run([sys.executable, "-m", *args], cwd=ROOT, check=True)


def make(runs: Path) -> None:
    """Trains, audits, scores; copies the results."""
    main, cache = runs / "moe_2bit", runs / "moe_2bit_cache"
    run("qatmoe.train", CONFIG, f"--workdir={main}")
    started = time.perf_counter()
    run("qatmoe.evaluate", f"--run={main}")
    seconds = time.perf_counter() - started
    run("qatmoe.tasks", f"--run={main}", "--branch", *BRANCHES)
    for name in ("audit.json", "audit.png", "tasks.json"):
        shutil.copy(main / name, HERE / name)
    cached = "JAX_COMPILATION_CACHE_DIR" in os.environ
    cost = {"seconds": seconds, "cores": os.cpu_count(), "compilation_cache": cached}
    (HERE / "cost.json").write_text(json.dumps(cost) + "\n")
    run("qatmoe.train", CONFIG, f"--workdir={cache}", *(f"--config.{key}={value}" for key, value in CACHED.items()))
    run("qatmoe.evaluate", f"--run={cache}", "--rows=^(control|qat)$|/kv/")
    for name in ("audit.json", "audit.png"):
        shutil.copy(cache / name, HERE / name.replace("audit", "cache"))


def chosen(rows: list[dict]) -> set[str]:
    """The rows that the main README shows: branches, the roundings to hold QAT against, with and without joined rows,
    conversions of the QAT model, and caches.
    """
    in_files = [r for r in rows if r["joined_rows"] == 1]
    beside = [r for qat in rows if qat["group"] == "qat" for of in (rows, in_files) for r in rivals(of, qat) if r]
    names = {r["row"] for r in beside} | {f"control/q2_0/{rule}" for rule in ("absmax", "search")} | set(BRANCHES)
    names |= {f"qat/{kind}/stock" for kind in AGAIN}
    return names | {f"{branch}/kv/q4_0" for branch in BRANCHES}


def tasks_table(rows: list[dict]) -> str:
    """Scores of the branches and their difference, as `qatmoe.tasks` measured them."""
    lines = [f"| task | metric | {' | '.join(BRANCHES)} | difference |", "|---|---|---|---|---|"]
    for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in rows):
        of = {r["branch"]: r for r in rows if (r["task"], r["metric"]) == (task, metric)}
        cells = [f"{of[b]['value']:.4f} ±{of[b]['stderr']:.4f}" for b in BRANCHES]
        last = of[BRANCHES[-1]]
        cells.append(f"{last['difference']:+.4f} ±{last['difference_stderr']:.4f}")
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write() -> None:
    """Writes the tables of the main README and of docs/audit.md."""
    rows, cost = json.loads((HERE / "audit.json").read_text()), json.loads((HERE / "cost.json").read_text())
    minutes = f"{cost['seconds'] / 60:.1f} minutes on {cost['cores']} cores"
    minutes += ", with a compilation cache" if cost["compilation_cache"] else ""
    spent = f"{len(rows)} rows of {rows[0]['tokens']:,} tokens in {minutes}."
    fill_tables(ROOT / "README.md", {"audit": f"{markdown(rows, chosen(rows))}\n\n{spent}"})
    fill_tables(ROOT / "docs" / "audit.md", {
        "audit": markdown(rows),
        "cache": markdown(json.loads((HERE / "cache.json").read_text())),
        "tasks": tasks_table(json.loads((HERE / "tasks.json").read_text())["rows"]),
    })  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs lie")
    parser.add_argument("--write", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if not options.write:
        make(options.runs.absolute())
    write()


if __name__ == "__main__":
    main()
