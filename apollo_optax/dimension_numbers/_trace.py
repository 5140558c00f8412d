"""Reads off a traced model which axes of each parameter make a matrix.

The jaxpr of the forward function is interpreted with a `Value` in place of every array. A `Value`
says which parameters an array still is, through casts, transposes, reshapes, slices and scans. A
product with the array then says what the parameter's axes are for. Nothing runs.

The rule of a primitive takes the facts gathered so far, the equation and the values of its
operands, and returns the values of its results. `_RULES`, at the end, has all rules.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from apollo_optax.dimension_numbers._values import (
    BATCH,
    IS,
    LOOKED_UP,
    ONE_HOT,
    OUTPUT,
    PRODUCT,
    REDUCTION,
    SPREAD,
    Factor,
    Facts,
    Value,
    View,
    axes_of,
    broadcast,
    cut,
    either,
    inserted,
    is_mapped,
    map_views,
    mark,
    merged_views,
    mixture,
    plain,
    regrouped,
    resized,
    shape_of,
    sized_as,
    spread_axes,
    without,
)


def interpret(facts: Facts, jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
    """Runs a jaxpr on values, and returns the values of its results."""
    env = dict.fromkeys(jaxpr.constvars, facts.constant)
    env.update(zip(jaxpr.invars, values, strict=True))

    def value_of(atom: Any) -> Value:
        return Value() if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, _opaque)
        results = rule(facts, eqn, [value_of(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


# Rules of primitives.


def _opaque(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    for value in values:
        facts.lose(value, f"{eqn.primitive.name!r} takes it, which cannot be looked into")
    return [mixture(values)] * len(eqn.outvars)


def _noise(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    return [Value()] * len(eqn.outvars)


def _elementwise(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
    values = [
        broadcast(value, shape_of(atom), shape, range(len(shape_of(atom))))
        for value, atom in zip(values, eqn.invars, strict=True)
    ]
    if name in ("add", "sub") and shape and all(value.last for value in values):
        facts.sums.add((values[0].last, values[1].last))
    spread = [spread_axes(value, shape) for value in values]
    varying = [v for v, s in zip(values, spread, strict=True) if v.data and len(s) < len(shape)]
    result = mixture(values)
    terms = values[1:] if name == "select_n" else values
    views: dict[Any, View] = {}
    if not varying and any(value.of(IS) for value in terms):
        # A weight that is multiplied by a scale from the inputs is still a weight.
        result = result._replace(data=False)
        views |= _fullest(merged_views(facts, (value.of(IS) for value in terms), IS))
    if all(value.of(LOOKED_UP) for value in varying):
        views |= _fullest(merged_views(facts, (value.of(LOOKED_UP) for value in terms), LOOKED_UP))
    views |= merged_views(facts, (value.of(PRODUCT) for value in terms), PRODUCT)
    if name == "eq":
        one_hot = {
            axis
            for a, b in ((0, 1), (1, 0))
            for axis in spread[a] - spread[b]
            if values[a].data and not values[b].data
        }
        if one_hot:
            views[ONE_HOT] = mark(shape, one_hot)
    elif name in ("convert_element_type", "mul", "and", "copy"):
        views.update(item for v in values for item in v.views.items() if item[0] == ONE_HOT)
    if common := set.intersection(*spread):
        views[SPREAD] = mark(shape, common)
    for value in terms:
        facts.entrywise.update(leaf for leaf in value.of(IS) if (IS, leaf) not in views)
    return [result._replace(views=views)]


def _fullest(views: dict[Any, View]) -> dict[Any, View]:
    """Keeps the parameters with most of the array's axes: the weight, and not its scale."""
    axes = {key: sum(map(is_mapped, view.axes)) for key, view in views.items()}
    return {key: view for key, view in views.items() if axes[key] == max(axes.values())}


def _same_axes(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    if len(shape_of(eqn.invars[0])) != len(shape_of(eqn.outvars[0])):  # devices as a new axis
        return _opaque(facts, eqn, values)
    return [
        cut(facts, value, before, after)
        for value, before, after in zip(values, eqn.invars, eqn.outvars, strict=False)
    ]


def _transpose(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    order = eqn.params["permutation"]
    return [map_views(values[0], lambda v: v._replace(axes=tuple(v.axes[axis] for axis in order)))]


def _broadcast_in_dim(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return [broadcast(values[0], old, new, eqn.params["broadcast_dimensions"])]


def _tile(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    def repeated(factors: tuple[Factor, ...], times: int) -> tuple[Factor, ...]:
        return factors if times == 1 else plain(times) + factors

    reps = eqn.params["reps"]
    return [map_views(values[0], lambda v: v._replace(axes=tuple(map(repeated, v.axes, reps))))]


def _reshape(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    (value,) = values[:1]

    def change(view: View) -> View | None:
        axes = regrouped(view.axes, shape_of(eqn.outvars[0]))
        ones = [factor for factors in view.axes for factor in factors if factor.size == 1]
        return None if axes is None else View(axes, view.batch | axes_of(ones))

    reshaped = map_views(value, change)
    if len(reshaped.of(IS)) < len(value.of(IS)):
        facts.lose(value, "a reshape cuts across its axes")
    return [reshaped]


def _squeeze(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    return [without(values[0], eqn.params["dimensions"])]


def _reduce(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    reduced = eqn.params["axes"]
    result = without(values[0], reduced)
    if any(is_mapped(view.axes[axis]) for view in values[0].of(IS).values() for axis in reduced):
        # Its norm or its mean is no longer the parameter.
        facts.lose(values[0], f"it is only summed up ({eqn.primitive.name})")
        views = {key: view for key, view in result.views.items() if key[0] != IS}
        result = result._replace(views=views)
    return [result] * len(eqn.outvars)


def _split(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    return [cut(facts, values[0], eqn.invars[0], part) for part in eqn.outvars]


def _unstack(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    axis = eqn.params["axis"]
    facts.take_apart(values[0], axis)
    return [without(values[0], [axis])] * len(eqn.outvars)


def _concatenate(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    shape = shape_of(eqn.outvars[0])
    if eqn.primitive.name == "stack":
        values = [
            inserted(value, eqn.params["axis"], shape[eqn.params["axis"]]) for value in values
        ]
    else:
        facts.put_together(values, eqn.params["dimension"])
    return [either(facts, [sized_as(value, eqn.outvars[0]) for value in values])]


def _iota(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    shape = shape_of(eqn.outvars[0])
    return [Value({SPREAD: mark(shape, set(range(len(shape))) - {eqn.params["dimension"]})})]


def _looked_up(facts: Facts, value: Value, axes: Iterable[int]) -> Value:
    """Notes that the inputs choose along these axes of the array."""
    for kind in (IS, LOOKED_UP):
        for leaf, view in value.of(kind).items():
            along = set().union(*(axes_of(view.axes[axis]) for axis in axes))
            facts.looked_up.setdefault(leaf, set()).update(along)
    views = {
        (LOOKED_UP if kind == IS else kind, leaf): view
        for (kind, leaf), view in value.views.items()
    }
    return value._replace(views=views, data=True)


def _dynamic_slice(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    value, old, new = values[0], shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if any(index.data for index in values[1:]):
        value = _looked_up(facts, value, [a for a in range(len(old)) if old[a] > new[a]])
    return [cut(facts, value, eqn.invars[0], eqn.outvars[0])]


def _gather(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    (value, indices), numbers = values, eqn.params["dimension_numbers"]
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    collapsed, batching = numbers.collapsed_slice_dims, numbers.operand_batching_dims
    kept = [axis for axis in range(len(old)) if axis not in (*collapsed, *batching)]
    source: dict[int, int] = dict(zip(numbers.offset_dims, kept, strict=True))
    of_indices = [axis for axis in range(len(new)) if axis not in source]
    for axis, of_index in zip(batching, numbers.start_indices_batching_dims, strict=True):
        source[of_indices[of_index]] = axis
    if indices.data:
        chosen = [a for a in numbers.start_index_map if eqn.params["slice_sizes"][a] < old[a]]
        value = _looked_up(facts, value, chosen)
    elif not of_indices:
        for axis in collapsed:
            facts.take_apart(value, axis)
    elif len(collapsed) == len(of_indices) == 1:  # a choice or an order known beforehand
        source[of_indices[0]] = collapsed[0]

    def change(view: View) -> View:
        batch = view.batch.union(
            *(axes_of(view.axes[axis]) for axis in collapsed if axis not in source.values())
        )
        axes = (
            resized(view.axes[source[a]], n) if a in source else plain(n) for a, n in enumerate(new)
        )
        return View(tuple(axes), batch)

    gathered = map_views(
        value._replace(
            views={key: view for key, view in value.views.items() if key not in (SPREAD, ONE_HOT)}
        ),
        change,
    )
    return [gathered._replace(data=value.data or indices.data)]


# Products.


def _is_weight(value: Value) -> bool:
    return not value.data and bool(value.of(IS))


def _is_repeated(value: Value) -> bool:
    """Whether the value has axes that no parameter has, such as examples, as activations do."""
    return not any(
        all(is_mapped(factors) or math.prod(f.size for f in factors) == 1 for factors in view.axes)
        for view in value.of(IS).values()
    )


def _product(
    facts: Facts,
    values: Sequence[Value],
    roles: Sequence[Sequence[str]],
    sources: Sequence[tuple[int | None, int | None]],
    paired: Iterable[tuple[int, int]],
    shape: tuple[int, ...],
    what: str,
) -> Value:
    """Returns the product of two values.

    Args:
      facts: The facts, to which the product adds.
      values: The operands.
      roles: What the product does with the axes of each operand.
      sources: The axes of the operands that each axis of the result comes from.
      paired: The axes of the operands that the product runs over together, contracted or not.
      shape: The shape of the result.
      what: The kind of product.
    """
    weight = [_is_weight(value) for value in values]
    if all(weight):
        if values[0].of(IS).keys() & values[1].of(IS).keys():
            return mixture(values)  # the norm of a weight, or its Gram matrix
        repeated = [_is_repeated(value) for value in values]
        if any(repeated) and not all(repeated):  # a learned input
            weight = [not r for r in repeated]
            facts.entrywise.update(values[repeated.index(True)].of(IS))

    def placed(view: View, operand: int) -> View:
        of = (source[operand] for source in sources)
        axes = (plain(n) if a is None else view.axes[a] for a, n in zip(of, shape, strict=True))
        return view._replace(axes=tuple(axes))

    result, views = mixture(values), {}
    last: frozenset[int] = frozenset()
    for operand, (value, other) in enumerate(zip(values, values[::-1], strict=True)):
        of_axis = roles[operand]
        pairs = [pair[::-1] if operand else pair for pair in paired]
        contracted = [axis for axis, role in enumerate(of_axis) if role == REDUCTION]
        one_hot = other.views.get(ONE_HOT)
        if (
            weight[operand]
            and one_hot
            and contracted
            and all(is_mapped(one_hot.axes[b]) for a, b in pairs if a in contracted)
        ):
            rows = _looked_up(facts, value, contracted)
            for leaf, view in rows.of(LOOKED_UP).items():
                along = frozenset().union(*(axes_of(view.axes[axis]) for axis in contracted))
                views[LOOKED_UP, leaf] = placed(view._replace(batch=view.batch | along), operand)
            continue
        if weight[operand]:
            used = value.of(IS)
        elif not weight[1 - operand] and not other.of(LOOKED_UP):
            used = {
                leaf: view
                for leaf, view in value.of(LOOKED_UP).items()
                if {REDUCTION, OUTPUT}
                <= {role for f, role in zip(view.axes, of_axis, strict=True) if is_mapped(f)}
            }
            facts.selected.update(used)
        else:
            used = {}
        if all(weight) and operand == 0:  # A B, as in x A B: what B contracts, A puts out
            swap = {REDUCTION: OUTPUT, OUTPUT: REDUCTION, BATCH: BATCH}
            of_axis = [swap[role] for role in of_axis]
        for leaf, view in used.items():
            facts.use(leaf, view, of_axis, what if not all(weight) else "product of parameters")
            outputs = placed(view, operand)
            if len(set().union(*map(axes_of, outputs.axes))) > 1:
                views[PRODUCT, leaf] = outputs
            for axis, of_other in pairs:
                if of_axis[axis] == BATCH and is_mapped(view.axes[axis]):
                    facts.take_apart(other, of_other)
        for leaf, view in value.of(PRODUCT).items():
            if any(map(is_mapped, (moved := placed(view, operand)).axes)):
                views.setdefault((PRODUCT, leaf), moved)
        if used or (value.last and not value.data and not weight[operand]):
            last |= value.last | used.keys()
            if not weight[1 - operand]:
                facts.followed |= other.last
    return result._replace(views=views, last=last or result.last)


def _dot_general(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    numbers, grouped = eqn.params.get("dimension_numbers"), ()
    what = "product"
    if numbers is None:
        ragged = eqn.params["ragged_dot_dimension_numbers"]
        numbers, grouped = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
        what = "ragged product"
    contracted, batch = numbers
    roles = [
        [
            REDUCTION
            if axis in contracted[operand]
            else BATCH
            if axis in batch[operand] or (operand and axis in grouped)
            else OUTPUT
            for axis in range(len(shape_of(eqn.invars[operand])))
        ]
        for operand in (0, 1)
    ]
    free = [[axis for axis, role in enumerate(of) if role == OUTPUT] for of in roles]
    shape = shape_of(eqn.outvars[0])
    sources: list[tuple[int | None, int | None]] = [
        *zip(*batch, strict=True),
        *((axis, None) for axis in free[0]),
        *((None, axis) for axis in free[1]),
    ]
    if len(sources) < len(shape):  # a ragged contraction puts out its groups
        sources = [(None, None)] * (len(shape) - len(sources)) + sources
    paired = [*zip(*contracted, strict=True), *zip(*batch, strict=True)]
    return [_product(facts, values[:2], roles, sources, paired, shape, what)]


def _convolution(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    layout, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    shape, kernel = shape_of(eqn.outvars[0]), values[1]
    features = layout.rhs_spec[0]
    roles = [OUTPUT if axis == features else REDUCTION for axis in range(len(shape))]
    what = "convolution" if groups == 1 else "convolution of groups"
    if groups == shape_of(eqn.invars[1])[features] > 1:  # a filter for each channel
        roles[features], what = BATCH, "convolution of each channel alone"
    sources: list[tuple[int | None, int | None]] = [(None, None)] * len(shape)
    sources[layout.out_spec[1]] = (None, features)
    if not _is_weight(kernel) or _is_weight(values[0]):
        return _opaque(facts, eqn, values)
    unknown = [REDUCTION] * len(shape)
    return [_product(facts, values, [unknown, roles], sources, [], shape, what)]


# Primitives that call other functions.


def _call(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    named = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
    (closed,) = (eqn.params[name] for name in named if name in eqn.params)
    return interpret(facts, getattr(closed, "jaxpr", closed), values)


def _shard_map(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    inner = eqn.params["jaxpr"]
    inner = getattr(inner, "jaxpr", inner)

    values = [sized_as(value, atom) for value, atom in zip(values, inner.invars, strict=True)]
    results = interpret(facts, inner, values)
    return [sized_as(value, atom) for value, atom in zip(results, eqn.outvars, strict=True)]


def _cond(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    results = [interpret(facts, branch.jaxpr, values[1:]) for branch in eqn.params["branches"]]
    return [either(facts, of_branches) for of_branches in zip(*results, strict=True)]


def _settled(before: Value, after: Value) -> Value:
    """Returns what holds both before and after an iteration of a loop."""
    mixed = mixture((before, after))
    views = {
        key: view
        for key, view in before.views.items()
        if after.views.get(key) == view and not (mixed.data and key[0] == IS)
    }
    return mixed._replace(views=views)


def _repeated(
    facts: Facts, carry: list[Value], turn: Callable[[Facts, list[Value]], list[Value]]
) -> list[Value]:
    """Returns what holds in every iteration of a loop; facts are noted only after that."""
    while True:
        after = turn(Facts(facts.shapes, facts.constant), carry)
        settled = [_settled(a, b) for a, b in zip(carry, after, strict=False)]
        if settled == carry:
            return settled
        for before, now in zip(carry, settled, strict=True):
            facts.entrywise.update(before.of(IS).keys() - now.of(IS).keys())
        carry = settled


def _scan(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    body = eqn.params["jaxpr"].jaxpr
    # Scanned arrays have one more axis outside. (The parameters with their counts differ among
    # versions of JAX.)
    row_count, carry_count = (
        sum(
            (len(shape_of(a)) == len(shape_of(b))) == same
            for a, b in zip(outer, inner, strict=True)
        )
        for outer, inner, same in (
            (eqn.invars, body.invars, False),
            (eqn.outvars, body.outvars, True),
        )
    )
    split = len(values) - row_count - carry_count, len(values) - row_count
    constants, carry, stacked = values[: split[0]], values[split[0] : split[1]], values[split[1] :]
    if any(_is_weight(v) and any(is_mapped(w.axes[0]) for w in v.of(IS).values()) for v in stacked):
        for value in stacked:
            facts.take_apart(value, 0)
    rows = [without(value, [0]) for value in stacked]

    def turn(facts: Facts, carry: list[Value]) -> list[Value]:
        return interpret(facts, body, [*constants, *carry, *rows])

    carry = _repeated(facts, carry, turn)
    after = turn(facts, carry)
    results = [inserted(value, 0, eqn.params["length"]) for value in after[len(carry) :]]
    return [*carry, *results]


def _while(facts: Facts, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    split = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    constants, carry = values[split[0] : split[1]], values[split[1] :]

    def turn(facts: Facts, carry: list[Value]) -> list[Value]:
        return interpret(facts, eqn.params["body_jaxpr"].jaxpr, [*constants, *carry])

    carry = _repeated(facts, carry, turn)
    turn(facts, carry)
    return carry


_Rule = Callable[[Facts, JaxprEqn, list[Value]], list[Value]]
_RULES_OF_MANY: dict[_Rule, str] = {
    _elementwise: """
        abs acos acosh add and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
        complex conj convert_element_type copy copy_p cos cosh cumlogsumexp cummax cummin cumprod
        cumsum digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag
        integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi ne neg
        nextafter not or polygamma population_count pow real reduce_precision
        regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
        shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta""",
    _same_axes: """
        all_gather device_put mesh_cast name optimization_barrier pad pbroadcast pcast pmax pmin
        ppermute psum psum2 psum_invariant pvary reduce_scatter reshard rev sharding_constraint
        slice""",
    _reduce: """
        argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
        reduce_xor""",
    _noise: """
        random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap
        random_wrap rng_bit_generator rng_uniform threefry2x32""",
    _call: """
        checkpoint closed_call composite core_call custom_jvp_call custom_partitioning
        custom_vjp_call custom_vjp_call_jaxpr jit pjit remat remat2""",
}
_RULES: dict[str, _Rule] = {
    **{name: rule for rule, names in _RULES_OF_MANY.items() for name in names.split()},
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "cond": _cond,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "ragged_dot_general": _dot_general,
    "reshape": _reshape,
    "scan": _scan,
    "shard_map": _shard_map,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _concatenate,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    "while": _while,
}
