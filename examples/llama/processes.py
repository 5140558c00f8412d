"""One run on several processes: how they find, agree with and lose each other."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from examples.llama.command_line import check_ranges
from examples.llama.options import ProcessOptions

__all__ = [
    "agreed",
    "everywhere",
    "joined_processes",
    "lost_process",
    "require_in_first",
    "writes_files",
]


def check_processes(options: ProcessOptions) -> None:
    """Raises ValueError if the options do not go together."""
    placed = (options.processes, options.process)
    if options.coordinator in (None, "auto"):
        if placed != (None, None):
            raise ValueError(
                "--processes and --process need --coordinator HOST:PORT, the address of process 0"
            )
    elif options.processes is None or options.process is None:
        raise ValueError(
            f"--coordinator {options.coordinator} needs --processes, how many there are, and "
            "--process, which this one is"
        )
    elif not 0 <= options.process < options.processes:
        raise ValueError(
            f"--process is {options.process} of {options.processes}; expected 0 to "
            f"{options.processes - 1}"
        )
    elif not re.fullmatch(r".+:\d+", options.coordinator):
        raise ValueError(
            f"--coordinator is {options.coordinator}; expected HOST:PORT, the address of process "
            "0, or auto"
        )
    check_ranges(options)


@contextlib.contextmanager
def joined_processes(options: ProcessOptions) -> Iterator[None]:
    """Makes this process one of several, before anything else is asked of JAX.

    Raises:
      ValueError: If the options do not go together.
      RuntimeError: If the processes do not find each other in `process_timeout` seconds.
    """
    check_processes(options)
    if options.coordinator is None:
        yield
        return
    timeout = options.process_timeout
    jax.distributed.initialize(
        None if options.coordinator == "auto" else options.coordinator,
        options.processes,
        options.process,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )
    try:
        yield
    finally:
        jax.distributed.shutdown()


def writes_files() -> bool:
    """Whether this process is the one that writes what is not divided among them."""
    return jax.process_index() == 0


def require_in_first(check: Callable[[], None]) -> None:
    """Runs a check in the first process only, and raises ValueError in all if it does."""
    refusal = None
    if writes_files():
        try:
            check()
        except ValueError as error:
            refusal = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(refusal is not None):
        refusal = refusal or ValueError("process 0 refuses this run; its output says why")
    if refusal is not None:
        raise refusal


def agreed(asked: Callable[[], bool], mesh: Mesh | None) -> Callable[[], bool]:
    """Returns the function that is true in all processes as soon as `asked` is in one.

    All call it equally often.
    """
    if mesh is None or jax.process_count() == 1:
        return asked
    divided = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    whole = NamedSharding(mesh, PartitionSpec())
    any_of = jax.jit(lambda answers: answers.any(), out_shardings=whole)

    def ask() -> bool:
        answers = np.full(jax.local_device_count(), asked())
        return bool(any_of(jax.make_array_from_process_local_data(divided, answers)))

    return ask


def lost_process(message: str) -> NoReturn:
    """Ends this process with a line that says why, without waiting for the others."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def everywhere(tree: PyTree) -> PyTree:
    """Returns the arrays of all processes as NumPy arrays, whole in each."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
