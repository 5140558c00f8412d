"""Instruction data: conversations, or prompts with completions, of which a model learns its part.

The forms are those of Hugging Face's TRL: `messages`, or `prompt` and `completion`, either as text
or as messages: https://huggingface.co/docs/trl/dataset_formats.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from examples.llama import corpus, hub
from examples.llama.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Example",
    "Examples",
    "Turn",
    "encode_example",
    "load_examples",
    "parse_example",
]

_FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}'
)


_FIELDS = {"messages", "prompt", "completion"}
# What a message has besides its text, and a template would write.
_REFUSED = ("tool_calls", "function_call")


class Turn(NamedTuple):
    """A part of an example.

    Attributes:
      role: Who speaks, as the chat template knows it; None of a plain prompt or completion.
      content: What is said.
      trained: Whether the model learns to say it.
    """

    role: str | None
    content: str
    trained: bool


class Example(NamedTuple):
    """One example.

    Attributes:
      turns: In their order.
      where: The file and the line, for errors.
    """

    turns: tuple[Turn, ...]
    where: str

    @property
    def text(self) -> str:
        """All that is said, without a template."""
        return "\n".join(turn.content for turn in self.turns)


class Examples(NamedTuple):
    """Examples in two disjoint splits.

    Attributes:
      name: Where they are from.
      train: To train on.
      validation: Held out.
    """

    name: str
    train: list[Example]
    validation: list[Example]

    def as_corpus(self) -> corpus.Corpus:
        """What is said in them, as texts."""
        return corpus.Corpus(
            self.name, *([each.text for each in split] for split in (self.train, self.validation))
        )


def load_examples(source: str) -> Examples | None:
    """Reads rows of which the first is an example; returns None for all else.

    About 5% are held out, by a hash of what is said in them, unless a data set of the hub has a
    split `validation`.

    Args:
      source: A file of JSON lines or of Parquet, or `hf:NAME` for a data set of the hub.

    Raises:
      ValueError: If a row is not as `parse_example` takes it, or there is but one example.
      ImportError: If the source needs a package that is not installed.
    """
    splits = _splits_of_rows(source)
    first = next(splits["train"](), None) if splits else None
    if first is None or "text" in first[0] or not first[0].keys() & _FIELDS:
        return None
    train, *held_out = [
        [parse_example(row, where) for row, where in rows()] for rows in splits.values()
    ]
    if held_out:
        return Examples(source, train, *held_out)
    return Examples(source, *corpus.split_by_hash(source, [(each.text, each) for each in train]))


def _splits_of_rows(source: str) -> Mapping[str, Callable[[], Iterator[tuple[Any, str]]]]:
    """The splits of a source of rows; none of another source."""
    if source.startswith(hub.PREFIX):
        return hub.stream_rows(source)
    path = Path(source).expanduser()
    if not (path.is_file() and corpus.holds_rows(path)):
        return {}
    return {"train": functools.partial(corpus.file_rows, path, ("text", *sorted(_FIELDS), "tools"))}


def parse_example(row: Mapping[str, Any], where: str) -> Example:
    """Reads a row.

    Args:
      row: With `messages`, or with `prompt` and `completion`, both texts or both messages.
      where: The file and the line.

    Raises:
      ValueError: If a field is missing or of another form, or nothing is there to be learned.

    >>> parse_example({"prompt": "1 + 1 =", "completion": " 2"}, "sums, line 1").turns[1]
    Turn(role=None, content=' 2', trained=True)
    """
    if row.get("tools"):
        raise ValueError(f"{where}: the row has tools; supported are conversations without tools")
    if "messages" in row:
        turns = _turns(row["messages"], where, learn=True)
    else:
        missing = {"prompt", "completion"} - row.keys()
        if missing:
            raise ValueError(
                f"{where}: no {sorted(missing)[0]!r} beside {sorted(row)}; expected {_FORMS}"
            )
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            turns = (
                Turn(None, corpus.without_halves(prompt), False),
                Turn(None, corpus.without_halves(completion), True),
            )
        else:
            turns = (
                *_turns(prompt, where, learn=False),
                *_turns(completion, where, learn=True),
            )
    if not any(turn.trained and turn.content for turn in turns):
        raise ValueError(
            f"{where}: there is no message of the assistant and no completion to be learned; "
            f"expected {_FORMS}"
        )
    return Example(turns, where)


def _turns(messages: Any, where: str, *, learn: bool) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError(f"{where}: {json.dumps(messages)[:80]} is no list of messages; {_FORMS}")
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            raise ValueError(
                f"{where}: the message {json.dumps(message)[:80]} has no role and content that "
                f"are strings; expected {_FORMS}"
            )
        refused = [name for name in _REFUSED if message.get(name)]
        weight = message.get("weight")
        weight = 1 if weight is None else weight  # Parquet has None for what is left out
        if refused or weight not in (0, 1):
            named = refused[0] if refused else f"weight {weight!r}"
            raise ValueError(
                f"{where}: the message {json.dumps(message)[:80]} has {named}; supported are "
                "messages of text, with a weight of 0 or 1"
            )
        trained = learn and role == "assistant" and weight == 1
        turns.append(Turn(role, corpus.without_halves(content), trained))
    return tuple(turns)


def _generation_tag() -> type[Any]:
    """The tag around an answer, which transformers knows: its body, and no more."""
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


class ChatTemplate:
    """A tokenizer's chat template, rendered by Jinja as transformers does.

    Only the date is not given to the template, so that a run that goes on another day reads the
    same text. Templates that ask for the date have a fixed one in its place.

    Args:
      source: The template.
      tokens: What it knows besides the messages, such as `bos_token`.
      file: The name of its file, for errors.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], file: str):
        import jinja2.sandbox

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_tag()],
        )
        environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
            value, ensure_ascii=ensure_ascii, **options
        )
        environment.globals |= {
            "raise_exception": raise_exception,
            **tokens,
        }
        self._file = file
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template in {file} cannot be read: {error}") from error

    @classmethod
    def of_files(cls, template: bytes | None, settings: bytes | None) -> "ChatTemplate | None":
        """Returns that of a tokenizer's folder, None if there is none.

        Args:
          template: The content of `chat_template.jinja`, if there is one.
          settings: That of `tokenizer_config.json`.

        Raises:
          ValueError: If the settings are no JSON object, or the template cannot be read.
        """
        try:
            known = json.loads(settings) if settings else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer_config.json is not JSON: {error}") from error
        if not isinstance(known, dict):
            raise ValueError(
                f"tokenizer_config.json holds a JSON {type(known).__name__}; it should be an object"
            )
        file = "chat_template.jinja" if template else "tokenizer_config.json"
        try:
            source = template.decode() if template else known.get("chat_template")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
        if isinstance(source, list):  # several, by name
            with contextlib.suppress(TypeError, KeyError):  # a list of another form is refused
                source = {each["name"]: each["template"] for each in source}.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(
                f"chat_template in {file} is {json.dumps(source)[:80]}; it should be a string, or "
                'a list of {"name": "...", "template": "..."}'
            )
        tokens = {}
        for name, token in known.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                tokens[name] = token
        return cls(source, tokens, file)

    def segments(self, example: Example) -> list[tuple[str, bool]]:
        """Returns the text in parts, each with whether it is trained on.

        Raises:
          ValueError: If the template refuses the messages, or a longer conversation does not begin
            as the shorter one does.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        parts: list[tuple[str, bool]] = []
        done = ""
        for number, turn in enumerate(example.turns):
            if not turn.trained:
                continue
            before = self._render(messages[:number], example.where, prompt=True)
            after = self._render(messages[: number + 1], example.where, prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(
                    f"{example.where}: the chat template writes the beginning of this conversation "
                    f"in another way once message {number + 1} follows; give the text itself, as "
                    '{"prompt": "...", "completion": "..."}'
                )
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return parts

    def _render(self, messages: Sequence[Mapping[str, Any]], where: str, *, prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(
                f"{where}: the chat template in {self._file} refuses this: "
                f"{type(error).__name__}: {error}"
            ) from error


def encode_example(
    example: Example, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Int32[np.ndarray, " tokens"]:
    """Returns the ids of an example: `id` where the model learns it, `~id` where it only reads it.

    A plain completion ends with the tokenizer's end of a document.

    Raises:
      ValueError: If there are messages and no template, or `ChatTemplate.segments` raises.
    """
    if example.turns[0].role is None:
        parts = [(turn.content, turn.trained) for turn in example.turns]
        end = [] if tokenizer.end_of_document is None else [tokenizer.end_of_document]
    elif template is None:
        raise ValueError(
            f"{example.where}: messages need a chat template, and the tokenizer's folder has "
            "neither chat_template.jinja nor one in tokenizer_config.json; give it, or rows of "
            '{"prompt": "...", "completion": "..."}'
        )
    else:
        parts, end = template.segments(example), []
    found = tokenizer.encode_parts([text for text, _ in parts])
    encoded = [np.asarray(ids, np.int32) for ids in found]
    signed = [ids if trained else ~ids for ids, (_, trained) in zip(encoded, parts, strict=True)]
    return np.concatenate([*signed, np.asarray(end, np.int32)])
