"""The training step on one GPU beside the peer's: every grid, parts, memory, compile time, loading data.

    python experiments/throughput/run.py            measures, writes h100.json and the table of the README
    python experiments/throughput/run.py --only peer,mxfp4     measures these anew, and keeps the rest of h100.json
    python experiments/throughput/run.py --out FOLDER          h100.json there; where there is none, what it keeps is
                                                               that of this folder
    python experiments/throughput/run.py --write    writes the table from h100.json

What a program has measured is in FOLDER when it is killed, too: h100.json is written after every program, and the rows
of the one that runs are in running.json.

Needs an NVIDIA GPU, `pip install -e '.[gpu]'`, and torch and transformers for the peer (peer.py). Both programs are
timed at several batch sizes, and each program's best counts: `ratio_to_peer` is qatmoe's tokens per second by the
peer's, and there is none before all sizes were tried in both on one GPU; `qat_overhead` the cost of Q2_0 with learned
scales at batch 16, measured step by step beside the bf16 step. Not the same in both: the peer drops no tokens and keeps
bf16 parameters and moments; qatmoe drops what its capacity does not hold (the column says how much), keeps f32 masters
and second moments, clips by the gradient's norm and balances its router. GiB: buffers that XLA plans for qatmoe, the
allocator's peak for the peer.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qatmoe.report import fill_tables
from qatmoe.text_table import markdown

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BATCHES = (8, 16, 32)
GRIDS = ("q2_0", "ternary", "ternary_256", "q2_k", "q3_k", "q4_0", "iq4_nl", "mxfp4", "nvfp4", "q8_0")
STEPS = ("peer", "bf16", "best", *GRIDS, "parts", "data", "fine", "small", "eager")
BESIDE = (*GRIDS, "parts", "data")  # of these the full-precision step is not a row again
PROGRAM_S = 540  # that one program may take


def peer(batch: int, *flags: str) -> dict:
    """One row of the peer; a failure (memory) is a row too."""
    done = _python(str(HERE / "peer.py"), f"--batch={batch}", *flags)
    if done.returncode:
        return {"variant": "transformers", "batch_size": batch, **_failure(done)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(running: Path, config: str, batch: int, *flags: str) -> dict:
    """What `qatmoe.benchmark` measures, as its JSON, which it writes to `running`; a failure is a result too."""
    running.unlink(missing_ok=True)
    options = [f"--config={ROOT / config}", f"--json={running}", f"--config.train.batch_size={batch}", *flags]
    done = _python("-m", "qatmoe.benchmark", *options)
    print(done.stdout, flush=True)
    found = json.loads(running.read_text()) if running.exists() else {"config": Path(config).stem, "batch_size": batch}
    return {"rows": []} | found | (_failure(done) if done.returncode else {})


def _python(*args: str) -> subprocess.CompletedProcess:
    """A program that has the GPU for itself. Its memory is taken at once: what grows in pieces holds less."""
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93", "JAX_PLATFORMS": "cuda"}  # no GPU: an error, not a CPU's figures
    command = [sys.executable, *args]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=os.environ | own, timeout=PROGRAM_S
        )
    except subprocess.TimeoutExpired as e:
        said = e.stderr.decode(errors="replace") if isinstance(e.stderr, bytes) else e.stderr or ""
        return subprocess.CompletedProcess(command, 124, "", f"{said}\nError: it took more than {PROGRAM_S} s")


def _failure(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Why a program failed: the last line that names an error, for the table, and the end of what it said."""
    lines = [" ".join(line.replace("|", "/").split()) for line in done.stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\w*Error\b|^error:", line)]
    said = (named or lines or ["it said nothing"])[-1]
    return {"failed": f"exit {done.returncode}: {said[:200]}", "stderr": done.stderr[-4000:]}


def measure(only: set[str], found: dict, out: Path) -> None:
    """Measures what is asked for, and writes it and `found`, what was measured before, after every program."""
    big, fine, small = (f"configs/{name}.py" for name in ("h100_1b", "h100_fine", "h100_study"))
    running = out / "running.json"
    of = lambda *arguments: functools.partial(ours, running, *arguments)  # noqa: E731
    programs: dict[str, list[Callable[[], dict]]] = {
        "peer": [functools.partial(peer, b) for b in BATCHES],
        "bf16": [of(big, b, "--grids=none") for b in BATCHES],
        "best": [of(big, 16, "--grids=q2_0", "--scales=learned")],
        **{grid: [of(big, 8, f"--grids={grid}", "--scales=learned", "--rounds=10")] for grid in GRIDS},
        "parts": [of(big, 8, "--grids=none", "--parts=yes")],
        "data": [of(big, 8, "--grids=none", "--data=yes")],
        "fine": [of(fine, 8, "--grids=none", "--parts=yes")],
        "small": [of(small, 128, "--grids=q2_0")],
        "eager": [lambda: peer(BATCHES[0], "--no-compile")],
    }
    for name in [n for n in STEPS if n in only]:
        before = found.get(name, [])
        for n, program in enumerate(programs[name], 1):
            found[name] = [*found.get(name, [])[: n - 1], program(), *before[n:]]
            (out / "h100.json").write_text(json.dumps(summary(found), indent=1) + "\n")
    running.unlink(missing_ok=True)


def summary(found: dict) -> dict:
    """The figures that are asked of it, and all rows."""
    theirs = [*found.get("peer", []), *found.get("eager", [])]
    peers = [r["tokens_per_s"] for r in found.get("peer", []) if "failed" not in r]
    results = [(name, r) for name in STEPS if name not in ("peer", "eager") for r in found.get(name, [])]
    bf16 = [r["rows"][0]["tokens_per_s"] for r in found.get("bf16", []) if r["rows"]]
    # The best of some batch sizes is no program's best, and another GPU's figures are no comparison.
    tried = all(len(found.get(name, [])) == len(BATCHES) for name in ("peer", "bf16"))
    devices = {r["device"] for r in (*found.get("peer", []), *found.get("bf16", [])) if "device" in r}
    learned = [
        row["cost"]
        for r in found.get("best", [])
        for row in r["rows"]
        if row["variant"] == "q2_0, learned scales" and "failed" not in row
    ]
    rows = [row for name, r in results for row in _rows(name, r)]
    return {
        "ratio_to_peer": max(bf16) / max(peers) if bf16 and peers and tried and len(devices) == 1 else None,
        "qat_overhead": learned[0] if learned else None,
        "device": next((r["device"] for _, r in results if r["rows"]), None),
        "rows": [*theirs, *rows],
        "results": found,
    }


def _rows(name: str, r: dict) -> list[dict]:
    """The rows of one program, the last of which says why it did not come to its end."""
    rows = r["rows"][1:] if name in BESIDE else r["rows"]
    failed = [{"variant": f"{name}: the rest", "failed": r["failed"]}] if "failed" in r else []
    return [{"config": r["config"], "batch_size": r["batch_size"], **row} for row in rows + failed]


def table(result: dict) -> str:
    """The README's tables, and what was measured beside steps."""
    head = ["model", "step", "batch", "ms", "tokens/s", "model TFLOP/s", "of the ceiling", "QAT cost", "GiB"]
    lines = [[*head, "compile s", "dropped"]]
    for r in result["rows"]:
        where = [r.get("config", "Qwen3-MoE"), r.get("variant", "full precision"), str(r["batch_size"])]
        if "failed" in r:
            lines.append([*where, r["failed"].replace("|", "/"), *[""] * 7])
            continue
        share = f"{r['ceiling_share']:.1%}" if "ceiling_share" in r else ""
        cost = f"{r['cost']:+.1%}" if "scales" in r["variant"] else ""
        dropped = f"{r['dropped']:.2%}" if "dropped" in r else ""
        speed = [f"{r['step_ms']:.1f}", f"{r['tokens_per_s']:,.0f}", f"{r['model_tflops']:.0f}"]
        took = [f"{r['peak_bytes'] / 2**30:.1f}", f"{r['compile_s']:.0f}"]
        lines.append([*where, *speed, share, cost, *took, dropped])
    found = [
        markdown(lines),
        f"On {result['device']}. Ratio to the peer {result['ratio_to_peer']}, QAT {result['qat_overhead']}.",
    ]
    found += [text for name in STEPS for r in result["results"].get(name, []) for text in _more(r)]
    return "\n\n".join(found)


def _more(r: dict) -> list[str]:
    """What a program measured beside steps: loading data, and the parts of a step, each alone."""
    found = []
    if d := r.get("data"):
        found.append(
            f"{r['config']} over its text: {d['real_tokens_per_s']:,.0f} tokens/s, {d['ratio']:.1%} of those without "
            "loading."
        )
    if r.get("parts"):
        step_ms = r["rows"][0]["step_ms"]
        lines = [[f"{r['config']}, batch {r['batch_size']}: part", "ms each", "times", "of the step"]]
        for p in r["parts"]:
            if "failed" in p:
                lines.append([p["part"], p["failed"].replace("|", "/"), str(p["times"]), ""])
            else:
                share = f"{p['ms'] * p['times'] / step_ms:.1%}"
                lines.append([p["part"], f"{p['ms']:.2f}", str(p["times"]), share])
        found.append(markdown(lines))
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS), help=f"of {', '.join(STEPS)}; all by default")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of h100.json; that of this file by default")
    parser.add_argument("--write", action="store_true", help="only write the README's table from h100.json")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    result = args.out / "h100.json"
    if not args.write:
        args.out.mkdir(parents=True, exist_ok=True)
        earlier = [file for file in (result, HERE / result.name) if file.exists()]
        before = json.loads(earlier[0].read_text())["results"] if earlier else {}
        measure(set(args.only.split(",")), before, args.out.absolute())
    fill_tables(HERE / "README.md", {"gpu": table(json.loads(result.read_text()))})


if __name__ == "__main__":
    main()
