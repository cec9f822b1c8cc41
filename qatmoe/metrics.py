"""What a run reports while it runs: metrics.jsonl, TensorBoard and the terminal's progress line.

WORKDIR/metrics.jsonl is the record that everything else is made from; one JSON object a line:

    {"phase": "qat", "step": 300, "split": "train", "time": 1760000000.0, "loss": 3.91, ...}

`split` is "train", "valid" (while training), "load" (each expert's, 1 an even share; at validations), "health" (of
the quantizer) or "final" (the validation at the end of a phase, or of a PTQ baseline). Losses are nats per token. A
value that is not finite is stored as null, read as nan.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from qatmoe import distributed
from qatmoe.errors import UserError
from qatmoe.files import write_atomically

# tensorboardX imports torch where that is installed, which takes seconds: only a run that writes curves pays for it.
if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FIELDS = ("phase", "step", "split", "time")

# TensorBoard's groups of training values whose names have none; what is not listed is grouped by split.
GROUPS = {
    **dict.fromkeys(("ce", "kl", "mtp", "balance", "z"), "loss"),
    **dict.fromkeys(("lr", "grad_norm"), "optim"),
    **dict.fromkeys(("tokens", "tokens_per_s", "step_s"), "speed"),
}

Record = dict[str, Any]


def read(workdir: str | Path) -> list[Record]:
    """All records of a run, in the order they were written; [] where there are none.

    A last line that a killed process left half-written is not a record.

    Raises:
      UserError: any other line is not a record.
    """
    file = Path(workdir) / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [_parse(line, f"{file}:{n}") for n, line in enumerate(lines, start=1)]


def training_seconds(trained: Sequence[Record]) -> float:
    """What a phase's records of split "train" took: no compiling, no validation, no time that the run lay stopped."""
    starts = [0, *(r["step"] for r in trained)]
    return sum(r["step_s"] * (r["step"] - start) for r, start in zip(trained, starts, strict=False))


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
        return {f: record[f] for f in FIELDS} | {
            k: math.nan if v is None else v for k, v in record.items() if k not in FIELDS
        }
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{where}: not a metrics record ({line[:60]!r}): remove that line") from e


class Metrics:
    """Writes records and, if `tensorboard`, event files under WORKDIR/tb/PHASE.

    In a multi-host run every process makes one; only the first writes.
    """

    def __init__(self, workdir: str | Path, tensorboard: bool = True):
        self._workdir = Path(workdir)
        self._file_path = self._workdir / "metrics.jsonl"
        self._active = distributed.first()
        self._tensorboard = tensorboard and self._active
        self._writers: dict[str, SummaryWriter] = {}
        self._purge: dict[str, int] = {}
        self._file: TextIO | None = None
        if self._active:
            self._drop_half_line()
            self._open()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, phase: str, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one record and its TensorBoard scalars.

        The tags: "loss/train", "loss/valid"; in training by group ("optim/lr"), else by split ("valid/perplexity").

        Args:
          step: optimizer steps taken in this phase.
          split: "train", "valid", "load", "health" or "final".
          values: scalars (numbers or 0-d arrays).

        Raises:
          UserError: the file cannot be written.
        """
        if self._file is None:
            return
        numbers = {name: float(np.asarray(v)) for name, v in values.items()}
        if reserved := set(numbers) & set(FIELDS):
            raise ValueError(f"metrics cannot be named {sorted(reserved)}: every record has these fields")
        record = {"phase": phase, "step": int(step), "split": split, "time": round(time.time(), 3)}
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        try:
            self._file.write(json.dumps(record | finite, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as e:
            raise UserError(f"cannot write {self._file_path}: {e.strerror}; make room there and start again") from e
        if writer := self._writer(phase):
            for name, v in numbers.items():
                writer.add_scalar(_tag(name, split), v, step)

    def histogram(self, phase: str, step: int, name: str, values: Any) -> None:
        """Adds a histogram of an array to TensorBoard; values that are not finite are left out."""
        array = np.asarray(values, np.float32).ravel()
        array = array[np.isfinite(array)]
        if array.size and (writer := self._writer(phase)):
            writer.add_histogram(name, array, step)

    def text(self, name: str, text: str) -> None:
        """Adds a text about the whole run (the plan, the config) to TensorBoard, as preformatted Markdown."""
        if writer := self._writer("run"):
            indented = "\n".join("    " + line for line in text.splitlines())
            writer.add_text(name, indented, 0)

    def rewind(self, phase: str, step: int) -> None:
        """Forgets what `phase` recorded after `step`, from which it is about to go on."""
        if self._file is None:
            return
        records = read(self._workdir)
        kept = [r for r in records if r["phase"] != phase or r["step"] <= step]
        if len(kept) < len(records):
            self._file.close()
            write_atomically(self._file_path, "".join(_line(r) for r in kept))
            self._open()
        if writer := self._writers.pop(phase, None):
            writer.close()
        self._purge[phase] = step + 1

    def close(self) -> None:
        """Flushes and closes all files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        try:
            self._file = open(self._file_path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as e:
            raise UserError(f"cannot write {self._file_path}: {e.strerror}") from e

    def _drop_half_line(self) -> None:
        if self._file_path.exists():
            data = self._file_path.read_bytes()
            if data and not data.endswith(b"\n"):
                with open(self._file_path, "r+b") as f:
                    f.truncate(data.rfind(b"\n") + 1)

    def _writer(self, phase: str) -> "SummaryWriter | None":
        if not self._tensorboard:
            return None
        if phase not in self._writers:
            from tensorboardX import SummaryWriter

            directory = self._workdir / "tb" / phase.replace(":", "_")
            # Events at or after purge_step, written before the phase was taken back, are hidden by TensorBoard. The
            # suffix keeps two files of one second apart: tensorboardX would write the second over the first.
            self._writers[phase] = SummaryWriter(
                str(directory),
                purge_step=self._purge.get(phase),
                flush_secs=10,
                filename_suffix=f".{time.time_ns()}",
            )
        return self._writers[phase]


def _line(record: Record) -> str:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _tag(name: str, split: str) -> str:
    if name == "loss":
        return f"loss/{split}"
    if split != "train":
        return f"{split}/{name}"
    return name if "/" in name else f"{GROUPS.get(name, split)}/{name}"


def hparams(workdir: str | Path, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
    """Writes a run's settings and results for TensorBoard's HPARAMS tab, in place of what it wrote before.

    They are a subrun, WORKDIR/tb/hparams, so `tensorboard --logdir` of a folder of runs has a row for each of them.

    Args:
      settings: {dotted key: text, number or truth value}; anything else is written as text.
      results: numbers of the finished run.
    """
    from tensorboardX import SummaryWriter, summary

    folder = Path(workdir) / "tb" / "hparams"
    shutil.rmtree(folder, ignore_errors=True)
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
    # Without the summary of an experiment, which `add_hparams` writes too: TensorBoard would take one run's for the
    # list of all settings. So it makes the list from all runs, and puts first the settings in which they differ.
    _, start, end = summary.hparams(plain, dict(results))
    with SummaryWriter(str(folder)) as writer:
        writer.file_writer.add_summary(start)
        writer.file_writer.add_summary(end)
        for name, value in results.items():
            writer.add_scalar(name, value, 0)


def device_memory(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """GiB in use, now and at most since the process began, of the fullest of this process's devices.

    Empty where the devices do not count, as CPUs do not.
    """
    stats = [d.memory_stats() for d in devices or jax.local_devices()]
    keys = {"memory/peak_gib": "peak_bytes_in_use", "memory/in_use_gib": "bytes_in_use"}
    found = {name: [s[key] for s in stats if s and key in s] for name, key in keys.items()}
    return {name: max(values) / 2**30 for name, values in found.items() if values}


class Trace:
    """The profiler over a few steps of a phase, for the profile plugin of TensorBoard.

    Writes WORKDIR/tb/PHASE/plugins/profile/TIME_pPROCESS/. A phase that goes on after its first traced step is not
    traced. Of several processes each traces its own devices into a folder of its own, which the plugin lists as a run:
    files there are named after the host, so in one folder processes of one host would write over each other.
    Tracing counts in the speed of those steps.
    """

    def __init__(self, workdir: str | Path, phase: str, first: int, steps: int):
        """Traces `steps` steps from step `first` on; nothing where `first` is 0."""
        self._folder = Path(workdir) / "tb" / phase
        self._first, self._last = first, first + steps - 1
        self._on = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Begins where `step` is the first one, when all that came before is done."""
        if self._first and step == self._first:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.session_id = time.strftime(f"%Y_%m_%d_%H_%M_%S_p{jax.process_index()}")
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._on = True

    def after(self, step: int, state: Any) -> None:
        """Ends where `step` is the last one, when it is done."""
        if self._on and step == self._last:
            jax.block_until_ready(state)
            self.__exit__()


class Progress:
    """The terminal's view of one phase: step, loss, tokens per second, time left.

    Of several processes only the first shows it.
    On a terminal a bar; elsewhere (a log file, a batch job) one plain line every `every` seconds and at the end.
    """

    def __init__(
        self,
        phase: str,
        start: int,
        steps: int,
        *,
        steps_after: int = 0,
        every: float = 30.0,
        stream: TextIO | None = None,
    ):
        """Starts at step `start` of `steps`; `steps_after` are those of the phases that follow."""
        self._active = distributed.first()
        self._phase, self._steps, self._steps_after = phase, steps, steps_after
        self._stream = stream or sys.stderr
        self._every = every
        self._first: tuple[int, float] | None = None  # step and time of the first update: before it lies compilation
        self._line = ""
        self._printed = time.monotonic()
        self._bar = None
        if self._active and self._stream.isatty():
            form = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {postfix}"
            self._bar = tqdm(total=steps, initial=start, desc=phase, file=self._stream, bar_format=form)

    def update(self, step: int, *, loss: float, tokens_per_s: float) -> None:
        """Reports that `step` is done."""
        if not self._active:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        text = f"loss {loss:.4f}  {_short(tokens_per_s)} tokens/s"
        if step > self._first[0]:
            per_step = (now - self._first[1]) / (step - self._first[0])
            text += f"  {_duration(per_step * (self._steps - step + self._steps_after))} left"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._line = f"{self._phase} {step}/{self._steps}  {text}"
        if now - self._printed >= self._every:
            self._print()

    def close(self) -> None:
        """Leaves the last state on the terminal."""
        if self._bar is not None:
            self._bar.close()
        elif self._line:
            self._print()

    def _print(self) -> None:
        print(self._line, file=self._stream, flush=True)
        self._line, self._printed = "", time.monotonic()


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"
