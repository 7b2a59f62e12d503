"""Batches of arrays and records: shares of replicas and hosts, weights."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from sos.errors import UsageError

# Number of epochs of an infinite data set.
FOREVER = 2**62


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


def replica_batch_size(
    batch_size: int, context: tf.distribute.InputContext
) -> int:
    """Returns a replica's share of a batch, if all shares can be equal."""
    replicas = context.num_replicas_in_sync
    if batch_size < 1 or batch_size % replicas:
        raise UsageError(
            "The batch size must be a positive multiple of the number of "
            f"replicas. Received: batch_size={batch_size} for {replicas} "
            "replicas"
        )
    return batch_size // replicas


def host_slices(
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


def assert_steps(
    steps: int, context: tf.distribute.InputContext
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Asserts the number of batches, one per step and replica."""
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    return tf.data.experimental.assert_cardinality(steps * replicas)


def check_names(names: Mapping[str, Any]) -> None:
    """Raises `UsageError` if a tensor would be replaced by the weights."""
    if "weight" in names:
        raise UsageError(
            "No tensor of an example may be named 'weight': the weights of "
            "examples, padding and corrupt records have this name. Rename it. "
            f"Received: {sorted(names)}"
        )
