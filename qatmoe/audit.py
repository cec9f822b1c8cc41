"""What an audit judges: the rows of a run, and the reference that they are compared with. Computes nothing."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from qatmoe import requantize as rounding
from qatmoe.checkpoint import Checkpoints, trained_tokens
from qatmoe.config import Config, ModelConfig, other_settings
from qatmoe.convert import llama
from qatmoe.convert.weights import Branch, read_config
from qatmoe.errors import UserError
from qatmoe.model import attention
from qatmoe.model.cache import CacheType
from qatmoe.model.transformer import abstract_params, param_shapes
from qatmoe.quant.plan import Plan, make_plan
from qatmoe.requantize import Format

CACHES = ("bf16", "q8_0", "q4_0", "iq4_nl", "q8_0+rot", "q4_0+rot", "iq4_nl+rot")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model to judge: a phase's weights, as deployed or rounded again, with a type of cache."""

    name: str
    group: str
    branch: str
    format: str
    rule: str
    bits: float  # per weight of the planned tensors
    rounded: Format | None = None
    cache: CacheType | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The phase in full precision that rows are compared with: one of the run itself, or of another run."""

    name: str  # of the phase; "RUN:PHASE" where it is another run's
    workdir: Path
    cfg: Config
    phase: str
    step: int  # its newest checkpoint
    trained_tokens: int  # up to it, those of the phases that it comes from included

    @property
    def model(self) -> ModelConfig:
        """As `unrolled` has it."""
        return unrolled(self.cfg)

    def open(self) -> Branch:
        """Its weights."""
        return Branch(self.workdir, self.phase, self.step, rest="F32")


@dataclasses.dataclass(frozen=True)
class Audit:
    """What is judged, on what."""

    workdir: Path
    cfg: Config
    model: ModelConfig  # as `unrolled` has it
    plan: Plan  # paths of the unrolled layout
    reference: Reference
    steps: dict[str, int]  # phase -> newest checkpoint
    trained_tokens: dict[str, int]  # up to it, those of the phases that it comes from included
    rows: list[Row]

    def is_reference(self, phase: str) -> bool:
        """Whether a phase of the run is what the others are compared with."""
        return self.workdir == self.reference.workdir and phase == self.reference.phase


def unrolled(cfg: Config) -> ModelConfig:
    """A run's model as `Branch.numbers` lays its weights out, with an attention kernel of the machine that judges."""
    return dataclasses.replace(attention.portable(cfg.model), scan_layers=False)


def lineage(cfg: Config, phase: str) -> list[str]:
    """The phases that a phase comes from, itself first."""
    phases = [phase]
    while start := cfg.train.phases[phases[-1]].start:
        phases.append(start)
    return phases


# ---- what is judged --------------------------------------------------------------------------------------------------


def open_run(workdir: Path, reference: str = "") -> tuple[Audit, list[str]]:
    """Reads what a run consists of, and lists the rows; computes nothing.

    Args:
      reference: a phase of the run, or RUN:PHASE; `control`, else the last phase in full precision, unless given.

    Returns:
      The audit, and what it leaves out and why.

    Raises:
      UserError: no run, no phase in full precision, an unusable reference, or a phase without a checkpoint.
    """
    cfg = read_config(workdir)
    steps, notes = {}, []
    for name in cfg.train.phases:
        step = _newest(workdir, name)
        if step is None:
            notes.append(f"phase {name} has no checkpoint yet: its rows are left out")
        else:
            steps[name] = step
    model = unrolled(cfg)
    shapes = param_shapes(model)
    found = _reference(workdir, reference)
    if found.workdir != workdir and (param_shapes(found.model), found.model.top_k) != (shapes, model.top_k):
        raise UserError(
            f"--reference {reference}: is of another architecture than {workdir}; name a control of its trunk"
        )
    tokens = {name: trained_tokens(workdir, name, step) for name, step in steps.items()}
    audit = Audit(workdir, cfg, model, make_plan(shapes, model, cfg.quant), found, steps, tokens, [])
    notes += [*_other_settings(model, found), *_unequal(audit)]
    return dataclasses.replace(audit, rows=_rows(audit, shapes, notes)), notes


def _newest(workdir: Path, phase: str) -> int | None:
    with Checkpoints(workdir, phase) as checkpoints:
        return checkpoints.latest_good()


def _reference(workdir: Path, text: str) -> Reference:
    """What --reference names; "" is the run's own control, else its last phase in full precision."""
    folder, colon, phase = text.rpartition(":")
    if colon and Path(folder).resolve() != workdir.resolve():
        workdir, name, option = Path(folder), text, "--reference"
    else:
        name, option = "", "--run"
    cfg = read_config(workdir, option)
    plain = [name for name, spec in cfg.train.phases.items() if not spec.quantize]
    if phase and phase not in plain:
        known = ", ".join(plain) or "none"
        raise UserError(f"--reference {text!r}: must be a phase of {workdir} in full precision ({known})")
    if not plain:
        raise UserError(f"{workdir} has no phase in full precision to compare with: add one without quantize")
    phase = phase or ("control" if "control" in plain else plain[-1])
    step = _newest(workdir, phase)
    if step is None:
        raise UserError(f"{workdir}: the reference, phase {phase}, has no checkpoint; train it first")
    return Reference(name or phase, workdir, cfg, phase, step, trained_tokens(workdir, phase, step))


def _other_settings(model: ModelConfig, reference: Reference) -> list[str]:
    """Settings of the model that shapes do not show and that the reference has otherwise: its KLD holds them too."""
    return [
        f"model.{name} is {here!r}, and {there!r} in the reference, {reference.name}"
        for name, (here, there) in other_settings(model, reference.model).items()
    ]


def _unequal(audit: Audit) -> list[str]:
    """Which phases are unfinished, or were trained on another number of tokens than the reference."""
    ref, notes = audit.reference, []
    expected = ref.trained_tokens
    own = lineage(ref.cfg, ref.phase) if ref.workdir == audit.workdir else []
    for name, step in audit.steps.items():
        replaced = bool(audit.cfg.init_from) and name == next(iter(audit.cfg.train.phases))
        if step != (last := audit.cfg.train.phases[name].steps) and not replaced:
            notes.append(f"phase {name} is not finished: its newest checkpoint is step {step:,} of {last:,}")
        found = audit.trained_tokens[name]
        if found != expected and name not in own:
            notes.append(
                f"phase {name} was trained on {found:,} tokens and the reference, {ref.name}, on {expected:,}: "
                "its KLD holds that difference too"
            )
    return notes


def _rows(audit: Audit, shapes: dict[str, tuple[int, ...]], notes: list[str]) -> list[Row]:
    """All rows, each branch's together, the reference first."""
    phases, weights = audit.cfg.train.phases, {path: np.prod(shapes[path]) for path in audit.plan}
    planned = sum(grid.bits * weights[path] for path, grid in audit.plan.items()) / max(sum(weights.values()), 1)
    grids = "+".join(dict.fromkeys(grid.name for grid in audit.plan.values()))
    formats, caches = _formats(audit, notes), _caches(audit, notes)
    branches = sorted(audit.steps, key=lambda name: not audit.is_reference(name))  # stable
    found = []
    for name in branches:
        quantized = phases[name].quantize
        group = "control" if audit.is_reference(name) else "qat" if quantized else "trunk"
        base = Row(name, group, name, grids if quantized else "f32", "", float(planned) if quantized else 32.0)
        found.append(base)
        if group == "trunk":
            continue
        for fmt in (f for f in formats if not (quantized and f.rule == "gptq")):  # a baseline of QAT, not of itself
            found.append(
                dataclasses.replace(
                    base,
                    name=f"{name}/{fmt.name}/{fmt.rule}",
                    group="requantized" if quantized else fmt.group,
                    format=fmt.name,
                    rule=fmt.rule,
                    bits=fmt.bits,
                    rounded=fmt,
                )
            )
        found += [dataclasses.replace(base, name=f"{name}/kv/{c}", group="kv", cache=c) for c in caches]
    return found


def _formats(audit: Audit, notes: list[str]) -> list[Format]:
    """The formats that the planned tensors can be rounded to."""
    if not audit.plan:
        notes.append("config.quant puts no tensor on a grid: no weights are rounded")
        return []
    found = []
    if not llama.installed():
        notes.append(
            "left out: llama.cpp's own types; pip install -e '.[deploy]' has llama-cpp-python, which rounds to them"
        )
    tree, alone = abstract_params(audit.model), []
    for fmt in rounding.formats():
        fault = rounding.misfit(tree, audit.plan, fmt)
        if not fault:
            found.append(fmt)
        elif fmt.rule == "gptq":
            alone.append(fmt.name)
        else:
            notes.append(f"left out: {fault}")
    if alone:
        notes.append(f"left out: rule gptq on {', '.join(alone)}: it joins no rows, and these are not whole blocks")
    return found


def _caches(audit: Audit, notes: list[str]) -> list[CacheType]:
    found = []
    for text in CACHES:
        cache = CacheType.parse(text)
        try:
            cache.check(audit.model.head_dim)
            found.append(cache)
        except UserError as e:
            notes.append(f"left out: {e}")
    return found


def choose(audit: Audit, pattern: str) -> list[Row]:
    """The rows whose name a regular expression is found in. Raises UserError if it is none, or matches nothing."""
    try:
        chosen = [row for row in audit.rows if re.search(pattern, row.name)]
    except re.error as e:
        raise UserError(f"--rows {pattern!r} is not a regular expression: {e}") from e
    if not chosen:
        raise UserError(f"--rows {pattern!r} matches no row; --list shows all {len(audit.rows)}")
    return chosen
