"""Parts that every block shares: parameter declarations, linear maps, RMSNorm, rotary embedding, SwiGLU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qatmoe.mesh import used

DOT = "dot"  # the name of what `weighted` marks


@dataclasses.dataclass(frozen=True)
class Param:
    """Declares one parameter: its shape, the logical name of each axis, and how it starts.

    It starts as std * normal, or constant at `fill` where std is 0. Initialisation, abstract shapes and shardings are
    all derived from one tree of these.

    axes: logical axes, giving the compute sharding. fsdp: axis additionally sharded in storage; None = not split. For a
    matrix that is the output axis: blocks of a grid run along the other, and none is then cut in two.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fsdp: int | None = None
    std: float = 0.0
    fill: float = 0.0

    def stacked(self, n: int) -> "Param":
        """The same parameter for n layers, layers on axis 0."""
        fsdp = None if self.fsdp is None else self.fsdp + 1
        return dataclasses.replace(self, shape=(n, *self.shape), axes=("layers", *self.axes), fsdp=fsdp)


def norm_param(width: int) -> Param:
    """An RMSNorm weight: ones, on every device."""
    return Param((width,), (None,), fill=1.0)


def einsum(subscripts: str, *operands: jax.Array, **options: Any) -> jax.Array:
    """jnp.einsum that multiplies f32 operands in f32: unasked, GPUs round them to TF32, 11 bits, and TPUs to bf16."""
    return jnp.einsum(subscripts, *operands, precision=precision(operands[0]), **options)


def precision(operand: jax.Array) -> jax.lax.Precision | None:
    """What a product with this operand is asked for, so that it is multiplied as it is."""
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None


def weighted(product: jax.Array) -> jax.Array:
    """Marks a product with a weight, which model.remat="dots" keeps for the backward pass; the number is the same."""
    return checkpoint_name(product, DOT)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (..., in) times weight (out, in), cast to the dtype of x at use -> (..., out)."""
    return weighted(einsum("...i,oi->...o", x, weight.astype(x.dtype)))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in f32, returned in the dtype of x (Zhang & Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight).astype(x.dtype)


def rope_angles(positions_BL: jax.Array, head_dim: int, fraction: float, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding, both f32 (B, L, R/2), for the R = head_dim * fraction turned dims."""
    rotary_dim = round(head_dim * fraction)
    frequencies = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BLHDh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the first dims of every head by its position's angles (RoFormer, Su et al. 2021); the rest passes through.

    Dim i is paired with dim i + R/2 of the turned part ("neox" order, as in Qwen3-MoE, OLMoE and GLM-4.5).
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first = x_BLHDh[..., :half].astype(jnp.float32)
    second = x_BLHDh[..., half : 2 * half].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([t.astype(x_BLHDh.dtype) for t in turned] + [x_BLHDh[..., 2 * half :]], axis=-1)


def halves(gate_up: jax.Array, axis: int = -1) -> jax.Array:
    """(..., 2F, ...) -> (..., 2, F, ...): gate and up on an axis of their own, so that F can be split over devices."""
    axis %= gate_up.ndim
    return gate_up.reshape(*gate_up.shape[:axis], 2, -1, *gate_up.shape[axis + 1 :])


def used_halves(gate_up: jax.Array, *leading: str | None) -> jax.Array:
    """A weight (..., 2F, D), as it is kept, as (..., 2, F, D) where it is used; `leading` names the axes before 2F.

    Cut in two before it is gathered: each device holds some of both halves then, and no gathered weight, nor its
    gradient, has to be reshaped across devices.
    """
    return used(halves(gate_up, axis=-2), (*leading, None, "mlp", None), len(leading) + 1)


def swiglu(gate_up: jax.Array, limit: float) -> jax.Array:
    """silu(gate) * up, (..., 2, F) -> (..., F) f32; gate first, up second (Shazeer 2020).

    limit > 0 clamps gate to at most limit and up to [-limit, limit] before the product (gpt-oss, DeepSeek-V4).
    """
    gate, up = (gate_up[..., i, :].astype(jnp.float32) for i in (0, 1))
    if limit > 0:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def ffn_params(dim: int, width: int, std: float, out_std: float) -> dict[str, Param]:
    """A SwiGLU feed-forward net of the given width."""
    return {
        "gate_up": Param((2 * width, dim), ("mlp", None), 0, std),
        "down": Param((dim, width), (None, "mlp"), 0, out_std),
    }


def ffn(params: dict, x: jax.Array, limit: float) -> jax.Array:
    """SwiGLU feed-forward net, (..., D) -> (..., D)."""
    gate_up_2FD = used_halves(params["gate_up"].astype(x.dtype))
    hidden = swiglu(weighted(einsum("...d,hfd->...hf", x, gate_up_2FD)), limit).astype(x.dtype)
    return linear(hidden, params["down"])
