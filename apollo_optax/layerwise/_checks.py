"""Checks that a transformation can run one layer at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from apollo_optax._paths import Path, named_leaves, spell
from apollo_optax._placement import placement_of, result_shardings
from apollo_optax.layerwise._model import EXACT, Params, WeightFormat
from apollo_optax.layerwise._parts import (
    join_state,
    number_of_layers,
    require_form,
    shapes_of,
    share_of,
    split_state,
)


def init(
    tx: optax.GradientTransformation, params: Params, *, weights: WeightFormat = EXACT
) -> optax.OptState:
    """Checks that `tx` can run one layer at a time, and returns its ordinary state.

    Args:
      tx: A transformation whose update of a leaf depends on that leaf's gradient only.
      params: The parameters, `{"blocks": stacked, "rest": rest}`, as arrays.
      weights: The format of the weights.

    Returns:
      `tx.init` of the parameters that `weights.read` returns. If the parameters are on a mesh, the
      state is sharded as `sharding.state_shardings` says.

    Raises:
      ValueError: If the parameters have another form. If the transformation needs all gradients at
        once, has a state of a stacked leaf without an axis of layers, or would give each layer the
        same random numbers.
    """
    require_form(params)
    shapes = shapes_of(jax.eval_shape(weights.read, params))
    check_per_leaf(tx, shapes)
    _check_randomness(tx, shapes)
    _check_layers_of_state(tx, shapes)

    def init_state(params: Params) -> optax.OptState:
        return tx.init(weights.read(params))

    placed = jax.tree.map(placement_of, params)
    on_mesh = all(
        placement_of(leaf) is not None and not isinstance(leaf, jax.core.Tracer)
        for leaf in jax.tree.leaves(params)
    )
    shardings = result_shardings(init_state, params, placed) if on_mesh else None
    # Compiled, so that quantized weights are not copied to floats only for their shapes.
    return jax.jit(init_state, out_shardings=shardings)(params)


def check_per_leaf(tx: optax.GradientTransformation, params: Params) -> None:
    """Raises ValueError if the update of some leaf depends on the gradient of another leaf.

    The update and the state of a leaf must not depend on the parameter or the state of another leaf
    either. The state that all leaves share, such as a count, must not depend on any leaf.

    The check traces the computation, and nothing runs. `optax.MultiSteps` is refused because of its
    state: its accumulators are as large as the gradients that a layer-wise step avoids.

    Args:
      tx: Any transformation.
      params: The parameters, as arrays or ShapeDtypeStructs.
    """
    params = shapes_of(params)
    state = jax.eval_shape(tx.init, params)

    def is_multi_steps(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    if any(map(is_multi_steps, jax.tree.leaves(state, is_leaf=is_multi_steps))):
        raise ValueError(
            "optax.MultiSteps keeps a gradient of the whole model, which a layer-wise step avoids. "
            "Use a larger micro-batch instead."
        )
    trace = _traced(tx, params, state)
    for index, (output, owner) in enumerate(trace.outputs):
        _, is_used = _computation_of(trace, index)
        for (source, source_owner), used in zip(trace.inputs, is_used, strict=True):
            if used and source_owner not in (None, owner):
                raise ValueError(
                    f"{output} depends on {source}: a layer-wise step has the gradients of only "
                    f"one layer at a time. Use a transformation that works leaf by leaf, such as "
                    f"limit_norm_growth in place of clipping by the global norm."
                )


class _Trace(NamedTuple):
    """The traced update of a transformation.

    Attributes:
      jaxpr: The jaxpr of the update.
      inputs: What each input is, and the leaf that the input belongs to, or None if all leaves
        share the input. The last input is `first_layer`.
      outputs: The same for each output.
    """

    jaxpr: Any
    inputs: list[tuple[str, Path | None]]
    outputs: list[tuple[str, Path | None]]


def _traced(tx: optax.GradientTransformation, params: Params, state: optax.OptState) -> _Trace:
    tx, split = optax.with_extra_args_support(tx), split_state(tx, state)
    paths = {path for path, _ in named_leaves(params)[0]}

    def update(
        grads: PyTree, params: Params, mirrored: list[PyTree], shared: list[Any], first: Array
    ) -> tuple[PyTree, list[PyTree], list[Any]]:
        state = join_state(split._replace(shared=shared), mirrored)
        updates, state = tx.update(grads, state, params, first_layer=first)
        new = split_state(tx, state)
        return updates, new.mirrored, new.shared

    def owned(what: str, tree: PyTree, depth: int = 0) -> list[tuple[str, Path | None]]:
        """Assigns each leaf to the parameter whose path its own starts with after `depth` names."""
        owners = []
        for path, _ in named_leaves(tree)[0]:
            path = path[depth:]
            owner = next((path[:n] for n in range(len(path) + 1) if path[:n] in paths), None)
            owners.append((f"{what} of {spell(path)}", owner))
        return owners

    def shared(tree: PyTree) -> list[tuple[str, Path | None]]:
        return [("The state that all leaves share", None) for _ in jax.tree.leaves(tree)]

    first = jax.ShapeDtypeStruct((), jnp.int32)
    args = params, params, split.mirrored, split.shared, first
    closed, (updates, mirrored, rest) = jax.make_jaxpr(update, return_shape=True)(*args)
    inputs = owned("the gradient", params) + owned("the parameter", params)
    inputs += owned("the state", split.mirrored, 1) + shared([split.shared, first])
    outputs = owned("The update", updates) + owned("The state", mirrored, 1) + shared(rest)
    return _Trace(closed.jaxpr, inputs, outputs)


def _computation_of(trace: _Trace, index: int) -> tuple[Any, list[bool]]:
    """Returns the jaxpr of one output, and whether the output depends on each input."""
    return partial_eval.dce_jaxpr(trace.jaxpr, [i == index for i in range(len(trace.outputs))])


def _check_randomness(tx: optax.GradientTransformation, params: Params) -> None:
    """Raises ValueError if an update of blocks would be random, and the same for all layers."""
    trace = _traced(tx, params, jax.eval_shape(tx.init, params))
    for index, (output, owner) in enumerate(trace.outputs):
        if owner is None or owner[0] != "blocks":
            continue
        jaxpr, is_used = _computation_of(trace, index)
        if _is_random(jaxpr) and not is_used[-1]:
            raise ValueError(
                f"{output} is random, and does not depend on the argument `first_layer` of "
                f"`tx.update`: each layer would get the same random numbers. Use a transformation "
                f"that folds `first_layer` into its key, or an ordinary step."
            )


def _is_random(jaxpr: Any) -> bool:
    def is_random(equation: Any) -> bool:
        name = equation.primitive.name
        inner = [getattr(p, "jaxpr", p) for p in jax.tree.leaves(equation.params)]
        return name.startswith(("random_", "rng_", "threefry")) or any(
            _is_random(each) for each in inner if hasattr(each, "eqns")
        )

    return any(map(is_random, jaxpr.eqns))


def _check_layers_of_state(tx: optax.GradientTransformation, params: Params) -> None:
    """Raises ValueError unless the state of every layer is a slice of the stacked leaf's state."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), params["blocks"])
    trees = {**params, "blocks": one}, params
    states = [split_state(tx, jax.eval_shape(tx.init, tree)) for tree in trees]
    blocks = {"blocks": None}
    layer, whole = ([share_of(blocks, tree) for tree in split.mirrored] for split in states)
    number = number_of_layers(params["blocks"])
    for (path, a), (_, b) in zip(named_leaves(layer)[0], named_leaves(whole)[0], strict=True):
        if (number, *a.shape[1:]) != b.shape or a.shape[:1] != (1,):
            raise ValueError(
                f"The optimizer state of a stacked leaf has shape {b.shape} at {spell(path[1:])}, "
                f"which is not {number} layers of its state for one layer, {a.shape}. Use a "
                f"transformation whose state has the leaf's leading axis (for limit_norm_growth: "
                f"weight_dimension_numbers)."
            )
