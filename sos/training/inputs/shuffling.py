"""The order of a host's records in every epoch."""

import dataclasses
import math
from typing import Any, NamedTuple

import tensorflow as tf

from sos.training.inputs.batches import FOREVER
from sos.training.inputs.reading import (
    fold_in,
    make_zeros,
    pair_with,
    read_part,
)
from sos.training.inputs.shards import Part, Read


class EpochState(NamedTuple):
    """How a host reads and shuffles the records of an epoch, all tensors.

    Attributes:
        key: Key of the epoch, int64; see `fold_in`.
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
class EpochPlan:
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

    part: Part
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

    def state(self, epoch: tf.Tensor) -> EpochState:
        """Returns the state of an epoch, int64 scalar, a function of it."""
        key = fold_in(tf.constant(self.seed, tf.int64), epoch)
        # Negative: the keys of files are folded from 0 on.
        order_key = fold_in(key, -1 - self.host)
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
        return EpochState(key, order_key, order, shift, begin, end, first_block)


def read_shuffled(
    plan: EpochPlan, read: Read, cycle_length: int
) -> tf.data.Dataset:
    """Reads and shuffles the records of all epochs from the first on.

    The records are read one after another, across the borders of epochs, into
    blocks. While one is used, the next is read.

    Returns:
        Elements of type `Element`, without end.
    """

    def read_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        state = plan.state(epoch)
        slot = state.first_block * plan.block
        start = tf.maximum(slot - state.shift, 0)
        records = read_part(
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
            (make_zeros(records.element_spec), False)
        )
        before = tf.maximum(state.shift - slot, 0)
        after = plan.blocks * plan.block - state.shift - plan.part.examples
        return (
            filler.repeat(before)
            .concatenate(pair_with(records, True))
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
                seed=fold_in(state.order_key, 3 + number),
                reshuffle_each_iteration=False,
            )
            .skip(skip)
            .take(tf.maximum(state.end - begin - skip, 0))
        )

    return (
        tf.data.Dataset.range(plan.first, FOREVER)
        .flat_map(read_epoch)
        .window(plan.block)
        .prefetch(1)
        .enumerate()
        .flat_map(shuffle_block)
    )
