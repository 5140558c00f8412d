"""Skips the steps that would spoil the weights: those of a bad batch or an overflow.

Optax's `apply_if_finite` does not see the loss, nor gradients whose squares overflow, and applies
the update after so many bad ones in a row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, PyTree

__all__ = [
    "CAUSES",
    "Outcome",
    "SkipState",
    "cause_of",
    "judged",
    "max_loss",
    "new_state",
    "skip_bad_steps",
]

CAUSES = ("", "not finite", "loss spike", "zero gradient")
"""Why a step was skipped, by the number that a state and an outcome have; 0 if it was taken."""

# From here on squares of gradients may not add up to a finite float32. A guarded layer-wise step
# has the same limit.
_SQUARES_OVERFLOW = 1e15
# The mean follows about the last 50 steps.
_DECAY = 0.98


class SkipState(NamedTuple):
    """An optimizer's state and what is remembered of the steps so far.

    Attributes:
      inner_state: The optimizer's state.
      mean_loss: Running mean of the losses of steps that were taken, NaN before the first.
      skipped: How many steps were skipped.
      in_a_row: How many of them were the last ones.
      cause: Index of `CAUSES` of the last step.
    """

    inner_state: optax.OptState
    mean_loss: Float[Array, ""]
    skipped: Int32[Array, ""]
    in_a_row: Int32[Array, ""]
    cause: Int32[Array, ""]


class Outcome(NamedTuple):
    """What came of a step.

    Attributes:
      loss: Before the step, in nats a token.
      cause: Index of `CAUSES`; None where no step is skipped.
      moved: Of a layer-wise step, how many parts it updated, though it may be skipped.
      parts: Of a layer-wise step, how many there are.
    """

    loss: Float[Array, ""]
    cause: Int32[Array, ""] | None = None
    moved: Int32[Array, ""] | None = None
    parts: Int32[Array, ""] | None = None


def cause_of(outcome: Outcome) -> str:
    """Returns why a step was skipped, and what it had updated already; "" if it was taken.

    >>> cause_of(Outcome(jnp.float32(2.0), jnp.int32(1), moved=2, parts=14))
    'not finite, after 2 of 14 parts were updated'
    """
    cause = "" if outcome.cause is None else CAUSES[int(outcome.cause)]
    if not cause or not outcome.moved:
        return cause
    return f"{cause}, after {outcome.moved} of {outcome.parts} parts were updated"


def new_state(inner_state: optax.OptState) -> SkipState:
    """Returns the state before the first step."""
    return SkipState(inner_state, jnp.full([], jnp.nan, jnp.float32), *jnp.zeros([3], jnp.int32))


def max_loss(state: SkipState, spike_limit: float) -> Float[Array, ""]:
    """Returns the loss above which the next step is a spike: so many nats above the mean."""
    no_limit = jnp.isnan(state.mean_loss) | (spike_limit == 0)
    return jnp.where(no_limit, jnp.inf, state.mean_loss + spike_limit)


def judged(
    state: SkipState, loss: Float[Array, ""], largest: Float[Array, ""], *, spike_limit: float
) -> SkipState:
    """Returns the state after a step with this loss and this largest gradient, but for the
    optimizer's own.

    >>> state = new_state(None)._replace(mean_loss=jnp.float32(2.0))
    >>> state = judged(state, jnp.float32(6.0), jnp.float32(0.1), spike_limit=3.0)
    >>> CAUSES[int(state.cause)], int(state.skipped)
    ('loss spike', 1)
    """
    finite = jnp.isfinite(loss) & (largest < _SQUARES_OVERFLOW)
    conditions = [~finite, loss > max_loss(state, spike_limit), largest == 0]
    cause = jnp.select(conditions, list(jnp.arange(1, len(CAUSES), dtype=jnp.int32)), jnp.int32(0))
    taken, first = cause == 0, jnp.isnan(state.mean_loss)
    mean = jnp.where(first, loss, _DECAY * state.mean_loss + (1 - _DECAY) * loss)
    return SkipState(
        state.inner_state,
        jnp.where(taken, mean, state.mean_loss),
        state.skipped + ~taken,
        jnp.where(taken, 0, state.in_a_row + 1),
        cause,
    )


def _largest(tree: PyTree) -> Float[Array, ""]:
    # XLA's CPU compiler leaves NaN out of the maximum of a large float32 array.
    is_nan = jnp.stack([jnp.isnan(x).any() for x in jax.tree.leaves(tree)]).any()
    largest = optax.tree.norm(tree, ord=jnp.inf).astype(jnp.float32)
    return jnp.where(is_nan, jnp.nan, largest)


def skip_bad_steps(
    inner: optax.GradientTransformation, spike_limit: float
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with an update of zero, and its state as it was, for a bad step.

    `update` takes the loss before the step as `value`.

    Args:
      inner: Any optimizer.
      spike_limit: Nats above the running mean from which a loss is a spike, 0 for never. Steps
        whose loss or gradients are not finite, or whose gradients are all zero, are skipped always.
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree,
        state: SkipState,
        params: PyTree | None = None,
        *,
        value: Float[Array, ""],
        **extra_args: Any,
    ) -> tuple[PyTree, SkipState]:
        after = judged(state, value, _largest(updates), spike_limit=spike_limit)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, value=value, **extra_args
        )
        taken = after.cause == 0
        updates = jax.tree.map(lambda u: jnp.where(taken, u, 0), updates)
        inner_state = optax.tree.where(taken, inner_state, state.inner_state)
        return updates, after._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(lambda p: new_state(inner.init(p)), update)
