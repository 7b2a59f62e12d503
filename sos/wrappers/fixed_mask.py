"""Fixed masks."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos import noise
from sos.arguments import check_integer, check_number
from sos.masks import keep_count, top_k_mask_host
from sos.registry import register
from sos.wrappers import dead_weights
from sos.wrappers.masked import MaskedWrapper
from sos.wrappers.sparse_weight import SparseWeight


@register
class FixedMask(MaskedWrapper):
    """Trains with a mask that does not change.

    It serves to fine-tune pruned models, to train sparse models from scratch,
    and to train lottery tickets. By default weights that are zero when the
    layer is wrapped stay zero, as for fine-tuning a stripped model. With
    `sparsity` the mask is random; below 1 it keeps at least one weight of each
    tensor. `sos.set_masks` sets any mask, and `sos.prune` masks by magnitude.

    It warns if the sparsity leaves no weight of a tensor, and if a tensor that
    was all zero is trained.

    Args:
        layer: The layer to wrap.
        sparsity: Fraction of zeros of a random mask, in [0, 1]; None to keep
            the zeros of the layer's weights.
        seed: Seed of the random mask, an integer.
        **kwargs: As for `SparseWrapper`.

    Raises:
        UsageError: If `sparsity` or `seed` is out of range.

    Example: fine-tuning a pruned model.
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> pruned = sos.strip(sos.prune(model, 0.75))
    >>> sparse = sos.sparsify(pruned, "FixedMask")
    >>> sos.sparsity_report(sparse).sparsity
    0.75
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        sparsity: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if sparsity is not None:
            sparsity = check_number(
                "sparsity", sparsity, "[0, 1]", ", the fraction of zeros"
            )
        seed = check_integer("seed", seed, minimum=-(2**31))
        super().__init__(layer, **kwargs)
        self.sparsity = sparsity
        self.seed = seed
        # Paths of weights that were all zero. They warn only when trained, as
        # their values may be loaded after the layer is wrapped.
        self._zeros: frozenset[str] = frozenset()

    def weights_changed(self) -> None:
        """Computes the masks from the dense weights."""
        masks = []
        zeros = set()
        for weight in self.sparse_weights:
            if self.sparsity is None:
                value = keras.ops.convert_to_numpy(weight.value)
                masks.append(value != 0)
                if value.size and not masks[-1].any():
                    zeros.add(weight.path)
            else:
                shape = tuple(weight.variable.shape)
                size = math.prod(shape)
                count = keep_count(size, self.sparsity)
                if not count and size and self.sparsity < 1:
                    count = 1
                    dead_weights.warn_kept(
                        self, weight, self.sparsity, count, "`sparsity=1`"
                    )
                masks.append(random_mask(weight.path, shape, count, self.seed))
        self.set_masks(masks)
        self._zeros = frozenset(zeros)

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the masked weight."""
        if weight.path in self._zeros:
            self._zeros -= {weight.path}
            # Eagerly, also while a training step is traced.
            with tf.init_scope():
                mask = weight.state["mask"].value
                if not tf.reduce_any(mask > 0):
                    dead_weights.warn_of_zeros(self, weight)
        return super().training_weight(weight)

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the masked weight."""
        return super().training_weight(weight)

    def target_sparsity(self) -> float | None:
        """Returns the sparsity of a random mask, None for other masks."""
        return self.sparsity

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's configuration, for `from_config`."""
        return {
            **super().get_config(),
            "sparsity": self.sparsity,
            "seed": self.seed,
        }


def random_mask(
    path: str, shape: Sequence[int], count: int, seed: int
) -> np.ndarray:
    """Returns a mask that is a function of the weight's path and the seed.

    Args:
        path: Path of the weight.
        shape: Shape of the weight.
        count: Number of elements to keep.
        seed: Any integer.

    Returns:
        A uint8 array of zeros and ones.
    """
    generator = np.random.Generator(
        # NumPy's seeds are not negative.
        np.random.Philox([seed % 2**32, noise.text_id(path)])
    )
    scores = generator.random(tuple(shape), dtype=np.float32)
    return top_k_mask_host(scores, count)
