"""The part of a mask update that XLA compiles for an accelerator.

It runs on the device of the scores, and the host reads back one small array of
statistics instead of scores and masks.
"""

from collections.abc import Sequence

import tensorflow as tf

from sos.masks import TensorRows, nan_counts, top_k_masks
from sos.rankings import PerTensorRanking, Ranking, undecided_device


def needs_only_counts(ranking: Ranking) -> bool:
    """Returns whether a ranking needs only the numbers of elements to keep.

    Then it is compiled once for all sparsities.
    """
    # A subclass may use the sparsity itself.
    return type(ranking) is PerTensorRanking


def new_masks(
    ranking: Ranking,
    scores: Sequence[tf.Tensor],
    ranked: Sequence[tf.Tensor],
    old: Sequence[tf.Tensor],
    cumulative: Sequence[bool],
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Keeps the masks of weights that cannot be ranked, and counts changes.

    Args:
        ranking: The ranking.
        scores: The scores of each weight; float16, bfloat16, float32 or
            float64.
        ranked: The masks that the ranking returned, uint8.
        old: The masks before the update, uint8.
        cumulative: Whether pruned elements stay pruned, for each weight.

    Returns:
        A uint8 mask for each weight, the old one where only positions would
        decide (`sos.rankings.undecided`); and int32 of shape [weights, 5]: the
        number of NaN scores, 1 if the old mask stays, and the counts `kept`,
        `pruned` and `regrown` of `MaskChanges`.
    """
    undecided = undecided_device(ranking, scores, ranked)
    masks = [
        tf.where(unchanged, before, mask)
        for unchanged, before, mask in zip(
            tf.unstack(undecided, num=len(old)), old, ranked, strict=True
        )
    ]
    # All weights together, as each operation costs a launch.
    rows = TensorRows([mask.shape for mask in old])
    before, after = rows.table(old, fill=0) > 0, rows.table(masks, fill=0) > 0
    total, kept, stayed = map(rows.count, (before, after, before & after))
    kept = tf.where(tf.constant(cumulative), stayed, kept)
    statistics = [
        nan_counts(scores),
        tf.cast(undecided, tf.int32),
        kept,
        total - stayed,
        kept - stayed,
    ]
    return masks, tf.stack(statistics, axis=1)


# Compiled once for each list of shapes.
@tf.function(jit_compile=True, autograph=False)
def rank_by_count(
    scores: Sequence[tf.Tensor],
    counts: tf.Tensor,
    old: Sequence[tf.Tensor],
    cumulative: Sequence[bool],
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Ranks the weights of a `PerTensorRanking` in one compiled call.

    Args:
        scores: As for `new_masks`.
        counts: Number of elements that each weight keeps, int32 of shape
            [weights].
        old: As for `new_masks`.
        cumulative: As for `new_masks`.

    Returns:
        As `new_masks`.
    """
    ranked, _ = top_k_masks(scores, counts)
    return new_masks(PerTensorRanking(), scores, ranked, old, cumulative)
