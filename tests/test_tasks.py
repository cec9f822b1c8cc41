"""The tasks command: from a run to its table, without a network, and what is refused."""

import contextlib
import dataclasses
import json
import math
import socket
import sys

import numpy as np
import pytest
from test_gguf_model import GLM, make_run

from qatmoe import tasks
from qatmoe.config import QuantConfig
from qatmoe.convert.weights import Branch
from qatmoe.data import cloze, corpus, tokenizer
from qatmoe.errors import UserError
from qatmoe.harness import Model
from qatmoe.mesh import local_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

LIMIT = 6
TEXT = next(corpus.documents("default", field="data.valid")).text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one branch with random weights on a grid."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    make_run(folder, tokenizer.load(), dataclasses.replace(GLM, vocab_size=2048, dim=64, expert_dim=64), QuantConfig())
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """What the command writes of the bundled tasks, and what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloze, "chapters", lambda text: [text[1000:1600], text[3000:3900], text[9000:9300]])
        assert tasks.main([f"--run={run}", f"--limit={LIMIT}", "--context=64"]) == 0
    return json.loads((run / "tasks.json").read_text())


def rows_of(report):
    return {(row["task"], row["metric"]): row for row in report["rows"]}


def test_end_to_end_without_a_network(run, offline, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert tasks.main([f"--run={run}", "--tasks=cloze", "--limit=2", "--context=32", f"--json={out}"]) == 0
    said = capsys.readouterr().out
    assert "cloze  acc " in said and "near chance" in said and str(out) in said
    assert json.loads(out.read_text())["limit"] == 2


def test_solved_examples_stand_before_a_question(run, offline, tmp_path, monkeypatch):
    asked, out = [], tmp_path / "out.json"
    encode = Model._encode_pair
    monkeypatch.setattr(Model, "_encode_pair", lambda self, *pair: asked.append(pair) or encode(self, *pair))
    args = [f"--run={run}", "--tasks=cloze", "--limit=2", f"--json={out}"]
    assert tasks.main(args) == 0
    plain, asked[:] = list(asked), []
    assert {row["shots"] for row in json.loads(out.read_text())["rows"]} == {0}
    assert tasks.main([*args, "--num_fewshot=1"]) == 0
    assert {row["shots"] for row in json.loads(out.read_text())["rows"]} == {1}
    assert len(asked) == len(plain) == 8
    for (context, choice), (before, same) in zip(asked, plain, strict=True):
        assert choice == same and context.endswith(before) and len(context) > len(before) + 20


def test_no_question_is_among_its_own_solved_examples(run, offline, tmp_path, monkeypatch):
    asked, out, questions = [], tmp_path / "out.json", cloze.questions
    encode = Model._encode_pair
    monkeypatch.setattr(Model, "_encode_pair", lambda self, *pair: asked.append(pair) or encode(self, *pair))
    monkeypatch.setattr(cloze, "questions", lambda text: questions(text)[:4])
    monkeypatch.setattr(cloze, "chapters", lambda text: [text[1000:1600]])
    assert tasks.main([f"--run={run}", "--num_fewshot=3", f"--json={out}"]) == 0
    contexts = {context for context, _ in asked if context}
    assert len(contexts) == 4
    own = [q["context"] for q in questions(TEXT)[:4]]
    for context in contexts:
        assert sorted(context.count(question) for question in own) == [1] * 4  # three others, and the one that is asked
        assert sum(context.endswith(question) for question in own) == 1
    shots = {row["task"]: row["shots"] for row in json.loads(out.read_text())["rows"]}
    assert shots == {"cloze": 3, "novel": 0}


def test_accuracies_are_those_of_the_models_own_log_likelihoods(run, report):
    with Branch(run, rest="F32") as branch:
        cfg = dataclasses.replace(branch.model, scan_layers=False)
        model = Model(branch.numbers(), cfg, local_mesh(), branch.tokenizer, 64)
    right, right_by_byte = [], []
    for q in cloze.questions(TEXT)[:LIMIT]:
        pairs = [(("", ""), *model._encode_pair(q["context"], " " + choice)) for choice in q["choices"]]
        nats = np.array([total for total, _ in model._loglikelihood_tokens(pairs)])
        right.append(nats.argmax() == q["label"])
        right_by_byte.append((nats / [len(choice) for choice in q["choices"]]).argmax() == q["label"])
    rows = rows_of(report)
    for metric, values in (("acc", right), ("acc_norm", right_by_byte)):
        row = rows["cloze", metric]
        assert row["value"] == np.mean(values)
        assert row["stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(LIMIT))
        assert (row["documents"], row["branch"], row["step"]) == (LIMIT, "only", 1)


def test_perplexities_are_of_one_sum(report):
    rows = rows_of(report)
    bits, byte = rows["novel", "bits_per_byte"], rows["novel", "byte_perplexity"]
    assert math.log2(byte["value"]) == pytest.approx(bits["value"])
    assert byte["stderr"] == pytest.approx(bits["stderr"] * byte["value"] * math.log(2))
    assert bits["documents"] == 3 and 0 < bits["stderr"] < bits["value"]
    assert bits["value"] > 3  # random weights know nothing: log2(2048) bits a token of 3.4 bytes


# ---- standard errors -------------------------------------------------------------------------------------------------


def test_the_error_of_a_ratio_by_hand():
    pairs = [(-10.0, 4), (-9.0, 5), (-30.0, 11)]
    ratio = 49 / 20
    expected = [math.sqrt(3 / 2) * part / 20 for part in (10 - ratio * 4, 9 - ratio * 5, 30 - ratio * 11)]
    np.testing.assert_allclose(tasks._influence("bits_per_byte", 0.0, pairs), np.array(expected) / math.log(2))
    np.testing.assert_allclose(tasks._influence("word_perplexity", 0.0, pairs), np.array(expected) * math.exp(ratio))


def test_the_error_of_a_ratio_is_that_of_drawn_documents():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 150, (2000, 40))
    nats = sizes * rng.normal(2.0, 0.3, sizes.shape)
    drawn = np.std(nats.sum(1) / sizes.sum(1)) / math.log(2)
    influence = tasks._influence("bits_per_byte", 0.0, list(zip(-nats[0], sizes[0], strict=True)))
    assert math.sqrt(np.sum(influence**2)) == pytest.approx(drawn, rel=0.3)


def test_differences_are_of_pairs():
    def row(values):
        return {
            "value": np.mean(values),
            "influence": tasks._influence("acc", np.mean(values), [float(v) for v in values]),
        }

    first, other = np.array([1, 0, 1, 1, 0]), np.array([1, 0, 0, 1, 0])
    difference, error = tasks.compare(row(first), row(other))
    assert difference == pytest.approx(-0.2)
    assert error == pytest.approx(np.std(other - first, ddof=1) / math.sqrt(5))
    assert tasks.compare(row(first), row(first)) == (0.0, 0.0)
    assert tasks.compare(row(first), row(other) | {"influence": None}) == (pytest.approx(-0.2), None)


def test_metrics_that_are_no_mean_keep_the_harness_own_error():
    found = {
        "results": {
            "t": {"alias": "t", "f1,strict": 0.5, "f1_stderr,strict": 0.1, "em,none": 1.0, "em_stderr,none": "N/A"}
        },
        "samples": {"t": [{"filter": "strict", "f1": (1, 0)}, {"filter": "strict", "f1": (0, 1)}]},
        "n-samples": {"t": {"effective": 7}},
        "n-shot": {"t": 5},
    }
    strict, exact = tasks._rows("t", found)
    assert (strict["shots"], exact["shots"]) == (5, 5)
    assert (strict["metric"], strict["stderr"], strict["documents"], strict["influence"]) == (
        "f1 (strict)",
        0.1,
        2,
        None,
    )
    assert (exact["metric"], exact["stderr"], exact["documents"]) == ("em", None, 7)


def test_other_functions_of_a_documents_number_are_no_means():
    assert tasks._influence("perplexity", math.exp(2.5), [-2.0, -3.0]) is None
    assert tasks._influence("acc", 0.5, [0.0]) is None


def test_the_table_has_a_column_for_each_branch_and_difference():
    def rows(values):
        influence = tasks._influence("acc", np.mean(values), values)
        error = math.sqrt(np.sum(influence**2))
        return [
            {
                "task": "t",
                "metric": "acc",
                "value": np.mean(values),
                "stderr": error,
                "documents": 4,
                "influence": influence,
            }
        ]

    head, line = tasks.table({"control": rows([1, 0, 1, 1]), "qat": rows([1, 0, 0, 1])}).splitlines()
    assert head.endswith("  qat - control")
    assert line.split() == "t acc 4 0.7500 ±0.2500 0.5000 ±0.2887 -0.2500 ±0.2500".split()


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Runs the command on two documents of a task, whose scores are given by branch; returns the file.

    An exception in place of scores is raised. `digests`: of checkpoints, where they are not as ever; `meanwhile` is
    called as a branch is measured.
    """

    def call(scores, *args, digests=(), meanwhile=lambda: None):
        digests = dict(digests)

        def measured(args, name, *_):
            meanwhile()
            if isinstance(scores[name], BaseException):
                raise scores[name]
            values = np.array(scores[name], np.float64)
            row = {"task": "cloze", "metric": "acc", "value": values.mean(), "stderr": None, "documents": 2, "shots": 0}
            return (
                name,
                {"step": 7, "checkpoint": digests.get(name, "d")},
                [row | {"influence": tasks._influence("acc", values.mean(), list(values))}],
            )

        monkeypatch.setattr(tasks, "_measured", measured)
        monkeypatch.setattr(tasks, "_digest", lambda run, phase, step: digests.get(phase, "d"))
        monkeypatch.setattr(tasks, "opened", contextlib.nullcontext)
        assert tasks.main([f"--run={tmp_path}", "--tasks=cloze", "--branch", *scores, *args]) == 0
        return json.loads((tmp_path / "tasks.json").read_text())

    return call


def values_of(report):
    return {row["branch"]: row["value"] for row in report["rows"]}


def test_finished_branches_outlive_an_interruption(scored, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt, match="^$"):
        scored({"control": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt, match="tasks.json has control$"):
        scored({"control": [1, 0], "qat": KeyboardInterrupt(), "other": [1, 1]})
    assert values_of(json.loads((tmp_path / "tasks.json").read_text())) == {"control": 0.5}
    assert capsys.readouterr().out == ""


def test_other_branches_of_the_same_settings_are_kept(scored, capsys):
    both = scored({"control": [1, 0], "qat": [1, 1]})
    qat = both["rows"][1]
    assert (qat["against"], qat["difference"], qat["difference_stderr"]) == ("control", 0.5, pytest.approx(0.5))
    report = scored({"third": [0, 0]})
    assert report == both | {"rows": [*report["rows"][:1], *both["rows"]]}  # with its difference: control is the same
    assert values_of(report) == {"third": 0.0, "control": 0.5, "qat": 1.0}
    report = scored({"control": [0, 0]})
    assert values_of(report) == {"control": 0.0, "third": 0.0, "qat": 1.0}
    assert not any("difference" in row or "against" in row for row in report["rows"])  # of the control that was
    (warning,) = capsys.readouterr().err.splitlines()
    assert "tasks.json has lost differences of qat to control: give these in one call" in warning
    scored({"control": [1, 0], "qat": [1, 1]})
    scored({"control": [1, 0], "qat": [0, 1]})  # made again
    assert capsys.readouterr().err == ""


def test_what_another_call_wrote_meanwhile_is_kept_or_named(scored, tmp_path, capsys):
    """Of the same settings it is kept; what is not kept is said, once."""
    out = tmp_path / "tasks.json"

    def other_call(limit):
        there = json.loads(out.read_text())
        new = there["rows"][0] | {"branch": "new"}
        out.write_text(json.dumps(there | {"limit": limit, "rows": [*there["rows"], new]}))

    scored({"control": [1, 0]})
    report = scored({"qat": [1, 1]}, meanwhile=lambda: other_call(None))
    assert set(values_of(report)) == {"control", "new", "qat"} and capsys.readouterr().err == ""
    report = scored({"qat": [1, 1], "third": [0, 0]}, meanwhile=lambda: other_call(5))
    assert set(values_of(report)) == {"qat", "third"}
    (warning,) = capsys.readouterr().err.splitlines()
    assert "has limit=5 (now None); it will be replaced" in warning


@pytest.mark.parametrize("option", ["limit", "num_fewshot", "context"])
def test_a_file_of_other_settings_is_replaced_and_that_is_said(option, scored, capsys):
    scored({"control": [1, 0]})
    report = scored({"qat": [1, 1]}, f"--{option}=3")
    assert values_of(report) == {"qat": 1.0} and report[option] == 3
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and f"tasks.json has {option}=" in warning
    assert warning.endswith(" (now 3); it will be replaced")


def test_scores_of_a_checkpoint_that_was_trained_again_are_not_kept(scored, capsys):
    """Nor those of another run whose folder has the same name."""
    scored({"control": [1, 0], "qat": [0, 1], "third": [0, 0]})
    report = scored({"qat": [1, 1]}, digests={"control": "another"})
    assert values_of(report) == {"qat": 1.0, "third": 0.0}
    assert not any("difference" in row for row in report["rows"])
    err = capsys.readouterr().err
    assert "has another checkpoint's scores of control, which are left out" in err
    assert "has lost differences of qat to control, third to control" in err


def test_scores_of_a_checkpoint_that_was_deleted_are_kept(scored, capsys):
    scored({"control": [1, 0], "qat": [0, 1]})
    report = scored({"third": [1, 1]}, digests={"qat": None})
    assert values_of(report) == {"third": 1.0, "control": 0.5, "qat": 0.5} and capsys.readouterr().err == ""
    report = scored({"third": [1, 1]}, digests={"qat": None, "control": ""})  # of which there is a later step
    assert values_of(report) == {"third": 1.0, "qat": 0.5}
    assert "has another checkpoint's scores of control, which are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("digest", "kept", "gone"),
    [("", {"qat": 0.5}, "control"), (tasks.TRAINED_AGAIN, {}, "control, qat")],
    ids=["trained for longer", "trained again"],
)
def test_scores_of_branches_that_another_run_does_not_have_yet_are_not_kept(digest, kept, gone, scored, capsys):
    scored({"control": [1, 0], "qat": [0, 1]})
    report = scored({"third": [1, 1]}, digests={"control": digest, "qat": None})
    assert values_of(report) == {"third": 1.0} | kept
    assert f"has another checkpoint's scores of {gone}, which are left out" in capsys.readouterr().err


def test_scores_of_another_run_are_not_kept(scored, capsys):
    scored({"third": [1, 1], "control": [1, 0]})
    scored({"qat": [0, 1]})
    capsys.readouterr()
    digests = {"third": "other", "control": "other"}  # another run
    report = scored({"third": [1, 1]}, digests=digests | {"qat": None})
    assert values_of(report) == {"third": 1.0} and "scores of third, control, qat, which" in capsys.readouterr().err


def test_a_checkpoint_is_told_from_none_and_from_another_step(tmp_path):
    folder = tmp_path / "checkpoints" / "qat" / "7"
    assert tasks._digest(str(tmp_path), "qat", 7) is None
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert tasks._digest(str(tmp_path), "qat", 6) == "" and len(tasks._digest(str(tmp_path), "qat", 7)) == 32
    assert tasks._digest(str(tmp_path), "qat", 8) == tasks.TRAINED_AGAIN


def test_differences_that_an_interruption_lost_are_named(scored, capsys):
    scored({"control": [1, 0], "qat": [1, 1]})
    with pytest.raises(KeyboardInterrupt):
        scored({"control": [1, 0], "qat": KeyboardInterrupt()})
    assert "tasks.json has lost differences of qat to control" in capsys.readouterr().err


def test_what_was_measured_is_shown_where_a_later_branch_fails(scored, capsys):
    with pytest.raises(AssertionError):
        scored({"control": [1, 0], "qta": UserError("no such phase")})
    out, err = capsys.readouterr()
    assert "control" in out and "error: no such phase" in err


def test_a_file_that_holds_no_scores_is_replaced_and_that_is_said(scored, tmp_path, capsys):
    for content in ("{", "[]", '{"rows": 3}', '{"rows": [{}]}', '{"rows": [null]}', '{"rows": [{"branch": 3}]}'):
        (tmp_path / "tasks.json").write_text(content)
        assert values_of(scored({"qat": [1, 1]})) == {"qat": 1.0}
        assert "tasks.json has no scores of tasks; it will be replaced" in capsys.readouterr().err
    now = json.loads((tmp_path / "tasks.json").read_text())
    (tmp_path / "tasks.json").write_text(json.dumps(now | {"rows": [{"branch": "control"}]}))  # of no checkpoint
    assert values_of(scored({"qat": [1, 1]})) == {"qat": 1.0}
    assert "tasks.json has no scores of tasks; it will be replaced" in capsys.readouterr().err
    old = {"lm_eval": "0.4", "limit": None, "rows": [{"branch": "control"}]}  # from before the settings were written
    (tmp_path / "tasks.json").write_text(json.dumps(old))
    assert values_of(scored({"qat": [1, 1]})) == {"qat": 1.0}
    assert "tasks=unknown (now ['cloze'])" in capsys.readouterr().err


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(capsys, *args):
    assert tasks.main(list(args)) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tasks=,"], "--tasks ',': names no task"),
        (["--tasks=cloze", "--limit=0"], "--limit 0: must be at least 1"),
        (["--tasks=cloze", "--num_fewshot=-1"], "--num_fewshot -1: must be at least 0"),
        (["--tasks=cloze", "--context=1"], "--context 1: must be at least 2"),
        (["--tasks=cloze", "--branch=qat"], "has no such phase; it has only"),
        (["--tasks=cloze,hellaswagg"], "did you mean 'hellaswag'?"),
    ],
)
def test_unusable_input(args, said, run, capsys, tmp_path):
    out = tmp_path / "out.json"
    assert said in refused(capsys, f"--run={run}", f"--json={out}", *args)
    assert not out.exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "opened", None)
    assert "there is no such folder" in refused(capsys, f"--run={run}", f"--json={tmp_path}/a/b.json")
    assert "is a folder" in refused(capsys, f"--run={run}", f"--json={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_without_the_harness_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install -e '.[eval]'" in refused(capsys, f"--run={run}")


def test_a_data_set_that_cannot_be_reached(run, capsys, monkeypatch, tmp_path):
    def unreachable(**options):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\n(no network)")

    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    line = refused(capsys, f"--run={run}", "--tasks=cloze", f"--json={tmp_path / 'x'}")
    assert line.endswith("a data set cannot be loaded: Couldn't reach 'Rowan/hellaswag' on the Hub (no network)")


def test_more_solved_examples_than_there_are(run, offline, capsys, monkeypatch, tmp_path):
    questions = cloze.questions
    monkeypatch.setattr(cloze, "questions", lambda text: questions(text)[:4])
    line = refused(capsys, f"--run={run}", "--tasks=cloze", "--num_fewshot=4", f"--json={tmp_path / 'x'}")
    assert line.startswith("error: --num_fewshot 4: of --tasks cloze one has not so many solved examples")
    assert not (tmp_path / "x").exists()


def test_other_errors_of_the_harness_are_not_taken_for_it(run, monkeypatch, tmp_path):
    def broken(**options):
        raise ValueError("something else")

    monkeypatch.setattr("lm_eval.simple_evaluate", broken)
    with pytest.raises(ValueError, match="something else"):
        tasks.main([f"--run={run}", "--tasks=cloze", "--num_fewshot=4", f"--json={tmp_path / 'x'}"])
