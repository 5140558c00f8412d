import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from examples.llama.config import MODELS
from examples.llama.huggingface import StoredModel
from examples.llama.optimizers import (
    DEFAULT_LEARNING_RATES,
    LEFT_OPEN,
    OPTIMIZERS,
    OPTIONS_OF,
    OptimizerName,
    OptimizerSettings,
    learning_rate_schedule,
)
from examples.llama.options import (
    ModelName,
    ModelOptions,
    OutputOptions,
    PretrainConfig,
    ProcessOptions,
    RunSettings,
    TrainingOptions,
    check_options,
    compared_optimizers,
    resolve,
)


def optimizer(**given: Any) -> OptimizerSettings:
    return dataclasses.replace(LEFT_OPEN, **given)


def resolved(name: Any, model: str = "nano", **options: Any) -> RunSettings:
    config = PretrainConfig(model=ModelOptions(name=model), **options)  # type: ignore[arg-type]
    return resolve(config, name, StoredModel(MODELS[model], "float32"), data="text", text_digest="")


def paper(name: Any, model: str, **options: Any) -> RunSettings:
    config = PretrainConfig(model=ModelOptions(name=model, preset="paper"), **options)  # type: ignore[arg-type]
    return resolve(config, name, StoredModel(MODELS[model], "float32"), data="text", text_digest="")


def test_the_command_line_offers_every_model_and_every_optimizer() -> None:
    assert set(get_args(ModelName)) == set(MODELS)
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("model", "optimizer", "rank", "alpha", "steps"),
    [
        ("60m", "apollo", 128, 1.0, 10_000),
        ("350m", "apollo_mini", 256, 128**0.5, 60_000),
        ("1b", "apollo", 512, 0.5, 100_000),
        ("7b", "apollo", 256, 0.5, 150_000),
    ],
)
def test_paper_preset_is_the_papers_setting(
    model: str, optimizer: str, rank: int, alpha: float, steps: int
) -> None:
    run = paper(optimizer, model)
    assert run.optimizer.rank == rank
    assert run.optimizer.alpha == pytest.approx(alpha)
    assert (run.steps, run.tokens_per_step) == (steps, 131_072)
    assert (run.optimizer.learning_rate, run.optimizer.warmup_fraction) == (0.01, 0.1)
    assert (run.optimizer.weight_decay, run.optimizer.clip) == (0, 0)
    assert (run.weights, run.compute) == ("bf16", "bf16")


def test_paper_preset_keeps_adamws_own_learning_rate() -> None:
    assert paper("adamw", "60m").optimizer.learning_rate == DEFAULT_LEARNING_RATES["adamw"]


def test_paper_preset_of_a_model_the_paper_does_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match="3b"):
        paper("apollo", "3b")


def test_what_is_given_goes_before_the_preset() -> None:
    run = paper(
        "apollo",
        "60m",
        optimizer=optimizer(learning_rate=0.5, rank=3, total_steps=7),
    )
    assert (run.optimizer.learning_rate, run.optimizer.rank, run.steps) == (0.5, 3, 7)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_defaults(model: str) -> None:
    run = resolved("apollo", model)
    assert (run.weights, run.compute) == ("f32", "f32")
    assert run.optimizer.rank == (256 if model == "7b" else MODELS[model].hidden_size // 4)
    assert run.optimizer.alpha == (0.5 if model in ("1b", "3b", "7b", "13b", "70b") else 1.0)


def fine_tuning(
    name: Any = "apollo",
    dtype: str = "bfloat16",
    context: int | None = 8192,
    text_tokens: int | None = 100_000,
    **options: Any,
) -> RunSettings:
    config = PretrainConfig(model=ModelOptions(load=Path("model")), **options)
    stored = StoredModel(MODELS["1b"], dtype, context)
    return resolve(
        config,
        name,
        stored,
        data="text",
        text_digest="",
        sequences_of=lambda length: None if text_tokens is None else text_tokens // length,
    )


@pytest.mark.parametrize(("name", "alpha"), [("apollo", 5**0.5), ("apollo_mini", 128**0.5)])
def test_a_loaded_model_is_trained_with_the_papers_settings_for_fine_tuning(
    name: str, alpha: float
) -> None:
    run = fine_tuning(name)
    assert (run.optimizer.learning_rate, run.optimizer.rank) == (3e-4, 32)
    assert run.optimizer.alpha == pytest.approx(alpha)
    assert (run.batch, run.weights, run.compute) == (32, "bf16", "bf16")


def test_no_optimizer_starts_a_loaded_model_at_a_new_models_learning_rate() -> None:
    for name in OPTIMIZERS:
        assert fine_tuning(name).optimizer.learning_rate < DEFAULT_LEARNING_RATES[name] / 25
    assert fine_tuning("adamw").optimizer.learning_rate == pytest.approx(2e-5)


def test_a_loaded_model_sees_its_text_three_times() -> None:
    run = fine_tuning(training=TrainingOptions(batch=10, sequence=100))
    assert (run.steps, run.micro_batches) == (300, 1)
    assert fine_tuning(text_tokens=None).steps == 1000
    assert fine_tuning(optimizer=optimizer(total_steps=7)).steps == 7


def test_a_loaded_model_is_not_given_more_tokens_than_its_context() -> None:
    assert fine_tuning(context=64).sequence == 64
    assert fine_tuning(context=None).sequence == fine_tuning(context=8192).sequence == 256


def test_more_tokens_than_a_loaded_models_context_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="--sequence is 65, and the model in model is .* 64 tok"):
        run = fine_tuning(context=64, training=TrainingOptions(sequence=65))
    assert run.sequence == 65
    assert fine_tuning(context=64, training=TrainingOptions(sequence=64)).sequence == 64


@pytest.mark.parametrize(("dtype", "weights"), [("float16", "f32"), ("float32", "f32")])
def test_weights_that_are_not_bfloat16_are_loaded_as_float32(dtype: str, weights: str) -> None:
    assert fine_tuning(dtype=dtype).weights == weights


@pytest.mark.parametrize(("field", "value"), [("name", "7b"), ("preset", "paper")])
def test_a_new_model_and_a_loaded_one_are_not_chosen_together(field: str, value: str) -> None:
    model = ModelOptions(load=Path("model"), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chooses a new model, and --load model brings one"):
        check_options(PretrainConfig(model=model))


def test_zero_given_is_not_taken_for_left_out() -> None:
    run = resolved("apollo", optimizer=optimizer(warmup_fraction=0.0))
    assert run.optimizer.warmup_fraction == 0.0


def test_research_options_reach_the_optimizer() -> None:
    options = optimizer(granularity="tensor", projection="svd", norm_growth_limit=0)
    found = resolved("apollo", optimizer=options).optimizer
    assert (found.granularity, found.projection, found.norm_growth_limit) == ("tensor", "svd", 0)


NO_EFFECT = [
    ("adamw", "rank", 4, "--rank does nothing for adamw; it is for apollo, galore"),
    ("apollo", "momentum", 0.0, "--momentum does nothing for apollo; it is for sgd"),
    ("apollo_mini", "granularity", "channel", "--granularity does nothing for apollo_mini"),
    ("lion", "alpha", 1.0, "--alpha does nothing for lion"),
    ("galore", "projection", "gaussian", "--projection does nothing for galore"),
    ("muon", "norm_growth_limit", 0.0, "--norm-growth-limit does nothing for muon"),
    ("sgd", "update_proj_gap", 200, "--update-proj-gap does nothing for sgd"),
    ("adafactor", "project_embeddings", True, "--project-embeddings does nothing for adafactor"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), NO_EFFECT)
def test_a_flag_that_does_nothing_for_the_optimizer_is_refused(
    name: Any, field: str, value: Any, message: str
) -> None:
    given: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=message):
        check_options(PretrainConfig(optimizer=optimizer(name=name, **given)))
    both = f"{name},{OPTIONS_OF[field][0]}"
    check_options(PretrainConfig(compare=both, optimizer=optimizer(**given)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_is_refused_by_its_own_defaults(name: Any) -> None:
    check_options(PretrainConfig(optimizer=optimizer(name=name)))


def test_compared_optimizers_come_in_the_order_given() -> None:
    assert compared_optimizers(PretrainConfig(compare="sgd, adamw")) == ("sgd", "adamw")
    assert compared_optimizers(PretrainConfig(optimizer=optimizer(name="muon"))) == ("muon",)


@pytest.mark.parametrize(
    ("compare", "named"), [("apollo,adam", "'adam'"), ("sgd,sgd", "sgd twice"), ("", "''")]
)
def test_wrong_comparisons_are_named(compare: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        compared_optimizers(PretrainConfig(compare=compare))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "adamw,lion", "optimizer": optimizer(name="muon")}, "leave one of the two"),
        ({"compare": "adamw,lion", "optimizer": optimizer(name="apollo")}, "leave one of the two"),
        (
            {"optimizer": optimizer(vocabulary="factored", project_embeddings=True)},
            "--vocabulary factored is for embeddings that are not projected",
        ),
        (
            {"optimizer": optimizer(vocabulary_learning_rate=0.1, project_embeddings=True)},
            "--vocabulary-learning-rate 0.1 is for embeddings that are not projected",
        ),
        ({"output": OutputOptions(allow_changes=True)}, "add --resume"),
        ({"training": TrainingOptions(remat=True, update="layerwise")}, "leave --remat out"),
    ],
)
def test_a_flag_that_another_one_leaves_without_effect_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(PretrainConfig(**options))


@pytest.mark.parametrize("fraction", [0.5, 0.96, 0.99])
def test_any_allowed_warm_up_fits_in_a_few_steps(fraction: float) -> None:
    settings = resolved(
        "sgd", optimizer=optimizer(total_steps=3, warmup_fraction=fraction)
    ).optimizer
    rates = [float(learning_rate_schedule(settings)(step)) for step in range(3)]
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert rates[-1] == pytest.approx(0.1 * settings.learning_rate)


def test_a_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 8 sequences .* 3 micro-batches"):
        resolved("apollo", training=TrainingOptions(micro_batches=3))


OUT_OF_RANGE: list[tuple[Any, str]] = [
    (OutputOptions(most_skipped=0), "--most-skipped is 0; expected at least 1"),
    (OutputOptions(evaluate_every=0), "--evaluate-every is 0"),
    (OutputOptions(evaluation_batches=0), "--evaluation-batches is 0"),
    (OutputOptions(checkpoint_every=-1), "--checkpoint-every is -1; expected at least 0"),
    (OutputOptions(keep=0), "--keep is 0"),
    (OutputOptions(log_every=0), "--log-every is 0"),
    (OutputOptions(sample_length=-1), "--sample-length is -1"),
    (OutputOptions(sample_length=10**12), r"--sample-length is 10{12}; expected from 0 to 2\*\*20"),
    (OutputOptions(temperature=-0.5), "--temperature is -0.5"),
    (TrainingOptions(batch=0), "--batch is 0"),
    (TrainingOptions(sequence=0), "--sequence is 0"),
    (TrainingOptions(micro_batches=0), "--micro-batches is 0"),
    (TrainingOptions(spike_limit=-1.0), "--spike-limit is -1.0"),
    (TrainingOptions(lora=-1), "--lora is -1; expected at least 0"),
    (optimizer(learning_rate=0.0), "--learning-rate is 0.0; expected a positive, finite number"),
    (optimizer(learning_rate=float("inf")), "--learning-rate is inf; expected a positive, finite"),
    (optimizer(name="galore", alpha=-1.0), "--alpha is -1.0; expected a positive"),
    (TrainingOptions(seed=5_000_000_000), r"--seed is 5000000000; expected from 0 to 2\*\*31 - 1"),
    (optimizer(total_steps=0), "--steps is 0"),
    (optimizer(total_steps=2**31), r"--steps is 2147483648; expected from 1 to 2\*\*31 - 1"),
    (optimizer(update_proj_gap=2**31), "--update-proj-gap is 2147483648; expected from 1"),
    (optimizer(norm_growth_limit=0.5), "--norm-growth-limit is 0.5; .* above 1, or 0 for no limit"),
    (optimizer(warmup_fraction=1.0), "--warmup-fraction is 1.0; expected at least 0 and below 1"),
    (optimizer(weight_decay=-1.0), "--weight-decay is -1.0"),
    (optimizer(clip=-1.0), "--clip is -1.0"),
    (optimizer(name="galore", rank=0), "--rank is 0"),
    (optimizer(name="sgd", momentum=1.0), "--momentum is 1.0"),
]


@pytest.mark.parametrize(("part", "message"), OUT_OF_RANGE, ids=lambda value: str(value)[:20])
def test_a_number_out_of_range_is_named_with_its_range(part: Any, message: str) -> None:
    field = {OutputOptions: "output", TrainingOptions: "training", OptimizerSettings: "optimizer"}
    with pytest.raises(ValueError, match=f"^{message}"):
        check_options(PretrainConfig(**{field[type(part)]: part}))


def layerwise(**options: Any) -> TrainingOptions:
    return dataclasses.replace(TrainingOptions(), update="layerwise", **options)


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, 1), (8, 1), (32, 4), (35, 1), (40, 5), (64, 8)]
)
def test_micro_batches_of_nano_have_eight_sequences_where_they_divide_the_batch(
    batch: int, expected: int
) -> None:
    assert resolved("apollo", training=TrainingOptions(batch=batch)).micro_batches == expected


def test_layerwise_updates_make_no_micro_batches_by_default() -> None:
    assert resolved("apollo", training=TrainingOptions(batch=16)).micro_batches == 2
    assert resolved("apollo", training=layerwise(batch=16)).micro_batches == 1


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("apollo", {"training": layerwise(micro_batches=2)}, "--micro-batches needs all gradients"),
        (
            "apollo",
            {"training": layerwise(), "optimizer": optimizer(clip=1.0)},
            "--clip needs all gradients at once.*choose --clip 0; the limiter",
        ),
        ("galore", {"training": layerwise()}, "galore does not treat layers one by one"),
    ],
)
def test_what_layerwise_updates_cannot_do_is_refused(name: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        resolved(name, **options)


@pytest.mark.parametrize(
    ("name", "training", "match"),
    [
        ("apollo", {}, "--lora 4 trains thin matrices.*with AdamW, not with apollo; choose --opt"),
        ("adamw", {"update": "layerwise"}, "--lora 4 and --update layerwise exclude each other"),
        ("adamw", {"weights": "int8"}, "--lora 4 and --weights int8 exclude each other"),
    ],
)
def test_what_lora_cannot_do_is_refused(name: str, training: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fine_tuning(name, training=TrainingOptions(lora=4, **training))


def test_lora_needs_a_loaded_model_and_one_device() -> None:
    lora = TrainingOptions(lora=4)
    with pytest.raises(ValueError, match="--lora 4 trains beside the weights .*add --load"):
        check_options(PretrainConfig(training=lora))
    model, mesh = ModelOptions(load=Path("model")), ProcessOptions(mesh="data=2")
    with pytest.raises(ValueError, match="--lora 4 trains on one device; leave --mesh out"):
        check_options(PretrainConfig(model=model, training=lora, processes=mesh))
    assert fine_tuning("adamw", training=lora).optimizer.learning_rate == pytest.approx(2e-4)


def test_int8_weights_need_layerwise_updates() -> None:
    config = PretrainConfig(training=TrainingOptions(weights="int8"))
    with pytest.raises(ValueError, match="int8 weights .*add --update layerwise"):
        resolve(
            config, "apollo", StoredModel(MODELS["nano"], "float32"), data="text", text_digest=""
        )
