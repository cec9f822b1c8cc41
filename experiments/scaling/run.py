"""What the big configs take on TPUs that are not there: plans, the cost of QAT, weak scaling.

    python experiments/scaling/run.py                     compiles everything, one by one, and writes the tables
    python experiments/scaling/run.py --only 30b weak     only the jobs whose names begin so
    python experiments/scaling/run.py --write             only the tables, from the reports

Needs libtpu (`pip install -e '.[tpu]'`) and no TPU. A job takes one to ten minutes and 3 to 4 GiB.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from qatmoe.report import fill_tables
from qatmoe.text_table import markdown
from qatmoe.topology import GIB, parse

HERE = Path(__file__).parent
REPORTS = HERE / "reports"
Report = dict[str, Any]

MODELS = {
    "30b": ("qwen3_30b_a3b", "v5p:4x4x8", "qat"),
    "30b_bf16": ("qwen3_30b_a3b", "v5p:4x4x8", "control"),
    "air": ("glm_4_5_air", "v5p:4x8x8", "qat"),
    "235b": ("qwen3_235b_a22b", "v5p:8x8x8", "qat"),
}
WEAK = ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8", "v5p:8x16x16", "v5p:16x16x16")


def jobs() -> dict[str, list[str]]:
    """{name: arguments of qatmoe.train}."""
    found = {
        name: [f"--config=configs/{config}.py", f"--topology={topology}", f"--phase={phase}"]
        for name, (config, topology, phase) in MODELS.items()
    }
    for topology in WEAK:
        chips = parse(topology).size
        if chips == 128:
            continue  # is "30b"
        expert, fsdp = 8, min(16, chips // 8)  # a copy of the model on 128 chips; beyond them, more copies
        found[f"weak_{chips}"] = [
            "--config=configs/qwen3_30b_a3b.py",
            f"--topology={topology}",
            f"--config.mesh.data={chips // (expert * fsdp)}",
            f"--config.mesh.fsdp={fsdp}",
            f"--config.train.batch_size={chips}",
            f"--config.train.loss_chunk={1024 * chips}",
        ]
    return found


def compile_one(name: str, arguments: list[str]) -> None:
    """One report, in a process of its own: it gives its memory back."""
    command = ["-m", "qatmoe.train", *arguments, "--compile_only", "--nosuggest", f"--json={REPORTS / name}.json"]
    print(f"{name}: python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode > 1:
        sys.exit(f"{name}: failed")


def read(name: str) -> Report | None:
    """A report, if it was made."""
    path = REPORTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def plans() -> str:
    """The big configs."""
    head = ["config", "phase", "topology", "mesh data x fsdp x expert", "state GiB", "needed GiB", "head-room"]
    head += [
        "compiled TFLOP a device",
        "model TFLOP",
        "step s, at least",
        "waiting",
        "tokens/s a chip, at most",
        "compile s",
    ]
    rows = []
    for r in filter(None, map(read, MODELS)):
        state = sum(r["memory"][k] for k in ("master weights", "learned scales", "optimizer moments"))
        memory = [f"{state / GIB:.1f}", f"{r['memory']['needed'] / GIB:.1f}", f"{r['head_room']:.0%}"]
        rows.append([r["config"], r["phase"], r["topology"], mesh(r), *memory, *times(r), f"{r['compile_s']:.0f}"])
    return markdown([head, *rows], left=1) + "\n\n" + made_by()


def mesh(r: Report) -> str:
    """The axes that are used."""
    return "x".join(str(r["mesh"][axis]) for axis in ("data", "fsdp", "expert"))


def times(r: Report) -> list[str]:
    """Cells of a step that compiled."""
    if "seconds" not in r:
        return ["", "", "does not fit", "", ""]
    return [
        f"{r['matmul_flops'] / 1e12:.0f}", f"{r['model_flops'] / 1e12:.0f}", f"{r['seconds']['step']:.2f}",
        f"{r['exposed_share']:.0%}", f"{r['tokens_per_s_per_device']:,.0f}",
    ]  # fmt: skip


def twins() -> str:
    """QAT beside full precision."""
    qat, plain = read("30b"), read("30b_bf16")
    if not qat or not plain or "seconds" not in qat or "seconds" not in plain:
        return "Not compiled yet."
    rows = [["configs/qwen3_30b_a3b.py on v5p:4x4x8", "full precision", "Q2_0, learned scales", "QAT adds"]]
    for what, value in (
        ("matmul TFLOP a device", lambda r: r["matmul_flops"] / 1e12),
        ("main memory read and written, GB", lambda r: r["memory_bytes"] / 1e9),
        ("work, s: each kernel at the slower of its FLOPs and its bytes", lambda r: r["seconds"]["work"]),
        ("step, s", lambda r: r["seconds"]["step"]),
        ("sent by collectives, GB", lambda r: sum(c["sent_bytes"] for c in r["collectives"]) / 1e9),
        ("needed memory, GiB", lambda r: r["memory"]["needed"] / GIB),
    ):
        a, b = value(plain), value(qat)
        rows.append([what, f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.1%}"])
    return markdown(rows, left=1)


def weak() -> str:
    """The same sequences per chip on more chips."""
    head = [
        "chips",
        "topology",
        "mesh data x fsdp x expert",
        "needed GiB",
        "work s",
        "beside s",
        "waiting s",
        "step s, at least",
    ]
    head += ["waiting", "tokens/s a chip, at most", "of the smallest", "compile s"]
    rows, first = [], math.nan
    for topology in WEAK:
        chips = parse(topology).size
        r = read("30b" if chips == 128 else f"weak_{chips}")
        if not r or "seconds" not in r:
            continue
        t, speed = r["seconds"], r["tokens_per_s_per_device"]
        first = speed if math.isnan(first) else first
        memory = f"{r['memory']['needed'] / GIB:.1f}"
        seconds = [f"{t[k]:.2f}" for k in ("work", "overlapped", "waiting", "step")]
        shares = [f"{r['exposed_share']:.0%}", f"{speed:,.0f}", f"{speed / first:.0%}"]
        rows.append([str(r["devices"]), topology, mesh(r), memory, *seconds, *shares, f"{r['compile_s']:.0f}"])
    return markdown([head, *rows], left=1) + "\n\n" + made_by()


def made_by() -> str:
    """What compiled the reports that there are."""
    versions = {r["compiler"] for r in map(read, jobs()) if r}
    return f"Compiled, not run, by {'; '.join(sorted(versions)) or 'nothing yet'}."


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="only write the tables of the README")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of jobs")
    given = parser.parse_args()
    for name, arguments in jobs().items():
        if not given.write and name.startswith(tuple(given.only)):
            compile_one(name, arguments)
    fill_tables(HERE / "README.md", {"plans": plans(), "twins": twins(), "weak": weak()})


if __name__ == "__main__":
    main()
