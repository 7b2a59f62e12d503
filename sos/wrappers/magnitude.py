"""Magnitude pruning."""

import tensorflow as tf

from sos.registry import register
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.sparse_weight import SparseWeight


@register
class MagnitudePruning(PruningWrapper):
    """Keeps the weights of the largest magnitude (Zhu and Gupta 2017).

    Each tensor is ranked separately, by the magnitudes of its dense weights,
    including those pruned before: a weight comes back when others shrink below
    it. Exactly `round(size * (1 - sparsity))` weights are kept, but at least
    one (`PerTensorRanking(min_kept=...)`). A tensor whose magnitudes are all
    equal, such as one initialized with zeros, keeps its mask.

    Differences from the code of Gale et al. 2019: ties are broken by position,
    so that the number of weights is exact, and the update at the schedule's
    last step always runs.

    The arguments are those of `sos.extend.PruningWrapper`.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(
    ...     model, "MagnitudePruning", sparsity=0.75, end_step=8, frequency=1
    ... )
    >>> sparse.compile("sgd", "mse")
    >>> history = sparse.fit(
    ...     keras.ops.ones((8, 4)),
    ...     keras.ops.ones((8, 2)),
    ...     batch_size=1,
    ...     verbose=0,
    ...     callbacks=[sos.SparsityCallback()],
    ... )
    >>> sos.sparsity_report(sparse).sparsity
    0.75
    """

    def scores(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the absolute values of the dense weight."""
        return tf.abs(weight.value)
