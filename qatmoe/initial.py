"""Where a run begins that does not begin from random weights: the checkpoint that config.init_from names.

It takes the place of the run's first phase. It is another run's, with moments and data position, or an imported
model's, weights alone.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qatmoe import distributed
from qatmoe import step as steps
from qatmoe.checkpoint import Checkpoints, trained_tokens
from qatmoe.config import Config, other_settings, resolve
from qatmoe.data.batches import Data
from qatmoe.errors import UserError
from qatmoe.model.transformer import STACKED
from qatmoe.quant.plan import Plan
from qatmoe.run import Run, Weights, abstract_state
from qatmoe.step import TrainState
from qatmoe.tree import leaves_by_path, path_of


def import_source(cfg: Config) -> tuple[str, str, int]:
    """Folder, phase and step that config.init_from=RUN[:PHASE][@STEP] names; PHASE is the first phase unless given.

    Raises:
      UserError: there is no such checkpoint.
    """
    where = f"config.init_from={cfg.init_from!r}"
    folder, phase, step = source_of(cfg)
    phase = phase or next(iter(cfg.train.phases))
    if step and not step.isdecimal():
        raise UserError(f"{where}: what follows '@' must be a step number")
    with Checkpoints(folder, phase) as checkpoints:
        known = checkpoints.steps()
        wanted = int(step) if step else max(known, default=-1)
        if wanted not in known:
            raise UserError(f"{where}: no such checkpoint; {folder} has steps {known} of phase {phase!r}")
        if not step and not checkpoints.said(wanted)["done"]:
            raise UserError(
                f"{where}: phase {phase!r} of {folder} is not finished: finish it, or name the step that is meant, "
                f"e.g. {cfg.init_from}@{wanted}"
            )
    return folder, phase, wanted


def source_of(cfg: Config) -> tuple[str, str, str]:
    """RUN, PHASE and STEP of config.init_from, whether they are there or not; "" for what it does not say."""
    source, step = _split(cfg.init_from, "@")
    return *_split(source, ":"), step


def _split(text: str, mark: str) -> tuple[str, str]:
    """What is before and after the last mark; all of it before, where it is a folder's name or has no mark."""
    before, found, after = text.rpartition(mark)
    return (before, after) if found and not os.path.isdir(text) else (text, "")


def check_import(cfg: Config, mesh: Mesh, plan: Plan, data: Data) -> None:
    """Raises UserError where the checkpoint that config.init_from names does not exist or does not fit this run."""
    roots = [n for n, p in cfg.train.phases.items() if not p.start]
    if len(roots) > 1:  # a config's phases come sorted by name: the first need not be the one that is meant
        raise UserError(
            f"config.init_from={cfg.init_from!r} takes the place of the phase that the others start from, and "
            f"{', '.join(roots)} all start from nothing: leave one of them, and train the others in a run of their own"
        )
    folder, phase, step = import_source(cfg)
    name, first = next(iter(cfg.train.phases.items()))
    if first.quantize:
        raise UserError(
            f"config.train.phases.{name}.quantize is on, and config.init_from replaces that phase, the first: "
            f"let it be the trunk, and add a phase with start={name!r}"
        )
    abstract = abstract_state(cfg, plan, mesh, quantize=False)
    with Checkpoints(folder, phase) as checkpoints:
        if checkpoints.in_parts(step):
            meta = checkpoints.meta(step)
            _layer_arrays(meta, abstract, folder)
        else:
            _require_full_precision(cfg, folder, phase, checkpoints.said(step))
            taken = _taken(checkpoints, step, abstract)
            meta = checkpoints.check(step, taken)
            goes_on = [n for n, p in cfg.train.phases.items() if p.start == name and not p.reset_moments]
            if goes_on and not taken.opt_state:
                raise UserError(
                    f"config.init_from={cfg.init_from!r}: its optimizer keeps other moments (optim.name, "
                    f"moments_dtype or clip is not this run's), and {goes_on[0]} goes on from them: take its "
                    f"settings, or set config.train.phases.{goes_on[0]}.reset_moments=True"
                )
    if meta["tokenizer"] != data.tokenizer.hash:
        raise UserError(
            f"config.init_from={cfg.init_from!r} was trained with another tokenizer: set config.data.tokenizer"
        )
    if meta["data"] != data.hash:
        print(f"{folder} was trained on other text: what this run holds out may have been trained on there")
    try:
        others = other_settings(cfg.model, resolve(meta["config"]).model)
    except UserError as e:  # the weights fit all the same
        print(f"whether {folder} was trained with this model's settings is not known: {e}")
        return
    for setting, (here, there) in others.items():
        print(f"{folder} was trained with model.{setting}={there!r}, and this run has {here!r}")


def _require_full_precision(cfg: Config, folder: str, phase: str, meta: dict[str, Any]) -> None:
    """Raises UserError for learned scales: the phase that a checkpoint takes the place of has none to go on with."""
    if any(name.startswith("params/scales/") for name in meta["tensors"]):
        phases = meta["config"]["train"]["phases"]
        plain = ", ".join(f"{folder}:{name}" for name, spec in phases.items() if not spec["quantize"])
        raise UserError(
            f"config.init_from={cfg.init_from!r}: phase {phase!r} is quantized, with scales that it has learned; begin "
            f"with one in full precision ({plain or 'that run has none'})"
        )


def tokens_of(workdir: str | Path, phase: str, step: int | None = None) -> int:
    """`checkpoint.trained_tokens` of a step, or of the newest one, as process 0 sees the folder; called by all."""
    with distributed.together():
        found = 0
        if distributed.first():
            with Checkpoints(workdir, phase) as checkpoints:
                step = step if step is not None else checkpoints.latest() or 0
            found = trained_tokens(workdir, phase, step)
    return int(distributed.from_first(found))


def import_state(run: Run, name: str) -> tuple[TrainState, dict[str, Any], int]:
    """The state that config.init_from names, as the last one of phase `name`, where its data stood, and its tokens."""
    with distributed.together():
        folder, phase, step = import_source(run.cfg)
    step = int(distributed.from_first(step))  # another process may see the folder as it was
    tokens = tokens_of(folder, phase, step)
    abstract = run.abstract_state(run.cfg.train.phases[name])
    with Checkpoints(folder, phase) as checkpoints:
        with distributed.together():
            parts = checkpoints.meta(step) if checkpoints.in_parts(step) else None
            taken = _taken(checkpoints, step, abstract)
        if parts:
            return _state_of_weights(run, abstract, checkpoints, parts), run.train_iterator.start, tokens
        state, position, _ = checkpoints.restore(step, taken)
        if not state.opt_state:
            fresh = _fresh_moments(run, abstract, state.params["model"])
            state = fresh._replace(step=state.step, ema=state.ema or fresh.ema)
        elif run.cfg.optim.ema and not state.ema:
            state = state._replace(ema=state.params["model"])
    if position["stream"] != run.train_iterator.start["stream"]:
        print(f"{folder} was trained on other batches: this run's data starts from its beginning")
        position = run.train_iterator.start
    return state, position, tokens


def _state_of_weights(run: Run, abstract: TrainState, checkpoints: Checkpoints, meta: dict[str, Any]) -> TrainState:
    """Weights that were saved alone, in the unrolled layout and any type, with fresh moments."""
    layers = _layer_arrays(meta, abstract, str(run.cfg.init_from))

    def leaf(path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
        parts = layers[path_of(path)]
        arrays = checkpoints.arrays(meta, parts)
        join = (lambda *a: jnp.stack(a)) if len(next(iter(parts.values())).shape) < len(wanted.shape) else lambda a: a
        cast = jax.jit(lambda *a: join(*a).astype(jnp.float32), out_shardings=wanted.sharding)
        return cast(*(arrays[n] for n in parts))

    return _fresh_moments(run, abstract, jax.tree_util.tree_map_with_path(leaf, abstract.params["model"]))


def _fresh_moments(run: Run, abstract: TrainState, model: Weights) -> TrainState:
    """The state before the first step of training these weights, which are donated."""
    places = jax.tree.map(lambda s: s.sharding, abstract)
    fresh = functools.partial(steps.state_of, run.cfg)
    return jax.jit(fresh, out_shardings=places, donate_argnums=0)(model)


def _taken(checkpoints: Checkpoints, step: int, abstract: TrainState) -> TrainState:
    """What of a state is read from a checkpoint: moments and average only where it has those that this run keeps."""
    saved = checkpoints.said(step)["tensors"]

    def there(group: str) -> Any:
        wanted = getattr(abstract, group)
        here = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves_by_path({group: wanted}).items()}
        return wanted if here == {n: what for n, what in saved.items() if n.split("/")[0] == group} else {}

    return abstract._replace(opt_state=there("opt_state"), ema=there("ema"))


def _layer_arrays(
    meta: dict[str, Any], abstract: TrainState, source: str
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{parameter: {name in the checkpoint: array}}: what a parameter is read from, one array a layer if it is stacked.

    Raises:
      UserError: the checkpoint is of another architecture.
    """
    found: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, leaf in leaves_by_path(abstract.params["model"]).items():
        spec = leaf.sharding.spec
        stack, _, rest = name.partition("/")
        stacked = stack in STACKED and not rest.split("/")[0].isdigit()
        shape = leaf.shape[1:] if stacked else leaf.shape
        place = NamedSharding(leaf.sharding.mesh, PartitionSpec(*(spec[1:] if stacked else spec)))
        names = [f"{stack}/{i}/{rest}" for i in range(leaf.shape[0])] if stacked else [name]
        for n in names:
            dtype, there = meta["tensors"].get(f"params/model/{n}", ["", None])
            if there != list(shape):
                raise UserError(
                    f"config.init_from={source!r} is of another architecture: {n} is {there or 'absent'} there and "
                    f"{list(shape)} here; use its model settings (an imported folder's qat.py has them)"
                )
            found.setdefault(name, {})[f"params/model/{n}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    known = {n for of in found.values() for n in of}
    extra = [n for n in meta["tensors"] if n not in known]
    if extra:
        raise UserError(
            f"config.init_from={source!r} is of another architecture: it has {extra[0]} ({len(extra)} tensors more); "
            "use its model settings (an imported folder's qat.py has them)"
        )
    return found
