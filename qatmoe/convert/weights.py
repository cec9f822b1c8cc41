"""The weights of a run's branch as they are deployed, one parameter at a time.

What a parameter holds in the file is decided here, on the training side, by the same functions that the forward pass of
training calls; `convert.verify` then compares files with it.
"""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from qatmoe.checkpoint import Checkpoints, DamagedCheckpoint
from qatmoe.config import Config, ModelConfig, resolve
from qatmoe.convert import names
from qatmoe.convert.names import Part
from qatmoe.data import tokenizer
from qatmoe.errors import UserError
from qatmoe.model.transformer import STACKED
from qatmoe.quant.grid import GRIDS, Grid
from qatmoe.quant.plan import Plan
from qatmoe.run import quant_plan

log = logging.getLogger(__name__)

PLAIN = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
RESTS = ("F32", "F16", "BF16", "Q8_0")


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


class Branch:
    """A phase of a run at one of its checkpoints. Nothing is written to the run's folder.

    Attributes: `cfg`, `model`, `plan` (empty where the phase does not quantize), `tokenizer`, `phase`, `step`, `rest`.
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
        if rest not in RESTS:
            raise UserError(f"--rest {rest!r}: must be one of {', '.join(RESTS)}")
        if ternary not in GRIDS["ternary_256"].gguf:
            raise UserError(f"--ternary {ternary!r}: must be one of {', '.join(GRIDS['ternary_256'].gguf)}")
        self.rest, self._ternary = rest, ternary
        self.workdir = Path(workdir)
        self.cfg = _config(self.workdir)
        self.phase = phase or list(self.cfg.train.phases)[-1]
        if self.phase not in self.cfg.train.phases:
            raise UserError(
                f"--branch {phase!r}: {workdir} has no such phase; it has {', '.join(self.cfg.train.phases)}"
            )
        self.tokenizer = _tokenizer(self.workdir)
        self._checkpoints = Checkpoints(self.workdir, self.phase)
        self._meta = self._newest() if step is None else self._checkpoints.meta(step)
        self.step: int = self._meta["step"]
        self.plan: Plan = quant_plan(self.cfg)[0] if self.cfg.train.phases[self.phase].quantize else {}
        self.model: ModelConfig = dataclasses.replace(self.cfg.model, n_mtp=0) if drop_mtp else self.cfg.model
        self._loaded: tuple[str, jax.Array, jax.Array | None] = ("", jnp.zeros(0), None)  # path, weight, scale
        self._layer: tuple[str, int | None, Value | None] = ("", None, None)

    def __enter__(self) -> "Branch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoints.close()

    def _newest(self) -> dict[str, Any]:
        """The `meta` of the newest complete checkpoint."""
        for step in reversed(self._checkpoints.steps()):
            try:
                return self._checkpoints.meta(step)
            except DamagedCheckpoint as e:
                log.warning("skipping a damaged checkpoint: %s", e)
        raise UserError(f"{self._checkpoints.directory}: no complete checkpoint; train that phase first")

    def storage(self, part: Part) -> tuple[str, Grid | None]:
        """GGUF type and grid of a part."""
        grid = self.plan.get(_in_layout(self.cfg.model, part.path, part.layer or 0))
        if grid is not None:
            return (self._ternary if self._ternary in grid.gguf else grid.gguf[0]), grid
        if part.path.endswith(("norm", "bias", "router/weight")):
            return "F32", None
        if self.rest != "Q8_0":
            return self.rest, None
        fits = self.shape_of(part)[-1] % GRIDS["q8_0"].superblock == 0
        return ("Q8_0", GRIDS["q8_0"]) if fits else ("BF16", None)

    def shape_of(self, part: Part) -> tuple[int, ...]:
        """The shape of a part."""
        return names.shape_of(self.model, part)

    def value(self, part: Part) -> Value:
        """One part. The last parameter stays in memory: ask for the parts of one parameter together."""
        path = _in_layout(self.cfg.model, part.path, part.layer or 0)
        if f"params/model/{path}" not in self._meta["tensors"]:
            return Value("F32", jnp.zeros(self.shape_of(part), jnp.float32))
        if self._loaded[0] != path:
            self._loaded = ("", jnp.zeros(0), None)  # freed before the next is read
            self._layer = ("", None, None)
            self._loaded = (path, *self._read(path))
        if self._layer[:2] != (path, part.layer) or self._layer[2] is None:
            self._layer = (path, part.layer, self._value(part))
        whole = self._layer[2]
        assert whole is not None
        scale = None if whole.scale is None else _cut(whole.scale, part)
        return dataclasses.replace(whole, weight=_cut(whole.weight, part), scale=scale)

    def _read(self, path: str) -> tuple[jax.Array, jax.Array | None]:
        """A parameter and its learned scales, as the checkpoint holds them."""
        tensors = self._meta["tensors"]
        weight_name = f"ema/{path}" if f"ema/{path}" in tensors else f"params/model/{path}"
        scale_name = f"params/scales/{path}"
        wanted = [n for n in (weight_name, scale_name) if n in tensors and (n == weight_name or path in self.plan)]
        abstract = {n: jax.ShapeDtypeStruct(tuple(tensors[n][1]), jnp.dtype(tensors[n][0])) for n in wanted}
        arrays = self._checkpoints.arrays(self._meta, abstract)
        return arrays[weight_name], arrays.get(scale_name)

    def _value(self, part: Part) -> Value:
        """All of a layer of the loaded parameter."""
        path, weight, scale = self._loaded
        if part.layer is not None and self.cfg.model.scan_layers:
            weight, scale = weight[part.layer], None if scale is None else scale[part.layer]
        weight = weight.astype(jnp.float32)
        kind, grid = self.storage(part)
        if kind == "F16" and float(jnp.abs(weight).max()) > 65504:
            raise UserError(f"{path} holds numbers beyond 65504, the largest of F16: give --rest BF16 or F32")
        if grid is None:
            return Value(kind, weight)
        scale = _scale_of(grid, weight, self.cfg.quant.dynamic_rule) if scale is None else _snapped(grid, scale)
        return Value(kind, weight, grid, scale)

    def numbers(self) -> dict[str, Any]:
        """The whole model as it computes when deployed: f32, in the unrolled layout of `model`."""
        sizes = names.stack_sizes(self.model)
        tree: dict[str, Any] = {}
        for tensor in self._meta["tensors"]:
            if not tensor.startswith("params/model/"):
                continue
            keys = tensor.removeprefix("params/model/").split("/")
            stack = keys[0] if keys[0] in STACKED else ""
            layers: list[int | None] = [None]
            if stack:
                layers = [int(keys.pop(1))] if keys[1].isdigit() else list(range(sizes[stack]))
            for layer in layers:
                if layer is None or layer < sizes[stack]:
                    place = keys if layer is None else [stack, str(layer), *keys[1:]]
                    _put(tree, place, self.value(Part("/".join(keys), layer)).numbers())
        return tree


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


def _in_layout(cfg: ModelConfig, path: str, layer: int) -> str:
    """A parameter's path in the run's own layout: "layers/3/attn/q" where layers are not stacked."""
    stack, _, rest = path.partition("/")
    return path if cfg.scan_layers or stack not in STACKED else f"{stack}/{layer}/{rest}"


def _put(tree: dict[str, Any], keys: list[str], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def _config(workdir: Path) -> Config:
    try:
        return resolve(json.loads((workdir / "config.json").read_text()))
    except FileNotFoundError as e:
        raise UserError(f"--run {workdir}: no qatmoe run there (it has no config.json)") from e
    except ValueError as e:
        raise UserError(f"{workdir}/config.json cannot be used: {e}") from e


def _tokenizer(workdir: Path) -> tokenizer.Tokenizer:
    if not (workdir / "tokenizer.json").is_file():
        raise UserError(f"{workdir}/tokenizer.json is missing: start the run's training command again, it writes it")
    return tokenizer.load(str(workdir / "tokenizer.json"))
