"""Lower bounds of a compiled program's time: what it does, over the peaks of the chip.

Each is a bound for this program, whatever its schedule: it never says how fast a step is, only
how fast it cannot be.

- Products and convolutions alone count as operations, each at the peak for the smaller dtype of
  its operands. What is in an elementwise or reducing instruction is free.
- Arguments are read once and results written once, as far as the program touches them. What is in
  between may stay on the chip, in fusions or caches. As many bytes as a cache holds are free, at
  the beginning and at the end.
- A collective sends what it has to by any algorithm, over all links of a device at once. Groups
  count as packed on neighbouring devices.

A loop that does not tell its trips is free, and of branches the cheapest counts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from apollo_optax.planning._collectives import Exchange, continued_exchanges, exchange
from apollo_optax.planning._hbm import touched
from apollo_optax.planning._hlo import Computation, Instruction, Program, total
from apollo_optax.planning._products import products
from apollo_optax.planning._targets import Hop, Rates

_BETWEEN_SLICES = " between slices"


class Bounds(NamedTuple):
    """Seconds that a program takes on a device, at least, by what limits it."""

    compute_seconds: float
    memory_seconds: float
    collective_seconds: float


def bounds(program: Program, rates: Rates, device_count: int, slices: int = 1) -> Bounds:
    """The lower bounds of a program on devices with these peaks."""

    def compute(instruction: Instruction, computation: Computation) -> float:
        found = products(instruction, computation, program)
        return sum(operations / _peak(rates, bits) for operations, bits in found)

    return Bounds(
        total(program, compute, untold_trips=0),
        sum(max(0, size - rates.cache_bytes) for size in touched(program)) / rates.memory_bytes,
        _collective_seconds(program, rates.hops, device_count, slices),
    )


def operations(program: Program) -> float:
    """Operations of the products and convolutions.

    Raises:
      ValueError: Of a loop whose trips the text does not tell.
    """

    def count(instruction: Instruction, computation: Computation) -> float:
        return sum(operations for operations, _ in products(instruction, computation, program))

    return total(program, count)


def _peak(rates: Rates, bits: int) -> float:
    """Operations a second with operands of so many bits.

    Wider ones than the chip's table has are taken at its widest, narrower ones at as many times the
    narrowest as they are narrower.
    """
    if wide_enough := [width for width in rates.operations if width >= bits]:
        width = min(wide_enough)
        narrower = width / max(1, bits) if width == min(rates.operations) else 1
        return rates.operations[width] * narrower
    return rates.operations[max(rates.operations)]


def _collective_seconds(
    program: Program, hops: Sequence[Hop], device_count: int, slices: int
) -> float:
    """The slowest hop's; of each direction of a hop the busier."""
    continued = continued_exchanges(program)

    def over(hop: Hop, direction: int) -> float:
        def cost(instruction: Instruction, computation: Computation) -> float:
            found = exchange(instruction, computation)
            if found is None or instruction.name in continued:
                return 0
            return exchanged_bytes(found, hop, device_count, slices)[direction]

        return total(program, cost, into_fusions=True, untold_trips=0) / hop.bytes_per_second

    seconds = [over(hop, direction) for hop in hops for direction in (0, 1)]
    return max(seconds, default=0.0)


def exchanged_bytes(
    found: Exchange, hop: Hop, device_count: int, slices: int = 1
) -> tuple[float, float]:
    """Bytes that the devices of a hop send over it together, at least, and that they receive.

    The devices of a group on one side of the hop add up and share what they have before anything
    crosses. `reduces` means that the other side adds up and copies, so that a sum is sent once.
    """
    kind, groups = found.kind, 1
    devices, of_a_side = found.devices or device_count, hop.devices
    if kind.endswith(_BETWEEN_SLICES):
        # Each device of a slice is in a group with one of every other.
        kind = kind.removesuffix(_BETWEEN_SLICES)
        if hop.devices * slices < device_count or slices == 1:
            return 0, 0
        groups, devices, of_a_side = hop.devices, slices, 1
    here = min(devices, of_a_side)
    elsewhere = found.bytes * groups * (devices - here) / devices
    if not elsewhere:
        return 0, 0
    whole, own = found.bytes * groups, found.bytes * groups - elsewhere
    if kind == "all-reduce":
        sides = math.ceil(devices / here)
        return (whole, whole) if hop.reduces else (2 * whole * (sides - 1) / sides,) * 2
    if kind == "all-gather":
        return (own, elsewhere) if hop.reduces else (elsewhere, elsewhere)
    if kind == "reduce-scatter":
        return (elsewhere, own) if hop.reduces else (elsewhere, elsewhere)
    if kind == "all-to-all":
        return here * elsewhere, here * elsewhere
    if kind == "collective-broadcast":
        return 0, whole
    if kind == "collective-permute" and here == 1:
        return whole, whole
    return 0, 0
