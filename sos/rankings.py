"""Rankings: how the scores of one or several tensors become masks."""

import math
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
    TensorRows,
    accelerator,
    all_equal,
    all_equal_tensors,
    check_not_nan,
    host_array,
    keep_count,
    ordered_integers_device,
    top_k_masks,
    top_k_masks_device,
    top_k_masks_host,
)


@keras.saving.register_keras_serializable(package="sos")
class Ranking(Configurable):
    """Turns scores into masks.

    Weights with equal rankings (same class, same config) are ranked together,
    in one call. A ranking may treat each tensor separately, compare tensors, or
    prune in patterns such as N:M or blocks.

    To write a ranking, override `masks`, and `get_config` if the constructor
    takes arguments, and register the class with
    `@keras.saving.register_keras_serializable()`. A ranking has no state.

    Example: a ranking that keeps the two highest of every four scores.
    >>> import keras, sos
    >>> @keras.saving.register_keras_serializable()
    ... class TwoOfFour(sos.extend.Ranking):
    ...     def masks(self, scores, sparsities):
    ...         masks = []
    ...         for score in scores:
    ...             groups = keras.ops.reshape(score, (-1, 4))
    ...             order = keras.ops.argsort(keras.ops.argsort(groups))
    ...             mask = keras.ops.cast(order >= 2, "uint8")
    ...             masks.append(keras.ops.reshape(mask, score.shape))
    ...         return masks
    >>> scores = keras.ops.convert_to_tensor([0.1, 0.4, 0.3, 0.2])
    >>> TwoOfFour().masks([scores], [0.5])[0].numpy()
    array([0, 1, 1, 0], dtype=uint8)
    """

    #: Whether the masks depend on the scores. Then a weight whose scores are
    #: all equal keeps its mask, with a warning, as only positions could decide.
    #: A ranking with a fixed pattern sets this to False.
    uses_scores = True

    def masks(
        self, scores: Sequence[Scores], sparsities: Sequence[float]
    ) -> list[Mask]:
        """Returns one mask per tensor of scores.

        Args:
            scores: One array or tensor per weight, of the weight's shape.
            sparsities: One sparsity per weight, in [0, 1], from the weight's
                schedule at this step. A ranking with a fixed pattern may
                ignore it.

        Returns:
            uint8 masks in the order and with the shapes of `scores`, 1 = kept.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `masks(scores, sparsities)`."
        )


@keras.saving.register_keras_serializable(package="sos")
class PerTensorRanking(Ranking):
    """Keeps exactly the k highest scores of each tensor.

    k is `sos.masks.keep_count(size, sparsity)`, but at least `min_kept`: a
    layer whose weights are all zero has constant outputs and zero gradients, so
    that no weight would come back. A sparsity of exactly 1 keeps nothing.

    Arrays, and tensors in the host's memory, are ranked by
    `sos.masks.top_k_mask_host`. Tensors on an accelerator are ranked there, all
    together, so that only the number of NaNs is copied to the host.

    Args:
        min_kept: Least number of weights that each tensor keeps, unless it has
            fewer. With 0 a tensor may lose all its weights.

    Raises:
        UsageError: If `min_kept` is not an integer, or below 0.

    Example:
    >>> import sos
    >>> sos.extend.PerTensorRanking().keep_count(36, 0.99)
    1
    >>> sos.extend.PerTensorRanking(min_kept=0).keep_count(36, 0.99)
    0
    """

    # For subclasses that do not call `__init__`.
    min_kept = 1

    def __init__(self, min_kept: int = 1) -> None:
        self.min_kept = check_integer("min_kept", min_kept)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"min_kept": self.min_kept}

    def keep_count(self, size: int, sparsity: float) -> int:
        """Returns the number of weights that are kept at a sparsity.

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
                or float64. In a traced function NaN does not raise: use
                `sos.masks.nan_counts` there.
            sparsities: One sparsity per tensor, in [0, 1].

        Returns:
            uint8 masks of the same shapes, 1 = kept: arrays if ranked on the
            host, tensors otherwise. Equal scores are ranked by position;
            `undecided` finds tensors whose scores are all equal.

        Raises:
            ValueError: If the two sequences differ in length, a sparsity is
                out of range, or a score is NaN.
        """
        if len(scores) != len(sparsities):
            raise ValueError(
                "There must be one sparsity per tensor of scores. Received: "
                f"{len(scores)} tensors and {len(sparsities)} sparsities"
            )
        by_place: dict[str, list[int]] = {}  # Positions in `scores`.
        for i, score in enumerate(scores):
            by_place.setdefault(_place(score), []).append(i)
        masks: list[Any] = [None] * len(scores)
        for place, positions in by_place.items():
            counts = [
                self.keep_count(math.prod(scores[i].shape), sparsities[i])
                for i in positions
            ]
            ranked = _rank(place, [scores[i] for i in positions], counts)
            for i, mask in zip(positions, ranked, strict=True):
                masks[i] = mask
        return masks


_HOST, _GRAPH = "host", "graph"


def _place(score: Scores) -> str:
    """Returns where scores are ranked: `_HOST`, `_GRAPH` or a device's name."""
    if isinstance(score, np.ndarray):
        return _HOST
    score = tf.convert_to_tensor(score)
    if tf.is_symbolic_tensor(score):
        return _GRAPH
    return accelerator(score) or _HOST


def _rank(
    place: str, scores: Sequence[Scores], counts: Sequence[int]
) -> Sequence[Mask]:
    """Ranks scores where they are."""
    if place == _HOST:
        arrays = [
            score
            if isinstance(score, np.ndarray)
            else host_array(tf.convert_to_tensor(score))
            for score in scores
        ]
        return top_k_masks_host(arrays, counts)
    tensors = [tf.convert_to_tensor(score) for score in scores]
    if place == _GRAPH:
        return top_k_masks(tensors, tf.constant(counts))[0]
    with tf.device(place):
        return _device_masks(tensors, counts)


def _device_masks(
    scores: Sequence[tf.Tensor], counts: Sequence[int]
) -> list[tf.Tensor]:
    """Ranks eager tensors on their device; raises `ValueError` for NaNs."""
    masks, nans = top_k_masks_device(scores, tf.constant(counts, tf.int32))
    for score, nan in zip(scores, nans.numpy(), strict=True):
        check_not_nan(int(nan), f" in a tensor of shape {score.shape}")
    return masks


def undecided(
    ranking: Ranking, scores: Sequence[Scores], masks: Sequence[Mask]
) -> list[bool]:
    """Returns which masks depend on the positions of weights alone.

    These are masks that keep a part of a tensor whose scores are all equal. If
    a ranking compares tensors, all its masks are undecided where the scores of
    all tensors are equal and a part of them is kept.

    Args:
        ranking: The ranking that computed the masks.
        scores: Its scores, arrays or eager tensors.
        masks: Its masks.

    Returns:
        One boolean per mask.
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
        # Reads a mask, which may be on an accelerator, only if it must.
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
    any_kept = any(array.any() for array in arrays)
    return any_kept and not all(array.all() for array in arrays)


def undecided_device(
    ranking: Ranking, scores: Sequence[tf.Tensor], masks: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Computes `undecided` in compiled code.

    Args:
        ranking: The ranking that computed the masks.
        scores: Its scores, tensors; float16, bfloat16, float32 or float64.
        masks: Its masks.

    Returns:
        Boolean tensor of shape [masks].
    """
    if not ranking.uses_scores:
        return tf.zeros([len(masks)], tf.bool)
    equal = all_equal_tensors(scores)
    rows = TensorRows([mask.shape for mask in masks])
    kept = rows.count(rows.table(masks, fill=0) > 0)
    undecided = equal & (kept > 0) & (kept < rows.sizes)
    nonempty = [
        i for i, score in enumerate(scores) if score.shape.num_elements()
    ]
    if (
        isinstance(ranking, PerTensorRanking)
        or len({scores[i].dtype for i in nonempty}) != 1
    ):
        return undecided
    values = tf.stack(
        [tf.reduce_min(ordered_integers_device(scores[i])) for i in nonempty]
    )
    across_tensors = (
        tf.reduce_all(tf.gather(equal, nonempty))
        & tf.reduce_all(values == values[0])
        & tf.reduce_any(kept > 0)
        & tf.reduce_any(kept < rows.sizes)
    )
    return undecided | across_tensors
