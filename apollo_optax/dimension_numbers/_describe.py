"""A table of what an optimizer will keep for each parameter."""

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from apollo_optax._apollo import scale_by_apollo
from apollo_optax._matrices import MatrixAxes, axes_of_each_leaf, matrix_axes
from apollo_optax._names import default_dimension_numbers
from apollo_optax._paths import Path, named_leaves, spell
from apollo_optax.dimension_numbers._infer import (
    ELEMENTWISE,
    MATRIX,
    UNKNOWN,
    VOCABULARY,
    placements,
)


class Row(NamedTuple):
    """A parameter, or parameters of several layers whose paths differ only in numbers.

    Attributes:
      path: The path, with "*" for numbers that differ.
      copies: The number of parameters.
      shape: The shape of each parameter.
      kind: "matrix", "vocabulary", "elementwise" or "unknown", and "" if neither the model nor the
        specifications say it.
      axes: The axes of the parameter as a matrix.
      reason: What the model does with the parameter.
      state_numbers: The count of numbers in the optimizer state of all copies.
      state_bytes: The bytes of the optimizer state of all copies.
      over_adamw: `state_bytes`, divided by the bytes of AdamW's float32 moments.
    """

    path: str
    copies: int
    shape: tuple[int, ...]
    kind: str
    axes: str
    reason: str
    state_numbers: int
    state_bytes: int
    over_adamw: float


class Description(Sequence[Row]):
    """Rows that print as a table, on a terminal and in a notebook.

    Attributes:
      rows: The rows, one for each parameter. Equal layers share a row.
      rest_bytes: The bytes of state that belongs to no parameter, such as counts and keys.
      state_bytes: The bytes of all state.
      over_adamw: The bytes of all state, divided by those of AdamW's float32 moments.
      remarks: Sentences on parameters that could not be placed, and on those that keep full-size
        state without being vocabularies.
    """

    def __init__(self, rows: list[Row], rest_bytes: int) -> None:
        self.rows = rows
        self.rest_bytes = rest_bytes
        self.state_bytes = rest_bytes + sum(row.state_bytes for row in rows)
        self.over_adamw = self.state_bytes / max(1, sum(map(_adamw_bytes, rows)))
        self.remarks = _remarks(rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[list[str]]:
        head = ["parameter", "shape", "kind", "axes", "numbers of state", "bytes", "over AdamW's"]
        cells = [
            [
                row.path + (f" x {row.copies}" if row.copies > 1 else ""),
                str(row.shape),
                row.kind,
                row.axes,
                f"{row.state_numbers:,}",
                f"{row.state_bytes:,}",
                f"{row.over_adamw:.4f}",
            ]
            for row in self.rows
        ]
        total = ["sum", "", "", "", "", f"{self.state_bytes:,}", f"{self.over_adamw:.4f}"]
        rest = ["counts and keys", *[""] * 4, f"{self.rest_bytes:,}", ""]
        columns = zip(head, *cells, rest, total, strict=True)
        return [list(row) for row in zip(*(c for c in columns if any(c[1:])), strict=True)]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if column >= len(row) - 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, *self.remarks])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = (
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._cells()
        )
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self.remarks)
        return f"<table>{''.join(rows)}</table>{remarks}"


def describe(
    params: PyTree,
    optimizer: Any,
    forward: Callable[..., Any] | None = None,
    *inputs: Any,
    rank: int | None = None,
) -> Description:
    """Shows what an optimizer will keep for each parameter.

    Nothing is allocated: the state is that of `jax.eval_shape(optimizer.init, params)`.

    Args:
      params: The parameters, bare or boxed, as arrays or ShapeDtypeStructs. Other leaves, such as
        Python's numbers, are left out.
      optimizer: Any Optax optimizer. Or specifications, as `weight_dimension_numbers` takes them,
        to show the state that `scale_by_apollo` keeps with them.
      forward: The model, as `infer_dimension_numbers` takes it. With the model, the rows have the
        kind and the axes of each parameter and the reason for them. Without the model, kinds and
        axes are those of the specifications.
      *inputs: The arguments of `forward` after the parameters.
      rank: The rank, with specifications. None means 1, the rank of APOLLO-Mini.

    Returns:
      A sequence of rows. `str` returns the table, and a notebook shows it. `remarks` names the
      parameters that could not be placed, and those that keep full-size state without being
      vocabularies.

    Raises:
      TypeError: If `rank` is given with an optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax import apollo, describe
      >>> layer = {"kernel": jnp.zeros((64, 256)), "bias": jnp.zeros(256)}
      >>> print(describe({"layers": [layer] * 12}, apollo(0.01, rank=16)))
      parameter             shape      numbers of state    bytes  over AdamW's
      layers/*/bias x 12    (256,)                6,156   24,624        1.0020
      layers/*/kernel x 12  (64, 256)            98,316  393,264        0.2500
      counts and keys                                         12
      sum                                                417,900        0.2616
    """
    is_optimizer = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if is_optimizer and rank is not None:
        raise TypeError(
            f"rank={rank!r} is only for specifications; an optimizer has its own rank, so leave "
            f"rank out."
        )
    arrays = jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, params)
    named = [(path, leaf) for path, leaf in named_leaves(params)[0] if _is_array(leaf)]
    axes: dict[Path, MatrixAxes | None] = {}
    if not is_optimizer:
        optimizer = default_dimension_numbers if optimizer is None else optimizer
        axes = axes_of_each_leaf(optimizer, arrays, quiet=True)
        optimizer = scale_by_apollo(1 if rank is None else rank, weight_dimension_numbers=optimizer)
    kinds: dict[Path, tuple[str, str, str]] = {
        path: (MATRIX if of_leaf else "", _axes(of_leaf), "") for path, of_leaf in axes.items()
    }
    if forward is not None:
        placed = placements(forward, params, *inputs)
        for (path, leaf), at in zip(named_leaves(params)[0], placed, strict=True):
            inferred = matrix_axes(at.spec, leaf.shape, path) if at.kind == MATRIX else None
            kinds[path] = (at.kind, _axes(axes.get(path, inferred)), at.reason)
    state_of, rest = _state_of_each(jax.eval_shape(optimizer.init, arrays), dict(named))
    folded: dict[Any, list[tuple[Path, Any]]] = {}
    for path, leaf in named:
        numbers = sum(array.size for array in state_of[path])
        key = (
            re.sub(r"\d+", "*", spell(path)),
            np.shape(leaf),
            kinds.get(path, ("", "", "")),
            numbers,
        )
        folded.setdefault(key, []).append((path, leaf))
    rows = []
    for (pattern, shape, (kind, axes_said, reason), _), members in folded.items():
        states = [array for path, _ in members for array in state_of[path]]
        row = Row(
            pattern if len(members) > 1 else spell(members[0][0]),
            len(members),
            shape,
            kind,
            axes_said,
            reason,
            state_numbers=sum(array.size for array in states),
            state_bytes=sum(array.size * array.dtype.itemsize for array in states),
            over_adamw=0.0,
        )
        rows.append(row._replace(over_adamw=row.state_bytes / max(1, _adamw_bytes(row))))
    return Description(rows, sum(array.size * array.dtype.itemsize for array in rest))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _axes(axes: MatrixAxes | None) -> str:
    if axes is None:
        return ""
    named = {"projected": axes.projected, "channels": axes.channel, "batch": axes.batch}
    return ", ".join(f"{name} {' '.join(map(str, of))}" for name, of in named.items() if of)


def _state_of_each(
    state: PyTree, params: dict[Path, Any]
) -> tuple[dict[Path, list[Any]], list[Any]]:
    """Returns the arrays of the state that belong to each parameter, and the rest.

    An array belongs to the parameter with whose path the array's own path ends. Numbers in the path
    may be left out, since a wrapper may have taken the layers of a stacked leaf apart.
    """
    of_each: dict[Path, list[Any]] = {path: [] for path in params}
    rest: list[Any] = []
    for path, array in named_leaves(state)[0]:
        ends = [path[start:] for start in range(len(path) + 1)]
        ends += [tuple(name for name in end if not name.isdigit()) for end in ends]
        owner = next((end for end in ends if end in params), None)
        (rest if owner is None else of_each[owner]).append(array)
    return of_each, rest


def _adamw_bytes(row: Row) -> int:
    return 8 * row.copies * math.prod(row.shape)


def _remarks(rows: list[Row]) -> list[str]:
    said = [row for row in rows if len(row.shape) > 1 and row.kind not in (VOCABULARY, ELEMENTWISE)]
    remarks = [
        f"{row.path} {row.shape} could not be placed: {row.reason}; {row.state_bytes:,} bytes."
        for row in said
        if row.kind == UNKNOWN
    ]
    full = [
        row
        for row in said
        if row.kind != UNKNOWN and row.state_numbers >= 2 * row.copies * math.prod(row.shape)
    ]
    if full:
        remarks.append(
            f"{', '.join(row.path for row in full)}: {sum(row.state_bytes for row in full):,} "
            f"bytes, as many as with Adam: these parameters are not projected, or the rank is not "
            f"below their smaller side."
        )
    return remarks
