"""Machines that are not there: names of topologies, what their chips can do, and devices to compile for.

v5p:4x4x8      a TPU slice, GENERATION:DIMENSIONS in chips; v4, v5e, v5p, v6e, tpu7x
v5e:16x16*4    four such slices, joined by the data center's network
gpu:16         H100s, eight to a machine
cpu:8          devices of this computer's CPU: whether a mesh is legal, nothing about memory or time
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from qatmoe.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: both cores of a v4 or v5p, half a chip of tpu7x."""

    name: str
    flops: float  # FLOP/s of bf16 matmuls
    hbm: int  # bytes that the compiler lets a program use
    hbm_bandwidth: float  # bytes/s
    link: float  # bytes/s that it sends over one link, in one direction
    dims: int  # of the torus: two links for each; 0: a switch, and one link
    network: float  # bytes/s that it sends outside its slice or machine
    per_chip: int = 1  # devices of a chip
    wrap: int = 0  # a dimension closes to a ring where this divides it; 0: never


# Peak FLOP/s, bandwidth and network: the tables of https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; `link` is
# the interconnect's bandwidth of a chip over its links (the pages' newer figures are for both directions together). hbm
# is what libtpu 0.0.42 says is available when a program is too large. H100 SXM: NVIDIA's data sheet, NVLink 900 GB/s in
# both directions together; the network is one 400 Gb/s port for each GPU.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1228e9, 50e9, 3, 3.125e9, wrap=4),
    "v5e": Chip("TPU v5e", 197e12, int(15.75 * GIB), 819e9, 50e9, 2, 3.125e9, wrap=16),
    "v5p": Chip("TPU v5p", 459e12, int(95.74 * GIB), 2765e9, 100e9, 3, 6.25e9, wrap=4),
    "v6e": Chip("TPU v6e", 918e12, int(31.25 * GIB), 1640e9, 100e9, 2, 12.5e9, wrap=16),
    "tpu7x": Chip(
        "TPU7x core", 2307e12 / 2, int(94.75 * GIB), 7380e9 / 2, 100e9 / 2, 3, 12.5e9 / 2, per_chip=2, wrap=4
    ),
    "gpu": Chip("NVIDIA H100 80GB HBM3", 989e12, 84_929_347_584, 3352e9, 450e9, 0, 50e9),
}
GPUS_PER_HOST = 8
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SIZES = {g: _CUBES if CHIPS[g].dims == 3 else _SQUARES for g in CHIPS if g != "gpu"}  # the usual ones
_MOST = 100_000  # devices
FORM = (
    "v4, v5e, v5p, v6e or tpu7x as GENERATION:DIMENSIONS, such as v5p:4x4x8 or v5e:16x16*4 for 4 slices; gpu:N; cpu:N"
)

# What XLA is told of an H100 (fields of its GpuTargetConfigProto).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A name, taken apart and checked."""

    name: str
    kind: str  # a generation of TPUs, "gpu" or "cpu"
    dims: tuple[int, ...]  # chips of a slice along each dimension, GPUs, or CPU devices
    slices: int = 1

    @property
    def chip(self) -> Chip | None:
        """None for a CPU, of which nothing is said."""
        return CHIPS.get(self.kind)

    @property
    def size(self) -> int:
        """Devices."""
        per_chip = self.chip.per_chip if self.chip else 1
        return math.prod(self.dims) * self.slices * per_chip

    def larger(self) -> list["Topology"]:
        """The usual sizes above this one, of the same kind and number of slices, the smallest first."""
        if self.kind not in SIZES:
            return [dataclasses.replace(self, name=f"{self.kind}:{2 * self.dims[0]}", dims=(2 * self.dims[0],))]
        suffix = f"*{self.slices}" if self.slices > 1 else ""
        found = [parse(f"{self.kind}:{size}{suffix}") for size in SIZES[self.kind]]
        return [t for t in found if t.size > self.size]


def parse(name: str) -> Topology:
    """Takes a topology's name apart. Raises UserError: no such topology; it names the nearest that there is."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    kind = found.group(1) if found else ""
    if not found or kind not in (*CHIPS, "cpu"):
        raise _unknown(name)
    dims = tuple(int(d) for d in found.group(2).split("x"))
    wanted = CHIPS[kind].dims if kind in SIZES else 1
    slices = int(found.group(3) or 1)
    topology = Topology(name, kind, dims, slices)
    whole = kind != "gpu" or dims[0] <= GPUS_PER_HOST or dims[0] % GPUS_PER_HOST == 0
    if len(dims) != wanted or not 0 < topology.size <= _MOST or (slices > 1 and kind not in SIZES) or not whole:
        raise _unknown(name)
    return topology


def _unknown(name: str) -> UserError:
    return UserError(f"--topology={name!r}: no such machine; the nearest is {_nearest(name)!r}. Known: {FORM}")


def _nearest(name: str) -> str:
    """By generation, then by number of chips; Cloud names such as v5litepod-16 and v5p-128 (cores) are understood."""
    kind, *rest = re.split(r"[:\-]", name.lower(), maxsplit=1)
    kind = {"v5litepod": "v5e", "v7x": "tpu7x", "v7": "tpu7x", "h100": "gpu", "cuda": "gpu"}.get(kind, kind)
    close = difflib.get_close_matches(kind, (*CHIPS, "cpu"), 1, 0.3)
    kind = close[0] if close else "v5p"
    numbers = [int(d) for d in re.findall(r"\d{1,6}", rest[0].partition("*")[0])] if rest else []
    n = math.prod(numbers) or 1
    if kind not in SIZES:
        n = n if kind == "cpu" or n <= GPUS_PER_HOST else round(n / GPUS_PER_HOST) * GPUS_PER_HOST
        return f"{kind}:{min(n, 1024)}"
    if "-" in name and kind in ("v4", "v5p"):
        n //= 2  # these are named by cores
    return f"{kind}:{min(SIZES[kind], key=lambda size: abs(math.prod(map(int, size.split('x'))) - n))}"


def prepare(topology: Topology) -> None:
    """Settings that must be made before JAX looks for devices: it is to look for none but CPUs.

    Raises:
      UserError: libtpu or JAX's CUDA plugin is not installed, or the plugin is too old to compile without a GPU.
    """
    if topology.kind == "gpu":
        there = importlib.util.find_spec("jax_cuda12_plugin") and jax.__version_info__ >= (0, 11, 2)
        wanted, install = "JAX's CUDA plugin, 0.11.2 or newer (Python 3.12)", "-e . 'jax[cuda12]>=0.11.2'"
    else:
        there = topology.kind == "cpu" or importlib.util.find_spec("libtpu")
        wanted, install = "the package libtpu", "-e '.[tpu]'"
    if not there:
        raise UserError(f"--topology={topology.name}: compiling for it needs {wanted}: pip install {install}")
    jax.config.update("jax_platforms", "cpu")
    if topology.kind == "cpu":
        with contextlib.suppress(RuntimeError):  # it has looked already; `devices` counts them
            jax.config.update("jax_num_cpu_devices", topology.size)
    elif topology.kind == "gpu":  # no kernel is tried on the chip, and a product that is split needs one that was
        # A JAX that does not know a flag ends the process and names it; jaxlib 0.10.2 to 0.11.2 know both.
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_experimental_force_split_k=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    else:
        # libtpu would ask the network what machine it is on, and lock its chips.
        os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, slice by slice; after `prepare`. Raises UserError: the compiler refuses the size."""
    from jax.experimental import topologies

    if topology.kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.size:
            raise UserError(f"--topology={topology.name}: this process has {len(found)} CPU devices already")
        return found[: topology.size]
    try:
        if topology.kind == "gpu":
            hosts = -(-topology.size // GPUS_PER_HOST)
            shape = f"1x{hosts}x{topology.size // hosts}"
            described = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology=shape)
        else:
            more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
            if topology.kind == "v4":  # its two cores are one device to JAX, but two to this call unless told
                more["chip_config_name"] = "megacore"
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.name.partition("*")[0], **more
            )
    except jax.errors.JaxRuntimeError as e:
        why = str(e).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: {why}; the nearest usual size is {_nearest(topology.name)!r}"
        ) from e
    return list(described.devices)


# ---- where devices lie -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Span:
    """How a group of devices lies in the network."""

    outside: bool  # it spans slices, or machines of GPUs
    rings: tuple[tuple[int, int], ...] = ()  # (devices, links that a device has) along each dimension that it spans


def span(topology: Topology, group: Sequence[Any]) -> Span:
    """Where the devices of a group lie."""
    if topology.kind not in SIZES:
        return Span(outside=len({d.process_index for d in group}) > 1)
    if len({getattr(d, "slice_index", 0) for d in group}) > 1:
        return Span(outside=True)
    wrap = CHIPS[topology.kind].wrap
    along = [{d.coords[axis] for d in group} for axis in range(len(topology.dims))]
    sizes = zip(topology.dims, along, strict=True)
    return Span(False, tuple((len(a), 2 if len(a) == n and n % wrap == 0 else 1) for n, a in sizes if len(a) > 1))
