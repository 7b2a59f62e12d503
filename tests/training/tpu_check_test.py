import json
import pathlib
import re

import keras
import pytest
import tensorflow as tf

from sos.errors import UsageError
from sos.training import tpu_check
from tests.support import techniques

IMAGES = tf.TensorSpec((4, 8, 8, 3))


@pytest.fixture(scope="module")
def strategy():
    return tpu_check.deviceless_strategy(2)


@pytest.fixture
def trace(strategy):
    """Traces a step of one replica, in a cluster."""

    def trace(step, *specs):
        @tf.function
        def outer(*args):
            def replica_step(*args):
                return step(*args)

            return strategy.run(replica_step, args=args)

        return outer.get_concrete_function(*(specs or [IMAGES]))

    return trace


def length(x):
    """What no TPU can do."""
    return tf.strings.length(tf.as_string(x))


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_deviceless_strategy_is_tensorflows_own(replicas):
    strategy = tpu_check.deviceless_strategy(replicas)
    assert type(strategy) is tf.distribute.TPUStrategy
    assert strategy.num_replicas_in_sync == replicas
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert len(strategy.experimental_local_results(variable)) == replicas
    variable.assign([3.0, 4.0])
    assert variable.numpy().tolist() == [3.0, 4.0]
    assert model(tf.ones((5, 3))).shape == (5, 2)


def test_deviceless_strategy_leaves_the_process_as_it_was():
    before = tf.config.get_soft_device_placement()
    tpu_check.deviceless_strategy(2)
    assert tf.config.get_soft_device_placement() == before
    assert not tf.distribute.has_strategy()
    # Another strategy works on.
    mirrored = techniques.two_replicas()

    @tf.function
    def both():
        def one():
            context = tf.distribute.get_replica_context()
            return context.all_reduce("sum", tf.constant(1.0))

        return mirrored.run(one)

    assert mirrored.experimental_local_results(both())[1].numpy() == 2.0


@pytest.mark.parametrize("replicas", [0, -1, 1.5, "2", None])
def test_deviceless_strategy_of_a_wrong_number_raises(replicas):
    with pytest.raises(UsageError, match="replicas="):
        tpu_check.deviceless_strategy(replicas)


def test_deviceless_strategy_without_soft_placement_raises():
    tf.config.set_soft_device_placement(False)
    try:
        with pytest.raises(UsageError, match="soft device placement"):
            tpu_check.deviceless_strategy(2)
    finally:
        tf.config.set_soft_device_placement(True)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_violations_of_a_clean_step_are_none(strategy, trace, policy):
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, dtype=policy),
                layers.BatchNormalization(synchronized=True, dtype=policy),
                layers.Dropout(0.1),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        optimizer = keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(0.1, 100), clipnorm=1.0
        )
        optimizer.build(model.trainable_variables)
        mean = keras.metrics.Mean()

    def step(x, y):
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                y, model(x, training=True)
            )
            loss = tf.reduce_mean(losses)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        mean.update_state(losses)
        return tf.math.top_k(losses, 2)

    function = trace(step, IMAGES, tf.TensorSpec((4,), tf.int32))
    assert tpu_check.violations(function) == []
    tpu_check.check(function)
    # It was the real thing: gradients are summed over the replicas.
    operations = {op.type for op in function.graph.get_operations()}
    assert {"CrossReplicaSum", "TPUReplicateMetadata"} <= operations


@tf.function
def nested(x):
    return length(x)


@tf.function
def twice_nested(x):
    return nested(x) + 1


# What a step does, and for each violation the operation and more of its line.
PLANTED = {
    "string": (
        length,
        {"AsString": "no such operation", "StringLength": "no such operation"},
    ),
    "bicubic": (
        lambda x: tf.image.resize(x, [16, 16], "bicubic"),
        {"ResizeBicubic": "no such operation"},
    ),
    "py_function": (
        lambda x: tf.ensure_shape(
            tf.py_function(lambda v: v, [x], tf.float32), x.shape
        ),
        {
            "EagerPyFunc": "no such operation",
            "EagerPyFunc of shape <unknown>": "not static",
        },
    ),
    "print": (
        lambda x: tf.print(x),
        {"StringFormat": "no such", "PrintV2": "no such"},
    ),
    "complex128": (
        lambda x: tf.abs(tf.cast(x, tf.complex128)),
        {
            "Cast with DstT=complex128": "not support this type",
            "ComplexAbs with T=complex128": "not support this type",
        },
    ),
    "while": (
        lambda x: tf.while_loop(
            lambda i, _: i < 3, lambda i, n: (i + 1, n + length(i)), (0, 0)
        ),
        {"AsString": "while_body", "StringLength": "while_body"},
    ),
    "cond": (
        lambda x: tf.cond(
            tf.reduce_sum(x) > 0,
            lambda: length(x),
            lambda: tf.zeros_like(x, tf.int32),
        ),
        {"AsString": "cond_true", "StringLength": "cond_true"},
    ),
    "switch_case": (
        lambda x: tf.switch_case(
            tf.argmax(x[0, 0, 0], output_type=tf.int32),
            [lambda: length(x), lambda: tf.zeros_like(x, tf.int32)],
        ),
        {"AsString": "branch", "StringLength": "branch"},
    ),
    "nested": (
        lambda x: twice_nested(x),
        {"AsString": "nested", "StringLength": "nested"},
    ),
    "map_fn": (
        lambda x: tf.map_fn(length, x, fn_output_signature=tf.int32),
        {"AsString": "while", "StringLength": "while"},
    ),
    "boolean_mask": (
        lambda x: tf.reduce_sum(tf.boolean_mask(x, x > 0)),
        {"Where of shape (None, 1)": "not static"},
    ),
    "growing": (
        lambda x: tf.while_loop(
            lambda i, _: i < 3,
            lambda i, y: [i + 1, tf.concat([y, y], 0)],
            [tf.constant(0), x],
            [tf.TensorShape(()), tf.TensorShape((None, 8, 8, 3))],
        )[1],
        {"While of shape (None, 8, 8, 3)": "not static"},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_violations_that_are_planted_are_found(trace, name):
    step, expected = PLANTED[name]
    lines = tpu_check.violations(trace(step))
    assert len(lines) == len(expected), lines
    for operation, more in expected.items():
        (line,) = [
            line
            for line in lines
            if re.match(rf"(Stateless)?{re.escape(operation)}:", line)
        ]
        assert more in line
        assert "(1 node, " in line


def test_violations_of_an_input_without_a_static_batch_are_one(trace):
    def step(x):
        # What follows from it is not listed.
        return tf.reduce_sum(tf.nn.relu(tf.matmul(x, tf.ones((6, 3)))), axis=1)

    (line,) = tpu_check.violations(trace(step, tf.TensorSpec((None, 6))))
    assert "of shape (None, 6): the shape is not static (1 node" in line
    assert tpu_check.violations(trace(step, tf.TensorSpec((4, 6)))) == []


def test_violations_that_are_equal_are_one_line(trace):
    def step(x):
        images = [x + i for i in range(3)]
        return [tf.image.resize(y, [16, 16], "bicubic") for y in images]

    (line,) = tpu_check.violations(trace(step))
    assert line == (
        "ResizeBicubic: a TPU has no such operation (3 nodes, such as "
        "'resize/ResizeBicubic')"
    )


def test_violations_in_host_loops_are_those_of_clusters(strategy):
    # What an estimator does: the host reads data, and may work on strings.
    dataset = tf.data.Dataset.from_tensors(tf.zeros((4, 3))).repeat()

    def make(step):
        @tf.function
        def loop(iterator, steps):
            for _ in tf.range(steps):
                tf.print(length(steps))
                strategy.run(step, args=(next(iterator),))

        iterator = iter(strategy.distribute_datasets_from_function(datasets))
        return loop.get_concrete_function(iterator, tf.TensorSpec((), tf.int32))

    def datasets(context):
        return dataset

    def good(x):
        return tf.reduce_sum(x)

    def bad(x):
        return nested(x)

    assert tpu_check.violations(make(good)) == []
    assert len(tpu_check.violations(make(bad))) == 2


def test_check_lists_all_violations(trace):
    def step(x):
        return length(x), tf.image.resize(x, [16, 16], "bicubic")

    with pytest.raises(UsageError) as error:
        tpu_check.check(trace(step))
    lines = str(error.value).splitlines()
    assert "would not accept" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [
        "- AsString",
        "- StringLength",
        "- ResizeBicubic",
    ]


@tf.function
def without_cluster(x):
    return x + 1


def test_check_without_a_cluster_raises():
    function = without_cluster.get_concrete_function(IMAGES)
    for checks in (tpu_check.check, tpu_check.violations):
        with pytest.raises(UsageError, match="TPU cluster"):
            checks(function)


def test_check_of_another_strategy_raises():
    mirrored = techniques.two_replicas()

    @tf.function
    def outer():
        return mirrored.run(lambda: tf.constant(1.0))

    with pytest.raises(UsageError, match="TPU cluster"):
        tpu_check.check(outer.get_concrete_function())


@pytest.mark.parametrize("function", [without_cluster, len, None])
def test_check_of_an_untraced_function_raises(function):
    with pytest.raises(TypeError, match="get_concrete_function"):
        tpu_check.check(function)


def test_deviceless_strategy_run_raises(strategy):
    @tf.function
    def outer():
        def step():
            return tf.constant(1.0)

        return strategy.run(step)

    with pytest.raises(tf.errors.OpError):
        outer()


def test_table_of_operations_is_what_it_is_said_to_be():
    path = pathlib.Path(tpu_check.__file__).parent / "data" / tpu_check._TABLE
    table = json.loads(path.read_text("utf-8"))
    assert len(table) == 537
    for operation in ("Conv2D", "MatMul", "CrossReplicaSum", "Svd", "While"):
        assert operation in table
    for operation in ("DecodeJpeg", "PyFunc", "AsString", "ResizeBicubic"):
        assert operation not in table
    (kernel,) = table["MatMul"]
    assert {"float32", "bfloat16"} <= set(kernel["T"].split())
    assert "complex128" not in kernel["T"].split()
