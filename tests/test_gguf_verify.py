"""What verification finds in damaged GGUF files, and what it says that it did not check."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_gguf_model import GLM, WINDOW, check, export, make_run, quant_of

from qatmoe.convert import gguf, llama, names, verify
from qatmoe.convert.verify import Report, verify_gguf
from qatmoe.convert.weights import Branch

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def sound(tmp_path_factory, small_tokenizer):
    """A run on Q2_0 and its file."""
    folder = tmp_path_factory.mktemp("sound")
    model = dataclasses.replace(GLM, dim=64, expert_dim=64, n_layers=2, n_dense_layers=0, routed_scale=2.5)
    make_run(folder / "run", small_tokenizer, model, quant_of(experts="q2_0"))
    check(export(folder / "run", folder / "m.gguf")[0])
    return folder


def verified(run: Path, path: Path) -> Report:
    with Branch(run, rest="F32") as branch:
        return verify_gguf(branch, path, "glm4moe", WINDOW)


def damaged(sound: Path, out: Path, name: str, change) -> Report:
    """The report on a copy of which `change` edited the bytes of one tensor."""
    with gguf.File(sound / "m.gguf") as file:
        start, size = file.offset(name), file.data(name).nbytes
    data = bytearray((sound / "m.gguf").read_bytes())
    data[start : start + size] = change(data[start : start + size])
    out.write_bytes(data)
    return verified(sound / "run", out)


def rewritten(sound: Path, out: Path, fields=None, rename=None) -> Report:
    """The report on a copy with other fields or names of tensors."""
    with gguf.File(sound / "m.gguf") as file:
        old = {(rename or {}).get(name, name): name for name in file.tensors}
        tensors = {new: file.tensors[name] for new, name in old.items()}
        gguf.write(out, {**file.fields, **(fields or {})}, tensors, lambda n: file.data(old[n]))
    return verified(sound / "run", out)


def test_one_byte_of_codes(sound, tmp_path):
    name = "blk.1.ffn_down_exps.weight"

    def flip(data):
        data[1000] ^= 0x55  # 1000 is 55 blocks of 18 bytes and 10
        return data

    report = damaged(sound, tmp_path / "m.gguf", name, flip)
    assert not report.ok
    assert f"L0: {name} holds other bytes than training packs" in report.faults
    for who in ("qatmoe", "libggml"):
        assert any(f.startswith(f"L1: {name} decoded by {who}") for f in report.faults)
    [row] = [row for row in report.rows if row.kind == "Q2_0"]
    assert row.same_bytes == row.tensors - 1
    assert min(row.max_diff.values()) > 0
    assert "FAILED: L0" in report.text()


def test_a_scale_that_is_nan(sound, tmp_path):
    report = damaged(sound, tmp_path / "m.gguf", "blk.0.ffn_up_exps.weight", lambda d: b"\xff\x7f" + d[2:])
    assert not report.ok
    [row] = [row for row in report.rows if row.kind == "Q2_0"]
    assert all(diff != 0.0 for diff in row.max_diff.values()), report.text()


def test_one_norm(sound, tmp_path):
    def change(data):
        values = np.frombuffer(data, "<f4").copy()
        values[7] += 0.5
        return values.tobytes()

    report = damaged(sound, tmp_path / "m.gguf", "blk.1.post_attention_norm.weight", change)
    assert [f.split()[0] for f in report.faults[:2]] == ["L0:", "L1:"]
    assert "blk.1.post_attention_norm.weight" in report.faults[0]


def test_a_tensor_under_another_name(sound, tmp_path):
    report = rewritten(sound, tmp_path / "m.gguf", rename={"blk.1.attn_q.weight": "blk.1.attn_p.weight"})
    assert not report.ok
    assert "blk.1.attn_p.weight" in report.faults[0] and "blk.1.attn_q.weight" in report.faults[0]


@pytest.mark.parametrize(
    ("key", "value"), [("rope.freq_base", 50.0), ("expert_weights_scale", 1.0), ("expert_gating_func", 1)]
)
def test_a_wrong_field_shows_in_the_logits(key, value, sound, tmp_path):
    field = gguf.Field("float32" if isinstance(value, float) else "uint32", value)
    report = rewritten(sound, tmp_path / "m.gguf", fields={f"glm4moe.{key}": field})
    assert report.faults and all(f.startswith("L2: ") for f in report.faults)


@pytest.fixture(params=["chaotic", "steady"])
def noise(request, monkeypatch):
    """Rounded logits with noise: as in a deep pretrained model another one at every call, or always the same."""
    rng, logits = np.random.default_rng(0), verify.llama_numerics.logits

    def noisy(weights, kinds, model, tokens_L):
        ours_LV = np.asarray(logits(weights, kinds, model, tokens_L))
        if set(kinds.values()) == {"F32"}:
            return ours_LV
        draws = rng if request.param == "chaotic" else np.random.default_rng(1)
        return ours_LV + draws.normal(0, 0.2, ours_LV.shape).astype(np.float32)

    monkeypatch.setattr(verify.llama_numerics, "logits", noisy)
    return request.param


def test_where_rounding_is_chaotic_logits_are_compared_in_float32(noise, sound):
    """What llama.cpp's differ by is no fault there, and is one where nothing else moves the logits as much."""
    report = verified(sound / "run", sound / "m.gguf")
    rounded = list(report.l2.values())[1]
    assert rounded["kld"] > verify.MAX_KLD
    said = [what for what in report.unchecked if what.startswith("L2 with rounded activations: llama.cpp's logits")]
    if noise == "chaotic":
        assert report.ok and len(said) == 1 and "compared in float32 instead" in said[0]
        assert report.l2["in float32"]["max_diff"] < verify.MAX_DIFF_F32
        assert "L2 against JAX in float32: mean KLD" in report.text()
    else:
        assert [f.split(";")[0] for f in report.faults] == [f"L2: {verify._said(rounded)}"]
        assert not said and "in float32" not in report.l2
    assert sorted(path.name for path in sound.iterdir()) == ["m.gguf", "run"]


@pytest.mark.parametrize("noise", ["chaotic"], indirect=True)
def test_chaos_hides_no_wrong_field(noise, sound, tmp_path):
    field = gguf.Field("float32", 2.501)
    report = rewritten(sound, tmp_path / "m.gguf", fields={"glm4moe.expert_weights_scale": field})
    assert [f.split(" by up to ")[0] for f in report.faults] == ["L2: logits differ"]
    assert any("compared in float32 instead" in what for what in report.unchecked)


def test_the_last_bit_of_inputs_moves_little_in_a_small_model(sound):
    with Branch(sound / "run", rest="F32") as branch:
        weights, model = branch.numbers(), branch.model
        kinds = {part.path: branch.storage.type_of(part)[0] for part in names.gguf_parts(model, "").values()}
    windows_ML = np.random.default_rng(0).integers(0, model.vocab_size, (2, 48))
    moved = verify._moved(weights, kinds, model, windows_ML)
    assert 0 < abs(moved["kld"]) < 1e-4 and moved["same_top1"] > 0.9
    moved = verify._moved(weights, dict.fromkeys(kinds, "F32"), model, windows_ML)
    assert abs(moved["kld"]) < 1e-7 and moved["same_top1"] == 1


def test_without_llama_it_says_what_was_not_checked(sound, monkeypatch):
    monkeypatch.setattr(llama, "installed", lambda: "")
    report = verified(sound / "run", sound / "m.gguf")
    assert report.ok and report.l2 == {}
    assert [what.split(":")[0] for what in report.unchecked] == ["L1 by libggml", "L2"]
    assert all(row.same_bytes == row.tensors for row in report.rows)
    assert "not checked: L2" in report.text()
