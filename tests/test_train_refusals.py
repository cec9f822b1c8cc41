"""What the main job refuses: one line that names the value and the fix, and nothing written."""

import os
import types

import numpy as np
import pytest
from test_train import arguments, fails

from configs import toy
from launch import sweep
from qatmoe import export, import_hf, phases, train
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import resolve
from qatmoe.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.dimm=3", "config.model.dimm: no such key; did you mean config.model.dim?"),
        ("--config.data.source=/no/such.txt", "/no/such.txt"),
        ("--config.data.source=EMPTY", "empty.txt"),
        ("--config.data.source=LATIN1", "latin1.txt"),
        ("--config.model.vocab_size=1024", "1024"),
        ("--config.quant.experts=q2_k", "q2_k"),
        ("--config.quant.experts=q4_o", "did you mean 'q4_0'"),
        ("--config.quant.gate_up=q2_k", "layers/experts/gate_up"),
        ("--config.mesh.expert=3", "expert"),
        ("--config.init_from=/no/run", "/no/run"),
        (f"--config.init_from=/no/{'r' * 300}", "no such checkpoint"),
        (f"--config.init_from=/no/run:{'p' * 300}", "no such checkpoint"),
        ("--config.init_from=/no/run@²", "what follows '@' must be a step number"),
        ("--config.data.cache_dir=~nobody_here/x", "no such home directory is known"),
        ("--config.data.tokenizer=~nobody_here/x", "no such home directory is known"),
        ("--config.train.phases.qat.lr=inf", "qat.lr=inf: must be more than 0 and at most 3.4e+38, or 0"),
        ("--config.train.loss_chunk=100", "loss_chunk=100"),
        ("--config.data.seq_len=2000000", "seq_len"),
        ("--config.quant.experts=none", "puts nothing on a grid"),
        ("--config.model.attention=cudnn", "needs a GPU"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(override, message, capsys, tmp_path, cache):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 1000)
    override = override.replace("EMPTY", f"{tmp_path}/empty.txt").replace("LATIN1", f"{tmp_path}/latin1.txt")
    code, line = fails(capsys, *arguments(tmp_path / "run", override))
    assert code == 2
    assert message in line
    assert not (tmp_path / "run").exists()


def test_an_address_is_no_folder(capsys, tmp_path, cache, monkeypatch):
    """Path() would make one of it, on each machine its own."""
    monkeypatch.chdir(tmp_path)
    code, line = fails(capsys, *arguments("gs://bucket/run"))
    assert code == 2
    assert "--workdir gs://bucket/run" in line and "mounted" in line
    for command, args in (
        (import_hf.main, ["model", "--out"]),
        (export.main, ["--run=run", "--format=gguf", "--out"]),
        (sweep.main, ["sweep.py", "--dir"]),
    ):
        assert command([*args, "gs://bucket/run"]) == 2
        assert f"{args[-1]} gs://bucket/run: is an address" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_unwritable_folder(capsys, tmp_path, cache):
    (tmp_path / "file").write_text("")
    code, line = fails(capsys, *arguments(tmp_path / "file"))
    assert code == 2
    assert "file" in line
    assert os.path.getsize(tmp_path / "file") == 0
    code, line = fails(capsys, *arguments(tmp_path / ("n" * 300)))
    assert code == 2 and "File name too long" in line


def test_a_damaged_plan_is_named_with_the_fix(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="plan.json is damaged: remove it, and the run's own command writes it again"):
        train.note_mesh(types.SimpleNamespace(workdir=tmp_path))


def test_a_step_that_has_passed_cannot_be_saved(tmp_path, capsys):
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        checkpoints.save(2, {"w": np.ones(3)}, {}, {}, stays=True)
        checkpoints.save(4, {"w": np.ones(3)}, {}, {}, wait=True)
    config = toy.get_config()
    config.train.phases.trunk.save_at = (2, 5)
    config.train.phases.qat.save_at = (1,)
    phases.check_save_at(resolve(config), tmp_path)
    for passed in (3, 4):  # 4 is there, and the next two would replace it
        config.train.phases.trunk.save_at = (2, passed)
        with pytest.raises(UserError, match=rf"trunk.save_at=\(2, {passed}\): .* has passed step {passed}, and"):
            phases.check_save_at(resolve(config), tmp_path)
    assert capsys.readouterr().out == ""
    config.init_from = "elsewhere"  # and the trunk there is an import: step 4 of another run
    phases.check_save_at(resolve(config), tmp_path)


def test_a_damaged_checkpoint_does_not_count_as_passed(tmp_path):
    """The run goes back to the one before it."""
    with Checkpoints(tmp_path, "trunk") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, {"w": np.ones(3)}, {}, {}, wait=True)
        largest = max((f for f in checkpoints.path(4).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        largest.write_bytes(b"")
    config = toy.get_config()
    config.train.phases.trunk.save_at = (3,)
    phases.check_save_at(resolve(config), tmp_path)


def test_a_quantized_phase_is_no_trunk(tiny_run, capsys, tmp_path, cache):
    code, line = fails(capsys, *arguments(tmp_path / "run", f"--config.init_from={tiny_run}:qat"))
    assert code == 2
    assert "phase 'qat' is quantized" in line and f"({tiny_run}:trunk, {tiny_run}:control)" in line
    assert not (tmp_path / "run").exists()
