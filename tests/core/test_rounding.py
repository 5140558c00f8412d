import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import apply_updates_stochastic
from apollo_optax._rounding import stochastic_round

NARROW = [jnp.bfloat16, jnp.float16]


def neighbours(x, dtype):
    """The representable value nearest to x, and those below and above that one."""
    nearest = np.asarray(jnp.asarray(x).astype(dtype))
    below = jax.lax.nextafter(jnp.asarray(nearest), jnp.full_like(nearest, -jnp.inf))
    above = jax.lax.nextafter(jnp.asarray(nearest), jnp.full_like(nearest, jnp.inf))
    return [np.asarray(v, np.float64) for v in (below, nearest, above)]


@pytest.mark.parametrize("dtype", NARROW)
def test_rounds_to_one_of_the_two_neighbours(dtype):
    x = jax.random.normal(jax.random.key(0), (20_000,)) * 10.0 ** jnp.linspace(-7, 4, 20_000)
    rounded = np.asarray(stochastic_round(jax.random.key(1), x, dtype), np.float64)
    below, nearest, above = neighbours(x, dtype)
    exact = np.asarray(x, np.float64)
    lower = np.where(nearest > exact, below, nearest)
    upper = np.where(nearest < exact, above, nearest)
    assert np.all((rounded == lower) | (rounded == upper))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -1.001, 0.3337, 1e-3 + 1e-6, 3e-6, -7e-8, 1000.3])
def test_expectation_is_the_value(dtype, value):
    samples = 40_000
    x = jnp.full(samples, value, jnp.float32)
    rounded = np.asarray(stochastic_round(jax.random.key(2), x, dtype), np.float64)
    spacing = np.ptp(rounded)
    standard_error = 0.5 * spacing / samples**0.5
    assert abs(rounded.mean() - float(np.float32(value))) <= 5 * standard_error


@pytest.mark.parametrize("dtype", NARROW)
def test_representable_values_infinities_and_nan_stay(dtype):
    values = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0**-14, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    limits = jnp.asarray([jnp.finfo(dtype).max, jnp.finfo(dtype).tiny], dtype).astype(jnp.float32)
    x = jnp.concatenate([values, limits, -limits])
    rounded = stochastic_round(jax.random.key(0), x, dtype).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, x)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(x))


def test_updates_too_small_to_round_to_nearest_are_not_lost():
    params = {"w": jnp.ones((100, 100), jnp.bfloat16)}
    updates = {"w": jnp.full((100, 100), 1e-4)}

    def step(params, key):
        return apply_updates_stochastic(params, updates, key), None

    keys = jax.random.split(jax.random.key(0), 100)
    moved, _ = jax.lax.scan(step, params, keys)
    nearest = params["w"] + updates["w"].astype(jnp.bfloat16)
    assert np.all(nearest == 1)
    assert float(jnp.mean(moved["w"].astype(jnp.float32))) == pytest.approx(1.01, abs=5e-4)


def test_float32_leaves_are_added_exactly():
    params, updates = {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([1e-3, -1e-3])}
    moved = apply_updates_stochastic(params, updates, jax.random.key(0))
    np.testing.assert_array_equal(moved["w"], params["w"] + updates["w"])


def test_other_leaves_do_not_matter_to_a_leaf():
    leaf, update = jnp.ones((50, 50), jnp.bfloat16), jnp.full((50, 50), 1e-3)
    key = jax.random.key(0)
    alone = apply_updates_stochastic({"w": leaf}, {"w": update}, key)
    among = apply_updates_stochastic({"a": leaf, "w": leaf}, {"a": update, "w": update}, key)
    np.testing.assert_array_equal(alone["w"], among["w"])
    assert np.any(among["a"] != among["w"])


def test_none_updates_leave_parameters_as_they_are():
    params = {"w": jnp.ones(3, jnp.bfloat16), "frozen": jnp.ones(2, jnp.bfloat16)}
    moved = apply_updates_stochastic(params, {"w": jnp.ones(3), "frozen": None}, jax.random.key(0))
    np.testing.assert_array_equal(moved["frozen"], params["frozen"])


@pytest.mark.parametrize("dtype", NARROW)
def test_no_nan_is_made_on_the_way(dtype):
    limits = jnp.finfo(dtype)
    smallest = float(limits.smallest_subnormal)
    sizes = [0.0, smallest, 0.3 * smallest, 3.5 * smallest, float(limits.tiny), 1.5, jnp.inf]
    sizes += [0.9999 * float(limits.tiny), float(limits.max), 1.003 * float(limits.max)]
    x = jnp.asarray([*sizes, *(-size for size in sizes)], jnp.float32)
    key = jax.random.key(0)
    # Each operation is looked at: outside of jit.
    with jax.debug_nans(True):
        rounded = stochastic_round(key, x, dtype)
        params = {"w": x.astype(dtype)}
        moved = apply_updates_stochastic(params, {"w": jnp.zeros(x.size)}, key)
    assert not np.any(np.isnan(np.asarray(rounded, np.float32)))
    # CPUs take subnormals for zero.
    before, after = (np.asarray(tree["w"], np.float32) for tree in (params, moved))
    np.testing.assert_allclose(after, before, rtol=0, atol=float(limits.tiny))


def test_without_a_key_it_is_refused():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="needs a PRNG key, got None.*fold_in"):
        apply_updates_stochastic(params, params, None)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    params, key = {"w": jnp.ones((2, 3), jnp.bfloat16)}, jax.random.key(0)
    with pytest.raises(ValueError, match=r"update of w has shape \(3,\), its parameter \(2, 3\)"):
        apply_updates_stochastic(params, {"w": jnp.ones(3)}, key)
    with pytest.raises(ValueError, match=r"expected keys: \['w'\]; present keys: \['v'\]"):
        apply_updates_stochastic(params, {"v": jnp.ones((2, 3))}, key)
    with pytest.raises(TypeError, match="w has dtype int32"):
        apply_updates_stochastic({"w": jnp.ones(3, int)}, {"w": jnp.ones(3)}, key)
