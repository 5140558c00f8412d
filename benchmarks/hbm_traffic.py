"""How many words of HBM does an update move for each parameter?

    JAX_PLATFORMS=cpu python -m benchmarks.hbm_traffic

Compiles the update alone, with its weight decay, learning rate and addition to the weights, of the
matrices of four layers of LLaMA-7B for a TPU v5e and an A100, with every optimizer, in float32 and
bfloat16. The layers are stacked unless the name says that they are apart. Adds a row each to
`results/hbm_traffic.json`. Half an hour on two cores, and always the same.

Words are of the weights' size: 3 for SGD (gradient, weight, new weight), 7 for AdamW. `hbm_words`
counts what the compiled program reads from and writes to HBM, each operand of an instruction once.
`compiler_words` is the TPU compiler's own sum, `bytes accessed`, which counts what it copies ahead
into the chip's fast memory three times: read from HBM, written there, and read from there.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import apollo_optax
from apollo_optax import ApolloDimensionNumbers
from apollo_optax.experimental import pallas_tpu
from apollo_optax.planning._hbm import hbm_bytes
from apollo_optax.planning._hlo import parse_program
from apollo_optax.planning._plan import compile_update
from benchmarks.rows import RESULTS, Row, add_row, read_rows
from examples.llama.config import MODELS
from examples.llama.pictures import INK, picture

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
_APART = ", layers apart"


def _apollo(rank: int, **options: Any) -> Callable[[], optax.GradientTransformation]:
    return lambda: apollo_optax.apollo(
        _LEARNING_RATE, rank, weight_dimension_numbers=_MATRIX, **options
    )


def _apollo_mini() -> optax.GradientTransformation:
    return apollo_optax.apollo_mini(_LEARNING_RATE, weight_dimension_numbers=_MATRIX)


def _swan() -> optax.GradientTransformation:
    return apollo_optax.swan(_LEARNING_RATE, weight_dimension_numbers=_MATRIX)


def _muon() -> optax.GradientTransformation:
    spec = optax.contrib.MuonDimensionNumbers(-2, -1)
    return optax.contrib.muon(
        _LEARNING_RATE,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: spec, params),
    )


# Of TPUs, where rank 1 needs none: XLA joins the two reads by itself.
_KERNEL = ", kernel"
_LEFT_OUT = {
    (_GALORE, "tpu-v5e"),
    *((f"APOLLO, r = {rank}{_KERNEL}", "a100-80gb") for rank in (128, 256)),
}


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGD": lambda: optax.sgd(_LEARNING_RATE),
    "AdamW": lambda: optax.adamw(_LEARNING_RATE),
    "Lion": lambda: optax.lion(_LEARNING_RATE),
    "Adafactor": lambda: optax.adafactor(_LEARNING_RATE),
    "Muon": _muon,
    "SWAN": _swan,
    _GALORE: lambda: optax.contrib.galore(_LEARNING_RATE, rank=256),
    "APOLLO-Mini": _apollo_mini,
    f"APOLLO-Mini{_APART}": lambda: apollo_optax.apollo_mini(_LEARNING_RATE),
    "APOLLO, r = 128": _apollo(128),
    "APOLLO, r = 256": _apollo(256),
    f"APOLLO, r = 256{_APART}": _apollo(256),
    "APOLLO, r = 256, Rademacher": _apollo(256, projection=apollo_optax.rademacher),
    f"APOLLO, r = 128{_KERNEL}": _apollo(128, implementation=pallas_tpu),
    f"APOLLO, r = 256{_KERNEL}": _apollo(256, implementation=pallas_tpu),
}


def _matrices(name: str, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Those of LLaMA-7B's layers that an optimizer is given."""
    shape = MODELS["7b"]
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    matrices = dict.fromkeys("qkvo", (hidden, hidden))
    matrices |= {"gate": (hidden, intermediate), "up": (hidden, intermediate)}
    matrices["down"] = (intermediate, hidden)
    if name.endswith(_APART):
        matrices = {f"{key}_{layer}": matrices[key] for layer in range(LAYERS) for key in matrices}
    stacked = () if name == _GALORE or name.endswith(_APART) else (LAYERS,)
    return {
        matrix: jax.ShapeDtypeStruct((*stacked, *sizes), dtype)
        for matrix, sizes in matrices.items()
    }


def measure(name: str, dtype: str, target: str) -> Row:
    """Words of HBM for each parameter, by this project's count and, on a TPU, by the compiler's."""
    params = _matrices(name, dtype)
    compiled = compile_update(OPTIMIZERS[name](), params, target)
    moved_bytes = hbm_bytes(parse_program(compiled.as_text() or ""))
    word = sum(math.prod(leaf.shape) for leaf in params.values()) * jnp.dtype(dtype).itemsize
    row = {
        "optimizer": name,
        "dtype": dtype,
        "target": target,
        "layers": 1 if name == _GALORE else LAYERS,
        "hbm_words": round(moved_bytes / word, 4),
    }
    analysis: Any = compiled.cost_analysis()
    if analysis:
        row["compiler_words"] = round(analysis["bytes accessed"] / word, 4)
    return row


def _wanted(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    done = {(row["optimizer"], row["dtype"], row["target"]) for row in rows}
    for wanted in itertools.product(OPTIMIZERS, DTYPES, TARGETS):
        if wanted not in done and (wanted[0], wanted[2]) not in _LEFT_OUT:
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
            if (name, target) in _LEFT_OUT:
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
    found = {(row["optimizer"], row["dtype"], row["target"]): row["hbm_words"] for row in rows}
    labels = [name for name in OPTIMIZERS if name not in ("Muon", "SWAN", _GALORE)]
    colors = ["C0" if label.startswith("APOLLO") else INK for label in labels]
    with picture(IMAGE, width=8.0, height=4.0) as figure:
        panels = figure.subplots(1, len(TARGETS), sharey=True)
        for axes, (target, title) in zip(panels, TARGETS.items(), strict=True):
            words = [found.get((label, "float32", target), 0) for label in labels]
            figures = [f"{word:.2f}" if word else "" for word in words]
            axes.bar_label(axes.barh(labels, words, color=colors), figures, padding=3)
            axes.margins(x=0.15)
            axes.set(title=title, xlabel="words of HBM a parameter, float32")
        panels[0].invert_yaxis()


def main() -> None:
    """Compiles what has no row yet, draws the picture and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS], help="this one only, printed")
    options = parser.parse_args()
    if options.optimizer:
        for dtype, target in itertools.product(DTYPES, TARGETS):
            if (options.optimizer, target) in _LEFT_OUT:
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
