"""The inputs of a layer-wise step, and its report."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from apollo_optax._rounding import apply_updates_stochastic

Batch: TypeAlias = Any
Params: TypeAlias = Any


class LayerwiseModel(NamedTuple):
    """A model as three pure functions of its parameters `{"blocks": stacked, "rest": rest}`.

    Every leaf of `blocks` has a leading axis of layers. `x` is a pytree of floating-point arrays. A
    block does not change the shapes and dtypes of `x`.

    Attributes:
      embed: The function before the first block, `(rest, batch) -> x`.
      block: The function of a block, `(one layer's parameters, x) -> x`, or `-> (x, aux)` if
        `has_aux`.
      loss: The function after the last block, `(rest, x, batch) -> scalar`, or `(rest, x, batch,
        aux) -> scalar` if `has_aux`. `aux` is summed over the layers.
      has_aux: Whether blocks return an auxiliary output, such as a balancing loss.
    """

    embed: Callable[[PyTree, Batch], PyTree]
    block: Callable[[PyTree, PyTree], Any]
    loss: Callable[..., Float[Array, ""]]
    has_aux: bool = False


class WeightFormat(NamedTuple):
    """How weights are read before use and written after an update, one layer at a time.

    Attributes:
      read: A function `params -> params` that returns the floating-point arrays that gradients are
        taken for.
      write: A function `(params, updates, key) -> params` that adds the updates of what `read`
        returned. The key is None if the step was called without a key. A format that needs a key
        then raises an error.
    """

    read: Callable[[Params], Params]
    write: Callable[[Params, PyTree, PRNGKeyArray | None], Params]


EXACT = WeightFormat(lambda params: params, lambda params, u, _: optax.apply_updates(params, u))
"""Reads the weights as they are, and adds updates by `optax.apply_updates`."""

STOCHASTIC = WeightFormat(lambda params: params, apply_updates_stochastic)
"""Reads bfloat16 or float16 weights as they are, and adds updates by `apply_updates_stochastic`."""


class GuardReport(NamedTuple):
    """What a guarded step did.

    A part is one layer, the entries of `rest` that only the loss reads, or all other entries of
    `rest`.

    Attributes:
      largest: The largest absolute value of all gradients, NaN or infinite if a gradient is.
      moved: The number of parts that were updated.
      parts: The number of parts.
    """

    largest: Float[Array, ""]
    moved: Int[Array, ""]
    parts: Int[Array, ""]
