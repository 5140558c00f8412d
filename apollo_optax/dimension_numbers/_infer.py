"""Places every parameter of a model by what the forward function does with the parameter."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from apollo_optax._arguments import require_callable
from apollo_optax._matrices import ApolloDimensionNumbers
from apollo_optax._names import by_name
from apollo_optax._paths import Path, named_leaves, spell
from apollo_optax.dimension_numbers import _trace, _values
from apollo_optax.dimension_numbers._values import BATCH, OUTPUT, REDUCTION, Facts, Value

MATRIX, VOCABULARY, ELEMENTWISE, UNKNOWN = "matrix", "vocabulary", "elementwise", "unknown"


class Placement(NamedTuple):
    """What a parameter is.

    Attributes:
      kind: "matrix", "vocabulary" (embedding tables and output heads), "elementwise" (norms,
        biases, gates) or "unknown".
      reason: What the model does with the parameter, or why that is unknown.
      spec: The axes that make a matrix, also for vocabularies, or None if there are none.
    """

    kind: str
    reason: str
    spec: ApolloDimensionNumbers | None = None


def infer_dimension_numbers(
    forward: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    project_embeddings: bool = False,
    specification: Callable[..., Any] = ApolloDimensionNumbers,
) -> PyTree:
    """Reads off a model which axes of each parameter make a matrix.

    The function traces `forward(params, *inputs)` on shapes, for any framework. Nothing runs, and
    names do not matter. The axes of a parameter are

    - reduction axes, if a product contracts them with activations,
    - batch axes, if a product or a scan runs over them, such as layers and experts,
    - output axes otherwise.

    In a convolution, the output features are the output axis, and all others are reduction axes.
    Three kinds of parameters are left to Adam: embedding tables, which inputs look up; output
    heads, whose products no other parameter's product follows; and parameters that are only added
    or multiplied entry by entry.

    If a parameter goes into an opaque kernel, is used in contradicting ways, or has an axis that is
    split between roles, the model does not say what its axes are. For such parameters, the names
    that `transformer_dimension_numbers` knows decide, and the rest is left to Adam. One warning
    names them. `describe` shows the reason for every parameter.

    Args:
      forward: The model's forward function or its loss function, which may return logits, a loss,
        or several results.
      params: The parameters, as arrays or ShapeDtypeStructs. Other leaves are passed unchanged.
      *inputs: The arguments of `forward` after the parameters, as arrays or ShapeDtypeStructs.
        Others, such as Python's numbers, are passed unchanged.
      project_embeddings: Whether to make matrices of embedding tables and output heads too. The
        paper does not. The optimizer state then has no full-size moments of them.
      specification: The type of an entry, which takes `reduction_axis` and `output_axis`, such as
        `optax.contrib.MuonDimensionNumbers` or `optax.contrib.GaLoreDimensionNumbers`.

    Returns:
      A tree of `params`' structure with specifications, or None for a leaf left to Adam. Pass this
      tree as `weight_dimension_numbers`.

    Raises:
      TypeError: If `forward` cannot be called.
      ValueError: If `forward` returns no array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from apollo_optax import infer_dimension_numbers
      >>> def forward(params, tokens):
      ...     x = params["table"][tokens]
      ...     def layer(x, w):
      ...         return x + jnp.tanh(x @ w["up"]) @ w["down"], None
      ...     x, _ = jax.lax.scan(layer, x, params["layers"])
      ...     return x @ params["head"]
      >>> params = {
      ...     "table": jnp.zeros((100, 8)),
      ...     "layers": {"up": jnp.zeros((3, 8, 32)), "down": jnp.zeros((3, 32, 8))},
      ...     "head": jnp.zeros((8, 100)),
      ... }
      >>> specs = infer_dimension_numbers(forward, params, jax.ShapeDtypeStruct((2, 5), "int32"))
      >>> specs["layers"]["up"]
      ApolloDimensionNumbers(reduction_axis=1, output_axis=2)
      >>> specs["table"], specs["head"]
      (None, None)
    """
    placed = placements(forward, params, *inputs)
    named, treedef = named_leaves(params)
    unknown = [
        (path, leaf, at.reason)
        for (path, leaf), at in zip(named, placed, strict=True)
        if at.kind == UNKNOWN
    ]
    by_name = _specs_by_name(named) if unknown else {}
    _warn_of_unknown(unknown, by_name)

    def spec_of(path: Path, at: Placement) -> Any:
        spec = by_name[path] if at.kind == UNKNOWN else at.spec
        if spec is None or (at.kind == VOCABULARY and not project_embeddings):
            return None
        return specification(reduction_axis=spec.reduction_axis, output_axis=spec.output_axis)

    specs = [spec_of(path, at) for (path, _), at in zip(named, placed, strict=True)]
    return jax.tree.unflatten(treedef, specs)


def placements(forward: Callable[..., Any], params: PyTree, *inputs: Any) -> list[Placement]:
    """Returns what each leaf of `params` is, in their order."""
    require_callable("forward", forward, "(params, *inputs)")
    leaves, treedef = jax.tree.flatten((params, inputs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    arrays = [leaf for leaf, is_one in zip(leaves, is_array, strict=True) if is_one]

    def call(*traced: Any) -> list[Any]:
        rest = iter(traced)
        all_leaves = [next(rest) if a else x for x, a in zip(leaves, is_array, strict=True)]
        params, inputs = jax.tree.unflatten(treedef, all_leaves)
        return [x for x in jax.tree.leaves(forward(params, *inputs)) if hasattr(x, "dtype")]

    jaxpr = jax.make_jaxpr(call)(*arrays).jaxpr
    if not jaxpr.outvars:
        raise ValueError(
            f"forward returned no array, got {forward!r}; a forward function must return logits, a "
            f"loss or several arrays."
        )
    count = len(jax.tree.leaves(params))
    shapes = [tuple(leaf.shape) if a else () for leaf, a in zip(leaves, is_array, strict=True)]
    values = [
        _values.parameter(index, shapes[index]) if index < count else Value(data=True)
        for index, leaf in enumerate(leaves)
        if is_array[index]
    ]
    # Random numbers that are added to a parameter do not make an activation of the sum.
    values = [
        Value() if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else value
        for value, array in zip(values, arrays, strict=True)
    ]
    # If `inputs` is empty, the inputs are among the constants.
    facts = Facts(shapes[:count], Value(data=len(arrays) == sum(is_array[:count])))
    results = _trace.interpret(facts, jaxpr, values)
    heads = _heads(facts, results)
    return [_place(facts, index, index in heads, is_array[index]) for index in range(count)]


def _heads(facts: Facts, results: list[Value]) -> set[int]:
    """Finds parameters whose products reach the results without another parameter's product.

    The last branch of a residual stream is no head, since it is added to the results of other
    layers.
    """
    heads = {leaf for value in results for leaf in value.last} - facts.followed
    for one, other in facts.sums:
        for term, rest in ((one, other), (other, one)):
            if rest & facts.followed:
                heads -= term
    return heads


def _place(facts: Facts, leaf: int, is_head: bool, is_array: bool) -> Placement:
    shape, uses = facts.shapes[leaf], facts.uses.get(leaf, {})
    if not is_array:
        return Placement(ELEMENTWISE, "not an array")
    if len(shape) < 2:
        return Placement(ELEMENTWISE, "fewer than two axes")
    matrix = _matrix(facts, leaf)
    rows = facts.looked_up.get(leaf, set())
    if rows and leaf not in facts.selected:
        rest = [axis for axis in range(len(shape)) if axis not in rows]
        spec = matrix.spec or (_spec(sorted(rows), rest) if rest else None)
        return Placement(
            VOCABULARY, "tied: looked up and multiplied" if uses else "looked up", spec
        )
    if is_head and uses:
        return Placement(VOCABULARY, "output head", matrix.spec)
    return matrix


def _matrix(facts: Facts, leaf: int) -> Placement:
    """Places the parameter as a matrix, as its products say."""
    uses = facts.uses.get(leaf, {})
    if not uses:
        if leaf in facts.lost:
            return Placement(UNKNOWN, facts.lost[leaf])
        if leaf in facts.entrywise:
            return Placement(ELEMENTWISE, "only entry by entry")
        return Placement(UNKNOWN, "forward does not use it")
    roles: list[str] = []
    for of_axes in uses:
        for axis, several in enumerate(of_axes):
            if len(several) > 1:
                return Placement(
                    UNKNOWN, f"axis {axis} is split between {' and '.join(sorted(several))}"
                )
        one = [role for (role,) in of_axes]
        if roles and any({a, b} == {REDUCTION, OUTPUT} for a, b in zip(roles, one, strict=True)):
            # A tied autoencoder uses the same two sides, the other way round.
            swap = {REDUCTION: OUTPUT, OUTPUT: REDUCTION, BATCH: BATCH}
            one = [swap[role] for role in one]
        both = list(zip(roles or one, one, strict=True))
        if any({a, b} == {REDUCTION, OUTPUT} for a, b in both):
            return Placement(UNKNOWN, "products use its axes in contradicting ways")
        roles = [BATCH if BATCH in pair else pair[0] for pair in both]
    apart = facts.apart.get(leaf, set())
    if any(role == OUTPUT and axis not in apart for axis, role in enumerate(roles)):
        roles = [BATCH if axis in apart and r == OUTPUT else r for axis, r in enumerate(roles)]
    sides = [[axis for axis, role in enumerate(roles) if role == r] for r in (REDUCTION, OUTPUT)]
    (what, *_) = uses.values()
    if not all(sides):
        return Placement(ELEMENTWISE, f"{what} of vectors: no {OUTPUT if sides[0] else REDUCTION}")
    return Placement(MATRIX, what, _spec(*sides))


def _spec(reduction: list[int], output: list[int]) -> ApolloDimensionNumbers:
    one_or_all = (tuple(side) if len(side) > 1 else side[0] for side in (reduction, output))
    return ApolloDimensionNumbers(*one_or_all)


def _specs_by_name(named: list[tuple[Path, Any]]) -> dict[Path, ApolloDimensionNumbers | None]:
    found = by_name((path, leaf) for path, leaf in named if hasattr(leaf, "ndim"))
    return {path: of_leaf.spec if of_leaf.certain else None for path, of_leaf in found.items()}


def _warn_of_unknown(unknown: list[tuple[Path, Any, str]], by_name: dict[Path, Any]) -> None:
    if not unknown:
        return
    folded: dict[Any, list[Path]] = {}
    for path, leaf, why in unknown:
        key = re.sub(r"\d+", "*", spell(path)), tuple(leaf.shape), why, by_name[path]
        folded.setdefault(key, []).append(path)
    said = [
        (f"{pattern} x {len(paths)}" if len(paths) > 1 else spell(paths[0]))
        + f" {shape} ({why}; "
        + (f"by its name {spec}" if spec else "trained with Adam")
        + f", {8 * len(paths) * math.prod(shape):,} bytes of AdamW's moments)"
        for (pattern, shape, why, spec), paths in folded.items()
    ]
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    warnings.warn(
        f"The model does not tell which axes make a matrix of {', '.join(said[:3])}{more}. In the "
        f"returned tree, set their entries to ApolloDimensionNumbers, or to None for Adam. Or give "
        f"their axes with dimension_numbers_from_rules.",
        stacklevel=3,
    )
