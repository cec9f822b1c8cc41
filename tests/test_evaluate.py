"""The audit command on a tiny run: its rows and figures, what it refuses, and how it goes on where it was stopped."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from qatmoe import audit_report, cli, evaluate, files, loss
from qatmoe.audit import open_run
from qatmoe.convert.weights import Branch, read_config
from qatmoe.data import batches, corpus
from qatmoe.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = next(corpus.documents("default", field="data.valid")).text
ROWS = r"^(control|trunk|qat)$|^(control|qat)/q2_0/(search|gptq)$|^control/(Q4_0/imatrix|BF16/stock)$|^qat/kv/q4_0$"
NAMES = [
    "control", "control/q2_0/search", "control/q2_0/gptq", "control/BF16/stock", "control/Q4_0/imatrix", "trunk", "qat",
    "qat/q2_0/search", "qat/kv/q4_0",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _little_calibration():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "CALIBRATION", 640)
        yield


@pytest.fixture(scope="module")
def run(tiny_run):
    """Read only: its text and cache lie beside it."""
    return tiny_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty short documents and a longer one."""
    file = tmp_path_factory.mktemp("text") / "lines.jsonl"
    lines = [TEXT[start : start + 150] for start in range(70_000, 78_000, 200)] + [TEXT[80_000:81_500]]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def command(run, *args):
    return evaluate.main([f"--run={run}", *map(str, args)])


def rows_of(run):
    return json.loads((run / "audit.json").read_text())


@pytest.fixture(scope="module")
def audited(run, text, tmp_path_factory, quick_compilation):
    """A copy of the run with its audit, over all of both texts."""
    folder = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(run, folder)
    assert command(folder, "--rows", ROWS, "--tokens", 10**6, f"--text=lines={text}") == 0
    return folder


@pytest.fixture
def copy(audited, tmp_path, monkeypatch):
    """Its picture is only written, not drawn: that takes longer than a row."""
    monkeypatch.setattr(audit_report, "plot", lambda rows, path: Figure(figsize=(1, 1)).savefig(path))
    return shutil.copytree(audited, tmp_path / "run")


# ---- rows and figures ------------------------------------------------------------------------------------------------


def test_the_rows_and_what_they_are(audited):
    rows = {row["row"]: row for row in rows_of(audited)}
    assert list(rows) == NAMES
    keys = ("group", "branch", "format", "rule", "bits_per_weight", "joined_rows", "kv", "reference")
    described = {name: tuple(row[k] for k in keys) for name, row in rows.items()}
    assert described == {
        "control": ("control", "control", "f32", "", 32.0, 1, "", "control"),
        "control/q2_0/search": ("grid", "control", "q2_0", "search", 2.25, 1, "", "control"),
        "control/q2_0/gptq": ("grid", "control", "q2_0", "gptq", 2.25, 1, "", "control"),
        "control/Q4_0/imatrix": ("ggml", "control", "Q4_0", "imatrix", 4.5, 1, "", "control"),
        "control/BF16/stock": ("ggml", "control", "BF16", "stock", 16.0, 1, "", "control"),
        "trunk": ("trunk", "trunk", "f32", "", 32.0, 1, "", "control"),
        "qat": ("qat", "qat", "q2_0", "", 2.25, 1, "", "control"),
        "qat/q2_0/search": ("requantized", "qat", "q2_0", "search", 2.25, 1, "", "control"),
        "qat/kv/q4_0": ("kv", "qat", "q2_0", "", 2.25, 1, "q4_0", "control"),
    }


def test_the_figures_tell_the_rows_apart(audited):
    rows = {row["row"]: row for row in rows_of(audited)}
    control, q4, q2 = (rows[n] for n in ("control", "control/Q4_0/imatrix", "control/q2_0/search"))
    bf16 = rows["control/BF16/stock"]
    assert abs(control["kld"]) < 1e-6 and control["same_top1"] == 1 and control["expert_agreement"] == 1
    # After two steps of training, what bfloat16 changes is smaller than what float32 can tell of a KLD, of either sign.
    assert bf16["loss"] != control["loss"] and abs(bf16["kld"]) < 0.1 * q4["kld"] < q4["kld"] < 0.1 * q2["kld"]
    assert q4["kld"] < rows["control/q2_0/gptq"]["kld"] < q2["kld"]
    assert q2["kld_routing"] == pytest.approx(q2["kld"] - q2["kld_experts"], abs=1e-9)
    assert q2["kld_median"] <= q2["kld_p99"] <= q2["kld_p999"]
    assert q2["kld_se"] > 0 and q2["loss_se"] > 0
    assert [name for name in NAMES if rows[name]["kld_own"] is not None] == ["qat/q2_0/search", "qat/kv/q4_0"]
    # On its grid already: the search finds the codes and scales that it was trained with, or as good ones.
    assert rows["qat/q2_0/search"]["kld_own"] < 0.1 * rows["qat"]["kld"]
    assert rows["qat/kv/q4_0"]["kld_own"] > 0
    for row in rows.values():
        assert len(row["expert_agreement_by_layer"]) == 2 and len(row["mtp_acceptance"]) == 1
        assert [(p["start"], p["end"]) for p in row["by_position"]] == [(i, i + 8) for i in range(0, 64, 8)]
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))


def test_domains_hold_every_figure_and_add_up(audited):
    for row in rows_of(audited):
        domains = row["domains"]
        assert list(domains) == ["valid", "lines"]
        own = {
            "row",
            "group",
            "branch",
            "format",
            "rule",
            "bits_per_weight",
            "joined_rows",
            "kv",
            "kv_bits",
            "step",
            "trained_tokens",
            "reference",
            "domains",
        }
        for figures in domains.values():
            assert set(figures) == set(row) - own
        assert row["tokens"] == sum(d["tokens"] for d in domains.values())
        assert (domains["valid"]["documents"], domains["lines"]["documents"], row["documents"]) == (1, 41, 42)
        for name in ("loss", "loss_above", "kld", "same_top1"):
            mean = sum(d[name] * d["tokens"] for d in domains.values()) / row["tokens"]
            assert row[name] == pytest.approx(mean, rel=1e-6, abs=1e-9)


def test_losses_are_those_of_validation(audited):
    """On all held-out text: as `losses.evaluation_sums` sums them over the batches of training's validation."""
    with Branch(audited, "qat", rest="F32") as branch:
        cfg, params = branch.cfg, branch.numbers()
        model = dataclasses.replace(branch.model, scan_layers=False)
    data = batches.load_data(cfg.data, cfg.model.vocab_size)
    sums = jax.jit(loss.evaluation_sums, static_argnums=1)
    parts = [sums(params, model, b) for b in batches.valid_batches(data, batch_size=8, n_mtp=1)]
    nats, count = (sum(float(jnp.sum(p[k][0])) for p in parts) for k in ("nats", "count"))
    by_name = {row["row"]: row["domains"]["valid"] for row in rows_of(audited)}
    found, control = by_name["qat"], by_name["control"]
    assert found["loss_above"] == pytest.approx(found["loss"] - control["loss"], abs=1e-6) != 0
    assert found["loss_above_se"] < found["loss_se"] and (control["loss_above"], control["loss_above_se"]) == (0, 0)
    assert found["tokens"] == count == len(data.valid.tokens) - 1
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / count / np.log(2) / data.valid.bytes_per_token, rel=1e-5)


def again(folder, text, *more):
    return command(folder, "--rows", ROWS, "--tokens", 10**6, f"--text=lines={text}", *more)


def test_the_report_is_written(audited, text, capsys):
    assert "qat" in (audited / "audit.md").read_text()
    assert (audited / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert again(audited, text) == 0  # nothing is left to compute
    out = capsys.readouterr().out
    assert "tokens/s" not in out
    assert "documents 1, units" in out and "documents 41, units 47" in out and "audit.json" in out


# ---- going on --------------------------------------------------------------------------------------------------------


def judged(patch, stop_after=None, action=None):
    """The names of rows that are computed from now on."""
    real, names = evaluate.Bench.judge, []

    def judge(bench, row):
        if len(names) == stop_after:
            action()
        names.append(row.name)
        return real(bench, row)

    patch.setattr(evaluate.Bench, "judge", judge)
    return names


def crash():
    raise MemoryError


def test_it_goes_on_after_a_crash_to_the_same_figures(copy, audited, text, monkeypatch):
    (copy / "audit.json").unlink()
    with monkeypatch.context() as patch:
        judged(patch, 4, crash)
        with pytest.raises(MemoryError):
            again(copy, text)
    assert [row["row"] for row in rows_of(copy)] == NAMES[:4]
    names = judged(monkeypatch)
    assert again(copy, text) == 0
    assert names == NAMES[4:]
    assert rows_of(copy) == rows_of(audited)


def test_a_signal_while_the_text_is_read_ends_it_there(copy, audited, text, monkeypatch, capsys):
    def load_data(*_):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(batches, "load_data", load_data)
    assert again(copy, text) == 130
    assert "SIGINT: stopped while the text was read, before any row. The same command" in capsys.readouterr().err
    assert rows_of(copy) == rows_of(audited)


def test_a_second_audit_of_the_run_is_refused_and_loses_nothing(copy, text, capsys):
    before = (copy / "audit.json").read_bytes()
    with files.alone(copy / "audit.lock", "this one"):
        assert command(copy, "--rows", ROWS, "--tokens", 64) == 2
    assert f"{copy}: another audit of it is running: wait for it, or stop it" in capsys.readouterr().err
    assert (copy / "audit.json").read_bytes() == before


def test_a_signal_ends_it_between_rows(copy, text, monkeypatch, capsys):
    (copy / "audit.json").unlink()
    judged(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert again(copy, text) == 143
    assert "SIGTERM: stopped before row control/q2_0/gptq, 3 of 9. The same command continues." in capsys.readouterr().err  # fmt: skip  # noqa: E501
    assert [row["row"] for row in rows_of(copy)] == NAMES[:2]
    table = (copy / "audit.md").read_text()  # of what there is
    assert "q2_0 search" in table and "qat" not in table
    assert (copy / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_goes_away_ends_it_between_rows(copy, text, monkeypatch):
    (copy / "audit.json").unlink()

    def gone(*args, **options):
        if str(args[0]).startswith("2/"):
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):  # `cli.run` ends quietly
        again(copy, text)
    assert [row["row"] for row in rows_of(copy)] == NAMES[:2]
    assert "q2_0 search" in (copy / "audit.md").read_text()


def test_a_row_that_cannot_be_judged_ends_it_with_a_report_of_the_others(copy, text, monkeypatch, capsys):
    (copy / "audit.json").unlink()

    def unusable():
        raise UserError("its weights are gone")

    judged(monkeypatch, 2, unusable)
    assert again(copy, text) == 2
    assert capsys.readouterr().err == "error: its weights are gone\n"
    assert "search" in (copy / "audit.md").read_text()


def test_rows_join_those_on_record(copy, text, monkeypatch):
    names = judged(monkeypatch)
    command(copy, "--rows", "^control/(q2_0|q4_0)/absmax$", "--tokens", 10**6, f"--text=lines={text}")
    assert names == ["control/q2_0/absmax", "control/q4_0/absmax"]
    assert {row["row"] for row in rows_of(copy)} == {*NAMES, *names}
    assert [row["row"] for row in rows_of(copy)][:2] == ["control", "control/q2_0/absmax"]  # in the order of --list


@pytest.mark.parametrize(
    "change",
    ["tokens", "text", "checkpoint", "llama_cpp_python", "dtype", "backend", "devices", "junk", "no figures"],
)
def test_what_changed_is_computed_anew(change, copy, text, monkeypatch, capsys):
    names = judged(monkeypatch)
    args = {"--rows": "^control$", "--tokens": 10**6, "--text": f"lines={text}"}
    if change == "tokens":
        args["--tokens"] = 640
    if change == "text":
        args["--text"] = f"others={text}"
    if change == "checkpoint":  # another branch of the run was trained again
        manifest = max((copy / "checkpoints" / "qat").glob("*/manifest.json"))
        manifest.write_text(manifest.read_text() + " ")
    if change == "llama_cpp_python":
        monkeypatch.setattr(evaluate.llama, "installed", lambda: "0.0.1")
    if change in ("dtype", "backend", "devices"):
        mark = json.loads((copy / "audit.fingerprint.json").read_text())
        (copy / "audit.fingerprint.json").write_text(json.dumps(mark | {change: "another"}))
        assert mark["dtype"] == "float32" and mark["backend"] == jax.default_backend() and "devices" not in mark
    if change in ("junk", "no figures"):
        (copy / "audit.json").write_text("[1]" if change == "junk" else '[{"row": "qat"}]')
    assert command(copy, *[f"{k}={v}" for k, v in args.items()]) == 0
    assert names == ["control"]
    assert [row["row"] for row in rows_of(copy)] == ["control"]
    said = {"tokens": "domains", "text": "domains", "checkpoint": "checkpoints"}.get(change, change)
    why = "the file is not what an audit writes" if change in ("junk", "no figures") else f"other than before: {said}"
    assert f"every row is computed anew ({why})" in capsys.readouterr().out


def test_force_computes_the_chosen_rows_alone(copy, audited, text, monkeypatch):
    names = judged(monkeypatch)
    assert command(copy, "--force", "--rows=^control$", "--tokens", 10**6, f"--text=lines={text}") == 0
    assert names == ["control"]
    assert rows_of(copy) == rows_of(audited)


def test_the_report_goes_with_the_rows_it_was_made_of(copy, text, monkeypatch):
    judged(monkeypatch, 0, crash)
    with pytest.raises(MemoryError):
        command(copy, "--rows", ROWS, "--tokens=640", f"--text=lines={text}")
    assert rows_of(copy) == [] and not (copy / "audit.md").exists() and not (copy / "audit.png").exists()


def test_list_computes_nothing(run, capsys):
    before = sorted(run.iterdir())
    assert command(run, "--list", "--rows", "^qat") == 0
    out, err = capsys.readouterr()
    assert {"qat", "qat/q2_0/absmax", "qat/kv/q8_0"} <= set(out.splitlines())
    assert all(line.startswith("qat") for line in out.splitlines())
    assert "q4_0+rot: llama.cpp rotates only where 64 divides head_dim" in err
    assert sorted(run.iterdir()) == before


def test_a_closed_pipe_ends_the_program_quietly(run):
    program = [sys.executable, "-m", "qatmoe.evaluate", f"--run={run}", "--list"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Error" not in process.stderr.read()
    assert process.returncode in (0, 141)  # 0 where all was written before the pipe closed


def test_a_terminal_that_knows_ascii_alone(monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    monkeypatch.setattr(evaluate, "main", lambda: print("zeil\u00e9n \u00b10.1"))
    cli.run(evaluate.main)
    assert screen.getvalue() == b"zeil?n ?0.1\n"


def test_checkpoints_at_other_steps_are_told(copy, capsys):
    shutil.rmtree(max((copy / "checkpoints" / "qat").iterdir(), key=lambda step: int(step.name)))
    assert command(copy, "--list") == 0
    err = capsys.readouterr().err
    cfg = read_config(copy)
    size = cfg.train.batch_size * cfg.data.seq_len
    assert "phase qat is not finished: its newest checkpoint is step 1 of 2" in err
    assert f"phase qat was trained on {3 * size:,} tokens and the reference, control, on {4 * size:,}" in err
    assert "phase trunk" not in err and "phase control is" not in err  # control comes from the trunk
    shutil.rmtree(copy / "checkpoints" / "trunk" / "2")
    for start in ("", "another/run"):  # what init_from replaced ends where it was taken
        config = json.loads((copy / "config.json").read_text()) | {"init_from": start}
        (copy / "config.json").write_text(json.dumps(config))
        assert command(copy, "--list") == 0
        assert ("phase trunk is not finished" in capsys.readouterr().err) == (not start)


def test_a_run_is_judged_by_the_kernels_of_the_machine_at_hand(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["attention"] = "cudnn"  # as if it had been trained on a GPU
    (copy / "config.json").write_text(json.dumps(config))
    assert command(copy, "--rows=^control$", "--tokens=640") == 0
    assert next(row for row in rows_of(copy) if row["row"] == "control")["loss"] > 0


def test_rows_hold_their_step_tokens_and_cache(audited):
    rows = {row["row"]: row for row in rows_of(audited)}
    cfg = read_config(audited)
    size = cfg.train.batch_size * cfg.data.seq_len
    assert {name: row["step"] for name, row in rows.items()} == dict.fromkeys(NAMES, 2)
    assert {n: r["trained_tokens"] // size for n, r in rows.items()} == dict.fromkeys(NAMES, 4) | {"trunk": 2}
    assert {name: row["kv_bits"] for name, row in rows.items()} == dict.fromkeys(NAMES) | {"qat/kv/q4_0": 4.5}


def test_a_text_of_a_single_unit_leaves_the_pooled_errors(copy, text, tmp_path, capsys):
    tiny = tmp_path / "tiny.txt"
    tiny.write_text(TEXT[80_000:80_060])
    assert command(copy, "--rows=^control/q2_0/search$", "--tokens=640", f"--text=tiny={tiny}") == 0
    (row,) = rows_of(copy)
    assert row["kld_se"] > 0 and row["domains"]["valid"]["kld_se"] > 0 and row["domains"]["tiny"]["kld_se"] is None
    assert row["kld_se"] < row["domains"]["valid"]["kld_se"]  # a part of it is fixed
    out = capsys.readouterr().out
    assert "units 1; a single unit has no standard errors" in out and out.count("a single unit") == 1


def test_text_key(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"body": TEXT[:500]}))
    refused(run, [f"--text=a={file}"], "no field 'text' .*--text_key", monkeypatch, capsys)
    audit, _ = open_run(run)
    found, _ = evaluate.load_domains(audit, [f"a={file}"], 640, "body")
    assert [domain.name for domain in found] == ["valid", "a"]


def test_types_that_nothing_here_rounds_to_are_named(run, monkeypatch):
    assert not any("llama.cpp's own types" in note for note in open_run(run)[1])
    monkeypatch.setattr("qatmoe.convert.llama.installed", lambda: "")
    audit, notes = open_run(run)
    assert any("llama.cpp's own types; pip install -e '.[deploy]'" in note for note in notes)
    assert not any("IQ" in row.name for row in audit.rows)


def test_a_phase_without_a_checkpoint_is_left_out(copy, capsys):
    shutil.rmtree(copy / "checkpoints" / "qat")
    assert command(copy, "--list") == 0
    out, err = capsys.readouterr()
    assert "qat" not in out.splitlines() and "control" in out.splitlines()
    assert "phase qat has no checkpoint yet" in err


# ---- bad input -------------------------------------------------------------------------------------------------------


def edit(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def quantize_all(config):
    for phase in config["train"]["phases"].values():
        phase["quantize"] = True


BAD = {
    "no run": (["--run=nowhere"], "--run nowhere: no qatmoe run there"),
    "unknown phase": (
        ["--reference=teacher"],
        "--reference 'teacher': must be a phase of .* in full precision .trunk, control",
    ),
    "quantized reference": (["--reference=qat"], "--reference 'qat': must be a phase"),
    "no such row": (["--rows=q7_0"], "--rows 'q7_0' matches no row; --list shows"),
    "no expression": (["--rows=("], "--rows '.' is not a regular expression"),
    "no window": (["--tokens=63"], "--tokens 63: less than one window, which has 64 tokens"),
    "no text": (["--text=code=missing.jsonl"], "--text code='missing.jsonl': no such file or directory"),
    "no name": (["--text=missing.jsonl"], "--text 'missing.jsonl': write NAME=PATH"),
    "a name with a pipe": (["--text=a|b={text}"], "--text .*: a name goes into tables"),
    "a name of two lines": (["--text=a\nb={text}"], "--text .*: a name goes into tables"),
    "a name that rings": (["--text=a\x07={text}"], "--text .*: a name goes into tables"),
    "a key of no text": (["--text_key=body"], "--text_key body: is of the rows of every --text, and there is none"),
    "a name twice": (["--text=valid={text}"], "--text valid=.*: there is a text of that name already"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_computed(args, message, run, text, monkeypatch, capsys):
    refused(run, [a.format(text=text) for a in args], message, monkeypatch, capsys)


def refused(run, args, message, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Bench", lambda *_: pytest.fail("something was computed"))
    before = sorted(run.iterdir())
    assert command(run, *args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.search(f"^error: .*{message}", line), line
    assert sorted(run.iterdir()) == before


def test_a_run_without_a_control(copy, monkeypatch, capsys):
    edit(copy, quantize_all)
    refused(copy, [], "has no phase in full precision to compare with", monkeypatch, capsys)


def test_a_control_that_is_not_trained_yet(copy, monkeypatch, capsys):
    shutil.rmtree(copy / "checkpoints" / "control")
    refused(copy, [], "the reference, phase control, has no checkpoint; train it first", monkeypatch, capsys)


def test_an_empty_text(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    refused(run, [f"--text=empty={tmp_path / 'empty.txt'}"], "holds no text", monkeypatch, capsys)


def test_the_reference_of_another_run(audited, copy, tmp_path, capsys):
    alone = shutil.copytree(copy, tmp_path / "alone")
    edit(alone, lambda config: config["train"]["phases"].pop("control"))
    shutil.rmtree(alone / "checkpoints" / "control")
    assert command(alone, "--rows=^(trunk|qat)$", "--tokens", 10**6, f"--reference={copy}:control") == 0
    rows, before = {r["row"]: r for r in rows_of(alone)}, {r["row"]: r for r in rows_of(audited)}
    assert list(rows) == ["trunk", "qat"]
    for name, row in rows.items():
        assert (row["reference"], row["group"]) == (f"{copy}:control", before[name]["group"])
        for figure in ("kld", "loss", "expert_agreement", "same_top1"):
            assert row[figure] == pytest.approx(before[name]["domains"]["valid"][figure], rel=1e-4), (name, figure)
    capsys.readouterr()
    assert command(alone, "--rows=^qat$", "--tokens", 10**6, "--reference=trunk") == 0  # rows of another one go
    assert [r["reference"] for r in rows_of(alone)] == ["trunk"]
    assert "every row is computed anew (other than before: reference)" in capsys.readouterr().out


def test_a_run_knows_its_tokenizer_wherever_that_came_from(copy, audited):
    """A run of an imported model names the file in the import's folder, which may have moved."""
    edit(copy, lambda config: config["data"].update(tokenizer="/gone/tokenizer.json"))
    found, _ = evaluate.load_domains(open_run(copy)[0], [], 640)
    there, _ = evaluate.load_domains(open_run(audited)[0], [], 640)
    np.testing.assert_array_equal(found[0].windows["tokens"], there[0].windows["tokens"])


def test_a_reference_that_does_not_fit(run, copy, monkeypatch, capsys):
    edit(copy, lambda config: config["model"].update(top_k=1))
    refused(run, [f"--reference={copy}:control"], "is of another architecture than", monkeypatch, capsys)
    refused(run, ["--reference=nowhere:control"], "--reference nowhere: no qatmoe run there", monkeypatch, capsys)
    refused(run, [f"--reference={copy}:qat"], "must be a phase of .* in full precision", monkeypatch, capsys)


def test_the_last_plain_phase_is_the_reference_where_there_is_no_control(copy):
    edit(copy, lambda config: config["train"]["phases"].pop("control"))
    audit, _ = open_run(copy)
    assert audit.reference.name == "trunk"
    assert audit.rows[0].group == "control"
    assert {row.branch for row in audit.rows} == {"trunk", "qat"}
