"""Flax's boxed parameters, whose axis names do not fit the low-rank state."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from apollo_optax import ApolloDimensionNumbers, apollo, apollo_mini, transformer_dimension_numbers

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
@pytest.mark.parametrize("family", ["linen", "nnx"])
def test_no_box_is_left_in_the_state(make, family):
    params = (
        linen_model(partitioned=True).init(jax.random.key(1), X)["params"]
        if family == "linen"
        else nnx.state(NnxModel(partitioned=False), nnx.Param)
    )
    state = make().init(params)
    assert not any(is_box(node) for node in jax.tree.leaves(state, is_leaf=is_box))


def test_the_state_of_boxed_and_bare_parameters_is_the_same_tree():
    boxed = linen_model(partitioned=True).init(jax.random.key(1), X)["params"]
    tx = apollo(0.01, 4)
    chex.assert_trees_all_equal_structs(tx.init(boxed), tx.init(nn.meta.unbox(boxed)))


def test_a_leaf_that_is_really_called_value_keeps_its_name():
    class Attention(eqx.Module):
        key: jax.Array
        value: jax.Array

    layer = Attention(jnp.ones((6, 9)), jnp.ones((6, 9)))
    for params in ({"attention": layer}, {"attention": {"key": layer.key, "value": layer.value}}):
        state = apollo(0.01, 4).init(params)
        assert set(state[0].mu["attention"]) == {"key", "value"}


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
