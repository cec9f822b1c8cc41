"""Token streams cut into batches, with grain: shuffled, repeated, resumable exactly, each process reads its rows alone.

The documents of a split are tokenized once, each followed by the end-of-text token, and laid end to end in
one stream. Row i of the stream starts at token i*L and has R = L + 1 + n_mtp tokens: inputs row[:L], targets
row[1:L+1], and for MTP module d (from 1) targets row[1+d:L+1+d].

Shapes: B sequences of a batch (of all processes), L data.seq_len, R tokens of a row.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import grain
import numpy as np

from qatmoe.config import DataConfig
from qatmoe.data import cache, corpus, tokenizer
from qatmoe.errors import UserError

log = logging.getLogger(__name__)

_CACHE_FORMAT = 1  # part of every cache key: raise it when the meaning of the cached files changes
# Rows that count as endless. grain's own endless length, sys.maxsize, overflows when it is batched and sliced.
_ENDLESS = 1 << 48

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One split as tokens: `tokens` (uint16 or uint32, memory-mapped), `ends` int64: one past each document's
    end of text, `text_bytes`: UTF-8 bytes of the documents, end of text not counted."""

    tokens: np.ndarray
    ends: np.ndarray
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; nats per token / (ln 2 * this) = bits per byte."""
        return self.text_bytes / len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Data:
    """What `load_data` made of `cfg`. `hash` names the content: tokens of both splits and the tokenizer."""

    cfg: DataConfig
    tokenizer: tokenizer.Tokenizer
    train: Stream
    valid: Stream
    dropped: int  # training documents left out because they are validation documents
    hash: str

    @property
    def stats(self) -> dict[str, int | float]:
        """Counts for logs and summaries."""
        counts: dict[str, int | float] = {}
        for name, stream in (("train", self.train), ("valid", self.valid)):
            counts[f"{name}_documents"] = len(stream.ends)
            counts[f"{name}_tokens"] = len(stream.tokens)
            counts[f"{name}_bytes"] = stream.text_bytes
            counts[f"{name}_bytes_per_token"] = stream.bytes_per_token
        return {**counts, "dropped_documents": self.dropped}


# ---------------------------------------------------------------------------------------------------
# Text to tokens
# ---------------------------------------------------------------------------------------------------


def load_data(cfg: DataConfig, vocab_size: int) -> Data:
    """Reads, splits and tokenizes the text, or finds that in the cache.

    Args:
      cfg: sources, tokenizer, cache.
      vocab_size: `model.vocab_size`: what the tokenizer must have, or is trained to have.

    Raises:
      UserError: bad source, tokenizer or cache directory (see `corpus`, `tokenizer`, `cache`); a tokenizer
        of another vocabulary size.
    """
    if cfg.tokenizer != "train":  # a wrong vocabulary shows before any text is read
        tokenizer.load(cfg.tokenizer).check_vocab(vocab_size)
    content = f"{_CACHE_FORMAT} {corpus.split_fingerprint(cfg)}"
    tok = _load_tokenizer(cfg, vocab_size, content)
    key = _hash(f"{content} {tok.hash}")

    def build(directory: Path) -> dict[str, Any]:
        log.info("tokenizing %s", cfg.source)
        split = corpus.Split(cfg)
        # The validation side first: an empty or unreadable one shows before the long part.
        valid_bytes = _write_stream(directory, "valid", split.valid(), tok)
        train_bytes = _write_stream(directory, "train", split.train(), tok)
        return {"bytes": {"train": train_bytes, "valid": valid_bytes}, "dropped": split.dropped, "notes": split.notes}

    place, kept = cache.entry(cfg.cache_dir, f"tokens-{key}", build)
    for note in kept["notes"]:
        log.warning("%s", note)
    if kept["dropped"]:
        log.warning("%d training documents left out: they are validation documents", kept["dropped"])
    streams = {name: _read_stream(place, name, kept["bytes"][name], tok.dtype) for name in ("train", "valid")}
    return Data(cfg=cfg, tokenizer=tok, dropped=kept["dropped"], hash=key, **streams)


def _load_tokenizer(cfg: DataConfig, vocab_size: int, content: str) -> tokenizer.Tokenizer:
    if cfg.tokenizer != "train":
        return tokenizer.load(cfg.tokenizer)

    def build(directory: Path) -> dict[str, Any]:
        log.info("training a tokenizer of %d tokens on %s", vocab_size, cfg.source)
        texts = (document.text for document in corpus.Split(cfg).train())
        tokenizer.train(texts, vocab_size).save(directory / "tokenizer.json")
        return {}

    place, _ = cache.entry(cfg.cache_dir, f"tokenizer-{_hash(f'{content} {vocab_size}')}", build)
    return tokenizer.load(str(place / "tokenizer.json"))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write_stream(directory: Path, name: str, docs: Iterable[corpus.Document], tok: tokenizer.Tokenizer) -> int:
    """Writes NAME.tokens (little-endian ids) and NAME.ends.npy (int64); returns the bytes of text."""
    text_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal text_bytes
        for document in docs:
            text_bytes += len(document.text.encode())
            yield document.text

    with (directory / f"{name}.tokens").open("wb") as f:
        lengths = [_write_document(f, ids, tok) for ids in tok.encode_documents(texts())]
    np.save(directory / f"{name}.ends.npy", np.cumsum(lengths, dtype=np.int64))
    return text_bytes


def _write_document(f: BinaryIO, ids: np.ndarray, tok: tokenizer.Tokenizer) -> int:
    ended = np.append(ids, np.asarray(tok.end_id, ids.dtype))
    f.write(ended.astype(ended.dtype.newbyteorder("<")).tobytes())
    return len(ended)


def _read_stream(place: Path, name: str, text_bytes: int, dtype: np.dtype) -> Stream:
    tokens = np.memmap(place / f"{name}.tokens", dtype=dtype.newbyteorder("<"), mode="r")
    return Stream(tokens, np.load(place / f"{name}.ends.npy"), text_bytes)


# ---------------------------------------------------------------------------------------------------
# Tokens to rows
# ---------------------------------------------------------------------------------------------------


class Rows:
    """Random access to the rows of a stream, `len(rows)`, `rows[i] -> dict of arrays (R,)`.

    tokens_R int32. With packing "segments" also segments_R int32, the row's documents numbered from 1, and
    positions_R int32, counted from 0 in each of them; attention must not cross segments, nor may a target lie
    in another segment than its input. With `pad` the last row may reach past the end of the stream, and every
    row has mask_R int32: 1 for tokens of the stream, 0 for padding (end of text, segment 0).
    """

    def __init__(self, stream: Stream, cfg: DataConfig, n_mtp: int, end_id: int, *, pad: bool):
        self._stream = stream
        self._seq_len = cfg.seq_len
        self._width = cfg.seq_len + 1 + n_mtp
        self._segments = cfg.packing == "segments"
        self._end_id = end_id
        self._pad = pad
        n = len(stream.tokens)
        self._len = -(-(n - 1) // cfg.seq_len) if pad else max(0, (n - 1 - n_mtp) // cfg.seq_len)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Batch:
        start = index * self._seq_len
        tokens_R = np.full(self._width, self._end_id, np.int32)
        stored = self._stream.tokens[start : start + self._width]
        tokens_R[: len(stored)] = stored
        row = {"tokens": tokens_R}
        if self._segments:
            row["segments"], row["positions"] = self._documents(start, len(stored))
        if self._pad:
            row["mask"] = (np.arange(self._width) < len(stored)).astype(np.int32)
        return row

    def _documents(self, start: int, n_stored: int) -> tuple[np.ndarray, np.ndarray]:
        """segments_R and positions_R of the row that starts at token `start` and has `n_stored` tokens."""
        index_R = np.arange(start, start + self._width)
        document_R = np.searchsorted(self._stream.ends, index_R, side="right")
        first = document_R[0]
        starts = np.concatenate([[start], self._stream.ends[first : document_R[-1]]])
        segments_R = (document_R - first + 1).astype(np.int32)
        positions_R = (index_R - starts[segments_R - 1]).astype(np.int32)
        segments_R[n_stored:] = 0
        positions_R[n_stored:] = 0
        return segments_R, positions_R


# ---------------------------------------------------------------------------------------------------
# Rows to batches
# ---------------------------------------------------------------------------------------------------


class TrainIterator:
    """Endless training batches. `get_state` is the position of what was consumed, whatever was prefetched."""

    def __init__(self, batches: grain.DatasetIterator, stream_hash: str):
        self._batches = batches
        self._stream_hash = stream_hash
        self.start = self.get_state()  # the state before the first batch

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """JSON-able position; the same in every process, and valid for another number of processes."""
        return {"grain": dict(self._batches.get_state()), "stream": self._stream_hash}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called. Raises UserError if that was on another stream of batches."""
        if state["stream"] != self._stream_hash:
            raise UserError(
                "the saved position belongs to other batches: source, tokenizer, seq_len, packing, n_mtp, batch_size "
                "or seed changed since; restore them, or start a new run"
            )
        self._batches.set_state(state["grain"])

    def close(self) -> None:
        """Stops the prefetch thread."""
        self._batches.close()


def make_train_iterator(
    data: Data, *, batch_size: int, seed: int, n_mtp: int, local_B: np.ndarray | None = None
) -> TrainIterator:
    """Endless batches of rows, those that this process holds: {"tokens": (len(local_B), R), ...}, see `Rows`.

    Every row is in every epoch exactly once, each epoch in another order; a batch may span two epochs. The same
    arguments give the same batches anywhere: which batch comes when depends on neither processes nor devices, nor does
    the position that is saved. Rows are cut from the whole stream, so packing is the same too.

    Args:
      data: from `load_data`.
      batch_size: B, over all processes.
      seed: of the order; any integer >= 0.
      n_mtp: MTP modules, each of which wants one more token at the end of a row.
      local_B: which of the B rows of each batch are read; all without it.

    Raises:
      UserError: less text than one row; a negative seed.
    """
    if seed < 0:
        raise UserError(f"train.seed={seed} is negative; give an integer >= 0")
    rows = Rows(data.train, data.cfg, n_mtp, data.tokenizer.end_id, pad=False)
    if len(rows) == 0:
        raise UserError(
            f"the training text has {len(data.train.tokens)} tokens, less than one row of "
            f"seq_len + 1 + n_mtp = {data.cfg.seq_len + 1 + n_mtp}; give more text or lower --config.data.seq_len"
        )
    # grain shuffles epoch e with seed + e: unmixed, run 1 would start with the second epoch of run 0.
    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(rows)).shuffle(seed=mixed_seed).repeat(_ENDLESS // len(rows)).batch(batch_size)
    local_B = np.arange(batch_size) if local_B is None else local_B
    dataset = order.map(lambda indices_B: _stacked(rows, indices_B[local_B]))
    # One thread, and no processes: a row is a copy of a few kB out of mapped memory.
    options = grain.ReadOptions(num_threads=min(1, data.cfg.prefetch), prefetch_buffer_size=data.cfg.prefetch)
    stream_hash = _hash(f"{data.hash} {data.cfg.seq_len} {data.cfg.packing} {n_mtp} {batch_size} {seed}")
    return TrainIterator(iter(dataset.to_iter_dataset(options)), stream_hash)


def valid_batches(
    data: Data, *, batch_size: int, n_mtp: int, limit: int = 0, local_B: np.ndarray | None = None
) -> Iterator[Batch]:
    """Validation batches in a fixed order, with "mask" (see `Rows`): target j of a row counts iff mask[j] is 1.

    Over all batches each token but the stream's first is the next-token target of exactly one row; rows are
    padded at the end of the stream, the last batch with empty rows.

    Args:
      data: from `load_data`.
      batch_size: B, over all processes.
      n_mtp: as in `make_train_iterator`.
      limit: at most so many batches, their rows spread evenly over the text; 0 = all.
      local_B: as in `make_train_iterator`.

    Raises:
      UserError: less than two tokens of validation text.
    """
    rows = Rows(data.valid, data.cfg, n_mtp, data.tokenizer.end_id, pad=True)
    if len(rows) == 0:
        raise UserError("the validation text is a single token; give more text in data.valid")
    n_rows = min(len(rows), limit * batch_size) if limit else len(rows)
    chosen = np.arange(n_rows) * len(rows) // n_rows
    return _padded_batches(rows, chosen, batch_size, np.arange(batch_size) if local_B is None else local_B)


def _padded_batches(rows: Rows, chosen: np.ndarray, batch_size: int, local_B: np.ndarray) -> Iterator[Batch]:
    past_the_end = len(rows) + 1  # a row of padding alone
    for start in range(0, len(chosen), batch_size):
        indices_B = np.full(batch_size, past_the_end)
        part = chosen[start : start + batch_size]
        indices_B[: len(part)] = part
        yield _stacked(rows, indices_B[local_B])


def _stacked(rows: Rows, indices: np.ndarray) -> Batch:
    picked = [rows[int(i)] for i in indices]
    return {name: np.stack([row[name] for row in picked]) for name in picked[0]}
