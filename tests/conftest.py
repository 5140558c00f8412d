from collections.abc import Iterator

import jax
import pytest

# For what runs on meshes; everything else is on the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Silent broadcasting between different numbers of axes is an error in our own code."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """For tests of small programs, which take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
