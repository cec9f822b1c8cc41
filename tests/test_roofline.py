import dataclasses

import pytest

from qatmoe.hlo import Collective, Cost, Kernel
from qatmoe.roofline import collective_rows, collective_seconds, step_time
from qatmoe.topology import Chip, Span

CHIP = Chip("toy", flops=100.0, hbm=1000, hbm_bandwidth=10.0, link=2.0, dims=3, network=0.5)
RING, LINE, OUTSIDE = Span(False, ((4, 2),)), Span(False, ((4, 1),)), Span(True)
SUM = Collective("all-reduce", ("fsdp",), 4, (0, 1, 2, 3), sent=12.0, runs=3, overlapped=False, name="")


@pytest.mark.parametrize(
    ("kind", "where", "seconds"),
    [
        ("all-reduce", RING, 12 / (2 * 2)),
        ("all-gather", LINE, 12 / 2),
        ("reduce-scatter", Span(False, ((4, 2), (8, 1))), 12 / (3 * 2)),  # links of both dimensions
        # 4 bytes to each other device, over 1, 2 and 1 links of a ring; each device has 2 links
        ("all-to-all", RING, (1 + 2 + 1) * 4 / (2 * 2)),
        ("all-to-all", LINE, 2 * 2 * 4 / 2),  # the middle link carries 4 bytes from each of 2 to each of 2
        ("collective-permute", RING, 12 / 2),  # to one neighbour
        ("all-reduce", OUTSIDE, 12 / 0.5),
        ("all-to-all", Span(False), 12 / 2),  # a switch
    ],
)
def test_time_of_a_collective(kind, where, seconds):
    assert collective_seconds(SUM._replace(kind=kind), CHIP, where) == pytest.approx(seconds)


def test_an_exchange_over_two_dimensions():
    """32 devices, 8 bytes to each: in the ring of 8, a device's 32 for each place go over 1, 2, 3, 4, 3, 2, 1 links."""
    c = SUM._replace(kind="all-to-all", size=32, sent=31 * 8.0)
    where = Span(False, ((4, 2), (8, 2)))
    assert collective_seconds(c, CHIP, where) == pytest.approx((1 + 2 + 3 + 4 + 3 + 2 + 1) * 32 / (2 * 2))


def test_a_step_by_hand():
    """Kernels: 5 s each by FLOPs, 3 runs; 4 s by bytes. Collectives: 9 s waited for, 30 s beside the 19 s of work."""
    beside = SUM._replace(kind="all-gather", sent=120.0, runs=1, overlapped=True)
    cost = Cost([Kernel(500.0, 10.0, 3, ""), Kernel(100.0, 40.0, 1, "")], [SUM, beside], 0)
    assert (cost.flops, cost.bytes) == (1600.0, 70.0)
    t = step_time(cost, CHIP, [RING, RING])
    assert (t.matmul, t.memory, t.work) == (16.0, 7.0, 19.0)
    assert (t.overlapped, t.waiting) == (30.0, 9.0)
    assert t.step == 30.0 + 9.0
    assert t.exposed == pytest.approx(20 / 39)
    quick = step_time(cost, dataclasses.replace(CHIP, link=2000.0), [RING, RING])
    assert quick.step == pytest.approx(19.0 + 0.009)


def test_collectives_are_summed_by_kind_and_axes():
    other = SUM._replace(axes=("expert",), sent=1.0)
    beside = SUM._replace(sent=4.0, runs=1, overlapped=True)
    rows = collective_rows(Cost([], [other, SUM, beside], 0), CHIP, [RING] * 3)
    assert [(r["kind"], r["axes"], r["runs"], r["sent_bytes"]) for r in rows] == [
        ("all-reduce", "fsdp", 4, 40.0),
        ("all-reduce", "expert", 3, 3.0),
    ]
    assert rows[0]["overlapped_bytes"] == 4.0
    assert rows[0]["seconds"] == pytest.approx(40 / 4)
    assert collective_rows(Cost([], [SUM], 0), None, [RING])[0]["seconds"] == 0
