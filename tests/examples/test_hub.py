import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.llama import hub
from examples.llama.config import LlamaConfig
from examples.llama.corpus import load_corpus
from examples.llama.data import encode_documents, streamed_batches, token_batches
from examples.llama.huggingface import save_llama
from examples.llama.model import init_params
from examples.llama.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
TRAIN = [f"document {i}: " + "x" * (i % 13) for i in range(30)]
VALIDATION = ["held out", "as well"]


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="streams with the [hub] extra")


def write_rows(folder: Path, name: str, texts: list[str]) -> None:
    with gzip.open(folder / f"{name}.json.gz", "wt") as file:
        for text in texts:
            row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.org"}
            file.write(json.dumps(row) + "\n")


def write_train(folder: Path) -> str:
    """The training split in files named, compressed and filled as C4's own."""
    for shard in range(3):
        texts = TRAIN[10 * shard : 10 * shard + 10]
        write_rows(folder, f"c4-train.{shard:05d}-of-00003", texts)
    return f"hf:{folder}"


def write_c4(folder: Path) -> str:
    write_rows(folder, "c4-validation.00000-of-00001", VALIDATION)
    return write_train(folder)


def batches_of(corpus, **options):
    return streamed_batches(corpus.train, BYTES, sequence_length=8, batch_size=4, **options)


def test_streamed_corpus_has_the_splits_of_the_data_set(datasets, tmp_path):
    corpus = load_corpus(write_c4(tmp_path))
    assert corpus.streamed
    assert list(corpus.train) == TRAIN
    assert list(corpus.validation) == VALIDATION


def test_data_set_without_validation_has_its_first_documents_held_out(
    datasets, tmp_path, monkeypatch
):
    monkeypatch.setattr(hub, "HELD_OUT_DOCUMENTS", 13)
    corpus = load_corpus(write_train(tmp_path))
    assert list(corpus.validation) == TRAIN[:13]
    assert list(corpus.train) == TRAIN[13:]


def test_two_iterators_of_one_stream_do_not_disturb_each_other(datasets, tmp_path):
    documents = load_corpus(write_c4(tmp_path)).train
    first, second = iter(documents), iter(documents)
    next(first)
    assert [next(second), next(second)] == TRAIN[:2]
    assert next(first) == TRAIN[1]


@pytest.mark.parametrize("held_out", [0, 13])
def test_restored_stream_goes_on_with_exactly_the_next_document(
    datasets, tmp_path, monkeypatch, held_out
):
    monkeypatch.setattr(hub, "HELD_OUT_DOCUMENTS", held_out)
    documents, _ = hub.load_splits(write_train(tmp_path))
    expected = TRAIN[held_out:]
    for step in range(len(expected) + 1):
        stopped = iter(documents)
        assert [next(stopped) for _ in range(step)] == expected[:step]
        restored = iter(documents)
        restored.set_state(json.loads(json.dumps(stopped.get_state())))
        assert list(restored) == expected[step:]


def test_restored_batches_of_a_stream_go_on_across_epochs(datasets, tmp_path):
    corpus = load_corpus(write_c4(tmp_path))
    iterator = batches_of(corpus)
    uninterrupted = [next(iterator)["tokens"] for _ in range(60)]
    for step in (0, 1, 17, 19, 45):
        stopped = batches_of(corpus)
        for _ in range(step):
            next(stopped)
        restored = batches_of(corpus)
        restored.set_state(json.loads(json.dumps(stopped.get_state())))
        following = [next(restored)["tokens"] for _ in range(60 - step)]
        np.testing.assert_array_equal(following, uninterrupted[step:])


def test_streamed_batches_are_those_of_the_same_documents_in_memory(datasets, tmp_path):
    corpus = load_corpus(write_c4(tmp_path))
    tokens = encode_documents(TRAIN, BYTES)
    expected = token_batches(tokens, sequence_length=8, batch_size=4, shuffle=False, epochs=1)
    for streamed, in_memory in zip(
        batches_of(corpus, shuffle=False, epochs=1), expected, strict=True
    ):
        np.testing.assert_array_equal(streamed["tokens"], in_memory["tokens"])


def test_stream_trains_a_tokenizer_as_the_same_documents_in_memory_do(datasets, tmp_path):
    documents = load_corpus(write_c4(tmp_path)).train
    streamed, in_memory = (load_tokenizer("train:270", source) for source in (documents, TRAIN))
    np.testing.assert_array_equal(streamed.encode(TRAIN[7]), in_memory.encode(TRAIN[7]))


def test_rows_without_text_are_left_out_and_without_the_column_refused(datasets, tmp_path):
    write_rows(tmp_path, "train", ["a", "", "b"])
    write_rows(tmp_path, "validation", ["c"])
    assert list(load_corpus(f"hf:{tmp_path}").train) == ["a", "b"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "other" / "validation.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match=r'no "text" column; the columns are \[.body.\]'):
        next(iter(load_corpus(f"hf:{tmp_path / 'other'}").train))


def test_data_set_without_a_train_split_is_refused(datasets, tmp_path):
    write_rows(tmp_path, "validation", VALIDATION)
    with pytest.raises(ValueError, match=r"no train split; the splits are \['validation'\]"):
        load_corpus(f"hf:{tmp_path}")


def test_data_set_or_configuration_that_does_not_exist_is_refused(datasets, tmp_path):
    with pytest.raises(ValueError, match=r"hf:.*absent: cannot be opened"):
        load_corpus(f"hf:{tmp_path / 'absent'}")
    with pytest.raises(ValueError, match=r"hf:.*:fr: cannot be opened: .*fr"):
        load_corpus(f"{write_c4(tmp_path)}:fr")


@pytest.mark.parametrize(
    ("source", "opened"),
    [
        ("hf:allenai/c4", ("allenai/c4", "en")),
        ("hf:allenai/c4:realnewslike", ("allenai/c4", "realnewslike")),
        ("hf:owner/name", ("owner/name", None)),
    ],
)
def test_name_and_configuration_are_what_the_source_says(datasets, monkeypatch, source, opened):
    asked = []

    def load_dataset_builder(name, config):
        asked.append((name, config))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(ValueError, match=f"{source}: cannot be opened: no network"):
        load_corpus(source)
    assert asked == [opened]


@pytest.mark.parametrize("source", ["hf:", "hf::en"])
def test_source_that_names_no_data_set_is_refused(source):
    with pytest.raises(ValueError, match=r"no data set named; expected hf:NAME\[:CONFIG\]"):
        load_corpus(source)


def test_streaming_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"in the checkout: pip install -e '\.\[hub\]'"):
        load_corpus("hf:allenai/c4")


def test_a_checkpoint_of_the_hub_is_found_where_it_was_brought_to(tmp_path):
    pytest.importorskip("huggingface_hub", reason="comes with the [hub] extra")
    # The layout of the hub's cache, as a download leaves it.
    model = tmp_path / "models--org--tiny"
    snapshot = model / "snapshots" / ("0" * 40)
    config = LlamaConfig(256, 16, 24, num_layers=2, num_heads=2, tied=True)
    save_llama(snapshot, config, init_params(config, 0))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    script = """
from examples.llama.huggingface import describe_llama, describe_shape
print(describe_llama("hf:org/tiny").config == describe_shape("hf:org/tiny")[0])
try:
    describe_llama("hf:org/absent")
except ValueError as error:
    print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *error = found.stdout.splitlines()
    assert first == "True"
    assert error[0].startswith("hf:org/absent: cannot be brought from the hub: ")
