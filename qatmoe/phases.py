"""One phase of a run: where it starts, its loop, its checkpoints, and what is measured on the way."""

import contextlib
import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qatmoe import distributed
from qatmoe import metrics as metrics_lib
from qatmoe import step as steps
from qatmoe.checkpoint import Checkpoints, DamagedCheckpoint
from qatmoe.config import Config, PhaseConfig, other_settings, resolve, to_json
from qatmoe.data.batches import Data
from qatmoe.errors import RunError, UserError
from qatmoe.initial import import_state, source_of, tokens_of
from qatmoe.optim import schedule
from qatmoe.quant import fake
from qatmoe.quant.grid import RULES
from qatmoe.quant.plan import Plan
from qatmoe.run import Run, Weights, abstract_state, jit_eval_weights, jit_rounding, quant_plan
from qatmoe.step import TrainState

Position = dict[str, Any]  # of the data iterator


def run_phase(run: Run, name: str) -> None:
    """Trains a phase from where it stands to its end, checkpointing on the way, and evaluates the result."""
    cfg, phase = run.cfg, run.cfg.train.phases[name]
    with run.checkpoints(name) as checkpoints:
        found = checkpoints.restore_latest(run.abstract_state(phase))
        if found is not None:
            state, position, meta = found
            done = meta["done"]
        elif cfg.init_from and name == next(iter(cfg.train.phases)):
            state, position, tokens = import_state(run, name)
            done = True
            save(run, checkpoints, state, position, tokens, done=done)
        else:
            state, position = first_state(run, name)
            done = False
        run.metrics.rewind(name, int(state.step) if found else -1)
        if found is None or not done:  # what was rounded came from weights that are being replaced
            for rule in RULES:
                run.metrics.rewind(f"ptq:{name}:{rule}", -1)
        if not done:
            with metrics_lib.Trace(run.workdir, name, cfg.train.profile_step, cfg.train.profile_steps) as trace:
                state = loop(run, name, state, position, checkpoints, trace)
    if not evaluated(run, name):
        result = run.evaluate(run.eval_weights(phase, state), cfg.eval.final_batches, interruptible=True)
        run.metrics.write(name, int(state.step), "final", result)


def round_control(run: Run) -> None:
    """PTQ: evaluates the full-precision branch rounded to the grid, under each scale rule.

    The branch is `control` if there is one; else the last phase that does not quantize.
    """
    plain = [name for name, phase in run.cfg.train.phases.items() if not phase.quantize]
    if not plain or not run.plan:
        return
    branch = "control" if "control" in plain else plain[-1]
    missing = [rule for rule in RULES if not evaluated(run, f"ptq:{branch}:{rule}")]
    if not missing:
        return
    state, _ = final_state(run, branch, moments=False)
    model = state.ema or state.params["model"]
    for rule in missing:
        result = run.evaluate(
            jit_rounding(run.plan, model, rule)(model), run.cfg.eval.final_batches, interruptible=True
        )
        run.metrics.write(f"ptq:{branch}:{rule}", int(state.step), "final", result)


def evaluated(run: Run, name: str) -> bool:
    """Whether the final validation of a phase or a PTQ baseline is on record."""
    first = distributed.first()  # which writes them: another process may see the file as it was
    return distributed.from_first(
        first and any(r["phase"] == name and r["split"] == "final" for r in metrics_lib.read(run.workdir))
    )


# ---- Where a phase starts --------------------------------------------------------------------------------------------


def first_state(run: Run, name: str) -> tuple[TrainState, Position]:
    """The state before a phase's first step, and where its data begins. Deterministic."""
    phase = run.cfg.train.phases[name]
    places = jax.tree.map(lambda s: s.sharding, run.abstract_state(phase))
    parent, position = _parent(run, phase, moments=not phase.reset_moments)
    # Where memory is scarce. A CPU's holds both states.
    donated = () if jax.default_backend() == "cpu" else (0,)
    with warnings.catch_warnings():  # of what has no counterpart, such as scales of a phase in full precision
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        start = jax.jit(
            functools.partial(_start, run.cfg, phase, run.plan), out_shardings=places, donate_argnums=donated
        )
        return start(parent), position


def first_params(run: Run, name: str) -> Weights:
    """Weights and scales before a phase's first step, as `first_state` has them, without its moments."""
    phase = run.cfg.train.phases[name]
    places = jax.tree.map(lambda s: s.sharding, run.abstract_state(phase).params)
    parent, _ = _parent(run, phase, moments=False)
    return jax.jit(lambda p: _start(run.cfg, phase, run.plan, p).params, out_shardings=places)(parent)


def _parent(run: Run, phase: PhaseConfig, *, moments: bool) -> tuple[Any, Position]:
    """What a phase starts from, the last state of another one or the run's random key, and where its data begins."""
    if not phase.start:
        return jax.random.key(run.cfg.train.seed), run.train_iterator.start
    return final_state(run, phase.start, moments=moments)


def _start(cfg: Config, phase: PhaseConfig, plan: Plan, parent: Any) -> TrainState:
    """The state before a phase's first step, from what `_parent` gives."""
    if phase.start:
        return steps.branch(cfg, plan, parent, quantize=phase.quantize, reset_moments=phase.reset_moments)
    state = steps.init_state(cfg, parent)
    return steps.branch(cfg, plan, state, quantize=True) if phase.quantize else state


def final_state(run: Run, name: str, *, moments: bool = True) -> tuple[TrainState, Position]:
    """The last state of a finished phase, and where its data stood; without the optimizer's moments if not wanted.

    Raises:
      RunError: the phase has no last checkpoint.
    """
    wanted = run.abstract_state(run.cfg.train.phases[name])
    with run.checkpoints(name) as checkpoints:
        found = checkpoints.restore_latest(wanted if moments else wanted._replace(opt_state={}))
    if found is None or not found[2]["done"]:
        raise RunError(
            f"{run.workdir}: phase {name} has no finished checkpoint to branch from; delete the later phases"
        )
    return found[0], found[1]


def tokens_before(run: Run, name: str) -> int:
    """Tokens of training before a phase's first step: of the phase that it starts from, which is finished."""
    start = run.cfg.train.phases[name].start
    return tokens_of(run.workdir, start) if start else 0


# ---- What a phase learns from ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A finished phase of another run."""

    folder: str
    phase: str
    step: int
    cfg: Config  # of its run
    digest: str  # of its checkpoint
    same_text: bool  # it was trained on the text of this run


def find_teacher(cfg: Config, name: str, data: Data) -> Teacher:
    """What phase.teacher=RUN:PHASE names; an empty RUN is init_from's.

    Raises:
      UserError: there is no such phase, it is not finished, or its model or tokenizer is another.
    """
    teacher = cfg.train.phases[name].teacher
    where = f"config.train.phases.{name}.teacher={teacher!r}"
    folder, _, phase = teacher.rpartition(":")
    folder = folder or source_of(cfg)[0]
    with Checkpoints(folder, phase) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            there = ", ".join(sorted(path.name for path in checkpoints.directory.parent.glob("*"))) or "none"
            raise UserError(f"{where}: {folder} has no checkpoint of phase {phase!r}; phases there: {there}")
        if checkpoints.in_parts(step):
            raise UserError(
                f"{where}: {folder} holds imported weights alone: begin a run there (config.init_from={folder!r}), "
                f"and name its phase: teacher={next(iter(cfg.train.phases))!r}"
            )
        meta, digest = checkpoints.meta(step), checkpoints.digest(step)
    if not meta["done"]:
        raise UserError(f"{where}: phase {phase!r} of {folder} stands at step {step}: finish it first")
    if meta["tokenizer"] != data.tokenizer.hash:
        raise UserError(f"{where} was trained with another tokenizer: set config.data.tokenizer")
    try:
        theirs = resolve(meta["config"])
    except UserError as e:
        raise UserError(f"{where}: the configuration of {folder} cannot be used: {e}") from e
    others = other_settings(cfg.model, theirs.model)
    if cfg.model.scan_layers != theirs.model.scan_layers:  # weights lie in another layout
        others["scan_layers"] = (cfg.model.scan_layers, theirs.model.scan_layers)
    if others:
        setting, (here, there) = next(iter(others.items()))
        raise UserError(f"{where}: model.{setting} is {there!r} there and {here!r} here; a teacher is the same model")
    return Teacher(folder, phase, step, theirs, digest, meta["data"] == data.hash)


def finished(workdir: Path, name: str) -> bool:
    """Whether a phase's newest checkpoint is its last one."""
    with Checkpoints(workdir, name) as checkpoints:
        step = checkpoints.latest()
        with contextlib.suppress(DamagedCheckpoint):
            return step is not None and bool(checkpoints.said(step)["done"])
    return False


def check_text(cfg: Config, workdir: Path, data: Data) -> None:
    """Raises UserError where the run's phases were trained on another text, or with another tokenizer, than is there.

    A finished phase reads no batch that would show it: its tokenizer would be replaced by one that its weights do not
    know, and its branches would be validated on another text than itself.
    """
    for name in cfg.train.phases:
        with Checkpoints(workdir, name) as checkpoints:
            meta = None
            for step in reversed(checkpoints.steps()):
                with contextlib.suppress(DamagedCheckpoint):  # an older one says it too
                    meta = checkpoints.said(step)
                    break
        if meta and (meta["tokenizer"], meta["data"]) != (data.tokenizer.hash, data.hash):
            raise UserError(
                f"{workdir} was trained on other text, or with another tokenizer, than config.data gives now: "
                "restore it, or take another --workdir"
            )


def check_save_at(cfg: Config, workdir: Path) -> None:
    """Looks for steps that are to be saved and that their phase has passed; an imported one has none to save.

    A line says which of them a finished phase does not have.

    Raises:
      UserError: an unfinished phase has passed one without saving it to stay.
    """
    imported = next(iter(cfg.train.phases)) if cfg.init_from else ""
    for name, phase in cfg.train.phases.items():
        if not phase.save_at or name == imported:
            continue
        where = f"config.train.phases.{name}.save_at={phase.save_at}: {workdir}"
        with Checkpoints(workdir, name) as checkpoints:
            if finished(workdir, name):
                gone = [str(step) for step in phase.save_at if step not in checkpoints.steps()]
                if gone and distributed.first():
                    print(f"{where} has finished {name} and has no checkpoint of step {', '.join(gone)}")
                continue
            newest = checkpoints.latest_good() or 0
            staying = [step for step in checkpoints.steps() if checkpoints.stays(step)]
        if passed := [step for step in phase.save_at if step <= newest and step not in staying]:
            raise UserError(
                f"{where} has passed step {passed[0]}, and it is not there or not saved to stay: leave it out, delete "
                "that checkpoint and later ones to train it again, or take another --workdir"
            )


def check_teachers(cfg: Config, workdir: Path, data: Data) -> None:
    """Looks for the teachers in other runs, of phases that are not finished.

    Raises:
      UserError: one does not exist, does not fit, or is not the one that the phase has learned from until now.
    """
    for name, phase in cfg.train.phases.items():
        if not phase.distill or phase.own_teacher:
            continue
        with Checkpoints(workdir, name) as checkpoints:
            step = checkpoints.latest_good()
            meta = {"done": False} if step is None else checkpoints.meta(step)
        if meta["done"]:
            continue
        found = find_teacher(cfg, name, data)
        if meta.get("teacher") and meta["teacher"] != found.digest:
            raise UserError(
                f"config.train.phases.{name}.teacher={phase.teacher!r} is not what {name} has learned from in its "
                f"first {step} steps: put that back, or take another --workdir"
            )
        if not found.same_text:
            print(f"{found.folder} was trained on other text: {name} may learn from it what this run holds out")


def teacher_weights(run: Run, name: str) -> tuple[Weights | None, str]:
    """The weights that a phase is distilled from, as they are evaluated, and the digest of their checkpoint.

    None, "" where nothing is distilled; the digest is "" for a teacher of the same run.

    Raises:
      UserError: what phase.teacher names in another run is not there any more, or no longer fits.
    """
    phase = run.cfg.train.phases[name]
    if not phase.distill:
        return None, ""
    if own := phase.own_teacher:
        return run.eval_weights(run.cfg.train.phases[own], final_state(run, own, moments=False)[0]), ""
    with distributed.together():
        found = find_teacher(run.cfg, name, run.data)
    plan, spec = quant_plan(found.cfg)[0], found.cfg.train.phases[found.phase]
    wanted = abstract_state(found.cfg, plan, run.mesh, quantize=spec.quantize)
    wanted = wanted._replace(opt_state={})  # not the average, which is what is evaluated
    with Checkpoints(found.folder, found.phase) as checkpoints:
        state = checkpoints.restore(found.step, wanted)[0]
    return jit_eval_weights(found.cfg, plan, wanted, quantize=spec.quantize)(state), found.digest


# ---- The loop --------------------------------------------------------------------------------------------------------


def loop(
    run: Run,
    name: str,
    state: TrainState,
    position: Position,
    checkpoints: Checkpoints,
    trace: metrics_lib.Trace,
) -> TrainState:
    """Steps until the phase is done. Host work on step n happens while the device is already on step n + 1."""
    cfg, phase = run.cfg, run.cfg.train.phases[name]
    watch = Watch(run, name, state)
    train_step = run.train_step(phase)
    run.train_iterator.set_state(position)
    keep = functools.partial(save, run, checkpoints, teacher=watch.teacher_digest)
    earlier, per_step = tokens_before(run, name), cfg.train.batch_size * cfg.data.seq_len
    kept = int(state.step)  # the newest state on disk; 0 where the phase begins, which need not be there
    with Log(run, name, int(state.step), checkpoints) as log:
        for n in range(int(state.step) + 1, phase.steps + 1):
            if run.stop.reached():
                log.flush()
                if n - 1 != kept or not kept:  # saving it again would first remove it
                    keep(state, run.train_iterator.get_state(), earlier + (n - 1) * per_step, wait=True)
                raise run.stop.interrupted(f"after step {n - 1} of {phase.steps} of phase {name}, which is saved")
            batch = run.place(next(run.train_iterator))
            due = n == phase.steps or bool(cfg.eval.every and n % cfg.eval.every == 0)
            before = watch.codes(state) if due else None
            trace.before(n, state)
            factor = np.float32(schedule(cfg.optim, phase, n - 1))
            with jax.profiler.StepTraceAnnotation("train", step_num=n):
                state, values = train_step(state, batch, watch.teacher, factor)
            trace.after(n, state)
            log.step(n, values)
            if due:
                log.flush()
                with log.paused():
                    run.metrics.write(name, n, "load", expert_load(values["load_NE"]))
                    if phase.quantize:
                        run.metrics.write(name, n, "health", watch.health(state, before))
                    if n < phase.steps:  # the last step is followed by the final validation
                        result = run.evaluate(run.eval_weights(phase, state), cfg.eval.batches)
                        run.metrics.write(name, n, "valid", result)
            if n % cfg.train.checkpoint_every == 0 or n == phase.steps or n in phase.save_at:
                log.flush()  # never keep a state whose loss was not looked at
                with log.paused():
                    keep(state, run.train_iterator.get_state(), earlier + n * per_step, done=n == phase.steps)
                kept = n
    checkpoints.wait()
    return state


def save(
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    position: Position,
    tokens: int,
    *,
    done: bool = False,
    wait: bool = False,
    teacher: str = "",
) -> None:
    """Saves a state under its step.

    Args:
      tokens: of training up to it, those of the phases that it comes from included.
      done: it is the phase's last one.
      teacher: the digest of another run's.
    """
    meta = {
        "config": json.loads(to_json(run.cfg)),
        "data": run.data.hash,
        "tokenizer": run.data.tokenizer.hash,
        "teacher": teacher,
        "trained_tokens": tokens,
    }
    step = int(state.step)
    stays = step in run.cfg.train.phases[checkpoints.phase].save_at
    checkpoints.save(step, state, position, meta, final=done, stays=stays, wait=wait)


class Watch:
    """What a phase is compared with: its teacher, and, where it quantizes, the codes and scales it began with."""

    def __init__(self, run: Run, name: str, state: TrainState):
        cfg, phase = run.cfg, run.cfg.train.phases[name]
        self.plan, self.quantize = run.plan, phase.quantize
        self.teacher, self.teacher_digest = teacher_weights(run, name)
        if not phase.quantize:
            return
        rule = cfg.quant.dynamic_rule
        self._codes = jax.jit(lambda p: fake.codes_of(run.plan, p["model"], p["scales"], rule=rule))
        replicated = NamedSharding(run.mesh, PartitionSpec())
        self._health = jax.jit(functools.partial(_health, run.plan, rule), out_shardings=replicated)
        # A resumed phase finds its beginning again by computing it again.
        first = state.params if int(state.step) == 0 else first_params(run, name)
        self._first = self._codes(first), jax.tree.map(jnp.copy, first["scales"])

    def codes(self, state: TrainState) -> Any:
        """The code of every quantized weight, {path: uint8}; None where the phase does not quantize."""
        return self._codes(_evaluated(state)) if self.quantize else None

    def health(self, state: TrainState, before: Any) -> dict[str, float]:
        """Quantizer health after a step; `before` are the codes before it. Means over weights, and per tensor."""
        values = jax.device_get(self._health(_evaluated(state), before, self._first))
        return {name: float(v) for name, v in values.items()}


def _evaluated(state: TrainState) -> Weights:
    """Weights and scales that a state is evaluated and deployed with: the average, where one is kept."""
    return {**state.params, "model": state.ema or state.params["model"]}


def _health(plan: Plan, rule: str, params: Weights, before: Any, first: Any) -> dict[str, Any]:
    model, scales = params["model"], params["scales"]
    now = fake.codes_of(plan, model, scales, rule=rule)
    per_tensor = {
        "weight_error": fake.weight_error(plan, model, scales, rule=rule),  # relative RMS
        "flip_rate": fake.flip_rate(before, now),  # share of codes that this one step changed
        "flipped": fake.flip_rate(first[0], now),  # share that differs from the start of the phase
        "scale_drift": fake.scale_drift(scales, first[1]),
    }
    sizes = {path: codes.size for path, codes in now.items()}
    values: dict[str, Any] = {}
    for name, of in per_tensor.items():
        if of:
            values[name] = sum(v * sizes[p] for p, v in of.items()) / sum(sizes[p] for p in of)
            values |= {f"{name}/{p}": v for p, v in of.items()}
    for path, shares in fake.histogram(plan, now).items():
        values |= {f"code_{i}/{path}": share for i, share in enumerate(shares)}
    return values


def expert_load(load_NE: jax.Array) -> dict[str, float]:
    """Each expert's load in a step, 1 an even share, by name. N * E numbers: too many for every record."""
    loads = enumerate(jax.device_get(load_NE) * load_NE.shape[1])
    return {f"layer_{row}/expert_{e}": float(load) for row, load_E in loads for e, load in enumerate(load_E)}


class Log:
    """Turns the device's metrics of a step into records, a progress bar, and an error when they are not finite.

    The bar ends with the `with`, however that is left, so that what is printed next has a line of its own.
    """

    def __init__(self, run: Run, name: str, start: int, checkpoints: Checkpoints):
        phases = list(run.cfg.train.phases.items())
        after = [n for n, _ in phases].index(name) + 1
        total = run.cfg.train.phases[name].steps
        self.run, self.name, self.total, self._checkpoints = run, name, total, checkpoints
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._per_step = run.cfg.train.batch_size * run.cfg.data.seq_len
        self._last = (start, time.perf_counter())
        self._pause = 0.0
        self._compiled = False
        self._speed = 0.0  # at the last record
        self._progress = metrics_lib.Progress(name, start, total, steps_after=sum(p.steps for _, p in phases[after:]))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def step(self, n: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was only begun, and looks at those of the one before."""
        self.flush()
        self._pending = (n, values)

    def flush(self) -> None:
        """Waits for the pending step, checks it and, every log_every steps, records it."""
        if self._pending is None:
            return
        (n, values), self._pending = self._pending, None
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            with distributed.together():
                raise self._not_finite(n, loss, norm)
        self._progress.update(n, loss=float(values["ce"]), tokens_per_s=self._speed or self._rate(n))
        if n % self.run.cfg.train.log_every == 0 or n == self.total:
            self._record(n, values)
        elif not self._compiled:  # the first step may have been compiled too: the clock starts after it
            self._last, self._pause = (n, time.perf_counter()), 0.0
        self._compiled = True

    def _rate(self, n: int) -> float:
        """Tokens per second since the last record."""
        seconds = time.perf_counter() - self._last[1] - self._pause
        return (n - self._last[0]) * self._per_step / max(seconds, 1e-9)

    def _record(self, n: int, values: dict[str, jax.Array]) -> None:
        self._speed = self._rate(n)
        load_NE = jax.device_get(values["load_NE"]) * values["load_NE"].shape[1]  # 1 = an even share
        record = {k: float(values[k]) for k in ("loss", "ce", "kl", "mtp", "balance", "z", "lr", "grad_norm")}
        record |= {
            "tokens": n * self._per_step,
            "tokens_per_s": self._speed,
            "step_s": self._per_step / self._speed,
            "moe/dropped": float(np.mean(jax.device_get(values["dropped_N"]))),
            "moe/load_max": float(load_NE.max()),
            "moe/load_min": float(load_NE.min()),
        } | metrics_lib.device_memory()
        for row, load_E in enumerate(load_NE):
            self.run.metrics.histogram(self.name, n, f"moe/load/layer_{row}", load_E)
        self.run.metrics.write(self.name, n, "train", record)
        self._last, self._pause = (n, time.perf_counter()), 0.0

    def _not_finite(self, n: int, loss: float, norm: float) -> RunError:
        lr = self.run.cfg.optim.lr
        self._checkpoints.wait()
        kept = self._checkpoints.steps()
        return RunError(
            f"phase {self.name}, step {n}: loss={loss}, gradient norm={norm}. Intact checkpoints of this phase: "
            f"{kept or 'none yet'} (to go back further than the newest, delete it); try a lower --config.optim.lr than "
            f"{lr} or a longer warmup in another --workdir, with --config.init_from={self.run.workdir} for the trunk"
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what happens inside out of tokens/s."""
        start = time.perf_counter()
        yield
        self._pause += time.perf_counter() - start
