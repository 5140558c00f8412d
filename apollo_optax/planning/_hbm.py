"""The bytes that a compiled program moves between the chip and its memory."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from apollo_optax.planning._hlo import (
    Array,
    Computation,
    Instruction,
    Program,
    arrays_of,
    attribute_of,
    called_by,
    elements_of,
    operands_of,
    parameters_of,
    received_shape,
    root_of,
    total,
    trip_count,
)

_MOVES_NOTHING = (
    *("parameter", "constant", "get-tuple-element", "bitcast", "tuple", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier"),
)
_MOVES_NOTHING_ITSELF = re.compile("ConcatBitcast|AllocateBuffer|AsyncCollective")


class Moved(NamedTuple):
    """Bytes that an instruction reads from HBM and writes there."""

    read: float
    written: float


class Uses(NamedTuple):
    """A program with what is asked of it again and again, by the name of a computation.

    Attributes:
      program: Of `parse_program`.
      users: The instructions that have each array as an operand.
      shares: The share of each array in a fusion that its results need.
    """

    program: Program
    users: Callable[[str], dict[str, list[Instruction]]]
    shares: Callable[[str], Callable[[str], float]]


def hbm_bytes(program: Program) -> int:
    """Bytes that a program compiled for a TPU or a GPU moves between HBM and the chip.

    Every instruction reads its operands and writes its result once, if they are in HBM; of an
    operand that is sliced, and of a result that is one with a part replaced, that part. Rows that
    are looked up do not count, and what a GPU's cache saves is not known. As `total` has it
    otherwise.

    Raises:
      ValueError: Of a loop whose trips the text does not tell.
    """
    return round(total(program, lambda instruction, at: sum(moved(instruction, at, program))))


def moved(instruction: Instruction, computation: Computation, program: Program) -> Moved:
    """Bytes that an instruction moves by itself."""
    opcode, arrays = instruction.opcode, arrays_of(received_shape(instruction))
    if (
        opcode in _MOVES_NOTHING
        or opcode.endswith(("-done", "-update"))
        or _MOVES_NOTHING_ITSELF.search(instruction.attributes)
    ):
        return Moved(0, 0)
    if opcode in ("copy-start", "slice-start"):
        # (destination, source, context), or ((sources), destination, context).
        arrays = arrays_of(instruction.shape)
        destination, source = arrays[:2] if opcode == "copy-start" else (arrays[-2], arrays[0])
        size = destination.bytes
        return Moved(size * source.is_in_hbm, size * destination.is_in_hbm)
    names = operands_of(instruction)
    if opcode == "fusion":
        inside = program.computations[attribute_of(instruction, "calls") or ""]
        share = shares_read(inside)
        parameters = parameters_of(inside)
        shares = {name: share(parameters[number]) for number, name in enumerate(names)}
        root = root_of(inside)
    else:
        inside, root = computation, instruction
        shares = {name: _share_read(instruction, name, 1, computation) for name in names}
    read = sum(
        share * sum(array.bytes for array in arrays_of(computation[name].shape) if array.is_in_hbm)
        for name, share in shares.items()
    )
    parts = operands_of(root) if root.opcode == "tuple" else [root.name]
    if len(parts) != len(arrays):
        return Moved(read, sum(array.bytes for array in arrays if array.is_in_hbm))
    return Moved(
        read,
        sum(
            _written(array, inside[part], inside)
            for array, part in zip(arrays, parts, strict=True)
            if array.is_in_hbm
        ),
    )


def touched(program: Program) -> Moved:
    """Bytes of the arguments that a program reads and of the results that it writes.

    They cross between the chip and its memory however instructions are fused in between. What is
    sliced counts in part, also where a loop takes a slice in each of its trips, and what the
    program hands on as it is does not count. As little as the text allows: the branches of
    conditionals and loops that do not tell their trips touch nothing.
    """
    uses = Uses(
        program,
        functools.cache(lambda name: _users(program.computations[name])),
        functools.cache(lambda name: shares_read(program.computations[name])),
    )
    entry = program.computations[program.entry]
    root = root_of(entry)
    is_tuple = root.shape.startswith("(")
    return Moved(
        sum(
            _share_touched(uses, program.entry, name, None) * arrays_of(entry[name].shape)[0].bytes
            for name in parameters_of(entry).values()
        ),
        sum(
            _bytes_made(program, program.entry, root.name, number if is_tuple else None, array)
            for number, array in enumerate(arrays_of(root.shape))
        ),
    )


def _share_touched(uses: Uses, where: str, name: str, element: int | None) -> float:
    """The share that is read of an array, or of one in a tuple, in a run of a computation."""
    computation = uses.program.computations[where]
    share = 0.0
    for user in uses.users(where).get(name, ()):
        opcode = user.opcode
        if element is not None:
            if opcode == "get-tuple-element" and attribute_of(user, "index") == str(element):
                share += _share_touched(uses, where, user.name, None)
            elif opcode == "while":
                share += _share_touched_in_loop(uses, where, user, element)
        elif opcode in ("bitcast", "copy", "copy-start", "copy-done"):
            share += _share_touched(uses, where, user.name, None)
        elif opcode == "tuple":
            numbers = [k for k, operand in enumerate(operands_of(user)) if operand == name]
            share += sum(_share_touched(uses, where, user.name, k) for k in numbers)
        elif opcode in ("fusion", "call"):
            called = next(called_by(user))
            parameters = parameters_of(uses.program.computations[called])
            parameter = parameters[operands_of(user).index(name)]
            if opcode == "fusion":
                share += uses.shares(called)(parameter)
            else:
                share += _share_touched(uses, called, parameter, None)
        elif opcode not in ("while", "conditional", "call-start", "async-start"):
            share += _share_read(user, name, 1, computation)
    return min(1, share)


def _share_touched_in_loop(uses: Uses, where: str, loop: Instruction, element: int) -> float:
    trips = trip_count(loop, uses.program.computations[where], uses.program) or 0
    body = attribute_of(loop, "body") or ""
    (state,) = parameters_of(uses.program.computations[body]).values()
    share = trips * _share_touched(uses, body, state, element)
    if _is_handed_on(uses.program.computations[body], element):
        share += _share_touched(uses, where, loop.name, element)
    return share


def _bytes_made(
    program: Program, where: str, name: str, element: int | None, array: Array
) -> float:
    """Bytes written of a result: of an array, or of one in a tuple, in a run of a computation."""
    computation = program.computations[where]
    made = computation[name]
    operands = operands_of(made)
    if made.opcode == "get-tuple-element":
        return _bytes_made(
            program, where, operands[0], int(attribute_of(made, "index") or 0), array
        )
    if made.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
        return _bytes_made(program, where, operands[0], None, array)
    if made.opcode == "tuple" and element is not None:
        return _bytes_made(program, where, operands[element], None, array)
    if made.opcode == "while" and element is not None:
        body = attribute_of(made, "body") or ""
        if _is_handed_on(program.computations[body], element):
            return _bytes_made(program, where, operands[0], element, array)
        trips = trip_count(made, computation, program) or 0
        root = root_of(program.computations[body])
        return min(array.bytes, trips * _bytes_made(program, body, root.name, element, array))
    if made.opcode in ("fusion", "call"):
        called = next(called_by(made))
        root = root_of(program.computations[called])
        return _bytes_made(program, called, root.name, element, array)
    if made.opcode == "conditional":
        return 0
    return _written(array, made, computation)


def _is_handed_on(body: Computation, element: int) -> bool:
    """Whether a loop leaves an element of its state as it is."""
    root = root_of(body)
    if root.opcode != "tuple":
        return False
    kept = body[operands_of(root)[element]]
    return (
        kept.opcode == "get-tuple-element"
        and body[operands_of(kept)[0]].opcode == "parameter"
        and attribute_of(kept, "index") == str(element)
    )


def _users(computation: Computation) -> defaultdict[str, list[Instruction]]:
    """The instructions that have each as an operand."""
    users: defaultdict[str, list[Instruction]] = defaultdict(list)
    for user in computation.values():
        if user.opcode not in ("parameter", "constant"):
            for name in dict.fromkeys(operands_of(user)):
                users[name].append(user)
    return users


def shares_read(inside: Computation) -> Callable[[str], float]:
    """The share of each array in a fusion that its results need, at least."""
    users = _users(inside)

    @functools.cache
    def share(name: str) -> float:
        if inside[name].is_root:
            return 1
        shares = (_share_read(user, name, share(user.name), inside) for user in users[name])
        return min(1, sum(shares))

    return share


def _share_read(user: Instruction, name: str, needed: float, inside: Computation) -> float:
    """The share of an operand that an instruction reads where `needed` is that of its result."""
    first = operands_of(user)[0] == name
    if first and user.opcode in ("dynamic-slice", "slice"):
        return needed * elements_of(user) / max(1, elements_of(inside[name]))
    if user.opcode == "slice-start":
        return arrays_of(user.shape)[-2].bytes / max(1, arrays_of(inside[name].shape)[0].bytes)
    # The rows that are picked may all be one. What is replaced in part stays where it is, and what
    # is handed on is not read.
    if (
        (first and user.opcode in ("gather", "scatter", "dynamic-update-slice"))
        or (user.opcode == "concatenate" and needed < 1)
        or (user.opcode == "tuple" and inside[name].opcode == "parameter")
        or _MOVES_NOTHING_ITSELF.search(user.attributes)
    ):
        return 0
    return needed


def _written(array: Array, result: Instruction, inside: Computation) -> int:
    """Bytes written of an array that an instruction, in a fusion or not, makes."""
    if result.opcode == "bitcast":
        return _written(array, inside[operands_of(result)[0]], inside)
    if result.opcode == "dynamic-update-slice":
        return arrays_of(inside[operands_of(result)[1]].shape)[0].bytes
    if result.opcode in ("parameter", "scatter", "send") or _MOVES_NOTHING_ITSELF.search(
        result.attributes
    ):
        return 0
    return array.bytes
