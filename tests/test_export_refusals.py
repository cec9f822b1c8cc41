"""What the export command refuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_export import FORMATS, command, contents, refused

from qatmoe import export
from qatmoe.convert.weights import Branch


@pytest.fixture
def run(tiny_run):
    """Read only."""
    return tiny_run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=/no/such/run"], "--run /no/such/run: no qatmoe run there (config.json: No such file or directory)"),
        (["--run=/dev/null/x"], "--run /dev/null/x: no qatmoe run there (config.json: Not a directory)"),
        ([f"--run=/{'r' * 300}"], "no qatmoe run there (config.json: File name too long)"),
        ([f"--out=/tmp/{'r' * 300}"], "File name too long"),
        (["--branch=nope"], "--branch 'nope'"),
        (["--branch=../qat"], "--branch '../qat'"),
        (["--step=99"], "no such checkpoint; steps of phase 'qat' there: 1, 2"),
        (["--step=-1"], "no such checkpoint"),
        (["--arch=llama"], "--arch 'llama': must be auto, "),
        (["--arch=olmoe"], "no architecture holds this model exactly: olmoe needs router='softmax'"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_unknown_values_are_named(form, options, message, run, tmp_path, capsys):
    assert message in refused(capsys, f"--run={run}", f"--format={form}", f"--out={tmp_path / 'out'}", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "option", "message"),
    [
        ("gguf", "--ternary=Q4_0", "--ternary 'Q4_0': must be one of TQ2_0"),
        ("gguf", "--verify_tokens=-5", "--verify_tokens -5"),
        ("gguf", "--chat_template=/no/such/file", "--chat_template /no/such/file: No such file"),
        ("safetensors", "--ternary=TQ1_0", "--ternary is for --format gguf"),
        ("compressed-tensors", "--name=x", "--name is for --format gguf"),
        ("safetensors", "--chat_template=x", "--chat_template is for --format gguf"),
    ],
)
def test_options_that_would_do_nothing(form, option, message, run, tmp_path, capsys):
    assert message in refused(capsys, f"--run={run}", f"--format={form}", f"--out={tmp_path / 'out'}", option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "config.json", "checkpoints/qat/2"])
def test_force_never_reaches_into_the_run(name, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    before = contents(tmp_path / "run")
    for form in FORMATS:
        out = tmp_path / "run" / name
        assert "belongs to what is read" in refused(capsys, "--run", tmp_path / "run", "--format", form, "--out", out, "--force")  # fmt: skip  # noqa: E501
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_two_at_once_do_not_write_one_file(form, run, tmp_path, monkeypatch, capsys):
    """The second finds the first at work, says so, and leaves it alone."""
    real, lines = Branch.value, []

    def value(branch, part):
        if not lines:
            lines.append("")  # the second one's own reading must not come here again
            lines[0] = refused(capsys, "--run", run, "--format", form, "--out", tmp_path / "out", "--branch=control")
        return real(branch, part)

    monkeypatch.setattr(Branch, "value", value)
    assert command(run, form, tmp_path / "out", "--verify", "--verify_tokens=0") == 0
    assert "another process is writing" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_config_that_is_not_the_checkpoints(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["qkv_bias"] = True
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "--run", tmp_path / "run", "--format=gguf", "--out", tmp_path / "out")
    assert "attn/k_bias is absent in it" in line


@pytest.mark.parametrize("option", ["--format=onnx", "--rest=F64", "--step=two", "--quantize"])
def test_options_that_the_parser_refuses(option, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(run, "gguf", tmp_path / "out", option)
    assert stopped.value.code == 2
    assert option.split("=")[0].removeprefix("--") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "context"), [*[(form, -5) for form in FORMATS], ("gguf", 2**32)])
def test_a_context_that_no_file_can_state(form, context, run, tmp_path, capsys):
    line = refused(capsys, f"--run={run}", f"--format={form}", f"--out={tmp_path / 'out'}", f"--context={context}")
    assert "context" in line
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_text(run, tmp_path, capsys):
    """Bytes on the command line that are not UTF-8 arrive as half surrogate pairs."""
    line = refused(capsys, f"--run={run}", "--format=gguf", f"--out={tmp_path / 'out'}", "--name=caf\udce9")
    assert "name" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("out", ["", ".", "/", ".."])
def test_an_out_without_a_name(form, out, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "precious").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    for force in ([], ["--force"]):
        refused(capsys, f"--run={run}", f"--format={form}", f"--out={out}", *force)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["here", "here/precious"]


def damage(run, copy, what):
    shutil.copytree(run, copy)
    if what == "array":
        for step in (copy / "checkpoints" / "qat").iterdir():
            largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            os.truncate(largest, largest.stat().st_size - 1)
    elif what == "newest":
        os.truncate(copy / "checkpoints" / "qat" / "2" / "meta.json", 20)
    elif what == "gone":
        shutil.rmtree(copy / "checkpoints" / "qat")
    elif what == "config":
        os.truncate(copy / "config.json", 100)
    elif what == "list":
        (copy / "config.json").write_text("[]")
    elif what == "bytes":
        (copy / "config.json").write_bytes(b"\xff\xfe")
    elif what == "tokenizer":
        (copy / "tokenizer.json").unlink()
    elif what == "half a tokenizer":
        os.truncate(copy / "tokenizer.json", 1000)
    return copy


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", "no complete checkpoint; train that phase first"),
        ("config", "config.json"),
        ("list", "config"),
        ("bytes", "config.json"),
        ("tokenizer", "tokenizer.json is missing"),
        ("half a tokenizer", "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_a_damaged_run_is_one_line(form, what, message, run, tmp_path, capsys):
    broken = damage(run, tmp_path / "run", what)
    assert message in refused(capsys, f"--run={broken}", f"--format={form}", f"--out={tmp_path / 'out'}")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_named_when_it_was_asked_for(run, tmp_path, capsys):
    broken = damage(run, tmp_path / "run", "newest")
    args = [f"--run={broken}", "--format=gguf", f"--out={tmp_path / 'out'}"]
    line = refused(capsys, *args, "--step=2")
    assert "is damaged" in line and "meta.json" in line
    assert not (tmp_path / "out").exists()
    assert export.main(args) == 0  # the newest complete one
    assert "phase qat, step 1 of" in capsys.readouterr().out


def test_no_traceback_reaches_the_user(run, child_env, tmp_path):
    broken = damage(run, tmp_path / "run", "array")
    done = subprocess.run(
        [sys.executable, "-m", "qatmoe.export", f"--run={broken}", "--format=gguf", f"--out={tmp_path / 'out'}"],
        env=child_env,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    *warnings, last = done.stderr.splitlines()
    assert last.startswith("error: ") and "no complete checkpoint" in last
    assert len(warnings) == 2 and all("damaged" in line for line in warnings)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
