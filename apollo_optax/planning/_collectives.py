"""The collectives of a compiled program."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from apollo_optax.planning._hlo import (
    COLLECTIVES,
    Array,
    Computation,
    Instruction,
    Program,
    arrays_of,
    attribute_of,
    executions,
    operands_of,
    received_shape,
    trip_count,
)


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind in one step.

    Attributes:
      count: How often they run. A collective in a loop counts once per trip.
      bytes: The bytes of a device's arrays: for each collective, the larger of what the device
        hands in and what it receives. Up to twice as many bytes travel over the links, depending on
        the algorithm.
    """

    count: int
    bytes: int


class Exchange(NamedTuple):
    """One collective.

    Attributes:
      kind: As in `Plan.collectives`.
      bytes: As in `Collective`.
      devices: Devices of a group that exchange something; None for all that there are.
    """

    kind: str
    bytes: int
    devices: int | None


class Traffic(NamedTuple):
    """What a program communicates.

    Attributes:
      collectives: By kind, in the order of their names.
      loops: Trips of each loop, None where the text does not tell.
    """

    collectives: dict[str, Collective]
    loops: tuple[int | None, ...]


def read_traffic(program: Program) -> Traffic:
    """Walks a program from its entry and adds up the collectives.

    A device's payload of a collective is the larger of what it hands in and what it receives: the
    gathered array of an all-gather, the unreduced one of a reduce-scatter. A loop whose trips
    cannot be told counts once. Of the branches of a conditional all count.
    """
    counts: Counter[str] = Counter()
    payloads: Counter[str] = Counter()
    loops: list[int | None] = []
    continued = continued_exchanges(program)
    for instruction, computation, runs in executions(program, program.entry, 1):
        if instruction.opcode == "while":
            loops.append(trip_count(instruction, computation, program))
        found = exchange(instruction, computation)
        if found and instruction.name not in continued:
            counts[found.kind] += runs
            payloads[found.kind] += runs * found.bytes
    collectives = {kind: Collective(counts[kind], payloads[kind]) for kind in sorted(counts)}
    return Traffic(collectives, tuple(loops))


def _kind(instruction: Instruction) -> str | None:
    """The kind of collective that the instruction starts; None if it starts none."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in COLLECTIVES:
        return None
    # A collective between TPU slices is handed to the host's runtime, which is told what it is.
    if between := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes):
        return between[1].lower().replace("_", "-") + " between slices"
    # TPUs write a reduce-scatter as a fusion of an all-reduce and the slice of it that is kept.
    if opcode == "all-reduce" and "from-cross-replica-sharding" in instruction.attributes:
        return "reduce-scatter"
    return opcode


def exchange(instruction: Instruction, computation: Computation) -> Exchange | None:
    """The collective that the instruction starts; None if it starts none."""
    kind = _kind(instruction)
    if kind is None:
        return None
    shapes = arrays_of(received_shape(instruction)), _operand_arrays(instruction, computation)
    payload = max(sum(array.bytes for array in arrays) for arrays in shapes)
    return Exchange(kind, payload, _group_size(instruction))


def continued_exchanges(program: Program) -> set[str]:
    """Names of the instructions that go on with a collective which another has started.

    TPUs spread one over several fusions, whose instructions have a chain in common.
    """
    chains: set[str] = set()
    continued = set()
    for computation in program.computations.values():
        for instruction in computation.values():
            if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
                identity = f"{chain[1]} {attribute_of(instruction, 'channel_id')}"
                if _kind(instruction) and identity in chains:
                    continued.add(instruction.name)
                elif _kind(instruction):
                    chains.add(identity)
    return continued


def _group_size(instruction: Instruction) -> int | None:
    """Devices of the smallest group; None where the text means all of them."""
    attributes = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return 1 + any(a != b for a, b in re.findall(r"(\d+),(\d+)", pairs[1]))
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        # An axis, or a part of one: 'data' or 'data':(2)4, of which 4 is the size.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(size or sizes[name]) for name, size in parts)
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return min(len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return None


def _operand_arrays(instruction: Instruction, computation: Computation) -> list[Array]:
    shapes = (computation[name].shape for name in operands_of(instruction))
    return [array for shape in shapes for array in arrays_of(shape)]
