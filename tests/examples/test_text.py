import json
from typing import Any

import grain
import numpy as np
import pytest

from examples.llama.config import MODELS
from examples.llama.corpus import Corpus
from examples.llama.huggingface import StoredModel
from examples.llama.options import PretrainConfig, RunSettings, TrainingOptions, resolve
from examples.llama.text import read_text, training_batches, validation_batches
from examples.llama.tokenizer import load_tokenizer

DOCUMENTS = [f"document {number} of a small corpus" for number in range(40)]
BYTES = load_tokenizer("bytes")


def corpus(*, streamed: bool, train: Any = None) -> Corpus:
    documents = DOCUMENTS if train is None else train
    if not streamed:
        return Corpus("small", documents, DOCUMENTS[:5])
    stream, held_out = (
        grain.MapDataset.source(part).to_iter_dataset() for part in (documents, DOCUMENTS[:5])
    )
    return Corpus("small", stream, held_out)


def settings(**sizes: Any) -> RunSettings:
    options: dict[str, Any] = {"batch": 2, "sequence": 8} | sizes
    training = TrainingOptions(**options)
    config = PretrainConfig(training=training)
    return resolve(
        config, "sgd", StoredModel(MODELS["nano"], "float32"), data="small", text_digest=""
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_batches_go_on_from_a_state_that_went_through_json(streamed: bool) -> None:
    text = read_text(corpus(streamed=streamed), BYTES)
    batches, later = (training_batches(text, settings()) for _ in range(2))
    for _ in range(3):
        next(batches)
    later.set_state(json.loads(json.dumps(batches.get_state())))
    for _ in range(3):
        np.testing.assert_array_equal(next(later)["tokens"], next(batches)["tokens"])
    batches.close()
    later.close()


def test_digest_changes_with_the_training_text_or_the_held_out_text_of_a_stream() -> None:
    digest = read_text(corpus(streamed=False), BYTES).digest
    assert digest == read_text(corpus(streamed=False), BYTES).digest
    changed = [*DOCUMENTS[:-1], "another last document"]
    assert digest != read_text(corpus(streamed=False, train=changed), BYTES).digest
    streamed = read_text(corpus(streamed=True), BYTES)
    assert streamed.digest == read_text(corpus(streamed=True), BYTES).digest
    assert streamed.digest != streamed._replace(validation=streamed.validation[1:]).digest


def test_validation_batches_are_the_same_each_time() -> None:
    text = read_text(corpus(streamed=False), BYTES)
    first, again = (validation_batches(text, settings(), max_batches=3) for _ in range(2))
    assert [batch.shape for batch in first] == [(2, 9)] * 3
    np.testing.assert_array_equal(first, again)


def test_a_short_validation_text_makes_one_smaller_batch() -> None:
    text = read_text(corpus(streamed=False), BYTES)
    (batch,) = validation_batches(text, settings(batch=64), max_batches=3)
    assert batch.shape == ((len(text.validation) - 1) // 8, 9)
