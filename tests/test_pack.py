import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from qatmoe.errors import UserError
from qatmoe.quant import fake, pack
from qatmoe.quant.grid import GRIDS

PAIRS = [(grid, kind) for grid in GRIDS.values() for kind in grid.gguf]
IDS = [f"{grid.name}-{kind}" for grid, kind in PAIRS]
BLOCKS = {  # GGUF type -> weights and bytes of a block (ggml-common.h)
    "Q2_0": (64, 18), "TQ2_0": (256, 66), "TQ1_0": (256, 54), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_0": (32, 18),
    "IQ4_NL": (32, 18), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q8_0": (32, 34),
}  # fmt: skip


def weights(seed, shape=(2, 3, 512), scale=0.05):
    """Gaussian weights whose blocks differ in size, with zeros and outliers among them."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * scale * np.exp(rng.normal(size=(*shape[:-1], 1)))
    w[..., :64] *= rng.choice([0.0, 1e-3, 1.0, 50.0])
    return w.astype(np.float32)


@pytest.mark.parametrize(("grid", "kind"), PAIRS, ids=IDS)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), rule=st.sampled_from(["absmax", "search"]))
def test_unpack_of_pack_is_the_identity(grid, kind, seed, rule):
    codes, scale = grid.encode(weights(seed), rule)
    packed = pack.pack(grid, codes, scale, kind)
    assert packed.data.shape == (2, 3, 512 // BLOCKS[kind][0] * BLOCKS[kind][1])
    back_codes, back_scale = pack.unpack(grid, packed)
    np.testing.assert_array_equal(back_codes, codes)
    np.testing.assert_array_equal(back_scale, scale)
    np.testing.assert_array_equal(pack.dequantize(packed), grid.decode(codes, scale))


@pytest.mark.parametrize(("grid", "kind"), PAIRS, ids=IDS)
def test_the_forward_pass_computes_with_the_deployed_numbers(grid, kind):
    """Training's value, jitted, against the decoded bytes: maximum difference 0.0, for a scale as LSQ leaves it."""
    w = weights(7)
    learned = grid.search(w) * np.random.default_rng(1).uniform(0.8, 1.2, size=grid.search(w).shape).astype(np.float32)
    forward = np.asarray(jax.jit(lambda w, s: fake.fake_quant(grid, w, s))(jnp.asarray(w), jnp.asarray(learned)))
    scale = grid.snap(learned)
    packed = pack.pack(grid, grid.nearest(w, scale), scale, kind)
    assert np.max(np.abs(forward - pack.dequantize(packed))) == 0.0
    if grid.bf16_exact:
        assert np.max(np.abs(forward - np.asarray(jnp.asarray(forward, jnp.bfloat16), np.float32))) == 0.0


def test_one_matrix_has_one_scale():
    """NVFP4's scale per matrix has no axis of its own, and the matrix gets none by it."""
    grid = GRIDS["nvfp4"]
    codes, scale = grid.encode(weights(5, (8, 64)), "absmax")
    packed = pack.pack(grid, codes, scale)
    assert isinstance(packed.tensor_scale, np.ndarray) and packed.tensor_scale.shape == ()
    back_codes, back_scale = pack.unpack(grid, packed)
    assert (back_codes.shape, back_scale.shape) == ((8, 64), (8, 4))
    assert pack.dequantize(packed).shape == (8, 64)
    np.testing.assert_array_equal(pack.dequantize(packed), grid.decode(codes, scale))


def gguf_dequantize(kind, data):
    with np.errstate(all="ignore"):
        return quants.dequantize(data, gguf.GGMLQuantizationType[kind])


# PyPI gguf 0.19 does not know Q2_0; its layout is pinned byte by byte below.
KNOWN = [kind for kind in pack.KINDS if kind != "Q2_0"]


@pytest.mark.parametrize("kind", KNOWN)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_every_legal_byte_pattern_decodes_as_gguf_decodes_it(kind, seed):
    data = np.random.default_rng(seed).integers(0, 256, (64, BLOCKS[kind][1]), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, 0] = data[:, 0].clip(0, 254)
    if kind == "NVFP4":
        data[:, :4] &= 127
    np.testing.assert_array_equal(pack.dequantize(pack.Packed(kind, data)), gguf_dequantize(kind, data))


@pytest.mark.parametrize(("grid", "kind"), [p for p in PAIRS if p[1] in KNOWN], ids=lambda v: getattr(v, "name", v))
def test_packed_tensors_read_back_by_gguf(grid, kind):
    w = weights(3)
    codes, scale = grid.encode(w, "search")
    packed = pack.pack(grid, codes, scale, kind)
    there = gguf_dequantize(kind, packed.data)
    if packed.tensor_scale is not None:
        there = there * packed.tensor_scale[:, None, None]
    assert np.max(np.abs(there - grid.decode(codes, scale))) == 0.0


def test_q2_0_bytes():
    """float16 d, then weight j in byte j/4 at bits 2(j%4); value (q - 1) d (docs/formats.md)."""
    data = np.zeros((1, 18), np.uint8)
    data[0, :2] = np.frombuffer(np.float16(-0.75).tobytes(), np.uint8)
    data[0, 2] = 0b11_10_01_00  # weights 0 to 3: codes 0, 1, 2, 3
    data[0, 17] = 0b00_00_00_11  # weight 60: code 3
    values = pack.dequantize(pack.Packed("Q2_0", data))[0]
    assert values[:4].tolist() == [0.75, 0.0, -0.75, -1.5]
    assert values[60] == -1.5
    assert values[61] == 0.75
    codes, scale = pack.unpack(GRIDS["q2_0"], pack.Packed("Q2_0", data))
    assert pack.pack(GRIDS["q2_0"], codes, scale).data.tobytes() == data.tobytes()


@pytest.mark.parametrize("d", [0, 1, 0x0400, 0x3C00, 0x7BFF, 0x8000, 0xBC00, 0x7C00, 0x7E00])
def test_q2_0_decodes_any_float16_scale(d):
    data = np.concatenate([np.array([[d & 255, d >> 8]], np.uint8), np.full((1, 16), 0b11100100, np.uint8)], axis=1)
    scale = np.array([d], np.uint16).view(np.float16).astype(np.float32)[0]
    with np.errstate(invalid="ignore"):
        expected = np.tile(np.array([-1, 0, 1, 2], np.float32) * scale, 16)
    np.testing.assert_array_equal(pack.dequantize(pack.Packed("Q2_0", data))[0], expected)


def test_tq2_0_code_3_decodes_to_two_d_but_is_not_ternary():
    data = np.zeros((1, 66), np.uint8)
    data[0, 0] = 3
    data[0, 64:] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    packed = pack.Packed("TQ2_0", data)
    assert pack.dequantize(packed)[0, :2].tolist() == [2.0, -1.0]
    with pytest.raises(UserError, match="not on grid ternary_256"):
        pack.unpack(GRIDS["ternary_256"], packed)


def test_two_bits_of_four_levels_fit_two_twos_complement_bits_by_a_negative_scale():
    """{-2,-1,0,1} s, the int2 of other tools, is Q2_0 with d = -s."""
    w = np.tile(np.array([-2, -1, 0, 1], np.float32) * np.float32(0.03125), 16)[None]
    codes, scale = GRIDS["q2_0"].encode(w)
    np.testing.assert_array_equal(pack.dequantize(pack.pack(GRIDS["q2_0"], codes, scale)), w)


def test_scales_that_differ_are_not_merged():
    codes, scale = GRIDS["ternary"].encode(weights(0))
    packed = pack.pack(GRIDS["ternary"], codes, scale)
    with pytest.raises(UserError, match="more than one scale per 256"):
        pack.unpack(GRIDS["ternary_256"], packed)


def test_what_cannot_be_packed_is_refused_by_name():
    grid = GRIDS["q4_0"]
    codes, scale = grid.encode(weights(0))
    with pytest.raises(UserError, match="no exact form in 'Q2_K'"):
        pack.pack(grid, codes, scale, "Q2_K")
    with pytest.raises(UserError, match="is not on grid q4_0: snap"):
        pack.pack(grid, codes, scale * np.float32(1.0001))
    with pytest.raises(UserError, match="not finite"):
        pack.pack(grid, codes, scale * np.float32(np.nan))
    with pytest.raises(UserError, match="do not fit codes"):
        pack.pack(grid, codes, scale[..., :-1])
    with pytest.raises(UserError, match=r"codes 0\.\.15; got 31"):
        pack.pack(grid, codes + 16, scale)
    with pytest.raises(UserError, match="whole blocks of 32"):
        pack.pack(grid, codes[..., :31], scale)
    with pytest.raises(UserError, match="whole blocks of 18 bytes"):
        pack.unpack(grid, pack.Packed("Q4_0", np.zeros((2, 17), np.uint8)))
    with pytest.raises(UserError, match="unknown GGUF type"):
        pack.dequantize(pack.Packed("Q9_9", np.zeros((2, 18), np.uint8)))
    for name in ("mxfp4", "nvfp4", "q2_k", "q3_k"):
        codes, scale = GRIDS[name].encode(weights(0))
        with pytest.raises(UserError, match="snap"):
            pack.pack(GRIDS[name], codes, scale * np.float32(1.17))
    with pytest.raises(UserError, match="not on grid q2_k"):
        pack.unpack(GRIDS["q2_k"], pack.Packed("Q2_K", np.random.default_rng(0).integers(0, 60, (1, 84), np.uint8)))
