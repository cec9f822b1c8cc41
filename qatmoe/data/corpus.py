"""Sources of text: bundled novels, local files, Hugging Face datasets; and what is held out of them.

A source is a string: "default" (bundled), a file, directory or glob of .txt/.jsonl/.parquet (text files
also as .gz/.xz/.zst), or "hf:DATASET[:CONFIG[:SPLIT]]". Of a directory all that lies below it is read, in linked
directories too, but for hidden ones and hidden files. Every source is an ordered sequence of documents;
the order depends on the paths and their contents alone. Documents are streamed; `Split` also keeps
16 bytes per document and the longest one.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import zstandard

from qatmoe.config import DataConfig
from qatmoe.errors import UserError
from qatmoe.files import expanded

BUNDLED_TRAIN = (
    "austen_emma",
    "austen_mansfield_park",
    "austen_northanger_abbey",
    "austen_pride_and_prejudice",
    "austen_sense_and_sensibility",
    "melville_moby_dick",
)
BUNDLED_VALID = ("austen_persuasion",)

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
_CHUNK = 1 << 20  # bytes read at once
_SET_KEY = "set --config.data.text_key, or the --text_key of another command than training"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and where it came from: a file, or file:line for rows of a file."""

    text: str
    name: str


# ---------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------


def bundled(name: str) -> Traversable:
    """The file `name` among the texts that come with the package."""
    return resources.files("qatmoe.data") / "text" / name


def documents(source: str, text_key: str = "text", *, field: str = "data.source") -> Iterator[Document]:
    """Yields the non-empty documents of `source`, in a fixed order.

    Args:
      source: see the module docstring. "default" is the bundled training text, or the bundled held-out
        novel where `field` is "data.valid".
      text_key: the field of .jsonl, .parquet and dataset rows that holds the text.
      field: the setting `source` came from, named in errors.

    Raises:
      UserError: missing file, unsupported or corrupt file, text that is not UTF-8, a row without text, or
        no document at all.
    """
    found = False
    rows = _hf_rows(source, text_key) if source.startswith("hf:") else _file_rows(source, text_key, field)
    for document in rows:
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise UserError(f"{field}={source!r} holds no text: every document is empty; give a source with text in it")


def fingerprint(source: str, text_key: str = "text", *, field: str = "data.source") -> str:
    """A hash that changes when the documents of `source` may change; reads files but parses none.

    Raises:
      UserError: as `documents`, for what can be seen without parsing.
    """
    digest = hashlib.blake2b(text_key.encode(), digest_size=16)
    if source.startswith("hf:"):
        # `datasets` keeps this hash of content and transforms up to date for its own cache.
        digest.update(f"{source}\0{_hf_dataset(source)._fingerprint}".encode())
        return digest.hexdigest()
    for path in _files(source, field):
        digest.update(f"\0{''.join(_suffixes(path.name))}\0".encode())
        content = hashlib.blake2b(digest_size=16)
        for chunk in _raw_chunks(path):
            content.update(chunk)
        digest.update(content.digest())
    return digest.hexdigest()


def _files(source: str, field: str) -> list[Traversable]:
    """The files of a local source, sorted by path."""
    if source == "default":
        names = BUNDLED_VALID if field == "data.valid" else BUNDLED_TRAIN
        return [bundled(f"{name}.txt.xz") for name in names]
    if not source:
        raise UserError(f'{field} is empty; give a file, directory, glob, "hf:DATASET" or "default"')
    path = expanded(source, field)
    if os.path.isfile(path):
        paths = [path]
    elif os.path.isdir(path):
        paths = list(_below(path, field))
        if not paths:
            raise UserError(f"{field}={source!r} has no {'/'.join(FORMATS)} file in it; point it at the text")
    elif glob.has_magic(source):
        # A set: a pattern with several ** finds a file more than once.
        paths = [p for p in map(Path, set(glob.glob(str(path), recursive=True))) if os.path.isfile(p)]
        if not paths:
            raise UserError(f"{field}={source!r} matches no file; check the pattern")
    else:
        raise UserError(f'{field}={source!r}: {_absence(path)}; give a path, a glob, "hf:..." or "default"')
    for p in paths:
        if not _supported(p.name):
            raise UserError(
                f"{field}: cannot read {str(p)!r}: its suffix must be one of {', '.join(FORMATS)}, "
                f"or .txt and .jsonl followed by {', '.join(COMPRESSIONS)}"
            )
    paths.sort(key=Path.as_posix)
    return list(paths)


def _below(folder: Path, field: str) -> Iterator[Path]:
    """The supported files of a folder and of those in it, linked ones too, each folder once; hidden ones are left out.

    Raises:
      UserError: a folder cannot be read: its text would be missing without a word.
    """

    def unreadable(e: OSError) -> None:
        raise UserError(
            f"{field}: cannot read {e.filename!r}: {e.strerror}; make it readable, or name the files"
        ) from e

    root = os.path.realpath(folder)
    seen: set[str] = set()
    waiting = [str(folder)]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=unreadable):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            shown = sorted(name for name in folders if not name.startswith("."))
            folders[:] = [name for name in shown if not os.path.islink(os.path.join(place, name))]
            links = [os.path.join(place, name) for name in shown if name not in folders]
            # After all that lies here itself; a link to where the folder lies would bring in what is beside it.
            waiting += [link for link in links if not Path(root).is_relative_to(os.path.realpath(link))]
            for path in (Path(place, name) for name in names if _supported(name) and not name.startswith(".")):
                if os.path.isfile(path) or not os.path.exists(path):  # a link to nothing is named when it is read
                    yield path


def _absence(path: Path) -> str:
    """Why there is no file or folder there."""
    try:
        path.stat()
    except (FileNotFoundError, ValueError):
        return "no such file or directory"
    except OSError as e:
        return str(e.strerror)
    return "neither a file nor a directory"


def _suffixes(name: str) -> tuple[str, str]:
    """(format, compression) of a file name, "" where it has none: "a.jsonl.gz" -> (".jsonl", ".gz")."""
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def _supported(name: str) -> bool:
    kind, compression = _suffixes(name)
    return kind in FORMATS and not (kind == ".parquet" and compression)


def _file_rows(source: str, text_key: str, field: str) -> Iterator[Document]:
    for path in _files(source, field):
        kind, _ = _suffixes(path.name)
        if kind == ".txt":
            yield Document(_decode(b"".join(_chunks(path)), str(path), 0), str(path))
        elif kind == ".jsonl":
            yield from _jsonl_rows(path, text_key)
        else:
            yield from _parquet_rows(path, text_key)


# ---------------------------------------------------------------------------------------------------
# File formats
# ---------------------------------------------------------------------------------------------------


def _raw_chunks(path: Traversable) -> Iterator[bytes]:
    """The bytes of a file as stored."""
    try:
        with path.open("rb") as f:
            while chunk := f.read(_CHUNK):
                yield chunk
    except OSError as e:
        raise UserError(f"cannot read {str(path)!r}: {e.strerror or e}") from e


def _chunks(path: Traversable) -> Iterator[bytes]:
    """The decompressed bytes of a file. A file cut short is an error, never a shorter text."""
    compression = _suffixes(path.name)[1]
    if not compression:
        yield from _raw_chunks(path)
    elif compression == ".zst":
        yield from _zstd_chunks(path)
    else:
        try:
            with path.open("rb") as raw, (gzip if compression == ".gz" else lzma).open(raw, "rb") as f:
                while chunk := f.read(_CHUNK):
                    yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
            raise UserError(f"{str(path)!r} is not an intact {compression} file ({e}); make or fetch it again") from e
        except OSError as e:
            raise UserError(f"cannot read {str(path)!r}: {e.strerror or e}") from e


def _zstd_chunks(path: Traversable) -> Iterator[bytes]:
    # One object per frame: unlike the stream reader it tells a complete frame from a truncated one.
    frame = None
    try:
        for data in _raw_chunks(path):
            while data:
                # As `zstd --long=31` makes them; without a bound it is a damaged file to the library.
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as e:
        raise UserError(f"{str(path)!r} is not an intact .zst file ({e}); make or fetch it again") from e
    if frame is not None:
        raise UserError(f"{str(path)!r} is not an intact .zst file (it ends early); make or fetch it again")


def _decode(data: bytes, name: str, offset: int) -> str:
    """UTF-8 to text, without a byte-order mark; `offset` is where `data` starts in the file."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{name!r} is not UTF-8: byte 0x{data[e.start]:02x} at offset {offset + e.start}; convert it, "
            "for example with iconv -t UTF-8"
        ) from e


def _jsonl_rows(path: Traversable, text_key: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        text, where = _decode(line, str(path), offset), f"{path}:{number}"
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as e:  # ValueError: also of a number with thousands of digits
            raise UserError(f"{where}: not a JSON object ({e}); every line must be one") from e
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not a JSON object; every line must be one")
        yield Document(_row_text(row, text_key, where), where)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Splits after each newline byte."""
    rest: list[bytes] = []  # a list, so that one very long line is not copied again for every chunk
    for chunk in chunks:
        *complete, last = chunk.split(b"\n")
        for part in complete:
            yield b"".join([*rest, part, b"\n"])
            rest = []
        rest.append(last)
    if any(rest):
        yield b"".join(rest)


def _row_text(row: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in row:
        keys = ", ".join(sorted(map(str, row))) or "none"
        raise UserError(f"{where}: no field {text_key!r} (fields: {keys}); {_SET_KEY}")
    text = row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_key!r} is {type(text).__name__}, not a string; fix or drop the row")
    if not _is_unicode(text):
        raise UserError(f"{where}: field {text_key!r} holds half of a surrogate pair; fix or drop the row")
    return text


def _is_unicode(text: str) -> bool:
    """False for a str with lone surrogates, which JSON escapes can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Traversable, text_key: str) -> Iterator[Document]:
    import pyarrow.parquet  # here, because it takes a while and most sources need none

    try:
        with pyarrow.parquet.ParquetFile(str(path)) as file:
            if text_key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {text_key!r} (columns: {columns}); {_SET_KEY}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for row in batch.to_pylist():
                    number += 1
                    yield Document(_row_text(row, text_key, f"{path}:{number}"), f"{path}:{number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{str(path)!r} is not an intact .parquet file ({e}); make or fetch it again") from e


def _hf_dataset(source: str) -> Any:
    """The `datasets.Dataset` that "hf:DATASET[:CONFIG[:SPLIT]]" names; SPLIT is "train" unless given."""
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"{source!r} needs the optional package `datasets`: pip install -e '.[hf]'") from e
    name, config, split = (*source.removeprefix("hf:").split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise UserError(f"{source!r}: write hf:DATASET, hf:DATASET:CONFIG or hf:DATASET:CONFIG:SPLIT")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as e:  # the library has no common base class for missing data, network and schema errors
        raise UserError(f"could not load {source!r}: {type(e).__name__}: {' '.join(str(e).split())}") from e


def _hf_rows(source: str, text_key: str) -> Iterator[Document]:
    for number, row in enumerate(_hf_dataset(source)):
        yield Document(_row_text(row, text_key, f"{source}:{number}"), f"{source}:{number}")


# ---------------------------------------------------------------------------------------------------
# Train and validation
# ---------------------------------------------------------------------------------------------------


class Split:
    """The documents to train on and those held out; no document is in both.

    What is held out: `cfg.valid` if given; else, of "default", the bundled held-out novel; else a share of
    the source's documents, chosen by a hash of their content so that copies fall on the same side. If that
    leaves one side empty (say, a single long file), the tail of the longest document is held out.
    A training document that is also in the validation source is dropped from training and counted.
    """

    def __init__(self, cfg: DataConfig):
        """Reads the validation source, or the whole source where documents of it are held out.

        Raises:
          UserError: as `documents`; also a share out of range, or text too short to hold any out.
        """
        self.cfg = cfg
        self.dropped = 0  # training documents left out because they are validation documents; set by train()
        self.notes: list[str] = []  # what the user should know about the split
        self._valid_source = valid_source(cfg)
        self._held_out: set[bytes] = set()
        self._cut_hash = b""  # the document whose tail is held out, if any
        self._cut_share = 0.0
        if self._valid_source:
            self._held_out = {_hash(d.text) for d in documents(self._valid_source, cfg.text_key, field="data.valid")}
        else:
            self._hold_out_share()

    def _hold_out_share(self) -> None:
        fraction = self.cfg.valid_fraction
        if not 0 < fraction < 1:
            raise UserError(f"data.valid_fraction={fraction} must lie between 0 and 1; or name a source in data.valid")
        every: set[bytes] = set()
        total, held, longest = 0, 0, Document("", "")
        for document in documents(self.cfg.source, self.cfg.text_key):
            key = _hash(document.text)
            every.add(key)
            if int.from_bytes(key[:8], "big") < fraction * 2**64:
                self._held_out.add(key)
                held += len(document.text)
            total += len(document.text)
            longest = max(longest, document, key=lambda d: len(d.text.strip()))  # the first of equals
        if self._held_out and len(self._held_out) < len(every):
            share = held / max(total, 1)
            if not fraction / 2 < share < min(2 * fraction, (1 + fraction) / 2):
                self.notes.append(
                    f"the documents that are held out have {share:.1%} of the text, and {fraction:.1%} was asked: "
                    "they are few or of unequal length, and chosen by their hash; to choose yourself, name data.valid"
                )
            return
        self._held_out = set()
        self._cut_hash = _hash(longest.text)
        self._cut_share = min(0.5, fraction * total / len(longest.text.strip()))
        head, tail = cut(longest.text, self._cut_share)
        if not (head.strip() and tail.strip()):
            raise UserError(f"data.source={self.cfg.source!r} is too short to hold any of it out; name data.valid")
        self.notes.append(
            f"too few documents to hold out {fraction:.0%} of them: the last {len(tail)} of {len(longest.text)} "
            f"characters of {longest.name} are held out instead"
        )

    def train(self) -> Iterator[Document]:
        """The training documents.

        Raises:
          UserError: as `documents`; or every document of the source is a validation document.
        """
        kept, dropped = 0, 0
        for document in documents(self.cfg.source, self.cfg.text_key):
            key = _hash(document.text)
            if key in self._held_out:
                dropped += 1
                continue
            kept += 1
            if key == self._cut_hash:
                document = Document(cut(document.text, self._cut_share)[0], document.name)
            yield document
        if self._valid_source:
            self.dropped = dropped
        if not kept:
            raise UserError(
                f"every document of data.source={self.cfg.source!r} is also in data.valid={self._valid_source!r}; "
                "nothing is left to train on"
            )

    def valid(self) -> Iterator[Document]:
        """The held-out documents."""
        if self._valid_source:
            yield from documents(self._valid_source, self.cfg.text_key, field="data.valid")
            return
        for document in documents(self.cfg.source, self.cfg.text_key):
            key = _hash(document.text)
            if key == self._cut_hash:  # held out once, however many copies there are
                yield Document(cut(document.text, self._cut_share)[1], document.name)
                return
            if key in self._held_out:
                yield document


def valid_source(cfg: DataConfig) -> str:
    """The source that is held out as a whole, or "" where a share of the training source is."""
    return cfg.valid or ("default" if cfg.source == "default" else "")


def split_fingerprint(cfg: DataConfig) -> str:
    """A hash that changes when the documents of either side of `Split(cfg)` may change."""
    held_out = valid_source(cfg)
    valid = fingerprint(held_out, cfg.text_key, field="data.valid") if held_out else repr(cfg.valid_fraction)
    joined = f"{fingerprint(cfg.source, cfg.text_key)} {valid}"
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


def cut(text: str, share: float) -> tuple[str, str]:
    """Cuts the last `share` (0 to 1) off `text`, at the next paragraph, else line, else word, else there.

    White space around the text does not count: copies that differ by it alone are cut at the same place.
    """
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    at = start + round((end - start) * (1 - share))
    for boundary in ("\n\n", "\n", " "):
        found = text.find(boundary, at, end)
        # A boundary far into the tail would leave too little of it.
        if 0 <= found <= (at + end) // 2:
            return text[: found + len(boundary)], text[found + len(boundary) :]
    return text[:at], text[at:]


def _hash(text: str) -> bytes:
    """Identity of a document: its text without the white space around it."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
