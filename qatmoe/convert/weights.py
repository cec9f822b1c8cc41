"""The weights of a run's branch as they are deployed, one parameter at a time.

What a parameter holds in the file is decided here, on the training side, by the same functions that the forward pass of
training calls; `convert.verify` then compares files with it.
"""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qatmoe.checkpoint import Checkpoints, DamagedCheckpoint
from qatmoe.config import Config, ModelConfig, resolve
from qatmoe.convert import names
from qatmoe.convert.names import Part
from qatmoe.convert.vocab import NO_ROLES, Roles
from qatmoe.data import tokenizer
from qatmoe.errors import UserError
from qatmoe.mesh import fitted
from qatmoe.model.transformer import STACKED, kept_specs, param_shapes
from qatmoe.quant.grid import GRIDS, Grid
from qatmoe.quant.plan import KEPT, Plan, family
from qatmoe.run import quant_plan
from qatmoe.tree import leaves_by_path

log = logging.getLogger(__name__)

PLAIN = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
RESTS = ("F32", "F16", "BF16", "Q8_0")


class NotFinite(UserError):
    """Weights or learned scales that are NaN or inf; `fault` says which."""

    def __init__(self, fault: str):
        super().__init__(f"{fault}: a model that diverged; take an earlier checkpoint, another phase or another model")
        self.fault = fault


@dataclasses.dataclass(frozen=True)
class Value:
    """One part of a parameter and how it is stored."""

    kind: str  # GGUF type
    weight: jax.Array  # (..., I) f32, as trained
    grid: Grid | None = None
    scale: jax.Array | None = None  # (..., G) f32, snapped

    def codes(self) -> jax.Array:
        """Codes of the grid, uint8 of the weight's shape."""
        assert self.grid is not None
        return _nearest(self.grid, self.weight, self.scale)

    def numbers(self) -> jax.Array:
        """The numbers that the stored tensor stands for, f32."""
        if self.grid is not None:
            return self.grid.decode(self.codes(), self.scale)
        return self.weight.astype(PLAIN[self.kind]).astype(jnp.float32)


class _Arrays:
    """Parameters of a checkpoint as it holds them, in the host's memory; groups, the next of which is read ahead."""

    GROUP_BYTES = 1 << 29

    def __init__(self, checkpoints: Checkpoints, meta: dict[str, Any], sources: Mapping[str, list[str]]):
        """`sources`: {path: tensors of the checkpoint that belong to it}."""
        self._checkpoints, self._meta, self._sources = checkpoints, meta, sources
        self._queue: list[str] = []  # paths that will be asked for, in order
        self._held: dict[str, dict[str, np.ndarray]] = {}
        self._pending: concurrent.futures.Future[dict[str, dict[str, np.ndarray]]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="weights")

    def expect(self, paths: Iterable[str]) -> None:
        """Says in which order paths will be asked for."""
        self._queue = list(dict.fromkeys(paths))
        self._read_ahead()

    def get(self, path: str) -> dict[str, np.ndarray]:
        """{tensor: array} of a path."""
        if path not in self._held:
            self._held = {}  # freed before more is read
            if self._pending is not None:
                self._held, self._pending = self._pending.result(), None
            if path not in self._held:
                self._held = self._read(self._next_group(path))
            self._read_ahead()
        return self._held[path]

    def _read_ahead(self) -> None:
        """Begins the next group, unless one is being read or it is so large that it should be alone in memory."""
        if self._pending is None and self._queue and self._bytes(self._queue[0]) <= self.GROUP_BYTES:
            self._pending = self._thread.submit(self._read, self._next_group(self._queue[0]))

    def close(self) -> None:
        """Waits for what is being read, and lets go of everything."""
        self._thread.shutdown(cancel_futures=True)
        self._held = {}

    def _bytes(self, path: str) -> int:
        tensors = self._meta["tensors"]
        return sum(math.prod(tensors[n][1]) * jnp.dtype(tensors[n][0]).itemsize for n in self._sources[path])

    def _next_group(self, path: str) -> list[str]:
        """`path` and what comes after it in the queue, up to GROUP_BYTES; takes them out of the queue."""
        start = self._queue.index(path) if path in self._queue else 0
        group, size = [path], self._bytes(path)
        rest = self._queue[start + 1 :] if path in self._queue else self._queue
        while rest and size + self._bytes(rest[0]) <= self.GROUP_BYTES:
            size += self._bytes(rest[0])
            group.append(rest.pop(0))
        self._queue = rest
        return group

    def _read(self, paths: list[str]) -> dict[str, dict[str, np.ndarray]]:
        arrays = self._checkpoints.read(self._meta, [n for path in paths for n in self._sources[path]])
        return {path: {n: arrays[n] for n in self._sources[path]} for path in paths}


def stored_as(grid: Grid | None, *, kept: bool, row: int, rest: str, ternary: str) -> tuple[str, Grid | None]:
    """GGUF type and grid of a tensor of weights.

    Args:
      grid: the grid that it was trained on, if any.
      kept: whether it is a norm, a bias or a router: always F32.
      row: weights along its contraction axis.
      rest, ternary: as `Branch` has them.
    """
    if grid is not None:
        return (ternary if ternary in grid.gguf else grid.gguf[0]), grid
    if kept:
        return "F32", None
    if rest != "Q8_0":
        return rest, None
    return ("Q8_0", GRIDS["q8_0"]) if row % GRIDS["q8_0"].superblock == 0 else ("BF16", None)


class Storage:
    """How the parts of a model are stored, before there are any weights.

    Attributes: `cfg`, `model`, `plan`, `rest`.
    """

    def __init__(self, cfg: Config, plan: Plan, *, rest: str = "BF16", ternary: str = "TQ2_0", drop_mtp: bool = False):
        """Arguments as `Branch` has them. Raises UserError for an unknown type."""
        if rest not in RESTS:
            raise UserError(f"--rest {rest!r}: must be one of {', '.join(RESTS)}")
        if ternary not in GRIDS["ternary_256"].gguf:
            raise UserError(f"--ternary {ternary!r}: must be one of {', '.join(GRIDS['ternary_256'].gguf)}")
        self.cfg, self.plan, self.rest, self._ternary = cfg, plan, rest, ternary
        self.model: ModelConfig = dataclasses.replace(cfg.model, n_mtp=0) if drop_mtp else cfg.model

    def path(self, part: Part) -> str:
        """A part's parameter in the run's own layout: "layers/3/attn/q" where layers are not stacked."""
        stack, _, rest = part.path.partition("/")
        return part.path if self.cfg.model.scan_layers or stack not in STACKED else f"{stack}/{part.layer}/{rest}"

    def type_of(self, part: Part) -> tuple[str, Grid | None]:
        """GGUF type and grid of a part."""
        grid = self.plan.get(self.path(part))
        kept = family(part.path) == KEPT
        return stored_as(grid, kept=kept, row=self.shape_of(part)[-1], rest=self.rest, ternary=self._ternary)

    def shape_of(self, part: Part) -> tuple[int, ...]:
        """The shape of a part."""
        return names.shape_of(self.model, part)


class Branch:
    """A phase of a run at one of its checkpoints. Nothing is written to the run's folder.

    Attributes: `cfg`, `model`, `plan` (empty where the phase does not quantize), `tokenizer`, `phase`, `step`,
    `storage`, `origin`.
    """

    def __init__(
        self,
        workdir: str | Path,
        phase: str = "",
        step: int | None = None,
        *,
        rest: str = "BF16",
        ternary: str = "TQ2_0",
        drop_mtp: bool = False,
    ):
        """Opens a checkpoint.

        Args:
          phase: the run's last phase by default.
          step: its newest complete checkpoint by default.
          rest: how weights that lie on no grid are stored, one of RESTS; norms, biases and routers are always F32.
          ternary: the type for ternary blocks of 256: TQ2_0, TQ1_0 or Q2_0.
          drop_mtp: leaves the MTP modules out.

        Raises:
          UserError: no such run, phase or step, or a damaged checkpoint.
        """
        self.workdir = Path(workdir)
        self.cfg = read_config(self.workdir)
        self.phase = phase or list(self.cfg.train.phases)[-1]
        if self.phase not in self.cfg.train.phases:
            raise UserError(
                f"--branch {phase!r}: {workdir} has no such phase; it has {', '.join(self.cfg.train.phases)}"
            )
        self.tokenizer = tokenizer_of(self.workdir)
        self._checkpoints = Checkpoints(self.workdir, self.phase)
        self._meta = self._newest() if step is None else self._checkpoints.meta(step)
        self.step: int = self._meta["step"]
        plan = quant_plan(self.cfg)[0] if self.cfg.train.phases[self.phase].quantize else {}
        self.storage = Storage(self.cfg, plan, rest=rest, ternary=ternary, drop_mtp=drop_mtp)
        self.plan, self.model = self.storage.plan, self.storage.model
        self.origin = read_origin(self.workdir)
        self._known = self._sources()
        self._check_shapes()
        self._arrays = _Arrays(self._checkpoints, self._meta, self._known)
        self._layer: tuple[str, int | None, Value | None] = ("", None, None)

    def __enter__(self) -> "Branch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrays.close()
        self._checkpoints.close()

    @property
    def context(self) -> int:
        """Tokens that the model is known to work on: the imported model's, or the training sequences'."""
        return self.origin.context or self.cfg.data.seq_len

    def expect(self, parts: Iterable[Part]) -> None:
        """Says in which order parts will be asked for, so that they can be read ahead."""
        self._arrays.expect(self.storage.path(part) for part in parts if self.storage.path(part) in self._known)

    def _sources(self) -> dict[str, list[str]]:
        """{path: its weights (their average, if the run keeps one) and learned scales in the checkpoint}."""
        tensors, prefix = self._meta["tensors"], "params/model/"
        found = {}
        for path in (name.removeprefix(prefix) for name in tensors if name.startswith(prefix)):
            found[path] = [f"ema/{path}" if f"ema/{path}" in tensors else prefix + path]
            if path in self.plan and f"params/scales/{path}" in tensors:
                found[path].append(f"params/scales/{path}")
        return found

    def _check_shapes(self) -> None:
        """Raises UserError where the checkpoint does not hold the model that config.json describes."""
        wanted = param_shapes(self.cfg.model)
        found = {path: tuple(self._meta["tensors"][source[0]][1]) for path, source in self._known.items()}
        differ = [path for path in wanted | found if wanted.get(path) != found.get(path)]
        if differ:
            path = differ[0]
            raise UserError(
                f"{self.workdir}/config.json is not of this checkpoint: {path} is {found.get(path, 'absent')} in it, "
                f"{wanted.get(path, 'absent')} by the config ({len(differ)} tensors differ); restore the config"
            )

    def _newest(self) -> dict[str, Any]:
        """The `meta` of the newest complete checkpoint."""
        for step in reversed(self._checkpoints.steps()):
            try:
                return self._checkpoints.meta(step)
            except DamagedCheckpoint as e:
                log.warning("skipping a damaged checkpoint: %s", e)
        raise UserError(f"{self._checkpoints.directory}: no complete checkpoint; train that phase first")

    def value(self, part: Part) -> Value:
        """One part. The last parameter stays in memory: ask for the parts of one parameter together.

        Raises:
          NotFinite: a weight or a learned scale is NaN or inf.
          UserError: one is beyond what F16 holds.
        """
        path = self.storage.path(part)
        if path not in self._known:
            return Value("F32", jnp.zeros(self.storage.shape_of(part), jnp.float32))
        if self._layer[:2] != (path, part.layer) or self._layer[2] is None:
            self._layer = ("", None, None)  # freed before the next is made
            self._layer = (path, part.layer, self._value(path, part))
        whole = self._layer[2]
        assert whole is not None
        scale = None if whole.scale is None else _cut(whole.scale, part)
        return dataclasses.replace(whole, weight=_cut(whole.weight, part), scale=scale)

    def _value(self, path: str, part: Part) -> Value:
        """All of a layer of a parameter. No more of it comes to the device: all layers together may not fit."""
        layer = part.layer if part.layer is not None and self.cfg.model.scan_layers else ...
        arrays = [jax.device_put(a[layer], may_alias=True) for a in self._arrays.get(path).values()]
        weight, scale = arrays[0].astype(jnp.float32), arrays[1] if arrays[1:] else None
        kind, grid = self.storage.type_of(part)
        largest = float(_largest(weight))
        # A grid would take NaN for one of its numbers, and an infinite scale for its largest.
        if not (math.isfinite(largest) and (scale is None or math.isfinite(_largest(scale)))):
            of_layer = "" if layer is ... else f" of layer {layer}"
            raise NotFinite(f"{path}{of_layer} or its scale holds NaN or inf, in phase {self.phase}")
        if kind == "F16" and largest > 65504:
            raise UserError(f"{path} holds numbers beyond 65504, the largest of F16: give --rest BF16 or F32")
        if grid is None:
            return Value(kind, weight)
        if scale is not None:
            return Value(kind, weight, grid, _snapped(grid, scale))
        rule = self.cfg.quant.dynamic_rule if path in self.plan else "absmax"  # of weights that saw no grid in training
        return Value(kind, weight, grid, _scale_of(grid, weight, rule))

    def numbers(self, mesh: Mesh | None = None) -> dict[str, Any]:
        """The whole model as it computes when deployed: f32, in the unrolled layout of `model`.

        Args:
          mesh: each parameter is split over its devices as training keeps it, once it is decoded, so that none holds
            more than its part and one layer of a parameter. Without, one device holds everything.

        Raises as `value`.
        """
        sizes = names.stack_sizes(self.model)
        specs = leaves_by_path(kept_specs(dataclasses.replace(self.model, scan_layers=False)))

        def placed(path: str, numbers: jax.Array) -> jax.Array:
            if mesh is None:
                return numbers
            return jax.device_put(numbers, NamedSharding(mesh, fitted(mesh, specs[path], numbers.shape)))

        tree: dict[str, Any] = {}
        for path in self._known:
            keys = path.split("/")
            stack = keys[0] if keys[0] in STACKED else ""
            layers: list[int | None] = [None]
            if stack:
                layers = [int(keys.pop(1))] if keys[1].isdigit() else list(range(sizes[stack]))
            for layer in layers:
                if layer is None or layer < sizes[stack]:
                    place = keys if layer is None else [stack, str(layer), *keys[1:]]
                    numbers = self.value(Part("/".join(keys), layer)).numbers()
                    _put(tree, place, placed("/".join(place), numbers))
        return tree


@jax.jit
def _largest(array: jax.Array) -> jax.Array:
    """The largest absolute value, NaN where there is one; compiled, it makes no array on its way."""
    return jnp.max(jnp.abs(array))


@functools.partial(jax.jit, static_argnums=0)
def _snapped(grid: Grid, scale: jax.Array) -> jax.Array:
    return grid.snap(scale)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _scale_of(grid: Grid, weight: jax.Array, rule: str) -> jax.Array:
    return grid.scale_of(weight, rule)


@functools.partial(jax.jit, static_argnums=0)
def _nearest(grid: Grid, weight: jax.Array, scale: jax.Array) -> jax.Array:
    return grid.nearest(weight, scale)


def _cut(array: jax.Array, part: Part) -> jax.Array:
    """An expert and a half of the rows of a layer."""
    if part.expert is not None:
        array = array[part.expert]
    if part.half is None:
        return array
    rows = array.shape[-2] // 2
    return array[..., part.half * rows : (part.half + 1) * rows, :]


def _put(tree: dict[str, Any], keys: list[str], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


class Origin(NamedTuple):
    """What an imported model's folder says of its use, beside its weights."""

    context: int = 0  # tokens; 0: unknown
    end_ids: tuple[int, ...] = ()  # tokens that end a text or a turn
    chat_template: str = ""
    roles: Roles = NO_ROLES  # ids of its eos, bos, pad and unk tokens, as far as it names them


ORIGIN = "origin.json"


def read_origin(workdir: Path) -> Origin:
    """The origin of a run's weights; an empty one where they were trained from scratch.

    Raises:
      UserError: the file is not what an import writes.
    """
    try:
        found = json.loads((workdir / ORIGIN).read_text(encoding="utf-8"))
        roles = {str(role): int(i) for role, i in found.get("roles", {}).items()}
        return Origin(int(found["context"]), tuple(map(int, found["end_ids"])), str(found["chat_template"]), roles)
    except FileNotFoundError:
        return Origin()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{workdir / ORIGIN} cannot be used ({e}): remove it, or import the model again") from e


def read_config(workdir: Path, option: str = "--run") -> Config:
    """The configuration of a run that an option names. Raises UserError for none, or one that cannot be used."""
    try:
        return resolve(json.loads((workdir / "config.json").read_text()))
    except OSError as e:
        raise UserError(f"{option} {workdir}: no qatmoe run there (config.json: {e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{workdir}/config.json cannot be used: {e}") from e


def tokenizer_of(workdir: Path) -> tokenizer.Tokenizer:
    """The tokenizer of a run. Raises UserError where its file is missing."""
    if not (workdir / "tokenizer.json").is_file():
        raise UserError(f"{workdir}/tokenizer.json is missing: start the run's training command again, it writes it")
    return tokenizer.load(str(workdir / "tokenizer.json"))
