"""Input pipelines that are functions of the seed, the epoch and the step.

To resume, they need only the number of completed steps: the following batches
do not depend on where training began. `array_batches` and `array_eval_batches`
read arrays in memory. `record_batches` and `record_eval_batches` read files of
records; each host reads its own files.
"""

import concurrent.futures
import contextlib
import dataclasses
import heapq
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from sos.errors import StorageError, UsageError, reason

#: Maps the path of a file, a string scalar, to a data set of its records.
Read = Callable[[tf.Tensor], tf.data.Dataset]

_FOREVER = 2**62

# Hosts that omit a larger fraction of an epoch's records log a warning.
_TOLERATED_FRACTION = 0.05

# Marks the errors that `usage_error` recognizes.
_WRONG_COUNT = "The number of records in a file differs from its shard:"
_CORRUPT = "A record cannot be decoded:"
_CORRUPT_END = "<end>"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    Attributes:
        path: Path of the file, in any file system that TensorFlow can read.
        examples: Number of records in the file.

    Example:
    >>> import sos.training
    >>> sos.training.Shard("train-00000-of-01024", 1251).examples
    1251
    """

    path: str
    examples: int


def list_shards(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    counts: Sequence[int] | None = None,
    read: Read = tf.data.TFRecordDataset,
) -> list[Shard]:
    """Lists files of records with the number of records in each.

    TensorFlow Datasets knows the numbers:

    ```python
    split = tfds.builder("imagenet2012").info.splits["train"]
    shards = list_shards(split.filepaths, counts=split.shard_lengths)
    ```

    Args:
        files: A glob pattern, whose matches are sorted, or paths.
        counts: Number of records in each file. By default all files are read to
            count their records.
        read: Opens a file to count its records.

    Returns:
        One `Shard` per file. The list must be the same on all hosts.

    Raises:
        UsageError: If no file matches, a file is missing or listed twice, or
            the number of counts differs from the number of files.
        StorageError: If a file cannot be read.

    Example:
    >>> import sos.training
    >>> import tensorflow as tf
    >>> for index in range(2):
    ...     with tf.io.TFRecordWriter(f"train-{index}") as writer:
    ...         for record in (b"a", b"b", b"c"):
    ...             writer.write(record)
    >>> shards = sos.training.list_shards("train-*")
    >>> [shard.examples for shard in shards]
    [3, 3]
    """
    if isinstance(files, str | os.PathLike):
        pattern = os.fspath(files)
        paths = sorted(tf.io.gfile.glob(pattern))
        if not paths:
            raise UsageError(
                "The pattern of an input's files must match at least one file. "
                f"Received: {pattern!r}, which matches none"
            )
    else:
        paths = [os.fspath(path) for path in files]
    _check_paths(paths)
    if counts is None:
        logging.info("Counting the records of %d files.", len(paths))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            counts = list(pool.map(lambda path: _count(path, read), paths))
    elif len(counts) != len(paths):
        raise UsageError(
            "`counts` must have one number per file. Received: "
            f"{len(counts)} numbers for {len(paths)} files"
        )
    return [
        Shard(path, int(examples))
        for path, examples in zip(paths, counts, strict=True)
    ]


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
    replica_batch = _replica_batch(batch_size, context)
    _check_positive(shuffle_buffer=shuffle_buffer, cycle_length=cycle_length)
    hosts, host = context.num_input_pipelines, context.input_pipeline_id
    parts = _divide(shards, hosts)
    part = parts[host]
    _check_files(part.paths)
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

    plan = _EpochPlan(
        part=part,
        host=host,
        seed=seed,
        per_epoch=per_epoch,
        first=first,
        completed=completed * host_batch,
        shuffle_buffer=shuffle_buffer,
    )

    def decode_record(element: _Element, weight: tf.Tensor) -> Any:
        example = decode(element.record, _example_seed(element))
        if not skip_corrupt:
            return example
        _check_example(example)
        return {**example, "weight": weight}

    return _decode_batches(
        _with(_shuffle(plan, read, cycle_length), 1.0),
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
    replica_batch = _replica_batch(batch_size, context)
    _check_positive(cycle_length=cycle_length)
    hosts = context.num_input_pipelines
    parts = _divide(shards, hosts)
    part = parts[context.input_pipeline_id]
    if not any(each.examples for each in parts):
        raise UsageError(
            "Evaluation data must have at least one record. Received: "
            f"{len(shards)} files without records"
        )
    _check_files(part.paths)
    host_batch = batch_size // hosts
    steps = math.ceil(max(each.examples for each in parts) / host_batch)

    def read_part(part: _Part) -> tf.data.Dataset:
        with tf.device("CPU:0"):
            order = tf.range(len(part.paths))
            key = tf.constant(0, tf.int64)
            return _read_part(part, read, order, key, cycle_length)

    def decode_record(element: _Element, weight: tf.Tensor) -> dict[str, Any]:
        example = decode(element.record)
        _check_example(example)
        return {**example, "weight": weight}

    records = read_part(part)
    if part.examples:
        padding = records
    else:
        # A host may lack records only if all hosts read all files. It takes
        # those of others as padding, because zeros could give NaN.
        padding = read_part(_whole(shards))
    records = _read_ahead(records)
    dataset = _with(records, 1.0).concatenate(_with(padding.repeat(), 0.0))
    return (
        _decode_batches(
            dataset.take(steps * host_batch),
            decode_record,
            replica_batch,
            skip_corrupt,
        )
        .apply(_assert_steps(steps, context))
        .prefetch(tf.data.AUTOTUNE)
    )


def usage_error(error: tf.errors.OpError) -> UsageError | None:
    """Converts an error raised while iterating a data set of this module.

    Args:
        error: The error that TensorFlow raised, for example in a step.

    Returns:
        A `UsageError` that names the file if its number of records differs from
        that in its `Shard`, or the file and the record if it cannot be decoded;
        None for any other error.
    """
    match = re.search(
        rf"\[{_CORRUPT}\] \[(.*?)\] \[(\d+)\] \[(.*?){_CORRUPT_END}\]",
        error.message,
        re.DOTALL,
    )
    if match:
        return UsageError(
            "`decode` must decode every record. Restore the file, or skip such "
            f"records with `skip_corrupt=True`. Received: record {match[2]} of "
            f"{match[1]}, counted from 0. Cause: {match[3]}"
        )
    match = re.search(
        rf"\[{_WRONG_COUNT}\] \[(.*?)\] \[(\d+)\] \[(\d+)\]", error.message
    )
    if not match:
        return None
    path, examples, actual = match[1], int(match[2]), int(match[3])
    actual = actual if actual < examples else f"more than {examples}"
    return UsageError(
        "A shard must have the number of records that are in its file. Correct "
        "the number, or restore the file. Received: "
        f"{Shard(path, examples)}, whose file has {actual} records"
    )


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Converts errors of reading records within the scope.

    Yields:
        Nothing.

    Raises:
        UsageError: If the number of records in a file differs from that in its
            `Shard`, or a record cannot be decoded.
        StorageError: If a record is damaged.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        if (usage := usage_error(error)) is None:
            raise
        raise usage from error
    except tf.errors.DataLossError as error:
        raise StorageError(
            f"A record of the input is damaged: {reason(error)}. Restore its "
            "file, or remove it from the input. `list_shards` without `counts` "
            "finds it."
        ) from error


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
    replica_batch = _replica_batch(batch_size, context)
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

    indices = tf.data.Dataset.range(first, _FOREVER).flat_map(epoch_indices)
    return (
        _host_slices(indices, batch_size, context)
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
    _check_names(arrays)
    tensors, examples = _tensors(arrays)
    replica_batch = _replica_batch(batch_size, context)
    steps = math.ceil(examples / batch_size)
    indices = tf.data.Dataset.range(steps * batch_size)

    def take(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        weight = tf.cast(batch < examples, tf.float32)
        values = _take(tensors, tf.minimum(batch, examples - 1))
        return {**values, "weight": weight}

    return (
        _host_slices(indices, batch_size, context)
        .batch(replica_batch, drop_remainder=True)
        .map(take)
        .apply(_assert_steps(steps, context))
        .prefetch(tf.data.AUTOTUNE)
    )


def whole_batch(maximum: int, context: tf.distribute.InputContext) -> int:
    """Lowers a batch size to a multiple of the number of replicas.

    Args:
        maximum: The batch size to lower.
        context: Says how many replicas there are.

    Returns:
        The batch size; at least one example for each replica.

    Example:
    >>> import sos.training.inputs
    >>> import tensorflow as tf
    >>> context = tf.distribute.InputContext(num_replicas_in_sync=3)
    >>> sos.training.inputs.whole_batch(10, context)
    9
    """
    replicas = context.num_replicas_in_sync
    return max(1, maximum // replicas) * replicas


class _Element(NamedTuple):
    """A record with its origin, all tensors.

    Attributes:
        record: The record.
        position: Its position in the file, int64.
        path: Path of the file.
        count: Number of records in the file according to its `Shard`, int64.
        key: Key of the epoch and the file, int64; see `_fold`.
    """

    record: Any
    position: tf.Tensor
    path: tf.Tensor
    count: tf.Tensor
    key: tf.Tensor


@dataclasses.dataclass(frozen=True)
class _Part:
    """The records that a host reads: every `stride`-th of some files.

    Attributes:
        numbers: Index of each file among all.
        paths: Path of each file.
        counts: Number of records in each file.
        offsets: Position of the first record to take from each file.
        stride: Distance between two records to take.
    """

    numbers: list[int]
    paths: list[str]
    counts: list[int]
    offsets: list[int]
    stride: int

    @property
    def lengths(self) -> list[int]:
        """Number of records to take from each file."""
        return [
            len(range(offset, count, self.stride))
            for offset, count in zip(self.offsets, self.counts, strict=True)
        ]

    @property
    def examples(self) -> int:
        """Number of records."""
        return sum(self.lengths)


def _whole(shards: Sequence[Shard], hosts: int = 1, host: int = 0) -> _Part:
    """Returns every `hosts`-th record of all files."""
    begins = np.cumsum([0] + [shard.examples for shard in shards])
    return _Part(
        numbers=list(range(len(shards))),
        paths=[shard.path for shard in shards],
        counts=[shard.examples for shard in shards],
        # As if all files were one.
        offsets=[int((host - begin) % hosts) for begin in begins[:-1]],
        stride=hosts,
    )


def _divide(shards: Sequence[Shard], hosts: int) -> list[_Part]:
    """Divides the records among hosts."""
    if not shards:
        raise UsageError(
            "An input needs at least one file of records. Received: no shards"
        )
    _check_unique([shard.path for shard in shards])
    for shard in shards:
        if shard.examples < 0:
            raise UsageError(
                "The number of records in a file must be at least 0. "
                f"Received: {shard}"
            )
    if sum(shard.examples > 0 for shard in shards) < hosts:
        return [_whole(shards, hosts, host) for host in range(hosts)]
    # The largest file first, each to the host with the fewest records. Files of
    # equal size go to the hosts in turns.
    numbers: list[list[int]] = [[] for _ in range(hosts)]
    loads = [(0, host) for host in range(hosts)]
    for number in sorted(
        range(len(shards)), key=lambda number: -shards[number].examples
    ):
        load, host = heapq.heappop(loads)
        numbers[host].append(number)
        heapq.heappush(loads, (load + shards[number].examples, host))
    return [
        _Part(
            numbers=sorted(files),
            paths=[shards[number].path for number in sorted(files)],
            counts=[shards[number].examples for number in sorted(files)],
            offsets=[0] * len(files),
            stride=1,
        )
        for files in numbers
    ]


def _shuffle(
    plan: "_EpochPlan", read: Read, cycle_length: int
) -> tf.data.Dataset:
    """Reads and shuffles the records of all epochs from the first on.

    The records are read one after another, across the borders of epochs, into
    blocks. While one is used, the next is read.

    Returns:
        Elements of type `_Element`, without end.
    """

    def read_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        state = plan.state(epoch)
        slot = state.first_block * plan.block
        start = tf.maximum(slot - state.shift, 0)
        records = _read_part(
            plan.part,
            read,
            state.order,
            state.key,
            cycle_length,
            start,
        ).take(plan.part.examples - start)
        # Every epoch fills the same number of blocks. Fillers are filtered out
        # of the blocks below.
        filler = tf.data.Dataset.from_tensors(
            (_zeros(records.element_spec), False)
        )
        before = tf.maximum(state.shift - slot, 0)
        after = plan.blocks * plan.block - state.shift - plan.part.examples
        return (
            filler.repeat(before)
            .concatenate(_with(records, True))
            .concatenate(filler.repeat(after))
        )

    def shuffle_block(index: tf.Tensor, block: Any) -> tf.data.Dataset:
        # Otherwise the user's `tf.random.set_seed` would change the order. This
        # affects only the function that is being traced.
        tf.random.set_seed(1)
        begin = plan.state(tf.constant(plan.first, tf.int64)).first_block
        index += plan.first * plan.blocks + begin
        state = plan.state(index // plan.blocks)
        number = index % plan.blocks
        # In the order of the epoch, the block begins with this record.
        begin = tf.maximum(number * plan.block - state.shift, 0)
        skip = tf.maximum(state.begin - begin, 0)
        return (
            tf.data.Dataset.zip(block)
            .filter(lambda _, is_record: is_record)
            .map(lambda element, _: element)
            .shuffle(
                plan.block,
                seed=_fold(state.order_key, 3 + number),
                reshuffle_each_iteration=False,
            )
            .skip(skip)
            .take(tf.maximum(state.end - begin - skip, 0))
        )

    return (
        tf.data.Dataset.range(plan.first, _FOREVER)
        .flat_map(read_epoch)
        .window(plan.block)
        .prefetch(1)
        .enumerate()
        .flat_map(shuffle_block)
    )


class _EpochState(NamedTuple):
    """How a host reads and shuffles the records of an epoch, all tensors.

    Attributes:
        key: Key of the epoch, int64; see `_fold`.
        order_key: Key of the epoch and the host, int64.
        order: A permutation of the host's files.
        shift: Number of fillers before the first record, which shifts the
            borders of the blocks.
        begin: Index in the shuffled epoch of the first record to use.
        end: Index in the shuffled epoch behind the last record to use.
        first_block: First block to read.
    """

    key: tf.Tensor
    order_key: tf.Tensor
    order: tf.Tensor
    shift: tf.Tensor
    begin: tf.Tensor
    end: tf.Tensor
    first_block: tf.Tensor


@dataclasses.dataclass(frozen=True)
class _EpochPlan:
    """How a host reads and shuffles its records.

    Attributes:
        part: The records.
        host: Index of the host.
        seed: Seed of the order.
        per_epoch: Number of records that an epoch uses.
        first: The epoch to begin in.
        completed: Number of records of the first epoch that were used before.
        shuffle_buffer: Number of records that are shuffled together.
    """

    part: "_Part"
    host: int
    seed: int
    per_epoch: int
    first: int
    completed: int
    shuffle_buffer: int

    @property
    def blocks(self) -> int:
        """Number of blocks in an epoch, whatever their shift."""
        if self.part.examples <= self.shuffle_buffer:
            return 1
        # One half more, to shift them by up to half a block.
        return math.ceil(self.part.examples / self.shuffle_buffer + 0.5)

    @property
    def block(self) -> int:
        """Number of records that are shuffled together.

        The first and the last block of an epoch share one and a half: much
        less would be used before the next block is there.
        """
        if self.blocks == 1:
            return self.part.examples
        return math.ceil(self.part.examples / (self.blocks - 0.5))

    def state(self, epoch: tf.Tensor) -> _EpochState:
        """Returns the state of an epoch, int64 scalar, a function of it."""
        key = _fold(tf.constant(self.seed, tf.int64), epoch)
        # Negative: the keys of files are folded from 0 on.
        order_key = _fold(key, -1 - self.host)
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(self.part.paths)), tf.stack([order_key, 0])
        )

        def draw(number: int, below: int) -> tf.Tensor:
            return tf.random.stateless_uniform(
                (),
                tf.stack([order_key, number]),
                maxval=below,
                dtype=tf.int64,
            )

        # The beginning is random. Otherwise blocks that are small compared to
        # the files would omit the same records in every epoch. So is the shift.
        # Otherwise a file that is large compared to a block would be divided
        # among blocks at the same records in every epoch.
        begin = draw(1, self.part.examples - self.per_epoch + 1)
        shift = draw(2, self.block // 2 + 1 if self.blocks > 1 else 1)
        end = begin + self.per_epoch
        is_first = tf.equal(epoch, self.first)
        begin += tf.where(is_first, tf.constant(self.completed, tf.int64), 0)
        first_block = tf.where(is_first, (begin + shift) // self.block, 0)
        return _EpochState(
            key, order_key, order, shift, begin, end, first_block
        )


def _read_part(
    part: _Part,
    read: Read,
    order: tf.Tensor,
    epoch_key: tf.Tensor,
    cycle_length: int,
    start: tf.Tensor | int = 0,
) -> tf.data.Dataset:
    """Reads a host's records, and interleaves the files of each chapter.

    A chapter is `cycle_length` files in a row. Those before the first record to
    read are not opened.

    Args:
        part: The records.
        read: Opens a file.
        order: A permutation of the files.
        epoch_key: int64 scalar to derive the keys of files from.
        cycle_length: Number of files to interleave.
        start: Index of the first record to read, int64 scalar.

    Returns:
        Elements of type `_Element`. Reading and filtering one calls no traced
        function, which would take several times as long.
    """

    def read_file(
        number: tf.Tensor, path: tf.Tensor, count: tf.Tensor, offset: tf.Tensor
    ) -> tf.data.Dataset:
        def constant(value: Any) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensors(value)

        def fail(_: tf.Tensor) -> tf.data.Dataset:
            actual = read(path).reduce(np.int64(0), lambda n, _: n + 1)
            _assert_count(False, path, count, actual)
            return records

        records = read(path)
        spec = records.element_spec
        if not all(isinstance(x, tf.TensorSpec) for x in tf.nest.flatten(spec)):
            raise UsageError(
                "`read` must return a data set of dense tensors or structures "
                f"of them. Received: elements of {spec}"
            )
        records = tf.data.Dataset.zip(records, constant(True).repeat())
        # An end mark, which is filtered out below, follows `count` records. If
        # there are fewer records, `fail` is called. If there are more, one of
        # them is at the position `count` instead of the mark.
        marked = (
            records.concatenate(constant((_zeros(spec), False)))
            .concatenate(tf.data.Dataset.range(1).flat_map(fail))
            .take(count + 1)
        )
        key = _fold(epoch_key, number)
        elements = tf.data.Dataset.zip(
            marked, constant((path, count, key)).repeat()
        ).enumerate()
        if part.stride > 1:
            elements = elements.shard(part.stride, offset)
        return elements.filter(lambda _, element: element[0][1]).map(
            lambda position, element: _Element(
                element[0][0], position, *element[1]
            )
        )

    columns = (
        tf.constant(part.numbers, tf.int64),
        tf.constant(part.paths, tf.string),
        tf.constant(part.counts, tf.int64),
        tf.constant(part.offsets, tf.int64),
    )
    columns = tuple(tf.gather(column, order) for column in columns)

    def read_chapter(chapter: tf.Tensor) -> tf.data.Dataset:
        files = slice(chapter * cycle_length, (chapter + 1) * cycle_length)
        return tf.data.Dataset.from_tensor_slices(
            tuple(column[files] for column in columns)
        ).interleave(
            read_file,
            cycle_length=cycle_length,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    cycle_length = min(cycle_length, len(part.paths))
    # The number of records before each file, then before each chapter.
    begins = tf.cumsum(tf.gather(tf.constant(part.lengths, tf.int64), order))
    begins = tf.concat([[0], begins], axis=0)[:-1:cycle_length]
    start = tf.cast(start, tf.int64)
    first = tf.searchsorted(begins, [start], side="right")[0] - 1
    # It opens the next chapter's files ahead.
    return (
        tf.data.Dataset.range(
            tf.cast(first, tf.int64), math.ceil(len(part.paths) / cycle_length)
        )
        .interleave(
            read_chapter,
            cycle_length=1,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        .skip(start - begins[first])
    )


def _decode_batches(
    dataset: tf.data.Dataset,
    decode: Callable[[_Element, tf.Tensor], Any],
    batch_size: int,
    skip_corrupt: bool,
) -> tf.data.Dataset:
    """Decodes records in parallel and batches them.

    Records are decoded as if nothing could fail. Only a batch that fails is
    decoded again, where each record costs about 0.1 ms more.

    Args:
        dataset: Pairs of an `_Element` and its weight, a multiple of
            `batch_size`.
        decode: Returns an example, with its weight if `skip_corrupt`.
        batch_size: Number of examples in a batch.
        skip_corrupt: Whether examples that cannot be decoded are replaced by
            zeros of weight 0, not raised as errors.
    """
    trace = tf.function(decode, input_signature=dataset.element_spec)
    causes = _Causes(trace, dataset.element_spec, skip_corrupt)

    def decode_checked(element: _Element, weight: tf.Tensor) -> Any:
        _check_position(element)
        return decode(element, weight)

    def report(element: _Element, weight: tf.Tensor) -> Any:
        cause = causes(element, weight)
        decodable = tf.equal(cause, "")
        if skip_corrupt:
            return tf.cond(
                decodable,
                lambda: trace(element, weight),
                lambda: tf.nest.map_structure(
                    lambda x: tf.zeros(x.shape, x.dtype), spec
                ),
            )
        assertion = tf.debugging.Assert(
            decodable,
            [
                _CORRUPT,
                element.path,
                tf.cast(element.position, tf.int32),
                cause + _CORRUPT_END,
            ],
        )
        # Raises an error that is no fault of the record.
        with tf.control_dependencies([assertion]):
            return trace(*tf.nest.map_structure(tf.identity, (element, weight)))

    def decode_or_report(element: _Element, weight: tf.Tensor) -> Any:
        _check_position(element)
        pair = tf.data.Dataset.from_tensors((element, weight))
        # The second data set is read only if the first is empty.
        return (
            pair.map(trace)
            .ignore_errors()
            .concatenate(pair.map(report))
            .take(1)
            .get_single_element()
        )

    def decode_batch(*parts: Any) -> tf.data.Dataset:
        batch = tf.data.Dataset.zip(parts)

        def attempt(function: Callable[..., Any]) -> tf.data.Dataset:
            return batch.map(
                function, num_parallel_calls=calls, deterministic=True
            ).batch(batch_size, drop_remainder=True)

        # Errors of reading are not ignored: `batch` is in memory.
        return (
            attempt(decode_checked)
            .ignore_errors()
            .concatenate(attempt(decode_or_report))
            .take(1)
        )

    spec = dataset.map(decode_checked).element_spec
    _check_static_shapes(spec)
    # Data sets that live for one batch have no time to be tuned.
    calls = os.cpu_count() or 1
    # Two more batches than these are decoded ahead.
    batches = math.ceil(2 * calls / batch_size)
    return dataset.window(batch_size, drop_remainder=True).interleave(
        decode_batch,
        cycle_length=batches,
        num_parallel_calls=batches,
        deterministic=True,
    )


class _Causes:
    """Finds out why records cannot be decoded, and logs it.

    Args:
        decode: A traced function of an `_Element` and a weight.
        spec: Element spec of the arguments of `decode`.
        log: Whether to log the records that are corrupt.
    """

    def __init__(
        self, decode: Callable[[_Element, tf.Tensor], Any], spec: Any, log: bool
    ) -> None:
        self._decode = decode
        self._spec = spec
        self._log = log

    def __call__(self, element: _Element, weight: tf.Tensor) -> tf.Tensor:
        """Returns the cause, or "" if the record is not corrupt."""
        cause = tf.numpy_function(
            self._find,
            tf.nest.flatten((element, weight)),
            tf.string,
            # Otherwise `enable_op_determinism` would decode one by one.
            stateful=False,
        )
        return tf.ensure_shape(cause, ())

    def _find(self, *values: Any) -> bytes:
        with tf.device("CPU:0"):
            tensors = [
                tf.constant(value, spec.dtype)
                for value, spec in zip(
                    values, tf.nest.flatten(self._spec), strict=True
                )
            ]
            element, weight = tf.nest.pack_sequence_as(self._spec, tensors)
            try:
                self._decode(element, weight)
            except (
                tf.errors.InvalidArgumentError,
                tf.errors.DataLossError,
            ) as error:
                cause = reason(error) or type(error).__name__
            except tf.errors.OpError:
                return b""
            else:
                return b""
        if self._log:
            _log_corrupt(
                element.path.numpy().decode(), int(element.position), cause
            )
        return cause.encode()


# Path and position of the corrupt records that this process has met.
_corrupt: set[tuple[str, int]] = set()


def _log_corrupt(path: str, position: int, cause: str) -> None:
    """Logs a corrupt record, once, with the number of all."""
    if (path, position) in _corrupt:
        return
    _corrupt.add((path, position))
    logging.warning(
        "Record %d of %s, counted from 0, has weight 0, because it cannot be "
        "decoded: %s. Corrupt records so far: %d",
        position,
        path,
        cause,
        len(_corrupt),
    )


def _with(dataset: tf.data.Dataset, value: Any) -> tf.data.Dataset:
    """Pairs every element with a constant."""
    values = tf.data.Dataset.from_tensors(tf.constant(value)).repeat()
    return tf.data.Dataset.zip(dataset, values)


def _read_ahead(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Checks the position of each element before it yields the previous one.

    It yields the last record only after all files were read to their ends.
    Otherwise nothing would read on after a last batch that is full.
    """

    def swap(last: _Element, element: _Element) -> tuple[_Element, _Element]:
        _check_position(element)
        return element, last

    end = _zeros(dataset.element_spec)
    end = end._replace(count=tf.constant(1, tf.int64))
    return (
        dataset.concatenate(tf.data.Dataset.from_tensors(end))
        .scan(end, swap)
        .skip(1)
    )


def _check_position(element: _Element) -> None:
    _assert_count(
        element.position < element.count,
        element.path,
        element.count,
        element.position,
    )


def _assert_count(
    condition: Any, path: tf.Tensor, count: tf.Tensor, actual: tf.Tensor
) -> None:
    # With these types, an assertion that holds is cheap.
    numbers = [tf.cast(number, tf.int32) for number in (count, actual)]
    tf.debugging.Assert(condition, [_WRONG_COUNT, path, *numbers])


def _zeros(spec: Any) -> Any:
    """Returns small tensors that match a spec."""
    return tf.nest.map_structure(
        lambda x: tf.zeros(
            [size or 0 for size in x.shape] if x.shape.rank else [], x.dtype
        ),
        spec,
    )


def _fold(key: tf.Tensor, number: Any) -> tf.Tensor:
    """Derives a key from another key and a number, all int64 scalars."""
    return tf.random.stateless_uniform(
        (),
        tf.stack([key, tf.cast(number, tf.int64)]),
        minval=None,
        maxval=None,
        dtype=tf.int64,
    )


def _example_seed(element: _Element) -> tf.Tensor:
    """Returns the seed, int32 of shape [2], of an example in an epoch."""
    return tf.random.stateless_uniform(
        (2,),
        tf.stack([element.key, element.position]),
        minval=None,
        maxval=None,
        dtype=tf.int32,
    )


def _host_slices(
    indices: tf.data.Dataset,
    batch_size: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Returns the host's contiguous slice of every global batch."""
    hosts = context.num_input_pipelines
    if hosts == 1:
        return indices
    size = batch_size // hosts
    begin = context.input_pipeline_id * size
    return (
        indices.batch(batch_size, drop_remainder=True)
        .map(lambda batch: batch[begin : begin + size])
        .unbatch()
    )


def _assert_steps(
    steps: int, context: tf.distribute.InputContext
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Asserts the number of batches, one per step and replica."""
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    return tf.data.experimental.assert_cardinality(steps * replicas)


def _count(path: str, read: Read) -> int:
    try:
        records = read(tf.constant(path))
        return int(records.reduce(np.int64(0), lambda count, _: count + 1))
    except tf.errors.OpError as error:
        raise StorageError(
            f"The records of {path} cannot be read. Restore the file or remove "
            f"it from the input. Cause: {reason(error)}"
        ) from error


def _check_paths(paths: Sequence[str]) -> None:
    if not paths:
        raise UsageError(
            "An input needs at least one file of records. Received: no paths"
        )
    _check_unique(paths)
    _check_files(paths)


def _check_unique(paths: Sequence[str]) -> None:
    if len(set(paths)) < len(paths):
        duplicate = next(path for path in paths if paths.count(path) > 1)
        raise UsageError(
            "The files of an input must differ. "
            f"Received: {duplicate} more than once"
        )


def _check_files(paths: Sequence[str]) -> None:
    """Raises `UsageError` if a file is missing."""
    # A remote file system lists a directory in one request. One per file would
    # take minutes.
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        directory, name = posixpath.split(path)
        if directory not in listed:
            try:
                names = tf.io.gfile.listdir(directory or ".")
            except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
                names = []
            listed[directory] = {entry.rstrip("/") for entry in names}
        if name not in listed[directory]:
            missing.append(path)
    if missing:
        raise UsageError(
            "All files of an input must exist. Restore them or remove them "
            f"from the input. Received: {len(paths)} files, of which "
            f"{len(missing)} are missing, {missing[0]} first"
        )


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise UsageError(
                f"`{name}` must be at least 1. Received: {name}={value}"
            )


def _check_steps_per_epoch(
    steps_per_epoch: int, parts: Sequence[_Part], batch_size: int
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
    _check_names(example)


def _check_names(names: Mapping[str, Any]) -> None:
    if "weight" in names:
        raise UsageError(
            "No tensor of an example may be named 'weight': the weights of "
            "examples, padding and corrupt records have this name. Rename it. "
            f"Received: {sorted(names)}"
        )


def _check_static_shapes(spec: Any) -> None:
    for part in tf.nest.flatten(spec):
        if not tf.TensorShape(getattr(part, "shape", None)).is_fully_defined():
            raise UsageError(
                "`decode` must return tensors of static shape. Set them with "
                f"`tf.ensure_shape`. Received: {spec}"
            )


def _replica_batch(batch_size: int, context: tf.distribute.InputContext) -> int:
    replicas = context.num_replicas_in_sync
    if batch_size < 1 or batch_size % replicas:
        raise UsageError(
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
