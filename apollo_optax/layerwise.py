"""Fuses the backward pass with the update, one layer at a time: no gradient of the whole model
exists.

A model is three pure functions over `{"blocks": stacked, "rest": ...}`. The step runs the blocks
forward keeping their inputs, then backwards: each block's gradient is made, turned into an update
by any per-leaf Optax transformation, written into the stacked weights in place, and dropped before
the next. The optimizer state is the ordinary one of the stacked tree, so checkpoints serve both.

What needs all gradients at once does not go with it. Clipping by the global norm: use APOLLO's
limiter (`limit_norm_growth`), which needs a matrix's own norm only. Accumulating gradients
(`optax.MultiSteps`): use a larger micro-batch, whose activations cost less than the gradients kept.
`optax.apply_if_finite`: use `make_guarded_step`. Statistics of a stacked leaf (a trust
ratio, a clipped root mean square) are statistics of a layer here.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import partial_eval
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from apollo_optax._paths import Path, named_leaves, spell
from apollo_optax._placement import placement_of, result_shardings
from apollo_optax._rounding import apply_updates_stochastic

Batch: TypeAlias = Any
Params: TypeAlias = Any


class LayerwiseModel(NamedTuple):
    """A model as three pure functions of its parameters `{"blocks": stacked, "rest": rest}`.

    Every leaf of `blocks` has a leading axis of layers. `x` is a pytree of floating-point arrays,
    of the same shapes and dtypes before and after a block.

    Attributes:
      embed: `(rest, batch) -> x`, before the first block.
      block: `(one layer's parameters, x) -> x`, or `-> (x, aux)` if `has_aux`.
      loss: `(rest, x, batch) -> scalar`, after the last block; `(rest, x, batch, aux)` if
        `has_aux`, with `aux` summed over the layers.
      has_aux: Whether blocks return an auxiliary output, such as a balancing loss.
    """

    embed: Callable[[PyTree, Batch], PyTree]
    block: Callable[[PyTree, PyTree], Any]
    loss: Callable[..., Float[Array, ""]]
    has_aux: bool = False


class WeightFormat(NamedTuple):
    """How weights are read before use and written after an update, one layer at a time.

    Attributes:
      read: `params -> params` of floating-point arrays, which gradients are taken for.
      write: `(params, updates, key) -> params`, adding the updates of what `read` returned. The key
        is None where the step was called without one; a format that needs one raises then.
    """

    read: Callable[[Params], Params]
    write: Callable[[Params, PyTree, PRNGKeyArray | None], Params]


EXACT = WeightFormat(lambda params: params, lambda params, u, _: optax.apply_updates(params, u))
"""Weights as they are, updates added by `optax.apply_updates`."""

STOCHASTIC = WeightFormat(lambda params: params, apply_updates_stochastic)
"""Weights as they are, updates added by `apply_updates_stochastic`: for bfloat16 and float16."""


SQUARES_OVERFLOW = 1e15
"""Squares of gradients up to here can be summed over 10^8 elements in float32; from here on moments
and norms may become infinite, and stay so."""


class GuardReport(NamedTuple):
    """What a guarded step did.

    A part is a layer, what of `rest` only the loss reads, or all else of `rest`.

    Attributes:
      largest: Largest absolute value of any gradient, NaN or infinite if one is.
      moved: How many parts were updated.
      parts: How many parts there are.
    """

    largest: Float[Array, ""]
    moved: Int[Array, ""]
    parts: Int[Array, ""]


def _no_part_yet() -> GuardReport:
    return GuardReport(jnp.zeros([], jnp.float32), *jnp.zeros([2], jnp.int32))


class _ParamLike:
    """A tree of an optimizer state that mirrors the parameters, as one leaf."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree


class _SplitState(NamedTuple):
    """An optimizer state, taken apart.

    Attributes:
      mirrored: The trees that mirror the parameters: moments, norms, traces.
      shared: The leaves that do not: counts, keys, hyperparameters.
      structure: Of the state, with each mirrored tree as a leaf.
      is_mirrored: For each leaf of `structure`, in order, whether it is a mirrored tree.
    """

    mirrored: list[PyTree]
    shared: list[Any]
    structure: Any
    is_mirrored: list[bool]


_Part: TypeAlias = tuple[Params, list[Any]]
"""Some of the parameters, and their shares of the mirrored trees of the optimizer state."""
_Update: TypeAlias = Callable[[_Part, PyTree, ArrayLike, Any], tuple[_Part, list[Any], Any]]


def _split(tx: optax.GradientTransformation, state: optax.OptState) -> _SplitState:
    marked = optax.tree_map_params(tx, _ParamLike, state, is_leaf=lambda _: True)
    leaves, structure = jax.tree.flatten(marked)
    is_mirrored = [isinstance(leaf, _ParamLike) for leaf in leaves]
    mirrored = [leaf.tree for leaf in leaves if isinstance(leaf, _ParamLike)]
    shared = [leaf for leaf in leaves if not isinstance(leaf, _ParamLike)]
    return _SplitState(mirrored, shared, structure, is_mirrored)


def _join(split: _SplitState, mirrored: list[PyTree]) -> optax.OptState:
    trees, shared = iter(mirrored), iter(split.shared)
    leaves = [next(trees) if mirrors else next(shared) for mirrors in split.is_mirrored]
    return jax.tree.unflatten(split.structure, leaves)


def _blocks_of(tree: PyTree) -> PyTree:
    return {"blocks": tree["blocks"]}


def _rest_of(tree: PyTree, keys: set[Any] | None) -> PyTree:
    """The entries of `rest` with these keys; None: all of it."""
    rest = tree["rest"]
    return {"rest": rest if keys is None else {key: rest[key] for key in rest if key in keys}}


def _as_part(tree: PyTree, part: PyTree) -> PyTree:
    """The entries of `tree` that the part has."""
    return _blocks_of(tree) if "blocks" in part else _rest_of(tree, _keys(part["rest"]))


def _keys(rest: PyTree) -> set[Any] | None:
    """The keys of the entries of `rest` that may be updated apart; None if it is no dictionary."""
    return set(rest) if type(rest) is dict else None


def _padded(part: PyTree, absent: PyTree) -> PyTree:
    """The part in the tree of all parameters, `optax.MaskedNode` in place of all other leaves.

    That is what `optax.masked` hands over. Masks and labels given as trees fit it.
    """
    if _keys(part.get("rest")) is not None:
        part = {"rest": {**absent["rest"], **part["rest"]}}
    # A copy, for a dictionary of the type that the state was made for.
    padded = copy.copy(absent)
    padded.update(part)
    return padded


def _share_of(part: Params, mirrored: PyTree) -> PyTree:
    """A tree of the state with `optax.MaskedNode` in place of what is not of the part's leaves."""
    keys = _keys(part.get("rest"))
    prefixes = [(name,) for name in part] if keys is None else [("rest", str(k)) for k in keys]
    named, structure = named_leaves(mirrored)
    return structure.unflatten(
        leaf if any(path[: len(p)] == p for p in prefixes) else optax.MaskedNode()
        for path, leaf in named
    )


def _replaced(tree: PyTree, *parts: PyTree) -> PyTree:
    """The tree with the leaves of its parts in place of its own."""
    new = {path: leaf for part in parts for path, leaf in named_leaves(part)[0]}
    named, structure = named_leaves(tree)
    return structure.unflatten(new.get(path, leaf) for path, leaf in named)


def _layer(stacked: PyTree, index: Int[Array, ""]) -> PyTree:
    """The leaves of one layer, with a leading axis of size 1."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index, 1), stacked)


def _with_layer(stacked: PyTree, layer: PyTree, index: Int[Array, ""]) -> PyTree:
    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), index, 0)

    return jax.tree.map(write, stacked, layer)


def _without_layer_axis(layer: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jnp.squeeze(a, 0), layer)


def _number_of_layers(blocks: PyTree) -> int:
    leaves, _ = named_leaves(blocks)
    if not leaves:
        raise ValueError('params["blocks"] has no leaves; a layer-wise step needs stacked layers.')
    (first, leaf), *_ = leaves
    for path, other in leaves:
        if other.ndim == 0 or other.shape[0] != leaf.shape[0]:
            raise ValueError(
                f"Leaves of blocks must share a leading axis of layers: {spell(first)} has shape "
                f"{leaf.shape}, {spell(path)} {other.shape}."
            )
    return leaf.shape[0]


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
    _require_form(params)
    shapes = _shapes(jax.eval_shape(weights.read, params))
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


def _require_form(params: Params) -> None:
    if not isinstance(params, dict) or set(params) != {"blocks", "rest"}:
        given = list(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f'params must be a dict {{"blocks": stacked, "rest": rest}}, got {given}.')
    _number_of_layers(params["blocks"])


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
    params = _shapes(params)
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


def _shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes, without shardings in the types: those do not matter to what is checked."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


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
    tx, split = optax.with_extra_args_support(tx), _split(tx, state)
    paths = {path for path, _ in named_leaves(params)[0]}

    def update(
        grads: PyTree, params: Params, mirrored: list[PyTree], shared: list[Any], first: Array
    ) -> tuple[PyTree, list[PyTree], list[Any]]:
        state = _join(split._replace(shared=shared), mirrored)
        updates, state = tx.update(grads, state, params, first_layer=first)
        new = _split(tx, state)
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
    states = [_split(tx, jax.eval_shape(tx.init, tree)) for tree in trees]
    blocks = {"blocks": None}
    layer, whole = ([_share_of(blocks, tree) for tree in split.mirrored] for split in states)
    number = _number_of_layers(params["blocks"])
    for (path, a), (_, b) in zip(named_leaves(layer)[0], named_leaves(whole)[0], strict=True):
        if (number, *a.shape[1:]) != b.shape or a.shape[:1] != (1,):
            raise ValueError(
                f"The optimizer state of a stacked leaf has shape {b.shape} at {spell(path[1:])}, "
                f"which is not {number} layers of its state for one layer, {a.shape}. Use a "
                f"transformation whose state has the leaf's leading axis (for limit_norm_growth: "
                f"weight_dimension_numbers)."
            )


def make_step(
    model: LayerwiseModel,
    tx: optax.GradientTransformation,
    *,
    weights: WeightFormat = EXACT,
    policy: Callable[..., bool] | None = None,
) -> Callable[..., tuple[Params, optax.OptState, Float[Array, ""]]]:
    """Returns the training step; jit it with the parameters and the state donated.

    Parameters, state and loss are those of the ordinary step on the stacked tree,
    `tx.update(jax.grad(loss)(params), state, params)`, with the same key.

    Args:
      model: The three functions.
      tx: A transformation that `init` accepts.
      weights: How weights are read and written: `EXACT`, `STOCHASTIC`, or a format of quantized
        weights.
      policy: What the forward pass keeps of a block, a policy of `jax.checkpoint`; None: the
        block's input only, everything else is computed again.

    Returns:
      `(params, state, batch, key=None) -> (params, state, loss)`. `key` is what `weights.write`
      gets, folded with the layer: a new one at each step for stochastic rounding, which raises
      ValueError without one. Functions of the parameters in `tx`, such as a mask, are called with
      the tree of all parameters, `optax.MaskedNode` in place of those of other parts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from apollo_optax import apollo_mini, layerwise, ApolloDimensionNumbers
      >>> params = {"blocks": {"w": jnp.stack([jnp.eye(4)] * 3)}, "rest": {"out": jnp.ones((4, 2))}}
      >>> model = layerwise.LayerwiseModel(
      ...     embed=lambda rest, batch: batch,
      ...     block=lambda block, x: x + jnp.tanh(x @ block["w"]),
      ...     loss=lambda rest, x, batch: jnp.mean((x @ rest["out"] - 1) ** 2),
      ... )
      >>> tx = apollo_mini(0.01, weight_dimension_numbers=ApolloDimensionNumbers(-2, -1))
      >>> state = layerwise.init(tx, params)
      >>> step = jax.jit(layerwise.make_step(model, tx), donate_argnums=(0, 1))
      >>> params, state, loss = step(params, state, jnp.ones((8, 4)))
    """
    run = _make_step(model, tx, weights=weights, policy=policy)

    def step(
        params: Params, state: optax.OptState, batch: Batch, key: PRNGKeyArray | None = None
    ) -> tuple[Params, optax.OptState, Float[Array, ""]]:
        params, state, loss, _ = run(params, state, batch, key, None)
        return params, state, loss

    return step


def make_guarded_step(
    model: LayerwiseModel,
    tx: optax.GradientTransformation,
    *,
    weights: WeightFormat = EXACT,
    policy: Callable[..., bool] | None = None,
) -> Callable[..., tuple[Params, optax.OptState, Float[Array, ""], GuardReport]]:
    """Returns the step of `make_step` that skips bad updates.

    If the loss is not finite or above `max_loss`, or if all gradients are zero, nothing changes.

    A gradient that is NaN, or beyond `SQUARES_OVERFLOW`, is seen only when its part is reached. The
    parts are gone through one after another: what only the loss reads, the layers from the last to
    the first, the rest. Nothing changes from the bad part on, and neither do the counts and
    schedules, which all parts share. The parts before it keep their update, weights and moments:
    `GuardReport.moved` says how many. To undo them would take a copy of the weights, to know better
    a second backward pass.

    A single part whose gradients are all zero stays as it is, the others are updated.

    Args:
      model: As `make_step`'s.
      tx: As `make_step`'s.
      weights: As `make_step`'s.
      policy: As `make_step`'s.

    Returns:
      `(params, state, batch, key=None, max_loss=inf) -> (params, state, loss, report)`, with a
      `GuardReport`. The step was taken if the loss is finite, `loss <= max_loss` and
      `0 < report.largest < SQUARES_OVERFLOW`; else it was skipped, as a whole if `report.moved` is
      0.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from apollo_optax import layerwise
      >>> params = {"blocks": {"w": jnp.ones((3, 2, 2))}, "rest": {}}
      >>> model = layerwise.LayerwiseModel(
      ...     embed=lambda rest, batch: batch,
      ...     block=lambda block, x: x @ block["w"],
      ...     loss=lambda rest, x, batch: jnp.mean(x),
      ... )
      >>> tx = optax.sgd(0.1)
      >>> step = layerwise.make_guarded_step(model, tx)
      >>> state = layerwise.init(tx, params)
      >>> same, state, loss, _ = step(params, state, jnp.full((1, 2), jnp.nan))
      >>> bool((same["blocks"]["w"] == params["blocks"]["w"]).all())
      True
    """
    run = _make_step(model, tx, weights=weights, policy=policy)

    def step(
        params: Params,
        state: optax.OptState,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        max_loss: ArrayLike = jnp.inf,
    ) -> tuple[Params, optax.OptState, Float[Array, ""], GuardReport]:
        return run(params, state, batch, key, max_loss)

    return step


def _make_step(
    model: LayerwiseModel,
    tx: optax.GradientTransformation,
    *,
    weights: WeightFormat,
    policy: Callable[..., bool] | None,
) -> Callable[..., tuple[Params, optax.OptState, Float[Array, ""], Any]]:
    """The step of both kinds: guarded if `max_loss` is not None."""
    tx = optax.with_extra_args_support(tx)

    def block(layer: Params, x: PyTree) -> tuple[PyTree, PyTree]:
        out = model.block(_without_layer_axis(layer), x)
        return out if model.has_aux else (out, ())

    # The forward and the backward pass are two loops, between which nothing could be merged.
    block = jax.checkpoint(block, policy=policy, prevent_cse=False)

    def step(
        params: Params,
        state: optax.OptState,
        batch: Batch,
        key: PRNGKeyArray | None,
        max_loss: ArrayLike | None,
    ) -> tuple[Params, optax.OptState, Float[Array, ""], Any]:
        _require_form(params)
        split = _split(tx, state)

        def embed(rest: PyTree) -> PyTree:
            return model.embed(rest, batch)

        def loss_of(rest: PyTree, x: PyTree, aux: PyTree) -> Float[Array, ""]:
            return model.loss(rest, x, batch, *([aux] if model.has_aux else []))

        rest = weights.read(params["rest"])
        x, pullback_embed = jax.vjp(embed, rest)
        x, aux, pullback_of = _run_blocks(block, weights, params["blocks"], x)
        loss, (rest_grads, x_grads, aux_grads) = jax.value_and_grad(loss_of, (0, 1, 2))(
            rest, x, aux
        )
        accepted = None if max_loss is None else jnp.isfinite(loss) & (loss <= max_loss)
        absent = jax.tree.map(
            lambda _: optax.MaskedNode(), jax.eval_shape(weights.read, _shapes(params))
        )
        update = _updater(tx, weights, split, absent, key, accepted)
        whole = params, split.mirrored
        end = _End(rest_grads, x_grads, aux_grads, pullback_of, pullback_embed)
        none_yet = None if accepted is None else _no_part_yet()
        late = _keys_read(embed, rest)
        (params, mirrored), shared, report = _update_all(update, whole, end, late, none_yet)
        if report is not None:
            counts = accepted & (report.largest < SQUARES_OVERFLOW) & (report.largest > 0)
            shared = optax.tree.where(counts, shared, split.shared)
        return params, _join(split._replace(shared=shared), mirrored), loss, report

    return step


class _End(NamedTuple):
    """Where the forward pass ends: the loss's own gradients, and the ways back."""

    rest_grads: PyTree
    x_grads: PyTree
    aux_grads: PyTree
    pullback_of: Callable[[Params, Int[Array, ""]], Callable]
    pullback_embed: Callable[[PyTree], tuple[PyTree]]


def _update_all(
    update: _Update, whole: _Part, end: _End, late: set[Any] | None, report: Any
) -> tuple[_Part, list[Any], Any]:
    """Goes backwards from the end and updates all parts; `late` are the keys `embed` reads."""
    params, mirrored = whole

    def share(part: Params) -> _Part:
        return part, [_share_of(part, tree) for tree in mirrored]

    early = (_keys(params["rest"]) or set()) - (late or set())
    parts, x_grads = [], end.x_grads
    # What only the loss reads is updated before the blocks, so that its gradient is gone by then.
    if early:
        grads = _rest_of({"rest": end.rest_grads}, early)
        part, _, report = update(share(_rest_of(params, early)), grads, 0, report)
        x_grads, part = jax.lax.optimization_barrier((x_grads, part))
        parts.append(part)
    part, x_grads, report = _update_blocks(
        update, end.pullback_of, share(_blocks_of(params)), x_grads, end.aux_grads, report
    )
    parts.append(part)
    (embed_grads,) = end.pullback_embed(x_grads)
    rest_grads = jax.tree.map(jnp.add, end.rest_grads, embed_grads)
    grads = _rest_of({"rest": rest_grads}, late)
    part, shared, report = update(share(_rest_of(params, late)), grads, 0, report)
    parts.append(part)

    params = _replaced(params, *(part for part, _ in parts))
    shares = zip(*(shares for _, shares in parts), strict=True)
    mirrored = [_replaced(tree, *share) for tree, share in zip(mirrored, shares, strict=True)]
    return (params, mirrored), shared, report


def make_loss(
    model: LayerwiseModel, *, weights: WeightFormat = EXACT
) -> Callable[[Params, Batch], Float[Array, ""]]:
    """Returns the loss alone, `(params, batch) -> scalar`, to evaluate with.

    Reads the weights one layer at a time, as the step does: no float copy of quantized ones exists.
    What `model.loss` returns is returned, scalar or not: with a head in its place, logits.
    """

    def loss_of(params: Params, batch: Batch) -> Float[Array, ""]:
        _require_form(params)
        rest = weights.read(params["rest"])

        def block(x: PyTree, layer: Params) -> tuple[PyTree, PyTree]:
            out = model.block(weights.read(layer), x)
            return out if model.has_aux else (out, ())

        x, aux = jax.lax.scan(block, model.embed(rest, batch), params["blocks"])
        aux = jax.tree.map(lambda a: jnp.sum(a, axis=0), aux)
        return model.loss(rest, x, batch, *([aux] if model.has_aux else []))

    return loss_of


def _updater(
    tx: optax.GradientTransformationExtraArgs,
    weights: WeightFormat,
    split: _SplitState,
    absent: PyTree,
    key: PRNGKeyArray | None,
    accepted: Bool[Array, ""] | None,
) -> _Update:
    """Returns the function that updates a part.

    It returns the shared leaves of the state too, and what is known of the gradients so far.
    Guarded, with `accepted` given, it updates the part only if that is true, the part's gradients
    are not all zero, and no gradient so far is unusable.
    """

    def update(
        part: _Part, grads: PyTree, first_layer: ArrayLike, report: Any
    ) -> tuple[_Part, list[Any], Any]:
        params, mirrored = part
        updates, state = tx.update(
            _padded(grads, absent),
            _join(split, mirrored),
            _padded(weights.read(params), absent),
            first_layer=first_layer,
        )
        of_part = None if key is None else jax.random.fold_in(key, first_layer)
        new = _split(tx, state)
        updated = (
            weights.write(params, _as_part(updates, params), of_part),
            [_replaced(old, tree) for old, tree in zip(mirrored, new.mirrored, strict=True)],
        )
        if accepted is None:
            return updated, new.shared, None
        size = jnp.asarray(optax.tree.norm(grads, ord=jnp.inf), jnp.float32)
        largest = jnp.maximum(report.largest, size)
        moves = accepted & (largest < SQUARES_OVERFLOW) & (size > 0)
        has_leaves = bool(jax.tree.leaves(grads))
        report = GuardReport(largest, report.moved + moves, report.parts + has_leaves)
        return optax.tree.where(moves, updated, part), new.shared, report

    return update


def _run_blocks(
    block: Callable[[Params, PyTree], tuple[PyTree, PyTree]],
    weights: WeightFormat,
    blocks: Params,
    x: PyTree,
) -> tuple[PyTree, PyTree, Callable[[Params, Int[Array, ""]], Callable]]:
    """Runs the blocks forward.

    Returns the last output, the sum of the auxiliary outputs, and a function of a layer's weights
    and index that returns the layer's pullback. What pullbacks need besides the weights is kept
    stacked; the weights are not, since the loop that goes backwards has them.
    """
    structure, layer_position = None, []

    def forward(x: PyTree, index: Int[Array, ""]) -> tuple[PyTree, tuple[list[Array], PyTree]]:
        nonlocal structure, layer_position
        layer = weights.read(_layer(blocks, index))
        (x, aux), pullback = jax.vjp(block, layer, x)
        residuals, structure = jax.tree.flatten(pullback)
        position = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(layer))}
        layer_position = [position.get(id(residual)) for residual in residuals]
        kept = [r for r, i in zip(residuals, layer_position, strict=True) if i is None]
        return x, (kept, aux)

    x, (kept, aux) = jax.lax.scan(forward, x, jnp.arange(_number_of_layers(blocks)))

    def pullback_of(layer: Params, index: Int[Array, ""]) -> Callable:
        of_layer = jax.tree.leaves(weights.read(layer))
        # Kept apart, or XLA transposes what all layers kept before the loop instead of one in it.
        saved = iter(jax.lax.optimization_barrier([a[index] for a in kept]))
        residuals = [next(saved) if i is None else of_layer[i] for i in layer_position]
        return jax.tree.unflatten(structure, residuals)

    return x, jax.tree.map(lambda a: jnp.sum(a, axis=0), aux), pullback_of


def _from_slices(function: Callable) -> Callable:
    """Makes sure that `function` gets slices of the stacks, not reads of them fused into its work.

    XLA for CPUs fuses the read of a layer into the write of another array, and then copies the
    whole stack to write that layer in place. There, `function` is a computation of its own.
    """

    def own_computation(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(function)(*args)

    def call(*args: Any) -> Any:
        return jax.lax.platform_dependent(*args, cpu=own_computation, default=function)

    return call


def _update_blocks(
    update: _Update,
    pullback_of: Callable[[Params, Int[Array, ""]], Callable],
    part: _Part,
    x_grads: PyTree,
    aux_grads: PyTree,
    report: Any,
) -> tuple[_Part, PyTree, Any]:
    """Runs the blocks backwards, each updated in place as soon as its gradient exists."""
    number = _number_of_layers(part[0]["blocks"])

    @_from_slices
    def update_layer(
        layer: _Part, grads: PyTree, index: Int[Array, ""], report: Any
    ) -> tuple[_Part, Any]:
        layer, _, report = update(layer, {"blocks": grads}, index, report)
        return layer, report

    def backward(
        done: Int[Array, ""], carry: tuple[_Part, PyTree, Any]
    ) -> tuple[_Part, PyTree, Any]:
        part, x_grads, report = carry
        index = number - 1 - done
        layer = _layer(part, index)
        grads, x_grads = pullback_of(layer[0]["blocks"], index)((x_grads, aux_grads))
        layer, report = update_layer(layer, grads, index, report)
        return _with_layer(part, layer, index), x_grads, report

    return jax.lax.fori_loop(0, number, backward, (part, x_grads, report))


def _keys_read(function: Callable[[PyTree], PyTree], rest: PyTree) -> set[Any] | None:
    """The entries of `rest` that `function` reads; None where `rest` is not a dictionary."""
    if _keys(rest) is None:
        return None
    closed = jax.make_jaxpr(lambda rest: jax.tree.leaves(function(rest)))(rest)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    is_read = jax.tree.unflatten(jax.tree.structure(rest), used)
    return {key for key, entry in is_read.items() if any(jax.tree.leaves(entry))}
