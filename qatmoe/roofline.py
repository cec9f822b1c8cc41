"""How long a compiled step would take if nothing but the chip's peak rates held it up.

    work     = sum over kernels of max(matmul FLOPs / peak FLOP/s, bytes of main memory / bandwidth)
    waiting  = sum over collectives that nothing runs beside, of their time
    step     = max(work, sum over the other collectives of their time) + waiting

A collective along a ring of n devices takes bytes sent / (links x link), links being 2 on a closed ring and 1 on an
open one; along several dimensions of the torus their links add up. An all-to-all takes n / 4 x array / (links x link)
of the longest dimension: the links in its middle carry what one half of the devices sends the other (the dimensions'
exchanges run at the same time).
Outside a slice or a machine it is bytes sent / network. Not in it: elementwise arithmetic, latency, kernels below peak.
So the time is a lower bound, meant for comparing meshes, sizes and variants.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from qatmoe.hlo import Collective, Cost
from qatmoe.topology import Chip, Span, Topology, span

Row = dict[str, Any]


class Time(NamedTuple):
    """Seconds of one step on one device."""

    matmul: float  # FLOPs / peak, were memory no limit
    memory: float  # bytes / bandwidth, were matmuls free
    work: float
    overlapped: float  # collectives beside which other work runs
    waiting: float  # the others
    step: float

    @property
    def exposed(self) -> float:
        """Share of the step in which a device waits for collectives."""
        return (self.step - self.work) / self.step


def collective_seconds(c: Collective, chip: Chip, where: Span) -> float:
    """Seconds of one run."""
    if where.outside:
        return c.sent / chip.network
    if not where.rings:  # behind a switch, or the cores of one chip
        return c.sent / chip.link
    if c.kind == "all-to-all":
        whole = c.sent * c.size / (c.size - 1)  # with the part that stays
        return max(n / 4 * whole / (links * chip.link) for n, links in where.rings)
    if c.kind == "collective-permute":
        return c.sent / chip.link
    return c.sent / (sum(links for _, links in where.rings) * chip.link)


def step_time(cost: Cost, chip: Chip, spans: Sequence[Span]) -> Time:
    """The time of a step; `spans`: where each of cost.collectives runs."""
    work = sum(k.runs * max(k.flops / chip.flops, k.bytes / chip.hbm_bandwidth) for k in cost.kernels)
    beside = alone = 0.0
    for c, where in zip(cost.collectives, spans, strict=True):
        seconds = c.runs * collective_seconds(c, chip, where)
        beside, alone = (beside + seconds, alone) if c.overlapped else (beside, alone + seconds)
    step = max(work, beside) + alone
    return Time(cost.flops / chip.flops, cost.bytes / chip.hbm_bandwidth, work, beside, alone, step)


def spans_of(cost: Cost, topology: Topology, mesh_devices: Sequence[Any]) -> list[Span]:
    """Where each collective runs. mesh_devices: those of the mesh, flat, in its order."""
    return [span(topology, [mesh_devices[i] for i in c.group]) for c in cost.collectives]


def collective_rows(cost: Cost, chip: Chip | None, spans: Sequence[Span]) -> list[Row]:
    """Sums by kind and mesh axes, the most bytes first; bytes are those that one device sends in a step."""
    rows: dict[tuple[str, str], Row] = {}
    for c, where in zip(cost.collectives, spans, strict=True):
        key = (c.kind, "+".join(c.axes))
        row = rows.setdefault(key, dict.fromkeys(("devices", "runs", "sent_bytes", "overlapped_bytes", "seconds"), 0))
        row["devices"] = max(row["devices"], c.size)
        row["runs"] += c.runs
        row["sent_bytes"] += c.runs * c.sent
        row["overlapped_bytes"] += c.runs * c.sent * c.overlapped
        row["seconds"] += c.runs * collective_seconds(c, chip, where) if chip else 0.0
    found = [{"kind": kind, "axes": axes, **row} for (kind, axes), row in rows.items()]
    return sorted(found, key=lambda r: -r["sent_bytes"])
