"""Flax's boxed parameters, whose axis names the low-rank state has in its own order."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    apollo_mini,
    scale_by_apollo,
    svd,
    transformer_dimension_numbers,
)

OPTIMIZERS = [
    lambda: apollo(0.01, 4, weight_dimension_numbers=transformer_dimension_numbers),
    lambda: apollo_mini(0.01, weight_dimension_numbers=transformer_dimension_numbers),
]
both = pytest.mark.parametrize("make", OPTIMIZERS, ids=["apollo", "apollo_mini"])
X = jax.random.normal(jax.random.key(0), (16, 12))
Y = jnp.sin(X[:, :8])


class NnxModel(nnx.Module):
    def __init__(self, partitioned: bool):
        init: Any = nnx.initializers.lecun_normal()
        if partitioned:
            init = nnx.with_partitioning(init, ("model", None))
        self.layers = nnx.List([nnx.Linear(12, 12, kernel_init=init, rngs=nnx.Rngs(1))])
        self.out = nnx.Linear(12, 8, kernel_init=init, rngs=nnx.Rngs(2))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.out(x)


def nnx_trained(tx, partitioned):
    model = NnxModel(partitioned)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@both
def test_nnx_partitioned_parameters_under_a_mesh_train_as_bare_ones(make):
    bare = nnx_trained(make(), partitioned=False)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        boxed = nnx_trained(make(), partitioned=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), boxed, bare)


def linen_model(partitioned):
    init: Any = nn.initializers.lecun_normal()
    if partitioned:
        init = nn.with_partitioning(init, ("model", None))
    return nn.Sequential([nn.Dense(12, kernel_init=init), nn.relu, nn.Dense(8, kernel_init=init)])


def linen_trained(tx, partitioned):
    model = linen_model(partitioned)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(1), X)["params"], tx=tx
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)
    return nn.meta.unbox(state.params), state


@both
def test_linen_partitioned_parameters_train_as_bare_ones(make):
    bare, _ = linen_trained(make(), partitioned=False)
    boxed, state = linen_trained(make(), partitioned=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), boxed, bare)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state.opt_state))


def is_box(node):
    return isinstance(node, nn.Partitioned | nnx.Variable)


@both
def test_parameters_without_axis_names_leave_no_box_in_the_state(make):
    state = make().init(nnx.state(NnxModel(partitioned=False), nnx.Param))
    assert not any(is_box(node) for node in jax.tree.leaves(state, is_leaf=is_box))


def in_a_box(kind, array, names):
    if kind == "nnx":
        return nnx.Param(array, out_sharding=names, eager_sharding=False)
    if kind == "logical":
        return nn.LogicallyPartitioned(array, names, rules=(("embed", "fsdp"),))
    return nn.Partitioned(array, names)


def spec_of(box):
    """The names that Flax itself reads off a box."""
    if isinstance(box, nnx.Variable):
        return nnx.get_partition_spec({"box": box})["box"].get_value()
    return nn.get_partition_spec(box)


DENSE = ApolloDimensionNumbers(-2, -1)


@pytest.mark.parametrize("kind", ["nnx", "partitioned", "logical"])
@pytest.mark.parametrize(
    ("shape", "numbers", "names", "mu", "norm", "projection"),
    [
        # Channels (the larger side) keep their names.
        ((8, 32), DENSE, (None, "mlp"), (None, "mlp"), (), (None, None)),
        ((32, 8), DENSE, ("mlp", "embed"), (None, "mlp"), (), (None, None)),
        ((8, 32), DENSE, ("embed", "mlp"), (None, "mlp"), (), (None, None)),
        # A name of the projected side goes to channels without one.
        ((8, 32), DENSE, ("embed", None), (None, "embed"), (), (None, None)),
        ((8, 32), DENSE, ("embed",), (None, "embed"), (), (None, None)),
        # Not where not all that divides it divides them.
        ((8, 33), DENSE, ("embed", None), (None, None), (), (None, None)),
        # Layers and experts.
        ((3, 8, 32), DENSE, ("layers", "embed", "mlp"), ("layers", None, "mlp"), ("layers",),
         ("layers", None, None)),
        # (embed, heads, head_dim)
        ((8, 4, 16), ApolloDimensionNumbers(0, (1, 2)), ("embed", "heads", None),
         (None, "heads", "embed"), (), (None, None)),
        # Adam's.
        ((32, 8), None, ("vocabulary", "embed"), ("vocabulary", "embed"), ("vocabulary",),
         ("vocabulary",)),
        ((32,), None, ("mlp",), ("mlp",), (), ()),
    ],
)  # fmt: skip
def test_the_state_of_a_boxed_parameter_has_the_names_of_its_axes(
    kind, shape, numbers, names, mu, norm, projection
):
    params = {"w": in_a_box(kind, jnp.ones(shape), names)}
    state = scale_by_apollo(4, projection=svd, weight_dimension_numbers={"w": numbers}).init(params)
    for tree in (state.mu, state.nu):
        assert spec_of(tree["w"]) == P(*mu)
    assert spec_of(state.norm["w"]) == P(*norm)
    assert spec_of(state.projection["w"]) == P(*projection)


@pytest.mark.parametrize("kind", ["nnx", "partitioned", "logical"])
@pytest.mark.parametrize("shape", [(256, 128), (128, 128)])
@pytest.mark.parametrize("rule", ["adam", "factored", "factored_momentum"])
def test_the_state_of_a_boxed_table_has_the_names_of_its_rows_and_columns(kind, shape, rule):
    names = ("vocabulary", "embed")
    params = {"w": in_a_box(kind, jnp.ones(shape), names)}
    state = scale_by_apollo(4, vocabulary=rule, weight_dimension_numbers={"w": None}).init(params)
    expected = {
        "adam": (names, names, names[:1]),
        "factored": ((), names[:1], names[1:]),
        "factored_momentum": (names, names[:1], names[1:]),
    }[rule]
    found = tuple(spec_of(tree["w"]) for tree in (state.mu, state.nu, state.norm))
    # Logical names are those of the mesh by their rules.
    assert found == tuple(P(*of_field) for of_field in expected)


def test_a_sharding_of_the_optimizer_state_alone_is_followed():
    param = nnx.Param(
        jnp.ones((8, 32)), out_sharding=(), optimizer_sharding=P(None, "fsdp"), eager_sharding=False
    )
    moment = scale_by_apollo(4).init({"w": param}).mu["w"]
    assert moment.get_metadata("optimizer_sharding") == P(None, "fsdp")


def test_names_under_the_old_key_of_flax_are_followed():
    names = ("fsdp", "tensor")
    model = nnx.Linear(8, 32, use_bias=False, rngs=nnx.Rngs(0))
    kernel: Any = nnx.Param(model.kernel[...], out_sharding=names, eager_sharding=False)
    model.kernel = kernel.replace(sharding_names=names)
    with pytest.warns(DeprecationWarning, match="sharding_names"):
        optimizer = nnx.Optimizer(model, scale_by_apollo(4), wrt=nnx.Param)
    assert optimizer.opt_state.mu["kernel"].get_metadata("out_sharding") == (None, "tensor")


@pytest.mark.parametrize("state_boxed", [False, True])
@pytest.mark.parametrize("gradients_boxed", [False, True])
def test_gradients_and_state_may_be_boxed_apart(state_boxed, gradients_boxed):
    boxed = linen_model(partitioned=True).init(jax.random.key(1), X)["params"]
    bare = nn.meta.unbox(boxed)
    tx = apollo(0.01, 4)
    update = jax.jit(tx.update)
    expected, _ = update(bare, update(bare, tx.init(bare), bare)[1], bare)
    start = tx.init(boxed if state_boxed else bare)
    grads = boxed if gradients_boxed else bare
    _, state = update(grads, start, grads)
    updates, state = update(grads, state, grads)
    chex.assert_trees_all_equal(nn.meta.unbox(updates), expected)
    chex.assert_trees_all_equal_structs(updates, grads)
    chex.assert_trees_all_equal_structs(state, start)


def test_moments_of_boxed_parameters_are_told_from_counts():
    tx = apollo(0.01, 4)
    boxed = linen_model(partitioned=True).init(jax.random.key(1), X)["params"]
    marked = optax.tree_map_params(tx, lambda _: "moment", tx.init(boxed))
    assert set(jax.tree.leaves((marked[0].mu, marked[0].nu, marked[0].norm))) == {"moment"}
    assert marked[0].count == 0


def test_a_leaf_that_is_really_called_value_keeps_its_name():
    class Attention(eqx.Module):
        key: jax.Array
        value: jax.Array

    layer = Attention(jnp.ones((6, 9)), jnp.ones((6, 9)))
    for params in ({"attention": layer}, {"attention": {"key": layer.key, "value": layer.value}}):
        state = apollo(0.01, 4).init(params)
        assert set(state[0].mu["attention"]) == {"key", "value"}


def test_a_module_that_has_an_array_named_value_beside_none_is_a_matrix():
    class Layer(eqx.Module):
        value: Any
        bias: Any = None

    params = {"a": Layer(jnp.ones((6, 9)))}
    for given in (None, {"a": Layer(ApolloDimensionNumbers(0, 1))}):
        state = apollo(0.01, 4, weight_dimension_numbers=given).init(params)
        assert state[0].mu["a"].shape == (4, 9)


def specs(params):
    return transformer_dimension_numbers(params)


def test_names_of_linen_attention_and_dense():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(50, 12, name="embed")(tokens)
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(3, name="attention")(x))
            return nn.Dense(50, name="lm_head")(nn.Dense(24, name="mlp")(x)[..., :12])

    params = Block().init(jax.random.key(0), jnp.zeros((2, 5), int))["params"]
    found = specs(params)
    for name in ("query", "key", "value"):
        assert found["attention"][name]["kernel"] == ApolloDimensionNumbers(-3, (-2, -1))
        assert found["attention"][name]["bias"] is None
    assert found["attention"]["out"]["kernel"] == ApolloDimensionNumbers((-3, -2), -1)
    assert found["mlp"] == {"kernel": ApolloDimensionNumbers(-2, -1), "bias": None}
    assert found["embed"] == {"embedding": None}
    assert found["lm_head"] == {"kernel": None, "bias": None}
    assert found["LayerNorm_0"] == {"scale": None, "bias": None}


def test_names_of_nnx_attention():
    attention = nnx.MultiHeadAttention(num_heads=3, in_features=12, decode=False, rngs=nnx.Rngs(0))
    found = nnx.to_pure_dict(specs(nnx.state(attention, nnx.Param)))
    assert found["query"]["kernel"] == ApolloDimensionNumbers(-3, (-2, -1))
    assert found["out"]["kernel"] == ApolloDimensionNumbers((-3, -2), -1)


def shapes(**leaves):
    return {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in leaves.items()
    }


def test_scanned_kernels_have_their_layers_as_batch_axes():
    dense = ApolloDimensionNumbers(-2, -1)
    heads = specs(shapes(query=(12, 64, 4, 16), out=(12, 4, 16, 64), mlp=(12, 64, 256)))
    assert heads["query"]["kernel"] == ApolloDimensionNumbers(-3, (-2, -1))
    assert heads["out"]["kernel"] == ApolloDimensionNumbers((-3, -2), -1)
    assert heads["mlp"]["kernel"] == dense
    plain = specs(shapes(query=(12, 64, 64), out=(12, 64, 64)))
    assert plain["query"]["kernel"] == dense
    assert plain["out"]["kernel"] == dense


def test_experts_convolutions_and_top_level_outputs():
    params = shapes(conv=(3, 3, 8, 16), output=(64, 500)) | {
        "experts": {"wi": jnp.zeros((4, 64, 256)), "wo": jnp.zeros((4, 256, 64))}
    }
    found = specs(params)
    assert found["conv"]["kernel"] is None
    assert found["output"]["kernel"] is None
    assert found["experts"] == dict.fromkeys(("wi", "wo"), ApolloDimensionNumbers(-2, -1))


def test_project_embeddings_takes_embeddings_and_heads_too():
    params = shapes(lm_head=(64, 500)) | {"embed": {"embedding": jnp.zeros((500, 64))}}
    found = transformer_dimension_numbers(params, project_embeddings=True)
    assert found["lm_head"]["kernel"] == ApolloDimensionNumbers(-2, -1)
    assert found["embed"]["embedding"] == ApolloDimensionNumbers(-2, -1)
