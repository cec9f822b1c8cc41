"""Batches: every row once per epoch, exact resume, shards that make up the whole, a cache that heals."""

import collections
import concurrent.futures
import dataclasses
import errno
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from qatmoe.config import DataConfig
from qatmoe.data import batches, cache, corpus, tokenizer
from qatmoe.errors import UserError

VOCAB = 2048
WORDS = "the quick brown fox jumps over a lazy dog while nine whales sing in the cold sea".split()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 short documents, all different, some of one token."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("text")
    texts = [f"{i}: " + " ".join(rng.choice(WORDS, rng.integers(1, 60))) for i in range(40)] + ["a", "b"]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(folder)


@pytest.fixture(scope="module")
def load(source, tmp_path_factory):
    cache_dir = str(tmp_path_factory.mktemp("cache"))

    def load(**kwargs):
        cfg = DataConfig(**{"source": source, "seq_len": 16, "valid_fraction": 0.2, "cache_dir": cache_dir, **kwargs})
        return batches.load_data(cfg, VOCAB)

    return load


def make(data, batch_size=4, seed=3, n_mtp=1, **kwargs):
    return batches.make_train_iterator(data, batch_size=batch_size, seed=seed, n_mtp=n_mtp, **kwargs)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def all_rows(data, n_mtp=1):
    """Every training row, cut by hand."""
    tokens, length = np.asarray(data.train.tokens, np.int32), data.cfg.seq_len
    width = length + 1 + n_mtp
    starts = range(0, len(tokens) - width + 1, length)
    return [tuple(tokens[s : s + width].tolist()) for s in starts]


def rows_of(taken):
    return [tuple(row) for batch in taken for row in batch["tokens"].tolist()]


# ---- streams -------------------------------------------------------------------------------------


def test_stream_is_the_documents_each_with_its_end(load, source):
    data = load()
    train = [d.text for d in corpus.Split(data.cfg).train()]
    tok = data.tokenizer
    expected = [i for text in train for i in [*tok.encode(text).tolist(), tok.end_id]]
    assert data.train.tokens.tolist() == expected
    assert data.train.tokens.dtype == np.uint16
    assert [expected[e - 1] for e in data.train.ends] == [tok.end_id] * len(train)
    assert data.train.text_bytes == sum(len(t.encode()) for t in train)
    assert data.stats["train_bytes_per_token"] == data.train.text_bytes / len(expected)
    assert data.stats["train_documents"] + data.stats["valid_documents"] == 42


def test_train_and_valid_share_no_document(load):
    data = load()
    sides = []
    for stream in (data.train, data.valid):
        starts = [0, *stream.ends[:-1]]
        sides.append({tuple(stream.tokens[a:b].tolist()) for a, b in zip(starts, stream.ends, strict=True)})
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_dropped_documents_and_notes_survive_the_cache(load, source, tmp_path, caplog):
    (tmp_path / "v.txt").write_text("a")
    for _ in range(2):
        assert load(valid=str(tmp_path / "v.txt")).dropped == 1
        assert "1 training documents left out" in caplog.text
        caplog.clear()
    (tmp_path / "book.txt").write_text(" ".join(WORDS * 30))
    for _ in range(2):
        load(source=str(tmp_path / "book.txt"))
        assert "book.txt are held out instead" in caplog.text
        caplog.clear()


def test_default_text_loads_fast_and_has_the_documented_size(tmp_path):
    cfg = DataConfig(cache_dir=str(tmp_path))
    start = time.monotonic()
    batches.load_data(cfg, VOCAB)
    cold = time.monotonic()
    data = batches.load_data(cfg, VOCAB)
    warm = time.monotonic()
    assert warm - cold < 1
    assert cold - start < 30, "a loose bound: the machine may be shared"
    assert data.stats["train_bytes"] == 4_761_193
    assert data.valid.bytes_per_token == pytest.approx(3.42, abs=0.01)


# ---- rows ----------------------------------------------------------------------------------------


def test_inputs_and_targets_come_from_one_row(load):
    """Consecutive rows overlap by 1 + n_mtp tokens, so every token but the first is a target once."""
    data = load()
    for n_mtp in (0, 2):
        rows = batches.Rows(data.train, data.cfg, n_mtp, data.tokenizer.end_id, pad=False)
        got = [rows[i]["tokens"] for i in range(len(rows))]
        assert {r.shape for r in got} == {(16 + 1 + n_mtp,)}
        targets = np.concatenate([r[1:17] for r in got])
        assert np.array_equal(targets, data.train.tokens[1 : len(targets) + 1])
        assert len(data.train.tokens) - 1 - n_mtp - len(targets) < 16, "no whole row may be left over"


def test_segments_follow_documents(load):
    data = load(packing="segments")
    end = data.tokenizer.end_id
    batch = next(make(data, batch_size=8, n_mtp=2))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((8, 19), np.int32) for k in ("tokens", "segments", "positions")
    }
    several = 0
    for tokens, segments, positions in zip(batch["tokens"], batch["segments"], batch["positions"], strict=True):
        segment, position = 1, 0
        for token, s, p in zip(tokens, segments, positions, strict=True):
            assert (s, p) == (segment, position)
            segment, position = (segment + 1, 0) if token == end else (segment, position + 1)
        several += segments[-1] > 1
    assert several > 1


def test_windows_and_segments_have_the_same_tokens(load):
    a, b = take(make(load()), 3), take(make(load(packing="segments")), 3)
    assert all(np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(a, b, strict=True))
    assert set(a[0]) == {"tokens"}


# ---- training order ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_every_row_exactly_once_per_epoch(load, prefetch):
    data = load(prefetch=prefetch)
    expected = collections.Counter(all_rows(data))
    n = sum(expected.values())
    batch_size = 4
    assert n % batch_size, "an epoch must end inside a batch, or this shows nothing"
    got = rows_of(take(make(data, batch_size), n))
    epochs = [got[i : i + n] for i in range(0, 3 * n, n)]
    assert [collections.Counter(e) for e in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != all_rows(data)


def test_order_depends_on_the_seed_alone(load):
    data = load()
    n = len(all_rows(data))
    by_seed = {seed: rows_of(take(make(data, 1, seed), 3 * n)) for seed in range(4)}
    assert by_seed[2] == rows_of(take(make(data, 1, 2), 3 * n))
    epochs = [tuple(by_seed[s][e * n : (e + 1) * n]) for s in by_seed for e in range(3)]
    assert len(set(epochs)) == 12, "no seed may repeat another seed's epoch"


def test_order_is_the_same_everywhere():
    """Recorded once: a change means that runs no longer reproduce."""
    tokens = np.arange(80 * 4 + 1, dtype=np.uint16)
    stream = batches.Stream(tokens, np.array([len(tokens)]), 1)
    data = batches.Data(DataConfig(seq_len=4), tokenizer.load(), stream, stream, 0, "x")
    first = take(make(data, batch_size=8, seed=7, n_mtp=0), 1)[0]["tokens"][:, 0] // 4
    assert first.tolist() == [3, 8, 48, 63, 16, 61, 49, 62]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("packing", ["windows", "segments"])
def test_resume_is_exact_in_and_across_epochs(load, prefetch, packing):
    data = load(prefetch=prefetch, packing=packing)
    per_epoch = len(all_rows(data)) // 4
    whole = take(make(data), 2 * per_epoch + 6)
    for stop in (0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch):
        first = make(data)
        assert equal(take(first, stop), whole[:stop])
        state = json.loads(json.dumps(first.get_state()))
        resumed = make(data)
        next(resumed)  # what was prefetched before must not leak into what follows
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert equal(take(resumed, 5), whole[stop : stop + 5])


def test_state_is_what_was_consumed_not_what_was_prefetched(load):
    iterators = [make(load(prefetch=p)) for p in (0, 8)]
    for it in iterators:
        take(it, 3)
    time.sleep(0.1)
    assert iterators[0].get_state() == iterators[1].get_state()


def test_a_state_of_other_batches_is_refused(load):
    data = load()
    state = make(data).get_state()
    others = [
        make(data, 8),
        make(data, seed=4),
        make(data, n_mtp=0),
        make(load(packing="segments")),
        make(load(seq_len=8)),
    ]
    others.append(make(load(valid_fraction=0.3)))
    for other in others:
        with pytest.raises(UserError, match="belongs to other batches"):
            other.set_state(state)


# Rows of a batch of 4 by process: side by side, scattered, and the same ones in two processes.
HELD = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3], [0], [1, 2]], [[0, 1], [2, 3], [0, 1]]]


def whole_again(parts, held):
    """Batches out of what each process read of them."""
    joined = []
    for of_processes in zip(*parts, strict=True):
        batch = {k: np.zeros((4, *v.shape[1:]), v.dtype) for k, v in of_processes[0].items()}
        for part, rows in zip(of_processes, held, strict=True):
            for k, v in part.items():
                batch[k][rows] = v
        joined.append(batch)
    return joined


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("packing", ["windows", "segments"])
def test_processes_share_each_batch(load, packing, held):
    data = load(packing=packing)
    parts = [take(make(data, 4, local_B=np.asarray(rows)), 30) for rows in held]
    assert equal(whole_again(parts, held), take(make(data, 4), 30))


def test_processes_read_every_row_once_per_epoch(load):
    data, held = load(), HELD[1]
    rows = all_rows(data)
    iterators = [make(data, 4, local_B=np.asarray(r)) for r in held]
    read = [row for _ in range(-(-len(rows) // 4)) for it in iterators for row in rows_of([next(it)])]
    counts = collections.Counter(read)
    assert set(counts) == set(rows)
    assert sum(counts.values()) - len(rows) < 4  # the last batch begins the next epoch


def test_resume_with_other_processes(load):
    data = load()
    expected = take(make(data, 4), 8)[7]["tokens"]
    one = make(data, 4, local_B=np.asarray([0]))
    take(one, 7)
    two = make(data, 4)
    take(two, 7)
    assert one.get_state() == two.get_state()
    other = make(data, 4, local_B=np.asarray([1, 3]))
    other.set_state(one.get_state())
    assert np.array_equal(next(other)["tokens"], expected[[1, 3]])


def test_one_row_is_enough(load):
    data = load()
    n = len(data.train.tokens)
    one = dataclasses.replace(data, cfg=dataclasses.replace(data.cfg, seq_len=n - 2))
    batch = next(make(one, batch_size=2, n_mtp=1))
    assert np.array_equal(batch["tokens"], [data.train.tokens] * 2)
    short = dataclasses.replace(data, cfg=dataclasses.replace(data.cfg, seq_len=n - 1))
    with pytest.raises(UserError, match=rf"{n} tokens, less than one row of seq_len \+ 1 \+ n_mtp = {n + 1}"):
        make(short, n_mtp=1)


def test_impossible_arguments(load):
    data = load()
    with pytest.raises(UserError, match="seed=-1"):
        make(data, seed=-1)


def test_no_child_process_and_threads_end(load):
    before = threading.active_count()
    it = make(load(prefetch=2))
    take(it, 3)
    assert threading.active_count() <= before + 1
    it.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# ---- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["windows", "segments"])
@pytest.mark.parametrize(("seq_len", "batch_size", "n_mtp"), [(16, 4, 1), (7, 3, 0), (5, 64, 2), (10_000, 2, 1)])
def test_every_validation_token_counts_once(load, packing, seq_len, batch_size, n_mtp):
    data = load(packing=packing, seq_len=seq_len)
    tokens = np.asarray(data.valid.tokens)
    got = list(batches.valid_batches(data, batch_size=batch_size, n_mtp=n_mtp))
    assert {v.shape for b in got for v in b.values()} == {(batch_size, seq_len + 1 + n_mtp)}
    assert all(v.dtype == np.int32 for b in got for v in b.values())
    for depth in range(n_mtp + 1):  # the main target, then each MTP module's
        window = slice(1 + depth, 1 + depth + seq_len)
        counted = [b["tokens"][:, window][b["mask"][:, window] == 1] for b in got]
        assert np.array_equal(np.concatenate(counted), tokens[1 + depth :])
    if packing == "segments":
        assert all(np.array_equal(b["segments"] > 0, b["mask"] == 1) for b in got)


def test_validation_repeats_and_limits(load):
    data = load(seq_len=4)
    every = list(batches.valid_batches(data, batch_size=2, n_mtp=1))
    assert equal(every, list(batches.valid_batches(data, batch_size=2, n_mtp=1)))
    assert equal(every, list(batches.valid_batches(data, batch_size=2, n_mtp=1, limit=len(every) + 5)))
    some = list(batches.valid_batches(data, batch_size=2, n_mtp=1, limit=3))
    assert len(some) == 3
    order = [every_rows.index(row) for every_rows in [rows_of(every)] for row in rows_of(some)]
    assert order == sorted(set(order)) and order[0] == 0
    assert order[-1] > len(rows_of(every)) / 2, "a limited validation must sample the whole text"


@pytest.mark.parametrize("held", HELD)
def test_processes_share_each_validation_batch(load, held):
    data = load()
    whole = list(batches.valid_batches(data, batch_size=4, n_mtp=1))
    parts = [list(batches.valid_batches(data, batch_size=4, n_mtp=1, local_B=np.asarray(rows))) for rows in held]
    assert equal(whole_again(parts, held), whole)


# ---- tokenizers and caches -----------------------------------------------------------------------


def test_vocabulary_mismatch_shows_before_the_text_is_read():
    with pytest.raises(UserError, match="2048 tokens but model.vocab_size=1024"):
        batches.load_data(DataConfig(source="/no/such/file.txt"), 1024)


def test_tokenizer_trained_on_the_source(load, source, tmp_path, monkeypatch):
    cfg = DataConfig(source=source, tokenizer="train", seq_len=16, cache_dir=str(tmp_path))
    data = batches.load_data(cfg, 300)
    assert data.tokenizer.vocab_size == 300
    monkeypatch.setattr(tokenizer, "train", None)  # a second load must not train again
    again = batches.load_data(cfg, 300)
    assert again.tokenizer.hash == data.tokenizer.hash
    assert again.hash == data.hash != load().hash


@pytest.fixture
def counted(monkeypatch):
    """How often text was tokenized."""
    calls = []
    write = batches._write_stream
    monkeypatch.setattr(batches, "_write_stream", lambda *args: (calls.append(args[1]), write(*args))[1])
    return calls


def test_cache_is_reused_and_keyed_by_content(source, tmp_path, counted):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"document {i} " + " ".join(WORDS))
    cfg = DataConfig(source=str(text), cache_dir=str(tmp_path / "cache"), valid_fraction=0.3)

    def rebuilt(**kwargs):
        counted.clear()
        batches.load_data(dataclasses.replace(cfg, **kwargs), VOCAB)
        return bool(counted)

    assert rebuilt()
    assert not rebuilt()
    assert not rebuilt(seq_len=4, packing="segments"), "neither changes the tokens"
    assert rebuilt(valid_fraction=0.31)
    assert rebuilt(valid="default")
    (text / "3.txt").write_text("document three, other text of any length")
    assert rebuilt()
    assert not rebuilt()


def test_damaged_cache_is_made_again(source, tmp_path, counted):
    cfg = DataConfig(source=source, cache_dir=str(tmp_path), valid_fraction=0.2, seq_len=16)
    expected = np.array(batches.load_data(cfg, VOCAB).train.tokens)
    (place,) = tmp_path.glob("tokens-*")

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-2])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def empty(path):
        path.write_bytes(b"")

    def remove(path):
        path.unlink()

    names = sorted(p.name for p in place.iterdir())
    assert len(names) == 5
    for name, damage in itertools.product(names, (truncate, flip, empty, remove)):
        if name == "manifest.json" and damage is flip:
            continue  # one flipped bit there may hit white space
        counted.clear()
        damage(place / name)
        assert np.array_equal(batches.load_data(cfg, VOCAB).train.tokens, expected)
        assert counted == ["valid", "train"], (name, damage)
    assert [p.name for p in tmp_path.iterdir()] == [place.name], "nothing temporary may stay"


def test_failed_build_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3 + "broken\n")
    (tmp_path / "v.txt").write_text("valid")
    cfg = DataConfig(source=str(tmp_path / "a.jsonl"), valid=str(tmp_path / "v.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        batches.load_data(cfg, VOCAB)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unwritable_cache_names_the_setting(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache in '.*file.*--config.data.cache_dir"):
        batches.load_data(DataConfig(source=source, cache_dir=str(tmp_path / "file" / "below")), VOCAB)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*--config.data.cache_dir"):
        batches.load_data(DataConfig(source=source, cache_dir=str(tmp_path / "c")), VOCAB)
    assert list((tmp_path / "c").iterdir()) == []


def test_cache_made_by_two_at_once_where_there_are_no_locks(tmp_path, monkeypatch):
    """The loser of the race uses the winner's entry, and nobody removes what may be in use."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)

    def build(directory):
        (directory / "a").write_text("x")
        return {"n": 1}

    def overtaken(directory):
        cache.entry(str(tmp_path), "k", build)
        return build(directory)

    used = tmp_path / f".k@{socket.gethostname()}@x"
    used.mkdir()
    assert cache.entry(str(tmp_path), "k", overtaken) == (tmp_path / "k", {"n": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == [used.name, "k"]


# Makes the entry k, says so, and takes its time, or kills itself in the middle.
MAKE = """
import os, pathlib, signal, sys, time
from qatmoe.data import cache
def build(directory):
    (directory / "a").write_text("x")
    with open(sys.argv[1] + ".made", "a") as f:
        f.write("x")
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    return {"n": 1}
print(cache.entry(sys.argv[1], "k", build)[1])
"""


def test_a_cache_entry_is_made_by_one_process_and_the_others_wait(tmp_path, child_env):
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", MAKE, str(folder), "lives"]
    both = [subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in both] == ["{'n': 1}\n"] * 2
    assert (tmp_path / "cache.made").read_text() == "x"
    assert [p.name for p in folder.iterdir()] == ["k"]


def test_a_damaged_entry_is_made_again_once(tmp_path, monkeypatch):
    made, looked, intact = [], threading.local(), cache._intact

    def build(directory):
        (directory / "a").write_text("x")
        made.append(directory)
        return {}  # as a tokenizer's entry keeps nothing

    cache.entry(str(tmp_path), "k", build)
    (tmp_path / "k" / "a").write_text("y")
    both_have_seen_it = threading.Barrier(2, timeout=60)

    def wait(place):
        found = intact(place)
        looked.times = getattr(looked, "times", 0) + 1
        if looked.times == 2:
            both_have_seen_it.wait()
        return found

    monkeypatch.setattr(cache, "_intact", wait)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cache.entry, str(tmp_path), "k", build) for _ in range(2)]
    assert [found.result() for found in both] == [(tmp_path / "k", {})] * 2
    assert len(made) == 2, "when it was new, and once more"


def test_what_a_killed_process_left_of_an_entry_is_removed(tmp_path, child_env):
    folder = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", MAKE, str(folder), "dies"], env=child_env, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.glob(".k@*"))) == 1
    others = folder / f".k@{socket.gethostname()}-2@x"  # whose locks may not reach here
    others.mkdir()
    cache.entry(str(folder), "k", lambda directory: {"n": 1})
    assert sorted(p.name for p in folder.iterdir()) == [others.name, "k"]


def test_cache_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root("") == tmp_path / "xdg" / "qatmoe"
    assert cache.root(str(tmp_path)) == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.root("") == tmp_path / "home" / ".cache" / "qatmoe"
    assert cache.root("~/x") == tmp_path / "home" / "x"
