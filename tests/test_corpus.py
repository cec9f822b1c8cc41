"""Sources: every format, fixed order, what is held out, and an error message for every broken input."""

import gzip
import json
import lzma
import os
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from qatmoe.config import DataConfig
from qatmoe.data import corpus
from qatmoe.errors import UserError

TEXTS = ["first ünïcode", "second\nwith lines", "third \U0001f600"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def texts(source, **kwargs):
    return [d.text for d in corpus.documents(str(source), **kwargs)]


def jsonl(rows, key="text"):
    return "".join(json.dumps({key: t}) + "\n" for t in rows).encode()


def sides(**kwargs):
    split = corpus.Split(DataConfig(**kwargs))
    return split, [d.text for d in split.train()], [d.text for d in split.valid()]


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
def test_txt_and_jsonl_with_every_compression(tmp_path, compression):
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression](TEXTS[0].encode()))
    (tmp_path / f"b.jsonl{compression}").write_bytes(COMPRESS[compression](jsonl(TEXTS[1:])))
    assert texts(tmp_path) == TEXTS


def test_parquet_and_text_key(tmp_path):
    table = pyarrow.table({"body": TEXTS, "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet", text_key="body") == TEXTS
    with pytest.raises(UserError, match=r"no column 'text' \(columns: body, n\).*text_key"):
        texts(tmp_path / "a.parquet")


def test_order_is_by_path_and_directories_are_recursive(tmp_path):
    for name in ("b/2.txt", "a/9.txt", "a/10.txt", "c.txt", "b/deep/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.md").write_text("not text to train on")
    (tmp_path / ".hidden.txt").write_text("editor droppings")
    expected = ["a/10.txt", "a/9.txt", "b/2.txt", "b/deep/1.txt", "c.txt"]
    assert texts(tmp_path) == expected
    assert texts(f"{tmp_path}/**/*.txt") == [t for t in expected]
    assert texts(f"{tmp_path}/a/*.txt") == expected[:2]


def test_a_folder_hides_no_text(tmp_path):
    """Linked folders are read, each once; what cannot be read is an error, not a shorter text."""
    (tmp_path / "shard" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "shard" / "b.txt").write_text("linked")
    (tmp_path / "shard" / ".ipynb_checkpoints" / "b.txt").write_text("an editor's copy")
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.txt").write_text("own")
    for name in ("linked", "linked_again"):
        (source / name).symlink_to(tmp_path / "shard")
    (source / "round").symlink_to(source)
    (source / "up").symlink_to(tmp_path)  # what lies beside the folder is not in it
    (source / "b").mkdir()
    (source / "b" / "b.txt").write_text("below")
    (source / "a_link").symlink_to(source / "b")
    assert texts(source) == ["own", "below", "linked"]
    assert [d.name for d in corpus.documents(str(source))][1].endswith("b/b.txt")  # under its own name
    (source / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"cannot read '.*gone.txt': No such file"):
        texts(source)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "private").mkdir()
    real = os.scandir

    def scandir(place):
        if str(place).endswith("private"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    with pytest.raises(UserError, match="data.source: cannot read '.*private': Permission denied"):
        texts(tmp_path)


def test_documents_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(["x", "y"]))
    assert [d.name for d in corpus.documents(str(tmp_path))] == [f"{tmp_path}/a.jsonl:{n}" for n in (2, 3)]


def test_lines_across_read_chunks_and_several_compressed_parts(tmp_path, monkeypatch):
    rows = ["x" * n for n in (1, 50, 3, 200, 7)]
    data = jsonl(rows)
    monkeypatch.setattr(corpus, "_CHUNK", 16)
    for suffix in COMPRESS:
        half = len(data) // 2
        parts = COMPRESS[suffix](data[:half]) + COMPRESS[suffix](data[half:])
        (tmp_path / f"a.jsonl{suffix}").write_bytes(parts)
        assert texts(tmp_path / f"a.jsonl{suffix}") == rows


def test_byte_order_mark_and_empty_documents_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(jsonl(["", " \n", "there"]))
    assert texts(tmp_path) == ["hello", "there"]


def test_bundled_text():
    train = list(corpus.documents("default"))
    valid = list(corpus.documents("default", field="data.valid"))
    assert (len(train), len(valid)) == (6, 1)
    assert "Anne Elliot" in valid[0].text
    assert not any("Anne Elliot" in d.text for d in train)
    assert sum(len(d.text.encode()) for d in train) > 4_700_000


# ---- Hugging Face --------------------------------------------------------------------------------


def test_hugging_face_source(monkeypatch):
    calls = []

    class Dataset(list):
        _fingerprint = "abc"

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return Dataset({"text": t} for t in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:org/name") == TEXTS
    assert texts("hf:org/name:conf:test") == TEXTS
    assert calls == [("org/name", None, "train"), ("org/name", "conf", "test")]
    assert corpus.fingerprint("hf:org/name") != corpus.fingerprint("hf:org/other")
    with pytest.raises(UserError, match="no field 'body'"):
        texts("hf:org/name", text_key="body")
    with pytest.raises(UserError, match="write hf:DATASET"):
        texts("hf:a:b:c:d")


def test_hugging_face_errors(monkeypatch):
    def load_dataset(name, config, split):
        raise FileNotFoundError("no such\ndataset")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match="could not load 'hf:x': FileNotFoundError: no such dataset"):
        texts("hf:x")
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(UserError, match=r"pip install -e '.\[hf\]'"):
        texts("hf:x")


# ---- broken input --------------------------------------------------------------------------------


def test_missing_paths(tmp_path):
    with pytest.raises(UserError, match="data.valid='/no/such/place': no such file"):
        texts("/no/such/place", field="data.valid")
    with pytest.raises(UserError, match=f"data.source='/{'n' * 300}': File name too long"):
        texts(f"/{'n' * 300}")
    with pytest.raises(UserError, match="data.source='~nobody_here/x': no such home directory is known"):
        texts("~nobody_here/x")
    with pytest.raises(UserError, match="data.source='/dev/null': neither a file nor a directory"):
        texts("/dev/null")
    with pytest.raises(UserError, match="matches no file"):
        texts(f"{tmp_path}/*.txt")
    with pytest.raises(UserError, match="has no .txt"):
        texts(tmp_path)
    with pytest.raises(UserError, match="data.source is empty"):
        texts("")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.parquet.gz", "a.gz", "a.txt.bz2"])
def test_unsupported_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="suffix must be one of"):
        texts(tmp_path / name)


def test_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        texts(tmp_path)


def test_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"a\.txt' is not UTF-8: byte 0xe9 at offset 3"):
        texts(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(jsonl(["x"]) + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=rf"b\.jsonl' is not UTF-8: byte 0xff at offset {len(jsonl(['x'])) + 10}"):
        texts(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ('{"text": "x", "n": ' + "1" * 5000 + "}", "not a JSON object"),
        ("[1]", "a list, not a JSON object"),
        ('{"txet": "x"}', r"no field 'text' \(fields: txet\); set --config.data.text_key"),
        ('{"text": 3}', "field 'text' is int"),
        ('{"text": null}', "field 'text' is NoneType"),
        ('{"text": "\\ud83d"}', "surrogate"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}|a\.jsonl:2: .*{message}"):
        texts(tmp_path)


def test_zst_of_a_long_window(tmp_path):
    """As `zstd --long=28` makes it; zstandard alone takes 27."""
    text = "a long window\n" * 1000
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(text.encode()) + compressor.flush())
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "a.txt.zst").read_bytes())
    assert texts(tmp_path / "a.txt.zst") == [text]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_damaged_compressed_files(tmp_path, suffix, damage):
    compress = zstandard.ZstdCompressor(write_checksum=True).compress if suffix == ".zst" else COMPRESS[suffix]
    data = bytearray(compress("".join(f"line {i * i}\n" for i in range(5000)).encode()))
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"hello", "flipped": data}[damage])
    with pytest.raises(UserError, match=rf"a\.txt{suffix}' is not an intact"):
        texts(path)


def test_parquet_of_bytes_that_are_no_text(tmp_path):
    buffers = [None, pyarrow.py_buffer(np.array([0, 2], np.int32)), pyarrow.py_buffer(b"\xff\xfe")]
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not an intact .parquet"):
        texts(tmp_path / "a.parquet")


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(UserError, match="not an intact .parquet"):
        texts(tmp_path)


def test_every_error_is_one_line(tmp_path):
    for name, content in {"a.jsonl": b"{\n", "b.txt": b"\xff", "c.txt.gz": b"x", "d.parquet": b"x", "e.x": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as e:
            texts(tmp_path / name)
        assert "\n" not in str(e.value)


# ---- train and validation ------------------------------------------------------------------------


def test_share_of_documents_is_held_out(tmp_path):
    rows = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    split, train, valid = sides(source=str(tmp_path), valid_fraction=0.1)
    assert sorted(train + valid) == sorted(rows)
    assert not set(train) & set(valid)
    assert 150 < len(valid) < 250
    assert split.notes == []
    # Other documents do not move a document to the other side.
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows[::-1] + ["new"]))
    assert set(sides(source=str(tmp_path), valid_fraction=0.1)[2]) - {"new"} == set(valid)


def test_a_share_far_from_what_was_asked_is_said(tmp_path):
    """Which of few documents is held out is chance, and one may be nearly all of the text."""
    for i in range(100):
        (tmp_path / "text.jsonl").write_bytes(jsonl([f"{i} " + "word " * 1000, f"short {i}"]))
        split, train, valid = sides(source=str(tmp_path), valid_fraction=0.1)
        if len(valid) == 1 and "word" in valid[0] and len(train) == 1:
            break
    assert len(split.notes) == 1 and "have 99.9% of the text, and 10.0% was asked" in split.notes[0]


def test_copies_fall_on_the_same_side(tmp_path):
    rows = [f"document {i}" for i in range(100)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "b.jsonl").write_bytes(jsonl([f" {r}\n" for r in rows]))
    _, train, valid = sides(source=str(tmp_path), valid_fraction=0.2)
    assert not {t.strip() for t in train} & {t.strip() for t in valid}
    assert len(train) + len(valid) == 200


def test_a_single_long_file_is_cut_at_a_paragraph(tmp_path):
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 20 for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    split, train, valid = sides(source=str(tmp_path / "book.txt"), valid_fraction=0.1)
    assert train[0] + valid[0] == text
    assert (len(train), len(valid)) == (1, 1)
    assert train[0].endswith("\n\n") and valid[0].startswith("Paragraph")
    assert 0.07 < len(valid[0]) / len(text) < 0.13
    assert len(split.notes) == 1 and "book.txt" in split.notes[0]


def test_few_documents_give_up_the_tail_of_the_longest(tmp_path):
    long = "\n".join(f"line {i}" for i in range(1000))
    for name, text in {"a": "short one", "b": long, "c": "short two", "d": long}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    _, train, valid = sides(source=str(tmp_path), valid_fraction=0.01)
    assert len(valid) == 1 and long.endswith(valid[0])
    assert [t for t in train if t.startswith("short")] == ["short one", "short two"]
    assert not any(valid[0] in t for t in train), "a copy of the cut document must lose its tail too"


def test_copies_of_a_cut_document_with_other_white_space_are_cut_at_the_same_place(tmp_path):
    body = "\n\n".join(f"Paragraph {i}. " + "word " * 20 for i in range(40)).strip()
    (tmp_path / "a.txt").write_text("\n" * 1500 + body)
    (tmp_path / "b.txt").write_text(body + "  \n")
    _, train, valid = sides(source=str(tmp_path), valid_fraction=0.1)
    assert len(valid) == 1 and len(train) == 2 and train[0].strip() == train[1].strip()
    assert train[0] + valid[0] == "\n" * 1500 + body and train[1] + valid[0] == body


def test_explicit_validation_source_wins_and_is_dropped_from_training(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(jsonl(["a", "shared", "b", "shared "]))
    (tmp_path / "v.jsonl").write_bytes(jsonl(["shared", "other"]))
    split, train, valid = sides(source=str(tmp_path / "t.jsonl"), valid=str(tmp_path / "v.jsonl"))
    assert (train, valid, split.dropped) == (["a", "b"], ["shared", "other"], 2)


def test_everything_held_out_is_an_error(tmp_path):
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(UserError, match="nothing is left to train on"):
        sides(source=str(tmp_path / "t.txt"), valid=str(tmp_path / "t.txt"))


def test_default_holds_out_the_bundled_novel(tmp_path):
    split = corpus.Split(DataConfig())
    assert [d.name for d in split.valid()] == [str(corpus.bundled("austen_persuasion.txt.xz"))]
    (tmp_path / "v.txt").write_text("mine")
    assert [d.text for d in corpus.Split(DataConfig(valid=str(tmp_path / "v.txt"))).valid()] == ["mine"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_share_out_of_range(tmp_path, fraction):
    (tmp_path / "t.txt").write_text("a b c")
    with pytest.raises(UserError, match=f"valid_fraction={fraction}"):
        sides(source=str(tmp_path), valid_fraction=fraction)


def test_too_short_to_split(tmp_path):
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(UserError, match="too short to hold any of it out"):
        sides(source=str(tmp_path))


# ---- fingerprints --------------------------------------------------------------------------------


def test_fingerprint_follows_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    cfg = DataConfig(source=str(tmp_path))
    before = corpus.split_fingerprint(cfg)
    assert corpus.split_fingerprint(cfg) == before
    assert corpus.split_fingerprint(DataConfig(source=f"{tmp_path}/*.txt")) == before
    changed = {before, corpus.split_fingerprint(DataConfig(source=str(tmp_path), valid_fraction=0.2))}
    changed.add(corpus.split_fingerprint(DataConfig(source=str(tmp_path), valid=str(tmp_path / "a.txt"))))
    changed.add(corpus.split_fingerprint(DataConfig(source=str(tmp_path), text_key="body")))
    (tmp_path / "a.txt").write_text("onetw")
    (tmp_path / "b.txt").write_text("o")
    changed.add(corpus.split_fingerprint(cfg))
    assert len(changed) == 5
