"""The example of one file: what its optimizer takes for matrices, that it learns, and goes on."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from flax import nnx

from apollo_optax import ApolloDimensionNumbers, transformer_dimension_numbers
from examples import minimal

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """A model and batches that compile and train in seconds."""
    sizes = {"WIDTH": 32, "LAYERS": 1, "SEQUENCE": 32, "BATCH": 8, "WARMUP_STEPS": 4}
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(minimal, name, size)
        yield


@pytest.fixture(scope="module")
def trained(small: None, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The validation loss of a run that nothing stopped."""
    return minimal.train(STEPS, tmp_path_factory.mktemp("whole"))


def test_every_matrix_of_a_block_is_projected_and_the_vocabulary_is_left_to_adam() -> None:
    model = nnx.eval_shape(lambda: minimal.Transformer(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    specs = transformer_dimension_numbers(params)
    into_heads = ApolloDimensionNumbers(-3, (-2, -1))
    out_of_heads = ApolloDimensionNumbers((-3, -2), -1)
    dense = ApolloDimensionNumbers(-2, -1)
    for block in specs["blocks"].values():
        for name in ("query", "key", "value"):
            assert block["attention"][name]["kernel"] == into_heads
        assert block["attention"]["out"]["kernel"] == out_of_heads
        assert block["up"]["kernel"] == block["down"]["kernel"] == dense
    projected = len(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ApolloDimensionNumbers)))
    assert projected == 6 * minimal.LAYERS
    with_two_axes = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    assert len(with_two_axes) == projected + 3  # two embeddings and the head


def test_the_loss_falls(trained: float, tmp_path: Path) -> None:
    untrained = minimal.train(0, tmp_path)
    assert trained < 0.8 * untrained


def test_a_resumed_run_ends_as_one_that_was_not_stopped(trained: float, tmp_path: Path) -> None:
    minimal.train(STEPS // 2, tmp_path)
    assert minimal.train(STEPS, tmp_path) == trained
