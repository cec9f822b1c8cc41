"""Tasks for lm-evaluation-harness that need no download, made from the bundled held-out novel.

    cloze   where the book goes on: a few sentences, and four continuations, of which one is true and three are from
            elsewhere in the book; chance is 25 %
    novel   rolling perplexity of the book's chapters

Both are functions of the text alone: the same questions in the same order everywhere.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from qatmoe.data import corpus

NAMES = ("cloze", "novel")
VERSION = 1.0

CHOICES = 4
_CONTEXT = 120  # characters before the continuation, at least; sentences are not cut
_CONTINUATION = (30, 150)  # shortest and longest, characters
_APART = 40  # questions between a continuation and the question that it is a wrong answer to
_CANDIDATES = 16  # of these, the three of the most similar length are the wrong answers

# This text separates sentences by two spaces, which sets them apart from abbreviations.
_SENTENCE = re.compile(r"(?<=[.!?\"'])  +(?=\S)")
_CHAPTER = re.compile(r"^Chapter \d+$", re.MULTILINE)


def questions(text: str) -> list[dict[str, Any]]:
    """[{"context", "choices", "label"}]: each sentence of a fitting length with enough of its paragraph before it."""
    found = [pair for paragraph in text.split("\n\n") for pair in _continuations(paragraph)]
    return [_question(i, found) for i in range(len(found))]


def chapters(text: str) -> list[str]:
    """The chapters, headings left out; of a text without any, all of it."""
    parts = [part.strip() for part in _CHAPTER.split(text)]
    return parts[1:] or parts


def write(folder: Path) -> None:
    """Writes both tasks: a YAML file and its documents each, for `TaskManager(include_path=folder)`."""
    text = next(corpus.documents("default", field="data.valid")).text
    novel = [{"text": chapter} for chapter in chapters(text)]
    _write(folder, "cloze", questions(text), {
        "output_type": "multiple_choice",
        "fewshot_split": "test",  # named, so that a question is not among its own solved examples
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    })  # fmt: skip
    _write(folder, "novel", novel, {
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            _metric("word_perplexity", "weighted_perplexity", False),
            _metric("byte_perplexity", "weighted_perplexity", False),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    })  # fmt: skip


def _continuations(paragraph: str) -> list[tuple[str, str]]:
    """(what stands before it, sentence) for the sentences that can be asked for."""
    sentences = [" ".join(sentence.split()) for sentence in _SENTENCE.split(paragraph)]
    found = []
    start = 0  # contexts do not overlap with the question before
    for i, sentence in enumerate(sentences):
        before = " ".join(sentences[start:i])
        if len(before) >= _CONTEXT and _CONTINUATION[0] <= len(sentence) <= _CONTINUATION[1]:
            while i - start > 1 and len(" ".join(sentences[start + 1 : i])) >= _CONTEXT:
                start += 1
            found.append((" ".join(sentences[start:i]), sentence))
            start = i
    return found


def _question(i: int, found: list[tuple[str, str]]) -> dict[str, Any]:
    """Wrong answers are other questions' true ones, of about the same length."""
    context, true = found[i]
    far = [sentence for j, (_, sentence) in enumerate(found) if abs(i - j) > _APART and sentence != true]
    drawn = sorted(set(far), key=lambda sentence: _hash(f"{i} {sentence}"))[:_CANDIDATES]
    wrong = sorted(drawn, key=lambda sentence: (abs(len(sentence) - len(true)), sentence))[: CHOICES - 1]
    choices = sorted([true, *wrong], key=lambda sentence: _hash(f"order {i} {sentence}"))
    return {"context": context, "choices": choices, "label": choices.index(true)}


def _hash(text: str) -> bytes:
    """An order that no version of a random number generator changes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def _write(folder: Path, name: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
    documents = folder / f"{name}.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": VERSION},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")  # JSON is YAML
