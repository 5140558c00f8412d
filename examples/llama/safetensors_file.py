"""Files of the safetensors format, written a tensor at a time.

The package safetensors reads them. To write, it needs all tensors in memory at once, and copies
them. The format: https://huggingface.co/docs/safetensors.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["FLOATS", "Tensor", "write_safetensors"]

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""NumPy's name of every floating-point dtype by that of the format."""


class Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        shape: its shape.
        dtype: the dtype it is written in, one of `FLOATS`.
        read: makes it, in this shape and any dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], ArrayLike]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by their names, each made when its turn comes.

    >>> import tempfile, safetensors.numpy
    >>> ones = Tensor((2,), np.dtype("float32"), lambda: np.ones(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "model.safetensors"), {"ones": ones})
    ...     safetensors.numpy.load_file(Path(folder, "model.safetensors"))
    {'ones': array([1., 1.], dtype=float32)}
    """
    format_names = {jnp.dtype(name): format_name for format_name, name in FLOATS.items()}
    # Wide dtypes first, so that each tensor begins at a multiple of its dtype's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    # Older transformers refuse a file that does not name a framework.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + int(np.prod(tensor.shape, dtype=int)) * tensor.dtype.itemsize
        header[name] = {
            "dtype": format_names[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in ordered:
            file.write(_content(name, tensor))


def _content(name: str, tensor: Tensor) -> memoryview:
    array = np.asarray(tensor.read())
    if array.shape != tensor.shape:
        raise ValueError(f"{name} has the shape {array.shape}; announced was {tensor.shape}.")
    return np.ascontiguousarray(array, tensor.dtype).view(np.uint8).data
