import functools
import math
import pathlib
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from sos.errors import StorageError, UsageError
from sos.training import inputs
from sos.training.inputs import Shard, decoding


def context(hosts=1, host=0, replicas=1):
    """Returns the context of a host with `replicas` replicas."""
    return tf.distribute.InputContext(
        num_input_pipelines=hosts,
        input_pipeline_id=host,
        num_replicas_in_sync=hosts * replicas,
    )


def take(dataset, count):
    return list(dataset.take(count).as_numpy_iterator())


def global_batches(make, steps, hosts=1, replicas=1):
    """Returns the batches of all replicas of all hosts, joined step by step.

    Args:
        make: Makes the data set of a context.
        steps: The number of steps.
        hosts: The number of hosts.
        replicas: The number of replicas of each.
    """
    of_hosts = [
        take(make(context(hosts, host, replicas)), steps * replicas)
        for host in range(hosts)
    ]
    return [
        tf.nest.map_structure(
            lambda *parts: np.concatenate(parts),
            *(
                batch
                for batches in of_hosts
                for batch in batches[step * replicas : (step + 1) * replicas]
            ),
        )
        for step in range(steps)
    ]


# Arrays.


def ids(examples):
    """Returns arrays whose values identify the examples."""
    numbers = np.arange(examples)
    return {"id": numbers, "image": np.stack([numbers, -numbers], axis=1)}


def array_ids(examples, *, step=0, count, batch_size, seed=3, **sharing):
    """Returns the examples of `count` steps."""
    batches = global_batches(
        lambda where: inputs.array_batches(
            ids(examples),
            seed=seed,
            batch_size=batch_size,
            step=step,
            context=where,
        ),
        count,
        **sharing,
    )
    for batch in batches:
        assert batch["id"].shape == (batch_size,)
        # The rows of all arrays stay together.
        np.testing.assert_array_equal(batch["image"][:, 1], -batch["id"])
    return [batch["id"].tolist() for batch in batches]


SHARINGS = st.tuples(
    st.integers(1, 3),  # hosts
    st.integers(1, 3),  # replicas of each
    st.integers(1, 2),  # examples of each replica
)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    SHARINGS, st.integers(0, 5), st.integers(0, 8), st.integers(0, 2**40)
)
def test_array_batches_depend_on_the_step_alone(sharing, more, step, seed):
    hosts, replicas, each = sharing
    batch_size = hosts * replicas * each
    examples = batch_size + more
    reference = array_ids(
        examples, count=step + 3, batch_size=batch_size, seed=seed
    )
    assert reference[step:] == array_ids(
        examples,
        step=step,
        count=3,
        batch_size=batch_size,
        seed=seed,
        hosts=hosts,
        replicas=replicas,
    )


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (13, 4), (5, 5)])
def test_array_batches_of_each_epoch_are_another_permutation(
    examples, batch_size
):
    per_epoch = examples // batch_size
    epochs = 6
    found = array_ids(examples, count=epochs * per_epoch, batch_size=batch_size)
    orders = [
        sum(found[i * per_epoch : (i + 1) * per_epoch], [])
        for i in range(epochs)
    ]
    for order in orders:
        assert len(set(order)) == len(order) == per_epoch * batch_size
        assert set(order) <= set(range(examples))
    assert len({tuple(order) for order in orders}) == epochs
    if examples % batch_size:
        # What is left out differs, so that every example is seen.
        assert set().union(*orders) == set(range(examples))


def test_array_batches_of_many_epochs_have_uniform_orders():
    """Each example is as often at each place, up to chance."""
    examples, epochs = 5, 600
    found = array_ids(examples, count=epochs, batch_size=examples)
    counts = np.zeros((examples, examples))
    for order in found:
        counts[np.arange(examples), order] += 1
    expected = epochs / examples
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-squared with 16 degrees of freedom: beyond it once in 10,000.
    assert statistic < 44.3


def test_array_batches_of_another_seed_have_another_order():
    orders = [
        array_ids(40, count=1, batch_size=40, seed=seed)[0]
        for seed in (0, 1, 2**40, -1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_array_batches_far_ahead_are_there_at_once():
    # Ten million epochs are not to be walked through.
    (batch,) = array_ids(6, step=20_000_001, count=1, batch_size=3)
    (before,) = array_ids(6, step=20_000_000, count=1, batch_size=3)
    assert sorted(before + batch) == list(range(6))


def test_array_batches_keep_dtypes_and_static_shapes():
    arrays = {
        "image": np.zeros((10, 4, 4, 3), np.uint8),
        "label": np.zeros(10, np.int32),
        "text": np.array([b"abc"] * 10),
    }
    dataset = inputs.array_batches(
        arrays, seed=0, batch_size=6, step=0, context=context(replicas=3)
    )
    assert dataset.element_spec == {
        "image": tf.TensorSpec((2, 4, 4, 3), tf.uint8),
        "label": tf.TensorSpec((2,), tf.int32),
        "text": tf.TensorSpec((2,), tf.string),
    }
    hosts = inputs.array_batches(
        arrays, seed=0, batch_size=6, step=0, context=context(3, 1)
    )
    assert hosts.element_spec == dataset.element_spec


@hypothesis.settings(max_examples=8)
@hypothesis.given(SHARINGS, st.integers(1, 25))
def test_array_eval_batches_hold_every_example_once(sharing, examples):
    hosts, replicas, each = sharing
    batch_size = hosts * replicas * each
    batches = math.ceil(examples / batch_size)

    def make(where):
        dataset = inputs.array_eval_batches(
            ids(examples), batch_size=batch_size, context=where
        )
        assert dataset.element_spec == {
            "id": tf.TensorSpec((each,), tf.int64),
            "image": tf.TensorSpec((each, 2), tf.int64),
            "weight": tf.TensorSpec((each,), tf.float32),
        }
        assert dataset.cardinality() == batches * replicas
        assert len(list(dataset)) == batches * replicas
        return dataset

    found = global_batches(make, batches, hosts, replicas)
    numbers = np.concatenate([batch["id"] for batch in found])
    weights = np.concatenate([batch["weight"] for batch in found])
    assert numbers[:examples].tolist() == list(range(examples))
    assert (weights == (np.arange(weights.size) < examples)).all()
    # What fills up is a real example, so that it computes nothing odd.
    assert (numbers < examples).all()


def test_array_eval_batches_named_weight_raise():
    arrays = {"x": np.zeros(3), "weight": np.ones(3)}
    with pytest.raises(UsageError, match="'weight'"):
        inputs.array_eval_batches(arrays, batch_size=2, context=context())


ARRAY_MAKERS = {
    "array_batches": functools.partial(inputs.array_batches, seed=0, step=0),
    "array_eval_batches": inputs.array_eval_batches,
}


@pytest.mark.parametrize("name", ["array_batches", "array_eval_batches"])
@pytest.mark.parametrize(
    "lengths", [{}, {"x": 0}, {"x": 3, "y": 4}, {"x": 0, "y": 2}], ids=str
)
def test_array_batches_of_other_lengths_raise(name, lengths):
    arrays = {key: np.zeros(size) for key, size in lengths.items()}
    with pytest.raises(UsageError) as error:
        ARRAY_MAKERS[name](arrays, batch_size=1, context=context())
    assert f"Received: {lengths}" in str(error.value)


# Records. Each holds the number of its file and its position in it.


@pytest.fixture(scope="module")
def make_shards(tmp_path_factory):
    """A function that writes files with these numbers of records."""

    @functools.cache
    def make(counts):
        return write_shards(tmp_path_factory.mktemp("records"), counts)

    return make


def write_shards(folder, counts):
    shards = []
    for number, count in enumerate(counts):
        path = str(folder / f"{number:03d}-of-{len(counts):03d}")
        with tf.io.TFRecordWriter(path) as writer:
            for position in range(count):
                writer.write(np.array([number, position], np.int64).tobytes())
        shards.append(Shard(path, count))
    return shards


def decode_id(record):
    return tf.ensure_shape(tf.io.decode_raw(record, tf.int64), (2,))


def decode_train(record, seed):
    return {"id": decode_id(record), "seed": seed}


def decode_eval(record):
    return {"id": decode_id(record)}


def record_batches(shards, decode=decode_train, *, where=None, **kwargs):
    defaults = {"seed": 3, "step": 0, "shuffle_buffer": 5, "cycle_length": 2}
    return inputs.record_batches(
        shards, decode, context=where or context(), **{**defaults, **kwargs}
    )


def all_ids(shards):
    return {
        (number, position)
        for number, shard in enumerate(shards)
        for position in range(shard.examples)
    }


def ids_of(batches):
    """Returns (file, position) of the examples of batches, in their order."""
    return [tuple(row) for batch in batches for row in batch["id"].tolist()]


def seeds_of(batches):
    """Returns the seeds of examples, by file and position."""
    return {
        tuple(row): tuple(seed)
        for batch in batches
        for row, seed in zip(
            batch["id"].tolist(), batch["seed"].tolist(), strict=True
        )
    }


class Notes:
    """Notes what passes through it when a data set is iterated."""

    def __init__(self):
        self.seen = []

    def __call__(self, tensor):
        def note(value):
            self.seen.append(value)
            return value

        noted = tf.numpy_function(note, [tensor], tensor.dtype)
        return tf.ensure_shape(noted, tensor.shape)

    def read(self, path):
        return tf.data.TFRecordDataset(self(path))

    @property
    def files(self):
        """The names of the files that were opened."""
        return {pathlib.Path(path.decode()).name for path in self.seen}


COUNTS = (5, 0, 3, 7, 4)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_record_batches_two_hosts_open_files_of_their_own(make_shards, kind):
    shards = make_shards(COUNTS)
    opened, found = [], []
    for host in range(2):
        notes = Notes()
        if kind == "train":
            dataset = record_batches(
                shards, batch_size=2, where=context(2, host), read=notes.read
            ).take(sum(COUNTS))
        else:
            dataset = inputs.record_eval_batches(
                shards,
                decode_eval,
                batch_size=2,
                context=context(2, host),
                read=notes.read,
            )
        found.append(set(ids_of(dataset.as_numpy_iterator())))
        opened.append(notes.files)
    assert not opened[0] & opened[1]
    assert opened[0] | opened[1] == {
        pathlib.Path(shard.path).name for shard in shards
    }
    assert not found[0] & found[1]
    if kind == "eval":
        assert found[0] | found[1] == all_ids(shards)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_record_batches_without_files_of_other_hosts_work(tmp_path, kind):
    # Files of equal size are dealt out in turns.
    shards = write_shards(tmp_path, (4, 4, 4, 4))
    for shard in shards[0::2]:
        pathlib.Path(shard.path).unlink()
    where = context(2, 1)
    if kind == "train":
        dataset = record_batches(shards, batch_size=4, where=where).take(4)
    else:
        dataset = inputs.record_eval_batches(
            shards, decode_eval, batch_size=4, context=where
        )
    found = ids_of(dataset.as_numpy_iterator())
    assert sorted(found) == [(1, i) for i in range(4)] + [
        (3, i) for i in range(4)
    ]


def test_record_batches_fewer_files_than_hosts_share_records(make_shards):
    # An empty file counts as none: no host could live on it.
    shards = make_shards((7, 0, 5))
    hosts, found, decoded = 3, [], []
    for host in range(hosts):
        notes = Notes()

        def decode(record, seed, notes=notes):
            return {"id": notes(decode_id(record))}

        dataset = record_batches(
            shards, decode, batch_size=3, where=context(hosts, host)
        )
        # One epoch.
        found.append(ids_of(take(dataset, 4)))
        decoded.append({tuple(row) for row in np.array(notes.seen).tolist()})
        # It reads ahead, but never decodes what others take.
        assert decoded[host] == set(found[host])
    assert sorted(sum(found, [])) == sorted(all_ids(shards))
    assert len({len(each) for each in found}) == 1


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    SHARINGS,
    st.integers(0, 20),
    st.integers(-(2**62), 2**62),
)
def test_record_batches_resumed_equal_uninterrupted_ones(
    make_shards, counts, sharing, step, seed
):
    hosts, replicas, each = sharing
    batch_size = hosts * replicas * each

    def batches(step, steps):
        return global_batches(
            lambda where: record_batches(
                make_shards(tuple(counts)),
                batch_size=batch_size,
                step=step,
                seed=seed,
                where=where,
            ),
            steps,
            hosts,
            replicas,
        )

    try:
        whole = batches(0, step + 2)
    except UsageError as error:
        assert "at least one batch" in str(error)
        hypothesis.reject()
    resumed = batches(step, 2)
    for before, after in zip(whole[step:], resumed, strict=True):
        np.testing.assert_array_equal(before["id"], after["id"])
        np.testing.assert_array_equal(before["seed"], after["seed"])


@pytest.mark.parametrize(
    ("hosts", "host", "resumed"),
    # In the first epoch, at its end, and in the second.
    [(1, 0, (1, 2, 3, 4, 5)), (2, 1, (2, 4))],
)
def test_record_batches_resumed_at_any_step_are_the_same(
    make_shards, hosts, host, resumed
):
    shards, steps = make_shards(COUNTS), 15  # Of three or more epochs.

    def batches(step):
        return take(
            record_batches(
                shards, batch_size=4, step=step, where=context(hosts, host)
            ),
            steps - step,
        )

    whole = batches(0)
    for step in resumed:
        for before, after in zip(whole[step:], batches(step), strict=True):
            np.testing.assert_array_equal(before["id"], after["id"])
            np.testing.assert_array_equal(before["seed"], after["seed"])


@pytest.mark.parametrize(
    ("counts", "shuffle_buffer"), [(COUNTS, 100), ((19,), 1), ((1,) * 19, 1)]
)
def test_record_batches_every_epoch_has_another_order(
    make_shards, counts, shuffle_buffer
):
    shards, epochs, per_epoch = make_shards(counts), 16, 4
    dataset = record_batches(
        shards, batch_size=4, shuffle_buffer=shuffle_buffer
    )
    batches = take(dataset, epochs * per_epoch)
    orders = [
        ids_of(batches[i : i + per_epoch])
        for i in range(0, len(batches), per_epoch)
    ]
    for order in orders:
        assert len(set(order)) == len(order) == 16
        assert set(order) <= all_ids(shards)
    # Records that do not fill a batch are others in each epoch.
    assert set().union(*orders) == all_ids(shards)
    if (counts, shuffle_buffer) != ((19,), 1):
        assert len({tuple(order) for order in orders}) > epochs / 2


def test_record_batches_another_seed_is_another_order(make_shards):
    shards = make_shards((30, 30))
    orders = [
        tuple(ids_of(take(record_batches(shards, batch_size=60, seed=seed), 1)))
        for seed in (0, 1, 2**40, -1)
    ]
    assert len(set(orders)) == 4


def test_record_batches_global_seed_has_no_influence(make_shards):
    found = []
    for seed in (1, 2):
        tf.random.set_seed(seed)
        dataset = record_batches(make_shards(COUNTS), batch_size=4)
        found.append([batch["id"].tolist() for batch in take(dataset, 6)])
    assert found[0] == found[1]
    tf.random.set_seed(3)
    after = tf.random.uniform(())
    tf.random.set_seed(3)
    record_batches(make_shards(COUNTS), batch_size=4)
    # Nor does making them set the global seed.
    assert tf.random.uniform(()) == after


def test_record_batches_other_hosts_give_the_same_augmentation(make_shards):
    shards = make_shards((4, 4, 4))
    found = []
    for hosts in (1, 2, 4):
        # Epochs in which every host takes all of its records.
        per_epoch = {1: 12, 2: 4, 4: 3}[hosts]
        epochs = [{}, {}]
        for host in range(hosts):
            dataset = record_batches(
                shards, batch_size=hosts, where=context(hosts, host)
            )
            batches = take(dataset, 2 * per_epoch)
            for i, seeds in enumerate(epochs):
                part = batches[i * per_epoch : (i + 1) * per_epoch]
                seeds.update(seeds_of(part))
        found.append(epochs)
    reference = found[0]
    assert len({*reference[0].values(), *reference[1].values()}) == 24
    for epochs in found[1:]:
        for seeds, expected in zip(epochs, reference, strict=True):
            assert seeds.items() <= expected.items()
    # With two hosts, one has twice the records and leaves some out.
    assert [len(epochs[0]) for epochs in found] == [12, 8, 12]


@pytest.mark.parametrize(("hosts", "host"), [(1, 0), (2, 1)])
def test_record_batches_skipped_records_are_not_decoded(
    make_shards, hosts, host
):
    shards = make_shards((8, 8))
    whole = take(
        record_batches(shards, batch_size=4, where=context(hosts, host)), 8
    )
    notes = Notes()
    dataset = record_batches(
        shards,
        lambda record, seed: {"id": decode_id(record), "seed": notes(seed)},
        batch_size=4,
        step=6,
        where=context(hosts, host),
    )
    assert ids_of(take(dataset, 1)) == ids_of(whole[6:7])
    decoded = {tuple(seed) for seed in np.array(notes.seen).tolist()}
    assert decoded >= set(seeds_of(whole[6:7]).values())
    for batch in whole[:6]:
        assert not decoded & set(seeds_of([batch]).values())


@pytest.mark.parametrize(("hosts", "host"), [(1, 0), (2, 1)])
def test_record_batches_resumed_open_no_file_of_a_used_chapter(
    make_shards, hosts, host
):
    shards, batch_size, chapter = make_shards((10,) * 24), 5, 20
    kwargs = {"batch_size": hosts * batch_size, "where": context(hosts, host)}
    steps = 240 // (hosts * batch_size)
    whole = ids_of(take(record_batches(shards, **kwargs), steps))
    step = 2 * steps // 3
    # A block may end after the chapter, and the batch after the block.
    behind = step * batch_size - chapter - 2 * batch_size
    used = {file for file, _ in whole} - {file for file, _ in whole[behind:]}
    assert len(used) >= 6 // hosts
    notes = Notes()
    resumed = record_batches(shards, step=step, read=notes.read, **kwargs)
    assert ids_of(take(resumed, 1)) == whole[step * batch_size :][:batch_size]
    opened = {int(name[:3]) for name in notes.files}
    assert not opened & used
    assert len(opened) <= 12 // hosts


@pytest.mark.parametrize("shuffle_buffer", [30, 1000])
def test_record_batches_read_one_block_ahead(make_shards, shuffle_buffer):
    shards, examples = make_shards((50, 50)), 100
    notes = Notes()
    dataset = record_batches(
        shards,
        batch_size=2,
        shuffle_buffer=shuffle_buffer,
        read=lambda path: tf.data.TFRecordDataset(path).map(notes),
    )
    iterator = iter(dataset)
    next(iterator)
    # Those of the first block or less, then as many more, from the next epoch
    # if there is one block in each.
    block = min(shuffle_buffer, examples)
    wait_until(lambda: len(notes.seen) >= 1.5 * block)
    time.sleep(0.2)
    # Each open file holds a few records ready.
    assert len(notes.seen) <= 2 * block + 24


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_record_batches_order_is_as_random_as_the_shuffle_buffer(make_shards):
    examples, shuffle_buffer, epochs = 200, 50, 30
    dataset = record_batches(
        make_shards((examples,)),
        batch_size=examples,
        shuffle_buffer=shuffle_buffer,
    )
    orders = [
        [i for _, i in ids_of([batch])] for batch in take(dataset, epochs)
    ]
    place = np.argsort(orders, axis=1)
    # 20 records that are drawn from 50 are about 50 * 19 / 21 apart.
    parts = np.reshape(orders, (epochs, -1, 20))
    assert np.ptp(parts, axis=-1).mean() > 0.7 * shuffle_buffer
    # None are divided by the borders of blocks in all epochs.
    assert (place[:, :-5] > place[:, 5:]).any(axis=0).all()
    # Each is as often early as late among its neighbours.
    later = (place[:, :-5] > place[:, 5:]).mean()
    assert 0.35 < later < 0.5


def test_record_batches_far_ahead_are_there_at_once(make_shards):
    shards = make_shards((3, 3))
    dataset = record_batches(shards, batch_size=3, step=20_000_000)
    assert set(ids_of(take(dataset, 2))) == all_ids(shards)


def test_record_batches_have_static_shapes(make_shards):
    dataset = record_batches(
        make_shards(COUNTS), batch_size=12, where=context(2, 0, replicas=3)
    )
    assert dataset.element_spec == {
        "id": tf.TensorSpec((2, 2), tf.int64),
        "seed": tf.TensorSpec((2, 2), tf.int32),
    }


def read_structures(path):
    """Records with a tensor whose shape depends on the record."""
    return tf.data.TFRecordDataset(path).map(
        lambda record: (
            record,
            {"row": tf.fill([decode_id(record)[1] + 1], decode_id(record)[0])},
        )
    )


@pytest.mark.parametrize("hosts", [1, 4])
def test_record_batches_records_may_be_structures(make_shards, hosts):
    shards = make_shards((4, 4, 4))

    def decode(record, seed=None):
        text, rest = record
        row = rest["row"]
        return {"id": decode_id(text), "size": tf.size(row), "file": row[0]}

    for dataset in (
        record_batches(
            shards,
            decode,
            batch_size=4,
            where=context(hosts, 0),
            read=read_structures,
        ).take(3),
        inputs.record_eval_batches(
            shards,
            decode,
            batch_size=4,
            context=context(hosts, 0),
            read=read_structures,
        ),
    ):
        for batch in dataset.as_numpy_iterator():
            np.testing.assert_array_equal(batch["id"][:, 0], batch["file"])
            np.testing.assert_array_equal(batch["id"][:, 1] + 1, batch["size"])


def test_record_batches_compressed_files_are_read(tmp_path):
    path = str(tmp_path / "records")
    with tf.io.TFRecordWriter(path, "GZIP") as writer:
        for position in range(5):
            writer.write(np.array([0, position], np.int64).tobytes())
    read = functools.partial(tf.data.TFRecordDataset, compression_type="GZIP")
    shards = inputs.list_shards([path], read=read)
    assert shards == [Shard(path, 5)]
    dataset = record_batches(shards, batch_size=5, read=read)
    assert set(ids_of(take(dataset, 1))) == all_ids(shards)


@hypothesis.settings(max_examples=3)
@hypothesis.given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), SHARINGS
)
@hypothesis.example([1], (3, 2, 2))
@hypothesis.example([0, 1, 0], (2, 1, 1))
@hypothesis.example([2, 3], (1, 1, 25))
def test_record_eval_batches_hold_every_record_once(
    make_shards, counts, sharing
):
    hosts, replicas, each = sharing
    shards = make_shards(tuple(counts))
    found, sizes, lengths = [], [], set()
    for host in range(hosts):
        dataset = inputs.record_eval_batches(
            shards,
            decode_eval,
            batch_size=hosts * replicas * each,
            context=context(hosts, host, replicas),
            cycle_length=2,
        )
        assert dataset.element_spec == {
            "id": tf.TensorSpec((each, 2), tf.int64),
            "weight": tf.TensorSpec((each,), tf.float32),
        }
        batches = list(dataset.as_numpy_iterator())
        assert dataset.cardinality() == len(batches)
        lengths.add(len(batches))
        weights = np.concatenate([batch["weight"] for batch in batches])
        size = int(weights.sum())
        assert (weights == (np.arange(weights.size) < size)).all()
        # Padding repeats records, so that it computes nothing odd.
        assert set(ids_of(batches)) <= all_ids(shards)
        found += ids_of(batches)[:size]
        sizes.append(size)
    assert sorted(found) == sorted(all_ids(shards))
    # All hosts have as many batches, no more than the largest part needs.
    assert lengths == {math.ceil(max(sizes) / (replicas * each)) * replicas}
    assert max(sizes) - min(sizes) <= max(counts)


def test_record_batches_under_a_strategy_reach_every_replica(make_shards):
    strategy = tf.distribute.MirroredStrategy(
        [device.name for device in tf.config.list_logical_devices("CPU")],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    shards = make_shards(COUNTS)
    batches = strategy.distribute_datasets_from_function(
        lambda where: inputs.record_eval_batches(
            shards, decode_eval, batch_size=4, context=where
        )
    )
    found = []
    for batch in batches:
        ids, weights = (
            np.concatenate(
                [x.numpy() for x in strategy.experimental_local_results(value)]
            )
            for value in (batch["id"], batch["weight"])
        )
        found += [tuple(row) for row in ids[weights == 1].tolist()]
    assert sorted(found) == sorted(all_ids(shards))


# Files.


def test_list_shards_pattern_counts_records(make_shards):
    shards = make_shards(COUNTS)
    pattern = str(pathlib.Path(shards[0].path).parent / "*-of-*")
    assert inputs.list_shards(pattern) == shards
    assert inputs.list_shards(pathlib.Path(pattern), counts=COUNTS) == shards


def test_list_shards_paths_keep_their_order(make_shards):
    shards = make_shards(COUNTS)[::-1]
    paths = [pathlib.Path(shard.path) for shard in shards]
    assert inputs.list_shards(paths) == shards
    # Nothing is read if the counts are known.
    assert inputs.list_shards(paths, counts=[9] * 5, read=None) == [
        Shard(shard.path, 9) for shard in shards
    ]


def test_list_shards_unusable_files_raise(tmp_path):
    first, second = (shard.path for shard in write_shards(tmp_path, (2, 3)))
    missing = str(tmp_path / "missing")
    for files, counts, message in (
        (str(tmp_path / "x*"), None, "at least one file.*x.*matches none"),
        ([], None, "at least one file"),
        ([first, missing], None, f"2 files.*1 are missing, {missing} first"),
        ([str(tmp_path / "no" / "file")], None, "must exist"),
        ([f"{first}/file"], None, "must exist"),
        ([first, second, first], None, f"must differ.*{first} more than once"),
        ([first, second], [2], "1 numbers for 2 files"),
    ):
        with pytest.raises(UsageError, match=message):
            inputs.list_shards(files, counts=counts)
    content = bytearray(pathlib.Path(second).read_bytes())
    content[-1] ^= 1
    pathlib.Path(second).write_bytes(content)
    with pytest.raises(StorageError, match=f"{second}.*corrupted record"):
        inputs.list_shards([first, second])


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize(
    ("wrong", "actual", "batch_size"),
    # With a batch that ends where the wrong number does, and one that does not.
    [(6, "4", 2), (6, "4", 6), (2, "more than 2", 2)],
)
def test_record_batches_wrong_count_raises(
    make_shards, kind, wrong, actual, batch_size
):
    right, shard = make_shards((4, 4))
    shards = [right, Shard(shard.path, wrong)]
    if kind == "train":
        # Two epochs.
        dataset = record_batches(shards, batch_size=batch_size).take(
            2 * (4 + wrong) // batch_size
        )
    else:
        dataset = inputs.record_eval_batches(
            shards, decode_eval, batch_size=batch_size, context=context()
        )
        # No more than an evaluation takes.
        dataset = dataset.take(dataset.cardinality())
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        list(dataset)
    error = inputs.usage_error(error.value)
    assert isinstance(error, UsageError)
    assert str(error) == (
        "A shard must have the number of records that are in its file. Correct "
        "the number, or restore the file. Received: "
        f"{shards[1]}, whose file has {actual} records"
    )


# Records that `decode` cannot decode, one of them as padding as well.
CORRUPT = [(0, 2), (1, 0)]


def decode_compressed(_):
    return tf.strings.length(tf.io.decode_compressed("no zlib", "ZLIB"))


def decode_jpeg(_):
    return tf.size(tf.io.decode_jpeg("no JPEG"))


def check(identity):
    with tf.control_dependencies(
        [tf.debugging.assert_less(identity, np.int64(-1))]
    ):
        return tf.constant(0)


def python_error(error):
    def fail(_):
        raise error

    return lambda x: tf.ensure_shape(tf.numpy_function(fail, [x], tf.int32), ())


def decode_with(failure, decoded=None):
    """Returns a `decode` for training and evaluation that fails for CORRUPT."""

    def decode(record, seed=None):
        identity = decode_id(record)
        if decoded is not None:
            identity = decoded(identity)
        is_corrupt = tf.reduce_any(tf.reduce_all(identity == CORRUPT, axis=1))
        zero = tf.cond(is_corrupt, lambda: failure(identity), lambda: 0)
        return {"id": identity, "float": tf.cast(1 + zero, tf.bfloat16)}

    return decode


def one_epoch(kind, shards, decode, **kwargs):
    if kind == "eval":
        return inputs.record_eval_batches(
            shards, decode, batch_size=3, context=context(), **kwargs
        )
    steps = sum(shard.examples for shard in shards) // 3
    return record_batches(shards, decode, batch_size=3, **kwargs).take(steps)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (decode_jpeg, "Unknown image file format. One of JPEG"),
        (decode_compressed, "inflate() failed with error -3"),
        (check, "assertion failed: [Condition x < y did not hold"),
    ],
)
def test_record_batches_corrupt_record_is_named(
    make_shards, kind, failure, cause
):
    shards = make_shards((4, 5))
    dataset = one_epoch(kind, shards, decode_with(failure))
    with pytest.raises(UsageError) as error, inputs.input_errors():
        list(dataset)
    first, second = (
        f"Received: record {position} of {shards[file].path}, counted from 0. "
        f"Cause: {cause}"
        for file, position in CORRUPT
    )
    assert first in str(error.value) or second in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("failure", [decode_jpeg, decode_compressed, check])
def test_record_batches_skip_corrupt_replaces_by_zeros(
    make_shards, kind, failure, caplog
):
    shards = make_shards((4, 5))
    plain = one_epoch(kind, shards, decode_with(lambda _: 0))
    dataset = one_epoch(kind, shards, decode_with(failure), skip_corrupt=True)
    decoding._logged.clear()
    with caplog.at_level("WARNING", logger="absl"):
        found = list(dataset.as_numpy_iterator())
        assert len(list(dataset)) == len(found)
    for before, after in zip(plain.as_numpy_iterator(), found, strict=True):
        corrupt = [tuple(row) in CORRUPT for row in before["id"].tolist()]
        # The others stay where they were.
        expected = np.where(np.array(corrupt)[:, None], 0, before["id"])
        np.testing.assert_array_equal(after["id"], expected)
        np.testing.assert_array_equal(after["weight"] == 0, corrupt)
        np.testing.assert_array_equal(after["float"], after["weight"])
    assert sum(batch["weight"].sum() for batch in found) == 9 - len(CORRUPT)
    # Once, although it was read twice.
    messages = [record.getMessage() for record in caplog.records]
    assert [text.rsplit(maxsplit=1)[1] for text in messages] == [
        str(i + 1) for i in range(len(CORRUPT))
    ]
    for file, position in CORRUPT:
        (message,) = (text for text in messages if shards[file].path in text)
        assert f"Record {position} of" in message


def test_record_batches_skip_corrupt_resumes_equally(make_shards):
    shards = make_shards((4, 5))
    whole, resumed = (
        take(
            record_batches(
                shards,
                decode_with(decode_jpeg),
                batch_size=2,
                step=step,
                skip_corrupt=True,
            ),
            8 - step,
        )
        for step in (0, 3)
    )
    for before, after in zip(whole[3:], resumed, strict=True):
        for name in before:
            np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("skip_corrupt", [False, True])
@pytest.mark.parametrize(
    "error",
    [MemoryError("full"), StopIteration("end"), OSError("gone")],
    ids=repr,
)
def test_record_batches_other_errors_are_raised(
    make_shards, kind, skip_corrupt, error
):
    dataset = one_epoch(
        kind,
        make_shards((4, 5)),
        decode_with(python_error(error)),
        skip_corrupt=skip_corrupt,
    )
    with pytest.raises(tf.errors.OpError, match=str(error)) as raised:
        list(dataset)
    assert inputs.usage_error(raised.value) is None


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_record_batches_error_that_passes_changes_nothing(make_shards, kind):
    shards = make_shards((4, 5))
    failed = []

    def fail_once(identity):
        def fail(value):
            if not failed:
                failed.append(value)
                raise MemoryError
            return np.int32(0)

        return tf.ensure_shape(
            tf.numpy_function(fail, [identity], tf.int32), ()
        )

    found = list(one_epoch(kind, shards, decode_with(fail_once)))
    plain = list(one_epoch(kind, shards, decode_with(lambda _: 0)))
    assert failed
    for before, after in zip(plain, found, strict=True):
        np.testing.assert_array_equal(before["id"], after["id"])


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_record_batches_sound_records_are_decoded_once(make_shards, kind):
    shards = make_shards((4, 5))
    notes = Notes()
    decode = decode_with(lambda _: 0, decoded=notes)
    dataset = one_epoch(kind, shards, decode, skip_corrupt=True)
    assert len(list(dataset)) == 3
    if kind == "eval":
        assert len(notes.seen) == 9


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_record_batches_skip_corrupt_still_checks_files(tmp_path, kind):
    shards = write_shards(tmp_path, (4, 5))
    wrong = [shards[0], Shard(shards[1].path, 6)]
    decode = decode_with(decode_jpeg)
    with pytest.raises(UsageError, match="5 records"), inputs.input_errors():
        list(one_epoch(kind, wrong, decode, skip_corrupt=True))
    content = bytearray(pathlib.Path(shards[1].path).read_bytes())
    content[-1] ^= 1
    pathlib.Path(shards[1].path).write_bytes(content)
    with pytest.raises(StorageError, match="corrupted"), inputs.input_errors():
        list(one_epoch(kind, shards, decode, skip_corrupt=True))


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda record, seed: decode_id(record), "must return a dictionary"),
        (lambda record, seed: {"weight": 1.0}, "named 'weight'"),
    ],
)
def test_record_batches_skip_corrupt_needs_a_dictionary(
    make_shards, decode, message
):
    with pytest.raises(UsageError, match=message):
        record_batches(
            make_shards((4, 5)), decode, batch_size=3, skip_corrupt=True
        )


def test_usage_error_other_errors_are_none():
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        tf.debugging.assert_equal(1, 2)
    assert inputs.usage_error(error.value) is None


def test_input_errors_of_a_damaged_record_names_the_cause(tmp_path):
    (shard,) = write_shards(tmp_path, (3,))
    content = bytearray(pathlib.Path(shard.path).read_bytes())
    content[-1] ^= 1
    pathlib.Path(shard.path).write_bytes(content)

    @tf.function
    def last(iterator):
        for _ in tf.range(3):
            record = next(iterator)
        return record

    dataset = tf.data.TFRecordDataset(shard.path).repeat()
    with (
        pytest.raises(StorageError, match="corrupted record at") as error,
        inputs.input_errors(),
    ):
        last(iter(dataset))
    assert "\n" not in str(error.value)


def test_record_batches_uneven_files_warn(make_shards, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        record_batches(make_shards((4, 4)), batch_size=2, where=context(2))
        assert not caplog.records
        record_batches(make_shards((4, 4, 4)), batch_size=2, where=context(2))
    assert "omits 33 % of the records" in caplog.text


# Errors.

MAKERS = {
    **ARRAY_MAKERS,
    "record_batches": lambda arrays, *, context, **kwargs: record_batches(
        [Shard("none", len(arrays["id"]))], where=context, **kwargs
    ),
    "record_eval_batches": lambda arrays, **kwargs: inputs.record_eval_batches(
        [Shard("none", len(arrays["id"]))], decode_eval, **kwargs
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("batch_size", "sharing"),
    [(0, {}), (-2, {}), (3, {"replicas": 2}), (6, {"hosts": 2, "replicas": 2})],
)
def test_batches_uneven_for_replicas_raise(name, batch_size, sharing):
    replicas = math.prod(sharing.values())
    with pytest.raises(
        UsageError,
        match=f"batch_size={batch_size} for {replicas} ",
    ):
        MAKERS[name](ids(10), batch_size=batch_size, context=context(**sharing))


def test_array_batches_epoch_without_a_batch_raises():
    with pytest.raises(UsageError, match="10 examples, batch_size=11"):
        MAKERS["array_batches"](ids(10), batch_size=11, context=context())


def test_record_batches_epoch_without_a_batch_raises(make_shards):
    with pytest.raises(UsageError, match="8 examples, batch_size=9, 1 host"):
        record_batches(make_shards((4, 4)), batch_size=9)
    with pytest.raises(UsageError, match="batch_size=4, 2 hosts .* 1 examples"):
        record_batches(make_shards((7, 1)), batch_size=4, where=context(2))


def test_record_batches_unusable_arguments_raise(make_shards):
    shards = make_shards((4, 4))
    missing = Shard(shards[0].path + "x", 4)
    for arguments, message in (
        ({"shards": []}, "no shards"),
        ({"shards": [shards[0], shards[0]]}, "more than once"),
        ({"shards": [Shard(shards[0].path, -1)]}, "at least 0.*examples=-1"),
        ({"shards": [shards[0], missing]}, f"1 are missing, {missing.path}"),
        ({"shuffle_buffer": 0}, "Received: shuffle_buffer=0"),
        ({"cycle_length": 0}, "Received: cycle_length=0"),
        (
            {"decode": lambda record, seed: tf.io.decode_raw(record, tf.int64)},
            "static shape.*ensure_shape.*None",
        ),
        (
            {
                "read": lambda path: tf.data.TFRecordDataset(path).map(
                    lambda record: tf.strings.split([record])
                )
            },
            "dense tensors.*Ragged",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            record_batches(**{"shards": shards, "batch_size": 2, **arguments})


def test_record_eval_batches_unusable_arguments_raise(make_shards):
    shards = make_shards((4, 4))
    for arguments, message in (
        ({"shards": make_shards((0, 0))}, "at least one record.*2 files"),
        ({"shards": [Shard(shards[0].path + "x", 4)]}, "1 are missing"),
        ({"decode": decode_id}, "must return a dictionary"),
        ({"decode": lambda record: {"weight": 1.0}}, "named 'weight'"),
        (
            {"decode": lambda x: {"x": tf.io.decode_raw(x, tf.int64)}},
            "static shape",
        ),
    ):
        arguments = {
            "shards": shards,
            "decode": decode_eval,
            "batch_size": 2,
            "context": context(),
            **arguments,
        }
        with pytest.raises(UsageError, match=message):
            inputs.record_eval_batches(**arguments)
