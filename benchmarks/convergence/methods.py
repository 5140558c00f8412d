"""What is compared: every optimizer at its own learning rate, and APOLLO with one thing changed."""

import dataclasses
import math
from typing import Any, Literal

from examples.llama.config import LlamaConfig
from examples.llama.optimizers import OptimizerSettings

__all__ = ["ABLATIONS", "METHODS", "MODEL", "STEPS", "Ablation", "Method", "Trial"]

VOCABULARY = 1024
MODEL = LlamaConfig(VOCABULARY, 128, 344, num_layers=5, num_heads=4)
"""0.99 million parameters beside the embedding and the head, 1.25 million with them."""
SEQUENCES, SEQUENCE_LENGTH, STEPS = 32, 128, 500
WARMUP_FRACTION = 0.3


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with all but its learning rate.

    Attributes:
      label: Its name in tables and pictures.
      optimizer: Fields of `OptimizerSettings`, beside those that all trials share.
      start: The learning rate its sweep starts at.
      fine: Whether the sweep ends with steps of a square root of 2 beside those of 2.
      weights: Dtype the weights are kept in; products are float32 always.
      rounding: Of weights that are not float32.
      vocabulary_factor: Multiplies the updates of embedding and head.
    """

    label: str
    optimizer: dict[str, Any]
    start: float
    fine: bool = False
    weights: Literal["f32", "bf16", "int8"] = "f32"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    vocabulary_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One thing changed of a method, at the learning rate that is best for the method.

    Attributes:
      of: The method's name.
      label: What is changed, for the table.
      changes: Fields of `Method` with other values; those of `optimizer` are added to its own.
      factor: Multiplies the method's best learning rate.
    """

    of: str
    label: str
    changes: dict[str, Any]
    factor: float = 1.0

    def method(self) -> Method:
        """The method that results."""
        base = METHODS[self.of]
        optimizer = base.optimizer | self.changes.get("optimizer", {})
        return dataclasses.replace(base, **(self.changes | {"optimizer": optimizer}))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: a name of `METHODS` or `ABLATIONS`, a learning rate and a seed."""

    name: str
    learning_rate: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name} lr={self.learning_rate:g} seed={self.seed}"

    @property
    def method(self) -> Method:
        """What is trained with."""
        return METHODS[self.name] if self.name in METHODS else ABLATIONS[self.name].method()

    @property
    def settings(self) -> OptimizerSettings:
        """The optimizer's settings."""
        return OptimizerSettings(
            learning_rate=self.learning_rate,
            total_steps=STEPS,
            warmup_fraction=WARMUP_FRACTION,
            seed=self.seed,
            **self.method.optimizer,
        )


def _apollo(rank: int, **others: Any) -> dict[str, Any]:
    return {"name": "apollo", "rank": rank, **others}


def _mini(alpha: float, **others: Any) -> dict[str, Any]:
    return {"name": "apollo_mini", "rank": 1, "alpha": alpha, **others}


_QUARTER, _EIGHTH = MODEL.hidden_size // 4, MODEL.hidden_size // 8
# Of a rank-r projection of m rows, APOLLO's factors are sqrt(r / m) of Adam's.
_MINI_ALPHA = math.sqrt(8)

METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", {"name": "adamw"}, 2e-3, fine=True),
    "apollo_r32": Method("APOLLO, r = 1/4", _apollo(_QUARTER), 2e-2, fine=True),
    "apollo_mini": Method("APOLLO-Mini", _mini(_MINI_ALPHA), 4e-2, fine=True),
    "muon": Method("Muon", {"name": "muon"}, 1e-2, fine=True),
    "adafactor": Method("Adafactor", {"name": "adafactor"}, 2e-2, fine=True),
    "apollo_r16": Method("APOLLO, r = 1/8", _apollo(_EIGHTH), 2e-2),
    "apollo_svd": Method("APOLLO with SVD", _apollo(_QUARTER, projection="svd"), 2e-2),
    "galore": Method("GaLore", {"name": "galore", "rank": _QUARTER, "alpha": 0.25}, 2e-2),
    "lion": Method("Lion", {"name": "lion"}, 4e-4),
    "sgd": Method("SGD with momentum", {"name": "sgd", "momentum": 0.9}, 2e-1),
    "q_apollo_mini": Method("Q-APOLLO-Mini", _mini(_MINI_ALPHA), 4e-2, weights="int8"),
    "apollo_mini_paper_alpha": Method(
        "APOLLO-Mini, alpha = sqrt(128)", _mini(math.sqrt(128)), 1e-2
    ),
}
"""By name, in the order in which they are swept."""


def _optimizer(**changes: Any) -> dict[str, Any]:
    return {"optimizer": changes}


def _granularities() -> dict[str, Ablation]:
    # alpha makes up for sqrt(r / m), so that one learning rate serves all ranks.
    base = METHODS["apollo_r32"].optimizer["rank"]
    ablations = {}
    for granularity in ("channel", "tensor"):
        for rank in (1, 4, _EIGHTH, _QUARTER):
            if (granularity, rank) == ("channel", base):
                continue
            alpha = math.sqrt(base / rank)
            changes = _optimizer(rank=rank, granularity=granularity, alpha=alpha)
            ablations[f"{granularity}_r{rank}"] = Ablation(
                "apollo_r32", f"per {granularity}, r = {rank}", changes
            )
    for factor, name in ((0.5, "half"), (2.0, "double")):
        changes = _optimizer(rank=1, granularity="channel", alpha=math.sqrt(base))
        ablations[f"channel_r1_{name}"] = Ablation(
            "apollo_r32", f"per channel, r = 1, {factor:g} of the learning rate", changes, factor
        )
    return ablations


def _of_both(name: str, label: str, changes: dict[str, Any]) -> dict[str, Ablation]:
    return {
        f"{of}_{name}": Ablation(of, f"{METHODS[of].label}: {label}", changes)
        for of in ("apollo_r32", "apollo_mini")
    }


ABLATIONS: dict[str, Ablation] = {
    **_granularities(),
    **_of_both("rademacher", "Rademacher", _optimizer(projection="rademacher")),
    **_of_both("no_limiter", "no limiter", _optimizer(norm_growth_limit=None)),
    **_of_both("clip", "gradients clipped to norm 1", _optimizer(norm_growth_limit=None, clip=1.0)),
    **_of_both("bf16", "bfloat16 weights", {"weights": "bf16"}),
    **_of_both(
        "bf16_nearest",
        "bfloat16 weights, rounded to nearest",
        {"weights": "bf16", "rounding": "nearest"},
    ),
    "adamw_bf16": Ablation("adamw", "AdamW: bfloat16 weights", {"weights": "bf16"}),
    "adamw_bf16_nearest": Ablation(
        "adamw",
        "AdamW: bfloat16 weights, rounded to nearest",
        {"weights": "bf16", "rounding": "nearest"},
    ),
    **{
        f"adamw_vocabulary_{factor}x": Ablation(
            "adamw",
            f"AdamW: {factor} times the learning rate for embedding and head",
            {"vocabulary_factor": float(factor)},
        )
        for factor in (4, 10)
    },
    **{
        name: ablation
        for gap, label in ((1, "every step"), (50, "every 50 steps"), (1000, "never"))
        for name, ablation in _of_both(
            f"gap_{gap}", f"a new projection {label}", _optimizer(update_proj_gap=gap)
        ).items()
    },
    **{
        f"apollo_r32_alpha_{name}": Ablation(
            "apollo_r32",
            f"{METHODS['apollo_r32'].label}: alpha = {alpha:g}",
            _optimizer(alpha=alpha),
        )
        for name, alpha in (("half", 0.5), ("double", 2.0))
    },
    **_of_both(
        "embeddings", "embedding and head projected too", _optimizer(project_embeddings=True)
    ),
}
"""By name, in the order in which they are run."""
