import dataclasses
import json

import pytest

from qatmoe.config import ModelConfig, QuantConfig
from qatmoe.errors import UserError
from qatmoe.model.transformer import param_shapes
from qatmoe.quant import plan as plans

MODEL = ModelConfig()
OFF = QuantConfig(experts="none")


def planned(quant, model=MODEL):
    return {path: grid.name for path, grid in plans.make_plan(param_shapes(model), model, quant).items()}


def test_default_quantizes_the_routed_experts_of_the_trunk():
    assert planned(QuantConfig()) == {"layers/experts/gate_up": "q2_0", "layers/experts/down": "q2_0"}


def test_each_family_has_its_own_grid():
    quant = QuantConfig(
        gate_up="q2_0", down="q4_0", shared="mxfp4", attention="q8_0", embedding="iq4_nl", head="nvfp4", mtp="same"
    )
    got = planned(quant)
    assert got["layers/experts/gate_up"] == "q2_0"
    assert got["layers/experts/down"] == "q4_0"
    assert got["layers/shared/down"] == got["dense_layers/ffn/gate_up"] == "mxfp4"
    assert got["layers/attn/q"] == got["dense_layers/attn/o"] == "q8_0"
    assert (got["embed"], got["head"]) == ("iq4_nl", "nvfp4")
    assert got["mtp/block/experts/gate_up"] == "q2_0"
    assert got["mtp/block/experts/down"] == "q4_0"
    assert got["mtp/block/attn/q"] == "q8_0"


def test_unsigned_scales_can_be_asked_for():
    (signed, *_), (unsigned, *_) = (
        plans.make_plan(param_shapes(MODEL), MODEL, QuantConfig(signed=signed)).values() for signed in (True, False)
    )
    assert (signed.signed, unsigned.signed, unsigned.name) == (True, False, "q2_0")


def test_router_norms_and_mtp_projection_are_never_quantized():
    everything = QuantConfig(
        **{
            f.name: "q8_0"
            for f in dataclasses.fields(QuantConfig)
            if f.type is str and not f.name.count("scale") and "rule" not in f.name
        }
    )
    got = planned(everything)
    left = set(param_shapes(MODEL)) - set(got)
    assert all(p.endswith("norm") or "router/" in p or p == "mtp/eh_proj" for p in left), left
    assert not [p for p in got if p.endswith("norm") or "router" in p]


def test_unrolled_layers_match_too():
    model = ModelConfig(scan_layers=False)
    got = planned(QuantConfig(attention="q8_0", mtp="mxfp4"), model)
    assert got["layers/2/experts/down"] == "q2_0"
    assert got["dense_layers/0/attn/v"] == "q8_0"
    assert got["mtp/0/block/experts/gate_up"] == "mxfp4"


@pytest.mark.parametrize(
    ("quant", "model", "message"),
    [
        (QuantConfig(experts="q4_o"), {}, "did you mean 'q4_0'"),
        (
            QuantConfig(shared="q8_0"),
            {"n_shared_experts": 0, "n_dense_layers": 0},
            "quant.shared='q8_0' matches no tensor",
        ),
        (QuantConfig(mtp="q8_0"), {"n_mtp": 0}, "quant.mtp"),
        (QuantConfig(mtp="same", experts="none"), {}, "quant.mtp='same' matches no tensor"),
        (QuantConfig(experts="q2_k"), {}, "layers/experts/.*rows of 128 weights.*256.*: q2_0, ternary, q4_0"),
        (QuantConfig(), {"expert_dim": 96}, r"down: rows of 96 .*such rows: q4_0, iq4_nl, mxfp4, q8_0\)"),
        (QuantConfig(), {"expert_dim": 40}, r"down: rows of 40 .*such rows: none\)"),
        (QuantConfig(head="q8_0"), {"tie_embeddings": True}, "quant.embedding"),
    ],
)
def test_mistakes_are_named(quant, model, message):
    with pytest.raises(UserError, match=message):
        planned(quant, ModelConfig(**model))


def test_tied_head_is_the_embedding():
    assert planned(QuantConfig(experts="none", embedding="q8_0", head="q8_0"), ModelConfig(tie_embeddings=True)) == {
        "embed": "q8_0"
    }


def test_coverage_adds_up_by_hand():
    shapes = {"layers/experts/down": (2, 4, 128, 64), "head": (10, 64), "norm": (64,)}
    plan = plans.make_plan(shapes, ModelConfig(), dataclasses.replace(OFF, down="q2_0"))
    rows = plans.coverage(plan, shapes)
    assert [r["bytes"] for r in rows] == [2 * 4 * 128 * 18, 10 * 64 * 2, 64 * 4]
    assert [r["grid"] for r in rows] == ["q2_0", "bf16", "f32"]
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    totals = plans.totals(rows)
    assert totals["bits_per_weight_quantized"] == 2.25
    assert totals["bytes_total"] == 18432 + 1280 + 256
    assert totals["bytes_bf16"] == 2 * 65536 + 1280 + 256
    assert totals["bits_per_weight_total"] == pytest.approx(8 * 19968 / (65536 + 640 + 64))
    assert json.loads(json.dumps(rows)) == rows
    text = plans.format_coverage(rows)
    assert all(name in text for name in shapes)
    assert f"{65536 / 66240:.1%} of 66,240 weights quantized at 2.25 bits" in text


def test_nothing_quantized_is_said():
    rows = plans.coverage({}, param_shapes(MODEL))
    assert "0.0% of" in plans.format_coverage(rows)
    assert plans.totals(rows)["bits_per_weight_quantized"] is None
