"""The optimizers to compare, with one set of settings: APOLLO's two, SWAN and six of Optax's."""

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
    "LORA_LEARNING_RATE",
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
"""Peak learning rates of small models. AdamW, APOLLO, APOLLO-Mini and SWAN have the best rates of
`nano`, from `benchmarks/results/nano_learning_rates.json`; if rates are within 0.001 nats, the
smaller. The others have the rates of `benchmarks/results/convergence.json`."""

FINE_TUNING_LEARNING_RATES: dict[str, float] = {
    name: rate / 100 for name, rate in DEFAULT_LEARNING_RATES.items()
} | {"apollo": 3e-4, "apollo_mini": 3e-4}
"""Peak learning rates of loaded models. AdamW has its usual 2e-5, a hundredth of the rate of a
small new model. The others have a hundredth too, except that APOLLO and APOLLO-Mini have the rates
of the paper's fine-tuning."""

LORA_LEARNING_RATE = 10 * FINE_TUNING_LEARNING_RATES["adamw"]
"""LoRA's peak learning rate, ten times AdamW's of all parameters, which is QLoRA's (Dettmers et
al., 2023)."""

FLOAT32_MOMENTS: tuple[OptimizerName, ...] = ("apollo", "apollo_mini", "swan")
"""The optimizers whose moments are float32 for weights of any dtype."""

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
"""The settings that not every optimizer has, and the optimizers that have them."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and everything that decides its updates.

    Attributes:
      name: The optimizer, one of this package or of Optax.
      learning_rate: The peak learning rate. Adafactor's is relative to the root mean square of the
        weights.
      total_steps: The number of optimizer steps of the whole run and of the schedule.
      warmup_fraction: The fraction of the steps in which the learning rate rises from 0 to its
        peak. A cosine then lowers the learning rate to a tenth of the peak.
      final_fraction: The learning rate of the last step, divided by the peak.
      weight_decay: The decoupled weight decay of the matrices, which is multiplied by the learning
        rate.
      clip: The largest global norm of the gradients. 0 means no clipping.
      rank: The number of rows of the projection, for apollo and galore.
      alpha: The scale of the projected updates, the paper's alpha, for apollo, apollo_mini and
        galore.
      granularity: Whether each channel or each matrix has a learning rate of its own, for apollo.
      update_proj_gap: The number of steps between two projections, for apollo, apollo_mini and
        galore.
      projection: The kind of projection, for apollo and apollo_mini.
      norm_growth_limit: The largest ratio of the norms of a matrix's consecutive updates, for
        apollo and apollo_mini. 0 means no limit.
      vocabulary: The update rule of the embedding and the head, for apollo, apollo_mini and swan.
      vocabulary_learning_rate: The peak learning rate of the embedding and the head, for apollo,
        apollo_mini and swan.
      project_embeddings: Project the embedding and the head like the other matrices, for apollo,
        apollo_mini, galore and muon. The paper trains both with Adam.
      momentum: The decay of the sum of past gradients, for sgd. 0 means no momentum.
      seed: The seed of the projections.
    """

    name: Annotated[
        LeftOut[OptimizerName],
        default("{" + ",".join(get_args(OptimizerName)) + "}", "apollo", name="optimizer"),
    ]
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
    rank: Annotated[
        LeftOut[int], default("INT", "a quarter of the hidden size; 7b: 256; --load: 32")
    ] = 256
    alpha: Annotated[
        LeftOut[float],
        default(
            "FLOAT",
            "1, sqrt 128, 1/4; nano: 1, 2.8, 1/4; 1b and larger: 1/2, sqrt 128, 1/4; "
            "--load: sqrt 5, sqrt 128, 1/4",
        ),
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
    LEFT_OUT,
    LEFT_OUT,
    LEFT_OUT,
    **dict.fromkeys(
        ("warmup_fraction", "weight_decay", *OPTIONS_OF.keys() - {"project_embeddings"}), LEFT_OUT
    ),
)
"""The settings of the optimizer on a command line without flags."""


def learning_rate_schedule(settings: OptimizerSettings) -> optax.Schedule:
    """Returns the learning rate by the number of steps done: a linear warm-up, then a cosine.

    The last step of the warm-up has the peak, and the last step of all has `final_fraction` of the
    peak.

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
        # Of a few steps, one is left for the cosine.
        warmup_steps=min(
            round(settings.warmup_fraction * settings.total_steps), settings.total_steps - 1
        ),
        decay_steps=settings.total_steps,
        end_value=settings.final_fraction * peak,
    )
    # Counted from one, so that the first step does not have a learning rate of zero.
    return lambda count: schedule(count + 1)


def decayed_leaves(params: PyTree) -> PyTree:
    """Returns the tree of booleans that is true for matrices and false for norms."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Returns the optimizer for the parameters of `model.init_params`.

    Args:
      settings: The optimizer and its settings.

    Returns:
      A transformation that includes the schedule of the learning rate, weight decay and clipping.

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
    # For optimizers without weight decay of their own, or without a mask for all leaves.
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
            # Optax adds the decay after the learning rate for Adafactor, and before it for others.
            return optax.adafactor(
                learning_rate,
                weight_decay_rate=lambda count: settings.weight_decay * learning_rate(count),
                weight_decay_mask=decayed_leaves,
            )
        case "muon":
            specs = _matrices(settings, optax.contrib.MuonDimensionNumbers)
            # Muon goes uphill here, since the learning rate that follows changes the sign.
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
    """Shows `inner` every layer of `params["blocks"]` as separate leaves.

    This is for transformations without batch axes, such as Optax's GaLore.

    Args:
      inner: A transformation that gets `params["blocks"]` as a list of layers.

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
