"""Counts the bytes that a compiled update moves between HBM and the chip, from its HLO text."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from apollo_optax import planning


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


# A shape may be a tuple of tuples.
_SHAPE = r"\((?:[^()]|\([^()]*\)|\((?:[^()]|\([^()]*\))*\))*\)|\S+"
_INSTRUCTION = re.compile(rf"\s*(?:ROOT )?%([\w.\-]+) = ({_SHAPE}) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_MOVES_NOTHING = {
    *("parameter", "constant", "get-tuple-element", "bitcast", "tuple", "after-all"),
    *("copy-done", "slice-done", "async-done", "partition-id", "iota"),
}


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a shape, and whether it is in HBM: other memories have an S(n)."""
    return [
        (
            _BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size),
            not re.search(r"S\([1-9]", layout),
        )
        for dtype, sizes, layout in _ARRAY.findall(shape)
        if dtype in _BYTES
    ]


def _in_hbm(shape: str) -> int:
    return sum(size for size, is_hbm in _arrays(shape) if is_hbm)


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation of a module, and the name of the first to run."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    return found, entry


def hbm_bytes(hlo: str) -> int:
    """Bytes that a compiled program moves between HBM and the chip.

    Every instruction reads its operands and writes its result once, if they are in HBM. Loops count
    as often as they run; of branches the cheapest, as in a step that keeps its projection.

    Args:
      hlo: Text of a module that is compiled for a TPU or a GPU.

    Raises:
      ValueError: Of a loop whose trips the text does not tell, or a text without an entry.
    """
    computations, entry = _computations(hlo)
    if not entry:
        raise ValueError(
            f"hlo begins {hlo[:40]!r} and has no entry computation; expected the text of a "
            "compiled program, jax.jit(f).lower(...).compile().as_text()"
        )

    def count(name: str) -> int:
        shapes = {each.name: each.shape for each in computations[name]}
        return sum(_moved(each, shapes, count) for each in computations[name])

    return count(entry)


def _cheapest(branches: Sequence[str], count: Callable[[str], int]) -> int:
    """Of those that can be counted: a branch may have a loop until it converges, as an SVD has."""
    counts, refused = [], ValueError("a conditional without branches")
    for branch in branches:
        try:
            counts.append(count(branch))
        except ValueError as error:
            refused = error
    if not counts:
        raise refused
    return min(counts)


def _moved(each: _Instruction, shapes: dict[str, str], count: Callable[[str], int]) -> int:
    if each.opcode in _MOVES_NOTHING or "ConcatBitcast" in each.rest:
        return 0
    called = dict(re.findall(r"(\w+)=%([\w.\-]+)", each.rest))
    if each.opcode == "while":
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', each.rest)
        if trips is None:
            raise ValueError(f"the loop {each.name} does not tell its trips")
        return int(trips[1]) * count(called["body"])
    if each.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", each.rest)
        names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
        names += [called[key] for key in ("true_computation", "false_computation") if key in called]
        return _cheapest(names, count)
    if each.opcode == "call":
        return count(called["to_apply"])
    if each.opcode in ("copy-start", "slice-start"):
        # (destination, source, context), or ((sources), destination, context).
        arrays = _arrays(each.shape)
        (size, is_hbm), (_, source_is_hbm) = (
            arrays[:2] if each.opcode == "copy-start" else (arrays[-2], arrays[0])
        )
        return size * (is_hbm + source_is_hbm)
    operands = re.findall(r"%([\w.\-]+)", each.rest.split("), ")[0])
    return _in_hbm(each.shape) + sum(_in_hbm(shapes.get(name, "")) for name in operands)


def compile_step(
    optimizer: optax.GradientTransformation, params: Any, target: str
) -> jax.stages.Compiled:
    """The update and its addition to the weights, in place, compiled for one chip.

    Args:
      optimizer: Its gradients are like the parameters.
      params: Their shapes.
      target: A name of `planning.parse_target`, of one device.
    """
    platform = planning.parse_target(target).platform
    sharding = None
    if platform:
        sharding = NamedSharding(planning.mesh_for(target, {"data": 1}), PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(0, 1))
    state = jax.eval_shape(optimizer.init, params)
    traced = step.trace(placed(params), placed(state), placed(params))
    # Nothing can be timed on a GPU that is not there.
    options = {"xla_gpu_autotune_level": 0} if platform == "cuda" else {}
    return traced.lower(lowering_platforms=(platform,) if platform else None).compile(options)
