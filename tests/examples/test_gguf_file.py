import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from examples.llama import model
from examples.llama.config import LlamaConfig, RopeScaling
from examples.llama.huggingface import (
    checkpoint_file,
    describe_llama,
    describe_shape,
    load_llama,
    save_llama,
)
from examples.llama.tokenizer import read_tokenizer

CONFIG = LlamaConfig(
    vocab_size=262,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
)
TIED = dataclasses.replace(CONFIG, tied=True)
STRETCHED = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def random_params(config: LlamaConfig) -> model.Params:
    shapes = jax.eval_shape(functools.partial(model.init_params, config), 0)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda s: generator.normal(size=s.shape).astype(np.float32), shapes)


def to_pairs(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Puts the channels i and i + half of each head beside each other, as llama.cpp does."""
    out, width = kernel.shape
    halves = kernel.reshape(heads, 2, out // heads // 2, width)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(out, width)


def byte_tokens() -> list[str]:
    """The characters that a byte-level BPE has for the bytes, by the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]


def write_gguf(
    path: Path,
    config: LlamaConfig,
    params: model.Params,
    *,
    quantized: gguf.GGMLQuantizationType | None = None,
    **fields: Any,
) -> None:
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(fields.get("heads", config.num_heads))
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if "rope_scaling" in fields:
        writer.add_string("llama.rope.scaling.type", fields["rope_scaling"])
    writer.add_tokenizer_model(fields.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    tokens = [*byte_tokens(), "he", "12", "<|im_start|>", "<|im_end|>", "<user>", "Ġa"]
    writer.add_token_list(fields.get("tokens", tokens))
    writer.add_token_types(fields.get("types", [1] * 258 + [3, 3, 4, 1]))
    writer.add_token_merges(fields.get("merges", ["h e", "1 2", "Ġ a"]))
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(fields.get("eos", 259))
    writer.add_chat_template(TEMPLATE)

    def add(name: str, tensor: np.ndarray) -> None:
        tensor = np.ascontiguousarray(tensor)
        if quantized is not None and tensor.ndim == 2:
            data = gguf.quants.quantize(tensor, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor)

    if "without_table" not in fields:
        add("token_embd.weight", params["embed"]["embedding"])
    add("output_norm.weight", params["norm"]["scale"])
    if not config.tied:
        add("output.weight", params["lm_head"]["kernel"].T)
    if "bias" in fields:
        add("blk.0.attn_q.bias", np.ones(config.hidden_size, np.float32))
    if "rope_factors" in fields:
        add("rope_freqs.weight", fields["rope_factors"])
    blocks = params["blocks"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    for layer in range(config.num_layers):
        heads = {"q": config.num_heads, "k": config.num_kv_heads}
        for name, count in heads.items():
            kernel = attention[f"{name}_proj"]["kernel"][layer].T
            add(f"blk.{layer}.attn_{name}.weight", to_pairs(kernel, count))
        add(f"blk.{layer}.attn_v.weight", attention["v_proj"]["kernel"][layer].T)
        add(f"blk.{layer}.attn_output.weight", attention["o_proj"]["kernel"][layer].T)
        for name in ("gate", "up", "down"):
            add(f"blk.{layer}.ffn_{name}.weight", mlp[f"{name}_proj"]["kernel"][layer].T)
        add(f"blk.{layer}.attn_norm.weight", blocks["attention_norm"]["scale"][layer])
        add(f"blk.{layer}.ffn_norm.weight", blocks["mlp_norm"]["scale"][layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG))
    return tmp_path / "model.gguf"


def llama3_factors(config: LlamaConfig) -> np.ndarray:
    stretched = model._rotary_frequencies(STRETCHED)
    plain = model._rotary_frequencies(config)
    return np.asarray(plain / stretched)


@pytest.mark.parametrize("config", [CONFIG, TIED, STRETCHED], ids=["plain", "tied", "stretched"])
def test_a_float_gguf_file_is_read_bit_for_bit(tmp_path: Path, config: LlamaConfig) -> None:
    params = random_params(config)
    fields: dict[str, Any] = {"rope_factors": llama3_factors(CONFIG)} if config.rope_scaling else {}
    write_gguf(tmp_path / "model.gguf", config, params, **fields)
    stored = describe_llama(tmp_path / "model.gguf")
    assert stored == (config, "float32", 512)
    loaded, read = load_llama(tmp_path / "model.gguf")
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_suffix_is_read_in_any_case(file: Path) -> None:
    renamed = file.rename(file.with_name("MODEL.GGUF"))
    assert describe_llama(renamed).config == describe_shape(renamed)[0] == CONFIG
    assert checkpoint_file(renamed, "tokenizer.json") is not None


def test_a_quantized_gguf_file_is_read_to_half_a_step(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    write_gguf(tmp_path / "model.gguf", CONFIG, params, quantized=Q8_0)
    _, read = load_llama(tmp_path / "model.gguf")
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=0.55 * np.abs(theirs).max() / 127
        ),
        read,
        params,
    )


def test_the_tokenizer_of_a_gguf_file_reads_special_tokens_digits_and_bytes(file: Path) -> None:
    content = checkpoint_file(file, "tokenizer.json")
    assert content is not None
    tokenizer = read_tokenizer(content, "it")
    # "smollm" takes digits one by one, so that the merge of 1 and 2 is never used.
    ids = tokenizer.encode("<|im_start|>he 12 a\n<user><|im_end|>").tolist()
    assert ids == [258, 256, 32, 49, 50, 261, 10, 260, 259]
    assert tokenizer.decode(ids) == "<|im_start|>he 12 a\n<user><|im_end|>"


@pytest.mark.parametrize(("pre", "ids"), [("gpt-2", [257, 49]), ("llama-bpe", [257, 49])])
def test_words_are_divided_as_the_file_says(tmp_path: Path, pre: str, ids: list[int]) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG), pre=pre)
    content = checkpoint_file(tmp_path / "model.gguf", "tokenizer.json")
    assert content is not None
    assert read_tokenizer(content, "it").encode("121").tolist() == ids


def test_a_gguf_file_is_saved_as_a_folder_with_its_template(file: Path, tmp_path: Path) -> None:
    config, params = load_llama(file)
    save_llama(tmp_path / "saved", config, params, like=file)
    loaded, read = load_llama(tmp_path / "saved")
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    config_json = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config_json["eos_token_id"] == 259
    assert config_json["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'; supported is 'llama' alone"),
        ({"without_table": True}, "has no tensor token_embd.weight; a LLaMA model has it"),
        ({"heads": 0}, r"model\.gguf: llama\.attention\.head_count is 0; it should be positive"),
        ({"bias": True}, "has a bias, blk.0.attn_q.bias; supported are models without biases"),
        ({"rope_scaling": "linear"}, "rotary scaling is 'linear'; supported are none and"),
        ({"rope_factors": np.full(8, 2.0, np.float32)}, "rope_freqs.weight are not those of LLaMA"),
    ],
)
def test_what_llama_does_not_have_is_named(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG), **fields)
    with pytest.raises(ValueError, match=match):
        describe_llama(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tokenizer": "llama"}, "the tokenizer is 'llama'.*Give --tokenizer"),
        ({"merges": ["h e x"]}, r"model\.gguf: tokenizer\.ggml\.merges has 'h e x'; a merge is"),
        ({"merges": ["h e", "h"]}, "merges has 'h'; a merge is two tokens"),
        ({"merges": ["h x"]}, "merges has 'h x'; .* which joined are a token too"),
        (
            {"merges": [1, 2]},
            r"tokenizer\.ggml\.merges is \[1, 2\]; it should list strings",
        ),
        ({"types": [1]}, r"model\.gguf: tokenizer\.ggml\.token_type has 1 types for 262 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named_with_the_remedy(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG), **fields)
    with pytest.raises(ValueError, match=match):
        checkpoint_file(tmp_path / "model.gguf", "tokenizer.json")


def test_a_model_whose_tokenizer_is_of_another_kind_is_saved_without_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, CONFIG, random_params(CONFIG), tokenizer="llama")
    save_llama(tmp_path / "saved", *load_llama(file), like=file)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer_config.json"}


def test_a_special_token_that_is_none_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG), eos=262)
    with pytest.raises(ValueError, match=r"eos_token_id is 262; the tokens are 0 to 261"):
        describe_llama(tmp_path / "model.gguf")


def test_tokens_that_are_no_strings_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG), tokens=[1, 2, 3])
    with pytest.raises(ValueError, match=r"ggml\.tokens is \[1, 2, 3\]; it should list strings"):
        describe_llama(tmp_path / "model.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a GGUF file at all, by far" * 9])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf is damaged or no GGUF file"):
        describe_llama(tmp_path / "model.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.gguf does not exist"):
        describe_llama(tmp_path / "none.gguf")
