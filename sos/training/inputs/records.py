"""Batches of records in files; each host reads its own files."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from sos.errors import UsageError
from sos.training.inputs.batches import (
    assert_steps,
    check_names,
    replica_batch_size,
)
from sos.training.inputs.decoding import decode_batches
from sos.training.inputs.reading import (
    Element,
    example_seed,
    pair_with,
    read_ahead,
    read_part,
)
from sos.training.inputs.shards import (
    Part,
    Read,
    Shard,
    check_files,
    divide_among_hosts,
    strided_part,
)
from sos.training.inputs.shuffling import EpochPlan, read_shuffled

# Hosts that omit a larger fraction of an epoch's records log a warning.
_TOLERATED_FRACTION = 0.05


def record_batches(
    shards: Sequence[Shard],
    decode: Callable[[Any, tf.Tensor], Any],
    *,
    seed: int,
    batch_size: int,
    step: int,
    context: tf.distribute.InputContext,
    read: Read = tf.data.TFRecordDataset,
    shuffle_buffer: int = 10_000,
    cycle_length: int = 16,
    skip_corrupt: bool = False,
) -> tf.data.Dataset:
    """Returns infinite training batches of records, such as JPEG files.

    Each host reads its own files, chosen so that all hosts have about the same
    number of records. If there are fewer files than hosts, every host reads all
    files and takes every n-th record.

    In every epoch, the host's files are put in a random order and read in
    chapters of `cycle_length` files, which are interleaved. The records are
    then cut into blocks of up to `shuffle_buffer` and each block is shuffled.
    The cuts differ between epochs. While one block is used, the next is read,
    also across the end of an epoch: training does not wait where one ends,
    unless reading is slower than training.

    The order of the records is a function of the seed, the epoch, the host,
    `shards`, `batch_size`, `shuffle_buffer` and `cycle_length`, which must not
    change when training resumes. The seeds that `decode` receives are functions
    of the seed, the epoch and the record. Another number of hosts therefore
    changes the order, but not the augmentation. Every epoch has the same number
    of steps on all hosts. It omits the records that do not fill its last batch;
    these differ between epochs.

    When training resumes within an epoch, chapters that were used before are
    not opened. In the current chapter, records before the current block are
    read and skipped; in the block, those that were used before. None of them
    are decoded.

    Args:
        shards: The files, the same on all hosts.
        decode: Called as `decode(record, seed)`, where `record` is an element
            of `read` and `seed` is int32 of shape [2], for the functions
            `tf.random.stateless_*` and `tf.image.stateless_*`. Returns tensors
            of static shape.
        seed: Seed of order and augmentation.
        batch_size: Number of records in a step, over all replicas.
        step: Number of completed steps.
        context: Describes the host's share of the data.
        read: Opens a file. The records must be dense tensors or structures of
            them; their shapes may differ.
        shuffle_buffer: Number of undecoded records that are shuffled together.
            A host holds up to twice as many in memory. The first block is read
            before the first batch.
        cycle_length: Number of files that a host interleaves.
        skip_corrupt: If True, a record that `decode` cannot decode is replaced
            by zeros of weight 0 and logged, once. `decode` must then return a
            dictionary; "weight", float32, is added to it: 1, or 0 for such a
            record. Metrics must be finite for zeros, as 0 times NaN is NaN.
            Batch statistics include the zeros.

    Returns:
        Batches of batch_size / replicas records, for one replica of the host
        after another. Iterating raises `tf.errors.InvalidArgumentError`, which
        `usage_error` converts, if `decode` raises
        `tf.errors.InvalidArgumentError` or `tf.errors.DataLossError` and
        `skip_corrupt` is False; or if the number of records in a file differs
        from that in its `Shard`: at the end of the file if there are fewer,
        and when the first excess record is decoded.

    Raises:
        UsageError: If there are no shards, a file is missing, an epoch does not
            fill one batch on every host, the replicas cannot share a batch
            evenly, or `decode` does not return what `skip_corrupt` asks for.

    Example:
    >>> import sos.training
    >>> import tensorflow as tf
    >>> with tf.io.TFRecordWriter("digits") as writer:
    ...     for digit in range(10):
    ...         writer.write(str(digit))
    >>> def decode(record, seed):
    ...     noise = tf.random.stateless_uniform((), seed)
    ...     return tf.strings.to_number(record) + noise
    >>> batches = sos.training.record_batches(
    ...     [sos.training.Shard("digits", 10)],
    ...     decode,
    ...     seed=0,
    ...     batch_size=4,
    ...     step=0,
    ...     context=tf.distribute.InputContext(),
    ... )
    >>> next(iter(batches)).shape
    TensorShape([4])
    """
    replica_batch = replica_batch_size(batch_size, context)
    _check_positive(shuffle_buffer=shuffle_buffer, cycle_length=cycle_length)
    hosts, host = context.num_input_pipelines, context.input_pipeline_id
    parts = divide_among_hosts(shards, hosts)
    part = parts[host]
    check_files(part.paths)
    host_batch = batch_size // hosts
    steps_per_epoch = min(each.examples for each in parts) // host_batch
    _check_steps_per_epoch(steps_per_epoch, parts, batch_size)
    first, completed = divmod(step, steps_per_epoch)
    per_epoch = steps_per_epoch * host_batch
    logging.info(
        "Host %d of %d reads %d of %d files, %d of their %d records in each "
        "epoch of %d steps. It begins in epoch %d and skips %d records. "
        "Another number of hosts would give another order.",
        host,
        hosts,
        len(part.paths),
        len(shards),
        per_epoch,
        part.examples,
        steps_per_epoch,
        first,
        completed * host_batch,
    )

    plan = EpochPlan(
        part=part,
        host=host,
        seed=seed,
        per_epoch=per_epoch,
        first=first,
        completed=completed * host_batch,
        shuffle_buffer=shuffle_buffer,
    )

    def decode_record(element: Element, weight: tf.Tensor) -> Any:
        example = decode(element.record, example_seed(element))
        if not skip_corrupt:
            return example
        _check_example(example)
        return {**example, "weight": weight}

    return decode_batches(
        pair_with(read_shuffled(plan, read, cycle_length), 1.0),
        decode_record,
        replica_batch,
        skip_corrupt,
    ).prefetch(tf.data.AUTOTUNE)


def record_eval_batches(
    shards: Sequence[Shard],
    decode: Callable[[Any], Mapping[str, Any]],
    *,
    batch_size: int,
    context: tf.distribute.InputContext,
    read: Read = tf.data.TFRecordDataset,
    cycle_length: int = 16,
    skip_corrupt: bool = False,
) -> tf.data.Dataset:
    """Returns evaluation batches with every record once, over all hosts.

    Hosts share the files as in `record_batches`.

    Args:
        shards: The files, the same on all hosts.
        decode: Called as `decode(record)`, where `record` is an element of
            `read`. Returns a dictionary of tensors of static shape.
        batch_size: Number of records in a step, over all replicas.
        context: Describes the host's share of the data.
        read: Opens a file. The records must be dense tensors or structures of
            them; their shapes may differ.
        cycle_length: Number of files that a host interleaves.
        skip_corrupt: If True, a record that `decode` cannot decode is replaced
            by zeros of weight 0 and logged, as in `record_batches`.

    Returns:
        Batches of batch_size / replicas records, for one replica of the host
        after another; their number is known and the same on every host. They
        are dictionaries of the tensors of `decode` and "weight", float32 of
        shape [batch], which is 1 for a record and 0 for padding. Padding
        repeats records. Iterating raises `tf.errors.InvalidArgumentError`,
        which `usage_error` converts, if a record cannot be decoded or the
        number of records in a file differs from that in its `Shard`.

    Raises:
        UsageError: If there are no records, a file is missing, `decode` does
            not return a dictionary or returns a tensor named "weight", or the
            replicas cannot share a batch evenly.

    Example:
    >>> import sos.training
    >>> import tensorflow as tf
    >>> with tf.io.TFRecordWriter("digits") as writer:
    ...     for digit in range(3):
    ...         writer.write(str(digit))
    >>> batches = sos.training.record_eval_batches(
    ...     [sos.training.Shard("digits", 3)],
    ...     lambda record: {"x": tf.strings.to_number(record)},
    ...     batch_size=4,
    ...     context=tf.distribute.InputContext(),
    ... )
    >>> [batch["weight"].numpy().tolist() for batch in batches]
    [[1.0, 1.0, 1.0, 0.0]]
    """
    replica_batch = replica_batch_size(batch_size, context)
    _check_positive(cycle_length=cycle_length)
    hosts = context.num_input_pipelines
    parts = divide_among_hosts(shards, hosts)
    part = parts[context.input_pipeline_id]
    if not any(each.examples for each in parts):
        raise UsageError(
            "Evaluation data must have at least one record. Received: "
            f"{len(shards)} files without records"
        )
    check_files(part.paths)
    host_batch = batch_size // hosts
    steps = math.ceil(max(each.examples for each in parts) / host_batch)

    def read_in_order(part: Part) -> tf.data.Dataset:
        with tf.device("CPU:0"):
            order = tf.range(len(part.paths))
            key = tf.constant(0, tf.int64)
            return read_part(part, read, order, key, cycle_length)

    def decode_record(element: Element, weight: tf.Tensor) -> dict[str, Any]:
        example = decode(element.record)
        _check_example(example)
        return {**example, "weight": weight}

    records = read_in_order(part)
    if part.examples:
        padding = records
    else:
        # A host may lack records only if all hosts read all files. It takes
        # those of others as padding, because zeros could give NaN.
        padding = read_in_order(strided_part(shards))
    records = read_ahead(records)
    dataset = pair_with(records, 1.0).concatenate(
        pair_with(padding.repeat(), 0.0)
    )
    return (
        decode_batches(
            dataset.take(steps * host_batch),
            decode_record,
            replica_batch,
            skip_corrupt,
        )
        .apply(assert_steps(steps, context))
        .prefetch(tf.data.AUTOTUNE)
    )


def _check_steps_per_epoch(
    steps_per_epoch: int, parts: Sequence[Part], batch_size: int
) -> None:
    examples = sum(part.examples for part in parts)
    fewest = min(part.examples for part in parts)
    if not steps_per_epoch:
        raise UsageError(
            "An epoch must fill at least one batch on every host. Lower the "
            "batch size, or divide the records evenly among more files. "
            f"Received: {examples} examples, batch_size={batch_size}, "
            f"{len(parts)} hosts of which one reads {fewest} examples"
        )
    omitted_fraction = 1 - steps_per_epoch / (examples // batch_size)
    if omitted_fraction > _TOLERATED_FRACTION:
        logging.warning(
            "Every epoch omits %.0f %% of the records, because hosts read "
            "between %d and %d. Divide the records evenly among a multiple of "
            "%d files.",
            100 * omitted_fraction,
            fewest,
            max(part.examples for part in parts),
            len(parts),
        )


def _check_example(example: Any) -> None:
    if not isinstance(example, Mapping):
        raise UsageError(
            "`decode` must return a dictionary of tensors for evaluation and "
            f"for `skip_corrupt`. Received: {example!r}"
        )
    check_names(example)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise UsageError(
                f"`{name}` must be at least 1. Received: {name}={value}"
            )
