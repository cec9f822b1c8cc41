"""Held-out text cut into windows, document by document or as training packed it."""

import dataclasses
import json

import numpy as np
import pytest

from qatmoe.config import DataConfig
from qatmoe.data import domains, tokenizer
from qatmoe.data.batches import Data, Stream
from qatmoe.errors import UserError

L, N_MTP = 4, 1
CFG = DataConfig(seq_len=L)
TOKENIZER = tokenizer.load()
END = TOKENIZER.end_id


def source(tmp_path, texts):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(file)


def cut(tmp_path, texts, tokens=10**6, cfg=CFG):
    return domains.of_source("texts", source(tmp_path, texts), cfg, TOKENIZER, N_MTP, tokens)


def packed(lengths, cfg=CFG):
    """A run's held-out stream whose tokens are 0, 1, 2, ..."""
    ends = np.cumsum(lengths)
    stream = Stream(np.arange(ends[-1], dtype=np.uint16), ends, text_bytes=int(ends[-1]) * 3)
    return Data(cfg, TOKENIZER, stream, stream, 0, "")


def test_no_window_holds_two_documents(tmp_path):
    texts = ["one two three four five six seven", "eight", "nine ten"]
    found = cut(tmp_path, texts)
    ids = [[*TOKENIZER.encode(t).tolist(), END] for t in texts]
    windows, mask = found.windows["tokens"], found.windows["mask"]
    for document, expected in enumerate(ids):
        mine = found.document_M == document
        # All tokens are inputs once, in order, but for the last, which is a target only.
        inputs = [w[:L][m[:L] == 1].tolist() for w, m in zip(windows[mine], mask[mine], strict=True)]
        joined = [token for window in inputs for token in window]
        assert joined[: len(expected) - 1] == expected[:-1]
        targets = int(mask[mine][:, 1 : L + 1].sum())
        assert targets == len(expected) - 1
    assert found.documents == 3
    assert found.bytes_per_token == pytest.approx(sum(map(len, texts)) / sum(map(len, ids)))


def test_windows_of_a_run_are_those_of_validation():
    found = domains.of_run(packed([7, 6]), N_MTP, 10**6)
    np.testing.assert_array_equal(found.windows["tokens"][:2], [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(found.document_M, [0, 0, 1])  # of the window's first token
    assert found.name == "novel"
    assert found.bytes_per_token == 3.0


def test_segments_stay_as_the_run_packs_them():
    found = domains.of_run(packed([7, 6], dataclasses.replace(CFG, packing="segments")), N_MTP, 10**6)
    np.testing.assert_array_equal(found.windows["segments"][1], [1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(found.windows["positions"][1], [0, 1, 2, 0, 1, 2])


def test_fewer_tokens_are_spread_evenly_over_the_text():
    found = domains.of_run(packed([401]), N_MTP, 5 * L)
    np.testing.assert_array_equal(found.windows["tokens"][:, 0], [0, 80, 160, 240, 320])


def test_tokens_are_targets_and_padding_is_none(tmp_path):
    texts = ["a word or two"] * 100  # a padded window each
    per_document = len(TOKENIZER.encode(texts[0]))
    assert per_document < 2 * L
    whole = cut(tmp_path, texts)
    half = cut(tmp_path, texts, tokens=per_document * 50)
    targets = [int(d.windows["mask"][:, 1 : L + 1].sum()) for d in (whole, half)]
    assert targets[0] == 100 * per_document
    assert targets[1] == pytest.approx(targets[0] / 2, rel=0.02)


def test_units_are_documents_where_there_are_enough(tmp_path):
    many = cut(tmp_path, [f"document number {i} of several" for i in range(40)])
    np.testing.assert_array_equal(many.unit_M, many.document_M)


def test_units_of_few_documents_are_runs_of_windows_of_one_document():
    found = domains.of_run(packed([600, 403]), N_MTP, 10**6)
    assert len(found.document_M) == 251
    units = found.unit_M
    assert np.all(np.diff(units) >= 0) and np.all(np.diff(units) <= 1)
    sizes = np.bincount(units)
    assert sizes.max() == 4 and 60 <= len(sizes) <= 70
    assert all(len(set(found.document_M[units == u])) == 1 for u in range(len(sizes)))


def test_one_long_document_among_many_is_cut_into_runs():
    found = domains.of_run(packed([600, *[12] * 40]), N_MTP, 10**6)
    sizes, M = np.bincount(found.unit_M), len(found.document_M)
    assert found.documents == 41 and np.bincount(found.document_M)[0] > M / 2
    long = found.unit_M[found.document_M == 0]
    assert np.bincount(long).max() == -(-M // 64) and len(set(long)) == 30
    assert sizes[long[-1] + 1 :].tolist() == np.bincount(found.document_M)[1:].tolist()


def test_a_single_window_is_a_single_unit():
    np.testing.assert_array_equal(domains.of_run(packed([9]), N_MTP, L).unit_M, [0])


def test_too_few_tokens():
    with pytest.raises(UserError, match="--tokens 3: less than one window, which has 4 tokens"):
        domains.of_run(packed([9]), N_MTP, 3)
    with pytest.raises(UserError, match="single token"):
        domains.of_run(packed([1]), N_MTP, 100)


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        (DataConfig(), "novel"),
        (DataConfig(source="texts", valid="held/out.jsonl.zst"), "out"),
        (DataConfig(source="texts/news"), "news"),
        (DataConfig(source="hf:group/corpus:en"), "corpus"),
        (DataConfig(source="texts/**/*.txt"), "heldout"),
    ],
)
def test_a_runs_own_text_is_named_after_its_source(cfg, name):
    assert domains.of_run(packed([9], dataclasses.replace(cfg, seq_len=L)), N_MTP, 100).name == name


def test_the_hash_names_the_content():
    first, same, other = (domains.of_run(packed(lengths), N_MTP, 100) for lengths in ([9], [9], [10]))
    assert first.hash == same.hash != other.hash
