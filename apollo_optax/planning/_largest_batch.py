"""The search for the largest batch that fits a target."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apollo_optax.planning._plan import Plan, compile_for
from apollo_optax.planning._targets import Target


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The result of `largest_batch`.

    Attributes:
      batch: The largest batch that fits, or 0 if none does.
      plan: The plan of that batch, or None if no batch fits.
      next_plan: The plan of the smallest batch found not to fit, or None if the limit still fits.
      plans: The plans of all batches that were tried. The batch with the highest bound on
        throughput need not be the largest. Near the capacity of a chip its compiler computes some
        things twice.
    """

    batch: int
    plan: Plan | None
    next_plan: Plan | None
    plans: Mapping[int, Plan] = dataclasses.field(default_factory=dict)


def largest_batch(
    target: str | Target,
    build: Callable[[int], tuple[Callable[..., Any], Sequence[Any]]],
    *,
    multiple_of: int = 1,
    limit: int = 65536,
    **options: Any,
) -> LargestBatch:
    """Searches for the largest batch that fits.

    The peak grows nearly linearly with the batch. A line through two peaks finds the batch in about
    four compilations. Bisection in between bounds the number of compilations for other peaks.

    Args:
      target: As for `compile_for`.
      build: A function that returns the step and its arguments for a batch,
        `batch -> (step, args)`.
      multiple_of: A divisor of all batches that are tried, such as the number of devices that share
        a batch.
      limit: The largest batch to try.
      **options: As for `compile_for`: `donate_argnums`, `mesh`, ...

    Returns:
      The batch, its plan, and the plan of the next one that does not fit.

    Raises:
      ValueError: If `multiple_of` is not positive, or the limit is below `multiple_of`.

    >>> import jax
    >>> def build(batch):
    ...     return lambda x: x.sum(), [jax.ShapeDtypeStruct((batch, 2**26), "float32")]
    >>> found = largest_batch("cpu", build)
    >>> found.plan.fits, found.next_plan.fits, found.batch > 0
    (True, False, True)
    """
    if multiple_of < 1 or limit < multiple_of:
        raise ValueError(
            f"multiple_of must be 1 or more and limit at least multiple_of, got {multiple_of=} "
            f"and {limit=}"
        )

    def plan_of(multiple: int) -> Plan:
        step, args = build(multiple * multiple_of)
        return compile_for(target, step, *args, **options)

    plans: dict[int, Plan] = {}
    most, candidate = limit // multiple_of, 1
    fits, refused = 0, most + 1
    while refused - fits > 1:
        plan = plans[candidate] = plan_of(candidate)
        fits, refused = (candidate, refused) if plan.fits else (fits, candidate)
        candidate = _next_candidate(plans, fits, refused, most)
    tried = {multiple * multiple_of: plan for multiple, plan in plans.items()}
    return LargestBatch(fits * multiple_of, plans.get(fits), plans.get(refused), tried)


def _next_candidate(plans: Mapping[int, Plan], fits: int, refused: int, most: int) -> int:
    """Where a line through the two plans nearest to the capacity says that the last fits.

    Every other time the middle instead, for peaks that are no line.
    """
    if fits == 0:
        return 1
    if refused in plans and len(plans) % 2:
        return (fits + refused) // 2
    largest = min(16 * fits, most) if refused > most else refused - 1
    points = sorted(plans.items(), key=lambda at: abs(at[1].peak_bytes - at[1].capacity_bytes))
    if len(points) < 2:
        return min(2 * fits, most)
    (batch, plan), (other_batch, other) = points[:2]
    slope = (plan.peak_bytes - other.peak_bytes) / (batch - other_batch)
    if slope <= 0:
        return largest
    room = (plan.capacity_bytes - plan.peak_bytes) / slope
    return min(max(batch + math.floor(room), fits + 1), largest)
