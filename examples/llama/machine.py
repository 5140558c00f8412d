"""The machine and the versions that a figure is from, and memory that the machine gets back."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

__all__ = ["machine", "return_freed_memory"]

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "libtpu", "jax-cuda13-pjrt")


def machine() -> dict[str, Any]:
    """Describes this machine and the versions on it, as far as they bear on a figure."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    accelerator = {}
    if jax.default_backend() != "cpu":
        accelerator["accelerator"] = jax.devices()[0].device_kind
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        **accelerator,
        "python": platform.python_version(),
        **versions,
    }


def return_freed_memory() -> None:
    """Gives the memory that this process has freed back to the system.

    glibc keeps it, hundreds of megabytes after a checkpoint was loaded and a step compiled. Other C
    libraries have no function for it.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
