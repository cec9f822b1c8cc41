"""What a compiled program does, read from its text: matmul FLOPs, bytes to and from memory, collectives.

XLA's own cost analysis counts the body of a loop once; here everything is multiplied by the trip counts, and scanned
layers are one loop. The text is that of `jax.stages.Compiled.as_text()`, the program of one device after partitioning,
fusion and scheduling (syntax: https://openxla.org/xla/operation_semantics, replica groups: xla/hlo/ir/replica_group.h).
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^{}]*\}|%[\w.\-]+)")
# No memory is touched: names for what is there already. Loops and calls move nothing themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "domain", "iota", "async-start",
}  # fmt: skip


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    main: bool  # in the chip's main memory; a TPU's compiler keeps some arrays on the chip

    @property
    def bytes(self) -> int:
        """Bytes of its elements, without padding."""
        return math.prod(self.dims) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of its result, tuples flattened
    operands: tuple[str, ...]
    inner: str  # what stands between its parentheses
    attributes: str  # and behind them
    root: bool

    @property
    def called(self) -> list[str]:
        """Computations that it runs; of a conditional, all that it may run."""
        return [name for part in _CALLED.findall(self.attributes) for name in _NAME.findall(part)]

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next attribute; "" where it has none."""
        found = re.search(rf"(?:^|[ ,]){name}=(\[[^\]]*\]|\{{[^{{}}]*\}}|[^ ,]+)", self.attributes)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """One collective of the program, as often as it runs in a step."""

    kind: str  # of KINDS
    axes: tuple[str, ...]  # mesh axes that it runs over
    size: int  # devices of a group
    group: tuple[int, ...]  # the first group: positions in the mesh; for a permute, a device and where it sends
    sent: float  # bytes that a device sends in one run: what a ring sends, (n - 1) / n of the whole array
    runs: int
    overlapped: bool  # the compiler started it before other work and waits for it afterwards
    name: str  # of the model's operation that it belongs to


class Kernel(NamedTuple):
    """One instruction that runs on its own: a fusion, a matmul, a copy."""

    flops: float  # of its matmuls, in one run
    bytes: float  # that it reads from and writes to main memory
    runs: int
    name: str  # of the model's operation that it belongs to


class Cost(NamedTuple):
    """One device, one run of the whole program."""

    kernels: list[Kernel]
    collectives: list[Collective]
    unknown_loops: int  # loops whose trip count could not be read, counted once

    @property
    def flops(self) -> float:
        """Of all matmuls."""
        return sum(k.flops * k.runs for k in self.kernels)

    @property
    def bytes(self) -> float:
        """Read from and written to main memory by all kernels."""
        return sum(k.bytes * k.runs for k in self.kernels)


def cost(text: str, axes: Mapping[str, int]) -> Cost:
    """Adds up a compiled program.

    Args:
      text: the program of one device.
      axes: the mesh's axes and sizes, in their order.

    Raises:
      ValueError: the text is not such a program.
    """
    computations, entry = parse(text)
    caller = {
        c: name for name, of in computations.items() for i in of.values() if i.opcode == "fusion" for c in i.called
    }
    runs, unknown = _runs(computations, entry)
    kernels = []
    for name in runs.keys() - caller.keys():
        own = computations[name]
        for i in own.values():
            flops, moved = _flops(i, own, computations), _moved(i, own, computations)
            if flops or moved:
                kernels.append(Kernel(flops, moved, runs[name], _operation(i)))
    return Cost(kernels, list(_collectives(computations, runs, caller, axes)), unknown)


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """{name: computation} and the name of the entry. Raises ValueError."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _lines(text):
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    return computations, entry


def _lines(text: str) -> Iterator[str]:
    """Lines, those joined that belong together: notes about a kernel may stand on lines of their own, not indented."""
    whole = ""
    for line in text.splitlines():
        if whole.startswith("  ") and line and not line.startswith("  ") and line != "}":
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:start],
        shapes=tuple(_shapes(right[:end])),
        operands=tuple(_NAME.findall(inner)),
        inner=inner,
        attributes=rest[stop + 1 :],
        root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        yield Shape(dtype, sizes, re.search(r"S\([1-9]", layout) is None)


@functools.cache
def _bits(dtype: str) -> int:
    """u32 -> 32, f8e4m3fn -> 8, bf16 -> 16."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0


def _runs(computations: dict[str, Computation], entry: str) -> tuple[dict[str, int], int]:
    """How often each computation runs, and the number of loops whose trip count is unknown.

    Every branch of a conditional counts: which one runs is not known, and none must be overlooked.
    """
    runs: dict[str, int] = collections.Counter()
    unknown = 0
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        runs[name] += times
        for i in computations[name].values():
            trips = 1
            if i.opcode == "while":
                found = trip_count(i, computations)
                unknown += found is None
                trips = found or 1
            if i.opcode not in ("reduce", "sort", "scatter", "map", "select-and-scatter", "reduce-window", *KINDS):
                waiting += [(called, times * trips) for called in i.called if called in computations]
    return runs, unknown


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """How often a `while` runs its body: as the compiler noted it, else the number that its counter is compared with.

    The second is right for a counter from 0 by 1, which is what `lax.scan`, `lax.map` and `fori_loop` make.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted.group(1))
    condition = computations.get(loop.attribute("condition").lstrip("%"), {})
    bounds = [int(i.inner) for i in condition.values() if i.opcode == "constant" and re.fullmatch(r"\d+", i.inner)]
    return max(bounds, default=None)


# ---- matmuls ---------------------------------------------------------------------------------------------------------


def _flops(i: Instruction, own: Computation, computations: dict[str, Computation]) -> float:
    """Of an instruction and, where it is a fusion, of what is fused."""
    if i.opcode != "fusion":
        return matmul_flops(i, own)
    return sum(_flops(j, computations[c], computations) for c in i.called for j in computations[c].values())


def matmul_flops(i: Instruction, own: Computation) -> float:
    """2 per multiply-add of a dot, a convolution (what a TPU's compiler makes of dots) or a call of cuBLAS."""
    if i.opcode == "dot" or (i.opcode == "custom-call" and "__cublas$" in i.attributes):
        lhs = own[i.operands[0]].shapes[0].dims
        noted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', i.attributes)
        contracted = [int(d) for d in noted.group(1).replace('"', "").split(",") if d] if noted else []
        return 2.0 * math.prod(i.shapes[0].dims) * math.prod(lhs[d] for d in contracted)
    if i.opcode == "convolution":
        return _convolution_flops(i, own)
    if i.opcode == "custom-call":
        return _attention_flops(i, own)
    return 0.0


def _attention_flops(i: Instruction, own: Computation) -> float:
    """Of causal flash attention, half of all pairs: the kernels of `model.attention`, splash's and cuDNN's."""
    if "__cudnn$fmha" in i.attributes:
        matmuls = 5 if "Backward" in i.attributes else 2
    else:
        found = re.match(r"splash_m[qh]a_(fwd|dq|dkv)", i.name)
        matmuls = {"fwd": 2, "dq": 3, "dkv": 4}[found.group(1)] if found else 0
    queries = next((own[o].shapes[0].dims for o in i.operands if own[o].shapes[0].dtype == "bf16"), ())
    if not matmuls or len(queries) < 3:
        return 0.0
    return float(matmuls * math.prod(queries) * max(queries[-3:-1]))


def _convolution_flops(i: Instruction, own: Computation) -> float:
    """Only window positions that meet an element count: batched dots are written with padding around them."""
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", i.attribute("dim_labels"))
    lhs, rhs = (own[o].shapes[0].dims for o in i.operands)
    out = i.shapes[0].dims
    window = dict(part.split("=") for part in i.attribute("window").strip("{}").split() if "=" in part)
    n_spatial = sum(label.isdigit() for label in out_labels)

    def field(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    valid = 1
    for axis in range(n_spatial):
        valid *= _valid_positions(
            lhs[lhs_labels.index(str(axis))],
            rhs[rhs_labels.index(str(axis))],
            out[out_labels.index(str(axis))],
            stride=int(field("stride", axis, "1")),
            pad=int(field("pad", axis, "0_0").split("_")[0]),
            lhs_dilate=int(field("lhs_dilate", axis, "1")),
            rhs_dilate=int(field("rhs_dilate", axis, "1")),
        )
    features = out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    batch = out[out_labels.index("b")] / int(i.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * valid


@functools.cache
def _valid_positions(n: int, window: int, out: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output and a window position that meet an element of the operand along one axis."""
    if window == 1 and not pad and lhs_dilate == 1:
        return out
    at = np.arange(out)[:, None] * stride + np.arange(window)[None] * rhs_dilate - pad
    return int(np.sum((at >= 0) & (at < (n - 1) * lhs_dilate + 1) & (at % lhs_dilate == 0)))


# ---- memory ----------------------------------------------------------------------------------------------------------


def _moved(i: Instruction, own: Computation, computations: dict[str, Computation]) -> float:
    """Bytes of main memory that one instruction reads and writes.

    Slices read what they cut out, updates write what they put in; a fusion is looked into for both. A collective reads
    and writes its arrays once, wherever the compiler put its parts.
    """
    if i.opcode in _FREE or _kind(i):
        return 0.0  # collectives: with the traffic of `Collective`, through the links
    read = [own[o] for o in i.operands if o in own]
    if i.opcode == "fusion":
        return _moved_by_fusion(i, read, computations[i.called[0]])
    if i.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _main(i.shapes) if read and _main(read[0].shapes) else _main(i.shapes)
    if i.opcode == "dynamic-update-slice":
        return 2 * _main(read[1].shapes)
    if i.opcode == "copy-start":
        return _main(i.shapes[:1]) + _main(read[0].shapes)
    if i.opcode.endswith("-done"):
        return 0.0
    return _main(i.shapes) + sum(_main(r.shapes) for r in read)


def _moved_by_fusion(fusion: Instruction, read: Sequence[Instruction], body: Computation) -> float:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for i in body.values():
        for o in i.operands:
            users[o].append(i)
    moved = 0.0
    for i in body.values():
        if i.opcode == "parameter" and int(i.inner) < len(read):
            moved += min(_main(read[int(i.inner)].shapes), _read_of(i, users))
    results = next(i for i in body.values() if i.root)
    parts = [body[o] for o in results.operands] if results.opcode == "tuple" else [results]
    if len(parts) != len(fusion.shapes):
        return moved
    return moved + sum(_written(p, s, body) for p, s in zip(parts, fusion.shapes, strict=True))


def _read_of(value: Instruction, users: Mapping[str, list[Instruction]]) -> float:
    """Bytes that a fusion reads of one of its operands."""
    read = 0.0
    for user in users[value.name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            read += sum(s.bytes for s in user.shapes)
        elif user.opcode == "bitcast":
            read += _read_of(user, users)
        elif not _passes(user, value):
            return math.inf
    return read


def _passes(user: Instruction, value: Instruction) -> bool:
    """Whether a value goes through without being read here: handed on, updated in place, or sent by a collective."""
    if user.opcode == "dynamic-update-slice":
        return user.operands[0] == value.name
    return user.opcode in ("tuple", "custom-call") or _kind(user) != ""


def _written(part: Instruction, result: Shape, body: Computation) -> float:
    """Bytes that a fusion writes for one of its results."""
    while part.opcode == "bitcast":
        part = body[part.operands[0]]
    if not result.main or part.opcode in ("parameter", "custom-call", "get-tuple-element") or _kind(part):
        return 0.0
    if part.opcode == "dynamic-update-slice":
        return float(sum(s.bytes for s in body[part.operands[1]].shapes))
    return float(result.bytes)


def _main(shapes: Sequence[Shape]) -> float:
    return float(sum(s.bytes for s in shapes if s.main))


# ---- collectives -----------------------------------------------------------------------------------------------------


def _kind(i: Instruction) -> str:
    name = i.opcode.removesuffix("-start").removeprefix("ragged-")
    return name if name in KINDS else ""


def _collectives(
    computations: dict[str, Computation], runs: Mapping[str, int], caller: Mapping[str, str], axes: Mapping[str, int]
) -> Iterator[Collective]:
    """Every collective once. A TPU's compiler spreads one over several fusions, which share its channel."""
    parts: dict[tuple[str, str], list[tuple[str, Instruction]]] = collections.defaultdict(list)
    for name in runs:
        for i in computations[name].values():
            if _kind(i):
                parts[caller.get(name, name), i.attribute("channel_id") or i.name].append((name, i))
    for found in parts.values():
        name, i = found[0]
        own = computations[name]
        groups = device_groups(i, math.prod(axes.values()))
        kind = _kind(i)
        if kind == "all-reduce" and name in caller and _scattered(i, own):
            kind = "reduce-scatter"
        size = len(groups[0])
        if size < 2:
            continue
        yield Collective(
            kind=kind,
            axes=varying(groups, axes),
            size=size,
            group=tuple(groups[0]),
            sent=_sent(kind, i, own, size),
            runs=runs[name],
            overlapped=len(found) > 1 or _beside_work(i, own, computations),
            name=_operation(i),
        )


def _beside_work(start: Instruction, own: Computation, computations: dict[str, Computation]) -> bool:
    """Whether a kernel runs between the start of a collective and its end; instructions stand in the order they run."""
    if not start.opcode.endswith("-start") or re.search(r'"is_sync":\s*true', start.attributes):
        return False
    later = list(own.values())[list(own).index(start.name) + 1 :]
    between = itertools.takewhile(lambda i: not (i.opcode.endswith("-done") and start.name in i.operands), later)
    return any(_works(i, own, computations) for i in between)


def _works(i: Instruction, own: Computation, computations: dict[str, Computation]) -> bool:
    """Whether an instruction, or one of those that it runs, is a kernel."""
    if i.opcode in ("while", "conditional", "call"):
        return any(_works(j, computations[c], computations) for c in i.called for j in computations[c].values())
    return bool(_flops(i, own, computations) or _moved(i, own, computations))


def _scattered(i: Instruction, own: Computation) -> bool:
    """Whether a fusion keeps only a slice of the all-reduce in it: a TPU's way to write a reduce-scatter."""
    users = [u.opcode for u in own.values() if i.name in u.operands]
    return users == ["dynamic-slice"]


def _sent(kind: str, i: Instruction, own: Computation, size: int) -> float:
    """Bytes that a device sends, as a ring does it (Thakur et al. 2005, "Optimization of Collective Communication")."""
    given = sum(s.bytes for o in i.operands if o in own for s in own[o].shapes)
    share = (size - 1) / size
    if kind == "all-gather":
        return given * (size - 1)
    return (
        given * {"reduce-scatter": share, "all-reduce": 2 * share, "all-to-all": share, "collective-permute": 1}[kind]
    )


def _operation(i: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    return found.group(1) if found else ""


def device_groups(i: Instruction, n: int) -> list[list[int]]:
    """Groups of devices, numbered as in the mesh; for a permute its pairs of sender and receiver that differ.

    Written as a list of lists, as an iota that is reshaped and transposed, or as axes of a mesh.

    Raises:
      ValueError: none of these.
    """
    text = i.attributes
    if i.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        found = re.findall(r"\{?(\d+),(\d+)", pairs.group(1)) if pairs else []
        return [[int(a), int(b)] for a, b in found if a != b] or [[0]]
    text = text[text.index("replica_groups=") + len("replica_groups=") :]
    if text.startswith("{{"):
        listed = re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 1])
        return [[int(d) for d in g.split(",")] for g in listed]
    if text.startswith("{}"):
        return [list(range(n))]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    iota = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if not iota:
        raise ValueError(f"unknown form of replica groups: {text[:80]}")
    return _iota(iota.group(2)).reshape(_numbers(iota.group(1))).tolist()


def _mesh_groups(text: str) -> list[list[int]]:
    """mesh['a'=1,'b'=4], device_ids=([4,2]T(1,0)) {'b', 'c':(1)2}: the axes in braces vary inside a group."""
    found = re.match(r"mesh\[([^\]]*)\](?:, ?device_ids=\(([^{]*)\))? ?\{([^}]*)\}", text)
    if not found:
        raise ValueError(f"unknown form of replica groups: {text[:80]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
    n = math.prod(sizes.values())
    ids = np.arange(n)
    if found.group(2):
        ids = _iota(found.group(2)) if found.group(2).startswith("[") else np.array(_numbers(found.group(2)))
    shape: list[int] = []
    inside: list[int] = []
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(3))}
    for name, size in sizes.items():
        if name not in parts:
            shape.append(size)
            continue
        pre, part = (int(v) if v else 0 for v in parts[name])
        pre, part = (pre, part) if pre else (1, size)
        inside.append(len(shape) + 1)
        shape += [pre, part, size // (pre * part)]
    ids = np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0))
    return ids.reshape(-1, math.prod(shape[d] for d in inside)).tolist()


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): 0, 1, ... in that shape, transposed, flat."""
    dims, _, order = text.strip("()").partition("]")
    shape = _numbers(dims.lstrip("["))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(order.strip("T()"))) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(d) for d in text.split(",") if d]


def varying(groups: Sequence[Sequence[int]], axes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    shape = tuple(axes.values())
    ids = np.array(max(groups, key=len)) if len(groups[0]) > 2 else np.array(groups)
    where = np.unravel_index(ids, shape)
    return tuple(
        name for name, at in zip(axes, where, strict=True) if np.any(at != (at[..., :1] if at.ndim > 1 else at[0]))
    )
