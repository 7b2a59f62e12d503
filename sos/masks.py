"""Computes masks from scores: pure functions of arrays and tensors.

A *score* ranks a weight by importance (its magnitude, a random number, ...), a
*mask* holds 1 where a weight is kept and 0 where it is pruned, and *sparsity*
is the fraction of zeros. Every function keeps an exact number of weights: the
highest scores, and among equal scores those that come first in the flattened
tensor. If all scores are equal, that order is arbitrary: `all_equal` finds such
tensors, and `sos.rankings.undecided` the masks that depend on position alone.

Two implementations give the same bits: one for the host, built on
`numpy.partition`, and one for accelerators, which needs no sort.
"""

import operator
from collections.abc import Sequence

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


def nan_count(scores: tf.Tensor) -> tf.Tensor:
    """Returns the number of NaN scores, as a scalar int32 tensor.

    Compiled code cannot raise: callers of `top_k_mask_device` read this number
    on the host and raise if it is not zero. It is computed from the bits, so
    that fast-math optimisations of a compiler cannot remove it.

    Args:
        scores: Tensor of any shape; float16, bfloat16, float32 or float64.
    """
    infinity = _infinity_bits(scores.dtype)
    return _count(tf.abs(ordered_integers_device(scores)) > infinity)


def _count(condition: tf.Tensor) -> tf.Tensor:
    """Returns the number of true elements, as a scalar int32 tensor."""
    return tf.reduce_sum(tf.cast(condition, tf.int32))


# Number of scores to compare before comparing all: in a layer that trains, the
# first few scores differ already.
_HEAD = 64


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
    if "CPU" in scores.device and scores.dtype != tf.bfloat16:
        # Without a copy. The buffer protocol has no bfloat16.
        return all_equal(np.asarray(memoryview(scores)))
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

    threshold = np.partition(keys, size - k)[size - k]
    mask = (keys >= threshold).view(np.uint8)
    excess = np.count_nonzero(mask) - k
    if excess:
        ties = np.flatnonzero(keys == threshold)
        mask[ties[-excess:]] = 0
    return mask.reshape(scores.shape)


def top_k_mask_device(scores: tf.Tensor, k: tf.Tensor | int) -> tf.Tensor:
    """Returns a mask that keeps exactly the `k` highest scores, without a sort.

    The threshold is the k-th highest score. Bisection over the integers of
    `ordered_integers_device` finds it, with one counting pass per bit: 16 for
    float16 and bfloat16, 32 for float32 and 64 for float64 (one for the sign,
    the rest for the magnitude). A cumulative sum then ranks scores equal to the
    threshold. The result has the same bits as `top_k_mask_host`.

    The number of operations does not depend on values, so it compiles with
    static shapes. NaN does not raise: see `nan_count`.

    Args:
        scores: Tensor of any shape with fewer than 2**31 elements; float16,
            bfloat16, float32 or float64.
        k: Number of scores to keep, an integer scalar. As a tensor it may
            change without a new trace. Below 0 nothing is kept, above the
            number of scores everything.

    Returns:
        uint8 tensor of the same shape, 1 = kept.

    Raises:
        TypeError: If the scores have another dtype.
    """
    keys = tf.reshape(ordered_integers_device(scores), [-1])
    k = tf.cast(k, tf.int32)
    bits = 8 * scores.dtype.size

    # The answer is the largest integer that at least k keys reach. `threshold`
    # is the lower end of an interval that holds it, `width` half its length.
    def narrow(threshold, width):
        middle = threshold + width
        enough = _count(keys >= middle) >= k
        return (
            tf.where(enough, middle, threshold),
            tf.bitwise.right_shift(width, tf.ones_like(width)),
        )

    zero = tf.constant(0, keys.dtype)
    lowest = tf.constant(-(2 ** (bits - 1)), keys.dtype)
    threshold, _ = tf.while_loop(
        lambda _, width: width > 0,
        narrow,
        [
            tf.where(_count(keys >= zero) >= k, zero, lowest),
            tf.constant(2 ** (bits - 2), keys.dtype),
        ],
    )

    above = keys > threshold
    tied = keys == threshold
    remaining = k - _count(above)
    position = tf.cumsum(tf.cast(tied, tf.int32))
    mask = above | (tied & (position <= remaining))
    return tf.reshape(tf.cast(mask, tf.uint8), tf.shape(scores))


# Compiled as one function: one launch per update, one trace per list of shapes.
# `reduce_retracing` would lose the static shapes that TPUs need.
@tf.function(jit_compile=True)
def top_k_masks_device(
    scores: Sequence[tf.Tensor], counts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Applies `top_k_mask_device` to many tensors in one compiled call.

    Args:
        scores: Tensors as `top_k_mask_device` takes them.
        counts: int32 tensor of shape [len(scores)], each tensor's k.

    Returns:
        The uint8 masks (1 = kept), and an int32 tensor of shape [len(scores)]
        with the number of NaN scores in each tensor, for the caller to check.
    """
    counts = tf.unstack(counts, num=len(scores))
    masks = [
        top_k_mask_device(s, k) for s, k in zip(scores, counts, strict=True)
    ]
    return masks, tf.stack([nan_count(s) for s in scores])
