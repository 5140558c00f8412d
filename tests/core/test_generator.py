import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from apollo_optax import gaussian
from apollo_optax._generator import random_bits, random_words, threefry2x32


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_has_its_published_answers(key, counter, words):
    """The known answers of Random123, the reference of Salmon et al."""
    high, low = (jnp.full(3, word, jnp.uint32) for word in counter)
    found = threefry2x32(jnp.asarray(key, jnp.uint32), high, low)
    for array, word in zip(found, words, strict=True):
        np.testing.assert_array_equal(array, np.full(3, word, np.uint32))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_words_are_of_any_generators_key_and_differ_by_stream(implementation):
    key = jax.random.key(3, impl=implementation)
    first, second = random_words(key, 0, 4, 50), random_words(key, 1, 4, 50)
    assert len(np.unique(np.stack([*first, *second]))) == 2 * 2 * 4 * 50


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7)])
def test_bits_are_those_of_jax(shape, implementation):
    key = jax.random.fold_in(jax.random.key(3, impl=implementation), 1)
    np.testing.assert_array_equal(random_bits(key, shape), jax.random.bits(key, shape, jnp.uint32))
    np.testing.assert_array_equal(
        random_bits(key, shape).astype(jnp.uint16), jax.random.bits(key, shape, jnp.uint16)
    )


def test_more_bits_than_a_word_can_count_are_left_to_jax():
    few, many = (
        str(
            jax.make_jaxpr(lambda key, size=size: random_bits(key, (size, 2**16)))(
                jax.random.key(0)
            )
        )
        for size in (2, 2**16)
    )
    assert "random_bits" in many
    assert "random_bits" not in few


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_gaussian_entries_are_normal_and_independent(implementation):
    key = jax.random.key(0, impl=implementation)
    x = np.asarray(gaussian(key, 5, 400, 2500), np.float64) * 400**0.5
    count = x.size
    assert scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(x**power) - moment) < 5 * (variance / count) ** 0.5
    # Far out as well: 63.3 of a million are beyond 4.
    expected = 2 * scipy.stats.norm.sf(4) * count
    assert abs(np.sum(np.abs(x) > 4) - expected) < 5 * expected**0.5
    # Neighbours, and the two of a pair: they share a radius, so their squares are looked at too.
    for y in (np.roll(x, 1, axis=1), np.roll(x, 1, axis=0), np.roll(x, 200, axis=0)):
        assert abs(np.mean(x * y)) < 5 / count**0.5
        assert abs(np.mean((x**2 - 1) * (y**2 - 1))) < 5 * 2 / count**0.5
