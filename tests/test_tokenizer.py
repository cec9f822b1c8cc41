"""Byte-level BPE: lossless, splits documents safely, refuses what does not fit."""

import json
import resource

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from qatmoe.data import corpus, tokenizer
from qatmoe.errors import UserError

DEFAULT = tokenizer.load("default")
PROSE = "It is a truth universally acknowledged, that a single man in want of a wife must be in want of a fortune. "


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain words, don't they'll 12345",
        "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 flags \U0001f1e9\U0001f1ea",
        "日本語 العربية ελληνικά e\u0301 vs \u00e9",
        "tabs\tand\r\nlines\r\r\n\n\n   indented\n  ",
        "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
        "a <|endoftext|> b <|endoftext|>",
    ],
)
def test_roundtrip(text):
    ids = DEFAULT.encode(text)
    assert DEFAULT.decode(ids) == text
    assert ids.dtype == np.uint16
    assert (ids < DEFAULT.vocab_size).all()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_roundtrip_of_any_text(text):
    assert DEFAULT.decode(DEFAULT.encode(text)) == text


def test_spelling_the_end_of_text_does_not_end_the_text():
    ids = DEFAULT.encode(f"before{tokenizer.END_OF_TEXT}after")
    assert DEFAULT.end_id not in ids


def test_lone_surrogate_is_refused():
    with pytest.raises(UserError, match="surrogate"):
        DEFAULT.encode("broken \ud83d half")


def test_long_documents_give_the_tokens_of_the_whole(monkeypatch):
    text = next(corpus.documents("default", field="data.valid")).text[:60_000]
    text += "\n\n  \n x\n\t\ty\n...\n\nz  \n" * 20
    whole = DEFAULT._backend.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tokenizer, "_PART", 500)
    assert len(list(DEFAULT._parts(text))) > 50
    assert DEFAULT.encode(text).tolist() == whole


def test_documents_keep_their_order_and_number():
    texts = ["one", "", "two " * 500, "", "", "three"]
    encoded = list(DEFAULT.encode_documents(texts))
    assert [DEFAULT.decode(ids) for ids in encoded] == texts


def test_bundled_tokenizer_is_what_its_readme_says(tmp_path):
    out = tmp_path / "tokenizer.json"
    assert tokenizer.main(["--vocab_size", "2048", "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == corpus.bundled("tokenizer.json").read_text(encoding="utf-8")
    assert DEFAULT.vocab_size == 2048


def test_pretokenizer_is_qwen2s():
    """The cuts Qwen2's regular expression makes: single digits, one leading space, contractions, newline runs."""
    pieces = DEFAULT._backend.pre_tokenizer.pre_tokenize_str("I'll pay 12  pounds!\n\nYes")
    text = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]
    assert text == ["I", "'ll", " pay", " ", "1", "2", " ", " pounds", "!\n\n", "Yes"]


def test_train_fills_the_vocabulary_exactly_and_again():
    first = tokenizer.train([PROSE * 3], 280)
    assert first.vocab_size == 280
    assert first.decode([first.end_id]) == tokenizer.END_OF_TEXT
    assert tokenizer.train([PROSE * 3], 280).json == first.json
    assert len(first.encode(PROSE)) < len(PROSE.encode())


def test_train_refuses_a_vocabulary_the_text_cannot_fill():
    with pytest.raises(UserError, match=r"vocab_size=5000.*vocab_size=\d+"):
        tokenizer.train([PROSE], 5000)
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        tokenizer.train([PROSE], 256)


def test_errors_of_the_text_reach_the_caller_of_train(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnot json\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2"):
        tokenizer.train((d.text for d in corpus.documents(str(tmp_path))), 300)


def test_check_vocab_names_both_numbers_and_the_fix():
    DEFAULT.check_vocab(2048)
    DEFAULT.check_vocab(4096)  # padded embeddings, as many published models have them
    with pytest.raises(UserError, match=r"2048 tokens but model.vocab_size=1024.*--config.model.vocab_size=2048"):
        DEFAULT.check_vocab(1024)


def test_load_of_a_saved_tokenizer(tmp_path):
    trained = tokenizer.train([PROSE * 3], 290)
    trained.save(tmp_path / "t.json")
    loaded = tokenizer.load(str(tmp_path / "t.json"))
    assert loaded.hash == trained.hash != DEFAULT.hash
    assert loaded.encode(PROSE).tolist() == trained.encode(PROSE).tolist()


def test_truncation_and_padding_of_a_foreign_tokenizer_are_ignored(tmp_path):
    foreign = tokenizers.Tokenizer.from_str(DEFAULT.json)
    foreign.enable_truncation(4)
    foreign.enable_padding(length=64)
    foreign.save(str(tmp_path / "t.json"))
    ids = tokenizer.load(str(tmp_path / "t.json")).encode(PROSE)
    assert ids.tolist() == DEFAULT.encode(PROSE).tolist()


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        tokenizer.load(str(tmp_path / "none.json"))
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="is not a tokenizer.json"):
        tokenizer.load(str(tmp_path / "x.json"))
    (tmp_path / "y.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"y\.json"):
        tokenizer.load(str(tmp_path / "y.json"))
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "z.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenizer.load(str(tmp_path / "z.json"))


def test_command_line_reports_a_mistake_in_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(PROSE)
    assert tokenizer.main(["--vocab_size", "9999", "--out", str(tmp_path / "o"), "--source", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("size", ["256", "9999"])
def test_command_line_names_its_own_option(size, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(PROSE)
    assert tokenizer.main(["--vocab_size", size, "--out", str(tmp_path / "o"), "--source", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "; set --vocab_size=" in message and "config" not in message


def test_what_is_at_out_is_replaced_with_force_alone(tmp_path, capsys, monkeypatch):
    out, text = tmp_path / "keep.json", tmp_path / "t.txt"
    out.write_text("PRECIOUS")
    text.write_text(PROSE * 9)
    command = ["--vocab_size", "270", "--out", str(out), "--source", str(text)]
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "Split", None)  # before any text is read
        assert tokenizer.main(command) == 2
        assert tokenizer.main(["--vocab_size", "270", "--out", str(tmp_path), "--force"]) == 2
        assert tokenizer.main(["--vocab_size", "270", "--out", str(tmp_path / "no" / "t.json")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: {out} exists: choose another path, or give --force to replace it"
    assert "is a folder" in said[1] and "no such folder" in said[2] and len(said) == 3
    assert out.read_text() == "PRECIOUS"
    assert tokenizer.main([*command, "--force"]) == 0
    assert tokenizer.load(str(out)).vocab_size == 270


def test_a_full_disk_leaves_what_is_at_out(tmp_path, capsys):
    out, text = tmp_path / "keep.json", tmp_path / "t.txt"
    out.write_text("PRECIOUS")
    text.write_text(PROSE * 9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        code = tokenizer.main(["--vocab_size", "270", "--out", str(out), "--source", str(text), "--force"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and f"cannot write {out}: File too large" in capsys.readouterr().err
    assert out.read_text() == "PRECIOUS"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keep.json", "t.txt"]
