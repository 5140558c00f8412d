"""Fine-tuning all parameters with APOLLO against AdamW and against LoRA.

    python -m benchmarks.fine_tuning

Pre-trains `nano` on Python's standard library with `examples.llama.pretrain`, saves it in Hugging
Face's format, and fine-tunes that checkpoint on C++, the headers that pyarrow brings: every method
at swept learning rates, then with two more seeds at its best. LoRA is qwix's. Adds a row a run to
`results/fine_tuning.json`; a run that has its row is not run again. Ninety minutes on two cores.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow

from apollo_optax import planning
from benchmarks.convergence.search import next_learning_rates, sweep_losses
from benchmarks.convergence.training import held_out_tokens
from benchmarks.rows import RESULTS, Row, add_row, read_rows
from examples.llama import corpus, data, lora, tokenizer, train
from examples.llama.checkpoint import tree_bytes
from examples.llama.config import LlamaConfig
from examples.llama.huggingface import load_llama
from examples.llama.optimizers import OptimizerSettings, make_optimizer

OUTPUT = RESULTS / "fine_tuning.json"
COMMAND = "python -m benchmarks.fine_tuning"
BASE = Path("runs/fine_tuning/base")
STEPS, SEQUENCES, SEQUENCE_LENGTH, EVALUATION_BATCHES = 200, 32, 128, 128
_MICRO_BATCHES, _SEEDS = 16, (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune, but for its learning rate.

    Attributes:
      label: Its name in the table.
      start: The learning rate its sweep starts at.
      optimizer: Fields of `OptimizerSettings`; of all parameters.
      lora_rank: Rank of LoRA, trained with AdamW; 0 trains all parameters.
    """

    label: str
    start: float
    optimizer: dict[str, Any]
    lora_rank: int = 0


METHODS = {
    "adamw": Method("AdamW", 1e-3, {"name": "adamw"}),
    "apollo": Method("APOLLO, r = 32", 1e-2, {"name": "apollo", "rank": 32}),
    "apollo_mini": Method("APOLLO-Mini", 1e-2, {"name": "apollo_mini", "alpha": math.sqrt(8)}),
    "lora_r8": Method("LoRA, r = 8", 1e-2, {"name": "adamw"}, lora_rank=8),
    "lora_r32": Method("LoRA, r = 32", 5e-3, {"name": "adamw"}, lora_rank=32),
}


def _settings(method: Method, learning_rate: float, seed: int) -> OptimizerSettings:
    return OptimizerSettings(
        learning_rate=learning_rate, total_steps=STEPS, seed=seed, **method.optimizer
    )


def training_of(
    method: Method, settings: OptimizerSettings, config: LlamaConfig, *, micro_batches: int = 1
) -> train.Training:
    """Returns how a method trains the parameters of a checkpoint."""
    make: Callable[..., train.Training] = train.standard_training
    if method.lora_rank:
        make = functools.partial(lora.lora_training, rank=method.lora_rank)
    return make(
        config,
        make_optimizer(settings),
        dtype=jnp.float32,
        micro_batches=micro_batches,
        seed=settings.seed,
    )


def _peak_bytes(training: train.Training, params: Any) -> int:
    """Peak of one step on a CPU by its compiler."""
    state = jax.eval_shape(training.init_state, params)
    tokens = jax.ShapeDtypeStruct((SEQUENCES, SEQUENCE_LENGTH + 1), jnp.int32)
    return planning.compile_for("cpu", training.step, state, tokens, donate_argnums=0).peak_bytes


def _token_ids(texts: corpus.Corpus) -> tuple[Any, Any]:
    tokens = tokenizer.load_tokenizer(str(BASE / "tokenizer.json"))
    return (
        data.encode_documents(texts.train, tokens),
        data.encode_documents(texts.validation, tokens),
    )


def fine_tune(name: str, learning_rate: float, seed: int) -> Row:
    """Fine-tunes the checkpoint once.

    Returns:
      The run; `loss_before` and `validation_loss` on C++, `loss_on_python` after, in nats a token,
      None if it diverged; `trained_parameters`; `state_bytes` of the optimizer; `peak_bytes` of a
      step; `seconds`.
    """
    method, settings = METHODS[name], _settings(METHODS[name], learning_rate, seed)
    config, params = load_llama(BASE)
    training = training_of(method, settings, config, micro_batches=_MICRO_BATCHES)
    train_ids, held_out = _token_ids(corpus.load_corpus(pyarrow.get_include()))
    python = _token_ids(corpus.load_corpus())[1]
    batches = data.token_batches(
        train_ids, sequence_length=SEQUENCE_LENGTH, batch_size=SEQUENCES, seed=seed
    )
    loss, evaluation = jax.jit(training.loss), held_out_tokens(held_out, EVALUATION_BATCHES)
    row: Row = {"trial": name, "learning_rate": learning_rate, "seed": seed}
    row["settings"] = dataclasses.asdict(settings)
    row["lora_rank"] = method.lora_rank
    row["peak_bytes"] = _peak_bytes(training_of(method, settings, config), params)
    state = training.init_state(params)
    trained = state.params["lora"] if method.lora_rank else state.params
    row["trained_parameters"] = sum(leaf.size for leaf in jax.tree.leaves(trained))
    row["loss_before"] = train.mean_loss(loss, state.params, evaluation)
    row["state_bytes"] = tree_bytes(state.opt_state)
    began = time.perf_counter()
    for _ in range(STEPS):
        state, _ = training.step(state, next(batches)["tokens"])
    for key, held in (
        ("validation_loss", evaluation),
        ("loss_on_python", held_out_tokens(python, EVALUATION_BATCHES)),
    ):
        found = train.mean_loss(loss, state.params, held)
        row[key] = found if math.isfinite(found) else None
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def wanted_runs(rows: Sequence[Row]) -> list[tuple[str, float, int]]:
    """The runs that can be run now: sweeps first, then the other seeds."""
    sweeps, seeds = [], []
    done = {(row["trial"], row["learning_rate"], row["seed"]) for row in rows}
    for name, method in METHODS.items():
        losses = sweep_losses(rows, name)
        missing = next_learning_rates(method.start, losses, fine=False)
        sweeps += [(name, rate, 0) for rate in missing]
        if not missing:
            best = min(losses, key=lambda rate: losses[rate])
            seeds += [(name, best, seed) for seed in _SEEDS]
    return [run for run in [*sweeps, *seeds] if run not in done]


def table(rows: Sequence[Row]) -> str:
    """Every method at its best learning rate, in Markdown."""
    lines = [
        "| method | learning rate | C++ | Python, after | trained | state | peak of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before = statistics.fmean(row["loss_before"] for row in rows)
    lines.append(f"| before | | {before:.3f} | | | | |")
    for name, method in METHODS.items():
        losses = sweep_losses(rows, name)
        if next_learning_rates(method.start, losses, fine=False):
            continue
        best = min(losses, key=lambda rate: losses[rate])
        own = [row for row in rows if (row["trial"], row["learning_rate"]) == (name, best)]
        found = [row["validation_loss"] for row in own]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        cells = [
            method.label,
            f"{best:g}",
            f"{statistics.fmean(found):.3f}{spread}",
            f"{statistics.fmean(row['loss_on_python'] for row in own):.3f}",
            f"{own[0]['trained_parameters']:,}",
            f"{own[0]['state_bytes'] / 1e6:.2f} MB",
            f"{own[0]['peak_bytes'] / 1e6:.1f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pretrain() -> None:
    options = ["--tokenizer", "train:1024", "--optimizer", "apollo", "--sample-length", "0"]
    options += ["--output", str(BASE.parent / "pretraining"), "--export", str(BASE)]
    subprocess.run([sys.executable, "-m", "examples.llama.pretrain", *options], check=True)


def main() -> None:
    """Runs what has no row yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=[*METHODS])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not BASE.exists():
        _pretrain()
    if options.learning_rate is not None:
        runs = [(options.method, options.learning_rate, options.seed)]
    else:
        runs = wanted_runs(read_rows(OUTPUT))
    while runs:
        name, learning_rate, seed = runs[0]
        row = fine_tune(name, learning_rate, seed)
        add_row(OUTPUT, COMMAND, row)
        print(f"{name} {learning_rate:g} seed {seed}: {row['validation_loss']}", flush=True)
        if options.learning_rate is not None:
            break
        runs = wanted_runs(read_rows(OUTPUT))
        print(f"{len(runs)} known to be left", flush=True)
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
