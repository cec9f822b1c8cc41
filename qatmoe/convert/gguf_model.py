"""A branch as a GGUF file for llama.cpp: hyper-parameters, vocabulary, and tensors on the grid they were trained on."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.convert import gguf, names
from qatmoe.convert.gguf import Field
from qatmoe.convert.names import Part
from qatmoe.convert.vocab import gguf_fields
from qatmoe.convert.weights import PLAIN, Branch, Storage, Value
from qatmoe.errors import UserError
from qatmoe.quant.grid import Grid
from qatmoe.quant.pack import Packed, check_scales, write_blocks

_GATING = {"softmax": 1, "sigmoid": 2}  # llama_expert_gating_func_type
# Where llama.cpp multiplies by the scale tensor that NVFP4 needs beside its blocks; it ignores others without a word.
SCALED = {
    "qwen3moe": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    "olmoe": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "glm4moe": ("attn_q", "attn_k", "attn_v", "attn_output"),
}


# A conversation is its text: models here are trained on plain text, and llama-cli then continues the prompt.
PLAIN_TEXT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


# Types whose bytes hold neighbouring codes: one compiled pass over the weights. In the others' layouts XLA would choose
# each code several times over, so codes are made first.
_ONE_PASS = ("Q2_0", "Q8_0")


def write(
    branch: Branch,
    path: Path,
    *,
    arch: str = "auto",
    name: str = "",
    context: int = 0,
    chat_template: str = "",
    force: bool,
) -> str:
    """Writes a branch as a GGUF file; returns the architecture.

    Args:
      arch: glm4moe, qwen3moe, olmoe, or the first that computes what the model computes.
      name: general.name; the run's by default.
      context: context_length; by default the imported model's, or the length of the training sequences.
      chat_template: Jinja, for llama.cpp's chat programs; by default the imported model's, or plain text.

    Raises:
      UserError: no architecture or type holds the model exactly, or the file cannot be written. Nothing is left behind.
    """
    arch = names.architecture(branch.model, names.GGUF, arch)
    held = parts(branch.storage, arch)
    fields = metadata(branch, arch, name, context, chat_template)
    tensors = {n: tensor(branch.storage, n, part) for n, part in held.items()}
    branch.expect(held.values())
    read = Source(branch)
    gguf.write(path, fields, tensors, lambda n: read(n, held[n]), force=force)
    return arch


def metadata(branch: Branch, arch: str, name: str = "", context: int = 0, chat_template: str = "") -> dict[str, Field]:
    """All fields of the file. Arguments and errors as `write` has them."""
    fields = hyper_parameters(branch.model, arch, name or branch.cfg.name, context or branch.context)
    fields |= gguf_fields(branch.tokenizer, branch.model.vocab_size, branch.origin.roles)
    fields["tokenizer.chat_template"] = Field("string", chat_template or branch.origin.chat_template or PLAIN_TEXT)
    # llama.cpp stops at each of these, and has no name for a fourth.
    for role, token in zip(("eos", "eot", "eom"), branch.origin.end_ids, strict=False):
        fields[f"tokenizer.ggml.{role}_token_id"] = Field("uint32", token)
    return fields


def parts(storage: Storage, arch: str) -> dict[str, Part]:
    """{tensor name: what it holds}; NVFP4 tensors are followed by their scale tensors.

    Raises:
      UserError: llama.cpp would ignore a scale tensor, or refuse the file for it.
    """
    held: dict[str, Part] = {}
    for name, part in names.gguf_parts(storage.model, arch).items():
        held[name] = part
        if storage.type_of(part)[0] != "NVFP4":
            continue
        if part.path.startswith("mtp/"):
            raise UserError(
                f"{name} is on nvfp4, and llama.cpp loads no file with the scale tensor that NVFP4 needs in an MTP "
                "module: export with --drop_mtp, or train with quant.mtp='none'"
            )
        if name.split(".")[-2] not in SCALED[arch]:
            raise UserError(
                f"{name} is on nvfp4, and llama.cpp's {arch} ignores the scale tensor that NVFP4 needs there: export "
                "with --format compressed-tensors, train it on mxfp4, or (for experts) use a model that fits qwen3moe"
            )
        held[name.removesuffix("weight") + "scale"] = part
    return held


def tensor(storage: Storage, name: str, part: Part) -> gguf.Tensor:
    """Type and shape of a tensor of the file."""
    shape = storage.shape_of(part)
    if name.endswith(".scale"):
        return gguf.Tensor("F32", shape[:-2] or (1,))
    return gguf.Tensor(storage.type_of(part)[0], shape)


class Source:
    """Reads what the file stores; keeps the last packed layer, which several tensors are cut from."""

    def __init__(self, branch: Branch):
        self._branch = branch
        self._packed: tuple[Part | None, Packed | None] = (None, None)

    def __call__(self, name: str, part: Part) -> np.ndarray:
        """Bytes of blocks, or plain numbers."""
        if self._branch.storage.type_of(part)[1] is None:
            value = self._branch.value(part)
            return np.asarray(value.weight.astype(PLAIN[value.kind]))
        whole = dataclasses.replace(part, half=None)
        if self._packed[0] != whole:
            self._packed = (None, None)  # freed before the next is made
            self._packed = (whole, packed_value(self._branch.value(whole)))
        packed = self._packed[1]
        assert packed is not None
        if name.endswith(".scale"):
            assert packed.tensor_scale is not None
            return np.atleast_1d(packed.tensor_scale)
        rows = self._branch.storage.shape_of(part)[-2]
        return packed.data if part.half is None else packed.data[..., part.half * rows : (part.half + 1) * rows, :]


def packed_value(value: Value) -> Packed:
    """Codes and scales in the bytes of the value's type."""
    assert value.grid is not None
    assert value.scale is not None
    if not _on_grid(value.grid, value.scale):
        check_scales(value.grid, np.asarray(value.scale))  # says which
    if value.kind in _ONE_PASS:
        data, tensor_scale = _from_weights(value.grid, value.kind, value.weight, value.scale)
    else:
        data, tensor_scale = _from_codes(value.grid, value.kind, value.codes(), value.scale)
    return Packed(value.kind, np.asarray(data), None if tensor_scale is None else np.asarray(tensor_scale))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from_weights(grid: Grid, kind: str, weight: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return write_blocks(grid, grid.nearest(weight, scale), scale, kind)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from_codes(grid: Grid, kind: str, codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return write_blocks(grid, codes, scale, kind)


@functools.partial(jax.jit, static_argnums=0)
def _on_grid(grid: Grid, scale: jax.Array) -> jax.Array:
    return jnp.array_equal(grid.snap(scale), scale)


def hyper_parameters(m: ModelConfig, arch: str, name: str, context: int) -> dict[str, Field]:
    """Everything but the vocabulary (llama.cpp: src/llama-arch.cpp has the keys)."""
    numbers = {
        "context_length": context,
        "embedding_length": m.dim,
        "block_count": m.n_layers + m.n_mtp,
        "feed_forward_length": m.expert_dim if arch == "olmoe" else m.dense_dim,
        "expert_feed_forward_length": m.expert_dim,
        "attention.head_count": m.n_heads,
        "attention.head_count_kv": m.n_kv_heads,
        "attention.key_length": m.head_dim,
        "attention.value_length": m.head_dim,
        "rope.dimension_count": m.rotary_dim,
        "expert_count": m.n_experts,
        "expert_used_count": m.top_k,
    }
    floats = {"rope.freq_base": m.rope_theta, "attention.layer_norm_rms_epsilon": m.norm_eps}
    flags = {}
    if arch == "glm4moe":
        numbers |= {
            "expert_shared_count": m.n_shared_experts,
            "leading_dense_block_count": m.n_dense_layers,
            "nextn_predict_layers": m.n_mtp,
            "expert_gating_func": _GATING[m.router],
        }
        floats["expert_weights_scale"] = m.routed_scale
        flags["expert_weights_norm"] = m.norm_topk
    return {
        "general.architecture": Field("string", arch),
        "general.name": Field("string", name),
        "general.quantization_version": Field("uint32", 2),
        **{f"{arch}.{key}": Field("uint32", value) for key, value in numbers.items()},
        **{f"{arch}.{key}": Field("float32", value) for key, value in floats.items()},
        **{f"{arch}.{key}": Field("bool", value) for key, value in flags.items()},
    }
