"""Runs as GGUF files: against llama.cpp, libggml and PyPI gguf."""

import dataclasses
import functools
from pathlib import Path

import gguf as other  # llama.cpp's package, to compare with
import jax
import llama_cpp
import numpy as np
import pytest
from conftest import VOCAB, forward_scores

from qatmoe import export as exporter
from qatmoe import train
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import Config, DataConfig, ModelConfig, OptimConfig, PhaseConfig, QuantConfig, TrainConfig, to_json
from qatmoe.convert import gguf, gguf_model, huggingface_model, llama, names, vocab
from qatmoe.convert.gguf import TYPES
from qatmoe.convert.verify import Report, verify_gguf
from qatmoe.convert.weights import PLAIN, Branch, Storage
from qatmoe.errors import UserError
from qatmoe.model import transformer
from qatmoe.model.cache import CacheType
from qatmoe.quant.grid import GRIDS
from qatmoe.run import quant_plan
from qatmoe.step import deployed
from qatmoe.tree import leaves_by_path, path_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

L = 32
WINDOW = 8  # of verification: a code that falls the other way reaches all later tokens of its window
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (1, L))


def random_weights(cfg: ModelConfig, seed: int) -> dict:
    """Numbers for every parameter, the same in both layouts."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path_of(path), rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("norm"):
            return 1 + 0.2 * noise
        return (0.2 if name.endswith("bias") else 0.5 if name == "embed" else leaf.shape[-1] ** -0.5) * noise

    stacked = dataclasses.replace(cfg, scan_layers=True)
    params = jax.tree_util.tree_map_with_path(draw, transformer.abstract_params(stacked))
    return params if cfg.scan_layers else transformer.unstack_layers(params)


def make_run(folder: Path, tok, model: ModelConfig, quant: QuantConfig | None = None, *, change=None, ema=False):
    """A run of one phase with random weights; returns its config and its state. Learned scales lie off the grid.

    `change` edits the weights, a tree.
    """
    cfg = Config(
        name="random",
        model=model,
        quant=quant or QuantConfig(dynamic_rule="absmax"),
        data=DataConfig(seq_len=WINDOW),
        optim=OptimConfig(ema=0.9 if ema else 0.0),
        train=TrainConfig(phases={"only": PhaseConfig(steps=1, quantize=quant is not None)}),
    )
    weights = random_weights(model, 1)
    if change is not None:
        change(weights)
    scales = {}
    if quant is not None and quant.scale == "learned":
        plan = quant_plan(cfg)[0]
        flat = leaves_by_path(weights)
        scales = {path: grid.absmax(flat[path]) * np.float32(0.83) for path, grid in plan.items()}
    state = {"params": {"model": weights, "scales": scales}}
    if ema:
        state["ema"] = random_weights(model, 2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(to_json(cfg))
    tok.save(folder / "tokenizer.json")
    with Checkpoints(folder, "only") as checkpoints:
        checkpoints.save(1, state, {}, {}, final=True, wait=True)
    return cfg, state


QWEN = ModelConfig(
    vocab_size=VOCAB, dim=48, n_layers=2, n_dense_layers=0, n_heads=4, n_kv_heads=2, head_dim=16, rotary_fraction=1.0,
    n_experts=4, top_k=2, expert_dim=40, n_shared_experts=0, router="softmax", router_bias=False, n_mtp=0,
)  # fmt: skip
OLMOE = dataclasses.replace(QWEN, qk_norm="full", n_kv_heads=4, head_dim=12, norm_topk=False)
GLM = ModelConfig(
    vocab_size=VOCAB, dim=48, n_layers=3, n_dense_layers=1, dense_dim=56, n_heads=4, n_kv_heads=2, head_dim=16,
    n_experts=4, top_k=2, expert_dim=40, n_mtp=1,
)  # fmt: skip
SHAPES = {
    "qwen3moe": ("qwen3moe", QWEN, {}),
    "qwen3moe, odd heads, tied": ("qwen3moe", QWEN, dict(n_heads=3, n_kv_heads=1, head_dim=10, tie_embeddings=True)),
    "qwen3moe, all experts, unrolled": ("qwen3moe", QWEN, dict(top_k=4, scan_layers=False, rope_theta=1e6)),
    "qwen3moe, one of three, more rows than tokens": ("qwen3moe", QWEN, dict(vocab_size=VOCAB + 43,
        n_experts=3, top_k=1, n_kv_heads=4, norm_eps=1e-6)),
    "olmoe": ("olmoe", OLMOE, dict(n_heads=3, n_kv_heads=3, head_dim=16, n_experts=5, top_k=3)),
    "glm4moe, tied, two shared": ("glm4moe", GLM, dict(tie_embeddings=True, n_shared_experts=2, routed_scale=2.5)),
    "glm4moe, softmax": ("glm4moe", GLM, dict(router="softmax", router_bias=False, routed_scale=0.7, n_mtp=0)),
    "glm4moe, softmax, bias": ("glm4moe", GLM, dict(router="softmax", norm_topk=False, n_dense_layers=0)),
    "glm4moe, no bias, qkv bias": ("glm4moe", GLM, dict(router_bias=False, qkv_bias=True, n_dense_layers=2)),
    "glm4moe, unnormalised": ("glm4moe", GLM, dict(norm_topk=False, qk_norm="none", rotary_fraction=1.0)),
    "glm4moe, odd heads": ("glm4moe", GLM, dict(n_heads=5, n_kv_heads=5, head_dim=12, rotary_fraction=1 / 3)),
    "glm4moe, everything": ("glm4moe", GLM, dict(n_shared_experts=2, router="softmax", routed_scale=1.5, qkv_bias=True,
        qk_norm="none", n_mtp=2, n_experts=6, top_k=3, norm_topk=False, tie_embeddings=True, scan_layers=False)),
}  # fmt: skip


def jax_logits(weights: dict, cfg: ModelConfig, cache: CacheType | None = None) -> np.ndarray:
    return np.asarray(forward_scores(cfg, cache, weights, TOKENS[0]))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_llama_computes_what_jax_does(shape, tmp_path, small_tokenizer):
    arch, base, changes = SHAPES[shape]
    model = dataclasses.replace(base, **changes)
    _, state = make_run(tmp_path / "run", small_tokenizer, model)
    with Branch(tmp_path / "run", rest="F32") as branch:
        assert gguf_model.write(branch, tmp_path / "m.gguf", force=False) == arch
    [theirs] = llama.logits(tmp_path / "m.gguf", TOKENS)
    assert theirs.shape == (L, model.vocab_size)
    assert theirs.std() > 0.3
    np.testing.assert_allclose(theirs, jax_logits(state["params"]["model"], model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("bf16", 16), ("q8_0", 32), ("q4_0", 32), ("iq4_nl+rot", 64), ("q8_0/q4_0+rot", 128), ("bf16/q4_0+rot", 192)],
)
def test_llama_reads_the_same_from_its_cache(name, head_dim, tmp_path, small_tokenizer):
    """Stored, rotated where 64 divides the width of a head, and read: much nearer than what the cache costs."""
    cache = CacheType.parse(name)
    model = dataclasses.replace(GLM, head_dim=head_dim, n_mtp=0)
    _, state = make_run(tmp_path / "run", small_tokenizer, model)
    weights, path = state["params"]["model"], tmp_path / "m.gguf"
    with Branch(tmp_path / "run", rest="F32") as branch:
        gguf_model.write(branch, path, force=False)
    types = {"type_k": TYPES[cache.k.upper()].id, "type_v": TYPES[cache.v.upper()].id}
    other = llama_cpp.Llama(
        str(path), n_ctx=L, n_batch=L, n_ubatch=L, logits_all=True, flash_attn=True, verbose=False, **types
    )
    other.eval(TOKENS[0].tolist())
    theirs = np.array(other.scores[:L])
    other.close()

    def distance(cache: CacheType | None) -> float:
        return float(np.mean((jax_logits(weights, model, cache) - theirs) ** 2))

    cost = distance(None)
    assert distance(cache) < 1e-3 * cost
    assert not cache.rotate or distance(dataclasses.replace(cache, rotate=False)) > 0.1 * cost


# ---- grids -----------------------------------------------------------------------------------------------------------

WIDE_QWEN = dataclasses.replace(QWEN, dim=256, expert_dim=256, n_experts=3, n_heads=2, n_kv_heads=1, head_dim=128)
WIDE_GLM = dataclasses.replace(
    GLM, dim=256, expert_dim=256, n_layers=2, n_dense_layers=0, n_experts=3, n_heads=2, n_kv_heads=1, head_dim=128
)
PAIRS = [
    ("q2_0", "q3_k"), ("ternary", "q4_0"), ("ternary_256", "iq4_nl"), ("q2_k", "mxfp4"), ("nvfp4", "q8_0")
]  # fmt: skip
EVERYWHERE = ("experts", "shared", "attention", "embedding", "head")


def quant_of(**more) -> QuantConfig:
    return QuantConfig(**{"experts": "none", "mtp": "same", "dynamic_rule": "absmax", **more})


# Each grid on the routed experts' gate and up and, in another run, on their down projection; learned and dynamic.
MIXED = {
    f"{gate_up}, {down}, {scale}": (gate_up, down, scale)
    for pair in PAIRS
    for (gate_up, down), scale in ((pair, "learned"), (pair[::-1], "dynamic"))
}


def export(run: Path, out: Path, *, tokens: int = L, **options) -> tuple[Report, dict[str, gguf.Tensor]]:
    """Writes and verifies; returns the report and what the file holds."""
    with Branch(run, **{"rest": "F32", **options}) as branch:
        arch = gguf_model.write(branch, out, force=False)
        report = verify_gguf(branch, out, arch, tokens)
        noted = any(what.startswith("L2 of the MTP modules: ") for what in report.unchecked)
        assert noted == bool(branch.model.n_mtp and report.l2)
    with gguf.File(out) as file:
        return report, file.tensors


def check(report: Report, fine: bool = False) -> None:
    """All that was written is exact, and llama.cpp computes with it what JAX does.

    A rounding of activations that falls the other way on some CPU may swap the two best of these few random tokens.
    Where they are rounded to a fine type (float16: 11 bits) one in every few tokens falls so, by the order of sums, and
    the tokens after it see it: half of the rows may differ, by less than half of what rounding itself does.
    """
    assert all(fault.startswith("L2: mean KLD") for fault in report.faults), report.text()
    assert [what.split(":")[0] for what in report.unchecked] in ([], ["L2 of the MTP modules"])
    for row in report.rows:
        assert row.same_bytes == row.tensors
        assert set(row.max_diff.values()) == {0.0}
        who = {"numpy"} if row.kind in PLAIN else {"qatmoe", "libggml"}
        if row.kind in other.GGMLQuantizationType.__members__ and row.kind not in PLAIN:
            who.add("gguf")
        assert set(row.max_diff) == who
    as_it_is, figures = (list(report.l2.values())[i] for i in (0, -1))
    assert figures["median_diff"] <= (min(as_it_is["median_diff"] / 2, 1e-3) if fine else 1e-4)
    assert figures["kld"] <= 1e-3
    assert figures["same_top1"] >= 0.9


def test_all_grids_are_covered():
    assert {name for pair in PAIRS for name in pair} == set(GRIDS)


@pytest.mark.parametrize("case", list(MIXED))
def test_experts_on_every_grid(case, tmp_path, small_tokenizer):
    gate_up, down, scale = MIXED[case]
    model = WIDE_QWEN if "nvfp4" in case else WIDE_GLM
    rule = "search" if gate_up == "q4_0" else "absmax"  # the search takes long to compile
    quant = quant_of(gate_up=gate_up, down=down, scale=scale, dynamic_rule=rule, mtp="same" if model.n_mtp else "none")
    make_run(tmp_path / "run", small_tokenizer, model, quant)
    report, tensors = export(tmp_path / "run", tmp_path / "m.gguf")
    check(report)
    for name, grid in (("gate_exps", gate_up), ("up_exps", gate_up), ("down_exps", down)):
        kinds = {t.kind for n, t in tensors.items() if n.endswith(f"{name}.weight")}
        assert kinds == {GRIDS[grid].gguf[0]}


@pytest.mark.parametrize("grid", ["q2_0", "q4_0", "mxfp4", "q8_0"])
def test_a_whole_model_on_a_grid(grid, tmp_path, small_tokenizer):
    model = dataclasses.replace(WIDE_GLM, n_dense_layers=1, dense_dim=256)
    make_run(tmp_path / "run", small_tokenizer, model, quant_of(**dict.fromkeys(EVERYWHERE, grid), scale="dynamic"))
    report, tensors = export(tmp_path / "run", tmp_path / "m.gguf")
    check(report)
    plain = {name for name, t in tensors.items() if t.kind == "F32"}
    assert {name.split(".", 2)[-1] for name in plain if name.startswith("blk.")} == {
        "attn_norm.weight", "post_attention_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight",
        "ffn_gate_inp.weight", "exp_probs_b.bias", "nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight",
        "nextn.shared_head_norm.weight",
    }  # fmt: skip
    assert {tensors[name].kind for name in tensors.keys() - plain} == {GRIDS[grid].gguf[0]}


@pytest.mark.parametrize("kind", ["TQ1_0", "Q2_0"])
def test_ternary_blocks_of_256_have_other_types(kind, tmp_path, small_tokenizer):
    make_run(tmp_path / "run", small_tokenizer, WIDE_GLM, quant_of(experts="ternary_256", scale="dynamic"))
    report, tensors = export(tmp_path / "run", tmp_path / "m.gguf", ternary=kind)
    check(report)
    assert {t.kind for n, t in tensors.items() if n.endswith("exps.weight")} == {kind}


@pytest.mark.parametrize(("scale", "ema"), [("learned", True), ("dynamic", False)], ids=["learned, ema", "dynamic"])
def test_both_layouts_give_the_file_that_training_evaluates(scale, ema, tmp_path, small_tokenizer):
    files = []
    model = dataclasses.replace(QWEN, dim=64, expert_dim=64)
    quant = quant_of(gate_up="nvfp4", down="q4_0", attention="q2_0", mtp="none", scale=scale)
    for scan in (True, False):
        run, out = tmp_path / f"run_{scan}", tmp_path / f"{scan}.gguf"
        cfg, state = make_run(run, small_tokenizer, dataclasses.replace(model, scan_layers=scan), quant, ema=ema)
        with Branch(run, rest="F32") as branch:
            gguf_model.write(branch, out, force=False)
            numbers = branch.numbers()
        params = {**state["params"], "model": state.get("ema", state["params"]["model"])}
        evaluated = jax.jit(lambda p, cfg=cfg: deployed(cfg, quant_plan(cfg)[0], p, True))(params)
        jax.tree.map(
            np.testing.assert_array_equal, numbers, transformer.unstack_layers(evaluated) if scan else evaluated
        )
        files.append(out.read_bytes())
    assert files[0] == files[1]


# ---- weights on no grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["F32", "F16", "BF16", "Q8_0"])
def test_weights_on_no_grid(rest, tmp_path, small_tokenizer):
    model = dataclasses.replace(GLM, dim=64, n_layers=2, n_dense_layers=0)  # rows of 64 and 40 weights
    make_run(tmp_path / "run", small_tokenizer, model)
    report, tensors = export(tmp_path / "run", tmp_path / "m.gguf", rest=rest)
    check(report, fine=rest == "F16")
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", ".bias", "ffn_gate_inp.weight")):
            assert tensor.kind == "F32", name
        elif rest == "Q8_0" and tensor.shape[-1] % 32:
            assert tensor.kind == "BF16" and "ffn_down" in name
        else:
            assert tensor.kind == rest, name


def test_f16_refuses_what_it_cannot_hold(tmp_path, small_tokenizer):
    def enlarge(weights):
        weights["layers"]["attn"]["q"][1, 3, 4] = -70000.0

    make_run(tmp_path / "run", small_tokenizer, QWEN, change=enlarge)
    with Branch(tmp_path / "run", rest="F16") as branch, pytest.raises(UserError, match="layers/attn/q .*BF16 or F32"):
        gguf_model.write(branch, tmp_path / "m.gguf", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("where", "bad", "rest"),
    [
        ("experts/down", np.nan, "F32"),
        ("experts/down", np.inf, "F32"),
        ("attn/q", np.nan, "F16"),
        ("norm", -np.inf, "F32"),
    ],
)
def test_weights_that_are_no_numbers_are_in_no_file(where, bad, rest, tmp_path, small_tokenizer):
    """Under a learned scale a grid would have a number for them, and training has NaN."""

    def breaks(weights):
        leaf = leaves_by_path(weights)[f"layers/{where}"] if where != "norm" else weights["norm"]
        leaf.flat[-1] = bad

    model = dataclasses.replace(QWEN, dim=64, expert_dim=64)
    make_run(tmp_path / "run", small_tokenizer, model, quant_of(experts="q4_0", mtp="none"), change=breaks)
    refusal = "^norm or its scale" if where == "norm" else f"^layers/{where} of layer 1 or its scale"
    with Branch(tmp_path / "run", rest=rest) as branch:
        with pytest.raises(UserError, match=f"{refusal} holds NaN or inf, in phase only: a model that diverged"):
            gguf_model.write(branch, tmp_path / "m.gguf", force=False)
        with pytest.raises(UserError, match=refusal):
            branch.numbers()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_in_no_file(bad, packed, tmp_path, small_tokenizer):
    model = dataclasses.replace(QWEN, dim=64, expert_dim=64)
    _, state = make_run(tmp_path / "run", small_tokenizer, model, quant_of(experts="q4_0", mtp="none"))
    scales = state["params"]["scales"]["layers/experts/down"]
    scales.flat[0] = bad
    with Checkpoints(tmp_path / "run", "only") as checkpoints:
        checkpoints.save(2, state, {}, {}, final=True, wait=True)
    with Branch(tmp_path / "run") as branch, pytest.raises(UserError, match="^layers/experts/down of layer 0 or"):
        huggingface_model.write(branch, tmp_path / "model", packed=packed, force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------


def test_nvfp4_has_a_scale_for_every_expert_and_llama_uses_it(tmp_path, small_tokenizer):
    def enlarge(weights):
        weights["layers"]["experts"]["gate_up"][:, 1] *= 32
        weights["layers"]["experts"]["gate_up"][:, 2, 40:] /= 32  # the up half of one expert
        weights["layers"]["experts"]["down"][:, 0] /= 32

    model = dataclasses.replace(QWEN, dim=64, expert_dim=64, n_heads=2, n_kv_heads=1, head_dim=32)
    quant = quant_of(experts="nvfp4", attention="nvfp4", mtp="none")
    make_run(tmp_path / "run", small_tokenizer, model, quant, change=enlarge)
    report, tensors = export(tmp_path / "run", tmp_path / "m.gguf")
    check(report)
    assert {n for n, t in tensors.items() if n.endswith(".scale")} == {
        n.replace("weight", "scale") for n, t in tensors.items() if t.kind == "NVFP4"
    }
    with gguf.File(tmp_path / "m.gguf") as file:
        scales = {n: np.array(file.data(n)) for n in tensors if n.endswith(".scale")}
        starts = {n: file.offset(n) for n in tensors}
    for name, scale in scales.items():
        assert scale.shape == ((model.n_experts,) if "exps" in name else (1,))
        assert np.all(np.frexp(scale)[0] == 0.5)  # powers of two
    assert scales["blk.0.ffn_gate_exps.scale"][1] > 8 * scales["blk.0.ffn_gate_exps.scale"][0]
    assert scales["blk.1.ffn_down_exps.scale"][0] < scales["blk.1.ffn_down_exps.scale"][1] / 8
    [before] = llama.logits(tmp_path / "m.gguf", TOKENS[:, :WINDOW])
    original = (tmp_path / "m.gguf").read_bytes()
    for name in [n for n in scales if n.startswith("blk.0.")]:
        data, scale = bytearray(original), scales[name]
        data[starts[name] : starts[name] + scale.nbytes] = (scale * 2).tobytes()
        (tmp_path / "other.gguf").write_bytes(data)
        [after] = llama.logits(tmp_path / "other.gguf", TOKENS[:, :WINDOW])
        # q and k are normalised next.
        assert (np.abs(after - before).max() > 0.01) == (name.split(".")[2] not in ("attn_q", "attn_k")), name


@pytest.mark.parametrize(
    ("base", "quant", "name"),
    [
        (GLM, dict(experts="nvfp4"), "blk.1.ffn_gate_exps.weight"),
        (GLM, dict(shared="nvfp4", mtp="none"), "blk.0.ffn_gate.weight"),
        (OLMOE, dict(gate_up="nvfp4", mtp="none"), "blk.0.ffn_gate_exps.weight"),
        (OLMOE, dict(down="nvfp4", mtp="none"), "blk.0.ffn_down_exps.weight"),
        (QWEN, dict(embedding="nvfp4", mtp="none"), "token_embd.weight"),
        (QWEN, dict(head="nvfp4", mtp="none"), "output.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nvfp4_is_refused_where_llama_would_drop_its_scale(base, quant, name, tmp_path, small_tokenizer):
    heads = dict(n_heads=4, n_kv_heads=4, head_dim=16)
    make_run(
        tmp_path / "run",
        small_tokenizer,
        dataclasses.replace(base, dim=64, expert_dim=64, dense_dim=64, **heads),
        quant_of(**quant),
    )
    with Branch(tmp_path / "run") as branch, pytest.raises(UserError, match=f"^{name} is on nvfp4"):
        gguf_model.write(branch, tmp_path / "m.gguf", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("mtp", ["same", "none"])
def test_nvfp4_attention_of_an_mtp_module_is_refused(mtp, small_tokenizer):
    """llama.cpp: "wrong number of tensors". Training says so at its start, and the module may be left out."""
    model = dataclasses.replace(GLM, dim=64, expert_dim=64, dense_dim=64)
    cfg = Config(model=model, quant=quant_of(attention="nvfp4", mtp=mtp))
    plan = quant_plan(cfg)[0]
    said = train.deployment(cfg, plan, small_tokenizer).splitlines()[0]
    if mtp == "none":
        assert said == "deploys to GGUF as glm4moe"
        return
    refusal = r"^blk.3.attn_q.weight is on nvfp4.* --drop_mtp, or train with quant.mtp='none'$"
    with pytest.raises(UserError, match=refusal) as error:
        gguf_model.parts(Storage(cfg, plan), "glm4moe")
    assert said == f"does not deploy to GGUF: {error.value}"
    held = gguf_model.parts(Storage(cfg, plan, drop_mtp=True), "glm4moe")
    assert sum(name.endswith(".scale") for name in held) == 3 * 4


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_model_of_no_architecture_is_told_what_is_in_the_way():
    model = dataclasses.replace(GLM, qk_norm="full", n_shared_experts=0, routed_scale=2.5)
    with pytest.raises(UserError) as error:
        names.architecture(model, names.GGUF)
    glm, qwen, olmoe = str(error.value).split(";")
    assert "glm4moe needs n_shared_experts of 1 or more, qk_norm='head' or 'none'" in glm
    for told in (qwen, olmoe):
        for what in (
            "router='softmax'", "router_bias=False", "routed_scale=1", "rotary_fraction=1", "n_mtp=0 (--drop_mtp",
            "n_dense_layers=0",
        ):  # fmt: skip
            assert what in told
    assert "qk_norm='head'" in qwen and "norm_topk=True" not in qwen
    assert "qk_norm" not in olmoe and "norm_topk=False" in olmoe and "n_kv_heads=n_heads" in olmoe
    assert "dim=n_heads*head_dim" in olmoe


@pytest.mark.parametrize("base", [GLM, QWEN, OLMOE], ids=["glm4moe", "qwen3moe", "olmoe"])
def test_a_clamped_swiglu_fits_nowhere(base):
    with pytest.raises(UserError) as error:
        names.architecture(dataclasses.replace(base, swiglu_limit=7.0), names.GGUF)
    assert str(error.value).count("swiglu_limit=0") == len(names.GGUF)


def test_a_routed_scale_of_zero_is_refused():
    """llama.cpp takes 0 as no scale at all."""
    with pytest.raises(UserError, match="routed_scale"):
        names.architecture(dataclasses.replace(GLM, routed_scale=0.0), names.GGUF)


def command(run: Path, out: Path, *more: str) -> int:
    return exporter.main(["--run", str(run), "--format", "gguf", "--out", str(out), *more])


def test_the_command(tmp_path, small_tokenizer, capsys):
    make_run(tmp_path / "run", small_tokenizer, QWEN)
    out = tmp_path / "m.gguf"
    assert command(tmp_path / "run", out, "--arch", "mixtral") == 2
    assert "--arch 'mixtral': must be auto, glm4moe, qwen3moe, olmoe" in capsys.readouterr().err
    assert command(tmp_path / "run", out, "--arch", "glm4moe") == 2
    assert "glm4moe needs n_shared_experts of 1 or more" in capsys.readouterr().err
    assert not out.exists()
    assert command(tmp_path / "run", out, "--verify", "--rest", "F32", "--verify_tokens", "32") == 0
    printed = capsys.readouterr().out
    assert "qwen3moe, phase only, step 1" in printed and "(32 tokens)" in printed and "FAILED" not in printed
    assert command(tmp_path / "run", out) == 2
    assert "--force" in capsys.readouterr().err


def test_verification_takes_a_window_at_least(tmp_path, small_tokenizer, capsys):
    make_run(tmp_path / "run", small_tokenizer, QWEN)
    assert command(tmp_path / "run", tmp_path / "m.gguf", "--verify", "--rest", "F32", "--verify_tokens", "1") == 0
    assert f"({WINDOW} tokens)" in capsys.readouterr().out


# ---- another reader --------------------------------------------------------------------------------------------------


def _keys(part: names.Part) -> list[str]:
    """Where branch.numbers() has a parameter."""
    keys = part.path.split("/")
    return keys if part.layer is None else [keys[0], str(part.layer), *keys[1:]]


def test_pypi_gguf_reads_fields_and_tensors_as_written(tmp_path, small_tokenizer):
    quant = quant_of(gate_up="nvfp4", down="q2_k", attention="mxfp4", embedding="q4_0", head="iq4_nl", mtp="none")
    make_run(tmp_path / "run", small_tokenizer, WIDE_QWEN, quant)
    with Branch(tmp_path / "run", rest="BF16") as branch:
        gguf_model.write(branch, tmp_path / "m.gguf", name="A model", context=77, force=False)
        numbers, parts = branch.numbers(), gguf_model.parts(branch.storage, "qwen3moe")
        fields = gguf_model.hyper_parameters(branch.model, "qwen3moe", "A model", 77)
        fields |= vocab.gguf_fields(branch.tokenizer, VOCAB)
    reader = other.GGUFReader(tmp_path / "m.gguf")
    stored = {t.name: other.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert list(stored) == list(parts)
    with gguf.File(tmp_path / "m.gguf") as file:
        for tensor in reader.tensors:
            described = file.tensors[tensor.name]
            assert (tensor.tensor_type.name, tuple(tensor.shape[::-1])) == (described.kind, described.shape)
            assert tensor.data.tobytes() == file.data(tensor.name).tobytes()
    for name in stored.keys() - {n for n in stored if n.endswith(".scale")}:
        expected = functools.reduce(lambda tree, key: tree[key], _keys(parts[name]), numbers)
        if parts[name].half is not None:
            expected = np.split(expected, 2, axis=-2)[parts[name].half]
        scale = stored.get(name.removesuffix("weight") + "scale", np.float32(1))
        np.testing.assert_array_equal(
            stored[name] * (scale[:, None, None] if "exps" in name and scale.ndim else scale), expected
        )
    assert {k for k in reader.fields if not k.startswith("GGUF.")} - {"tokenizer.chat_template"} == set(fields)
    for key, field in fields.items():
        value = reader.fields[key].contents()
        assert value == (np.float32(field.value) if field.type == "float32" else field.value), key
    assert reader.fields["general.name"].contents() == "A model"
    assert reader.fields["qwen3moe.context_length"].contents() == 77
    assert reader.fields["qwen3moe.expert_count"].contents() == 3
