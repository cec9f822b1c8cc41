"""A dense model as a Mixture of Experts that computes the same: sparse upcycling, with shards.

The width of a dense FFN is cut into S `shards`, which add up to it. The first H become shared experts, each of the
others `copies` routed experts. Rows of the router are random and, at first, the same for all shards of a copy, so that
these are chosen together ("virtual groups": He et al. 2024, "Upcycling Large Language Models into Mixture of Experts";
with one shard it is Komatsuzaki et al. 2022, "Sparse Upcycling"). A token's A best copies get weights w_1 .. w_A, and
each shard of theirs w_i / (S - H) after the router's normalisation over all that was chosen. What is routed is
therefore multiplied by S - H: by `model.routed_scale` or, where the architecture has none, in the down projection.
Copies are equal and w_1 .. w_A sum to 1, so the sum over experts is the dense FFN, up to float rounding, whichever
copies a token goes to.

Training ties nothing: experts and rows of the router go their own ways, and a token may then go to one shard twice and
to another not at all. With A = 1 nothing but the balance term teaches the router which copy to choose, as the weights
of its shards are normalised.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from qatmoe.config import ModelConfig
from qatmoe.errors import UserError

ROUTER_STD = 0.02
MAX_EXPERTS = 1 << 14


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """How a dense FFN becomes experts."""

    copies: int  # of each routed shard
    shards: int = 1  # S, that a dense FFN is cut into
    shared: int = 0  # H, of them, that every token goes through
    active: int = 1  # A, copies that a token goes to
    seed: int = 0  # of the router's rows

    @property
    def routed(self) -> int:
        """Shards that are routed, S - H."""
        return self.shards - self.shared


def moe_of(dense: ModelConfig, up: Upcycling) -> ModelConfig:
    """The upcycled model's shape: that of Qwen3-MoE where it can be, otherwise GLM-4-MoE's.

    Args:
      dense: a model all of whose layers are dense.

    Raises:
      UserError: the numbers do not fit together, or not this model.
    """
    for name, low in (("copies", 2), ("shards", 1), ("active", 1), ("seed", 0)):
        if getattr(up, name) < low:
            raise UserError(f"--{name} {getattr(up, name)}: must be at least {low}")
    if not 0 <= up.shared < up.shards:
        raise UserError(f"--shared {up.shared}: must be from 0 to {up.shards - 1}, so that of --shards one is routed")
    if up.active > up.copies:
        raise UserError(f"--active {up.active}: a token cannot go to more than --copies {up.copies}")
    if dense.dense_dim % up.shards:
        fit = ", ".join(str(n) for n in range(1, 17) if not dense.dense_dim % n)
        raise UserError(f"--shards {up.shards} does not divide the dense FFN's width of {dense.dense_dim}; {fit} do")
    if up.copies * up.routed > MAX_EXPERTS:
        raise UserError(f"--copies {up.copies} of {up.routed} routed shards are more than {MAX_EXPERTS} experts")
    if up.active * up.routed == 1:
        raise UserError(
            "one expert a token would get the weight 1 whatever the router says, and the router would learn nothing: "
            "give --active 2"
        )
    qwen = dense.qk_norm == "head" and not up.shared and not dense.qkv_bias
    return dataclasses.replace(
        dense,
        n_dense_layers=0,
        n_experts=up.copies * up.routed,
        top_k=up.active * up.routed,
        expert_dim=dense.dense_dim // up.shards,
        n_shared_experts=up.shared,
        router="softmax" if qwen else "sigmoid",
        router_bias=not qwen,
        norm_topk=True,
        routed_scale=1.0 if qwen else float(up.routed),
    )


def router_of(moe: ModelConfig, up: Upcycling, layer: int) -> dict[str, np.ndarray]:
    """{router/weight: (E, D), router/bias: (E,)} of a layer, f32."""
    rng = np.random.default_rng((up.seed, layer))
    copies_CD = rng.normal(0.0, ROUTER_STD, (up.copies, moe.dim)).astype(np.float32)
    found = {"router/weight": np.repeat(copies_CD, up.routed, axis=0)}
    return found | ({"router/bias": np.zeros(moe.n_experts, np.float32)} if moe.router_bias else {})


def experts_of(moe: ModelConfig, up: Upcycling, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """What a dense FFN's matrix becomes in the MoE: in its own type, or float32 where it is multiplied.

    Args:
      name: "gate_up", (2 S F, D), or "down", (D, S F).

    Returns:
      {"experts/NAME": (E, 2 F, D) or (E, D, F)} and, with shared experts, "shared/NAME": (2 H F, D) or (D, H F).
    """
    width, shared = moe.expert_dim, up.shared * moe.expert_dim
    if name == "gate_up":
        gate_up = array.reshape(2, up.shards * width, moe.dim)
        shards = gate_up[:, shared:].reshape(2, up.routed, width, moe.dim).swapaxes(0, 1)
        routed = shards.reshape(up.routed, 2 * width, moe.dim)
        always = gate_up[:, :shared].reshape(2 * shared, moe.dim)
    else:
        routed = array[:, shared:].reshape(moe.dim, up.routed, width).swapaxes(0, 1)
        if up.routed != moe.routed_scale:
            routed = routed.astype(np.float32) * np.float32(up.routed / moe.routed_scale)
        always = array[:, :shared]
    # Expert COPY * (S - H) + SHARD, as the router's rows are.
    found = {f"experts/{name}": np.tile(routed, (up.copies, 1, 1))}
    return found | ({f"shared/{name}": np.ascontiguousarray(always)} if up.shared else {})


def layer_of(moe: ModelConfig, up: Upcycling, layer: int, rest: str, array: np.ndarray) -> Mapping[str, np.ndarray]:
    """{path in a MoE layer: array} that a dense layer's parameter becomes; the router comes beside the FFN's norm."""
    if rest.startswith("ffn/"):
        return experts_of(moe, up, rest.removeprefix("ffn/"), array)
    return {rest: array} | (router_of(moe, up, layer) if rest == "ffn_norm" else {})
