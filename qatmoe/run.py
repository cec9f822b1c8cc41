"""A run and what every phase of it shares: devices, data, the plan, and how weights are evaluated."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qatmoe import loss as losses
from qatmoe import step as steps
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import Config, PhaseConfig
from qatmoe.data import batches
from qatmoe.errors import UserError
from qatmoe.mesh import batch_groups, spec
from qatmoe.metrics import Metrics
from qatmoe.model import attention
from qatmoe.model.transformer import param_shapes
from qatmoe.optim import is_frozen
from qatmoe.quant import fake
from qatmoe.quant.plan import Plan, coverage, make_plan

Weights = dict[str, Any]


SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = tuple(128 + number for number in SIGNALS)  # exit codes of a command that one of them ended, as shells have it


class Interrupted(Exception):
    """A signal asked the run to end; everything worth saving is saved. Its text says where the run stands.

    `exit_code` is one of `STOPPED`: what is not done must not look done.
    """

    together = True  # all processes stop at the same step, see `distributed.joined`

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped {where}")
        self.exit_code = 128 + number


class Stop:
    """Turns SIGTERM and SIGINT into a note that the loops read: `with Stop() as stop: ... stop.check("here")`.

    With several processes a signal to any of them stops all at the same place: JAX's preemption service, which listens
    for SIGTERM itself once the processes are joined, chooses it, and other signals are passed on to it. All processes
    must ask equally often, with `reached` or `check`; asking is no communication.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at_once = False
        self._asked = 0
        self._passed_on = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        signal.signal(number, self._before[number])  # a second one ends the process at once
        if self._at_once:
            self._at_once = False  # what cleans up is not interrupted again
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # the reader may be gone; print is not safe in a handler
            os.write(2, b"\nstopping where nothing is lost; once more to stop at once\n")

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Around work that leaves nothing to save and has no steps: a signal ends it wherever it is in Python's code.

        Not with several processes, which must stop together: the next `check` does it.

        Raises:
          Interrupted: a signal has come.
        """
        if jax.distributed.is_initialized():
            yield
            return
        self._at_once = True
        try:
            if self.signal:  # it came before
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt as e:  # no Exception, so that nothing takes it for an error of its own
            raise self.interrupted(where) from e
        finally:
            self._at_once = False

    def reached(self) -> bool:
        """Whether to stop here."""
        if jax.distributed.is_initialized():
            if self.signal and not self._passed_on:
                self._passed_on = True
                signal.raise_signal(signal.SIGTERM)
            self._asked += 1
            if not multihost_utils.reached_preemption_sync_point(self._asked):
                return False
            self.signal = signal.SIGTERM  # in all processes, whichever signal one of them had: all end with one code
        return bool(self.signal)

    def interrupted(self, where: str) -> Interrupted:
        """What to raise once `reached` was true and what is worth saving is saved."""
        return Interrupted(self.signal, where)

    def check(self, where: str) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.reached():
            raise self.interrupted(where)


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a run to its last."""

    cfg: Config
    workdir: Path
    mesh: Mesh
    data: batches.Data
    train_iterator: batches.TrainIterator  # one for all phases: each sets it to its own position
    plan: Plan
    metrics: Metrics
    stop: Stop

    @property
    def groups(self) -> int:
        """Groups of tokens that are dispatched to experts on their own: one for each split of the batch."""
        return batch_groups(self.mesh)

    def place(self, batch: batches.Batch) -> losses.Batch:
        """Puts this process's rows of a batch on its devices."""
        return place(self.mesh, self.cfg.train.batch_size, batch)

    def checkpoints(self, phase: str) -> Checkpoints:
        """The checkpoints of one phase."""
        return Checkpoints(self.workdir, phase, self.cfg.train.keep)

    def abstract_state(self, phase: PhaseConfig) -> steps.TrainState:
        """Shapes and shardings of a phase's state."""
        return self._abstract_state(phase.quantize)

    @functools.cached_property
    def _abstract_state(self) -> Callable[[bool], steps.TrainState]:
        """Of `quantize`: each is asked for several times, and traced once."""
        cfg, plan, mesh = self.cfg, self.plan, self.mesh  # a function that held `self` would keep it from being freed
        return functools.cache(lambda quantize: abstract_state(cfg, plan, mesh, quantize=quantize))

    def train_step(self, phase: PhaseConfig) -> Any:
        """A phase's step, as `jit_step` makes it. Phases of the same `quantize`, `distill` and `freeze` share one."""
        return self._train_step(phase.quantize, phase.distill, phase.freeze)

    @functools.cached_property
    def _train_step(self) -> Callable[[bool, float, str], Any]:
        """Of `quantize`, `distill` and `freeze`: jitted once per run, not once per phase."""
        cfg, plan, mesh, abstract = self.cfg, self.plan, self.mesh, self._abstract_state

        def jitted(quantize: bool, distill: float, freeze: str) -> Any:
            return jit_step(cfg, plan, mesh, abstract(quantize), quantize=quantize, distill=distill, freeze=freeze)

        return functools.cache(jitted)

    @functools.cached_property
    def _evaluate_batch(self) -> Callable[..., dict[str, jax.Array]]:
        """Jitted once: every branch and every rounding is evaluated by the same program."""
        cfg, groups = self.cfg, self.groups

        def sums(weights: Weights, batch: losses.Batch) -> dict[str, jax.Array]:
            return losses.evaluation_sums(weights, cfg.model, batch, cfg.train.loss_chunk, groups)

        return jax.jit(sums, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def eval_weights(self, phase: PhaseConfig, state: steps.TrainState) -> Weights:
        """What is evaluated: the average if the run keeps one, on the grid if the phase quantizes."""
        return self._eval_weights(phase.quantize)(state)

    @functools.cached_property
    def _eval_weights(self) -> Callable[[bool], Callable[[steps.TrainState], Weights]]:
        """Of `quantize`: jitted once per run, not once per validation."""
        cfg, plan, abstract = self.cfg, self.plan, self._abstract_state

        def jitted(quantize: bool) -> Callable[[steps.TrainState], Weights]:
            return jit_eval_weights(cfg, plan, abstract(quantize), quantize=quantize)

        return functools.cache(jitted)

    def evaluate(self, weights: Weights, limit: int, *, interruptible: bool = False) -> dict[str, float]:
        """Validation of one set of weights on `limit` batches (0: all of it), dropless.

        `interruptible` where all training so far is saved: a signal then ends it at once.

        Returns loss (nats per token), its standard error over rows, bits per byte, perplexity, and the MTP modules'
        losses. For the error rows are taken as independent, though neighbours in a document are not quite; of a single
        row it is NaN.
        """
        nats: list[jax.Array] = []
        count: list[jax.Array] = []
        for batch in valid_batches(self.cfg, self.mesh, self.data, limit):
            if interruptible:
                jax.block_until_ready(nats[-2:-1])  # what is given to the device is waited for: two batches at most
                self.stop.check("while evaluating; all training so far is saved")
            sums = self._evaluate_batch(weights, place(self.mesh, self.cfg.train.micro_batch, batch))
            nats.append(sums["nats"])
            count.append(sums["count"])
        # Read at the end: the device does not wait for the host between batches.
        nats_MR, count_MR = (np.concatenate(jax.device_get(a), axis=1).astype(np.float64) for a in (nats, count))
        loss, *mtp = nats_MR.sum(axis=1) / np.maximum(count_MR.sum(axis=1), 1)
        used = count_MR[0] > 0
        spread = nats_MR[0, used] - loss * count_MR[0, used]  # of a ratio of sums over rows
        n = len(spread)
        se = math.sqrt(n / (n - 1) * np.sum(spread**2)) / count_MR[0].sum() if n > 1 else math.nan
        result = {
            "loss": float(loss),
            "loss_se": float(se),
            "perplexity": float(np.exp(min(loss, 700.0))),
            "bits_per_byte": float(loss / math.log(2) / self.data.valid.bytes_per_token),
            "tokens": float(count_MR[0].sum()),
        }
        return result | {f"mtp{i + 1}_loss": float(v) for i, v in enumerate(mtp)}


@functools.cache
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold, ascending, i64.

    They follow from the mesh: processes whose devices differ only along `tensor` hold the same ones, and the rows of
    one need not lie side by side.
    """
    held = NamedSharding(mesh, spec(("batch",))).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def place(mesh: Mesh, batch_size: int, batch: batches.Batch) -> losses.Batch:
    """Puts this process's rows of a batch, those of `local_rows`, on its devices."""
    rows, local_B = NamedSharding(mesh, spec(("batch", None))), local_rows(mesh, batch_size)

    def put(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:  # whose rows lie side by side, here too
            start, stop, _ = index[0].indices(batch_size)
            at = int(np.searchsorted(local_B, start))
            return local[at : at + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), rows, shard)

    return {k: put(v) for k, v in batch.items()}


def train_iterator(cfg: Config, mesh: Mesh, data: batches.Data) -> batches.TrainIterator:
    """This process's rows of the training batches, from their beginning. Raises UserError."""
    return batches.make_train_iterator(
        data,
        batch_size=cfg.train.batch_size,
        seed=cfg.train.seed,
        n_mtp=cfg.model.n_mtp,
        local_B=local_rows(mesh, cfg.train.batch_size),
    )


def valid_batches(cfg: Config, mesh: Mesh, data: batches.Data, limit: int) -> Iterator[batches.Batch]:
    """This process's rows of `limit` validation batches, cut as training's are accumulated. Raises UserError."""
    return batches.valid_batches(
        data,
        batch_size=cfg.train.micro_batch,
        n_mtp=cfg.model.n_mtp,
        limit=limit * cfg.train.grad_accum,
        local_B=local_rows(mesh, cfg.train.micro_batch),
    )


def abstract_state(cfg: Config, plan: Plan, mesh: Mesh, *, quantize: bool) -> steps.TrainState:
    """Shapes and shardings of the state of a phase that quantizes or does not, with nothing computed."""
    shapes = jax.eval_shape(lambda: steps.init_state(cfg, jax.random.key(0)))
    if quantize:
        shapes = jax.eval_shape(functools.partial(steps.branch, cfg, plan, quantize=True), shapes)
    places = steps.state_shardings(cfg, mesh, shapes)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)


def jit_eval_weights(
    cfg: Config, plan: Plan, state: steps.TrainState, *, quantize: bool
) -> Callable[[steps.TrainState], Weights]:
    """`steps.eval_weights`, jitted; the weights lie as the parameters of `state` do, arrays or their shapes."""
    return jax.jit(
        functools.partial(steps.eval_weights, cfg, plan, quantize=quantize),
        out_shardings=jax.tree.map(lambda s: s.sharding, state.params["model"]),
    )


def jit_rounding(plan: Plan, model: Weights, rule: str) -> Callable[[Weights], Weights]:
    """Parameters rounded to their grids under a scale rule, jitted; they lie as those of `model` do."""
    places = jax.tree.map(lambda a: a.sharding, model)
    return jax.jit(lambda params: fake.apply(plan, params, {}, rule=rule), out_shardings=places)


def jit_step(
    cfg: Config,
    plan: Plan,
    mesh: Mesh,
    state: steps.TrainState,
    *,
    quantize: bool,
    distill: float,
    freeze: str,
) -> Any:
    """The training step, (state, batch, teacher, factor) -> (state, metrics). The state is donated and stays in place.

    Args:
      state: arrays or their shapes, with the shardings that the step keeps.
      quantize, distill, freeze: as for `steps.train_step`.
    """
    return jax.jit(
        functools.partial(
            steps.train_step,
            cfg=cfg,
            plan=plan,
            quantize=quantize,
            distill=distill,
            freeze=freeze,
            groups=batch_groups(mesh),
        ),
        donate_argnums=0,
        out_shardings=(
            jax.tree.map(lambda s: s.sharding, state),
            NamedSharding(mesh, PartitionSpec()),  # every process reads the metrics
        ),
    )


def quant_plan(cfg: Config) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan and the coverage table of the model's parameters.

    Raises:
      UserError: the plan is unusable (`make_plan`), or empty where a phase trains on it.
    """
    shapes = param_shapes(cfg.model)
    plan = make_plan(shapes, cfg.model, cfg.quant)
    for name, phase in cfg.train.phases.items():
        if phase.quantize and not plan:
            raise UserError(
                f"config.train.phases.{name}.quantize is on and config.quant puts nothing on a grid; "
                "set config.quant.experts, or quantize=False"
            )
    return plan, coverage(plan, shapes)


def check_frozen(cfg: Config, plan: Plan) -> list[str]:
    """A line for each phase that freezes something.

    Raises:
      UserError: a phase freezes nothing that is there, or all that is trained.
    """
    lines = []
    for name, phase in cfg.train.phases.items():
        if not phase.freeze:
            continue
        scales = [f"scales/{path}" for path in plan] if phase.quantize and cfg.quant.scale == "learned" else []
        every = [*param_shapes(cfg.model), *scales]
        held = [path for path in every if is_frozen(path, phase.freeze)]
        where = f"config.train.phases.{name}.freeze={phase.freeze!r}"
        if not held:
            known = ", ".join(dict.fromkeys(re.sub(r"/\d+/", "/N/", path) for path in every))
            raise UserError(f"{where} is found in no parameter's name: {known}")
        if all(path.endswith("router/bias") for path in every if path not in held):  # it is moved by the load alone
            raise UserError(f"{where} is found in the names of all {len(held)} parameters: nothing would be trained")
        lines.append(f"{name} freezes {len(held)} of {len(every)} parameters: {held[0]}{', ...' * (len(held) > 1)}")
    return lines


def check_mesh(cfg: Config, mesh: Mesh) -> None:
    """Raises UserError where the model or the batch cannot be split over the mesh."""
    sizes = mesh.shape
    rows = cfg.train.micro_batch
    m = cfg.model
    for what, value, over, n in (
        ("train.batch_size / grad_accum", rows, "data*fsdp*expert", sizes["data"] * sizes["fsdp"] * sizes["expert"]),
        ("model.n_experts", m.n_experts, "expert", sizes["expert"]),
        ("model.n_kv_heads", m.n_kv_heads, "tensor", sizes["tensor"]),
        ("model.expert_dim", m.expert_dim, "tensor", sizes["tensor"]),
    ):
        if value % n:
            raise UserError(f"config.{what}={value} does not divide over mesh {over}={n}: change it or config.mesh")
    platform = mesh.devices.flat[0].platform
    if m.attention == "cudnn" and (platform != "gpu" or not attention.fits_cudnn(m, cfg.data.seq_len)):
        raise UserError(
            f"config.model.attention='cudnn' needs a GPU, model.dtype='bfloat16', heads of 8 to 128 by 8 and an even "
            f"seq_len, and here are {platform}, {m.dtype}, model.head_dim={m.head_dim} and "
            f"data.seq_len={cfg.data.seq_len}: use 'auto'"
        )
    if m.attention == "splash" and (platform != "tpu" or not attention.fits_splash(m, cfg.data.seq_len)):
        raise UserError(
            f"config.model.attention='splash' needs a TPU, model.dtype='bfloat16', heads of 128 and a seq_len that 128 "
            f"divides, and here are {platform}, {m.dtype}, model.head_dim={m.head_dim} and "
            f"data.seq_len={cfg.data.seq_len}: use 'auto'"
        )
    chunk, groups = cfg.train.loss_chunk, batch_groups(mesh)
    tokens = rows * cfg.data.seq_len
    if chunk and tokens > chunk and (tokens % chunk or chunk % groups):
        over = f" and be a multiple of the {groups} parts that the mesh splits a batch into" if groups > 1 else ""
        raise UserError(f"config.train.loss_chunk={chunk} must divide the {tokens} tokens of a micro-batch{over}")
