"""The Pallas kernels against the plain code, and their claims of what they move."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from apollo_optax import ApolloDimensionNumbers, scale_by_apollo
from apollo_optax._matrices import (
    low_rank_shape,
    matrix_axes,
    project,
    projection_shape,
    sum_of_squares_per_channel,
)
from apollo_optax.experimental import (
    _pallas,
    _pallas_tpu,
    _program,
    pallas_tpu,
)

LAST_TWO = ApolloDimensionNumbers(-2, -1)
TPU_SHAPES = [(128, 300), (300, 128), (1024, 1100), (1100, 640), (3, 256, 700), (2, 2, 700, 256)]


@pytest.mark.parametrize(
    ("kernels", "rank", "shape", "dtype"),
    [(_pallas_tpu, 16, shape, jnp.float32) for shape in TPU_SHAPES]
    + [(_pallas_tpu, 16, TPU_SHAPES[-2], jnp.bfloat16)],
)
def test_it_is_the_plain_code(kernels, rank, shape, dtype):
    axes = matrix_axes(LAST_TWO, shape, ("w",))
    dim, channels = min(shape[-2:]), max(shape[-2:])
    keys = jax.random.split(jax.random.key(0), 4)
    # Entries that G's dtype has: outside of a kernel P is rounded to it.
    P = jax.random.normal(keys[0], (*shape[:-2], rank, dim)).astype(dtype).astype(jnp.float32)
    G = jax.random.normal(keys[1], shape, dtype)
    mu = jax.random.normal(keys[2], (*shape[:-2], rank, channels))
    nu = jax.random.uniform(keys[3], mu.shape)
    assert kernels.fits(G, mu, rank, dim, axes)
    decays = {"b1": 0.9, "b2": 0.99, "eps": 1e-3}
    found = _pallas.project(kernels.program, P, G, mu, nu, axes, **decays, interpret=True)

    R = project(P, G, axes)
    mu, nu = 0.9 * mu + 0.1 * R, 0.99 * nu + 0.01 * R**2
    np.testing.assert_allclose(found.mu, mu, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.nu, nu, rtol=1e-4, atol=1e-4)
    for squares, of in (
        (found.squared_direction, mu / (jnp.sqrt(nu) + 1e-3)),
        (found.squared_projection, R),
    ):
        # Of a single number the square may be as small as its rounding.
        atol = 1e-6 if rank == 1 else 0
        np.testing.assert_allclose(squares, jnp.sum(of**2, axis=-2), rtol=1e-4, atol=atol)
    np.testing.assert_allclose(found.squared_norm, sum_of_squares_per_channel(G, axes), rtol=1e-5)


HEADS, LAYERS_INSIDE = ApolloDimensionNumbers(0, (1, 2)), ApolloDimensionNumbers(0, 2)


@pytest.mark.parametrize(
    ("kernels", "shape", "axes", "rank", "dtype", "mu_dtype"),
    [
        (_pallas_tpu, (256, 512), LAST_TWO, 4, jnp.float32, jnp.float32),  # no whole tile of rows
        (_pallas_tpu, (200, 512), LAST_TWO, 8, jnp.float32, jnp.float32),  # nor of columns
        (_pallas_tpu, (16384, 16384), LAST_TWO, 256, jnp.float32, jnp.float32),  # P has no room
        *(
            (kernels, *unsuited)
            for kernels in (_pallas_tpu,)
            for unsuited in (
                ((256, 512), LAST_TWO, 16, jnp.float16, jnp.float32),
                ((256, 512), LAST_TWO, 16, jnp.float32, jnp.bfloat16),
                ((256, 4, 128), HEADS, 16, jnp.float32, jnp.float32),
                ((256, 3, 512), LAYERS_INSIDE, 16, jnp.float32, jnp.float32),
            )
        ),
    ],
)
def test_what_does_not_fit_is_known(kernels, shape, axes, rank, dtype, mu_dtype):
    matrix = matrix_axes(axes, shape, ("w",))
    G: Any = jax.ShapeDtypeStruct(shape, dtype)
    mu: Any = jax.ShapeDtypeStruct(low_rank_shape(shape, matrix, rank), mu_dtype)
    dim = projection_shape(shape, matrix, rank)[-1]
    assert not kernels.fits(G, mu, rank, dim, matrix)


def test_its_cost_is_every_block_once():
    """By hand: 2 matrices of 256 x 512 in bfloat16, P of 8 x 256, moments of 8 x 512, 3 norms."""
    sizes = _program.Sizes(matrices=2, rank=8, dim=256, channels=512, dim_is_last=False)
    cost = _pallas.cost_of(sizes, itemsize=2)
    G, P, moments, norms = 256 * 512 * 2, 8 * 256 * 4, 2 * 8 * 512 * 4, 3 * 512 * 4
    assert cost.bytes_accessed == 2 * (G + P + 2 * moments + norms)
    assert cost.flops == 2 * (2 * 8 * 256 * 512 + 2 * 256 * 512)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip's kernels run on this machine too."""
    interpreted = functools.partial(_pallas.project, interpret=True)
    monkeypatch.setattr(_pallas, "project", interpreted)


def has_kernel(function: Any, *args: Any) -> bool:
    return "pallas_call" in str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize(
    ("granularity", "shape"), [("channel", (2, 304, 128)), ("tensor", (128, 304))]
)
def test_training_with_it_is_training_without(granularity, shape, monkeypatch):
    grads = [{"w": jax.random.normal(jax.random.key(n), shape)} for n in range(4)]

    def train(implementation: Any):
        numbers: dict[str, Any] = {"granularity": granularity, "weight_dimension_numbers": LAST_TWO}
        tx = scale_by_apollo(16, 2, implementation=implementation, **numbers)
        state = tx.init(grads[0])
        assert has_kernel(tx.update, grads[0], state) == (implementation is not None)
        for grad in grads:
            updates, state = jax.jit(tx.update)(grad, state)
        return updates, state

    expected = train(None)
    interpret(monkeypatch)
    for found, wanted in zip(
        jax.tree.leaves(train(pallas_tpu)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_chip_gets_its_kernel():
    params = {"w": jax.ShapeDtypeStruct((128, 256), jnp.float32)}
    tx = scale_by_apollo(rank=16, implementation=pallas_tpu)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_on_another_platform_jax_refuses_it():
    params = {"w": jnp.ones((128, 256))}
    tx = scale_by_apollo(rank=16, implementation=pallas_tpu)
    with pytest.raises(ValueError, match=r"(?i)interpret mode"):
        jax.jit(tx.update)(params, tx.init(params))


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((100, 256), {}, r"float32 gradient of shape \(100, 256\) at rank 16 .* a smaller side"),
        ((128, 256), {"granularity": lambda R_tilde, R: jnp.ones(256)}, "got a function"),
        ((128, 256), {"mu_dtype": jnp.bfloat16}, "with bfloat16 moments"),
    ],
)
def test_what_it_cannot_take_is_refused(shape, options, match):
    params = {"w": jnp.ones(shape)}
    tx = scale_by_apollo(rank=16, implementation=pallas_tpu, **options)
    with pytest.raises(NotImplementedError, match=match):
        tx.update(params, tx.init(params))


def test_a_kernel_that_the_compiler_would_have_to_divide_is_refused(monkeypatch):
    interpret(monkeypatch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((128, 256))}
    tx = scale_by_apollo(rank=16, implementation=pallas_tpu)
    state = tx.init(params)

    def update(grads: Any, state: Any) -> Any:
        return tx.update(grads, state)

    whole = PartitionSpec()
    each = jax.shard_map(update, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)

    assert has_kernel(update, params, state)
    with jax.set_mesh(mesh):
        with pytest.raises(NotImplementedError, match="XLA cannot divide a kernel"):
            update(params, state)
        assert has_kernel(each, params, state)


def test_an_implementation_is_a_function():
    with pytest.raises(TypeError, match="implementation must be a function .* got 'tpu'"):
        scale_by_apollo(implementation="tpu")  # type: ignore[arg-type]
