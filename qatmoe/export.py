"""Writes a branch of a run as the file that is deployed.

    python -m qatmoe.export --run runs/moe_2bit --format gguf --out model.gguf --verify
    python -m qatmoe.export --run runs/moe_2bit --format safetensors --out model_hf

Formats:
    gguf                one file for llama.cpp; every weight in the bytes of the grid it was trained on
    safetensors         a Hugging Face folder; the numbers of the grids in bfloat16 (or float32, with --rest F32)
    compressed-tensors  a Hugging Face folder; codes and scales, for programs that serve them packed
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qatmoe import cli
from qatmoe.convert import gguf_model, huggingface_model, names
from qatmoe.convert.verify import Report, verify_gguf, verify_huggingface
from qatmoe.convert.weights import RESTS, Branch
from qatmoe.errors import UserError
from qatmoe.files import check_apart, check_free, check_local

FORMATS = ("gguf", "safetensors", "compressed-tensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 written (and verified), 1 the verification failed, 2 unusable input."""
    parser = _parser()
    args = parser.parse_args(argv)
    out = Path(args.out)
    try:
        check_free(out, force=args.force)
        check_apart(out, Path(args.run))
        _check(args)
        options = {"rest": args.rest, "ternary": args.ternary or "TQ2_0", "drop_mtp": args.drop_mtp}
        with Branch(args.run, args.branch, args.step, **options) as branch:
            started = time.perf_counter()
            arch = _write(branch, out, args)
            size, seconds = _size(out), time.perf_counter() - started
            print(f"{out}: {arch}, phase {branch.phase}, step {branch.step} of {args.run}")
            print(f"{size:,} bytes in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s", flush=True)
            if args.format == "gguf" and branch.model.n_mtp > 1:
                print("llama.cpp cannot draft with more than one MTP module and aborts when asked to")
            if not args.verify:
                return 0
            report = _verify(branch, out, arch, args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(report.text())
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qatmoe.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run (the training command's --workdir)")
    parser.add_argument("--branch", default="", help="phase of the run; its last one by default")
    parser.add_argument("--step", type=int, help="checkpoint; the phase's newest by default")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="file (gguf) or folder to write")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    parser.add_argument("--verify", action="store_true", help="read it back and compare it with the run")
    parser.add_argument("--verify_tokens", type=int, default=4096, help="tokens for the comparison of logits, 0: none")
    known = f"gguf: {', '.join(names.GGUF)}; else {', '.join(names.HUGGINGFACE)}"
    parser.add_argument("--arch", default="auto", help=f"architecture; the first that fits by default ({known})")
    parser.add_argument("--rest", default="BF16", choices=RESTS, help="type of the weights that lie on no grid")
    parser.add_argument("--ternary", default="", help="gguf type of ternary_256: TQ2_0 (default), TQ1_0 or Q2_0")
    parser.add_argument("--drop_mtp", action="store_true", help="leave the MTP modules out")
    parser.add_argument(
        "--context", type=int, default=0, help="context length to state; the import's or training's by default"
    )
    parser.add_argument(
        "--chat_template", type=Path, help="gguf: file with a Jinja template; plain text or the import's by default"
    )
    parser.add_argument("--name", default="", help="name of the model; the run's by default")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for values that nothing can be done with, and for options that the format would ignore."""
    check_local(args.out, "--out")
    if args.context < 0:
        raise UserError(f"--context {args.context}: must be a number of tokens, or 0 for that of training")
    if args.format == "gguf" and os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: is a folder, and gguf is one file: name the file")
    if args.verify_tokens < 0:
        raise UserError(f"--verify_tokens {args.verify_tokens}: must be a number of tokens, or 0 for none")
    for name in ("name", "chat_template", "ternary"):
        if args.format != "gguf" and getattr(args, name):
            raise UserError(f"--{name} is for --format gguf: leave it out")


def _write(branch: Branch, out: Path, args: argparse.Namespace) -> str:
    if args.format == "gguf":
        chat = {"chat_template": _text(args.chat_template)} if args.chat_template else {}
        return gguf_model.write(
            branch, out, arch=args.arch, name=args.name, context=args.context, force=args.force, **chat
        )
    return huggingface_model.write(
        branch, out, arch=args.arch, packed=args.format == "compressed-tensors", context=args.context, force=args.force
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--chat_template {path}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}") from e


def _verify(branch: Branch, out: Path, arch: str, args: argparse.Namespace) -> Report:
    if args.format == "gguf":
        return verify_gguf(branch, out, arch, args.verify_tokens)
    return verify_huggingface(branch, out, arch, packed=args.format == "compressed-tensors")


def _size(out: Path) -> int:
    return sum(f.stat().st_size for f in out.iterdir()) if out.is_dir() else out.stat().st_size


if __name__ == "__main__":
    sys.exit(cli.run(main))
