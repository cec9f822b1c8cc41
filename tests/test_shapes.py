"""Published models: their counts, and the same types as an export decides."""

import dataclasses
import importlib.util
import itertools

import pytest
from conftest import ROOT

from qatmoe import shapes
from qatmoe.config import Config, ModelConfig, QuantConfig, resolve
from qatmoe.convert import gguf_model, names
from qatmoe.convert.weights import RESTS, Storage
from qatmoe.errors import UserError
from qatmoe.model import transformer
from qatmoe.quant.grid import GRIDS
from qatmoe.quant.plan import make_plan

OFF = QuantConfig(experts="none")
# Model: total and active weights in billions as published (model cards and reports), and which tables count as active.
PUBLISHED = {
    "olmoe-7b-a1b": (6.92, 1.3, ("embedding", "head")),
    "qwen3-30b-a3b": (30.5, 3.3, ("embedding", "head")),
    "glm-4.5-air": (106, 12, ()),
    "gpt-oss-120b": (116.83, 5.13, ("head",)),
    "qwen3-235b-a22b": (235, 22, ("embedding", "head")),
    "glm-4.5": (355, 32, ()),
    "deepseek-v3": (671, 37, ("embedding", "head")),
}


def table(shape, family):
    return sum(p.weights for p in shape.pieces if p.family == family)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    shape = shapes.find(name)
    total, active, counted = PUBLISHED[name]
    assert shape.total / 1e9 == pytest.approx(total, rel=0.01)
    left_out = sum(table(shape, family) for family in ("embedding", "head") if family not in counted)
    assert (shape.active - left_out) / 1e9 == pytest.approx(active, rel=0.02)


def test_mtp_modules_come_on_top():
    # The folders of GLM-4.5-Air and GLM-4.5 hold 110.47 and 358.34 billion weights: there MTP layers repeat both tables
    for name, folder in (("glm-4.5-air", 110.47), ("glm-4.5", 358.34)):
        shape = shapes.find(name)
        repeated = table(shape, "embedding") + table(shape, "head")
        assert (shape.total + shape.mtp + repeated) / 1e9 == pytest.approx(folder, abs=0.006)


@pytest.mark.parametrize(
    ("name", "experts", "gibibytes"),  # llama-bench's "size" of files that llama.cpp's programs wrote
    [("gpt-oss-120b", "mxfp4", 59.02), ("qwen3-30b-a3b", "none", 30.25), ("deepseek-v3", "none", 664.29)],
)
def test_sizes_of_known_files(name, experts, gibibytes):
    shape = shapes.find(name)
    pieces = shapes.stored(shape, dataclasses.replace(OFF, experts=experts), rest="Q8_0", ternary="TQ2_0")
    assert sum(shapes.size(*piece) for piece in pieces) / 2**30 == pytest.approx(gibibytes, rel=1e-3)


def test_default_is_the_main_jobs_model():
    spec = importlib.util.spec_from_file_location("moe_2bit", ROOT / "configs" / "moe_2bit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = resolve(module.get_config())
    assert shapes.find("default") == shapes.from_model("default", cfg.model, cfg.data.seq_len, 29.3)


def test_counts_by_hand():
    model = ModelConfig(
        vocab_size=100, dim=8, n_layers=3, n_dense_layers=1, dense_dim=16, n_heads=2, n_kv_heads=1, head_dim=4,
        n_experts=4, top_k=2, expert_dim=6, n_shared_experts=2, n_mtp=1,
    )  # fmt: skip
    shape = shapes.from_model("tiny", model, 64, 0.0)
    attention = 8 * 8 * 2 + 2 * 4 * 8  # q and o, k and v
    norms = 2 * 8 + 2 * 4
    router, expert, shared = 4 * 8 + 4, 3 * 6 * 8, 3 * 12 * 8
    moe = attention + norms + router + 4 * expert + shared
    total = 2 * 100 * 8 + 8 + (attention + norms + 3 * 16 * 8) + 2 * moe
    assert shape.total == total
    assert shape.active == total - 2 * 2 * expert
    assert shape.mtp == moe + 8 * 16 + 3 * 8
    assert shape.caches == ((3, 4, 4, 4, 0),)


# ---- types -----------------------------------------------------------------------------------------------------------

WIDE = ModelConfig(dim=256, dense_dim=256, expert_dim=256, head_dim=64, n_layers=2, n_experts=2, vocab_size=64)
QWEN = dataclasses.replace(
    WIDE, router="softmax", router_bias=False, n_shared_experts=0, n_dense_layers=0, rotary_fraction=1.0, n_mtp=0
)
MIXES = {
    "none": OFF,
    "mtp as trunk": QuantConfig(experts="q4_0", down="ternary_256", shared="q8_0", attention="q3_k", mtp="same"),
    "mtp alone": QuantConfig(experts="none", mtp="mxfp4"),
    "mtp beside": QuantConfig(gate_up="q2_k", shared="q8_0", embedding="iq4_nl", head="q8_0", mtp="q2_0"),
    "mtp left": QuantConfig(shared="q4_0", attention="nvfp4"),
}


def exported(model, quant, rest, ternary):
    """{(tensor name without its block, type, shape): number} as an export stores it."""
    plan = make_plan(transformer.param_shapes(model), model, quant)
    storage = Storage(Config(model=model, quant=quant), plan, rest=rest, ternary=ternary)
    found = {}
    for name, part in gguf_model.parts(storage, names.architecture(model, names.GGUF)).items():
        tensor = gguf_model.tensor(storage, name, part)
        key = (name.split(".", 2)[2] if name.startswith("blk.") else name, *tensor)
        found[key] = found.get(key, 0) + 1
    return found


def planned(model, quant, rest, ternary):
    found = {}
    for piece, kind in shapes.stored(shapes.from_model("tiny", model, 64, 0.0), quant, rest=rest, ternary=ternary):
        key = (piece.name, kind, piece.shape)
        found[key] = found.get(key, 0) + piece.number
    return found


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rest", RESTS)
def test_types_are_those_of_an_export(mix, rest):
    assert planned(WIDE, MIXES[mix], rest, "TQ1_0") == exported(WIDE, MIXES[mix], rest, "TQ1_0")


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_stored_as_an_export_stores_it(grid):
    quant = QuantConfig(experts=grid, attention=grid, embedding="q8_0")
    assert planned(QWEN, quant, "BF16", "TQ2_0") == exported(QWEN, quant, "BF16", "TQ2_0")


def test_rows_that_are_no_whole_blocks_stay_bf16():
    model = dataclasses.replace(WIDE, dim=48, dense_dim=40)
    assert planned(model, OFF, "Q8_0", "TQ2_0") == exported(model, OFF, "Q8_0", "TQ2_0")


def test_every_tensor_is_of_a_family():
    for shape in shapes.SHAPES.values():
        assert {p.family for p in shape.pieces} <= {*shapes.FAMILIES, "kept", "other"}
        assert all(p.family == "kept" for p in shape.pieces if len(p.shape) == 1)
        keys = [(p.name, p.shape, p.mtp, p.family) for p in shape.pieces]
        assert len(set(keys)) == len(keys)
    assert {p.name for p in shapes.find("glm-4.5").pieces if p.family == "other"} == {"nextn.eh_proj.weight"}


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_block_that_does_not_divide_a_row_is_refused():
    with pytest.raises(
        UserError, match=r"q2_k needs rows of whole blocks of 256 .* rows of 2880; grids .*: q2_0, .*mxfp4"
    ):
        shapes.stored(shapes.find("gpt-oss-120b"), QuantConfig(experts="q2_k"), rest="BF16", ternary="TQ2_0")
    with pytest.raises(UserError, match="attn_k_b.weight of deepseek-v3 has rows of 128"):
        shapes.stored(shapes.find("deepseek-v3"), QuantConfig(attention="q3_k"), rest="BF16", ternary="TQ2_0")


def test_grids_for_weights_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="--shared q8_0: qwen3-30b-a3b has no such weights"):
        shapes.stored(shapes.find("qwen3-30b-a3b"), QuantConfig(shared="q8_0"), rest="BF16", ternary="TQ2_0")
    with pytest.raises(UserError, match="--mtp same: deepseek-v3 has no MTP module"):
        shapes.stored(shapes.find("deepseek-v3"), QuantConfig(mtp="same"), rest="BF16", ternary="TQ2_0")


@pytest.mark.parametrize("name", ["glm-4.5", "gpt-oss-120b", "deepseek-v3"])
def test_nvfp4_is_refused_where_llama_ignores_its_scales(name):
    with pytest.raises(UserError, match=r"ignores the scale tensors .* ffn_gate_exps.weight"):
        shapes.stored(shapes.find(name), QuantConfig(experts="nvfp4"), rest="BF16", ternary="TQ2_0")


def test_unknown_models_and_their_closest():
    with pytest.raises(UserError, match="did you mean 'qwen3-235b-a22b'"):
        shapes.find("qwen3-235b")
    with pytest.raises(UserError, match=r"unknown Models: default, olmoe"):
        shapes.find("zzz")
    assert shapes.find("GPT-OSS-120B").name == "gpt-oss-120b"


def test_grids_of_all_families_at_once():
    for name, family in itertools.product(("olmoe-7b-a1b", "glm-4.5"), ("attention", "embedding", "head")):
        pieces = shapes.stored(shapes.find(name), QuantConfig(**{family: "q8_0"}), rest="BF16", ternary="TQ2_0")
        kinds = {kind for piece, kind in pieces if piece.family == family and not piece.mtp}
        assert kinds == {"Q8_0"}
