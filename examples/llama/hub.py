"""What comes from the Hugging Face hub: checkpoints, and corpora, streamed to the document."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain

PREFIX = "hf:"
HELD_OUT_DOCUMENTS = 1000

# What a name without a configuration stands for, where the hub would ask for one.
_DEFAULT_CONFIGS = {"allenai/c4": "en"}


def load_splits(source: str) -> tuple["HubDocuments", "HubDocuments"]:
    """Opens the training and the validation split of a data set on the hub.

    Nothing is downloaded but what is read. A data set without a `validation` split has its first
    1,000 training documents held out.

    Args:
      source: `hf:NAME[:CONFIG]`, such as `hf:allenai/c4:en` (the default of `hf:allenai/c4`) or
        `hf:FOLDER`, a folder of local files in a format that `datasets` reads. The data set needs
        a `train` split and a `text` column.

    Returns:
      The training and the validation documents.

    Raises:
      ValueError: If the source names nothing, cannot be reached, or has no `train` split.
      ImportError: If `datasets` is not installed.
    """
    builder, splits = _open_splits(source)

    def rows(split: str) -> Any:
        return builder.as_streaming_dataset(split)

    if "validation" in splits:
        return (
            HubDocuments(source, lambda: rows("train")),
            HubDocuments(source, lambda: rows("validation")),
        )
    return (
        HubDocuments(source, lambda: rows("train").skip(HELD_OUT_DOCUMENTS)),
        HubDocuments(source, lambda: rows("train").take(HELD_OUT_DOCUMENTS)),
    )


def stream_rows(source: str) -> dict[str, Callable[[], Iterator[tuple[dict[str, Any], str]]]]:
    """Opens the splits `train` and, if there is one, `validation` of a data set on the hub.

    Args:
      source: As in `load_splits`, with any columns.

    Returns:
      For each of the two a function that yields its rows, each with the place of the row.

    Raises:
      ValueError: As `load_splits` does.
      ImportError: If `datasets` is not installed.
    """
    builder, splits = _open_splits(source)

    def rows(split: str) -> Iterator[tuple[dict[str, Any], str]]:
        for number, row in enumerate(builder.as_streaming_dataset(split), start=1):
            yield row, f"{source}, row {number} of {split}"

    return {
        split: functools.partial(rows, split)
        for split in ("train", "validation")
        if split in splits
    }


def _open_splits(source: str) -> tuple[Any, list[str]]:
    """Returns the builder of a data set, and the names of its splits."""
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise ValueError(f"{source}: no data set named; expected {PREFIX}NAME[:CONFIG]")
    builder = _open(source, name, config or _DEFAULT_CONFIGS.get(name))
    splits = sorted(builder.as_streaming_dataset())
    if "train" not in splits:
        raise ValueError(f"{source}: no train split; the splits are {splits}")
    return builder, splits


def _open(source: str, name: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source}: streaming needs datasets; in the checkout: pip install -e '.[hub]'"
        ) from error
    try:
        return datasets.load_dataset_builder(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source}: cannot be opened: {error}") from error


WEIGHT_FILES = "*.safetensors"
OTHER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
CHECKPOINT_FILES = (WEIGHT_FILES, *OTHER_FILES)


@functools.cache
def download_checkpoint(source: str, files: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """Brings a checkpoint from the hub, or finds it where an earlier download left it.

    Args:
      source: `hf:NAME[:REVISION]`, such as `hf:HuggingFaceTB/SmolLM2-135M`.
      files: Patterns of the names of the files to bring.

    Returns:
      The folder, in the hub's cache.

    Raises:
      ValueError: If the source names nothing, does not exist, needs a login, or cannot be reached.
      ImportError: If `huggingface_hub` is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{source}: needs huggingface_hub; in the checkout: pip install -e '.[hub]'"
        ) from error
    name, _, revision = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise ValueError(f"{source}: no model named; expected {PREFIX}NAME[:REVISION]")
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(files)
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be brought from the hub: {error}") from error
    return Path(folder)


class HubDocuments(grain.IterDataset[str]):
    """The texts of a streamed data set, in its order; rows without text are left out.

    The state of its iterator is that of `datasets`: the file and the row within. Restoring opens
    that file and reads up to that row; no earlier file is read again.
    """

    def __init__(self, name: str, open_rows: Callable[[], Any]):
        """Makes documents of rows.

        Args:
          name: What messages call the documents.
          open_rows: Returns a new `datasets.IterableDataset`: its state is its own, not that of
            its iterators, so that each iterator needs one.
        """
        super().__init__()
        self._name = name
        self._open_rows = open_rows

    def __iter__(self) -> grain.DatasetIterator[str]:
        """Returns an iterator of its own state, at the first document."""
        return _HubIterator(self._name, self._open_rows())


class _HubIterator(grain.DatasetIterator[str]):
    def __init__(self, name: str, rows: Any):
        super().__init__()
        self._name = name
        self._rows = rows
        self._remaining: Iterator[Mapping[str, Any]] = iter(rows)

    def __next__(self) -> str:
        for row in self._remaining:
            if "text" not in row:
                raise ValueError(f'{self._name}: no "text" column; the columns are {sorted(row)}')
            if row["text"]:
                return row["text"]
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return self._rows.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state)
        self._remaining = iter(self._rows)
