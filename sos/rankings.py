"""The step from scores to masks, over one tensor or many."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from sos.configurable import Configurable
from sos.masks import (
    Mask,
    Scores,
    keep_count,
    refuse_nan,
    top_k_mask_device,
    top_k_mask_host,
    top_k_masks_device,
)


@keras.saving.register_keras_serializable(package="sos")
class Ranking(Configurable):
    """The step from scores to masks.

    A ranking sees the scores of all weights that share it in one call: weights
    with equal rankings (same class, same config) are ranked together. So one
    interface serves a ranking of each tensor by itself, one across tensors,
    and patterns such as N:M or blocks within a tensor.

    To write one, override `masks`, and `get_config` if the constructor takes
    arguments, and register the class with
    `@keras.saving.register_keras_serializable()`. Rankings have no state.
    """

    def masks(
        self, scores: Sequence[Scores], sparsities: Sequence[float]
    ) -> list[Mask]:
        """Returns one mask per tensor of scores.

        Args:
            scores: One array or tensor per weight, of the weight's shape.
            sparsities: One target per weight, in [0, 1], as the weight's
                schedule gives it for this step. A ranking with a fixed pattern
                may ignore it.

        Returns:
            uint8 masks in the order and with the shapes of `scores`, 1 = kept.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `masks(scores, sparsities)`."
        )


@keras.saving.register_keras_serializable(package="sos")
class PerTensorRanking(Ranking):
    """Keeps the highest scores of each tensor by itself, and exactly k.

    Arrays, and tensors that lie in the host's memory, are ranked by
    `top_k_mask_host`; tensors on an accelerator are ranked there, so that only
    a count of NaNs travels to the host.
    """

    def masks(
        self, scores: Sequence[Scores], sparsities: Sequence[float]
    ) -> list[Mask]:
        """Returns one mask per tensor of scores.

        Args:
            scores: Arrays or tensors of any shape; float16, bfloat16, float32
                or float64. Within a traced function NaNs go unnoticed: use
                `nan_count` there.
            sparsities: One target per tensor, in [0, 1].

        Returns:
            uint8 masks of the same shapes, 1 = kept: arrays for what was
            ranked on the host, tensors for the rest.

        Raises:
            ValueError: If the two sequences differ in length, a sparsity is
                out of range, or a score is NaN.
        """
        if len(scores) != len(sparsities):
            raise ValueError(
                "There must be one sparsity per tensor of scores. Received: "
                f"{len(scores)} tensors and {len(sparsities)} sparsities"
            )
        masks: list[Mask | None] = [None] * len(scores)
        elsewhere: dict[str, list[int]] = {}  # device -> positions in `scores`
        for i, (score, sparsity) in enumerate(
            zip(scores, sparsities, strict=True)
        ):
            if not isinstance(score, np.ndarray):
                score = tf.convert_to_tensor(score)
                if tf.is_symbolic_tensor(score):
                    k = keep_count(score.shape.num_elements(), sparsity)
                    masks[i] = top_k_mask_device(score, k)
                    continue
                if "CPU" not in score.device:
                    elsewhere.setdefault(score.device, []).append(i)
                    continue
                score = score.numpy()
            masks[i] = top_k_mask_host(score, keep_count(score.size, sparsity))
        for device, places in elsewhere.items():
            with tf.device(device):
                found = _device_masks(
                    [tf.convert_to_tensor(scores[i]) for i in places],
                    [sparsities[i] for i in places],
                )
            for i, mask in zip(places, found, strict=True):
                masks[i] = mask
        return masks


def _device_masks(
    scores: list[tf.Tensor], sparsities: list[float]
) -> list[tf.Tensor]:
    """Ranks eager tensors where they are, and refuses NaNs."""
    counts = [
        keep_count(score.shape.num_elements(), sparsity)
        for score, sparsity in zip(scores, sparsities, strict=True)
    ]
    masks, nans = top_k_masks_device(scores, tf.constant(counts, tf.int32))
    for score, nan in zip(scores, nans.numpy(), strict=True):
        refuse_nan(int(nan), f" in a tensor of shape {score.shape}")
    return masks
