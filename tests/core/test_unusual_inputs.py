"""Inputs at the edge of what an optimizer is given: small sides, huge numbers, foreign states."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    apollo_mini,
    apply_updates_stochastic,
    gaussian,
    limit_norm_growth,
    rademacher,
    scale_by_apollo,
    svd,
    transformer_dimension_numbers,
)

LAST_TWO = ApolloDimensionNumbers(-2, -1)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))


@pytest.mark.parametrize(
    ("shape", "granularity", "projection"),
    [
        ((64, 1), "channel", gaussian),
        ((1, 64), "tensor", gaussian),
        ((64, 2), "channel", rademacher),
        ((8, 8), "tensor", rademacher),
        ((3, 64, 2), "tensor", gaussian),
        ((3, 1, 16), "channel", rademacher),
    ],
)
def test_where_rank_is_the_smaller_side_the_first_update_is_adams_for_every_seed(
    shape, granularity, projection
):
    grads = {"kernel": normal(*shape)}

    def size(key):
        tx = scale_by_apollo(
            8,
            scale=5.0,
            granularity=granularity,
            key=key,
            projection=projection,
            weight_dimension_numbers=LAST_TWO,
        )
        return rms(tx.update(grads, tx.init(grads))[0]["kernel"])

    sizes = jax.jit(jax.vmap(size))(jax.vmap(jax.random.key)(jnp.arange(20)))
    np.testing.assert_allclose(sizes, 1, rtol=1e-5)


def test_of_a_side_of_one_mini_moves_as_far_as_adam():
    grads = [{"head": normal(1, 1, seed=seed)} for seed in range(5)]
    ours, adam = apollo_mini(0.1, norm_growth_limit=None), optax.adam(0.1)
    state, expected_state = ours.init(grads[0]), adam.init(grads[0])
    for grad in grads:
        update, state = ours.update(grad, state, grad)
        expected, expected_state = adam.update(grad, expected_state)
        np.testing.assert_allclose(abs(update["head"]), abs(expected["head"]), rtol=1e-4)


@pytest.mark.parametrize("size", [1e19, 3e38])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    "tx",
    [
        scale_by_apollo(4),
        scale_by_apollo(1, granularity="tensor"),
        scale_by_apollo(4, norm_growth_limit=None),
        scale_by_apollo(4, projection=svd),
        scale_by_apollo(16),
        limit_norm_growth(),
    ],
    ids=["apollo", "mini", "no limit", "svd", "identity", "limiter alone"],
)
def test_a_huge_gradient_leaves_updates_and_state_finite_and_training_goes_on(tx, at, size):
    grads = [
        {"kernel": normal(8, 16, seed=seed), "bias": normal(16, seed=seed)} for seed in range(5)
    ]
    grads[at] = jax.tree.map(lambda g: size * jnp.sign(g), grads[at])
    state = tx.init(grads[0])
    for grad in grads:
        update, state = jax.jit(tx.update)(grad, state)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((update, state)))
    assert all(jnp.any(leaf != 0) for leaf in update.values())


def test_a_gradient_whose_squares_overflow_moves_nothing():
    tx = scale_by_apollo(4)
    grads = {"kernel": normal(8, 16)}
    _, state = tx.update(grads, tx.init(grads))
    update, after = tx.update(jax.tree.map(lambda g: 1e25 * g, grads), state)
    assert not jnp.any(update["kernel"])
    np.testing.assert_array_equal(after.norm["kernel"], state.norm["kernel"])
    np.testing.assert_allclose(after.mu["kernel"], 0.9 * state.mu["kernel"], rtol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_in_a_gradient_reaches_the_update_and_not_the_state(value):
    tx = scale_by_apollo(4)
    grads = {"kernel": normal(8, 16).at[3, 5].set(value)}
    update, state = tx.update(grads, tx.init(grads))
    assert not jnp.isfinite(update["kernel"]).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("shape", [(8, 16), (3, 8, 16)], ids=str)
def test_svd_waits_for_a_gradient_that_is_not_zero(shape):
    tx = scale_by_apollo(2, projection=svd, weight_dimension_numbers=LAST_TWO)
    later = {"kernel": normal(*shape).at[..., :4, :].set(0)}  # no gradient in the first rows
    state = tx.init(later)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, later), state)
    update, state = tx.update(later, state)
    taken = state.projection["kernel"]
    assert jnp.all(jnp.any(update["kernel"][..., 4:, :] != 0, axis=(-2, -1)))
    expected = svd(later["kernel"], 2)
    np.testing.assert_allclose(jnp.abs(taken), jnp.abs(expected), atol=1e-5)
    _, state = tx.update({"kernel": normal(*shape, seed=1)}, state)
    np.testing.assert_array_equal(state.projection["kernel"], taken)  # kept until it is due


def test_svd_of_a_stack_is_taken_of_each_matrix_when_its_gradient_comes():
    tx = scale_by_apollo(2, projection=svd, weight_dimension_numbers=LAST_TWO)
    one = {"experts": normal(2, 8, 16).at[1].set(0)}
    _, state = tx.update(one, tx.init(one))
    first = state.projection["experts"][0]
    update, state = tx.update({"experts": normal(2, 8, 16, seed=1)}, state)
    np.testing.assert_array_equal(state.projection["experts"][0], first)
    assert jnp.any(update["experts"][1] != 0)


@pytest.mark.parametrize("gone", ["matrix", "bias"])
def test_none_for_the_gradient_of_a_leaf_with_state_is_refused(gone):
    params = {"matrix": normal(4, 8), "bias": normal(8)}
    tx = apollo(0.1, rank=2)
    with pytest.raises(ValueError, match=f"moments for {gone}, which has no gradient"):
        tx.update(params | {gone: None}, tx.init(params), params)


def states_of_other_kinds():
    params = {"kernel": normal(8, 16)}
    return {
        "svd's": apollo(0.1, rank=4, projection=svd).init(params),
        "another rank's": apollo(0.1, rank=2).init(params),
        "adamw's": optax.adamw(0.1).init(params),
        "dictionaries": (apollo(0.1, rank=4).init(params)[0]._asdict(), (), ()),
        "no norm": (apollo(0.1, rank=4).init(params)[0]._replace(norm={}), (), ()),
        "another second moment": (
            apollo(0.1, rank=4).init(params)[0]._replace(nu={"kernel": jnp.zeros(3)}),
            optax.EmptyState(),
            optax.EmptyState(),
        ),
    }


@pytest.mark.parametrize("kind", states_of_other_kinds())
def test_a_state_of_another_kind_is_refused(kind):
    params = {"kernel": normal(8, 16)}
    with pytest.raises(ValueError, match=r"[Tt]he state"):
        apollo(0.1, rank=4).update(params, states_of_other_kinds()[kind], params)


def test_svd_refuses_a_state_without_projections():
    params = {"kernel": normal(8, 16)}
    state = apollo(0.1, rank=4).init(params)
    with pytest.raises(ValueError, match="state is of another projection"):
        apollo(0.1, rank=4, projection=svd).update(params, state, params)


@pytest.mark.filterwarnings("ignore:.*have more than two axes:UserWarning")
@pytest.mark.parametrize("numbers", [LAST_TWO, None], ids=["one for all", "default"])
def test_norms_and_biases_of_stacked_layers_are_no_matrix(numbers):
    params = {
        "blocks": {"w": normal(12, 64, 32), "norm": {"scale": normal(12, 64)}},
        "mix": normal(64, 32),
    }
    state = scale_by_apollo(4, weight_dimension_numbers=numbers).init(params)
    assert state.mu["blocks"]["norm"]["scale"].shape == (12, 64)
    assert state.mu["mix"].shape == (4, 64)


def test_a_state_wider_than_its_gradients_stays_so():
    with jax.enable_x64(True):
        params = {"matrix": jnp.ones((4, 8), jnp.float64), "bias": jnp.ones(8, jnp.float64)}
        tx = scale_by_apollo(2)
        state = tx.init(params)
        _, after = tx.update(jax.tree.map(lambda p: p.astype(jnp.float32), params), state)
        for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert before.dtype == now.dtype


@pytest.mark.parametrize(
    "tx",
    [
        apollo_optax.swan(0.1, b2=np.float64(0.99)),
        apollo_optax.scale_by_apollo(2, norm_growth_limit=np.float64(1.01)),
        limit_norm_growth(np.float64(1.01)),
    ],
    ids=["factored", "apollo", "limiter"],
)
def test_numbers_of_numpy_leave_the_state_in_float32_with_x64_too(tx):
    params = {"embedding": normal(130, 128), "kernel": normal(8, 16)}
    with jax.enable_x64(True):
        state = tx.init(params)
        _, after = tx.update(params, state, params)
    before, after = ([leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (state, after))
    assert after == before


@pytest.mark.parametrize("numbers", [None, apollo_optax.ApolloDimensionNumbers(0, -1)])
def test_a_square_matrix_beside_three_heads_of_queries_keys_and_values_is_a_matrix(numbers):
    params = {"attn": {"qkv": jnp.ones((128, 3, 128)), "proj": jnp.ones((128, 128))}}
    with warnings.catch_warnings(action="ignore"):  # of three axes without a known name
        state = scale_by_apollo(4, weight_dimension_numbers=numbers).init(params)
    assert state.mu["attn"]["proj"].shape == (4, 128)


@pytest.mark.parametrize("largest", [1e15, 1e16, 1e19, 1e25])
@pytest.mark.parametrize(
    "tx",
    [
        scale_by_apollo(16),
        scale_by_apollo(16, norm_growth_limit=None),
        scale_by_apollo(1, granularity="tensor"),
    ],
    ids=["limited", "not limited", "tensor"],
)
def test_one_huge_entry_moves_nothing_far(tx, largest):
    grads = {"kernel": normal(16, 256)}
    huge = {"kernel": grads["kernel"].at[3, 5].set(largest)}
    for steps in ((huge, grads), (grads, huge, grads)):
        state = tx.init(grads)
        for each in steps:
            update, state = tx.update(each, state)
            assert jnp.all(jnp.abs(update["kernel"]) < 100)
            assert jnp.all(update["kernel"] == 0) == (each is huge)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.mu))


def test_hyperparameters_of_bfloat16_are_refused_with_the_remedy():
    params = {"kernel": jnp.ones((8, 16), jnp.bfloat16)}
    static = apollo_optax._arguments.STATIC_ARGUMENTS
    make = optax.inject_hyperparams(apollo, static_args=static)
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        make(learning_rate=0.01, rank=4).init(params)
    wide = optax.inject_hyperparams(apollo, static_args=static, hyperparam_dtype=jnp.float32)
    wide(learning_rate=0.01, rank=4).init(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_scalar_of_any_floating_dtype_is_a_number(dtype):
    grads = {"kernel": normal(8, 16)}
    given, plain = scale_by_apollo(4, scale=dtype(2)), scale_by_apollo(4, scale=2.0)
    update, _ = given.update(grads, given.init(grads))
    expected, _ = plain.update(grads, plain.init(grads))
    np.testing.assert_allclose(update["kernel"], expected["kernel"], rtol=1e-6)


def test_a_function_of_the_parameters_refuses_a_step_count():
    params = {"kernel": normal(8, 16)}
    make = optax.inject_hyperparams(apollo, static_args=("rank", "update_proj_gap"))
    tx = make(learning_rate=0.1, weight_dimension_numbers=transformer_dimension_numbers)
    with pytest.raises(TypeError, match=r"static_args=\('rank'.*'weight_dimension_numbers'"):
        tx.init(params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mu_dtype", jnp.bfloat16),
        ("mask", lambda params: jnp.asarray(False)),
        ("mask", lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)),
    ],
)
def test_what_injection_made_of_an_argument_is_refused_with_the_remedy(name, value):
    params = {"kernel": normal(8, 16)}
    for alias, static in ((apollo, ("rank", "update_proj_gap")), (apollo_optax.swan, ())):
        make = optax.inject_hyperparams(alias, static_args=static)
        with pytest.raises(TypeError, match=rf"{name} must be .*static_args=\('rank'.*'mask'"):
            make(learning_rate=0.1, **{name: value}).init(params)


def test_all_static_arguments_together_train_as_without_injection():
    params = {"embedding": normal(32, 8), "mlp": {"kernel": normal(8, 16)}}
    given: dict[str, Any] = {"rank": 2, "weight_dimension_numbers": transformer_dimension_numbers}
    make = optax.inject_hyperparams(apollo, static_args=apollo_optax._arguments.STATIC_ARGUMENTS)
    injected, plain = make(learning_rate=0.1, **given), apollo(0.1, **given)
    update, _ = injected.update(params, injected.init(params), params)
    expected, _ = plain.update(params, plain.init(params), params)
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_python_floats_are_trained_as_by_adam():
    params = {"kernel": normal(4, 8), "temperature": 1.0, "scale": np.float32(2)}
    ours, adam = apollo(0.1, rank=2), optax.adamw(0.1, weight_decay=0)
    update, _ = ours.update(params, ours.init(params), params)
    expected, _ = adam.update(params, adam.init(params), params)
    np.testing.assert_allclose(update["temperature"], expected["temperature"], rtol=1e-5)
    np.testing.assert_allclose(update["scale"], expected["scale"], rtol=1e-5)


@pytest.mark.parametrize(
    "tx", [apollo(0.1, rank=2), limit_norm_growth()], ids=["apollo", "limiter"]
)
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int32, jnp.complex64])
def test_a_leaf_of_a_dtype_that_cannot_be_trained_is_named(dtype, tx):
    with pytest.raises(
        TypeError, match=r"layer/kernel has dtype .*; allowed are real floating dtypes"
    ):
        tx.init({"layer": {"kernel": jnp.ones((8, 16), dtype)}})


def test_stochastic_rounding_names_a_leaf_of_a_dtype_it_does_not_know():
    weights = {"kernel": jnp.ones((8, 16), jnp.float8_e4m3fn)}
    with pytest.raises(TypeError, match="kernel has dtype float8"):
        apply_updates_stochastic(weights, weights, jax.random.key(0))


def test_weight_decay_takes_a_schedule_as_adamw_does():
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    params = {"bias": normal(8)}
    ours, adamw = apollo(0.1, weight_decay=schedule), optax.adamw(0.1, weight_decay=schedule)
    state, expected_state = ours.init(params), adamw.init(params)
    for _ in range(3):
        update, state = ours.update(params, state, params)
        expected, expected_state = adamw.update(params, expected_state, params)
        np.testing.assert_allclose(update["bias"], expected["bias"], rtol=1e-5)


@pytest.mark.parametrize("projection", [gaussian, svd])
def test_tree_map_params_takes_a_tree_like_the_parameters(projection):
    params = {"h": {"kernel": normal(8, 16), "bias": normal(16), "embedding": normal(4, 5, 6)}}
    specs = jax.tree.map(lambda leaf: f"spec of {leaf.ndim} axes", params)
    numbers = {"h": {"kernel": LAST_TWO, "bias": None, "embedding": None}}
    tx = apollo(0.01, 4, projection=projection, weight_dimension_numbers=numbers)
    mapped = optax.tree_map_params(tx, lambda _, spec: spec, tx.init(params), specs)
    for field in ("mu", "nu", "norm"):
        assert getattr(mapped[0], field) == specs


def test_a_projection_of_ones_own_may_keep_state():
    def first_rows(G, rank):
        """Follows the sign of the gradient that it was taken from."""
        eye = jnp.eye(rank, G.shape[-2], dtype=jnp.float32)
        return eye * jnp.sign(G[..., :1, :1])

    first_rows.keeps_state = True  # type: ignore[attr-defined]
    tx = scale_by_apollo(2, 2, projection=first_rows)
    state, kept = tx.init({"w": jnp.ones((4, 8))}), []
    for sign in (1.0, -1.0, -1.0):
        _, state = jax.jit(tx.update)({"w": jnp.full((4, 8), sign)}, state)
        kept.append(np.asarray(state.projection["w"]))
    np.testing.assert_array_equal(kept, [np.eye(2, 4), np.eye(2, 4), -np.eye(2, 4)])


@pytest.mark.parametrize("rows", ["all", "one", "bfloat16"])
def test_what_a_projection_with_state_returns_is_checked_at_init(rows):
    def first_rows(G, rank):
        if rows == "all":
            return G
        return G[..., :1, : G.shape[-2]] if rows == "one" else jnp.eye(rank, 4, dtype=jnp.bfloat16)

    first_rows.keeps_state = True  # type: ignore[attr-defined]
    with pytest.raises((TypeError, ValueError), match=r"projection first_rows must return"):
        scale_by_apollo(2, projection=first_rows).init({"w": jnp.ones((4, 8))})


def test_nothing_is_projected_by_svd_where_the_rank_is_the_whole_side():
    grads = {"kernel": normal(8, 16)}
    by_svd, plain = (scale_by_apollo(8, projection=projection) for projection in (svd, None))
    update, _ = by_svd.update(grads, by_svd.init(grads))
    expected, _ = plain.update(grads, plain.init(grads))
    np.testing.assert_array_equal(update["kernel"], expected["kernel"])


def test_the_limiter_keeps_the_norm_of_a_leaf_without_a_gradient():
    tx = limit_norm_growth(1.01)
    grads = {"a": jnp.ones(4), "b": jnp.ones(4)}
    _, state = tx.update(grads, tx.init(grads))
    _, state = tx.update({"a": grads["a"], "b": None}, state)
    update, _ = tx.update({"a": grads["a"], "b": 10 * grads["b"]}, state)
    np.testing.assert_allclose(update["b"], 1.01, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn, jnp.int32])
def test_moments_of_a_small_range_are_refused(dtype):
    with pytest.raises(TypeError, match=r"mu_dtype must be .* range of float32.*got"):
        apollo(0.1, mu_dtype=dtype)


def test_float64_of_numpy_is_float32_without_a_warning():
    params = {"kernel": np.ones((8, 16))}
    with warnings.catch_warnings(action="error"):
        state = scale_by_apollo(2).init(params)
    assert state.mu["kernel"].dtype == jnp.float32
