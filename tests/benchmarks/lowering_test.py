import numpy as np
import tensorflow as tf

from benchmarks.lowering import lower, run_steps
from benchmarks.recipes import Recipe


def test_lower_finds_data_and_variables_in_the_order_of_the_module():
    big = tf.Variable(tf.random.stateless_normal([100], [0, 1]), name="big")
    small = tf.Variable(3.0, name="small")

    @tf.function(jit_compile=True)
    def step(x, y):
        big.assign_add(small * x)
        return tf.reduce_sum(y)

    data = [
        Recipe("x", (100,), "float32", "normal", (0.0, 1.0)),
        Recipe("y", (2,), "int32", "integers", (0, 5)),
    ]
    lowered = lower(step, data)
    assert lowered.module.startswith(b"ML\xefR")
    assert [r.name for r in lowered.arguments()] == [
        "x",
        "y",
        *(v.name for v in lowered.variables),
    ]
    assert {v.name for v in lowered.variables} == {"big:0", "small:0"}


def test_run_steps_starts_from_what_the_recipes_make():
    total = tf.Variable(tf.ones([2, 3]))

    @tf.function(jit_compile=True)
    def step(x):
        total.assign_add(x)
        return tf.reduce_sum(x)

    recipe = Recipe("x", (2, 3), "float32", "normal", (0.0, 1.0))
    lowered = lower(step, [recipe])
    total.assign(tf.fill([2, 3], 7.0))
    first, second = run_steps(step, lowered, 2)
    x = recipe.make(0)
    np.testing.assert_allclose(first[0], 7 + x, rtol=1e-6)
    np.testing.assert_allclose(second[0], 7 + x + x, rtol=1e-6)
