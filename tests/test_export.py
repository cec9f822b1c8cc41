"""The export command: what it writes, over what, and what is left when it is interrupted."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from conftest import our_logits

from qatmoe import export, files
from qatmoe.convert import gguf
from qatmoe.convert.weights import Branch
from qatmoe.data import corpus

FORMATS = export.FORMATS
TEXT = next(corpus.documents("default", field="data.valid")).text
LOGITS = "--verify_tokens=256"


@pytest.fixture(scope="module")
def run(tiny_run):
    """Read only: its text and cache lie beside it."""
    return tiny_run


def command(run, form, out, *more):
    return export.main([f"--run={run}", f"--format={form}", f"--out={out}", *more])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """{format: the last branch in it}, without options."""
    folder = tmp_path_factory.mktemp("exported")
    for form in FORMATS:
        assert command(run, form, folder / form) == 0
    return {form: folder / form for form in FORMATS}


def contents(path):
    """{relative name: SHA-256} of a file or a folder, and of nothing."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def refused(capsys, *args):
    """Exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert export.main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def field(path, key):
    with gguf.File(path) as file:
        return file.fields[key].value


def kinds(path):
    """{tensor name: GGUF type}; PyPI gguf refuses files with Q2_0 in them."""
    with gguf.File(path) as file:
        return {name: tensor.kind for name, tensor in file.tensors.items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("options", [[], ["--branch=control", "--rest=F32"], ["--drop_mtp"]], ids=lambda o: "".join(o))
def test_every_format_writes_and_verifies(form, options, run, tmp_path, capsys):
    plain = options and "control" in options[0]
    if plain and form == "compressed-tensors":
        line = refused(capsys, f"--run={run}", f"--format={form}", f"--out={tmp_path / 'out'}", *options)
        assert "nothing on a grid" in line
        assert list(tmp_path.iterdir()) == []
        return
    out = tmp_path / "out"
    capsys.readouterr()
    assert command(run, form, out, "--verify", LOGITS, *options) == 0
    said, err = capsys.readouterr()
    assert "error" not in err
    first, second, *lines = said.splitlines()
    arch = "glm4moe" if form == "gguf" else "glm4_moe"
    assert first == f"{out}: {arch}, phase {'control' if plain else 'qat'}, step 2 of {run}"
    assert second.startswith(f"{export._size(out):,} bytes in ")
    assert not [line for line in lines if "FAILED" in line]
    table = {line.split()[0]: line for line in lines if " tensors " in line and " weights " in line}
    assert set(table) == {"F32"} | (set() if plain else {"BF16", {"gguf": "Q2_0"}.get(form, "q2_0")})
    for line in table.values():
        count = line.split()[1]
        assert f"L0 {count}/{count} equal" in line
        figures = line.split("max difference: ")[1].split(", ")
        assert figures and all(figure.endswith(" 0") for figure in figures)
    if form == "gguf":
        unchecked = ["not checked: L2 of the MTP modules: llama.cpp gives the trunk's logits alone"]
        assert [line for line in lines if "not checked" in line] == unchecked * ("--drop_mtp" not in options)
        assert [line.split(":")[0] for line in lines if line.startswith("L2")] == ["L2 against JAX as it is"] + (
            [] if plain else ["L2 against JAX with activations rounded as llama.cpp does"]
        )
        assert "(256 tokens)" in said
        if not plain:
            assert "libggml 0" in table["Q2_0"] and "qatmoe 0" in table["Q2_0"]
    else:
        assert "not checked: L2: llama.cpp does not read safetensors" in lines
        by_itself = "not checked: L1 of packed weights by another program: they are decoded by qatmoe's own reader"
        assert (by_itself in lines) == (form == "compressed-tensors")
        assert "safetensors 0" in table["F32"]
    assert lines[-1].startswith("sha256 of the tensors ") and len(lines[-1].split()[-1]) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_last_phase_is_the_default(run, exported, tmp_path):
    for form in FORMATS:
        assert command(run, form, tmp_path / form, "--branch=qat") == 0
        assert contents(tmp_path / form) == contents(exported[form]) != {}


def test_branch_and_step_choose_the_weights(run, exported, tmp_path):
    newest = set(kinds(exported["gguf"]).values())
    assert newest == {"BF16", "F32", "Q2_0"}
    for name, options in {
        "control": ["--branch=control"],
        "trunk": ["--branch=trunk", "--step=2"],
        "earlier": ["--branch=trunk", "--step=1"],
    }.items():
        assert command(run, "gguf", tmp_path / name, "--rest=F32", *options) == 0
        assert set(kinds(tmp_path / name).values()) == {"F32"}
        phase = "control" if name == "control" else "trunk"
        with Branch(run, phase, 1 if name == "earlier" else 2, rest="F32") as branch:
            (tensor,) = [t for t in gguf_package.GGUFReader(tmp_path / name).tensors if t.name == "token_embd.weight"]
            np.testing.assert_array_equal(tensor.data, np.asarray(branch.numbers()["embed"]))
    files_ = [contents(tmp_path / name)["."] for name in ("control", "trunk", "earlier")]
    assert len(set(files_)) == 3


def test_rest_names_the_type_of_what_lies_on_no_grid(run, tmp_path):
    for rest in ("F32", "F16", "Q8_0"):
        assert command(run, "gguf", tmp_path / rest, f"--rest={rest}") == 0
        found = kinds(tmp_path / rest)
        assert found["token_embd.weight"] == found["blk.1.attn_q.weight"] == rest
        assert found["blk.1.ffn_up_exps.weight"] == "Q2_0"
        assert found["blk.1.ffn_gate_inp.weight"] == found["output_norm.weight"] == "F32"
    for form in ("safetensors", "compressed-tensors"):
        assert command(run, form, tmp_path / form, "--rest=F32") == 0
        assert config_of(tmp_path / form)["dtype"] == "float32"
        tensors = safetensors.numpy.load_file(tmp_path / form / "model.safetensors")
        assert tensors["model.embed_tokens.weight"].dtype == np.float32


@pytest.mark.parametrize("rest", ["F16", "Q8_0"])
@pytest.mark.parametrize("form", FORMATS[1:])
def test_types_that_a_folder_does_not_have_are_refused(form, rest, run, tmp_path, capsys):
    line = refused(capsys, "--run", run, "--format", form, "--out", tmp_path / "out", "--rest", rest)
    assert f"--rest {rest}" in line and "BF16 or F32" in line
    assert list(tmp_path.iterdir()) == []


def test_mtp_modules_are_kept_or_left_out(run, exported, tmp_path):
    for form in FORMATS:
        assert command(run, form, tmp_path / form, "--drop_mtp") == 0
    there, dropped = kinds(exported["gguf"]), kinds(tmp_path / "gguf")
    assert set(there) - set(dropped) == {n for n in there if n.startswith("blk.3.")}
    assert "blk.3.nextn.eh_proj.weight" in there
    assert (field(exported["gguf"], "glm4moe.block_count"), field(tmp_path / "gguf", "glm4moe.block_count")) == (4, 3)
    assert field(exported["gguf"], "glm4moe.nextn_predict_layers") == 1
    assert field(tmp_path / "gguf", "glm4moe.nextn_predict_layers") == 0
    for form in FORMATS[1:]:
        there, dropped = (safetensors.numpy.safe_open(f / "model.safetensors", "numpy") for f in (exported[form], tmp_path / form))  # fmt: skip  # noqa: E501
        with there, dropped:
            gone = set(there.keys()) - set(dropped.keys())
            assert gone == {n for n in there.keys() if n.startswith("model.layers.3.")}  # noqa: SIM118
            assert "model.layers.3.eh_proj.weight" in gone
        assert config_of(exported[form])["num_nextn_predict_layers"] == 1
        assert config_of(tmp_path / form)["num_nextn_predict_layers"] == 0


def test_name_and_context(run, exported, tmp_path):
    assert field(exported["gguf"], "general.name") == "toy"
    assert field(exported["gguf"], "glm4moe.context_length") == 64
    assert command(run, "gguf", tmp_path / "gguf", "--name=Modèle 2", "--context=4096") == 0
    assert field(tmp_path / "gguf", "general.name") == "Modèle 2"
    assert field(tmp_path / "gguf", "glm4moe.context_length") == 4096
    for form in FORMATS[1:]:
        assert config_of(exported[form])["max_position_embeddings"] == 64
        assert command(run, form, tmp_path / form, "--context=4096") == 0
        assert config_of(tmp_path / form)["max_position_embeddings"] == 4096


def test_the_run_is_not_touched(run, tmp_path):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}
    for form in FORMATS:
        assert command(run, form, tmp_path / form) == 0
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")} == before


# ---- Hugging Face folders --------------------------------------------------------------------------------------------


def test_transformers_loads_the_folder_and_computes_the_same(run, tmp_path):
    """The MTP module is in the file as layer 3. Transformers loads no such layer, says so, and goes on without it."""
    out = tmp_path / "model"
    assert command(run, "safetensors", out, "--rest=F32") == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert type(model).__name__ == "Glm4MoeForCausalLM" and model.dtype == torch.float32
    assert model.config.num_mtp_layers == 1

    def one_of_all(match):  # it joins the experts as it loads them
        return f"experts.{'down' if match[1] == 'down' else 'gate_up'}_proj"

    with safetensors.safe_open(out / "model.safetensors", "numpy") as file:
        mtp = {name for name in file.keys() if name.startswith("model.layers.3.")}  # noqa: SIM118
    assert len(mtp) > 10
    fused = {re.sub(r"experts\.\d+\.(\w+)_proj.weight", one_of_all, name) for name in mtp}
    assert set(info["unexpected_keys"]) == fused
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ids = transformers.AutoTokenizer.from_pretrained(out)(TEXT[:200])["input_ids"][:48]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([ids])).logits[0].numpy()
    ours = our_logits(run, ids)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMATS[1:])
def test_the_tokenizer_gives_the_same_ids(form, run, exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[form])
    with Branch(run) as branch:
        ours = branch.tokenizer
    for text in (TEXT[:20_000], "", " \n\n x  ", "naïve 模型 \U0001f600 1234", "a\r\nb\tc"):
        assert tokenizer(text)["input_ids"] == ours.encode(text).tolist()
    assert tokenizer.eos_token_id == ours.end_id == config_of(exported[form])["eos_token_id"]
    assert tokenizer.decode(ours.encode("It is 5 o'clock.").tolist()) == "It is 5 o'clock."


def test_the_packed_folder_decoded_by_its_library_is_the_branch(run, exported):
    config = QuantizationConfig.model_validate(config_of(exported["compressed-tensors"])["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    packed = safetensors.torch.load_file(exported["compressed-tensors"] / "model.safetensors")
    plain = safetensors.torch.load_file(exported["safetensors"] / "model.safetensors")
    modules = {name.removesuffix("_packed") for name in packed if name.endswith("weight_packed")}
    assert modules == {name for name in plain if ".mlp.experts." in name and "layers.3." not in name}
    assert len(modules) == 2 * 4 * 3
    with Branch(run) as branch:
        numbers = branch.numbers()["layers"]
    for name in modules:
        block, expert, kind = int(name.split(".")[2]), int(name.split(".")[5]), name.split(".")[6]
        state = {key: packed[name.removesuffix("weight") + key] for key in compressor.compression_param_names(scheme)}
        decoded = compressor.decompress(state, scheme)["weight"].float().numpy()
        ours = np.asarray(numbers[str(block - 1)]["experts"]["down" if kind == "down_proj" else "gate_up"][expert])
        if kind != "down_proj":
            ours = np.split(ours, 2)[kind == "up_proj"]
        np.testing.assert_array_equal(decoded, ours)
        np.testing.assert_array_equal(plain[name].float().numpy(), ours)
        assert len(np.unique(ours)) > 4  # several scales
    for name in set(plain) - modules:
        assert torch.equal(packed[name], plain[name]), name


# ---- what is there already -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_there_is_replaced_only_when_told(form, run, exported, tmp_path, capsys):
    out = tmp_path / "out"
    if form == "gguf":
        out.write_bytes(b"precious")
    else:
        out.mkdir()
        (out / "precious").write_bytes(b"precious")
        line = refused(capsys, "--run", run, "--format", form, "--out", out, "--force")
        assert "neither a model nor a run" in line and (out / "precious").exists()  # nobody meant that with --force
        (out / "config.json").write_bytes(b"{}")
    before = contents(out)
    assert f"{out} exists" in refused(capsys, "--run", run, "--format", form, "--out", out)
    assert contents(out) == before
    assert command(run, form, out, "--force") == 0
    assert contents(out) == contents(exported[form])
    assert command(run, form, out, "--force", "--branch=qat") == 0  # and once more
    assert contents(out) == contents(exported[form])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_dangling_link_is_something(form, run, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "exists" in refused(capsys, "--run", run, "--format", form, "--out", tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_is_no_place_for_a_file(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    # Before the whole file is written, which then could not be put there.
    line = refused(capsys, "--run", run, "--format=gguf", "--out", tmp_path / "out", "--force")
    assert "is a folder, and gguf is one file" in line
    (tmp_path / "file").write_text("precious")
    assert "cannot write" in refused(capsys, "--run", run, "--format=safetensors", "--out", tmp_path / "file", "--force")  # fmt: skip  # noqa: E501
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "out", "precious"]


@pytest.mark.parametrize("form", FORMATS)
def test_folders_that_cannot_be_made(form, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, "--run", run, "--format", form, "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == ""


# ---- interrupted -----------------------------------------------------------------------------------------------------


def fail_at(monkeypatch, count, error):
    """The writer meets an error at the n-th tensor."""
    real = Branch.value
    left = [count]

    def value(*args):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(*args)

    monkeypatch.setattr(Branch, "value", value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("there", [False, True])
def test_an_exception_in_the_middle_leaves_what_was_there(form, there, run, exported, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if there:
        (shutil.copytree if exported[form].is_dir() else shutil.copy)(exported[form], out)
    before = contents(out)
    for error in (KeyboardInterrupt(), MemoryError()):
        with monkeypatch.context() as patch:
            fail_at(patch, 30, error)
            with pytest.raises(type(error)):
                command(run, form, out, "--force", "--branch=qat", "--step=1")
        assert contents(out) == before
        assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])
    assert command(run, form, out, "--force") == 0
    assert contents(out) == contents(exported[form])


KILLER = """
import os, signal, sys
from qatmoe import export
from qatmoe.convert.weights import Branch
real, left = Branch.value, [30]
def deadly(*args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
Branch.value = deadly
form, run, out = sys.argv[1:]
sys.exit(export.main(["--run", run, "--format", form, "--out", out]))
"""


def test_killed_while_writing(run, exported, child_env, tmp_path):
    """Nothing has the final name, and the next command is not disturbed by what was left."""
    args = {form: [sys.executable, "-c", KILLER, form, str(run), str(tmp_path / form)] for form in ("gguf", "safetensors")}  # fmt: skip  # noqa: E501
    children = [subprocess.Popen(a, env=child_env, stderr=subprocess.PIPE, text=True) for a in args.values()]
    for child in children:
        _, err = child.communicate(timeout=200)
        assert child.returncode == -signal.SIGKILL, err
    assert {p.name for p in tmp_path.iterdir()} == {".gguf.tmp", ".safetensors.tmp"}
    for form in args:
        assert command(run, form, tmp_path / form) == 0
        assert contents(tmp_path / form) == contents(exported[form])
    assert {p.name for p in tmp_path.iterdir()} == set(args)


def test_killed_while_the_old_folder_is_removed(run, exported, tmp_path):
    """The new one has its name already; what is left of the old one must not stop the next export."""
    out, old = tmp_path / "out", tmp_path / ".out.old"
    shutil.copytree(exported["safetensors"], out)
    old.mkdir()
    (old / "model.safetensors").write_text("")
    assert command(run, "safetensors", out, "--force") == 0
    assert contents(out) == contents(exported["safetensors"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("precious")
    (out / "config.json").write_text("{}")
    real = os.replace

    def replace(source, target):
        if Path(source).name == ".out.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    line = refused(capsys, "--run", run, "--format=safetensors", "--out", out, "--force")
    assert "cannot write" in line and "Input/output error" in line
    assert out.is_dir() and (out / "precious").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Full:
    """A file on a disk that has room for a few bytes."""

    def __init__(self, room, *args):
        self._file, self._room = open(*args), room  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def write(self, data):
        size = memoryview(data).nbytes
        if self._file.tell() + size > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("room", [0, 500_000])
def test_a_full_disk_is_one_line(form, room, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "open", lambda *args: Full(room, *args), raising=False)
    line = refused(capsys, "--run", run, "--format", form, "--out", tmp_path / "out")
    assert "cannot write" in line and "No space left on device" in line and str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_last_small_file(run, tmp_path, monkeypatch, capsys):
    real = Path.write_text

    def write_text(path, *args, **options):
        if path.name == "config.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    line = refused(capsys, "--run", run, "--format=safetensors", "--out", tmp_path / "out")
    assert "cannot write" in line and "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


# ---- verification ----------------------------------------------------------------------------------------------------


def flip(path, at):
    with open(path, "r+b") as f:
        f.seek(at)
        (byte,) = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("form", FORMATS)
def test_one_wrong_bit_fails_the_verification(form, run, tmp_path, monkeypatch, capsys):
    real = export._write

    def write(branch, out, args):
        arch = real(branch, out, args)
        if form == "gguf":
            with gguf.File(out) as file:
                block = file.data("blk.2.ffn_down_exps.weight").tobytes()
            flip(out, out.read_bytes().index(block) + 2)
        else:
            flip(out / "model.safetensors", (out / "model.safetensors").stat().st_size - 1)
        return arch

    monkeypatch.setattr(export, "_write", write)
    assert command(run, form, tmp_path / "out", "--verify", LOGITS) == 1
    said, err = capsys.readouterr()
    faults = [line for line in said.splitlines() if line.startswith("FAILED: ")]
    assert any("holds other bytes than training packs" in line for line in faults)
    if form == "gguf":
        assert "L0: blk.2.ffn_down_exps.weight" in faults[0]
        assert any("decoded by libggml differs" in line for line in faults)
    assert "Traceback" not in err
    assert (tmp_path / "out").exists()  # to be looked at


@pytest.mark.parametrize("form", FORMATS)
def test_a_tensor_that_is_missing_fails_the_verification(form, run, tmp_path, monkeypatch, capsys):
    """Compared as the whole branch, a file of it without its MTP module lacks tensors."""
    real = export._verify

    def verify(branch, out, arch, args):
        with Branch(run) as whole:
            return real(whole, out, arch, args)

    monkeypatch.setattr(export, "_verify", verify)
    assert command(run, form, tmp_path / "out", "--verify", "--drop_mtp", LOGITS) == 1
    assert "FAILED: tensors differ: [" in capsys.readouterr().out


# ---- without the optional packages -----------------------------------------------------------------------------------

BARE = """
import sys
for name in ("gguf", "llama_cpp", "safetensors", "torch", "transformers", "compressed_tensors"):
    sys.modules[name] = None
from qatmoe import export
run, out = sys.argv[1:]
for form in export.FORMATS:
    code = export.main(["--run", run, "--format", form, "--out", f"{out}/{form}", "--verify"])
    assert code == 0, (form, code)
    print("end of", form)
"""


def test_without_the_deploy_extra_the_same_bytes_are_written(run, exported, child_env, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", BARE, str(run), str(tmp_path)],
        env=child_env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("end of")
    for form, part in zip(FORMATS, said, strict=False):
        assert contents(tmp_path / form) == contents(exported[form])
        missing = [line for line in part.splitlines() if line.startswith("not checked: ")]
        if form == "gguf":
            assert [line.split(":")[1].strip().split(" ")[-1] for line in missing] == ["gguf", "libggml", "L2"]
        else:
            assert any("L1 by safetensors" in line for line in missing)
        known = ("does not read", "own reader")  # what no package would check
        assert all("pip install -e '.[deploy]'" in line for line in missing if not any(k in line for k in known))
        assert "FAILED" not in part and "L0" in part and "qatmoe 0" in part + "qatmoe 0" * (form == "safetensors")
    assert gguf.File(tmp_path / "gguf").tensors
