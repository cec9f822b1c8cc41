"""config.json of Hugging Face models <-> ModelConfig: Qwen3-MoE, OLMoE, GLM-4-MoE, and dots1, which computes like GLM.

Dense models are read too, as models all of whose layers are dense; `convert.upcycle` makes a MoE of one.

Keys have changed their names over the years; both spellings are read, and both are written where transformers still
reads the old one.
"""

import math
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from qatmoe.config import ModelConfig
from qatmoe.errors import UserError

Json = dict[str, Any]

_CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM"}
IMPORTED = (*_CLASSES, "dots1")
DENSE = ("llama", "mistral", "qwen2", "qwen3")
# Features that the model here does not have: key -> the values with which they are off.
_OFF: dict[str, tuple[Any, ...]] = {
    "clip_qkv": (None,),
    "use_sliding_window": (None, False),
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "kv_lora_rank": (None,),
    "q_lora_rank": (None,),
    "quantization_config": (None,),
    "hidden_act": (None, "silu"),
    "mlp_bias": (None, False),
    "moe_layer_freq": (None, 1),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
}
_LARGEST = 1 << 24  # no size in a config is larger


class _Reader:
    """Typed access to the keys of a config.json."""

    def __init__(self, raw: Json, where: str):
        self.raw, self.where = raw, where

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first key that is there and not null."""
        return next((self.raw[n] for n in names if self.raw.get(n) is not None), default)

    def size(self, *names: str, default: int | None = None, low: int = 1) -> int:
        value = self.get(*names, default=default)
        if value is None:
            raise self.refuse(f"has no {' or '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _LARGEST:
            raise self.refuse(f"{names[0]}={reprlib.repr(value)} is not a whole number from {low} to {_LARGEST}")
        return value

    def number(self, *names: str, default: float) -> float:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.refuse(f"{names[0]}={reprlib.repr(value)} is not a positive number")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise self.refuse(f"{names[0]}={value!r} is neither true nor false")
        return value

    def refuse_output_bias(self) -> None:
        """Of the architectures whose attention_bias means the output projection too, which has none here."""
        if self.flag("attention_bias", default=False):
            raise self.refuse("attention_bias=True (biases on the output projection too) cannot be imported")


def read(raw: Json, where: str) -> tuple[str, ModelConfig]:
    """The architecture and the model that a config.json describes; `where` names the file in messages.

    Raises:
      UserError: another architecture, a feature that this package's model does not have, or an unusable value.
    """
    r = _Reader(raw, where)
    arch = raw.get("model_type")
    if arch not in (*IMPORTED, *DENSE):
        mla = " (its attention is MLA, which is not supported)" if str(arch).startswith("deepseek") else ""
        raise r.refuse(f"model_type={arch!r} cannot be imported{mla}; can be: {', '.join((*IMPORTED, *DENSE))}")
    for key, off in _OFF.items():
        if raw.get(key) not in off:
            raise r.refuse(f"{key}={raw[key]!r} is a feature that cannot be imported")
    kinds = r.get("layer_types", default=[])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise r.refuse(f"layer_types={reprlib.repr(kinds)}: only full attention can be imported")
    heads, dim = r.size("num_attention_heads"), r.size("hidden_size")
    head_dim = r.size("head_dim", default=dim // heads)
    theta, fraction = _rope(r, arch)
    common: dict[str, Any] = {
        "vocab_size": r.size("vocab_size"),
        "dim": dim,
        "n_layers": r.size("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": r.size("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "rotary_fraction": fraction,
        "rope_theta": theta,
        "norm_eps": r.number("rms_norm_eps", default=1e-5 if arch in ("olmoe", "glm4_moe") else 1e-6),
        "top_k": r.size("num_experts_per_tok", default=8),
        "tie_embeddings": r.flag("tie_word_embeddings", default=False),
    }
    readers = {"qwen3_moe": _qwen3_moe, "olmoe": _olmoe, "glm4_moe": _glm4_moe, "dots1": _glm4_moe}
    return arch, ModelConfig(**common | readers.get(str(arch), _dense)(r))


def _rope(r: _Reader, arch: str) -> tuple[float, float]:
    """theta, and the share of a head that is turned."""
    rope: Json = {}
    for key in ("rope_scaling", "rope_parameters"):
        settings = r.get(key, default={})
        if not isinstance(settings, Mapping):
            raise r.refuse(f"{key}={settings!r} is not an object")
        if any(isinstance(value, Mapping) for value in settings.values()):
            raise r.refuse(f"{key}={settings!r} has settings per kind of layer: only one kind can be imported")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise r.refuse(f"rope_type={kind!r} is a feature that cannot be imported")
        rope |= settings
    inner = _Reader({**r.raw, **rope}, r.where)
    fraction = inner.number("partial_rotary_factor", default=0.5 if arch == "glm4_moe" else 1.0)
    if arch != "glm4_moe" and fraction != 1.0:
        raise r.refuse(
            f"partial_rotary_factor={fraction} is set and transformers turns whole heads of {arch}: remove it"
        )
    return inner.number("rope_theta", default=10_000.0), fraction


def _qwen3_moe(r: _Reader) -> dict[str, Any]:
    r.refuse_output_bias()
    if r.size("decoder_sparse_step", default=1) != 1:
        raise r.refuse(f"decoder_sparse_step={r.raw['decoder_sparse_step']}: only 1, every layer, can be imported")
    dense = r.get("mlp_only_layers", default=[])
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise r.refuse(f"mlp_only_layers={dense!r}: only leading dense layers can be imported")
    return {
        "n_dense_layers": len(dense),
        "dense_dim": r.size("intermediate_size", default=6144),
        "qk_norm": "head",
        "n_experts": r.size("num_local_experts", "num_experts"),
        "expert_dim": r.size("moe_intermediate_size"),
        "norm_topk": r.flag("norm_topk_prob", default=False),
        **_SOFTMAX,
    }


def _olmoe(r: _Reader) -> dict[str, Any]:
    r.refuse_output_bias()
    return {
        "n_dense_layers": 0,
        "dense_dim": r.size("intermediate_size"),
        "qk_norm": "full",
        "n_experts": r.size("num_local_experts", "num_experts"),
        "expert_dim": r.size("intermediate_size"),
        "norm_topk": r.flag("norm_topk_prob", default=False),
        **_SOFTMAX,
    }


_SOFTMAX = {"router": "softmax", "router_bias": False, "routed_scale": 1.0, "n_shared_experts": 0, "n_mtp": 0}


def _glm4_moe(r: _Reader) -> dict[str, Any]:
    dots = r.raw["model_type"] == "dots1"
    if dots and r.get("sliding_window") is not None and "layer_types" not in r.raw:
        full = r.size("max_window_layers", default=62, low=0)
        if full < r.size("num_hidden_layers"):
            raise r.refuse(f"layers from max_window_layers={full} on have a sliding window, which cannot be imported")
    if dots:
        r.refuse_output_bias()
    return {
        "n_dense_layers": r.size("first_k_dense_replace", default=0 if dots else 1, low=0),
        "dense_dim": r.size("intermediate_size"),
        "qk_norm": "head" if dots or r.flag("use_qk_norm", default=False) else "none",
        "qkv_bias": not dots and r.flag("attention_bias", default=False),
        "n_experts": r.size("num_local_experts", "n_routed_experts"),
        "expert_dim": r.size("moe_intermediate_size"),
        "n_shared_experts": r.size("n_shared_experts", default=0 if dots else 1, low=0),
        "router": "sigmoid",
        "router_bias": True,
        "norm_topk": r.flag("norm_topk_prob", default=not dots),
        "routed_scale": r.number("routed_scaling_factor", default=1.0),
        "n_mtp": 0 if dots else r.size("num_nextn_predict_layers", "num_mtp_layers", default=0, low=0),
    }


def _dense(r: _Reader) -> dict[str, Any]:
    """Llama, Mistral, Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k)."""
    kind = r.raw["model_type"]
    r.refuse_output_bias()
    window = r.raw.get("sliding_window", 4096)  # which transformers takes where the key is missing
    if kind == "mistral" and window is not None:
        raise r.refuse(
            f"sliding_window={window!r} is a feature that cannot be imported; without it, null, is the same model for "
            "texts that are not longer"
        )
    return {
        "n_dense_layers": r.size("num_hidden_layers"),
        "dense_dim": r.size("intermediate_size"),
        "qk_norm": "head" if kind == "qwen3" else "none",
        "qkv_bias": kind == "qwen2",
        "n_shared_experts": 0,
        "n_mtp": 0,
    }


def write(
    m: ModelConfig, arch: str, context: int, dtype: str, end_ids: tuple[int, ...], roles: Mapping[str, int]
) -> dict[str, Any]:
    """A config.json that transformers reads as this model.

    Args:
      context: max_position_embeddings.
      dtype: of the weights, "bfloat16" or "float32".
      end_ids: tokens that end a text.
      roles: {role: token}, of which "bos" and "pad" are said here.
    """
    rope = {"rope_type": "default", "rope_theta": m.rope_theta}
    config: dict[str, Any] = {
        "architectures": [_CLASSES[arch]],
        "model_type": arch,
        "vocab_size": m.vocab_size,
        "hidden_size": m.dim,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.n_kv_heads,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": context,
        "num_experts_per_tok": m.top_k,
        "norm_topk_prob": m.norm_topk,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_bias": m.qkv_bias,
        "bos_token_id": roles.get("bos"),
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else list(end_ids),
        "pad_token_id": roles.get("pad"),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if arch == "olmoe":
        return config | {"num_experts": m.n_experts, "intermediate_size": m.expert_dim}
    config |= {"intermediate_size": m.dense_dim, "moe_intermediate_size": m.expert_dim}
    if arch == "qwen3_moe":
        dense = list(range(m.n_dense_layers))
        return config | {"num_experts": m.n_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    rope["partial_rotary_factor"] = _rotary_factor(m)
    return config | {
        "partial_rotary_factor": _rotary_factor(m),
        "n_routed_experts": m.n_experts,
        "n_shared_experts": m.n_shared_experts,
        "first_k_dense_replace": m.n_dense_layers,
        "routed_scaling_factor": m.routed_scale,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": m.qk_norm == "head",
        "num_nextn_predict_layers": m.n_mtp,
    }


def _rotary_factor(m: ModelConfig) -> float:
    """What transformers' int(head_dim * factor) makes the model's rotated dims of: it would make 57 of 100 * 0.58."""
    if int(m.head_dim * m.rotary_fraction) == m.rotary_dim:
        return m.rotary_fraction
    factor = m.rotary_dim / m.head_dim
    return factor if int(m.head_dim * factor) == m.rotary_dim else math.nextafter(factor, 1)
