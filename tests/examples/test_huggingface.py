"""The tests marked `huggingface` compare with transformers: pytest -m huggingface FILE."""

import dataclasses
import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apollo_optax import quantization
from examples.llama import model
from examples.llama.config import LlamaConfig, RopeScaling
from examples.llama.huggingface import describe_llama, load_llama, save_llama

GROUPED = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
)
STRETCHED = dataclasses.replace(
    GROUPED,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64
    ),
)


def random_params(config, dtype=jnp.float32):
    shapes = jax.eval_shape(functools.partial(model.init_params, config), 0)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), dtype), shapes)


def assert_equal_params(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), actual, expected)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of `GROUPED`."""
    save_llama(tmp_path / "checkpoint", GROUPED, random_params(GROUPED))
    return tmp_path / "checkpoint"


def change_settings(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def change_tensors(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not ...}, path)


def shard(folder):
    """Splits the checkpoint into two files and an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("config", [GROUPED, STRETCHED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loading_returns_what_was_saved(tmp_path, config, dtype):
    params = random_params(config, dtype)
    save_llama(tmp_path / "new" / "folder", config, params)
    loaded_config, loaded = load_llama(str(tmp_path / "new" / "folder"))
    assert loaded_config == config
    assert_equal_params(loaded, params)


def test_quantized_weights_are_saved_as_the_floats_that_they_stand_for(tmp_path):
    quantized = quantization.quantize(random_params(GROUPED))
    save_llama(tmp_path, GROUPED, quantized, floats=quantization.dequantize)
    assert_equal_params(load_llama(tmp_path)[1], quantization.dequantize(quantized))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_loaded_model_is_saved_as_it_was_but_for_its_weights(folder, tmp_path, tied):
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    save_llama(folder, GROUPED, random_params(GROUPED, jnp.bfloat16))
    change_tensors(folder, **{"model.norm.weight": norm})
    if tied:
        change_tensors(folder, **{"lm_head.weight": ...})
    given = {"bos_token_id": 1, "eos_token_id": [2, 5], "max_position_embeddings": 131072}
    change_settings(folder, tie_word_embeddings=tied, torch_dtype="bfloat16", other=[1], **given)
    others = {
        "generation_config.json": '{"eos_token_id": [2, 5]}',
        "chat_template.jinja": "{{ x }}",
    }
    others |= {"tokenizer_config.json": "{}", "tokenizer.model": "pieces", "LICENSE": "as is"}
    others |= {"merges.txt": "a b"}
    for name, content in others.items():
        (folder / name).write_text(content)
    for name in ("pytorch_model.bin", "rng_state.pth", "model.safetensors.index.json"):
        (folder / name).write_text("{}")

    config, params = load_llama(folder)
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) + 1, params)
    save_llama(tmp_path / "saved", config, trained, like=folder)
    saved = tmp_path / "saved"
    assert {path.name for path in saved.iterdir()} == {*others, "config.json", "model.safetensors"}
    assert {name: (saved / name).read_text() for name in others} == others
    settings = json.loads((folder / "config.json").read_text())
    assert json.loads((saved / "config.json").read_text()) == settings
    written = load_file(saved / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {"bfloat16", "float32"}
    assert written["model.norm.weight"].dtype == np.float32
    expected = jax.tree.map(lambda new, old: new.astype(old.dtype), trained, params)
    assert_equal_params(load_llama(saved)[1], expected)


def test_tensors_have_the_names_and_shapes_of_transformers(folder):
    shapes = {
        name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert len(shapes) == 3 + 9 * GROUPED.num_layers
    assert shapes["model.embed_tokens.weight"] == (31, 16)
    assert shapes["lm_head.weight"] == (31, 16)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (8, 16)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (16, 24)
    assert shapes["model.layers.1.post_attention_layernorm.weight"] == (16,)


def test_matrices_are_stored_transposed(folder):
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    ours = random_params(GROUPED)["blocks"]["mlp"]["up_proj"]["kernel"][1]
    np.testing.assert_array_equal(stored, ours.T)


def test_shards_load_like_one_file(folder):
    shard(folder)
    assert_equal_params(load_llama(folder)[1], random_params(GROUPED))


def test_saving_over_shards_replaces_them(folder):
    shard(folder)
    params = random_params(GROUPED, jnp.bfloat16)
    save_llama(folder, GROUPED, params)
    assert_equal_params(load_llama(folder)[1], params)


def test_a_tied_head_is_the_embedding(folder, tmp_path, tokens):
    untied = load_llama(folder)[1]
    change_tensors(folder, **{"lm_head.weight": ...})
    change_settings(folder, tie_word_embeddings=True)
    config, params = load_llama(folder)
    assert config.tied
    assert "lm_head" not in params
    head = {"lm_head": {"kernel": params["embed"]["embedding"].T}}
    expected = model.forward(GROUPED, untied | head, tokens)
    np.testing.assert_allclose(model.forward(config, params, tokens), expected, rtol=1e-5)
    save_llama(tmp_path / "saved", config, params)
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    assert load_llama(tmp_path / "saved")[0] == config


def test_tensors_that_llama_does_not_need_are_left_alone(folder):
    change_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)})
    assert_equal_params(load_llama(folder)[1], random_params(GROUPED))


@pytest.mark.parametrize("key_value_heads", [..., None])
def test_absent_optional_settings_are_those_of_transformers(folder, key_value_heads):
    params = random_params(dataclasses.replace(GROUPED, num_kv_heads=4))
    save_llama(folder, dataclasses.replace(GROUPED, num_kv_heads=4), params)
    absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "hidden_act")
    left_out = dict.fromkeys(absent, ...)
    change_settings(folder, **left_out | {"num_key_value_heads": key_value_heads})
    config, _ = load_llama(folder)
    assert (config.num_kv_heads, config.rms_norm_eps, config.rope_theta) == (4, 1e-6, 10_000.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 7.0, "rope_parameters": ..., "rope_scaling": None},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
    ],
)
def test_the_rotary_base_is_found_in_either_place(folder, rope):
    change_settings(folder, **rope)
    assert load_llama(folder)[0].rope_theta == 7.0


DEEP = dataclasses.replace(GROUPED, intermediate_size=16_384, num_layers=12)


def traced_peak_bytes(function):
    """The largest size of what Python and NumPy allocated at one time."""
    tracemalloc.start()
    try:
        returned = function()
        return returned, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_loading_holds_one_parameter_of_all_layers_at_a_time(tmp_path):
    save_llama(tmp_path, DEEP, random_params(DEEP))
    largest = 4 * DEEP.num_layers * DEEP.hidden_size * DEEP.intermediate_size
    (_, params), peak_bytes = traced_peak_bytes(lambda: load_llama(tmp_path))
    assert peak_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + largest / 2


def test_describing_a_checkpoint_reads_no_weights(tmp_path):
    save_llama(tmp_path, DEEP, random_params(DEEP, jnp.bfloat16))
    one_matrix = 2 * DEEP.hidden_size * DEEP.intermediate_size
    arrays = len(jax.live_arrays())
    description, peak_bytes = traced_peak_bytes(lambda: describe_llama(tmp_path))
    assert description == (DEEP, "bfloat16", None)
    assert peak_bytes < one_matrix
    assert len(jax.live_arrays()) == arrays


def test_parameters_are_converted_one_tensor_at_a_time_and_placed(folder):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    expected = quantization.quantize(random_params(GROUPED))
    shardings = jax.tree.map(lambda _: device, expected)
    seen: list[int] = []

    def convert(params):
        seen.extend(leaf.ndim for leaf in jax.tree.leaves(params))
        return quantization.quantize(params)

    _, params = load_llama(folder, convert=convert, shardings=shardings)
    assert max(seen) == 2
    assert_equal_params(params, expected)
    assert all(leaf.sharding == device for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "config.json has no hidden_size"),
        ({"num_hidden_layers": "3"}, "config.json is '3'; it should be a positive int"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads in config.json is '2'; it should be"),
        ({"num_key_value_heads": [2]}, r"num_key_value_heads in config.json is \[2\]"),
        ({"num_key_value_heads": 0}, "num_key_value_heads in config.json is 0"),
        ({"rope_theta": "10000"}, "rope_theta in config.json is '10000'; .* a positive float"),
        ({"rope_theta": None}, "rope_theta in config.json is None"),
        ({"rms_norm_eps": None}, "rms_norm_eps in config.json is None"),
        ({"tie_word_embeddings": "false"}, "config.json is 'false'; it should be true or false"),
        ({"max_position_embeddings": "2048"}, "checkpoint: max_position_.* is '2048'"),
        ({"max_position_embeddings": -5}, "max_position_embeddings in config.json is -5"),
        ({"rope_scaling": "llama3"}, "rope_scaling .* is 'llama3'; it should be an object or null"),
        ({"model_type": "mistral"}, "model_type in config.json is 'mistral'.*'llama' alone"),
        ({"hidden_act": "gelu"}, "hidden_act in config.json is 'gelu'"),
        ({"attention_bias": True}, "attention_bias in config.json is True"),
        ({"head_dim": 8}, "head_dim in config.json is 8.* here 4"),
        ({"num_attention_heads": 3}, "checkpoint: hidden_size 16 is not divisible by num_heads 3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .* type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters .* type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "config.json has no factor"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_field(folder, changes, message):
    change_settings(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_llama(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": ...}, "no tensor model.norm.weight"),
        (
            {"model.layers.2.mlp.up_proj.weight": np.ones((16, 24), np.float32)},
            r"model.layers.2.mlp.up_proj.weight has the shape \(16, 24\); .* implies \(24, 16\)",
        ),
        ({"lm_head.weight": np.ones((31, 16), np.int8)}, "lm_head.weight is I8; supported are F16"),
    ],
)
def test_an_unusable_tensor_is_refused_by_name(folder, changes, message):
    change_tensors(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_llama(folder)
    with pytest.raises(ValueError, match=message):
        describe_llama(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_llama(tmp_path)


def test_a_configuration_without_tensors_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_llama(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_is_answered_with_the_folder(folder, name):
    (folder / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is a file; give its folder, {folder}, or"):
        describe_llama(folder / name)


def test_a_missing_shard_is_refused_by_name(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors does not exist"):
        load_llama(folder)


def test_a_shard_without_a_tensor_that_the_index_lists_is_refused_by_name(folder):
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    save_file({"other": np.ones(2)}, file)
    with pytest.raises(ValueError, match=r"00002\.safetensors has no tensor .*index lists"):
        describe_llama(folder)


@pytest.mark.parametrize(
    ("files", "match"),
    [([], r"index\.json has no weight_map"), ({"a": 3}, r"index\.json lists 3;")],
)
def test_an_index_of_another_form_is_refused(folder, files, match):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ValueError, match=match):
        describe_llama(folder)


def test_a_truncated_file_is_refused_by_name(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_llama(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000], ids=lambda text: text[:2])
def test_a_configuration_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|holds a JSON list)"):
        load_llama(folder)


def test_parameters_of_another_shape_are_not_saved(tmp_path):
    params = random_params(GROUPED)
    with pytest.raises(
        ValueError, match=r"blocks.attention.k_proj.kernel has the shape \(3, 16, 8"
    ):
        save_llama(tmp_path, dataclasses.replace(GROUPED, num_kv_heads=4), params)
    assert list(tmp_path.iterdir()) == []


def reference_model(config, **settings):
    import torch
    import transformers

    torch.manual_seed(0)
    scaling = config.rope_scaling
    if scaling is not None:
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=512,
            initializer_range=0.3,
            **settings,
        )
    )
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return reference.eval()


def reference_logits(reference, tokens):
    import torch

    with torch.no_grad():
        return reference(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, GROUPED.vocab_size, (2, 100), np.int32)


TIED = dataclasses.replace(GROUPED, tied=True)
MULTI_HEAD = dataclasses.replace(GROUPED, num_kv_heads=4, rope_theta=10_000.0)
CASES = {
    "multi-head": (MULTI_HEAD, {}, {}),
    "grouped": (GROUPED, {}, {}),
    "stretched": (STRETCHED, {}, {}),
    "tied": (TIED, {"tie_word_embeddings": True}, {}),
    "sharded": (GROUPED, {}, {"max_shard_size": "4KB"}),
}


@pytest.mark.huggingface
@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(tmp_path, tokens, case):
    config, settings, saving = CASES[case]
    reference = reference_model(config, **settings)
    reference.save_pretrained(tmp_path, safe_serialization=True, **saving)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(saving)
    loaded_config, params = load_llama(tmp_path)
    assert loaded_config == config
    expected = reference_logits(reference, tokens)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(model.forward(config, params, tokens), expected, atol=1e-4)


@pytest.mark.huggingface
@pytest.mark.parametrize("config", [MULTI_HEAD, GROUPED, STRETCHED, TIED])
def test_transformers_loads_what_was_saved(tmp_path, tokens, config):
    import transformers

    reference = reference_model(config, tie_word_embeddings=config.tied)
    reference.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    save_llama(tmp_path / "ours", *load_llama(tmp_path / "theirs"))
    returned, loading = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading.values())
    np.testing.assert_array_equal(
        reference_logits(returned, tokens), reference_logits(reference, tokens)
    )
