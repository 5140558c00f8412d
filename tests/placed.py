"""What inference says of a model's leaves, with equal layers folded."""

import re
from typing import Any

from apollo_optax._paths import named_leaves, spell
from apollo_optax.dimension_numbers._infer import placements


def placed(forward: Any, params: Any, *inputs: Any) -> dict[str, Any]:
    """Kind, or the axes of a matrix as (reduction, output), of all leaves with two or more axes."""
    said: dict[str, Any] = {}
    at_each = placements(forward, params, *inputs)
    for (path, leaf), at in zip(named_leaves(params)[0], at_each, strict=True):
        if len(getattr(leaf, "shape", ())) > 1:
            name = re.sub(r"\d+", "*", spell(path))
            answer = tuple(at.spec) if at.spec and at.kind == "matrix" else at.kind
            assert said.setdefault(name, answer) == answer, f"{name} is told in two ways"
    return said
