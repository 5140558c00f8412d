"""Takes the optimised HLO text of a compiled program apart, and adds up what its instructions cost.

What is in a loop counts once for every trip. XLA writes the trips of a loop down for CPUs and GPUs;
for TPUs they are read off the loop's condition.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
    "send",
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


Cost: TypeAlias = Callable[[Instruction, Computation], float]
"""What an instruction costs, by itself; the computation is where it stands."""


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


def total(
    program: Program, cost: Cost, *, into_fusions: bool = False, untold_trips: int | None = None
) -> float:
    """Adds up what the instructions of a program cost, at least.

    Loops count as often as they run; of branches the cheapest, as in a step that keeps its
    projection.

    Args:
      program: Of `parse_program`.
      cost: Of an instruction.
      into_fusions: Whether the instructions of a fusion count too, beside the fusion.
      untold_trips: How often a loop runs whose trips the text does not tell.

    Raises:
      ValueError: Of a loop whose trips the text does not tell, if `untold_trips` is None.
    """

    def of(name: str) -> float:
        computation = program.computations[name]
        return sum(of_one(instruction, computation) for instruction in computation.values())

    def of_one(instruction: Instruction, computation: Computation) -> float:
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(instruction, computation, program)
            trips = untold_trips if trips is None else trips
            if trips is None:
                raise ValueError(f"the loop {instruction.name} does not tell its trips")
            return trips * of(attribute_of(instruction, "body") or "") if trips else 0
        if opcode == "conditional":
            return _cheapest(list(called_by(instruction)), of)
        if opcode in ("call", "call-start", "async-start"):
            return sum(of(name) for name in called_by(instruction))
        own = cost(instruction, computation)
        if opcode == "fusion" and into_fusions:
            own += sum(of(name) for name in called_by(instruction))
        return own

    return of(program.entry)


def root_of(computation: Computation) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def parameters_of(computation: Computation) -> dict[int, str]:
    """Their names by number."""
    return {int(i.operands): i.name for i in computation.values() if i.opcode == "parameter"}


def executions(
    program: Program, name: str, runs: int
) -> Iterator[tuple[Instruction, Computation, int]]:
    """Each instruction that a computation runs, where it stands, and how often it runs."""
    computation = program.computations[name]
    for instruction in computation.values():
        yield instruction, computation, runs
        trips = None
        if instruction.opcode == "while":
            trips = trip_count(instruction, computation, program)
        for called in called_by(instruction):
            yield from executions(program, called, runs if trips is None else runs * trips)


def _cheapest(branches: Sequence[str], of: Callable[[str], float]) -> float:
    """Of those that can be counted: a branch may have a loop until it converges, as an SVD has."""
    counts, refusal = [], ValueError("a conditional without branches")
    for branch in branches:
        try:
            counts.append(of(branch))
        except ValueError as error:
            refusal = error
    if not counts:
        raise refusal
    return min(counts)


def received_shape(instruction: Instruction) -> str:
    """The shape of what an instruction makes, without what an asynchronous one keeps beside it."""
    opcode, parts = instruction.opcode, _split_tuple(instruction.shape)
    if opcode in ("send", "recv") or "__cu" in instruction.attributes:
        return parts[0]  # the last is the workspace of NVIDIA's library
    if opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
        # After the operands, before the compiler's own words.
        return instruction.shape if opcode == "all-reduce-start" else parts[1]
    return instruction.shape


def trip_count(loop: Instruction, computation: Computation, program: Program) -> int | None:
    """How often a loop runs: as XLA notes it, or from a counter that grows by one to a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition = program.computations[attribute_of(loop, "condition") or ""]
    root = root_of(condition)
    if root.opcode != "compare" or attribute_of(root, "direction") != "LT":
        return None
    counter, bound = (condition.get(name) for name in operands_of(root))
    if counter is None or bound is None or counter.opcode != "get-tuple-element":
        return None
    (state,) = (computation[name] for name in operands_of(loop))
    if state.opcode != "tuple":
        return None
    first = operands_of(state)[int(attribute_of(counter, "index") or 0)]
    end, begin = _constant(bound.name, condition), _constant(first, computation)
    return None if end is None or begin is None else max(0, end - begin)


def _constant(name: str, computation: Computation) -> int | None:
    """The integer an instruction holds, through copies."""
    instruction = computation.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "copy":
        return _constant(operands_of(instruction)[0], computation)
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands):
        return int(instruction.operands)
    return None


def called_by(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs; reductions too, which hold no collective."""
    if instruction.opcode.endswith(("-done", "-update")):  # "-start" has run them
        return
    for one, several in _CALLED.findall(instruction.attributes):
        yield from (name.strip().removeprefix("%") for name in (one or several).split(","))


def attribute_of(instruction: Instruction, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return match and match[1]


def operands_of(instruction: Instruction) -> list[str]:
    """The names of the operands, also where the text repeats their shapes."""
    operands = _split_tuple(f"({instruction.operands})")
    return [operand.split(" ")[-1].removeprefix("%") for operand in operands if operand]


def arrays_of(shape: str) -> list[Array]:
    """The arrays of a shape: `(bf16[2,3]{1,0}, f32[]{:S(1)})` has 12 bytes in HBM and 4 elsewhere.

    Memories other than HBM have an S(n) in the layout.
    """
    return [
        Array(
            (bits_of(dtype) * math.prod(int(size) for size in re.findall(r"\d+", sizes)) + 7) // 8,
            not re.search(r"S\([1-9]", layout),
        )
        for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
    ]


def sizes_of(shape: str) -> list[int]:
    """Of the first array."""
    array = re.search(r"\w+\[([\d,<=]*)\]", shape)
    return [int(size) for size in re.findall(r"\d+", array[1])] if array else []


def elements_of(instruction: Instruction) -> int:
    return math.prod(sizes_of(instruction.shape))


def bits_of(dtype: str) -> int:
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
