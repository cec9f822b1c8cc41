import contextlib
import io
import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2

from qatmoe import metrics
from qatmoe.errors import UserError
from qatmoe.metrics import Metrics, Progress, Trace


def write_steps(workdir, phase, steps, tensorboard=False):
    with Metrics(workdir, tensorboard) as m:
        for step in steps:
            m.write(phase, step, "train", {"loss": 1.0 + step})


def steps_of(workdir, phase):
    return [r["step"] for r in metrics.read(workdir) if r["phase"] == phase]


def tensorboard_of(workdir, phase):
    events = EventAccumulator(str(workdir / "tb" / phase), {"scalars": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def test_a_record_comes_back(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as m:
        m.write("qat", 3, "valid", {"loss": np.float32(2.5), "mtp1_loss": 4})
        (record,) = metrics.read(tmp_path)  # before the file is closed: each line is flushed
    assert record.pop("time") > 1e9
    assert record == {"phase": "qat", "step": 3, "split": "valid", "loss": 2.5, "mtp1_loss": 4.0}
    assert not (tmp_path / "tb").exists()


def test_values_that_are_not_finite_stay_strict_json(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as m:
        m.write("qat", 3, "train", {"loss": math.nan, "grad_norm": math.inf})
        m.rewind("trunk", -1)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (record,) = metrics.read(tmp_path)
    assert math.isnan(record["loss"])
    assert math.isnan(record["grad_norm"])


def test_a_name_that_would_hide_the_step_is_refused(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as m, pytest.raises(ValueError, match="step"):
        m.write("qat", 3, "train", {"step": 1.0})


def test_a_line_cut_by_a_kill_is_dropped_and_not_glued(tmp_path):
    write_steps(tmp_path, "trunk", [1, 2])
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    for cut in (1, 10, len(whole) // 2 - 1):  # the last: only the newline is missing
        file.write_bytes(whole[: len(whole) - cut])
        assert steps_of(tmp_path, "trunk") == [1]
        write_steps(tmp_path, "trunk", [3])
        assert steps_of(tmp_path, "trunk") == [1, 3]


def test_a_broken_line_inside_is_named(tmp_path):
    write_steps(tmp_path, "trunk", [1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_text("{oops\n" + file.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a metrics record \('\{oops'\)"):
        metrics.read(tmp_path)


def test_no_file_is_no_records(tmp_path):
    assert metrics.read(tmp_path) == []


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        Metrics(tmp_path / "nowhere")


def test_rewind_forgets_only_later_records_of_the_phase(tmp_path):
    write_steps(tmp_path, "trunk", [1, 2, 3])
    write_steps(tmp_path, "qat", [1, 2, 3, 4])
    with Metrics(tmp_path, tensorboard=False) as m:
        m.rewind("qat", 2)
        assert steps_of(tmp_path, "qat") == [1, 2]
        m.write("qat", 3, "train", {"loss": 0.5})
        assert steps_of(tmp_path, "qat") == [1, 2, 3]
        m.rewind("qat", -1)
        assert steps_of(tmp_path, "qat") == []
    assert steps_of(tmp_path, "trunk") == [1, 2, 3]


def test_tensorboard_tags_and_values(tmp_path):
    with Metrics(tmp_path) as m:
        m.write("qat", 1, "train", {"loss": 2.0, "moe/load_max": 1.5, "lr": 0.1})
        m.write("qat", 1, "valid", {"loss": 3.0, "perplexity": 20.0})
        m.write("qat", 1, "health", {"flip_rate/experts": 0.01})
        m.write("ptq:control:search", 1, "final", {"loss": 3.5})
        m.histogram("qat", 1, "moe/load", np.asarray([1.0, 2.0, math.nan]))
        m.text("plan", "tensor  grid\nembed   none")
    qat = tensorboard_of(tmp_path, "qat")
    assert set(qat.Tags()["scalars"]) == {
        "loss/train",
        "moe/load_max",
        "optim/lr",
        "loss/valid",
        "valid/perplexity",
        "health/flip_rate/experts",
    }
    assert qat.Tags()["histograms"] == ["moe/load"]
    assert qat.Scalars("loss/valid")[0].value == 3.0
    assert tensorboard_of(tmp_path, "ptq_control_search").Scalars("loss/final")[0].value == 3.5
    (text,) = tensorboard_of(tmp_path, "run").Tags()["tensors"]
    assert text.startswith("plan")


def test_tensorboard_forgets_what_was_rewound(tmp_path):
    write_steps(tmp_path, "qat", [1, 2, 3, 4], tensorboard=True)
    with Metrics(tmp_path) as m:
        m.rewind("qat", 2)
        m.write("qat", 3, "train", {"loss": 50.0})
    scalars = tensorboard_of(tmp_path, "qat").Scalars("loss/train")
    assert [(s.step, s.value) for s in scalars] == [(1, 2.0), (2, 3.0), (3, 50.0)]


def test_hparams_are_a_subrun_that_is_written_anew(tmp_path):
    settings = {"optim.lr": 0.1, "quant.experts": "q2_0", "train.tensorboard": True, "optim.betas": [0.9, 0.95]}
    for loss in (3.0, 2.0):
        metrics.hparams(tmp_path, settings, {"final/loss_qat": loss})
    events = EventAccumulator(str(tmp_path / "tb" / "hparams")).Reload()
    content = events.PluginTagToContent(hparams_metadata.PLUGIN_NAME)
    start = plugin_data_pb2.HParamsPluginData.FromString(content[hparams_metadata.SESSION_START_INFO_TAG])
    found = start.session_start_info.hparams
    assert found["optim.lr"].number_value == 0.1
    assert found["quant.experts"].string_value == "q2_0"
    assert found["train.tensorboard"].bool_value is True
    assert found["optim.betas"].string_value == "[0.9, 0.95]"
    assert set(content) == {hparams_metadata.SESSION_START_INFO_TAG, hparams_metadata.SESSION_END_INFO_TAG}
    assert [s.value for s in events.Scalars("final/loss_qat")] == [2.0]


class Device:
    def __init__(self, **stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats or None


def test_memory_of_the_fullest_device():
    full = Device(bytes_in_use=2**30, peak_bytes_in_use=3 * 2**30, num_allocs=1)
    other = Device(bytes_in_use=2**31, peak_bytes_in_use=5 * 2**29)
    assert metrics.device_memory([full, other]) == {"memory/peak_gib": 3.0, "memory/in_use_gib": 2.0}
    assert metrics.device_memory([Device()]) == {}  # a CPU
    assert metrics.device_memory([Device(bytes_in_use=0)]) == {"memory/in_use_gib": 0.0}


def cut_short(workdir):
    with Trace(workdir, "qat", 2, 2) as trace:
        for n in (1, 2):
            trace.before(n, np.zeros(3))
        raise KeyboardInterrupt


def test_a_trace_that_is_cut_short_is_ended(tmp_path):
    for _ in range(2):  # a profiler that was left on could not be started again
        with pytest.raises(KeyboardInterrupt):
            cut_short(tmp_path)
    assert list((tmp_path / "tb" / "qat" / "plugins" / "profile").glob("*/*.xplane.pb"))
    with Trace(tmp_path, "trunk", 0, 3) as trace:
        trace.before(0, np.zeros(3))
    assert not (tmp_path / "tb" / "trunk").exists()


def test_processes_of_one_host_trace_into_folders_of_their_own(tmp_path, monkeypatch):
    for process in range(2):
        monkeypatch.setattr(metrics.jax, "process_index", lambda process=process: process)
        with Trace(tmp_path, "qat", 1, 1) as trace:
            trace.before(1, np.zeros(3))
            trace.after(1, np.zeros(3))
    folders = sorted((tmp_path / "tb" / "qat" / "plugins" / "profile").iterdir(), key=lambda f: f.name[-1])
    assert [f.name[-3:] for f in folders] == ["_p0", "_p1"]
    assert all(len(list(f.glob("*.xplane.pb"))) == 1 for f in folders)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still unless the test moves it."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_progress_off_a_terminal_is_a_line_now_and_then(clock):
    out = io.StringIO()
    with contextlib.closing(Progress("qat", 0, 100, steps_after=50, every=30, stream=out)) as progress:
        for step in range(1, 12):
            progress.update(step, loss=4.0 - step / 10, tokens_per_s=41_234)
            clock[0] += 10
    first, *_, last = out.getvalue().splitlines()
    assert first == "qat 4/100  loss 3.6000  41.2k tokens/s  24m20s left"  # (96 + 50) steps of 10 s
    assert last.startswith("qat 11/100")
    assert len(out.getvalue().splitlines()) == 4  # steps 4, 7, 10 and the last


def test_progress_on_a_terminal_is_a_bar(clock):
    out = Terminal()
    with contextlib.closing(Progress("qat", 40, 100, stream=out)) as progress:
        clock[0] += 1
        progress.update(41, loss=4.0, tokens_per_s=900)
        clock[0] += 1
        progress.update(42, loss=3.5, tokens_per_s=900)
    last = out.getvalue().rstrip().split("\r")[-1]
    assert "qat 42/100" in last
    assert "loss 3.5000  900 tokens/s  58s left" in last


def test_progress_of_nothing_prints_nothing():
    out = io.StringIO()
    Progress("qat", 100, 100, stream=out).close()
    assert out.getvalue() == ""
