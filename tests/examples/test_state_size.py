"""The optimizer state of every LLaMA, counted without allocating it."""

import functools
import math

import jax
import pytest

from apollo_optax import apollo, apollo_mini, transformer_dimension_numbers
from examples.llama.config import MODELS, paper_settings
from examples.llama.model import init_params


def numbers(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def block_matrices(config):
    """(inputs, outputs) of every projected matrix, from the architecture and not from the code."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    attention = [
        (hidden, hidden),
        (hidden, config.kv_size),
        (hidden, config.kv_size),
        (hidden, hidden),
    ]
    mlp = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return (attention + mlp) * config.num_layers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mini", [False, True], ids=["apollo", "apollo_mini"])
# A quarter of its width is more than its keys and values have.
@pytest.mark.filterwarnings("ignore:rank=2048 is at least the smaller side:UserWarning")
def test_state_is_two_moments_of_the_projection_and_a_norm_a_matrix(name, mini):
    config = MODELS[name]
    rank = 1 if mini else max(1, config.hidden_size // 4)
    make = functools.partial(apollo, rank=rank) if not mini else apollo_mini
    params = jax.eval_shape(lambda: init_params(config, 0))
    tx = make(0.01, weight_dimension_numbers=transformer_dimension_numbers)
    state = jax.eval_shape(tx.init, params)

    matrices = block_matrices(config)
    projected = sum(2 * max(matrix) * min(rank, min(matrix)) + 1 for matrix in matrices)
    by_adam = numbers(params) - sum(math.prod(matrix) for matrix in matrices)
    count, key = 1, 2
    # A number for each row of Adam's leaves: embedding, head, two norms a layer, the last norm.
    rows = config.vocab_size + config.hidden_size + 2 * config.num_layers + 1
    assert numbers(state[0]) == projected + 2 * by_adam + rows + count + key


@pytest.mark.parametrize("name", ["60m", "7b"])
def test_projected_embeddings_leave_no_state_of_full_size(name):
    params = jax.eval_shape(lambda: init_params(MODELS[name], 0))
    specs = transformer_dimension_numbers(params, project_embeddings=True)
    state = jax.eval_shape(apollo_mini(0.01, weight_dimension_numbers=specs).init, params)
    assert numbers(state) < 0.005 * numbers(params)


def test_the_papers_rank_is_a_quarter_of_the_hidden_size_up_to_1b():
    for name in ("60m", "130m", "350m", "1b"):
        assert paper_settings(name).rank == MODELS[name].hidden_size // 4
