"""Trains the model of one trial and returns its row."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from benchmarks.convergence.methods import (
    MODEL,
    SEQUENCE_LENGTH,
    SEQUENCES,
    STEPS,
    VOCABULARY,
    Method,
    Trial,
)
from benchmarks.rows import Row
from examples.llama import corpus, data, model, tokenizer, train
from examples.llama.checkpoint import tree_bytes
from examples.llama.layered import layered_training
from examples.llama.optimizers import make_optimizer

__all__ = ["held_out_tokens", "initial_params", "make_training", "make_transformation", "run_trial"]

# What suits the caches of one CPU core; the step is the same.
_MICRO_BATCHES = 16
_EVALUATION_SEQUENCES, _CURVE_BATCHES, _FINAL_BATCHES = 8, 16, 128
_EVALUATE_EVERY, _LOSSES_AVERAGED = 50, 10


def make_transformation(trial: Trial) -> optax.GradientTransformation:
    """The optimizer of a trial."""
    optimizer = make_optimizer(trial.settings)
    factor = trial.method.vocabulary_factor
    if factor == 1:
        return optimizer
    return optax.chain(optimizer, optax.masked(optax.scale(factor), _of_vocabulary))


def _of_vocabulary(params: PyTree) -> PyTree:
    return {name: name in ("embed", "lm_head") for name in params}


def make_training(trial: Trial) -> train.Training:
    """The way to train that goes with a trial's weights."""
    method, tx = trial.method, make_transformation(trial)
    if method.weights == "int8":
        return layered_training(
            MODEL,
            tx,
            weights="int8",
            dtype=jnp.float32,
            seed=trial.seed,
            rounding=method.rounding,
        )
    return train.standard_training(
        MODEL,
        tx,
        dtype=jnp.float32,
        micro_batches=_MICRO_BATCHES,
        seed=trial.seed,
        rounding=method.rounding,
    )


def initial_params(method: Method, training: train.Training, seed: int) -> model.Params:
    """The weights that a training begins with."""
    dtype = jnp.bfloat16 if method.weights == "bf16" else jnp.float32
    init = jax.jit(lambda: model.init_params(MODEL, seed, param_dtype=dtype, convert=training.keep))
    return init()


def held_out_tokens(ids: Any, batches: int) -> list[Any]:
    """Batches of validation tokens, spread over a text, small enough for one core's caches."""
    found = data.evaluation_batches(
        ids,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=_EVALUATION_SEQUENCES,
        max_batches=batches,
    )
    return [batch["tokens"] for batch in found]


def run_trial(trial: Trial, show: Callable[[int, float], None]) -> Row:
    """Trains from the beginning.

    Args:
      trial: What to train.
      show: Called with the step and the loss now and then.

    Returns:
      The trial and its settings; `validation_loss`, nats a token, None if the training diverged;
      `validation_curve` and `training_curve`, pairs of step and loss, those of training averaged
      over ten steps; `state_bytes`, of the optimizer; `seconds`.
    """
    training = make_training(trial)
    texts = corpus.load_corpus()
    tokens = tokenizer.load_tokenizer(f"train:{VOCABULARY}", texts.train)
    batches = data.token_batches(
        data.encode_documents(texts.train, tokens),
        sequence_length=SEQUENCE_LENGTH,
        batch_size=SEQUENCES,
        seed=trial.seed,
    )
    held_out = data.encode_documents(texts.validation, tokens)

    curve_batches, final_batches = (
        held_out_tokens(held_out, count) for count in (_CURVE_BATCHES, _FINAL_BATCHES)
    )
    loss = jax.jit(training.loss)
    state = training.init_state(initial_params(trial.method, training, trial.seed))
    row: Row = {
        "trial": trial.name,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "settings": dataclasses.asdict(trial.settings),
        "state_bytes": tree_bytes(state.opt_state),
    }
    losses: list[jax.Array] = []
    training_curve: list[tuple[int, float]] = []
    validation_curve: list[tuple[int, float]] = []
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        state, outcome = training.step(state, next(batches)["tokens"])
        losses.append(outcome.loss)
        if step % _LOSSES_AVERAGED == 0:
            mean = statistics.fmean(map(float, losses))
            losses.clear()
            show(step, mean)
            if not math.isfinite(mean):
                break
            training_curve.append((step, round(mean, 4)))
        if step % _EVALUATE_EVERY == 0:
            value = train.mean_loss(loss, state.params, curve_batches)
            validation_curve.append((step, round(value, 4)))
    final = train.mean_loss(loss, state.params, final_batches)
    row["validation_loss"] = final if math.isfinite(final) else None
    row["validation_curve"], row["training_curve"] = validation_curve, training_curve
    return row | {"seconds": round(time.perf_counter() - began, 1)}
