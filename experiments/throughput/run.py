"""The training step on one GPU beside the peer's: every grid, parts, memory, compile time, loading data.

    python experiments/throughput/run.py            measures, writes h100.json and the table of the README; 25 minutes
    python experiments/throughput/run.py --only peer,bf16      measures these anew, and keeps the rest of h100.json
    python experiments/throughput/run.py --write    writes the table from h100.json

Needs an NVIDIA GPU, and torch and transformers for the peer (peer.py). Both programs are timed at several batch sizes,
and each program's best counts: `ratio_to_peer` is qatmoe's tokens per second by the compiled peer's, `qat_overhead` the
cost of Q2_0 with learned scales at batch 16, measured step by step beside the bf16 step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qatmoe.report import fill_tables

HERE = Path(__file__).parent
RESULT = HERE / "h100.json"
BATCHES = (8, 16, 32)
STEPS = ("peer", "bf16", "grids", "fine", "small")


def peer(batch: int) -> dict:
    """One row of the peer; a failure (memory) is a row too."""
    done = subprocess.run(
        [sys.executable, str(HERE / "peer.py"), f"--batch={batch}"], capture_output=True, text=True, env=_env()
    )
    if done.returncode:
        return {"variant": "transformers compiled", "batch_size": batch, "failed": done.stderr.strip()[-300:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(config: str, batch: int, *flags: str) -> dict:
    """What `qatmoe.benchmark` measures, as its JSON; a failure is a result too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "qatmoe.benchmark", f"--config={config}", f"--json={out}", *flags]
        done = subprocess.run(
            [*command, f"--config.train.batch_size={batch}"], capture_output=True, text=True, env=_env()
        )
        print(done.stdout, flush=True)
        if done.returncode:
            return {"config": config, "batch_size": batch, "failed": done.stderr.strip()[-300:], "rows": []}
        return json.loads(out.read_text())


def _env() -> dict[str, str]:
    """One program at a time has the GPU, and takes what it needs as it goes."""
    return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def measure(only: set[str], found: dict) -> dict:
    """`found`, with all that is asked for measured anew."""
    big = "configs/h100_1b.py"
    if "peer" in only:
        found["peer"] = [peer(b) for b in BATCHES]
    if "bf16" in only:
        found["bf16"] = [ours(big, b, "--grids=none") for b in BATCHES]
    if "grids" in only:
        found["grids"] = ours(big, 8, "--grids=all", "--scales=learned", "--parts=yes", "--data=yes", "--rounds=10")
        found["best"] = ours(big, 16, "--grids=q2_0", "--scales=learned,dynamic")
    if "fine" in only:
        found["fine"] = ours("configs/h100_fine.py", 8, "--grids=none", "--parts=yes")
    if "small" in only:
        found["small"] = ours("configs/moe_2bit.py", 256, "--grids=q2_0")
    return found


def summary(found: dict) -> dict:
    """The figures that are asked of it, and all rows."""
    peers = [r["tokens_per_s"] for r in found.get("peer", []) if "failed" not in r]
    bf16 = [r["rows"][0]["tokens_per_s"] for r in found.get("bf16", []) if r["rows"]]
    learned = [r["cost"] for r in found.get("best", {}).get("rows", []) if r["variant"] == "q2_0, learned scales"]
    results = [*found.get("bf16", []), *(found[k] for k in ("grids", "best", "fine", "small") if k in found)]
    rows = [
        {"config": r["config"], "batch_size": r["batch_size"], **row}
        for r in results
        for row in (r["rows"] or [{"failed": r["failed"]}])
    ]
    return {
        "ratio_to_peer": max(bf16) / max(peers) if bf16 and peers else None,
        "qat_overhead": learned[0] if learned else None,
        "device": next((r["device"] for r in results if r["rows"]), None),
        "rows": [*found.get("peer", []), *rows],
        "results": found,
    }


def table(result: dict) -> str:
    """The README's table."""
    heads = (
        "model | step | batch | ms | tokens/s | model TFLOP/s | of the ceiling | QAT cost | GiB | compile s | dropped"
    )
    lines = [f"| {heads} |", "|---" * (heads.count("|") + 1) + "|"]
    for r in result["rows"]:
        where = f"| {r.get('config', 'Qwen3-MoE')} | {r.get('variant', 'full precision')} | {r['batch_size']}"
        if "failed" in r:
            lines.append(f"{where} | failed: {r['failed'].splitlines()[-1][:80]} | | | | | | | |")
            continue
        share = f"{r['ceiling_share']:.1%}" if "ceiling_share" in r else ""
        cost = f"{r['cost']:+.1%}" if "scales" in r["variant"] else ""
        dropped = f"{r['dropped']:.2%}" if "dropped" in r else ""
        lines.append(
            f"{where} | {r['step_ms']:.1f} | {r['tokens_per_s']:,.0f} | {r['model_tflops']:.0f} | {share} | {cost} | "
            f"{r['peak_bytes'] / 2**30:.1f} | {r['compile_s']:.0f} | {dropped} |"
        )
    lines.append(f"\nOn {result['device']}. Ratio to the peer {result['ratio_to_peer']}, QAT {result['qat_overhead']}.")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS), help=f"of {', '.join(STEPS)}; all by default")
    parser.add_argument("--write", action="store_true", help="only write the README's table from h100.json")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    if not args.write:
        before = json.loads(RESULT.read_text())["results"] if RESULT.exists() else {}
        RESULT.write_text(json.dumps(summary(measure(set(args.only.split(",")), before)), indent=1) + "\n")
    fill_tables(HERE / "README.md", {"gpu": table(json.loads(RESULT.read_text()))})


if __name__ == "__main__":
    main()
