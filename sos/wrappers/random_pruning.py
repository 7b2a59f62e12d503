"""Random pruning."""

from typing import Any

import keras
import tensorflow as tf

from sos import noise
from sos.registry import register
from sos.wrappers.hyperparameters import Hyperparameter
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.sparse_weight import SparseWeight


@register
class RandomPruning(PruningWrapper):
    """Prunes random weights permanently: a baseline for any ranking.

    Each weight has one random score in [0, 1) for the whole run, so that an
    update prunes a uniform sample of the remaining weights. This is the "random
    cumulative" pruning of Gale et al. 2019, which their published code does not
    implement. Each tensor keeps at least one weight
    (`PerTensorRanking(min_kept=...)`).

    Args:
        layer: The layer to wrap.
        seed: Seed of the scores, an integer. They also depend on the paths of
            the weights: name the layers to get the same scores again.
        **kwargs: As for `PruningWrapper`; `sparsity` is one of them.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(
    ...     model, "RandomPruning", sparsity=0.5, end_step=1000, seed=1
    ... )
    >>> sparse.layers[0].techniques[0].target_sparsity()
    0.5
    """

    seed = Hyperparameter("int32")
    cumulative = True

    def __init__(
        self, layer: keras.layers.Layer, *, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(layer, **kwargs)
        self.seed = seed

    def scores(self, weight: SparseWeight) -> tf.Tensor:
        """Returns scores uniform in [0, 1), and -1 for pruned weights."""
        scores = tf.random.stateless_uniform(
            weight.variable.shape,
            seed=tf.stack(
                [self.hyperparameter("seed"), noise.text_id(weight.path)]
            ),
            # The default differs between devices, and between compiled and
            # other code on one device.
            alg="philox",
        )
        return tf.where(weight.state["mask"].value > 0, scores, -1.0)
