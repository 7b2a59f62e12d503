import logging

import numpy as np
import tensorflow as tf

from sos.traced import traced


def test_traced_traces_once_for_each_signature():
    traces = []

    @traced
    def power(x, exponent):
        traces.append((x.shape, exponent))
        return x**exponent

    @tf.function
    def powers(x):
        return power(x, 2), power(x, 3), power(tf.ones(4), 2)

    # Two graphs.
    for x in (tf.constant(3.0), tf.constant([3.0, 3.0])):
        square, cube, ones = powers(x)
        np.testing.assert_array_equal(square, 9 + 0 * x)
        np.testing.assert_array_equal(cube, 27 + 0 * x)
        assert ones.shape == (4,)
    shapes = [(), (), (4,), (2,), (2,)]
    assert traces == list(zip(shapes, [2, 3, 2, 2, 3], strict=True))


def test_traced_outside_of_a_graph_calls_the_function():
    @traced
    def is_eager(x):
        return tf.executing_eagerly(), x

    assert is_eager(tf.constant(1.0))[0] is True


def test_traced_adds_one_operation_to_a_graph_and_has_a_gradient():
    @traced
    def cube(x):
        return x * x * x

    @tf.function
    def slope(x):
        before = len(tf.compat.v1.get_default_graph().get_operations())
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = cube(x)
        after = len(tf.compat.v1.get_default_graph().get_operations())
        assert after - before <= 2
        return tape.gradient(y, x)

    assert float(slope(tf.constant(2.0))) == 12


def test_traced_does_not_warn_of_many_shapes(caplog):
    @traced
    def double(x):
        return 2 * x

    @tf.function
    def double_many():
        for size in range(12):
            double(tf.ones(size))

    with caplog.at_level(logging.WARNING):
        double_many()
    assert "retracing" not in caplog.text
