"""Which steps are taken and which are skipped: what a bad batch or an overflow must not spoil."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, PyTree

__all__ = [
    "CAUSES",
    "Health",
    "Outcome",
    "cause_of",
    "judge",
    "largest_of",
    "max_loss",
    "new_health",
    "record",
]

CAUSES = ("", "not finite", "loss spike", "zero gradient")
"""What a verdict says: why a step was skipped; 0 if it was taken."""

_TAKEN, _NOT_FINITE, _SPIKE, _ZERO = range(len(CAUSES))
# From here on squares of gradients may not add up to a finite float32. A guarded layer-wise step
# has the same limit.
_SQUARES_OVERFLOW = 1e15
# The mean follows about the last 50 steps.
_DECAY = 0.98


class Health(NamedTuple):
    """What is remembered of the steps so far.

    Attributes:
      mean_loss: Running mean of the losses of steps that were taken, NaN before the first.
      skipped: How many steps were skipped.
      in_a_row: How many of them were the last ones.
    """

    mean_loss: Float[Array, ""]
    skipped: Int32[Array, ""]
    in_a_row: Int32[Array, ""]


class Outcome(NamedTuple):
    """What came of a step.

    Attributes:
      loss: Before the step, in nats a token.
      verdict: Index of `CAUSES`.
      moved: Of a layer-wise step, how many parts it updated, though it may be skipped.
      parts: Of a layer-wise step, how many there are.
    """

    loss: Float[Array, ""]
    verdict: Int32[Array, ""]
    moved: Int32[Array, ""] | int = 0
    parts: Int32[Array, ""] | int = 0


def cause_of(outcome: Outcome) -> str:
    """Returns why a step was skipped, and what it had updated already; "" if it was taken.

    >>> cause_of(Outcome(jnp.float32(2.0), jnp.int32(1), moved=2, parts=14))
    'not finite, after 2 of 14 parts were updated'
    """
    cause = CAUSES[int(outcome.verdict)]
    if not cause or not int(outcome.moved):
        return cause
    return f"{cause}, after {int(outcome.moved)} of {int(outcome.parts)} parts were updated"


def new_health() -> Health:
    """Returns the health before the first step."""
    return Health(jnp.full([], jnp.nan, jnp.float32), *jnp.zeros([2], jnp.int32))


def max_loss(health: Health, spike_limit: float) -> Float[Array, ""]:
    """Returns the loss above which a step is a spike.

    Args:
      health: Of the steps before.
      spike_limit: Nats above the mean; 0 for no limit.
    """
    if spike_limit == 0:
        return jnp.full([], jnp.inf, jnp.float32)
    return jnp.where(jnp.isnan(health.mean_loss), jnp.inf, health.mean_loss + spike_limit)


def largest_of(grads: PyTree) -> Float[Array, ""]:
    """Returns the largest absolute value, NaN if there is one."""
    return jnp.asarray(optax.tree.norm(grads, ord=jnp.inf), jnp.float32)


def judge(
    health: Health, loss: Float[Array, ""], largest: Float[Array, ""], *, spike_limit: float
) -> Int32[Array, ""]:
    """Returns the verdict on a step.

    Args:
      health: Of the steps before.
      loss: Of this one, before it.
      largest: Largest absolute value of its gradients.
      spike_limit: Nats above the mean of the losses; 0 for no limit.

    >>> health = new_health()._replace(mean_loss=jnp.float32(2.0))
    >>> verdict = judge(health, jnp.float32(6.0), jnp.float32(0.1), spike_limit=3.0)
    >>> CAUSES[int(verdict)]
    'loss spike'
    """
    finite = jnp.isfinite(loss) & (largest < _SQUARES_OVERFLOW)
    spike = loss > max_loss(health, spike_limit)
    causes = [(~finite, _NOT_FINITE), (spike, _SPIKE), (largest == 0, _ZERO)]
    conditions, verdicts = zip(*causes, strict=True)
    return jnp.select(conditions, [jnp.int32(v) for v in verdicts], jnp.int32(_TAKEN))


def record(health: Health, outcome: Outcome) -> Health:
    """Returns the health after a step."""
    taken = outcome.verdict == _TAKEN
    first = jnp.isnan(health.mean_loss)
    mean = jnp.where(first, outcome.loss, _DECAY * health.mean_loss + (1 - _DECAY) * outcome.loss)
    return Health(
        jnp.where(taken, mean, health.mean_loss),
        health.skipped + jnp.where(taken, 0, 1),
        jnp.where(taken, 0, health.in_a_row + 1),
    )
