"""`pretrain` that is killed: before its first step, in a step, or in a save.

    python -m tests.examples.killed start|step|save [options of pretrain]

It kills itself, so that the moment does not depend on how busy the machine is.
"""

import os
import signal
import sys
from typing import Any
from unittest import mock

import orbax.checkpoint as ocp

from examples.llama import run
from examples.llama.config import MODELS
from examples.llama.pretrain import main
from tests.examples.tiny_pretrain import TINY

# Instead of which call of what: in the fifth step of the process; in its second save, half written.
MOMENTS = {
    "start": (run, "_compile_step", 1),
    "step": (run._Watch, "see", 5),
    "save": (ocp.JsonCheckpointHandler, "async_save", 2),
}


def kill_at(owner: Any, name: str, number: int) -> None:
    """Kills this process instead of the call of that number, counted from 1."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    mock.patch.object(owner, name, counted).start()


if __name__ == "__main__":
    MODELS["nano"] = TINY
    kill_at(*MOMENTS[sys.argv[1]])
    sys.exit(main(sys.argv[2:]))
