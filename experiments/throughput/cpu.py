"""A training step of qatmoe beside MaxText's, on this machine's CPU, at one small shape.

    python experiments/throughput/cpu.py --maxtext PYTHON     times both, writes cpu.json and the table of the README
    python experiments/throughput/cpu.py --write              writes the table of the README from cpu.json

PYTHON is that of an environment of its own, Python 3.12 or newer, with `pip install 'maxtext[tpu]==0.2.5'` (MaxText
asks for another jax). Both train the same model (cpu_shape.py) in float32 with AdamW on random tokens; MaxText runs
each of its ways to multiply experts that a CPU has, and its best counts. The programs take turns, three rounds of each.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qatmoe.report import fill_tables

HERE = Path(__file__).parent
ROUNDS, STEPS, WARM_UP = 3, 40, 10
BATCH, LENGTH = 8, 128
SHAPE = {
    "decoder_block": "mixtral",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "base_emb_dim": 128,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 32,
    "base_mlp_dim": 256,
    "base_moe_mlp_dim": 256,
    "base_num_decoder_layers": 2,
    "vocab_size": 512,
    "per_device_batch_size": BATCH,
    "max_target_length": LENGTH,
    "attention": "dot_product",
    "dtype": "float32",
}
DENSE: dict[str, object] = {"sparse_matmul": "false", "megablox": "false"}
UNROLLED = {"scan_layers": "false"}
NO_REMAT = {"remat_policy": "minimal_with_context"}
SETTINGS = {  # of MaxText: how it multiplies experts, lays out layers, and keeps activations
    "every expert on every token": DENSE,
    "ragged_dot": {"sparse_matmul": "true", "megablox": "false"},
    "capacity 1.25": DENSE | {"capacity_factor": 1.25},
    "capacity 1.25, unrolled": DENSE | UNROLLED | {"capacity_factor": 1.25},
    "capacity 1.25, unrolled, activations kept": DENSE | UNROLLED | NO_REMAT | {"capacity_factor": 1.25},
}


def maxtext(python: str, settings: dict) -> float:
    """Median tokens per second of the steps after warming up."""
    find = "import maxtext, pathlib; print(pathlib.Path(maxtext.__path__[0]) / 'configs' / 'base.yml')"
    base = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as out:
        options = {
            "run_name": "cpu", "base_output_directory": out, "hardware": "cpu", "dataset_type": "synthetic",
            "enable_checkpointing": "false", "steps": STEPS, "skip_jax_distributed_system": "true",
            "enable_goodput_recording": "false", "monitor_goodput": "false", "log_config": "false",
        }  # fmt: skip
        command = [python, "-m", "maxtext.trainers.pre_train.train", base]
        command += [f"{k}={v}" for k, v in (options | SHAPE | settings).items()]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=out)
    seconds = [float(s) for s in re.findall(r"completed step: \d+, seconds: ([\d.]+)", done.stdout + done.stderr)]
    if done.returncode or len(seconds) < STEPS - 1:
        raise SystemExit(f"MaxText failed with {settings}:\n{(done.stdout + done.stderr)[-2000:]}")
    return BATCH * LENGTH / statistics.median(seconds[WARM_UP:])


def ours() -> float:
    """Median tokens per second of the full-precision step."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, "-m", "qatmoe.benchmark", f"--config={HERE / 'cpu_shape.py'}", f"--json={out.name}"]
        subprocess.run([*command, f"--rounds={STEPS - WARM_UP}", "--grids=none"], check=True, capture_output=True)
        return json.loads(Path(out.name).read_text())["rows"][0]["tokens_per_s"]


def measure(python: str) -> dict:
    """All rounds of all programs, tokens per second."""
    rows: dict[str, list[float]] = {"qatmoe": []}
    for _ in range(ROUNDS):
        rows["qatmoe"].append(ours())
        for name, settings in SETTINGS.items():
            rows.setdefault(f"MaxText: {name}", []).append(maxtext(python, settings))
        print({k: round(v[-1]) for k, v in rows.items()}, flush=True)
    best = max((k for k in rows if k != "qatmoe"), key=lambda k: statistics.median(rows[k]))
    ratios = [a / b for a, b in zip(rows["qatmoe"], rows[best], strict=True)]
    return {"rows": rows, "best": best, "ratio": statistics.median(ratios), "ratios": ratios, "cores": os.cpu_count()}


def table(result: dict) -> str:
    """The README's table."""
    lines = ["| step | tokens/s (median, range of rounds) |", "|---|---|"]
    for name, speed in result["rows"].items():
        lines.append(f"| {name} | {statistics.median(speed):,.0f} ({min(speed):,.0f} .. {max(speed):,.0f}) |")
    low, high = min(result["ratios"]), max(result["ratios"])
    ratio = f"**{result['ratio']:.2f}** ({low:.2f} .. {high:.2f})"
    lines.append(
        f"\nqatmoe / MaxText's best: {ratio}, {result['cores']} cores; median and range of the rounds' own ratios."
    )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", help="python of an environment that has MaxText")
    parser.add_argument("--write", action="store_true", help="only write the README's table from cpu.json")
    args = parser.parse_args()
    if args.maxtext:
        (HERE / "cpu.json").write_text(json.dumps(measure(args.maxtext), indent=1) + "\n")
    elif not args.write:
        parser.error("give --maxtext PYTHON or --write")
    fill_tables(HERE / "README.md", {"cpu": table(json.loads((HERE / "cpu.json").read_text()))})


if __name__ == "__main__":
    main()
