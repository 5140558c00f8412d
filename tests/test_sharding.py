"""The state follows the parameters on any mesh, and the optimizer gathers nothing.

`conftest.py` gives this process 8 CPU devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    apollo_mini,
    apply_updates_stochastic,
    limit_norm_growth,
    planning,
    quantization,
    scale_by_apollo,
    scale_by_swan,
    svd,
    swan,
    transformer_dimension_numbers,
)
from apollo_optax.sharding import on_automatic_axes, state_shardings

DENSE = ApolloDimensionNumbers(-2, -1)
AXIS_TYPES = pytest.mark.parametrize(
    "axis_type", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)


def mesh_of(axis_type=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))


def shaped(mesh, *shape, spec=()):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def specs_of(shardings):
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def trimmed(spec):
    """Without the Nones at its end, which mean nothing."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


# Which sharding


@pytest.mark.parametrize(
    ("shape", "numbers", "spec", "moments", "norm"),
    [
        # Channels (the larger side) keep theirs; the rank axis is whole.
        ((64, 256), DENSE, (None, "fsdp"), (None, "fsdp"), ()),
        ((256, 64), DENSE, ("tensor", None), (None, "tensor"), ()),
        # What divides the projected side divides the channels further.
        ((64, 256), DENSE, ("fsdp", None), (None, "fsdp"), ()),
        ((64, 256), DENSE, ("fsdp", "tensor"), (None, ("tensor", "fsdp")), ()),
        ((64, 256), DENSE, (("fsdp", "tensor"), None), (None, ("fsdp", "tensor")), ()),
        # Not where their number does not allow it.
        ((8, 65), DENSE, ("fsdp", None), (), ()),
        ((8, 66), DENSE, ("fsdp", "tensor"), (None, "tensor"), ()),
        # Layers and experts.
        ((4, 64, 256), DENSE, ("fsdp", None, "tensor"), ("fsdp", None, "tensor"), ("fsdp",)),
        # (embed, heads, head_dim) with the heads sharded, projected and not.
        ((64, 8, 16), ApolloDimensionNumbers(0, (1, 2)), ("fsdp", "tensor"),
         (None, ("tensor", "fsdp")), ()),
        ((8, 4, 64), ApolloDimensionNumbers((0, 1), 2), ("tensor", None, None),
         (None, "tensor"), ()),
    ],
)  # fmt: skip
@AXIS_TYPES
def test_moments_of_a_matrix_follow_its_batch_and_channel_axes(
    shape, numbers, spec, moments, norm, axis_type
):
    mesh = mesh_of(axis_type, fsdp=4, tensor=2)
    tx = scale_by_apollo(4, weight_dimension_numbers=numbers)
    found = specs_of(state_shardings(tx, {"w": shaped(mesh, *shape, spec=spec)}))
    assert trimmed(found.mu["w"]) == trimmed(found.nu["w"]) == moments
    assert trimmed(found.norm["w"]) == norm
    assert trimmed(found.count) == trimmed(found.key) == ()


@pytest.mark.parametrize("rule", ["factored", "factored_momentum"])
@AXIS_TYPES
def test_factors_of_a_table_follow_its_rows_and_columns(rule, axis_type):
    mesh = mesh_of(axis_type, fsdp=4, tensor=2)
    params = {"embed": shaped(mesh, 256, 128, spec=("tensor", "fsdp"))}
    tx = scale_by_apollo(4, vocabulary=rule)
    found = state_shardings(tx, params)
    assert trimmed(found.nu["embed"].spec) == ("tensor",)
    assert trimmed(found.norm["embed"].spec) == ("fsdp",)
    has_momentum = rule == "factored_momentum"
    assert trimmed(found.mu["embed"].spec) == (("tensor", "fsdp") if has_momentum else ())
    arrays = jax.tree.map(lambda p: jax.device_put(jnp.ones(p.shape), p.sharding), params)
    state = jax.jit(tx.init, out_shardings=found)(arrays)
    with jax.set_mesh(mesh):
        compiled = jax.jit(tx.update).lower(arrays, state).compile()
    assert jax.tree.map(jax.typeof, compiled(arrays, state)[1]) == jax.tree.map(jax.typeof, state)
    # Sums over an axis are all-reduced, and nothing is gathered.
    assert "all-gather" not in str(compiled.as_text())


@pytest.mark.parametrize("rule", ["factored", "factored_momentum"])
def test_a_table_trains_on_a_mesh_as_on_one_device(rule):
    mesh, tx = mesh_of(fsdp=4, tensor=2), scale_by_apollo(4, vocabulary=rule)
    grads = [{"embed": jax.random.normal(jax.random.key(n), (256, 128))} for n in range(3)]
    placed = NamedSharding(mesh, P("tensor", "fsdp"))

    def trained(place):
        update, state = jax.jit(tx.update), tx.init(place(grads[0]))
        for g in grads:
            updates, state = update(place(g), state)
        return jax.device_get((updates, state))

    alone, on_mesh = trained(lambda g: g), trained(lambda g: jax.device_put(g, placed))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(on_mesh), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "gathers"),
    [(("fsdp",), False), ((None, "fsdp"), True), ((None, "fsdp", "tensor"), True)],
)
def test_swan_moves_nothing_of_whole_layers_and_gathers_parts_of_matrices(spec, gathers):
    mesh = mesh_of(fsdp=4, tensor=2)
    params = {"w": shaped(mesh, 8, 64, 128, spec=spec)}
    tx = scale_by_swan(weight_dimension_numbers=DENSE)
    compiled = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params)).compile()
    program = str(compiled.as_text())
    assert ("all-gather" in program) is gathers
    assert ("all-reduce" in program) is gathers


def test_projections_kept_by_svd_are_whole():
    mesh = mesh_of(fsdp=4, tensor=2)
    tx = scale_by_apollo(4, projection=svd, weight_dimension_numbers=DENSE)
    params = {"w": shaped(mesh, 4, 64, 256, spec=("fsdp", "tensor"))}
    assert trimmed(state_shardings(tx, params).projection["w"].spec) == ("fsdp",)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), apollo(1e-3, 4), optax.ema(0.9)),
    "injected": lambda: optax.inject_hyperparams(apollo_mini, static_args="update_proj_gap")(1e-3),
    "multi_steps": lambda: optax.MultiSteps(apollo(1e-3, 4), 2).gradient_transformation(),
    "masked": lambda: optax.masked(apollo(1e-3, 4), {"kernel": True, "bias": False}),
    "schedule_free": lambda: optax.contrib.schedule_free(apollo(1e-3, 4), 1e-3),
    "partition": lambda: optax.partition(
        {"apollo": apollo(1e-3, 4), "adam": optax.adam(1e-3)}, {"kernel": "apollo", "bias": "adam"}
    ),
    "svd": lambda: apollo(1e-3, 4, projection=svd),
    "limited": lambda: optax.chain(optax.scale_by_adam(), limit_norm_growth(), optax.scale(-1e-3)),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=32),
    "muon": lambda: on_automatic_axes(optax.contrib.muon(1e-3)),
    "lion": lambda: optax.lion(1e-3),
    "swan": lambda: swan(1e-3),
}


# Of a kernel's state by its shape: like the kernel, its rows, its columns or bias, or low-rank.
PLACED = {
    (64, 256): ("fsdp", "tensor"),
    (64,): ("fsdp",),
    (256,): ("tensor",),
    (4, 256): (None, ("tensor", "fsdp")),
    (1, 256): (None, ("tensor", "fsdp")),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@AXIS_TYPES
def test_state_of_any_chain_is_placed_and_stays_there(name, axis_type):
    mesh = mesh_of(axis_type, fsdp=4, tensor=2)
    params = {
        "kernel": shaped(mesh, 64, 256, spec=("fsdp", "tensor")),
        "bias": shaped(mesh, 256, spec=("tensor",)),
    }
    tx = OPTIMIZERS[name]()
    shardings = state_shardings(tx, params)
    arrays = jax.tree.map(lambda p: jax.device_put(jnp.ones(p.shape), p.sharding), params)
    state = jax.jit(tx.init, out_shardings=shardings)(arrays)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert trimmed(sharding.spec) == PLACED.get(leaf.shape, ())
    assert any(leaf.shape in PLACED for leaf in jax.tree.leaves(state))
    # An update keeps its shardings by itself, but for singular vectors, where with automatic axes
    # the compiler has its own mind and has to be told.
    told: dict[str, Any] = {
        "out_shardings": (jax.tree.map(lambda p: p.sharding, params), shardings)
    }
    told = told if name == "svd" and axis_type is AxisType.Auto else {}
    with jax.set_mesh(mesh):
        _, updated = jax.jit(tx.update, **told)(arrays, state, arrays)
    assert jax.tree.map(jax.typeof, updated) == jax.tree.map(jax.typeof, state)
    for leaf, sharding in zip(jax.tree.leaves(updated), jax.tree.leaves(shardings), strict=True):
        if leaf.ndim:
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), leaf.shape


def test_norms_of_layers_and_arguments_that_are_functions_on_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit, fsdp=8)
    grads = {"layers": jax.device_put(jnp.ones((8, 4, 16)), NamedSharding(mesh, P("fsdp")))}
    tx = optax.chain(
        scale_by_apollo(2, weight_dimension_numbers=DENSE),
        limit_norm_growth(1.01, weight_dimension_numbers=DENSE),
    )
    state = jax.device_put(tx.init(grads), state_shardings(tx, grads))
    with jax.set_mesh(mesh):
        for _ in range(2):
            update, state = jax.jit(lambda g, s: tx.update(g, s, value_fn=jnp.sum))(grads, state)
    assert trimmed(jax.typeof(update["layers"]).sharding.spec) == ("fsdp",)
    assert jnp.all(jnp.isfinite(update["layers"]))
    assert state[1].norm["layers"].shape == (8,)


@AXIS_TYPES
def test_eager_init_places_the_state_by_itself(axis_type):
    mesh = mesh_of(axis_type, fsdp=8)
    params = {"w": jax.device_put(jnp.ones((64, 256)), NamedSharding(mesh, P("fsdp")))}
    tx = scale_by_apollo(4)
    state, expected = tx.init(params), state_shardings(tx, params)
    for field in ("mu", "nu", "norm"):
        leaf = getattr(state, field)["w"]
        assert leaf.sharding.is_equivalent_to(getattr(expected, field)["w"], leaf.ndim)


def test_arrays_shapes_and_shardings_are_the_same_question():
    mesh = mesh_of(fsdp=4, tensor=2)
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    shape = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    tx = apollo(1e-3, 4)
    answers = [
        state_shardings(tx, {"w": jax.device_put(jnp.ones(shape.shape), sharding)}),
        state_shardings(tx, {"w": shaped(mesh, 64, 256, spec=("fsdp", "tensor"))}),
        state_shardings(tx, {"w": shape}, {"w": sharding}),
    ]
    assert answers[0] == answers[1] == answers[2]


def test_nothing_runs_and_nothing_is_allocated():
    mesh = mesh_of(fsdp=8)
    params = {"w": shaped(mesh, 2**20, 2**20, spec=("fsdp",))}
    assert state_shardings(optax.adam(1e-3), params)[0].mu["w"].spec == P("fsdp", None)


@pytest.mark.parametrize(
    ("params", "shardings", "match"),
    [
        (lambda _: {"w": jnp.ones((4, 8))}, None, r"w has no NamedSharding .*place the parameters"),
        (lambda _: {}, None, "0 shardings and 0 parameters"),
        (
            lambda mesh: {"w": shaped(mesh, 4, 8)},
            {"w": None},
            "0 shardings and 1 parameters",
        ),
        (
            lambda mesh: {"a": shaped(mesh, 4, 8), "b": shaped(mesh_of(other=8), 4, 8)},
            None,
            r"b is sharded over .*other.*, a over .*fsdp.*one mesh",
        ),
    ],
)
def test_parameters_without_one_mesh_are_refused(params, shardings, match):
    with pytest.raises(ValueError, match=match):
        state_shardings(apollo(1e-3, 4), params(mesh_of(fsdp=8)), shardings)


# Flax's axis names


def low_rank_on_the_parameters_nodes():
    """What not to do: low-rank moments in the parameters' own boxes, whose names do not fit."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros((1, p.shape[1])), params)

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


class NnxModel(nnx.Module):
    def __init__(self):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("model", None))
        self.dense = nnx.Linear(16, 24, kernel_init=kernel, rngs=nnx.Rngs(0))


def test_the_low_rank_state_of_nnx_has_the_axis_names_that_fit_it():
    tx = apollo(1e-3, 4, weight_dimension_numbers=transformer_dimension_numbers)
    mesh = mesh_of(model=8)
    with jax.set_mesh(mesh):
        model = NnxModel()
        naive = optax.masked(low_rank_on_the_parameters_nodes(), lambda p: jax.tree.map(
            lambda leaf: leaf.ndim == 2, p))  # fmt: skip
        with pytest.raises(ValueError, match="axis 0 is partitioned 8 times"):
            nnx.Optimizer(model, naive, wrt=nnx.Param)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = nnx.state(model, nnx.Param)
        expected = state_shardings(tx, params)
    mu = optimizer.opt_state[0].mu["dense"]["kernel"][...]
    placed = expected[0].mu["dense"]["kernel"].get_value()
    assert trimmed(placed.spec) == (None, "model")
    assert mu.sharding.is_equivalent_to(placed, 2)
    with jax.set_mesh(mesh):
        abstract = nnx.state(nnx.eval_shape(NnxModel), nnx.Param)
    named = nnx.get_named_sharding(abstract, mesh)
    again = state_shardings(tx, abstract, named)
    assert jax.tree.leaves(specs_of(again)) == jax.tree.leaves(specs_of(expected))


def test_the_low_rank_state_of_linen_has_the_axis_names_that_fit_it():
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None))
    dense = nn.Dense(24, kernel_init=kernel, use_bias=False)
    boxed = jax.eval_shape(dense.init, jax.random.key(0), jnp.ones((1, 16)))["params"]
    mesh = mesh_of(model=8)
    params = nn.get_sharding(boxed, mesh)

    def init(tx, shardings):
        def make():
            return tx.init(dense.init(jax.random.key(0), jnp.ones((1, 16)))["params"])

        return jax.jit(make, out_shardings=shardings)()

    naive = low_rank_on_the_parameters_nodes()
    with pytest.raises(ValueError, match="axis 0 is partitioned 8 times"):
        init(naive, nn.get_sharding(jax.eval_shape(naive.init, boxed), mesh))
    tx = apollo(1e-3, 4, weight_dimension_numbers=transformer_dimension_numbers)
    state = init(tx, state_shardings(tx, boxed, params))
    assert trimmed(state[0].mu["kernel"].value.sharding.spec) == (None, "model")
    # Adam's moments are in boxes like the parameters', with their sharding.
    adam = init(optax.adam(1e-3), state_shardings(optax.adam(1e-3), boxed, params))
    assert trimmed(adam[0].mu["kernel"].value.sharding.spec) == ("model",)


# By Flax's own patterns: the names of the state's boxes, nothing of this package's

FOUR = {
    "apollo": lambda: apollo(0.01, 8, weight_dimension_numbers=transformer_dimension_numbers),
    "apollo_mini": lambda: apollo_mini(
        0.01, weight_dimension_numbers=transformer_dimension_numbers
    ),
    "multi_steps": lambda: optax.MultiSteps(
        apollo(0.01, 8, weight_dimension_numbers=transformer_dimension_numbers), 2
    ).gradient_transformation(),
}
BY_FLAX = pytest.mark.parametrize("name", FOUR)
TOKENS = jax.random.randint(jax.random.key(1), (16,), 0, 64)


def mesh_of_four():
    return jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:4])


class NnxDecoder(nnx.Module):
    def __init__(self, partitioned=True):
        def init(*names):
            plain = nnx.initializers.lecun_normal()
            return nnx.with_partitioning(plain, names) if partitioned else plain

        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(64, 32, embedding_init=init("fsdp", None), rngs=rngs)
        self.up = nnx.Linear(32, 128, kernel_init=init("fsdp", None), rngs=rngs)
        self.down = nnx.Linear(128, 32, kernel_init=init("fsdp", None), rngs=rngs)

    def __call__(self, tokens):
        return self.down(nnx.relu(self.up(self.embed(tokens))))


def nnx_made(tx, partitioned=True):
    """Flax's guide: a model and an optimizer sharded by the partition specs of their state."""

    @nnx.jit
    def make():
        model = NnxDecoder(partitioned)
        both = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
        if partitioned:
            state = nnx.state(both)
            specs = nnx.get_partition_spec(state)
            nnx.update(both, jax.lax.with_sharding_constraint(state, specs))
        return both

    return make()


@nnx.jit
def nnx_step(model, optimizer):
    grads = nnx.grad(lambda model: jnp.mean((model(TOKENS) - 1) ** 2))(model)
    optimizer.update(model, grads)


def bytes_of_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def held(optimizer):
    return bytes_of_a_device(nnx.state(optimizer, nnx.optimizer.OptState))


@BY_FLAX
def test_a_device_holds_its_share_of_the_state_by_nnxs_own_pattern(name, tmp_path):
    tx, adamw = FOUR[name](), optax.adamw(1e-3)
    if name == "multi_steps":
        adamw = optax.MultiSteps(adamw, 2).gradient_transformation()
    mesh = mesh_of_four()
    with jax.set_mesh(mesh):
        model, optimizer = nnx_made(tx)
        share, of_adamw = held(optimizer), held(nnx_made(adamw)[1])
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(optimizer)))
        assert share < of_adamw
        assert share < 0.3 * whole
        for _ in range(2):
            nnx_step(model, optimizer)
        assert held(optimizer) <= share

        state = nnx.state((model, optimizer))
        abstract = nnx.state(nnx.eval_shape(lambda: nnx_made(tx)))
        targets = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            nnx.get_named_sharding(abstract, mesh),
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", targets)
        other = nnx_made(tx)
        nnx.update(other, restored)
        assert held(other[1]) == share
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
        nnx_step(*other)
        nnx_step(model, optimizer)
    for a, b in zip(
        jax.tree.leaves(nnx.state(other)), jax.tree.leaves(nnx.state((model, optimizer))),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(a, b)


@BY_FLAX
def test_nnxs_own_pattern_trains_as_one_device_does(name):
    tx = FOUR[name]()
    alone = nnx_made(tx, partitioned=False)
    with jax.set_mesh(mesh_of_four()):
        sharded = nnx_made(tx)
        for _ in range(3):
            nnx_step(*sharded)
    for _ in range(3):
        nnx_step(*alone)
    pure = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model, _ in (sharded, alone)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *pure)


class LinenDecoder(nn.Module):
    boxed: Any

    @nn.compact
    def __call__(self, tokens):
        def init(*names):
            plain = nn.initializers.lecun_normal()
            return self.boxed(plain, names) if self.boxed else plain

        x = nn.Embed(64, 32, embedding_init=init("fsdp", None), name="embed")(tokens)
        x = nn.relu(nn.Dense(128, kernel_init=init("fsdp", None), name="up")(x))
        return nn.Dense(32, kernel_init=init("fsdp", None), name="down")(x)


def linen_made(tx, boxed):
    model = LinenDecoder(boxed)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def linen_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, TOKENS) - 1) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@pytest.mark.parametrize(
    ("name", "boxed"),
    [
        ("apollo", nn.with_partitioning),
        ("apollo_mini", nn.with_logical_partitioning),
        ("multi_steps", nn.with_logical_partitioning),
    ],
    ids=["apollo", "apollo_mini", "multi_steps"],
)
def test_a_device_holds_its_share_of_the_state_by_linens_own_pattern(name, boxed):
    mesh = mesh_of_four()

    def sharded(tx):
        make = functools.partial(linen_made, tx, boxed)
        abstract = jax.eval_shape(make)
        shardings = nn.get_sharding(abstract, mesh)
        if boxed is nn.with_logical_partitioning:
            specs = nn.get_partition_spec(abstract)
            shardings = nn.logical_to_mesh_sharding(specs, mesh, [("fsdp", "fsdp")])
        return jax.jit(make, out_shardings=shardings)()

    tx, adamw = FOUR[name](), optax.adamw(1e-3)
    if name == "multi_steps":
        adamw = optax.MultiSteps(adamw, 2).gradient_transformation()
    state, alone = sharded(tx), linen_made(tx, None)
    share = bytes_of_a_device(state.opt_state)
    assert share < bytes_of_a_device(sharded(adamw).opt_state)
    assert share < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    for _ in range(2):
        state, alone = linen_step(state), linen_step(alone)
    assert bytes_of_a_device(state.opt_state) <= share
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_on_an_explicit_mesh_nnx_shards_the_state_by_its_names():
    tx = apollo(0.01, 4, weight_dimension_numbers=transformer_dimension_numbers)
    with jax.set_mesh(mesh_of(AxisType.Explicit, model=8)):
        model = NnxModel()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx.state(model, nnx.Param))
    mu = optimizer.opt_state[0].mu["dense"]["kernel"]
    assert trimmed(mu[...].sharding.spec) == (None, "model")
    assert trimmed(jax.typeof(mu[...]).sharding.spec) == (None, "model")


# The same trajectory on any mesh

NUMBERS = {
    "dense": DENSE,
    "layers": DENSE,
    "heads": ApolloDimensionNumbers(-3, (-2, -1)),
    "experts": DENSE,
    "more": DENSE,
    "bias": None,
}
SHAPES = {
    "dense": (16, 32),
    "layers": (3, 32, 16),
    "heads": (16, 8, 4),
    "experts": (8, 16, 24),
    "more": (3, 16, 8),
    "bias": (32,),
}
MESHES: dict[str, tuple[dict[str, int], dict[str, tuple[Any, ...]]]] = {
    "data_parallel": ({"data": 8}, {}),
    "fsdp_rows": (
        {"data": 8},
        {"dense": ("data",), "layers": (None, "data"), "heads": ("data",),
         "experts": (None, "data"), "bias": ("data",)},
    ),
    "fsdp_columns": (
        {"data": 8},
        {"dense": (None, "data"), "layers": (None, None, "data"), "heads": (None, "data"),
         "experts": (None, None, "data"), "more": (None, None, "data")},
    ),
    "tensor_parallel": (
        {"tensor": 8},
        {"dense": (None, "tensor"), "layers": (None, "tensor"), "heads": (None, "tensor"),
         "experts": ("tensor",), "more": (None, "tensor"), "bias": ("tensor",)},
    ),
    "two_axes": (
        {"data": 4, "tensor": 2},
        {"dense": ("data", "tensor"), "layers": (None, "tensor", "data"),
         "heads": ("data", "tensor"), "experts": ("tensor", "data"), "bias": ("tensor",)},
    ),
}  # fmt: skip
STEPS = 9  # one more than until the second projection
ON_MESHES = pytest.mark.parametrize(
    ("name", "axis_type"),
    [("two_axes", AxisType.Explicit)]
    + [pytest.param("two_axes", AxisType.Auto, marks=pytest.mark.slow)]
    + [
        pytest.param(name, AxisType.Auto, marks=pytest.mark.release)
        for name in MESHES
        if name != "two_axes"
    ],
)


def start():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {n: jax.random.normal(k, SHAPES[n]) for n, k in zip(SHAPES, keys, strict=True)}


def loss(params, batch):
    """Pulls every weight to a target of its own, by an amount that depends on the batch."""

    def distance(name):
        weights = params[name]
        target = jnp.cos(jnp.arange(weights.size, dtype=jnp.float32)).reshape(weights.shape)
        pull = jnp.mean(batch[:, :1] ** 2) * (weights - target) + jnp.mean(batch[:, 1:])
        return jnp.mean(jnp.square(pull))

    return sum(distance(name) for name in params)


def transformations():
    return {
        "apollo": apollo(
            0.02, 4, update_proj_gap=7, weight_dimension_numbers=NUMBERS, weight_decay=0.01
        ),
        "apollo_mini": apollo_mini(
            0.01, update_proj_gap=7, scale=1.0, weight_dimension_numbers=NUMBERS
        ),
    }


def trained(params, batches):
    """Trains with each transformation; the gradients have the parameters' shardings."""
    txs = transformations()
    types = jax.tree.map(lambda p: jax.typeof(p).sharding, params)

    @jax.jit
    def step(trees, states, batch):
        def updated(tx, params, state):
            grads = jax.grad(loss)
            if AxisType.Explicit in jax.typeof(params["dense"]).sharding.mesh.axis_types:
                grads = jax.sharding.auto_axes(grads, out_sharding=types)
            updates, state = tx.update(grads(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        moved = {name: updated(txs[name], trees[name], states[name]) for name in txs}
        return {n: p for n, (p, _) in moved.items()}, {n: s for n, (_, s) in moved.items()}

    trees, states = dict.fromkeys(txs, params), {n: tx.init(params) for n, tx in txs.items()}
    for batch in batches:
        # One at a time: on few cores the collectives of two runs can wait for each other's threads.
        trees, states = jax.block_until_ready(step(trees, states, batch))
    return trees, states


def batches():
    return [jax.random.normal(jax.random.key(100 + i), (8, 3)) for i in range(STEPS)]


@functools.cache
def trained_on_one_device():
    return jax.device_get(trained(start(), batches()))


def placed_on(mesh, specs):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, P(*specs.get(name, ()))))
        for name, leaf in start().items()
    }


@ON_MESHES
def test_trajectory_is_the_same_on_any_mesh(name, axis_type):
    sizes, specs = MESHES[name]
    mesh = mesh_of(axis_type, **sizes)
    rows = NamedSharding(mesh, P("data" if "data" in sizes else None))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(batch, rows) for batch in batches()]
        params, states = trained(placed_on(mesh, specs), sharded)
    expected_params, expected_states = trained_on_one_device()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected_params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        states,
        expected_states,
    )


@ON_MESHES
def test_projections_are_bit_identical_on_any_mesh(name, axis_type):
    """With b1 = 0 and an identity for a gradient, the first moment is P."""
    sizes, specs = MESHES[name]
    mesh = mesh_of(axis_type, **sizes)
    tx = scale_by_apollo(4, b1=0.0, weight_dimension_numbers=DENSE)
    gradient = {"dense": jnp.eye(16, 32)}
    _, one = jax.jit(tx.update)(gradient, tx.init(gradient))
    sharding = NamedSharding(mesh, P(*specs.get("dense", ())))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(gradient, sharding)
        _, many = jax.jit(tx.update)(sharded, tx.init(sharded))
    np.testing.assert_array_equal(many.mu["dense"], one.mu["dense"])
    assert jnp.any(one.mu["dense"] != 0)


@AXIS_TYPES
def test_weights_are_rounded_alike_on_any_mesh(axis_type):
    mesh = mesh_of(axis_type, data=4, tensor=2)
    weights = {"w": jnp.linspace(-1, 1, 512 * 64).reshape(512, 64)}
    updates = {"w": jnp.full((512, 64), 1e-3)}
    sharding = NamedSharding(mesh, P("data", "tensor"))
    key = jax.random.key(0)

    def rounded(weights, updates):
        in_bf16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
        in_int8 = quantization.quantize(weights)
        return (
            apply_updates_stochastic(in_bf16, updates, key),
            quantization.apply_updates(in_int8, updates, key),
        )

    expected = jax.jit(rounded)(weights, updates)
    with jax.set_mesh(mesh):
        actual = jax.jit(rounded)(*jax.device_put((weights, updates), sharding))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@AXIS_TYPES
def test_groups_of_int8_may_be_larger_than_a_devices_share(axis_type):
    mesh = mesh_of(axis_type, fsdp=8)
    quantized = quantization.quantize({"w": jax.random.normal(jax.random.key(0), (256, 16))})
    updates = {"w": jnp.full((256, 16), 1e-3)}
    by_rows = NamedSharding(mesh, P("fsdp"))  # 32 rows a device, in two groups of 128
    placed = quantization.QArray(
        jax.device_put(quantized["w"].qvalue, by_rows),
        jax.device_put(quantized["w"].scale, NamedSharding(mesh, P())),
    )

    @jax.jit
    def moved(params, updates):
        moved = quantization.apply_updates(params, updates, jax.random.key(1))
        return moved, quantization.dequantize(moved)

    with jax.set_mesh(mesh):
        actual = moved({"w": placed}, jax.device_put(updates, by_rows))
    jax.tree.map(np.testing.assert_array_equal, actual, moved(quantized, updates))
    if axis_type is AxisType.Explicit:
        assert jax.typeof(actual[1]["w"]).sharding.spec == P("fsdp", None)


# Nothing is gathered

COMPILED_SHAPES = {"wide": (4, 256, 1024), "tall": (4, 1024, 256), "square": (4, 512, 512)}
COMPILED_SPECS = {
    "data_parallel": (),
    "fsdp_rows": (None, "fsdp", None),
    "fsdp_columns": (None, None, "fsdp"),
    "tensor_parallel": (None, None, "tensor"),
    "two_axes": (None, "fsdp", "tensor"),
    "two_axes_swapped": (None, "tensor", "fsdp"),
}


def assert_only_low_rank_numbers_move(target, shape, spec, rank):
    """The collectives of an update have no more than the low-rank product and the factors."""
    mesh = planning.mesh_for(target, {"fsdp": 4, "tensor": 2})
    tx = scale_by_apollo(
        rank,
        granularity="channel" if rank > 1 else "tensor",
        weight_dimension_numbers=DENSE,
    )
    gradient = {"w": shaped(mesh, *shape, spec=spec)}
    shardings = state_shardings(tx, gradient)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}),
        shardings,
    )
    plan = planning.compile_for(
        target,
        lambda gradient, state: tx.update(gradient, state),
        gradient,
        state,
        donate_argnums=(0, 1),
        out_shardings=({"w": gradient["w"].sharding}, shardings),
        mesh=mesh,
    )
    layers, channels = shape[0], max(shape[1:])
    low_rank_bytes = 4 * layers * rank * channels
    factor_bytes = 4 * layers * channels
    assert plan.collective_bytes is not None
    assert plan.collectives is not None
    assert plan.collective_bytes <= low_rank_bytes + 4 * factor_bytes + 64 * layers
    gathered = plan.collectives.get("all-gather", planning.Collective(0, 0)).bytes
    assert gathered <= factor_bytes


both_ranks = pytest.mark.parametrize("rank", [1, 32])
each_shape = pytest.mark.parametrize("shape", COMPILED_SHAPES.values(), ids=COMPILED_SHAPES)
each_spec = pytest.mark.parametrize("spec", COMPILED_SPECS.values(), ids=COMPILED_SPECS)


@pytest.mark.optimized
@pytest.mark.slow
@both_ranks
@each_spec
def test_no_gradient_is_gathered(spec, rank):
    """Each specification at both ranks, with two of the shapes; on chips with all."""
    number = list(COMPILED_SPECS.values()).index(spec) + (rank == 1)
    shape = list(COMPILED_SHAPES.values())[number % len(COMPILED_SHAPES)]
    assert_only_low_rank_numbers_move("cpu:8", shape, spec, rank)


@pytest.mark.planning
@pytest.mark.optimized
@pytest.mark.parametrize("target", ["a100-80gb:8", "tpu-v5e:2x4"])
@both_ranks
@each_shape
@each_spec
def test_no_gradient_is_gathered_on_chips(target, shape, spec, rank):
    assert_only_low_rank_numbers_move(target, shape, spec, rank)
