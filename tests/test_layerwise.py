import collections
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    layerwise,
    planning,
    transformer_dimension_numbers,
)
from examples.llama import model as llama
from examples.llama.config import LlamaConfig

CONFIG = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2)
LLAMA = layerwise.LayerwiseModel(
    embed=lambda rest, batch: llama.embed(CONFIG, rest, batch[:, :-1], jnp.float32),
    block=functools.partial(llama.block, CONFIG),
    loss=lambda rest, x, batch: jnp.mean(
        llama.cross_entropy(llama.logits(CONFIG, rest, x), batch[:, 1:])
    ),
)
SPECS: dict[str, Any] = {"weight_dimension_numbers": transformer_dimension_numbers}
OPTIMIZERS = {
    "apollo": lambda: apollo_optax.apollo(0.003, 4, update_proj_gap=5, **SPECS),
    "apollo_mini": lambda: apollo_optax.apollo_mini(
        0.001, update_proj_gap=5, scale=1.0, **SPECS, weight_decay=0.1
    ),
    "swan": lambda: apollo_optax.swan(0.001, **SPECS, adam_learning_rate=0.01),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.01, 0.0, 30), weight_decay=0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(0.01, weight_decay=0.1),
    "limited": lambda: optax.chain(
        optax.scale_by_adam(), apollo_optax.limit_norm_growth(**SPECS), optax.scale(-0.01)
    ),
}


def llama_params(seed=0):
    params = llama.init_params(CONFIG, seed)
    return {"blocks": params.pop("blocks"), "rest": params}


def tokens(step):
    """Rows that count upwards from a random token: something to learn in a few steps."""
    first = jax.random.randint(jax.random.key(step), (4, 1), 0, CONFIG.vocab_size)
    return (first + jnp.arange(9)[None, :]) % CONFIG.vocab_size


BATCHES = [tokens(step) for step in range(8)]


def ordinary_step(model, tx):
    """The step without this module: a gradient of the whole stacked tree."""

    def loss_of(params, batch):
        def block(x, layer):
            out = model.block(layer, x)
            return out if model.has_aux else (out, ())

        x, aux = jax.lax.scan(block, model.embed(params["rest"], batch), params["blocks"])
        aux = [jax.tree.map(lambda a: a.sum(0), aux)] if model.has_aux else []
        return model.loss(params["rest"], x, batch, *aux)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def trained(step, params, state, batches):
    losses = []
    for batch in batches:
        # One at a time: on few cores the collectives of two runs can wait for each other's threads.
        params, state, loss = jax.block_until_ready(step(params, state, batch))
        losses.append(loss)
    return params, state, jnp.stack(losses)


def assert_same_training(model, tx, params, batches, tolerance=1e-6, **options):
    expected = trained(ordinary_step(model, tx), params, tx.init(params), batches)
    step = jax.jit(layerwise.make_step(model, tx, **options))
    actual = trained(step, params, layerwise.init(tx, params), batches)
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_dtypes(actual, expected)

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))

    jax.tree.map(assert_close, actual, expected)


def slow_but(quick, names):
    """Parameters, all but these in the slow tier."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in names]


@pytest.mark.parametrize("name", slow_but(("apollo_mini", "adamw"), OPTIMIZERS))
def test_llama_trains_as_by_the_ordinary_step(name):
    assert_same_training(LLAMA, OPTIMIZERS[name](), llama_params(), BATCHES)


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [
        pytest.param("apollo_mini", "factored", marks=pytest.mark.slow),
        pytest.param("swan", "factored_momentum", marks=pytest.mark.slow),
        pytest.param("apollo_mini", "factored_momentum", marks=pytest.mark.release),
        pytest.param("swan", "factored", marks=pytest.mark.release),
    ],
)
def test_small_rules_of_the_vocabulary_train_as_by_the_ordinary_step(name, vocabulary):
    config = LlamaConfig(
        vocab_size=160, hidden_size=128, intermediate_size=64, num_layers=2, num_heads=2
    )
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: llama.embed(config, rest, batch[:, :-1], jnp.float32),
        block=functools.partial(llama.block, config),
        loss=lambda rest, x, batch: jnp.mean(
            llama.cross_entropy(llama.logits(config, rest, x), batch[:, 1:])
        ),
    )
    params = llama.init_params(config, 0)
    make = getattr(apollo_optax, name)
    # An entry whose gradient is near its rounding has an update of the rate's size all the same.
    rates = {"learning_rate": 0.001, "vocabulary_learning_rate": 0.002}
    # In bfloat16 the orders of two sums may be a last bit apart.
    tx = make(**rates, vocabulary=vocabulary, mu_dtype=jnp.float32, **SPECS)
    given = {"blocks": params.pop("blocks"), "rest": params}
    state = tx.init(given)
    assert state[0].nu["rest"]["embed"]["embedding"].shape == (160,)
    assert_same_training(model, tx, given, BATCHES[:4], tolerance=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        jax.checkpoint_policies.everything_saveable,
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ],
)
def test_what_the_forward_pass_keeps_does_not_change_the_numbers(policy):
    tx = OPTIMIZERS["sgd"]()
    assert_same_training(LLAMA, tx, llama_params(), BATCHES[:3], policy=policy)


def test_svd_projections_of_layers_are_kept_in_place():
    # Singular vectors amplify rounding: a looser tolerance, fewer steps.
    tx = apollo_optax.apollo(0.003, 4, update_proj_gap=2, projection=apollo_optax.svd, **SPECS)
    assert_same_training(LLAMA, tx, llama_params(), BATCHES[:5], tolerance=1e-5)


def test_a_policy_keeps_activations_and_never_weights():
    def kept_bytes(policy):
        step = layerwise.make_step(LLAMA, optax.sgd(0.1), policy=policy)
        params = llama_params()
        closed = jax.make_jaxpr(step)(params, optax.sgd(0.1).init(params), tokens(0))
        forward = next(eqn for eqn in closed.eqns if eqn.primitive.name == "scan")
        stacked: list[Any] = [v.aval for v in forward.outvars[forward.params["num_carry"] :]]
        layers = {(leaf.shape[0], 1, *leaf.shape[1:]) for leaf in jax.tree.leaves(params["blocks"])}
        assert not layers & {aval.shape for aval in stacked}
        return sum(aval.size * aval.dtype.itemsize for aval in stacked)

    policies = jax.checkpoint_policies
    block_inputs = CONFIG.num_layers * 4 * 8 * CONFIG.hidden_size * 4
    # JAX before 0.9 keeps a few scalars a layer besides.
    assert block_inputs <= kept_bytes(None) < 1.05 * block_inputs
    assert kept_bytes(policies.dots_with_no_batch_dims_saveable) > 3 * block_inputs


EXPERTS = ApolloDimensionNumbers(-2, -1)


def expert_params():
    key = iter(jax.random.split(jax.random.key(3), 5))
    normal = lambda *shape: 0.3 * jax.random.normal(next(key), shape)  # noqa: E731
    return {
        "blocks": {
            "router": {"kernel": normal(3, 8, 4)},
            "experts": {"wi": normal(3, 4, 8, 12), "wo": normal(3, 4, 12, 8)},
        },
        "rest": {"embed": normal(8, 8), "head": normal(8, 5)},
    }


def expert_block(block, x):
    """A mixture of experts, each token sent to the one the router scores highest."""
    scores = jax.nn.softmax(x @ block["router"]["kernel"])
    chosen = jax.nn.one_hot(jnp.argmax(scores, -1), 4)
    hidden = jax.nn.relu(jnp.einsum("td,edh->teh", x, block["experts"]["wi"]))
    out = jnp.einsum("teh,ehd->ted", hidden, block["experts"]["wo"])
    balance = 4 * jnp.sum(chosen.mean(0) * scores.mean(0))
    return x + jnp.einsum("ted,te->td", out, chosen * scores), {"balance": balance}


MIXTURE = layerwise.LayerwiseModel(
    embed=lambda rest, batch: batch @ rest["embed"],
    block=expert_block,
    loss=lambda rest, x, batch, aux: (
        jnp.mean((x @ rest["head"] - batch[:, :5]) ** 2) + 0.1 * aux["balance"]
    ),
    has_aux=True,
)
EXPERT_BATCHES = [jax.random.normal(jax.random.key(step), (16, 8)) for step in range(8)]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: apollo_optax.apollo(0.01, 4, update_proj_gap=5, **SPECS), marks=pytest.mark.slow
        ),
        lambda: apollo_optax.apollo_mini(0.01, update_proj_gap=5, **SPECS),
        lambda: optax.adamw(0.01),
    ],
    ids=["apollo", "apollo_mini", "adamw"],
)
def test_mixture_of_experts_with_auxiliary_loss_trains_as_by_the_ordinary_step(make):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), expert_params())
        batches = [jnp.asarray(batch, jnp.float64) for batch in EXPERT_BATCHES]
        # In float64 what is left is the same computation up to the order of its sums.
        assert_same_training(MIXTURE, make(), params, batches, tolerance=1e-10)


def test_rest_read_at_both_ends_gets_both_gradients():
    tied = LLAMA._replace(
        loss=lambda rest, x, batch: jnp.mean(
            llama.cross_entropy(x @ rest["embed"]["embedding"].T, batch[:, 1:])
        )
    )
    assert_same_training(tied, optax.adamw(0.01), llama_params(), BATCHES[:5])


def test_the_branch_for_gpus_computes_the_same(monkeypatch):
    def on_gpu(*args, default, cuda=None, cpu=None):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpu)
    step = layerwise.make_step(LLAMA, optax.adamw(0.01))
    state = layerwise.init(optax.adamw(0.01), llama_params())
    assert "cond[" in str(jax.make_jaxpr(step)(llama_params(), state, BATCHES[0]))
    assert_same_training(LLAMA, optax.adamw(0.01), llama_params(), BATCHES[:5])


def test_rest_may_be_any_tree():
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: batch * rest[0],
        block=lambda block, x: jnp.tanh(x @ block),
        loss=lambda rest, x, batch: jnp.mean((x - rest[1]) ** 2),
    )
    params = {"blocks": jnp.stack([jnp.eye(4)] * 2), "rest": (jnp.ones(4), jnp.zeros(4))}
    batches = [jax.random.normal(jax.random.key(s), (6, 4)) for s in range(5)]
    with jax.numpy_rank_promotion("allow"):
        assert_same_training(model, optax.adam(0.01), params, batches)


class Ends(NamedTuple):
    first: Any
    last: Any


RESTS = {
    "int keys": ({0: jnp.ones(4), 1: jnp.zeros(4)}, 0, 1),
    "tuple keys": ({(0, 1): jnp.ones(4), (0, 2): jnp.zeros(4)}, (0, 1), (0, 2)),
    "names": ({"in": jnp.ones(4), "out": jnp.zeros(4)}, "in", "out"),
    "list": ([jnp.ones(4), jnp.zeros(4)], 0, 1),
    "ordered": (collections.OrderedDict(b=jnp.ones(4), a=jnp.zeros(4)), "b", "a"),
    "record": (Ends(jnp.ones(4), jnp.zeros(4)), 0, 1),
}


FOR_ADAM: dict[str, Any] = {
    "weight_dimension_numbers": lambda params: jax.tree.map(lambda _: None, params)
}


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("optimizer", [optax.adam, apollo_optax.apollo])
def test_both_ends_get_their_gradients_whatever_their_keys_are(rest, optimizer):
    tree, first, last = RESTS[rest]
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: batch * rest[first],
        block=lambda block, x: x * block,
        loss=lambda rest, x, batch: jnp.mean((x - rest[last] - 1) ** 2),
    )
    params = {"blocks": jnp.ones((2, 4)), "rest": tree}
    tx = optimizer(0.1) if optimizer is optax.adam else optimizer(0.1, **FOR_ADAM)
    assert_same_training(model, tx, params, [jnp.arange(1.0, 5.0)] * 2)


TREES_OF_CHOICES = {
    "mask": lambda: optax.adamw(
        0.1, weight_decay=0.5, mask={"blocks": {"w": True}, "rest": {"in": False, "out": True}}
    ),
    "mask of subtrees": lambda: optax.adamw(
        0.1, weight_decay=0.5, mask={"blocks": False, "rest": True}
    ),
    "mask of a function of the whole": lambda: optax.adamw(
        0.1, weight_decay=0.5, mask=lambda p: {"blocks": True, "rest": {"in": True, "out": False}}
    ),
    "labels": lambda: optax.partition(
        {"trained": optax.adam(0.1), "frozen": optax.set_to_zero(), "moved": optax.sgd(0.1, 0.9)},
        {"blocks": {"w": "trained"}, "rest": {"in": "moved", "out": "frozen"}},
    ),
}


@pytest.mark.parametrize("name", TREES_OF_CHOICES)
def test_masks_and_labels_may_be_trees(name):
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: batch * rest["in"],
        block=lambda block, x: x * block["w"],
        loss=lambda rest, x, batch: jnp.mean((x * rest["out"] - 3) ** 2),
    )
    ends = {"in": jnp.ones(4), "out": jnp.full(4, 0.5)}
    params = {"blocks": {"w": jnp.ones((2, 4))}, "rest": ends}
    assert_same_training(model, TREES_OF_CHOICES[name](), params, [jnp.arange(1.0, 5.0)] * 2)


@pytest.mark.parametrize("make", [layerwise.make_step, layerwise.make_guarded_step])
def test_stochastic_rounding_without_a_key_is_refused(make):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), roots_params())
    tx = optax.sgd(0.1)
    step = jax.jit(make(ROOTS, tx, weights=layerwise.STOCHASTIC))
    state = layerwise.init(tx, params, weights=layerwise.STOCHASTIC)
    with pytest.raises(ValueError, match="needs a PRNG key, got None. Pass another key at each"):
        jax.eval_shape(step, params, state, jnp.ones((2, 4), jnp.bfloat16))


@pytest.mark.slow
def test_stochastic_rounding_moves_bfloat16_weights_by_the_update_in_expectation():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), llama_params())
    tx = optax.sgd(1e-3)
    step = jax.jit(layerwise.make_step(LLAMA, tx, weights=layerwise.STOCHASTIC))
    state = layerwise.init(tx, params)
    moved = [step(params, state, tokens(0), jax.random.key(seed))[0] for seed in range(200)]
    mean = jax.tree.map(lambda *p: jnp.mean(jnp.stack(p).astype(jnp.float32), 0), *moved)
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected, *_ = ordinary_step(LLAMA, tx)(exact, tx.init(exact), tokens(0))

    def moved_along(start, mean, expected):
        return jnp.vdot(mean - start, expected - start), jnp.vdot(
            expected - start, expected - start
        )

    for part in ("blocks", "rest"):
        pairs = jax.tree.map(moved_along, exact[part], mean[part], expected[part])
        along, full = np.sum(jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple)), axis=0)
        assert along / full == pytest.approx(1, abs=0.1)


def test_layers_round_with_randomness_of_their_own():
    params = {"blocks": jnp.ones((2, 64), jnp.bfloat16), "rest": {}}
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: batch,
        block=lambda block, x: x + block,
        loss=lambda rest, x, batch: jnp.sum(x),
    )
    tx = optax.sgd(1e-3)
    step = layerwise.make_step(model, tx, weights=layerwise.STOCHASTIC)
    x = jnp.ones(64, jnp.bfloat16)
    moved, *_ = step(params, layerwise.init(tx, params), x, jax.random.key(0))
    assert np.any(moved["blocks"][0] != moved["blocks"][1])


def big_model_plan(tx, *, target="cpu", sizes=None, shard=None, ordinary=False, scale=1):
    """What the step needs on a device; `shard` gives the specification of a leaf of a shape."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128 * scale,
        intermediate_size=512 * scale,
        num_layers=16,
        num_heads=2,
    )
    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: llama.embed(config, rest, batch[:, :-1], jnp.float32),
        block=functools.partial(llama.block, config),
        loss=lambda rest, x, batch: jnp.mean(
            llama.cross_entropy(llama.logits(config, rest, x), batch[:, 1:])
        ),
    )
    params = jax.eval_shape(lambda: llama.init_params(config, 0))
    params = {"blocks": params.pop("blocks"), "rest": params}
    step = ordinary_step(model, tx) if ordinary else layerwise.make_step(model, tx)
    mesh = planning.mesh_for(target, sizes or {"data": 1})
    devices = math.prod(mesh.shape.values())
    batch = jax.ShapeDtypeStruct((devices, 17), jnp.int32, sharding=NamedSharding(mesh, P("data")))

    def placed(leaf):
        spec = shard(leaf.shape) if shard else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
    params = jax.tree.map(placed, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    plan = planning.compile_for(
        target,
        step,
        params,
        state,
        batch,
        donate_argnums=(0, 1),
        out_shardings=(*shardings, None),
        mesh=mesh,
    )
    block_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(params["blocks"]))
    return plan, block_bytes, config.num_layers


def assert_peak_is_one_blocks(target, name, **options):
    plan, block_bytes, layers = big_model_plan(OPTIMIZERS[name](), target=target, **options)
    assert plan.alias_bytes > block_bytes
    # One block's weights, their gradient and its update, and activations smaller than a block.
    assert plan.temporary_bytes < 5 * block_bytes / layers
    ordinary, *_ = big_model_plan(OPTIMIZERS[name](), target=target, ordinary=True, **options)
    assert ordinary.temporary_bytes > block_bytes


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("name", ["apollo_mini", "sgd"])
def test_peak_has_no_second_copy_of_the_weights_and_no_gradient_of_many_blocks(name):
    assert_peak_is_one_blocks("cpu", name)


@pytest.mark.planning
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["apollo", "apollo_mini", "adamw"])
@pytest.mark.parametrize("target", ["a100-80gb", "tpu-v5e"])
def test_peak_on_chips_has_no_second_copy_of_the_weights_and_no_gradient_of_many_blocks(
    target, name
):
    assert_peak_is_one_blocks(target, name, scale=4)


SHARDS = {
    "data_parallel": lambda shape: P(),
    # Over the last axis, which is never the layers'.
    "fsdp": lambda shape: (
        P(*[None] * (len(shape) - 1), "data") if shape and shape[-1] % 8 == 0 else P()
    ),
}


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize(
    "shard", ["fsdp", pytest.param("data_parallel", marks=pytest.mark.release)]
)
def test_gradients_of_a_block_are_reduced_before_the_next_ones_exist(shard):
    tx = OPTIMIZERS["apollo_mini"]()
    options = {"target": "cpu:8", "sizes": {"data": 8}, "shard": SHARDS[shard]}
    plan, block_bytes, layers = big_model_plan(tx, **options)
    # No gradient waits for its reduction, and no more than a block's weights are gathered.
    assert plan.temporary_bytes < 5 * block_bytes / layers
    reduced = {
        kind: plan.collectives[kind]
        for kind in ("all-reduce", "reduce-scatter")
        if kind in plan.collectives
    }
    assert sum(each.count for each in reduced.values()) >= layers
    total = sum(each.bytes for each in reduced.values())
    assert total < 1.2 * block_bytes
    if shard == "data_parallel":  # with sharded weights XLA may reduce activations instead
        assert total > block_bytes


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        pytest.param("fsdp", "apollo_mini", marks=pytest.mark.slow),
        ("fsdp", "adamw"),
        pytest.param("data_parallel", "apollo_mini", marks=pytest.mark.release),
    ],
)
def test_sharded_over_devices_it_trains_as_on_one(shard, name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = OPTIMIZERS[name]()

    def placed(tree):
        def place(leaf):
            return jax.device_put(leaf, NamedSharding(mesh, SHARDS[shard](leaf.shape)))

        return jax.tree.map(place, tree)

    params = llama_params()
    rows = jax.device_put(
        [jnp.concatenate([tokens(step), tokens(step + 100)]) for step in range(8)],
        NamedSharding(mesh, P("data")),
    )
    step = jax.jit(layerwise.make_step(LLAMA, tx))
    expected = trained(step, params, layerwise.init(tx, params), jax.device_get(rows))
    params = placed(params)
    actual = trained(step, params, placed(layerwise.init(tx, params)), rows)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tx", "match"),
    [
        (
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
            "update of blocks/.* depends on the gradient of .*limit_norm_growth",
        ),
        (optax.apply_if_finite(optax.sgd(0.1), 3), "depends on the gradient of"),
        (
            optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
            "MultiSteps keeps a gradient of the whole model.*larger micro-batch",
        ),
        (
            apollo_optax.limit_norm_growth(),
            r"has shape \(\).*not 3 layers.*weight_dimension_numbers",
        ),
    ],
    ids=["global_norm", "apply_if_finite", "multi_steps", "norm_of_a_stack"],
)
def test_what_cannot_run_layer_by_layer_is_refused(tx, match):
    with pytest.raises(ValueError, match=match):
        layerwise.init(tx, llama_params())


class Shared(NamedTuple):
    total: Any


def with_total(of_updates):
    """Passes updates on, and keeps a number of them all."""

    def update(updates, state, params=None):
        return updates, Shared(of_updates(updates, params))

    return optax.GradientTransformation(lambda params: Shared(jnp.zeros([])), update)


@pytest.mark.parametrize(
    ("tx", "match"),
    [
        (
            with_total(lambda updates, params: optax.tree.norm(updates)),
            "state that all leaves share depends on the gradient of blocks/",
        ),
        (
            with_total(lambda updates, params: optax.tree.norm(params)),
            "state that all leaves share depends on the parameter of blocks/",
        ),
        (
            optax.stateless(lambda u, p: jax.tree.map(lambda g: g * optax.tree.norm(p), u)),
            "update of blocks/.* depends on the parameter of blocks/",
        ),
    ],
    ids=["gradients", "parameters", "update"],
)
def test_what_is_computed_of_all_leaves_is_refused(tx, match):
    with pytest.raises(ValueError, match=match):
        layerwise.check_per_leaf(tx, roots_params())


def with_noise(fold):
    """Adds noise of a key that is no part of the state."""

    def update(updates, state, params=None, *, first_layer=0, **extra_args):
        key = jax.random.fold_in(jax.random.key(0), fold(first_layer))
        noise = optax.tree.random_like(key, updates)
        return optax.tree.add(updates, noise), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.add_noise(1.0, 0.0, key=0), optax.sgd(0.1)),
        optax.add_noise(1.0, 0.0, key=jax.random.key(0)),
        optax.masked(optax.add_noise(1.0, 0.0, key=0), {"blocks": True, "rest": False}),
        with_noise(lambda layer: 0),
        optax.noisy_sgd(0.1, key=0),
    ],
    ids=["chain", "typed_key", "masked", "no_state", "noisy_sgd"],
)
def test_noise_that_is_the_same_for_all_layers_is_refused(tx):
    with pytest.raises(ValueError, match="blocks/.* is random, and does not depend on .*`first_l"):
        layerwise.init(tx, roots_params())


def test_noise_that_is_folded_with_the_layer_is_its_own():
    tx, params = with_noise(lambda layer: layer), roots_params()
    step = jax.jit(layerwise.make_step(ROOTS, tx))
    after, *_ = step(params, layerwise.init(tx, params), jnp.zeros((2, 4)))
    moved = after["blocks"]["w"] - params["blocks"]["w"]
    assert len(np.unique(moved[:, 0, 0])) == 3


def compiled(tx):
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"blocks": {}, "rest": {}}, "no leaves"),
        ({"layers": jnp.ones(3)}, r"must be a dict .*got \['layers'\]"),
        (jnp.ones(3), "got Array"),
        (
            {"blocks": {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}, "rest": {}},
            r"a has shape \(3, 2\), b",
        ),
    ],
)
def test_parameters_of_another_form_are_refused(params, match):
    with pytest.raises(ValueError, match=match):
        layerwise.init(optax.sgd(0.1), params)


ROOTS = layerwise.LayerwiseModel(
    embed=lambda rest, batch: batch * rest["scale"][None],
    # The gradient of `root` at 0 is infinite; what passes on to the layer before is not.
    block=lambda block, x: jnp.tanh(x @ block["w"]) + jnp.sum(jnp.sqrt(block["root"])),
    loss=lambda rest, x, batch: jnp.mean((x @ rest["out"]) ** 2),
)


def roots_params(bad_layer=None):
    root = jnp.ones((3, 2))
    return {
        "blocks": {
            "w": jax.random.normal(jax.random.key(0), (3, 4, 4)) / 2,
            "root": root if bad_layer is None else root.at[bad_layer, 1].set(0.0),
        },
        "rest": {"scale": jnp.ones(4), "out": jnp.ones((4, 2))},
    }


ROOTS_TX = {
    "apollo_mini": lambda: apollo_optax.apollo_mini(
        0.01,
        weight_dimension_numbers={
            "blocks": {"w": ApolloDimensionNumbers(-2, -1), "root": None},
            "rest": {"scale": None, "out": None},
        },
    ),
    "adamw": lambda: optax.adamw(0.01),
}


@pytest.mark.parametrize("name", ROOTS_TX)
def test_a_guarded_step_is_the_step_where_nothing_is_bad(name):
    tx, batch = ROOTS_TX[name](), jnp.ones((2, 4))
    plain, guarded = (
        jax.jit(make(ROOTS, tx)) for make in (layerwise.make_step, layerwise.make_guarded_step)
    )
    trees = [(roots_params(), layerwise.init(tx, roots_params())) for _ in range(2)]
    for _ in range(3):
        *plain_tree, loss = plain(*trees[0], batch)
        *guarded_tree, same_loss, report = guarded(*trees[1], batch)
        assert loss == same_loss
        assert 0 < report.largest < jnp.inf
        # Three layers, what only the loss reads and what `embed` does.
        assert report.moved == report.parts == 5
        trees = [tuple(plain_tree), tuple(guarded_tree)]
        chex.assert_trees_all_close(*trees, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "max_loss"),
    [
        (jnp.full((2, 4), jnp.nan), jnp.inf),
        (jnp.full((2, 4), jnp.inf), jnp.inf),
        (jnp.full((2, 4), 5.0), 1e-3),
    ],
    ids=["nan", "infinite", "spike"],
)
def test_a_guarded_step_leaves_everything_where_the_loss_is_too_high_or_not_finite(batch, max_loss):
    tx, params = ROOTS_TX["apollo_mini"](), roots_params()
    step = jax.jit(layerwise.make_guarded_step(ROOTS, tx))
    params, state, _, _ = step(params, layerwise.init(tx, params), jnp.ones((2, 4)))
    after, state_after, loss, report = step(params, state, batch, None, max_loss)
    assert not (jnp.isfinite(loss) and loss <= max_loss)
    assert report.moved == 0
    chex.assert_trees_all_equal((after, state_after), (params, state))


def test_a_guarded_step_leaves_all_from_the_layer_on_whose_gradient_is_infinite():
    tx, params = ROOTS_TX["adamw"](), roots_params(bad_layer=1)
    step = jax.jit(layerwise.make_guarded_step(ROOTS, tx))
    state = layerwise.init(tx, params)
    after, state_after, loss, report = step(params, state, jnp.ones((2, 4)))
    assert jnp.isfinite(loss)
    assert not jnp.isfinite(report.largest)
    # The last layer, and what only the loss reads.
    assert (report.moved, report.parts) == (2, 5)
    for before, now in ((params, after), (state[0].mu, state_after[0].mu)):
        changed = [np.any(now["blocks"]["w"][i] != before["blocks"]["w"][i]) for i in range(3)]
        assert changed == [False, False, True]
        assert np.any(now["rest"]["out"] != before["rest"]["out"])
        np.testing.assert_array_equal(now["blocks"]["root"][:2], before["blocks"]["root"][:2])
        np.testing.assert_array_equal(now["rest"]["scale"], before["rest"]["scale"])
    assert state_after[0].count == state[0].count
    chex.assert_tree_all_finite((after, state_after))


@pytest.mark.parametrize("bad", ["w", "table", "out"])
def test_a_guarded_step_sees_one_nan_in_a_large_gradient(bad):
    def x_and_nan(x, weights):
        """x, and 0 whose gradient is NaN where a weight is 0."""
        return x + 0 * jnp.sum(jnp.sqrt(jnp.abs(weights)))

    model = layerwise.LayerwiseModel(
        embed=lambda rest, batch: x_and_nan(batch @ rest["table"], rest["table"]),
        block=lambda block, x: x_and_nan(jnp.tanh(x @ block["w"]), block["w"]),
        loss=lambda rest, x, batch: jnp.mean(x_and_nan(x @ rest["out"], rest["out"]) ** 2),
    )
    w, table, out = (jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i in range(3))
    params = {"blocks": {"w": w[None]}, "rest": {"table": table, "out": out}}
    part = params["blocks" if bad == "w" else "rest"]
    part[bad] = part[bad].at[..., 3, 4].set(0.0)
    tx = optax.adamw(0.01)
    step = jax.jit(layerwise.make_guarded_step(model, tx))
    after, state, loss, report = step(params, layerwise.init(tx, params), jnp.ones((2, 64)))
    assert jnp.isfinite(loss)
    assert jnp.isnan(report.largest)
    assert report.moved == {"out": 0, "w": 1, "table": 2}[bad]
    chex.assert_tree_all_finite((after, state))


def test_a_guarded_step_without_any_gradient_changes_nothing():
    tx, params = ROOTS_TX["adamw"](), roots_params()
    params["rest"]["out"] = jnp.zeros((4, 2))
    step = jax.jit(layerwise.make_guarded_step(ROOTS, tx))
    state = layerwise.init(tx, params)
    after, state_after, _, report = step(params, state, jnp.ones((2, 4)))
    assert report.largest == report.moved == 0
    chex.assert_trees_all_equal((after, state_after), (params, state))
