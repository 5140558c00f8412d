import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from examples.llama import data, model
from examples.llama.config import LlamaConfig
from examples.llama.corpus import load_corpus
from examples.llama.instructions import (
    ChatTemplate,
    encode_example,
    load_examples,
    parse_example,
)
from examples.llama.layered import layered_training
from examples.llama.text import Text, read_examples
from examples.llama.tokenizer import SubwordTokenizer, load_tokenizer
from examples.llama.train import make_loss, standard_training

CHATML = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
BYTES = load_tokenizer("bytes")
CONFIG = LlamaConfig(256, 16, 24, num_layers=2, num_heads=2)
PARAMS = jax.jit(lambda: model.init_params(CONFIG, 0))()


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
        ]
    }


def template(source: str = CHATML) -> ChatTemplate:
    found = ChatTemplate.of_files(source.encode(), b'{"eos_token": {"content": "#"}}')
    assert found is not None
    return found


def learned(row: dict[str, Any], source: str = CHATML) -> tuple[str, str]:
    """The text of an example, and below it a caret where the model learns."""
    ids = encode_example(parse_example(row, "file, line 1"), BYTES, template(source))
    text = bytes(np.maximum(ids, ~ids).tolist()).decode()
    return text, "".join("^" if one >= 0 else " " for one in ids)


def test_of_a_conversation_all_that_the_assistant_says_is_learned() -> None:
    text, marks = learned(chat("hi", "yes", "and", "no"))
    assert text == "<user>hi#\n<assistant>yes#\n<user>and#\n<assistant>no#\n"
    read = "".join(" " if mark == "^" else char for char, mark in zip(text, marks, strict=True))
    assert read == "<user>hi#\n<assistant>     <user>and#\n<assistant>    "


def test_of_a_prompt_and_its_completion_the_completion_is_learned_to_its_end() -> None:
    text, marks = learned({"prompt": "1 + 1 =", "completion": " 2"})
    assert (text, marks) == ("1 + 1 = 2\n", "       ^^^")


def test_prompt_and_completion_have_the_tokens_of_their_whole_text() -> None:
    """Tokenizers of Llama 2 begin every text with a mark of a space."""
    tokens = ["<unk>", "▁", "1", "2", "+", "▁1", "▁2", "▁+"]
    model = tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [("▁", "1"), ("▁", "2"), ("▁", "+")],
        unk_token="<unk>",
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    subwords = SubwordTokenizer(tokenizer)
    for prompt, completion in (("1 +", " 2"), ("1 + ", "2")):
        example = parse_example({"prompt": prompt, "completion": completion}, "file, line 1")
        ids = encode_example(example, subwords, None)
        assert [tokens[i] for i in np.maximum(ids, ~ids)] == ["▁1", "▁+", "▁2"]
        assert [i >= 0 for i in ids] == [False, False, True]
    parts = ["1", "", " + 2", " 1"]
    assert [len(ids) for ids in subwords.encode_parts(parts)] == [1, 0, 2, 1]


def test_templates_for_training_mark_the_answer_with_a_tag_and_may_ask_for_ascii() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | tojson(ensure_ascii=True) }}"
        "{% endif %}{% endfor %}"
    )
    assert learned(chat("é", "yes"), source) == (
        '"\\u00e9"yes#',
        "        ^^^^",
    )


def test_a_prompt_of_messages_is_read_and_its_completion_learned() -> None:
    messages = chat("hi", "yes", "and", "no")["messages"]
    text, marks = learned({"prompt": messages[:3], "completion": messages[3:]})
    assert text == "<user>hi#\n<assistant>yes#\n<user>and#\n<assistant>no#\n"
    assert marks.count("^") == len("no#\n")
    assert marks.endswith("^^^^")


def test_an_answer_of_weight_zero_is_not_learned() -> None:
    messages = chat("hi", "yes", "and", "no")["messages"]
    left_out = {"weight": None, "tool_calls": None}
    said = [messages[0], messages[1] | {"weight": 0}, *(each | left_out for each in messages[2:])]
    text, marks = learned({"messages": said})
    assert text == "<user>hi#\n<assistant>yes#\n<user>and#\n<assistant>no#\n"
    assert marks.count("^") == len("no#\n")


def test_half_a_surrogate_pair_is_replaced() -> None:
    text, _ = learned({"prompt": "a\ud83d", "completion": "b"})
    assert text == "a?b\n"
    text, _ = learned(chat("a\ud83d", "b"))
    assert "a?" in text


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a"}, "line 7: no 'completion' beside"),
        ({"completion": "a"}, "line 7: no 'prompt' beside"),
        ({"messages": "a"}, 'line 7: "a" is no list of messages'),
        ({"messages": [{"role": "user"}]}, "has no role and content that are strings"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "has no role and content"),
        (chat("only a question"), "there is no message of the assistant and no completion"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]},
            "has tool_calls; supported are messages of text",
        ),
        ({"messages": [{"role": "user", "content": "a", "weight": 2}]}, "has weight 2; supported"),
        (chat("hi", "yes") | {"tools": [{}]}, "line 7: the row has tools; supported are"),
        ({"prompt": "a", "completion": ""}, "there is no message of the assistant and no"),
    ],
)
def test_a_row_of_another_form_is_answered_with_its_line(row: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_example(row, "file, line 7")


def test_messages_without_a_template_are_answered_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"line 1: messages need a chat template.*give it"):
        encode_example(parse_example(chat("a", "b"), "line 1"), BYTES, None)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% for %}", r"the chat template in chat_template\.jinja cannot be read"),
        ("{{ " + "(" * 9000, r"the chat template in chat_template\.jinja cannot be read"),
        ("{{ raise_exception('no system') }}", r"line 1: .* in chat_template\.jinja .*: no system"),
        ("{{ messages|length // 0 }}", r"chat_template\.jinja refuses this: ZeroDivisionError: "),
        ("{{ 10.0 ** 999 }}", r"chat_template\.jinja refuses this: OverflowError: "),
        ("{{ 'a'.index('b') }}", "refuses this: ValueError: substring not found"),
        ("{{ messages|length }}{{ messages[-1].content }}", "writes the beginning of this conver"),
    ],
)
def test_a_template_that_does_not_serve_is_named(source: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        learned(chat("a", "b"), source)


def test_the_template_is_that_of_the_tokenizers_folder() -> None:
    settings = {"eos_token": "#", "chat_template": CHATML}
    named = settings | {"chat_template": [{"name": "default", "template": CHATML}]}
    example = parse_example(chat("a", "b"), "line 1")
    for content in (settings, named):
        found = ChatTemplate.of_files(None, json.dumps(content).encode())
        assert found is not None
        assert found.segments(example) == template().segments(example)
    assert ChatTemplate.of_files(None, b"{}") is None


def test_an_example_reads_the_same_on_another_day() -> None:
    source = "{% set date = strftime_now('%d') if strftime_now is defined else '26 Jul 2024' %}"
    text, _ = learned(chat("hi", "yes"), source + "{{ date }}" + CHATML)
    assert text.startswith("26 Jul 2024<user>hi#")


@pytest.mark.parametrize(
    ("template", "settings", "match"),
    [
        (None, b"{", r"tokenizer_config\.json is not JSON"),
        (None, b"[" * 200_000, r"tokenizer_config\.json is not JSON"),
        (None, b"[]", r"tokenizer_config\.json holds a JSON list; it should be an object"),
        (None, b'{"chat_template": 5}', r"chat_template in tokenizer_config\.json is 5; it should"),
        (
            None,
            b'{"chat_template": [{"template": "a"}]}',
            r'is \[{"template": "a"}\]; it should be',
        ),
        (b"\xff", None, r"chat_template\.jinja is not UTF-8 text"),
    ],
)
def test_files_of_another_form_are_named(
    template: bytes | None, settings: bytes | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ChatTemplate.of_files(template, settings)


def test_the_digest_changes_with_where_an_example_ends() -> None:
    ids = np.arange(6, dtype=np.int32)
    one, other = (Text("it", BYTES, [ids[:end], ids[end:]], [ids]).digest for end in (2, 3))
    assert one != other


def test_texts_are_no_examples(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "prompt": "b"}\n')
    assert load_examples(str(path)) is None
    assert load_examples("stdlib") is None


def test_splits_are_disjoint_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, again = load_examples(str(path)), load_examples(str(path))
    assert first is not None
    assert first == again
    assert len(first.train) + len(first.validation) == 100
    assert 1 <= len(first.validation) <= 15
    text = read_examples(first, BYTES, None)
    assert text.sequences(8) == len(first.train)
    prompt = bytes(text.beginning(32).tolist()).decode()
    assert prompt == first.validation[0].turns[0].content


def rows(length: int) -> np.ndarray:
    """Examples with different numbers of targets, one in a row."""
    given = [("what is it?", " it"), ("a", " long answer to it"), ("b", "c")]
    examples = [
        encode_example(parse_example({"prompt": p, "completion": c}, "line"), BYTES, None)
        for p, c in given
    ]
    return data.example_rows([*examples, examples[0]], length)


def test_the_loss_is_the_mean_over_what_is_learned() -> None:
    tokens = rows(24)
    ids = np.maximum(tokens, ~tokens)
    losses = model.cross_entropy(model.forward(CONFIG, PARAMS, ids[:, :-1]), ids[:, 1:])
    expected = np.mean(np.asarray(losses)[tokens[:, 1:] >= 0])
    actual = jax.jit(make_loss(CONFIG, dtype=jnp.float32, remat=False))(PARAMS, tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_what_fills_a_row_changes_neither_loss_nor_gradients() -> None:
    loss = make_loss(CONFIG, dtype=jnp.float32, remat=False)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    short, long = (value_and_grad(PARAMS, rows(length)) for length in (20, 31))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), short, long)


@pytest.mark.parametrize("way", ["micro-batches", "layerwise"])
def test_another_way_to_take_the_step_weighs_targets_alike(way: str) -> None:
    tx = optax.sgd(1.0)
    expected = standard_training(CONFIG, tx, dtype=jnp.float32)
    if way == "micro-batches":
        other = standard_training(CONFIG, tx, dtype=jnp.float32, micro_batches=2)
    else:
        other = layered_training(CONFIG, tx, weights="f32", dtype=jnp.float32)
    found = []
    for training in (expected, other):
        state = training.init_state(jax.tree.map(jnp.copy, PARAMS))
        state, outcome = training.step(state, rows(24))
        found.append((training.float_params(state.params), outcome.loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)


def test_examples_that_do_not_fit_are_counted() -> None:
    with pytest.warns(
        UserWarning, match=r"3 of 4 examples are too long for --sequence 8 .* 2 of them lose every"
    ):
        kept = rows(8)
    assert len(kept) == 2


def test_too_few_examples_for_a_batch_are_counted() -> None:
    with pytest.raises(ValueError, match=r"there are 4 sequences, and one batch needs 5; use"):
        data.row_batches(rows(24), batch_size=5)


def test_examples_in_a_folder_are_answered_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(ValueError, match=r"line 1: no .text. field.*by itself, not in a folder"):
        load_corpus(str(tmp_path))


def test_parquet_and_data_sets_of_the_hub_are_read_as_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reads .parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads .parquet")
    pytest.importorskip("datasets", reason="streams with the [hub] extra")
    rows = [chat(f"{n} + {n}?", str(2 * n)) for n in range(50)]
    lines = tmp_path / "chats.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    expected = load_examples(str(lines))
    assert expected is not None
    for folder, splits in (("one", ["train"]), ("two", ["train", "validation"])):
        (tmp_path / folder).mkdir()
        for split in splits:
            table = pyarrow.Table.from_pylist([row | {"id": 1} for row in rows])
            parquet.write_table(table, tmp_path / folder / f"{split}.parquet")
    of_file = load_examples(str(tmp_path / "one" / "train.parquet"))
    of_hub = load_examples(f"hf:{tmp_path / 'one'}")
    assert of_file is not None
    assert of_hub is not None
    for found in (of_file, of_hub):
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert [each.turns for each in ours] == [each.turns for each in theirs]
    given = load_examples(f"hf:{tmp_path / 'two'}")
    assert given is not None
    assert len(given.train) == len(given.validation) == 50
    assert given.validation[3].where == f"hf:{tmp_path / 'two'}, row 4 of validation"
