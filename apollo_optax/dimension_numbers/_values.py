"""What is known of an array while a model is traced: which parameters it is, and along which axes.

A `Value` stands for an array. Its views say which parameters are in the array, and which axes of
these parameters each axis of the array is. The functions below say what a change of shape does to
the views. `Facts` gathers what the products of the model say about the parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REDUCTION, OUTPUT, BATCH = "reduction", "output", "batch"
Roles = tuple[frozenset[str], ...]
"""What a product does with each axis of a parameter; more than one role if the axis is split."""


class Factor(NamedTuple):
    """A part of an axis, and the axes of the parameter that run along this part, if any."""

    axes: tuple[int, ...]
    size: int


class View(NamedTuple):
    """A parameter in an array: the factors of every axis of the array, from major to minor.

    Attributes:
      axes: The factors of each axis.
      batch: The axes of the parameter that are scanned over, indexed or looked up.
    """

    axes: tuple[tuple[Factor, ...], ...]
    batch: frozenset[int] = frozenset()


# How an array can contain a parameter, or be marked.
IS = "is"  # the parameter itself, without inputs
LOOKED_UP = "looked up"  # its rows, chosen by the inputs
PRODUCT = "product"  # a product with it; the axes are those of the product's outputs
SPREAD, ONE_HOT = ("spread", -1), ("one hot", -1)  # marks: constant, or one-hot, along the axis


class Value(NamedTuple):
    """What is known of an array.

    Attributes:
      views: The views, by (kind, index of the parameter) or by mark.
      data: Whether the array depends on inputs.
      last: The parameters whose products the array is made of, without another product in between.
    """

    views: Mapping[tuple[str, int], View] = {}
    data: bool = False
    last: frozenset[int] = frozenset()

    def of(self, kind: str) -> dict[int, View]:
        """The views of a kind, by parameter."""
        return {leaf: view for (of, leaf), view in self.views.items() if of == kind}


@dataclass
class Facts:
    """What the interpretation has found out about the parameters, by their index.

    Attributes:
      shapes: The shapes of the parameters.
      constant: The value of constants.
      uses: The roles of a parameter's axes in its products, and the kind of product for each.
      looked_up: The axes along which the inputs choose rows of a parameter.
      selected: The parameters of which the inputs choose matrices for a product.
      apart: The axes that are taken apart, or are a batch axis, after a product.
      followed: The parameters whose products are followed by another parameter's product.
      sums: The `last` of both terms of every sum.
      entrywise: The parameters that are added or multiplied entry by entry.
      lost: Why a parameter could not be followed further.
    """

    shapes: Sequence[tuple[int, ...]]
    constant: Value = field(default_factory=Value)
    uses: dict[int, dict[Roles, str]] = field(default_factory=dict)
    looked_up: dict[int, set[int]] = field(default_factory=dict)
    selected: set[int] = field(default_factory=set)
    apart: dict[int, set[int]] = field(default_factory=dict)
    followed: set[int] = field(default_factory=set)
    sums: set[tuple[frozenset[int], frozenset[int]]] = field(default_factory=set)
    entrywise: set[int] = field(default_factory=set)
    lost: dict[int, str] = field(default_factory=dict)

    def use(self, leaf: int, view: View, roles: Sequence[str], what: str) -> None:
        """Notes a product that gives the axes of a view these roles."""
        of_axis: list[set[str]] = [set() for _ in self.shapes[leaf]]
        for factors, role in zip(view.axes, roles, strict=True):
            for axis in axes_of(factors):
                of_axis[axis].add(role)
        for axis in view.batch:
            of_axis[axis].add(BATCH)
        # Axes of size one may have been dropped on the way.
        found = tuple(frozenset(roles or {BATCH}) for roles in of_axis)
        self.uses.setdefault(leaf, {}).setdefault(found, what)

    def take_apart(self, value: Value, axis: int, size: int = 1) -> None:
        """Notes that an axis of a product is taken apart into parts of this size."""
        for leaf, view in value.of(PRODUCT).items():
            for factor in indexed_factors(view.axes[axis], size):
                of_leaf = factor.axes[0] if len(factor.axes) == 1 else None
                if of_leaf is not None and factor.size == self.shapes[leaf][of_leaf]:
                    self.apart.setdefault(leaf, set()).add(of_leaf)

    def put_together(self, parts: Sequence[Value], axis: int) -> None:
        """Notes that parts of an axis of a product make the whole axis again, as in a roll."""
        products = [part.of(PRODUCT) for part in parts]
        for leaf in set(products[0]).intersection(*products[1:]):
            factors = [factor for views in products for factor in views[leaf].axes[axis]]
            size = sum(factor.size for factor in factors)
            whole = {of for of in axes_of(factors) if self.shapes[leaf][of] == size}
            if len(parts) == len(factors) < size:  # parts of one index each may still go apart
                self.apart.get(leaf, set()).difference_update(whole)

    def lose(self, value: Value, why: str) -> None:
        """Notes that the parameters in a value cannot be followed."""
        for kind in (IS, LOOKED_UP):
            for leaf in value.of(kind):
                self.lost.setdefault(leaf, why)


def parameter(leaf: int, shape: tuple[int, ...]) -> Value:
    """Returns the value of a parameter."""
    return Value({(IS, leaf): View(tuple((Factor((a,), n),) for a, n in enumerate(shape)))})


# Views: what a change of shape does to them.


def axes_of(factors: Iterable[Factor]) -> set[int]:
    return {axis for factor in factors for axis in factor.axes}


def is_mapped(factors: Iterable[Factor]) -> bool:
    return any(factor.axes for factor in factors)


def plain(size: int) -> tuple[Factor, ...]:
    """Returns the factors of an axis that belongs to no parameter."""
    return (Factor((), size),)


def shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def indexed_factors(factors: Iterable[Factor], size: int) -> list[Factor]:
    """Returns the major factors of which a part of this size has one index each."""
    large = [factor for factor in factors if factor.size > 1]
    for count in range(1, len(large) + 1):
        if math.prod(factor.size for factor in large[count:]) == size:
            return large[:count]
    return []


def resized(factors: tuple[Factor, ...], size: int) -> tuple[Factor, ...]:
    """Returns the factors of an axis after a part is taken or something is added."""
    if math.prod(factor.size for factor in factors) == size:
        return factors
    return (Factor(tuple(sorted(axes_of(factors))), size),)


def regrouped(
    axes: Iterable[tuple[Factor, ...]], shape: tuple[int, ...]
) -> tuple[tuple[Factor, ...], ...] | None:
    """Returns the factors of each axis after a reshape, or None if it cuts across factors."""
    factors = [factor for axis in axes for factor in axis if factor.size > 1][::-1]
    regrouped = []
    for size in shape:
        group = []
        while size > 1 and factors:
            factor = factors.pop()
            major = math.gcd(factor.size, size)
            if major not in (factor.size, size):
                return None
            group.append(Factor(factor.axes, major))
            if factor.size > major:
                factors.append(Factor(factor.axes, factor.size // major))
            size //= major
        regrouped.append(tuple(group))
    return tuple(regrouped)


def map_views(value: Value, change: Callable[[View], View | None]) -> Value:
    """Returns the value after a change of shape, without views that the change makes None."""
    changed = ((key, change(view)) for key, view in value.views.items())
    return value._replace(views={key: view for key, view in changed if view is not None})


def without(value: Value, axes: Iterable[int]) -> Value:
    """Removes axes; the axes of a parameter in them become batch axes."""
    gone = set(axes)

    def change(view: View) -> View:
        batch = view.batch.union(*(axes_of(view.axes[axis]) for axis in gone))
        kept = tuple(factors for axis, factors in enumerate(view.axes) if axis not in gone)
        return View(kept, batch)

    return map_views(value, change) if value.views else value


def inserted(value: Value, axis: int, size: int) -> Value:
    return map_views(
        value, lambda v: v._replace(axes=(*v.axes[:axis], plain(size), *v.axes[axis:]))
    )


def sized_as(value: Value, atom: Any) -> Value:
    """Returns the same axes with the sizes of the variable that holds the value."""
    return map_views(value, lambda v: v._replace(axes=tuple(map(resized, v.axes, shape_of(atom)))))


def cut(facts: Facts, value: Value, array: Any, part: Any) -> Value:
    """Returns the value of a part or an extension of an array: same axes, other sizes."""
    sizes = list(zip(shape_of(array), shape_of(part), strict=True))
    for axis, (before, after) in enumerate(sizes):
        if after < before:
            facts.take_apart(value, axis, after)

    def change(view: View) -> View:
        axes, batch = [], set(view.batch)
        for factors, (before, after) in zip(view.axes, sizes, strict=True):
            if 1 < after < before:
                indexed = indexed_factors(factors, after)
                batch |= axes_of(indexed)
                factors = tuple(factor for factor in factors if factor not in indexed)
            axes.append(resized(factors, after))
        return View(tuple(axes), frozenset(batch))

    return map_views(value, change) if value.views else value


def spread_axes(value: Value, shape: tuple[int, ...]) -> set[int]:
    """Returns the axes along which all entries are the same."""
    mark = value.views.get(SPREAD)
    return {
        axis
        for axis, size in enumerate(shape)
        if size == 1 or (mark is not None and all(factor.axes for factor in mark.axes[axis]))
    }


def mark(shape: tuple[int, ...], axes: set[int]) -> View:
    return View(tuple((Factor((0,) * (a in axes), n),) for a, n in enumerate(shape)))


def broadcast(
    value: Value, old: tuple[int, ...], new: tuple[int, ...], onto: Sequence[int]
) -> Value:
    """Axis i of `old` becomes axis `onto[i]` of `new`; the array is the same along all others."""
    if old == new:
        return value
    source = {to: axis for axis, to in enumerate(onto) if old[axis] == new[to]}

    def change(view: View) -> View:
        axes = (view.axes[source[a]] if a in source else plain(n) for a, n in enumerate(new))
        return view._replace(axes=tuple(axes))

    spread = spread_axes(value, old)
    spread = {axis for axis in range(len(new)) if source.get(axis) in (None, *spread)}
    moved = map_views(value, change)
    return moved._replace(views={**moved.views, SPREAD: mark(new, spread)})


def merged_views(facts: Facts, views: Iterable[dict[int, View]], kind: str) -> dict[Any, View]:
    """Merges the views of several values, without parameters whose views differ."""
    merged: dict[int, View] = {}
    torn: set[int] = set()
    for of_value in views:
        for leaf, view in of_value.items():
            if merged.setdefault(leaf, view) != view:
                torn.add(leaf)
                if kind == IS:
                    facts.lost.setdefault(leaf, "it is combined with itself in another shape")
    return {(kind, leaf): view for leaf, view in merged.items() if leaf not in torn}


def mixture(values: Iterable[Value]) -> Value:
    """Returns the value of all that went into an array, without views."""
    values = list(values)
    return Value(
        data=any(value.data for value in values),
        last=frozenset().union(*(value.last for value in values)),
    )


def either(facts: Facts, values: Sequence[Value]) -> Value:
    """Returns the value of an array that is one of several, as the branches of a condition are."""
    mixed = mixture(values)
    if mixed.data:
        facts.entrywise.update(leaf for value in values for leaf in value.of(IS))
    kinds = (LOOKED_UP, PRODUCT) if mixed.data else (IS, LOOKED_UP, PRODUCT)
    views: dict[Any, View] = {}
    for kind in kinds:
        views |= merged_views(facts, (value.of(kind) for value in values), kind)
    return mixed._replace(views=views)
