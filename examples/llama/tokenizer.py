"""Turns text into token ids and back: bytes, a tokenizer.json, or one trained on the corpus."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

_EXPECTED = "bytes, train:VOCAB, or the path of a tokenizer.json"
_TRAINED_END_OF_DOCUMENT = "<|endoftext|>"
_ENDS_OF_DOCUMENT = (_TRAINED_END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
_SMALLEST_TRAINED_VOCABULARY = 256 + 1
# Enough for any vocabulary; a streamed corpus has no end.
_TRAINING_CHARACTERS = 100_000_000
_PIECE_CHARACTERS = 1 << 20


class Tokenizer(Protocol):
    """What the data pipeline and the text sample need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is below it."""
        ...

    @property
    def end_of_document(self) -> int | None:
        """The id that follows each document, if the tokenizer has one."""
        ...

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """Returns the ids of a text, without any that mark its beginning or end."""
        ...

    def encode_parts(self, parts: Sequence[str]) -> list[Integer[np.ndarray, " tokens"]]:
        """Returns the ids of a text of several parts, those of each part apart.

        They are the ids of the whole text. A token that crosses a boundary is of the part in which
        it ends.
        """
        ...

    def decode(self, ids: Integer[np.ndarray, " tokens"]) -> str:
        """Returns the text of ids; what is not valid UTF-8 becomes U+FFFD."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json from which `load_tokenizer` makes the same tokenizer."""
        ...


def load_tokenizer(spec: str, train_documents: Iterable[str] = ()) -> Tokenizer:
    """Returns the tokenizer that a specification names.

    Args:
      spec: `"bytes"`: the 256 values of a byte. `"train:VOCAB"`: a byte-level BPE of `VOCAB` ids
        trained on the documents; the same documents give the same ids. Else the path of a
        Hugging Face `tokenizer.json`, or of a folder that holds one.
      train_documents: Read by `"train:VOCAB"` alone, up to their first 100 million characters.

    Returns:
      The tokenizer.

    Raises:
      ValueError: If the specification is none of these, the file cannot be read, the vocabulary
        cannot hold every byte, or the documents have too few different words to fill it.

    Example:
      >>> tokenizer = load_tokenizer("bytes")
      >>> tokenizer.encode("né")
      array([110, 195, 169], dtype=uint8)
      >>> tokenizer.decode([110, 195, 169])
      'né'
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("train:"):
        return _train(_vocabulary_size(spec), train_documents)
    path = Path(spec).expanduser()
    return _read(path / "tokenizer.json" if path.is_dir() else path)


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 values of a byte as ids; a document ends with a newline."""

    vocab_size: int = field(default=256, init=False)
    end_of_document: int = field(default=ord("\n"), init=False)

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """Returns the bytes of the text in UTF-8, uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def encode_parts(self, parts: Sequence[str]) -> list[Integer[np.ndarray, " tokens"]]:
        """Returns the bytes of each part."""
        return [self.encode(part) for part in parts]

    def decode(self, ids: Integer[np.ndarray, " tokens"]) -> str:
        """Returns the text of the bytes, with U+FFFD for an id that is none."""
        ids = np.asarray(ids)
        in_utf8_or_never = np.where((ids >= 0) & (ids < self.vocab_size), ids, 0xFF)
        return bytes(in_utf8_or_never.astype(np.uint8)).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json: a byte-level BPE without merges, whose ids are the bytes."""
        _byte_model().save(str(path))


@dataclass(frozen=True)
class SubwordTokenizer:
    """A Hugging Face tokenizer.

    Attributes:
      tokenizer: It.
      file_content: Of the tokenizer.json it was read from, if it was.
    """

    tokenizer: tokenizers.Tokenizer
    file_content: bytes | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def end_of_document(self) -> int | None:
        """The id of the first of <|endoftext|>, <|end_of_text|>, </s> and <eos> that exists."""
        known = (self.tokenizer.token_to_id(token) for token in _ENDS_OF_DOCUMENT)
        return next((token for token in known if token is not None), None)

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """Returns the ids of the text, int32, without special tokens."""
        ids: list[int] = []
        for piece in _pieces(text):
            # The batched call is the one that skips the offsets nobody reads.
            (encoding,) = self.tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            ids.extend(encoding.ids)
        return np.array(ids, dtype=np.int32)

    def encode_parts(self, parts: Sequence[str]) -> list[Integer[np.ndarray, " tokens"]]:
        """Returns the ids of the whole text, int32, those of each part apart."""
        encoding = self.tokenizer.encode("".join(parts), add_special_tokens=False)
        last_characters = [max(begin, end - 1) for begin, end in encoding.offsets]
        ends = np.cumsum([len(part) for part in parts])
        of_part = np.searchsorted(ends, np.maximum.accumulate([0, *last_characters])[1:], "right")
        ids = np.array(encoding.ids, dtype=np.int32)
        return [ids[of_part == index] for index in range(len(parts))]

    def decode(self, ids: Integer[np.ndarray, " tokens"]) -> str:
        """Returns the text of the ids, special tokens among it."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json, to the byte the one that was read if it was."""
        if self.file_content is None:
            self.tokenizer.save(str(path))
        else:
            Path(path).write_bytes(self.file_content)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most 1 Mi characters that end at a line, if they can.

    An encoding holds a hundred bytes a token until it is dropped, too much for a whole corpus.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _vocabulary_size(spec: str) -> int:
    size = spec.removeprefix("train:")
    if not (size.isascii() and size.isdigit() and int(size) >= _SMALLEST_TRAINED_VOCABULARY):
        raise ValueError(
            f"tokenizer {spec!r}: VOCAB is {size!r}; expected an integer of at least "
            f"{_SMALLEST_TRAINED_VOCABULARY}: one id a byte and one for the end of a document"
        )
    return int(size)


def _train(vocab_size: int, documents: Iterable[str]) -> SubwordTokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_TRAINED_END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(documents, _TRAINING_CHARACTERS), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"tokenizer train:{vocab_size}: the training documents only fill "
            f"{tokenizer.get_vocab_size()} ids; ask for at most that many, or give more text"
        )
    return SubwordTokenizer(tokenizer)


def _first_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    for piece in itertools.chain.from_iterable(map(_pieces, documents)):
        yield piece[:characters]
        characters -= len(piece)
        if characters <= 0:
            return


def _read(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ValueError(f"tokenizer {str(path)!r}: no such file; expected {_EXPECTED}")
    return read_tokenizer(path.read_bytes(), str(path))


def read_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Returns the tokenizer of the content of a tokenizer.json.

    Args:
      content: It.
      name: Where it is from, for the error.

    Raises:
      ValueError: If it is none.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"tokenizer {name!r}: not a tokenizer.json of Hugging Face's tokenizers: {error}"
        ) from error
    if not tokenizer.get_vocab():
        raise ValueError(f"tokenizer {name!r}: its vocabulary is empty; expected {_EXPECTED}")
    if tokenizer.get_vocab() == _byte_vocabulary():
        return ByteTokenizer()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return SubwordTokenizer(tokenizer, content)


def _byte_model() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_vocabulary() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE.

    Printable bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
