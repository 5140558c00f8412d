"""What a transformation must satisfy to run one layer at a time."""

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
      params: `{"blocks": stacked, "rest": rest}`, arrays.
      weights: The format of the weights.

    Returns:
      `tx.init` of the parameters as `weights.read` gives them; with parameters on a mesh, sharded
      as `sharding.state_shardings` has it.

    Raises:
      ValueError: Parameters of another form; a transformation that needs all gradients at once,
        whose state of a stacked leaf has no axis of layers, or that would give each layer the same
        random numbers.
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
    # Compiled, so that no float copy of quantized weights is made for the sake of its shapes.
    return jax.jit(init_state, out_shardings=shardings)(params)


def check_per_leaf(tx: optax.GradientTransformation, params: Params) -> None:
    """Raises ValueError if the update of some leaf depends on the gradient of another.

    Neither may the update or the state of a leaf depend on another's parameter or state, nor the
    state that all leaves share, such as a count, on anything of any leaf.

    Decided on the traced computation, nothing is run. `optax.MultiSteps`, whose accumulators are as
    large as the gradients a layer-wise step avoids, is refused by its state.

    Args:
      tx: Any transformation.
      params: Its parameters, arrays or ShapeDtypeStructs.
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
                    f"{output} depends on {source}: a layer-wise step has one layer's gradients at "
                    f"a time. Instead of clipping by the global norm use limit_norm_growth, or a "
                    f"transformation that works leaf by leaf."
                )


class _Trace(NamedTuple):
    """The traced update of a transformation.

    Attributes:
      jaxpr: Of the update.
      inputs: What each input is, and the leaf it is of; None for what all leaves share. The last
        one is `first_layer`.
      outputs: The same of each output.
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
        """Each leaf, of the parameter whose path its own begins with, `depth` indices aside."""
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
    """What an output is computed by, and whether by each of the inputs."""
    return partial_eval.dce_jaxpr(trace.jaxpr, [i == index for i in range(len(trace.outputs))])


def _check_randomness(tx: optax.GradientTransformation, params: Params) -> None:
    """Raises ValueError if an update of blocks is random and the same for all layers."""
    trace = _traced(tx, params, jax.eval_shape(tx.init, params))
    for index, (output, owner) in enumerate(trace.outputs):
        if owner is None or owner[0] != "blocks":
            continue
        jaxpr, is_used = _computation_of(trace, index)
        if _is_random(jaxpr) and not is_used[-1]:
            raise ValueError(
                f"{output} is random, and does not depend on `first_layer`, an argument of "
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
