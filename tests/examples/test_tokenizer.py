import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from examples.llama.tokenizer import ByteTokenizer, load_tokenizer

DOCUMENTS = [
    "def forward(x):\n    return x @ weight + bias\n" * 5,
    "the quick brown fox jumps over the lazy dog; 0.5 * (a + b)\n" * 5,
    "Grüße aus Zürich, 你好, 🚀\n" * 5,
]
ODD_TEXTS = ["", "a", "né 你好 🚀\r\n\t\x00  end ", "<|endoftext|> </s>", "\n" * 7]


@pytest.fixture(scope="module")
def trained():
    return load_tokenizer("train:320", DOCUMENTS)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_bytes_decode_to_the_text_they_encode(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(ids, list(text.encode()))


def test_bytes_that_are_no_utf8_decode_to_replacement_characters():
    assert load_tokenizer("bytes").decode(np.array([0xC3, 0x41])) == "\ufffdA"


def test_ids_that_are_no_bytes_decode_to_replacement_characters():
    ids = np.array([72, 256, 105, 256 + 65, 31_999, -1])
    assert load_tokenizer("bytes").decode(ids) == "H\ufffdi\ufffd\ufffd\ufffd"


def test_a_tokenizer_that_was_read_is_saved_to_the_byte(trained, tmp_path):
    trained.tokenizer.save(str(tmp_path / "read.json"), pretty=False)
    content = json.loads((tmp_path / "read.json").read_text())
    content["truncation"] = {
        **{"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    }
    (tmp_path / "read.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path / "read.json"))
    tokenizer.save(tmp_path / "saved.json")
    assert (tmp_path / "saved.json").read_bytes() == (tmp_path / "read.json").read_bytes()
    assert len(tokenizer.encode(DOCUMENTS[0])) > 7


@pytest.mark.parametrize("text", [*ODD_TEXTS, *DOCUMENTS])
def test_trained_tokenizer_decodes_any_text_it_encodes(trained, text):
    ids = trained.encode(text)
    assert ids.dtype == np.int32
    assert np.all((ids >= 0) & (ids < trained.vocab_size))
    assert trained.decode(ids) == text


def test_trained_tokenizer_has_the_size_asked_for_and_shortens_its_documents(trained):
    assert trained.vocab_size == 320
    assert len(trained.encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2
    assert trained.decode([trained.end_of_document]) == "<|endoftext|>"


def test_training_twice_on_the_same_documents_gives_the_same_tokenizer(trained, tmp_path):
    load_tokenizer("train:320", iter(DOCUMENTS)).save(tmp_path / "second.json")
    trained.save(tmp_path / "first.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


@pytest.mark.parametrize("spec", ["bytes", "train:320"])
def test_saved_tokenizer_is_read_back_as_itself_from_its_file_and_its_folder(spec, tmp_path):
    tokenizer = load_tokenizer(spec, DOCUMENTS)
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        restored = load_tokenizer(str(path))
        assert type(restored) is type(tokenizer)
        assert restored.vocab_size == tokenizer.vocab_size
        assert restored.end_of_document == tokenizer.end_of_document
        for text in ODD_TEXTS + DOCUMENTS:
            np.testing.assert_array_equal(restored.encode(text), tokenizer.encode(text))


def test_saved_byte_tokenizer_gives_other_programs_the_bytes_as_ids(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    everything = "".join(map(chr, [*range(0x800), 0x4F60, 0x1F680]))
    assert other.encode(everything).ids == list(everything.encode())
    assert other.decode(other.encode(everything).ids) == everything


def test_text_longer_than_a_piece_is_encoded_whole(trained):
    text = ("a line of the text, " * 4 + "\n") * 13_000
    assert len(text) > 1 << 20
    assert trained.decode(trained.encode(text)) == text


def word_tokenizer(*special: str) -> tokenizers.Tokenizer:
    vocabulary = {"[UNK]": 0, "one": 1, "two": 2}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.mark.parametrize(
    ("special", "end"), [((), None), (("<s>", "</s>"), 4), (("<|endoftext|>",), 3)]
)
def test_end_of_document_of_a_file_is_its_special_token_if_it_has_one(tmp_path, special, end):
    path = tmp_path / "words.json"
    word_tokenizer(*special).save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.end_of_document == end
    assert tokenizer.vocab_size == 3 + len(special)
    np.testing.assert_array_equal(tokenizer.encode("Two one"), [2, 1])


def test_truncation_and_padding_stored_in_a_file_do_not_change_the_corpus(tmp_path):
    stored = word_tokenizer()
    stored.enable_truncation(2)
    stored.enable_padding(length=6)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    np.testing.assert_array_equal(tokenizer.encode("one two one"), [1, 2, 1])


@pytest.mark.parametrize("size", ["", "256", "-1", "4k", "1e4", "²"])
def test_vocabulary_that_cannot_hold_every_byte_is_refused(size):
    with pytest.raises(ValueError, match=r"VOCAB is .*expected an integer of at least 257"):
        load_tokenizer(f"train:{size}", DOCUMENTS)


def test_documents_too_few_for_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"only fill \d+ ids; ask for at most"):
        load_tokenizer("train:5000", DOCUMENTS)


def test_missing_file_is_refused_with_what_is_expected():
    with pytest.raises(ValueError, match=r"'byte': no such file; expected bytes, train:VOCAB"):
        load_tokenizer("byte")


def test_file_with_an_empty_vocabulary_is_refused_by_name(tmp_path):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match=r"empty\.json': its vocabulary is empty; expected bytes"):
        load_tokenizer(str(tmp_path / "empty.json"))


@pytest.mark.parametrize("content", ["", "no json", json.dumps({"version": "1.0"})])
def test_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"not a tokenizer\.json of Hugging Face"):
        load_tokenizer(str(tmp_path))
