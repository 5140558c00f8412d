import functools
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.llama.safetensors_file import Tensor, write_safetensors


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    arrays = {
        "odd": np.arange(3).astype(jnp.bfloat16),
        "matrix": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
        "half": np.ones((1, 2, 2), np.float16),
        "double": np.full(2, np.pi),
        "empty": np.zeros((0, 4), np.float32),
    }
    tensors = {
        name: Tensor(array.shape, array.dtype, functools.partial(np.asarray, array))
        for name, array in arrays.items()
    }
    write_safetensors(tmp_path / "file", tensors)
    written = load_file(tmp_path / "file")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array, strict=True)


def test_one_tensor_exists_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def read() -> np.ndarray:
        assert [array() for array in made] == [None] * len(made)
        array = np.ones(3, np.float32)
        made.append(weakref.ref(array))
        return array

    tensors = {name: Tensor((3,), np.dtype(np.float32), read) for name in "abc"}
    write_safetensors(tmp_path / "file", tensors)
    assert len(made) == 3


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    tensor = Tensor((3,), np.dtype(np.float32), lambda: np.ones(2))
    with pytest.raises(ValueError, match=r"head has the shape \(2,\); announced was \(3,\)"):
        write_safetensors(tmp_path / "file", {"head": tensor})
