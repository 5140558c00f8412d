import dataclasses
import math

import pytest

from examples.llama.config import (
    MODELS,
    PRESETS,
    LlamaConfig,
    RopeScaling,
    non_embedding_parameter_count,
    paper_settings,
    parameter_count,
)

TINY = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2)
MILLIONS = {
    "9m": 9,
    "20m": 20,
    "60m": 58,
    "130m": 134,
    "350m": 368,
    "1b": 1339,
    "3b": 2686,
    "7b": 6738,
    "13b": 13016,
}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_a_model_has_the_parameters_it_is_known_for(name, millions):
    assert round(parameter_count(MODELS[name]) / 1e6) == millions
    assert MODELS[name].vocab_size == 32_000


def test_the_paper_models_have_the_paper_shapes():
    shapes = {
        name: (c.hidden_size, c.intermediate_size, c.num_heads, c.num_layers)
        for name, c in MODELS.items()
    }
    assert shapes["60m"] == (512, 1376, 8, 8)
    assert shapes["130m"] == (768, 2048, 12, 12)
    assert shapes["350m"] == (1024, 2736, 16, 24)
    assert shapes["1b"] == (2048, 5461, 32, 24)
    assert shapes["7b"] == (4096, 11_008, 32, 32)
    assert shapes["13b"] == (5120, 13_824, 40, 40)


def test_nano_trains_on_bytes_with_less_than_a_million_parameters():
    assert MODELS["nano"].vocab_size == 256
    assert parameter_count(MODELS["nano"]) == 857_216


def test_the_counts_differ_by_embedding_and_head():
    assert parameter_count(TINY) - non_embedding_parameter_count(TINY) == 2 * 11 * 8


def test_fewer_key_value_heads_save_their_projections():
    grouped = dataclasses.replace(TINY, num_kv_heads=1)
    assert grouped.kv_size == 4
    assert parameter_count(TINY) - parameter_count(grouped) == 3 * 2 * 8 * 4


def test_zero_key_value_heads_mean_one_for_each_query_head():
    assert TINY.num_kv_heads == TINY.num_heads
    assert dataclasses.replace(TINY, num_kv_heads=2) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_kv_heads": -2}, "num_kv_heads is -2"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"num_heads": 3, "num_kv_heads": 3}, "hidden_size 8 is not divisible by num_heads 3"),
        ({"num_heads": 8, "num_kv_heads": 8}, "heads 1 wide; rotary embeddings need an even"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 1.0, 4.0, 8192), "factor is 0.5"),
        ((8.0, 4.0, 4.0, 8192), "0 < low_freq_factor < high_freq_factor"),
        ((8.0, 1.0, 4.0, 0), "original_context is 0"),
    ],
)
def test_an_impossible_rope_scaling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*arguments)


def test_the_paper_trains_on_131k_tokens_a_batch():
    for name in ("60m", "130m", "350m", "1b", "7b"):
        settings = paper_settings(name)
        assert settings.tokens_per_batch == 131_072
        assert settings.learning_rate == 0.01
        assert settings.alpha_mini == math.sqrt(128)
        assert settings.dtype == "bfloat16"


def test_the_paper_reports_tokens_that_match_its_steps():
    billions = {"60m": 1.3, "130m": 2.6, "350m": 7.8, "1b": 13.1, "7b": 19.7}
    for name, tokens in billions.items():
        settings = paper_settings(name)
        assert settings.steps * settings.tokens_per_batch / 1e9 == pytest.approx(tokens, abs=0.07)


def test_the_rank_is_a_quarter_of_the_hidden_size_below_7b():
    ranks = {name: settings.rank for name, settings in PRESETS.items()}
    assert ranks.pop("7b") == 256
    assert ranks == {name: MODELS[name].hidden_size // 4 for name in ranks}


def test_alpha_halves_from_1b_on():
    assert paper_settings("350m").alpha_apollo == 1.0
    assert paper_settings("1b").alpha_apollo == 0.5


def test_nano_trains_400_steps_of_1024_tokens():
    assert PRESETS["nano"].steps == 400
    assert PRESETS["nano"].tokens_per_batch == 1024


@pytest.mark.parametrize("name", ["13b", "9m", "gpt2", "nano"])
def test_a_model_without_a_published_run_is_refused(name):
    with pytest.raises(ValueError, match=f"no pre-training of '{name}'; it has settings for 60m, "):
        paper_settings(name)
