"""Batches of token windows: shuffled, resumable at the exact batch."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from grain.experimental import (
    RepeatIterDataset,
    ThreadPrefetchIterDataset,
    WindowShuffleIterDataset,
)
from jaxtyping import Int32, Integer

from examples.llama.hub import HELD_OUT_DOCUMENTS
from examples.llama.tokenizer import Tokenizer

# Gathering a batch takes less time than handing it over from a thread.
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_SHUFFLED_WINDOWS = 1024
_PREFETCHED_BATCHES = 2


class Batch(TypedDict):
    """What an iterator yields.

    Position i + 1 of a row is the target of position i, so that a row of sequence + 1 tokens
    holds `sequence` predictions. A token that is read but is no target is stored as `~id`, below
    zero.
    """

    tokens: Int32[np.ndarray, "batch sequence_and_next"]


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, *, max_tokens: int | None = None
) -> Integer[np.ndarray, " tokens"]:
    """Joins documents to one array of ids, each followed by its end-of-document id.

    Args:
      documents: Texts.
      tokenizer: Makes ids of a text. Without an end-of-document id nothing is put between.
      max_tokens: Where to stop, as for the validation split of a streamed corpus; None for
        never. No document after it is read.

    Returns:
      The ids, in the smallest unsigned type that holds the tokenizer's.

    Example:
      >>> from examples.llama.tokenizer import load_tokenizer
      >>> encode_documents(["ab", "c"], load_tokenizer("bytes"))
      array([97, 98, 10, 99, 10], dtype=uint8)
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    encoded: list[np.ndarray] = [np.empty(0, dtype)]
    length = 0
    for text in documents:
        encoded.append(_document_ids(text, tokenizer).astype(dtype))
        length += len(encoded[-1])
        if max_tokens is not None and length >= max_tokens:
            break
    return np.concatenate(encoded)[:max_tokens]


def token_windows(
    tokens: Integer[np.ndarray, " tokens"], sequence_length: int
) -> Integer[np.ndarray, "windows sequence_and_next"]:
    """Cuts tokens in windows that overlap by one: each but the first is a target exactly once.

    Args:
      tokens: Ids of a corpus.
      sequence_length: Predictions in a window, one less than its tokens.

    Returns:
      A read-only view; tokens after the last whole window are left out.

    Raises:
      TypeError: If the tokens are not one axis of integers.
      ValueError: If the sequence length is below 1 or the tokens do not fill one window.

    Example:
      >>> token_windows(np.arange(8), sequence_length=3)
      array([[0, 1, 2, 3],
             [3, 4, 5, 6]])
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}; expected one axis of integers"
        )
    _check_positive("sequence_length", sequence_length)
    if len(tokens) <= sequence_length:
        raise ValueError(
            f"the text has {len(tokens):,} tokens; one sequence of {sequence_length:,} needs "
            f"{sequence_length + 1:,}; use a shorter --sequence or more text"
        )
    windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)
    return windows[::sequence_length]


def token_batches(
    tokens: Integer[np.ndarray, " tokens"],
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterates over batches of windows of a corpus in memory.

    Every epoch is shuffled anew and yields whole batches only.

    Args:
      tokens: Ids of the training split.
      sequence_length: Predictions in a row.
      batch_size: Rows of a batch.
      seed: Decides the order, in [0, 2**31).
      shuffle: Whether to shuffle; else the windows come in their order.
      epochs: How often to go through the tokens; None for ever.

    Returns:
      An iterator over `{"tokens": int32 (batch_size, sequence_length + 1)}`. Its
      `get_state()` is `{"next_index": batches yielded}`; after `set_state` the next batch is
      exactly the one that would have followed.

    Raises:
      TypeError: If the tokens are not one axis of integers.
      ValueError: If an argument is out of its range, or the tokens do not fill one batch.

    Example:
      >>> tokens = np.arange(100)
      >>> batches = token_batches(tokens, sequence_length=4, batch_size=2, shuffle=False)
      >>> next(batches)["tokens"]
      array([[0, 1, 2, 3, 4],
             [4, 5, 6, 7, 8]], dtype=int32)
      >>> batches.get_state()
      {'next_index': 1}
    """
    windows = _windows_for_batch(tokens, sequence_length, batch_size)
    return row_batches(windows, batch_size=batch_size, seed=seed, shuffle=shuffle, epochs=epochs)


def row_batches(
    rows: Integer[np.ndarray, "rows sequence_and_next"],
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterates over batches of rows, as `token_batches` does over those of windows."""
    _check_order(seed, epochs)
    _check_rows(len(rows), batch_size)
    order = grain.MapDataset.range(len(rows))
    if shuffle:
        order = order.seed(seed).shuffle()
    batches = order.batch(batch_size, drop_remainder=True).map(lambda i: _as_batch(rows[i]))
    return iter(batches.repeat(epochs).to_iter_dataset(_NO_THREADS))


def example_rows(
    examples: Sequence[Integer[np.ndarray, " tokens"]], sequence_length: int
) -> Int32[np.ndarray, "rows sequence_and_next"]:
    """Lays one example in each row, and fills the row up behind it.

    Attention looks backwards only, so that no example sees another, nor what fills its row.

    Args:
      examples: Ids of each, `~id` for those that are read but not learned.
      sequence_length: Predictions in a row, one less than its tokens.

    Returns:
      The rows. Those without a target are left out, and longer examples lose their end; a warning
      counts both.

    Example:
      >>> example_rows([np.array([~7, 8, 9]), np.array([~1, 2])], sequence_length=2)
      array([[-8,  8,  9],
             [-2,  2, -1]], dtype=int32)
    """
    _check_positive("sequence_length", sequence_length)
    cut = [np.asarray(each[: sequence_length + 1], np.int32) for each in examples]
    rows = np.full((len(cut), sequence_length + 1), ~0, np.int32)
    for row, ids in zip(rows, cut, strict=True):
        row[: len(ids)] = ids
    learned = (rows[:, 1:] >= 0).any(axis=1)
    longer = sum(len(each) > sequence_length + 1 for each in examples)
    if longer:
        left_out = int((~learned).sum())
        warnings.warn(
            f"{longer:,} of {len(examples):,} examples are too long for --sequence "
            f"{sequence_length:,} and lose their end. {left_out:,} of them lose everything that is "
            f"to be learned, and are left out. The longest has {max(map(len, examples)):,} tokens: "
            "choose a longer --sequence",
            stacklevel=2,
        )
    return rows[learned]


def evaluation_batches(
    tokens: Integer[np.ndarray, " tokens"],
    *,
    sequence_length: int,
    batch_size: int,
    max_batches: int | None = None,
) -> grain.IterDataset[Batch]:
    """Returns one pass over a held-out text, the same each time.

    When `max_batches` leaves windows out, those taken are spread evenly over the whole text, since
    its beginning may be of one kind.

    Args:
      tokens: Ids of the validation split.
      sequence_length: Predictions in a row.
      batch_size: Rows of a batch.
      max_batches: The most batches to yield; None for all whole ones.

    Returns:
      A data set to iterate over as often as needed, of elements as those of `token_batches`.

    Raises:
      TypeError: If the tokens are not one axis of integers.
      ValueError: If an argument is out of its range, or the tokens do not fill one batch.
    """
    if max_batches is not None:
        _check_positive("max_batches", max_batches)
    windows = _windows_for_batch(tokens, sequence_length, batch_size)
    return evaluation_row_batches(windows, batch_size=batch_size, max_batches=max_batches)


def evaluation_row_batches(
    rows: Integer[np.ndarray, "rows sequence_and_next"],
    *,
    batch_size: int,
    max_batches: int | None = None,
) -> grain.IterDataset[Batch]:
    """Returns one pass over held-out rows, as `evaluation_batches` does over windows."""
    _check_rows(len(rows), batch_size)
    whole_batches = len(rows) // batch_size
    taken = batch_size * min(whole_batches, max_batches or whole_batches)
    spread = np.arange(taken) * len(rows) // taken
    batches = grain.MapDataset.source(spread).batch(batch_size)
    return batches.map(lambda i: _as_batch(rows[i])).to_iter_dataset(_NO_THREADS)


def streamed_batches(
    documents: grain.IterDataset[str],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterates over batches of windows of a corpus that does not fit in memory.

    Documents are joined and cut in windows as by `encode_documents` and `token_batches`. Windows
    are shuffled among 1,024 neighbours only.

    Args:
      documents: Texts, such as the training split of a streamed corpus.
      tokenizer: Makes ids of a text.
      sequence_length: Predictions in a row.
      batch_size: Rows of a batch.
      seed: Decides the order, in [0, 2**31).
      shuffle: Whether to shuffle; else the windows come in their order.
      epochs: How often to go through the documents; None for ever.

    Returns:
      An iterator over `{"tokens": int32 (batch_size, sequence_length + 1)}`. Its
      `get_state()` holds where the documents stood before the windows being shuffled, and the
      tokens left of the last document then; `set_state` reads at most those 1,024 windows again.
      A thread reads two batches ahead until `close()`.

    Raises:
      ValueError: If an argument is out of its range, or there are no documents.
    """
    _check_order(seed, epochs)
    _check_positive("batch_size", batch_size)
    _check_positive("sequence_length", sequence_length)
    if next(iter(documents), None) is None:
        raise ValueError(
            "the streamed corpus has no documents to train on; without a split `validation`, the "
            f"first {HELD_OUT_DOCUMENTS:,} are held out"
        )
    ids = documents.map(lambda text: _document_ids(text, tokenizer))
    # Grain's ConcatThenSplitIterDataset 0.2.18 does not go on from its own state to the token.
    windows: grain.IterDataset = _StreamedWindows(RepeatIterDataset(ids, epochs), sequence_length)
    if shuffle:
        windows = WindowShuffleIterDataset(windows, window_size=_SHUFFLED_WINDOWS, seed=seed)
    batches = windows.batch(batch_size, drop_remainder=True).map(_as_batch)
    return iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED_BATCHES))


class _StreamedWindows(grain.IterDataset[np.ndarray]):
    """The windows of `token_windows`, from documents that arrive one at a time."""

    def __init__(self, documents: grain.IterDataset[np.ndarray], sequence_length: int):
        super().__init__(documents)
        self._documents = documents
        self._sequence_length = sequence_length

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _StreamedWindowIterator(iter(self._documents), self._sequence_length)


class _StreamedWindowIterator(grain.DatasetIterator[np.ndarray]):
    def __init__(self, documents: grain.DatasetIterator[np.ndarray], sequence_length: int):
        super().__init__(documents)
        self._documents = documents
        self._sequence_length = sequence_length
        self._unused = np.empty(0, np.int32)

    def __next__(self) -> np.ndarray:
        while len(self._unused) <= self._sequence_length:
            self._unused = np.concatenate([self._unused, next(self._documents)])
        window = self._unused[: self._sequence_length + 1]
        self._unused = self._unused[self._sequence_length :]
        return window

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._documents.get_state(), "unused": self._unused.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._unused = np.array(state["unused"], np.int32)


def _document_ids(text: str, tokenizer: Tokenizer) -> Integer[np.ndarray, " tokens"]:
    ids = tokenizer.encode(text)
    end = tokenizer.end_of_document
    return ids if end is None else np.append(ids, ids.dtype.type(end))


def _as_batch(rows: Integer[np.ndarray, "batch sequence_and_next"]) -> Batch:
    return {"tokens": rows.astype(np.int32)}


def _windows_for_batch(
    tokens: Integer[np.ndarray, " tokens"], sequence_length: int, batch_size: int
) -> Integer[np.ndarray, "windows sequence_and_next"]:
    _check_positive("batch_size", batch_size)
    windows = token_windows(tokens, sequence_length)
    if len(windows) < batch_size:
        raise ValueError(
            f"the text has {len(tokens):,} tokens, {len(windows)} windows of {sequence_length}: "
            f"one batch of {batch_size} needs {batch_size * sequence_length + 1:,} tokens; use a "
            "smaller --batch, a shorter --sequence or more text"
        )
    return windows


def _check_rows(rows: int, batch_size: int) -> None:
    _check_positive("batch_size", batch_size)
    if rows < batch_size:
        raise ValueError(
            f"there are {rows:,} sequences, and one batch needs {batch_size:,}; use a smaller "
            "--batch or more data"
        )


def _check_order(seed: int, epochs: int | None) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}; expected 0 to 2**31 - 1")
    if epochs is not None:
        _check_positive("epochs", epochs)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")
