"""Checkpoints of a run by Orbax: arrays, and a record in JSON that is read before them."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from examples.llama.train import TrainState

__all__ = [
    "differing_settings",
    "open_checkpoints",
    "read_record",
    "restore_state",
    "save",
    "tree_bytes",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    with _disk_errors_named(checkpoints, step):
        _require_space(Path(checkpoints.directory), tree_bytes(state))
        checkpoints.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)),
                record=ocp.args.JsonSave(dict(record)),
            ),
        )


def read_record(checkpoints: ocp.CheckpointManager) -> dict[str, Any] | None:
    """Returns the record of the latest checkpoint, None if there is none; reads no arrays."""
    step = checkpoints.latest_step()
    if step is None:
        return None
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    return checkpoints.restore(step, args=args).record


def restore_state(checkpoints: ocp.CheckpointManager, abstract_state: TrainState) -> TrainState:
    """Returns the state of the latest checkpoint.

    Args:
      checkpoints: Where from.
      abstract_state: ShapeDtypeStructs of the run's state, with the shardings it is to have.
    """
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_without_empty(abstract_state)))
    restored = checkpoints.restore(checkpoints.latest_step(), args=args).state
    return jax.tree.map(
        lambda x, saved: saved if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding),
        abstract_state,
        restored,
    )


def _without_empty(tree: PyTree) -> PyTree:
    # Orbax stores no array of size zero, GaLore's projector of a leaf that it does not project.
    return jax.tree.map(lambda x: x if x.size else None, tree)


def differing_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Says in words which of two nested settings differ.

    >>> saved = {"model": {"hidden_size": 128, "num_layers": 4}, "seed": 0}
    >>> differing_settings(saved, {"model": {"hidden_size": 256, "num_layers": 4}, "seed": 0})
    ['model.hidden_size is 128 there and 256 here']
    """
    before, after = dict(_flatten(saved)), dict(_flatten(given))
    return [
        f"{name} is {_shown(before, name)} there and {_shown(after, name)} here"
        for name in before | after
        if _shown(before, name) != _shown(after, name)
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
    log = logging.getLogger("absl")
    level = log.level
    # Orbax logs the tracebacks of all its threads before it raises the error.
    log.setLevel(logging.CRITICAL)
    try:
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
        detail = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise OSError(
            codes[0],
            f"no room for the checkpoint of step {step} in {checkpoints.directory}: "
            f"{os.strerror(codes[0])}{detail}; "
            + ("there is none before it" if latest is None else f"that of step {latest} is whole"),
        ) from error
    finally:
        log.setLevel(level)
