"""Reads the optimised HLO text of a compiled program: its collectives, products and traffic.

What is in a loop counts once for every trip. XLA writes the trips of a loop down for CPUs and GPUs;
for TPUs they are read off the loop's condition.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

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
    *("partition-id", "replica-id", "iota", "opt-barrier"),
)
_MOVES_NOTHING_ITSELF = re.compile("ConcatBitcast|AllocateBuffer|AsyncCollective")
_TAKES_A_PART = ("dynamic-slice", "slice")
# The rows that they pick may all be one.
_PICKS_ROWS = ("gather", "scatter")
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
    """The collectives of one kind in one step.

    Attributes:
      count: How often they run. A collective in a loop counts once per trip.
      bytes: The bytes of a device's arrays: for each collective, the larger of what the device
        hands in and what it receives. Up to twice as many bytes travel over the links, depending on
        the algorithm.
    """

    count: int
    bytes: int


class Moved(NamedTuple):
    """Bytes that an instruction reads from HBM and writes there."""

    read: float
    written: float


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


Cost: TypeAlias = Callable[[Instruction, Computation], float]
"""What an instruction costs, by itself; the computation is where it stands."""


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
    continued = continued_exchanges(program)
    for instruction, computation, runs in _executions(program, program.entry, 1):
        if instruction.opcode == "while":
            loops.append(_trip_count(instruction, computation, program))
        found = exchange(instruction, computation)
        if found and instruction.name not in continued:
            counts[found.kind] += runs
            payloads[found.kind] += runs * found.bytes
    collectives = {kind: Collective(counts[kind], payloads[kind]) for kind in sorted(counts)}
    return Traffic(collectives, tuple(loops))


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
            trips = _trip_count(instruction, computation, program)
            trips = untold_trips if trips is None else trips
            if trips is None:
                raise ValueError(f"the loop {instruction.name} does not tell its trips")
            return trips * of(_attribute(instruction, "body") or "") if trips else 0
        if opcode == "conditional":
            return _cheapest(list(_called(instruction)), of)
        if opcode in ("call", "call-start", "async-start"):
            return sum(of(name) for name in _called(instruction))
        own = cost(instruction, computation)
        if opcode == "fusion" and into_fusions:
            own += sum(of(name) for name in _called(instruction))
        return own

    return of(program.entry)


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
    opcode, arrays = instruction.opcode, _arrays(_received(instruction))
    if (
        opcode in _MOVES_NOTHING
        or opcode.endswith(("-done", "-update"))
        or _MOVES_NOTHING_ITSELF.search(instruction.attributes)
    ):
        return Moved(0, 0)
    if opcode in ("copy-start", "slice-start"):
        # (destination, source, context), or ((sources), destination, context).
        arrays = _arrays(instruction.shape)
        destination, source = arrays[:2] if opcode == "copy-start" else (arrays[-2], arrays[0])
        size = destination.bytes
        return Moved(size * source.is_in_hbm, size * destination.is_in_hbm)
    names = _operands(instruction)
    if opcode == "fusion":
        inside = program.computations[_attribute(instruction, "calls") or ""]
        share = _shares_read(inside)
        parameters = _parameters(inside)
        shares = {name: share(parameters[number]) for number, name in enumerate(names)}
        root = _root(inside)
    else:
        inside, root = computation, instruction
        shares = {name: _share_read(instruction, name, 1, computation) for name in names}
    read = sum(
        share * sum(array.bytes for array in _arrays(computation[name].shape) if array.is_in_hbm)
        for name, share in shares.items()
    )
    parts = _operands(root) if root.opcode == "tuple" else [root.name]
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
        functools.cache(lambda name: _shares_read(program.computations[name])),
    )
    entry = program.computations[program.entry]
    root = _root(entry)
    is_tuple = root.shape.startswith("(")
    return Moved(
        sum(
            _share_touched(uses, program.entry, name, None) * _arrays(entry[name].shape)[0].bytes
            for name in _parameters(entry).values()
        ),
        sum(
            _bytes_made(program, program.entry, root.name, number if is_tuple else None, array)
            for number, array in enumerate(_arrays(root.shape))
        ),
    )


def _share_touched(uses: Uses, where: str, name: str, element: int | None) -> float:
    """The share that is read of an array, or of one in a tuple, in a run of a computation."""
    computation = uses.program.computations[where]
    share = 0.0
    for user in uses.users(where).get(name, ()):
        opcode = user.opcode
        if element is not None:
            if opcode == "get-tuple-element" and _attribute(user, "index") == str(element):
                share += _share_touched(uses, where, user.name, None)
            elif opcode == "while":
                share += _share_touched_in_loop(uses, where, user, element)
        elif opcode in ("bitcast", "copy", "copy-start", "copy-done"):
            share += _share_touched(uses, where, user.name, None)
        elif opcode == "tuple":
            numbers = [k for k, operand in enumerate(_operands(user)) if operand == name]
            share += sum(_share_touched(uses, where, user.name, k) for k in numbers)
        elif opcode in ("fusion", "call"):
            called = next(_called(user))
            parameters = _parameters(uses.program.computations[called])
            parameter = parameters[_operands(user).index(name)]
            if opcode == "fusion":
                share += uses.shares(called)(parameter)
            else:
                share += _share_touched(uses, called, parameter, None)
        elif opcode not in ("while", "conditional", "call-start", "async-start"):
            share += _share_read(user, name, 1, computation)
    return min(1, share)


def _share_touched_in_loop(uses: Uses, where: str, loop: Instruction, element: int) -> float:
    trips = _trip_count(loop, uses.program.computations[where], uses.program) or 0
    body = _attribute(loop, "body") or ""
    (state,) = _parameters(uses.program.computations[body]).values()
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
    operands = _operands(made)
    if made.opcode == "get-tuple-element":
        return _bytes_made(program, where, operands[0], int(_attribute(made, "index") or 0), array)
    if made.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
        return _bytes_made(program, where, operands[0], None, array)
    if made.opcode == "tuple" and element is not None:
        return _bytes_made(program, where, operands[element], None, array)
    if made.opcode == "while" and element is not None:
        body = _attribute(made, "body") or ""
        if _is_handed_on(program.computations[body], element):
            return _bytes_made(program, where, operands[0], element, array)
        trips = _trip_count(made, computation, program) or 0
        root = _root(program.computations[body])
        return min(array.bytes, trips * _bytes_made(program, body, root.name, element, array))
    if made.opcode in ("fusion", "call"):
        called = next(_called(made))
        root = _root(program.computations[called])
        return _bytes_made(program, called, root.name, element, array)
    if made.opcode == "conditional":
        return 0
    return _written(array, made, computation)


def _is_handed_on(body: Computation, element: int) -> bool:
    """Whether a loop leaves an element of its state as it is."""
    root = _root(body)
    if root.opcode != "tuple":
        return False
    kept = body[_operands(root)[element]]
    return (
        kept.opcode == "get-tuple-element"
        and body[_operands(kept)[0]].opcode == "parameter"
        and _attribute(kept, "index") == str(element)
    )


def _root(computation: Computation) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _parameters(computation: Computation) -> dict[int, str]:
    """Their names by number."""
    return {int(i.operands): i.name for i in computation.values() if i.opcode == "parameter"}


def _users(computation: Computation) -> defaultdict[str, list[Instruction]]:
    """The instructions that have each as an operand."""
    users: defaultdict[str, list[Instruction]] = defaultdict(list)
    for user in computation.values():
        if user.opcode not in ("parameter", "constant"):
            for name in dict.fromkeys(_operands(user)):
                users[name].append(user)
    return users


def _shares_read(inside: Computation) -> Callable[[str], float]:
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
    first = _operands(user)[0] == name
    if first and user.opcode in ("dynamic-slice", "slice"):
        return needed * _elements(user) / max(1, _elements(inside[name]))
    if user.opcode == "slice-start":
        return _arrays(user.shape)[-2].bytes / max(1, _arrays(inside[name].shape)[0].bytes)
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
        return _written(array, inside[_operands(result)[0]], inside)
    if result.opcode == "dynamic-update-slice":
        return _arrays(inside[_operands(result)[1]].shape)[0].bytes
    if result.opcode in ("parameter", "scatter", "send") or _MOVES_NOTHING_ITSELF.search(
        result.attributes
    ):
        return 0
    return array.bytes


def products(
    instruction: Instruction, computation: Computation, program: Program
) -> Iterator[tuple[float, int]]:
    """Matrix products and convolutions, also in a fusion: operations, bits of an operand.

    A multiplication and an addition are two. Products with the padding of a convolution do not
    count, nor what a fusion does not need of a result. Bits are those of the smaller operand, ahead
    of a conversion that stands beside the product.
    """
    if instruction.opcode == "fusion":
        inside = program.computations[_attribute(instruction, "calls") or ""]
        share = _shares_read(inside)
        for part in inside.values():
            for operations, bits in products(part, inside, program):
                yield operations * share(part.name), bits
        return
    names = _operands(instruction)
    if instruction.opcode == "convolution":
        depth = _convolution_depth(instruction, *(computation[name] for name in names))
    elif axes := re.search(
        r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)[\]}]', instruction.attributes
    ):  # of a dot, or of NVIDIA's library in the words of its call
        sizes = _sizes(computation[names[0]].shape)
        depth = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    else:
        return
    bits = min(_narrowest_bits(name, computation) for name in names[:2])
    yield 2 * _elements(instruction) * depth, bits


def _convolution_depth(convolution: Instruction, image: Instruction, kernel: Instruction) -> float:
    """Products that are added up for one element of the result, in the mean."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if not labels:
        raise ValueError(f"the convolution {convolution.name} has no dim_labels")
    of_image, of_kernel, of_result = (
        dict(zip(label, _sizes(instruction.shape), strict=True))
        for label, instruction in zip(labels.groups(), (image, kernel, convolution), strict=True)
    )
    depth: float = of_kernel["i"]
    for axis, (stride, low, spread, reach) in enumerate(_windows(convolution)):
        label = str(axis)
        places = np.arange(of_result[label])[:, None] * stride - low
        places = places + np.arange(of_kernel[label]) * reach
        end = (of_image[label] - 1) * spread
        inside = (places >= 0) & (places <= end) & (places % spread == 0)
        depth *= int(inside.sum()) / of_result[label]
    return depth


def _windows(convolution: Instruction) -> list[tuple[int, int, int, int]]:
    """For each spatial axis stride, low padding, and dilations of image and kernel."""
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    if not window:
        return []
    told = dict(part.split("=") for part in window[1].split())
    axes = len(told["size"].split("x"))

    def numbers(name: str, default: int) -> list[int]:
        words = told[name].split("x") if name in told else [str(default)] * axes
        return [int(word.split("_")[0]) for word in words]

    columns = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    return list(zip(*(numbers(*column) for column in columns), strict=True))


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


def exchange(instruction: Instruction, computation: Computation) -> Exchange | None:
    """The collective that the instruction starts; None if it starts none."""
    kind = _kind(instruction)
    if kind is None:
        return None
    shapes = _arrays(_received(instruction)), _operand_arrays(instruction, computation)
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
                identity = f"{chain[1]} {_attribute(instruction, 'channel_id')}"
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


def _received(instruction: Instruction) -> str:
    """The shape of what an instruction makes, without what an asynchronous one keeps beside it."""
    opcode, parts = instruction.opcode, _split_tuple(instruction.shape)
    if opcode in ("send", "recv") or "__cu" in instruction.attributes:
        return parts[0]  # the last is the workspace of NVIDIA's library
    if opcode.removesuffix("-start") in _COLLECTIVES and opcode.endswith("-start"):
        # After the operands, before the compiler's own words.
        return instruction.shape if opcode == "all-reduce-start" else parts[1]
    return instruction.shape


def _trip_count(loop: Instruction, computation: Computation, program: Program) -> int | None:
    """How often a loop runs: as XLA notes it, or from a counter that grows by one to a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition = program.computations[_attribute(loop, "condition") or ""]
    root = _root(condition)
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


def _sizes(shape: str) -> list[int]:
    """Of the first array."""
    array = re.search(r"\w+\[([\d,<=]*)\]", shape)
    return [int(size) for size in re.findall(r"\d+", array[1])] if array else []


def _elements(instruction: Instruction) -> int:
    return math.prod(_sizes(instruction.shape))


def _narrowest_bits(name: str, computation: Computation) -> int:
    """Of a number in an array, or in what it is a conversion or another layout of."""
    instruction = computation[name]
    bits = _component_bits(instruction.shape)
    if instruction.opcode in ("convert", "bitcast", "copy", "transpose", "reshape", "broadcast"):
        return min(bits, _narrowest_bits(_operands(instruction)[0], computation))
    return bits


def _component_bits(shape: str) -> int:
    """Of a number in the first array; a complex one has two."""
    dtype = re.search(r"(\w+)\[", shape)
    bits = _bits(dtype[1]) if dtype else 0
    return bits // 2 if dtype and dtype[1].startswith("c") else bits


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
