"""Checkpoints of a run by Orbax: arrays, and a record in JSON that is read before them."""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from examples.llama.checksum import array_checksums
from examples.llama.train import TrainState

__all__ = [
    "Damage",
    "Restored",
    "differing_settings",
    "open_checkpoints",
    "read_record",
    "restore",
    "save",
    "tree_bytes",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_MISSING_CODES = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
_QUOTED_CODE = re.compile(r"(?:os_error_code='|OS error )(\d+)")
# What parsers raise for a file that is not as it was written.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
# A disk or a network that did not answer may do so a little later.
_PAUSES_SECONDS = (1.0, 5.0)
_ARRAYS, _DIGEST = "array_checksums", "digest"
_DAMAGED = "damaged"
_LONGEST_REASON = 300


_T = TypeVar("_T")


class Damage(NamedTuple):
    """A checkpoint that is not as it was written: its step, and what is wrong with it."""

    step: int
    reason: str


class Restored(NamedTuple):
    """A checkpoint.

    Attributes:
      state: What a step reads, as it was saved to the bit.
      record: What was saved beside it.
      damaged: The newer ones that were not whole.
    """

    state: TrainState
    record: dict[str, Any]
    damaged: Sequence[Damage] = ()


@contextlib.contextmanager
def open_checkpoints(folder: Path, *, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """Opens a folder of checkpoints, made if it is missing.

    Args:
      folder: Holds one folder a checkpoint, named by its step.
      keep: Checkpoints to keep; older ones are deleted once a newer one is whole.

    Yields:
      Orbax's manager, for the other functions here.

    Raises:
      ValueError: If `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1 checkpoint to keep")
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as checkpoints:
        yield checkpoints


def save(checkpoints: ocp.CheckpointManager, state: TrainState, record: Mapping[str, Any]) -> None:
    """Writes a checkpoint of the state's step; nothing if there is one of that step.

    With it goes a checksum of every array and of the record, by which `restore` and `read_record`
    know damage.

    Args:
      checkpoints: Where to.
      state: What a step reads.
      record: Whatever else the run goes on from, as JSON can hold it.

    Raises:
      OSError: If the disk is full. The checkpoints before this one are as they were.
    """
    step = int(state.step)
    if checkpoints.latest_step() == step:
        return
    whole = dict(record) | {_ARRAYS: array_checksums(state)}
    whole[_DIGEST] = _digest(whole)
    with _disk_errors_named(checkpoints, step):
        _require_space(Path(checkpoints.directory), tree_bytes(state))
        checkpoints.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)),
                record=ocp.args.JsonSave(whole),
            ),
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns the record of the newest checkpoint whose record is whole; reads no arrays.

    Args:
      folder: Of checkpoints; it need not exist.

    Returns:
      What was saved as `record`; None if there is no checkpoint.

    Raises:
      OSError: If a record cannot be read, or the records of all checkpoints are damaged.
    """
    damaged: list[Damage] = []
    with _open_to_read(folder) as checkpoints:
        for step in _newest_first(checkpoints):
            try:
                return _without_checksums(_read_record(checkpoints, step))
            except _DamagedError as error:
                damaged.append(Damage(step, str(error)))
    _refuse_if_any(folder, damaged)
    return None


def restore(folder: Path, abstract_state: TrainState) -> Restored:
    """Reads the newest checkpoint that is whole.

    Damaged checkpoints are moved to the folder `damaged` beside `folder`, where nothing reads them:
    those with a file missing or malformed, or with another checksum. A checkpoint that the disk
    fails to deliver is not damaged: it is read again, and stays where it is. All processes of a run
    call this together, and come to the same.

    Args:
      folder: Of checkpoints.
      abstract_state: ShapeDtypeStructs of the run's state, with the shardings it is to have. The
        checkpoint may have been written with any others, by any number of processes.

    Returns:
      The checkpoint, and what was found damaged.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      OSError: If one cannot be read, or all are damaged; none is moved.
    """
    damaged: list[Damage] = []
    with _open_to_read(folder) as checkpoints:
        for step in _newest_first(checkpoints):
            try:
                restored = _read(checkpoints, step, abstract_state)
                break
            except _DamagedError as error:
                damaged.append(Damage(step, str(error)))
        else:
            _refuse_if_any(folder, damaged)
            raise FileNotFoundError(f"there is no checkpoint in {folder}")
    _set_aside(folder, damaged)
    return restored._replace(damaged=damaged)


class _DamagedError(Exception):
    """A checkpoint is not as it was written."""


def _open_to_read(folder: Path) -> contextlib.AbstractContextManager[ocp.CheckpointManager | None]:
    """Opens a folder for this process alone, so that what one cannot read holds up no other."""
    if not folder.is_dir():
        return contextlib.nullcontext()
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process {this}"
    )
    options = ocp.CheckpointManagerOptions(
        create=False, read_only=True, save_interval_steps=0, multiprocessing_options=alone
    )
    with _quiet_orbax():
        return ocp.CheckpointManager(folder.absolute(), options=options)


def _newest_first(checkpoints: ocp.CheckpointManager | None) -> list[int]:
    return [] if checkpoints is None else sorted(checkpoints.all_steps(), reverse=True)


def _read_record(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = _from_disk(lambda: checkpoints.restore(step, args=args).record, "record", step)
    if not isinstance(record, dict) or record.get(_DIGEST) != _digest(record):
        raise _DamagedError("its record is not the one that was written")
    return record


def _read(checkpoints: ocp.CheckpointManager, step: int, abstract_state: TrainState) -> Restored:
    failure: Exception | None = None
    try:
        record = _read_record(checkpoints, step)
        state = _read_state(checkpoints, step, abstract_state)
    except (_DamagedError, OSError) as error:
        failure = error
    here = np.array([isinstance(failure, OSError), failure is not None])
    unreadable, failed = multihost_utils.process_allgather(here).reshape(-1, 2).any(axis=0)
    if unreadable and not isinstance(failure, OSError):
        raise OSError(errno.EIO, f"another process cannot read the checkpoint of step {step}")
    if failed:
        raise failure or _DamagedError("another process cannot read its part of it")
    found = array_checksums(state)
    if wrong := [name for name, value in record[_ARRAYS].items() if found.get(name) != value]:
        raise _DamagedError(f"not what was written: {', '.join(wrong)}")
    return Restored(state, _without_checksums(record))


def _read_state(
    checkpoints: ocp.CheckpointManager, step: int, abstract_state: TrainState
) -> TrainState:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_without_empty(abstract_state)))
    restored = _from_disk(lambda: checkpoints.restore(step, args=args).state, "arrays", step)
    return jax.tree.map(
        lambda x, saved: saved if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding),
        abstract_state,
        restored,
    )


def _from_disk(read: Callable[[], _T], what: str, step: int) -> _T:
    """Reads a part of a checkpoint, several times if the operating system fails to.

    Raises:
      _DamagedError: If a file is missing or malformed.
      OSError: If the files cannot be read, whatever is in them.
    """
    for pause_seconds in (*_PAUSES_SECONDS, None):
        try:
            with _quiet_orbax():
                return read()
        except Exception as raised:
            # Of an array's data Orbax says that it could not be read, and why in the cause alone.
            error = raised.__cause__ if type(raised) is Exception else raised
            if not isinstance(error, (OSError, *_MALFORMED)):
                raise
            if not _is_unreadable(error):
                raise _DamagedError(f"its {what} cannot be read: {_one_line(error)}") from error
            if pause_seconds is None:
                raise OSError(
                    errno.EIO,
                    f"the {what} of the checkpoint of step {step} cannot be read, after "
                    f"{len(_PAUSES_SECONDS) + 1} attempts: {_one_line(error)}; nothing was moved. "
                    "Try again once the disk or the network answers. If it never does, move the "
                    f"folder {step} of the checkpoints away, to go on from the one before",
                ) from error
            time.sleep(pause_seconds)
    raise AssertionError("the last attempt returns or raises")


def _is_unreadable(error: Exception) -> bool:
    """Whether the operating system could not read; TensorStore's ValueErrors only quote it."""
    if isinstance(error, OSError):
        return not isinstance(error, _MISSING)
    return any(int(code) not in _MISSING_CODES for code in _QUOTED_CODE.findall(str(error)))


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line[:_LONGEST_REASON]}"


def _refuse_if_any(folder: Path, damaged: Sequence[Damage]) -> None:
    if damaged:
        raise OSError(
            f"no checkpoint in {folder} is whole: "
            + "; ".join(f"{each.reason} (step {each.step})" for each in damaged)
            + ". Bring back a copy of one, or start again with another --output"
        )


def _set_aside(folder: Path, damaged: Sequence[Damage]) -> None:
    if not damaged:
        return
    if jax.process_index() == 0:
        aside = folder.parent / _DAMAGED
        aside.mkdir(exist_ok=True)
        for each in damaged:
            names = (f"{each.step}-{number}" for number in itertools.count(1))
            free = next(aside / name for name in names if not (aside / name).exists())
            os.rename(folder / str(each.step), free)
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")


def _digest(record: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in record.items() if name != _DIGEST}
    text = json.dumps(covered, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _without_checksums(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in (_DIGEST, _ARRAYS)}


def _without_empty(tree: PyTree) -> PyTree:
    # Orbax stores no array of size zero, GaLore's projector of a leaf that it does not project.
    return jax.tree.map(lambda x: x if x.size else None, tree)


def differing_settings(
    saved: Mapping[str, Any], given: Mapping[str, Any], *, but: Container[str] = ()
) -> list[str]:
    """Says in words which of two nested settings differ, but for those named.

    >>> saved = {"model": {"hidden_size": 128, "num_layers": 4}, "seed": 0}
    >>> differing_settings(saved, {"model": {"hidden_size": 256, "num_layers": 4}, "seed": 0})
    ['model.hidden_size is 128 there and 256 here']
    """
    before, after = dict(_flatten(saved)), dict(_flatten(given))
    return [
        f"{name} is {_shown(before, name)} there and {_shown(after, name)} here"
        for name in before | after
        if name not in but and _shown(before, name) != _shown(after, name)
    ]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays (or ShapeDtypeStructs) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _require_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OSError(
            errno.ENOSPC, f"{needed_bytes:,} bytes are needed and {free_bytes:,} are free"
        )


@contextlib.contextmanager
def _disk_errors_named(checkpoints: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Turns what says that the disk is full into one OSError of one line."""
    latest = checkpoints.latest_step()
    try:
        with _quiet_orbax():
            yield
    except (OSError, ValueError) as error:
        # TensorStore's errors are ValueErrors that only quote the operating system's.
        codes = [
            code
            for code in _FULL
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error)
        ]
        if not codes:
            raise
        said = getattr(error, "strerror", None)
        detail = f" ({said})" if said and said != os.strerror(codes[0]) else ""
        raise OSError(
            codes[0],
            f"no room for the checkpoint of step {step} in {checkpoints.directory}: "
            f"{os.strerror(codes[0])}{detail}; "
            + ("there is none before it" if latest is None else f"that of step {latest} is whole"),
        ) from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Without the tracebacks of all its threads, which Orbax logs before it raises an error."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
