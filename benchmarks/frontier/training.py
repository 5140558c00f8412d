"""Trains many small LLaMAs side by side in one program: they differ in rates and seed only."""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from benchmarks.frontier.rules import HIDDEN, VOCABULARY
from examples.llama.config import LlamaConfig
from examples.llama.model import init_params
from examples.llama.train import make_loss

__all__ = ["LANES", "SETTINGS", "Setting", "Texts", "Trial", "load_texts", "state_bytes", "train"]

VOCABULARY_SIZE, SEQUENCE_LENGTH = 1024, 128
LANES = 12
"""Models in one program on an accelerator."""
_WARMUP, _FINAL_RATE = 0.3, 0.1
_VALIDATION_SEQUENCES, _VALIDATION_BATCH = 1024, 64


class Setting(NamedTuple):
    """A model and how long it is trained.

    Attributes:
      label: For tables.
      width: Of the residual stream.
      layers: Of the model.
      steps: Optimizer steps.
      sequences: Of a step.
    """

    label: str
    width: int = 128
    layers: int = 5
    steps: int = 500
    sequences: int = 32

    @property
    def model(self) -> LlamaConfig:
        """The model's shape, of LLaMA's proportions."""
        inner = 8 * round(self.width * 8 / 3 / 8 + 0.35)
        return LlamaConfig(VOCABULARY_SIZE, self.width, inner, self.layers, self.width // 32)


SETTINGS = {
    "1m": Setting("1M parameters"),
    "1m_batch": Setting("1M parameters, four times the tokens a step", sequences=128),
    "1m_long": Setting("1M parameters, 2,000 steps", steps=2000),
    "4m": Setting("4M parameters", width=256),
    "16m": Setting("16M parameters", width=512),
}


class Trial(NamedTuple):
    """Peak learning rates of the three kinds of leaves, and the seed of weights and data."""

    hidden_rate: float
    vocabulary_rate: float
    norm_rate: float
    seed: int = 0


class Texts(NamedTuple):
    """Tokens to train on and to validate with, uint16."""

    train: np.ndarray
    validation: np.ndarray


def load_texts(path: Path | None) -> Texts:
    """Python's standard library as tokens: of this machine, or those that a file has.

    Args:
      path: A file that is read if it exists and written if not, so that another machine trains on
        the same text; None for no file.
    """
    if path is not None and path.exists():
        with np.load(path) as arrays:
            return Texts(arrays["train"], arrays["validation"])
    # Here: a machine that has the file needs no tokenizer.
    from examples.llama import corpus, data, tokenizer

    texts = corpus.load_corpus()
    tokens = tokenizer.load_tokenizer(f"train:{VOCABULARY_SIZE}", texts.train)
    found = Texts(
        data.encode_documents(texts.train, tokens),
        data.encode_documents(texts.validation, tokens),
    )
    if path is not None:
        np.savez(path, train=found.train, validation=found.validation)
    return found


def _optimizer(
    setting: Setting, hidden: str, vocabulary: str, trial: Trial
) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, round(_WARMUP * setting.steps), setting.steps, _FINAL_RATE
    )

    def at(rate: float, direction: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(
            direction, optax.scale_by_learning_rate(lambda count: rate * schedule(count + 1))
        )

    width, seed = setting.width, trial.seed
    return optax.partition(
        {
            "hidden": at(trial.hidden_rate, HIDDEN[hidden].make(width, seed)),
            "vocabulary": at(trial.vocabulary_rate, VOCABULARY[vocabulary].make(width, seed)),
            "norms": at(trial.norm_rate, optax.scale_by_adam()),
        },
        _kinds,
    )


def _kinds(params: PyTree) -> PyTree:
    def kind(path: Any, leaf: Any) -> str:
        if path[0].key in ("embed", "lm_head"):
            return "vocabulary"
        return "hidden" if leaf.ndim == 3 else "norms"

    return jax.tree_util.tree_map_with_path(kind, params)


def state_bytes(setting: Setting, hidden: str, vocabulary: str) -> int:
    """Bytes of the optimizer's arrays but for counts and keys, a boolean for an eighth of one."""
    params = jax.eval_shape(lambda: init_params(setting.model, 0))
    state = jax.eval_shape(_optimizer(setting, hidden, vocabulary, Trial(1, 1, 1)).init, params)
    arrays = [x for x in jax.tree.leaves(state) if x.size > 2]
    bits = [x.size * (1 if x.dtype == bool else 8 * x.dtype.itemsize) for x in arrays]
    return math.ceil(sum(bits) / 8)


def _windows(tokens: Int[Array, " tokens"], starts: Int[Array, " batch"]) -> Int[Array, "batch n"]:
    return tokens[starts[:, None] * SEQUENCE_LENGTH + jnp.arange(SEQUENCE_LENGTH + 1)[None]].astype(
        jnp.int32
    )


@functools.partial(jax.jit, static_argnames=("setting", "hidden", "vocabulary"))
def _train_all(
    setting: Setting,
    hidden: str,
    vocabulary: str,
    trials: Any,
    train: Int[Array, " tokens"],
    validation: Int[Array, " tokens"],
) -> Float[Array, " lanes"]:
    loss = make_loss(setting.model, dtype=jnp.float32, remat=False)
    num_windows = (len(train) - 1) // SEQUENCE_LENGTH
    epochs = math.ceil(setting.steps * setting.sequences / num_windows)

    def order(key: Array) -> Array:
        keys = jax.random.split(key, epochs)
        shuffled = jax.vmap(lambda k: jax.random.permutation(k, num_windows))(keys).reshape(-1)
        return shuffled[: setting.steps * setting.sequences].reshape(setting.steps, -1)

    def run(trial: Trial) -> Array:
        tx = _optimizer(setting, hidden, vocabulary, trial)
        params = init_params(setting.model, trial.seed)

        def step(carry: tuple[PyTree, PyTree], starts: Array) -> tuple[tuple[PyTree, PyTree], None]:
            params, state = carry
            grads = jax.grad(loss)(params, _windows(train, starts))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        starts = order(jax.random.fold_in(jax.random.key(1), trial.seed))
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), starts)
        spread = jnp.linspace(
            0, (len(validation) - 1) // SEQUENCE_LENGTH - 1, _VALIDATION_SEQUENCES
        ).astype(jnp.int32)
        batches = spread.reshape(-1, _VALIDATION_BATCH)
        return jnp.mean(jax.lax.map(lambda s: loss(params, _windows(validation, s)), batches))

    return jax.vmap(run)(trials)


def train(
    setting: Setting,
    hidden: str,
    vocabulary: str,
    trials: list[Trial],
    texts: Texts,
    lanes: int,
) -> list[float | None]:
    """Trains a model a trial, `lanes` of them in one program.

    Returns:
      Their validation losses in nats a token, None of one that diverged.
    """
    losses: list[float | None] = []
    for first in range(0, len(trials), lanes):
        chosen = trials[first : first + lanes]
        filled = [*chosen, *[chosen[-1]] * (lanes - len(chosen))]  # one program for any number
        together: Any = jax.tree.map(lambda *values: jnp.asarray(values), *filled)
        found = _train_all(setting, hidden, vocabulary, together, *map(jnp.asarray, texts))
        losses += [float(x) if math.isfinite(x) else None for x in found[: len(chosen)]]
    return losses
