import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from apollo_optax import planning, quantization
from examples.llama import model
from examples.llama.config import MODELS, parameter_count
from examples.llama.plan import PlanConfig, argument_bytes, asked, main, plan_step, weight_bytes

pytestmark = pytest.mark.optimized

STEP = ["--device", "cpu", "--batch", "2", "--sequence", "16"]
SMALL = ["--model", "nano", *STEP]


def planned(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main([*SMALL, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_what_a_script_needs(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "--weights", "f32")
    assert report["fits"] is True
    assert report["weight_bytes"] == 4 * parameter_count(MODELS["nano"])
    assert report["weight_bytes"] < report["argument_bytes"] <= report["peak_bytes"]
    assert report["capacity_bytes"] >= report["peak_bytes"] >= report["temporary_bytes"]
    assert {"collectives", "flops", "hbm_bytes"} <= set(report)
    assert "largest_batch" not in report


def test_a_configuration_is_planned_in_place_of_a_named_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    given = sizes | {"model_type": "mistral", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(given))
    weights = 64 * 32 + 2 * (2 * 32 * (32 + 16) + 3 * 32 * 48 + 2 * 32) + 32
    assert weight_bytes(PlanConfig(load=tmp_path, weights="f32")) == 4 * weights
    load = tmp_path / "config.json"
    assert weight_bytes(PlanConfig(load=load, weights="f32")) == 4 * weights
    assert asked(PlanConfig(load=load))["model"] is None
    assert main([*STEP, "--load", str(tmp_path), "--weights", "f32"]) == 0
    output = capsys.readouterr().out
    assert f"{weights:,} parameters, planned as a LLaMA although it has model_type 'mi" in output
    del given["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert main([*STEP, "--load", str(tmp_path)]) == 2
    assert "config.json has no hidden_size" in capsys.readouterr().err


@pytest.mark.release
def test_layerwise_int8_needs_less_than_a_standard_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layerwise = ["--update", "layerwise", "--project-embeddings", "--weights"]
    standard = planned(capsys, "--optimizer", "adamw", "--weights", "f32")
    in_int8 = planned(capsys, *layerwise, "int8")
    assert in_int8["argument_bytes"] < 0.15 * standard["argument_bytes"]
    assert in_int8["peak_bytes"] < standard["peak_bytes"]


def test_report_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--weights", "f32"]) == 0
    output = capsys.readouterr().out
    assert "LLaMA-nano, apollo_mini, f32 weights, standard update" in output
    assert "fits" in output
    assert "largest batch" not in output


@pytest.mark.parametrize("flag", ["--batch", "--sequence", "--rank"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_sizes_below_one_are_answered_in_one_line(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, flag, value]) == 2
    assert capsys.readouterr().err == f"error: {flag} is {value}; expected at least 1\n"


@pytest.mark.planning
def test_swan_copies_no_stack_of_layers_to_lay_it_out_anew(tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 1024, "intermediate_size": 3584}
    sizes |= {"num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    swan, mini = (
        plan_step(
            PlanConfig(
                load=tmp_path,
                device="rtx-4090-24gb",
                weights="int8",
                update="layerwise",
                optimizer=name,
                vocabulary="factored",
                sequence=128,
            )
        )
        for name in ("swan", "apollo_mini")
    )
    assert swan.temporary_bytes is not None
    assert mini.temporary_bytes is not None
    # Copies of the two stacks that it would lay out anew take 40 MiB more than APOLLO-Mini's step.
    one_stack = 12 * 1024 * 3584
    assert swan.temporary_bytes < mini.temporary_bytes + one_stack / 2


@pytest.mark.planning
def test_the_gradient_of_the_embedding_takes_no_memory_before_it_is_computed() -> None:
    config = PlanConfig(load=Path("benchmarks/models/llama-3.1-8b.json"), device="rtx-4090-24gb")
    layerwise = dataclasses.replace(config, weights="int8", update="layerwise", sequence=1024)
    report = plan_step(dataclasses.replace(layerwise, vocabulary="factored"))
    assert report.peak_bytes <= planning.parse_target("rtx-4070-12gb").capacity_bytes


def test_what_is_left_out_is_as_pretrain_has_it(tmp_path: Path) -> None:
    swan, apollo = (PlanConfig("60m", "cpu", optimizer=name) for name in ("swan", "apollo"))
    assert asked(swan)["vocabulary"] == "factored"
    assert argument_bytes(swan) == argument_bytes(dataclasses.replace(swan, vocabulary="factored"))
    assert argument_bytes(apollo) == argument_bytes(dataclasses.replace(apollo, rank=128))
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    loaded = dataclasses.replace(apollo, load=tmp_path)
    assert argument_bytes(loaded) == argument_bytes(dataclasses.replace(loaded, rank=32))
    assert argument_bytes(loaded) < argument_bytes(dataclasses.replace(loaded, rank=64))


@pytest.mark.planning
@pytest.mark.parametrize("device", ["rtx-4060-8gb", "tpu-v5e"])
def test_7b_begins_where_its_int8_step_fits(device: str) -> None:
    def begin(seed: jax.Array) -> model.Params:
        return model.init_params(MODELS["7b"], seed, convert=quantization.quantize)

    plan = planning.compile_for(device, begin, jax.ShapeDtypeStruct((), jnp.int32))
    assert plan.output_bytes is not None
    # The embedding and the head are drawn in float32, and no more of the blocks than a layer.
    assert plan.fits
    assert plan.peak_bytes < 1.1 * plan.output_bytes


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--device", "a100-80"], "a100-80gb"),
        (["--mesh", "rows=2"], "allowed are data=N"),
        (["--mesh", "data=3"], "3"),
        (["--weights", "int8"], "add --update layerwise"),
        (["--optimizer", "swan", "--moments", "bf16"], "--moments bf16 does nothing for swan"),
        (["--optimizer", "adamw", "--rank", "4"], "--rank does nothing for adamw; it is for"),
        (["--vocabulary", "factored", "--project-embeddings"], "leave one of the two out"),
        (["--load", "folder"], "--model chooses a new model, and --load folder brings one"),
        (["--update", "layerwise", "--remat"], "leave --remat out"),
        (
            ["--device", "a100-80gb:2", "--optimizer", "adamw", "--lora", "2"],
            "--lora 2 trains on one device; a100-80gb:2 has 2",
        ),
    ],
)
def test_wrong_input_is_answered_in_one_line(
    flags: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert match in error
