"""How long does the update take on this machine, next to other optimizers?

    python -m benchmarks.step_time
    pip install torch apollo-torch   # before it, to have PyTorch's and the authors' in the same run

Times the update alone, compiled and in place, of all matrices of LLaMA-60M and 130M in float32, a
leaf each: those of Optax and this package by JAX, and where they are installed PyTorch's fused
AdamW and `apollo-torch`, which is under CC-BY-NC. Optimizers take turns in another order each time,
so that a machine's drift and what the last one left meet them all; medians. Writes
`results/step_time.json`; twenty minutes. `--model` and `--rounds` are for a chip of your own.

`apollo-torch` draws a projection once in 200 steps and keeps it; this package draws it in every
step and keeps nothing.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import apollo_optax
from benchmarks.rows import RESULTS, Row, read_rows, write_rows
from examples.llama.config import MODELS

OUTPUT = RESULTS / "step_time.json"
COMMAND = "python -m benchmarks.step_time"
_LEARNING_RATE = 1e-3
# An optimizer that takes a second is timed every eighth turn only.
_SLOW_SECONDS, _SKIPPED_BY_SLOW = 1.0, 8
_PAPER_RANKS = {"60m": 128, "130m": 192}

Step = Callable[[], None]

JAX_OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "optax.sgd": lambda rank: optax.sgd(_LEARNING_RATE),
    "optax.adamw": lambda rank: optax.adamw(_LEARNING_RATE),
    "optax.adafactor": lambda rank: optax.adafactor(_LEARNING_RATE),
    "optax.contrib.muon": lambda rank: optax.contrib.muon(_LEARNING_RATE),
    "SWAN": lambda rank: apollo_optax.swan(_LEARNING_RATE),
    "APOLLO-Mini": lambda rank: apollo_optax.apollo_mini(_LEARNING_RATE),
    "APOLLO": lambda rank: apollo_optax.apollo(_LEARNING_RATE, rank),
    "APOLLO, Rademacher": lambda rank: apollo_optax.apollo(
        _LEARNING_RATE, rank, projection=apollo_optax.rademacher
    ),
}
TORCH_OPTIMIZERS = ("torch AdamW, fused", "apollo-torch, Mini", "apollo-torch")


def matrices(model: str) -> dict[str, np.ndarray]:
    """Random matrices of a LLaMA's shapes, without embedding and head."""
    shape = MODELS[model]
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    of_a_layer = dict.fromkeys("qkvo", (hidden, hidden))
    of_a_layer |= {"gate": (hidden, intermediate), "up": (hidden, intermediate)}
    of_a_layer["down"] = (intermediate, hidden)
    rng = np.random.default_rng(0)
    return {
        f"{name}_{layer:02}": 0.02 * rng.standard_normal(sizes, np.float32)
        for layer in range(shape.num_layers)
        for name, sizes in of_a_layer.items()
    }


def jax_step(optimizer: optax.GradientTransformation, arrays: dict[str, np.ndarray]) -> Step:
    """A step of the optimizer, which returns when it is done."""
    grads = jax.tree.map(jax.numpy.asarray, arrays)
    params = jax.tree.map(jax.numpy.copy, grads)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kept = [params, optimizer.init(params)]

    def step() -> None:
        kept[:] = jax.block_until_ready(update(*kept, grads))

    return step


def torch_step(name: str, rank: int, arrays: dict[str, np.ndarray]) -> Step:
    """A step of one of PyTorch's, whose weights lie as `torch.nn.Linear` has them."""
    import apollo_torch
    import torch

    weights = [torch.nn.Parameter(torch.from_numpy(x.T.copy())) for x in arrays.values()]
    for weight in weights:
        weight.grad = weight.detach().clone()
    apollo = {"params": weights, "update_proj_gap": 200, "proj": "random", "proj_type": "std"}
    optimizer: Any
    if name == "torch AdamW, fused":
        optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, fused=True)
    elif name == "apollo-torch, Mini":
        group = apollo | {"rank": 1, "scale": 128, "scale_type": "tensor"}
        optimizer = apollo_torch.APOLLOAdamW([group], lr=_LEARNING_RATE)
    else:
        group = apollo | {"rank": rank, "scale": 1, "scale_type": "channel"}
        optimizer = apollo_torch.APOLLOAdamW([group], lr=_LEARNING_RATE)
    return optimizer.step


def measure(model: str, rounds: int, names: Sequence[str]) -> list[Row]:
    """A row for each optimizer: its median, and the median over that of `optax.adamw`."""
    arrays = matrices(model)
    rank = _PAPER_RANKS.get(model, MODELS[model].hidden_size // 4)
    steps, compile_seconds = {}, {}
    for name in names:
        began = time.perf_counter()
        if name in JAX_OPTIMIZERS:
            steps[name] = jax_step(JAX_OPTIMIZERS[name](rank), arrays)
        else:
            steps[name] = torch_step(name, rank, arrays)
        steps[name]()
        compile_seconds[name] = time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(rounds):
        for name in order.sample(names, len(names)):
            if seconds[name] and turn % _SKIPPED_BY_SLOW and seconds[name][0] > _SLOW_SECONDS:
                continue
            steps[name]()  # so that the caches have what it needs, not what the last one needed
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "model": model,
            "rank": rank,
            "optimizer": name,
            "step_seconds": round(median, 5),
            "over_adamw": round(median / medians["optax.adamw"], 3),
            "first_step_seconds": round(compile_seconds[name], 2),
        }
        for name, median in medians.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Medians and their ratios to those of `optax.adamw`, in Markdown."""
    models = sorted({row["model"] for row in rows}, key=lambda model: MODELS[model].hidden_size)
    found = {(row["model"], row["optimizer"]): row for row in rows}
    titles = [
        f"LLaMA-{model.upper()}, r = {next(r['rank'] for r in rows if r['model'] == model)}"
        for model in models
    ]
    lines = ["| optimizer | " + " | ".join(f"{title} | over AdamW's" for title in titles) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(models))
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        cells = [name]
        for model in models:
            row = found[model, name]
            cells += [f"{1e3 * row['step_seconds']:.0f} ms", f"{row['over_adamw']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*MODELS], help="this one only, printed")
    parser.add_argument("--rounds", type=int, default=80)
    options = parser.parse_args()
    names = [*JAX_OPTIMIZERS]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("apollo_torch"):
        names += TORCH_OPTIMIZERS
    if options.model:
        print(table(measure(options.model, options.rounds, names)))
        return
    rows = [row for model in _PAPER_RANKS for row in measure(model, options.rounds, names)]
    for row in rows:
        if row["optimizer"] in TORCH_OPTIMIZERS:
            row["torch"] = importlib.metadata.version("torch")
            row["apollo-torch"] = importlib.metadata.version("apollo-torch")
    write_rows(OUTPUT, COMMAND, rows)
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
