import logging

import tensorflow as tf

from sos.traced import traced


def test_traced_traces_once_for_each_signature():
    traces = []

    @traced
    def power(x, exponent):
        traces.append((x.shape, exponent))
        return x**exponent

    for _ in range(2):
        assert float(power(tf.constant(3.0), 2)) == 9
        assert float(power(tf.constant(3.0), 3)) == 27
    assert power(tf.ones(4), 2).shape == (4,)
    assert traces == [((), 2), ((), 3), ((4,), 2)]


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

    with caplog.at_level(logging.WARNING):
        for size in range(12):
            double(tf.ones(size))
    assert "retracing" not in caplog.text
