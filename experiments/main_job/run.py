"""The main job at three seeds, and the cost of its fake quantization: makes the tables of the README.

    python experiments/main_job/run.py            trains what is not trained, benchmarks -> results.json, curves.png
    python experiments/main_job/run.py --write    writes the tables from results.json into README.md

The runs are those of sweep.py, which are the studies' trunks too.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from qatmoe.report import fill_tables

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG = ROOT / "configs" / "moe_2bit.py"
RUNS = ROOT / "runs" / "small_trunks"
RESULTS = HERE / "results.json"


def run(*args: str) -> None:
    """Runs a module of the project from its root; stops everything if it fails."""
    subprocess.run([sys.executable, "-m", *args], cwd=ROOT, check=True)


def make() -> None:
    """Trains the seeds, times the step, stores what the tables need."""
    run("launch.sweep", f"{HERE / 'sweep.py'}", "--slots=2")
    runs = [RUNS / run["name"] for run in json.loads((RUNS / "sweep.json").read_text())["runs"]]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    shutil.copy(runs[0] / "curves.png", HERE / "curves.png")
    timing = RUNS / "benchmark.json"
    run("qatmoe.benchmark", f"--config={CONFIG}", f"--json={timing}")
    result = {"runs": summaries, "benchmark": json.loads(timing.read_text())}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def spread(values: list[float]) -> str:
    """Mean and, in brackets, smallest and largest."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} .. {max(values):.4f})"


def loss_table(runs: list[dict]) -> str:
    """Validation losses over seeds, differences to each seed's own control."""
    rules = sorted(runs[0]["ptq_rules"]["control"])
    rows = {"trunk, where the branches begin": ([r["loss"]["trunk"] for r in runs], 16.0)}
    rows["control: the branch in full precision"] = ([r["loss"]["control"] for r in runs], 16.0)
    bits = runs[0]["bits_per_weight"]["quantized"]
    for rule in rules:
        rows[f"PTQ: control rounded, {rule} scales"] = ([r["ptq_rules"]["control"][rule] for r in runs], bits)
    rows["**QAT**: the branch trained on the grid"] = ([r["loss"]["qat"] for r in runs], bits)
    control = rows["control: the branch in full precision"][0]
    lines = [
        f"Validation loss, nats per token: mean (range) of {len(runs)} seeds. Bits per weight of the experts.",
        "",
        "| branch | bits | loss | above control |",
        "|---|---|---|---|",
    ]
    for name, (values, b) in rows.items():
        above = [v - c for v, c in zip(values, control, strict=True)]
        lines.append(f"| {name} | {b:g} | {spread(values)} | {spread(above) if any(above) else ''} |")
    recovered = [r["recovered"] for r in runs]
    lines += [
        "",
        f"**QAT recovers {statistics.mean(recovered):.1%}** of what PTQ loses, (PTQ - QAT) / (PTQ - control), PTQ at "
        f"its better scale rule: {', '.join(f'{r:.1%}' for r in recovered)}. The whole model takes "
        f"{runs[0]['bytes']['deployed'] / 1e6:.2f} MB instead of {runs[0]['bytes']['bf16'] / 1e6:.2f} MB in bfloat16. "
        f"{runs[0]['tokens']['total']:,.0f} tokens a seed.",
    ]
    return "\n".join(lines)


def benchmark_table(result: dict) -> str:
    """Step times as the benchmark measured them."""
    lines = ["| step | ms | tokens/s | cost (quartiles) |", "|---|---|---|---|"]
    for r in result["rows"]:
        low, high = r["cost_quartiles"]
        cost = "" if r is result["rows"][0] else f"{r['cost']:+.1%} ({low:+.1%} .. {high:+.1%})"
        lines.append(f"| {r['variant']} | {r['step_ms']:.0f} | {r['tokens_per_s']:,.0f} | {cost} |")
    machine = f"On {result['devices']} {result['device']} device, jax {result['jax']}."
    return "\n".join([*lines, "", f"{machine} Cost: median of the ratios of neighbouring steps."])


def write() -> None:
    """Puts the tables between their markers in README.md."""
    result = json.loads(RESULTS.read_text())
    tables = {"table": loss_table(result["runs"]), "benchmark": benchmark_table(result["benchmark"])}
    fill_tables(ROOT / "README.md", tables)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="only write the tables into README.md")
    options = parser.parse_args()
    if not options.write:
        make()
    write()


if __name__ == "__main__":
    main()
