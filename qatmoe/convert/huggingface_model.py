"""A branch as a Hugging Face folder: config.json, tokenizer, and safetensors, plain or packed.

Plain: the numbers of the grids in bfloat16, which holds them exactly (Grid.bf16_exact), or everything in float32.
Packed: codes and scales as compressed-tensors lays them out.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from qatmoe.convert import compressed, hf_config, names, safetensors
from qatmoe.convert.names import Part
from qatmoe.convert.safetensors import DTYPES, Tensor
from qatmoe.convert.vocab import all_roles, huggingface_files
from qatmoe.convert.weights import PLAIN, Branch, Storage
from qatmoe.errors import UserError
from qatmoe.files import atomic_folder
from qatmoe.quant.grid import GRIDS, Grid

Content = tuple[Part, str]  # a part, and the suffix of its packed tensor, "" where it is one plain tensor


def write(branch: Branch, folder: Path, *, arch: str = "auto", packed: bool, context: int = 0, force: bool) -> str:
    """Writes a branch as a Hugging Face folder; returns the architecture.

    Args:
      arch: glm4_moe, qwen3_moe, olmoe, or the first that computes what the model computes.
      packed: codes and scales (compressed-tensors) instead of plain numbers.
      context: max_position_embeddings; by default the imported model's, or the length of the training sequences.

    Raises:
      UserError: no architecture, type or layout holds the model exactly, or the folder cannot be written.
    """
    arch = names.architecture(branch.model, names.HUGGINGFACE, arch)
    held = contents(branch.storage, arch, packed)
    tensors = {name: tensor(branch.storage, *content) for name, content in held.items()}
    dtype = "float32" if branch.storage.rest == "F32" else "bfloat16"
    origin = branch.origin
    ends = origin.end_ids or (branch.tokenizer.end_id,)
    config = hf_config.write(
        branch.model, arch, context or branch.context, dtype, ends, all_roles(branch.tokenizer, origin.roles)
    )
    if packed:
        config["quantization_config"] = _quantization(branch.storage, arch)
    read = Source(branch)
    branch.expect(part for part, _ in held.values())
    with atomic_folder(folder, force=force) as place:
        safetensors.write_sharded(place, tensors, lambda name: read(*held[name]))
        files = huggingface_files(branch.tokenizer, origin.roles)
        files["config.json"] = json.dumps(config, indent=2)
        if origin.chat_template:
            files["chat_template.jinja"] = origin.chat_template
        for file, text in files.items():
            (place / file).write_text(text, encoding="utf-8")
    return arch


def contents(storage: Storage, arch: str, packed: bool) -> dict[str, Content]:
    """{tensor name: what it holds}.

    Raises:
      UserError: a grid has no exact form in such a folder.
    """
    if storage.rest not in ("F32", "BF16"):
        raise UserError(f"--rest {storage.rest}: Hugging Face folders are written with BF16 or F32")
    held: dict[str, Content] = {}
    for name, part in names.huggingface_parts(storage.model, arch).items():
        grid = storage.type_of(part)[1]
        if grid is None:
            held[name] = (part, "")
            continue
        if packed and grid.name not in compressed.FORMATS:
            raise UserError(f"{name} is on {grid.name}, which compressed-tensors cannot hold: use --format safetensors")
        # transformers casts the scales of all but routed experts to config.json's dtype before it multiplies.
        in_bf16 = storage.rest != "F32" and not (packed and part.expert is not None)
        if in_bf16 and not grid.bf16_exact:
            raise UserError(f"{name} is on {grid.name}, whose numbers bfloat16 cannot hold: give --rest F32")
        if not packed:
            held[name] = (part, "")
            continue
        if not name.endswith("_proj.weight"):
            raise UserError(
                f"{name} is on {grid.name}: compressed-tensors packs projections only, not embeddings or heads; use "
                "--format safetensors"
            )
        for suffix in _packed_tensors(grid.name, storage.shape_of(part)):
            held[name.removesuffix("weight") + suffix] = (part, suffix)
    return held


def tensor(storage: Storage, part: Part, suffix: str) -> Tensor:
    """Type and shape of a tensor of the folder."""
    kind, grid = storage.type_of(part)
    shape = storage.shape_of(part)
    if suffix:
        assert grid is not None
        return _packed_tensors(grid.name, shape)[suffix]
    return Tensor(kind if grid is None else storage.rest, shape)


class Source:
    """Reads what the folder stores; keeps the last packed matrix, which several tensors are cut from."""

    def __init__(self, branch: Branch):
        self._branch = branch
        self._packed: tuple[Part | None, dict[str, np.ndarray]] = (None, {})

    def __call__(self, part: Part, suffix: str) -> np.ndarray:
        """The tensor of a part; `suffix` as in `contents`."""
        if not suffix:
            value = self._branch.value(part)
            numbers = value.weight if value.grid is None else value.numbers()
            return np.asarray(numbers.astype(PLAIN[tensor(self._branch.storage, part, "").dtype]))
        # gate and up are packed as one: programs fuse them, and then both need the same global scale (nvfp4).
        whole = dataclasses.replace(part, half=None)
        if self._packed[0] != whole:
            value = self._branch.value(whole)
            assert value.grid is not None
            self._packed = (
                whole,
                compressed.pack(value.grid, np.asarray(value.codes()), np.asarray(value.scale)).tensors,
            )
        array, rows = self._packed[1][suffix], self._branch.storage.shape_of(part)[0]
        if suffix == "weight_shape":
            return np.asarray(self._branch.storage.shape_of(part), array.dtype)
        if part.half is None or suffix == "weight_global_scale":
            return array
        return array[part.half * rows : (part.half + 1) * rows]


@functools.cache
def _packed_tensors(grid_name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Types and shapes that a matrix is packed to, found by packing one of zeros."""
    grid = GRIDS[grid_name]
    zeros = compressed.pack(grid, *grid.encode(np.zeros(shape, np.float32), "absmax"))
    known = {dtype: name for name, dtype in DTYPES.items()}
    return {suffix: Tensor(known[array.dtype], array.shape) for suffix, array in zeros.tensors.items()}


def _quantization(storage: Storage, arch: str) -> dict[str, object]:
    """The quantization_config of config.json: all linear layers that are not on a grid are named in `ignore`.

    Raises:
      UserError: nothing is on a grid, or programs that decode all routed experts by one scheme would go wrong.
    """
    grids: dict[str, Grid] = {}
    ignore = []
    experts: dict[Any, str] = {}  # scheme of the trunk's routed experts, None for plain numbers -> who has it
    for name, part in names.huggingface_parts(storage.model, arch).items():
        grid = storage.type_of(part)[1]
        module = name.removesuffix(".weight")
        if part.expert is not None and not part.path.startswith("mtp/"):
            weights = f"{part.path.rpartition('/')[2]} on {grid.name if grid else 'no grid'}"
            experts.setdefault(grid and compressed.scheme(grid), weights)
        if grid is not None:
            grids[module] = grid
        elif name.endswith("_proj.weight") or module == "lm_head" or module.endswith("mlp.gate"):
            ignore.append(module)
    if not grids:
        raise UserError("this branch has nothing on a grid: compressed-tensors packs nothing; use --format safetensors")
    if len(experts) > 1:
        raise UserError(
            f"routed experts are stored differently ({', '.join(experts.values())}), and programs that load "
            "compressed-tensors decode all of them by one scheme: export with --format safetensors or gguf"
        )
    if None in experts:
        raise UserError(
            "routed experts lie on no grid, and transformers decodes all of them as soon as anything is packed: export "
            "with --format safetensors or gguf"
        )
    return compressed.config(grids, ignore)
