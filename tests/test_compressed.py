import dataclasses
import json
import re

import compressed_tensors
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from transformers import CompressedTensorsConfig

from qatmoe.config import Config, ModelConfig, QuantConfig
from qatmoe.convert import compressed, huggingface_model, names
from qatmoe.convert.weights import Storage
from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS
from qatmoe.run import quant_plan

HELD = [grid for grid in GRIDS.values() if grid.name in compressed.FORMATS]
ALL_HELD = pytest.mark.parametrize("grid", HELD, ids=lambda grid: grid.name)
BITS = {
    "q2_0": 2, "ternary": 2, "ternary_256": 2, "q2_k": 3, "q3_k": 3, "q4_0": 4, "q8_0": 8, "mxfp4": 4, "nvfp4": 4,
}  # fmt: skip


def matrix(grid, seed=0, out=6, width=512):
    """Random codes and scales over the grid's whole range: both signs where it has them, and a block of zeros."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(grid.first_code, len(grid.levels), (out, width), dtype=np.uint8)
    size = 2.0 ** rng.uniform(-8, 4, (out, width // grid.block))
    if grid.scales in ("f16", "e8m0"):
        size[0, 0], size[1, 0] = 1e-30, 1e30  # the smallest and the largest scale
    if grid.signed:
        size *= rng.choice([-1, 1], size.shape)
    if 0.0 in grid.levels:
        codes[2, : grid.block] = grid.levels.index(0.0)
    else:
        size[2, 0] = 0.0
    return codes, np.asarray(grid.snap(size.astype(np.float32)))


def layers(pattern, *sizes):
    """Names of modules: the pattern with every index below the sizes."""
    return [pattern.format(*index) for index in np.ndindex(*sizes)]


# ---- in numpy --------------------------------------------------------------------------------------------------------


def test_every_grid_but_iq4_nl_has_a_format():
    assert set(GRIDS) - set(compressed.FORMATS) == {"iq4_nl"}
    assert set(compressed.FORMATS.values()) == {"pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"}


@ALL_HELD
@pytest.mark.parametrize("seed", range(3))
def test_the_tensors_mean_the_decoded_weights(grid, seed):
    codes, scale = matrix(grid, seed)
    there = compressed.dequantize(grid, compressed.pack(grid, codes, scale))
    assert there.dtype == np.float32
    np.testing.assert_array_equal(there, grid.decode(codes, scale))
    assert not there[2, : grid.block].any()
    if grid.signed:
        assert (scale < 0).any() and (scale > 0).any()


@ALL_HELD
def test_dtypes_and_shapes(grid):
    tensors = compressed.pack(grid, *matrix(grid)).tensors
    found = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    groups = (6, 512 // grid.block)
    if grid.name == "mxfp4":
        assert found == {"weight_packed": ("uint8", (6, 256)), "weight_scale": ("uint8", groups)}
    elif grid.name == "nvfp4":
        assert found == {
            "weight_packed": ("uint8", (6, 256)),
            "weight_scale": ("float8_e4m3fn", groups),
            "weight_global_scale": ("float32", (1,)),
        }
    else:
        assert found == {
            "weight_packed": ("int32", (6, 512 * BITS[grid.name] // 32)),
            "weight_scale": ("float32" if grid.name == "q8_0" else "bfloat16", groups),
            "weight_shape": ("int64", (2,)),
        }
        assert tensors["weight_shape"].tolist() == [6, 512]


def test_words_of_two_bits():
    """Weight i is bits 2i and 2i + 1; q2_0's levels -1, 0, 1, 2 are the ints 1, 0, -1, -2 of the negated scale."""
    codes = np.zeros((1, 64), np.uint8)
    codes[0, :4], codes[0, 15], codes[0, 16] = [0, 1, 2, 3], 3, 3
    tensors = compressed.pack(GRIDS["q2_0"], codes, np.full((1, 1), 0.5, np.float32)).tensors
    words = tensors["weight_packed"].view(np.uint32)[0]
    assert words[0] == int("00" + 11 * "11" + "00011011", 2)
    assert words[1] == int(15 * "11" + "00", 2)
    assert tensors["weight_scale"].astype(np.float32).tolist() == [[-0.5]]


def test_three_bits_run_on_across_words():
    codes = np.zeros((1, 256), np.uint8)
    codes[0, 10] = 0b110  # bits 30 and 31 of word 0 and bit 0 of word 1
    words = compressed.pack(GRIDS["q3_k"], codes, np.ones((1, 16), np.float32)).tensors["weight_packed"]
    assert words.view(np.uint32)[0, :2].tolist() == [0b10 << 30, 1]


def test_nibbles_and_the_reciprocal_global_scale():
    codes = np.zeros((2, 64), np.uint8)
    codes[0, :2] = [0x3, 0xA]
    scale = GRIDS["nvfp4"].snap(np.linspace(1, 100, 8, dtype=np.float32).reshape(2, 4) * np.float32(2.0**-20))
    tensors = compressed.pack(GRIDS["nvfp4"], codes, scale).tensors
    assert tensors["weight_packed"][0, 0] == 0xA3
    unit = tensors["weight_scale"].astype(np.float32)
    assert unit.max() > 224  # the largest scale uses E4M3's upper half, so the global scale is the one of the grid
    np.testing.assert_array_equal(unit / tensors["weight_global_scale"], scale)
    assert np.log2(tensors["weight_global_scale"][0]) % 1 == 0 and tensors["weight_global_scale"][0] > 1


def test_what_cannot_be_packed_is_refused_by_name():
    grid = GRIDS["q4_0"]
    codes, scale = matrix(grid)
    with pytest.raises(UserError, match="no exact form of grid iq4_nl; it has of q2_0"):
        compressed.pack(GRIDS["iq4_nl"], codes, scale)
    with pytest.raises(UserError, match="no exact form of grid iq4_nl"):
        compressed.dequantize(GRIDS["iq4_nl"], compressed.pack(grid, codes, scale))
    with pytest.raises(UserError, match="codes are uint8, got int64"):
        compressed.pack(grid, codes.astype(np.int64), scale)
    with pytest.raises(UserError, match="multiple of 32"):
        compressed.pack(grid, codes[:, :31], scale)
    with pytest.raises(UserError, match=r"got \(0, 512\)"):
        compressed.pack(grid, codes[:0], scale[:0])
    with pytest.raises(UserError, match="do not fit codes"):
        compressed.pack(grid, codes, scale[:, :-1])
    with pytest.raises(UserError, match=r"one \(out, in\) matrix"):
        compressed.pack(grid, codes[None], scale[None])
    with pytest.raises(UserError, match=r"codes 0\.\.15; got 31"):
        compressed.pack(grid, codes | 16, scale)
    with pytest.raises(UserError, match="not finite"):
        compressed.pack(grid, codes, scale * np.float32(np.nan))
    with pytest.raises(UserError, match="needs the tensor weight_scale; got weight_packed"):
        compressed.dequantize(grid, compressed.Packed({"weight_packed": np.zeros((1, 1), np.int32)}))
    for held in HELD:
        codes, scale = matrix(held)
        with pytest.raises(UserError, match=f"is not on grid {held.name}: snap"):
            compressed.pack(held, codes, scale * np.float32(1.17))


def test_scales_that_the_file_would_round_are_refused():
    fine = dataclasses.replace(GRIDS["q2_0"], scale_bits=11)
    codes, _ = matrix(fine)
    scale = np.full((6, 8), 1 + 2**-9, np.float32)
    with pytest.raises(UserError, match="not exact in bfloat16"):
        compressed.pack(fine, codes, scale)
    wide = dataclasses.replace(fine, bf16_exact=False)
    there = compressed.dequantize(wide, compressed.pack(wide, codes, scale))
    np.testing.assert_array_equal(there, wide.decode(codes, scale))


# ---- config.json -----------------------------------------------------------------------------------------------------


def matched(targets, name):
    return any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in targets)


def test_targets_match_the_quantized_modules_and_no_others():
    q2, q4 = GRIDS["q2_0"], GRIDS["q4_0"]
    ups = layers("model.layers.{}.mlp.experts.{}.up_proj", 12, 16)
    downs = layers("model.layers.{}.mlp.experts.{}.down_proj", 12, 16)
    grids = dict.fromkeys(ups, q2) | dict.fromkeys(downs, q4) | {"model.layers.0.mlp.up_proj": q4, "lm_head": q4}
    del grids[ups[0]], grids[ups[40]]  # left as they are, although nobody says so in `ignore`
    grids[ups[50]] = q4
    made = compressed.config(grids, ["model.layers.0.mlp.gate"])
    assert made["ignore"] == ["model.layers.0.mlp.gate"]
    two, four = made["config_groups"].values()
    assert (two["weights"]["num_bits"], four["weights"]["num_bits"]) == (2, 4)
    for name in [*ups, *downs, "model.layers.0.mlp.up_proj", "lm_head", "model.layers.1.mlp.up_proj", "lm_head2",
                 "model.layers.112.mlp.experts.1.up_proj", "model.layers.1.mlp.experts.1.up_proj2"]:  # fmt: skip
        assert matched(two["targets"], name) == (grids.get(name) == q2), name
        assert matched(four["targets"], name) == (grids.get(name) == q4), name
    assert sum(len(group["targets"]) for group in made["config_groups"].values()) < 10


def storage_of(rest="BF16", **quant):
    """How a small model with an MTP module is stored, and its architecture."""
    cfg = Config(model=ModelConfig(dim=64, dense_dim=64, expert_dim=64), quant=QuantConfig(**quant))
    return Storage(cfg, quant_plan(cfg)[0], rest=rest), names.architecture(cfg.model, names.HUGGINGFACE)


@pytest.mark.parametrize(
    ("quant", "bits"),
    [
        ({"gate_up": "q2_0", "down": "ternary"}, [2]),  # what they were trained on does not matter
        ({"experts": "q2_0", "mtp": "none"}, [2]),  # transformers loads no MTP modules
        ({"experts": "q2_0", "mtp": "q4_0"}, [2, 4]),
    ],
)
def test_routed_experts_of_one_scheme(quant, bits):
    groups = huggingface_model._quantization(*storage_of(**quant))["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == bits


@pytest.mark.parametrize(
    ("quant", "refusal"),
    [
        ({"gate_up": "q2_0", "down": "q4_0"}, r"stored differently \(gate_up on q2_0, down on q4_0\)"),
        ({"experts": "q2_0", "down": "none"}, r"stored differently \(gate_up on q2_0, down on no grid\)"),
        ({"experts": "q2_0", "gate_up": "none"}, r"stored differently \(gate_up on no grid, down on q2_0\)"),
        ({"experts": "none", "attention": "q4_0"}, "routed experts lie on no grid"),
        ({"experts": "none", "mtp": "q2_0"}, "routed experts lie on no grid"),
    ],
)
def test_routed_experts_of_several_schemes(quant, refusal):
    """Programs decode all of them by one: transformers 5.23 leaves others as they were initialised, or raises."""
    with pytest.raises(UserError, match=refusal):
        huggingface_model._quantization(*storage_of(**quant))


@pytest.mark.parametrize("quant", [{"attention": "q8_0"}, {"shared": "q8_0"}])
def test_q8_0_outside_routed_experts_needs_float32(quant):
    """transformers casts its scales to the folder's dtype, and then most weights are others."""
    quant = {"experts": "q2_0", "mtp": "none"} | quant
    with pytest.raises(UserError, match=r"_proj.weight is on q8_0, .* bfloat16 cannot hold: give --rest F32"):
        huggingface_model.contents(*storage_of(**quant), packed=True)
    held = huggingface_model.contents(*storage_of(rest="F32", **quant), packed=True)
    scales = [name for name, (part, suffix) in held.items() if suffix == "weight_scale" and part.expert is None]
    assert scales and all("self_attn" in name or "mlp" in name for name in scales)
    held = huggingface_model.contents(*storage_of(experts="q8_0", mtp="none"), packed=True)
    assert any(part.expert is not None and suffix == "weight_scale" for part, suffix in held.values())


def test_config_names_the_format():
    assert compressed.scheme(GRIDS["q2_0"]) == compressed.scheme(GRIDS["ternary"])
    assert compressed.scheme(GRIDS["ternary"]) != compressed.scheme(GRIDS["ternary_256"])
    one = compressed.config({"a": GRIDS["q2_0"], "b": GRIDS["ternary"]}, [])
    assert one["format"] == "pack-quantized"
    assert [group["targets"] for group in one["config_groups"].values()] == [["a", "b"]]  # stored alike
    two = compressed.config({"mlp.up_proj": GRIDS["mxfp4"], "mlp.experts.0.up_proj": GRIDS["nvfp4"]}, ["lm_head"])
    assert two["format"] == "mixed-precision"
    formats = [group["format"] for group in two["config_groups"].values()]
    assert formats == ["nvfp4-pack-quantized", "mxfp4-pack-quantized"]  # routed experts first


def test_config_refuses_by_module_name():
    with pytest.raises(UserError, match="mlp.up: compressed-tensors has no exact form of grid iq4_nl"):
        compressed.config({"mlp.up": GRIDS["iq4_nl"]}, [])
    with pytest.raises(UserError, match="no module is quantized"):
        compressed.config({}, [])
    for ignore in ("mlp.up", "re:mlp"):
        with pytest.raises(UserError, match="mlp.up has grid q4_0 and is in ignore"):
            compressed.config({"mlp.up": GRIDS["q4_0"]}, [ignore])


# ---- against the libraries that read these files ---------------------------------------------------------------------


def as_torch(array):
    """A tensor of the same bytes; numpy knows ml_dtypes' types, torch's from_numpy does not."""
    raw = {ml_dtypes.bfloat16: torch.bfloat16, ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn}.get(array.dtype.type)
    if raw is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.uint16 if array.itemsize == 2 else np.uint8)).view(raw)


def validated(grids, ignore=()):
    """Our config after the way into and out of config.json, as the library understands it."""
    return QuantizationConfig.model_validate(json.loads(json.dumps(compressed.config(grids, list(ignore)))))


class TestCompressedTensors:
    @ALL_HELD
    @pytest.mark.parametrize("seed", range(2))
    def test_decompresses_to_the_decoded_weights(self, grid, seed):
        """Also where it computes in bfloat16: maximum difference 0.0."""
        codes, scale = matrix(grid, seed)
        tensors = {name: as_torch(a) for name, a in compressed.pack(grid, codes, scale).tensors.items()}
        (scheme,) = validated({"up_proj": grid}).config_groups.values()
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        assert compressor.can_compress(torch.nn.Linear, scheme)
        assert set(compressor.compression_param_names(scheme)) == set(tensors)
        there = compressor.decompress(tensors, scheme)["weight"]
        assert there.dtype == (torch.float32 if grid.name == "q8_0" else torch.bfloat16)
        np.testing.assert_array_equal(there.float().numpy(), grid.decode(codes, scale))

    @ALL_HELD
    def test_compresses_the_decoded_weights_to_the_same_bytes(self, grid):
        """Every tensor but the sign of zero, which the codes of FP4 have and the library's rounding loses."""
        codes, scale = matrix(grid, 5)
        if grid.levels[8:9] == (0.0,):
            codes[codes == 8] = 0
        if 0.0 not in grid.levels:
            scale[2, 0] = scale[2, 1]  # it divides by the scale
        ours = {name: as_torch(a) for name, a in compressed.pack(grid, codes, scale).tensors.items()}
        (scheme,) = validated({"up_proj": grid}).config_groups.values()
        factor = ours.get("weight_global_scale", 1)
        state = ours | {"weight": torch.from_numpy(grid.decode(codes, scale).copy())}
        del state["weight_packed"]
        if grid.name in ("mxfp4", "nvfp4"):
            state["weight_scale"] = torch.from_numpy(scale) * factor
        theirs = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
        assert set(theirs) == set(ours)
        for name, tensor in ours.items():
            assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape
            assert torch.equal(theirs[name].float(), tensor.float()), name

    def test_knows_every_field_of_the_config(self):
        for name, form in compressed.FORMATS.items():
            grid = GRIDS[name]
            config = validated({"up_proj": grid}, ["lm_head"])
            (scheme,) = config.config_groups.values()
            assert config.format == scheme.format == form
            assert config.quant_method == compressed_tensors.quantization.DEFAULT_QUANTIZATION_METHOD
            assert config.quantization_status.value == "compressed" and config.ignore == ["lm_head"]
            weights = scheme.weights
            assert (weights.num_bits, weights.group_size, weights.symmetric) == (BITS[name], grid.block, True)
            assert (weights.type, weights.dynamic) == ("int" if form == "pack-quantized" else "float", False)
            assert weights.strategy == ("tensor_group" if name == "nvfp4" else "group")
            tensor = as_torch(compressed.pack(grid, *matrix(grid)).tensors["weight_scale"])
            assert weights.scale_dtype == tensor.dtype

    @pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
    def test_says_of_fp4_what_the_library_s_own_preset_says(self, name):
        (scheme,) = validated({"up_proj": GRIDS[name]}).config_groups.values()
        preset = preset_name_to_scheme(f"{name}a16", ["up_proj"])
        assert scheme.weights.model_dump() == preset.weights.model_dump()  # as it is written: without zero points

    def test_applies_the_config_to_a_model(self):
        """Each Linear gets the scheme of its grid, the others none."""
        experts = torch.nn.ModuleList([])
        for _ in range(3):
            experts.append(torch.nn.ModuleDict({name: torch.nn.Linear(256, 8) for name in ("up_proj", "down_proj")}))
        model = torch.nn.ModuleDict({"experts": experts, "head": torch.nn.Linear(256, 8)})
        grids = dict.fromkeys(layers("experts.{}.up_proj", 3), GRIDS["q2_0"])
        grids |= dict.fromkeys(layers("experts.{}.down_proj", 2), GRIDS["nvfp4"])
        apply_quantization_config(model, validated(grids))
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if name in grids:
                assert scheme.weights.num_bits == BITS[grids[name].name]
                assert scheme.format == compressed.FORMATS[grids[name].name]
            else:
                assert scheme is None


class TestTransformers:
    def test_config_class_reads_it(self):
        made = compressed.config({"model.layers.0.mlp.experts.0.up_proj": GRIDS["q2_0"]}, ["lm_head"])
        config = CompressedTensorsConfig.from_dict(json.loads(json.dumps(made)))
        assert config.is_quantized and config.is_quantization_compressed
