"""Devices: the four mesh axes, and the one table that says which array axis lies on which of them.

Every mesh has all four axes, so no code asks whether one is there:

    data    batch is split, parameters are copied
    fsdp    batch is split, parameters are split and gathered when used
    expert  batch is split, experts are split: tokens travel to their experts by all-to-all; other parameters as in fsdp
    tensor  heads, FFN width and vocabulary are split

A parameter lies in one way where it is kept (weights, moments, scales: split over everything but data) and in another
where it is used (gathered over fsdp). `used` goes from the one to the other, and its gradient the way back.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from qatmoe.config import MeshConfig
from qatmoe.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis of an array -> mesh axes. The only such table.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # sequences, tokens, or groups of tokens before they are exchanged
    "group": ("data", "fsdp"),  # groups of tokens once their rows lie with their experts
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),  # F of a parameter
    "vocab": ("tensor",),
    "table_batch": ("data",),  # sequences while embeddings are looked up, and D then
    "table_embed": ("fsdp", "expert"),
}
FSDP = ("fsdp", "expert")  # what a kept parameter is split over beside its own axes, as far as these leave it free


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over all devices; an axis of -1 takes what the others leave.

    On TPUs axes follow the wires of the torus, and of several slices each has its own part of `data`, whose
    collectives alone cross the network between them. Elsewhere devices come in their order, `tensor` nearest together.

    Raises:
      UserError: the axes' product is not the number of devices, or `data` no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    bad = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    if len(free) > 1 or bad:
        raise UserError(f"mesh={sizes}: each axis is at least 1, and at most one may be -1 (take what is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"mesh={sizes} needs {'a multiple of ' if free else ''}{fixed} devices and there are {len(devices)}: "
            "change --config.mesh.* so that the product of the axes is the number of devices"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = [sizes[a] for a in AXES]
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})  # described devices of a single slice lack it
    if shape[0] % slices:
        raise UserError(f"mesh={sizes}: the devices are {slices} slices; make data a multiple of {slices}")
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    inside, across = [shape[0] // slices, *shape[1:]], [slices, 1, 1, 1]
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def local_mesh() -> Mesh:
    """The mesh of a program that runs as one process: its devices share batches and parameters alike.

    Raises:
      UserError: there are several processes, as on a TPU pod, whose hosts find each other unasked.
    """
    if (count := jax.process_count()) > 1:
        raise UserError(
            f"this command is one process and here are {count}: start it on one machine, which has all of its devices "
            "to itself"
        )
    return make_mesh(MeshConfig(data=1, fsdp=-1))


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes -> PartitionSpec, e.g. ("experts", "mlp", None).

    Raises:
      ValueError: an unknown name, or two axes of one array on the same mesh axis.
    """
    used: set[str] = set()
    parts: list[tuple[str, ...] | str | None] = []
    for axis in axes:
        if axis is None or axis == "layers":
            parts.append(None)
            continue
        if axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {sorted(RULES)}")
        mesh_axes = RULES[axis]
        if used & set(mesh_axes):
            raise ValueError(f"{axes}: two axes would lie on the same mesh axis {sorted(used & set(mesh_axes))}")
        used |= set(mesh_axes)
        parts.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes)
    return PartitionSpec(*parts)


def kept(axes: tuple[str | None, ...], fsdp: int | None) -> PartitionSpec:
    """How a parameter lies where it is kept: as where it is used, and axis `fsdp` split further. See `layers.Param`."""
    parts = [_names(part) for part in spec(axes)]
    if fsdp is not None:
        taken = {name for part in parts for name in part}
        parts[fsdp] += tuple(name for name in FSDP if name not in taken)
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def fitted(mesh: Mesh | AbstractMesh, parts: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """A spec without the mesh axes that do not divide an array of `shape`: along those it is copied."""
    found = []
    for size, part in zip(shape, parts, strict=True):
        names = _names(part)
        while size % math.prod(mesh.shape[n] for n in names):
            names = names[:-1]
        found.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*found)


def _names(part: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def gathers() -> bool:
    """Whether parameters are gathered where they are used, under the active mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(mesh.shape[a] for a in FSDP) > 1


def not_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint`: keep everything for the backward pass but gathered weights, which are gathered again.

    Known by their layout: of all that is pinned, weights alone are not split along data, neither where they are used
    nor where they are kept. Both pins are made again, so that what is kept lies as the weight does. (Giving gathered
    weights a name would not do: what the name is put on would be kept.)
    """
    if primitive.name != "sharding_constraint":
        return True
    return any("data" in _names(part) for part in params["sharding"].spec)


def batch_groups(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins an activation's sharding under the active mesh (`jax.set_mesh`); without one it returns x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitted(mesh, spec(axes), x.shape))


def over_rows(f: Callable[[Any, Any], Any], rows: Any, shared: Any = ()) -> Any:
    """f(rows, shared), on each device for its own part of the rows, as the active mesh splits a batch.

    For what is computed row by row and XLA's partitioner would gather all rows for: top_k, or a loop over them.

    Args:
      rows: a tree of arrays whose first axis is rows; so is that of what f returns.
      shared: a tree of arrays that every device has all of.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f(rows, shared)
    split = fitted(mesh, spec(("batch",)), jax.tree.leaves(rows)[0].shape[:1])
    return jax.shard_map(f, in_specs=(split, PartitionSpec()), out_specs=split)(rows, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def used(w: jax.Array, axes: tuple[str | None, ...], fsdp: int | None) -> jax.Array:
    """All-gathers a stored parameter to its compute sharding; the gradient is reduce-scattered back."""
    return _gathered(w, axes, fsdp)


def _gathered(w: jax.Array, axes: tuple[str | None, ...], fsdp: int | None) -> jax.Array:
    # Both ends are pinned: otherwise the compiler may gather before a cast.
    return constrain(put_back(w, axes, fsdp), axes)


def put_back(w: jax.Array, axes: tuple[str | None, ...], fsdp: int | None) -> jax.Array:
    """A parameter, or its gradient, as the parameter is kept."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return w
    return jax.lax.with_sharding_constraint(w, fitted(mesh, kept(axes, fsdp), w.shape))


used.defvjp(
    lambda w, axes, fsdp: (_gathered(w, axes, fsdp), None),  # not `used`: `not_gathered` would not see into it
    lambda axes, fsdp, _, g: (put_back(g, axes, fsdp),),
)
