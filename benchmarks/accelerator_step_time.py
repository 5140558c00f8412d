"""How long does the update take on an accelerator, next to Optax's optimizers?

    python -m benchmarks.accelerator_step_time

Times the update alone, compiled and in place, of all matrices of a LLaMA: 7B in bfloat16 and 350M
in float32 with the layers stacked, 130M in float32 with a leaf a matrix. Optimizers take their
turns twice, the second time in reverse; medians. `gigabytes_moved` counts what any program has to:
weights are read and written, the gradient is read, the state is read and written. Beside it the
rate of a copy on this chip. Writes `results/accelerator_step_time.json`; on an H200 two minutes.
"""

import argparse
import concurrent.futures
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import apollo_optax
from benchmarks.rows import RESULTS, Row, read_rows, write_rows
from examples.llama.config import MODELS

OUTPUT = RESULTS / "accelerator_step_time.json"
COMMAND = "python -m benchmarks.accelerator_step_time"
_RATE = 1e-4
_SECONDS, _MOST_STEPS = 0.5, 50
# Model, dtype, stacked, rank.
CASES = (
    ("7b", jnp.bfloat16, True, 256),
    ("350m", jnp.float32, True, 256),
    ("130m", jnp.float32, False, 192),
)

_MATRICES = apollo_optax.ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)

Make = Callable[[int], optax.GradientTransformation]


def _apollo(**others: Any) -> Make:
    return lambda rank: apollo_optax.apollo(
        _RATE, rank, weight_dimension_numbers=_MATRICES, **others
    )


def _mini(**others: Any) -> Make:
    return lambda rank: apollo_optax.apollo_mini(
        _RATE, weight_dimension_numbers=_MATRICES, **others
    )


OPTIMIZERS: dict[str, Make] = {
    "optax.sgd": lambda rank: optax.sgd(_RATE),
    "optax.adamw": lambda rank: optax.adamw(_RATE),
    "optax.adafactor": lambda rank: optax.adafactor(_RATE),
    "APOLLO-Mini": _mini(),
    "APOLLO": _apollo(),
    "APOLLO, Rademacher": _apollo(projection=apollo_optax.rademacher),
    "optax.contrib.muon": lambda rank: optax.contrib.muon(
        _RATE, muon_weight_dimension_numbers=_muon_numbers
    ),
}


def _muon_numbers(params: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(*_MATRICES), params)


def shapes(model: str, stacked: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a LLaMA's matrices, without embedding and head."""
    shape = MODELS[model]
    hidden, inner = shape.hidden_size, shape.intermediate_size
    of_a_layer = {f"{name}_proj": (hidden, hidden) for name in "qkvo"}
    of_a_layer |= {f"{name}_proj": (hidden, inner) for name in ("gate", "up")}
    of_a_layer["down_proj"] = (inner, hidden)
    if stacked:
        return {name: (shape.num_layers, *sides) for name, sides in of_a_layer.items()}
    return {
        f"{name}_{layer:02}": sides
        for layer in range(shape.num_layers)
        for name, sides in of_a_layer.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
    def one(key: Array) -> Array:
        return (0.02 * jax.random.normal(key, shape[-2:])).astype(dtype)

    if len(shape) == 2:
        return one(jax.random.key(seed))
    return jax.lax.map(one, jax.random.split(jax.random.key(seed), shape[0]))


def _arrays(model: str, dtype: Any, stacked: bool, first_seed: int) -> dict[str, Array]:
    """Other entries in each layer of a name: all leaves of a shape may share a program."""
    return {
        name: _random(shape, dtype, first_seed) * (1 + 0.01 * i)
        for i, (name, shape) in enumerate(shapes(model, stacked).items())
    }


class Timed:
    """An optimizer's compiled step, and what has been timed of it."""

    def __init__(self, optimizer: optax.GradientTransformation) -> None:
        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.init = jax.jit(optimizer.init)
        self.jitted = jax.jit(update, donate_argnums=(0, 1))
        self.seconds: list[float] = []
        self.compile_seconds = 0.0
        self.state_bytes = 0

    def compile(self, params: Any, grads: Any) -> None:
        """Compiles the step for these arrays or shapes."""
        began = time.perf_counter()
        self.update = self.jitted.lower(params, jax.eval_shape(self.init, params), grads).compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, params: Any, grads: Any) -> Any:
        """Times steps for half a second, and returns the weights that result."""
        state = self.init(params)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        for _ in range(2):
            params, state = jax.block_until_ready(self.update(params, state, grads))
        until = time.perf_counter() + _SECONDS
        for _ in range(_MOST_STEPS):
            began = time.perf_counter()
            params, state = jax.block_until_ready(self.update(params, state, grads))
            self.seconds.append(time.perf_counter() - began)
            if time.perf_counter() > until:
                break
        return params


def measure(model: str, dtype: Any, stacked: bool, rank: int, names: Sequence[str]) -> list[Row]:
    """A row for each optimizer."""
    grads = _arrays(model, dtype, stacked, 1)
    params = _arrays(model, dtype, stacked, 2)
    weight_bytes = sum(x.nbytes for x in params.values())
    timed = {name: Timed(OPTIMIZERS[name](rank)) for name in names}
    of_arrays = jax.eval_shape(lambda x: x, params)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(one.compile, of_arrays, of_arrays) for one in timed.values()]:
            done.result()
    for turn in (names, reversed(names)):
        for name in turn:
            params = timed[name].run(params, grads)
    medians = {name: statistics.median(one.seconds) for name, one in timed.items()}
    return [
        {
            "model": model,
            "dtype": jnp.dtype(dtype).name,
            "stacked": stacked,
            "rank": rank,
            "optimizer": name,
            "step_seconds": round(medians[name], 6),
            "over_adamw": round(medians[name] / medians["optax.adamw"], 3),
            "steps_timed": len(one.seconds),
            "state_bytes": one.state_bytes,
            "gigabytes_moved": round((3 * weight_bytes + 2 * one.state_bytes) / 1e9, 2),
        }
        for name, one in timed.items()
    ]


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of a gigabyte."""
    x = jnp.ones((1 << 28,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(copy(x))
        seconds.append(time.perf_counter() - began)
    return 2 * x.nbytes / statistics.median(seconds[2:])


def table(rows: Sequence[Row]) -> str:
    """Medians and their ratios to those of `optax.adamw`, in Markdown."""
    timed = [row for row in rows if "optimizer" in row]
    cases = dict.fromkeys((row["model"], row["dtype"], row["rank"]) for row in timed)
    found = {(row["model"], row["optimizer"]): row for row in timed}
    titles = [f"LLaMA-{model.upper()}, {dtype}, r = {rank}" for model, dtype, rank in cases]
    lines = ["| optimizer | " + " | ".join(f"{title} | over AdamW's" for title in titles) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(cases))
    for name in dict.fromkeys(row["optimizer"] for row in timed):
        cells = [name]
        for model, _, _ in cases:
            row = found.get((model, name))
            if row is None:
                cells += ["", ""]
                continue
            cells += [f"{1e3 * row['step_seconds']:.1f} ms", f"{row['over_adamw']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--model", choices=[case[0] for case in CASES], action="append")
    options = parser.parse_args()
    rows: list[Row] = [{"copy_gigabytes_a_second": round(copy_rate() / 1e9, 1)}]
    print(rows[0], flush=True)
    for case in CASES:
        if options.model and case[0] not in options.model:
            continue
        names = [n for n in OPTIMIZERS if (case[0], n) != ("7b", "optax.contrib.muon")]
        rows += measure(*case, names)
        write_rows(options.output, COMMAND, rows)
        print(table(rows), flush=True)
    print(table(read_rows(options.output)))


if __name__ == "__main__":
    main()
