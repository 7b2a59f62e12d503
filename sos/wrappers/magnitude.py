"""Magnitude pruning."""

import tensorflow as tf

from sos.registry import register
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.sparse_weight import SparseWeight


@register
class MagnitudePruning(PruningWrapper):
    """Keeps the weights of the largest magnitude (Zhu and Gupta 2017).

    The magnitudes are those of the raw weights, pruned ones too, and each
    tensor is ranked for itself: exactly `round(size * (1 - sparsity))` weights
    are kept, but at least one (`PerTensorRanking(min_kept=...)`). A pruned
    weight comes back when others shrink below it. A tensor whose magnitudes are
    all equal, such as one that is initialized with zeros, keeps its mask.

    Differences from Gale et al. 2019's code: ties are broken by position, so
    that the count is exact, and the update of the schedule's last step always
    runs.
    """

    def scores(self, weight: SparseWeight) -> tf.Tensor:
        """The absolute values of the raw weight."""
        return tf.abs(weight.value)
