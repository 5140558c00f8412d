"""The model of the README's comparison, trained on the source of Python's standard library."""

import time

import jax

from examples.llama import corpus, data, model, tokenizer, train
from examples.llama.config import MODELS

SEQUENCE_LENGTH, HELD_OUT_SEQUENCES = 128, 1024


def train_nano(training: train.Training, steps: int, sequences: int) -> dict[str, float]:
    """Trains `nano` with so many sequences a step.

    Returns its validation loss in nats a byte, and the seconds it took.
    """
    texts = corpus.load_corpus()
    tokens = tokenizer.load_tokenizer("bytes")
    batches = data.token_batches(
        data.encode_documents(texts.train, tokens),
        sequence_length=SEQUENCE_LENGTH,
        batch_size=sequences,
    )
    held_out = data.evaluation_batches(
        data.encode_documents(texts.validation, tokens),
        sequence_length=SEQUENCE_LENGTH,
        batch_size=sequences,
        max_batches=HELD_OUT_SEQUENCES // sequences,
    )
    params = jax.jit(lambda: model.init_params(MODELS["nano"], 0, convert=training.keep))()
    state = training.init_state(params)
    started = time.perf_counter()
    for _ in range(steps):
        state, _ = training.step(state, next(batches)["tokens"])
    loss = jax.jit(training.loss)
    validation = train.mean_loss(loss, state.params, (batch["tokens"] for batch in held_out))
    return {"validation_loss": validation, "seconds": time.perf_counter() - started}
