"""Writes what a branch of a run says after a prompt, as it is deployed.

    python -m qatmoe.generate --run runs/moe_2bit --prompt "She had been looking at him with"
    python -m qatmoe.generate --run runs/moe_2bit --branch control qat --prompt - --cache q8_0 < prompt.txt

The text goes to the standard output, without the prompt; several branches write under headings, from the same seed. It
ends at the end-of-text token, at a --stop string or after --max_tokens. One device holds the whole model.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

from qatmoe import cli
from qatmoe.convert.weights import Branch
from qatmoe.decode import check_sampling, generate, stream_text
from qatmoe.errors import UserError
from qatmoe.model.cache import KINDS, CacheType


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 written, 2 unusable input."""
    args = _parser().parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            check_sampling(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)
            if "" in args.stop:
                raise UserError("--stop '': an empty text is everywhere; leave it out")
            cache = CacheType.parse(args.cache)
            branches = [stack.enter_context(_open(args, name)) for name in args.branch or [""]]
            cache.check(branches[0].model.head_dim)
            prompt = _prompt(args.prompt)
            _warn(branches[0], prompt, args.max_tokens)
            for branch in branches:
                if len(branches) > 1:
                    print(f"== {branch.phase}, step {branch.step} ==", flush=True)
                _write(branch, prompt, cache, args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print()  # ends the line of the text
        raise
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qatmoe.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run (the training command's --workdir)")
    parser.add_argument(
        "--branch", nargs="+", action="extend", default=[], help="phases of the run, one or more; its last by default"
    )
    parser.add_argument("--step", type=int, help="checkpoint; the phase's newest by default")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from the standard input")
    parser.add_argument("--max_tokens", type=int, default=200, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token every time")
    parser.add_argument("--top_k", type=int, default=0, help="draw from that many most probable tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the most probable tokens of that sum")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same tokens")
    parser.add_argument(
        "--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="texts that end it; they are not written"
    )
    parser.add_argument(
        "--cache",
        default="f32",
        help=f"type of the key/value cache: {', '.join(KINDS)}, or two as keys/values; +rot at the end rotates as "
        "llama.cpp does",
    )
    return parser


def _open(args: argparse.Namespace, name: str) -> Branch:
    return Branch(args.run, name, args.step, rest="F32", drop_mtp=True)


def _prompt(text: str) -> str:
    """The prompt, from the standard input for "-", where one newline at the end does not count."""
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as e:
            raise UserError(f"--prompt -: the standard input is not UTF-8 text ({e.reason} at byte {e.start})") from e
    if not text:
        raise UserError("the prompt is empty: give a text to continue")
    return text


def _warn(branch: Branch, prompt: str, max_tokens: int) -> None:
    count = len(branch.tokenizer.encode(prompt))
    if count + max_tokens > branch.context:
        print(
            f"warning: {count} tokens of the prompt and {max_tokens} more go beyond the {branch.context} of a sequence "
            "in training",
            file=sys.stderr,
        )


def _write(branch: Branch, prompt: str, cache: CacheType, args: argparse.Namespace) -> None:
    """Writes the text of one branch, and its speed to stderr."""
    cfg, params = dataclasses.replace(branch.model, scan_layers=False), branch.numbers()
    ids = branch.tokenizer.encode(prompt)
    tokens = generate(
        params,
        cfg,
        ids,
        max_tokens=args.max_tokens,
        cache=cache,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=(branch.tokenizer.end_id, *branch.origin.end_ids),
        warm_up=True,  # so that the times below are of running alone
    )
    started = time.perf_counter()
    times: list[float] = []

    def timed() -> Iterator[int]:
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    for piece in stream_text(timed(), branch.tokenizer.decode, ids, args.stop):
        print(piece, end="", flush=True)
    print(flush=True)
    print(f"{branch.phase}, cache {cache}: {_speed(len(ids), started, times)}", file=sys.stderr)


def _speed(count: int, started: float, times: list[float]) -> str:
    """Speeds from the moments at which tokens were there; the first one costs the prompt."""
    if not times:
        return "the text ended at once"
    line = f"prefill of {count} tokens {count / (times[0] - started):,.0f} tokens/s"
    if len(times) > 1:
        line += f", decode of {len(times) - 1} {(len(times) - 1) / (times[-1] - times[0]):,.0f} tokens/s"
    return line


if __name__ == "__main__":
    sys.exit(cli.run(main))
