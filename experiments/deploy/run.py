"""Is the exported file the trained model? Every grid, every file format, three levels; then drafts in llama-server.

    python experiments/deploy/run.py [--runs DIR]     trains, exports, verifies: 15 minutes on 2 cores
    python experiments/deploy/run.py --write          writes the tables from results.json into the documentation

Needs the extra `deploy`, and llama-server on PATH or in the folder that $QATMOE_LLAMA_CPP names
(tests/build_llama_cpp.sh builds it). Finished runs under DIR are not repeated.
"""

import argparse
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from qatmoe.convert import compressed, gguf_model, huggingface_model, llama
from qatmoe.convert.verify import Report, verify_gguf, verify_huggingface
from qatmoe.convert.weights import Branch
from qatmoe.quant.grid import GRIDS
from qatmoe.report import fill_tables

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
TOKENS = 4096
PROMPTS = ("She had been looking at him with", "The old house stood", "It was in the month of")


def train(config: str, workdir: Path, *overrides: str) -> None:
    """Trains a run, or finds it finished."""
    command = ["qatmoe.train", f"--config=configs/{config}.py", f"--workdir={workdir}", *overrides]
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)


def export_all(run: Path, grid: str, out: Path) -> list[dict]:
    """One row for each file format that holds the grid."""
    rows = []
    for kind in GRIDS[grid].gguf:
        with Branch(run, "qat", rest="F32", ternary=kind if grid == "ternary_256" else "TQ2_0") as branch:
            arch = gguf_model.write(branch, out / f"{grid}-{kind}.gguf", force=True)
            rows.append(row(grid, kind, verify_gguf(branch, out / f"{grid}-{kind}.gguf", arch, TOKENS)))
    for packed in (False, True):
        if packed and grid not in compressed.FORMATS:
            continue
        name = f"compressed-tensors, {compressed.FORMATS[grid]}" if packed else "safetensors"
        rest = "BF16" if GRIDS[grid].bf16_exact else "F32"
        with Branch(run, "qat", rest=rest) as branch:
            folder = out / f"{grid}-{'packed' if packed else 'plain'}"
            arch = huggingface_model.write(branch, folder, packed=packed, force=True)
            rows.append(row(grid, f"{name} ({rest})", verify_huggingface(branch, folder, arch, packed=packed)))
    return rows


def row(grid: str, file: str, report: Report) -> dict:
    """A report as JSON."""
    print(f"{grid} as {file}\n{report.text()}", flush=True)
    return {"grid": grid, "file": file, "ok": report.ok, **dataclasses.asdict(report)}


def find_server() -> str:
    """The program. Ends this one where there is none."""
    server = shutil.which("llama-server", path=os.environ.get("QATMOE_LLAMA_CPP", os.environ["PATH"]))
    if server is None:
        raise SystemExit("no llama-server on PATH or in $QATMOE_LLAMA_CPP: build it with tests/build_llama_cpp.sh")
    return server


def generate(model: Path, *options: str) -> list[dict]:
    """llama-server's greedy continuations of PROMPTS: text, drafted and accepted tokens."""
    server = find_server()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [server, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "512", "-np", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        return [complete(port, prompt) for prompt in PROMPTS]
    finally:
        process.kill()
        process.wait()


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Returns when the server answers."""
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("llama-server does not answer")


def complete(port: int, prompt: str) -> dict:
    """One greedy completion."""
    body = {"prompt": prompt, "n_predict": 64, "temperature": 0, "top_k": 1, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    timings = found["timings"]
    return {
        "prompt": prompt,
        "text": found["content"],
        "drafted": timings.get("draft_n", 0),
        "accepted": timings.get("draft_n_accepted", 0),
    }


def make(runs: Path) -> None:
    """Trains what is missing, exports, verifies, generates."""
    find_server()  # before a quarter of an hour of work
    trunk, out = runs / "trunk", runs / "files"
    out.mkdir(parents=True, exist_ok=True)
    train("every_grid", trunk, "--config.train.phases.qat.steps=1", "--config.train.phases.qat.decay=1")
    rows = []
    for grid in GRIDS:
        options = (f"--config.quant.experts={grid}", f"--config.quant.attention={grid}", f"--config.init_from={trunk}")
        train("every_grid", runs / grid, *options)
        rows += export_all(runs / grid, grid, out)
    main_job = runs / "moe_2bit"
    train("moe_2bit", main_job)
    for phase, rest in (("control", "F32"), ("qat", "F32"), ("qat", "BF16"), ("qat", "Q8_0")):
        with Branch(main_job, phase, rest=rest) as branch:
            path = out / f"moe_2bit-{phase}-{rest}.gguf"
            arch = gguf_model.write(branch, path, force=True)
            rows.append(row("default model", f"{phase}, the rest {rest}", verify_gguf(branch, path, arch, TOKENS)))
    model = out / "moe_2bit-qat-BF16.gguf"
    drafts = generate(model, "--spec-type", "draft-mtp", "--spec-draft-n-max", "2")
    result = {"rows": rows, "drafts": drafts, "plain": generate(model), "llama_cpp_python": llama.installed()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


# ---- tables ----------------------------------------------------------------------------------------------------------


def grid_table(rows: list[dict]) -> str:
    """Grid x level x result."""
    head = "| grid | file | L0 equal tensors | L1 max difference, by | L2 KLD, same top-1 | L2, activations rounded |"
    lines = [head, "|---|---|---|---|---|---|"]
    for r in rows:
        tensors, same = (sum(k[key] for k in r["rows"]) for key in ("tensors", "same_bytes"))
        decoders: dict[str, float] = {}
        for kind in r["rows"]:
            for who, diff in kind["max_diff"].items():
                decoders[who] = max(decoders.get(who, 0.0), diff)
        l1 = ", ".join(f"{diff:g} {who}" for who, diff in decoders.items() if who != "numpy") or "0 numpy"
        l2 = [f"{f['kld']:.1e}, {f['same_top1']:.2%}" for f in r["l2"].values()]
        file = r["file"] if r["ok"] else f"{r['file']} **failed**"
        l2 = [*l2[:1], "; in float32 ".join(l2[1:]), ""]  # a third one, where rounding activations is chaotic
        lines.append(f"| {r['grid']} | {file} | {same}/{tensors} | {l1} | {l2[0]} | {l2[1]} |")
    return "\n".join(lines)


def draft_table(result: dict) -> str:
    """Drafts of the MTP module in llama-server."""
    lines = ["| prompt | drafted | accepted | same text without drafts |", "|---|---|---|---|"]
    for drafted, plain in zip(result["drafts"], result["plain"], strict=True):
        same = "yes" if drafted["text"] == plain["text"] else "**no**"
        lines.append(f"| {drafted['prompt']} | {drafted['drafted']} | {drafted['accepted']} | {same} |")
    return "\n".join([*lines, "", f"llama-cpp-python {result['llama_cpp_python']}, 64 tokens each."])


def write() -> None:
    """Puts the tables between their markers in docs/deploy.md."""
    result = json.loads(RESULTS.read_text())
    fill_tables(ROOT / "docs" / "deploy.md", {"grids": grid_table(result["rows"]), "drafts": draft_table(result)})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "deploy", help="where the runs lie")
    parser.add_argument("--write", action="store_true", help="only write the tables into the documentation")
    options = parser.parse_args()
    if not options.write:
        make(options.runs.absolute())
    write()


if __name__ == "__main__":
    main()
