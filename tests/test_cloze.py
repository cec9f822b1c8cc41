"""The bundled tasks: what is asked, and that it stays so."""

import hashlib
import json

import pytest

from qatmoe.data import cloze, corpus

TEXT = next(corpus.documents("default", field="data.valid")).text


@pytest.fixture(scope="module")
def questions():
    return cloze.questions(TEXT)


def test_the_questions_never_change(questions):
    # Scores of different versions of the package are compared: other questions need another cloze.VERSION.
    digest = hashlib.sha256("".join(json.dumps(q, sort_keys=True) for q in questions).encode()).hexdigest()
    assert (cloze.VERSION, len(questions), digest[:16]) == (1.0, 709, "311583910975f6f0")


def test_one_choice_goes_on_from_the_context_and_the_others_are_elsewhere(questions):
    book = " ".join(TEXT.split())
    for q in questions:
        assert len(set(q["choices"])) == 4
        places = [f"{q['context']} {choice}" in book for choice in q["choices"]]
        assert places.index(True) == q["label"] and sum(places) == 1
        assert all(choice in book for choice in q["choices"])


def test_neither_place_nor_length_tells_the_true_one(questions):
    n = len(questions)
    for place in range(4):
        assert abs(sum(q["label"] == place for q in questions) / n - 0.25) < 0.05
    for pick in (min, max):
        right = sum(pick(range(4), key=lambda k: len(q["choices"][k])) == q["label"] for q in questions)
        assert right / n < 0.25
    lengths = [[len(choice) for choice in q["choices"]] for q in questions]
    assert sum(max(row) - min(row) <= 25 for row in lengths) / n > 0.8


def test_contexts_fit_a_short_window(questions):
    assert all(len(q["context"]) >= 120 for q in questions)
    assert sum(len(q["context"]) + max(map(len, q["choices"])) < 400 for q in questions) / len(questions) > 0.8


def test_chapters():
    chapters = cloze.chapters(TEXT)
    assert len(chapters) == 24
    assert chapters[0].startswith("Sir Walter Elliot, of Kellynch Hall")
    assert sum(map(len, chapters)) > 0.99 * len(TEXT)
    assert cloze.chapters("No headings.\nAt all.") == ["No headings.\nAt all."]


def test_short_texts_give_no_question():
    assert cloze.questions("Too short.  For a question.") == []
