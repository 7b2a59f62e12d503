"""Gradients against automatic differentiation of the formula, in all modes."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos import noise
from sos.wrappers import normal_sampling
from tests.support import hlo, techniques

KEY = [123456789, -987654321]
EPSILON = 1e-8


@pytest.fixture(params=[False, True], ids=["kept", "redrawn"], autouse=True)
def redraws(request):
    with noise.redrawing(request.param):
        yield request.param


@pytest.fixture(params=["eager", "graph", "xla"])
def run(request):
    """Runs a function in one of three ways."""
    if request.param == "eager":
        return lambda function, *args: function(*args)
    jit_compile = request.param == "xla"
    return lambda function, *args: tf.function(
        function, jit_compile=jit_compile
    )(*args)


def dense(weight, x):
    return tf.matmul(x, weight)


def convolution(weight, x):
    return tf.nn.conv2d(x, weight, 2, "SAME")


CASES = {
    "dense": (dense, (4, 3), (6, 4)),
    "convolution": (convolution, (3, 3, 2, 4), (2, 5, 5, 2)),
}


def linear_map(name, dtype=tf.float32):
    """A linear map, its inputs, and variances of its weights."""
    function, weight_shape, shape = CASES[name]
    x = tf.cast(techniques.normal(*shape, seed=1), dtype)
    variance = tf.exp(techniques.normal(*weight_shape, seed=2) - 2)
    weight = keras.Variable(tf.zeros(weight_shape))
    use = sos.extend.LinearMap(weight, inputs=x, function=function)
    return use, x, variance


def deviate(use, x, variance, spread_dtype=None):
    return normal_sampling.deviate_linear_map(
        use,
        x,
        variance,
        tf.constant(KEY),
        spread_dtype=spread_dtype or x.dtype,
        dtype=x.dtype,
    )


def by_formula(use, x, variance):
    """The same, for automatic differentiation, in float32."""
    spread = use.function(variance, tf.square(tf.cast(x, tf.float32)))
    normal = noise.normal(tf.shape(spread), tf.constant(KEY))
    return tf.sqrt(spread + EPSILON) * normal


def weighted(outputs):
    """A scalar in which every output has its own coefficient."""
    coefficients = techniques.normal(*outputs.shape, seed=7)
    return tf.reduce_sum(tf.cast(outputs, tf.float32) * coefficients)


def value_and_gradients(function, *args):
    with tf.GradientTape() as tape:
        tape.watch(args)
        outputs = function(*args)
        value = weighted(outputs)
    return outputs, *tape.gradient(value, args)


def assert_close(found, expected, tolerance):
    """Compares to within a fraction of the largest expected number."""
    found, expected = (
        np.float64(tf.cast(t, "float32")) for t in [found, expected]
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_deviate_linear_map_matches_the_formula(name, run):
    use, x, variance = linear_map(name)
    found = run(
        lambda *args: value_and_gradients(
            lambda x, variance: deviate(use, x, variance), *args
        ),
        x,
        variance,
    )
    expected = value_and_gradients(
        lambda x, variance: by_formula(use, x, variance), x, variance
    )
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, 2e-6)


@pytest.mark.parametrize(
    ("dtype", "spread_dtype", "tolerance"),
    [
        ("float32", "bfloat16", 0.02),
        ("bfloat16", "bfloat16", 0.03),
        ("bfloat16", "float32", 0.02),
        ("float16", "float16", 0.003),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_deviate_linear_map_in_low_precision_matches_float32(
    name, dtype, spread_dtype, tolerance, run
):
    use, x, variance = linear_map(name, dtype)
    found = run(
        lambda *args: value_and_gradients(
            lambda x, variance: deviate(
                use, x, variance, tf.as_dtype(spread_dtype)
            ),
            *args,
        ),
        x,
        variance,
    )
    expected = value_and_gradients(
        lambda x, variance: by_formula(use, x, variance),
        tf.cast(x, tf.float32),
        variance,
    )
    assert [t.dtype for t in found] == [dtype, dtype, "float32"]
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, tolerance)


def test_sample_matches_the_formula(run):
    mean = tf.constant(techniques.normal(5, 3, seed=1))
    variance = tf.exp(techniques.normal(5, 3, seed=2) - 2)

    def formula(mean, variance):
        normal = noise.normal(tf.shape(mean), tf.constant(KEY))
        return mean + tf.sqrt(variance + EPSILON) * normal

    found = run(
        lambda *args: value_and_gradients(
            lambda *args: normal_sampling.sample(*args, tf.constant(KEY)), *args
        ),
        mean,
        variance,
    )
    expected = value_and_gradients(formula, mean, variance)
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, 1e-6)


# Gradients of gradients.


def hessian_product(function, args, directions):
    """The derivative of the gradients in a direction."""
    with tf.GradientTape() as outer:
        outer.watch(args)
        _, *gradients = value_and_gradients(function, *args)
        product = tf.add_n(
            [
                tf.reduce_sum(gradient * tf.stop_gradient(direction))
                for gradient, direction in zip(
                    gradients, directions, strict=True
                )
            ]
        )
    return outer.gradient(product, args, unconnected_gradients="zero")


def differences(function, args, directions, step=1e-3):
    """The same, from two gradients."""
    below, above = (
        value_and_gradients(
            function,
            *(
                arg + sign * step * direction
                for arg, direction in zip(args, directions, strict=True)
            ),
        )[1:]
        for sign in (-1, 1)
    )
    return [(b - a) / (2 * step) for a, b in zip(below, above, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_second_order_gradients_of_a_linear_map_are_differences(name, run):
    use, x, variance = linear_map(name)
    args = x, variance
    # In proportion, so that variances stay positive.
    directions = techniques.normal(*x.shape, seed=3), variance
    found = run(
        lambda *args: hessian_product(
            lambda *args: deviate(use, *args), args, directions
        ),
        *args,
    )
    expected = differences(lambda *args: deviate(use, *args), args, directions)
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, 2e-3)


def test_second_order_gradients_of_a_sample_are_differences(run):
    mean = tf.constant(techniques.normal(5, 3, seed=1))
    variance = tf.exp(techniques.normal(5, 3, seed=2) - 2)
    args, directions = (mean, variance), (mean, variance)

    def sample(mean, variance):
        return normal_sampling.sample(mean, variance, tf.constant(KEY))

    found = run(lambda *args: hessian_product(sample, args, directions), *args)
    expected = differences(sample, args, directions)
    assert_close(found[1], expected[1], 2e-3)
    np.testing.assert_array_equal(found[0], tf.zeros_like(mean))


# Unusual arguments.


def test_deviate_linear_map_of_an_empty_batch_has_zero_gradients(run):
    use, x, variance = linear_map("dense")
    outputs, of_inputs, of_variance = run(
        lambda *args: value_and_gradients(
            lambda *args: deviate(use, *args), *args
        ),
        x[:0],
        variance,
    )
    assert outputs.shape == (0, 3)
    assert of_inputs.shape == (0, 4)
    np.testing.assert_array_equal(of_variance, tf.zeros_like(variance))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_non_finite_upstream_gradient_spoils_only_what_it_reaches(bad, run):
    use, x, variance = linear_map("dense")

    def gradients(x, variance, bad):
        with tf.GradientTape() as tape:
            tape.watch([x, variance])
            outputs = deviate(use, x, variance)
        upstream = tf.tensor_scatter_nd_update(
            tf.ones_like(outputs), [[0, 0]], [bad]
        )
        return tape.gradient(outputs, [x, variance], upstream)

    found = run(gradients, x, variance, tf.constant(bad))
    finite = run(gradients, x, variance, tf.constant(1.0))
    assert not np.isfinite(found[0][0]).any()
    assert not np.isfinite(found[1][:, 0]).any()
    np.testing.assert_array_equal(found[0][1:], finite[0][1:])
    np.testing.assert_array_equal(found[1][:, 1:], finite[1][:, 1:])


@pytest.mark.parametrize("kind", ["rows", "unknown rank"])
@pytest.mark.parametrize("name", ["linear map", "sample"])
def test_upstream_gradients_of_other_forms_give_the_same(kind, name):
    use, x, variance = linear_map("dense")

    def draw(variance):
        if name == "linear map":
            return deviate(use, x, variance)
        return normal_sampling.sample(
            tf.zeros_like(variance), variance, tf.constant(KEY)
        )

    @tf.custom_gradient
    def forget_shape(x):
        def gradient(upstream):
            return tf.py_function(lambda t: t, [upstream], tf.float32)

        return x, gradient

    def gradient(function):
        with tf.GradientTape() as tape:
            tape.watch(variance)
            outputs = draw(variance)
            if function == "rows":  # Gives `IndexedSlices`.
                outputs = tf.gather(outputs, tf.range(len(outputs)))
            elif function == "unknown rank":
                outputs = forget_shape(outputs)
            value = weighted(outputs)
        return tape.gradient(value, variance)

    found = tf.function(lambda: gradient(kind))()
    assert_close(found, gradient(None), 1e-6)


def test_outputs_without_any_variance_have_finite_gradients(run):
    use, x, variance = linear_map("dense", "float16")
    x = x * np.float16([[1], [0], [1], [1], [0], [1]])
    outputs, *gradients = run(
        lambda *args: value_and_gradients(
            lambda *args: deviate(use, *args), *args
        ),
        x,
        variance * 1e-3,
    )
    for tensor in [outputs, *gradients]:
        assert np.isfinite(tensor).all()
    np.testing.assert_array_equal(gradients[0][1], np.zeros(4))


def test_variables_that_a_linear_map_reads_get_their_gradients(run):
    use, x, variance = linear_map("dense")
    gain = tf.Variable([0.5, 1.0, 2.0])
    scaled = sos.extend.LinearMap(
        use.weight,
        inputs=x,
        function=lambda weight, x: tf.matmul(x, weight) * gain,
    )

    def gradients(draw):
        with tf.GradientTape() as tape:
            tape.watch([x, variance])
            value = weighted(draw(scaled, x, variance))
        return tape.gradient(value, [x, variance, gain])

    found = run(lambda: gradients(deviate))
    expected = gradients(by_formula)
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, 1e-6)


def test_gradients_can_be_computed_repeatedly_from_a_persistent_tape():
    use, x, variance = linear_map("dense")
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(variance)
        value = weighted(deviate(use, x, variance))
    np.testing.assert_array_equal(
        tape.gradient(value, variance), tape.gradient(value, variance)
    )


def test_gradients_through_a_loop_match_those_of_its_steps(run):
    use, x, variance = linear_map("dense")

    def gradient(steps):
        with tf.GradientTape() as tape:
            tape.watch(variance)
            total = tf.zeros([])
            for i in steps:
                total += weighted(
                    deviate(use, x * tf.cast(i + 1, tf.float32), variance)
                )
        return tape.gradient(total, variance)

    found = run(lambda: gradient(tf.range(3)))
    assert_close(found, gradient(range(3)), 1e-6)


def test_gradients_of_a_rematerialised_block_are_the_same():
    use, x, variance = linear_map("dense")

    def block(x, variance):
        return deviate(use, x, variance)

    plain = value_and_gradients(block, x, variance)
    again = value_and_gradients(tf.recompute_grad(block), x, variance)
    for got, want in zip(again, plain, strict=True):
        np.testing.assert_array_equal(got, want)


# What is kept.


@functools.cache
def compiled_step(depth, redraws):
    """The gradients of equal convolutions, as XLA optimises them."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16, 16, 8))])
    for _ in range(depth):
        model.add(keras.layers.Conv2D(8, 3, padding="same", use_bias=False))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model = sos.sparsify(model, "VariationalDropout", penalty_weight=1e-3)
    optimizer = keras.optimizers.SGD()

    @tf.function(jit_compile=True)
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables)

    x = tf.ones((16, 16, 16, 8))
    with sos.SparsityUpdater(model, optimizer), noise.redrawing(redraws):
        ir = gradients.experimental_get_compiler_ir(x)
        return ir(stage="optimized_hlo"), 4 * tf.size(x).numpy()


def test_compiled_step_keeps_no_noise_if_it_is_drawn_again(redraws):
    text, _ = compiled_step(2, redraws)
    # Only noise has logarithms here.
    draws = len(re.findall(r" log\(", text))
    assert draws == (4 if redraws else 2)


def test_compiled_step_keeps_three_tensors_of_a_layer_if_noise_is_redrawn(
    redraws,
):
    (two, size), (six, _) = compiled_step(2, redraws), compiled_step(6, redraws)
    kept = (hlo.peak_bytes(six) - hlo.peak_bytes(two)) / (4 * size)
    # Inputs, variances and outputs; or also noise, deviations and squares.
    assert kept == pytest.approx(3 if redraws else 5, abs=0.3)
