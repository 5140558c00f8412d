"""Reads a corpus: documents of text, split into training and validation."""

import gzip
import hashlib
import itertools
import json
import os
import platform
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grain

from examples.llama import hub

VALIDATION_FRACTION = 0.05
DocumentT = TypeVar("DocumentT")

_JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
_EXPECTED = (
    "a UTF-8 text file, a folder, a .jsonl, .jsonl.gz, .json.gz or .parquet file with a "
    f'"text" field or with messages or prompts, or {hub.PREFIX}NAME[:CONFIG]'
)
# Only sources that every installation of one Python version has: no tests, no third parties.
_NOT_LIBRARY_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


@dataclass(frozen=True)
class Corpus:
    """Documents of text in two disjoint splits.

    Attributes:
      name: What the corpus is, for people.
      train: Documents to train on: a sequence in memory, or a stream that Grain iterates over.
      validation: Documents held out, of the same kind.
    """

    name: str
    train: Sequence[str] | grain.IterDataset[str]
    validation: Sequence[str] | grain.IterDataset[str]

    @property
    def streamed(self) -> bool:
        """Whether the documents are read while training instead of held in memory."""
        return isinstance(self.train, grain.IterDataset)


def load_corpus(source: str | None = None) -> Corpus:
    """Reads a corpus and holds out about 5% of it for validation.

    The split depends on the data alone, never on a seed, the machine or the order of a listing:

    - `None` or `"stdlib"`: the sources of the running Python's standard library, in the order of
      their relative paths; a file is held out by a hash of its relative path.
    - A folder: its files in the order of their relative paths, hidden ones left out. A text file
      is one document, held out by a hash of its relative path; files of rows are read as below.
      Files that are not UTF-8 are left out, with a warning that counts them.
    - `.jsonl`, `.jsonl.gz`, `.json.gz` (one object a line, as C4's own files) or `.parquet`: the
      rows' `text`, held out by a hash of the text, so that a duplicate stays in its split. Empty
      rows are left out.
    - Any other file: UTF-8 text, whose last 5% is held out, cut at the end of a line.
    - `hf:NAME[:CONFIG]`: streamed from the Hugging Face hub, see `hub.load_splits`.

    Wherever a hash decides, each split gets at least one document.

    Args:
      source: What to read.

    Returns:
      The corpus. All but `hf:` is held in memory.

    Raises:
      ValueError: If the source is missing, holds no text, too little to split, or text in a form
        that cannot be read.
      ImportError: If the source needs a package that is not installed.
    """
    if source is None or source == "stdlib":
        return _standard_library()
    if source.startswith(hub.PREFIX):
        return Corpus(source, *hub.load_splits(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _split_by_hash(source, _folder_documents(path, _files(path)))
    if not path.is_file():
        raise ValueError(f"{source}: no such file or folder; expected {_EXPECTED}")
    if holds_rows(path):
        return _split_by_hash(source, _file_documents(path, path.name))
    if path.suffix.lower() == ".json":
        raise ValueError(
            f"{source}: a .json file may have an object a line, or one value; expected {_EXPECTED}"
            "; write an object a line to a .jsonl file, or name the file .txt to learn it as text"
        )
    return _split_text_file(source, path)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        path
        for path in _files(root, excluded=_NOT_LIBRARY_FOLDERS)
        if path.suffix == ".py" and not _written_at_installation(path.relative_to(root))
    ]
    name = f"the standard library of Python {platform.python_version()}"
    return _split_by_hash(name, _folder_documents(root, sources))


def _written_at_installation(path: Path) -> bool:
    return path.parts[0].startswith(("config-", "_sysconfigdata"))


def _files(root: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    """Files below a folder, in the order of their relative paths, without hidden ones."""
    found: list[Path] = []
    walked: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in walked:
            folders.clear()  # a link to where the walk has been
            continue
        walked.add(real)
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        found.extend(Path(folder, name) for name in names if name[0] != ".")
    regular = [path for path in found if path.is_file()]
    return sorted(regular, key=lambda path: path.relative_to(root).as_posix())


def _folder_documents(root: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    unreadable: list[str] = []
    for path in paths:
        relative = path.relative_to(root).as_posix()
        try:
            yield from _file_documents(path, relative)
        except UnicodeDecodeError:
            unreadable.append(relative)
    if unreadable:
        warnings.warn(
            f"{root}: left out {len(unreadable)} files that are not UTF-8 text, "
            f"such as {unreadable[0]}",
            stacklevel=2,
        )


def holds_rows(path: Path) -> bool:
    """Whether a file is named as one of JSON lines or of Parquet."""
    return path.name.lower().endswith((*_JSON_LINES, ".parquet"))


def _file_documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The documents of one file, each with the key whose hash decides its split."""
    if not holds_rows(path):
        yield name, path.read_text(encoding="utf-8-sig")
        return
    for row, where in file_rows(path):
        text = _text_of(row, where)
        yield text, text


def file_rows(
    path: Path, columns: Sequence[str] = ("text",)
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the rows of a file that `holds_rows`, each with its place in the file.

    Args:
      path: The file.
      columns: Those to read of a Parquet file, of which it has one at least.

    Raises:
      ValueError: If the file or a row is not of its form.
      ImportError: If the file is Parquet, and pyarrow is not installed.
    """
    is_parquet = path.suffix.lower() == ".parquet"
    return _parquet_rows(path, columns) if is_parquet else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_object(line, f"{path}, line {number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def _json_object(line: bytes, where: str) -> tuple[dict[str, Any], str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: a {type(row).__name__}; expected an object with a "text" field')
    return row, where


def _text_of(row: dict[str, Any], where: str) -> str:
    if "text" not in row:
        remedy = "; give a file of messages or prompts by itself, not in a folder"
        raise ValueError(
            f'{where}: no "text" field; the fields are {sorted(row)}'
            f"{remedy if row.keys() & {'messages', 'prompt'} else ''}"
        )
    text = row["text"]
    if not isinstance(text, str | None):
        raise ValueError(f'{where}: "text" is a {type(text).__name__}; expected a string')
    return without_halves(text or "")


def without_halves(text: str) -> str:
    r"""Replaces half a surrogate pair, which JSON can escape and no encoding accepts.

    >>> without_halves("a\ud83d")
    'a?'
    """
    return text.encode(errors="replace").decode()


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f"{path}: .parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    with table:
        there = table.schema_arrow.names
        wanted = [column for column in columns if column in there]
        if not wanted:
            raise ValueError(f'{path}: no "{columns[0]}" column; the columns are {sorted(there)}')
        batches = table.iter_batches(columns=wanted)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield row, f"{path}, row {number}"


def _split_by_hash(name: str, documents: Iterable[tuple[str, str]]) -> Corpus:
    texts = [(key, text) for key, text in documents if text.strip()]
    if not texts:
        raise ValueError(f"{name}: no text in it; expected {_EXPECTED}")
    return Corpus(name, *split_by_hash(name, texts))


def split_by_hash(
    name: str, documents: Sequence[tuple[str, DocumentT]]
) -> tuple[list[DocumentT], list[DocumentT]]:
    """Divides documents into those to train on and those held out.

    Args:
      name: Of the corpus, for the error.
      documents: Each with the key whose hash decides.

    Raises:
      ValueError: If all have one key.
    """
    hashed = [(_hash_fraction(key), document) for key, document in documents]
    fractions = sorted({fraction for fraction, _ in hashed})
    if len(fractions) < 2:
        raise ValueError(
            f"{name}: one document, too few to hold any out for validation; give at least two, or "
            "name a single text file, whose last 5% is held out"
        )
    # At least the lowest is held out, and at least the highest is not.
    limit = min(max(VALIDATION_FRACTION, fractions[0]), fractions[-2])
    return (
        [document for fraction, document in hashed if fraction > limit],
        [document for fraction, document in hashed if fraction <= limit],
    )


def _hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _split_text_file(name: str, path: Path) -> Corpus:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text ({error.reason} at byte {error.start}); expected {_EXPECTED}"
        ) from error
    if len(text.strip()) < 2:
        raise ValueError(f"{name}: no text in it; expected {_EXPECTED}")
    latest = int(len(text) * (1 - VALIDATION_FRACTION))
    earliest = int(len(text) * (1 - 2 * VALIDATION_FRACTION))
    # A text without a line end near the cut is cut inside its line.
    cut = text.rfind("\n", earliest, latest) + 1 or latest
    return Corpus(name, train=[text[:cut]], validation=[text[cut:]])
