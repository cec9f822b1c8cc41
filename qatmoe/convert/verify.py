"""Is the file the trained model? Three levels.

L0  every tensor's bytes are those that the training side packs now
L1  decoded by PyPI gguf and by libggml, every weight is the number that training computed with: max difference 0.0
L2  llama.cpp's logits against the forward pass in JAX: as it is, and with llama.cpp's rounding of activations

Rounding to 8 bits can be chaotic: in a pretrained model of 30 layers inputs that were moved by the last bit changed the
rounded logits as much as llama.cpp's differ from ours (experiments/upcycled). Where L2 fails, that is measured; where
it is the reason, L2 is checked on a temporary file without rounding: the same fields, the same numbers in float32.

L1 and L2 are against programs that were not written here. What they cannot see is said: packed weights of Hugging Face
folders are decoded by this project's own reader, and L2's logits are the trunk's, not those of MTP modules.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.convert import compressed, gguf, gguf_model, huggingface_model, llama, llama_numerics, safetensors
from qatmoe.convert.names import Part, gguf_parts
from qatmoe.convert.weights import Branch
from qatmoe.data import corpus
from qatmoe.errors import UserError
from qatmoe.quant.pack import KINDS, Packed, dequantize

MAX_DIFF_F32 = 1e-4  # L2 of files without any rounding of activations, of the spread of logits where that is above 1
MAX_KLD = 1e-3  # L2 of all others, with the rounding emulated: mean, nats
MIN_SAME_TOP1 = 0.995
CHAOS = 2  # times what the last bit of the embeddings changes is no fault
Figures = dict[str, float]
Decoder = Callable[[str, np.ndarray], np.ndarray | None]


@dataclasses.dataclass
class Row:
    """All tensors of one type."""

    kind: str
    tensors: int = 0
    weights: int = 0
    same_bytes: int = 0  # tensors
    max_diff: dict[str, float] = dataclasses.field(default_factory=dict)  # decoder -> L1


@dataclasses.dataclass
class Report:
    """What was checked, and what could not be."""

    rows: list[Row]
    l2: dict[str, Figures]  # "as it is", "emulated" -> figures; {} where llama.cpp is not installed
    faults: list[str]
    unchecked: list[str]
    sha256: str

    @property
    def ok(self) -> bool:
        """Nothing that was checked failed."""
        return not self.faults

    def text(self) -> str:
        """The table for the terminal."""
        lines = []
        for row in self.rows:
            diffs = ", ".join(f"{d} {v:g}" for d, v in row.max_diff.items()) or "not decoded"
            lines.append(
                f"{row.kind:6} {row.tensors:4} tensors {row.weights:13,} weights   L0 {row.same_bytes}/{row.tensors} "
                f"equal   L1 max difference: {diffs}"
            )
        for name, figures in self.l2.items():
            lines.append(
                f"L2 against JAX {name}: mean KLD {figures['kld']:.2e}, same top-1 {figures['same_top1']:.2%}, "
                f"max |difference| {figures['max_diff']:.2e}, median row's {figures['median_diff']:.2e} "
                f"({figures['tokens']:.0f} tokens)"
            )
        lines += [f"not checked: {what}" for what in self.unchecked] + [f"FAILED: {what}" for what in self.faults]
        lines.append(f"sha256 of the tensors {self.sha256}")
        return "\n".join(lines)


def verify_gguf(branch: Branch, path: Path, arch: str, tokens: int = 4096) -> Report:
    """Reads a GGUF file back and compares it with the branch it was written from.

    Args:
      tokens: how many tokens of the bundled held-out novel L2 takes; 0 leaves it out. It holds the model in f32, and
        where rounding is chaotic there is a file in f32 beside `path` while it is compared.

    Raises:
      UserError: the file cannot be read.
    """
    report = Report([], {}, [], [], "")
    rows: dict[str, Row] = {}
    sha = hashlib.sha256()
    decoders = _decoders(report)
    with gguf.File(path) as file:
        held = gguf_model.parts(branch.storage, arch)
        branch.expect(held.values())
        read = gguf_model.Source(branch)
        if set(held) != set(file.tensors):
            report.faults.append(f"tensors differ: {sorted(set(held) ^ set(file.tensors))[:4]}")
        for name in [n for n in held if n in file.tensors]:
            data, tensor = file.data(name), file.tensors[name]
            row = rows.setdefault(tensor.kind, Row(tensor.kind))
            row.tensors += 1
            row.weights += int(np.prod(tensor.shape))
            sha.update(data.tobytes())
            same = data.tobytes() == np.ascontiguousarray(read(name, held[name])).tobytes()
            row.same_bytes += same
            if not same:
                report.faults.append(f"L0: {name} holds other bytes than training packs")
            if name.endswith(".scale"):
                continue
            scale = file.data(name.removesuffix("weight") + "scale") if tensor.kind == "NVFP4" else None
            _compare(report, row, name, data, scale, np.asarray(branch.value(held[name]).numbers()), decoders)
    report.rows, report.sha256 = list(rows.values()), sha.hexdigest()
    if not tokens:
        report.unchecked.append("L2: --verify_tokens 0")
    elif llama.installed():
        try:
            _logits(branch, path, held, tokens, report)
            if branch.model.n_mtp:
                report.unchecked.append("L2 of the MTP modules: llama.cpp gives the trunk's logits alone")
        except UserError as e:  # llama.cpp refuses the file
            report.faults.append(f"L2: {e}")
    else:
        report.unchecked.append("L2: llama-cpp-python is not installed (pip install -e '.[deploy]')")
    return report


def verify_huggingface(branch: Branch, folder: Path, arch: str, *, packed: bool) -> Report:
    """Reads a Hugging Face folder back and compares it with the branch it was written from: L0 and L1.

    Raises:
      UserError: the folder cannot be read.
    """
    report = Report([], {}, [], [], "")
    rows: dict[str, Row] = {}
    sha = hashlib.sha256()
    held = huggingface_model.contents(branch.storage, arch, packed)
    branch.expect(part for part, _ in held.values())
    read = huggingface_model.Source(branch)
    with safetensors.Folder(folder) as file, contextlib.ExitStack() as stack:
        library = _library(folder, stack, report)
        if set(held) != set(file.tensors):
            report.faults.append(f"tensors differ: {sorted(set(held) ^ set(file.tensors))[:4]}")
        of_module: dict[str, list[str]] = {}  # what its packed weights need to be decoded
        for name in held:
            of_module.setdefault(name.rpartition("weight_")[0], []).append(name)
        for name, (part, suffix) in [(n, c) for n, c in held.items() if n in file.tensors]:
            grid = branch.storage.type_of(part)[1]
            row = rows.setdefault(kind := grid.name if grid else file.tensors[name].dtype, Row(kind))
            data = file.read(name)
            sha.update(data.tobytes())
            row.tensors += 1
            same = data.tobytes() == np.ascontiguousarray(read(part, suffix)).tobytes()
            row.same_bytes += same
            if not same:
                report.faults.append(f"L0: {name} holds other bytes than training packs")
            if suffix not in ("", "weight_packed"):
                continue
            expected = np.asarray(branch.value(part).numbers())
            row.weights += expected.size
            decoded = {}
            if suffix:
                assert grid is not None
                stem = name.removesuffix("weight_packed")
                tensors = {n.removeprefix(stem): file.read(n) for n in of_module[stem]}
                decoded["qatmoe"] = compressed.dequantize(grid, compressed.Packed(tensors))
            elif library is None:
                decoded["numpy"] = data.astype(np.float32)
            else:
                decoded["safetensors"] = library[name].get_tensor(name).astype(np.float32)
            _note(report, row, name, decoded, expected)
    report.rows, report.sha256 = list(rows.values()), sha.hexdigest()
    if packed:
        report.unchecked.append("L1 of packed weights by another program: they are decoded by qatmoe's own reader")
    report.unchecked.append("L2: llama.cpp does not read safetensors")
    return report


def _library(folder: Path, stack: contextlib.ExitStack, report: Report) -> dict[str, Any] | None:
    """{tensor name: an open file of the safetensors library}."""
    try:
        package = importlib.import_module("safetensors")
    except ImportError:
        report.unchecked.append("L1 by safetensors: the package is not installed (pip install -e '.[deploy]')")
        return None
    opened = [stack.enter_context(package.safe_open(f, "numpy")) for f in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)


def _decoders(report: Report) -> dict[str, Decoder]:
    decoders: dict[str, Decoder] = {}
    try:
        package = importlib.import_module("gguf")
    except ImportError:
        report.unchecked.append("L1 by gguf: the package is not installed (pip install -e '.[deploy]')")
    else:

        def by_gguf(kind: str, data: np.ndarray) -> np.ndarray | None:
            """None for types that the package does not know."""
            number = getattr(package.GGMLQuantizationType, kind, None)
            return None if number is None else np.asarray(package.quants.dequantize(data, number))

        decoders["gguf"] = by_gguf
    if llama.installed():
        decoders["libggml"] = llama.dequantize
    else:
        report.unchecked.append("L1 by libggml: llama-cpp-python is not installed (pip install -e '.[deploy]')")
    return decoders


def _compare(
    report: Report,
    row: Row,
    name: str,
    data: np.ndarray,
    scale: np.ndarray | None,
    expected: np.ndarray,
    decoders: dict[str, Decoder],
) -> None:
    """L1 of one tensor by every decoder that knows its type."""
    decoded = {}
    if row.kind in KINDS:
        matrix_scale = None if scale is None else scale.reshape(data.shape[:-2])
        decoded["qatmoe"] = dequantize(Packed(row.kind, np.asarray(data), matrix_scale))
        for who, decode in decoders.items():
            values = decode(row.kind, data)
            if values is not None:
                factor = 1 if scale is None else scale.reshape(*data.shape[:-2], 1, 1)
                decoded[who] = values.reshape(expected.shape) * factor
    else:
        decoded["numpy"] = data.astype(np.float32)
    _note(report, row, name, decoded, expected)


def _note(report: Report, row: Row, name: str, decoded: dict[str, np.ndarray], expected: np.ndarray) -> None:
    for who, values in decoded.items():
        diff = float(np.max(np.abs(values - expected), initial=0.0))
        row.max_diff[who] = float(np.maximum(row.max_diff.get(who, 0.0), diff))  # NaN stays
        if diff != 0.0:
            report.faults.append(f"L1: {name} decoded by {who} differs by up to {diff:g}")


def _logits(branch: Branch, path: Path, held: dict[str, Part], tokens: int, report: Report) -> None:
    windows_ML = _windows(branch, tokens)
    weights = branch.numbers()
    kinds = {part.path: branch.storage.type_of(part)[0] for part in gguf_parts(branch.model, "").values()}
    asked = {"as it is": dict.fromkeys(kinds, "F32")}
    rounded = any(kind != "F32" for kind in kinds.values())
    if rounded:
        asked["with activations rounded as llama.cpp does"] = kinds
    report.l2 |= _compared(weights, asked, branch.model, path, windows_ML)
    decisive = report.l2[list(asked)[-1]]
    fault = _fault(decisive, rounded)
    if fault and rounded:
        moved = _moved(weights, kinds, branch.model, windows_ML)
        apart = 1 - decisive["same_top1"]
        if decisive["kld"] <= CHAOS * moved["kld"] and apart <= CHAOS * (1 - moved["same_top1"]):
            report.unchecked.append(
                f"L2 with rounded activations: llama.cpp's logits differ ({_said(decisive)}) at most {CHAOS} times as "
                f"much as ours do where embeddings are moved by their last bit ({_said(moved)}); the same fields and "
                "numbers were compared in float32 instead"
            )
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                unrounded = Path(folder) / "float32.gguf"
                _write_float32(branch, path, held, unrounded)
                asked = {"in float32": dict.fromkeys(kinds, "F32")}
                found = _compared(weights, asked, branch.model, unrounded, windows_ML)
            report.l2 |= found
            fault = _fault(found["in float32"], rounded=False)
    if fault:
        report.faults.append(f"L2: {fault}")


def _compared(
    weights: llama_numerics.Tree,
    asked: dict[str, dict[str, str]],
    model: ModelConfig,
    path: Path,
    windows_ML: np.ndarray,
) -> dict[str, Figures]:
    """llama.cpp's logits of a file against those of `weights`, with each rounding of activations that is asked."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
    for tokens_L, theirs_LV in zip(windows_ML, llama.logits(path, windows_ML), strict=True):
        for name, kinds in asked.items():
            ours_LV = llama_numerics.logits(weights, kinds, model, tokens_L)
            found[name].append(_distance(np.asarray(ours_LV), theirs_LV))
    return {
        name: {key: float(np.mean([r[key] for r in rows])) for key in ("kld", "same_top1", "spread")}
        | {
            "max_diff": float(np.max([r["diff_L"].max() for r in rows])),
            "median_diff": float(np.median(np.concatenate([r["diff_L"] for r in rows]))),
            "tokens": float(windows_ML.size),
        }
        for name, rows in found.items()
    }


def _fault(figures: Figures, rounded: bool) -> str:
    """What is wrong with logits, "" if nothing is. So written, NaN is a fault."""
    limit = MAX_DIFF_F32 * max(1.0, figures["spread"])
    if not rounded and not figures["max_diff"] <= limit:
        return f"logits differ by up to {figures['max_diff']:g}, more than {limit:g}"
    if figures["kld"] <= MAX_KLD and figures["same_top1"] >= MIN_SAME_TOP1:
        return ""
    return f"{_said(figures)}; at most {MAX_KLD:g} and at least {MIN_SAME_TOP1:.1%}"


def _said(figures: Figures) -> str:
    return f"mean KLD {figures['kld']:.2e}, same top-1 {figures['same_top1']:.2%}"


def _write_float32(branch: Branch, path: Path, held: dict[str, Part], out: Path) -> None:
    """A copy of a file, its fields as they are, its weights the numbers that training computed with, in float32."""
    parts = {name: part for name, part in held.items() if not name.endswith(".scale")}
    with gguf.File(path) as file:
        tensors = {name: gguf.Tensor("F32", file.tensors[name].shape) for name in parts}
        gguf.write(out, file.fields, tensors, lambda name: np.asarray(branch.value(parts[name]).numbers(), np.float32))


def _moved(weights: llama_numerics.Tree, kinds: dict[str, str], model: ModelConfig, windows_ML: np.ndarray) -> Figures:
    """What the rounded logits change, mean KLD and same top-1, where every embedding is moved by its last bit."""
    signs = np.random.default_rng(0).choice([-1, 1], np.shape(weights["embed"]))
    other = {**weights, "embed": weights["embed"] * jnp.asarray(1 + signs * 2.0**-23, jnp.float32)}
    rows = []
    for tokens_L in windows_ML:
        ours, theirs = (np.asarray(llama_numerics.logits(w, kinds, model, tokens_L)) for w in (weights, other))
        rows.append(_distance(ours, theirs))
    return {key: float(np.mean([r[key] for r in rows])) for key in ("kld", "same_top1")}


def _windows(branch: Branch, tokens: int) -> np.ndarray:
    """(M, L) token ids of the bundled held-out novel."""
    length = min(branch.cfg.data.seq_len, 256)
    novel = next(corpus.documents("default", field="data.valid")).text
    ids = branch.tokenizer.encode(novel[: 8 * max(tokens, length)])
    count = max(1, min(tokens, len(ids)) // length)
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def _distance(ours_LV: np.ndarray, theirs_LV: np.ndarray) -> dict[str, Any]:
    """Mean KL(ours || theirs) in nats, share of equal best tokens, each row's largest difference of scores, and the
    standard deviation of our scores."""
    ours, theirs = (jax.nn.log_softmax(jnp.asarray(a, jnp.float32), axis=-1) for a in (ours_LV, theirs_LV))
    return {
        "kld": float(jnp.mean(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1))),
        "same_top1": float(np.mean(ours_LV.argmax(-1) == theirs_LV.argmax(-1))),
        "diff_L": np.abs(ours_LV - theirs_LV).max(axis=-1),
        "spread": float(ours_LV.std(axis=-1).mean()),
    }
