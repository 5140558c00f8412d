"""Which rule for the matrices is tried with which for the vocabulary, and at what size."""

from typing import NamedTuple

__all__ = ["OTHER_RULES", "PAIRS", "SMALLEST", "SWAN", "Pair"]


class Pair(NamedTuple):
    """Names of `training.SETTINGS`, `rules.HIDDEN` and `rules.VOCABULARY`."""

    setting: str
    hidden: str
    vocabulary: str

    def __str__(self) -> str:
        return f"{self.setting}, {self.hidden}, {self.vocabulary}"


# The first are run first, should the time not suffice for all.
_OF_ALL_SIZES = (
    ("adam", "adam"),
    ("muon", "adam"),
    ("whitened", "factored"),
    ("apollo_mini", "adam"),
    ("apollo_quarter", "adam"),
    ("apollo_mini", "factored"),
    ("apollo_quarter", "factored"),
)
_VOCABULARY_RULES = (
    ("whitened", "adam"),
    ("whitened", "head_momentum_quarter"),
    ("whitened", "head_factored_momentum"),
    ("whitened", "token"),
    ("whitened", "factored_momentum"),
    ("apollo_quarter", "apollo"),
)
_HIDDEN_RULES = (
    "orthogonalized",
    "neuron",
    "one_bit_muon",
    "low_rank_muon",
    "whitened_basis",
    "apollo_orthogonalized",
    "swan",
    "muon",
)


def _pairs(setting: str, rules: tuple[tuple[str, str], ...]) -> tuple[Pair, ...]:
    return tuple(Pair(setting, *pair) for pair in rules)


SMALLEST = "1m"
SWAN = Pair(SMALLEST, "whitened", "factored")
OTHER_RULES = _pairs(SMALLEST, tuple((rule, "factored") for rule in _HIDDEN_RULES))
"""Other rules for the matrices, in SWAN's place."""
PAIRS = (
    *_pairs("1m", _OF_ALL_SIZES),
    *_pairs("1m", _VOCABULARY_RULES[:4]),
    *_pairs("4m", _OF_ALL_SIZES[:4]),
    *_pairs("16m", _OF_ALL_SIZES[:4]),
    *OTHER_RULES,
    *_pairs("1m_batch", _OF_ALL_SIZES[:4]),
    *_pairs("1m_long", _OF_ALL_SIZES[:4]),
    Pair("1m_long", "whitened", "head_factored_momentum"),
    *_pairs("1m", _VOCABULARY_RULES[4:]),
    *_pairs("4m", _OF_ALL_SIZES[4:]),
    *_pairs("16m", _OF_ALL_SIZES[4:]),
    *_pairs("1m_batch", _OF_ALL_SIZES[4:]),
    *_pairs("1m_long", _OF_ALL_SIZES[4:]),
)
"""In the order in which they are run."""
