"""Training with a mask that never changes."""

from typing import Any

import keras
import numpy as np

from sos import noise
from sos.arguments import check_integer, check_number
from sos.masks import keep_count, top_k_mask_host
from sos.registry import register
from sos.wrappers.masked import MaskedWrapper


@register
class FixedMask(MaskedWrapper):
    """Keeps a mask: fine-tuning, training from scratch, lottery tickets.

    By default the weights that are zero when the layer is wrapped stay zero,
    which is what fine-tuning a stripped model needs. With `sparsity` the mask
    is drawn at random. `set_masks` sets any other.

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

    def weights_changed(self) -> None:
        """Sets the masks anew from the dense weights."""
        masks = []
        for weight in self.sparse_weights:
            if self.sparsity is None:
                value = keras.ops.convert_to_numpy(weight.value)
                masks.append(value != 0)
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
                masks.append(top_k_mask_host(scores, count))
        self.set_masks(masks)

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
