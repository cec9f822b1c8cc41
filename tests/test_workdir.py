"""The run's directory: whose it is, and that one process holds it."""

import fcntl
import json
import os
import re
import threading

import pytest
from test_checkpoint import child

from qatmoe.errors import UserError
from qatmoe.workdir import open_workdir

CONFIG = json.dumps({"name": "a", "train": {"seed": 0, "phases": {"trunk": {"steps": 9}}}})


def test_workdir_is_made_and_entered_again(tmp_path):
    workdir = tmp_path / "runs/a"
    with open_workdir(workdir, CONFIG):
        assert json.loads((workdir / "config.json").read_text()) == json.loads(CONFIG)
    with open_workdir(workdir, json.dumps(json.loads(CONFIG), indent=3)):
        pass


def test_another_config_is_refused_by_key(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    other = {"name": "b", "train": {"seed": 0, "phases": {"qat": {"steps": 9}}}}
    with pytest.raises(UserError) as caught:
        open_workdir(tmp_path, json.dumps(other))
    message = str(caught.value)
    for part in ("name: 'a' there, 'b' here", "train.phases.trunk.steps: 9 there, 'absent' here", "train.phases.qat"):
        assert part in message
    assert "seed" not in message
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(CONFIG)
    open_workdir(tmp_path, CONFIG).close()  # the refused attempt holds no lock


def test_a_key_that_came_later_has_its_default_in_an_older_run(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    later = json.loads(CONFIG) | {"quant": {"signed": True}}
    open_workdir(tmp_path, json.dumps(later)).close()
    with pytest.raises(UserError, match=r"quant.signed: 'absent' there, False here"):
        open_workdir(tmp_path, json.dumps(later | {"quant": {"signed": False}}))


def test_a_look_at_the_lock_stops_no_run(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    with open(tmp_path / "lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        open_workdir(tmp_path, CONFIG).close()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no qatmoe run"):
        open_workdir(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_workdir_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match="Not a directory"):
            open_workdir(path, CONFIG)


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "a\\b", os.fsdecode(b"a\xff")])
def test_a_path_that_checkpoints_cannot_be_written_below(name, tmp_path, monkeypatch):
    """Whichever part of it is meant to have another name, and however the run is addressed."""
    character = re.escape(repr(re.sub(r"[ab1\]]", "", name)))
    with pytest.raises(UserError, match=f"with {character} in its name"):
        open_workdir(tmp_path / name, CONFIG)
    assert os.listdir(tmp_path) == []
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match=f"with {character} in its name"):
        open_workdir("run", CONFIG)
    assert os.listdir() == []


def test_one_process_at_a_time(tmp_path):
    code = """
        import sys, time
        from qatmoe.workdir import open_workdir
        with open_workdir(sys.argv[1], sys.argv[2]):
            print("locked", flush=True)
            time.sleep(100)
    """
    holder = child(code, tmp_path, CONFIG)
    try:
        assert holder.stdout.readline().strip() == "locked"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            open_workdir(tmp_path, CONFIG)
    finally:
        holder.kill()  # and a killed process holds nothing
        holder.communicate()
    open_workdir(tmp_path, CONFIG).close()


def test_a_run_may_be_continued_with_another_cache_directory(tmp_path):
    with open_workdir(tmp_path / "run", json.dumps({"data": {"cache_dir": "a", "seq_len": 8}})):
        pass
    with open_workdir(tmp_path / "run", json.dumps({"data": {"cache_dir": "b", "seq_len": 8}})):
        pass
    with pytest.raises(UserError, match=r"data\.seq_len"):
        open_workdir(tmp_path / "run", json.dumps({"data": {"cache_dir": "b", "seq_len": 9}}))
