"""SWAN trains matrices by their whitened gradients, without any state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, ArrayLike, Float

from apollo_optax._arguments import wide
from apollo_optax._leafwise import MatrixRule, scale_leaves
from apollo_optax._leaves import Hyperparameters, LeafState, Vocabulary
from apollo_optax._matrices import (
    MatrixAxes,
    WeightDimensionNumbers,
    leaf_of,
    matrices_of,
    side,
)

# The quintic Newton-Schulz iteration of `optax.contrib.muon`.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


@functools.partial(jax.jit, static_argnames="axes")
def whiten(G: Float[Array, "*leaf"], axes: MatrixAxes) -> Float[Array, "*leaf"]:
    """Returns every matrix of a gradient with outputs of one size and orthogonal, in G's dtype.

    Each output is divided by its root mean square over the inputs. Newton-Schulz iterations then
    bring the singular values near 1, and the root of the larger side brings the entries to about 1.
    The computation is in float32 or better.
    """
    X = G.astype(wide(G.dtype))
    sides = (*axes.projected, *axes.channel)
    # Scaled first, so that squares neither overflow nor underflow.
    X = X / _or_one(jnp.max(jnp.abs(X), axis=sides, keepdims=True))
    X = X / _or_one(jnp.sqrt(jnp.mean(jnp.square(X), axis=axes.reduction, keepdims=True)))

    M = matrices_of(X, axes)
    norm = jnp.linalg.norm(M, axis=(-2, -1), keepdims=True)
    # NaN where an entry is not finite; the maximum may leave NaN out (`largest_magnitude`).
    M = jnp.where(jnp.isfinite(norm), M / _or_one(norm), 0)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = M @ jnp.swapaxes(M, -2, -1)
        M = a * M + (b * gram + c * gram @ gram) @ M
    return _row_major(
        leaf_of(M * side(G.shape, axes.channel) ** 0.5, G.shape, axes).astype(G.dtype)
    )


def _row_major(x: Array) -> Array:
    """Keeps XLA for GPUs from laying out a whole stack of layers as the products like it.

    A layer-wise step would then copy the stack. On a mesh the constraint would cost collectives.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return x
    layout = Layout(tuple(range(x.ndim)))
    return jax.lax.platform_dependent(
        x, cuda=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )


def _or_one(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)


def scale_by_swan(
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: Any = None,
    vocabulary: Vocabulary = "factored",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens the gradients of matrices, without any state.

    For a matrix G with inputs `j` and outputs `k`:

    .. math::
      X_{jk} &= G_{jk} / \sqrt{\textstyle\mathrm{mean}_j \, G_{jk}^2} \\
      U &= \sqrt{n} \, (X X^T)^{-1/2} X

    Here n is the size of the larger side, so that the entries have a size of about 1. The inverse
    root is computed by five Newton-Schulz iterations with the coefficients of
    `optax.contrib.muon`. The paper also subtracts the mean of each output first, and gives U the
    norm of G.

    Leaves that are not matrices are trained as `scale_by_apollo` trains them.

    Args:
      b1: The decay of the first moment of leaves that are not matrices.
      b2: The decay of the second moment of these leaves.
      eps: The number added to the root of the second moment.
      mu_dtype: The dtype that the first moment is kept in.
      vocabulary: As in `scale_by_apollo`. "factored" keeps about V + d numbers for a table of shape
        (V, d).
      weight_dimension_numbers: As in `scale_by_apollo`.

    Returns:
      A gradient transformation whose state is a `ScaleByApolloState`. For a matrix, `mu`, `nu` and
      `norm` are one zero each, so that the dictionaries of the state fit the parameters. The key is
      not used.

    Raises:
      TypeError: If an argument has the wrong type; at init and update, if a leaf is not real
        floating point.
      ValueError: If an argument is out of range; at init, if axes do not fit a parameter; at
        update, if the gradients do not match the state.

    References:
      Ma et al., SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training, ICML
      2025, https://arxiv.org/abs/2412.13148

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from apollo_optax import scale_by_swan
      >>> tx = optax.chain(scale_by_swan(), optax.scale_by_learning_rate(0.004))
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})
      >>> state[0].mu["kernel"].shape
      ()
    """

    def update(
        G: Array, P: None, state: LeafState, axes: MatrixAxes, *_: Any
    ) -> tuple[Array, LeafState]:
        return whiten(G, axes), state

    return scale_leaves(
        MatrixRule(update),
        Hyperparameters(b1, b2, eps, scale=1.0, norm_growth_limit=None),
        mu_dtype=mu_dtype,
        vocabulary=vocabulary,
        weight_dimension_numbers=weight_dimension_numbers,
    )
