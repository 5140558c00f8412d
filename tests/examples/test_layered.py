import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import model
from examples.llama.config import LlamaConfig
from examples.llama.layered import join_params, layered_model, split_params
from examples.llama.train import make_loss

CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2
)
PARAMS = model.init_params(CONFIG, 0)
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, CONFIG.vocab_size)


def layered_loss(params, **options):
    layered = layered_model(CONFIG, dtype=jnp.float32, **options)
    parts = split_params(params)
    x = layered.embed(parts["rest"], TOKENS)
    for layer in range(CONFIG.num_layers):
        x = layered.block(jax.tree.map(lambda a, i=layer: a[i], parts["blocks"]), x)
    return layered.loss(parts["rest"], x, TOKENS)


def test_splitting_and_joining_parameters_changes_nothing():
    assert set(split_params(PARAMS)["rest"]) == {"embed", "norm", "lm_head"}
    jax.tree.map(np.testing.assert_array_equal, join_params(split_params(PARAMS)), PARAMS)


@pytest.mark.parametrize(
    "options",
    [{}, {"tokens_at_once": 8}, {"tokens_at_once": 5}, {"heads_at_once": 2}],
    ids=["whole", "chunks", "chunks_that_do_not_divide", "groups_of_heads"],
)
def test_loss_and_gradients_are_the_models(options):
    whole = make_loss(CONFIG, dtype=jnp.float32, remat=False)
    expected = jax.value_and_grad(whole)(PARAMS, TOKENS)
    actual = jax.value_and_grad(lambda params: layered_loss(params, **options))(PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected
    )


def test_logits_of_a_chunk_are_all_that_exists_at_one_time():
    def largest(tokens_at_once):
        loss = lambda params: layered_loss(params, tokens_at_once=tokens_at_once)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(PARAMS).as_text().count("32x48xf32")

    assert largest(512) > 0
    assert largest(8) == 0


@pytest.mark.parametrize("heads_at_once", [3, 1])
def test_groups_that_split_key_and_value_heads_are_refused(heads_at_once):
    with pytest.raises(ValueError, match=f"heads_at_once is {heads_at_once}; it must divide the 4"):
        layered_loss(PARAMS, heads_at_once=heads_at_once)
