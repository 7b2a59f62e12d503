"""Input that is a function of seed, epoch and step.

The batches of a step do not depend on where training began, nor on how many
hosts and replicas share them: replica after replica reads its slice of one
global batch. So a restart needs nothing but the step, and skips what was seen
before it is decoded.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

_FOREVER = 2**62


def record_batches(
    epoch_records: Callable[[tf.Tensor], tf.data.Dataset],
    decode: Callable[[Any, tf.Tensor], Any],
    *,
    records_per_epoch: int,
    batch_size: int,
    step: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Batches of records that are costly to decode, such as JPEG files.

    Records that do not fill a batch at the end of an epoch are left out.

    Args:
        epoch_records: Gives the records of an epoch, an int64 scalar, in their
            order in that epoch, not decoded. All hosts must give the same.
        decode: Called as `decode(record, number)`, where the int64 `number` of
            an example in the whole training is what random augmentation is to
            be drawn from. It returns tensors of static shape.
        records_per_epoch: The number of records in an epoch.
        batch_size: The number of records in a step, over all replicas.
        step: The number of steps that were made before.
        context: Which share of the data this host reads.

    Returns:
        Batches for one replica after another, without end.

    Raises:
        ValueError: If an epoch does not fill one batch, or the replicas cannot
            share a batch evenly.
    """
    replica_batch = _replica_batch(batch_size, context)
    records = _all_epochs(epoch_records, records_per_epoch, batch_size, step)
    records = records.enumerate(start=step * batch_size)
    # Not by batches, as records may have all shapes before they are decoded.
    size = batch_size // context.num_input_pipelines
    host = context.input_pipeline_id
    if size < batch_size:
        records = records.filter(
            lambda number, _: number % batch_size // size == host
        )
    return (
        records.map(
            lambda number, record: decode(record, number),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        .batch(replica_batch, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )


def array_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    seed: int,
    batch_size: int,
    step: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Batches of arrays in memory, in another order in every epoch.

    Args:
        arrays: By name, arrays with the examples along the first axis.
        seed: Seed of the orders.
        batch_size: The number of examples in a step, over all replicas.
        step: The number of steps that were made before.
        context: Which share of the data this host reads.

    Returns:
        Batches for one replica after another, without end: dictionaries with
        the names of `arrays`. Examples that do not fill a batch at the end of
        an epoch are left out.

    Raises:
        ValueError: If the arrays differ in length or do not fill one batch, or
            the replicas cannot share a batch evenly.
    """
    tensors, examples = _tensors(arrays)
    replica_batch = _replica_batch(batch_size, context)

    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(
            tf.random.experimental.stateless_shuffle(
                tf.range(examples),
                tf.stack([tf.constant(seed, tf.int64), epoch]),
            )
        )

    indices = _all_epochs(order, examples, batch_size, step)
    indices = _share(indices, batch_size, context)
    return (
        indices.batch(replica_batch, drop_remainder=True)
        .map(lambda batch: _take(tensors, batch))
        .prefetch(tf.data.AUTOTUNE)
    )


def evaluation_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Every example once, in batches of equal size.

    Args:
        arrays: By name, arrays with the examples along the first axis.
        batch_size: The number of examples in a batch, over all replicas.
        context: Which share of the data this host reads.

    Returns:
        `evaluation_batch_count` batches for each replica: dictionaries with
        the names of `arrays` and "weight", float32, which is 1 for an example
        and 0 for what only fills the last batch up.

    Raises:
        ValueError: If the arrays differ in length or one is named "weight", or
            the replicas cannot share a batch evenly.
    """
    if "weight" in arrays:
        raise ValueError(
            "No array may be named 'weight', as the weights that tell examples "
            f"from padding are. Received: {sorted(arrays)}"
        )
    tensors, examples = _tensors(arrays)
    replica_batch = _replica_batch(batch_size, context)
    padded = evaluation_batch_count(examples, batch_size) * batch_size
    indices = _share(tf.data.Dataset.range(padded), batch_size, context)

    def take(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        real = batch < examples
        taken = _take(tensors, tf.minimum(batch, examples - 1))
        return {**taken, "weight": tf.cast(real, tf.float32)}

    return (
        indices.batch(replica_batch, drop_remainder=True)
        .map(take)
        .prefetch(tf.data.AUTOTUNE)
    )


def evaluation_batch_count(examples: int, batch_size: int) -> int:
    """The number of batches that hold every example once."""
    return math.ceil(examples / batch_size)


def _all_epochs(
    epoch_records: Callable[[tf.Tensor], tf.data.Dataset],
    records_per_epoch: int,
    batch_size: int,
    step: int,
) -> tf.data.Dataset:
    """The records of all epochs from a step on, whole batches of each."""
    steps_per_epoch = records_per_epoch // batch_size
    if not steps_per_epoch:
        raise ValueError(
            "An epoch must fill at least one batch. Received: "
            f"{records_per_epoch} examples, batch_size={batch_size}"
        )
    first, skipped = divmod(step, steps_per_epoch)

    def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        skip = tf.where(epoch == first, skipped * batch_size, 0)
        records = epoch_records(epoch).take(steps_per_epoch * batch_size)
        return records.skip(tf.cast(skip, tf.int64))

    return tf.data.Dataset.range(first, _FOREVER).flat_map(of_epoch)


def _share(
    records: tf.data.Dataset,
    batch_size: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """This host's contiguous slice of every global batch."""
    hosts = context.num_input_pipelines
    if hosts == 1:
        return records
    size = batch_size // hosts
    begin = context.input_pipeline_id * size
    return (
        records.batch(batch_size, drop_remainder=True)
        .map(
            lambda *batch: tf.nest.map_structure(
                lambda x: x[begin : begin + size],
                batch if len(batch) > 1 else batch[0],
            )
        )
        .unbatch()
    )


def _replica_batch(batch_size: int, context: tf.distribute.InputContext) -> int:
    replicas = context.num_replicas_in_sync
    if batch_size < 1 or batch_size % replicas:
        raise ValueError(
            "The batch size must be a positive multiple of the number of "
            f"replicas. Received: batch_size={batch_size} for {replicas} "
            "replicas"
        )
    return batch_size // replicas


def _tensors(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, tf.Tensor], int]:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            "The arrays must have the same number of examples, and at least "
            f"one. Received: {lengths}"
        )
    # On the host: gathering there leaves the accelerator's memory alone.
    with tf.device("CPU:0"):
        tensors = {name: tf.constant(array) for name, array in arrays.items()}
    return tensors, next(iter(lengths.values()))


def _take(
    tensors: Mapping[str, tf.Tensor], indices: tf.Tensor
) -> dict[str, tf.Tensor]:
    return {name: tf.gather(x, indices) for name, x in tensors.items()}
