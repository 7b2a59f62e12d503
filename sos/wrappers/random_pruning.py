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
    """Drops weights at random, and for good: the lower bound of any ranking.

    Each weight has one random score for the whole run, so that the weights that
    an update drops are drawn uniformly from those that are left. This is the
    "random cumulative" pruning of Gale et al. 2019, which their published code
    does not implement. Each tensor keeps at least one weight
    (`PerTensorRanking(min_kept=...)`).

    Args:
        layer: The layer to wrap.
        seed: Seed of the scores, an integer. They differ by the weights' paths,
            so name layers that are to draw the same scores again.
        **kwargs: As for `PruningWrapper`, `sparsity` among them.
    """

    seed = Hyperparameter("int32")
    cumulative = True

    def __init__(
        self, layer: keras.layers.Layer, *, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(layer, **kwargs)
        self.seed = seed

    def scores(self, weight: SparseWeight) -> tf.Tensor:
        """Uniform in [0, 1), and -1 for what is pruned already."""
        scores = tf.random.stateless_uniform(
            weight.variable.shape,
            seed=tf.stack(
                [self.hyperparameter("seed"), noise.text_id(weight.path)]
            ),
            alg=noise.ALGORITHM,
        )
        return tf.where(weight.state["mask"].value > 0, scores, -1.0)
