"""Makes a run of a Hugging Face model: a trunk that QAT branches from.

    python -m qatmoe.import_hf models/Qwen3-30B-A3B --out runs/qwen3
    python -m qatmoe.train --config runs/qwen3/qat.py --workdir runs/qwen3_qat --config.data.source=TEXT

DIR holds config.json, tokenizer.json and model.safetensors (or shards and their index) of a Qwen3-MoE, OLMoE, GLM-4-MoE
or dots1 model. Nothing in it is executed or unpickled. The model may be larger than memory.

A dense model (Llama, Mistral, Qwen2, Qwen3) becomes a MoE that computes the same, by sparse upcycling: each FFN is cut
into --shards; --shared of them become shared experts, each of the others --copies routed ones; a token goes to the
shards of the --active best copies.

    python -m qatmoe.import_hf models/Qwen3-0.6B --out runs/moe --copies 4 --shards 4 --shared 1
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qatmoe import cli
from qatmoe.config import ModelConfig
from qatmoe.convert import names
from qatmoe.convert.hf_import import import_folder
from qatmoe.convert.upcycle import Upcycling
from qatmoe.convert.vocab import gguf_fields
from qatmoe.data import tokenizer
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
    dense = parser.add_argument_group("of a dense model")
    dense.add_argument("--copies", type=int, metavar="N", help="routed experts that each routed shard becomes")
    dense.add_argument("--shards", type=int, metavar="N", help="parts that its FFN is cut into (1)")
    dense.add_argument("--shared", type=int, metavar="N", help="of them shared experts (0)")
    dense.add_argument("--active", type=int, metavar="N", help="copies that a token goes to (1)")
    dense.add_argument("--seed", type=int, help="of the router, which is new (0)")
    args = parser.parse_args(argv)
    source, out = Path(args.source), Path(args.out)
    try:
        check_local(args.out, "--out")
        upcycling = _upcycling(args)
        model = import_folder(source, out, drop_mtp=args.drop_mtp, upcycling=upcycling, force=args.force)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    if upcycling:
        print(f"{out}: {_files(out, model)}")
    print(f"{out}: {model.n_layers} layers, {model.n_experts} experts, {model.n_mtp} MTP modules")
    job = ["python", "-m", "qatmoe.train", "--config", f"{out}/qat.py", "--workdir", f"{out}_qat"]
    print(f"next: {shlex.join(job)} --config.data.source=TEXT")
    return 0


def _upcycling(args: argparse.Namespace) -> Upcycling | None:
    given = {name: getattr(args, name) for name in ("copies", "shards", "shared", "active", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and "copies" not in given:
        raise UserError(f"--{next(iter(given))} says how a dense model becomes a MoE: give --copies too")
    return Upcycling(**given) if given else None


def _files(out: Path, model: ModelConfig) -> str:
    """What a model can be exported as."""
    found = []
    for form, table in (("gguf", names.GGUF), ("safetensors", names.HUGGINGFACE)):
        try:
            arch = names.architecture(model, table)
            if form == "gguf":
                gguf_fields(tokenizer.load(str(out / "tokenizer.json")), model.vocab_size)
            found.append(f"{form} ({arch})")
        except UserError as e:
            found.append(f"no {form}: {e}")
    return "; ".join(found)


if __name__ == "__main__":
    sys.exit(cli.run(main))
