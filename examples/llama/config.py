"""Shapes of the LLaMA models and the settings the paper trains them with.

The shapes and settings are those of *APOLLO: SGD-like Memory, AdamW-level Performance* (Zhu et
al., MLSys 2025, arXiv 2412.05270); its smaller relatives `9m` and `20m` and its larger one `3b` are
those of GaLore (Zhao et al., ICML 2024, arXiv 2403.03507), and `nano` is ours, for two CPU cores.
"""

import dataclasses
import math

__all__ = [
    "MODELS",
    "PRESETS",
    "LlamaConfig",
    "PaperSettings",
    "RopeScaling",
    "fine_tuning_settings",
    "non_embedding_parameter_count",
    "paper_settings",
    "parameter_count",
]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How LLaMA 3.1 stretches the rotary wavelengths for long contexts (`rope_type` "llama3").

    Wavelengths longer than `original_context / low_freq_factor` tokens grow by `factor`, those
    shorter than `original_context / high_freq_factor` stay, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor is {self.factor}; the rotary scaling factor is at least 1.")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor is "
                f"{self.high_freq_factor}; allowed are 0 < low_freq_factor < high_freq_factor."
            )
        if self.original_context < 1:
            raise ValueError(f"original_context is {self.original_context}; it is at least 1.")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA model.

    Attributes:
        vocab_size: rows of the embedding and columns of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the SwiGLU feed-forward layer.
        num_layers: number of blocks.
        num_heads: number of query heads; each is `hidden_size / num_heads` wide.
        num_kv_heads: number of key and value heads, shared by groups of query heads; 0 means
            `num_heads`, and reads as `num_heads` from then on.
        rope_theta: base of the rotary wavelengths.
        rms_norm_eps: added to the mean square in RMSNorm.
        rope_scaling: LLaMA 3.1's stretching of the rotary wavelengths, or None.
        tied: whether the output head is the embedding, one parameter for both.

    Raises:
        ValueError: if a size is not positive or the sizes do not divide as attention needs.

    >>> LlamaConfig(256, hidden_size=64, intermediate_size=172, num_layers=2, num_heads=4).head_dim
    16
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    rope_scaling: RopeScaling | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rope_scaling", "tied") and not value > 0:
                raise ValueError(f"{field.name} is {value}; a LLaMA model needs a positive one.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                "choose sizes that give every head the same width."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} with num_heads {self.num_heads} makes heads "
                f"{self.head_dim} wide; rotary embeddings need an even width."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads "
                f"{self.num_kv_heads}; every key head serves the same number of query heads."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Width of all keys, and of all values, of one token."""
        return self.num_kv_heads * self.head_dim


MODELS: dict[str, LlamaConfig] = {
    "nano": LlamaConfig(256, 128, 344, num_layers=4, num_heads=4),
    "9m": LlamaConfig(32_000, 128, 352, num_layers=4, num_heads=4),
    "20m": LlamaConfig(32_000, 256, 688, num_layers=4, num_heads=4),
    "60m": LlamaConfig(32_000, 512, 1376, num_layers=8, num_heads=8),
    "130m": LlamaConfig(32_000, 768, 2048, num_layers=12, num_heads=12),
    "350m": LlamaConfig(32_000, 1024, 2736, num_layers=24, num_heads=16),
    "1b": LlamaConfig(32_000, 2048, 5461, num_layers=24, num_heads=32),
    "3b": LlamaConfig(32_000, 2560, 6848, num_layers=32, num_heads=32),
    "7b": LlamaConfig(32_000, 4096, 11_008, num_layers=32, num_heads=32),
    "13b": LlamaConfig(32_000, 5120, 13_824, num_layers=40, num_heads=40),
    "70b": LlamaConfig(32_000, 8192, 28_672, num_layers=80, num_heads=64, num_kv_heads=8),
}
"""Models by name. A name counts the parameters at the listed vocabulary: `9m` and `20m` are mostly
embedding and head. `nano` has 0.86 million, for a vocabulary of bytes."""


def non_embedding_parameter_count(config: LlamaConfig) -> int:
    """Parameters outside the embedding and the output head: blocks and norms, exactly.

    >>> non_embedding_parameter_count(MODELS["60m"])
    25305600
    """
    attention = 2 * config.hidden_size * (config.hidden_size + config.kv_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    norms = 2 * config.hidden_size
    return config.num_layers * (attention + mlp + norms) + config.hidden_size


def parameter_count(config: LlamaConfig) -> int:
    """All parameters, exactly.

    >>> parameter_count(MODELS["60m"])
    58073600
    """
    tables = 1 if config.tied else 2
    return tables * config.vocab_size * config.hidden_size + non_embedding_parameter_count(config)


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """How a model is trained; the defaults are what all sizes of the paper's pre-training share.

    Attributes:
        steps: optimizer steps.
        rank: rank of APOLLO's projection, a quarter of the hidden size, 256 at 7B.
        alpha_apollo: APOLLO's scale: 1 below 1B, 1/2 from 1B on.
        alpha_mini: APOLLO-Mini's scale.
        sequences_per_batch: sequences in the batch of one optimizer step.
        sequence_length: tokens that are predicted in one sequence.
        micro_batches: parts of a batch whose gradients are made one after another.
        learning_rate: the peak, reached at the end of the warm-up.
        warmup_fraction: part of the steps in which the learning rate rises from zero.
        weight_decay: decoupled weight decay.
        dtype: of parameters and computation, as a NumPy name.
        update_proj_gap: steps between two draws of the projection.
    """

    steps: int
    rank: int
    alpha_apollo: float = 1.0
    alpha_mini: float = math.sqrt(128)
    sequences_per_batch: int = 512
    sequence_length: int = 256
    micro_batches: int = 1
    learning_rate: float = 0.01
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    dtype: str = "bfloat16"
    update_proj_gap: int = 200

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that one optimizer step predicts."""
        return self.sequences_per_batch * self.sequence_length


PRESETS: dict[str, PaperSettings] = {
    "nano": PaperSettings(
        steps=400,
        rank=32,
        sequences_per_batch=8,
        sequence_length=128,
        warmup_fraction=0.3,
        alpha_mini=2.8,
        dtype="float32",
    ),
    "60m": PaperSettings(steps=10_000, rank=128),
    "130m": PaperSettings(steps=20_000, rank=192),
    "350m": PaperSettings(steps=60_000, rank=256),
    "1b": PaperSettings(steps=100_000, rank=512, alpha_apollo=0.5),
    "7b": PaperSettings(steps=150_000, rank=256, alpha_apollo=0.5),
}
"""Settings by the name of the model: the paper's own where it reports a run, and for `nano` the
same recipe cut down to 400 steps of 1,024 tokens. Its warm-up and alphas are from
`benchmarks/results/nano_learning_rates.json`: so short a run needs more of it for warm-up."""


def fine_tuning_settings(config: LlamaConfig, *, steps: int, dtype: str) -> PaperSettings:
    """Returns how a loaded model is trained unless told otherwise.

    Rank, scales, learning rate of APOLLO and batch are those of the paper's fine-tuning of
    LLaMA-3.2-1B; APOLLO-Mini's scale is smaller for matrices narrower than 128, where the paper's
    would give updates larger than Adam's.

    Args:
        config: the loaded model's shape.
        steps: optimizer steps.
        dtype: in which the weights are stored, as a NumPy name.
    """
    return PaperSettings(
        steps=steps,
        rank=min(32, max(1, config.hidden_size // 4)),
        alpha_apollo=math.sqrt(5),
        alpha_mini=math.sqrt(min(128, config.hidden_size)),
        sequences_per_batch=32,
        micro_batches=4,
        learning_rate=3e-4,
        dtype=dtype,
    )


def paper_settings(model_name: str) -> PaperSettings:
    """Returns the paper's settings for a model of `MODELS`.

    Raises:
        ValueError: if the paper reports no run of that model.

    >>> paper_settings("60m").tokens_per_batch
    131072
    """
    reported = [name for name in PRESETS if name != "nano"]
    if model_name not in reported:
        raise ValueError(
            f"the paper reports no pre-training of {model_name!r}; it has settings for "
            f"{', '.join(reported)}. Choose one of these, or leave the preset out and give steps, "
            "batch and learning rate yourself."
        )
    return PRESETS[model_name]
