"""`pretrain` without room to write after a checkpoint, then with room again.

    python -m tests.examples.full_disk FILLER LEFT [options of pretrain]

FILLER is the file that takes all of the file system's room but LEFT bytes; "none" instead lets no
file grow beyond LEFT bytes. Prints what `pretrain` returned each time.
"""

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from examples.llama import run
from examples.llama.config import MODELS
from examples.llama.pretrain import main
from tests.examples.tiny_pretrain import TINY


def fill(filler: Path, left: int) -> None:
    """Takes all room but so many bytes."""
    with open(filler, "wb", buffering=0) as file:
        while (free := shutil.disk_usage(filler.parent).free) > left:
            file.write(bytes(min(free - left, 1 << 16)))


def limit_files(size: int) -> None:
    """Lets no file grow beyond a size: writing fails, with EFBIG, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def run_out_after_a_checkpoint(filler: Path | None, left: int) -> None:
    """Takes the room once a checkpoint is there, though it was free when it was asked for."""
    usage, save = shutil.disk_usage, run.save

    def save_and_fill(*args: Any) -> None:
        filling.stop()
        save(*args)
        if filler is None:
            limit_files(left)
            return
        fill(filler, left)
        mock.patch.object(shutil, "disk_usage", return_value=usage("/")).start()

    filling = mock.patch.object(run, "save", save_and_fill)
    filling.start()


if __name__ == "__main__":
    MODELS["nano"] = TINY
    name, left, *options = sys.argv[1:]
    filler = None if name == "none" else Path(name)
    run_out_after_a_checkpoint(filler, int(left))
    print("filling up:", main(options))
    if filler is None:
        limit_files(resource.RLIM_INFINITY)
    else:
        filler.unlink()
    # In another process, as a user would: this one's threads may still fail, and Python 3.11 then
    # fails to parse source.
    again = [sys.executable, "-m", "tests.examples.tiny_pretrain", *options, "--resume"]
    print("with room:", subprocess.run(again, check=False).returncode)
