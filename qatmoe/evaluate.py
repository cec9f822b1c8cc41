"""How much of a model is left: every branch of a run, and every rounding of its weights and cache, beside the control.

    python -m qatmoe.evaluate --run runs/moe_2bit
    python -m qatmoe.evaluate --run runs/moe_2bit --text code='src/**/*.jsonl' --text wiki=wiki.jsonl.zst --rows '^qat'

Rows: the phases as deployed, in full precision the trained f32 weights; the control, and each quantized phase, rounded
to every format (`requantize.formats`) on the tensors of the run's quant plan; both with every type of key/value cache.
Each is compared with the reference, the phase `control` or the last one in full precision, and what was made from a
quantized phase also with that phase itself (kld_own). Domains: the run's own held-out text and any --text.
--reference RUN:PHASE takes the reference from another run, as where branches of one trunk are runs of their own.
docs/audit.md defines the figures.

Writes WORKDIR/audit.json row by row, then audit.md and audit.png, also when it is stopped between rows. The same
command goes on where it was stopped, and computes rows anew when what they depend on has changed: the checkpoints, the
text, the number of tokens, llama-cpp-python, the dtype, the kind of device or how many there are.

It takes all devices that it sees, in one process, and splits weights and windows over them.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qatmoe import audit_report, cli, fidelity, gptq
from qatmoe import requantize as rounding
from qatmoe.audit import Audit, Row, choose, open_run
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import ModelConfig
from qatmoe.convert import llama
from qatmoe.convert.weights import Branch, tokenizer_of
from qatmoe.data import batches, domains
from qatmoe.data.domains import Domain
from qatmoe.errors import UserError
from qatmoe.fidelity import Outcome
from qatmoe.files import alone, write_atomically
from qatmoe.loss import Batch, Params
from qatmoe.mesh import batch_groups, local_mesh
from qatmoe.model.cache import CacheType
from qatmoe.quant.grid import GRIDS
from qatmoe.run import Interrupted, Stop, place

TOKENS = 32768
CALIBRATION = 16384  # tokens of training text that importance matrices are made from, and that GPTQ sees
_BATCH_TOKENS = 8192  # of each device
_VERSION = 5  # raise it when a figure's meaning changes


# ---- the text --------------------------------------------------------------------------------------------------------


def load_domains(
    audit: Audit, texts: Sequence[str], tokens: int, text_key: str = ""
) -> tuple[list[Domain], np.ndarray]:
    """The run's own held-out text and each NAME=SOURCE, and windows (M, L) of training text for importance matrices.

    Args:
      text_key: the field of the sources' rows that holds the text; the run's data.text_key by default.

    Raises:
      UserError: a text that cannot be read, a name that is missing, taken or not fit for a table, or fewer tokens than
        a window.
    """
    if text_key and not texts:
        raise UserError(f"--text_key {text_key}: is of the rows of every --text, and there is none: give one too")
    sources = []
    for text in texts:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise UserError(f"--text {text!r}: write NAME=PATH, e.g. code=src.jsonl")
        if not name.isprintable() or "|" in name:
            raise UserError(f"--text {text!r}: a name goes into tables; give one without | and control characters")
        sources.append((name, source))
    hashes = {workdir: tokenizer_of(workdir).hash for workdir in (audit.workdir, audit.reference.workdir)}
    own = audit.cfg.data
    if own.tokenizer not in ("train", "default"):  # the file may be elsewhere by now, and the run has it
        own = dataclasses.replace(own, tokenizer=str(audit.workdir / "tokenizer.json"))
    data = batches.load_data(own, audit.cfg.model.vocab_size)
    for workdir, known in hashes.items():
        if known != data.tokenizer.hash:
            raise UserError(
                f"{workdir}/tokenizer.json is not what config.data.tokenizer={audit.cfg.data.tokenizer!r} of "
                f"{audit.workdir} gives now: restore the training text or the tokenizer"
            )
    found = [domains.of_run(data, audit.model.n_mtp, tokens)]
    cfg = dataclasses.replace(audit.cfg.data, text_key=text_key or audit.cfg.data.text_key)
    for name, source in sources:
        if name in [d.name for d in found]:
            raise UserError(f"--text {name}={source}: there is a text of that name already; choose another")
        found.append(domains.of_source(name, source, cfg, data.tokenizer, audit.model.n_mtp, tokens))
    length = audit.cfg.data.seq_len
    stream, count = data.train.tokens, max(1, min(len(data.train.tokens), CALIBRATION) // length)
    starts = np.arange(count) * ((len(stream) - length) // count)
    return found, np.stack([stream[s : s + length] for s in starts]).astype(np.int32)


# ---- computing -------------------------------------------------------------------------------------------------------


class Bench:
    """The windows of all domains, split over devices, what the reference makes of them, and the bootstrap's weights."""

    def __init__(self, audit: Audit, mesh: Mesh, found: list[Domain], calibration_ML: np.ndarray):
        self.audit, self.domains, self._calibration_ML = audit, found, calibration_ML
        self._mesh, self._groups = mesh, batch_groups(mesh)
        self._length = length = audit.cfg.data.seq_len
        windows = {k: np.concatenate([d.windows[k] for d in found]) for k in found[0].windows}
        self._size = M = len(windows["tokens"])
        B = min(M, self._groups * max(1, _BATCH_TOKENS // length))
        B += -B % self._groups
        padded = {k: np.concatenate([a, np.zeros((-M % B, *a.shape[1:]), a.dtype)]) for k, a in windows.items()}
        cut = ({k: a[i : i + B] for k, a in padded.items()} for i in range(0, M, B))
        self._batches: list[Batch] = [place(mesh, B, rows) for rows in cut]
        chunk = fidelity.chunk_size(B * length // self._groups, audit.model.vocab_size)
        self._options = {"cfg": audit.model, "chunk": chunk}
        self._tokens = 2 * len(self._batches) * B * length  # of a row: twice through the model, once forced
        self.tokens_per_s = 0.0  # of the last row, its comparison with the reference included
        unit_counts = [int(d.unit_M[-1]) + 1 for d in found]
        starts = np.cumsum([0, *unit_counts])
        self._unit_M = np.concatenate([d.unit_M + s for d, s in zip(found, starts, strict=False)])
        self._domain_M = np.repeat(np.arange(len(found)), [len(d.document_M) for d in found])
        self._domain_U = np.repeat(np.arange(len(found)), unit_counts)
        self._weights_RU = fidelity.resample(self._domain_U)
        self._bytes_M = np.repeat([d.bytes_per_token for d in found], [len(d.document_M) for d in found])
        self._reference: tuple[Params, list[Outcome]] | None = None
        self._branch = ""
        self._params: Params = {}
        self._own: tuple[Params, list[jax.Array]] | None = None
        self._importance: dict[str, np.ndarray] | None = None

    def judge(self, row: Row) -> dict[str, Any]:
        """All figures of a row, as audit.json holds them."""
        if self._reference is None:
            self._reference = self._outcomes_of_reference()
        self._enter(row.branch)
        params, joined = self._params, 1
        if row.rounded:
            params, joined = self._rounded(row.rounded)
        made = not self.audit.is_reference(row.branch) and (row.rounded or row.cache)
        own = self._own_outcomes() if made else None
        started = time.perf_counter()
        figures = self._figures(params, row.cache, own)
        self.tokens_per_s = self._tokens / (time.perf_counter() - started)
        scopes = self._summaries(figures)
        return {
            "row": row.name,
            "group": row.group,
            "branch": row.branch,
            "step": self.audit.steps[row.branch],
            "trained_tokens": self.audit.trained_tokens[row.branch],
            "format": row.format,
            "rule": row.rule,
            "bits_per_weight": row.bits,
            "joined_rows": joined,
            "kv": str(row.cache or ""),
            "kv_bits": 8 * row.cache.bytes(1, 1) / 2 if row.cache else None,  # as many keys as values
            "reference": self.audit.reference.name,
            **scopes[0],
            "domains": dict(zip([d.name for d in self.domains], scopes[1:], strict=True)),
        }

    def _outcomes_of_reference(self) -> tuple[Params, list[Outcome]]:
        """Its head and what it makes of all windows; its other weights are let go of."""
        with self.audit.reference.open() as opened:
            params = opened.numbers(self._mesh)
        return fidelity.head_of(params), self._outcomes(params, self.audit.reference.model)

    def _enter(self, branch: str) -> None:
        """Holds the weights of one branch, and of no other."""
        if branch != self._branch:
            self._params, self._own, self._importance = {}, None, None
            with Branch(self.audit.workdir, branch, self.audit.steps[branch], rest="F32") as opened:
                self._branch, self._params = branch, opened.numbers(self._mesh)

    def _own_outcomes(self) -> tuple[Params, list[jax.Array]]:
        """The head and the hidden states of the branch itself."""
        if self._own is None:
            hidden = [outcome.hidden_BLD for outcome in self._outcomes(self._params, self.audit.model)]
            self._own = fidelity.head_of(self._params), hidden
        return self._own

    def _rounded(self, fmt: rounding.Format) -> tuple[Params, int]:
        """The branch in another format, and how many rows were joined for it."""
        plan = self.audit.plan
        if fmt.rule == "gptq":
            grid, windows_ML = GRIDS[fmt.name], self._calibration_ML
            return gptq.requantize(self._params, self.audit.model, list(plan), grid, windows_ML), 1
        importance = self._importance_of_branch() if fmt.rule == "imatrix" else None
        return rounding.requantize(self._params, plan, fmt, importance)

    def _importance_of_branch(self) -> dict[str, np.ndarray]:
        if self._importance is None:
            with jax.set_mesh(self._mesh):
                self._importance = rounding.importance(
                    self._params, self.audit.model, self._calibration_ML, list(self.audit.plan)
                )
        return self._importance

    def _outcomes(self, params: Params, model: ModelConfig) -> list[Outcome]:
        with jax.set_mesh(self._mesh):
            return [fidelity.run_model(params, batch, cfg=model, groups=self._groups) for batch in self._batches]

    def _figures(
        self, params: Params, cache: CacheType | None, own: tuple[Params, list[jax.Array]] | None
    ) -> dict[str, np.ndarray]:
        """Figures of all tokens, (..., M, L). Nothing waits for a device before the last batch."""
        assert self._reference is not None
        (reference_head, reference), options = self._reference, self._options
        run = functools.partial(fidelity.run_model, cfg=self.audit.model, cache=cache, groups=self._groups)
        head, found = fidelity.head_of(params), []
        with jax.set_mesh(self._mesh):
            for i, (batch, theirs) in enumerate(zip(self._batches, reference, strict=True)):
                outcome, forced = run(params, batch), run(params, batch, theirs.indices_NTk)
                figures = fidelity.compare(reference_head, theirs, head, outcome, forced.hidden_BLD, batch, **options)
                if own:
                    figures["kld_own"] = fidelity.kld(own[0], own[1][i], head, outcome.hidden_BLD, **options)
                found.append(figures)
        held = jax.device_get(found)
        return {k: np.concatenate([f[k] for f in held], axis=-2)[..., : self._size, :] for k in held[0]}

    def _summaries(self, figures: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Summaries of all tokens, then of each domain's."""
        used_ML = figures.pop("count") > 0
        tokens = {name: np.asarray(a[..., used_ML], np.float64) for name, a in figures.items()}
        for name in ("accepted", "drafted"):
            tokens.setdefault(name, np.zeros((0, int(used_ML.sum()))))
        window_T, position_T = np.nonzero(used_ML)
        tokens["position"] = position_T.astype(np.float64)
        tokens["bytes"] = self._bytes_M[window_T]
        unit_T, domain_T = self._unit_M[window_T], self._domain_M[window_T]
        units = fidelity.Units(unit_T, self._domain_U)
        pooled = fidelity.summarize(tokens, units, self._weights_RU, self._length)
        scopes = [pooled | {"documents": sum(d.documents for d in self.domains)}]
        if len(self.domains) == 1:
            return scopes * 2
        for i, domain in enumerate(self.domains):
            of_T, of_U = domain_T == i, self._domain_U == i
            units = fidelity.Units(unit_T[of_T] - int(np.argmax(of_U)), self._domain_U[of_U])
            part = {name: a[..., of_T] for name, a in tokens.items()}
            scope = fidelity.summarize(part, units, self._weights_RU[:, of_U], self._length)
            scopes.append(scope | {"documents": domain.documents})
        return scopes


# ---- the record ------------------------------------------------------------------------------------------------------


def fingerprint(audit: Audit, mesh: Mesh, found: list[Domain], calibration_ML: np.ndarray) -> dict[str, Any]:
    """What rows depend on besides their name: rows of another fingerprint are computed again.

    Of one device it does not say the number.
    """

    def checkpoint(workdir: Path, phase: str, step: int) -> list[Any]:
        with Checkpoints(workdir, phase) as folder:
            return [step, folder.digest(step)]

    ref = audit.reference
    return {
        "version": _VERSION,
        "reference": [ref.name, *checkpoint(ref.workdir, ref.phase, ref.step)],
        "checkpoints": {name: checkpoint(audit.workdir, name, step) for name, step in audit.steps.items()},
        "domains": {domain.name: domain.hash for domain in found},
        "calibration": _digest(calibration_ML.tobytes()),
        "llama_cpp_python": llama.installed(),
        "dtype": audit.model.dtype,
        "backend": jax.default_backend(),
        **({"devices": mesh.size} if mesh.size > 1 else {}),
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Record:
    """WORKDIR/audit.json, beside it audit.fingerprint.json, which says what it was computed from, and the report."""

    def __init__(self, audit: Audit, mark: dict[str, Any], dropped: Collection[str] = ()):
        """Takes over the rows on record that were computed from the same, without those named in `dropped`."""
        self._file, mark_file = audit.workdir / "audit.json", audit.workdir / "audit.fingerprint.json"
        self._table, self._picture = audit.workdir / "audit.md", audit.workdir / "audit.png"
        self._order = {row.name: i for i, row in enumerate(audit.rows)}
        self.rows: list[dict[str, Any]] = []
        before, rows = _read(mark_file), _read(self._file)
        if before == mark and _readable(rows):
            self.rows = [r for r in rows if r["row"] in self._order and r["row"] not in dropped]
            return
        if rows:
            known = before if isinstance(before, dict) else {}
            changed = ", ".join(name for name in known | mark if known.get(name) != mark.get(name))
            why = f"other than before: {changed}" if changed else "the file is not what an audit writes"
            print(f"{self._file}: every row is computed anew ({why})")
        self._table.unlink(missing_ok=True)
        self._picture.unlink(missing_ok=True)
        write_atomically(self._file, "[]")  # first: rows never stand beside a fingerprint that is not theirs
        write_atomically(mark_file, json.dumps(mark, indent=1))

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row at its place."""
        self.rows = sorted([*self.rows, row], key=lambda r: self._order[r["row"]])
        write_atomically(self._file, json.dumps(self.rows, indent=1, allow_nan=False))

    def report(self) -> None:
        """Writes the table and the picture of the rows on record, if there are any."""
        if self.rows:
            write_atomically(self._table, audit_report.markdown(self.rows))
            audit_report.plot(self.rows, self._picture)


def _readable(rows: Any) -> bool:
    """Whether a record holds rows with all that the report reads without asking."""
    return isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() >= audit_report.KEYS and isinstance(row["row"], str) for row in rows
    )


def _read(file: Path) -> Any:
    """A JSON file's content; None where there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def evaluate(
    audit: Audit,
    mesh: Mesh,
    rows: list[Row],
    found: list[Domain],
    calibration_ML: np.ndarray,
    force: bool,
    check: Callable,
) -> list[dict[str, Any]]:
    """Computes the rows that are not on record, and writes the report.

    Args:
      mesh: of this process's devices, which share weights and windows.
      force: computes `rows` again that are on record.
      check: called between rows; may raise to stop.

    Returns:
      All rows on record.

    Raises:
      UserError: another audit of the run is under way.
    """
    with alone(
        audit.workdir / "audit.lock", f"{audit.workdir}: another audit of it is running: wait for it, or stop it"
    ):
        names = [row.name for row in rows]
        record = Record(audit, fingerprint(audit, mesh, found, calibration_ML), dropped=names if force else ())
        done = {r["row"] for r in record.rows}
        missing = [row for row in rows if row.name not in done]
        bench = Bench(audit, mesh, found, calibration_ML)
        try:
            for i, row in enumerate(missing, start=1):
                check(f"before row {row.name}, {i} of {len(missing)}")
                started = time.perf_counter()
                result = bench.judge(row)
                seconds = time.perf_counter() - started
                record.add(result)
                print(
                    f"{i}/{len(missing)} {row.name}: loss {_number(result['loss'])}, KLD {_number(result['kld'])}, "
                    f"same top-1 {_number(result['same_top1'])}, {seconds:.1f} s, {bench.tokens_per_s:,.0f} tokens/s",
                    flush=True,
                )
        except (Interrupted, BrokenPipeError, UserError):  # of the rows that there are
            record.report()
            raise
        record.report()
        return record.rows


def _number(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.4f}"


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 unusable input, 130 or 143 stopped by SIGINT or SIGTERM."""
    args = _parser().parse_args(argv)
    workdir = Path(args.run)
    try:
        mesh = local_mesh()
        audit, notes = open_run(workdir, args.reference)
        rows = choose(audit, args.rows)
        if args.list:
            print("\n".join(row.name for row in rows))
            print("\n".join(notes), file=sys.stderr)
            return 0
        with Stop() as stop:
            with stop.at_once("while the text was read, before any row"):
                found, calibration_ML = load_domains(audit, args.text, args.tokens, args.text_key)
            print("\n".join([*notes, *(_described(domain, audit.cfg.data.seq_len) for domain in found)]), flush=True)
            done = evaluate(audit, mesh, rows, found, calibration_ML, args.force, stop.check)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except Interrupted as e:
        print(f"{e}. The same command continues.", file=sys.stderr)
        return e.exit_code
    print(audit_report.table(done))
    print(f"{workdir}/audit.json  {workdir}/audit.md  {workdir}/audit.png")
    return 0


def _described(domain: Domain, length: int) -> str:
    tokens, units = int(domain.windows["mask"][:, 1 : 1 + length].sum()), int(domain.unit_M[-1]) + 1
    found = {"windows": len(domain.document_M), "documents": domain.documents, "units": units}
    alone = "; a single unit has no standard errors, and those over all text take it as fixed" if units == 1 else ""
    return f"{domain.name}: {tokens:,} tokens, " + ", ".join(f"{name} {n}" for name, n in found.items()) + alone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qatmoe.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run (the training command's --workdir)")
    parser.add_argument("--reference", default="", metavar="[RUN:]PHASE", help="to compare with; control by default")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another domain: a file, folder, glob, or hf:DATASET",
    )
    parser.add_argument("--text_key", default="", help="field that holds the text in the rows of every --text")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each domain (%(default)s)")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows with such a name")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and compute nothing")
    parser.add_argument("--force", action="store_true", help="compute the chosen rows again that are on record")
    return parser


if __name__ == "__main__":
    sys.exit(cli.run(main))
