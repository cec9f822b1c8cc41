"""Published models by their tensors: what `qatmoe.plan` counts without any weights.

Models that `ModelConfig` expresses take their tensors from `convert.names`. The others (gpt-oss, DeepSeek-V3) are lists
of their own, with the names and shapes that llama.cpp's loaders ask for (src/models/openai-moe.cpp, deepseek2.cpp).
Sizes are those of the models' config.json.
"""

import collections
import dataclasses
import difflib
import math
from typing import NamedTuple

from qatmoe.config import ModelConfig, QuantConfig
from qatmoe.convert import gguf, names
from qatmoe.convert.gguf_model import SCALED
from qatmoe.convert.weights import stored_as
from qatmoe.errors import UserError
from qatmoe.quant.grid import GRIDS, Grid, get
from qatmoe.quant.plan import KEPT, OTHER, RULES, family

FAMILIES = tuple(key for key, _ in RULES)  # keys of config.quant that name a grid
ROUTED = ("gate_up", "down")  # of these a token uses top_k of n_experts

# Bytes of a file's metadata per entry of the vocabulary: text, type and merges, as `convert.vocab` writes them.
# Measured on GPT-NeoX's tokenizer (35.1; OLMoE's is it), Qwen3's (39.0), DeepSeek-V3's (40.5) and gpt-oss's (64.7).
# Merges make the difference: one for each token, or more than two. GLM-4.5's are as many as Llama 3's, which take 61.0.
_ENTRY = {"bundled": 29.3, "gpt-neox": 35.1, "qwen3": 39.0, "deepseek-v3": 40.5, "glm-4.5": 61.0, "gpt-oss": 64.7}


class Piece(NamedTuple):
    """`number` tensors of one name and shape, in as many blocks of a file."""

    family: str  # of FAMILIES, KEPT (norms, biases, routers) or OTHER
    name: str  # GGUF's, without "blk.N."
    shape: tuple[int, ...]  # the last axis is the contraction axis
    number: int = 1
    mtp: bool = False  # belongs to an MTP module

    @property
    def weights(self) -> int:
        """Weights in all of them."""
        return self.number * math.prod(self.shape)


class Cache(NamedTuple):
    """Layers that store the same number of values for a token."""

    layers: int
    k: int  # values of a token in K
    v: int  # and in V
    head: int  # values of a head, which blocks must divide
    window: int = 0  # tokens that attention looks back, 0: all


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    name: str
    arch: str  # GGUF architecture
    pieces: tuple[Piece, ...]
    caches: tuple[Cache, ...]  # of the trunk
    context: int  # tokens, the most that the model is made for
    vocab_size: int
    entry_bytes: float  # bytes of metadata per entry of the vocabulary
    top_k: int

    @property
    def total(self) -> int:
        """Weights of the trunk, embedding and head included, MTP modules not: what is published."""
        return sum(p.weights for p in self.pieces if not p.mtp)

    @property
    def mtp(self) -> int:
        """Weights of the MTP modules."""
        return sum(p.weights for p in self.pieces if p.mtp)

    @property
    def active(self) -> int:
        """Weights of the trunk that one token uses, embedding and head included."""
        used = (p.weights * (self.top_k / p.shape[0] if p.family in ROUTED else 1) for p in self.pieces if not p.mtp)
        return round(sum(used))


# ---- tensors of a model ----------------------------------------------------------------------------------------------


def from_model(name: str, model: ModelConfig, context: int, entry_bytes: float) -> Shape:
    """The shape of a model. Raises UserError where no GGUF architecture holds it."""
    arch = names.architecture(model, names.GGUF)
    counts = collections.Counter(
        (family(part.path), _leaf(tensor), names.shape_of(model, part), part.path.startswith("mtp/"))
        for tensor, part in names.gguf_parts(model, arch).items()
    )
    pieces = tuple(Piece(key, leaf, shape, count, mtp) for (key, leaf, shape, mtp), count in counts.items())
    return Shape(name, arch, pieces, caches_of(model), context, model.vocab_size, entry_bytes, model.top_k)


def caches_of(model: ModelConfig) -> tuple[Cache, ...]:
    """What the trunk caches: keys and values of every layer."""
    width = model.n_kv_heads * model.head_dim
    return (Cache(model.n_layers, width, width, model.head_dim),)


def _leaf(tensor: str) -> str:
    """A tensor's name without its block."""
    return tensor.split(".", 2)[2] if tensor.startswith("blk.") else tensor


def _blocks(n: int, *pieces: Piece) -> tuple[Piece, ...]:
    return tuple(piece._replace(number=n) for piece in pieces)


def _gpt_oss_120b() -> Shape:
    """Biases everywhere, attention sinks, and a window of 128 tokens in every other layer."""
    n, dim, width, experts, vocab, q, kv = 36, 2880, 2880, 128, 201_088, 64 * 64, 8 * 64
    pieces = (
        Piece("embedding", "token_embd.weight", (vocab, dim)),
        Piece("head", "output.weight", (vocab, dim)),
        Piece(KEPT, "output_norm.weight", (dim,)),
        *_blocks(
            n,
            Piece("attention", "attn_q.weight", (q, dim)),
            Piece("attention", "attn_k.weight", (kv, dim)),
            Piece("attention", "attn_v.weight", (kv, dim)),
            Piece("attention", "attn_output.weight", (dim, q)),
            Piece("gate_up", "ffn_gate_exps.weight", (experts, width, dim)),
            Piece("gate_up", "ffn_up_exps.weight", (experts, width, dim)),
            Piece("down", "ffn_down_exps.weight", (experts, dim, width)),
            Piece(KEPT, "ffn_gate_inp.weight", (experts, dim)),
            Piece(KEPT, "ffn_gate_inp.bias", (experts,)),
            Piece(KEPT, "ffn_gate_exps.bias", (experts, width)),
            Piece(KEPT, "ffn_up_exps.bias", (experts, width)),
            Piece(KEPT, "ffn_down_exps.bias", (experts, dim)),
            Piece(KEPT, "attn_q.bias", (q,)),
            Piece(KEPT, "attn_k.bias", (kv,)),
            Piece(KEPT, "attn_v.bias", (kv,)),
            Piece(KEPT, "attn_output.bias", (dim,)),
            Piece(KEPT, "attn_sinks.weight", (64,)),
            Piece(KEPT, "attn_norm.weight", (dim,)),
            Piece(KEPT, "post_attention_norm.weight", (dim,)),
        ),
    )
    caches = (Cache(n // 2, kv, kv, 64), Cache(n // 2, kv, kv, 64, window=128))
    return Shape("gpt-oss-120b", "gpt-oss", pieces, caches, 131_072, vocab, _ENTRY["gpt-oss"], top_k=4)


def _deepseek_v3() -> Shape:
    """Multi-head latent attention: one key of 512 + 64 values for all heads, which holds the values too.

    Without its MTP module, as llama.cpp's converter writes DeepSeek-V3.
    """
    n, dense, dim, heads, vocab, experts = 61, 3, 7168, 128, 129_280, 256
    q_rank, kv_rank, rope, nope, value, width = 1536, 512, 64, 128, 128, 2048
    pieces = (
        Piece("embedding", "token_embd.weight", (vocab, dim)),
        Piece("head", "output.weight", (vocab, dim)),
        Piece(KEPT, "output_norm.weight", (dim,)),
        *_blocks(
            n,
            Piece("attention", "attn_q_a.weight", (q_rank, dim)),
            Piece("attention", "attn_q_b.weight", (heads * (nope + rope), q_rank)),
            Piece("attention", "attn_kv_a_mqa.weight", (kv_rank + rope, dim)),
            Piece("attention", "attn_k_b.weight", (heads, kv_rank, nope)),
            Piece("attention", "attn_v_b.weight", (heads, value, kv_rank)),
            Piece("attention", "attn_output.weight", (dim, heads * value)),
            Piece(KEPT, "attn_q_a_norm.weight", (q_rank,)),
            Piece(KEPT, "attn_kv_a_norm.weight", (kv_rank,)),
            Piece(KEPT, "attn_norm.weight", (dim,)),
            Piece(KEPT, "ffn_norm.weight", (dim,)),
        ),
        *_blocks(
            dense,
            Piece("shared", "ffn_gate.weight", (18_432, dim)),
            Piece("shared", "ffn_up.weight", (18_432, dim)),
            Piece("shared", "ffn_down.weight", (dim, 18_432)),
        ),
        *_blocks(
            n - dense,
            Piece("gate_up", "ffn_gate_exps.weight", (experts, width, dim)),
            Piece("gate_up", "ffn_up_exps.weight", (experts, width, dim)),
            Piece("down", "ffn_down_exps.weight", (experts, dim, width)),
            Piece("shared", "ffn_gate_shexp.weight", (width, dim)),
            Piece("shared", "ffn_up_shexp.weight", (width, dim)),
            Piece("shared", "ffn_down_shexp.weight", (dim, width)),
            Piece(KEPT, "ffn_gate_inp.weight", (experts, dim)),
            Piece(KEPT, "exp_probs_b.bias", (experts,)),
        ),
    )
    caches = (Cache(n, kv_rank + rope, 0, kv_rank + rope),)
    return Shape("deepseek-v3", "deepseek2", pieces, caches, 163_840, vocab, _ENTRY["deepseek-v3"], top_k=8)


# ---- the table -------------------------------------------------------------------------------------------------------

_DEFAULT = ModelConfig(
    dim=64, n_layers=3, n_dense_layers=1, dense_dim=128, n_heads=2, n_kv_heads=1, head_dim=32, expert_dim=64,
    routed_scale=2.5,
)  # fmt: skip
_QWEN3 = ModelConfig(
    vocab_size=151_936, n_kv_heads=4, head_dim=128, n_dense_layers=0, rotary_fraction=1.0, n_experts=128, top_k=8,
    n_shared_experts=0, router="softmax", router_bias=False, n_mtp=0,
)  # fmt: skip
_OLMOE = ModelConfig(
    vocab_size=50_304, dim=2048, n_layers=16, n_dense_layers=0, n_heads=16, n_kv_heads=16, head_dim=128, qk_norm="full",
    rotary_fraction=1.0, n_experts=64, top_k=8, expert_dim=1024, n_shared_experts=0, router="softmax",
    router_bias=False, norm_topk=False, n_mtp=0,
)  # fmt: skip
_GLM = ModelConfig(vocab_size=151_552, n_heads=96, n_kv_heads=8, head_dim=128, qkv_bias=True, top_k=8)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        from_model("default", _DEFAULT, 128, _ENTRY["bundled"]),  # configs/moe_2bit.py
        from_model("olmoe-7b-a1b", _OLMOE, 4096, _ENTRY["gpt-neox"]),
        from_model(
            "qwen3-30b-a3b",
            dataclasses.replace(_QWEN3, dim=2048, n_layers=48, n_heads=32, expert_dim=768),
            40_960,
            _ENTRY["qwen3"],
        ),
        from_model(
            "glm-4.5-air",
            dataclasses.replace(
                _GLM, dim=4096, n_layers=46, dense_dim=10_944, qk_norm="none", n_experts=128, expert_dim=1408
            ),
            131_072,
            _ENTRY["glm-4.5"],
        ),
        _gpt_oss_120b(),
        from_model(
            "qwen3-235b-a22b",
            dataclasses.replace(_QWEN3, dim=4096, n_layers=94, n_heads=64, expert_dim=1536),
            40_960,
            _ENTRY["qwen3"],
        ),
        from_model(
            "glm-4.5",
            dataclasses.replace(
                _GLM, dim=5120, n_layers=92, n_dense_layers=3, dense_dim=12_288, n_experts=160, expert_dim=1536
            ),
            131_072,
            _ENTRY["glm-4.5"],
        ),
        _deepseek_v3(),
    )
}


def find(name: str) -> Shape:
    """A built-in shape; UserError with the closest name and the whole list otherwise."""
    if name.lower() not in SHAPES:
        close = difflib.get_close_matches(name.lower(), SHAPES, 1, 0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"--model {name!r}: unknown{hint} Models: {', '.join(SHAPES)}")
    return SHAPES[name.lower()]


# ---- on grids --------------------------------------------------------------------------------------------------------


def stored(shape: Shape, quant: QuantConfig, *, rest: str, ternary: str) -> list[tuple[Piece, str]]:
    """Every piece and its GGUF type, decided as for the export of a run (`convert.weights.Storage`).

    A piece on NVFP4 is followed by the scale tensors that it needs.

    Raises:
      UserError: a grid that is unknown, that no tensor of the model gets, whose block does not divide a row, or whose
        scale tensors llama.cpp would ignore.
    """
    _check_used(shape, quant)
    found = []
    for piece in shape.pieces:
        grid = _grid(quant, piece)
        if grid is not None:
            _check_row(shape, piece, grid)
        kind = stored_as(grid, kept=piece.family == KEPT, row=piece.shape[-1], rest=rest, ternary=ternary)[0]
        found.append((piece, kind))
        if kind == "NVFP4":
            _check_scaled(shape, piece)
            name = piece.name.removesuffix("weight") + "scale"
            found.append((piece._replace(name=name, shape=piece.shape[:-2] or (1,)), "F32"))
    return found


def size(piece: Piece, kind: str) -> int:
    """Bytes of the pieces' data in a file, padding included."""
    return piece.number * gguf.data_bytes(gguf.Tensor(kind, piece.shape))


def _grid(quant: QuantConfig, piece: Piece) -> Grid | None:
    """The grid that config.quant gives a piece; `quant.mtp` as its comment in the configuration says."""
    if piece.family in (KEPT, OTHER) or (piece.mtp and quant.mtp == "none"):
        return None
    name = getattr(quant, piece.family)
    if piece.family in ROUTED:
        name = quant.experts if name == "same" else name
        name = quant.mtp if piece.mtp and quant.mtp != "same" else name
    return None if name == "none" else get(name)


def _check_used(shape: Shape, quant: QuantConfig) -> None:
    for key in FAMILIES:
        if getattr(quant, key) not in ("none", "same") and not any(p.family == key for p in shape.pieces):
            raise UserError(f"--{key} {getattr(quant, key)}: {shape.name} has no such weights; leave it out")
    if quant.mtp != "none" and not shape.mtp:
        raise UserError(f"--mtp {quant.mtp}: {shape.name} has no MTP module here; leave it out")


def _check_row(shape: Shape, piece: Piece, grid: Grid) -> None:
    if piece.shape[-1] % grid.superblock:
        fits = ", ".join(g.name for g in GRIDS.values() if piece.shape[-1] % g.superblock == 0) or "none"
        raise UserError(
            f"{grid.name} needs rows of whole blocks of {grid.superblock} weights, and {piece.name} of {shape.name} "
            f"has rows of {piece.shape[-1]}; grids that fit it: {fits}"
        )


def _check_scaled(shape: Shape, piece: Piece) -> None:
    if piece.name.split(".")[-2] not in SCALED.get(shape.arch, ()):
        raise UserError(
            f"llama.cpp's {shape.arch} ignores the scale tensors that nvfp4 needs beside {piece.name}: choose another "
            "grid, mxfp4 for example"
        )
