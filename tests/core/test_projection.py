import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import gaussian, rademacher, scale_by_apollo, svd

RANDOM = [gaussian, rademacher]


@pytest.mark.parametrize("draw", RANDOM)
@pytest.mark.parametrize(("rank", "dim"), [(1, 7), (4, 33), (16, 64)])
def test_expectation_of_the_gram_matrix_is_the_identity(draw, rank, dim):
    samples = 4000
    P = jax.vmap(lambda refresh: draw(jax.random.key(1), refresh, rank, dim))(jnp.arange(samples))
    gram = jnp.einsum("sri,srj->ij", P, P) / samples
    # An entry's standard error is at most sqrt(2 / rank / samples); 6 of them over all entries.
    np.testing.assert_allclose(gram, np.eye(dim), atol=6 * (2 / rank / samples) ** 0.5)


def test_svd_has_orthonormal_rows_that_span_the_leading_left_space():
    left, _, right = np.linalg.svd(np.random.default_rng(0).normal(size=(8, 12)))
    G = jnp.asarray((left * [9, 8, 7, 0.1, 0.1, 0.1, 0.1, 0.1]) @ right[:8], jnp.float32)
    P = svd(G, 3)
    np.testing.assert_allclose(P @ P.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(P.T @ P, left[:, :3] @ left[:, :3].T, atol=1e-4)


@pytest.mark.parametrize("draw", RANDOM)
def test_rank_by_dim_float32_in_every_precision_mode(draw):
    for x64 in (False, True):
        with jax.enable_x64(x64):
            P = draw(jax.random.key(0), 3, 5, 40)
            assert (P.shape, P.dtype) == ((5, 40), jnp.float32)


@pytest.mark.parametrize("draw", RANDOM)
def test_key_and_refresh_each_give_another_projection(draw):
    def columns(seed, refresh):
        return np.asarray(draw(jax.random.key(seed), refresh, 8, 64)).ravel()

    first = columns(0, 0)
    np.testing.assert_array_equal(first, columns(0, 0))
    for other in (columns(1, 0), columns(0, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 6 / first.size**0.5


@pytest.mark.parametrize("draw", RANDOM)
def test_johnson_lindenstrauss_bound_holds_on_samples(draw):
    rank, dim, samples = 64, 256, 1000
    x = jax.random.normal(jax.random.key(7), (dim,)) * jnp.linspace(0.1, 3, dim)
    P = jax.vmap(lambda refresh: draw(jax.random.key(0), refresh, rank, dim))(jnp.arange(samples))
    distortion = jnp.sum(jnp.square(P @ x), axis=1) / jnp.sum(jnp.square(x)) - 1
    for epsilon in (0.3, 0.5):
        observed = float(jnp.mean(jnp.abs(distortion) >= epsilon))
        assert 0 < observed <= 2 * np.exp(-rank * epsilon**2 / 8)


@pytest.mark.parametrize("draw", RANDOM)
@pytest.mark.parametrize("fraction", [4, 8])
def test_scaling_factors_follow_the_square_root_of_rank_over_dimension(draw, fraction):
    """Figures 4 and 8 of the paper: 1/2 at a quarter of the rank, 0.35 at an eighth."""
    dim, channels, steps = 256, 512, 20
    grads = jax.random.normal(jax.random.key(3), (steps, dim, channels))

    def identity(key, refresh, rank, dim):
        return jnp.eye(dim, dtype=jnp.float32)

    def factors(rank, projection):
        tx = scale_by_apollo(rank, projection=projection, norm_growth_limit=None)
        state, update = tx.init(grads[0]), jax.jit(tx.update)
        for grad in grads:
            updates, state = update(grad, state)
        return jnp.linalg.norm(updates, axis=0) / jnp.linalg.norm(grads[-1], axis=0)

    ratio = factors(dim // fraction, draw) / factors(dim, identity)
    assert float(jnp.median(ratio)) == pytest.approx(fraction**-0.5, rel=0.05)
    assert float(jnp.std(ratio)) < 0.25 * fraction**-0.5


def update_of_two_leaves(key, refresh, rank, dim):
    tx = scale_by_apollo(rank, key=key)
    grads = {name: jnp.full((dim, 32), 1.0 + refresh) for name in ("a", "b")}
    return tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("call", [gaussian, rademacher, update_of_two_leaves])
def test_outside_of_jit_nothing_is_compiled_again(call):
    compiled = []
    call(jax.random.key(0), 0, 4, 24)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        call(jax.random.key(1), 1, 4, 24)
        assert not compiled
        call(jax.random.key(1), 1, 4, 25)
        assert compiled
    finally:
        jax.monitoring.clear_event_listeners()
