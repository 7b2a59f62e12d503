"""Counts what an update of masks changes."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from sos.masks import accelerator, host_array
from sos.wrappers.sparse_weight import SparseWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskChanges:
    """Counts of the changes of an update, over all its masks.

    Attributes:
        elements: Number of elements of the masks.
        kept: Number of ones after the update.
        pruned: Number of elements that changed from 1 to 0.
        regrown: Number of elements that changed from 0 to 1.
    """

    elements: int
    kept: int
    pruned: int
    regrown: int


def count_changes(old: Any, new: Any) -> tf.Tensor | np.ndarray:
    """Compares two masks of a weight where they are.

    Args:
        old: The mask before the update: uint8 zeros and ones, not traced.
        new: The mask after the update, like `old`.

    Returns:
        int32 of shape [3]: `kept`, `pruned` and `regrown` of `MaskChanges`; an
        array if the masks are in the host's memory.
    """
    old, new = tf.convert_to_tensor(old), tf.convert_to_tensor(new)
    if accelerator(old):
        old, new = tf.cast(old, tf.int32), tf.cast(new, tf.int32)
        total, kept, stayed = map(tf.reduce_sum, (old, new, old * new))
        return tf.stack([kept, total - stayed, kept - stayed])
    # As Booleans, which NumPy counts several times faster.
    before, after = host_array(old).view(bool), host_array(new).view(bool)
    total, kept, stayed = map(np.count_nonzero, (before, after, before & after))
    return np.array([kept, total - stayed, kept - stayed], np.int32)


def total_changes(
    weights: Iterable[SparseWeight], counts: Sequence[Sequence[int]]
) -> MaskChanges:
    """Adds the changes of several weights.

    Args:
        weights: The weights.
        counts: For each weight, the output of `count_changes`.
    """
    kept, pruned, regrown = map(sum, zip(*counts, strict=True))
    return MaskChanges(
        elements=sum(math.prod(w.variable.shape) for w in weights),
        kept=kept,
        pruned=pruned,
        regrown=regrown,
    )
