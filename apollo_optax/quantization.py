"""int8 weights in groups that share a scale, trained by stochastic rounding without a float copy.

A quantized leaf is a `QArray` of qwix: an int8 `qvalue` in the weight's shape, and a float32
`scale`. Up to 128 neighbours along the axis that a matrix product contracts share a scale:

    weight = qvalue * scale,  scale = largest magnitude in the group / 127

A training step reads `dequantize(params)` and takes gradients with respect to these floats.
`apply_updates` adds the updates of an Optax transformation to the int8 weights, leaf by leaf:

    state = tx.init(jax.eval_shape(dequantize, params))
    weights = dequantize(params)
    updates, state = tx.update(jax.grad(loss)(weights), state, weights)
    params = apply_updates(params, updates, key)

`layerwise.WeightFormat(dequantize, apply_updates)` does the same for one layer at a time. A layer
that is sliced out of a stacked `QArray` is a `QArray`.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier
from jaxtyping import Array, Float, Int8, PRNGKeyArray, PyTree

from apollo_optax._arguments import require_one_of, require_positive_integer
from apollo_optax._magnitudes import largest_magnitude
from apollo_optax._matrices import ApolloDimensionNumbers
from apollo_optax._names import LARGEST_WINDOW, by_name
from apollo_optax._paths import Path, named_arrays, named_leaves, spell
from apollo_optax._placement import call_on_automatic_axes
from apollo_optax._rounding import (
    add_update,
    leaf_key,
    require_new_key,
    require_shape_of_parameter,
    rounds_up,
)

try:
    import qwix
    from qwix import QArray
except ImportError as error:
    raise ImportError(
        "apollo_optax.quantization needs qwix. Install it in the checkout of apollo-optax: "
        "pip install -e '.[quantization]'"
    ) from error

__all__ = [
    "QArray",
    "QuantizationRule",
    "apply_updates",
    "contracted_axes",
    "dequantize",
    "quantize",
]

Rounding: TypeAlias = Literal["stochastic", "nearest"]

# -128 is not used, so that a group and its negative have the same steps.
_LARGEST_STEP = 127
_SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)
# Compiled, so that eager calls make no float copies; inlined in a compiled caller.
_compiled = functools.partial(jax.jit, inline=True)

# A group of fewer weights does not justify a scale of 4 bytes, if another axis is longer.
_FEWEST_IN_A_GROUP = 16

_INT8 = (jnp.int8, "int8")
_VECTORS = ("b", "bias", "offset", "scale")


def contracted_axes(params: PyTree) -> PyTree:
    """Finds the axis that a matrix product contracts, by the names that Flax and Equinox give.

    - Matrices (..., in, out) of any name are grouped along the input axis, -2. The axes before the
      input axis are layers or experts.
    - `kernel` of DenseGeneral in attention is grouped along embed for `query`, `key` and `value`
      (..., embed, heads, head_dim), and along head_dim for `out` (..., heads, head_dim, embed).
    - `embedding` (vocabulary, embed) and Equinox's `weight` (out, in) are grouped along the last
      axis. The row of a token has scales of its own.
    - Such an axis may have fewer than 16 indices, as the window of a convolution has. Then the last
      axis with at least 16 is taken, or else the longest. Equinox's convolutions (out, in, height,
      width) are grouped along `in`. This rule does not apply to leaves with two axes.
    - Leaves that are not quantized get None: leaves with fewer than two axes, leaves without a
      floating dtype, empty leaves, and biases and norms, also if they are stacked over layers.
      Biases and norms are leaves named `bias`, `b`, `scale` or `offset`, and everything under a
      name that contains "norm".

    Args:
      params: The parameters, bare or boxed, as arrays, ShapeDtypeStructs or QArrays.

    Returns:
      A tree of `params`' structure with a negative axis, or None for a leaf that is not quantized.

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax.quantization import contracted_axes
      >>> dense = {"kernel": jnp.zeros((12, 64, 256)), "bias": jnp.zeros((12, 256))}
      >>> contracted_axes({"mlp": dense, "embed": {"embedding": jnp.zeros((1000, 64))}})
      {'embed': {'embedding': -1}, 'mlp': {'bias': None, 'kernel': -2}}
    """
    named, treedef = named_arrays(params, is_leaf=_is_quantized)
    found = by_name(named, project_embeddings=True)
    axes = [_contracted_axis(path, leaf, found[path].spec) for path, leaf in named]
    return treedef.unflatten(axes)


def _contracted_axis(path: Path, leaf: Any, spec: ApolloDimensionNumbers | None) -> int | None:
    *modules, name = path or ("",)
    is_vector = name in _VECTORS or any("norm" in module.lower() for module in modules)
    if leaf.ndim < 2 or is_vector or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    if 0 in leaf.shape:
        return None
    if name == "weight" or name.endswith("embedding"):
        return _long_axis(leaf.shape, -1)
    reduction = -2 if spec is None else spec.reduction_axis
    return _long_axis(leaf.shape, reduction if isinstance(reduction, int) else reduction[-1])


def _long_axis(shape: tuple[int, ...], contracted: int) -> int:
    """Returns the contracted axis, or a longer axis if the contracted one is too short."""
    if len(shape) == 2 or shape[contracted] >= _FEWEST_IN_A_GROUP:
        return contracted
    # The search starts at the last axis, and finds the input channels of (layers, out, in, height,
    # width). The first axis may be layers, which have scales of their own, unless all other axes
    # are a window.
    later = list(range(-1, -len(shape), -1))
    is_window = all(shape[axis] <= LARGEST_WINDOW for axis in later)
    allowed = [*later, -len(shape)] if is_window else later
    long = [axis for axis in allowed if shape[axis] >= _FEWEST_IN_A_GROUP]
    return long[0] if long else max([contracted, *later], key=lambda axis: shape[axis])


@dataclasses.dataclass(frozen=True)
class QuantizationRule:
    """Which leaves are quantized, and how.

    Attributes:
      group_size: The largest number of neighbours that share a scale. If `group_size` does not
        divide an axis, the axis is cut into groups of its largest divisor below `group_size`. If
        this divisor is less than a quarter of `group_size`, as for a prime axis, the whole axis is
        one group.
      axes: The axis along which each leaf is grouped, as a tree of ints with None for a leaf that
        is not quantized, or as a function of the parameters that returns such a tree. An entry may
        stand for a whole subtree.

    Raises:
      TypeError: If `group_size` is not an int.
      ValueError: If `group_size` is not positive.

    Example:
      Everything but the output head, in groups of 64:

      >>> from apollo_optax.quantization import QuantizationRule, contracted_axes
      >>> rule = QuantizationRule(64, lambda params: {**contracted_axes(params), "lm_head": None})
    """

    group_size: int = 128
    axes: PyTree | Callable[[PyTree], PyTree] = contracted_axes

    def __post_init__(self) -> None:
        require_positive_integer("group_size", self.group_size)


def quantize(params: PyTree, rule: QuantizationRule | None = None) -> PyTree:
    """Rounds weights to the nearest int8, with one scale for each group.

    The largest magnitude of a group becomes ±127. A group of zeros stays zero and can grow again. A
    group that contains NaN or infinity becomes NaN as a whole.

    Args:
      params: The parameters, bare or boxed. Leaves that are QArrays already do not change.
      rule: The leaves that are quantized, and their groups. None means `QuantizationRule()`.

    Returns:
      `params` with a QArray in place of each leaf that the rule selects. `qvalue` is int8 in the
      leaf's shape. `scale` is float32 in the leaf's shape, except that the grouped axis has the
      number of groups. No group crosses another axis, so that indexing both arrays on a leading
      axis of layers gives the layer's QArray. In groups of 128, a parameter takes 1.03 bytes.

    Raises:
      TypeError: If the rule selects a leaf that is not real floating point, or gives an axis that
        is not an int.
      ValueError: If the axes of the rule do not fit the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from apollo_optax.quantization import dequantize, quantize
      >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 512 * 8).reshape(512, 8), "bias": jnp.ones(8)}
      >>> quantized = quantize(params)
      >>> jax.tree.map(lambda a: (a.dtype.name, a.shape), quantized["kernel"].qvalue)
      ('int8', (512, 8))
    """
    rule = rule or QuantizationRule()
    named, treedef = named_leaves(params, is_leaf=_is_quantized)
    axes = rule.axes(params) if callable(rule.axes) else rule.axes
    placeholders = treedef.unflatten([0] * len(named))
    each_axis = treedef.flatten_up_to(
        jax.tree.broadcast(axes, placeholders, is_leaf=lambda node: node is None)
    )
    quantized = [
        leaf if axis is None or _is_quantized(leaf) else _quantize_leaf(path, leaf, axis, rule)
        for (path, leaf), axis in zip(named, each_axis, strict=True)
    ]
    return treedef.unflatten(quantized)


def dequantize(params: PyTree, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
    """Returns `qvalue * scale` for every quantized leaf: the floats that gradients are taken for.

    Args:
      params: The parameters, some of them QArrays.
      dtype: The dtype of the arrays that replace QArrays. None means the dtype of the scale,
        float32. The products are computed in the dtype of the scale, and then rounded.

    Returns:
      `params` with an array in place of each QArray. Other leaves do not change.

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax.quantization import dequantize, quantize
      >>> weights = jnp.asarray([[1.0, -0.5], [0.25, 0.5]])
      >>> bool(abs(dequantize(quantize(weights)) - weights).max() <= 0.5 / 127)
      True
    """

    def to_float(leaf: Any) -> Any:
        if not _is_quantized(leaf):
            return leaf
        if leaf.zero_point is not None or leaf.qtype not in _INT8:
            weights = qwix.dequantize(leaf)
            return weights if dtype is None else weights.astype(dtype)
        as_dtype = functools.partial(_dequantize_leaf, dtype=dtype or leaf.scale.dtype)
        return call_on_automatic_axes(as_dtype, leaf, like=leaf.qvalue)

    return jax.tree.map(to_float, params, is_leaf=_is_quantized)


def apply_updates(
    params: PyTree,
    updates: PyTree,
    key: PRNGKeyArray | None = None,
    *,
    rounding: Rounding = "stochastic",
) -> PyTree:
    r"""Adds updates to parameters, rounding the sum stochastically.

    For each group of a quantized leaf:

    .. math::
      w &= \text{qvalue} \cdot \text{scale} + \text{update} \quad \text{in float32} \\
      \text{scale} &\leftarrow \max |w| / 127 \\
      \text{qvalue} &\leftarrow \lfloor w / \text{scale} + u \rfloor, \quad u \sim U(0, 1)

    Hence `E[dequantize(result)] = w`. The scale depends only on w before the rounding, and puts the
    largest weight exactly on ±127. No weight is clipped, so that there is no bias and the scale
    does not drift. u has 16 bits, which leaves a bias of at most 2^-17 of a step. A bias of this
    size is 2^-24 of the group's largest weight, as much as float32 itself rounds.

    - A group whose update is zero does not change, bit for bit.
    - A group whose sum contains NaN or infinity becomes NaN as a whole and stays NaN. The next loss
      then shows that the step diverged.
    - A group of zeros grows from its first update that is not zero. Steps are no finer than the
      smallest normal float32, 1.2e-38.
    - A large weight makes the steps of its own group large, and of no other group.

    Other leaves are updated as by `apollo_optax.apply_updates_stochastic`: bfloat16 and float16
    leaves are rounded stochastically, and float32 leaves are added. Compiled, the sum of a leaf is
    fused with its rounding, so that there is no float copy of the parameters.

    Args:
      params: The parameters, some of them QArrays.
      updates: The updates, floating point, with the structure and shapes of `dequantize(params)`. A
        None leaves its parameter unchanged.
      key: A PRNG key, a new one for every step. Each leaf folds its path into the key, so that
        other leaves do not change its rounding. Rounding to nearest needs no key.
      rounding: "stochastic", or "nearest" to round every leaf to nearest. Rounding to nearest loses
        updates of less than half a step, and is there for comparisons.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      TypeError: If a parameter has another dtype, if a QArray is of another kind than `quantize`
        makes, or if an update is a QArray.
      ValueError: If the updates have another structure or shape, if `rounding` has another value,
        or if stochastic rounding gets no key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from apollo_optax.quantization import apply_updates, dequantize, quantize
      >>> params = quantize({"kernel": jnp.ones((128, 100)).at[0].set(127.0)})
      >>> moved = apply_updates(params, {"kernel": jnp.full((128, 100), 0.01)}, jax.random.key(0))
      >>> bool(abs(dequantize(moved)["kernel"][1:].mean() - 1.01) < 0.005)
      True
    """
    require_one_of("rounding", rounding, ("stochastic", "nearest"))
    new_key = require_new_key(key) if rounding == "stochastic" else None
    named, treedef = named_leaves(params, is_leaf=_is_quantized)
    given = treedef.flatten_up_to(updates)

    def add(path: Path, param: Any, update: Any) -> Any:
        if not _is_quantized(param):
            return add_update(path, param, update, new_key)
        if update is None:
            return param
        _require_trainable(path, param, update)
        of_leaf = None if new_key is None else leaf_key(new_key, path)
        return call_on_automatic_axes(_add_to_quantized, param, update, of_leaf, like=param)

    added = [add(path, param, u) for (path, param), u in zip(named, given, strict=True)]
    return treedef.unflatten(added)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QArray)


def _groups_along(size: int, group_size: int) -> int:
    """Returns how many equal groups an axis is cut into."""
    divisor = max(d for d in range(1, min(size, group_size) + 1) if size % d == 0)
    return size // divisor if 4 * divisor >= group_size else 1


def _quantize_leaf(path: Path, leaf: Array, axis: int, rule: QuantizationRule) -> QArray:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"The rule quantizes {spell(path)}, which has dtype {leaf.dtype}; allowed are real "
            f"floating dtypes. To leave {spell(path)} unchanged, give None as its axis."
        )
    if not isinstance(axis, numbers.Integral) or isinstance(axis, bool):
        raise TypeError(
            f"The rule groups {spell(path)} along axis {axis!r} ({type(axis).__name__}); allowed "
            f"are an int, and None to leave {spell(path)} unchanged."
        )
    if not -leaf.ndim <= axis < leaf.ndim or 0 in leaf.shape:
        raise ValueError(
            f"The rule groups {spell(path)} along axis {axis!r}, but the shape {leaf.shape} has no "
            f"such axis or is empty. Give another axis, or None to leave {spell(path)} unchanged."
        )
    scale_shape = list(leaf.shape)
    scale_shape[axis] = _groups_along(leaf.shape[axis], rule.group_size)
    return _to_nearest(leaf, tuple(scale_shape))


@functools.partial(_compiled, static_argnums=1)
def _to_nearest(weights: Float[Array, "*leaf"], scale_shape: tuple[int, ...]) -> QArray:
    split_shape, entry_axes = _split(weights.shape, scale_shape)
    split = weights.astype(jnp.float32).reshape(split_shape)
    scale = _scale_for(largest_magnitude(split, entry_axes))
    steps = _steps_of(split, scale, key=None)
    return QArray(steps.reshape(weights.shape), scale.reshape(scale_shape))


@functools.partial(_compiled, static_argnames="dtype")
def _dequantize_leaf(leaf: QArray, dtype: jax.typing.DTypeLike) -> Float[Array, "*leaf"]:
    split_shape, entry_axes = _split(leaf.shape, leaf.scale.shape)
    # The barriers make the product one fusion. Without them, XLA's TPU compiler writes a scale for
    # every weight to memory first, since it does not fuse across the reshapes.
    steps, scale = optimization_barrier(
        (leaf.qvalue.reshape(split_shape), jnp.expand_dims(leaf.scale, entry_axes))
    )
    weights = (steps.astype(scale.dtype) * scale).astype(dtype)
    return optimization_barrier(weights).reshape(leaf.shape)


def _split(
    shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns a shape with separate axes for the entries of groups, and these axes."""
    split_shape: list[int] = []
    entry_axes = []
    for size, groups in zip(shape, scale_shape, strict=True):
        split_shape.append(groups)
        if groups != size:
            entry_axes.append(len(split_shape))
            split_shape.append(size // groups)
    return tuple(split_shape), tuple(entry_axes)


def _scale_for(largest: Float[Array, "*groups"]) -> Float[Array, "*groups"]:
    return jnp.maximum(largest / _LARGEST_STEP, _SMALLEST_SCALE)


def _steps_of(
    weights: Float[Array, "*split"], scale: Float[Array, "*groups"], key: PRNGKeyArray | None
) -> Int8[Array, "*split"]:
    steps = weights / scale
    if key is None:
        steps = jnp.round(steps)
    else:
        lower = jnp.floor(steps)
        steps = lower + rounds_up(key, steps - lower)
    # Only a rounding error of the division can exceed the largest step.
    steps = jnp.clip(steps, -_LARGEST_STEP, _LARGEST_STEP)
    return jnp.where(jnp.isnan(steps), 0, steps).astype(jnp.int8)


@_compiled
def _add_to_quantized(
    param: QArray, update: Float[Array, "*leaf"], key: PRNGKeyArray | None
) -> QArray:
    """Adds an update to a quantized leaf, rounded to nearest without a key."""
    split_shape, entry_axes = _split(param.shape, param.scale.shape)
    # The barrier lets nothing here start before the update exists. Without it, XLA's TPU compiler
    # keeps the int8 copy that it makes for the reshape in `dequantize` until here.
    qvalue, scale, update = optimization_barrier((param.qvalue, param.scale, update))
    operands = (
        qvalue.reshape(split_shape),
        jnp.expand_dims(scale, entry_axes),
        update.reshape(split_shape),
    )
    # The barriers make each of the two passes one fusion that reads int8 and the update. Without
    # them, XLA keeps the sum, 4 bytes per weight, from the first pass to the second.
    operands = optimization_barrier(operands)
    largest, largest_update = _largest_in_groups(
        _sum(*operands), operands[2].astype(jnp.float32), entry_axes
    )
    operands, largest, largest_update = optimization_barrier((operands, largest, largest_update))
    new_scale = _scale_for(largest)
    new_steps = _steps_of(_sum(*operands), new_scale, key)
    # A step that is multiplied and divided by the scale may not be the same step.
    is_still = largest_update == 0
    steps = jnp.where(is_still, operands[0], new_steps)
    scale = jnp.where(is_still, operands[1], new_scale)
    return dataclasses.replace(
        param, qvalue=steps.reshape(param.shape), scale=scale.reshape(param.scale.shape)
    )


def _largest_in_groups(
    x: Float[Array, "*split"], y: Float[Array, "*split"], entry_axes: tuple[int, ...]
) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
    """Returns the largest magnitudes of each group of two arrays.

    One reduction takes both arrays. XLA's GPU compiler would transpose the operand of a reduction
    of one array in memory.
    """

    def larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.max(a[0], b[0]), jax.lax.max(a[1], b[1])

    zero = jnp.zeros([], x.dtype)
    largest = jax.lax.reduce((jnp.abs(x), jnp.abs(y)), (zero, zero), larger, entry_axes)
    return jnp.expand_dims(largest[0], entry_axes), jnp.expand_dims(largest[1], entry_axes)


def _sum(
    steps: Int8[Array, "*split"], scale: Float[Array, "*groups"], update: Float[Array, "*split"]
) -> Float[Array, "*split"]:
    return steps.astype(jnp.float32) * scale + update.astype(jnp.float32)


def _require_trainable(path: Path, param: QArray, update: Any) -> None:
    is_int8 = param.qvalue.dtype == jnp.int8 and param.qtype in _INT8
    if not is_int8 or param.scale.dtype != jnp.float32 or param.zero_point is not None:
        given = f"{param.qvalue.dtype} with a scale of {param.scale.dtype}"
        zero_point = "no" if param.zero_point is None else "a"
        raise TypeError(
            f"{spell(path)} is a QArray of {given} and {zero_point} zero point; allowed is int8 "
            f"with a scale of float32 and no zero point, as `quantize` makes it."
        )
    if _is_quantized(update):
        raise TypeError(
            f"The update of {spell(path)} is a QArray; take gradients with respect to "
            f"dequantize(params), and update these."
        )
    require_shape_of_parameter(path, update, param.shape)
