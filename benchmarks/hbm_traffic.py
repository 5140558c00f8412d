"""How many words of HBM does an update move for each parameter?

    JAX_PLATFORMS=cpu python -m benchmarks.hbm_traffic

Compiles the update alone, with its weight decay, learning rate and addition to the weights, of the
matrices of four layers of LLaMA-7B for a TPU v5e and an A100, with every optimizer, in float32 and
bfloat16. Adds a row each to `results/hbm_traffic.json`. Half an hour on two cores, and always the
same.

Words are of the weights' size: 3 for SGD (gradient, weight, new weight), 7 for AdamW. `hbm_words`
counts what the compiled program reads from and writes to HBM, each operand of an instruction once.
`compiler_words` is the TPU compiler's own sum, `bytes accessed`, which counts what it copies ahead
into the chip's fast memory three times: read from HBM, written there, and read from there.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import apollo_optax
from apollo_optax import ApolloDimensionNumbers, planning
from benchmarks.rows import RESULTS, Row, add_row, read_rows
from examples.llama.config import MODELS

OUTPUT = RESULTS / "hbm_traffic.json"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "hbm_traffic.png"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.hbm_traffic"
TARGETS = {"tpu-v5e": "TPU v5e", "a100-80gb": "A100"}
LAYERS = 4
DTYPES = ("float32", "bfloat16")
_LEARNING_RATE = 1e-3
_MATRIX = ApolloDimensionNumbers(-2, -1)
# Optax's GaLore takes no stacked layers: one layer of it, each matrix a leaf. A TPU's compiler did
# not end with its SVDs within six minutes.
_GALORE = "GaLore, r = 256"
_LEFT_OUT = (_GALORE, "tpu-v5e")


def _apollo(rank: int, **options: Any) -> Callable[[], optax.GradientTransformation]:
    return lambda: apollo_optax.apollo(
        _LEARNING_RATE, rank, weight_dimension_numbers=_MATRIX, **options
    )


def _muon() -> optax.GradientTransformation:
    spec = optax.contrib.MuonDimensionNumbers(-2, -1)
    return optax.contrib.muon(
        _LEARNING_RATE,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: spec, params),
    )


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGD": lambda: optax.sgd(_LEARNING_RATE),
    "AdamW": lambda: optax.adamw(_LEARNING_RATE),
    "Lion": lambda: optax.lion(_LEARNING_RATE),
    "Adafactor": lambda: optax.adafactor(_LEARNING_RATE),
    "Muon": _muon,
    _GALORE: lambda: optax.contrib.galore(_LEARNING_RATE, rank=256),
    "APOLLO-Mini": lambda: apollo_optax.apollo_mini(
        _LEARNING_RATE, weight_dimension_numbers=_MATRIX
    ),
    "APOLLO-Mini, kernel": lambda: apollo_optax.apollo_mini(
        _LEARNING_RATE, weight_dimension_numbers=_MATRIX, use_pallas=True
    ),
    "APOLLO, r = 128": _apollo(128),
    "APOLLO, r = 256": _apollo(256),
    "APOLLO, r = 256, Rademacher": _apollo(256, projection=apollo_optax.rademacher),
    "APOLLO, r = 128, kernel": _apollo(128, use_pallas=True),
    "APOLLO, r = 256, kernel": _apollo(256, use_pallas=True),
}


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
      ValueError: Of a loop whose trips the text does not tell.
    """
    computations, entry = _computations(hlo)

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


def _matrices(name: str, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Those of LLaMA-7B's layers that an optimizer is given."""
    shape = MODELS["7b"]
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    matrices = dict.fromkeys("qkvo", (hidden, hidden))
    matrices |= {"gate": (hidden, intermediate), "up": (hidden, intermediate)}
    matrices["down"] = (intermediate, hidden)
    stacked = () if name == _GALORE else (LAYERS,)
    return {
        matrix: jax.ShapeDtypeStruct((*stacked, *sizes), dtype)
        for matrix, sizes in matrices.items()
    }


def measure(name: str, dtype: str, target: str) -> Row:
    """Words of HBM for each parameter, by this module's count and, on a TPU, by the compiler's."""
    params = _matrices(name, dtype)
    compiled = compile_step(OPTIMIZERS[name](), params, target)
    word = sum(math.prod(leaf.shape) for leaf in params.values()) * jnp.dtype(dtype).itemsize
    row = {
        "optimizer": name,
        "dtype": dtype,
        "target": target,
        "layers": 1 if name == _GALORE else LAYERS,
        "hbm_words": round(hbm_bytes(compiled.as_text() or "") / word, 4),
    }
    analysis: Any = compiled.cost_analysis()
    if analysis:
        row["compiler_words"] = round(analysis["bytes accessed"] / word, 4)
    return row


def _wanted(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    done = {(row["optimizer"], row["dtype"], row["target"]) for row in rows}
    for wanted in itertools.product(OPTIMIZERS, DTYPES, TARGETS):
        if wanted not in done and (wanted[0], wanted[2]) != _LEFT_OUT:
            yield wanted


def table(rows: Sequence[Row]) -> str:
    """Words of HBM a parameter, in Markdown; the TPU compiler's sum after a slash."""
    found = {(row["optimizer"], row["dtype"], row["target"]): row for row in rows}
    columns = list(itertools.product(TARGETS, DTYPES))
    titles = [f"{TARGETS[target]}, {dtype} | over AdamW's" for target, dtype in columns]
    lines = [
        "| optimizer | " + " | ".join(titles) + " |",
        "| --- |" + " ---: | ---: |" * len(columns),
    ]
    for name in OPTIMIZERS:
        cells = [name]
        for target, dtype in columns:
            if (name, target) == _LEFT_OUT:
                cells += ["", ""]
                continue
            row, adamw = found[name, dtype, target], found["AdamW", dtype, target]
            of_compiler = f" / {row['compiler_words']:.2f}" if "compiler_words" in row else ""
            cells.append(f"{row['hbm_words']:.2f}{of_compiler}")
            cells.append(f"{row['hbm_words'] / adamw['hbm_words']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> None:
    """Draws the words of float32 updates as bars."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    found = {(row["optimizer"], row["dtype"], row["target"]): row["hbm_words"] for row in rows}
    labels = [name for name in OPTIMIZERS if name not in ("Muon", _GALORE)]
    colors = ["C1" if label.startswith("APOLLO") else "C0" for label in labels]
    panels = figure.subplots(1, len(TARGETS), sharey=True)
    for axes, (target, title) in zip(panels, TARGETS.items(), strict=True):
        words = [found[label, "float32", target] for label in labels]
        axes.bar_label(axes.barh(labels, words, color=colors), fmt="%.2f", padding=3)
        axes.margins(x=0.15)
        axes.set(title=title, xlabel="words of HBM a parameter, float32")
    panels[0].invert_yaxis()
    figure.savefig(IMAGE, dpi=120, metadata={"Software": None})


def main() -> None:
    """Compiles what has no row yet, draws the picture and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS], help="this one only, printed")
    options = parser.parse_args()
    if options.optimizer:
        for dtype, target in itertools.product(DTYPES, TARGETS):
            if (options.optimizer, target) == _LEFT_OUT:
                continue
            print(measure(options.optimizer, dtype, target))
        return
    for wanted in _wanted(read_rows(OUTPUT)):
        row = measure(*wanted)
        add_row(OUTPUT, COMMAND, row)
        print(row, flush=True)
    draw(read_rows(OUTPUT))
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
