"""What a layer-wise step is given and reports."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from apollo_optax._rounding import apply_updates_stochastic

Batch: TypeAlias = Any
Params: TypeAlias = Any


class LayerwiseModel(NamedTuple):
    """A model as three pure functions of its parameters `{"blocks": stacked, "rest": rest}`.

    Every leaf of `blocks` has a leading axis of layers. `x` is a pytree of floating-point arrays,
    of the same shapes and dtypes before and after a block.

    Attributes:
      embed: `(rest, batch) -> x`, before the first block.
      block: `(one layer's parameters, x) -> x`, or `-> (x, aux)` if `has_aux`.
      loss: `(rest, x, batch) -> scalar`, after the last block; `(rest, x, batch, aux)` if
        `has_aux`, with `aux` summed over the layers.
      has_aux: Whether blocks return an auxiliary output, such as a balancing loss.
    """

    embed: Callable[[PyTree, Batch], PyTree]
    block: Callable[[PyTree, PyTree], Any]
    loss: Callable[..., Float[Array, ""]]
    has_aux: bool = False


class WeightFormat(NamedTuple):
    """How weights are read before use and written after an update, one layer at a time.

    Attributes:
      read: `params -> params` of floating-point arrays, which gradients are taken for.
      write: `(params, updates, key) -> params`, adding the updates of what `read` returned. The key
        is None where the step was called without one; a format that needs one raises then.
    """

    read: Callable[[Params], Params]
    write: Callable[[Params, PyTree, PRNGKeyArray | None], Params]


EXACT = WeightFormat(lambda params: params, lambda params, u, _: optax.apply_updates(params, u))
"""Weights as they are, updates added by `optax.apply_updates`."""

STOCHASTIC = WeightFormat(lambda params: params, apply_updates_stochastic)
"""Weights as they are, updates added by `apply_updates_stochastic`: for bfloat16 and float16."""


class GuardReport(NamedTuple):
    """What a guarded step did.

    A part is a layer, what of `rest` only the loss reads, or all else of `rest`.

    Attributes:
      largest: Largest absolute value of any gradient, NaN or infinite if one is.
      moved: How many parts were updated.
      parts: How many parts there are.
    """

    largest: Float[Array, ""]
    moved: Int[Array, ""]
    parts: Int[Array, ""]
