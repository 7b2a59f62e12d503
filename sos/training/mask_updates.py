"""Mask updates as a compiled function that runs on the replicas."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from sos.masks import (
    keep_count,
    nan_count,
    refuse_nan,
    top_k_mask_device,
)
from sos.rankings import PerTensorRanking, Ranking
from sos.wrappers.masked import PruningWrapper
from sos.wrappers.sparse_weight import SparseWeight


class CompiledMaskUpdate:
    """Does what `sos.wrappers.masked.update_masks` does, on a TPU.

    There nothing can run but compiled code inside `strategy.run`. The number of
    weights to keep is an argument of that code, so that there is one
    compilation for a ranking of single tensors; other rankings are compiled for
    each sparsity.
    """

    def __init__(self) -> None:
        self._strategy = tf.distribute.get_strategy()
        self._functions: dict[Any, Any] = {}

    def __call__(self, updates: dict[PruningWrapper, float]) -> None:
        """Ranks weights and sets their masks.

        Args:
            updates: The sparsity to reach, by wrapper.

        Raises:
            ValueError: If a score is NaN; all masks stay as they are.
        """
        if not updates:
            return
        jobs = _jobs(updates)
        counts = [
            keep_count(math.prod(weight.variable.shape), updates[wrapper])
            for wrapper, weight in jobs
        ]
        # Python sparsities are part of a compilation only where they must be.
        identity = (
            tuple(id(wrapper) for wrapper in updates),
            tuple(
                sparsity
                for wrapper, sparsity in updates.items()
                if not _ranks_by_count(wrapper.ranking)
            ),
        )
        if identity not in self._functions:
            self._functions[identity] = self._compile(dict(updates))
        nans = self._functions[identity](tf.constant(counts, tf.int32))
        nans = self._strategy.experimental_local_results(nans)[0].numpy()
        for (_, weight), nan in zip(jobs, nans, strict=True):
            refuse_nan(int(nan), f" of {weight.path}")

    def _compile(self, updates: dict[PruningWrapper, float]) -> Any:
        def step(counts: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            return mask_update_step(updates, counts)

        def here(value: Any) -> tf.Tensor:
            return self._strategy.experimental_local_results(value)[0]

        @tf.function
        def update(counts: tf.Tensor) -> tf.Tensor:
            masks, nans = self._strategy.run(step, args=(counts,))
            nans = here(nans)
            refused = tf.reduce_sum(nans) > 0
            # Not on the replicas, where an assignment sends every mask to every
            # other replica, although all have the same.
            for (wrapper, weight), mask in zip(
                _jobs(updates), masks, strict=True
            ):
                old = weight.state["mask"].value
                wrapper.assign_mask(weight, tf.where(refused, old, here(mask)))
            return nans

        return update


def mask_update_step(
    updates: dict[PruningWrapper, float], counts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Ranks weights, on one replica.

    Args:
        updates: The sparsity to reach, by wrapper.
        counts: int32 of shape [weights]: how many elements each weight keeps.

    Returns:
        The uint8 masks, one for each weight; and int32 of shape [weights], the
        number of scores that are NaN.
    """
    groups: dict[Any, list[tuple[PruningWrapper, SparseWeight, int]]] = {}
    for place, (wrapper, weight) in enumerate(_jobs(updates)):
        groups.setdefault(wrapper.ranking, []).append((wrapper, weight, place))
    masks: list[Any] = [None] * len(_jobs(updates))
    nans = list(masks)
    for ranking, members in groups.items():
        scores = [wrapper.scores(weight) for wrapper, weight, _ in members]
        if _ranks_by_count(ranking):
            found: Sequence[Any] = [
                top_k_mask_device(score, counts[i])
                for score, (_, _, i) in zip(scores, members, strict=True)
            ]
        else:
            found = ranking.masks(
                scores, [updates[wrapper] for wrapper, _, _ in members]
            )
        for (_, _, i), score, mask in zip(members, scores, found, strict=True):
            nans[i] = nan_count(score)
            masks[i] = tf.cast(mask, tf.uint8)
    return masks, tf.stack(nans)


def _jobs(
    updates: dict[PruningWrapper, float],
) -> list[tuple[PruningWrapper, SparseWeight]]:
    return [
        (wrapper, weight)
        for wrapper in updates
        for weight in wrapper.sparse_weights
    ]


def _ranks_by_count(ranking: Ranking) -> bool:
    # Of a subclass nobody knows what it does with the sparsity.
    return type(ranking) is PerTensorRanking
