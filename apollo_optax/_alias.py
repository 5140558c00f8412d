"""APOLLO, APOLLO-Mini and SWAN, each a transformation with weight decay and a learning rate."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from apollo_optax._apollo import Granularity, Implementation, scale_by_apollo
from apollo_optax._arguments import require_number, require_static
from apollo_optax._leaves import FACTORED_SIDE, Vocabulary, is_full_size
from apollo_optax._matrices import WeightDimensionNumbers, axes_of_each_leaf
from apollo_optax._names import default_dimension_numbers
from apollo_optax._paths import Path, named_leaves
from apollo_optax._projections import Projection
from apollo_optax._swan import scale_by_swan


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    *,
    update_proj_gap: int = 200,
    scale: ArrayLike = 1.0,
    granularity: Granularity = "channel",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    norm_growth_limit: ArrayLike | None = 1.01,
    projection: Projection | Callable[..., Array] | None = None,
    key: int | PRNGKeyArray = 0,
    mu_dtype: Any = None,
    vocabulary: Vocabulary = "adam",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    implementation: Implementation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    vocabulary_learning_rate: optax.ScalarOrSchedule | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO trains like AdamW, but its moments are of a random projection of the gradient.

    The optimizer is `chain(scale_by_apollo, add_decayed_weights, scale_by_learning_rate)`;
    `scale_by_apollo` has the equations. Leaves that are not matrices are trained with Adam:
    embeddings, heads, norms and biases. These leaves may have a learning rate and a weight decay of
    their own.

    The optimizer state of a matrix with larger side n has `2 * rank * n + 1` numbers. The state of
    any other leaf has two numbers for each weight and one for each index of the leaf's first axis
    (one in all if the leaf has a single axis), or what `vocabulary` says.

    Args:
      learning_rate: The learning rate, a number or an Optax schedule. The paper pre-trains with
        0.01, ten times the rate of AdamW.
      rank: The number of rows of the projection. The paper takes a quarter of the hidden size.
      update_proj_gap: The number of steps between two projections.
      scale: The factor of the projected updates, the paper's alpha. The paper takes 1, and 1/2 for
        models of 1B parameters and more.
      granularity: "channel", "tensor" or a function, as in `scale_by_apollo`.
      b1: The decay of the first moment.
      b2: The decay of the second moment.
      eps: The number added to the root of the second moment.
      norm_growth_limit: The largest ratio of the norms of a matrix's consecutive updates. None
        means no limit.
      projection: `gaussian` (None means this one), `rademacher`, `svd` or a function of your own.
      key: The seed or the PRNG key of the projections.
      mu_dtype: The dtype of the first moment.
      vocabulary: The rule for leaves of full size that are not matrices, such as embedding tables
        and output heads: "adam" (the paper), "factored" (about V + d numbers for a table of shape
        (V, d)) or "factored_momentum", as in `scale_by_apollo`.
      weight_dimension_numbers: The axes that make a matrix, as in `scale_by_apollo`. Use
        `transformer_dimension_numbers` for the transformers of Flax.
      implementation: A kernel of `apollo_optax.experimental`. None means XLA's own program.
      weight_decay: The decoupled weight decay, a number or a schedule, which is multiplied by the
        learning rate.
      adam_learning_rate: The learning rate of the leaves that are not matrices, a number or a
        schedule. None means `learning_rate`.
      adam_weight_decay: The weight decay of the leaves that are not matrices, which is multiplied
        by their learning rate. None means `weight_decay`.
      vocabulary_learning_rate: The learning rate of the leaves that `vocabulary` applies to, a
        number or a schedule, for each of the rules. None means `adam_learning_rate`.
      mask: The leaves that are decayed, as a tree of booleans or a function of the parameters that
        returns one.

    Returns:
      A gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If an argument is out of range.

    References:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, MLSys 2025,
      https://arxiv.org/abs/2412.05270

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import apollo
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> tx = apollo(0.01, rank=2)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
      >>> updates, state = jax.jit(tx.update)(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    return optax.chain(
        scale_by_apollo(
            rank,
            update_proj_gap,
            scale,
            granularity,
            b1=b1,
            b2=b2,
            eps=eps,
            norm_growth_limit=norm_growth_limit,
            projection=projection,
            key=key,
            mu_dtype=mu_dtype,
            vocabulary=vocabulary,
            weight_dimension_numbers=weight_dimension_numbers,
            implementation=implementation,
        ),
        *_decay_and_learning_rate(
            (learning_rate, adam_learning_rate, vocabulary_learning_rate),
            (weight_decay, adam_weight_decay),
            mask,
            weight_dimension_numbers,
        ),
    )


def _decay_and_learning_rate(
    learning_rates: tuple[optax.ScalarOrSchedule | None, ...],
    weight_decays: tuple[optax.ScalarOrSchedule | None, ...],
    mask: PyTree | Callable[[PyTree], PyTree] | None,
    weight_dimension_numbers: WeightDimensionNumbers,
) -> tuple[optax.GradientTransformation, ...]:
    """Returns what follows the direction: one chain for all leaves, or one for each kind of leaf.

    The kinds are matrices, leaves of full size that are not matrices, and all other leaves. None
    stands for the number or schedule before it.
    """
    for name, decay in zip(("weight_decay", "adam_weight_decay"), weight_decays, strict=True):
        is_optional = name == "adam_weight_decay"
        if not (callable(decay) or (decay is None and is_optional)):
            require_number(name, decay, at_least=0)
    require_static("mask", mask, "None, a tree of booleans or a function of the parameters")
    if weight_dimension_numbers is None:
        weight_dimension_numbers = default_dimension_numbers

    def chain(learning_rate: Any, weight_decay: Any) -> tuple[optax.GradientTransformation, ...]:
        decayed = optax.add_decayed_weights(weight_decay, mask)
        return decayed, optax.scale_by_learning_rate(learning_rate)

    def labels(tree: PyTree) -> PyTree:
        axes = axes_of_each_leaf(weight_dimension_numbers, tree, quiet=True)
        named, treedef = named_leaves(tree)

        def kind(path: Path, leaf: Any) -> str:
            if axes.get(path):
                return "matrix"
            return "vocabulary" if is_full_size(jnp.shape(leaf), None) else "other"

        return treedef.unflatten(kind(*leaf) for leaf in named)

    rate, *other_rates = learning_rates
    decay, other_decay = weight_decays
    if (*other_rates, other_decay) == (None, None, None):
        return chain(rate, decay)
    rate_of_others, rate_of_vocabulary = other_rates
    rate_of_others = rate if rate_of_others is None else rate_of_others
    if rate_of_vocabulary is None:
        rate_of_vocabulary = rate_of_others
    other_decay = decay if other_decay is None else other_decay
    chains = {
        "matrix": optax.chain(*chain(rate, decay)),
        "other": optax.chain(*chain(rate_of_others, other_decay)),
        "vocabulary": optax.chain(*chain(rate_of_vocabulary, other_decay)),
    }
    partition = optax.partition(chains, labels)

    def init(params: PyTree) -> optax.OptState:
        kinds = set(jax.tree.leaves(labels(params)))
        if other_rates[1] is not None and kinds and "vocabulary" not in kinds:
            warnings.warn(
                f"vocabulary_learning_rate reaches no leaf: matrices aside, no leaf has "
                f"{FACTORED_SIDE} indices or more on each of its last two axes. Use "
                f"adam_learning_rate for smaller leaves.",
                stacklevel=3,
            )
        return partition.init(params)

    return (optax.GradientTransformationExtraArgs(init, partition.update),)


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    update_proj_gap: int = 200,
    scale: ArrayLike = 128**0.5,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    norm_growth_limit: ArrayLike | None = 1.01,
    projection: Projection | Callable[..., Array] | None = None,
    key: int | PRNGKeyArray = 0,
    mu_dtype: Any = None,
    vocabulary: Vocabulary = "adam",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    implementation: Implementation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    vocabulary_learning_rate: optax.ScalarOrSchedule | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini is `apollo` at rank 1 with one factor for each matrix, at the memory of SGD.

    The optimizer state of a matrix with larger side n has `2 * n + 1` numbers. The arguments, the
    result and the errors are those of `apollo`. The paper pre-trains with a `scale` of sqrt(128).

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax import apollo_mini
      >>> state = apollo_mini(0.01).init({"kernel": jnp.ones((8, 16))})
      >>> state[0].mu["kernel"].shape, state[0].norm["kernel"].shape
      ((1, 16), ())
    """
    return apollo(
        learning_rate,
        1,
        update_proj_gap=update_proj_gap,
        scale=scale,
        granularity="tensor",
        b1=b1,
        b2=b2,
        eps=eps,
        norm_growth_limit=norm_growth_limit,
        projection=projection,
        key=key,
        mu_dtype=mu_dtype,
        vocabulary=vocabulary,
        weight_dimension_numbers=weight_dimension_numbers,
        implementation=implementation,
        weight_decay=weight_decay,
        adam_learning_rate=adam_learning_rate,
        adam_weight_decay=adam_weight_decay,
        vocabulary_learning_rate=vocabulary_learning_rate,
        mask=mask,
    )


def swan(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: Any = None,
    vocabulary: Vocabulary = "factored",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    vocabulary_learning_rate: optax.ScalarOrSchedule | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SWAN updates each matrix by its whitened gradient, and keeps no state of the matrix.

    The optimizer is `chain(scale_by_swan, add_decayed_weights, scale_by_learning_rate)`. With the
    default rule for the vocabulary, the optimizer state is 0.2% of AdamW's for a transformer of a
    million parameters, and 0.005% for LLaMA-7B.

    The entries of an update have a size of about 1, and no momentum averages the updates. Begin at
    twice AdamW's learning rate. The vocabulary and the norms gain from higher rates of their own,
    `vocabulary_learning_rate` and `adam_learning_rate`. The other arguments, the result and the
    errors are those of `apollo`.

    References:
      Ma et al., SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training, ICML
      2025, https://arxiv.org/abs/2412.13148

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax import describe, swan
      >>> params = {"embed": jnp.ones((1024, 128)), "mlp": {"kernel": jnp.ones((128, 344))}}
      >>> tx = swan(0.004, vocabulary_learning_rate=0.016)
      >>> print(describe(params, tx))
      parameter        shape        numbers of state  bytes  over AdamW's
      embed            (1024, 128)             1,153  4,612        0.0044
      mlp/kernel       (128, 344)                  3     12        0.0000
      counts and keys                                    12
      sum                                             4,636        0.0033
    """
    return optax.chain(
        scale_by_swan(
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=mu_dtype,
            vocabulary=vocabulary,
            weight_dimension_numbers=weight_dimension_numbers,
        ),
        *_decay_and_learning_rate(
            (learning_rate, adam_learning_rate, vocabulary_learning_rate),
            (weight_decay, adam_weight_decay),
            mask,
            weight_dimension_numbers,
        ),
    )
