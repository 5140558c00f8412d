"""The transformation that APOLLO and SWAN have in common: one loop over the leaves."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray, PyTree

from apollo_optax._arguments import require_real_floating
from apollo_optax._boxes import with_axis_names
from apollo_optax._keys import key_data
from apollo_optax._leaves import (
    Hyperparameters,
    LeafState,
    ScaleByApolloState,
    Vocabulary,
    checked,
    init_leaf,
    leaf_state,
    nested,
    no_projection,
    others_update,
    require_mu_dtype,
    require_state_of,
    require_vocabulary,
    state_shapes,
    warn_of_whole_moments,
)
from apollo_optax._matrices import MatrixAxes, WeightDimensionNumbers, axes_of_each_leaf
from apollo_optax._names import default_dimension_numbers
from apollo_optax._paths import Path, named_arrays, named_leaves, replaced
from apollo_optax._placement import on_automatic_axes

LeafAxes: TypeAlias = dict[Path, MatrixAxes | None]
Projections: TypeAlias = dict[Path, Array]


class MatrixRule(NamedTuple):
    """How matrices are updated.

    Attributes:
      update: A function of the gradient of a leaf, its projections (None without any), its state,
        its axes, the number of the step and the hyperparameters, `-> (update, state)`.
      rank: The rank of the moments; 0 for none.
      project: A function of the gradients, the state, the projections in it, the axes of all leaves
        and the first layer. It returns the projections, and those to keep in the state.
      stores_projections: Whether projections are kept in the state.
      check: A function of the parameters and their axes, which raises and warns at init.
      key: The seed or the PRNG key that the state has.
    """

    update: Callable[..., tuple[Array, LeafState]]
    rank: int = 0
    project: Callable[..., tuple[Projections, Projections]] = lambda *_: ({}, {})
    stores_projections: bool = False
    check: Callable[[list[tuple[Path, Any]], LeafAxes], None] = lambda *_: None
    key: int | PRNGKeyArray = 0


def scale_leaves(
    rule: MatrixRule,
    hyper: Hyperparameters,
    *,
    mu_dtype: Any,
    vocabulary: Vocabulary,
    weight_dimension_numbers: WeightDimensionNumbers,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that updates matrices by `rule`, and other leaves as Adam does.

    The arguments are checked here. Those of the same name are as in `scale_by_apollo`.
    """
    require_mu_dtype(mu_dtype)
    require_vocabulary(vocabulary)
    hyper = checked(hyper)
    if weight_dimension_numbers is None:
        weight_dimension_numbers = default_dimension_numbers

    def init(params: PyTree) -> ScaleByApolloState:
        count, key = jnp.zeros([], jnp.int32), key_data(rule.key)
        named, _ = named_arrays(params)
        if not named:
            # Nothing to train, or the placeholder by which optax.tree_map_params finds the fields
            # of a state that mirror the parameters.
            stored = params if rule.stores_projections else {}
            return ScaleByApolloState(count, key, params, params, params, stored)
        require_real_floating(named)
        axes = axes_of_each_leaf(weight_dimension_numbers, params)
        rule.check(named, axes)
        warn_of_whole_moments(named, axes, vocabulary)
        leaves = {
            path: init_leaf(leaf, axes[path], rule.rank, mu_dtype, vocabulary)
            for path, leaf in named
        }
        stored = {}
        if rule.stores_projections:
            stored = {path: no_projection(leaf, axes[path], rule.rank) for path, leaf in named}
        return with_axis_names(nested(count, key, leaves, stored), params, axes)

    def update(
        updates: PyTree,
        state: ScaleByApolloState,
        params: PyTree | None = None,
        *,
        first_layer: Int[ArrayLike, ""] = 0,
        hyper: Hyperparameters,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByApolloState]:
        del params, extra_args
        named, treedef = named_arrays(updates)
        require_state_of(state, named, rule.stores_projections)
        require_real_floating(named)
        t = optax.safe_increment(state.count)
        if not named:
            return updates, state._replace(count=t)
        axes = axes_of_each_leaf(weight_dimension_numbers, updates, quiet=True)
        of_field = {name: dict(named_leaves(tree)[0]) for name, tree in state._asdict().items()}
        needed = {
            path: state_shapes(G.shape, axes[path], rule.rank, vocabulary) for path, G in named
        }
        leaves = {path: leaf_state(of_field, path, needed[path]) for path, G in named}
        P, stored = rule.project(dict(named), state, of_field["projection"], axes, first_layer)
        scaled = []
        for path, G in named:
            if (matrix := axes[path]) is None:
                U, leaves[path] = others_update(G, leaves[path], t, hyper)
            else:
                U, leaves[path] = rule.update(G, P.get(path), leaves[path], matrix, t, hyper)
            scaled.append(U)
        # Built on the tree of the incoming state, to keep its boxes.
        new_state = replaced(state, nested(t, state.key, leaves, stored))
        return jax.tree.unflatten(treedef, scaled), new_state

    tx = on_automatic_axes(optax.GradientTransformationExtraArgs(init, update))
    # Passed as an argument, since injected hyperparameters are traced and have their own types.
    return optax.GradientTransformationExtraArgs(init, functools.partial(tx.update, hyper=hyper))
