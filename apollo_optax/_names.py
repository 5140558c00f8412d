"""Finds the matrices of a transformer by the names that libraries give its parameters."""

import itertools
import re
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from apollo_optax._arguments import require_tree_not_count
from apollo_optax._matrices import ApolloDimensionNumbers, stacked_vectors
from apollo_optax._paths import Path, named_arrays, spell

_DENSE = ApolloDimensionNumbers(-2, -1)
_INTO_HEADS = ApolloDimensionNumbers(-3, (-2, -1))  # (embed, heads, head_dim)
_OUT_OF_HEADS = ApolloDimensionNumbers((-3, -2), -1)  # (heads, head_dim, embed)
_HEADS_FIRST = ApolloDimensionNumbers(-2, (-3, -1))  # (heads, embed, head_dim)

# Names of leaves, or of the modules of leaves that are called `w` or `kernel`.
_KERNELS = {"kernel", "wi", "wi_0", "wi_1", "wo"}
# Matrices if they have two axes: Haiku's (in, out), and Equinox's and PyTorch's (out, in).
_PLAIN = {"w": _DENSE} | dict.fromkeys(
    ("weight", "weight_ih", "weight_hh"), ApolloDimensionNumbers(-1, -2)
)
_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
_EINSUMS = {
    "q_einsum": _HEADS_FIRST,
    "kv_einsum": _HEADS_FIRST,
    "qkv_einsum": _HEADS_FIRST,
    "attn_vec_einsum": _OUT_OF_HEADS,
    "gating_einsum": _DENSE,
    "linear": _DENSE,
}
_INTO = {"query", "key", "value", "q_proj", "k_proj", "v_proj"}
_OUT = {"out", "o_proj"}
# With more than two axes, these names do not say what each axis is.
_UNTOLD = re.compile(r"(w?q?kv|wq|c_attn|patch)(_.*|$)|.*_output")
_VOCABULARIES = re.compile(
    r"(?!patch_).*embed(ding|dings|der|_tokens)?$|posembed.*|pos_embedding|wte|wpe|shared_embedding"
)
_HEADS = re.compile(r"(lm_|output_)head|(to_)?logits?(_?dense)?|unembed(ding)?")
# Also names of modules with several layers, even of a whole model. Heads only as a leaf's module.
_HEADS_OF_ONE_LAYER = re.compile(r"head|readout|classifier")
# At the top of a model only. Further down, they are modules of a layer.
_TOP_HEADS_AND_VOCABULARIES = {("output", "kernel"), ("output", "weight"), ("shared", "weight")}
# Neither matrices nor vocabularies, whatever their axes: the names of such leaves, and of modules.
_NORMS_AND_CONVOLUTIONS = re.compile(r".*norm\d*|conv(?!er).*|ln\d*(_.*)?|rms\d*")
_ELEMENTWISE = re.compile(r"bias|scale|offset|gamma|beta|cls|.*_bias")
# The longest side of a convolution's window.
LARGEST_WINDOW = 7
_LAYERS = re.compile(r"(.*_)?(layers|blocks)|h")


class Named(NamedTuple):
    """What a name says about a leaf.

    Attributes:
      spec: The axes, or None for a leaf that is left to Adam.
      known: Whether the name says anything.
      certain: Whether the name says more than that the leaf belongs to some layer.
    """

    spec: ApolloDimensionNumbers | None
    known: bool = True
    certain: bool = True


_UNKNOWN = Named(None, known=False)


def transformer_dimension_numbers(
    params: PyTree, *, project_embeddings: bool = False, layers_axis: int | None = None
) -> PyTree:
    """Finds the matrices of a transformer by the names that libraries give its parameters.

    The names of Flax and its examples, Gemma's einsums, Tunix, MaxText and Hugging Face's models in
    Flax are known. The weights of Haiku, Equinox and PyTorch are known if they have two axes.

    - In `kernel` of Dense and of scanned or expert Dense, (..., in, out), the last two axes are the
      matrix and all others are batch axes. The same holds for mixture-of-experts weights named
      `wi`, `wi_0`, `wi_1` and `wo`, and for `w` or `weight` with two axes. If a batch axis other
      than the layers' is longer than a side of the matrix, or if two batch axes look like the
      window of a convolution, the name is unknown.
    - `kernel` of DenseGeneral in attention is a matrix per layer: `query`, `key` and `value` (...,
      embed, heads, head_dim) and `out` (..., heads, head_dim, embed), also as `q_proj` to `o_proj`.
      If kernels of three axes do not fit together as attention kernels (`out` against `query`),
      they are taken for scanned Dense kernels.
    - Embeddings, output heads, convolutions, biases and norms are left to Adam, as in the paper.

    A leaf with two or more axes and an unknown name is left to Adam, with a warning.
    `infer_dimension_numbers` reads the axes off the model instead, and does not depend on names.

    Args:
      params: The parameters, bare or boxed, as arrays or ShapeDtypeStructs.
      project_embeddings: Whether to project embedding tables (vocabulary, embed) and output heads
        too. The paper does not. The optimizer state then has no full-size moments of them.
      layers_axis: The axis of stacked layers if it is not the first: 1 for MaxText's
        `param_scan_axis=1`. This axis is a batch axis of the leaves under `layers`, `blocks` or
        `h`.

    Returns:
      A tree of `params`' structure with `ApolloDimensionNumbers`, or None for a leaf left to Adam.
      Pass it, or this function itself, as `weight_dimension_numbers`.

    Raises:
      TypeError: If `params` is a step count, as `optax.inject_hyperparams` passes.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.zeros((12, 64, 256)), "bias": jnp.zeros((12, 256))}}
      >>> transformer_dimension_numbers(params)["mlp"]
      {'bias': None, 'kernel': ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    require_tree_not_count("transformer_dimension_numbers", params)
    named, treedef = named_arrays(params)
    found = by_name(named, project_embeddings=project_embeddings, layers_axis=layers_axis)
    warn_of_adams_state(
        [(path, leaf) for path, leaf in named if not found[path].known],
        "names that are not known",
    )
    return jax.tree.unflatten(treedef, [found[path].spec for path, _ in named])


def default_dimension_numbers(params: PyTree) -> PyTree:
    """Goes by names, and makes a matrix of any other leaf with two axes.

    This is what `weight_dimension_numbers=None` means. Stacked norms and biases are not matrices. A
    leaf with more than two axes and no known name is left to Adam, with a warning.
    """
    named, treedef = named_arrays(params)
    found = by_name(named)

    def spec_of(path: Path, leaf: Any) -> ApolloDimensionNumbers | None:
        if found[path].known or leaf.ndim != 2:
            return found[path].spec
        return ApolloDimensionNumbers()

    warn_of_adams_state(
        [(path, leaf) for path, leaf in named if not found[path].known and leaf.ndim > 2],
        "more than two axes and no known name",
    )
    return jax.tree.unflatten(treedef, [spec_of(path, leaf) for path, leaf in named])


def warn_of_adams_state(leaves: list[tuple[Path, Any]], why: str) -> None:
    """Warns once of all leaves that are left to Adam because they have no specification."""
    if not leaves:
        return
    moment_bytes = sum(2 * leaf.size * max(leaf.dtype.itemsize, 4) for _, leaf in leaves)
    named = ", ".join(f"{spell(path)} {tuple(leaf.shape)}" for path, leaf in leaves[:3])
    more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
    warnings.warn(
        f"{named}{more} have {why}: they are trained with Adam, and their moments take "
        f"{moment_bytes:,} bytes. To project them, pass weight_dimension_numbers: the result of "
        f"infer_dimension_numbers(forward, params, *inputs) or of dimension_numbers_from_rules, or "
        f"ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1) for stacks of (in, out). To "
        f"train them with Adam without this warning, give None as their entries.",
        stacklevel=4,
    )


def by_name(
    named: Iterable[tuple[Path, Any]],
    *,
    project_embeddings: bool = False,
    layers_axis: int | None = None,
) -> dict[Path, Named]:
    """Returns what the name of each leaf says; of stacked vectors, also what the shapes say."""
    named = list(named)
    leaves = [(path, _words(path), tuple(leaf.shape)) for path, leaf in named]
    vectors = stacked_vectors(named)

    def stacked_axis(names: Path, shape: tuple[int, ...]) -> int | None:
        if layers_axis is None or not shape or not _is_stacked(names):
            return None
        return layers_axis % len(shape)

    axes = {path: stacked_axis(names, shape) for path, names, shape in leaves}
    # The shapes of one layer, which the names describe.
    of_layer = {
        path: shape if (axis := axes[path]) is None else shape[:axis] + shape[axis + 1 :]
        for path, _, shape in leaves
    }
    siblings = {names: of_layer[path] for path, names, _ in leaves}
    found = {}
    for path, names, shape in leaves:
        axis, is_stacked = axes[path], _is_stacked(names)
        one = _named(
            names,
            of_layer[path],
            siblings,
            vocabulary=project_embeddings,
            stacked=is_stacked and axis is None,
        )
        # Leaves of (out, in), beside a convolution's, have one first axis too.
        if path in vectors and (not one.known or (is_stacked and not one.certain)):
            one = Named(None)
        if one.spec and axis is not None:
            one = one._replace(spec=_with_axis(one.spec, axis, len(shape)))
        found[path] = one
    return found


def _is_stacked(names: Path) -> bool:
    """Whether a leaf is under `layers`, and not under one layer of a list, as `layers/3`."""
    return any(
        _LAYERS.fullmatch(name) and not following.isdecimal()
        for name, following in itertools.pairwise(names)
    )


def _words(path: Path) -> Path:
    """Returns the names of a path, split where a library joined them: `blocks/mlp/kernel`."""
    return tuple(word for name in path for word in re.split(r"[/.]", name) if word)


def _with_axis(spec: ApolloDimensionNumbers, axis: int, ndim: int) -> ApolloDimensionNumbers:
    """Turns the specification of a leaf without an axis into that of the leaf with the axis."""

    def moved(axes: Any) -> tuple[int, ...]:
        each = (a % (ndim - 1) for a in (axes if isinstance(axes, tuple) else (axes,)))
        return tuple(a + (a >= axis) for a in each)

    return ApolloDimensionNumbers(moved(spec.reduction_axis), moved(spec.output_axis))


def _named(
    names: Path,
    shape: tuple[int, ...],
    shapes: dict[Path, tuple[int, ...]],
    *,
    vocabulary: bool,
    stacked: bool,
) -> Named:
    name = names[-1] if names else ""
    module = names[-2] if len(names) > 1 else ""
    axes = len(shape)
    dense = _PLAIN.get(name, _DENSE)
    if axes < 2 or _is_no_matrix(name) or _is_no_module_of_matrices(module.lower(), name):
        return Named(None)
    is_head = any(_HEADS.fullmatch(part) for part in names)
    is_head |= any(_HEADS_OF_ONE_LAYER.fullmatch(part) for part in names[-2:])
    is_head |= names[names[:1] == ("params",) :] in _TOP_HEADS_AND_VOCABULARIES
    # Of attention, it is the projection of its outputs.
    is_head |= module == "output_projection" and not any("att" in part.lower() for part in names)
    # The name of the leaf or of its module. A module further up, as `time_embedding`, has layers.
    if is_head or any(_VOCABULARIES.fullmatch(part) for part in names[-2:]):
        return Named(_DENSE if vocabulary and axes == 2 else None)
    if name in _EINSUMS or (module in _EINSUMS and name == "w"):
        spec = _EINSUMS[name if name in _EINSUMS else module]
        if "gating_einsum" in names[-2:] and _is_out_by_in(names, shape, shapes):
            spec = ApolloDimensionNumbers(-1, -2)
        return _UNKNOWN if axes == 2 and spec in (_HEADS_FIRST, _OUT_OF_HEADS) else Named(spec)
    if name in _PLAIN:
        if axes == 2:
            return Named(dense, certain=False)
        name = "kernel" if module in _INTO | _OUT else name
    if name in _EXPERTS and axes == 3:
        return Named(_DENSE)
    if name not in _KERNELS or (axes > 2 and _UNTOLD.match(module)):
        return _UNKNOWN
    if axes > 2 and (module in _INTO or module in _OUT):
        of_heads = _fits_heads(names, shape, shapes)
        if of_heads is None:
            return _UNKNOWN
        if of_heads:
            return Named(_INTO_HEADS if module in _INTO else _OUT_OF_HEADS)
    elif name == "kernel" and not _may_be_matrices(shape[stacked:-2], shape[-2:]):
        return _UNKNOWN
    return Named(dense)


def _may_be_matrices(batch: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    """Whether a kernel may be (experts, in, out): no window, and not (in, heads, head_dim)."""
    is_window = len(batch) > 1 and max(batch) <= LARGEST_WINDOW
    return not is_window and all(size <= min(matrix) for size in batch)


def _is_out_by_in(names: Path, shape: tuple[int, ...], shapes: dict[Path, tuple[int, ...]]) -> bool:
    """Whether Gemma's gates are (hidden, embed): `linear` beside them is, in all versions."""
    linear = shapes.get(tuple("linear" if name == "gating_einsum" else name for name in names))
    return linear is not None and shape[-2] != shape[-1] and shape[-2:] == linear[-2:]


def _is_no_matrix(name: str) -> bool:
    return bool(_ELEMENTWISE.fullmatch(name) or _NORMS_AND_CONVOLUTIONS.fullmatch(name))


def _is_no_module_of_matrices(module: str, name: str) -> bool:
    # A module `scale` may have a kernel, which computes the scale.
    if name in _KERNELS or name in _PLAIN:
        return bool(_NORMS_AND_CONVOLUTIONS.fullmatch(module))
    return _is_no_matrix(module)


def _fits_heads(
    names: Path, shape: tuple[int, ...], shapes: dict[Path, tuple[int, ...]]
) -> bool | None:
    """Whether attention kernels have axes of heads: `out` has those of the query or value.

    Returns None if the kernels fit neither as heads nor as stacked (in, out).
    """
    attention, leaf = names[:-2], names[-1]
    siblings = {module: shapes.get((*attention, module, leaf)) for module in sorted(_INTO | _OUT)}
    into = siblings["query"] or siblings["q_proj"]
    value = siblings["value"] or siblings["v_proj"] or into
    out = siblings["out"] or siblings["o_proj"]
    if into is None or out is None or len(into) < 3 or len(out) < 3:
        if names[-2] in ("query", "key", "value", "out"):
            return True
        return False if len(shape) == 3 and shape[0] <= min(shape[1:]) else None
    if into[-2:] == out[-3:-1] or (value and value[-2:] == out[-3:-1]):
        return True
    is_stack = len(into) == len(out) == 3 and into[0] == out[0]
    return False if is_stack else None
