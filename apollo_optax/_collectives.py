"""Counts the collectives of a compiled program, from its optimised HLO text.

A collective in a loop counts once for every trip. XLA writes the trips of a loop down for CPUs and
GPUs; for TPUs they are read off the loop's condition.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
    "send",
)
CALLED = re.compile(
    r"\b(?:body|calls|condition|to_apply|true_computation|false_computation)=(%?[\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}  # others end in their number: f32, s4, c64


class Instruction(NamedTuple):
    """One line of HLO: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool


@dataclass(frozen=True)
class Computation:
    """The instructions of a computation by name, in their order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(each for each in self.instructions.values() if each.is_root)


class Traffic(NamedTuple):
    """What a program communicates.

    Attributes:
      counts: Executions of each kind of collective in one run of the program.
      payloads: Their bytes.
      loops: Trips of each loop, None where the text does not tell.
    """

    counts: Counter[str]
    payloads: Counter[str]
    loops: tuple[int | None, ...]


def read_traffic(hlo: str) -> Traffic:
    """Walks a program from its entry and adds up the collectives.

    A device's payload of a collective is the larger of what it hands in and what it receives: the
    gathered array of an all-gather, the unreduced one of a reduce-scatter. A loop whose trips
    cannot be told counts once. Of the branches of a conditional all count.

    Args:
      hlo: Text of a compiled program, as `jax.stages.Compiled.as_text` gives it.

    Raises:
      ValueError: If the text has no entry computation, as that of a program not yet compiled.
    """
    computations, entry = _parse(hlo or "")
    if not entry:
        raise ValueError(
            f"hlo begins {str(hlo)[:40]!r} and has no entry computation; expected the text of a "
            "compiled program, jax.jit(f).lower(...).compile().as_text()"
        )
    counts: Counter[str] = Counter()
    payloads: Counter[str] = Counter()
    loops: list[int | None] = []
    chains: set[str] = set()

    def walk(name: str, runs: int) -> None:
        computation = computations[name]
        for instruction in computation.instructions.values():
            kind, chain = _kind(instruction), _chain(instruction)
            if kind and chain not in chains:
                counts[kind] += runs
                payloads[kind] += runs * _payload(instruction, computation)
            if kind and chain:
                chains.add(chain)
            runs_of_called = runs
            if instruction.opcode == "while":
                loops.append(_trip_count(instruction, computation, computations))
                runs_of_called *= 1 if loops[-1] is None else loops[-1]
            for called in _called(instruction):
                walk(called, runs_of_called)

    walk(entry, 1)
    return Traffic(counts, payloads, tuple(loops))


def _parse(hlo: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            shape, rest = _split_shape(match[3])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split_closing(rest)
            current.instructions[match[2]] = Instruction(
                match[2], shape, opcode, operands, attributes, bool(match[1])
            )
    return computations, entry


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


def _kind(instruction: Instruction) -> str | None:
    """The kind of collective that the instruction starts; None if it starts none."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
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
    handed = sum(
        _bytes(operand if "[" in operand else computation.instructions[operand].shape)
        for operand in _operands(instruction)
    )
    return max(handed, _bytes(received))


def _operands(instruction: Instruction) -> Iterator[str]:
    """The operands' names, or `shape name` where the text repeats the shape."""
    for operand in _split_tuple(f"({instruction.operands})"):
        if operand:
            yield operand if "[" in operand else operand.removeprefix("%")


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


def _bytes(shape: str) -> int:
    """Bytes of the arrays of a shape, without padding: `(bf16[2,3]{1,0}, f32[])` has 16."""
    bits = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,<=]*)\]", shape):
        elements = 1
        for size in filter(None, sizes.replace("<=", "").split(",")):
            elements *= int(size)
        bits += elements * _bits(dtype)
    return (bits + 7) // 8


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    number = re.match(r"[a-z]+(\d+)", dtype)
    return int(number[1]) if number else 0


def _attribute(instruction: Instruction, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return match and match[1]


def _called(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs; reductions too, which hold no collective."""
    if instruction.opcode.endswith(("-done", "-update")):  # "-start" has run them
        return
    for one, several in CALLED.findall(instruction.attributes):
        yield from (name.strip().removeprefix("%") for name in (one or several).split(","))


def _trip_count(
    loop: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> int | None:
    """How often a loop runs: as XLA notes it, or from a counter that grows by one to a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition = computations[_attribute(loop, "condition") or ""]
    root = condition.root
    if root.opcode != "compare" or _attribute(root, "direction") != "LT":
        return None
    counter, bound = (condition.instructions.get(name) for name in _operands(root))
    if counter is None or bound is None or counter.opcode != "get-tuple-element":
        return None
    (start,) = _operands(loop)
    index = int(_attribute(counter, "index") or 0)
    first = list(_operands(computation.instructions[start]))[index]
    end, begin = _constant(bound.name, condition), _constant(first, computation)
    return None if end is None or begin is None else max(0, end - begin)


def _constant(name: str, computation: Computation) -> int | None:
    """The integer an instruction holds, through copies."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "copy":
        return _constant(next(_operands(instruction)), computation)
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands):
        return int(instruction.operands)
    return None
