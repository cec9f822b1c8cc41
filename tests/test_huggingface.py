"""Import of Hugging Face folders and export to them, against transformers' own models and files."""

import functools
import hashlib
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import our_logits
from transformers.modeling_layers import MtpModel

from qatmoe.checkpoint import Checkpoints
from qatmoe.config import Config, ModelConfig, PhaseConfig, TrainConfig, to_json
from qatmoe.convert import huggingface_model, llama_numerics, names
from qatmoe.convert.hf_import import import_folder
from qatmoe.convert.weights import Branch
from qatmoe.data import tokenizer
from qatmoe.model import transformer

# Of transformers, for shared experts of width 0.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")

TOKENS = np.random.default_rng(0).integers(0, 320, 24)
BASE = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
QWEN = BASE | dict(moe_intermediate_size=40, num_experts=6, head_dim=16, rope_theta=5000.0)
GLM = BASE | dict(moe_intermediate_size=40, n_routed_experts=6, head_dim=16, use_qk_norm=True, num_mtp_layers=0)
OLMOE = BASE | dict(num_experts=6, num_key_value_heads=4)
SHAPES = {
    "qwen3": ("Qwen3Moe", QWEN | dict(norm_topk_prob=True)),
    "qwen3 unnormalised, tied": ("Qwen3Moe", QWEN | dict(norm_topk_prob=False, tie_word_embeddings=True)),
    "qwen3 odd heads": ("Qwen3Moe", QWEN | dict(num_attention_heads=3, num_key_value_heads=1, head_dim=10)),
    "qwen3 dense lead": ("Qwen3Moe", QWEN | dict(mlp_only_layers=[0], norm_topk_prob=True)),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe grouped, normalised": ("Olmoe", OLMOE | dict(num_key_value_heads=2, norm_topk_prob=True)),
    "olmoe odd heads, tied": (
        "Olmoe",
        OLMOE | dict(num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True),
    ),
    "glm4": ("Glm4Moe", GLM | dict(routed_scaling_factor=2.5)),
    "glm4 no shared": ("Glm4Moe", GLM | dict(n_shared_experts=0, first_k_dense_replace=0)),
    "glm4 two shared, biases": ("Glm4Moe", GLM | dict(n_shared_experts=2, attention_bias=True, use_qk_norm=False)),
    "glm4 unnormalised, tied": (
        "Glm4Moe",
        GLM | dict(norm_topk_prob=False, tie_word_embeddings=True, first_k_dense_replace=2),
    ),
    "glm4 odd heads": ("Glm4Moe", GLM | dict(num_attention_heads=5, num_key_value_heads=5, head_dim=12)),
    "dots1": ("Dots1", {k: v for k, v in GLM.items() if k not in ("use_qk_norm", "num_mtp_layers")}
        | dict(n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.0)),
}  # fmt: skip


def make(family: str, settings: dict, folder: Path, dtype=torch.float32, **save):
    """A random model of transformers, saved with a tokenizer."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                p.normal_(0, 0.1)
            elif p.ndim >= 2:
                p.normal_(0, 0.15)
            elif "inv_freq" not in name:
                p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    model.save_pretrained(folder, **save)
    words = ["the expert routes a token", "two bits of every weight", "bench of models 0123"] * 3
    tokenizer.train(words, 290).save(folder / "tokenizer.json")
    return model


@pytest.fixture(scope="module", params=list(SHAPES))
def imported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    family, settings = SHAPES[request.param]
    model = make(family, settings, folder / "model")
    import_folder(folder / "model", folder / "run")
    return model, folder


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)[None]).logits[0].float().numpy()


def test_logits_are_those_of_transformers(imported):
    model, folder = imported
    theirs = their_logits(model)
    assert theirs.std() > 0.3  # a model that says something
    np.testing.assert_allclose(our_logits(folder / "run", TOKENS), theirs, atol=1e-4, rtol=0)


def test_the_forward_pass_of_verification_is_that_of_training(imported):
    _, folder = imported
    with Branch(folder / "run", rest="F32") as branch:
        weights, cfg = branch.numbers(), branch.model
    kinds = {part.path: "F32" for part in names.gguf_parts(cfg, "").values()}
    ours = our_logits(folder / "run", TOKENS)
    np.testing.assert_allclose(llama_numerics.logits(weights, kinds, cfg, jnp.asarray(TOKENS)), ours, atol=1e-4, rtol=0)


def test_the_config_beside_it_puts_all_ffns_of_layers_on_the_grid(imported):
    model, folder = imported
    scope = runpy.run_path(str(folder / "run" / "qat.py"))
    keys = ("n_shared_experts", "first_k_dense_replace", "mlp_only_layers")
    dense = any(getattr(model.config, key, 0) for key in keys)
    quant = scope["get_config"]().quant
    assert (quant.experts, quant.shared) == ("q4_0", "q4_0" if dense else "none")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_import_then_export_gives_the_same_file(imported):
    model, folder = imported
    out = folder / "again"
    with Branch(folder / "run", rest="F32") as branch:
        arch = huggingface_model.write(branch, out, packed=False, context=64, force=True)
    assert arch == {"dots1": "glm4_moe"}.get(model.config.model_type, model.config.model_type)
    if model.config.model_type != "dots1":  # written as glm4_moe, which has the same tensors
        assert digest(out / "model.safetensors") == digest(folder / "model" / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    np.testing.assert_allclose(their_logits(again), their_logits(model), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory):
    """A random model with an MTP module as a run, and exported to a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("mtp")
    shape = ModelConfig(
        vocab_size=320, dim=48, n_layers=2, n_dense_layers=1, dense_dim=80, n_heads=4, n_kv_heads=2, head_dim=16,
        n_experts=6, top_k=2, expert_dim=40, routed_scale=1.5, n_mtp=1, init_std=0.15, scan_layers=False,
    )  # fmt: skip
    cfg = Config(model=shape, train=TrainConfig(phases={"trunk": PhaseConfig(steps=1)}))
    params = transformer.init_params(shape, jax.random.key(3))
    noise = lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape) if a.ndim == 1 else a  # noqa: E731
    with Checkpoints(folder / "run", "trunk") as checkpoints:
        state = {"params": {"model": jax.tree.map(noise, params), "scales": {}}}
        checkpoints.save(1, state, {}, {}, final=True, wait=True)
    (folder / "run" / "config.json").write_text(to_json(cfg))
    tokenizer.train(["two bits of every weight"] * 9, 270).save(folder / "run" / "tokenizer.json")
    with Branch(folder / "run", rest="F32") as branch:
        assert huggingface_model.write(branch, folder / "model", packed=False, force=False) == "glm4_moe"
    return folder


def test_mtp_logits_are_those_of_transformers(with_mtp):
    """Which hidden state, which embedding, in which order, and which norm: conventions that no file says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(with_mtp / "model", dtype=torch.float32).eval()
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]  # theirs knows the depths of GLM-4.5 alone
    ids = torch.tensor(TOKENS)[None]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        module = MtpModel.from_pretrained(model).eval()
        positions = torch.arange(1, ids.shape[1])[None]
        _, theirs, _ = module(ids[:, 1:], hidden[:, :-1], None, positions, None)

    with Branch(with_mtp / "run", rest="F32") as branch:
        weights, cfg = branch.numbers(), branch.model
    following = jnp.asarray(np.roll(TOKENS, -1))[None, None]
    forward = jax.jit(functools.partial(transformer.forward, cfg=cfg, train=False))
    out = forward(weights, tokens_BL=jnp.asarray(TOKENS)[None], mtp_tokens=following)
    ours = transformer.logits(weights, cfg, out.mtp_hidden[0])[0, -2]  # the last place whose next token is known
    assert theirs.std() > 0.3
    np.testing.assert_allclose(ours, theirs[0, -1].numpy(), atol=1e-4, rtol=0)


def test_import_keeps_the_mtp_module(with_mtp):
    import_folder(with_mtp / "model", with_mtp / "again")
    with Branch(with_mtp / "again", rest="F32") as branch:
        again = branch.numbers()
    with Branch(with_mtp / "run", rest="F32") as branch:
        jax.tree.map(np.testing.assert_array_equal, again, branch.numbers())
