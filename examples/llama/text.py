"""The text of a run, or its examples: token ids to train on, to evaluate with and to continue."""

import hashlib
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Integer

from examples.llama import data
from examples.llama.corpus import Corpus
from examples.llama.instructions import ChatTemplate, Examples, encode_example
from examples.llama.options import RunSettings
from examples.llama.tokenizer import Tokenizer

__all__ = ["Text", "read_examples", "read_text", "training_batches", "validation_batches"]

Tokens = list[Int32[np.ndarray, " tokens"]]

_STREAMED_VALIDATION_TOKENS = 1 << 20


class Text(NamedTuple):
    """A corpus and the ids a tokenizer makes of it.

    Attributes:
      name: Of the corpus.
      tokenizer: Made the ids.
      train: Ids of the training documents, or the stream of these; of examples the ids of each, as
        `encode_example` returns them.
      validation: Ids of the held-out documents, of a stream the first million; of examples as
        `train`.
    """

    name: str
    tokenizer: Tokenizer
    train: Integer[np.ndarray, " tokens"] | grain.IterDataset[str] | Tokens
    validation: Integer[np.ndarray, " tokens"] | Tokens

    @property
    def digest(self) -> str:
        """Eight bytes, in hexadecimal, that change with the ids: of a stream, the held-out ones."""
        whole = self.validation if isinstance(self.train, grain.IterDataset) else self.train
        if isinstance(whole, list):
            whole = np.concatenate([*whole, [len(example) for example in whole]])
        return hashlib.blake2b(whole.tobytes(), digest_size=8).hexdigest()

    def sequences(self, length: int) -> int | None:
        """Sequences of one pass over the training documents; None for a stream."""
        if isinstance(self.train, grain.IterDataset):
            return None
        return len(self.train) if isinstance(self.train, list) else len(self.train) // length

    def beginning(self, tokens: int) -> Integer[np.ndarray, " tokens"]:
        """The beginning of the validation text; of examples the first one's, before its answer."""
        if not isinstance(self.validation, list):
            return self.validation[:tokens]
        ids = self.validation[0]
        answer = int(np.argmax(ids >= 0))
        return ~ids[:answer] if answer else ids[:1]


def read_examples(examples: Examples, tokenizer: Tokenizer, template: ChatTemplate | None) -> Text:
    """Encodes examples.

    Raises:
      ValueError: As `encode_example`.
    """
    train, validation = (
        [encode_example(each, tokenizer, template) for each in split]
        for split in (examples.train, examples.validation)
    )
    return Text(examples.name, tokenizer, train, validation)


def read_text(corpus: Corpus, tokenizer: Tokenizer) -> Text:
    """Encodes a corpus; of a streamed one only the validation documents."""
    limit = _STREAMED_VALIDATION_TOKENS if corpus.streamed else None
    validation = data.encode_documents(corpus.validation, tokenizer, max_tokens=limit)
    if isinstance(corpus.train, grain.IterDataset):
        return Text(corpus.name, tokenizer, corpus.train, validation)
    train = data.encode_documents(corpus.train, tokenizer)
    return Text(corpus.name, tokenizer, train, validation)


def training_batches(text: Text, settings: RunSettings) -> grain.DatasetIterator[data.Batch]:
    """Returns the batches of a run, from its first.

    Raises:
      ValueError: If the text does not fill one batch.
    """
    sequence, batch, seed = settings.sequence, settings.batch, settings.seed
    if isinstance(text.train, grain.IterDataset):
        return data.streamed_batches(
            text.train, text.tokenizer, sequence_length=sequence, batch_size=batch, seed=seed
        )
    if isinstance(text.train, list):
        rows = data.example_rows(text.train, sequence)
        return data.row_batches(rows, batch_size=batch, seed=seed)
    return data.token_batches(text.train, sequence_length=sequence, batch_size=batch, seed=seed)


def validation_batches(
    text: Text, settings: RunSettings, *, max_batches: int
) -> list[Int32[np.ndarray, "batch sequence_and_next"]]:
    """Returns the batches of every evaluation.

    A validation text too short for a batch makes one smaller batch of all its sequences.

    Raises:
      ValueError: If the text does not fill one sequence.
    """
    if isinstance(text.validation, list):
        rows = data.example_rows(text.validation, settings.sequence)
        batches = data.evaluation_row_batches(
            rows, batch_size=max(1, min(settings.batch, len(rows))), max_batches=max_batches
        )
    else:
        sequences = (len(text.validation) - 1) // settings.sequence
        if sequences < 1:
            raise ValueError(
                f"the part of the text that is held out for validation has {len(text.validation):,}"
                f" tokens; one sequence of {settings.sequence:,} needs {settings.sequence + 1:,}; "
                "use a shorter --sequence or more text"
            )
        batches = data.evaluation_batches(
            text.validation,
            sequence_length=settings.sequence,
            batch_size=max(1, min(settings.batch, sequences)),
            max_batches=max_batches,
        )
    return [batch["tokens"] for batch in batches]
