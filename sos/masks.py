"""Computes masks from scores: pure functions of arrays and tensors.

A *score* ranks a weight by importance (its magnitude, a random number, ...), a
*mask* holds 1 where a weight is kept and 0 where it is pruned, and *sparsity*
is the fraction of zeros. Every function keeps an exact number of weights: the
highest scores, and among equal scores those that come first in the flattened
tensor. If all scores are equal, that order is arbitrary: `all_equal` finds such
tensors, and `sos.rankings.undecided` the masks that depend on position alone.

Two implementations give the same bits: one for the host, which partitions the
scores near the threshold, and one for accelerators, which needs no sort.
"""

import concurrent.futures
import itertools
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# Scores are ranked through the signed integer of the same width, which orders
# floats exactly; float comparisons may flush denormals on some devices.
_INTEGER_TYPES = {
    tf.float16: tf.int16,
    tf.bfloat16: tf.int16,
    tf.float32: tf.int32,
    tf.float64: tf.int64,
}

Scores = np.ndarray | tf.Tensor
Mask = np.ndarray | tf.Tensor


def keep_count(size: int, sparsity: float) -> int:
    """Returns the number of weights that are kept at a sparsity.

    This is k = size * (1 - sparsity), computed in float64 and rounded half to
    even. Rounding in float32, as in tfmot, differs by one for some sizes.

    Args:
        size: Number of weights, at least 0.
        sparsity: Fraction of zeros, in [0, 1].

    Returns:
        The number k, in [0, size].

    Raises:
        ValueError: If `size` is negative, or `sparsity` is outside [0, 1] or
            NaN.
    """
    size = operator.index(size)
    if size < 0:
        raise ValueError(
            "`size` must be at least 0: it counts the weights of a tensor. "
            f"Received: size={size}"
        )
    sparsity = float(sparsity)
    if not 0.0 <= sparsity <= 1.0:  # also catches NaN
        raise ValueError(
            "`sparsity` must be in [0, 1]: it is the fraction of zeros, so "
            f"write 0.9 for 90 %. Received: sparsity={sparsity}"
        )
    return round(size * (1.0 - sparsity))


def _integer_type(dtype: tf.DType) -> tf.DType:
    """Returns the signed integer type as wide as the float type `dtype`."""
    if dtype not in _INTEGER_TYPES:
        valid = ", ".join(known.name for known in _INTEGER_TYPES)
        raise TypeError(
            f"Scores must have one of the dtypes {valid}; cast them first. "
            f"Received: dtype={dtype.name}"
        )
    return _INTEGER_TYPES[dtype]


def _infinity_bits(dtype: tf.DType) -> int:
    """Returns the bits of +inf as an integer; those of NaNs are greater."""
    infinity = np.array(np.inf, dtype.as_numpy_dtype)
    return int(infinity.view(_integer_type(dtype).as_numpy_dtype))


def _numpy_dtype(scores: np.ndarray) -> tf.DType:
    """Returns the TensorFlow dtype of an array.

    Raises:
        TypeError: If there is none.
    """
    try:
        dtype = tf.as_dtype(scores.dtype)
    except TypeError:
        dtype = None
    # `tf.as_dtype` ignores the byte order, which matters for a view.
    if dtype is None or dtype.as_numpy_dtype != scores.dtype:
        raise TypeError(
            "Scores must be floats in the byte order of this machine. "
            f"Received: dtype={scores.dtype!r}"
        )
    return dtype


def ordered_integers_host(scores: np.ndarray) -> np.ndarray:
    """Returns integers with the order of the scores.

    The bits of a non-negative float, read as an integer, have its order. For a
    negative float, the bits of its magnitude are negated. So -0.0 equals +0.0,
    and denormals keep their order.

    Args:
        scores: Array of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Array of the same shape with the signed integers of the same width. It
        may share the memory of `scores`.

    Raises:
        TypeError: If the scores have another dtype.
    """
    integer = _integer_type(_numpy_dtype(scores)).as_numpy_dtype
    bits = np.asarray(scores, order="C").view(integer)
    if bits.size == 0 or bits.min() >= 0:
        return bits
    magnitude = bits & np.iinfo(integer).max
    return np.where(bits < 0, -magnitude, magnitude)


def ordered_integers_device(scores: tf.Tensor) -> tf.Tensor:
    """Returns integers with the order of the scores.

    They equal those of `ordered_integers_host`, except that 16-bit integers are
    widened to int32, with which accelerators compute.

    Args:
        scores: Tensor of any shape; float16, bfloat16, float32 or float64. On
            a TPU float64 fails, as its bits cannot be read there.

    Returns:
        int32 or int64 tensor of the same shape.

    Raises:
        TypeError: If the scores have another dtype.
    """
    integer = _integer_type(scores.dtype)
    bits = tf.bitcast(scores, integer)
    if integer == tf.int16:
        bits = tf.cast(bits, tf.int32)
    magnitude = tf.bitwise.bitwise_and(
        bits, tf.constant(integer.max, bits.dtype)
    )
    return tf.where(bits < 0, -magnitude, magnitude)


# Number of scores to compare before comparing all: in a layer that trains, the
# first few scores differ already.
_HEAD = 64


def accelerator(values: Any) -> str | None:
    """Returns the name of the accelerator whose memory holds values.

    Args:
        values: Array or eager tensor.

    Returns:
        The device's name; None if the values are in the host's memory.
    """
    if not tf.is_tensor(values) or "CPU" in values.device:
        return None
    return values.device


def host_array(tensor: tf.Tensor) -> np.ndarray:
    """Returns the values of an eager tensor in the host's memory.

    Args:
        tensor: Tensor of any shape and dtype.

    Returns:
        Array to read from. It shares the tensor's memory, except for bfloat16,
        which the buffer protocol does not have.
    """
    if tensor.dtype == tf.bfloat16:
        return tensor.numpy()
    return np.asarray(memoryview(tensor))


def all_equal(scores: Scores) -> bool:
    """Returns whether all scores are equal; False if there are none.

    Scores are compared as for ranking: -0.0 equals +0.0, and denormals keep
    their value. NaN equals nothing.

    Args:
        scores: Array or eager tensor of any shape. A tensor on an accelerator
            is compared there.
    """
    if isinstance(scores, np.ndarray):
        flat = scores.reshape(-1)
        return _all_equal_host(flat[:_HEAD]) and _all_equal_host(flat)
    scores = tf.convert_to_tensor(scores)
    if not accelerator(scores):
        return all_equal(host_array(scores))
    if not _all_equal_host(tf.reshape(scores, [-1])[:_HEAD].numpy()):
        return False
    if scores.dtype not in _INTEGER_TYPES:
        return _all_equal_host(scores.numpy().reshape(-1))
    return bool(all_equal_device(scores))


def _all_equal_host(scores: np.ndarray) -> bool:
    if not scores.size:
        return False
    if not any(
        dtype.as_numpy_dtype == scores.dtype for dtype in _INTEGER_TYPES
    ):
        # A dtype for which only a user's ranking can work.
        return bool((scores == scores[0]).all())
    keys = ordered_integers_host(scores)
    infinity = _infinity_bits(_numpy_dtype(scores))
    return abs(int(keys[0])) <= infinity and bool((keys == keys[0]).all())


def all_equal_device(scores: tf.Tensor) -> tf.Tensor:
    """Computes `all_equal` in compiled code, as a scalar boolean tensor.

    Args:
        scores: Tensor of any shape; float16, bfloat16, float32 or float64.

    Raises:
        TypeError: If the scores have another dtype.
    """
    keys = ordered_integers_device(scores)
    # An empty tensor gives the largest integer as minimum, and the smallest as
    # maximum.
    lowest, highest = tf.reduce_min(keys), tf.reduce_max(keys)
    is_number = tf.abs(lowest) <= _infinity_bits(scores.dtype)
    return (lowest == highest) & is_number


def check_not_nan(count: int, where: str = "") -> None:
    """Raises an error if there are NaN scores, which have no rank.

    Args:
        count: Number of NaN scores.
        where: Text that the message adds after the number.

    Raises:
        ValueError: If `count` is not zero.
    """
    if count:
        raise ValueError(
            "Scores must not be NaN, as NaN has no rank. Find the step at "
            "which the weights became NaN (`keras.callbacks.TerminateOnNaN` "
            f"stops there). Received: {count} NaN score(s){where}"
        )


def top_k_mask_host(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns a mask that keeps exactly the `k` highest scores.

    Args:
        scores: Array of any shape, possibly empty; float16, bfloat16, float32
            or float64. Among equal scores, the first in C order are kept.
        k: Number of scores to keep, in [0, scores.size].

    Returns:
        uint8 array of the same shape, 1 = kept.

    Raises:
        TypeError: If the scores have another dtype.
        ValueError: If a score is NaN, or `k` is out of range.
    """
    scores = np.asarray(scores)
    size = scores.size
    k = operator.index(k)
    if not 0 <= k <= size:
        raise ValueError(
            "`k` must be between 0 and the number of scores. Received: "
            f"k={k} for {size} scores of shape {scores.shape}"
        )
    keys = ordered_integers_host(scores).reshape(-1)
    infinity = _infinity_bits(_numpy_dtype(scores))
    if size and (keys.max() > infinity or keys.min() < -infinity):
        check_not_nan(np.count_nonzero(np.abs(keys) > infinity))
    if k == 0:
        return np.zeros(scores.shape, np.uint8)
    if k == size:
        return np.ones(scores.shape, np.uint8)

    bounds = _likely_bounds(keys, k)
    mask = _top_k_between(keys, k, *bounds)
    if mask is None:
        mask = _top_k_between(keys, k, -infinity, infinity)
    return mask.view(np.uint8).reshape(scores.shape)


# Number of scores for which a thread more is worth its cost.
_SCORES_PER_THREAD = 2**20


def top_k_masks_host(
    scores: Sequence[np.ndarray], counts: Sequence[int]
) -> list[np.ndarray]:
    """Applies `top_k_mask_host` to many arrays, on several cores if they pay.

    Args:
        scores: Arrays as `top_k_mask_host` takes them.
        counts: Each array's k.

    Returns:
        The uint8 masks, 1 = kept.

    Raises:
        TypeError: As `top_k_mask_host`.
        ValueError: As `top_k_mask_host`.
    """
    sizes = [np.size(score) for score in scores]
    threads = min(len(sizes), sum(sizes) // _SCORES_PER_THREAD, _cpu_count())
    if threads < 2:
        return list(map(top_k_mask_host, scores, counts))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # The largest first, so that the threads end at about the same time.
        masks = {
            i: pool.submit(top_k_mask_host, scores[i], counts[i])
            for i in sorted(range(len(sizes)), key=lambda i: -sizes[i])
        }
        return [masks[i].result() for i in range(len(sizes))]


def _cpu_count() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS and Windows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The bounds of independent keys miss the k-th highest in 0.3 % of cases.
_STANDARD_DEVIATIONS = 3


def _likely_bounds(keys: np.ndarray, k: int) -> tuple[int, int]:
    """Returns integers between which the k-th highest key probably lies.

    Comparing all keys with two bounds and partitioning those between them is
    much faster than partitioning all.

    Args:
        keys: One-dimensional array of integers.
        k: Number of keys to keep, above 0 and below the number of keys.

    Returns:
        Lower and upper bound, both inclusive.
    """
    limits = np.iinfo(keys.dtype)
    # The cube root balances the work on the sample with that on the keys within
    # its bounds. It is odd, so that the sample has keys of all channels.
    sample = np.sort(keys[:: round(keys.size ** (1 / 3)) | 1])
    share = k / keys.size
    deviation = math.sqrt(sample.size * share * (1 - share))
    margin = 1 + _STANDARD_DEVIATIONS * deviation
    place = sample.size * (1 - share)
    lower, upper = math.floor(place - margin), math.ceil(place + margin)
    return (
        int(sample[lower]) if lower >= 0 else limits.min,
        int(sample[upper]) if upper < sample.size else limits.max,
    )


def _top_k_between(
    keys: np.ndarray, k: int, lower: int, upper: int
) -> np.ndarray | None:
    """Returns a mask of the `k` highest keys, if it is decided within bounds.

    Args:
        keys: One-dimensional array of integers.
        k: Number of keys to keep.
        lower: A lower bound of the k-th highest key.
        upper: An upper bound of the k-th highest key.

    Returns:
        Boolean array, or None if the k-th highest key is not within the bounds.
    """
    mask = keys > upper
    missing = k - np.count_nonzero(mask)
    within = keys >= lower
    within ^= mask
    positions = np.flatnonzero(within)
    if not 0 < missing <= positions.size:
        return None
    candidates = keys[positions]
    place = candidates.size - missing
    threshold = np.partition(candidates, place)[place]
    above = positions[candidates > threshold]
    tied = positions[candidates == threshold]
    mask[above] = True
    mask[tied[: missing - above.size]] = True
    return mask


def top_k_mask_device(scores: tf.Tensor, k: tf.Tensor | int) -> tf.Tensor:
    """Returns a mask that keeps exactly the `k` highest scores, without a sort.

    It is `top_k_masks` for a single tensor.

    Args:
        scores: Tensor of a static shape with fewer than 2**31 elements;
            float16, bfloat16, float32 or float64.
        k: Number of scores to keep, an integer scalar. As a tensor it may
            change without a new trace. Below 0 nothing is kept, above the
            number of scores everything.

    Returns:
        uint8 tensor of the same shape, 1 = kept.

    Raises:
        TypeError: If the scores have another dtype.
        ValueError: If their shape is not static, or has too many elements.
    """
    masks, _ = top_k_masks([scores], tf.reshape(k, [1]))
    return masks[0]


def top_k_masks(
    scores: Sequence[tf.Tensor], counts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Returns masks that keep exactly the highest scores, without a sort.

    The threshold of a tensor is its k-th highest score. All thresholds are
    found together, four bits at a time, from the highest: a pass over all
    scores counts for each tensor how many reach each of the 15 thresholds that
    the next four bits allow. This takes 4 passes for float16 and bfloat16, 8
    for float32 and 16 for float64. Scores equal to the threshold are kept by
    position. The results have the same bits as those of `top_k_mask_host`.

    The operations do not depend on values, so they compile with static shapes.
    NaN does not raise: callers check the second output on the host
    (`check_not_nan`).

    Args:
        scores: Tensors of any static shapes, each with fewer than 2**31
            elements; float16, bfloat16, float32 or float64. Tensors of one
            dtype are ranked in the same passes.
        counts: Integer tensor of shape [len(scores)], each tensor's k. They may
            change without a new trace. Below 0 nothing is kept, above the
            number of scores everything.

    Returns:
        The uint8 masks in the shapes of the scores, 1 = kept; and the number of
        NaN scores in each tensor, int32 of shape [len(scores)].

    Raises:
        TypeError: If scores have another dtype.
        ValueError: If a shape is not static, or has too many elements.
    """
    masks: list[Any] = [None] * len(scores)
    nans: list[Any] = [None] * len(scores)
    # Before the cast, which would wrap larger numbers around.
    counts = tf.clip_by_value(tf.convert_to_tensor(counts), 0, tf.int32.max)
    counts = tf.cast(counts, tf.int32)
    for positions in _table_groups(scores):
        table = _KeyTable([scores[i] for i in positions])
        group_masks = table.top_k_masks(tf.gather(counts, positions))
        group_nans = tf.unstack(table.nan_counts(), num=len(positions))
        for i, mask, nan in zip(
            positions, group_masks, group_nans, strict=True
        ):
            masks[i], nans[i] = mask, nan
    return masks, tf.stack(nans)


def nan_counts(scores: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the number of NaNs in each tensor of scores.

    Compiled code cannot raise: callers read these numbers on the host
    (`check_not_nan`). They are computed from the bits, so that fast-math
    optimisations of a compiler cannot remove them.

    Args:
        scores: Tensors as `top_k_masks` takes them.

    Returns:
        int32 tensor of shape [len(scores)].
    """
    return _by_table(scores, _KeyTable.nan_counts)


def _by_table(
    scores: Sequence[tf.Tensor], function: Callable[["_KeyTable"], tf.Tensor]
) -> tf.Tensor:
    """Applies a function that returns a number for each tensor of a table."""
    results: list[Any] = [None] * len(scores)
    for positions in _table_groups(scores):
        table = _KeyTable([scores[i] for i in positions])
        values = tf.unstack(function(table), num=len(positions))
        for i, value in zip(positions, values, strict=True):
            results[i] = value
    return tf.stack(results)


def all_equal_tensors(scores: Sequence[tf.Tensor]) -> tf.Tensor:
    """Computes `all_equal` of many tensors in compiled code.

    Args:
        scores: Tensors as `top_k_masks` takes them.

    Returns:
        Boolean tensor of shape [len(scores)].

    Raises:
        TypeError: As `top_k_masks`.
        ValueError: As `top_k_masks`.
    """
    return _by_table(scores, _KeyTable.all_equal)


# Compiled as one function: one launch per update, one trace per list of shapes.
# `reduce_retracing` would lose the static shapes that TPUs need.
@tf.function(jit_compile=True, autograph=False)
def top_k_masks_device(
    scores: Sequence[tf.Tensor], counts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Calls `top_k_masks` as one function that XLA compiles."""
    return top_k_masks(scores, counts)


# Length of a table's rows. Less than 2**15, so that two counts of a row fit in
# one int32.
_ROW = 1024
# Positions in a table, and sums of counts, are int32.
_MAX_TABLE_SIZE = 2**31 - 1
# Bits of a threshold that are found in one pass over the table.
_DIGIT_BITS = 4


def _row_count(shape: tf.TensorShape) -> int:
    """Returns the number of a table's rows for a tensor; at least 1."""
    size = shape.num_elements()
    if size is None:
        raise ValueError(
            "Scores must have a static shape to be ranked in compiled code. "
            f"Received: shape={shape}"
        )
    rows = max(1, -(-size // _ROW))
    if rows * _ROW > _MAX_TABLE_SIZE:
        raise ValueError(
            "A tensor of scores must have fewer than 2**31 elements to be "
            "ranked on an accelerator, where they are counted in int32. "
            f"Received: shape={shape} with {size} elements"
        )
    return rows


def _table_groups(scores: Sequence[tf.Tensor]) -> list[list[int]]:
    """Groups tensors of one dtype that fit in one table.

    Returns:
        The positions in `scores`, by group.
    """
    groups: list[list[int]] = []
    for dtype in dict.fromkeys(score.dtype for score in scores):
        total = _MAX_TABLE_SIZE  # The first tensor begins a group.
        for i, score in enumerate(scores):
            if score.dtype != dtype:
                continue
            size = _ROW * _row_count(score.shape)
            if total + size > _MAX_TABLE_SIZE:
                groups.append([])
                total = 0
            groups[-1].append(i)
            total += size
    return groups


class TensorRows:
    """Puts tensors into the rows of one table, to sum over them together.

    Each tensor has its own rows, at least one. A sum over all tensors takes two
    operations instead of one for each tensor.

    Args:
        shapes: The static shapes of the tensors.

    Attributes:
        shapes: The shapes.
        sizes: int32 of shape [tensors], the number of elements of each.
        owner: int32 of shape [rows], the tensor to which each row belongs.
        first: The first row of each tensor.

    Raises:
        ValueError: If a shape is not static, or has 2**31 elements or more.
    """

    def __init__(self, shapes: Sequence[tf.TensorShape]) -> None:
        self._rows = [_row_count(shape) for shape in shapes]
        self.shapes = shapes
        self.sizes = tf.constant([s.num_elements() for s in shapes], tf.int32)
        self.owner = tf.constant(
            np.repeat(np.arange(len(shapes)), self._rows), tf.int32
        )
        self.first = np.cumsum([0, *self._rows[:-1]])

    def table(self, tensors: Sequence[tf.Tensor], fill: int) -> tf.Tensor:
        """Returns tensors as a table: [rows, columns], filled with `fill`."""
        flat = [
            tf.pad(
                tf.reshape(tensor, [-1]),
                [[0, _ROW * rows - shape.num_elements()]],
                constant_values=fill,
            )
            for tensor, shape, rows in zip(
                tensors, self.shapes, self._rows, strict=True
            )
        ]
        return tf.reshape(tf.concat(flat, axis=0), [-1, _ROW])

    def tensors(self, table: tf.Tensor) -> list[tf.Tensor]:
        """Returns the tensors of a table."""
        return [
            tf.reshape(tf.reshape(rows, [-1])[: shape.num_elements()], shape)
            for rows, shape in zip(
                tf.split(table, self._rows), self.shapes, strict=True
            )
        ]

    def count(self, condition: tf.Tensor) -> tf.Tensor:
        """Counts the true elements of a table by tensor: int32, [tensors]."""
        by_row = tf.reduce_sum(tf.cast(condition, tf.int32), axis=1)
        return self.sum_rows(by_row)

    def sum_rows(self, by_row: tf.Tensor) -> tf.Tensor:
        """Sums the rows of each tensor: [rows, ...] to [tensors, ...]."""
        return tf.math.unsorted_segment_sum(by_row, self.owner, len(self._rows))


class _KeyTable:
    """The keys of several tensors in one table.

    Keys are the integers of `ordered_integers_device`. The table is filled with
    an integer below all keys.

    Args:
        scores: Tensors of one dtype and of static shapes.
    """

    def __init__(self, scores: Sequence[tf.Tensor]) -> None:
        self._dtype = scores[0].dtype
        self._lowest = -(2 ** (8 * self._dtype.size - 1))
        self._rows = TensorRows([score.shape for score in scores])
        self._keys = self._rows.table(
            list(map(ordered_integers_device, scores)), fill=self._lowest
        )

    def nan_counts(self) -> tf.Tensor:
        """Returns the number of NaNs in each tensor, int32 of [tensors]."""
        infinity = _infinity_bits(self._dtype)
        # NaNs are above +inf or, with the sign bit, below -inf.
        bounds = [[infinity + 1, -infinity]] * len(self._rows.shapes)
        reached = self._counts_reaching(tf.constant(bounds, self._keys.dtype))
        return reached[:, 0] + self._rows.sizes - reached[:, 1]

    def all_equal(self) -> tf.Tensor:
        """Returns which tensors' scores are all equal, bool of [tensors]."""
        first = tf.gather(self._keys, self._rows.first)[:, 0]
        equal = self._rows.count(self._keys == self._by_row(first))
        is_number = tf.abs(first) <= _infinity_bits(self._dtype)
        return (equal == self._rows.sizes) & is_number

    def top_k_masks(self, counts: tf.Tensor) -> list[tf.Tensor]:
        """Returns the tensors' masks.

        Args:
            counts: int32 of shape [tensors], each tensor's k.

        Returns:
            uint8 tensors of the tensors' shapes, 1 = kept.
        """
        threshold = self._kth_highest(counts)
        by_row = self._by_row(threshold)
        # The column in each row before which ties are kept.
        end = self._tie_ends(threshold, counts)[:, tf.newaxis]
        tied = (self._keys == by_row) & (tf.range(_ROW) < end)
        kept = tf.cast((self._keys > by_row) | tied, tf.uint8)
        return self._rows.tensors(kept)

    def _by_row(self, by_tensor: tf.Tensor) -> tf.Tensor:
        """Repeats a number of each tensor: [tensors] to [rows, 1]."""
        return tf.gather(by_tensor, self._rows.owner)[:, tf.newaxis]

    def _kth_highest(self, counts: tf.Tensor) -> tf.Tensor:
        """Returns the greatest integers that at least `counts` keys reach.

        Args:
            counts: int32 of shape [tensors].

        Returns:
            Integers of shape [tensors] and of the keys' dtype.
        """
        dtype = self._keys.dtype
        digits = tf.range(1, 2**_DIGIT_BITS, dtype=dtype)

        # Integers wrap around, so that the highest digits, which include the
        # sign, can be added to the lowest integer.
        def find_digit(
            threshold: tf.Tensor, shift: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            steps = tf.bitwise.left_shift(digits, shift)
            reached = self._counts_reaching(threshold[:, tf.newaxis] + steps)
            enough = reached >= counts[:, tf.newaxis]
            digit = tf.reduce_sum(tf.cast(enough, dtype), axis=1)
            return (
                threshold + tf.bitwise.left_shift(digit, shift),
                shift - _DIGIT_BITS,
            )

        bits = 8 * self._dtype.size
        threshold, _ = tf.while_loop(
            lambda _, shift: shift >= 0,
            find_digit,
            (
                tf.fill(tf.shape(counts), tf.constant(self._lowest, dtype)),
                tf.constant(bits - _DIGIT_BITS, dtype),
            ),
            maximum_iterations=bits // _DIGIT_BITS,
        )
        return threshold

    def _counts_reaching(self, thresholds: tf.Tensor) -> tf.Tensor:
        """Counts each tensor's keys that are not below its thresholds.

        Args:
            thresholds: Shape [tensors, n], above the lowest integer.

        Returns:
            int32 of shape [tensors, n].
        """
        by_row = tf.gather(thresholds, self._rows.owner)
        reaching = [
            tf.cast(self._keys >= threshold[:, tf.newaxis], tf.int32)
            for threshold in tf.unstack(by_row, axis=1)
        ]
        # Two counts in one integer: XLA fuses so few sums that it reads the
        # table once.
        half = -(-len(reaching) // 2)
        pairs = itertools.zip_longest(
            reaching[:half], reaching[half:], fillvalue=0
        )
        sums = tf.stack(
            [
                tf.reduce_sum(low + (high * 2**16), axis=1)
                for low, high in pairs
            ],
            axis=1,
        )
        counts = tf.concat([sums % 2**16, sums // 2**16], axis=1)
        return self._rows.sum_rows(counts[:, : len(reaching)])

    def _tie_ends(self, threshold: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        """Returns the column of each row before which ties are kept.

        It is 0 or the row's length, except in one row of each tensor. So only
        that row needs a cumulative sum over its columns.

        Args:
            threshold: Each tensor's threshold, shape [tensors].
            counts: Number of keys that each tensor keeps, int32 of shape
                [tensors].

        Returns:
            int32 of shape [rows].
        """
        by_row = self._by_row(threshold)
        above = self._rows.count(self._keys > by_row)
        ties = tf.reduce_sum(tf.cast(self._keys == by_row, tf.int32), axis=1)
        before = tf.cumsum(ties, exclusive=True)
        # How many ties may be kept from the start of each row on.
        left = tf.gather(
            counts - above + tf.gather(before, self._rows.first),
            self._rows.owner,
        )
        left -= before
        ends_here = (left > 0) & (left <= ties)
        # A sum, because ties end in at most one row of a tensor.
        end_row = self._rows.sum_rows(
            tf.where(ends_here, tf.range(ends_here.shape[0]), 0)
        )
        tied = tf.gather(self._keys, end_row) == threshold[:, tf.newaxis]
        place = tf.cumsum(tf.cast(tied, tf.int32), axis=1)
        earlier = place < tf.gather(left, end_row)[:, tf.newaxis]
        end_column = 1 + tf.reduce_sum(tf.cast(earlier, tf.int32), axis=1)
        return tf.where(
            ends_here,
            tf.gather(end_column, self._rows.owner),
            tf.where(left > 0, _ROW, 0),
        )
