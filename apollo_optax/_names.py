"""Finds the matrices of a transformer by the names that Flax gives its parameters."""

from typing import Any

import jax
from jaxtyping import PyTree

from apollo_optax._arguments import require_tree_not_count
from apollo_optax._matrices import ApolloDimensionNumbers
from apollo_optax._paths import Path, named_leaves

_DENSE_GENERAL = {
    "query": ApolloDimensionNumbers(-3, (-2, -1)),
    "key": ApolloDimensionNumbers(-3, (-2, -1)),
    "value": ApolloDimensionNumbers(-3, (-2, -1)),
    "out": ApolloDimensionNumbers((-3, -2), -1),
}
_DENSE = ApolloDimensionNumbers(-2, -1)
_KERNELS = ("kernel", "wi", "wi_0", "wi_1", "wo")
_EMBEDDINGS = (
    "embed",
    "embedding",
    "embeddings",
    "embed_tokens",
    "token_embed",
    "position_embed",
    "wte",
    "wpe",
)
_HEADS = ("head", "lm_head", "logits", "logits_dense", "unembed", "unembedding", "classifier")


def transformer_dimension_numbers(params: PyTree, *, project_embeddings: bool = False) -> PyTree:
    """Finds the matrices of a transformer by the names Flax gives them.

    - `kernel` of Dense and of scanned or expert Dense, (..., in, out): the last two axes are the
      matrix, all others batch axes; likewise mixture-of-experts weights named `wi`, `wi_0`, `wi_1`,
      `wo`.
    - `kernel` of DenseGeneral in attention: `query`, `key`, `value` (..., embed, heads, head_dim)
      and `out` (..., heads, head_dim, embed). Three axes that do not fit together as attention
      kernels (`out` against `query`) are taken for scanned Dense kernels of those names.
    - Embeddings, output heads, convolutions, biases and norms are left to Adam, as in the paper.

    Args:
      params: Parameters, bare or boxed; arrays or ShapeDtypeStructs.
      project_embeddings: Project embedding tables (vocabulary, embed) and output heads too. Beyond
        the paper: no full-size moments are left in the optimizer state.

    Returns:
      A tree of `params`' structure with `ApolloDimensionNumbers`, or None for a leaf left to Adam.
      Pass it, or this function itself, as `weight_dimension_numbers`.

    Raises:
      TypeError: A step count in place of parameters, as from `optax.inject_hyperparams`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.zeros((12, 64, 256)), "bias": jnp.zeros((12, 256))}}
      >>> transformer_dimension_numbers(params)["mlp"]
      {'bias': None, 'kernel': ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    require_tree_not_count("transformer_dimension_numbers", params)
    named, treedef = named_leaves(params)
    leaves = dict(named)
    specs = [_transformer_spec(path, leaves, project_embeddings) for path in leaves]
    return jax.tree.unflatten(treedef, specs)


def _transformer_spec(
    path: Path, leaves: dict[Path, Any], project_embeddings: bool
) -> ApolloDimensionNumbers | None:
    leaf, name = leaves[path], path[-1] if path else ""
    module = path[-2] if len(path) > 1 else ""
    if leaf.ndim < 2:
        return None
    is_head = any(part in _HEADS for part in path) or path in (
        ("output", "kernel"),
        ("params", "output", "kernel"),
    )
    if is_head or name == "embedding" or any(part in _EMBEDDINGS for part in path[:-1]):
        return _DENSE if project_embeddings and name in ("embedding", "kernel") else None
    if name not in _KERNELS or module.lower().startswith("conv"):
        return None
    if module in _DENSE_GENERAL and leaf.ndim > 2 and _is_dense_general(path[:-2], leaves):
        return _DENSE_GENERAL[module]
    return _DENSE


def _is_dense_general(attention: Path, leaves: dict[Path, Any]) -> bool:
    query, out = (leaves.get((*attention, name, "kernel")) for name in ("query", "out"))
    if query is None or out is None or query.ndim < 3 or out.ndim < 3:
        return True
    return query.shape[-2:] == out.shape[-3:-1]
