"""The optimizers to compare: APOLLO's two, SWAN and six of Optax's, behind one set of settings."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
import tyro
from jaxtyping import PyTree

import apollo_optax
from examples.llama.command_line import LEFT_OUT, LeftOut, check_ranges, default

__all__ = [
    "DEFAULT_LEARNING_RATES",
    "FINE_TUNING_LEARNING_RATES",
    "FLOAT32_MOMENTS",
    "LEFT_OPEN",
    "OPTIMIZERS",
    "OPTIONS_OF",
    "OptimizerName",
    "OptimizerSettings",
    "ProjectionName",
    "VocabularyName",
    "decayed_leaves",
    "learning_rate_schedule",
    "make_optimizer",
    "unstack_blocks",
]

OptimizerName = Literal[
    "apollo", "apollo_mini", "swan", "adamw", "adafactor", "lion", "muon", "galore", "sgd"
]
ProjectionName = Literal["gaussian", "rademacher", "svd"]
VocabularyName = Literal["adam", "factored", "factored_momentum"]

DEFAULT_LEARNING_RATES: dict[str, float] = {
    "apollo": 2e-2,
    "apollo_mini": 2e-2,
    "swan": 8e-3,
    "adamw": 2e-3,
    "adafactor": 8e-2,
    "lion": 1.6e-3,
    "muon": 2.83e-2,
    "galore": 4e-2,
    "sgd": 4e-1,
}
"""Peak learning rates of small models. AdamW, APOLLO, APOLLO-Mini and SWAN have the best of `nano`,
in `benchmarks/results/nano_learning_rates.json`; of rates within 0.001 nats, the smaller. The
others have those of `benchmarks/results/convergence.json`."""

FINE_TUNING_LEARNING_RATES: dict[str, float] = {
    name: rate / 100 for name, rate in DEFAULT_LEARNING_RATES.items()
} | {"apollo": 3e-4, "apollo_mini": 3e-4}
"""Peak learning rates of loaded models: AdamW's usual 2e-5, a hundredth of that of a small new
model, and as much for the others; for APOLLO and APOLLO-Mini those of the paper's fine-tuning."""

FLOAT32_MOMENTS: tuple[OptimizerName, ...] = ("apollo", "apollo_mini", "swan")
"""Optimizers whose moments are float32 whatever the weights are."""

OPTIMIZERS: tuple[OptimizerName, ...] = tuple(DEFAULT_LEARNING_RATES)  # type: ignore[arg-type]


OPTIONS_OF: dict[str, tuple[OptimizerName, ...]] = {
    "rank": ("apollo", "galore"),
    "alpha": ("apollo", "apollo_mini", "galore"),
    "update_proj_gap": ("apollo", "apollo_mini", "galore"),
    "granularity": ("apollo",),
    "projection": ("apollo", "apollo_mini"),
    "norm_growth_limit": ("apollo", "apollo_mini"),
    "vocabulary": ("apollo", "apollo_mini", "swan"),
    "vocabulary_learning_rate": ("apollo", "apollo_mini", "swan"),
    "project_embeddings": ("apollo", "apollo_mini", "galore", "muon"),
    "momentum": ("sgd",),
}
"""The settings that not every optimizer has, and which have them."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and everything that decides its updates.

    Attributes:
      name: APOLLO's, or one of Optax's.
      learning_rate: Its peak. Adafactor's is relative to the root mean square of the weights.
      total_steps: Optimizer steps of the whole run, which the schedule spreads over.
      warmup_fraction: Part of the steps in which the learning rate rises from 0 to its peak; a
        cosine leads from there to a tenth of it.
      final_fraction: The last step's learning rate over the peak.
      weight_decay: Decoupled weight decay of the matrices, times the learning rate.
      clip: Largest global norm of the gradients; 0 for no clipping.
      rank: Rows of the projection; for apollo and galore.
      alpha: Factor of the projected updates; for apollo, apollo_mini and galore.
      granularity: What shares a learning rate, a channel or a whole matrix; for apollo.
      update_proj_gap: Steps between two projections; for apollo, apollo_mini and galore.
      projection: What the projection is drawn from; for apollo and apollo_mini.
      norm_growth_limit: Largest ratio of the norms of a matrix's consecutive updates, 0 for no
        limit; for apollo and apollo_mini.
      vocabulary: The rule of embedding and head; for apollo, apollo_mini and swan.
      vocabulary_learning_rate: The peak learning rate of embedding and head; for apollo,
        apollo_mini and swan.
      project_embeddings: Treat embedding and head as the other matrices, instead of training them
        with Adam as the paper does; for apollo, apollo_mini, galore and muon.
      momentum: Decay of the sum of past gradients, 0 for none; for sgd.
      seed: Seed of the projections.
    """

    name: Annotated[OptimizerName, tyro.conf.arg(name="optimizer")]
    learning_rate: Annotated[
        LeftOut[float], default("FLOAT", "the optimizer's own; smaller with --load")
    ]
    total_steps: Annotated[
        LeftOut[int],
        default("INT", "the paper's; nano: 400; others: 10,000; --load: 3 epochs", name="steps"),
    ]
    warmup_fraction: Annotated[LeftOut[float], default("FLOAT", "0.1; nano: 0.3")] = 0.1
    final_fraction: tyro.conf.Suppress[float] = 0.1
    weight_decay: Annotated[LeftOut[float], default("FLOAT", "0")] = 0.0
    clip: float = 0.0
    rank: Annotated[LeftOut[int], default("INT", "a quarter of the hidden size; --load: 32")] = 256
    alpha: Annotated[
        LeftOut[float],
        default("FLOAT", "1, sqrt 128, 1/4; nano: 1, 2.8, 1/4; --load: sqrt 5, sqrt 128, 1/4"),
    ] = 1.0
    granularity: Annotated[
        LeftOut[Literal["channel", "tensor"]], default("{channel,tensor}", "channel")
    ] = "channel"
    update_proj_gap: Annotated[LeftOut[int], default("INT", "200")] = 200
    projection: Annotated[
        LeftOut[ProjectionName], default("{gaussian,rademacher,svd}", "gaussian")
    ] = "gaussian"
    norm_growth_limit: Annotated[LeftOut[float], default("FLOAT", "1.01")] = 1.01
    vocabulary: Annotated[
        LeftOut[VocabularyName],
        default("{adam,factored,factored_momentum}", "adam; swan: factored"),
    ] = "adam"
    vocabulary_learning_rate: Annotated[float | None, default("FLOAT", "the learning rate")] = None
    project_embeddings: bool = False
    momentum: Annotated[LeftOut[float], default("FLOAT", "0.9")] = 0.0
    seed: tyro.conf.Suppress[int] = 0


LEFT_OPEN = OptimizerSettings(
    "apollo",
    LEFT_OUT,
    LEFT_OUT,
    **dict.fromkeys(
        ("warmup_fraction", "weight_decay", *OPTIONS_OF.keys() - {"project_embeddings"}), LEFT_OUT
    ),
)
"""What a command line that gives no flag says of the optimizer."""


def learning_rate_schedule(settings: OptimizerSettings) -> optax.Schedule:
    """Returns the learning rate by the number of steps done: linear warm-up, then a cosine.

    The last step of the warm-up has the peak, the last of all `final_fraction` of it.

    >>> settings = OptimizerSettings("sgd", learning_rate=1.0, total_steps=10, warmup_fraction=0.2)
    >>> schedule = learning_rate_schedule(settings)
    >>> [round(float(schedule(steps_done)), 2) for steps_done in (0, 1, 9)]
    [0.5, 1.0, 0.1]
    """
    return _schedule(settings, settings.learning_rate)


def _schedule(settings: OptimizerSettings, peak: float) -> optax.Schedule:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=round(settings.warmup_fraction * settings.total_steps),
        decay_steps=settings.total_steps,
        end_value=settings.final_fraction * peak,
    )
    # Counted from one, so that the first step is not lost to a learning rate of zero.
    return lambda count: schedule(count + 1)


def decayed_leaves(params: PyTree) -> PyTree:
    """Returns the tree of booleans that is true for matrices and false for norms."""
    specs = apollo_optax.transformer_dimension_numbers(params, project_embeddings=True)
    return jax.tree.map(lambda _, spec: spec is not None, params, specs)


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Returns the optimizer for the parameters of `model.init_params`.

    Args:
      settings: Which one, and how.

    Returns:
      A transformation with the learning rate's schedule, weight decay and clipping in it.

    Raises:
      ValueError: If a setting is out of the range of its optimizer.
    """
    check_ranges(settings)
    _require_one_of("optimizer", settings.name, OPTIMIZERS)
    optimizer = _make(settings, learning_rate_schedule(settings))
    if settings.clip == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip), optimizer)


def _make(
    settings: OptimizerSettings, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    decay: dict[str, Any] = {"weight_decay": settings.weight_decay, "mask": decayed_leaves}
    # For what has no decay of its own, or one that has no mask for all that it trains.
    decay_and_rate = optax.chain(
        optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(learning_rate)
    )
    match settings.name:
        case "apollo":
            return apollo_optax.apollo(
                learning_rate,
                settings.rank,
                granularity=settings.granularity,
                **_apollo_arguments(settings),
                **decay,
            )
        case "apollo_mini":
            return apollo_optax.apollo_mini(learning_rate, **_apollo_arguments(settings), **decay)
        case "swan":
            return apollo_optax.swan(learning_rate, **_vocabulary_arguments(settings), **decay)
        case "adamw":
            return optax.adamw(learning_rate, **decay)
        case "lion":
            return optax.lion(learning_rate, **decay)
        case "adafactor":
            # Optax adds Adafactor's decay after the learning rate, that of the others before it.
            return optax.adafactor(
                learning_rate,
                weight_decay_rate=lambda count: settings.weight_decay * learning_rate(count),
                weight_decay_mask=decayed_leaves,
            )
        case "muon":
            specs = _matrices(settings, optax.contrib.MuonDimensionNumbers)
            # Uphill, for the learning rate that follows.
            uphill = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=specs)
            return optax.chain(uphill, decay_and_rate)
        case "galore":
            return unstack_blocks(
                optax.contrib.galore(
                    learning_rate,
                    settings.rank,
                    settings.update_proj_gap,
                    settings.alpha,
                    weight_dimension_numbers=_matrices(
                        settings, optax.contrib.GaLoreDimensionNumbers
                    ),
                    **decay,
                )
            )
        case "sgd":
            momentum = optax.trace(settings.momentum) if settings.momentum else optax.identity()
            return optax.chain(momentum, decay_and_rate)


def _require_one_of(flag: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"--{flag} is {value!r}; expected one of {', '.join(allowed)}")


def _apollo_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    _require_one_of("projection", settings.projection, get_args(ProjectionName))
    return {
        "update_proj_gap": settings.update_proj_gap,
        "scale": settings.alpha,
        "norm_growth_limit": settings.norm_growth_limit or None,
        "projection": getattr(apollo_optax, settings.projection),
        "key": settings.seed,
        **_vocabulary_arguments(settings),
    }


def _vocabulary_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    peak = settings.vocabulary_learning_rate
    return {
        "vocabulary": settings.vocabulary,
        "vocabulary_learning_rate": None if peak is None else _schedule(settings, peak),
        "weight_dimension_numbers": _matrices(settings, apollo_optax.ApolloDimensionNumbers),
    }


def _matrices(
    settings: OptimizerSettings, specification: Callable[..., Any]
) -> Callable[[PyTree], PyTree]:
    """Returns the function of the parameters that says which axes make a matrix."""

    def dimension_numbers(params: PyTree) -> PyTree:
        specs = apollo_optax.transformer_dimension_numbers(
            params, project_embeddings=settings.project_embeddings
        )
        return jax.tree.map(lambda _, spec: spec and specification(*spec), params, specs)

    return dimension_numbers


def unstack_blocks(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows `inner` every layer of `params["blocks"]` as leaves of their own.

    For transformations that know no batch axes, such as Optax's GaLore.

    Args:
      inner: Sees `params["blocks"]` as a list of layers.

    Returns:
      A transformation for stacked blocks, with the state of `inner`.
    """

    def unstacked(tree: PyTree) -> PyTree:
        num_layers = jax.tree.leaves(tree["blocks"])[0].shape[0]
        layers = [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(num_layers)]
        return tree | {"blocks": layers}

    def init(params: PyTree) -> optax.OptState:
        return inner.init(unstacked(params))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        layers_of_params = None if params is None else unstacked(params)
        updates, state = inner.update(unstacked(updates), state, layers_of_params)
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *updates["blocks"])
        return updates | {"blocks": stacked}, state

    return optax.GradientTransformation(init, update)
