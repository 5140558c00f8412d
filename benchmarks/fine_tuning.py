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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pyarrow
import qwix
from flax import nnx

from apollo_optax import planning
from benchmarks.convergence.search import next_learning_rates, sweep_losses
from benchmarks.convergence.training import held_out_tokens
from benchmarks.rows import RESULTS, Row, add_row, read_rows
from examples.llama import corpus, data, model, tokenizer, train
from examples.llama.checkpoint import tree_bytes
from examples.llama.config import LlamaConfig
from examples.llama.huggingface import load_llama
from examples.llama.optimizers import OptimizerSettings, learning_rate_schedule, make_optimizer

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


class FineTuning(NamedTuple):
    """What a run trains.

    Attributes:
      params: A tree of all parameters.
      trained: The part of it that is trained.
      loss: `(params, tokens) -> float32 scalar`.
      tx: The optimizer of `params`.
    """

    params: Any
    trained: Any
    loss: Callable[[Any, Any], jax.Array]
    tx: optax.GradientTransformation


class _Unrolled(model.Llama):
    """LLaMA with a module a layer, for qwix, which puts LoRA into modules."""

    def __init__(self, config: LlamaConfig, params: model.Params, rngs: nnx.Rngs):
        super().__init__(dataclasses.replace(config, num_layers=1), rngs=rngs)
        self.layers = nnx.List(
            model.Block(config, param_dtype=jnp.float32, dtype=jnp.float32, rngs=rngs)
            for _ in range(config.num_layers)
        )
        del self.blocks
        for name in params.keys() - {"blocks"}:
            nnx.update(getattr(self, name), params[name])
        for number, block in enumerate(self.layers):
            nnx.update(block, jax.tree.map(lambda x, i=number: x[i], params["blocks"]))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x)
        return self.logits(x)


def _settings(method: Method, learning_rate: float, seed: int) -> OptimizerSettings:
    return OptimizerSettings(
        learning_rate=learning_rate, total_steps=STEPS, seed=seed, **method.optimizer
    )


def prepare(
    method: Method, settings: OptimizerSettings, config: LlamaConfig, params: model.Params
) -> FineTuning:
    """Returns what a method trains, from the weights of the checkpoint."""
    if not method.lora_rank:
        loss = train.make_loss(config, dtype=jnp.float32, remat=False)
        return FineTuning(params, params, loss, make_optimizer(settings))
    rank = method.lora_rank
    provider = qwix.LoraProvider(module_path=".*_proj", rank=rank, alpha=2.0 * rank)
    lora_model = qwix.apply_lora_to_model(
        _Unrolled(config, params, nnx.Rngs(0)),
        provider,
        jnp.zeros((1, SEQUENCE_LENGTH), jnp.int32),
        rngs=nnx.Rngs(settings.seed),
    )
    parts: Any = nnx.split(lora_model, nnx.LoRAParam, nnx.Param, ...)
    graph, lora, frozen, other = parts

    def lora_loss(params: Any, tokens: jax.Array) -> jax.Array:
        frozen = jax.lax.stop_gradient(params["frozen"])
        logits = nnx.merge(graph, params["lora"], frozen, other)(tokens[:, :-1])
        return jnp.mean(model.cross_entropy(logits, tokens[:, 1:]))

    tx = optax.partition(
        {"trained": optax.adamw(learning_rate_schedule(settings), weight_decay=0.0)}
        | {"frozen": optax.set_to_zero()},
        {"lora": "trained", "frozen": "frozen"},
    )
    return FineTuning({"lora": lora, "frozen": frozen}, lora, lora_loss, tx)


def _peak_bytes(tuning: FineTuning) -> int:
    """Peak of one step on a CPU by its compiler, of the whole batch at once."""
    step = train.make_train_step(tuning.loss, tuning.tx)
    state = jax.eval_shape(functools.partial(train.init_state, tuning.tx), tuning.params)
    tokens = jax.ShapeDtypeStruct((SEQUENCES, SEQUENCE_LENGTH + 1), jnp.int32)
    return planning.compile_for("cpu", step, state, tokens, donate_argnums=0).peak_bytes


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
    settings = _settings(METHODS[name], learning_rate, seed)
    config, params = load_llama(BASE)
    tuning = prepare(METHODS[name], settings, config, params)
    train_ids, held_out = _token_ids(corpus.load_corpus(pyarrow.get_include()))
    python = _token_ids(corpus.load_corpus())[1]
    batches = data.token_batches(
        train_ids, sequence_length=SEQUENCE_LENGTH, batch_size=SEQUENCES, seed=seed
    )
    step = train.make_train_step(tuning.loss, tuning.tx, micro_batches=_MICRO_BATCHES, seed=seed)
    loss, evaluation = jax.jit(tuning.loss), held_out_tokens(held_out, EVALUATION_BATCHES)
    row: Row = {"trial": name, "learning_rate": learning_rate, "seed": seed}
    row["settings"] = dataclasses.asdict(settings)
    row["lora_rank"] = METHODS[name].lora_rank
    row["loss_before"] = train.mean_loss(loss, tuning.params, evaluation)
    row["trained_parameters"] = sum(leaf.size for leaf in jax.tree.leaves(tuning.trained))
    row["peak_bytes"] = _peak_bytes(tuning)
    state = train.init_state(tuning.tx, jax.tree.map(jnp.copy, tuning.params))
    row["state_bytes"] = tree_bytes(state.opt_state)
    began = time.perf_counter()
    for _ in range(STEPS):
        state, _ = step(state, next(batches)["tokens"])
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
