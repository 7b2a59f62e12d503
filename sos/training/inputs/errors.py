"""Errors that a data set raises while it is read, and what users see.

A data set cannot raise exceptions of Python. Its assertions put a marker and
values into their message, which `usage_error` parses.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from sos.errors import StorageError, UsageError, reason
from sos.training.inputs.shards import Shard

# Marks the errors that `usage_error` recognizes.
_WRONG_COUNT = "The number of records in a file differs from its shard:"
_CORRUPT = "A record cannot be decoded:"
_CORRUPT_END = "<end>"


def assert_count(
    condition: Any, path: tf.Tensor, count: tf.Tensor, actual: tf.Tensor
) -> None:
    """Asserts a condition on the number of records in a file."""
    # With these types, an assertion that holds is cheap.
    numbers = [tf.cast(number, tf.int32) for number in (count, actual)]
    tf.debugging.Assert(condition, [_WRONG_COUNT, path, *numbers])


def assert_decodable(
    cause: tf.Tensor, path: tf.Tensor, position: tf.Tensor
) -> tf.Operation:
    """Asserts that a record was decoded; the cause is "" if it was."""
    return tf.debugging.Assert(
        tf.equal(cause, ""),
        [_CORRUPT, path, tf.cast(position, tf.int32), cause + _CORRUPT_END],
    )


def usage_error(error: tf.errors.OpError) -> UsageError | None:
    """Converts an error raised while iterating a data set of records.

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
