"""Batches of arrays in memory."""

import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from sos.errors import UsageError
from sos.training.inputs.batches import (
    FOREVER,
    assert_steps,
    check_names,
    host_slices,
    replica_batch_size,
)


def array_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    seed: int,
    batch_size: int,
    step: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Returns infinite training batches of arrays in memory.

    The order is a function of the seed and the epoch. The batch of a step, over
    all replicas, does not depend on the number of hosts.

    Args:
        arrays: Arrays by name, with the examples along the first axis.
        seed: Seed of the order.
        batch_size: Number of examples in a step, over all replicas.
        step: Number of completed steps.
        context: Describes the host's share of the data.

    Returns:
        Batches of batch_size / replicas examples, for one replica of the host
        after another: dictionaries with the names of `arrays`. An epoch omits
        the examples that do not fill its last batch.

    Raises:
        UsageError: If the arrays differ in length or do not fill one batch, or
            the replicas cannot share a batch evenly.

    Example:
    >>> import numpy as np, sos.training, tensorflow as tf
    >>> batches = sos.training.array_batches(
    ...     {"x": np.arange(6)},
    ...     seed=0,
    ...     batch_size=3,
    ...     step=0,
    ...     context=tf.distribute.InputContext(),
    ... )
    >>> epoch = [batch["x"].numpy() for batch in batches.take(2)]
    >>> sorted(np.concatenate(epoch).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    tensors, examples = _tensors(arrays)
    replica_batch = replica_batch_size(batch_size, context)
    steps_per_epoch = examples // batch_size
    if not steps_per_epoch:
        raise UsageError(
            "An epoch must fill at least one batch. Received: "
            f"{examples} examples, batch_size={batch_size}"
        )
    first, completed = divmod(step, steps_per_epoch)

    def epoch_indices(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(examples), tf.stack([tf.constant(seed, tf.int64), epoch])
        )
        skip = tf.where(epoch == first, completed * batch_size, 0)
        return tf.data.Dataset.from_tensor_slices(
            order[skip : steps_per_epoch * batch_size]
        )

    indices = tf.data.Dataset.range(first, FOREVER).flat_map(epoch_indices)
    return (
        host_slices(indices, batch_size, context)
        .batch(replica_batch, drop_remainder=True)
        .map(lambda batch: _take(tensors, batch))
        .prefetch(tf.data.AUTOTUNE)
    )


def array_eval_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Returns evaluation batches with every example once, over all hosts.

    Args:
        arrays: Arrays by name, with the examples along the first axis.
        batch_size: Number of examples in a step, over all replicas.
        context: Describes the host's share of the data.

    Returns:
        Batches of batch_size / replicas examples, for one replica of the host
        after another; their number is known and the same on every host. They
        are dictionaries with the names of `arrays` and "weight", float32 of
        shape [batch], which is 1 for an example and 0 for padding. Padding
        repeats the last example.

    Raises:
        UsageError: If the arrays differ in length or one is named "weight", or
            the replicas cannot share a batch evenly.

    Example:
    >>> import numpy as np, sos.training, tensorflow as tf
    >>> batches = sos.training.array_eval_batches(
    ...     {"x": np.arange(3)},
    ...     batch_size=2,
    ...     context=tf.distribute.InputContext(),
    ... )
    >>> [batch["weight"].numpy().tolist() for batch in batches]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    check_names(arrays)
    tensors, examples = _tensors(arrays)
    replica_batch = replica_batch_size(batch_size, context)
    steps = math.ceil(examples / batch_size)
    indices = tf.data.Dataset.range(steps * batch_size)

    def take(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        weight = tf.cast(batch < examples, tf.float32)
        values = _take(tensors, tf.minimum(batch, examples - 1))
        return {**values, "weight": weight}

    return (
        host_slices(indices, batch_size, context)
        .batch(replica_batch, drop_remainder=True)
        .map(take)
        .apply(assert_steps(steps, context))
        .prefetch(tf.data.AUTOTUNE)
    )


def _tensors(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, tf.Tensor], int]:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise UsageError(
            "The arrays must have the same number of examples, and at least "
            f"one. Received: {lengths}"
        )
    # On the host, to save the accelerator's memory.
    with tf.device("CPU:0"):
        tensors = {name: tf.constant(array) for name, array in arrays.items()}
    return tensors, next(iter(lengths.values()))


def _take(
    tensors: Mapping[str, tf.Tensor], indices: tf.Tensor
) -> dict[str, tf.Tensor]:
    return {name: tf.gather(x, indices) for name, x in tensors.items()}
