import json

import grain
import numpy as np
import pytest

from examples.llama.corpus import load_corpus
from examples.llama.data import (
    encode_documents,
    evaluation_batches,
    streamed_batches,
    token_batches,
    token_windows,
)
from examples.llama.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
SEQUENCE_LENGTH = 4
TOKENS = np.arange(4 * 23 + 2)  # 23 windows, so that a batch of 4 leaves 3 of them to no batch
DOCUMENTS = [f"{i}:" + "x" * (i * 7 % 40) for i in range(60)]


def batches(tokens=TOKENS, batch_size=4, **options):
    return token_batches(tokens, sequence_length=SEQUENCE_LENGTH, batch_size=batch_size, **options)


def documents(texts=DOCUMENTS):
    return grain.MapDataset.source(texts).to_iter_dataset()


def streamed(texts=DOCUMENTS, batch_size=4, **options):
    return streamed_batches(
        documents(texts),
        BYTES,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=batch_size,
        **options,
    )


def take(iterator, count):
    return [next(iterator)["tokens"] for _ in range(count)]


def window_set(rows):
    return {tuple(row.tolist()) for batch in rows for row in batch}


def state_after(iterator, count):
    take(iterator, count)
    return json.loads(json.dumps(iterator.get_state()))


def test_documents_are_joined_with_a_newline_as_bytes():
    ids = encode_documents(["né", "", "b"], BYTES)
    assert ids.tobytes() == "né\n\nb\n".encode()
    assert ids.dtype == np.uint8


def test_documents_are_joined_with_the_end_of_document_of_a_trained_tokenizer():
    tokenizer = load_tokenizer("train:280", DOCUMENTS)
    ids = encode_documents(DOCUMENTS[:3], tokenizer)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "".join(f"{text}<|endoftext|>" for text in DOCUMENTS[:3])


def test_encoding_stops_at_the_tokens_asked_for_and_reads_no_further():
    def endless():
        while True:
            yield "abc"

    assert encode_documents(endless(), BYTES, max_tokens=6).tobytes() == b"abc\nab"


def test_default_corpus_becomes_batches():
    corpus = load_corpus()
    tokens = encode_documents(corpus.train, BYTES)
    batch = next(token_batches(tokens, sequence_length=64, batch_size=8))
    assert batch["tokens"].shape == (8, 65)
    assert batch["tokens"].dtype == np.int32
    assert all(bytes(row.tolist()) in tokens.tobytes() for row in batch["tokens"])


@pytest.mark.parametrize("length", [5, 6, 8, 9, 41])
def test_every_token_but_the_first_is_a_target_once_until_the_last_whole_window(length):
    windows = token_windows(np.arange(length), SEQUENCE_LENGTH)
    targets = windows[:, 1:].ravel()
    whole = (length - 1) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    np.testing.assert_array_equal(targets, np.arange(1, whole + 1))


def test_elements_are_int32_rows_of_one_more_than_the_sequence():
    (batch,) = take(batches(TOKENS.astype(np.uint16)), 1)
    assert batch.shape == (4, SEQUENCE_LENGTH + 1)
    assert batch.dtype == np.int32


def test_epoch_has_each_window_at_most_once_and_whole_batches_only():
    epoch = take(batches(epochs=1), 5)
    assert len(window_set(epoch)) == 20
    assert window_set(epoch) <= window_set([token_windows(TOKENS, SEQUENCE_LENGTH)])
    assert len(list(batches(epochs=1))) == 5
    assert len(list(batches(epochs=3))) == 15


def test_order_depends_on_the_seed_and_changes_each_epoch():
    first, second = np.split(np.array(take(batches(seed=3), 10)), 2)
    np.testing.assert_array_equal(first, take(batches(seed=3), 5))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, take(batches(seed=4), 5))
    assert not np.array_equal(second, take(batches(seed=4), 5))


def test_without_shuffling_windows_come_in_order_each_epoch():
    ordered = np.concatenate(take(batches(shuffle=False), 10))
    expected = token_windows(TOKENS, SEQUENCE_LENGTH)[:20]
    np.testing.assert_array_equal(ordered, np.concatenate([expected, expected]))


# An epoch is 5 batches in memory and 86 of the stream, which shuffles 256 batches at a time.
@pytest.mark.parametrize(
    ("make", "steps"), [(batches, (0, 1, 4, 5, 6, 11)), (streamed, (0, 1, 86, 87, 255, 256, 257))]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_restored_iterator_goes_on_with_exactly_the_next_batch_across_epochs(make, steps, shuffle):
    options = {"seed": 7, "shuffle": shuffle}
    uninterrupted = take(make(**options), steps[-1] + 20)
    for step in steps:
        restored = make(**options)
        restored.set_state(state_after(make(**options), step))
        np.testing.assert_array_equal(take(restored, 20), uninterrupted[step : step + 20])


@pytest.mark.parametrize("make", [batches, streamed])
def test_iterator_set_back_yields_the_same_batches_again(make):
    iterator = make()
    state = state_after(iterator, 3)
    following = take(iterator, 9)
    iterator.set_state(state)
    np.testing.assert_array_equal(take(iterator, 9), following)


@pytest.mark.parametrize("make", [batches, streamed])
def test_iterator_restored_at_its_end_is_at_its_end(make):
    total = len(list(make(epochs=2)))
    restored = make(epochs=2)
    restored.set_state(state_after(make(epochs=2), total))
    assert list(restored) == []


def test_streamed_windows_are_those_of_the_same_documents_in_memory():
    tokens = encode_documents(DOCUMENTS, BYTES)
    in_order = list(batches(tokens, shuffle=False, epochs=1))
    stream = list(streamed(shuffle=False, epochs=1))
    assert len(stream) > 10
    for expected, element in zip(in_order, stream, strict=True):
        np.testing.assert_array_equal(element["tokens"], expected["tokens"])
        assert element["tokens"].dtype == np.int32


def test_streamed_windows_go_on_over_the_end_of_an_epoch_without_losing_a_token():
    tokens = encode_documents(DOCUMENTS * 3, BYTES)
    expected = take(batches(tokens, shuffle=False), 150)
    np.testing.assert_array_equal(take(streamed(shuffle=False), 150), expected)


def test_streamed_windows_are_shuffled_by_the_seed():
    ordered, first, again, other = (
        [element["tokens"] for element in streamed(epochs=1, batch_size=1, **options)]
        for options in ({"shuffle": False}, {"seed": 1}, {"seed": 1}, {"seed": 2})
    )
    assert window_set(first) == window_set(ordered)
    assert not np.array_equal(first, ordered)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, again)


def test_stream_without_documents_is_refused():
    with pytest.raises(ValueError, match="no documents"):
        streamed(texts=[])


def test_evaluation_is_the_same_each_pass_and_covers_each_whole_batch():
    evaluation = evaluation_batches(TOKENS, sequence_length=SEQUENCE_LENGTH, batch_size=4)
    first, second = ([batch["tokens"] for batch in evaluation] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(first) == 5
    assert len(window_set(first)) == 20


def test_limited_evaluation_is_spread_over_the_whole_text():
    tokens = np.arange(1 + 4 * 1000)
    limited = evaluation_batches(
        tokens, sequence_length=SEQUENCE_LENGTH, batch_size=5, max_batches=2
    )
    starts = [int(row[0]) for batch in limited for row in batch["tokens"]]
    assert starts == [400 * i for i in range(10)]


@pytest.mark.parametrize("shortage", [0, 1])
def test_text_is_enough_exactly_from_one_whole_batch_on(shortage):
    tokens = np.arange(4 * SEQUENCE_LENGTH + 1 - shortage)
    if not shortage:
        assert take(batches(tokens, shuffle=False), 1)[0].max() == 16
        return
    for make in (token_batches, evaluation_batches):
        with pytest.raises(ValueError, match=r"16 tokens, 3 windows .* needs 17 tokens; use a"):
            make(tokens, sequence_length=SEQUENCE_LENGTH, batch_size=4)


@pytest.mark.parametrize("length", [0, SEQUENCE_LENGTH])
def test_text_shorter_than_one_window_is_refused(length):
    with pytest.raises(ValueError, match=r"one sequence of 4 needs 5; use a shorter --sequence"):
        batches(np.arange(length))


@pytest.mark.parametrize("make", [batches, streamed])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
        ({"seed": 2**31}, "seed is 2147483648; expected 0 to"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
    ],
)
def test_bad_argument_is_refused_at_construction(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_sequence_length_or_evaluation_size_is_refused():
    with pytest.raises(ValueError, match="sequence_length is 0; expected at least 1"):
        token_batches(TOKENS, sequence_length=0, batch_size=1)
    with pytest.raises(ValueError, match="max_batches is 0; expected at least 1"):
        evaluation_batches(TOKENS, sequence_length=4, batch_size=1, max_batches=0)


@pytest.mark.parametrize("tokens", [np.zeros(100), np.zeros((100, 2), np.int32)])
def test_tokens_of_another_kind_are_refused(tokens):
    with pytest.raises(TypeError, match="expected one axis of integers"):
        batches(tokens)


def test_a_stream_without_documents_says_what_was_held_out():
    nothing = documents().filter(lambda text: False)
    with pytest.raises(ValueError, match=r"no documents to train on; .* the first 1,000 are held"):
        streamed_batches(nothing, BYTES, sequence_length=4, batch_size=4)
