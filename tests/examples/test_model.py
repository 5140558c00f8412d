import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama import model
from examples.llama.config import MODELS, LlamaConfig, RopeScaling, parameter_count

TINY = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4)


@pytest.fixture(scope="module")
def init():
    return jax.jit(functools.partial(model.init_params, TINY)).lower(0).compile()


@pytest.fixture(scope="module")
def params(init):
    return init(0)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 7), 0, TINY.vocab_size)


@pytest.fixture(scope="module")
def forward(params, tokens):
    return jax.jit(functools.partial(model.forward, TINY)).lower(params, tokens).compile()


@pytest.fixture(scope="module")
def logits(forward, params, tokens):
    return forward(params, tokens)


def loss(params, tokens, config=TINY, **kwargs):
    predicted = model.forward(config, params, tokens[:, :-1], **kwargs)
    return model.cross_entropy(predicted, tokens[:, 1:]).mean()


@pytest.fixture(scope="module")
def gradient(params, tokens):
    return jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()


def leaf_shapes(config, **kwargs):
    return jax.eval_shape(functools.partial(model.init_params, config, **kwargs), 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_as_many_as_counted(name):
    leaves = jax.tree.leaves(leaf_shapes(MODELS[name]))
    assert sum(leaf.size for leaf in leaves) == parameter_count(MODELS[name])


@pytest.mark.parametrize("name", ["nano", "1b", "13b"])
def test_a_training_step_is_traced_without_allocating(name):
    config = MODELS[name]
    tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)
    gradient = jax.grad(functools.partial(loss, config=config, dtype=jnp.bfloat16, remat=True))
    params = leaf_shapes(config, param_dtype=jnp.bfloat16)
    gradients = jax.eval_shape(gradient, params, tokens)
    assert jax.tree.map(lambda g: (g.shape, g.dtype), gradients) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )


def test_the_parameters_are_a_plain_dict_with_stacked_blocks(params):
    assert set(params) == {"embed", "blocks", "norm", "lm_head"}
    assert jax.tree.map(jnp.shape, params) == {
        "embed": {"embedding": (31, 16)},
        "blocks": {
            "attention_norm": {"scale": (3, 16)},
            "attention": {
                name: {"kernel": (3, 16, 16)} for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            },
            "mlp_norm": {"scale": (3, 16)},
            "mlp": {
                "gate_proj": {"kernel": (3, 16, 24)},
                "up_proj": {"kernel": (3, 16, 24)},
                "down_proj": {"kernel": (3, 24, 16)},
            },
        },
        "norm": {"scale": (16,)},
        "lm_head": {"kernel": (16, 31)},
    }


def test_the_parameters_are_the_modules(params):
    llama = nnx.jit(lambda: model.Llama(TINY, rngs=nnx.Rngs(jax.random.key(0))))()
    own = nnx.to_pure_dict(nnx.state(llama, nnx.Param))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-8), params, own)


def test_layers_are_converted_one_at_a_time():
    shapes = []

    def doubled(params):
        shapes.append(jax.tree.map(jnp.shape, params))
        return jax.tree.map(lambda leaf: 2 * leaf, params)

    params = model.init_params(TINY, 0, convert=doubled)
    assert shapes[0]["mlp"]["down_proj"]["kernel"] == (24, 16)
    assert set(shapes[-1]) == {"embed", "norm", "lm_head"}
    np.testing.assert_array_equal(params["blocks"]["mlp_norm"]["scale"], 2.0)


def test_matrices_start_normal_and_norms_start_at_one(params):
    leaves = jax.tree.leaves_with_path(params)
    norms = [leaf.ravel() for path, leaf in leaves if path[-1].key == "scale"]
    matrices = [leaf.ravel() for path, leaf in leaves if path[-1].key != "scale"]
    np.testing.assert_array_equal(jnp.concatenate(norms), 1.0)
    np.testing.assert_allclose(jnp.concatenate(matrices).std(), 0.02, rtol=0.03)
    assert jnp.concatenate(matrices).max() > 0.06


def test_layers_start_different_and_seeds_too(init, params):
    kernel = params["blocks"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert not np.array_equal(kernel, init(1)["blocks"]["mlp"]["up_proj"]["kernel"])


def test_bfloat16_parameters_are_the_float32_ones_rounded():
    exact, rounded = (
        model.Mlp(TINY, param_dtype=dtype, dtype=jnp.float32, rngs=nnx.Rngs(0)).up_proj.kernel[...]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(("dtype", "remat"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_the_module_computes_what_the_functions_do(tokens, params, dtype, remat):
    def build():
        return model.Llama(TINY, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    llama = nnx.merge(nnx.graphdef(nnx.eval_shape(build)), params)
    expected = jax.jit(functools.partial(model.forward, TINY, dtype=dtype))(params, tokens)
    np.testing.assert_allclose(nnx.jit(llama)(tokens), expected, atol=1e-6)
    own = nnx.to_pure_dict(nnx.state(llama, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, own, params)


def test_a_tied_model_has_one_table_whose_gradient_is_that_of_both_its_uses(params, tokens):
    tied = dataclasses.replace(TINY, tied=True)
    one = model.init_params(tied, 0)
    assert "lm_head" not in one
    assert sum(leaf.size for leaf in jax.tree.leaves(one)) == parameter_count(tied)
    two = {**one, "lm_head": {"kernel": one["embed"]["embedding"].T}}
    of_one = jax.jit(jax.value_and_grad(functools.partial(loss, config=tied)))
    value, gradient = of_one(one, tokens)
    expected, apart = jax.jit(jax.value_and_grad(loss))(two, tokens)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    summed = apart["embed"]["embedding"] + apart.pop("lm_head")["kernel"].T
    apart["embed"]["embedding"] = summed
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), gradient, apart)

    def build():
        return model.Llama(tied, rngs=nnx.Rngs(0))

    llama = nnx.merge(nnx.graphdef(nnx.eval_shape(build)), one)
    np.testing.assert_allclose(llama(tokens), model.forward(tied, one, tokens), atol=1e-6)


def test_the_scan_runs_the_layers_in_order(params, tokens, logits):
    x = model.embed(TINY, params, tokens, jnp.float32)
    for layer in range(TINY.num_layers):
        layer_params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        x = model.block(TINY, layer_params, x)
    np.testing.assert_allclose(model.logits(TINY, params, x), logits, atol=1e-6)


def test_embed_and_logits_need_no_blocks(params, tokens):
    rest = {name: leaves for name, leaves in params.items() if name != "blocks"}
    x = model.embed(TINY, rest, tokens, jnp.bfloat16)
    assert x.shape == (2, 7, 16)
    assert x.dtype == jnp.bfloat16
    assert model.logits(TINY, rest, x).shape == (2, 7, 31)


def test_parameters_under_other_names_are_refused(params, tokens):
    renamed = {**params, "norm": {"weight": params["norm"]["scale"]}}
    with pytest.raises(ValueError, match=r"parameters are \['weight'\].* has \['scale'\]"):
        model.forward(TINY, renamed, tokens)


def test_a_token_does_not_see_later_tokens(forward, params, tokens, logits):
    changed = tokens.at[:, 4].add(1) % TINY.vocab_size
    seen = forward(params, changed)
    np.testing.assert_allclose(seen[:, :4], logits[:, :4], atol=1e-6)
    assert not np.allclose(seen[:, 4:], logits[:, 4:], atol=1e-4)


def test_earlier_tokens_matter_by_their_order(forward, params, tokens, logits):
    swapped = tokens.at[:, [0, 1]].set(tokens[:, [1, 0]])
    assert not np.allclose(forward(params, swapped)[:, -1], logits[:, -1], atol=1e-4)


def test_rotary_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, TINY.head_dim))
    turned_query, turned_key = (
        model.rotary_embedding(TINY, jnp.broadcast_to(x, (1, 12, 1, TINY.head_dim)))[0, :, 0]
        for x in (query, key)
    )
    products = turned_query @ turned_key.T
    for distance in range(12):
        diagonal = jnp.diagonal(products, offset=distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    np.testing.assert_allclose(products[0, 0], query @ key, atol=1e-5)


def test_rotary_positions_keep_their_precision_in_bfloat16():
    x = jnp.ones((1, 600, 1, TINY.head_dim))
    exact = model.rotary_embedding(TINY, x)
    rounded = model.rotary_embedding(TINY, x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_rope_scaling_slows_long_wavelengths_and_keeps_short_ones():
    config = LlamaConfig(31, 64, 24, num_layers=1, num_heads=1)
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_context=256)
    x = jnp.zeros((1, 2, 1, 64)).at[..., :32].set(1.0)

    def frequencies(config):
        cos, sin = jnp.split(model.rotary_embedding(config, x)[0, 1, 0], 2)
        return np.asarray(jnp.arctan2(sin, cos))

    before = frequencies(config)
    after = frequencies(dataclasses.replace(config, rope_scaling=scaling))
    wavelengths = 2 * np.pi / before
    np.testing.assert_allclose(after[wavelengths < 64], before[wavelengths < 64], rtol=1e-5)
    np.testing.assert_allclose(after[wavelengths > 256], before[wavelengths > 256] / 8, rtol=1e-5)
    assert np.all(np.diff(after) < 0)


def test_grouped_heads_equal_repeated_key_value_heads(params, tokens):
    grouped_config = dataclasses.replace(TINY, num_kv_heads=2)
    grouped, repeated = dict(params["blocks"]["attention"]), dict(params["blocks"]["attention"])
    for name in ("k_proj", "v_proj"):
        kernel = params["blocks"]["attention"][name]["kernel"][..., : grouped_config.kv_size]
        heads = kernel.reshape(3, 16, 2, TINY.head_dim)
        grouped[name] = {"kernel": kernel}
        repeated[name] = {"kernel": jnp.repeat(heads, 2, axis=2).reshape(3, 16, 16)}

    def predict(config, attention):
        blocks = {**params["blocks"], "attention": attention}
        return model.forward(config, {**params, "blocks": blocks}, tokens)

    np.testing.assert_allclose(predict(grouped_config, grouped), predict(TINY, repeated), atol=1e-6)


def test_bfloat16_compute_returns_float32_logits_near_the_exact_ones(params, tokens, logits):
    rounded = jax.jit(functools.partial(model.forward, TINY, dtype=jnp.bfloat16))(params, tokens)
    assert rounded.dtype == jnp.float32
    # Eight bits of mantissa, through three layers.
    np.testing.assert_allclose(rounded, logits, atol=0.03 * float(jnp.max(jnp.abs(logits))))


def test_norm_statistics_do_not_overflow_in_float16(params):
    x = jnp.full((1, 2, TINY.hidden_size), 500.0, jnp.float16)
    assert np.all(np.isfinite(model.logits(TINY, params, x)))


def temporary_bytes(compiled):
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_rematerialisation_keeps_less_and_changes_no_gradient(params, tokens, gradient):
    remat_loss = functools.partial(loss, remat=True)
    recomputing = jax.jit(jax.value_and_grad(remat_loss)).lower(params, tokens).compile()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        recomputing(params, tokens),
        gradient(params, tokens),
    )
    assert temporary_bytes(recomputing) < 0.7 * temporary_bytes(gradient)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    losses = model.cross_entropy(jnp.zeros((2, 3, 10), jnp.bfloat16), jnp.zeros((2, 3), jnp.int32))
    assert losses.shape == (2, 3)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(10), rtol=1e-6)


def test_cross_entropy_is_the_negative_log_probability_of_the_target(logits):
    targets = jnp.arange(14).reshape(2, 7)
    probabilities = jax.nn.softmax(logits, axis=-1)
    expected = -jnp.log(jnp.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(model.cross_entropy(logits, targets), expected, rtol=1e-5)


def test_a_fresh_model_predicts_like_chance_and_can_learn_a_batch_by_heart(
    params, tokens, gradient
):
    value, _ = gradient(params, tokens)
    assert value == pytest.approx(np.log(TINY.vocab_size), abs=0.05)
    for step_size in np.geomspace(0.02, 0.001, 60):
        value, slopes = gradient(params, tokens)
        params = jax.tree.map(
            lambda leaf, slope, size=step_size: leaf - size * jnp.sign(slope), params, slopes
        )
    assert value < 0.1
