"""The command line of `pretrain`, and the settings of a run that follow from it."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.llama.command_line import (
    LEFT_OUT,
    MODEL_NAME,
    LeftOut,
    check_ranges,
    default,
    filled,
)
from examples.llama.config import (
    MODELS,
    PRESETS,
    LlamaConfig,
    PaperSettings,
    fine_tuning_settings,
    paper_settings,
    parameter_count,
)
from examples.llama.huggingface import StoredModel
from examples.llama.optimizers import (
    DEFAULT_LEARNING_RATES,
    FINE_TUNING_LEARNING_RATES,
    LEFT_OPEN,
    LORA_LEARNING_RATE,
    OPTIMIZERS,
    OPTIONS_OF,
    OptimizerName,
    OptimizerSettings,
)

__all__ = [
    "CHANGEABLE",
    "DataOptions",
    "ModelOptions",
    "OutputOptions",
    "PretrainConfig",
    "ProcessOptions",
    "RunSettings",
    "TrainingOptions",
    "check_options",
    "check_step_options",
    "compared_optimizers",
    "resolve",
]

ModelName = Literal["nano", "9m", "20m", "60m", "130m", "350m", "1b", "3b", "7b", "13b", "70b"]
Precision = Literal["f32", "bf16"]
Weights = Literal["f32", "bf16", "int8"]

CHANGEABLE = frozenset(
    [
        *("optimizer.learning_rate", "optimizer.warmup_fraction", "optimizer.final_fraction"),
        *("optimizer.alpha", "optimizer.update_proj_gap", "optimizer.seed"),
        "optimizer.vocabulary_learning_rate",
        "optimizer.total_steps",
        *("spike_limit", "seed"),
    ]
)
"""Settings that may change when a run continues, since the state keeps its form."""

# The default of GaLore. The alphas of APOLLO are the paper's for each model.
_GALORE_ALPHA = 0.25


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model, and the settings that depend on it.

    Attributes:
      name: The size of the LLaMA. The defaults of steps, batch, sequence, rank and alpha are those
        of this model.
      preset: paper also takes the paper's learning rate and bf16, for the models that the paper
        trains.
      load: A LLaMA to fine-tune in place of a new --model, as a folder in Hugging Face's format, as
        a .gguf file, or as hf:NAME for the Hugging Face hub. The defaults are then the paper's for
        fine-tuning, and 3 epochs.
    """

    name: Annotated[ModelName, tyro.conf.arg(name="model"), MODEL_NAME] = "nano"
    preset: Literal["none", "paper"] = "none"
    load: Annotated[Path | None, default("CHECKPOINT", "none")] = None


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a step is taken, and the size of its batch.

    Attributes:
      weights: The dtype of the weights. bf16 and int8 weights are rounded stochastically. int8
        weights share a scale in groups of 128, and need --update layerwise.
      compute: The dtype of the matrix products.
      remat: Recompute activations in the backward pass, which takes less memory and a third more
        time.
      batch: The number of sequences in a step.
      sequence: The number of tokens in a sequence.
      micro_batches: The number of parts of a batch whose gradients are accumulated one after
        another. More parts take less memory, and the step has the same result.
      update: layerwise computes and uses the gradient of one layer at a time, so that no gradient
        of the whole model exists. The step takes far less memory and has the same result. layerwise
        cannot be combined with --clip or --micro-batches, which need all gradients at once.
      lora: The rank of LoRA. Train thin matrices of this rank beside each matrix in the blocks of a
        loaded model, instead of all parameters. LoRA needs --optimizer adamw. 0 means no LoRA.
      spike_limit: Skip a step if its loss is this many nats above the mean of about the last 50
        steps. 0 means no limit. Steps whose gradients are not finite, or all zero, are always
        skipped.
      seed: The seed of the weights, data order, projections, stochastic rounding and text sample.
    """

    weights: Annotated[
        LeftOut[Weights], default("{f32,bf16,int8}", "f32, or the preset's, or --load's")
    ] = LEFT_OUT
    compute: Annotated[
        LeftOut[Precision], default("{f32,bf16}", "that of the weights; bf16 for int8")
    ] = LEFT_OUT
    remat: bool = False
    batch: Annotated[LeftOut[int], default("INT", "512; nano: 8; --load: 32")] = LEFT_OUT
    sequence: Annotated[LeftOut[int], default("INT", "256; nano: 128")] = LEFT_OUT
    micro_batches: Annotated[LeftOut[int], default("INT", "1; nano, --load: of 8 sequences")] = (
        LEFT_OUT
    )
    update: Literal["standard", "layerwise"] = "standard"
    lora: int = 0
    spike_limit: float = 3.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The text to train on.

    Attributes:
      source: A text file, a folder, a .jsonl, .jsonl.gz or .parquet file with a "text" field,
        hf:NAME for a data set of the Hugging Face hub, or stdlib for the sources of Python's
        standard library. Instead of "text", the rows may have "messages", or "prompt" and
        "completion". Then only the answers are learned, and each example is a sequence.
      tokenizer: bytes, train:VOCAB, or the path of a tokenizer.json.
    """

    source: Annotated[str, tyro.conf.arg(name="data", metavar="SOURCE")] = "stdlib"
    tokenizer: Annotated[str | None, default("TOKENIZER", "that of --load, else bytes")] = None


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What the run prints and saves.

    Attributes:
      folder: The folder for all files of the run.
      resume: Continue from the last checkpoint in --output, with all other flags unchanged. A run
        that was killed before its first checkpoint starts from the beginning.
      allow_changes: With --resume, continue although the learning rate, its schedule, alpha,
        update_proj_gap, spike_limit or the seed has changed, or for more --steps than planned.
      most_skipped: Stop after this many skipped steps in a row.
      evaluate_every: The number of steps between two evaluations. The last step is always
        evaluated.
      evaluation_batches: The number of batches in an evaluation, which are the same each time.
      checkpoint_every: The number of steps between two checkpoints. 0 saves only at the end and at
        interruptions.
      keep: The number of checkpoints to keep.
      log_every: The number of steps between two lines of progress. The metrics have every step.
      tensorboard: Also write TensorBoard event files.
      sample_length: The number of tokens in the text sample. 0 means no sample.
      temperature: The temperature of the text sample. 0 takes the likeliest token each time.
      export: The folder to write the trained model to, as Hugging Face's transformers load it.
      describe: Print what the optimizer will keep for each parameter, and stop before training.
    """

    folder: Annotated[Path | None, default("FOLDER", "runs/MODEL-OPTIMIZER", name="output")] = None
    resume: bool = False
    allow_changes: bool = False
    most_skipped: int = 20
    evaluate_every: Annotated[int | None, default("INT", "a fifth of the steps")] = None
    evaluation_batches: int = 10
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: Annotated[int | None, default("INT", "a fiftieth of the steps, at most 100")] = None
    tensorboard: bool = False
    sample_length: int = 200
    temperature: float = 0.8
    export: Annotated[Path | None, default("FOLDER", "none")] = None
    describe: bool = False


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """The devices. Several processes share a folder, and a command except for --process.

    Attributes:
      coordinator: HOST:PORT of process 0. auto works on Cloud TPU, SLURM, Kubernetes and Open MPI,
        and takes neither --processes nor --process.
      processes: The number of processes.
      process: The number of this process, counted from 0.
      process_timeout: If a process does not answer for this many seconds, the others take it for
        dead and end.
      mesh: The axes of the device mesh and their sizes. With this flag, all devices train. data and
        fsdp divide the batch. fsdp also divides the weights, which are gathered one layer at a
        time. tensor divides heads, feed-forward and vocabulary. The training is the same up to the
        order of sums.
    """

    coordinator: Annotated[str | None, default("HOST:PORT|auto", "one process")] = None
    processes: Annotated[int | None, default("INT", "none")] = None
    process: Annotated[int | None, default("INT", "none")] = None
    process_timeout: int = 60
    mesh: Annotated[str | None, default("data=N,fsdp=N,tensor=N", "the first device")] = None


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pre-trains or fine-tunes a LLaMA with APOLLO, SWAN or one of Optax's optimizers.

    A run ends with a table of the validation loss, the optimizer's memory and the time of a step, a
    picture of the loss curves, and a sample of text. Ctrl-C saves a checkpoint, and the run prints
    the command that continues it.

    Attributes:
      compare: Several optimizers instead of one. The model is trained with one after another, from
        the same weights and on the same batches.
    """

    model: ModelOptions = ModelOptions()
    compare: Annotated[str | None, default("NAME,NAME,...", "none")] = None
    optimizer: OptimizerSettings = LEFT_OPEN
    training: TrainingOptions = TrainingOptions()
    data: DataOptions = DataOptions()
    output: OutputOptions = OutputOptions()
    processes: ProcessOptions = ProcessOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(TrainingOptions):
    """Everything that decides the numbers of one run, with no defaults left open.

    A run continues from a checkpoint only if all settings are the same, or if only those in
    `CHANGEABLE` differ and changes are allowed.

    Attributes:
      model: The model's shape.
      load: The folder that the initial weights come from, or None.
      optimizer: The optimizer, with the number of steps.
      data: The name of the text.
      text_digest: The digest of the training tokens, "" for a stream.
      spike_limit: As in `TrainingOptions`. None takes every step, for plans only.
    """

    model: LlamaConfig
    load: str | None
    optimizer: OptimizerSettings
    data: str
    text_digest: str = ""
    spike_limit: float | None = 3.0  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.batch % self.micro_batches:
            raise ValueError(
                f"a batch of {self.batch} sequences cannot be divided in {self.micro_batches} "
                "micro-batches of one size; choose --micro-batches that divides --batch"
            )
        if self.lora:
            self._check_lora()
        if self.update == "standard" and self.weights == "int8":
            raise ValueError("int8 weights are trained layer by layer; add --update layerwise")
        if self.update == "layerwise":
            self._check_layerwise()

    def _check_lora(self) -> None:
        if self.optimizer.name != "adamw":
            raise ValueError(
                f"--lora {self.lora} trains thin matrices, whose moments are small, with AdamW, "
                f"not with {self.optimizer.name}; choose --optimizer adamw, or leave --lora out"
            )
        flags = {
            "--update layerwise": self.update == "layerwise",
            "--weights int8": self.weights == "int8",
        }
        for flag, is_given in flags.items():
            if is_given:
                raise ValueError(f"--lora {self.lora} and {flag} exclude each other; choose one")

    def _check_layerwise(self) -> None:
        needs_all_gradients = {
            "--clip": (self.optimizer.clip != 0, "0; the limiter of apollo serves instead"),
            "--micro-batches": (self.micro_batches > 1, "1, and a smaller --batch if need be"),
        }
        for flag, (given, instead) in needs_all_gradients.items():
            if given:
                raise ValueError(
                    f"{flag} needs all gradients at once, --update layerwise has one layer's at a "
                    f"time; choose {flag} {instead}"
                )
        if self.optimizer.name in ("galore", "adafactor"):
            raise ValueError(
                f"{self.optimizer.name} does not treat layers one by one, as --update layerwise "
                f"does; choose another --optimizer, or --update standard"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optimizer.total_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step predicts."""
        return self.batch * self.sequence


def check_options(config: PretrainConfig) -> None:
    """Checks each number, and the combinations of flags.

    Raises:
      ValueError: If a value is out of range, or cannot be combined with another.
    """
    check_step_options(config)
    if config.compare is not None and config.optimizer.name is not None:
        raise ValueError(
            f"--optimizer {config.optimizer.name} is one optimizer, and --compare names those of "
            "the runs; leave one of the two out"
        )
    if config.output.allow_changes and not config.output.resume:
        raise ValueError("--allow-changes is for a run that continues; add --resume")
    lora = f"--lora {config.training.lora}"
    if config.training.lora and config.model.load is None:
        raise ValueError(f"{lora} trains beside the weights of a loaded model; add --load")
    if config.training.lora and config.processes.mesh is not None:
        raise ValueError(f"{lora} trains on one device; leave --mesh out, or --lora")


def check_step_options(
    config: PretrainConfig, *, default_model: ModelName = ModelOptions.name
) -> None:
    """Checks what `plan` has of the command line too.

    Args:
      config: The command line.
      default_model: The name of the model if none is given.

    Raises:
      ValueError: As `check_options`.
    """
    check_ranges(config)
    model = config.model
    if model.load is not None and (model.name, model.preset) != (default_model, "none"):
        flag = "--preset" if model.preset != "none" else "--model"
        raise ValueError(
            f"{flag} chooses a new model, and --load {model.load} brings one; leave {flag} out, or "
            "--load"
        )
    for setting in ("vocabulary", "vocabulary_learning_rate"):
        given = getattr(config.optimizer, setting)
        if config.optimizer.project_embeddings and given is not None:
            raise ValueError(
                f"--{setting.replace('_', '-')} {given} is for embeddings that are not projected, "
                "and --project-embeddings projects them; leave one of the two out"
            )
    if config.training.remat and config.training.update == "layerwise":
        raise ValueError("--update layerwise always recomputes activations; leave --remat out")
    names = compared_optimizers(config)
    for setting, users in OPTIONS_OF.items():
        given = getattr(config.optimizer, setting)
        is_given = given is not None and given is not False
        if is_given and not set(users) & set(names):
            raise ValueError(
                f"--{setting.replace('_', '-')} does nothing for {', '.join(names)}; it is for "
                f"{', '.join(users)}"
            )


def compared_optimizers(config: PretrainConfig) -> tuple[OptimizerName, ...]:
    """Returns the optimizers to train with, in order.

    Raises:
      ValueError: If one is unknown, or named twice.

    >>> compared_optimizers(PretrainConfig(compare="apollo_mini,adamw"))
    ('apollo_mini', 'adamw')
    """
    if config.compare is None:
        return (config.optimizer.name or "apollo",)
    names = [name.strip() for name in config.compare.split(",")]
    known = {str(name): name for name in OPTIMIZERS}
    for name in names:
        if name not in known:
            raise ValueError(
                f"--compare names the optimizer {name!r}; allowed are {', '.join(OPTIMIZERS)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"--compare names {name} twice; name each optimizer once")
    return tuple(known[name] for name in names)


_EPOCHS = 3
_STEPS_ON_A_STREAM = 1000


def _defaults(
    config: PretrainConfig, stored: StoredModel, sequences_of: Callable[[int], int | None]
) -> PaperSettings:
    options, training = config.model, config.training
    if options.load is not None:
        settings = fine_tuning_settings(stored.config, steps=_STEPS_ON_A_STREAM, dtype=stored.dtype)
        context = stored.longest_context or settings.sequence_length
        sequence = min(settings.sequence_length, context)
        settings = dataclasses.replace(settings, sequence_length=sequence)
        in_text = sequences_of(max(1, _first(training.sequence, sequence)))
        if in_text is not None:
            batch = max(1, _first(training.batch, settings.sequences_per_batch))
            steps = max(1, _EPOCHS * in_text // batch)
            settings = dataclasses.replace(settings, steps=steps)
        return settings
    if options.preset == "paper":
        return paper_settings(options.name)
    defaults = PRESETS.get(options.name)
    if defaults is None:
        shape = MODELS[options.name]
        # The paper halves APOLLO's alpha from 1B on.
        alpha = 0.5 if parameter_count(shape) > 1e9 else 1.0
        defaults = PaperSettings(steps=10_000, rank=shape.hidden_size // 4, alpha_apollo=alpha)
    return dataclasses.replace(defaults, dtype="float32")


def resolve(
    config: PretrainConfig,
    name: OptimizerName,
    stored: StoredModel,
    *,
    data: str,
    text_digest: str,
    sequences_of: Callable[[int], int | None] = lambda length: None,
) -> RunSettings:
    """Fills in what was left out, with the defaults of the preset, the model or fine-tuning.

    Args:
      config: The command line.
      name: The optimizer of the run, one of those compared.
      stored: The model, whose vocabulary is that of the tokenizer or of the loaded weights.
      data: The name of the text.
      text_digest: The digest of the training tokens.
      sequences_of: A function that returns how many sequences of a length there are to train on, or
        None for a stream.

    Returns:
      The settings of the run.

    Raises:
      ValueError: If a setting is out of range, or the paper has none for the model.
    """
    defaults = _defaults(config, stored, sequences_of)
    training = filled(
        config.training,
        {
            "weights": "bf16" if defaults.dtype == "bfloat16" else "f32",
            "batch": defaults.sequences_per_batch,
            "sequence": defaults.sequence_length,
        },
    )
    longest = stored.longest_context
    if longest is not None and training.sequence > longest:
        warnings.warn(
            f"--sequence is {training.sequence}, and the model in {config.model.load} is made for "
            f"at most {longest} tokens; give --sequence {longest} to stay within this",
            stacklevel=2,
        )
    training = filled(
        training,
        {
            "compute": "bf16" if training.weights == "int8" else training.weights,
            "micro_batches": _micro_batches(training, defaults),
        },
    )
    return RunSettings(
        **vars(training),
        model=stored.config,
        load=None if config.model.load is None else str(config.model.load),
        optimizer=_optimizer_settings(config, name, defaults),
        data=data,
        text_digest=text_digest,
    )


def _micro_batches(training: TrainingOptions, defaults: PaperSettings) -> int:
    if training.update == "layerwise":
        return 1
    # As close as possible to the size of the micro-batches of the model's own batch.
    parts = training.batch * defaults.micro_batches // defaults.sequences_per_batch
    return math.gcd(training.batch, max(1, parts))


def _optimizer_settings(
    config: PretrainConfig, name: OptimizerName, defaults: PaperSettings
) -> OptimizerSettings:
    is_apollo = name in ("apollo", "apollo_mini")
    rates = DEFAULT_LEARNING_RATES if config.model.load is None else FINE_TUNING_LEARNING_RATES
    if config.training.lora:
        rates = rates | {"adamw": LORA_LEARNING_RATE}
    is_papers = config.model.preset == "paper" and is_apollo
    alphas = {"apollo": defaults.alpha_apollo, "apollo_mini": defaults.alpha_mini}
    usual = OptimizerSettings(
        name,
        defaults.learning_rate if is_papers else rates[name],
        defaults.steps,
        warmup_fraction=defaults.warmup_fraction,
        weight_decay=defaults.weight_decay,
        rank=defaults.rank,
        alpha=alphas.get(name, _GALORE_ALPHA),
        update_proj_gap=defaults.update_proj_gap,
        momentum=0.9 if name == "sgd" else 0.0,
        vocabulary="factored" if name == "swan" else "adam",
    )
    given = dataclasses.replace(config.optimizer, name=name, seed=config.training.seed)
    return filled(given, vars(usual))


def _first(*values: Any) -> Any:
    """The first value that was given."""
    return next(value for value in values if value is not None)
