"""The main job: train the trunk, branch into control and QAT, compare.

    python -m qatmoe.train --config configs/moe_2bit.py [--workdir DIR] [--config.key=value ...]
                           [--coordinator HOST:PORT --processes N --process I]

The same command after any interruption continues from the last checkpoint, on other devices too. The last line of flags
is for several processes that nobody else introduces to each other, see qatmoe/distributed.py; all need one folder.
A run's folder:

    config.json  plan.json          what was asked for; which tensor lies on which grid
    tokenizer.json                  the tokenizer, for exports
    checkpoints/PHASE/STEP/         weights, optimizer, data position
    metrics.jsonl  tb/              every number, as JSON lines and for TensorBoard
    summary.json  curves.png        the comparison

    python -m qatmoe.train --config C --compile_only --topology v5p:4x4x8 [--phase qat] [--nosuggest] [--json FILE]

compiles a phase's training step for a machine that need not be there (the first phase that quantizes, unless one is
named), and says what it takes: memory, FLOPs, collectives, time at the least, and, where it does not fit, the cheapest
change that makes it fit. Machines: v4, v5e, v5p, v6e or tpu7x as v5p:4x4x8, or v5e:16x16*4 for 4 slices; gpu:N; cpu:N.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qatmoe import aot, cli, distributed, fit, report, topology
from qatmoe.config import Config, to_json
from qatmoe.convert import gguf_model, huggingface_model, names
from qatmoe.convert.vocab import gguf_fields, huggingface_files
from qatmoe.convert.weights import ORIGIN, Storage
from qatmoe.data import batches
from qatmoe.data.tokenizer import Tokenizer
from qatmoe.errors import UserError
from qatmoe.files import check_local, check_place, is_there, write_atomically
from qatmoe.initial import check_import, source_of
from qatmoe.mesh import RULES, make_mesh
from qatmoe.metrics import Metrics
from qatmoe.metrics import read as read_metrics
from qatmoe.phases import check_save_at, check_teachers, check_text, finished, round_control, run_phase
from qatmoe.quant.plan import Plan, format_coverage, totals
from qatmoe.run import Interrupted, Run, Stop, check_frozen, check_mesh, quant_plan, train_iterator, valid_batches
from qatmoe.workdir import open_workdir

OPTIONS: dict[str, str | bool] = {
    "workdir": "",
    "compile_only": False,
    "topology": "",
    "phase": "",
    "suggest": True,
    "json": "",
}


def train(cfg: Config, workdir: Path, stop: Stop) -> report.Summary:
    """Runs or continues every phase, evaluates the branches and their roundings, and writes the report.

    Raises:
      UserError: unusable input; nothing was written into `workdir`, but where a teacher's run has gone meanwhile.
      RunError: the run cannot go on; its checkpoints are intact.
      Interrupted: a signal asked for an end; all is saved.
    """
    # Input: what can be wrong is found before the run writes anything.
    with distributed.together():
        mesh = make_mesh(cfg.mesh)
        check_mesh(cfg, mesh)
        plan, table = quant_plan(cfg)
        check_frozen(cfg, plan)
        with stop.at_once("while the text was read, before anything was trained"):
            data = batches.load_data(cfg.data, cfg.model.vocab_size)
        iterator = train_iterator(cfg, mesh, data)
        next(valid_batches(cfg, mesh, data, limit=1))
    distributed.require_same("data", data.hash)
    stop.check("before anything was trained")
    with distributed.together():
        there = distributed.first() and is_there(workdir / "checkpoints")
    new = distributed.from_first(not there)
    with distributed.together():
        if cfg.init_from and new:
            check_import(cfg, mesh, plan, data)
        check_teachers(cfg, workdir, data)
        check_save_at(cfg, workdir)
    with distributed.together():
        lock = open_workdir(workdir, to_json(cfg))
    with lock, contextlib.closing(iterator), jax.set_mesh(mesh):
        with distributed.together():
            check_text(cfg, workdir, data)
        with Metrics(workdir, tensorboard=cfg.train.tensorboard) as metrics:
            run = Run(cfg, workdir, mesh, data, iterator, plan, metrics, stop)
            announce(run, table)
            keep_origin(cfg, workdir)
            # Phases: the trunk, then its branches. A finished one is passed over.
            for name in cfg.train.phases:
                run_phase(run, name)
            # PTQ: the control, rounded.
            round_control(run)
        # Report.
        return report.write(workdir) if distributed.first() else {}


def announce(run: Run, table: list[dict[str, Any]]) -> None:
    """Prints and stores what is about to be trained, where, on which text and grids. Process 0 does, for all."""
    if not distributed.first():
        return
    stats, mesh = run.data.stats, " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = jax.devices()[0].device_kind
    print(f"{run.cfg.name} in {run.workdir} on {jax.device_count()} {kind}{processes} (mesh {mesh})")
    known = trained_on(run)
    if not known:
        note_mesh(run)
    print(
        f"text: {stats['train_tokens']:,} tokens to train on, {stats['valid_tokens']:,} held out, "
        f"{stats['valid_bytes_per_token']:.2f} bytes per token"
    )
    longest = longest_branch(run.cfg)
    print(f"longest branch: {longest:,} tokens, {longest / stats['train_tokens']:,.2f} passes over the text")
    if run.cfg.model.top_k == 1 < run.cfg.model.n_experts and run.cfg.model.norm_topk:
        print("with top_k=1 model.norm_topk makes every weight 1, and the loss teaches the router nothing")
    print(format_coverage(table))
    for line in check_frozen(run.cfg, run.plan):
        print(line)
    print(deployment(run.cfg, run.plan, run.data.tokenizer), flush=True)
    environment = known or report.environment() | {"processes": jax.process_count(), "mesh": dict(run.mesh.shape)}
    plan = {"totals": totals(table), "rows": table, "data": stats, "environment": environment}
    write_atomically(run.workdir / "plan.json", json.dumps(plan, indent=1))
    write_atomically(run.workdir / "tokenizer.json", run.data.tokenizer.json)
    run.metrics.text("config", to_json(run.cfg))
    run.metrics.text("plan", format_coverage(table))


def longest_branch(cfg: Config) -> int:
    """Tokens from a run's first step to the end of its longest branch; what init_from names was trained before."""
    steps: dict[str, int] = {}
    for name, phase in cfg.train.phases.items():
        own = 0 if cfg.init_from and not steps else phase.steps
        steps[name] = own + (steps[phase.start] if phase.start else 0)
    return max(steps.values()) * cfg.train.batch_size * cfg.data.seq_len


def trained_on(run: Run) -> dict[str, Any]:
    """Where a run was trained, as plan.json has it, if nothing of it is left to train; else {}."""
    evaluated = {r["phase"] for r in read_metrics(run.workdir) if r["split"] == "final"}
    whole = all(name in evaluated and finished(run.workdir, name) for name in run.cfg.train.phases)
    return report.plan_of(run.workdir).get("environment", {}) if whole else {}


def note_mesh(run: Run) -> None:
    """Says what to expect where a run goes on in another mesh than it was in."""
    before = report.plan_of(run.workdir).get("environment", {}).get("mesh")
    if before in (None, dict(run.mesh.shape)):
        return
    print(f"goes on from mesh {before}: same batches, losses agree up to rounding", end="")
    if run.cfg.model.experts == "dense" and math.prod(before[a] for a in RULES["batch"]) != run.groups:
        print(
            f"; each of {run.groups} groups of tokens now has its own capacity, so other tokens may be dropped "
            "(moe/dropped in the metrics)",
            end="",
        )
    print()


def deployment(cfg: Config, plan: Plan, tokenizer: Tokenizer) -> str:
    """Which files will hold the quantized model; better known before it is trained than after."""
    storage = Storage(cfg, plan, rest="F32")
    lines = []
    for what, table in (("GGUF", names.GGUF), ("Hugging Face", names.HUGGINGFACE)):
        try:
            arch = names.architecture(cfg.model, table)
            if what == "GGUF":
                gguf_model.parts(storage, arch)
                gguf_fields(tokenizer, cfg.model.vocab_size)
            else:
                huggingface_model.contents(storage, arch, packed=False)
                huggingface_files(tokenizer)
            lines.append(f"deploys to {what} as {arch}")
        except UserError as e:
            lines.append(f"does not deploy to {what}: {e}")
    return "\n".join(lines)


def keep_origin(cfg: Config, workdir: Path) -> None:
    """An imported model's context, chat template and ends of turn belong to what is trained from it."""
    if distributed.first() and cfg.init_from and not (workdir / ORIGIN).exists():
        source = Path(source_of(cfg)[0]) / ORIGIN
        if source.is_file():
            write_atomically(workdir / ORIGIN, source.read_text(encoding="utf-8"))


def compile_only(cfg: Config, given: dict[str, Any]) -> int:
    """Compiles a phase's step for --topology, prints the report, writes --json. Returns 0 where it fits, else 1.

    Raises:
      UserError: no such machine or phase, a mesh or batch that does not fit it, or a compiler that is not installed.
    """
    machine = topology.parse(given["topology"])
    if given["json"]:
        check_place(given["json"], "--json")
    topology.prepare(machine)
    job = aot.make_job(cfg, machine, given["phase"])
    result = aot.examine(job)
    print(aot.table(result), flush=True)
    fits = result.get("fits", True)
    _keep(result, given["json"])  # a suggestion takes minutes, and may fail
    if not fits and given["suggest"]:
        result["suggestion"] = fit.suggest(job, result)
        print(result["suggestion"])
        _keep(result, given["json"])
    return 0 if fits else 1


def _keep(result: aot.Report, file: str) -> None:
    if file:
        write_atomically(file, json.dumps(result, indent=1) + "\n")


def asks_to_compile(args: Sequence[str]) -> bool:
    """Whether --compile_only is given and not false; looked for before all else, as such a process joins no others.

    The last one counts, as it does for `cli.parse`, which refuses a value that is neither true nor false.
    """
    last = "false"
    for arg in args:
        name, _, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name in ("compile_only", "nocompile_only"):
            last = "false" if name.startswith("no") else value or "true"
    return last.lower() not in ("false", "f", "0")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 the run failed, 2 unusable input, 130 or 143 stopped by SIGINT or SIGTERM.

    Another process of the run that dies ends this one with 1 or by SIGABRT. With --compile_only: 0 the step fits, 1 it
    does not, 2 unusable input.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        rest, place = distributed.flags(sys.argv if argv is None else argv)
        if asks_to_compile(rest):
            return compile_only(*cli.parse(rest, __doc__, OPTIONS))
        with Stop() as stop, distributed.joined(place, detect=argv is None):
            with distributed.together():
                cfg, given = cli.parse(rest, __doc__, OPTIONS)
                for name in ("topology", "phase", "json"):
                    if given[name]:
                        raise UserError(f"--{name}={given[name]}: it belongs to --compile_only, which is not given")
                check_local(given["workdir"], "--workdir")
            distributed.require_same("configuration", to_json(cfg))
            workdir = Path(given["workdir"] or f"runs/{cfg.name}")
            summary = train(cfg, workdir, stop)
            if not distributed.first():
                return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except Interrupted as e:
        print(f"{e}. The same command continues.", file=sys.stderr)
        return e.exit_code
    print(report.table(summary))
    print(f"{workdir}/summary.json  {workdir}/curves.png  tensorboard --logdir {workdir}/tb")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
