import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    limit_norm_growth,
    scale_by_apollo,
    scale_by_swan,
    svd,
)
from apollo_optax._matrices import matrix_axes, project

STACKED = ApolloDimensionNumbers(-2, -1)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def run(tx, grads_of_steps):
    """Returns the updates of every step and the last state."""
    state = tx.init(grads_of_steps[0])
    updates_of_steps = []
    update = jax.jit(tx.update)
    for grads in grads_of_steps:
        updates, state = update(grads, state)
        updates_of_steps.append(updates)
    return updates_of_steps, state


def projections_in_use(steps, update_proj_gap, dim=6, **arguments):
    """P at every step, read off the first moment: with b1 = 0 it is R = P G, and here G = I."""
    tx = scale_by_apollo(3, update_proj_gap, b1=0.0, **arguments)
    state = tx.init(jnp.eye(dim))
    projections = []
    for _ in range(steps):
        _, state = tx.update(jnp.eye(dim), state)
        projections.append(np.asarray(state.mu))
    return projections


def test_zero_gradient_step_does_not_freeze_the_weight():
    G = normal(8, 12)
    for granularity in ("channel", "tensor"):
        tx = scale_by_apollo(4, granularity=granularity)
        (*_, before), state = run(tx, [G] * 5)
        zero, state_after_zero = tx.update(jnp.zeros_like(G), state)
        after, _ = tx.update(G, state_after_zero)
        assert not np.any(zero)
        np.testing.assert_array_equal(state_after_zero.norm, state.norm)
        # One missed step changes the moments a little; the update stays within 20% of its size.
        assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before), rel=0.2)


def test_update_after_a_zero_step_is_limited_by_the_last_nonzero_norm():
    G = normal(8, 12)
    tx = scale_by_apollo(4, b1=0.0, b2=0.0)
    _, state = run(tx, [G, jnp.zeros_like(G)])
    remembered = float(state.norm)
    # With b1 = b2 = 0 the norm without limit is the same every step; half of it makes it act.
    state = state._replace(norm=jnp.asarray(remembered / 2))
    _, state = tx.update(G, state)
    assert float(state.norm) == pytest.approx(1.01 * remembered / 2, rel=1e-5)


def test_first_zero_gradients_leave_no_norm_to_limit_by():
    G = normal(8, 12)
    (*_, limited), _ = run(scale_by_apollo(4), [jnp.zeros_like(G), G])
    (*_, free), _ = run(scale_by_apollo(4, norm_growth_limit=None), [jnp.zeros_like(G), G])
    np.testing.assert_array_equal(limited, free)


def test_scale_is_alpha():
    grads = [normal(8, 12, seed=seed) for seed in range(4)]
    one, _ = run(scale_by_apollo(4, scale=1.0), grads)
    many, _ = run(scale_by_apollo(4, scale=128**0.5), grads)
    for u, v in zip(one, many, strict=True):
        np.testing.assert_allclose(v, 128**0.5 * u, rtol=1e-5)


def test_limiter_bounds_the_growth_of_the_norm():
    grads = [normal(8, 12, seed=seed) * 3.0 ** (seed % 5) for seed in range(12)]
    tx = scale_by_apollo(4, b1=0.5, b2=0.9, norm_growth_limit=1.1)
    state, norms = tx.init(grads[0]), []
    for grad in grads:
        _, state = tx.update(grad, state)
        norms.append(float(state.norm))
    growth = [norm / before for before, norm in itertools.pairwise(norms)]
    assert max(growth) == pytest.approx(1.1, rel=1e-5)
    assert min(growth) < 1


@pytest.mark.parametrize("gap", [1, 3])
def test_projection_is_redrawn_exactly_when_count_is_a_multiple_of_the_gap(gap):
    projections = projections_in_use(steps=8, update_proj_gap=gap)
    for step in range(1, 8):
        same = np.array_equal(projections[step], projections[step - 1])
        assert same == (step % gap != 0)


def test_svd_projection_is_recomputed_exactly_at_a_refresh():
    grads = [normal(6, 9, seed=seed) for seed in range(7)]
    tx = scale_by_apollo(2, 3, projection=svd)
    state = tx.init(grads[0])
    for step, grad in enumerate(grads):
        _, state = tx.update(grad, state)
        expected = svd(grads[step - step % 3], 2)
        np.testing.assert_allclose(state.projection, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_svd_projection_is_of_the_smaller_side(shape):
    state = scale_by_apollo(2, projection=svd).init(jnp.zeros(shape))
    assert (state.projection.shape, state.mu.shape) == ((2, 6), (2, 9))


def test_nothing_of_the_projections_size_is_stored():
    params = {"tall": jnp.zeros((512, 24)), "wide": jnp.zeros((24, 512))}
    for projection in (apollo_optax.gaussian, apollo_optax.rademacher):
        state = scale_by_apollo(4, projection=projection).init(params)
        sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
        assert sizes == [1, 1, 1, 2, *[4 * 512] * 4]


@pytest.mark.parametrize(("shape", "projected"), [((6, 9), 6), ((9, 6), 6), ((7, 7), 7)])
def test_the_smaller_side_is_projected(shape, projected):
    seen = []

    def recording(key, refresh, rank, dim):
        seen.append(dim)
        return jnp.ones((rank, dim), jnp.float32)

    scale_by_apollo(2, projection=recording).init(jnp.zeros(shape))
    assert set(seen) == {projected}


def test_reduction_axis_is_projected_on_a_tie():
    G = normal(6, 6)
    kernel, _ = run(scale_by_apollo(2), [G])
    reversed_axes = ApolloDimensionNumbers(1, 0)
    transposed, _ = run(scale_by_apollo(2, weight_dimension_numbers=reversed_axes), [G.T])
    np.testing.assert_allclose(transposed[0], kernel[0].T, rtol=1e-5)


def norm_of_each_channel(R_tilde, R):
    return jnp.linalg.norm(R_tilde, axis=0) / (jnp.linalg.norm(R, axis=0) + 1e-8)


def norm_of_all(R_tilde, R):
    return jnp.linalg.norm(R_tilde) / (jnp.linalg.norm(R) + 1e-8)


@pytest.mark.parametrize(
    ("granularity", "rule"), [("channel", norm_of_each_channel), ("tensor", norm_of_all)]
)
@pytest.mark.parametrize("spec", [None, STACKED])
def test_granularity_may_be_a_function_of_each_matrix(granularity, rule, spec):
    shape = (6, 9) if spec is None else (3, 6, 9)
    grads = [normal(*shape, seed=seed) for seed in range(4)]
    arguments = {"rank": 4, "weight_dimension_numbers": spec}
    named, named_state = run(scale_by_apollo(granularity=granularity, **arguments), grads)
    ruled, ruled_state = run(scale_by_apollo(granularity=rule, **arguments), grads)
    chex.assert_trees_all_close(named, ruled, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(named_state, ruled_state, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "rule",
    [
        lambda R_tilde, R: jnp.ones((5,)),
        lambda R_tilde, R: R,
        lambda R_tilde, R: jnp.ones((9,), jnp.int32),
        lambda R_tilde, R: (R, R),
    ],
)
def test_granularity_of_another_shape_is_refused_at_init(rule):
    with pytest.raises(ValueError, match="granularity returned .* broadcast to the channels"):
        scale_by_apollo(4, granularity=rule).init(jnp.zeros((6, 9)))


def test_rank_is_capped_at_the_smaller_side():
    state = scale_by_apollo(100).init({"w": jnp.zeros((6, 9))})
    assert state.mu["w"].shape == (6, 9)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_stacked_leaf_is_its_layers_as_separate_leaves(granularity):
    layers, shape, steps = 3, (6, 9), 5
    grads = [normal(layers, *shape, seed=s) for s in range(steps)]
    arguments = {"rank": 4, "update_proj_gap": 2, "granularity": granularity}
    stacked, stacked_state = run(
        scale_by_apollo(**arguments, weight_dimension_numbers=STACKED), grads
    )
    # P of each layer and refresh, read off R = P G with G the identity.
    reader = scale_by_apollo(4, 2, b1=0.0, weight_dimension_numbers=STACKED)
    eyes = jnp.broadcast_to(jnp.eye(6), (layers, 6, 6))
    state, drawn = reader.init(eyes), []
    for _ in range(steps):
        _, state = reader.update(eyes, state)
        drawn.append(state.mu)
    assert not np.allclose(drawn[0][0], drawn[0][1])
    for layer in range(layers):
        P = jnp.stack([drawn[step][layer] for step in range(steps)])
        tx = scale_by_apollo(
            **arguments, projection=lambda key, refresh, rank, dim, P=P: P[2 * refresh]
        )
        alone, alone_state = run(tx, [grad[layer] for grad in grads])
        for u, v in zip(stacked, alone, strict=True):
            np.testing.assert_allclose(u[layer], v, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(stacked_state.norm[layer], alone_state.norm, rtol=1e-5)
        np.testing.assert_allclose(stacked_state.mu[layer], alone_state.mu, rtol=1e-4, atol=1e-6)


def test_slices_of_a_stacked_leaf_are_updated_as_the_whole_leaf():
    G = normal(4, 2, 6, 9)
    tx = scale_by_apollo(4, weight_dimension_numbers=STACKED)
    whole, _ = tx.update(G, tx.init(G))
    for layer in range(4):
        part = G[layer : layer + 1]
        update, _ = tx.update(part, tx.init(part), first_layer=layer)
        np.testing.assert_allclose(update[0], whole[layer], rtol=1e-5, atol=1e-7)


def test_svd_takes_bfloat16_gradients_of_stacked_leaves():
    grads = [normal(3, 6, 9, dtype=jnp.bfloat16, seed=seed) for seed in range(2)]
    tx = scale_by_apollo(2, projection=svd, weight_dimension_numbers=STACKED)
    (*_, update), state = run(tx, grads)
    assert update.dtype == jnp.bfloat16
    assert state.projection.shape == (3, 2, 6)
    alone, _ = run(scale_by_apollo(2, projection=svd), [grad[1] for grad in grads])
    np.testing.assert_allclose(
        np.asarray(update[1], np.float32), np.asarray(alone[-1], np.float32), rtol=0.02, atol=1e-3
    )


def test_batch_axis_may_stand_anywhere():
    G = normal(3, 6, 9)
    leading, _ = run(scale_by_apollo(4, weight_dimension_numbers=STACKED), [G])
    for axis, spec in ((1, ApolloDimensionNumbers(0, 2)), (2, ApolloDimensionNumbers(0, 1))):
        moved, _ = run(
            scale_by_apollo(4, weight_dimension_numbers=spec), [jnp.moveaxis(G, 0, axis)]
        )
        np.testing.assert_allclose(
            jnp.moveaxis(moved[0], axis, 0), leading[0], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(
    ("shape", "spec", "matrix"),
    [
        ((6, 3, 4), ApolloDimensionNumbers(0, (1, 2)), (6, 12)),
        ((20, 3, 4), ApolloDimensionNumbers(0, (1, 2)), (20, 12)),
        ((3, 4, 6), ApolloDimensionNumbers((0, 1), 2), (12, 6)),
        ((3, 4, 20), ApolloDimensionNumbers((-3, -2), -1), (12, 20)),
    ],
)
def test_heads_are_as_their_reshape(shape, spec, matrix, granularity):
    grads = [normal(*shape, seed=s) for s in range(3)]
    heads, heads_state = run(
        scale_by_apollo(4, 2, granularity=granularity, weight_dimension_numbers=spec), grads
    )
    flat, flat_state = run(
        scale_by_apollo(4, 2, granularity=granularity), [G.reshape(matrix) for G in grads]
    )
    for u, v in zip(heads, flat, strict=True):
        np.testing.assert_allclose(u.reshape(matrix), v, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(heads_state.norm, flat_state.norm, rtol=1e-5)
    assert heads_state.mu.size == flat_state.mu.size


@pytest.mark.parametrize(
    "family", [optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers]
)
def test_trees_of_other_optimizers_specifications_are_taken_as_they_are(family):
    grads = {"query": normal(6, 3, 4), "mlp": normal(6, 9), "bias": normal(9)}
    theirs = {"query": family(0, (1, 2)), "mlp": family(), "bias": None}
    ours = {
        "query": ApolloDimensionNumbers(0, (1, 2)),
        "mlp": ApolloDimensionNumbers(),
        "bias": None,
    }
    given, _ = run(scale_by_apollo(4, weight_dimension_numbers=theirs), [grads])
    expected, _ = run(scale_by_apollo(4, weight_dimension_numbers=ours), [grads])
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_one_specification_serves_every_leaf_with_two_axes_or_more():
    params = {"kernel": jnp.zeros((3, 6, 9)), "bias": jnp.zeros(9)}
    state = scale_by_apollo(4, weight_dimension_numbers=STACKED).init(params)
    assert state.mu["kernel"].shape == (3, 4, 9)
    assert state.mu["bias"].shape == (9,)


def test_a_specification_of_a_subtree_serves_its_leaves():
    params = {"layer": {"up": jnp.zeros((6, 9)), "down": jnp.zeros((9, 6))}, "bias": jnp.zeros(6)}
    specs = {"layer": ApolloDimensionNumbers(), "bias": None}
    state = scale_by_apollo(4, weight_dimension_numbers=specs).init(params)
    assert {name: mu.shape for name, mu in state.mu["layer"].items()} == dict.fromkeys(
        ("up", "down"), (4, 9)
    )


def test_other_leaves_do_not_matter_to_a_leaf():
    leaf = normal(6, 9)
    others = {"a": normal(4, 4, seed=1), "z": {"b": normal(5, seed=2)}}
    alone, _ = run(scale_by_apollo(4), [{"m": {"w": leaf}}])
    among, _ = run(scale_by_apollo(4), [{"m": {"w": leaf, "c": normal(3, 3)}, **others}])
    reordered, _ = run(scale_by_apollo(4), [{**others, "m": {"w": leaf}}])
    for updates in (among, reordered):
        np.testing.assert_array_equal(updates[0]["m"]["w"], alone[0]["m"]["w"])


def test_leaves_of_one_shape_have_projections_of_their_own():
    eye = jnp.eye(6)
    tx = scale_by_apollo(3, b1=0.0)
    _, state = tx.update({"a": eye, "b": eye}, tx.init({"a": eye, "b": eye}))
    assert not np.allclose(state.mu["a"], state.mu["b"])


def test_key_may_be_a_seed_or_a_key_and_survives_donation():
    key = jax.random.key(5)
    from_seed, from_key, from_raw = (
        projections_in_use(1, 1, key=given)[0] for given in (5, key, jax.random.PRNGKey(5))
    )
    np.testing.assert_array_equal(from_seed, from_key)
    np.testing.assert_array_equal(from_seed, from_raw)
    assert not np.array_equal(from_seed, projections_in_use(1, 1, key=6)[0])

    tx = scale_by_apollo(3, key=key)
    step = jax.jit(lambda grads, state: tx.update(grads, state)[1], donate_argnums=1)
    step(jnp.eye(6), tx.init(jnp.eye(6)))
    tx.init(jnp.eye(6))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_with_keys_of_another_generator_a_projection_depends_on_its_own_matrix_alone(
    implementation,
):
    key = jax.random.key(7, impl=implementation)
    first, second = projections_in_use(2, 1, key=key)
    assert np.all(np.isfinite(first))
    assert not np.array_equal(first, second)

    tx = scale_by_apollo(3, key=key, weight_dimension_numbers=ApolloDimensionNumbers(-2, -1))
    stack = {"w": normal(2, 6, 9)}
    of_stack, _ = tx.update(stack, tx.init(stack))
    beside = stack | {"a": normal(2, 6, 9, seed=1)}
    of_both, _ = tx.update(beside, tx.init(beside))
    np.testing.assert_array_equal(of_both["w"], of_stack["w"])
    layer = {"w": stack["w"][1:]}
    of_layer, _ = tx.update(layer, tx.init(layer), first_layer=1)
    np.testing.assert_allclose(of_layer["w"], of_stack["w"][1:], rtol=1e-5)


def test_leaves_that_are_not_matrices_are_adams():
    grads = [{"bias": normal(7, seed=s), "gain": normal(seed=s)} for s in range(4)]
    ours, _ = run(scale_by_apollo(4, scale=3.0), grads)
    adam, _ = run(optax.scale_by_adam(), grads)
    for u, v in zip(ours, adam, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), u, v)


def test_more_than_two_axes_without_a_specification_is_adam_and_warned_of():
    with pytest.warns(
        UserWarning, match=r"qkv \(2, 6, 9\) have more than two.*864 bytes.*weight_dimension"
    ):
        state = scale_by_apollo(4).init({"qkv": jnp.zeros((2, 6, 9))})
    assert state.mu["qkv"].shape == (2, 6, 9)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_projection_is_a_product_of_the_gradients_dtype_accumulated_in_float32(dtype):
    axes = matrix_axes(ApolloDimensionNumbers(-2, -1), (3, 16, 24), ("w",))
    P, G = normal(3, 4, 16), normal(3, 16, 24, seed=1, dtype=dtype)
    (product,) = (
        equation
        for equation in jax.make_jaxpr(lambda P, G: project(P, G, axes))(P, G).jaxpr.eqns
        if equation.primitive.name == "dot_general"
    )
    assert {operand.aval.dtype for operand in product.invars} == {jnp.dtype(dtype)}
    assert product.outvars[0].aval.dtype == jnp.float32
    exact = jnp.einsum("brm,bmn->brn", P.astype(dtype).astype(jnp.float32), G.astype(jnp.float32))
    np.testing.assert_allclose(project(P, G, axes), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_gradients_dtype_and_moments_are_float32(dtype):
    grads = {"w": normal(6, 9, dtype=dtype), "b": normal(9, dtype=dtype)}
    (updates,), state = run(scale_by_apollo(4), [grads])
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    moments = jax.tree.leaves((state.mu, state.nu, state.norm))
    assert {m.dtype for m in moments} == {jnp.dtype(jnp.float32)}


def test_mu_dtype_is_kept():
    _, state = run(scale_by_apollo(4, mu_dtype=jnp.bfloat16), [{"w": normal(6, 9), "b": normal(9)}])
    assert {m.dtype for m in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {m.dtype for m in jax.tree.leaves(state.nu)} == {jnp.dtype(jnp.float32)}


def test_x64_keeps_float64_leaves_exact():
    grads32 = [normal(6, 9, seed=s) for s in range(3)]
    narrow, _ = run(scale_by_apollo(4), grads32)
    with jax.enable_x64(True):
        grads = [jnp.asarray(np.asarray(g), jnp.float64) for g in grads32]
        wide, state = run(scale_by_apollo(4), grads)
        assert {leaf.dtype for leaf in (wide[0], state.mu, state.nu, state.norm)} == {
            jnp.dtype(jnp.float64)
        }
        for u, v in zip(narrow, wide, strict=True):
            np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-6)


def test_norm_is_computed_in_float32_for_float16_gradients():
    G = jnp.full((64, 64), 100.0, jnp.float16)  # its squared norm, 4e7, is infinite in float16
    (update,), state = run(scale_by_apollo(4), [G])
    assert np.all(np.isfinite(update))
    assert np.isfinite(state.norm)


def test_none_and_empty_subtrees_pass_through():
    grads = {"w": normal(6, 9), "none": None, "empty": {}, "tuple": (), "list": [normal(4, 4)]}
    (updates,), state = run(scale_by_apollo(4), [grads])
    chex.assert_trees_all_equal_structs(updates, grads)
    assert state.mu["list"]["0"].shape == (4, 4)


@pytest.mark.parametrize("params", [{}, None, (), {"a": {}}])
def test_nothing_to_train_is_no_error(params):
    tx = scale_by_apollo()
    state = tx.init(params)
    updates, state = tx.update(params, state)
    assert updates == params
    assert int(state.count) == 1


def test_size_zero_leaves_pass_through():
    (updates,), _ = run(scale_by_apollo(4), [{"w": jnp.zeros((0, 5)), "v": jnp.zeros((4, 0))}])
    assert updates["w"].shape == (0, 5)


def test_state_for_other_parameters_is_refused():
    tx = scale_by_apollo(4)
    state = tx.init({"old": jnp.zeros((6, 9))})
    with pytest.raises(ValueError, match=r"no moments for new.*init made it for other parameters"):
        tx.update({"new": jnp.zeros((6, 9))}, state)


def test_state_of_another_shape_is_refused():
    tx = scale_by_apollo(4)
    state = tx.init({"w": jnp.zeros((6, 9))})
    with pytest.raises(ValueError, match=r"shape \(4, 9\) for w, whose gradient needs \(4, 12\)"):
        tx.update({"w": jnp.zeros((6, 12))}, state)


@dataclasses.dataclass
class Unhashable:
    def __call__(self, *args):
        return args


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank must be an int >= 1 and .*, got 0"),
        ({"rank": -3}, ValueError, "rank.*-3"),
        ({"rank": True}, TypeError, "rank.*True"),
        ({"rank": 4.0}, TypeError, "rank.*4.0"),
        ({"rank": jnp.asarray(4)}, TypeError, "static_args"),
        ({"update_proj_gap": 0}, ValueError, "update_proj_gap must be an int >= 1 and .*, got 0"),
        ({"update_proj_gap": 2**40}, ValueError, r"update_proj_gap must be .* < 2\*\*31"),
        ({"b1": 1}, ValueError, "b1 must be .*>= 0 and < 1, got 1"),
        ({"b1": -0.1}, ValueError, "b1"),
        ({"b2": 1.0}, ValueError, "b2"),
        ({"b2": float("nan")}, ValueError, "b2"),
        ({"b2": "0.9"}, TypeError, "b2"),
        ({"eps": 0}, ValueError, "eps must be .*> 0, got 0"),
        ({"scale": 0}, ValueError, "scale must be .*> 0, got 0"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"granularity": "row"}, ValueError, r"granularity must be one of \('channel', 'tensor'\)"),
        ({"norm_growth_limit": 1}, ValueError, "norm_growth_limit must be .*> 1, got 1"),
        ({"norm_growth_limit": True}, TypeError, "norm_growth_limit"),
        ({"projection": "gaussian"}, TypeError, "projection must be a function"),
        ({"projection": Unhashable()}, TypeError, "projection must be hashable"),
        ({"granularity": Unhashable()}, TypeError, "granularity must be hashable"),
        ({"implementation": Unhashable()}, TypeError, "implementation must be hashable"),
        ({"key": 0.5}, TypeError, "key must be an int seed or a key"),
        ({"key": 2**70}, ValueError, "key must be a seed from"),
        ({"mu_dtype": jnp.int8}, TypeError, "mu_dtype"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, match):
    with pytest.raises(error, match=match):
        scale_by_apollo(**arguments)
    if "granularity" not in arguments:
        with pytest.raises(error, match=match):
            apollo(0.01, **arguments)


@pytest.mark.parametrize("limit", [1, 0.5, -1, float("nan"), float("inf")])
def test_limits_that_cannot_work_are_refused(limit):
    with pytest.raises(ValueError, match="limit must be .*> 1"):
        limit_norm_growth(limit)


def test_a_limit_that_is_1_in_bfloat16_is_refused():
    tx = optax.inject_hyperparams(limit_norm_growth)(limit=1.003)
    with pytest.raises(TypeError, match=r"limit is a bfloat16 array.*hyperparam_dtype"):
        tx.init(jnp.ones(3, jnp.bfloat16))


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        (ApolloDimensionNumbers(0, 0), ValueError, r"w with shape \(6, 9\).*overlap"),
        (ApolloDimensionNumbers(0, -2), ValueError, "overlap"),
        (
            ApolloDimensionNumbers(0, 2),
            ValueError,
            "output_axis=2 is out of range; allowed are -2 to 1",
        ),
        (ApolloDimensionNumbers(-3, 1), ValueError, "reduction_axis=-3 is out of range"),
        (ApolloDimensionNumbers((), 1), ValueError, "at least one axis"),
        (ApolloDimensionNumbers("in", 1), TypeError, "reduction_axis must be an int"),  # type: ignore[arg-type]
        ("dense", TypeError, "'dense' at w; allowed are"),
    ],
)
def test_bad_axes_are_refused_at_init(spec, error, match):
    with pytest.raises(error, match=match):
        scale_by_apollo(4, weight_dimension_numbers={"w": spec}).init({"w": jnp.zeros((6, 9))})


def test_missing_specification_is_refused_at_init():
    tx = scale_by_apollo(4, weight_dimension_numbers={"w": ApolloDimensionNumbers()})
    with pytest.raises(ValueError, match="no entry for v"):
        tx.init({"w": jnp.zeros((6, 9)), "v": jnp.zeros((6, 9))})


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (
            jnp.zeros((6, 4), jnp.float32),
            ValueError,
            r"shape \(rank, dim\) = \(4, 6\), got \(6, 4\)",
        ),
        (jnp.zeros((4, 6), jnp.bfloat16), TypeError, "float32"),
        (None, TypeError, "float32"),
    ],
)
def test_bad_projections_are_refused_at_init(result, error, match):
    tx = scale_by_apollo(4, projection=lambda key, refresh, rank, dim: result)
    with pytest.raises(error, match=match):
        tx.init({"w": jnp.zeros((6, 9))})


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, bool])
@pytest.mark.parametrize("tx", [scale_by_apollo(4), limit_norm_growth()])
def test_leaves_that_are_not_real_floating_are_refused_at_init(tx, dtype):
    with pytest.raises(TypeError, match="inner/w has dtype .*allowed are real floating"):
        tx.init({"inner": {"w": jnp.zeros((6, 9), dtype)}})


@pytest.mark.parametrize("tx", [scale_by_apollo(4), scale_by_swan()])
def test_gradients_that_are_not_real_floating_are_refused(tx):
    params = {"inner": {"w": jnp.zeros((6, 9))}}
    gradients = {"inner": {"w": jnp.ones((6, 9), jnp.int32)}}
    with pytest.raises(TypeError, match="inner/w has dtype int32; allowed are real floating"):
        tx.update(gradients, tx.init(params), params)


def test_limiter_alone_matches_its_definition():
    grads = [normal(6, 9, seed=s) * (20.0 if s == 2 else 1.0) for s in range(5)]
    updates, _ = run(limit_norm_growth(1.01), grads)
    previous = 0.0
    for grad, update in zip(grads, updates, strict=True):
        norm = math.sqrt(np.sum(np.square(np.asarray(grad, np.float64))))
        allowed = min(norm, 1.01 * (previous + 1e-8)) if previous else norm
        np.testing.assert_allclose(update, grad * (allowed / norm), rtol=1e-5)
        previous = allowed


def test_limiter_alone_refuses_the_state_of_other_parameters():
    tx = limit_norm_growth()
    with pytest.raises(ValueError, match="no norm for new: init made it for other parameters"):
        tx.update({"new": jnp.ones(3)}, tx.init({"old": jnp.ones(3)}))


def test_limiter_alone_survives_a_zero_update():
    G = normal(6, 9)
    (_, _, last), _ = run(limit_norm_growth(1.01), [G, jnp.zeros_like(G), G])
    np.testing.assert_allclose(last, G, rtol=1e-6)


def test_limiter_alone_has_a_norm_a_matrix_where_told_so():
    quiet, loud = normal(6, 9), 50 * normal(6, 9)
    first, second = jnp.stack([quiet, quiet]), jnp.stack([quiet, loud])
    specs = {"weight_dimension_numbers": {"w": STACKED, "b": None}}
    tx = limit_norm_growth(1.01, **specs)
    steps = [{"w": first, "b": jnp.ones(3)}, {"w": second, "b": jnp.full(3, 50.0)}]
    (_, updates), _ = run(tx, steps)
    update = updates["w"]
    np.testing.assert_array_equal(updates["b"], steps[1]["b"])
    np.testing.assert_allclose(update[0], quiet, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(update[1]), 1.01 * jnp.linalg.norm(quiet), rtol=1e-5)
