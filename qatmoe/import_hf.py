"""Makes a run of a Hugging Face model: a trunk that QAT branches from.

    python -m qatmoe.import_hf models/Qwen3-30B-A3B --out runs/qwen3
    python -m qatmoe.train --config runs/qwen3/qat.py --workdir runs/qwen3_qat --config.data.source=TEXT

DIR holds config.json, tokenizer.json and model.safetensors (or shards and their index) of a Qwen3-MoE, OLMoE, GLM-4-MoE
or dots1 model. Nothing in it is executed or unpickled. The model may be larger than memory.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qatmoe import cli
from qatmoe.convert.hf_import import import_folder
from qatmoe.errors import UserError
from qatmoe.files import check_local


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 imported, 1 the disk failed, 2 unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m qatmoe.import_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="DIR", help="folder of the Hugging Face model")
    parser.add_argument("--out", required=True, help="folder of the run to make")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    parser.add_argument("--drop_mtp", action="store_true", help="leave the MTP modules out")
    args = parser.parse_args(argv)
    try:
        check_local(args.out, "--out")
        model = import_folder(Path(args.source), Path(args.out), drop_mtp=args.drop_mtp, force=args.force)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    out = Path(args.out)
    print(f"{out}: {model.n_layers} layers, {model.n_experts} experts, {model.n_mtp} MTP modules")
    job = ["python", "-m", "qatmoe.train", "--config", f"{out}/qat.py", "--workdir", f"{out}_qat"]
    print(f"next: {shlex.join(job)} --config.data.source=TEXT")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
