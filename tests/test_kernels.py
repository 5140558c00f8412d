"""The Pallas kernel against the plain code, and its claims of what it moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import ApolloDimensionNumbers, _kernels, planning, scale_by_apollo
from apollo_optax._matrices import matrix_axes, project, sum_of_squares_per_channel

LAST_TWO = ApolloDimensionNumbers(-2, -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(128, 300), (300, 128), (1024, 1100), (1100, 640), (3, 256, 700), (2, 2, 700, 256)],
    ids=str,
)
def test_it_is_the_plain_code(shape, dtype):
    axes = matrix_axes(LAST_TWO, shape, ("w",))
    rank, dim = 16, min(shape[-2:])
    P = jax.random.normal(jax.random.key(0), (*shape[:-2], rank, dim))
    G = jax.random.normal(jax.random.key(1), shape, dtype)
    assert _kernels.fits(P, G, axes)
    R, squares = _kernels.project_and_square(P, G, axes, interpret=True)
    np.testing.assert_allclose(R, project(P, G, axes), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(squares, sum_of_squares_per_channel(G, axes), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes", "rank", "dtype"),
    [
        ((256, 512), LAST_TWO, 4, jnp.float32),  # no whole tile of rows
        ((200, 512), LAST_TWO, 8, jnp.float32),  # nor of columns
        ((256, 512), LAST_TWO, 8, jnp.float16),
        ((16384, 16384), LAST_TWO, 256, jnp.float32),  # P has no room
        ((256, 4, 128), ApolloDimensionNumbers(0, (1, 2)), 8, jnp.float32),  # heads
        ((256, 3, 512), ApolloDimensionNumbers(0, 2), 8, jnp.float32),  # layers in the middle
    ],
)
def test_what_it_cannot_take_is_left_to_the_plain_code(shape, axes, rank, dtype):
    matrix = matrix_axes(axes, shape, ("w",))
    batch = [shape[a] for a in matrix.batch]
    dim = np.prod([shape[a] for a in matrix.projected])
    P: Any = jax.ShapeDtypeStruct((*batch, rank, int(dim)), jnp.float32)
    G: Any = jax.ShapeDtypeStruct(shape, dtype)
    assert not _kernels.fits(P, G, matrix)


def test_its_cost_is_every_block_once():
    """By hand: 2 matrices of 256 x 512 in bfloat16, P of 8 x 256, R of 8 x 512, 512 norms."""
    cost = _kernels.cost_of(matrices=2, rank=8, dim=256, channels=512, itemsize=2)
    G, P, R, norms = 256 * 512 * 2, 8 * 256 * 4, 8 * 512 * 4, 512 * 4
    assert cost.bytes_accessed == 2 * (G + P + R + norms)
    assert cost.flops == 2 * (2 * 8 * 256 * 512 + 2 * 256 * 512)


def test_elsewhere_than_on_tpus_nothing_changes():
    params = {"w": jax.random.normal(jax.random.key(0), (128, 256))}

    def train(**options):
        tx = scale_by_apollo(rank=8, **options)
        return jax.jit(tx.update)(params, tx.init(params))[0]["w"]

    np.testing.assert_array_equal(train(use_pallas=True), train())


def test_use_pallas_is_true_or_false():
    with pytest.raises(TypeError, match="use_pallas must be True or False, got 'tpu'"):
        scale_by_apollo(use_pallas="tpu")  # type: ignore[arg-type]


@pytest.mark.planning
@pytest.mark.parametrize("shape", [(4, 1024, 4096), (4, 4096, 1024)])
def test_on_a_tpu_it_saves_a_read_of_the_gradient(shape):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def moved(*, use_pallas: bool) -> float:
        tx = scale_by_apollo(64, weight_dimension_numbers=LAST_TWO, use_pallas=use_pallas)
        state = jax.eval_shape(tx.init, params)
        plan = planning.compile_for("tpu-v5e", tx.update, params, state, donate_argnums=1)
        assert plan.hbm_bytes is not None
        return plan.hbm_bytes

    # Less than a whole read: R is now written and read again, and the compiler counts copies.
    assert moved(use_pallas=True) < moved(use_pallas=False) - 0.5 * np.prod(shape) * 4
