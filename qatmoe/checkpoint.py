"""Checkpoints of a run.

    WORKDIR/checkpoints/PHASE/STEP/state/       the arrays, written by orbax under flat '/'-joined paths; `state-1`, ...
                                                where weights that may not fit in memory were written in parts
                                  /data.json     state of the data iterator
                                  /meta.json     config, phase, step, done, stays, trained_tokens, version,
                                                 {path: [dtype, shape]}, and, if in parts, {path: folder}
                                  /manifest.json size and CRC-32 of every other file

A save is staged in `.saving-STEP` and renamed to `STEP` as its very last act: a directory named by a number is
complete, whenever the process was killed. Damage done later (a truncated or altered file) is found by the manifest
before a single array is read.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qatmoe import distributed
from qatmoe.errors import RunError, UserError
from qatmoe.files import cannot_look, is_there, write_atomically
from qatmoe.tree import leaves_by_path

log = logging.getLogger(__name__)

_MAPPED = ts.Context({"file_io_mode": {"mode": "memmap"}})

Json = dict[str, Any]

# Seconds. After so long a save is given up. Orbax's own 20 minutes, for all arrays of one, are less than a state of
# 84 GB takes at 70 MB/s; what is slow must end, and only what hangs be told.
SAVE_S = 24 * 3600

# Checkpoints that this process found undamaged: the manifest's digest, and size and time of each file. A start asks for
# some of them several times, and to look at every byte of a large one takes minutes.
_verified: dict[Path, tuple[str, list[tuple[int, int, int]]]] = {}


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not the ones that were saved."""


class Checkpoints:
    """The checkpoints of one phase.

    All processes of a multi-host run make one of a directory that they share and call the same methods in the same
    order. Each writes and reads the parts of arrays that it holds; the first process alone writes the small files,
    renames, and compares every byte before a restore. What is restored lies on the shardings that are asked for,
    whatever devices and processes saved it. A save that fails in one process raises there, and not in the others.
    Making one and restoring from it write nothing to the directory.
    """

    def __init__(self, workdir: str | Path, phase: str, keep: int = 2):
        self.phase = phase
        self.directory = Path(workdir).absolute() / "checkpoints" / phase
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False), timeout_secs=SAVE_S)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None  # step, and its save

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self, step: int) -> Path:
        """Directory of one checkpoint."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Saved steps, ascending. Each was written completely; whether it still is so is for `restore` to find out.

        Raises:
          UserError: what is there cannot be known, or is no folder.
        """
        if not is_there(self.directory):
            return []
        try:
            return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir())
        except FileNotFoundError:
            return []
        except OSError as e:
            raise cannot_look(self.directory, e) from e

    def latest(self) -> int | None:
        """The newest saved step. Raises as `steps`."""
        return max(self.steps(), default=None)

    # Saving.

    def save(
        self,
        step: int,
        state: Any,
        data_state: Json,
        meta: Json,
        *,
        final: bool = False,
        stays: bool = False,
        wait: bool = False,
    ) -> None:
        """Starts saving; returns when the arrays are copied off the devices, so that `state` may then be donated.

        Waits first for a save that is still under way. Of the phase, the newest `keep` checkpoints, those that were
        saved to stay and any final one do; later steps than this one are removed, for they are what the run did before
        it was taken back.

        Args:
          state: any tree of arrays (random keys as raw data).
          data_state: state of the data iterator, JSON.
          meta: what the reader must know, JSON (the config, the tokenizer's hash). Added to it: `phase`, `step`,
            `done` (this is the phase's last checkpoint), `stays`, `version` and `tensors`, {path: [dtype, shape]}.
          final: this is the phase's last checkpoint.
          stays: newer ones do not replace it.
          wait: return only when it is on disk.

        Raises:
          RunError: the directory could not be written, now or by the previous save. Older checkpoints are intact.
        """
        self.wait()
        arrays = {name: jnp.asarray(leaf) for name, leaf in leaves_by_path(state).items()}
        own = {"done": final, "stays": stays, "tensors": _shapes(arrays)}
        texts = self._texts(step, data_state, meta | own)
        staging = self.directory / f".saving-{step}"
        try:
            if distributed.first():
                self._remove_leftovers()
                staging.mkdir(parents=True)
            distributed.barrier(f"staged {self.phase} {step}")  # its folder may have another path on each host
            self._orbax.save(staging / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as e:
            self._abandon(staging, e)
        self._pending = step, self._thread.submit(self._commit, step, staging, texts)
        if wait:
            self.wait()

    def save_weights(self, step: int, parts: Iterable[dict[str, np.ndarray]], meta: Json) -> None:
        """Saves weights alone as the phase's last checkpoint, one part after another, each freed before the next.

        For one process; an error of `parts` is passed on as it is.

        Args:
          parts: flat {path: array}; together all the weights.
          meta: as in `save`.

        Raises:
          RunError: the directory could not be written.
        """
        self.wait()
        staging = self.directory / f".saving-{step}"
        tensors: dict[str, list[Any]] = {}
        folders: dict[str, str] = {}
        try:
            self._remove_leftovers()
            staging.mkdir(parents=True)
            for i, arrays in enumerate(parts):
                folder = f"state-{i}" if i else "state"
                self._orbax.save(staging / folder, args=ocp.args.PyTreeSave(arrays))
                self._orbax.wait_until_finished()
                tensors |= _shapes(arrays)
                folders |= dict.fromkeys(arrays, folder)
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except Exception as e:
            self._abandon(staging, e)
        self._commit(step, staging, self._texts(step, {}, meta | {"done": True, "tensors": tensors, "parts": folders}))

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          RunError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            step, saved = pending
            saved.result()
            distributed.barrier(f"saved {self.phase} {step}")

    def close(self) -> None:
        """Waits, then ends the threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _texts(self, step: int, data_state: Json, meta: Json) -> dict[str, str]:
        own = {"phase": self.phase, "step": step, "version": _version()}
        return {"data.json": json.dumps(data_state), "meta.json": json.dumps(meta | own)}

    def _commit(self, step: int, staging: Path, texts: dict[str, str]) -> None:
        try:
            self._orbax.wait_until_finished()
            if not distributed.first():
                return
            for folder in sorted(staging.glob("state*")) or [staging / "state"]:
                if not (folder / "manifest.ocdbt").is_file():  # orbax, which finds nothing to put together, only warns
                    raise RunError(
                        f"no checkpoint was written under {self.directory}: orbax left {folder.name}/manifest.ocdbt, "
                        "without which there are no weights, unwritten; choose another workdir"
                    )
            for name, text in texts.items():
                write_atomically(staging / name, text)
            files = sorted(p for p in staging.rglob("*") if p.is_file())
            write_atomically(staging / "manifest.json", json.dumps({"files": _digests(staging, files)}))
            if self.path(step).exists():
                os.rename(self.path(step), self.directory / f".old-{step}")
            os.rename(staging, self.path(step))
            _sync_directory(self.directory)
            self._prune(step)
        except Exception as e:
            self._abandon(staging, e)

    def _abandon(self, staging: Path, error: Exception) -> None:
        """Frees the space of a save that failed, and raises what the user can act on."""
        if distributed.first():
            shutil.rmtree(staging, ignore_errors=True)
        reason = _disk_error(error)
        if reason is None:
            raise error
        try:
            known = self.steps()
            good = f"step {known[-1]} is intact" if known else "no earlier checkpoint of this phase exists"
        except UserError:
            good = "whether there are earlier ones cannot be seen now"
        raise RunError(
            f"cannot write a checkpoint under {self.directory}: {reason}; make room or write permission there and "
            f"start the same command again ({good})"
        ) from error

    def _prune(self, newest: int) -> None:
        steps = self.steps()
        earlier = [s for s in steps if s <= newest]
        for step in steps:
            if step > newest or (step not in earlier[-self._keep :] and not self.stays(step)):
                # Renamed first: a half-deleted directory must not look like a checkpoint.
                os.rename(self.path(step), self.directory / f".old-{step}")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(".*"):
            if path.name.startswith((".saving-", ".old-")):
                shutil.rmtree(path)

    def stays(self, step: int) -> bool:
        """Whether newer checkpoints do not replace one: it is a final one, or was saved to stay."""
        with contextlib.suppress(DamagedCheckpoint):  # not `said`: it would wait for the save that asks
            meta = _load_json(self.path(step) / "meta.json")
            return bool(meta.get("done") or meta.get("stays"))
        return False

    # Restoring.

    def check(self, step: int, abstract_state: Any) -> Json:
        """The `meta` of one checkpoint, after comparing shapes and types and every byte; raises as `restore` does."""
        meta = self.meta(step)
        _require_same(meta["tensors"], _shapes(leaves_by_path(abstract_state)), self.path(step))
        return meta

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, Json, Json]:
        """Reads one checkpoint, after checking every byte of it.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct`; arrays are put on their shardings (the first device where
            one has none). It may hold some of the top-level groups only, e.g. {"params": ...}.

        Returns:
          The state (with the structure of `abstract_state`), the data iterator's state and `meta`.

        Raises:
          DamagedCheckpoint: a file is missing, truncated or altered.
          UserError: there is no such step, or its arrays are of another architecture.
        """
        with distributed.together():
            if distributed.first():
                self._verify_or_hint(step)
        return self._read(step, abstract_state)

    def _verify_or_hint(self, step: int) -> None:
        self._require(step)
        try:
            self._verify(step)
        except DamagedCheckpoint as e:
            older = self.latest_good(before=step)
            hint = "no older checkpoint of this phase is complete"
            if older is not None:
                hint = f"step {older} is complete: to go on from there, delete {self.path(step)}"
            raise DamagedCheckpoint(f"{e}; {hint}") from e

    def restore_latest(self, abstract_state: Any) -> tuple[Any, Json, Json] | None:
        """`restore` of the newest checkpoint that is undamaged; logs a warning for each one it passes over.

        Process 0 chooses it for all. Returns None where nothing was saved yet.

        Raises:
          DamagedCheckpoint: there are checkpoints, and none of them is complete.
          UserError: the newest complete one is of another architecture.
        """
        with distributed.together():
            step = self._newest_undamaged() if distributed.first() else None
        step = distributed.from_first(step)
        return None if step is None else self._read(step, abstract_state)

    def _newest_undamaged(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                self._verify(step)
                return step
            except DamagedCheckpoint as e:
                log.warning("skipping a damaged checkpoint: %s", e)
        if steps:
            raise DamagedCheckpoint(
                f"{self.directory}: all its checkpoints ({', '.join(map(str, steps))}) are damaged; delete the "
                "directory to train this phase again"
            )
        return None

    def latest_good(self, before: int | None = None) -> int | None:
        """The newest step whose files are all as they were saved, optionally among those before a step."""
        for step in reversed(self.steps()):
            if before is None or step < before:
                try:
                    self._verify(step)
                except DamagedCheckpoint:
                    continue
                return step
        return None

    def said(self, step: int) -> Json:
        """`meta` without a look at the checkpoint's other files: reads one small file."""
        self._require(step)
        return _load_json(self.path(step) / "meta.json")

    def in_parts(self, step: int) -> bool:
        """Whether a checkpoint holds weights alone, as `save_weights` writes them."""
        return "parts" in self.said(step)

    def meta(self, step: int) -> Json:
        """The `meta` of one checkpoint, without its arrays.

        Raises:
          UserError: there is no such step, or it is damaged.
        """
        self._require(step)
        self._verify(step)
        return self.said(step)

    def digest(self, step: int) -> str:
        """What tells a checkpoint's files from any others: the hash of its manifest, which has a checksum of each."""
        return hashlib.blake2b((self.path(step) / "manifest.json").read_bytes(), digest_size=16).hexdigest()

    def _require(self, step: int) -> None:
        self.wait()
        if not self.path(step).is_dir():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.path(step)}: no such checkpoint; steps of phase {self.phase!r} there: {there}")

    def _verify(self, step: int) -> None:
        path = self.path(step)
        files = _load_json(path / "manifest.json").get("files")
        if not isinstance(files, dict):
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: manifest.json lists no files")
        try:
            stats = [os.stat(path / name) for name in files]
            written = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
            known = (self.digest(step), written)
            if _verified.get(path) == known:
                return
            found = _digests(path, [path / name for name in files])
        except OSError as e:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {e.filename}: {e.strerror}") from e
        for name, (size, crc) in files.items():
            if found[name] != [size, crc]:
                is_ = f"{found[name][0]} bytes of {size}" if found[name][0] != size else "its contents changed"
                raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name}: {is_}")
        _verified[path] = known

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, Json, Json]:
        path = self.path(step)
        wanted = leaves_by_path(abstract_state)
        with distributed.together():
            meta = _load_json(path / "meta.json")
            _require_same(meta["tensors"], _shapes(wanted), path)
        arrays = self.arrays(meta, wanted)
        leaves = [arrays[name] for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return state, _load_json(path / "data.json"), meta

    def arrays(self, meta: Json, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some arrays of the checkpoint whose `meta` this is, by flat path; `meta()` has compared every byte before."""
        found: dict[str, jax.Array] = {}
        parts = meta.get("parts", {})
        for folder in dict.fromkeys(parts.get(name, "state") for name in wanted):
            abstract = {n: _placed(leaf) for n, leaf in wanted.items() if parts.get(n, "state") == folder}
            found |= self._orbax.restore(
                self.path(meta["step"]) / folder,
                args=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                ),
            )
        return found

    def read(self, meta: Json, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Some whole arrays, those of `arrays`, in the host's memory: read from the mapped files straight into it.

        Several times as fast as orbax, which copies twice into fresh memory; for programs on one host.
        """
        found = {}
        for name in names:
            dtype, shape = meta["tensors"][name]
            folder = (self.path(meta["step"]) / meta.get("parts", {}).get(name, "state")).resolve()  # no ".." for ts
            base = {"driver": "file", "path": f"{folder}/"}  # not an address, in which "%", "#" and "?" mean more
            kvstore = {"driver": "ocdbt", "base": base, "path": name}
            source = ts.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True, context=_MAPPED).result()
            out = _empty(tuple(shape), jnp.dtype(dtype))
            ts.array(out, copy=False, write=True).write(source).result()
            found[name] = out
        return found


def trained_tokens(workdir: str | Path, phase: str, step: int) -> int:
    """Tokens of training up to a checkpoint, those of the phases that it comes from included, in other runs too.

    It says it. One of before does not, and is counted by its run's configuration and newest checkpoints, as if what
    config.init_from names had been trained by that configuration from its first step.

    Raises:
      UserError: there is no such checkpoint.
    """
    with Checkpoints(workdir, phase) as checkpoints:
        meta = checkpoints.said(step)
    tokens, newest = 0, step
    while "trained_tokens" not in meta:
        train = meta["config"]["train"]
        tokens += newest * train["batch_size"] * meta["config"]["data"]["seq_len"]
        phase = train["phases"][phase]["start"]
        if not phase:
            return tokens
        with Checkpoints(workdir, phase) as checkpoints:
            found = checkpoints.latest_good()
            newest = train["phases"][phase]["steps"] if found is None else found
            meta = meta if found is None else checkpoints.said(found)
    return tokens + meta["trained_tokens"]


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that jax takes over without a copy, which needs it aligned; numpy asks for huge pages, malloc does not."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _shapes(flat: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in flat.items()}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Compares the top-level groups that are wanted, in both directions."""
    groups = {name.split("/")[0] for name in wanted}
    saved = {name: what for name, what in saved.items() if name.split("/")[0] in groups}
    differ = [name for name in sorted(saved | wanted) if saved.get(name) != wanted.get(name)]
    if not differ:
        return
    show = lambda what: "absent" if what is None else f"{what[0]} {tuple(what[1])}"  # noqa: E731
    first = "; ".join(f"{n} is {show(saved.get(n))} there, {show(wanted.get(n))} here" for n in differ[:3])
    raise UserError(
        f"checkpoint {path} is of another architecture: {first} ({len(differ)} tensors differ); use the config that "
        "it was trained with, or another workdir"
    )


def _digests(root: Path, files: list[Path]) -> dict[str, list[int]]:
    """{path below root: [size, CRC-32]}. The CRC releases the GIL, so that training goes on beside it."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip((str(f.relative_to(root)) for f in files), pool.map(_digest, files), strict=True))


def _digest(file: Path) -> list[int]:
    size = crc = 0
    with open(file, "rb") as f:
        while chunk := f.read(1 << 23):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


def _load_json(file: Path) -> Json:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else "not complete JSON"
        raise DamagedCheckpoint(f"checkpoint {file.parent} is damaged: {file.name}: {why}") from e
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"checkpoint {file.parent} is damaged: {file.name}: not a JSON object")
    return value


def _disk_error(error: BaseException | None) -> str | None:
    """What the disk did not do, or the operating system said: tensorstore passes its code on in the message only."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, UserError):
        return _disk_error(error.__cause__)
    if isinstance(error, TimeoutError):
        waited = distributed.coordination_error(error)
        if waited and "DEADLINE_EXCEEDED" not in str(waited):
            return None  # orbax says the same where another process is gone
        return f"it took longer than {SAVE_S:,} s"
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _version() -> str:
    try:
        return importlib.metadata.version("qatmoe")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return "source"
