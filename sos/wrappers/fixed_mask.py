"""Training with a mask that never changes."""

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
    """Keeps a mask: fine-tuning, training from scratch, lottery tickets.

    By default the weights that are zero when the layer is wrapped stay zero,
    which is what fine-tuning a stripped model needs. With `sparsity` the mask
    is drawn at random; below 1 it keeps at least one weight of each tensor.
    `sos.set_masks` sets any other, and `sos.prune` one of magnitudes.

    A warning names a weight that keeps its last element only for that reason,
    and one that is trained although all its elements were zero and stay so.

    Args:
        layer: The layer to wrap.
        sparsity: Fraction of zeros of a random mask in [0, 1], or None to keep
            the layer's own zeros.
        seed: Seed of the random mask, an integer.
        **kwargs: As for `SparseWrapper`.

    Raises:
        UsageError: If `sparsity` or `seed` is out of range.
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
        # Paths of weights that were zero throughout. Often they are loaded
        # next, and only a weight that is trained as it is needs a warning.
        self._zeros: frozenset[str] = frozenset()

    def weights_changed(self) -> None:
        """Sets the masks anew from the dense weights."""
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
                generator = np.random.Generator(
                    np.random.Philox(
                        # NumPy takes no negative seeds.
                        [self.seed % 2**32, noise.text_id(weight.path)]
                    )
                )
                scores = generator.random(shape, dtype=np.float32)
                count = keep_count(scores.size, self.sparsity)
                if not count and scores.size and self.sparsity < 1:
                    count = 1
                    dead_weights.warn_kept(
                        self, weight, self.sparsity, count, "`sparsity=1`"
                    )
                masks.append(top_k_mask_host(scores, count))
        self.set_masks(masks)
        self._zeros = frozenset(zeros)

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The masked weight."""
        if weight.path in self._zeros:
            self._zeros -= {weight.path}
            # On the host, also while a training step is traced.
            with tf.init_scope():
                mask = weight.state["mask"].value
                if not tf.reduce_any(mask > 0):
                    dead_weights.warn_of_zeros(self, weight)
        return super().training_weight(weight)

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The masked weight."""
        return super().training_weight(weight)

    def target_sparsity(self) -> float | None:
        """The sparsity of a random mask."""
        return self.sparsity

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, which `from_config` takes."""
        return {
            **super().get_config(),
            "sparsity": self.sparsity,
            "seed": self.seed,
        }
