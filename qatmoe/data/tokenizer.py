"""Byte-level BPE: any text to token ids and back without loss.

The pre-tokenizer is the one of Qwen2 (llama.cpp: `pre: qwen2`): a regular expression cuts the text into
pieces, then every byte of a piece is one symbol, so no text is out of vocabulary. Nothing is normalised.

    python -m qatmoe.data.tokenizer --vocab_size 2048 --out tokenizer.json
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qatmoe import cli
from qatmoe.config import DataConfig
from qatmoe.data import corpus
from qatmoe.errors import UserError
from qatmoe.files import atomic_file, check_free, check_place, expanded

END_OF_TEXT = "<|endoftext|>"
# What other model families call it, for tokenizers that are not ours.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_SMALLEST_VOCAB = 256 + 1  # every byte, and the end of text

# Qwen2's pre-tokenizer, written as its tokenizer.json has it: llama.cpp recognises exactly this split.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# No piece of QWEN2_PATTERN spans a newline followed by something else than white space, so a text cut
# there gives the same tokens as the whole.
_SAFE_CUT = re.compile(r"\n(?=\S)")
_PART = 1 << 16  # characters handed to the encoder at once: its memory is about 100 bytes per token


class Tokenizer:
    """A `tokenizers.Tokenizer` with an end-of-text token.

    Attributes: `vocab_size` (ids are below it), `end_id` (ends every document), `dtype` (of stored ids:
    uint16 if they fit, else uint32), `json` (the tokenizer.json), `hash` (of `json`, hexadecimal).
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        """Raises UserError if the vocabulary has no end-of-text token; `name` is for that message."""
        backend.no_truncation()
        backend.no_padding()
        vocab = backend.get_vocab(with_added_tokens=True)
        ends = [vocab[token] for token in _END_NAMES if token in vocab]
        if not ends:
            raise UserError(f"{name} has no end-of-text token (one of {', '.join(_END_NAMES)}); add one to it")
        self.json: str = backend.to_str()
        self.hash = hashlib.blake2b(self.json.encode(), digest_size=16).hexdigest()
        self.end_id = ends[0]
        self.vocab_size = 1 + max(vocab.values())
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        # A document that spells a special token gets the bytes of its spelling, not the token.
        backend.encode_special_tokens = True
        self._backend = backend
        self._safe_to_cut = json.dumps(QWEN2_PATTERN) in self.json

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (tokens,), dtype `self.dtype`, without an end of text. Raises UserError on lone surrogates."""
        return next(self.encode_documents([text]))

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields each text's ids, dtype `self.dtype`; encodes on all cores, in bounded memory."""
        parts = ((i, part) for i, text in enumerate(texts) for part in self._parts(text))
        encoded = itertools.chain.from_iterable(map(self._encode_parts, _grouped(parts)))
        for _, group in itertools.groupby(encoded, key=lambda pair: pair[0]):
            yield np.concatenate([ids for _, ids in group])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        """The id of the token with this text; None where there is none."""
        return self._backend.token_to_id(token)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json, and not atomically: into a folder that gets its name as a whole."""
        Path(path).write_text(self.json, encoding="utf-8")

    def check_vocab(self, vocab_size: int) -> None:
        """Raises UserError if the model's `vocab_size` is too small; rows beyond the tokenizer's are never used."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {self.vocab_size} tokens but model.vocab_size={vocab_size}; "
                f"set --config.model.vocab_size={self.vocab_size}"
            )

    def _parts(self, text: str) -> Iterator[str]:
        start = 0
        while self._safe_to_cut and len(text) - start > _PART:
            match = _SAFE_CUT.search(text, start + _PART)
            if match is None:
                break
            yield text[start : match.end()]
            start = match.end()
        yield text[start:]

    def _encode_parts(self, parts: list[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray]]:
        try:
            encodings = self._backend.encode_batch_fast([part for _, part in parts], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as e:
            raise UserError("the text holds half of a surrogate pair, which no UTF-8 text can; remove it") from e
        for (i, _), encoding in zip(parts, encodings, strict=True):
            yield i, np.asarray(encoding.ids, self.dtype)


def _grouped(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Lists of consecutive parts, of a few MB each: enough for all cores, little enough for memory."""
    group: list[tuple[int, str]] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part[1]) + 64  # the 64 bounds the number of empty and tiny parts
        if size >= 32 * _PART:
            yield group
            group, size = [], 0
    if group:
        yield group


def train(texts: Iterable[str], vocab_size: int, option: str = "--config.model.vocab_size") -> Tokenizer:
    """Learns a byte-level BPE of exactly `vocab_size` tokens; the same texts give the same tokenizer.

    Args:
      texts: to learn from.
      vocab_size: tokens, the end of text among them.
      option: what sets `vocab_size`, named in errors.

    Raises:
      UserError: `vocab_size` is below 257, or more than the text has repeated byte sequences for.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise UserError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {END_OF_TEXT} need {_SMALLEST_VOCAB}; "
            f"set {option}={_SMALLEST_VOCAB} or more"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise UserError(
            f"the text is too small for vocab_size={vocab_size}: it gives {reached} tokens; "
            f"set {option}={reached} or give more text"
        )
    return Tokenizer(backend)


@functools.lru_cache(maxsize=1)
def _bundled_json() -> str:
    return corpus.bundled("tokenizer.json").read_text(encoding="utf-8")


def load(path: str = "default") -> Tokenizer:
    """Reads a tokenizer.json; "default" is the bundled one.

    Raises:
      UserError: no such file, not a tokenizer.json, or a vocabulary without end of text.
    """
    if path == "default":
        return Tokenizer(tokenizers.Tokenizer.from_str(_bundled_json()))
    try:
        content = expanded(path, "data.tokenizer").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"data.tokenizer={path!r}: cannot read it ({reason}); give a tokenizer.json, 'default' or 'train'"
        ) from e
    return parse(content, f"data.tokenizer={path!r}")


def parse(content: str, name: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text; `name` is for messages.

    Raises:
      UserError: not a tokenizer.json, or a vocabulary without end of text.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{name} is not a tokenizer.json ({e}); give one") from e
    return Tokenizer(backend, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a tokenizer on the training text of a source and writes it. Exit codes: 0 written, 2 unusable input."""
    parser = argparse.ArgumentParser(prog="python -m qatmoe.data.tokenizer", description=main.__doc__)
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--out", required=True, help="the tokenizer.json to write")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    parser.add_argument("--source", default="default", help="as data.source")
    parser.add_argument("--text_key", default="text", help="as data.text_key")
    args = parser.parse_args(argv)
    try:
        check_place(args.out, "--out")
        check_free(Path(args.out), force=args.force)
        split = corpus.Split(DataConfig(source=args.source, text_key=args.text_key))
        tokenizer = train((document.text for document in split.train()), args.vocab_size, "--vocab_size")
        with atomic_file(args.out, force=args.force) as f:
            f.write(tokenizer.json.encode("utf-8"))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(f"{args.out}: {tokenizer.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
