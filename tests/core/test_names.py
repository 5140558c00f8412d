"""Which leaves are matrices by the names that libraries give them."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from apollo_optax import ApolloDimensionNumbers, apollo, transformer_dimension_numbers
from apollo_optax._matrices import matrix_axes
from apollo_optax._names import default_dimension_numbers
from apollo_optax._paths import lookup, named_leaves


def tree(**shapes):
    """Nested dictionaries from `a__b__kernel=(4, 8)`."""
    made: dict = {}
    for name, shape in shapes.items():
        *path, last = name.split("__")
        node = made
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return made


# Shape, reduction axes and output axes of every leaf; None for Adam.
MODELS: dict[str, dict[str, Any]] = {
    "flax": {
        "attn__query__kernel": ((64, 4, 16), (0,), (1, 2)),
        "attn__out__kernel": ((4, 16, 64), (0, 1), (2,)),
        "attn__query__bias": ((4, 16), None, None),
        "embed__embedding": ((100, 64), None, None),
    },
    "gemma": {
        "layer_0__attn__q_einsum__w": ((4, 64, 16), (1,), (0, 2)),
        "layer_0__attn__kv_einsum__w": ((2, 2, 64, 16), (2,), (1, 3)),
        "layer_0__attn__attn_vec_einsum__w": ((4, 16, 64), (0, 1), (2,)),
        "layer_0__mlp__gating_einsum": ((2, 64, 128), (1,), (2,)),
        "layer_0__mlp__linear": ((128, 64), (0,), (1,)),
        "layer_0__pre_attention_norm__scale": ((64,), None, None),
        "embedder__input_embedding": ((100, 64), None, None),
    },
    "gemma, joint": {
        "attn__qkv_einsum__w": ((3, 4, 64, 16), (2,), (1, 3)),
        "attn__attn_vec_einsum__w": ((4, 16, 64), (0, 1), (2,)),
    },
    "tunix": {
        "attn__q_proj__w": ((64, 4, 16), (0,), (1, 2)),
        "attn__k_proj__w": ((64, 2, 16), (0,), (1, 2)),
        "attn__v_proj__w": ((64, 2, 16), (0,), (1, 2)),
        "attn__o_proj__w": ((4, 16, 64), (0, 1), (2,)),
        "mlp__gate_proj__kernel": ((64, 128), (0,), (1,)),
        "lm_head__w": ((64, 100), None, None),
    },
    "mixture": {
        "mlp__experts__gate_proj": ((8, 64, 128), (1,), (2,)),
        "mlp__router__kernel": ((64, 8), (0,), (1,)),
    },
    "hugging face": {
        "layers__self_attn__q_proj__kernel": ((3, 64, 64), (1,), (2,)),
        "layers__self_attn__o_proj__kernel": ((3, 64, 64), (1,), (2,)),
        "embed_tokens__embedding": ((100, 64), None, None),
        "lm_head__kernel": ((64, 100), None, None),
    },
    "multi-head latent attention": {
        "attn__query__kernel": ((64, 4, 24), (0,), (1, 2)),
        "attn__value__kernel": ((64, 4, 16), (0,), (1, 2)),
        "attn__out__kernel": ((4, 16, 64), (0, 1), (2,)),
    },
    "lm1b": {
        "decoder__logitdense__kernel": ((64, 100), None, None),
        "decoder__posembed_output__pos_embedding": ((1, 32, 64), None, None),
        "decoder__shared_embedding__embedding": ((100, 64), None, None),
    },
    "diffusion": {
        "time_embedding__linear_1__kernel": ((64, 128), (0,), (1,)),
        "y_embedder__embedding_table__embedding": ((100, 64), None, None),
    },
    "haiku": {"mlp/linear__w": ((64, 128), (0,), (1,)), "mlp/linear__b": ((128,), None, None)},
    "equinox": {"mlp__weight": ((128, 64), (0,), (1,)), "embedding__weight": ((9, 64), None, None)},
    "flattened": {"blocks/mlp/kernel": ((64, 128), (0,), (1,))},
    "dots": {"blocks.0.mlp.wi.kernel": ((64, 128), (0,), (1,))},
    "convolutions": {
        "conv_1__kernel": ((3, 3, 4, 8), None, None),
        "embedding__kernel": ((4, 4, 3, 64), None, None),
        "Convolution_0__kernel": ((3, 8, 8), None, None),
    },
    "names within names": {
        "modulation__scale__kernel": ((64, 128), (0,), (1,)),
        "attention__output_projection__kernel": ((64, 64), (0,), (1,)),
        "decoder__output_projection__kernel": ((64, 100), None, None),
        "converter__kernel": ((64, 128), (0,), (1,)),
        "scale__value": ((4, 64), None, None),
    },
    "a model whose name is that of a head": {
        "classifier/~/linear_0__w": ((64, 128), (0,), (1,)),
        "head__layers_0__kernel": ((64, 128), (0,), (1,)),
        "lm_head__dense__kernel": ((64, 64), None, None),
        "classifier__kernel": ((64, 10), None, None),
    },
    "heads and tables of PyTorch": {
        "output__weight": ((100, 64), None, None),
        "shared__weight": ((100, 64), None, None),
        "readout__kernel": ((64, 100), None, None),
        "to_logits__kernel": ((64, 100), None, None),
        "block__output__weight": ((64, 64), (0,), (1,)),
    },
    "weights beside a convolution": {
        "block__conv__weight": ((64, 64, 3, 3), None, None),
        "block__norm__weight": ((64,), None, None),
        "block__q__weight": ((64, 64), (0,), (1,)),
        "block__up__weight": ((64, 256), (0,), (1,)),
    },
    "stacked norms": {
        "layers__ln1__weight": ((12, 64), None, None),
        "layers__rms__weight": ((12, 64), None, None),
        "layers__attention_gain__weight": ((12, 64), None, None),
        "layers__up__kernel": ((12, 64, 128), (1,), (2,)),
        "layers__to_q__kernel": ((12, 8, 128), (1,), (2,)),
    },
}


def sides(params, specs):
    found = {}
    for path, leaf in named_leaves(params)[0]:
        spec = lookup(specs, path)
        axes = spec and matrix_axes(spec, leaf.shape, path)
        found["__".join(path)] = axes and (axes.batch, {axes.projected, axes.channel})
    return found


@pytest.mark.parametrize("function", [transformer_dimension_numbers, default_dimension_numbers])
@pytest.mark.parametrize("model", MODELS)
def test_names_of_libraries_are_known(function, model):
    leaves = MODELS[model]
    params = tree(**{name: shape for name, (shape, *_) in leaves.items()})
    with warnings.catch_warnings(action="error"):
        found = sides(params, function(params))
    for name, (shape, reduction, output) in leaves.items():
        if reduction is None:
            assert found[name] is None, name
            continue
        batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
        assert found[name] == (batch, {reduction, output}), name


def test_layers_may_be_on_another_axis():
    params = tree(
        layers__mlp__wi_0__kernel=(64, 12, 128),
        layers__attn__query__kernel=(64, 12, 4, 16),
        layers__attn__out__kernel=(4, 12, 16, 64),
        layers__norm__scale=(64, 12),
        mlp__kernel=(64, 128),
        blocks__0__mlp__kernel=(64, 128),
    )
    found = sides(params, transformer_dimension_numbers(params, layers_axis=1))
    assert found == {
        "layers__mlp__wi_0__kernel": ((1,), {(0,), (2,)}),
        "layers__attn__query__kernel": ((1,), {(0,), (2, 3)}),
        "layers__attn__out__kernel": ((1,), {(0, 2), (3,)}),
        "layers__norm__scale": None,
        "mlp__kernel": ((), {(0,), (1,)}),
        "blocks__0__mlp__kernel": ((), {(0,), (1,)}),
    }


@pytest.mark.parametrize("leaf", ["gating_einsum", "gating_einsum__w"])
def test_the_gates_of_gemma_are_read_beside_its_linear(leaf):
    linear = leaf.replace("gating_einsum", "linear")
    for gates, reduction in (((2, 64, 128), -2), ((2, 128, 64), -1)):
        params = tree(**{f"mlp__{leaf}": gates, f"mlp__{linear}": (128, 64)})
        found = lookup(transformer_dimension_numbers(params), ("mlp", *leaf.split("__")))
        assert found.reduction_axis == reduction


def test_weights_of_pytorch_are_out_by_in_also_stacked():
    params = tree(
        layers__attn__q_proj__weight=(12, 96, 64),
        layers__attn__o_proj__weight=(12, 64, 96),
        gru__weight_ih=(96, 64),
    )
    of_pytorch = ApolloDimensionNumbers(reduction_axis=-1, output_axis=-2)
    found = transformer_dimension_numbers(params)
    assert jax.tree.leaves(found, is_leaf=lambda x: x == of_pytorch) == [of_pytorch] * 3


UNKNOWN = {
    "heads of another name": tree(attention__qkv__kernel=(64, 3, 4, 16)),
    "heads of MLA": tree(attention__wq_b__kernel=(24, 4, 32), attention__wkv_b__kernel=(32, 4, 40)),
    "patches": tree(patch_embeddings__kernel=(4, 4, 3, 64)),
    "layers on the second axis": tree(
        attn__q_proj__kernel=(64, 12, 4), attn__o_proj__kernel=(4, 12, 64)
    ),
    "queries of another name": tree(attn__to_q__kernel=(512, 8, 64)),
    "stacked queries of another name": tree(layers__to_q__kernel=(12, 128, 8, 64)),
    "convolutions of another name": tree(stem__kernel=(3, 3, 64, 64)),
    "a table": tree(table=(100, 64)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_name_tells_is_said_once_and_left_to_adam(name):
    params = UNKNOWN[name]
    tx = apollo(0.01, 4, weight_dimension_numbers=transformer_dimension_numbers)
    with pytest.warns(UserWarning, match=r"have names that are not known.*bytes.*infer_dimension"):
        state = jax.eval_shape(tx.init, params)
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, state[0].mu) == shapes
    with warnings.catch_warnings(action="error"):
        jax.eval_shape(tx.update, params, state, params)


def test_by_default_leaves_of_two_axes_and_no_known_name_are_matrices():
    params = tree(table=(100, 64), head__kernel=(64, 100), embed__embedding=(100, 64))
    specs = default_dimension_numbers(params)
    assert specs["table"] == ApolloDimensionNumbers()
    assert specs["head"]["kernel"] is specs["embed"]["embedding"] is None


def test_a_rank_that_saves_nothing_is_said():
    wide = ApolloDimensionNumbers(-2, -1)
    params = tree(query=(512, 16, 192))
    tx = apollo(0.01, 256, weight_dimension_numbers=wide)
    with pytest.warns(UserWarning, match=r"rank=256 .* 1,572,864 weights.*smaller side of 16"):
        jax.eval_shape(tx.init, params)
    with warnings.catch_warnings(action="error"):
        jax.eval_shape(apollo(0.01, 8, weight_dimension_numbers=wide).init, params)


def test_a_model_without_a_matrix_is_said():
    params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    with pytest.warns(UserWarning, match=r"No leaf is a matrix: all 1,048,576 weights"):
        jax.eval_shape(optax.flatten(apollo(0.01, 4)).init, params)
    with warnings.catch_warnings(action="error"):
        jax.eval_shape(apollo(0.01, 4).init, params)


def test_paths_that_read_the_same_keep_their_own_shapes():
    params = {"a/w": jnp.zeros((4, 8)), "a": {"w": jnp.zeros(4)}}
    specs = transformer_dimension_numbers(params)
    assert specs == {"a/w": ApolloDimensionNumbers(-2, -1), "a": {"w": None}}
