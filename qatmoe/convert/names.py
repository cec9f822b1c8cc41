"""Which tensor of a file holds which rows of which parameter: ONE table for GGUF and Hugging Face.

A parameter is named by its path in the stacked layout, `layers/experts/gate_up`, and the number of its layer within its
stack. A fused gate_up is two tensors in a file, its first and second half of rows; Hugging Face has one tensor per
expert, GGUF one for all of them. A file numbers its blocks through: leading dense layers, MoE layers, MTP modules.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

from qatmoe.config import ModelConfig
from qatmoe.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """What a tensor of a file holds: a stacked parameter, or a layer of it, or an expert or a half of that."""

    path: str  # parameter path without a layer number
    layer: int | None = None  # index in its stack
    expert: int | None = None
    half: int | None = None  # 0: first half of the rows (gate), 1: second half (up)


# Parameter, half, GGUF name in "blk.N.", Hugging Face name in "model.layers.N.".
_BLOCK: tuple[tuple[str, int | None, str, str], ...] = (
    ("attn_norm", None, "attn_norm.weight", "input_layernorm.weight"),
    ("attn/q", None, "attn_q.weight", "self_attn.q_proj.weight"),
    ("attn/k", None, "attn_k.weight", "self_attn.k_proj.weight"),
    ("attn/v", None, "attn_v.weight", "self_attn.v_proj.weight"),
    ("attn/o", None, "attn_output.weight", "self_attn.o_proj.weight"),
    ("attn/q_bias", None, "attn_q.bias", "self_attn.q_proj.bias"),
    ("attn/k_bias", None, "attn_k.bias", "self_attn.k_proj.bias"),
    ("attn/v_bias", None, "attn_v.bias", "self_attn.v_proj.bias"),
    ("attn/q_norm", None, "attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn/k_norm", None, "attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("ffn_norm", None, "ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn/gate_up", 0, "ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn/gate_up", 1, "ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn/down", None, "ffn_down.weight", "mlp.down_proj.weight"),
    ("router/weight", None, "ffn_gate_inp.weight", "mlp.gate.weight"),
    ("router/bias", None, "exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    ("experts/gate_up", 0, "ffn_gate_exps.weight", "mlp.experts.{}.gate_proj.weight"),
    ("experts/gate_up", 1, "ffn_up_exps.weight", "mlp.experts.{}.up_proj.weight"),
    ("experts/down", None, "ffn_down_exps.weight", "mlp.experts.{}.down_proj.weight"),
    ("shared/gate_up", 0, "ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"),
    ("shared/gate_up", 1, "ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"),
    ("shared/down", None, "ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"),
)
# What an MTP module has around its block.
_MTP: tuple[tuple[str, str, str], ...] = (
    ("eh_proj", "nextn.eh_proj.weight", "eh_proj.weight"),
    ("enorm", "nextn.enorm.weight", "enorm.weight"),
    ("hnorm", "nextn.hnorm.weight", "hnorm.weight"),
    ("norm", "nextn.shared_head_norm.weight", "shared_head.norm.weight"),
)
_TOP: tuple[tuple[str, str, str], ...] = (
    ("embed", "token_embd.weight", "model.embed_tokens.weight"),
    ("head", "output.weight", "lm_head.weight"),
    ("norm", "output_norm.weight", "model.norm.weight"),
)


_STACK = re.compile(r"^(dense_layers/|layers/|mtp/block/|mtp/)")


def gguf_parts(cfg: ModelConfig, arch: str) -> dict[str, Part]:
    """{GGUF tensor name: what it holds}, the tensors of one parameter together."""
    post_norm = {"ffn_norm.weight": "post_attention_norm.weight"} if arch == "glm4moe" else {}
    parts = {}
    for stack, layer, block, prefix in _blocks(cfg):
        for path, half, name, _ in _BLOCK:
            if has(cfg, stack, path) or (arch == "glm4moe" and _wants_bias(cfg, stack, path)):
                parts[f"blk.{block}.{post_norm.get(name, name)}"] = Part(f"{prefix}{path}", layer, half=half)
        for path, name, _ in _MTP if stack == "mtp" else ():
            parts[f"blk.{block}.{name}"] = Part(f"mtp/{path}", layer)
    return _together({name: Part(path) for path, name, _ in _top(cfg)} | parts)


def huggingface_parts(cfg: ModelConfig, arch: str) -> dict[str, Part]:
    """{Hugging Face tensor name: what it holds}, the tensors of one parameter together."""
    parts = {}
    for stack, layer, block, prefix in _blocks(cfg):
        for path, half, _, name in _BLOCK:
            extra = arch == "glm4_moe" and (_wants_bias(cfg, stack, path) or _wants_empty(cfg, stack, path))
            if not has(cfg, stack, path) and not extra:
                continue
            for expert in range(cfg.n_experts) if "{}" in name else (None,):
                full = f"model.layers.{block}.{name.format(expert)}"
                parts[full] = Part(f"{prefix}{path}", layer, expert, half)
        for path, _, name in _MTP if stack == "mtp" else ():
            parts[f"model.layers.{block}.{name}"] = Part(f"mtp/{path}", layer)
    return _together({name: Part(path) for path, _, name in _top(cfg)} | parts)


def has(cfg: ModelConfig, stack: str, path: str) -> bool:
    """Whether blocks of a stack ("dense_layers", "layers", "mtp") have this parameter."""
    dense = stack == "dense_layers"
    group = path.split("/")[0]
    if group in ("router", "experts"):
        return not dense and (path != "router/bias" or cfg.router_bias)
    if group == "shared":
        return not dense and cfg.n_shared_experts > 0
    if group == "ffn":
        return dense
    if path in ("attn/q_bias", "attn/k_bias", "attn/v_bias"):
        return cfg.qkv_bias
    if path in ("attn/q_norm", "attn/k_norm"):
        return cfg.qk_norm != "none"
    return True


def shape_of(cfg: ModelConfig, part: Part) -> tuple[int, ...]:
    """Shape of a part."""
    name = _STACK.sub("", part.path)
    group, _, leaf = name.partition("/")
    heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads, "o": cfg.n_heads}
    widths = {
        "ffn": cfg.dense_dim,
        "shared": cfg.n_shared_experts * cfg.expert_dim,
        "experts": cfg.expert_dim,
    }
    if group == "attn":
        width = heads[leaf[0]] * cfg.head_dim
        if leaf in ("q_norm", "k_norm"):
            return (width if cfg.qk_norm == "full" else cfg.head_dim,)
        if leaf.endswith("bias"):
            return (width,)
        return (cfg.dim, width) if leaf == "o" else (width, cfg.dim)
    if group == "router":
        return (cfg.n_experts, cfg.dim) if leaf == "weight" else (cfg.n_experts,)
    if group in widths:
        rows = widths[group] if part.half is not None else 2 * widths[group]
        matrix = (cfg.dim, widths[group]) if leaf == "down" else (rows, cfg.dim)
        return (cfg.n_experts, *matrix) if group == "experts" and part.expert is None else matrix
    tables = {"embed": (cfg.vocab_size, cfg.dim), "head": (cfg.vocab_size, cfg.dim), "eh_proj": (cfg.dim, 2 * cfg.dim)}
    return tables.get(name, (cfg.dim,))


def _wants_bias(cfg: ModelConfig, stack: str, path: str) -> bool:
    """GLM-4-MoE files always hold a selection bias; a model without one has zeros there."""
    return path == "router/bias" and stack != "dense_layers" and not cfg.router_bias


def _wants_empty(cfg: ModelConfig, stack: str, path: str) -> bool:
    """Transformers' GLM-4-MoE always has shared experts, of width 0 where there are none."""
    return path.startswith("shared/") and stack != "dense_layers" and cfg.n_shared_experts == 0


def stack_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Layers of each stack, in the order in which a file numbers them."""
    return {"dense_layers": cfg.n_dense_layers, "layers": cfg.n_layers - cfg.n_dense_layers, "mtp": cfg.n_mtp}


def _blocks(cfg: ModelConfig) -> Iterator[tuple[str, int, int, str]]:
    """(stack, index in it, block number, prefix of parameter paths) of every block."""
    block = 0
    for stack, count in stack_sizes(cfg).items():
        for layer in range(count):
            yield stack, layer, block, "mtp/block/" if stack == "mtp" else f"{stack}/"
            block += 1


def _top(cfg: ModelConfig) -> list[tuple[str, str, str]]:
    return [row for row in _TOP if not (cfg.tie_embeddings and row[0] == "head")]


def _together(parts: dict[str, Part]) -> dict[str, Part]:
    """Sorted by parameter, then layer: whoever writes them loads each parameter once."""
    order = {path: i for i, path in enumerate(dict.fromkeys(part.path for part in parts.values()))}
    return dict(sorted(parts.items(), key=lambda item: (order[item[1].path], item[1].layer or 0)))


# ---- which architectures hold a model --------------------------------------------------------------------------------

Rule = tuple[str, Callable[[ModelConfig], bool]]

_NO_CLAMP: Rule = ("swiglu_limit=0", lambda m: m.swiglu_limit == 0)
_SOFTMAX_ONLY: tuple[Rule, ...] = (
    ("router='softmax'", lambda m: m.router == "softmax"),
    ("router_bias=False", lambda m: not m.router_bias),
    ("n_shared_experts=0", lambda m: m.n_shared_experts == 0),
    ("routed_scale=1", lambda m: m.routed_scale == 1),
    ("rotary_fraction=1", lambda m: m.rotary_fraction == 1),
    ("qkv_bias=False", lambda m: not m.qkv_bias),
    _NO_CLAMP,
)
_QK_HEAD: Rule = ("qk_norm='head'", lambda m: m.qk_norm == "head")
_QK_FULL: Rule = ("qk_norm='full'", lambda m: m.qk_norm == "full")
_QK_NOT_FULL: Rule = ("qk_norm='head' or 'none'", lambda m: m.qk_norm != "full")
_NO_MTP: Rule = ("n_mtp=0 (--drop_mtp leaves the MTP modules out)", lambda m: m.n_mtp == 0)
_NO_DENSE: Rule = ("n_dense_layers=0", lambda m: m.n_dense_layers == 0)

_LIMITS: tuple[Rule, ...] = (  # LLAMA_MAX_EXPERTS and LLAMA_MAX_LAYERS
    ("n_experts of at most 1024", lambda m: m.n_experts <= 1024),
    ("n_layers + n_mtp of at most 512", lambda m: m.n_layers + m.n_mtp <= 512),
)

# What llama.cpp's graphs compute (src/models/{glm4-moe,qwen3moe,olmoe}.cpp).
GGUF: dict[str, tuple[Rule, ...]] = {
    "glm4moe": (
        ("n_shared_experts of 1 or more", lambda m: m.n_shared_experts > 0),
        ("routed_scale other than 0", lambda m: m.routed_scale != 0),  # which llama.cpp takes for none
        _QK_NOT_FULL,
        _NO_CLAMP,
        *_LIMITS,
    ),
    "qwen3moe": (*_SOFTMAX_ONLY, _QK_HEAD, ("norm_topk=True", lambda m: m.norm_topk), _NO_DENSE, _NO_MTP, *_LIMITS),
    "olmoe": (
        *_SOFTMAX_ONLY,
        _QK_FULL,
        ("norm_topk=False", lambda m: not m.norm_topk),
        ("n_kv_heads=n_heads", lambda m: m.n_kv_heads == m.n_heads),
        ("dim=n_heads*head_dim", lambda m: m.dim == m.n_heads * m.head_dim),
        ("tie_embeddings=False", lambda m: not m.tie_embeddings),
        _NO_DENSE,
        _NO_MTP,
        *_LIMITS,
    ),
}
# What transformers' models compute.
HUGGINGFACE: dict[str, tuple[Rule, ...]] = {
    "glm4_moe": (("router='sigmoid'", lambda m: m.router == "sigmoid"), _QK_NOT_FULL, _NO_CLAMP),
    "qwen3_moe": (*_SOFTMAX_ONLY, _QK_HEAD, _NO_MTP),
    "olmoe": (
        *_SOFTMAX_ONLY,
        _QK_FULL,
        ("dim=n_heads*head_dim", lambda m: m.dim == m.n_heads * m.head_dim),
        _NO_DENSE,
        _NO_MTP,
    ),
}


def architecture(cfg: ModelConfig, table: dict[str, tuple[Rule, ...]], wanted: str = "auto") -> str:
    """The first architecture of a table that computes exactly what this model computes, or the wanted one if it does.

    Raises:
      UserError: it is unknown, or none does; says for each what stands in the way.
    """
    if wanted != "auto" and wanted not in table:
        raise UserError(f"--arch {wanted!r}: must be auto, {', '.join(table)}")
    names = [wanted] if wanted != "auto" else list(table)
    missing = {name: [what for what, holds in table[name] if not holds(cfg)] for name in names}
    for name, lacks in missing.items():
        if not lacks:
            return name
    reasons = "; ".join(f"{name} needs {', '.join(lacks)}" for name, lacks in missing.items())
    raise UserError(f"no architecture holds this model exactly: {reasons}")
