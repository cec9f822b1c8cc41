"""Held-out text for judging a model, domain by domain, cut into windows.

The run's own held-out text is cut as training validated it: windows of the packed stream, where attention crosses
documents unless the run packs segments; a window belongs to the document of its first token. Any other text is cut
document by document, each followed by the end-of-text token: no window holds two, and a document's last is padded.

When only some windows are wanted they are spread evenly over the text.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qatmoe.config import DataConfig
from qatmoe.data import corpus
from qatmoe.data.batches import Batch, Data, Rows, Stream
from qatmoe.data.tokenizer import Tokenizer
from qatmoe.errors import UserError

FEW_UNITS = 32  # a document that has a larger part of the windows than one of so many is cut into runs of windows
MANY_UNITS = 64  # as long as one of so many parts


@dataclasses.dataclass(frozen=True)
class Domain:
    """Windows of one kind of text."""

    name: str
    windows: Batch  # tokens (M, R), mask (M, R), and, with segments, segments and positions; see `batches.Rows`
    document_M: np.ndarray  # int, numbered from 0 without gaps, in order
    bytes_per_token: float  # UTF-8 bytes of the whole text, end of text not counted

    @property
    def unit_M(self) -> np.ndarray:
        """What a bootstrap draws, numbered from 0: documents, and of a long one runs of consecutive windows."""
        M, counts_D = len(self.document_M), np.bincount(self.document_M)
        starts_D = np.cumsum(counts_D) - counts_D
        run_D = np.where(counts_D * FEW_UNITS > M, math.ceil(M / MANY_UNITS), counts_D)
        run_M = (np.arange(M) - starts_D[self.document_M]) // run_D[self.document_M]
        first_M = np.concatenate([[True], (np.diff(self.document_M) != 0) | (np.diff(run_M) != 0)])
        return np.cumsum(first_M) - 1

    @property
    def documents(self) -> int:
        """Documents that a window was taken from."""
        return int(self.document_M[-1]) + 1

    @property
    def hash(self) -> str:
        """Names the content."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=16)
        for name, array in sorted(self.windows.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def of_run(data: Data, n_mtp: int, tokens: int) -> Domain:
    """At most `tokens` tokens of a run's own held-out text. It is named after its source, the bundled one "novel".

    Raises:
      UserError: fewer tokens than a window has, or no text.
    """
    rows = Rows(data.valid, data.cfg, n_mtp, data.tokenizer.end_id, pad=True)
    name = _name_of(data.cfg)
    chosen = _spread(name, len(rows), len(data.valid.tokens) - 1, tokens, data.cfg.seq_len)
    document_M = np.searchsorted(data.valid.ends, chosen * data.cfg.seq_len, side="right")
    return _domain(name, chosen, lambda i: rows[i], document_M, data.valid.bytes_per_token)


def of_source(name: str, source: str, cfg: DataConfig, tokenizer: Tokenizer, n_mtp: int, tokens: int) -> Domain:
    """At most `tokens` tokens of the documents of `source`, whatever `data.corpus` reads.

    Raises:
      UserError: as `corpus.documents`, and as `of_run`.
    """
    texts = [document.text for document in corpus.documents(source, cfg.text_key, field=f"--text {name}")]
    streams = [
        Stream(np.append(ids, np.asarray(tokenizer.end_id, ids.dtype)), np.asarray([len(ids) + 1]), len(text.encode()))
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True)
    ]
    rows_D = [Rows(stream, cfg, n_mtp, tokenizer.end_id, pad=True) for stream in streams]
    ends_D = np.cumsum([len(rows) for rows in rows_D])
    n_tokens = sum(len(stream.tokens) for stream in streams)
    chosen = _spread(name, int(ends_D[-1]), n_tokens - len(streams), tokens, cfg.seq_len)
    document_M = np.searchsorted(ends_D, chosen, side="right")

    def window(i: int) -> Batch:
        document = int(np.searchsorted(ends_D, i, side="right"))
        return rows_D[document][i - int(ends_D[document]) + len(rows_D[document])]

    return _domain(name, chosen, window, document_M, sum(stream.text_bytes for stream in streams) / n_tokens)


def _spread(name: str, windows: int, targets: int, tokens: int, length: int) -> np.ndarray:
    """Which windows of a text to take for about `tokens` targets."""
    if tokens < length:
        raise UserError(f"--tokens {tokens}: less than one window, which has {length} tokens; give more")
    if windows < 1:
        raise UserError(f"the text of {name!r} is a single token: nothing can be predicted; give more text")
    count = max(1, min(windows, tokens * windows // max(targets, 1)))
    return np.arange(count) * windows // count


def _domain(
    name: str, chosen: np.ndarray, window: Callable[[int], Batch], document_M: np.ndarray, bytes_per_token: float
) -> Domain:
    picked = [window(int(i)) for i in chosen]
    windows = {key: np.stack([row[key] for row in picked]) for key in picked[0]}
    return Domain(name, windows, np.unique(document_M, return_inverse=True)[1], bytes_per_token)


def _name_of(cfg: DataConfig) -> str:
    """A short name of what a run holds out."""
    source = corpus.valid_source(cfg) or cfg.source
    if source == "default":
        return "novel"
    if source.startswith("hf:"):
        return source.removeprefix("hf:").split(":")[0].rpartition("/")[2]
    return Path(source).name.split(".")[0].strip("*") or "heldout"
