"""The layer-wise training steps: forward through the layers, then backwards with their updates."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import partial_eval
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from apollo_optax._magnitudes import largest_of_tree
from apollo_optax._paths import replaced
from apollo_optax.layerwise._model import (
    EXACT,
    Batch,
    GuardReport,
    LayerwiseModel,
    Params,
    WeightFormat,
)
from apollo_optax.layerwise._parts import (
    Part,
    SplitState,
    as_part,
    blocks_of,
    join_state,
    keys_of,
    layer_of,
    number_of_layers,
    padded,
    require_form,
    rest_of,
    shapes_of,
    share_of,
    split_state,
    with_layer,
    without_layer_axis,
)

_Update: TypeAlias = Callable[[Part, PyTree, ArrayLike, Any], tuple[Part, list[Any], Any]]

# Below this size, the squares of gradients can be summed over 10^8 elements in float32. Above it,
# moments and norms may become infinite, and then stay infinite.
_SQUARES_OVERFLOW = 1e15


def make_step(
    model: LayerwiseModel,
    tx: optax.GradientTransformation,
    *,
    weights: WeightFormat = EXACT,
    policy: Callable[..., bool] | None = None,
) -> Callable[..., tuple[Params, optax.OptState, Float[Array, ""]]]:
    """Returns the training step; use `jax.jit` with the parameters and the state donated.

    The parameters, the state and the loss are those of the ordinary step on the stacked tree,
    `tx.update(jax.grad(loss)(params), state, params)`, with the same key.

    Args:
      model: The three functions of the model.
      tx: A transformation that `init` accepts.
      weights: How weights are read and written: `EXACT`, `STOCHASTIC`, or a format of quantized
        weights.
      policy: A policy of `jax.checkpoint`, for what the forward pass keeps of a block. None keeps
        only the block's input, and everything else is computed again.

    Returns:
      `(params, state, batch, key=None) -> (params, state, loss)`. `weights.write` gets `key` folded
      with the layer. Stochastic rounding needs a new key at each step, and raises ValueError
      without a key. Functions of the parameters in `tx`, such as a mask, are called with the tree
      of all parameters, with `optax.MaskedNode` in place of the parameters of other parts.

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

    A gradient is bad if it is NaN, or 1e15 or more: its squares may not add up to a finite float32.
    The step sees a bad gradient only when it reaches the gradient's part. The order of the parts is
    the entries that only the loss reads, the layers from the last to the first, and the rest. The
    bad part and the parts after it do not change, and neither do the counts and schedules, which
    all parts share. The parts before it keep their updates, and `GuardReport.moved` is the number
    of these parts. To undo the updates would take a copy of the weights, and to check the gradients
    first would take a second backward pass.

    If all gradients of a single part are zero, this part does not change, and the others are
    updated.

    Args:
      model: As in `make_step`.
      tx: As in `make_step`.
      weights: As in `make_step`.
      policy: As in `make_step`.

    Returns:
      `(params, state, batch, key=None, max_loss=inf) -> (params, state, loss, report)`, with a
      `GuardReport`. The step was taken if the loss is finite, `loss <= max_loss` and
      `0 < report.largest < 1e15`. Otherwise it was skipped, as a whole if `report.moved` is 0.

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
    return _make_step(model, tx, weights=weights, policy=policy)


def _make_step(
    model: LayerwiseModel,
    tx: optax.GradientTransformation,
    *,
    weights: WeightFormat,
    policy: Callable[..., bool] | None,
) -> Callable[..., tuple[Params, optax.OptState, Float[Array, ""], Any]]:
    """Returns the step of both kinds, which is guarded if `max_loss` is not None."""
    tx = optax.with_extra_args_support(tx)

    def block(layer: Params, x: PyTree) -> tuple[PyTree, PyTree]:
        out = model.block(without_layer_axis(layer), x)
        return out if model.has_aux else (out, ())

    # The forward and the backward pass are two loops, so there is nothing to merge between them.
    block = jax.checkpoint(block, policy=policy, prevent_cse=False)

    def step(
        params: Params,
        state: optax.OptState,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        max_loss: ArrayLike | None = jnp.inf,
    ) -> tuple[Params, optax.OptState, Float[Array, ""], Any]:
        require_form(params)
        split = split_state(tx, state)

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
            lambda _: optax.MaskedNode(), jax.eval_shape(weights.read, shapes_of(params))
        )
        update = _updater(tx, weights, split, absent, key, accepted)
        whole = params, split.mirrored
        late = _keys_read(embed, rest)
        read_last = _keys_read(lambda rest: loss_of(rest, x, aux), rest)
        # The gradient of a table that both ends read exists already, and the lookup adds to it.
        if late and read_last and late.isdisjoint(read_last):
            pullback_embed = _late(pullback_embed, like=(rest,))
        end = _End(rest_grads, x_grads, aux_grads, pullback_of, pullback_embed)
        none_yet = None
        if accepted is not None:
            none_yet = GuardReport(jnp.zeros([], jnp.float32), *jnp.zeros([2], jnp.int32))
        (params, mirrored), shared, report = _update_all(update, whole, end, late, none_yet)
        if report is not None:
            counts = accepted & (report.largest < _SQUARES_OVERFLOW) & (report.largest > 0)
            shared = optax.tree.where(counts, shared, split.shared)
        return params, join_state(split._replace(shared=shared), mirrored), loss, report

    return step


def make_loss(
    model: LayerwiseModel, *, weights: WeightFormat = EXACT
) -> Callable[[Params, Batch], Float[Array, ""]]:
    """Returns the loss alone, `(params, batch) -> scalar`, for evaluation.

    The function reads the weights one layer at a time, as the step does, so that no float copy of
    quantized weights exists. The result is what `model.loss` returns, scalar or not. If
    `model.loss` is an output head, the result is logits.
    """

    def loss_of(params: Params, batch: Batch) -> Float[Array, ""]:
        require_form(params)
        rest = weights.read(params["rest"])

        def block(x: PyTree, layer: Params) -> tuple[PyTree, PyTree]:
            out = model.block(weights.read(layer), x)
            return out if model.has_aux else (out, ())

        x, aux = jax.lax.scan(block, model.embed(rest, batch), params["blocks"])
        aux = jax.tree.map(lambda a: jnp.sum(a, axis=0), aux)
        return model.loss(rest, x, batch, *([aux] if model.has_aux else []))

    return loss_of


class _End(NamedTuple):
    """The end of the forward pass: the gradients of the loss function, and the pullbacks."""

    rest_grads: PyTree
    x_grads: PyTree
    aux_grads: PyTree
    pullback_of: Callable[[Params, Int[Array, ""]], Callable]
    pullback_embed: Callable[[PyTree], tuple[PyTree]]


def _update_all(
    update: _Update, whole: Part, end: _End, late: set[Any] | None, report: Any
) -> tuple[Part, list[Any], Any]:
    """Goes backwards from the end and updates all parts; `embed` reads the keys in `late`."""
    params, mirrored = whole

    def share(part: Params) -> Part:
        return part, [share_of(part, tree) for tree in mirrored]

    early = (keys_of(params["rest"]) or set()) - (late or set())
    parts, x_grads = [], end.x_grads
    # Entries that only the loss reads are updated before the blocks, to free their gradients first.
    if early:
        grads = rest_of({"rest": end.rest_grads}, early)
        part, _, report = update(share(rest_of(params, early)), grads, 0, report)
        x_grads, part = jax.lax.optimization_barrier((x_grads, part))
        parts.append(part)
    part, x_grads, report = _update_blocks(
        update, end.pullback_of, share(blocks_of(params)), x_grads, end.aux_grads, report
    )
    parts.append(part)
    (embed_grads,) = end.pullback_embed(x_grads)
    rest_grads = jax.tree.map(jnp.add, end.rest_grads, embed_grads)
    grads = rest_of({"rest": rest_grads}, late)
    part, shared, report = update(share(rest_of(params, late)), grads, 0, report)
    parts.append(part)

    params = replaced(params, *(part for part, _ in parts))
    shares = zip(*(shares for _, shares in parts), strict=True)
    mirrored = [replaced(tree, *share) for tree, share in zip(mirrored, shares, strict=True)]
    return (params, mirrored), shared, report


def _updater(
    tx: optax.GradientTransformationExtraArgs,
    weights: WeightFormat,
    split: SplitState,
    absent: PyTree,
    key: PRNGKeyArray | None,
    accepted: Bool[Array, ""] | None,
) -> _Update:
    """Returns the function that updates a part.

    The function also returns the shared leaves of the state, and the report on the gradients so
    far. If `accepted` is given, the step is guarded: the function updates the part only if
    `accepted` is true, the part's gradients are not all zero, and no gradient so far is bad.
    """

    def update(
        part: Part, grads: PyTree, first_layer: ArrayLike, report: Any
    ) -> tuple[Part, list[Any], Any]:
        params, mirrored = part
        updates, state = tx.update(
            padded(grads, absent),
            join_state(split, mirrored),
            padded(weights.read(params), absent),
            first_layer=first_layer,
        )
        of_part = None if key is None else jax.random.fold_in(key, first_layer)
        new = split_state(tx, state)
        updated = (
            weights.write(params, as_part(updates, params), of_part),
            [replaced(old, tree) for old, tree in zip(mirrored, new.mirrored, strict=True)],
        )
        if accepted is None:
            return updated, new.shared, None
        size = largest_of_tree(grads)
        largest = jnp.maximum(report.largest, size)
        moves = accepted & (largest < _SQUARES_OVERFLOW) & (size > 0)
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
    and index that returns the layer's pullback. Everything that pullbacks need is kept stacked,
    except the weights, which the backward loop has.
    """
    structure, layer_position = None, []

    def forward(x: PyTree, index: Int[Array, ""]) -> tuple[PyTree, tuple[list[Array], PyTree]]:
        nonlocal structure, layer_position
        layer = weights.read(layer_of(blocks, index))
        (x, aux), pullback = jax.vjp(block, layer, x)
        residuals, structure = jax.tree.flatten(pullback)
        position = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(layer))}
        layer_position = [position.get(id(residual)) for residual in residuals]
        kept = [r for r, i in zip(residuals, layer_position, strict=True) if i is None]
        return x, (kept, aux)

    x, (kept, aux) = jax.lax.scan(forward, x, jnp.arange(number_of_layers(blocks)))

    def pullback_of(layer: Params, index: Int[Array, ""]) -> Callable:
        of_layer = jax.tree.leaves(weights.read(layer))
        # Without the barrier, XLA transposes the residuals of all layers before the loop.
        saved = iter(jax.lax.optimization_barrier([a[index] for a in kept]))
        residuals = [next(saved) if i is None else of_layer[i] for i in layer_position]
        return jax.tree.unflatten(structure, residuals)

    return x, jax.tree.map(lambda a: jnp.sum(a, axis=0), aux), pullback_of


def _from_slices(function: Callable) -> Callable:
    """Makes `function` a computation of its own on CPUs, whose arguments are slices of the stacks.

    XLA for CPUs would fuse the read of a layer into the write of another array, and would then copy
    the whole stack to write that layer in place.
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
    part: Part,
    x_grads: PyTree,
    aux_grads: PyTree,
    report: Any,
) -> tuple[Part, PyTree, Any]:
    """Runs the blocks backwards, and updates each in place as soon as its gradient exists."""
    number = number_of_layers(part[0]["blocks"])

    @_from_slices
    def update_layer(
        layer: Part, grads: PyTree, index: Int[Array, ""], report: Any
    ) -> tuple[Part, Any]:
        layer, _, report = update(layer, {"blocks": grads}, index, report)
        return layer, report

    def backward(done: Int[Array, ""], carry: tuple[Part, PyTree, Any]) -> tuple[Part, PyTree, Any]:
        part, x_grads, report = carry
        index = number - 1 - done
        layer = layer_of(part, index)
        grads, x_grads = pullback_of(layer[0]["blocks"], index)((x_grads, aux_grads))
        layer, report = update_layer(layer, grads, index, report)
        return with_layer(part, layer, index), x_grads, report

    return jax.lax.fori_loop(0, number, backward, (part, x_grads, report))


def _late(pullback: Callable[[PyTree], PyTree], *, like: PyTree) -> Callable[[PyTree], PyTree]:
    """Keeps the gradients that `pullback` returns out of memory until its argument is there.

    The gradient of a lookup is added to a table of zeros, which XLA for GPUs would make at the
    beginning of the step, since they depend on nothing. In a conditional, they are made late.
    """

    def conditional(grads: PyTree) -> PyTree:
        is_late, grads = jax.lax.optimization_barrier((True, grads))
        return jax.lax.cond(is_late, pullback, lambda _: jax.tree.map(jnp.zeros_like, like), grads)

    return lambda grads: jax.lax.platform_dependent(grads, cuda=conditional, default=pullback)


def _keys_read(function: Callable[[PyTree], PyTree], rest: PyTree) -> set[Any] | None:
    """Returns the keys of `rest` that `function` reads, or None if `rest` is not a dictionary."""
    if keys_of(rest) is None:
        return None
    closed = jax.make_jaxpr(lambda rest: jax.tree.leaves(function(rest)))(rest)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    is_read = jax.tree.unflatten(jax.tree.structure(rest), used)
    return {key for key, entry in is_read.items() if any(jax.tree.leaves(entry))}
