"""Reads the optimised HLO text of a compiled program: its collectives, and the bytes it moves.

What is in a loop counts once for every trip. XLA writes the trips of a loop down for CPUs and GPUs;
for TPUs they are read off the loop's condition.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
    "send",
)
_MOVES_NOTHING = (
    *("parameter", "constant", "get-tuple-element", "bitcast", "tuple", "after-all"),
    *("copy-done", "slice-done", "async-done", "partition-id", "iota"),
)
_CALLED = re.compile(
    r"\b(?:body|calls|condition|to_apply|true_computation|false_computation)=(%?[\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """One line of HLO: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool


Computation: TypeAlias = dict[str, Instruction]
"""The instructions of a computation by name, in their order."""


class Program(NamedTuple):
    """The computations of a program by name, and the name of the first to run."""

    computations: dict[str, Computation]
    entry: str


class Array(NamedTuple):
    """An array in a shape: its bytes without padding, and whether it is in HBM."""

    bytes: int
    is_in_hbm: bool


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one step.

    Attributes:
      count: How often they run, those in loops once a trip.
      bytes: Bytes of a device's arrays in them, the larger of what it hands in and what it receives
        of each. What travels over the links is up to twice that, by the algorithm.
    """

    count: int
    bytes: int


class Traffic(NamedTuple):
    """What a program communicates.

    Attributes:
      collectives: By kind, in the order of their names.
      loops: Trips of each loop, None where the text does not tell.
    """

    collectives: dict[str, Collective]
    loops: tuple[int | None, ...]


def parse_program(hlo: str) -> Program:
    """Takes the text of a compiled program, `jax.stages.Compiled.as_text()`, apart.

    Raises:
      ValueError: If the text has no entry computation, as that of a program not yet compiled.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    for line in (hlo or "").splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            shape, rest = _split_shape(match[3])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split_closing(rest)
            current[match[2]] = Instruction(
                match[2], shape, opcode, operands, attributes, bool(match[1])
            )
    if not entry:
        raise ValueError(
            f"hlo begins {str(hlo)[:40]!r} and has no entry computation; expected the text of a "
            "compiled program, jax.jit(f).lower(...).compile().as_text()"
        )
    return Program(computations, entry)


def read_traffic(program: Program) -> Traffic:
    """Walks a program from its entry and adds up the collectives.

    A device's payload of a collective is the larger of what it hands in and what it receives: the
    gathered array of an all-gather, the unreduced one of a reduce-scatter. A loop whose trips
    cannot be told counts once. Of the branches of a conditional all count.
    """
    counts: Counter[str] = Counter()
    payloads: Counter[str] = Counter()
    loops: list[int | None] = []
    chains: set[str] = set()
    for instruction, computation, runs in _executions(program, program.entry, 1):
        if instruction.opcode == "while":
            loops.append(_trip_count(instruction, computation, program))
        kind, chain = _kind(instruction), _chain(instruction)
        if kind and chain not in chains:
            counts[kind] += runs
            payloads[kind] += runs * _payload(instruction, computation)
        if kind and chain:
            chains.add(chain)
    collectives = {kind: Collective(counts[kind], payloads[kind]) for kind in sorted(counts)}
    return Traffic(collectives, tuple(loops))


def hbm_bytes(program: Program) -> int:
    """Bytes that a program compiled for a TPU or a GPU moves between HBM and the chip.

    Every instruction reads its operands and writes its result once, if they are in HBM. Loops count
    as often as they run; of branches the cheapest, as in a step that keeps its projection.

    Raises:
      ValueError: Of a loop whose trips the text does not tell.
    """
    return _moved_by_computation(program.entry, program)


def _executions(
    program: Program, name: str, runs: int
) -> Iterator[tuple[Instruction, Computation, int]]:
    """Each instruction that a computation runs, where it stands, and how often it runs."""
    computation = program.computations[name]
    for instruction in computation.values():
        yield instruction, computation, runs
        trips = None
        if instruction.opcode == "while":
            trips = _trip_count(instruction, computation, program)
        for called in _called(instruction):
            yield from _executions(program, called, runs if trips is None else runs * trips)


def _moved_by_computation(name: str, program: Program) -> int:
    computation = program.computations[name]
    return sum(_moved(instruction, computation, program) for instruction in computation.values())


def _moved(instruction: Instruction, computation: Computation, program: Program) -> int:
    """Bytes that an instruction moves, with what it calls."""
    if instruction.opcode in _MOVES_NOTHING or "ConcatBitcast" in instruction.attributes:
        return 0
    if instruction.opcode == "while":
        trips = _trip_count(instruction, computation, program)
        if trips is None:
            raise ValueError(f"the loop {instruction.name} does not tell its trips")
        return trips * _moved_by_computation(_attribute(instruction, "body") or "", program)
    if instruction.opcode == "conditional":
        return _cheapest(list(_called(instruction)), program)
    if instruction.opcode == "call":
        return sum(_moved_by_computation(name, program) for name in _called(instruction))
    arrays = _arrays(instruction.shape)
    if instruction.opcode in ("copy-start", "slice-start"):
        # (destination, source, context), or ((sources), destination, context).
        is_copy = instruction.opcode == "copy-start"
        destination, source = arrays[:2] if is_copy else (arrays[-2], arrays[0])
        return destination.bytes * (destination.is_in_hbm + source.is_in_hbm)
    arrays += _operand_arrays(instruction, computation)
    return sum(array.bytes for array in arrays if array.is_in_hbm)


def _cheapest(branches: Sequence[str], program: Program) -> int:
    """Of those that can be counted: a branch may have a loop until it converges, as an SVD has."""
    counts, refusal = [], ValueError("a conditional without branches")
    for branch in branches:
        try:
            counts.append(_moved_by_computation(branch, program))
        except ValueError as error:
            refusal = error
    if not counts:
        raise refusal
    return min(counts)


def _kind(instruction: Instruction) -> str | None:
    """The kind of collective that the instruction starts; None if it starts none."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in _COLLECTIVES:
        return None
    # A collective between TPU slices is handed to the host's runtime, which is told what it is.
    if between := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes):
        return between[1].lower().replace("_", "-") + " between slices"
    # TPUs write a reduce-scatter as a fusion of an all-reduce and the slice of it that is kept.
    if opcode == "all-reduce" and "from-cross-replica-sharding" in instruction.attributes:
        return "reduce-scatter"
    return opcode


def _chain(instruction: Instruction) -> str | None:
    """What the parts of one collective share where TPUs spread it over several fusions."""
    if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
        return f"{chain[1]} {_attribute(instruction, 'channel_id')}"
    return None


def _payload(instruction: Instruction, computation: Computation) -> int:
    received = instruction.shape
    parts = _split_tuple(received)
    if instruction.opcode in ("send", "recv"):
        received = parts[0]
    elif instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        received = parts[1]  # after the operands, before the compiler's own words
    shapes = _arrays(received), _operand_arrays(instruction, computation)
    return max(sum(array.bytes for array in arrays) for arrays in shapes)


def _trip_count(loop: Instruction, computation: Computation, program: Program) -> int | None:
    """How often a loop runs: as XLA notes it, or from a counter that grows by one to a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition = program.computations[_attribute(loop, "condition") or ""]
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode != "compare" or _attribute(root, "direction") != "LT":
        return None
    counter, bound = (condition.get(name) for name in _operands(root))
    if counter is None or bound is None or counter.opcode != "get-tuple-element":
        return None
    (state,) = (computation[name] for name in _operands(loop))
    if state.opcode != "tuple":
        return None
    first = _operands(state)[int(_attribute(counter, "index") or 0)]
    end, begin = _constant(bound.name, condition), _constant(first, computation)
    return None if end is None or begin is None else max(0, end - begin)


def _constant(name: str, computation: Computation) -> int | None:
    """The integer an instruction holds, through copies."""
    instruction = computation.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "copy":
        return _constant(_operands(instruction)[0], computation)
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands):
        return int(instruction.operands)
    return None


def _called(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs; reductions too, which hold no collective."""
    if instruction.opcode.endswith(("-done", "-update")):  # "-start" has run them
        return
    for one, several in _CALLED.findall(instruction.attributes):
        yield from (name.strip().removeprefix("%") for name in (one or several).split(","))


def _attribute(instruction: Instruction, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return match and match[1]


def _operands(instruction: Instruction) -> list[str]:
    """The names of the operands, also where the text repeats their shapes."""
    operands = _split_tuple(f"({instruction.operands})")
    return [operand.split(" ")[-1].removeprefix("%") for operand in operands if operand]


def _operand_arrays(instruction: Instruction, computation: Computation) -> list[Array]:
    shapes = (computation[name].shape for name in _operands(instruction))
    return [array for shape in shapes for array in _arrays(shape)]


def _arrays(shape: str) -> list[Array]:
    """The arrays of a shape: `(bf16[2,3]{1,0}, f32[]{:S(1)})` has 12 bytes in HBM and 4 elsewhere.

    Memories other than HBM have an S(n) in the layout.
    """
    return [
        Array(
            (_bits(dtype) * math.prod(int(size) for size in re.findall(r"\d+", sizes)) + 7) // 8,
            not re.search(r"S\([1-9]", layout),
        )
        for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
    ]


def _bits(dtype: str) -> int:
    """Of an element: the number in its name, as in s4, f8e4m3fn or c64; tokens have none."""
    if dtype == "pred":
        return 8
    number = re.match(r"[a-z]+(\d+)", dtype)
    return int(number[1]) if number else 0


def _split_shape(text: str) -> tuple[str, str]:
    """Splits `(f32[2], s32[]) opcode(...` or `f32[2]{0:T(128)} opcode(...` before the opcode."""
    if text.startswith("("):
        inside, rest = _split_closing(text[1:])
        return f"({inside})", rest.lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _split_closing(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes the one before `text`."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    return text, ""


def _split_tuple(text: str) -> list[str]:
    """Splits `(a, (b, c), d)` into its parts at the outermost level."""
    text = re.sub(r"/\*.*?\*/", "", text)
    if not text.startswith("("):
        return [text]
    parts, depth, start = [], 0, 1
    for match in re.finditer(r"[(){}\[\],]", text):
        if match[0] in "({[":
            depth += 1
        elif match[0] != ",":
            depth -= 1
        if (match[0] == "," and depth == 1) or depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return parts
