import dataclasses
import subprocess
import sys

import pytest

from qatmoe.errors import UserError
from qatmoe.topology import CHIPS, SIZES, Span, parse, span


@dataclasses.dataclass
class Device:
    coords: tuple[int, ...] = (0, 0, 0)
    slice_index: int = 0
    process_index: int = 0


@pytest.mark.parametrize(
    ("name", "kind", "size", "slices"),
    [
        ("v5p:4x4x8", "v5p", 128, 1),
        ("v4:4x4x4", "v4", 64, 1),  # its two cores are one device
        ("tpu7x:2x2x1", "tpu7x", 8, 1),  # two devices a chip
        ("v5e:16x16*4", "v5e", 1024, 4),
        ("gpu:16", "gpu", 16, 1),
        ("cpu:6", "cpu", 6, 1),
    ],
)
def test_names(name, kind, size, slices):
    found = parse(name)
    assert (found.kind, found.size, found.slices) == (kind, size, slices)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5p-128", "v5p:4x4x4"),  # Cloud counts cores of v5p
        ("v5litepod-16", "v5e:4x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5p:8x8", "v5p:4x4x4"),
        ("v7x:2x2x1", "tpu7x:2x2x1"),
        ("v5e:0x4", "v5e:2x2"),
        ("h100:8", "gpu:8"),
        ("gpu:12", "gpu:16"),
        ("gpu:2x4", "gpu:8"),
        ("cpu:0", "cpu:1"),
        ("gpu:16*2", "gpu:16"),
        ("v5p:400x400x400", "v5p:16x16x16"),
        ("v5e:16x16*", "v5e:16x16"),
        ("", "v5p:2x2x1"),
    ],
)
def test_unknown_names_get_the_nearest(name, nearest):
    with pytest.raises(UserError, match="no such machine") as e:
        parse(name)
    assert f"nearest is {nearest!r}" in str(e.value)
    assert "GENERATION:DIMENSIONS" in str(e.value) and "\n" not in str(e.value)


def test_usual_sizes_are_known_and_grow():
    for kind, sizes in SIZES.items():
        found = [parse(f"{kind}:{size}").size for size in sizes]
        assert found == sorted(found)
    assert [t.name for t in parse("v5e:8x8").larger()] == ["v5e:8x16", "v5e:16x16"]
    assert [t.name for t in parse("v5e:8x16*2").larger()] == ["v5e:16x16*2"]
    assert [t.size for t in parse("gpu:8").larger()] == [16]


def test_chips_are_plausible():
    """FLOPs per byte of every accelerator lie where a matmul of some hundred rows meets its bandwidth."""
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.hbm_bandwidth < 700
        assert chip.network < chip.link < chip.hbm_bandwidth


@pytest.mark.parametrize(
    ("name", "coords", "rings"),
    [
        ("v5p:4x4x8", [(x, 0, 0) for x in range(4)], ((4, 2),)),  # all of a dimension that closes: both ways round
        ("v5p:4x4x8", [(0, 0, z) for z in range(4)], ((4, 1),)),  # half of one: a line
        ("v5p:2x2x1", [(x, 0, 0) for x in range(2)], ((2, 1),)),  # too short to close
        ("v5p:4x4x8", [(x, y, 0) for x in range(4) for y in range(4)], ((4, 2), (4, 2))),
        ("v5e:8x16", [(x, 0, 0) for x in range(8)], ((8, 1),)),  # v5e closes at 16
        ("v5e:8x16", [(0, y, 0) for y in range(16)], ((16, 2),)),
        ("tpu7x:2x2x1", [(0, 0, 0), (0, 0, 0)], ()),  # the two devices of a chip
    ],
)
def test_where_a_group_lies(name, coords, rings):
    assert span(parse(name), [Device(c) for c in coords]) == Span(False, rings)


def test_groups_that_leave_a_slice_or_a_machine():
    two = [Device(slice_index=0), Device(slice_index=1)]
    assert span(parse("v5e:4x4*2"), two).outside
    assert not span(parse("gpu:16"), [Device(process_index=1), Device(process_index=1)]).outside
    assert span(parse("gpu:16"), [Device(process_index=0), Device(process_index=1)]).outside


@pytest.mark.tpu_compiler
def test_a_topology_has_the_devices_of_its_name(child_env):
    """Of every generation; in a process of its own, as libtpu stays loaded."""
    program = (
        "from qatmoe.topology import SIZES, devices, parse, prepare\n"
        "for kind, sizes in SIZES.items():\n"
        "    for t in map(parse, (f'{kind}:{sizes[0]}', f'{kind}:{sizes[0]}*2')):\n"
        "        prepare(t)\n"
        "        assert len(devices(t)) == t.size, t\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=child_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
