"""The command line of `pretrain`, and the settings of a run that it comes to."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.llama.command_line import MODEL_NAME
from examples.llama.config import (
    MODELS,
    PRESETS,
    LlamaConfig,
    PaperSettings,
    fine_tuning_settings,
    paper_settings,
)
from examples.llama.huggingface import StoredModel
from examples.llama.optimizers import (
    DEFAULT_LEARNING_RATES,
    FINE_TUNING_LEARNING_RATES,
    OPTIMIZERS,
    OPTIONS_OF,
    OptimizerName,
    OptimizerSettings,
    ProjectionName,
)

__all__ = [
    "CHANGEABLE",
    "DataOptions",
    "ModelOptions",
    "OptimizerOptions",
    "OutputOptions",
    "PretrainConfig",
    "ProcessOptions",
    "RunSettings",
    "TrainingOptions",
    "check_options",
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
        "optimizer.total_steps",
        *("spike_limit", "seed"),
    ]
)
"""Settings a run may go on with other values of: the state is of the same form."""

# GaLore's own; the alphas of APOLLO are the paper's, by model.
_GALORE_ALPHA = 0.25


def _default(metavar: str, default: str) -> Any:
    """How --help shows a flag whose default depends on others."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model, and the settings that come with it.

    Attributes:
      name: Size of the LLaMA. Steps, batch, sequence, rank and alpha default to this model's.
      preset: The paper's learning rate and bf16 too, for the models the paper trains.
      load: Folder of a Hugging Face LLaMA to fine-tune, instead of a new --model. The defaults are
        then the paper's for fine-tuning, and 3 times through the text.
      weights: Dtype of the weights; bf16 and int8 weights are rounded stochastically. int8, in
        groups of 128, goes with --update layerwise.
      compute: Dtype of the matrix products.
      remat: Recompute activations in the backward pass: less memory, a third more time.
    """

    name: Annotated[ModelName, tyro.conf.arg(name="model"), MODEL_NAME] = "nano"
    preset: Literal["none", "paper"] = "none"
    load: Annotated[Path | None, _default("FOLDER", "none")] = None
    weights: Annotated[
        Weights | None, _default("{f32,bf16,int8}", "f32, or the preset's, or --load's")
    ] = None
    compute: Annotated[
        Precision | None, _default("{f32,bf16}", "that of the weights; bf16 for int8")
    ] = None
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, or several on the same batches from the same weights.

    Attributes:
      name: APOLLO's, or one of Optax's.
      compare: Several optimizers instead, trained one after another.
      learning_rate: Its peak.
      warmup_fraction: Part of the steps in which the learning rate rises from 0 to its peak; a
        cosine leads from there to a tenth of it.
      weight_decay: Decoupled weight decay of the matrices, times the learning rate.
      clip: Largest global norm of the gradients; 0 for no clipping.
      rank: Rows of the projection; for apollo and galore.
      alpha: Factor of the projected updates; for apollo, apollo_mini and galore.
      update_proj_gap: Steps between two projections; for apollo, apollo_mini and galore.
      granularity: What shares a learning rate, a channel or a whole matrix; for apollo.
      projection: What the projection is drawn from; for apollo and apollo_mini.
      norm_growth_limit: Largest ratio of the norms of a matrix's consecutive updates, 0 for no
        limit; for apollo and apollo_mini.
      project_embeddings: Treat embedding and head as the other matrices, instead of training them
        with Adam as the paper does; for apollo, apollo_mini, galore and muon.
      momentum: Decay of the sum of past gradients, 0 for none; for sgd.
    """

    name: Annotated[OptimizerName, tyro.conf.arg(name="optimizer")] = "apollo"
    compare: Annotated[str | None, _default("NAME,NAME,...", "none")] = None
    learning_rate: Annotated[
        float | None, _default("FLOAT", "the optimizer's own; smaller with --load")
    ] = None
    warmup_fraction: Annotated[float | None, _default("FLOAT", "0.1; nano: 0.3")] = None
    weight_decay: Annotated[float | None, _default("FLOAT", "0")] = None
    clip: float = 0.0
    rank: Annotated[int | None, _default("INT", "a quarter of the hidden size; --load: 32")] = None
    alpha: Annotated[
        float | None,
        _default("FLOAT", "1, sqrt 128, 1/4; nano: 1, 2.8, 1/4; --load: sqrt 5, sqrt 128, 1/4"),
    ] = None
    update_proj_gap: Annotated[int | None, _default("INT", "200")] = None
    granularity: Annotated[
        Literal["channel", "tensor"] | None, _default("{channel,tensor}", "channel")
    ] = None
    projection: Annotated[
        ProjectionName | None, _default("{gaussian,rademacher,svd}", "gaussian")
    ] = None
    norm_growth_limit: Annotated[float | None, _default("FLOAT", "1.01")] = None
    project_embeddings: bool = False
    momentum: Annotated[float | None, _default("FLOAT", "0.9")] = None


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How long, and on how much at a time.

    Attributes:
      steps: Optimizer steps.
      batch: Sequences a step.
      sequence: Tokens a sequence.
      micro_batches: Parts of a batch whose gradients are made one after another and added up: less
        memory, the same step.
      update: layerwise makes and uses up the gradient of one layer at a time, so that none of the
        whole model exists: far less memory, the same step. Without --clip and --micro-batches,
        which need all gradients at once.
      mesh: Trains on all devices: data and fsdp divide the batch, fsdp the weights too, gathered a
        layer at a time; tensor divides heads, feed-forward and vocabulary. The same training up to
        the order of sums.
      spike_limit: Skip a step whose loss is so many nats above the mean of the last 50 or so, 0
        for no limit. Steps with gradients that are not finite, or all zero, are skipped always.
      most_skipped: Stop once so many steps in a row were skipped.
      evaluate_every: Steps between two evaluations; there is always one at the end.
      evaluation_batches: Batches of an evaluation, the same ones each time.
      seed: Seed of weights, data order, projections, stochastic rounding and text sample.
    """

    steps: Annotated[
        int | None, _default("INT", "the paper's; nano: 400; others: 10,000; --load: 3 epochs")
    ] = None
    batch: Annotated[int | None, _default("INT", "512; nano: 16; --load: 32")] = None
    sequence: Annotated[int | None, _default("INT", "256; nano: 128")] = None
    micro_batches: Annotated[int | None, _default("INT", "1; nano, --load: of 8 sequences")] = None
    update: Literal["standard", "layerwise"] = "standard"
    mesh: Annotated[str | None, _default("data=N,fsdp=N,tensor=N", "the first device")] = None
    spike_limit: float = 3.0
    most_skipped: int = 20
    evaluate_every: Annotated[int | None, _default("INT", "a fifth of the steps")] = None
    evaluation_batches: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The text.

    Attributes:
      source: A text file, a folder, a .jsonl, .jsonl.gz or .parquet file with a "text" field, or
        hf:NAME for a data set of the Hugging Face hub; stdlib for the sources of Python's standard
        library.
      tokenizer: bytes, train:VOCAB, or the path of a tokenizer.json.
    """

    source: Annotated[str, tyro.conf.arg(name="data", metavar="SOURCE")] = "stdlib"
    tokenizer: Annotated[str | None, _default("TOKENIZER", "that of --load, else bytes")] = None


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is kept of the run.

    Attributes:
      folder: Folder for all of it.
      resume: Go on from the last checkpoint in --output, with all other flags as they were; from
        the beginning if the run was killed before its first.
      allow_changes: With --resume: go on although the learning rate, its schedule, alpha,
        update_proj_gap, spike_limit or the seed is another, or for more --steps than planned.
      checkpoint_every: Steps between two checkpoints; 0 for the end and interruptions only.
      keep: Checkpoints to keep.
      log_every: Steps between two lines of progress; the metrics have every step.
      tensorboard: Write TensorBoard event files too.
      sample_length: Tokens of the text sample; 0 for none.
      temperature: Temperature of the text sample; 0 for the likeliest token each time.
      export: Folder to write the trained model to, as Hugging Face's transformers load it.
      describe: Print what the optimizer keeps for each parameter, and stop before training.
    """

    folder: Annotated[
        Path | None,
        tyro.conf.arg(
            name="output",
            metavar="FOLDER",
            help_behavior_hint="(default: runs/MODEL-OPTIMIZER)",
        ),
    ] = None
    resume: bool = False
    allow_changes: bool = False
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: Annotated[int | None, _default("INT", "a fiftieth of the steps, at most 100")] = None
    tensorboard: bool = False
    sample_length: int = 200
    temperature: float = 0.8
    export: Annotated[Path | None, _default("FOLDER", "none")] = None
    describe: bool = False


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Several processes, each with the same command but for --process; all need the same folder.

    Attributes:
      coordinator: HOST:PORT of the process 0; auto on Cloud TPU, SLURM, Kubernetes and Open MPI,
        which know all of these.
      processes: How many there are.
      process: Which this is, from 0.
      process_timeout: Seconds after which a process that does not answer is taken for dead, and
        the others end.
    """

    coordinator: Annotated[str | None, _default("HOST:PORT|auto", "one process")] = None
    processes: Annotated[int | None, _default("INT", "none")] = None
    process: Annotated[int | None, _default("INT", "none")] = None
    process_timeout: int = 60


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pre-trains a LLaMA with APOLLO or with one of Optax's optimizers.

    Ends with a table of the validation loss, the optimizer's memory and the time of a step, a
    picture of the curves and a sample of text. Ctrl-C saves, and says how to go on.
    """

    model: ModelOptions = ModelOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    training: TrainingOptions = TrainingOptions()
    data: DataOptions = DataOptions()
    output: OutputOptions = OutputOptions()
    processes: ProcessOptions = ProcessOptions()


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything that decides the numbers of one run.

    A run goes on from a checkpoint only if all of it is the same.

    Attributes:
      model: The model's shape.
      load: Folder the initial weights come from, or None.
      weights: Dtype of the weights, "f32", "bf16" or "int8".
      compute: Dtype of the matrix products, "f32" or "bf16".
      remat: Whether activations are recomputed.
      optimizer: The optimizer, with the number of steps.
      batch: Sequences a step.
      sequence: Tokens a sequence.
      micro_batches: Parts of a batch.
      update: "standard" or "layerwise".
      spike_limit: Nats above the running mean from which a loss is a spike, 0 for never.
      seed: Seed of weights, data order, projections and rounding.
      data: What the text is, by name.
      text_digest: Digest of the training tokens, "" for a stream.
    """

    model: LlamaConfig
    load: str | None
    weights: Weights
    compute: Precision
    remat: bool
    optimizer: OptimizerSettings
    batch: int
    sequence: int
    micro_batches: int
    update: Literal["standard", "layerwise"]
    spike_limit: float
    seed: int
    data: str
    text_digest: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "micro_batches"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is {getattr(self, name)}; expected at least 1")
        if self.batch % self.micro_batches:
            raise ValueError(
                f"a batch of {self.batch} sequences cannot be divided in {self.micro_batches} "
                "micro-batches of one size; choose --micro-batches that divides --batch"
            )

        if self.update == "standard" and self.weights == "int8":
            raise ValueError("int8 weights are trained layer by layer; add --update layerwise")
        if self.update == "layerwise":
            self._check_layerwise()

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
    """Checks what goes together, and what decides no numbers: how often, how many, how long.

    Raises:
      ValueError: If a value is out of range, or does not go with another.
    """
    model, training, output = config.model, config.training, config.output
    if model.load is not None and (model.name, model.preset) != ("nano", "none"):
        flag = "--preset" if model.preset != "none" else "--model"
        raise ValueError(
            f"{flag} chooses a new model, and --load {model.load} brings one; leave {flag} out, or "
            "--load"
        )
    names = compared_optimizers(config.optimizer)
    for setting, users in OPTIONS_OF.items():
        given = getattr(config.optimizer, setting)
        is_given = given is not None and given is not False
        if is_given and not set(users) & set(names):
            raise ValueError(
                f"--{setting.replace('_', '-')} does nothing for {', '.join(names)}; it is for "
                f"{', '.join(users)}"
            )
    lowest = {
        "--spike-limit": (training.spike_limit, 0),
        "--most-skipped": (training.most_skipped, 1),
        "--evaluate-every": (training.evaluate_every, 1),
        "--evaluation-batches": (training.evaluation_batches, 1),
        "--checkpoint-every": (output.checkpoint_every, 0),
        "--keep": (output.keep, 1),
        "--log-every": (output.log_every, 1),
        "--sample-length": (output.sample_length, 0),
        "--temperature": (output.temperature, 0),
    }
    for flag, (value, least) in lowest.items():
        if value is not None and value < least:
            raise ValueError(f"{flag} is {value}; expected at least {least}")


def compared_optimizers(options: OptimizerOptions) -> tuple[OptimizerName, ...]:
    """Returns the optimizers to train with, in order.

    Raises:
      ValueError: If one is unknown, or named twice.

    >>> compared_optimizers(OptimizerOptions(compare="apollo_mini,adamw"))
    ('apollo_mini', 'adamw')
    """
    if options.compare is None:
        return (options.name,)
    names = [name.strip() for name in options.compare.split(",")]
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
    config: PretrainConfig, stored: StoredModel, text_tokens: int | None
) -> PaperSettings:
    options, training = config.model, config.training
    if options.load is not None:
        settings = fine_tuning_settings(stored.config, steps=_STEPS_ON_A_STREAM, dtype=stored.dtype)
        context = stored.longest_context or settings.sequence_length
        sequence = min(settings.sequence_length, context)
        settings = dataclasses.replace(settings, sequence_length=sequence)
        if text_tokens is not None:
            batch = _first(training.batch, settings.sequences_per_batch)
            tokens_per_step = max(1, batch * _first(training.sequence, sequence))
            steps = max(1, _EPOCHS * text_tokens // tokens_per_step)
            settings = dataclasses.replace(settings, steps=steps)
        return settings
    if options.preset == "paper":
        return paper_settings(options.name)
    defaults = PRESETS.get(options.name)
    if defaults is None:
        defaults = PaperSettings(steps=10_000, rank=MODELS[options.name].hidden_size // 4)
    return dataclasses.replace(defaults, dtype="float32")


def resolve(
    config: PretrainConfig,
    name: OptimizerName,
    stored: StoredModel,
    *,
    data: str,
    text_digest: str,
    text_tokens: int | None = None,
) -> RunSettings:
    """Fills what was left out with the preset's, the model's or fine-tuning's defaults.

    Args:
      config: The command line.
      name: Which of the compared optimizers the run is for.
      stored: The model, whose vocabulary is the tokenizer's or that of the loaded weights.
      data: What the text is, by name.
      text_digest: Digest of the training tokens.
      text_tokens: How many training tokens there are; None for a stream.

    Returns:
      The settings of the run.

    Raises:
      ValueError: If a setting is out of range, or the paper has none for the model.
    """
    defaults = _defaults(config, stored, text_tokens)
    weights = config.model.weights or ("bf16" if defaults.dtype == "bfloat16" else "f32")
    return RunSettings(
        model=stored.config,
        load=None if config.model.load is None else str(config.model.load),
        weights=weights,
        compute=config.model.compute or ("bf16" if weights == "int8" else weights),
        remat=config.model.remat,
        optimizer=_optimizer_settings(config, name, defaults),
        batch=_first(config.training.batch, defaults.sequences_per_batch),
        sequence=_first(config.training.sequence, defaults.sequence_length),
        micro_batches=_micro_batches(config.training, defaults),
        update=config.training.update,
        spike_limit=config.training.spike_limit,
        seed=config.training.seed,
        data=data,
        text_digest=text_digest,
    )


def _micro_batches(training: TrainingOptions, defaults: PaperSettings) -> int:
    if training.micro_batches is not None or training.update == "layerwise":
        return _first(training.micro_batches, 1)
    # Of the size that the model's own batch is divided in, as far as this batch can be.
    batch = _first(training.batch, defaults.sequences_per_batch)
    parts = batch * defaults.micro_batches // defaults.sequences_per_batch
    return math.gcd(batch, max(1, parts))


def _optimizer_settings(
    config: PretrainConfig, name: OptimizerName, defaults: PaperSettings
) -> OptimizerSettings:
    options = config.optimizer
    is_apollo = name in ("apollo", "apollo_mini")
    paper_rate = defaults.learning_rate if config.model.preset == "paper" and is_apollo else None
    loads = config.model.load is not None
    learning_rates = FINE_TUNING_LEARNING_RATES if loads else DEFAULT_LEARNING_RATES
    alphas = {"apollo": defaults.alpha_apollo, "apollo_mini": defaults.alpha_mini}
    return OptimizerSettings(
        name=name,
        learning_rate=_first(options.learning_rate, paper_rate, learning_rates[name]),
        total_steps=_first(config.training.steps, defaults.steps),
        warmup_fraction=_first(options.warmup_fraction, defaults.warmup_fraction),
        final_fraction=defaults.final_learning_rate_fraction,
        weight_decay=_first(options.weight_decay, defaults.weight_decay),
        clip=options.clip,
        rank=_first(options.rank, defaults.rank),
        alpha=_first(options.alpha, alphas.get(name, _GALORE_ALPHA)),
        update_proj_gap=_first(options.update_proj_gap, defaults.update_proj_gap),
        granularity=_first(options.granularity, "channel"),
        projection=_first(options.projection, "gaussian"),
        norm_growth_limit=_first(options.norm_growth_limit, 1.01) or None,
        project_embeddings=options.project_embeddings,
        momentum=_first(options.momentum, 0.9) if name == "sgd" else 0.0,
        seed=config.training.seed,
    )


def _first(*values: Any) -> Any:
    """The first value that was given."""
    return next(value for value in values if value is not None)
