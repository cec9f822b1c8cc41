"""Devices: the four mesh axes, and the one table that says which array axis lies on which of them.

Every mesh has all four axes, so no code asks whether one is there:

    data    batch is split, parameters are copied
    fsdp    batch is split, parameters are split along `embed` and gathered when used
    expert  batch is split, experts are split: tokens travel to their experts by all-to-all
    tensor  heads, FFN width and vocabulary are split
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qatmoe.config import MeshConfig
from qatmoe.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis of an array -> mesh axes. The only such table.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # sequences, tokens, or groups of tokens before they are exchanged
    "group": ("data", "fsdp"),  # groups of tokens once their rows lie with their experts
    "experts": ("expert",),
    "embed": ("fsdp",),  # D of a parameter
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),  # F of a parameter
    "vocab": ("tensor",),
}


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over all devices; an axis of -1 takes what the others leave.

    Raises:
      UserError: the axes' product is not the number of devices.
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
    return Mesh(np.asarray(devices).reshape([sizes[a] for a in AXES]), AXES)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes -> PartitionSpec, e.g. ("experts", "mlp", "embed").

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


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of an array of `shape` whose axes are named; an axis that its mesh axes do not divide is copied."""
    parts = []
    for size, part in zip(shape, spec(axes), strict=True):
        names = (part,) if isinstance(part, str) else (part or ())
        parts.append(part if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def batch_groups(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins an activation's sharding under the active mesh (`jax.set_mesh`); without one it returns x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
