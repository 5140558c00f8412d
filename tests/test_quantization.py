import functools
import importlib
import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx

import apollo_optax
from apollo_optax import layerwise
from apollo_optax.quantization import (
    QArray,
    QuantizationRule,
    apply_updates,
    contracted_axes,
    dequantize,
    quantize,
)


def normal(shape, seed=0, scale=0.02):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def steps(params):
    """Each weight's quantization step, in float64."""
    weights = np.asarray(dequantize(params), np.float64)
    return np.repeat(
        np.asarray(params.scale, np.float64), params.shape[-2] // params.scale.shape[-2], -2
    ).reshape(weights.shape)


def samples(params, update, number, **options):
    """Float64 weights after the same update with `number` different keys."""

    @jax.jit
    @jax.vmap
    def moved(key):
        return dequantize(apply_updates(params, update, key, **options))

    return np.asarray(moved(jax.random.split(jax.random.key(7), number)), np.float64)


def float64_sum(params, update):
    return np.asarray(params.qvalue, np.float64) * steps(params) + np.asarray(update, np.float64)


# Quantizing


def transformer_params():
    kernel = functools.partial(jnp.ones, dtype=jnp.bfloat16)
    return {
        "embed": {"embedding": kernel((300, 128))},
        "blocks": {
            "attention": {"q_proj": {"kernel": kernel((3, 128, 256))}},
            "mlp": {"up_proj": {"kernel": kernel((3, 128, 512)), "bias": kernel((3, 512))}},
            "attention_norm": {"scale": kernel((3, 128))},
        },
        "norm": {"scale": kernel(128)},
        "lm_head": {"kernel": kernel((128, 300))},
    }


def test_matrices_embeddings_and_heads_are_quantized_norms_and_biases_are_not():
    axes = contracted_axes(transformer_params())
    assert axes == {
        "embed": {"embedding": -1},
        "blocks": {
            "attention": {"q_proj": {"kernel": -2}},
            "mlp": {"up_proj": {"kernel": -2, "bias": None}},
            "attention_norm": {"scale": None},
        },
        "norm": {"scale": None},
        "lm_head": {"kernel": -2},
    }


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("query", (2, 64, 4, 16), -3),
        ("out", (2, 4, 16, 64), -2),
        ("conv", (3, 3, 64, 32), -2),
        ("wi", (2, 4, 64, 128), -2),
        ("w", (64, 128), -2),
        ("weight", (128, 64), -1),
    ],
)
def test_groups_run_along_the_axis_a_product_contracts(name, shape, axis):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    is_leaf = name.startswith("w")
    params = {"module": {name: leaf if is_leaf else {"kernel": leaf}}}
    assert jax.tree.leaves(contracted_axes(params)) == [axis]


@pytest.mark.parametrize(
    ("name", "shape", "group"),
    [
        ("weight", (64, 32, 3, 3), 32),
        ("weight", (4, 64, 32, 3, 3), 32),
        ("weight", (512, 256, 10), 128),
        ("weight", (64, 3, 7, 7), 64),
        ("weight", (64, 1, 3, 3), 64),
        ("weight", (64, 1, 3), 64),
        ("kernel", (3, 3, 64, 32), 64),
        ("kernel", (3, 3, 1, 512), 128),
        ("kernel", (7, 7, 3, 64), 64),
        ("kernel", (5, 1, 48), 48),
    ],
)
def test_convolutions_are_not_grouped_along_their_windows(name, shape, group):
    quantized = quantize({"conv": {name: normal(shape)}})["conv"][name]
    assert quantized.qvalue.size == group * quantized.scale.size
    np.testing.assert_allclose(dequantize(quantized), normal(shape), atol=0.1 / 127)


@pytest.mark.parametrize("shape", [(64, 3), (3, 5, 8), (24, 8, 8), (12, 4, 4)])
def test_a_row_and_a_layer_have_their_scales_to_themselves(shape):
    quantized = quantize({"weight": normal(shape)})["weight"]
    assert quantized.scale.shape[0] == shape[0]


def test_a_number_of_python_stays():
    quantized = quantize({"kernel": jnp.ones((64, 32)), "temperature": 1.0})
    assert isinstance(quantized["kernel"], QArray)
    assert quantized["temperature"] == 1.0


def test_equinox_norms_and_integer_and_empty_leaves_stay():
    leaves = {
        "norm1": {"weight": jnp.ones((3, 8))},
        "ids": jnp.ones((4, 4), int),
        "none": {"kernel": jnp.ones((0, 4))},
    }
    assert not jax.tree.leaves(contracted_axes(leaves))
    chex.assert_trees_all_equal(quantize(leaves), leaves)


def test_shapes_and_dtypes():
    quantized = quantize(transformer_params())
    up = quantized["blocks"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(up, QArray)
    assert (up.qvalue.dtype, up.qvalue.shape) == (jnp.int8, (3, 128, 512))
    assert (up.scale.dtype, up.scale.shape) == (jnp.float32, (3, 1, 512))
    assert quantized["embed"]["embedding"].scale.shape == (300, 1)
    assert quantized["blocks"]["mlp"]["up_proj"]["bias"].dtype == jnp.bfloat16
    qwix._src.core.qarray.validate_qarray(up)
    back = dequantize(quantized)
    chex.assert_trees_all_equal_shapes(back, transformer_params())
    assert back["lm_head"]["kernel"].dtype == jnp.float32
    assert dequantize(quantized, jnp.bfloat16)["lm_head"]["kernel"].dtype == jnp.bfloat16


def test_compiled_and_abstract_quantization_is_the_same():
    params = {"kernel": normal((256, 12)), "bias": jnp.ones(12)}
    eager, compiled = quantize(params), jax.jit(quantize)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(quantize, params), eager)
    chex.assert_trees_all_close(dequantize(eager), dequantize(compiled), rtol=1e-6)
    chex.assert_trees_all_equal(quantize(eager), eager)


def test_error_is_half_a_step_of_the_own_group():
    weights = normal((512, 16)).at[130, 3].set(7.0)
    quantized = quantize(weights)
    error = np.abs(np.asarray(dequantize(quantized), np.float64) - np.asarray(weights, np.float64))
    assert np.all(error <= 0.5 * steps(quantized) * (1 + 1e-5))
    # The outlier's group has large steps; its neighbours in the column and the row do not.
    assert steps(quantized)[128:256, 3] == pytest.approx(7 / 127)
    assert np.delete(steps(quantized)[128:256], 3, 1).max() < 0.1 / 127
    assert steps(quantized)[256:, 3].max() < 0.1 / 127


def test_products_are_those_of_qwix():
    quantized = quantize(normal((2, 256, 6)))
    np.testing.assert_array_equal(dequantize(quantized), qwix.dequantize(quantized))


@pytest.mark.parametrize(
    ("size", "groups"),
    [(128, 1), (4096, 32), (5461, 43), (688, 8), (12, 1), (257, 1), (262, 1), (160, 2)],
)
def test_odd_sizes_take_a_divisor_or_one_group(size, groups):
    quantized = jax.eval_shape(quantize, jax.ShapeDtypeStruct((size, 2), jnp.float32))
    assert quantized.scale.shape == (groups, 2)


def test_odd_sizes_are_rounded_within_a_step():
    params = {"three groups of 43": normal((129, 2)), "one group": normal((257, 2))}
    quantized = quantize(params)
    moved = apply_updates(quantized, jax.tree.map(jnp.zeros_like, params), jax.random.key(0))
    for name, weights in params.items():
        assert np.all(np.abs(dequantize(moved)[name] - weights) <= steps(quantized[name]))


def test_rule_chooses_leaves_axes_and_sizes():
    params = {"a": jnp.ones((64, 32)), "b": {"c": jnp.ones((64, 32)), "d": jnp.ones((64, 32))}}
    quantized = quantize(params, QuantizationRule(16, {"a": 1, "b": None}))
    assert quantized["a"].scale.shape == (64, 2)
    chex.assert_trees_all_equal(quantized["b"], params["b"])
    rule = QuantizationRule(1, lambda tree: {**contracted_axes(tree), "a": None})
    quantized = quantize(params, rule)
    assert quantized["b"]["c"].scale.shape == (64, 32)
    assert not isinstance(quantized["a"], QArray)
    chex.assert_trees_all_equal(dequantize(quantized), params)
    moved = apply_updates(quantized, jax.tree.map(jnp.ones_like, params), jax.random.key(0))
    chex.assert_trees_all_close(dequantize(moved), jax.tree.map(lambda p: p + 1, params))


@pytest.mark.parametrize(
    ("params", "rule", "error", "match"),
    [
        ({"a": jnp.ones((4, 4), int)}, {"axes": 0}, TypeError, "a, which has dtype int32"),
        (
            {"a": jnp.ones(4)},
            {"axes": -2},
            ValueError,
            r"a along axis -2, .* \(4,\) has no such axis",
        ),
        ({"a": jnp.ones((0, 4))}, {"axes": 0}, ValueError, r"\(0, 4\) .*is empty"),
        ({"a": jnp.ones((4, 4))}, {"axes": {"b": 0}}, ValueError, r"metadata\s+\('b',\)"),
        ({"a": jnp.ones((4, 4))}, {"axes": "in"}, TypeError, "axis 'in'"),
        ({"a": jnp.ones((4, 4))}, {"axes": True}, TypeError, "axis True"),
        ({}, {"group_size": 0}, ValueError, "group_size must be an int >= 1 and .*, got 0"),
        ({}, {"group_size": 12.5}, TypeError, "group_size must be an int >= 1"),
    ],
)
def test_rules_that_do_not_fit_are_refused(params, rule, error, match):
    with pytest.raises(error, match=match):
        quantize(params, QuantizationRule(**rule))


def test_an_axis_may_be_numpys_integer():
    leaf = quantize(normal((256, 3)), QuantizationRule(axes=np.int64(0)))
    assert leaf.scale.shape == (2, 3)


def test_bytes_a_parameter():
    shapes = {"kernel": jax.ShapeDtypeStruct((32, 4096, 11008), jnp.float32)}
    quantized = jax.eval_shape(quantize, shapes)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(quantized))
    assert stored / shapes["kernel"].size == 1 + 4 / 128
    real = quantize({"kernel": normal((256, 128))})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(real)) / (256 * 128) == 1 + 4 / 128


def test_a_checkpoint_stores_int8(tmp_path):
    params = {"mlp": {"kernel": normal((256, 16)), "bias": jnp.ones(16)}}
    quantized = quantize(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "weights", quantized)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: quantized)
        restored = checkpointer.restore(tmp_path / "weights", abstract)
    assert isinstance(restored["mlp"]["kernel"], QArray)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, quantized)
    chex.assert_trees_all_equal(restored, quantized)
    assert restored["mlp"]["kernel"].qvalue.dtype == jnp.int8
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert stored < 4 * params["mlp"]["kernel"].size


# Updating


def test_expectation_is_the_sum():
    params = quantize(normal((256, 24)))
    # Updates of a step, a tenth and a thousandth of one, in columns of their own.
    sizes = np.repeat([1.0, 0.1, 1e-3], 8)[None, :]
    update = jnp.asarray(sizes * steps(params), jnp.float32) * normal((256, 24), 1, 1.0)
    number = 2000
    exact = float64_sum(params, update)
    error = samples(params, update, number).mean(0) - exact
    step = np.abs(exact).reshape(2, 128, 24).max(1).repeat(128, 0) / 127
    fraction = exact / step % 1
    variance = fraction * (1 - fraction) / number
    # Bernstein's bound of a mean of `number` draws between neighbouring steps, and 16 bits' bias.
    allowed = 6 * np.sqrt(variance) + 12 / number + 2.0**-16
    assert np.all(np.abs(error) <= allowed * step)
    # All weights together: neither the updates nor the weights are shortened or lengthened.
    for columns in np.split(np.arange(24), 3):
        for direction in (np.sign(update), np.sign(exact)):
            drift = np.mean((error / step * direction)[:, columns])
            noise = variance[:, columns]
            assert abs(drift) <= 5 * np.sqrt(noise.mean() / noise.size) + 2.0**-16


def test_largest_weights_are_unbiased_and_never_clipped():
    params = quantize(normal((128, 400)))
    outwards = 0.3 * np.sign(params.qvalue) * steps(params)
    moved = samples(params, jnp.asarray(outwards, jnp.float32), 50)
    exact = float64_sum(params, outwards)
    largest = np.abs(exact) == np.abs(exact).max(0)
    error = (moved - exact) / steps(params)
    assert np.abs(error[:, largest]).max() < 1e-4
    assert abs(error.mean()) < 5 * error.std() / error.size**0.5


def test_scale_follows_the_largest_weight_and_does_not_wander():
    params = quantize(normal((256, 8)))
    update = jnp.zeros((256, 8)).at[5].set(1e-6)

    def step(params, key):
        return apply_updates(params, update, key), None

    moved, _ = jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 500))
    np.testing.assert_array_equal(moved.scale[1], params.scale[1])
    # Over 500 steps the largest of the other weights was rounded 500 times, each time to itself.
    still = np.argmax(np.abs(params.qvalue[:128]), 0) != 5
    np.testing.assert_allclose(moved.scale[0][still], params.scale[0][still], rtol=1e-4)


def test_small_updates_are_kept_by_stochastic_rounding_and_lost_by_rounding_to_nearest():
    params = quantize(normal((1024, 64)))
    update = jnp.asarray(1e-3 * steps(params), jnp.float32)

    def moved(rounding):
        def step(params, key):
            return apply_updates(params, update, key, rounding=rounding), None

        keys = jax.random.split(jax.random.key(1), 200)
        return dequantize(jax.lax.scan(step, params, keys)[0])

    distance = {r: np.asarray(moved(r) - dequantize(params)) for r in ("stochastic", "nearest")}
    asked = 200 * np.asarray(update)
    assert (distance["stochastic"] / asked).mean() == pytest.approx(1, abs=0.05)
    # The largest weight of a group is on its step whatever the rounding; all others stay.
    assert np.median(distance["nearest"] / asked) == pytest.approx(0, abs=0.2)


def test_rounding_to_nearest_gives_the_nearest():
    params, update = quantize(normal((256, 8))), normal((256, 8), 1, 1e-3)
    moved = apply_updates(params, update, rounding="nearest")
    chex.assert_trees_all_close(moved, quantize(dequantize(params) + update), rtol=1e-6)


def test_groups_without_an_update_stay_bit_for_bit():
    params = quantize(normal((384, 100)))
    update = jnp.zeros((384, 100)).at[128:256].set(1e-4)
    for rounding in ("stochastic", "nearest"):
        moved = jax.jit(functools.partial(apply_updates, rounding=rounding))(
            params, update, jax.random.key(0)
        )
        for rows, groups in ((slice(0, 128), 0), (slice(256, 384), 2)):
            np.testing.assert_array_equal(moved.qvalue[rows], params.qvalue[rows])
            np.testing.assert_array_equal(moved.scale[groups], params.scale[groups])
        assert np.any(moved.scale[1] != params.scale[1])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_groups_of_zeros_stay_zero_and_can_grow(size):
    params = quantize(jnp.zeros((256, 4)))
    np.testing.assert_array_equal(dequantize(params), 0)
    still = apply_updates(params, jnp.zeros((256, 4)), jax.random.key(0))
    chex.assert_trees_all_equal(still, params)
    update = normal((256, 4), 1, size)
    grown = dequantize(apply_updates(params, update, jax.random.key(0)))
    np.testing.assert_allclose(grown, update, rtol=0, atol=float(jnp.abs(update).max()) / 127)


def test_weights_below_the_smallest_scale_are_rounded_to_its_steps():
    tiny = float(jnp.finfo(jnp.float32).tiny)
    params = quantize(jnp.full((128, 500), 0.25 * tiny))
    assert np.all(np.isfinite(dequantize(params)))
    moved = apply_updates(params, jnp.full((128, 500), 3.25 * tiny), jax.random.key(0))
    mean = np.asarray(moved.qvalue, np.float64).mean()
    assert mean == pytest.approx(3.25, abs=0.05)


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_what_is_not_finite_shows_in_its_group_and_stays(value):
    params = quantize(normal((256, 3)))
    update = jnp.full((256, 3), 1e-4).at[7, 1].set(value)
    moved = apply_updates(params, update, jax.random.key(0))
    poisoned = np.zeros((256, 3), bool)
    poisoned[:128, 1] = True
    np.testing.assert_array_equal(np.isnan(dequantize(moved)), poisoned)
    np.testing.assert_array_equal(np.isfinite(dequantize(moved)), ~poisoned)
    np.testing.assert_array_equal(np.asarray(moved.qvalue)[poisoned], 0)
    later = apply_updates(moved, jnp.full((256, 3), 1e-4), jax.random.key(1))
    np.testing.assert_array_equal(np.isnan(dequantize(later)), poisoned)


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("columns", [3, 64])
def test_what_is_not_finite_in_weights_shows_in_its_group(columns, value):
    weights = normal((256, columns)).at[7, 1].set(value)
    poisoned = np.zeros((256, columns), bool)
    poisoned[:128, 1] = True
    np.testing.assert_array_equal(np.isnan(dequantize(quantize(weights))), poisoned)


def test_leaves_that_are_not_quantized_are_those_of_apply_updates_stochastic():
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "b": jnp.ones(8), "frozen": jnp.ones(2)}
    updates: dict[str, Any] = {"w": jnp.full((8, 8), 1e-3), "b": jnp.full(8, 1e-3), "frozen": None}
    key = jax.random.key(0)
    mixed = apply_updates({**params, "q": quantize(normal((8, 8)))}, {**updates, "q": None}, key)
    expected = apollo_optax.apply_updates_stochastic(params, updates, key)
    chex.assert_trees_all_equal({name: mixed[name] for name in params}, expected)
    nearest = apply_updates(params, updates, key, rounding="nearest")
    np.testing.assert_array_equal(nearest["w"], 1)
    np.testing.assert_array_equal(nearest["b"], params["b"] + updates["b"])


def test_other_leaves_do_not_matter_to_a_leaf():
    leaf, update, key = quantize(normal((128, 50))), normal((128, 50), 1, 1e-4), jax.random.key(0)
    alone = apply_updates({"w": leaf}, {"w": update}, key)
    among = apply_updates({"a": leaf, "w": leaf}, {"a": update, "w": update}, key)
    chex.assert_trees_all_equal(alone["w"], among["w"])
    assert np.any(among["a"].qvalue != among["w"].qvalue)


def test_parameters_of_flax_round_as_bare_ones():
    boxed = nnx.state(nnx.Linear(128, 8, rngs=nnx.Rngs(0)))
    key = jax.random.key(0)

    def moved(params):
        quantized = quantize(params)
        updates = jax.tree.map(lambda w: 1e-3 * jnp.ones_like(w), dequantize(quantized))
        return apply_updates(quantized, updates, key)

    bare = moved(nnx.to_pure_dict(boxed))
    assert isinstance(bare["kernel"], QArray)
    chex.assert_trees_all_equal(nnx.to_pure_dict(moved(boxed)), bare)


def test_none_leaves_a_quantized_leaf_as_it_is():
    params = {"w": quantize(normal((128, 5)))}
    chex.assert_trees_all_equal(apply_updates(params, {"w": None}, jax.random.key(0)), params)


def test_a_layer_of_the_stack_is_quantized_and_updated_as_in_the_stack():
    weights, update = normal((3, 256, 8)), normal((3, 256, 8), 1, 1e-3)
    params = quantize({"kernel": weights})
    nearest = functools.partial(apply_updates, key=jax.random.key(0), rounding="nearest")
    whole = nearest(params, {"kernel": update})
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i : i + 1], params)
        chex.assert_trees_all_equal(layer, quantize({"kernel": weights[i : i + 1]}))
        moved = nearest(layer, {"kernel": update[i : i + 1]})
        chex.assert_trees_all_equal(moved, jax.tree.map(lambda a, i=i: a[i : i + 1], whole))


@pytest.mark.parametrize(
    ("param", "update", "error", "match"),
    [
        (quantize(jnp.ones((4, 2))), jnp.ones(4), ValueError, r"w has shape \(4,\).*\(4, 2\)"),
        (quantize(jnp.ones((4, 2))), quantize(jnp.ones((4, 2))), TypeError, "w is a QArray; take"),
        (
            qwix.quantize(jnp.ones((4, 2)), jnp.int4),
            jnp.ones((4, 2)),
            TypeError,
            "w is a QArray of int4",
        ),
        (
            qwix.quantize(jnp.ones((4, 2), jnp.bfloat16), jnp.int8),
            jnp.ones((4, 2)),
            TypeError,
            "scale of bfloat16",
        ),
        (
            qwix.quantize(jnp.ones((4, 2)), jnp.int8, calibration_method="minmax"),
            jnp.ones((4, 2)),
            TypeError,
            "a zero point",
        ),
        (jnp.ones((4, 2), int), jnp.ones((4, 2)), TypeError, "w has dtype int32"),
    ],
)
def test_updates_and_parameters_that_do_not_fit_are_refused(param, update, error, match):
    with pytest.raises(error, match=match):
        apply_updates({"w": param}, {"w": update}, jax.random.key(0))


def test_stochastic_rounding_needs_a_key():
    params = {"w": quantize(jnp.ones((4, 2)))}
    with pytest.raises(ValueError, match="needs a PRNG key, got None"):
        apply_updates(params, {"w": jnp.ones((4, 2))})
    weights = layerwise.WeightFormat(dequantize, apply_updates)
    model, start = stacked_network()
    step = layerwise.make_step(model, optax.sgd(0.1), weights=weights)
    with pytest.raises(ValueError, match="needs a PRNG key, got None"):
        jax.eval_shape(step, quantize(start), optax.sgd(0.1).init(start), jnp.ones((2, 8)))


def test_another_rounding_or_structure_is_refused():
    params = {"w": quantize(jnp.ones((4, 2)))}
    with pytest.raises(ValueError, match="rounding must be one of"):
        apply_updates(params, params, jax.random.key(0), rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected keys: \['w'\]; present keys: \['v'\]"):
        apply_updates(params, {"v": jnp.ones((4, 2))}, jax.random.key(0))


@pytest.mark.slow
def test_qarrays_of_qwix_are_read_and_its_int8_is_trained():
    weights = normal((256, 8))
    foreign = {
        "int4": qwix.quantize(weights, jnp.int4),
        "zero_point": qwix.quantize(weights, jnp.int8, calibration_method="minmax"),
        "int8": qwix.quantize(weights, jnp.int8, tiled_axes={0: 64}, channelwise_axes=[1]),
    }
    chex.assert_trees_all_equal(
        dequantize(foreign), {name: qwix.dequantize(leaf) for name, leaf in foreign.items()}
    )
    params = foreign["int8"]
    moved = apply_updates(params, jnp.full((256, 8), 1e-3), jax.random.key(0))
    chex.assert_trees_all_equal_structs(moved, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)
    difference = dequantize(moved) - dequantize(params)
    assert float(difference.mean()) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.optimized
@pytest.mark.slow
def test_no_float_copy_of_the_weights_is_made():
    params = {str(i): {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)} for i in range(8)}
    updates = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    quantized = jax.eval_shape(quantize, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(apply_updates, donate_argnums=0).lower(quantized, updates, key).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = 8 * 512 * 512
    assert memory.alias_size_in_bytes == size * (1 + 4 / 128)
    # The new int8 weights; random bits would be 2 bytes more, a float copy 4.
    assert memory.temp_size_in_bytes < 2 * size


def stacked_network():
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: batch @ rest["embed"]["kernel"],
        block=lambda block, x: x + jnp.tanh(x @ block["kernel"]),
        loss=lambda rest, x, batch: jnp.mean((x @ rest["head"]["kernel"] - 1) ** 2),
    )
    return model, {
        "blocks": {"kernel": normal((3, 16, 16))},
        "rest": {"embed": {"kernel": normal((8, 16), 1)}, "head": {"kernel": normal((16, 4), 2)}},
    }


def test_layerwise_step_moves_int8_weights_as_the_ordinary_step():
    model, start = stacked_network()
    params, tx, batch = quantize(start), optax.sgd(10.0), normal((32, 8), 3, 1.0)

    def write(params, updates, key):
        return apply_updates(params, updates, key, rounding="nearest")

    def loss(weights):
        x = model.embed(weights["rest"], batch)
        x, _ = jax.lax.scan(lambda x, layer: (model.block(layer, x), None), x, weights["blocks"])
        return model.loss(weights["rest"], x, batch)

    weight_format = layerwise.WeightFormat(dequantize, write)
    step = jax.jit(layerwise.make_step(model, tx, weights=weight_format))
    moved, _, _ = step(params, layerwise.init(tx, params, weights=weight_format), batch)
    weights = dequantize(params)
    updates, _ = tx.update(jax.grad(loss)(weights), tx.init(weights), weights)
    expected = write(params, updates, jax.random.key(0))
    chex.assert_trees_all_close(dequantize(moved), dequantize(expected), atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)


def test_without_qwix_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    monkeypatch.delitem(sys.modules, "apollo_optax.quantization")
    with pytest.raises(ImportError, match=r"pip install -e '\.\[quantization\]'") as error:
        importlib.import_module("apollo_optax.quantization")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_the_core_does_not_import_qwix():
    code = "import sys, apollo_optax; sys.exit('qwix' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Training


def regression(seed=0):
    """A small network's data: inputs, and what a random network makes of them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (512, 64))
    hidden = jnp.tanh(x @ (0.2 * jax.random.normal(keys[1], (64, 32))))
    return x, hidden @ (0.3 * jax.random.normal(keys[2], (32, 8)))


def initial_network(seed=5):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "hidden": {"kernel": 0.1 * jax.random.normal(keys[0], (64, 128)), "bias": jnp.zeros(128)},
        "out": {"kernel": 0.1 * jax.random.normal(keys[1], (128, 8))},
    }


def network_loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :])
    return jnp.mean((hidden @ params["out"]["kernel"] - y) ** 2)


def trained_loss(params, write, number_of_steps=300):
    x, y = regression()
    tx = apollo_optax.apollo_mini(
        optax.cosine_decay_schedule(1e-3, number_of_steps), update_proj_gap=50, scale=4.0
    )

    def step(carry, key):
        params, state = carry
        weights = dequantize(params)
        grads = jax.grad(network_loss)(weights, x, y)
        updates, state = tx.update(grads, state, weights)
        return (write(params, updates, key), state), None

    state = tx.init(jax.eval_shape(dequantize, params))
    keys = jax.random.split(jax.random.key(0), number_of_steps)
    (params, _), _ = jax.lax.scan(step, (params, state), keys)
    return float(network_loss(dequantize(params), x, y))


@pytest.mark.slow
def test_int8_weights_train_as_float_ones_with_stochastic_rounding_only():
    start = initial_network()
    exact = trained_loss(start, lambda params, updates, _: optax.apply_updates(params, updates))
    stochastic = trained_loss(quantize(start), apply_updates)
    nearest = trained_loss(quantize(start), functools.partial(apply_updates, rounding="nearest"))
    first = float(network_loss(start, *regression()))
    assert exact < 0.1 * first
    assert stochastic < 1.5 * exact
    assert nearest > 2 * stochastic
