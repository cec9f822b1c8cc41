"""The decoder: parameter tree, initialisation and forward pass.

Parameters are a nested dict of f32 arrays. With scan_layers the layers of a kind are stacked on axis 0 and run by
`jax.lax.scan`; without, the same trees hang under "0", "1", ... and run in a Python loop, to the same numbers.
Master weights are f32 and cast to cfg.dtype where they are used; the residual stream is cfg.dtype; norms, router,
softmax, SwiGLU and logits are f32.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qatmoe.config import ModelConfig
from qatmoe.mesh import constrain, gathers, kept, not_gathered, used
from qatmoe.model.attention import attention, attention_params
from qatmoe.model.cache import CacheType
from qatmoe.model.layers import DOT, Param, einsum, ffn, ffn_params, norm_param, rms_norm, rope_angles
from qatmoe.model.moe import expert_ffn, expert_params
from qatmoe.model.mtp import mtp_module, mtp_params
from qatmoe.model.router import Routing, route, router_params
from qatmoe.tree import leaves_by_path, path_of

STACKED = ("dense_layers", "layers", "mtp")  # top-level keys whose trees are stacked over layers

TABLE = ("vocab", None), 1  # how embeddings lie, see `layers.Param`: looked up as they are kept, in parts of D
HEAD = ("vocab", None), 0  # the head is gathered


class Output(NamedTuple):
    """What a forward pass returns. Rows of the per-layer values: MoE layers in order, then MTP modules that ran."""

    hidden_BLD: jax.Array  # after the final norm, cfg.dtype; `logits` turns it into predictions of token t+1
    mtp_hidden: tuple[jax.Array, ...]  # per module (B, L, D) after its norm: predictions of token t+2+i
    aux: dict[
        str, jax.Array
    ]  # "balance", "z" (f32 scalars, means over rows), "load_NE", "dropped_N", ["indices_NTk", "probs_NTE"]


# ---- parameters ----


def param_tree(cfg: ModelConfig) -> dict[str, Any]:
    """The whole model as a tree of `Param` declarations, in the layout cfg.scan_layers asks for."""
    std = cfg.init_std
    n_moe = cfg.n_layers - cfg.n_dense_layers
    moe_block = _block_params(cfg, moe=True)
    tree: dict[str, Any] = {"embed": Param((cfg.vocab_size, cfg.dim), *TABLE, std)}
    if not cfg.tie_embeddings:
        tree["head"] = Param((cfg.vocab_size, cfg.dim), *HEAD, std)
    tree["norm"] = norm_param(cfg.dim)
    for name, count, one in (
        ("dense_layers", cfg.n_dense_layers, _block_params(cfg, moe=False)),
        ("layers", n_moe, moe_block),
        ("mtp", cfg.n_mtp, mtp_params(cfg, std, moe_block)),
    ):
        if count and cfg.scan_layers:
            tree[name] = jax.tree.map(lambda p, n=count: p.stacked(n), one)
        elif count:
            tree[name] = {str(i): one for i in range(count)}
    return tree


def _block_params(cfg: ModelConfig, moe: bool) -> dict[str, Any]:
    std = cfg.init_std
    out_std = std / math.sqrt(2 * cfg.n_layers)  # writes into the residual stream: keeps its variance flat in depth
    block: dict[str, Any] = {
        "attn_norm": norm_param(cfg.dim),
        "attn": attention_params(cfg, std, out_std),
        "ffn_norm": norm_param(cfg.dim),
    }
    if not moe:
        return block | {"ffn": ffn_params(cfg.dim, cfg.dense_dim, std, out_std)}
    block |= {"router": router_params(cfg, std), "experts": expert_params(cfg, std, out_std)}
    if cfg.n_shared_experts:
        block["shared"] = ffn_params(cfg.dim, cfg.n_shared_experts * cfg.expert_dim, std, out_std)
    return block


def abstract_params(cfg: ModelConfig) -> dict[str, Any]:
    """The parameter tree as f32 `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), param_tree(cfg))


def param_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter."""
    return {path: leaf.shape for path, leaf in leaves_by_path(abstract_params(cfg)).items()}


def kept_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The parameter tree as `PartitionSpec`s: how each parameter, and all that has its shape, is kept."""
    return jax.tree.map(lambda p: kept(p.axes, p.fsdp), param_tree(cfg))


def init_params(cfg: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Draws f32 parameters: normal(init_std), outputs into the residual stream divided by sqrt(2N), norms 1, biases 0.

    Each parameter's key comes from its path and layer number, so both layouts start from the same numbers, and adding a
    module leaves the others as they were. Pure: jit it with out_shardings to create parameters in place.
    """

    def draw(path: tuple, param: Param) -> jax.Array:
        names = [str(entry.key) for entry in path]
        path_key = jax.random.fold_in(key, zlib.crc32("/".join(names).encode()))
        if not param.std:
            return jnp.full(param.shape, param.fill, jnp.float32)
        if names[0] not in STACKED:
            return param.std * jax.random.normal(path_key, param.shape, jnp.float32)
        n, *shape = param.shape
        layer_keys = jax.vmap(lambda i: jax.random.fold_in(path_key, i))(jnp.arange(n))
        return param.std * jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(layer_keys)

    params = jax.tree_util.tree_map_with_path(draw, param_tree(dataclasses.replace(cfg, scan_layers=True)))
    if cfg.scan_layers:
        return params
    # Drawn for all layers at once and cut afterwards: a GPU's compiler takes half a second for each kernel that draws.
    return unstack_layers(jax.tree.map(jax.lax.optimization_barrier, params))


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Unrolled layout ("layers/0/...") -> scan layout (layers on axis 0)."""
    out = dict(params)
    for name in STACKED:
        if name in params:
            layers = [params[name][str(i)] for i in range(len(params[name]))]
            out[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return out


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Scan layout (layers on axis 0) -> unrolled layout ("layers/0/...")."""
    out = dict(params)
    for name in STACKED:
        if name in params:
            count = jax.tree.leaves(params[name])[0].shape[0]
            out[name] = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(count)}
    return out


# ---- forward pass ----


def forward(
    params: dict[str, Any],
    cfg: ModelConfig,
    tokens_BL: jax.Array,
    *,
    positions_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    mtp_tokens: jax.Array | None = None,
    train: bool,
    groups: int = 1,
    cache: CacheType | None = None,
    choices_NTk: jax.Array | None = None,
    return_routing: bool = False,
) -> Output:
    """Runs the trunk and, when their inputs are given, the MTP modules.

    Args:
      params: nested dict in the layout of cfg.scan_layers; quantized weights arrive already decoded.
      tokens_BL: int token ids.
      positions_BL: int rotary positions; None counts 0..L-1 along each row.
      segments_BL: int document ids; attention stays inside a document. None means one document per row.
      mtp_tokens: int (n_mtp, B, L), [i][:, t] is token t+1+i, the input of module i; None skips the modules.
      train: experts run as cfg.experts; otherwise as cfg.eval_experts, which drops no token.
      groups: equal groups of tokens dispatched to experts on their own; a multiple of the devices that split the batch.
      cache: attention reads keys and values as that type of cache stores them, as when the tokens are decoded one by
        one (`decode`); static under jit. None: as they are.
      choices_NTk: int32 experts that tokens are sent to, for every row of "load_NE"; their weights are still the
        token's own scores. None: each router chooses.
      return_routing: adds to aux, for every row of "load_NE", "indices_NTk", the chosen experts, and "probs_NTE", the
        router's scores normalised to sum 1 (f32).

    Returns:
      `Output`; aux["load_NE"] is the share of assignments each expert got (rows sum to 1), aux["dropped_N"] the share
      of assignments that found no room, both f32.

    Raises:
      UserError: heads of cfg.head_dim do not fit the cache type.
    """
    B, L = tokens_BL.shape
    dtype = jnp.dtype(cfg.dtype)
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    rope = rope_angles(positions_BL, cfg.head_dim, cfg.rotary_fraction, cfg.rope_theta)
    implementation = cfg.experts if train else eval_experts(cfg, groups)

    def embed(ids_BL: jax.Array) -> jax.Array:
        # The table stays as it is kept: a device looks up its part of D for the sequences of all that share the table,
        # and the parts are exchanged. Gathering the table would move V * D numbers.
        x_BLD = params["embed"][constrain(ids_BL, ("table_batch", None))].astype(dtype)
        return constrain(constrain(x_BLD, ("table_batch", None, "table_embed")), ("batch", None, None))

    def attend(params: dict[str, Any], x_BLD: jax.Array) -> jax.Array:
        return attention(params, cfg, x_BLD, rope, segments_BL, cache)

    def own_block(
        layer: dict[str, Any], x_BLD: jax.Array, choices_Tk: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_BLD = constrain(x_BLD, ("batch", None, None))
        layer = _gather(layer, _block_params(cfg, moe="router" in layer), dtype)
        return block(layer, cfg, x_BLD, attend, implementation, groups, choices_Tk, return_routing)

    if cfg.remat == "full":
        own_block = jax.checkpoint(own_block)
    elif cfg.remat == "dots":  # gathered weights have no name: they are gathered again
        own_block = jax.checkpoint(own_block, policy=jax.checkpoint_policies.save_only_these_names(DOT))
    elif gathers():
        own_block = jax.checkpoint(own_block, policy=not_gathered)
    x_BLD = embed(tokens_BL)
    x_BLD, _ = _run_layers(own_block, params.get("dense_layers"), x_BLD, cfg.scan_layers)
    n_moe = cfg.n_layers - cfg.n_dense_layers
    forced_NTk = None if choices_NTk is None else choices_NTk[:n_moe]
    x_BLD, layers_aux = _run_layers(own_block, params.get("layers"), x_BLD, cfg.scan_layers, forced_NTk)
    hidden_BLD = rms_norm(x_BLD, params["norm"], cfg.norm_eps)

    mtp_hidden: list[jax.Array] = []
    rows = [layers_aux]
    for i, ids_BL in enumerate([] if mtp_tokens is None else mtp_tokens):
        previous_BLD = mtp_hidden[-1] if mtp_hidden else hidden_BLD
        module = _layer(params["mtp"], i, cfg.scan_layers)
        module = module | {"eh_proj": _gather(module["eh_proj"], mtp_params(cfg, cfg.init_std, {})["eh_proj"], dtype)}
        forced_Tk = None if choices_NTk is None else choices_NTk[n_moe + i]
        forced_block = functools.partial(own_block, choices_Tk=forced_Tk)
        module_BLD, module_aux = mtp_module(module, cfg, previous_BLD, embed(ids_BL), forced_block)
        mtp_hidden.append(module_BLD)
        rows.append(jax.tree.map(lambda a: a[None], module_aux))
    return Output(hidden_BLD, tuple(mtp_hidden), _collect_aux(rows))


def _gather(layer: Any, declared: Any, dtype: jnp.dtype) -> Any:
    """Casts matrices to `dtype` and all-gathers them. gate_up is left to `layers.used_halves`."""

    def one(path: tuple[Any, ...], w: jax.Array, param: Param) -> jax.Array:
        name = path_of(path)
        if param.fsdp is None or name.endswith("gate_up"):
            return w
        w = w if name.startswith("router/") else w.astype(dtype)
        return used(w, param.axes, param.fsdp)

    return jax.tree_util.tree_map_with_path(one, layer, declared)


def block(
    layer: dict[str, Any],
    cfg: ModelConfig,
    x_BLD: jax.Array,
    attend: Callable[[dict[str, Any], jax.Array], jax.Array],
    implementation: str,
    groups: int = 1,
    choices_Tk: jax.Array | None = None,
    return_routing: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One decoder layer, (B, L, D) -> (B, L, D), and a MoE layer's row of `Output.aux`.

    attend: (parameters of "attn", normed (B, L, D)) -> (B, L, D). implementation: how experts run, see `moe`.
    """
    x_BLD += attend(layer["attn"], rms_norm(x_BLD, layer["attn_norm"], cfg.norm_eps))
    normed_BLD = rms_norm(x_BLD, layer["ffn_norm"], cfg.norm_eps)
    if "ffn" in layer:
        return x_BLD + ffn(layer["ffn"], normed_BLD, cfg.swiglu_limit), {}
    routing = route(layer["router"], cfg, normed_BLD.reshape(-1, cfg.dim), choices_Tk)
    y_BLD, aux = _moe(layer, cfg, normed_BLD, routing, implementation, groups)
    if return_routing:
        aux |= {"indices_NTk": routing.indices_Tk, "probs_NTE": routing.probs_TE}
    return x_BLD + y_BLD, aux


def head_weight(params: dict[str, Any], cfg: ModelConfig) -> jax.Array:
    """The matrix (V, D) that scores tokens: the head, or the embeddings where they are tied."""
    return params["embed" if cfg.tie_embeddings else "head"]


def head_layout(cfg: ModelConfig) -> tuple[tuple[str | None, ...], int]:
    """How `head_weight` is used and kept: axes and fsdp of its `Param`."""
    return TABLE if cfg.tie_embeddings else HEAD


def used_head(params: dict[str, Any], cfg: ModelConfig) -> jax.Array:
    """`head_weight` in cfg.dtype as it lies where it is used: gathered once, for all chunks of hidden states."""
    return used(head_weight(params, cfg).astype(jnp.dtype(cfg.dtype)), *head_layout(cfg))


def score(hidden: jax.Array, weight_VD: jax.Array) -> jax.Array:
    """(..., D) -> (..., V) f32, accumulated in f32 from operands in the dtype of hidden."""
    return einsum("...d,vd->...v", hidden, weight_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)


def logits(params: dict[str, Any], cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of the next token, (..., D) -> (..., V) f32, from operands in cfg.dtype.

    hidden is `Output.hidden_BLD`, one of `Output.mtp_hidden`, or any chunk of them.
    """
    scores = score(hidden.astype(jnp.dtype(cfg.dtype)), head_weight(params, cfg))
    return constrain(scores, ("batch", None, "vocab")) if scores.ndim == 3 else scores


def _moe(
    layer: dict[str, Any], cfg: ModelConfig, x_BLD: jax.Array, routing: Routing, implementation: str, groups: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Routed experts plus shared experts."""
    x_TD = x_BLD.reshape(-1, cfg.dim)
    experts = layer["experts"]
    y_TD, dropped = expert_ffn(
        x_TD, routing.weights_Tk, routing.indices_Tk, experts["gate_up"], experts["down"], cfg, implementation, groups
    )
    y_BLD = y_TD.reshape(x_BLD.shape)
    if cfg.n_shared_experts:
        y_BLD += ffn(layer["shared"], x_BLD, cfg.swiglu_limit)
    return y_BLD, {"balance": routing.balance, "z": routing.z, "load_NE": routing.load_E, "dropped_N": dropped}


def _run_layers(
    block: Callable,
    layers: dict[str, Any] | None,
    x_BLD: jax.Array,
    scan: bool,
    choices_NTk: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the layers of one kind in order; auxiliary values come back stacked on axis 0."""
    if layers is None:
        return x_BLD, {}
    if scan:
        return jax.lax.scan(lambda x_BLD, layer: block(layer[0], x_BLD, layer[1]), x_BLD, (layers, choices_NTk))
    auxes = []
    for i in range(len(layers)):
        x_BLD, aux = block(layers[str(i)], x_BLD, None if choices_NTk is None else choices_NTk[i])
        auxes.append(aux)
    return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)


def _layer(layers: dict[str, Any], i: int, stacked: bool) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[i], layers) if stacked else layers[str(i)]


def eval_experts(cfg: ModelConfig, groups: int) -> str:
    """What "auto" means: ragged_dot is made for a TPU, but cannot keep groups of tokens on their own devices."""
    if cfg.eval_experts != "auto":
        return cfg.eval_experts
    return "ragged" if jax.default_backend() == "tpu" and groups == 1 else "blocked"


def _collect_aux(rows: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Joins the trunk's rows and the modules'; the two losses become means over rows, whatever the depth."""
    aux = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    return aux | {"balance": jnp.mean(aux["balance"]), "z": jnp.mean(aux["z"])}


# ---- container ----


class Transformer(nnx.Module):
    """The model as an NNX module, for building and looking at it (`nnx.display`, `nnx.tabulate`).

    It only holds arrays; training takes them out once (`pure_params`) and jits the functions above.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.params = nnx.data(jax.tree.map(nnx.Param, init_params(cfg, rngs.params())))

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """(B, L) token ids -> (B, L, V) f32 scores of the next token."""
        params = self.pure_params()
        return logits(params, self.cfg, forward(params, self.cfg, tokens_BL, train=False).hidden_BLD)

    def pure_params(self) -> dict[str, Any]:
        """The parameters as a plain nested dict of arrays."""
        return jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
