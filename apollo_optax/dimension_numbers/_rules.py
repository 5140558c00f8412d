"""Dimension numbers given by regular expressions for the parameters' names."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from apollo_optax._arguments import require_tree_not_count
from apollo_optax._matrices import is_dimension_numbers, matrix_axes
from apollo_optax._paths import Path, named_arrays, spell


def dimension_numbers_from_rules(rules: Sequence[tuple[str, Any]]) -> Callable[[PyTree], PyTree]:
    """Makes rules that say by names which axes of each parameter make a matrix.

    Args:
      rules: Pairs of a regular expression and a specification. A specification is an
        `ApolloDimensionNumbers`, Muon's or GaLore's dimension numbers, or None for a leaf left to
        Adam. The path of a leaf is its names joined by "/". The first expression that is found
        anywhere in the path gives the specification. Leaves with fewer than two axes are left to
        Adam.

    Returns:
      A function of the parameters that returns the tree of their specifications. Pass this function
      as `weight_dimension_numbers`. The function raises ValueError if a specification does not fit
      the shape of a leaf, or if no expression is found for a leaf with two or more axes.

    Raises:
      TypeError: If a rule is not such a pair.
      ValueError: If an expression is not a valid regular expression.

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax import ApolloDimensionNumbers, dimension_numbers_from_rules
      >>> rules = dimension_numbers_from_rules([
      ...     ("embed|head", None),
      ...     ("attention/out/w$", ApolloDimensionNumbers((0, 1), 2)),
      ...     ("/w$", ApolloDimensionNumbers(0, (1, 2))),
      ... ])
      >>> params = {"embed": jnp.zeros((9, 8)), "attention": {"query": {"w": jnp.zeros((8, 2, 4))}}}
      >>> rules(params)["attention"]["query"]
      {'w': ApolloDimensionNumbers(reduction_axis=0, output_axis=(1, 2))}
    """
    compiled = [_compiled(rule) for rule in rules]

    def dimension_numbers(params: PyTree) -> PyTree:
        require_tree_not_count("dimension_numbers_from_rules(...)", params)
        named, treedef = named_arrays(params)
        unmatched: list[str] = []

        def spec_of(path: Path, leaf: Any) -> Any:
            if leaf.ndim < 2:
                return None
            for pattern, spec in compiled:
                if pattern.search("/".join(path)):
                    if spec is not None:
                        matrix_axes(spec, leaf.shape, path)
                    return spec
            unmatched.append(f"{spell(path)} {tuple(leaf.shape)}")
            return None

        specs = [spec_of(path, leaf) for path, leaf in named]
        if unmatched:
            more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
            raise ValueError(
                f"No rule for {', '.join(unmatched[:5])}{more}; the expressions are "
                f"{[pattern.pattern for pattern, _ in compiled]}. Add a rule for these leaves. A "
                f'last rule ("", None) leaves all other leaves to Adam.'
            )
        return jax.tree.unflatten(treedef, specs)

    return dimension_numbers


def _compiled(rule: Any) -> tuple[re.Pattern[str], Any]:
    try:
        pattern, spec = rule
        is_rule = isinstance(pattern, str) and (spec is None or is_dimension_numbers(spec))
    except (TypeError, ValueError):
        is_rule = False
    if not is_rule:
        raise TypeError(
            f"rules must be pairs of a regular expression and dimension numbers or None, got "
            f"{rule!r}."
        )
    try:
        return re.compile(pattern), spec
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
