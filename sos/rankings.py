"""The step from scores to masks, over one tensor or many."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.arguments import check_integer
from sos.configurable import Configurable
from sos.masks import (
    Mask,
    Scores,
    all_equal,
    all_equal_device,
    keep_count,
    ordered_integers_device,
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

    #: Whether the masks depend on the scores. If the scores that a mask is made
    #: of are all equal, only positions could decide: the weight keeps the mask
    #: that it has, and a warning says so. A ranking with a fixed pattern sets
    #: this to False, and its masks always hold.
    uses_scores = True

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

    k is `sos.masks.keep_count(size, sparsity)`, but at least `min_kept`: a
    layer without any weight has constant outputs, and no gradient that could
    bring it back. A sparsity of exactly 1 keeps nothing.

    Arrays, and tensors that lie in the host's memory, are ranked by
    `top_k_mask_host`; tensors on an accelerator are ranked there, so that only
    a count of NaNs travels to the host.

    Args:
        min_kept: Number of weights that each tensor keeps at least, unless it
            has fewer. 0 lets a tensor lose all its weights.

    Raises:
        UsageError: If `min_kept` is not an integer, or below 0.

    Example:
    >>> PerTensorRanking().keep_count(36, 0.99)
    1
    >>> PerTensorRanking(min_kept=0).keep_count(36, 0.99)
    0
    """

    # A subclass need not call `__init__`.
    min_kept = 1

    def __init__(self, min_kept: int = 1) -> None:
        self.min_kept = check_integer("min_kept", min_kept)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"min_kept": self.min_kept}

    def keep_count(self, size: int, sparsity: float) -> int:
        """Returns how many of `size` weights are kept at the given sparsity.

        Args:
            size: Number of weights, at least 0.
            sparsity: Fraction of zeros, in [0, 1].

        Raises:
            ValueError: If `size` is negative, or `sparsity` is outside [0, 1]
                or NaN.
        """
        count = keep_count(size, sparsity)
        if sparsity == 1:
            return count
        return max(count, min(self.min_kept, size))

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
            ranked on the host, tensors for the rest. Equal scores are kept by
            position; `undecided` tells where all are.

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
                    k = self.keep_count(score.shape.num_elements(), sparsity)
                    masks[i] = top_k_mask_device(score, k)
                    continue
                if "CPU" not in score.device:
                    elsewhere.setdefault(score.device, []).append(i)
                    continue
                score = score.numpy()
            k = self.keep_count(score.size, sparsity)
            masks[i] = top_k_mask_host(score, k)
        for device, places in elsewhere.items():
            with tf.device(device):
                tensors = [tf.convert_to_tensor(scores[i]) for i in places]
                counts = [
                    self.keep_count(score.shape.num_elements(), sparsities[i])
                    for i, score in zip(places, tensors, strict=True)
                ]
                found = _device_masks(tensors, counts)
            for i, mask in zip(places, found, strict=True):
                masks[i] = mask
        return masks


def _device_masks(
    scores: list[tf.Tensor], counts: list[int]
) -> list[tf.Tensor]:
    """Ranks eager tensors where they are, and refuses NaNs."""
    masks, nans = top_k_masks_device(scores, tf.constant(counts, tf.int32))
    for score, nan in zip(scores, nans.numpy(), strict=True):
        refuse_nan(int(nan), f" in a tensor of shape {score.shape}")
    return masks


def undecided(
    ranking: Ranking, scores: Sequence[Scores], masks: Sequence[Mask]
) -> list[bool]:
    """Returns which masks were decided by the positions of weights alone.

    These are the masks that keep a part of a tensor whose scores are all equal.
    Where a ranking compares tensors, all its masks are undecided if the scores
    of all tensors are equal to each other, and a part of them is kept.

    Args:
        ranking: The ranking that made the masks.
        scores: The arrays or eager tensors that it was given.
        masks: The masks that it returned.

    Returns:
        One truth value per mask.
    """
    if not ranking.uses_scores:
        return [False] * len(masks)
    equal = [all_equal(score) for score in scores]
    if (
        not isinstance(ranking, PerTensorRanking)
        and _have_one_value(scores, equal)
        and _keep_a_part(masks)
    ):
        return [True] * len(masks)
    return [
        # Masks, which may lie on an accelerator, are rarely looked at.
        same and _keep_a_part([mask])
        for mask, same in zip(masks, equal, strict=True)
    ]


def _have_one_value(scores: Sequence[Scores], equal: Sequence[bool]) -> bool:
    values = set()
    for score, same in zip(scores, equal, strict=True):
        first = np.asarray(keras.ops.reshape(score, [-1])[:1])
        if first.size and not same:
            return False
        values |= {(first.dtype.name, value) for value in first.tolist()}
    return len(values) == 1


def _keep_a_part(masks: Sequence[Mask]) -> bool:
    arrays = [keras.ops.convert_to_numpy(mask) != 0 for mask in masks]
    some = any(array.any() for array in arrays)
    return some and not all(array.all() for array in arrays)


def undecided_device(
    ranking: Ranking, scores: Sequence[tf.Tensor], masks: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Does the same as `undecided` in compiled code.

    Args:
        ranking: The ranking that made the masks.
        scores: The tensors that it was given; float16, bfloat16, float32 or
            float64.
        masks: The masks that it returned.

    Returns:
        One scalar boolean tensor per mask.
    """
    if not ranking.uses_scores:
        return [tf.constant(False)] * len(masks)
    equal = [all_equal_device(score) for score in scores]
    some = [tf.reduce_any(mask > 0) for mask in masks]
    every = [tf.reduce_all(mask > 0) for mask in masks]
    found = [
        same & one & ~each
        for same, one, each in zip(equal, some, every, strict=True)
    ]
    sized = [i for i, score in enumerate(scores) if score.shape.num_elements()]
    if (
        isinstance(ranking, PerTensorRanking)
        or len({scores[i].dtype for i in sized}) != 1
    ):
        return found
    values = tf.stack(
        [tf.reduce_min(ordered_integers_device(scores[i])) for i in sized]
    )
    together = (
        tf.reduce_all(tf.stack([equal[i] for i in sized]))
        & tf.reduce_all(values == values[0])
        & tf.reduce_any(tf.stack(some))
        & ~tf.reduce_all(tf.stack(every))
    )
    return [one | together for one in found]
