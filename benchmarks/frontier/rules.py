"""The rules that are compared, as Optax transformations of a LLaMA's leaves.

A hidden rule sees the matrices of the blocks, `(layers, in, out)`; a vocabulary rule sees the
embedding `(vocabulary, width)` and the head `(width, vocabulary)`. Updates have entries of size
about 1 and point uphill; a learning rate follows.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

import apollo_optax

__all__ = ["HIDDEN", "VOCABULARY", "Rule"]

# Muon's, as in `optax.contrib`.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_TINY = 1e-30
_BATCHED = apollo_optax.ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)
# width, seed -> transformation
Make = Callable[[int, Any], optax.GradientTransformation]


class Rule(NamedTuple):
    """A rule for some of the leaves.

    Attributes:
      label: Its name in tables and pictures.
      make: Makes it of the model's width and of a seed.
      start: The learning rate its sweep starts at.
    """

    label: str
    make: Make
    start: float


def _stateless(rule: Callable[[Array], Array]) -> Make:
    return lambda width, seed: optax.stateless_with_tree_map(lambda g, _: rule(g))


def _rms(x: Array, axes: int | tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + _TINY)


def _orthogonalized(x: Array) -> Array:
    """Newton-Schulz iterations of every matrix; entries of size about 1."""
    a, b, c = _COEFFICIENTS
    largest = max(x.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if is_tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(_ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return math.sqrt(largest) * (jnp.swapaxes(x, -1, -2) if is_tall else x)


def _swan(width: int, seed: Any) -> optax.GradientTransformation:
    return apollo_optax.scale_by_swan(weight_dimension_numbers=_BATCHED)


def _centered(x: Array) -> Array:
    """Of each output, the mean over the inputs is taken off, as in SWAN's paper."""
    return x - jnp.mean(x, axis=-2, keepdims=True)


class _OneBit(NamedTuple):
    signs: PyTree
    rows: PyTree
    columns: PyTree


def _one_bit_muon(beta: float) -> Make:
    """Muon whose momentum is kept as signs, and means of its magnitude by row and column."""

    def init(params: PyTree) -> _OneBit:
        return _OneBit(
            jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params),
            jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1)), params),
            jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, p.shape[-1])), params),
        )

    def update(
        updates: PyTree, state: _OneBit, params: PyTree | None = None
    ) -> tuple[PyTree, _OneBit]:
        def restored(sign: Array, row: Array, column: Array) -> Array:
            magnitude = row * column / (jnp.mean(row, -2, keepdims=True) + _TINY)
            return jnp.where(sign, magnitude, -magnitude)

        momentum = jax.tree.map(
            lambda g, *kept: beta * restored(*kept) + (1 - beta) * g, updates, *state
        )
        look_ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates)
        magnitudes = jax.tree.map(jnp.abs, momentum)
        return jax.tree.map(_orthogonalized, look_ahead), _OneBit(
            jax.tree.map(lambda m: m > 0, momentum),
            jax.tree.map(lambda m: jnp.mean(m, -1, keepdims=True), magnitudes),
            jax.tree.map(lambda m: jnp.mean(m, -2, keepdims=True), magnitudes),
        )

    return lambda width, seed: optax.GradientTransformation(init, update)


def _low_rank_muon(rank: int, beta: float) -> Make:
    """LoRA-Pre's Muon (arXiv:2602.24283): the momentum is a product of two factors fitted online.

    `B <- (1 - c) B + c G A^T (A A^T)^-1` and `A <- (1 - c) A + c (B^T B)^-1 B^T G`, with
    `(1 - c)^2 = beta`. A starts with random orthonormal rows, B at zero.
    """
    keep = math.sqrt(beta)

    def inverse(gram: Array) -> Array:
        size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / rank
        return jnp.linalg.inv(gram + (1e-4 * size + _TINY) * jnp.eye(rank)[None])

    def update_one(g: Array, B: Array, A: Array) -> tuple[Array, Array, Array]:
        At, Bt = jnp.swapaxes(A, -1, -2), jnp.swapaxes(B, -1, -2)
        B, A = (
            keep * B + (1 - keep) * (g @ At) @ inverse(A @ At),
            keep * A + (1 - keep) * inverse(Bt @ B) @ (Bt @ g),
        )
        return _orthogonalized(beta * (B @ A) + (1 - beta) * g), B, A

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        def rows(p: Array) -> Array:
            drawn = jax.random.normal(jax.random.key(p.shape[-1]), (p.shape[-1], rank))
            return jnp.broadcast_to(jnp.linalg.qr(drawn)[0].T, (p.shape[0], rank, p.shape[-1]))

        return jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], rank)), params), jax.tree.map(
            rows, params
        )

    def update(
        updates: PyTree, state: tuple[PyTree, PyTree], params: PyTree | None = None
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        results = jax.tree.map(update_one, updates, *state)
        direction, B, A = (
            jax.tree.map(lambda _, of_leaf, i=i: of_leaf[i], updates, results) for i in range(3)
        )
        return direction, (B, A)

    return lambda width, seed: optax.GradientTransformation(init, update)


def _momentum_in_a_basis(rank: int, beta: float) -> Make:
    """The raw gradient, but in a fixed random basis of its inputs its momentum."""

    def make(width: int, seed: Any) -> optax.GradientTransformation:
        def basis(g: Array) -> Array:
            drawn = jax.random.normal(jax.random.key(g.shape[-2]), (g.shape[-2], rank))
            return jnp.linalg.qr(drawn)[0].T

        def init(params: PyTree) -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros((p.shape[0], rank, p.shape[-1])), params)

        def update(
            updates: PyTree, state: PyTree, params: PyTree | None = None
        ) -> tuple[PyTree, PyTree]:
            state = jax.tree.map(
                lambda m, g: beta * m + (1 - beta) * (basis(g) @ g), state, updates
            )
            # So that noise has the same size within the basis as outside.
            factor = math.sqrt((1 + beta) / (1 - beta))

            def direction(m: Array, g: Array) -> Array:
                P = basis(g)
                return g + P.T @ (factor * m - P @ g)

            return jax.tree.map(direction, state, updates), state

        return optax.GradientTransformation(init, update)

    return make


def _apollo(rank_of: Callable[[int], int], **others: Any) -> Make:
    return lambda width, seed: apollo_optax.scale_by_apollo(
        rank_of(width), key=seed, weight_dimension_numbers=_BATCHED, **others
    )


def _mini(width: int, seed: Any) -> optax.GradientTransformation:
    return apollo_optax.scale_by_apollo(
        1,
        scale=math.sqrt(8),
        granularity="tensor",
        key=seed,
        weight_dimension_numbers=_BATCHED,
    )


def _muon(width: int, seed: Any) -> optax.GradientTransformation:
    """Optax's Muon, with entries of size about 1 as the others have them."""
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: numbers, params)
    )
    return optax.chain(
        muon,
        optax.stateless_with_tree_map(lambda u, _: math.sqrt(max(u.shape[-2:])) * u),
    )


def _eighth(width: int) -> int:
    return width // 8


def _chain(*makes: Make) -> Make:
    return lambda width, seed: optax.chain(*(make(width, seed) for make in makes))


def _adam(width: int, seed: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam()


def _small(vocabulary: str) -> Make:
    """The package's rule for leaves that are not matrices."""
    return lambda width, seed: apollo_optax.scale_by_apollo(
        vocabulary=vocabulary,  # type: ignore[arg-type]
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: None, params),
    )


HIDDEN: Mapping[str, Rule] = {
    "adam": Rule("Adam", _adam, 2e-3),
    "muon": Rule("Muon", _muon, 2e-3),
    "apollo_quarter": Rule("APOLLO, r = 1/4", _apollo(lambda width: width // 4), 2e-2),
    "apollo_mini": Rule("APOLLO-Mini", _mini, 4e-2),
    "whitened": Rule("SWAN", _swan, 4e-3),
    "swan": Rule("SWAN, with the mean taken off", _chain(_stateless(_centered), _swan), 4e-3),
    "orthogonalized": Rule("orthogonalized gradient", _stateless(_orthogonalized), 4e-3),
    "neuron": Rule("SCALE", _stateless(lambda g: g / _rms(g, -2)), 4e-3),
    "one_bit_muon": Rule("Muon, momentum of one bit", _one_bit_muon(0.98), 2e-3),
    "whitened_basis": Rule(
        "whitened, momentum in a random basis",
        _chain(_momentum_in_a_basis(16, 0.95), _swan),
        4e-3,
    ),
    "low_rank_muon": Rule("Muon, momentum of rank 8", _low_rank_muon(8, 0.95), 2e-3),
    "apollo_orthogonalized": Rule(
        "APOLLO, r = 1/8, then orthogonalized",
        _chain(_apollo(_eighth), _stateless(_orthogonalized)),
        4e-3,
    ),
}
"""By name: what trains the matrices of the blocks."""


def _of_both(embed: Make, head: Make) -> Make:
    def make(width: int, seed: Any) -> optax.GradientTransformation:
        transforms = {"embed": embed(width, seed), "lm_head": head(width, seed)}
        return optax.partition(transforms, _first_names)

    return make


def _first_names(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def _token_moment(b2: float) -> Make:
    """Over the root of one second moment a token."""

    def axis(path: Any) -> int:
        return {"embed": 1, "lm_head": 0}[path[0].key]  # the width's

    def init(params: PyTree) -> tuple[Array, PyTree]:
        nu = jax.tree_util.tree_map_with_path(
            lambda path, p: jnp.zeros_like(p.mean(axis(path), keepdims=True)), params
        )
        return jnp.zeros([], jnp.int32), nu

    def update(
        updates: PyTree, state: tuple[Array, PyTree], params: PyTree | None = None
    ) -> tuple[PyTree, tuple[Array, PyTree]]:
        count, nu = state
        nu = jax.tree_util.tree_map_with_path(
            lambda path, g, v: (
                b2 * v + (1 - b2) * jnp.mean(jnp.square(g), axis(path), keepdims=True)
            ),
            updates,
            nu,
        )
        correction = 1 - b2 ** (count + 1)
        scaled = jax.tree.map(lambda g, v: g / (jnp.sqrt(v / correction) + 1e-12), updates, nu)
        return scaled, (count + 1, nu)

    return lambda width, seed: optax.GradientTransformation(init, update)


def _normalized_momentum(factor: float) -> Make:
    """SCALE's for the head: each token's momentum, in bfloat16, over its root mean square."""

    def make(width: int, seed: Any) -> optax.GradientTransformation:
        average = optax.chain(
            optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
            optax.stateless_with_tree_map(lambda m, _: m.astype(jnp.float32)),
        )
        return optax.chain(
            average, optax.stateless_with_tree_map(lambda m, _: factor * m / _rms(m, 0))
        )

    return make


VOCABULARY: Mapping[str, Rule] = {
    "adam": Rule("Adam", _adam, 3e-2),
    "factored": Rule("factored second moment", _small("factored"), 3e-2),
    "token": Rule("second moment a token, b2 = 0.999", _token_moment(0.999), 3e-2),
    "factored_momentum": Rule(
        "factored, with momentum (bfloat16)", _small("factored_momentum"), 3e-2
    ),
    "head_momentum_quarter": Rule(
        "embedding factored, head momentum (bfloat16) by token at a quarter of the rate",
        _of_both(_small("factored"), _normalized_momentum(0.25)),
        3e-2,
    ),
    "head_factored_momentum": Rule(
        "factored, head with momentum (bfloat16)",
        _of_both(_small("factored"), _small("factored_momentum")),
        3e-2,
    ),
    "apollo": Rule("APOLLO, r = 1/4", _apollo(lambda width: width // 4), 0.25),
}
"""By name: what trains embedding and head."""
