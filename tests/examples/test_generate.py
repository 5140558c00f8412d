from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import model
from examples.llama.config import LlamaConfig
from examples.llama.generate import generate

PROMPT = np.array([3, 1, 4, 1, 5])
CONFIG = LlamaConfig(32, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2)
forward = partial(model.forward, CONFIG)


@pytest.fixture(scope="module")
def params() -> model.Params:
    """Larger than the initial ones, so that logits differ by more than rounding."""
    return jax.tree.map(lambda leaf: 30 * leaf, jax.jit(partial(model.init_params, CONFIG))(0))


def likeliest(params: model.Params, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.argmax(jax.jit(forward)(params, tokens), axis=-1))


def test_greedy_text_is_the_likeliest_continuation(params: model.Params) -> None:
    sample = generate(forward, params, PROMPT, length=6, window=64, temperature=0)
    written = np.concatenate([PROMPT, sample])
    assert sample.tolist() == likeliest(params, written[None])[0, 4:-1].tolist()


def test_text_longer_than_the_window_goes_on_from_the_tokens_in_it(params: model.Params) -> None:
    sample = generate(forward, params, PROMPT, length=6, window=4, temperature=0)
    written = np.concatenate([PROMPT, sample])
    windows = np.lib.stride_tricks.sliding_window_view(written, 4)[1:-1]
    assert sample.tolist() == likeliest(params, windows)[:, -1].tolist()


def test_same_seed_writes_the_same_and_another_seed_something_else(params: model.Params) -> None:
    first, again, other = (
        generate(forward, params, PROMPT, length=20, window=8, temperature=2.0, seed=seed)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("prompt", "temperature", "named"),
    [(PROMPT[:0], 1.0, "prompt is empty"), (PROMPT, -1.0, "temperature is -1.0")],
)
def test_wrong_arguments_are_named(prompt: np.ndarray, temperature: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        generate(forward, {}, prompt, length=1, window=4, temperature=temperature)
