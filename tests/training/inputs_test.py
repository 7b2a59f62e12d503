import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from sos.training import inputs


def context(hosts=1, host=0, replicas=1):
    """The context of one host, where each has so many replicas."""
    return tf.distribute.InputContext(
        num_input_pipelines=hosts,
        input_pipeline_id=host,
        num_replicas_in_sync=hosts * replicas,
    )


def take(dataset, count):
    return list(dataset.take(count).as_numpy_iterator())


def global_batches(make, steps, hosts=1, replicas=1):
    """The batches of all replicas of all hosts, put together step by step.

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


def ids(examples):
    """Arrays whose values tell the examples."""
    numbers = np.arange(examples)
    return {"id": numbers, "image": np.stack([numbers, -numbers], axis=1)}


def array_ids(examples, *, step=0, count, batch_size, seed=3, **sharing):
    """The examples that so many steps see."""
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


# What both kinds of input promise, with the first epochs of one host and one
# replica as the reference.

SHARINGS = st.tuples(
    st.integers(1, 3),  # hosts
    st.integers(1, 3),  # replicas of each
    st.integers(1, 2),  # examples of each replica
)


def in_some_order(epoch, examples):
    """An order that only this test knows, a permutation for each epoch."""
    return (tf.range(examples, dtype=tf.int64) * 7 + epoch * 5) % examples


def number_records(examples, decode, *, step, batch_size, where):
    return inputs.record_batches(
        lambda epoch: tf.data.Dataset.from_tensor_slices(
            in_some_order(epoch, examples)
        ),
        decode,
        records_per_epoch=examples,
        batch_size=batch_size,
        step=step,
        context=where,
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


@hypothesis.settings(max_examples=8)
@hypothesis.given(SHARINGS, st.integers(0, 5), st.integers(0, 12))
def test_record_batches_depend_on_the_step_alone(sharing, more, step):
    hosts, replicas, each = sharing
    batch_size = hosts * replicas * each
    # Such that multiplying by 7 is a permutation.
    examples = batch_size + more + ((batch_size + more) % 7 == 0)
    found = global_batches(
        lambda where: number_records(
            examples,
            lambda record, number: {"record": record, "number": number},
            step=step,
            batch_size=batch_size,
            where=where,
        ),
        3,
        hosts=hosts,
        replicas=replicas,
    )
    per_epoch = examples // batch_size
    for i, batch in enumerate(found, start=step):
        epoch, place = divmod(i, per_epoch)
        order = [(7 * n + 5 * epoch) % examples for n in range(examples)]
        expected = order[place * batch_size : (place + 1) * batch_size]
        assert batch["record"].tolist() == expected
        first = i * batch_size
        assert batch["number"].tolist() == [*range(first, first + batch_size)]
        assert batch["number"].dtype == np.int64


# Arrays.


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (13, 4), (5, 5)])
def test_each_epoch_is_another_permutation(examples, batch_size):
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


def test_orders_are_uniform():
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


def test_another_seed_is_another_order():
    orders = [
        array_ids(40, count=1, batch_size=40, seed=seed)[0]
        for seed in (0, 1, 2**40, -1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_step_far_ahead_is_there_at_once():
    # Ten million epochs are not to be walked through.
    (batch,) = array_ids(6, step=20_000_001, count=1, batch_size=3)
    (before,) = array_ids(6, step=20_000_000, count=1, batch_size=3)
    assert sorted(before + batch) == list(range(6))


def test_dtypes_and_static_shapes_are_kept():
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


# Records.


class Decoder:
    """Notes the records that it is called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, record, number):
        def note(value):
            self.seen.append(int(value))
            return value

        value = tf.numpy_function(note, [record], tf.int64)
        return tf.ensure_shape(value, ())


@pytest.mark.parametrize(("hosts", "host"), [(1, 0), (2, 1)])
def test_what_was_seen_before_is_not_decoded(hosts, host):
    batch_size, per_epoch, step = 4, 5, 8
    decoder = Decoder()
    # The record tells its place in the training.
    dataset = inputs.record_batches(
        lambda epoch: tf.data.Dataset.range(20).map(lambda i: epoch * 100 + i),
        decoder,
        records_per_epoch=22,
        batch_size=batch_size,
        step=step,
        context=context(hosts, host),
    )
    batch = next(dataset.as_numpy_iterator()).tolist()
    assert batch == [112, 113, 114, 115][host * 2 :][: batch_size // hosts]
    # More than the batch, as it reads ahead, but of this host alone.
    assert set(batch) <= set(decoder.seen)
    for seen in decoder.seen:
        epoch, place = divmod(seen, 100)
        assert epoch * per_epoch * batch_size + place >= step * batch_size
        assert hosts == 1 or place % batch_size >= 2


def record_batches(records, decode, hosts):
    """The second and third batch of four records in epochs of eight."""
    return global_batches(
        lambda where: inputs.record_batches(
            records,
            decode,
            records_per_epoch=8,
            batch_size=4,
            step=1,
            context=where,
        ),
        2,
        hosts=hosts,
        replicas=2,
    )


@pytest.mark.parametrize("hosts", [1, 2])
def test_records_may_be_structures(hosts):
    def records(epoch):
        numbers = tf.data.Dataset.range(8)
        return numbers.map(lambda i: (tf.as_string(i), {"label": i + epoch}))

    def decode(record, number):
        text, rest = record
        return {
            "x": tf.strings.to_number(text),
            "y": rest["label"],
            "n": number,
        }

    (_, second) = record_batches(records, decode, hosts)
    assert second["x"].tolist() == [0, 1, 2, 3]
    assert second["y"].tolist() == [1, 2, 3, 4]
    assert second["n"].tolist() == [8, 9, 10, 11]


def test_records_may_differ_in_shape():
    def records(epoch):
        numbers = tf.data.Dataset.range(8)
        return numbers.map(lambda i: tf.fill([i + 1], i))

    for hosts in (1, 2):
        (first, _) = record_batches(
            records, lambda record, number: {"x": record[0]}, hosts
        )
        assert first["x"].tolist() == [4, 5, 6, 7]


def test_augmentation_by_number_is_the_same_after_a_restart():
    def augment(record, number):
        seed = tf.stack([tf.constant(9, tf.int64), number])
        return tf.random.stateless_uniform((2,), seed)

    def batches(step, count, replicas=1):
        return global_batches(
            lambda where: number_records(
                8, augment, step=step, batch_size=4, where=where
            ),
            count,
            replicas=replicas,
        )

    whole = batches(0, 5)
    np.testing.assert_array_equal(whole[3:], batches(3, 2, replicas=2))
    assert len(np.unique(np.concatenate(whole), axis=0)) == 20


def test_an_epoch_with_more_records_than_told_is_cut():
    # Otherwise a restart would count its steps differently.
    dataset = inputs.record_batches(
        lambda epoch: tf.data.Dataset.range(9),
        lambda record, number: record,
        records_per_epoch=4,
        batch_size=2,
        step=0,
        context=context(),
    )
    found = np.concatenate(take(dataset, 4)).tolist()
    assert found == [0, 1, 2, 3, 0, 1, 2, 3]


# Evaluation.


@hypothesis.settings(max_examples=8)
@hypothesis.given(SHARINGS, st.integers(1, 25))
def test_evaluation_sees_every_example_once(sharing, examples):
    hosts, replicas, each = sharing
    batch_size = hosts * replicas * each
    batches = inputs.evaluation_batch_count(examples, batch_size)
    assert batches == math.ceil(examples / batch_size)

    def make(where):
        dataset = inputs.evaluation_batches(
            ids(examples), batch_size=batch_size, context=where
        )
        assert dataset.element_spec == {
            "id": tf.TensorSpec((each,), tf.int64),
            "image": tf.TensorSpec((each, 2), tf.int64),
            "weight": tf.TensorSpec((each,), tf.float32),
        }
        # As many for each replica, and no more.
        assert len(list(dataset)) == batches * replicas
        return dataset

    found = global_batches(make, batches, hosts, replicas)
    numbers = np.concatenate([batch["id"] for batch in found])
    weights = np.concatenate([batch["weight"] for batch in found])
    assert numbers[:examples].tolist() == list(range(examples))
    assert (weights == (np.arange(weights.size) < examples)).all()
    # What fills up is a real example, so that it computes nothing odd.
    assert (numbers < examples).all()


def test_evaluation_has_the_name_weight_for_itself():
    arrays = {"x": np.zeros(3), "weight": np.ones(3)}
    with pytest.raises(ValueError, match="'weight'"):
        inputs.evaluation_batches(arrays, batch_size=2, context=context())


# What is refused.

MAKERS = {
    "array_batches": lambda arrays, **kwargs: inputs.array_batches(
        arrays, seed=0, step=0, **kwargs
    ),
    "evaluation_batches": inputs.evaluation_batches,
    "record_batches": lambda arrays, **kwargs: inputs.record_batches(
        lambda epoch: tf.data.Dataset.range(10),
        lambda record, number: record,
        records_per_epoch=10,
        step=0,
        **kwargs,
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("batch_size", "sharing"),
    [(0, {}), (-2, {}), (3, {"replicas": 2}), (6, {"hosts": 2, "replicas": 2})],
)
def test_batches_that_replicas_cannot_share_are_refused(
    name, batch_size, sharing
):
    replicas = math.prod(sharing.values())
    with pytest.raises(
        ValueError,
        match=f"positive multiple.*batch_size={batch_size} for {replicas} ",
    ):
        MAKERS[name](ids(10), batch_size=batch_size, context=context(**sharing))


@pytest.mark.parametrize("name", ["array_batches", "record_batches"])
def test_epochs_that_fill_no_batch_are_refused(name):
    with pytest.raises(
        ValueError, match="at least one batch.*10 examples, batch_size=11"
    ):
        MAKERS[name](ids(10), batch_size=11, context=context())


@pytest.mark.parametrize("name", ["array_batches", "evaluation_batches"])
@pytest.mark.parametrize(
    "lengths", [{}, {"x": 0}, {"x": 3, "y": 4}, {"x": 0, "y": 2}], ids=str
)
def test_arrays_of_other_lengths_are_refused(name, lengths):
    arrays = {key: np.zeros(size) for key, size in lengths.items()}
    with pytest.raises(ValueError) as error:
        MAKERS[name](arrays, batch_size=1, context=context())
    assert f"Received: {lengths}" in str(error.value)
