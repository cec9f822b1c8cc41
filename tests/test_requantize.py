import ctypes
import dataclasses
import re

import gguf
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest

from qatmoe import gptq, requantize
from qatmoe.config import ModelConfig
from qatmoe.convert import llama
from qatmoe.errors import UserError
from qatmoe.model import transformer
from qatmoe.model.attention import attention
from qatmoe.model.layers import rms_norm, rope_angles
from qatmoe.model.mtp import mtp_input
from qatmoe.model.router import route
from qatmoe.quant.grid import GRIDS
from qatmoe.requantize import Format
from qatmoe.tree import leaves_by_path, path_of

FORMATS = {(f.name, f.rule): f for f in requantize.formats()}
# libggml searches 1 to 10 s for the neighbours in their codebooks, once per process
SLOW_TABLES = ("IQ1_S", "IQ1_M", "IQ2_S")
RNG = np.random.default_rng(0)
W = (RNG.standard_normal((2, 8, 256)) * 0.05).astype(np.float32)  # two matrices of eight rows
COLUMNS = RNG.gamma(1.0, 1.0, (2, 256)).astype(np.float32)
PARAMS = jax.tree.map(
    jnp.asarray, {"layers": {"0": {"experts": {"gate_up": W}, "norm": np.ones(256, np.float32)}}, "embed": W[0]}
)
PATH = "layers/0/experts/gate_up"
EXPERTS = "blk.0.ffn_gate_exps.weight"


def rounded(name, rule, w=W, importance=None):
    new, joined = requantize.requantize({"w": jnp.asarray(w)}, ["w"], FORMATS[name, rule], importance)
    return np.asarray(new["w"]), joined


def error(y, w=W, columns=None):
    weight = 1.0 if columns is None else columns[:, None, :]
    return float(np.sqrt((weight * (y - w) ** 2).sum() / (weight * w**2).sum()))


# ---- the list --------------------------------------------------------------------------------------------------------


def test_formats_are_every_grid_and_every_type_once():
    assert len(FORMATS) == len(requantize.formats())
    for own in ("absmax", "search", "gptq"):
        assert {name for name, rule in FORMATS if rule == own} == set(GRIDS)
    assert {name for name, rule in FORMATS if rule in ("stock", "imatrix")} == {*requantize.TYPES, "BF16", "F16"}
    assert [name for name in requantize.TYPES if (name, "stock") not in FORMATS] == ["IQ1_S", "IQ2_XXS", "IQ2_XS"]
    assert {f.group for f in FORMATS.values() if f.rule in ("search", "gptq")} == {"grid"}
    assert {f.group for f in FORMATS.values() if f.rule == "stock"} == {"ggml"}


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Q1_0", 1.125), ("IQ1_S", 1.5625), ("Q2_K", 2.625), ("MXFP4", 4.25), ("Q8_0", 8.5), ("BF16", 16)],
)
def test_bits_per_weight(name, bits):
    """Bytes of a block over its weights, from the table of docs/formats.md."""
    assert {f.bits for (n, _), f in FORMATS.items() if n == name} == {bits}


def test_without_llama_cpp_there_are_the_grids_and_the_floats(monkeypatch):
    monkeypatch.setattr(llama, "installed", lambda: "")
    assert {f.name for f in requantize.formats()} == {*GRIDS, "BF16", "F16"}


# ---- against other quantizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "BF16", "F16"])
def test_types_that_pypi_gguf_can_quantize(kind):
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(W, number), number)
    np.testing.assert_array_equal(rounded(kind, "stock")[0], expected)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "NVFP4"])
def test_types_that_pypi_gguf_can_only_decode(kind):
    data = llama.quantize(kind, W[0])
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(rounded(kind, "stock")[0][0], expected)


@pytest.fixture(scope="module")
def expert_file(tmp_path_factory):
    """W as the experts of a GGUF file that llama.cpp's program quantizes; it reads nothing else of the model."""
    path = tmp_path_factory.mktemp("llama") / "experts.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_context_length(8)
    writer.add_head_count(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_vocab_size(8)
    writer.add_tensor(EXPERTS, W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "rule"),
    [("Q4_0", "stock"), ("Q2_K", "stock"), ("Q2_K", "imatrix"), ("IQ2_XXS", "imatrix"), ("IQ3_S", "imatrix"),
     ("IQ4_NL", "imatrix"), ("TQ2_0", "stock"), ("Q1_0", "stock")],
)  # fmt: skip
def test_it_is_what_llama_quantize_pure_writes(name, rule, expert_file, tmp_path):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.pure, params.nthread = True, 1
    if rule == "imatrix":
        entries = (llama_cpp.llama_cpp.llama_model_imatrix_data * 2)()  # ends with a nameless one
        entries[0].name, entries[0].size = EXPERTS.encode(), COLUMNS.size
        entries[0].data = COLUMNS.ctypes.data_as(type(entries[0].data))
        params.imatrix = entries
    assert not llama_cpp.llama_model_quantize(bytes(expert_file), bytes(tmp_path / "out"), ctypes.byref(params))
    (tensor,) = gguf.GGUFReader(tmp_path / "out").tensors
    assert tensor.tensor_type.name == name
    expected = llama.dequantize(name, np.asarray(tensor.data).reshape(2, 8, -1))
    np.testing.assert_array_equal(rounded(name, rule, importance={"w": COLUMNS})[0], expected)


def test_q1_0_by_hand():
    """Sign times the mean size of 128 weights, in float16."""
    blocks = W.reshape(-1, 128)
    d = abs(blocks).mean(-1, keepdims=True).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(rounded("Q1_0", "stock")[0], np.where(blocks >= 0, d, -d).reshape(W.shape), rtol=1e-3)


def test_q2_0_by_hand():
    """Round to nearest at the largest of 64 weights, in float16."""
    blocks = W.reshape(-1, 64)
    d = abs(blocks).max(-1, keepdims=True)
    expected = np.rint(blocks / d) * d.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rounded("Q2_0", "stock")[0], expected.reshape(W.shape))


def test_grids_round_as_in_training():
    for grid in (GRIDS["q2_0"], GRIDS["nvfp4"]):
        for rule in ("absmax", "search"):
            expected = grid.decode(*grid.encode(jnp.asarray(W), rule))
            np.testing.assert_array_equal(rounded(grid.name, rule)[0], expected)


def test_mxfp4_is_the_same_by_both_roads():
    np.testing.assert_array_equal(rounded("mxfp4", "absmax")[0], rounded("MXFP4", "stock")[0])


# ---- error -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
        ("Q4_0", "Q5_0", "Q8_0"),
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        ("Q1_0", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
        ("NVFP4", "Q5_0"),
    ],
)
def test_error_falls_with_bits(family):
    errors = [error(rounded(kind, "stock")[0]) for kind in family]
    assert errors == sorted(errors, reverse=True)


def test_error_falls_with_bits_under_an_importance_matrix():
    kinds = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", "Q4_K", "Q5_K", "Q6_K")
    errors = [error(rounded(kind, "imatrix", importance={"w": COLUMNS})[0], columns=COLUMNS) for kind in kinds]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("grid", GRIDS)
def test_search_is_no_worse_than_absmax(grid):
    assert error(rounded(grid, "search")[0]) < error(rounded(grid, "absmax")[0])


def test_nvfp4_of_libggml_has_no_factor_per_tensor():
    """What the module says of small weights; the grid has the factor."""
    small = W / 16
    assert error(rounded("NVFP4", "stock", small)[0], small) > 2 * error(rounded("NVFP4", "stock")[0])
    assert error(rounded("nvfp4", "absmax", small)[0], small) < 1.05 * error(rounded("nvfp4", "absmax")[0])


# ---- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in requantize.TYPES if k not in SLOW_TABLES])
def test_importance_changes_what_it_should(kind):
    if (kind, "imatrix") not in FORMATS:  # listed as ignoring it
        with_it = llama.quantize(kind, W[0], COLUMNS[0])
        np.testing.assert_array_equal(with_it, llama.quantize(kind, W[0]))
        return
    columns = {"w": COLUMNS}
    fine = rounded(kind, "imatrix", importance=columns)[0]
    flat = {"w": np.ones_like(COLUMNS)}
    plain = rounded(kind, "stock" if (kind, "stock") in FORMATS else "imatrix", importance=flat)[0]
    assert error(fine, columns=COLUMNS) < error(plain, columns=COLUMNS)


def test_each_matrix_has_its_own_importance():
    """The second matrix's does not reach the first; one row of importance holds for all matrices."""
    one = rounded("Q2_K", "imatrix", importance={"w": COLUMNS})[0]
    other = rounded("Q2_K", "imatrix", importance={"w": COLUMNS[[0, 0]]})[0]
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1] != other[1]).any()
    np.testing.assert_array_equal(rounded("Q2_K", "imatrix", importance={"w": COLUMNS[0]})[0], other)


def test_rule_imatrix_needs_importance():
    with pytest.raises(UserError, match="w: IQ2_XXS under rule imatrix needs its importance"):
        rounded("IQ2_XXS", "imatrix", importance={"other": COLUMNS})
    with pytest.raises(UserError, match="w as Q2_K: .*256 finite numbers"):
        rounded("Q2_K", "imatrix", importance={"w": -COLUMNS})


@pytest.mark.parametrize("kind", SLOW_TABLES)
def test_types_whose_tables_take_long(kind):
    y, joined = rounded(kind, "imatrix", importance={"w": COLUMNS})
    flat = rounded(kind, "imatrix", importance={"w": np.ones_like(COLUMNS)})[0]
    assert error(y, columns=COLUMNS) < error(flat, columns=COLUMNS) < 0.62  # of one bit at the best scale: 0.603
    assert joined == 1
    number = gguf.GGMLQuantizationType[kind]
    np.testing.assert_array_equal(y[0], gguf.quants.dequantize(llama.quantize(kind, W[0], COLUMNS[0]), number))


# ---- joined rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q2_K", "q2_k", "q3_k"])
def test_short_rows_are_joined(name):
    """Rows of 64 in blocks of 256: as if four rows of a matrix were one."""
    rule = "stock" if name == "Q2_K" else "search"
    y, joined = rounded(name, rule, W.reshape(2, 32, 64))
    assert joined == 4
    np.testing.assert_array_equal(y, rounded(name, rule)[0].reshape(2, 32, 64))


def test_joined_rows_carry_their_importance():
    columns_64 = COLUMNS[:, :64]
    y, joined = rounded("Q4_K", "imatrix", W.reshape(2, 32, 64), {"w": columns_64})
    assert joined == 4
    as_one = rounded("Q4_K", "imatrix", importance={"w": np.concatenate([columns_64] * 4, axis=-1)})[0]
    np.testing.assert_array_equal(y, as_one.reshape(2, 32, 64))


def test_rows_of_96_are_joined_by_eight():
    """lcm(96, 256) = 768 = 8 rows."""
    w = W.reshape(-1)[: 16 * 96].reshape(1, 16, 96)
    y, joined = rounded("Q6_K", "stock", w)
    assert joined == 8
    np.testing.assert_array_equal(y.reshape(2, 768), rounded("Q6_K", "stock", w.reshape(1, 2, 768))[0][0])
    assert rounded("Q8_0", "stock", w)[1] == 1


def test_rows_that_cannot_be_joined():
    w = W.reshape(-1)[: 6 * 64].reshape(1, 6, 64)
    fmt = FORMATS["Q2_K", "stock"]
    reason = requantize.misfit({"w": w}, ["w"], fmt)
    assert reason.startswith("w: Q2_K needs rows of a multiple of 256 weights; 4 rows of 64") and "the 6 rows" in reason
    with pytest.raises(UserError, match="w: Q2_K needs rows"):
        requantize.requantize({"w": w}, ["w"], fmt)
    assert requantize.misfit({"w": w}, ["w"], FORMATS["Q1_0", "stock"]) == ""


# ---- trees -----------------------------------------------------------------------------------------------------------


def test_only_the_named_tensors_change():
    before = PARAMS["layers"]["0"]["experts"]["gate_up"]
    new, joined = requantize.requantize(PARAMS, [PATH], FORMATS["Q4_0", "stock"])
    assert joined == 1
    layer = new["layers"]["0"]
    assert layer["norm"] is PARAMS["layers"]["0"]["norm"] and new["embed"] is PARAMS["embed"]
    assert layer["experts"]["gate_up"].dtype == jnp.float32
    np.testing.assert_array_equal(layer["experts"]["gate_up"], rounded("Q4_0", "stock")[0])
    assert PARAMS["layers"]["0"]["experts"]["gate_up"] is before


def test_the_same_again_and_in_any_number_of_threads(monkeypatch):
    first = rounded("IQ3_S", "imatrix", importance={"w": COLUMNS})[0]
    monkeypatch.setattr(requantize, "THREADS", 1)
    monkeypatch.setattr(requantize, "_CHUNK", 3 * 256)  # three rows at a time
    np.testing.assert_array_equal(first, rounded("IQ3_S", "imatrix", importance={"w": COLUMNS})[0])


def test_what_cannot_be_rounded():
    with pytest.raises(UserError, match="no matrix 'layers/experts/gate_up'"):
        requantize.requantize(PARAMS, ["layers/experts/gate_up"], FORMATS["Q4_0", "stock"])
    with pytest.raises(UserError, match="no matrix 'layers/0/norm'"):
        requantize.requantize(PARAMS, ["layers/0/norm"], FORMATS["Q4_0", "stock"])
    for value, names in ((np.nan, ("q2_0", "Q2_K")), (1e6, ("Q2_K",))):
        broken = W.copy()
        broken[1, 2, 3] = value
        for name in names:
            with pytest.raises(UserError, match=f"w as {name}: a weight is not"):
                rounded(name, "stock" if name.isupper() else "absmax", broken)


def test_f16_refuses_what_it_would_make_inf():
    """And says which rows of an audit to leave out: of llama.cpp's types too, which have the same limit."""
    large = W.copy()
    large[1, 2, 3] = -65504
    assert rounded("F16", "stock", large)[0].min() == -65504
    large[1, 2, 3] = -70000
    assert np.isfinite(rounded("BF16", "stock", large)[0]).all()
    with pytest.raises(UserError, match="^w as F16: a weight is beyond 65504.*--rows=") as error:
        rounded("F16", "stock", large)
    (pattern,) = re.findall("--rows='(.*)'", str(error.value))
    kept = [f for f in FORMATS.values() if re.search(pattern, f"control/{f.name}/{f.rule}")]
    assert {f.name for f in kept} == set(GRIDS)


def test_zeros_stay_zeros():
    for name in ("q2_0", "Q2_K", "IQ3_XXS", "Q4_0", "MXFP4"):
        rule = "absmax" if name == "q2_0" else "stock"
        np.testing.assert_array_equal(rounded(name, rule, np.zeros_like(W))[0], 0.0)


# ---- importance of a model -------------------------------------------------------------------------------------------

CFG = ModelConfig(
    vocab_size=40, dim=16, n_layers=3, n_dense_layers=1, dense_dim=24, n_heads=2, n_kv_heads=1, head_dim=8,
    n_experts=4, top_k=2, expert_dim=8, n_shared_experts=1, n_mtp=1, init_std=0.5, scan_layers=False, dtype="float32",
)  # fmt: skip
WINDOWS = np.random.default_rng(1).integers(0, 40, (2, 8))


def by_hand(params, cfg, windows):
    """{path: [inputs, each (I,)]}, of experts {path: {expert: [inputs]}}: one token at a time."""
    seen = {}

    def look(path, rows):
        seen.setdefault(path, []).extend(np.asarray(rows, np.float64))

    def net(name, p, x):
        x, gate_up, down = (np.asarray(a, np.float64) for a in (x, p["gate_up"], p["down"]))
        gate, up = np.split(x @ gate_up.T, 2, axis=-1)
        hidden = gate / (1 + np.exp(-gate)) * up
        look(f"{name}/gate_up", x)
        look(f"{name}/down", hidden)
        return hidden @ down.T

    def block(name, p, x_LD):
        rope = rope_angles(jnp.arange(len(x_LD))[None], cfg.head_dim, cfg.rotary_fraction, cfg.rope_theta)
        normed = rms_norm(x_LD, p["attn_norm"], cfg.norm_eps)
        for n in "qkv":
            look(f"{name}/attn/{n}", normed)
        mixed = attention(p["attn"] | {"o": jnp.eye(cfg.dim)}, cfg, normed[None], rope, None)[0]  # H * Dh = D here
        look(f"{name}/attn/o", mixed)
        x_LD = x_LD + mixed @ p["attn"]["o"].T
        normed = rms_norm(x_LD, p["ffn_norm"], cfg.norm_eps)
        if "ffn" in p:
            return x_LD + net(f"{name}/ffn", p["ffn"], normed).astype(np.float32)
        y_LD = net(f"{name}/shared", p["shared"], normed)
        routing = route(p["router"], cfg, normed)
        weights_Tk, indices_Tk, normed = (np.asarray(a) for a in (routing.weights_Tk, routing.indices_Tk, normed))
        for t in range(len(normed)):
            for weight, e in zip(weights_Tk[t], indices_Tk[t], strict=True):
                expert = {n: np.asarray(p["experts"][n])[e] for n in ("gate_up", "down")}
                y_LD[t] += weight * net(f"{name}/experts@{e}", expert, normed[t : t + 1])[0]
        return x_LD + y_LD.astype(np.float32)

    for tokens in windows:
        x = params["embed"][tokens]
        for name in ("dense_layers/0", "layers/0", "layers/1"):
            stack, i = name.split("/")
            x = block(name, params[stack][i], x)
        hidden = rms_norm(x, params["norm"], cfg.norm_eps)
        look("head", hidden)
        module = params["mtp"]["0"]
        block("mtp/0/block", module["block"], mtp_input(module, cfg, hidden[:-1], params["embed"][tokens[1:]]))
    return seen


@pytest.fixture(scope="module")
def model(quick_compilation):
    params = jax.jit(transformer.init_params, static_argnums=0)(CFG, jax.random.key(0))
    # A selection bias leaves expert 3 of the first MoE layer without tokens.
    cfg = dataclasses.replace(CFG, router_bias=True)
    for layer in (*params["layers"].values(), params["mtp"]["0"]["block"]):
        layer["router"]["bias"] = jnp.zeros(4)
    params["layers"]["0"]["router"]["bias"] = jnp.asarray([0.0, 0.0, 0.0, -10.0])
    return params, cfg


def test_importance_is_the_mean_square_of_what_each_matmul_sees(model):
    params, cfg = model
    seen = by_hand(params, cfg, WINDOWS)
    paths = [p for p in seen if "@" not in p] + [
        f"{n}/experts/{m}" for n in ("layers/0", "layers/1", "mtp/0/block") for m in ("gate_up", "down")
    ]
    found = requantize.importance(params, cfg, WINDOWS, paths)
    assert list(found) == paths
    for path in paths:
        if "/experts/" in path:
            layer, _, matrix = path.rsplit("/", 2)
            rows = [seen.get(f"{layer}/experts@{e}/{matrix}", np.ones((1, found[path].shape[-1]))) for e in range(4)]
            expected = np.stack([np.mean(np.square(r), axis=0) for r in rows])
        else:
            expected = np.mean(np.square(seen[path]), axis=0)
        np.testing.assert_allclose(found[path], expected, rtol=2e-4, atol=1e-6, err_msg=path)
    assert "layers/0/experts@3/gate_up" not in seen
    np.testing.assert_array_equal(found["layers/0/experts/down"][3], 1.0)


def test_importance_of_embeddings(model):
    params, cfg = model
    np.testing.assert_array_equal(requantize.importance(params, cfg, WINDOWS[:1], ["embed"])["embed"], np.ones(16))
    head = requantize.importance(params, cfg, WINDOWS[:1], ["head"])["head"]
    tied = {k: v for k, v in params.items() if k != "head"}
    shared = requantize.importance(tied, dataclasses.replace(cfg, tie_embeddings=True), WINDOWS[:1], ["embed"])
    np.testing.assert_array_equal(shared["embed"], head)
    with pytest.raises(UserError, match="layers/0/router/weight: its inputs are not measured"):
        requantize.importance(params, cfg, WINDOWS[:1], ["layers/0/router/weight"])


def test_a_model_rounded_with_its_own_importance(model):
    """End to end on rows of 16 and 8: joined to blocks of 32."""
    params, cfg = model
    paths = ["layers/0/experts/gate_up", "layers/0/experts/down", "dense_layers/0/ffn/down"]
    found = requantize.importance(params, cfg, WINDOWS, paths)
    new, joined = requantize.requantize(params, paths, FORMATS["Q4_0", "imatrix"], found)
    assert joined == 4
    w, y = params["layers"]["0"]["experts"]["down"], new["layers"]["0"]["experts"]["down"]
    assert w.shape == y.shape and 0 < error(np.asarray(y), np.asarray(w)) < 0.15


# ---- gptq of a model -------------------------------------------------------------------------------------------------


def test_gptq_sees_the_inputs_that_rounded_layers_make(model):
    params, cfg = model
    grid = dataclasses.replace(GRIDS["q4_0"], block=8, superblock=8)
    layers = ["dense_layers/0/ffn", "layers/0/shared", "layers/0/experts", "layers/1/experts", "mtp/0/block/experts"]
    paths = [f"{layer}/{matrix}" for layer in layers for matrix in ("gate_up", "down")]
    outside = ["embed", "head"]
    new = gptq.requantize(params, cfg, [*paths, *outside], grid, WINDOWS)
    before, after = leaves_by_path(params), leaves_by_path(new)
    assert {path for path in before if after[path] is not before[path]} == {*paths, *outside}
    for path in outside:
        np.testing.assert_array_equal(after[path], grid.quantize(before[path], grid.search(before[path])))
    mixed = _put(params, {path: after[path] for path in outside})
    for layer in ("dense_layers/0", "layers/0", "layers/1", "mtp/0/block"):
        seen = by_hand(mixed, cfg, WINDOWS)  # earlier layers are rounded, this one is not yet
        for path in (p for p in paths if p.startswith(layer)):
            w = before[path]
            own = [seen.get(p, np.zeros((1, w.shape[-1]))) for p in _matrices_of(path, w)]
            products = jnp.asarray(np.stack([np.transpose(x) @ np.asarray(x) for x in own]), jnp.float32)
            expected = gptq.solve(grid, w, products if w.ndim == 3 else products[0], "w")
            assert np.mean(np.asarray(after[path]) == np.asarray(expected)) > 0.98, path
            assert np.any(np.asarray(after[path]) != grid.quantize(w, grid.search(w))), path
        mixed = _put(mixed, {p: after[p] for p in paths if p.startswith(layer)})


def test_gptq_names_what_it_cannot_round(model):
    params, cfg = model
    grid, path = dataclasses.replace(GRIDS["q4_0"], block=8, superblock=8), "mtp/0/block/experts/down"
    broken = _put(params, {path: leaves_by_path(params)[path].at[0, 0, 0].set(np.nan)})
    with pytest.raises(UserError, match=f"GPTQ of {path}: "):
        gptq.requantize(broken, cfg, ["layers/0/experts/down", path], grid, WINDOWS)


def _put(tree, leaves):
    """The tree with other leaves on some paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_of(path), leaf), tree)


def _matrices_of(path, w):
    """Names by which `by_hand` knows the matrices of a weight."""
    layer, matrix = path.rsplit("/", 1)
    return [f"{layer}@{e}/{matrix}" for e in range(len(w))] if w.ndim == 3 else [path]


def test_gptq_joins_no_rows():
    fault = requantize.misfit({"w": W[..., :32]}, ["w"], FORMATS["q2_0", "gptq"])
    assert fault == "w: q2_0 under rule gptq needs rows of a multiple of 64 weights, not 32"
    assert not requantize.misfit({"w": W[..., :32]}, ["w"], FORMATS["q2_0", "search"])


def test_format_is_hashable():
    assert len({Format("Q4_0", "stock", 4.5, 32), Format("Q4_0", "stock", 4.5, 32)}) == 1
