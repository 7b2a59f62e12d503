"""Reads a host's records in a given order of the files."""

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from sos.errors import UsageError
from sos.training.inputs.errors import assert_count
from sos.training.inputs.shards import Part, Read


class Element(NamedTuple):
    """A record with its origin, all tensors.

    Attributes:
        record: The record.
        position: Its position in the file, int64.
        path: Path of the file.
        count: Number of records in the file according to its `Shard`, int64.
        key: Key of the epoch and the file, int64; see `fold_in`.
    """

    record: Any
    position: tf.Tensor
    path: tf.Tensor
    count: tf.Tensor
    key: tf.Tensor


def read_part(
    part: Part,
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
        Elements of type `Element`. Reading and filtering one calls no traced
        function, which would take several times as long.
    """

    def read_file(
        number: tf.Tensor, path: tf.Tensor, count: tf.Tensor, offset: tf.Tensor
    ) -> tf.data.Dataset:
        def constant(value: Any) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensors(value)

        def fail(_: tf.Tensor) -> tf.data.Dataset:
            actual = read(path).reduce(np.int64(0), lambda n, _: n + 1)
            assert_count(False, path, count, actual)
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
            records.concatenate(constant((make_zeros(spec), False)))
            .concatenate(tf.data.Dataset.range(1).flat_map(fail))
            .take(count + 1)
        )
        key = fold_in(epoch_key, number)
        elements = tf.data.Dataset.zip(
            marked, constant((path, count, key)).repeat()
        ).enumerate()
        if part.stride > 1:
            elements = elements.shard(part.stride, offset)
        return elements.filter(lambda _, element: element[0][1]).map(
            lambda position, element: Element(
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


def read_ahead(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Checks the position of each element before it yields the previous one.

    It yields the last record only after all files were read to their ends.
    Otherwise nothing would read on after a last batch that is full.
    """

    def swap(last: Element, element: Element) -> tuple[Element, Element]:
        check_position(element)
        return element, last

    end = make_zeros(dataset.element_spec)
    end = end._replace(count=tf.constant(1, tf.int64))
    return (
        dataset.concatenate(tf.data.Dataset.from_tensors(end))
        .scan(end, swap)
        .skip(1)
    )


def check_position(element: Element) -> None:
    """Raises an error if a file has more records than its `Shard`."""
    assert_count(
        element.position < element.count,
        element.path,
        element.count,
        element.position,
    )


def pair_with(dataset: tf.data.Dataset, value: Any) -> tf.data.Dataset:
    """Pairs every element with a constant."""
    values = tf.data.Dataset.from_tensors(tf.constant(value)).repeat()
    return tf.data.Dataset.zip(dataset, values)


def make_zeros(spec: Any) -> Any:
    """Returns small tensors that match a spec."""
    return tf.nest.map_structure(
        lambda x: tf.zeros(
            [size or 0 for size in x.shape] if x.shape.rank else [], x.dtype
        ),
        spec,
    )


def fold_in(key: tf.Tensor, number: Any) -> tf.Tensor:
    """Derives a key from another key and a number, all int64 scalars."""
    return tf.random.stateless_uniform(
        (),
        tf.stack([key, tf.cast(number, tf.int64)]),
        minval=None,
        maxval=None,
        dtype=tf.int64,
    )


def example_seed(element: Element) -> tf.Tensor:
    """Returns the seed, int32 of shape [2], of an example in an epoch."""
    return tf.random.stateless_uniform(
        (2,),
        tf.stack([element.key, element.position]),
        minval=None,
        maxval=None,
        dtype=tf.int32,
    )
