import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Silent broadcasting between different numbers of axes is an error in our own code."""
    with jax.numpy_rank_promotion("raise"):
        yield
