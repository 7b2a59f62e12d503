import inspect
import json
import re

import keras
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import tensorflow as tf

import sos
from sos import noise, processor, uses
from sos.wrappers import variational_dropout as vd
from tests.support import techniques

EULER = 0.5772156649015329


def exact_kl(log_alpha):
    """KL(N(1, alpha) || log-uniform) by quadrature, 0 at alpha = infinity.

    -KL = 0.5 log(alpha) - E log|eps| + C for eps ~ N(1, alpha). For alpha to
    infinity eps / sqrt(alpha) is standard normal, for which E log|eps| is
    -(gamma + log 2) / 2; that gives C.
    """
    alpha = np.exp(log_alpha)
    deviation = np.sqrt(alpha)

    # E log|1 + sqrt(alpha) z|, split at the singularity.
    def integrand(z):
        return np.log(abs(1 + deviation * z)) * scipy.stats.norm.pdf(z)

    ends = sorted({-12.0, min(max(-1 / deviation, -12.0), 12.0), 12.0})
    mean_log = sum(
        scipy.integrate.quad(integrand, a, b, limit=400)[0]
        for a, b in zip(ends, ends[1:], strict=False)
    )
    limit = -(EULER + np.log(2)) / 2
    return mean_log - limit - 0.5 * log_alpha


def numpy_variance(theta, log_sigma2, clip=8.0):
    log_square = np.log(theta**2 + 1e-8)
    log_alpha = log_sigma2 - log_square
    if clip is not None:
        log_alpha = np.clip(log_alpha, -clip, clip)
    return np.exp(log_alpha + log_square)


def numpy_kl(theta, log_sigma2, clip=8.0):
    log_alpha = log_sigma2 - np.log(theta**2 + 1e-8)
    if clip is not None:
        log_alpha = np.clip(log_alpha, -clip, clip)
    negative = (
        0.63576 / (1 + np.exp(-1.8732 - 1.48695 * log_alpha))
        - 0.5 * np.log(1 + np.exp(-log_alpha))
        - 0.63576
    )
    return -negative.sum()


def finite_differences(function, at, step=1e-6):
    """The gradient of a NumPy function of a float64 array."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = at.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def wrap(layer, shape, *, seed=0, log_sigma2=None, **settings):
    """A built wrapper around a layer with random theta and log sigma^2."""
    # Noise is a function of paths, in which Keras numbers what was made before.
    for inner in layer._flatten_layers():
        inner.name = re.sub(r"_\d+$", "", inner.name)
    # The same numbers on all CPUs, for exact comparisons.
    settings = {
        "penalty_weight": 1.0,
        "variance_dtype": None
        if layer.compute_dtype == "float16"
        else "float32",
        **settings,
    }
    wrapper = sos.VariationalDropout(layer, **settings)
    wrapper.build(shape)
    for i, variable in enumerate(layer.weights):
        variable.assign(techniques.normal(*variable.shape, seed=seed + i))
    for weight in wrapper.sparse_weights:
        value = log_sigma2
        if value is None:
            value = np.random.default_rng(seed).uniform(
                -4.0, 0.0, weight.variable.shape
            )
        variable = weight.state["log_sigma2"]
        variable.assign(np.broadcast_to(value, variable.shape))
    return wrapper


# The functions.


@pytest.mark.parametrize("log_alpha", np.linspace(-8.0, 8.0, 33))
def test_kl_is_near_the_exact_integral(log_alpha):
    found = float(vd.kl_divergence(tf.constant(log_alpha, tf.float32)))
    assert found == pytest.approx(exact_kl(log_alpha), abs=0.0095)


def test_kl_vanishes_at_infinity_and_stays_finite():
    far = tf.constant([-1e4, 50.0, 1e4])
    found = vd.kl_divergence(far).numpy()
    np.testing.assert_allclose(
        found, [5000.0 + 0.63576, 0, 0], rtol=1e-6, atol=1e-20
    )
    assert found.min() >= 0


def test_log_alpha_and_log_sigma2_are_each_others_inverse():
    generator = np.random.default_rng(10)
    theta = generator.uniform(-10, 10, (32, 80))
    log_sigma2 = generator.uniform(-10, 10, (32, 80))
    found = vd.log_alpha_of(
        tf.constant(theta, tf.float32), tf.constant(log_sigma2, tf.float32)
    )
    expected = log_sigma2 - np.log(theta**2 + 1e-8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    back = vd.log_sigma2_of(tf.constant(theta, tf.float32), found)
    np.testing.assert_allclose(back, log_sigma2, rtol=1e-5, atol=1e-5)
    at_zero = vd.log_alpha_of(tf.constant(0.0), tf.constant(-10.0))
    assert float(at_zero) == pytest.approx(-10 + 8 * np.log(10), rel=1e-6)


# The output in training.


LINEAR = {
    "dense": lambda: (keras.layers.Dense(3), (4,)),
    "dense_without_bias": lambda: (keras.layers.Dense(3, use_bias=False), (4,)),
    "dense_rank_3": lambda: (keras.layers.Dense(2), (3, 4)),
    "einsum": lambda: (
        keras.layers.EinsumDense("bti,ijk->btjk", (3, 2, 2), bias_axes="k"),
        (3, 4),
    ),
    "conv1d": lambda: (keras.layers.Conv1D(2, 3, padding="causal"), (4, 2)),
    "conv_stride": lambda: (
        keras.layers.Conv2D(2, 3, strides=2, padding="same"),
        (5, 5, 2),
    ),
    "conv_dilation": lambda: (
        keras.layers.Conv2D(2, 2, dilation_rate=2),
        (4, 4, 2),
    ),
    "conv_groups": lambda: (keras.layers.Conv2D(4, 2, groups=2), (3, 3, 4)),
    "depthwise": lambda: (
        keras.layers.DepthwiseConv2D(2, depth_multiplier=2),
        (3, 3, 2),
    ),
    "transpose": lambda: (
        keras.layers.Conv2DTranspose(2, 2, strides=2),
        (2, 2, 2),
    ),
    "time_distributed": lambda: (
        keras.layers.TimeDistributed(keras.layers.Dense(2)),
        (3, 4),
    ),
}


def monte_carlo(layer, kernel, theta, variance, x, count):
    """Outputs of the plain layer with sampled weights, one for each sample."""
    noise = np.random.default_rng(5).normal(size=(count, *theta.shape))
    samples = (theta + np.sqrt(variance) * noise).astype(np.float32)

    @tf.function
    def outputs(samples):
        def one(sample):
            kernel.assign(sample)
            return layer(x)[0]

        return tf.map_fn(one, samples, parallel_iterations=1)

    return outputs(tf.constant(samples)).numpy()


@pytest.mark.parametrize("name", LINEAR)
def test_output_has_the_moments_of_sampled_weights(name):
    layer, shape = LINEAR[name]()
    wrapper = wrap(layer, (None, *shape))
    techniques.bind(wrapper)
    (weight,) = wrapper.sparse_weights
    theta = np.float64(weight.value)
    log_sigma2 = np.float64(weight.state["log_sigma2"])
    variance = np.exp(log_sigma2)
    x = techniques.normal(1, *shape, seed=3)

    # The variance of a sum is linear in sigma^2, with the squares of the
    # plain layer's derivatives as coefficients.
    with tf.GradientTape(persistent=True) as tape:
        mean = layer(x)[0]
    # The vectorised Jacobian of a grouped convolution is wrong.
    slopes = tape.jacobian(
        mean, weight.variable.value, experimental_use_pfor=False
    ).numpy()
    exact = (slopes**2 * variance).reshape(*mean.shape, -1).sum(-1) + 1e-8

    count = 20_000
    many = tf.repeat(x, count, axis=0)
    outputs = tf.function(wrapper)(many, training=True).numpy()
    error = np.abs(outputs.mean(0) - mean) / np.sqrt(exact / count)
    assert error.max() < 5
    ratio = outputs.var(0) / exact
    assert np.abs(ratio - 1).max() < 6 * np.sqrt(2 / count)

    sampled = monte_carlo(layer, weight.variable, theta, variance, x, 2_000)
    error = np.abs(sampled.mean(0) - outputs.mean(0))
    assert (error / np.sqrt(exact / 1_800)).max() < 5
    ratio = sampled.var(0) / outputs.var(0)
    assert np.abs(ratio - 1).max() < 6 * np.sqrt(2 / 1_800)


def standard_noise(wrapper, x, deviation=1.0):
    """The noise of outputs whose mean is 0 and deviation known."""
    return wrapper(x, training=True).numpy() / deviation


def centred(layer, shape):
    """A wrapper whose outputs are pure noise of variance sum x^2."""
    wrapper = wrap(layer, shape, log_sigma2=0.0, clip_log_alpha=None)
    for variable in layer.weights:
        variable.assign(tf.zeros_like(variable))
    return wrapper


def test_noise_is_standard_normal_and_independent_everywhere():
    wrapper = centred(
        keras.layers.Conv2D(3, 1, use_bias=False), (None, 3, 3, 1)
    )
    optimizer = techniques.bind(wrapper)
    x = np.ones((8, 3, 3, 1), np.float32)
    steps = []
    for step in range(400):
        optimizer.iterations.assign(step)
        steps.append(standard_noise(wrapper, x).ravel())
    noise = np.array(steps)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    # Between any two of the 216 output elements, over the steps.
    correlation = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    assert np.abs(correlation).max() < 6 / np.sqrt(len(noise))
    # Between neighbouring steps.
    lagged = (noise[1:] * noise[:-1]).mean()
    assert abs(lagged) < 5 / np.sqrt(noise[1:].size)


def test_noise_is_the_same_within_a_step_and_another_in_the_next():
    wrapper = centred(keras.layers.Dense(50), (None, 1))
    optimizer = techniques.bind(wrapper)
    x = np.ones((4, 1), np.float32)
    first = standard_noise(wrapper, x)
    np.testing.assert_array_equal(first, standard_noise(wrapper, x))
    with sos.noise_scope("second use"):
        labelled = standard_noise(wrapper, x)
    optimizer.iterations.assign(1)
    for other in (labelled, standard_noise(wrapper, x)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.4


def test_embedding_draws_for_each_occurrence():
    layer = keras.layers.Embedding(5, 3)
    wrapper = wrap(layer, (None, None))
    techniques.bind(wrapper)
    ids = np.tile([[2, 0, 2, 4]], (8_000, 1))
    outputs = wrapper(ids, training=True).numpy()
    theta = np.float64(layer.embeddings)
    variance = (
        np.exp(np.float64(techniques.state(wrapper, "log_sigma2"))) + 1e-8
    )
    deviation = np.sqrt(variance)
    noise = (outputs - theta[ids]) / deviation[ids]
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    for place, row in enumerate(ids[0]):
        found = outputs[:, place]
        error = np.abs(found.mean(0) - theta[row]) / deviation[row]
        assert error.max() < 5 / np.sqrt(len(ids))
        ratio = found.var(0) / variance[row]
        assert np.abs(ratio - 1).max() < 6 * np.sqrt(2 / len(ids))
    # Places 0 and 2 hold the same row.
    flat = noise.reshape(len(ids), -1)
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlation).max() < 6 / np.sqrt(len(ids))


def test_embedding_clips_the_rows():
    layer = keras.layers.Embedding(2, 1)
    wrapper = wrap(layer, (None, None), log_sigma2=20.0, clip_log_alpha=2.0)
    layer.embeddings.assign([[0.5], [-2.0]])
    techniques.bind(wrapper)
    outputs = wrapper(np.tile([[0, 1]], (8_000, 1)), training=True).numpy()
    expected = np.exp(2.0) * np.array([0.25, 4.0])
    np.testing.assert_allclose(outputs.var(0)[:, 0], expected, rtol=0.1)


PLAIN = {
    **LINEAR,
    "embedding": lambda: (keras.layers.Embedding(7, 3), (6,)),
    "rnn": lambda: (keras.layers.SimpleRNN(3, return_sequences=True), (4, 2)),
    "lstm": lambda: (keras.layers.LSTM(3, return_sequences=True), (4, 2)),
    "gru": lambda: (keras.layers.GRU(3), (4, 2)),
    "separable": lambda: (keras.layers.SeparableConv1D(3, 2), (4, 2)),
}


def inputs_for(name, shape):
    if name == "embedding":
        return np.arange(6)[None]
    return techniques.normal(2, *shape, seed=3)


@pytest.mark.parametrize("name", PLAIN)
def test_layer_without_variance_is_the_plain_one(name):
    layer, shape = PLAIN[name]()
    shape = (None, *shape)
    wrapper = wrap(layer, shape, log_sigma2=-1e7, clip_log_alpha=None)
    techniques.bind(wrapper)
    x = inputs_for(name, shape[1:])
    # Epsilon keeps a deviation of 1e-4 on every output, and on every weight
    # of a layer that is sampled in weight space, whose outputs add some up.
    tolerance = 6e-4 if name in (*LINEAR, "embedding") else 6e-3
    found = wrapper(x, training=True)
    np.testing.assert_allclose(found, layer(x), atol=tolerance)
    found = wrapper(x, training=False)
    np.testing.assert_allclose(found, layer(x), rtol=1e-6, atol=1e-6)


def test_epsilon_is_added_once_to_the_outputs_variance():
    wrapper = centred(keras.layers.Dense(2_000), (None, 4))
    techniques.state(wrapper, "log_sigma2").assign(tf.fill((4, 2_000), -1e7))
    techniques.bind(wrapper)
    noise = standard_noise(wrapper, np.ones((4, 4), np.float32), 1e-4)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3


def test_activation_comes_after_the_noise():
    layer = keras.layers.Dense(200, activation="relu")
    wrapper = wrap(layer, (None, 3))
    techniques.bind(wrapper)
    x = techniques.normal(40, 3)
    outputs = wrapper(x, training=True).numpy()
    layer.activation = None
    linear = wrapper(x, training=True).numpy()
    np.testing.assert_array_equal(outputs, np.maximum(linear, 0))
    assert (linear < 0).any()


def test_bias_is_not_sampled():
    layer = keras.layers.Dense(4)
    wrapper = wrap(layer, (None, 3), log_sigma2=2.0)
    techniques.bind(wrapper)
    outputs = wrapper(np.zeros((6, 3), np.float32), training=True)
    np.testing.assert_allclose(outputs, [layer.bias.numpy()] * 6, atol=6e-4)


# Weight space.


def test_recurrent_layer_keeps_one_sample_for_all_time_steps():
    layer = keras.layers.LSTM(5, return_sequences=True)
    wrapper = wrap(layer, (None, 7, 2), include="/kernel", log_sigma2=0.0)
    # With the state held fixed: no recurrence, and a forget gate of zero.
    layer.cell.recurrent_kernel.assign(tf.zeros((5, 20)))
    layer.cell.bias.assign([0.0] * 5 + [-1e9] * 5 + [0.0] * 10)
    optimizer = techniques.bind(wrapper)
    x = np.full((3, 7, 2), 0.1, np.float32)
    first = wrapper(x, training=True).numpy()
    np.testing.assert_allclose(first, first[:1, :1] + 0 * first, rtol=1e-5)
    np.testing.assert_array_equal(first, wrapper(x, training=True))
    optimizer.iterations.assign(1)
    assert np.abs(first - wrapper(x, training=True)).max() > 1e-3


def test_sampled_weights_have_the_right_moments():
    layer = keras.layers.SimpleRNN(4, activation=None, use_bias=False)
    wrapper = wrap(layer, (None, 1, 3), log_sigma2=None)
    optimizer = techniques.bind(wrapper)
    kernel, recurrent = wrapper.sparse_weights
    # One time step of one-hot inputs shows the kernel.
    x = np.eye(3, dtype=np.float32)[:, None]

    @tf.function
    def sample(step):
        optimizer.iterations.assign(step)
        return wrapper(x, training=True)

    samples = np.array([sample(tf.constant(i)) for i in range(3_000)])
    theta = np.float64(kernel.value)
    variance = np.exp(np.float64(kernel.state["log_sigma2"])) + 1e-8
    noise = (samples - theta) / np.sqrt(variance)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.abs(noise.mean(0)).max() < 5 / np.sqrt(3_000)
    assert np.abs(noise.var(0) - 1).max() < 6 * np.sqrt(2 / 3_000)
    assert recurrent.state["log_sigma2"].shape == (4, 4)


def test_epsilon_is_added_once_to_the_weights_variance():
    layer = keras.layers.SimpleRNN(60, use_bias=False)
    wrapper = wrap(layer, (None, 1, 60), log_sigma2=-1e7, clip_log_alpha=None)
    techniques.bind(wrapper)
    for weight in wrapper.sparse_weights:
        weight.variable.assign(tf.zeros((60, 60)))
        noise = np.float64(wrapper.training_weight(weight)) / 1e-4
        assert noise.var() == pytest.approx(1, abs=6 * np.sqrt(2 / 3_600))
        assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3


def test_weights_of_one_layer_have_noise_of_their_own():
    layer = keras.layers.SimpleRNN(30)
    wrapper = wrap(layer, (None, 2, 30), log_sigma2=0.0, clip_log_alpha=None)
    layer.cell.kernel.assign(tf.zeros((30, 30)))
    layer.cell.recurrent_kernel.assign(tf.zeros((30, 30)))
    techniques.bind(wrapper)
    kernel, recurrent = [
        np.ravel(wrapper.training_weight(w)) for w in wrapper.sparse_weights
    ]
    assert abs(np.corrcoef(kernel, recurrent)[0, 1]) < 6 / 30


# Noise that is drawn again.


@pytest.mark.parametrize(
    "policy", ["float32", "mixed_bfloat16", "mixed_float16"]
)
@pytest.mark.parametrize("name", ["dense", "conv_stride", "embedding", "rnn"])
def test_gradients_are_the_same_whether_noise_is_kept_or_drawn_again(
    name, policy
):
    layer, shape = PLAIN[name]()
    layer.dtype_policy = policy
    wrapper = wrap(layer, (None, *shape))
    techniques.bind(wrapper)
    x = inputs_for(name, shape)

    def outputs_and_gradients(redraws):
        @tf.function
        def compute():
            with noise.redrawing(redraws), tf.GradientTape() as tape:
                outputs = tf.cast(wrapper(x, training=True), tf.float32)
                loss = tf.reduce_mean(tf.square(outputs))
            variables = wrapper.trainable_variables
            return [outputs, *tape.gradient(loss, variables)]

        return [np.float64(tf.convert_to_tensor(t)) for t in compute()]

    kept, redrawn = outputs_and_gradients(False), outputs_and_gradients(True)
    for first, second in zip(kept, redrawn, strict=True):
        np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LINEAR)
def test_functions_of_linear_maps_do_not_refer_to_the_layer(name):
    """TensorFlow never frees what gradients written by hand refer to."""
    layer, shape = LINEAR[name]()
    wrap(layer, (None, *shape))
    (use,) = uses.describe(layer.plain_class, layer, tf.zeros((2, *shape)))
    functions = [use.function]
    for function in functions:
        for value in inspect.getclosurevars(function).nonlocals.values():
            held = (keras.layers.Layer, keras.Variable, uses.Use)
            assert not isinstance(value, held)
            if inspect.isfunction(value):
                functions.append(value)


# The dtype of variances.


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A CPU that multiplies bfloat16 natively."""
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: True)


def spread_dtype(layer, shape, **settings):
    """The dtype of variances that a wrapper chooses."""
    wrapper = wrap(
        layer, (None, *shape), **{"variance_dtype": None, **settings}
    )
    (use,) = uses.describe(layer.plain_class, layer, tf.zeros((2, *shape)))
    return wrapper._spread_dtype(use)


@pytest.mark.parametrize("name", ["dense", "conv_stride", "time_distributed"])
def test_variances_are_bfloat16_on_a_cpu_that_multiplies_it(
    name, fast_bfloat16
):
    assert spread_dtype(*LINEAR[name]()) == tf.bfloat16
    assert spread_dtype(*LINEAR[name](), variance_dtype="float32") == tf.float32
    with noise.redrawing(True):  # As with an accelerator.
        assert spread_dtype(*LINEAR[name]()) == tf.float32


def test_variances_are_float32_on_other_cpus(monkeypatch):
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: False)
    layer, shape = LINEAR["dense"]()
    assert spread_dtype(layer, shape) == tf.float32
    assert spread_dtype(layer, shape, variance_dtype="bfloat16") == tf.bfloat16


def test_variances_of_registered_layers_are_float32(fast_bfloat16):
    """Their function may not take bfloat16."""
    use = sos.extend.LinearMap(
        keras.Variable(tf.ones((4, 3))),
        inputs=tf.ones((2, 4)),
        function=lambda weight, x: tf.matmul(x, weight),
    )
    wrapper = wrap(keras.layers.Dense(3), (None, 4), variance_dtype=None)
    assert wrapper._spread_dtype(use) == tf.float32


def test_variances_in_bfloat16_are_unbiased_and_means_exact():
    layer = keras.layers.Dense(256, use_bias=False)
    noises = {}
    for dtype in ("float32", "bfloat16"):
        wrapper = wrap(layer, (None, 64), variance_dtype=dtype)
        layer.kernel.assign(tf.zeros((64, 256)))
        techniques.state(wrapper, "log_sigma2").assign(
            techniques.normal(64, 256, seed=2)
        )
        wrapper.clip_log_alpha = None
        techniques.bind(wrapper)
        x = techniques.normal(500, 64, seed=3)
        noises[dtype] = np.float64(wrapper(x, training=True))
    # The same noise, so that its factors can be compared.
    errors = (noises["bfloat16"] / noises["float32"]) ** 2 - 1
    assert abs(errors.mean()) < 5e-5
    assert errors.std() < 2.5e-3
    assert np.abs(errors).max() < 0.012


def test_variance_dtype_is_restored_from_a_configuration():
    wrapper = wrap(keras.layers.Dense(3), (None, 4), variance_dtype="bfloat16")
    config = json.loads(json.dumps(wrapper.get_config()))
    restored = sos.VariationalDropout.from_config(config)
    assert restored.variance_dtype == "bfloat16"
    del config["variance_dtype"]  # A file of an earlier version.
    assert sos.VariationalDropout.from_config(config).variance_dtype is None


@pytest.mark.parametrize("value", ["float16", "int8", 16])
def test_variance_dtype_of_another_value_raises_an_error(value):
    with pytest.raises(ValueError, match="one of None, 'float32', 'bfloat16'"):
        wrap(keras.layers.Dense(2), (None, 2), variance_dtype=value)


@pytest.mark.parametrize("variance_dtype", [None, "float32"])
def test_outputs_of_float16_without_any_variance_are_finite(variance_dtype):
    layer = keras.layers.Dense(3, dtype="mixed_float16")
    wrapper = wrap(
        layer, (None, 4), clip_log_alpha=None, variance_dtype=variance_dtype
    )
    techniques.state(wrapper, "log_sigma2").assign(tf.fill((4, 3), -1e7))
    techniques.bind(wrapper)
    x = techniques.normal(2, 4)
    np.testing.assert_allclose(
        wrapper(x, training=True), layer(x), rtol=0, atol=1e-2
    )


# Clipping and gradients.


@pytest.mark.parametrize(
    ("log_sigma2", "log_alpha"), [(20.0, 8.0), (-30.0, -8.0)]
)
def test_variance_is_clipped_by_log_alpha(log_sigma2, log_alpha):
    layer = keras.layers.Dense(5_000, use_bias=False)
    wrapper = wrap(layer, (None, 1), log_sigma2=log_sigma2)
    layer.kernel.assign(tf.fill((1, 5_000), -0.5))
    techniques.bind(wrapper)
    noise = wrapper(np.ones((1, 1), np.float32), training=True).numpy() + 0.5
    expected = np.exp(log_alpha) * 0.25
    assert noise.var() == pytest.approx(expected, rel=6 * np.sqrt(2 / 5_000))


def gradients(wrapper, loss):
    (weight,) = wrapper.sparse_weights
    theta, log_sigma2 = weight.variable, weight.state["log_sigma2"]
    with tf.GradientTape() as tape:
        value = loss()
    found = tape.gradient(
        value,
        [theta.value, log_sigma2.value],
        unconnected_gradients="zero",
    )
    return [np.float64(tf.convert_to_tensor(g)) for g in found]


def in_and_out_of_range(wrapper):
    """Sets log alpha to all of: within, above and below the limits of 8."""
    (weight,) = wrapper.sparse_weights
    theta = np.float64(weight.value)
    log_alpha = np.resize([-3.0, 9.0, -11.0, 0.5, 7.0], theta.shape)
    value = log_alpha + np.log(theta**2 + 1e-8)
    weight.state["log_sigma2"].assign(value)
    return theta, np.float64(weight.state["log_sigma2"]), np.abs(log_alpha) > 8


def dense_case():
    x = techniques.normal(6, 4, seed=3)
    return keras.layers.Dense(3), x, x


def conv_case():
    x = techniques.normal(2, 4, 4, 2, seed=3)
    patches = tf.image.extract_patches(
        x, [1, 3, 3, 1], [1, 2, 2, 1], [1, 1, 1, 1], "SAME"
    )
    layer = keras.layers.Conv2D(3, 3, strides=2, padding="same")
    return layer, x, patches.numpy().reshape(-1, 18)


def embedding_case():
    ids = np.array([[0, 2, 1], [4, 2, 3]])
    return keras.layers.Embedding(5, 3), ids, np.eye(5)[ids.ravel()]


@pytest.mark.parametrize("clip", [8.0, None])
@pytest.mark.parametrize("case", [dense_case, conv_case, embedding_case])
def test_gradients_of_the_output_are_finite_differences(case, clip):
    """Against x @ theta + bias + sqrt(x^2 @ sigma^2 + epsilon) * noise."""
    layer, inputs, x = case()
    x = np.float64(x)
    wrapper = wrap(layer, inputs.shape, clip_log_alpha=clip)
    techniques.bind(wrapper)
    matrices = in_and_out_of_range(wrapper)
    theta, log_sigma2, outside = [m.reshape(-1, 3) for m in matrices]
    bias = np.float64(getattr(layer, "bias", 0.0))

    def call():
        return tf.reshape(wrapper(inputs, training=True), (-1, 3))

    outputs = np.float64(call())

    def std(theta, log_sigma2):
        variance = numpy_variance(theta, log_sigma2, clip)
        return np.sqrt(x**2 @ variance + 1e-8)

    noise = (outputs - x @ theta - bias) / std(theta, log_sigma2)
    upstream = techniques.normal(len(x), 3, seed=9)

    def loss(theta, log_sigma2):
        sample = x @ theta + bias + std(theta, log_sigma2) * noise
        return (sample * upstream).sum()

    found = gradients(wrapper, lambda: tf.reduce_sum(call() * upstream))
    found = [g.reshape(-1, 3) for g in found]
    expected = [
        finite_differences(lambda t: loss(t, log_sigma2), theta),
        finite_differences(lambda s: loss(theta, s), log_sigma2),
    ]
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
    if clip is not None:
        assert (found[1][outside] == 0).all()
        # Theta still moves the variance, as log alpha stands at the limit.
        through_mean = x.T @ upstream
        assert (np.abs(found[0] - through_mean)[outside] > 0.01).any()


@pytest.mark.parametrize("log_sigma2", [60.0, 100.0, -200.0])
def test_gradients_are_finite_far_outside_of_the_limits(log_sigma2):
    wrapper = wrap(keras.layers.Dense(3), (None, 4), log_sigma2=log_sigma2)
    techniques.bind(wrapper)
    x = techniques.normal(6, 4)
    theta, log_sigma2 = gradients(
        wrapper, lambda: tf.reduce_sum(wrapper(x, training=True))
    )
    assert np.isfinite(theta).all()
    assert (log_sigma2 == 0).all()


@pytest.mark.parametrize("clip", [8.0, None])
def test_penalty_and_its_gradients(clip):
    wrapper = wrap(
        keras.layers.Dense(3),
        (None, 4),
        clip_log_alpha=clip,
        penalty_weight=0.7,
    )
    techniques.bind(wrapper)
    theta, log_sigma2, outside = in_and_out_of_range(wrapper)
    (penalty,) = wrapper.losses
    expected = 0.7 * numpy_kl(theta, log_sigma2, clip)
    assert penalty.dtype == tf.float32
    assert float(penalty) == pytest.approx(expected, rel=1e-5)
    found = gradients(wrapper, lambda: sum(wrapper.losses))
    expected = [
        finite_differences(
            lambda t: 0.7 * numpy_kl(t, log_sigma2, clip), theta
        ),
        finite_differences(
            lambda s: 0.7 * numpy_kl(theta, s, clip), log_sigma2
        ),
    ]
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    if clip is not None:
        assert all((g[outside] == 0).all() for g in found)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "function", [vd._clipped_variance, vd._clipped_divergence]
)
def test_second_order_gradients_by_clipped_log_alpha(function, traced):
    """Against differences of the first, within and outside of the limits."""
    theta = tf.constant(techniques.normal(40, seed=1))
    log_alpha = np.resize([-3.0, 9.0, -11.0, 0.5, 7.0], 40)
    log_sigma2 = tf.cast(log_alpha + np.log(theta.numpy() ** 2), tf.float32)

    def gradient(*args):
        with tf.GradientTape() as tape:
            tape.watch(args)
            value = tf.reduce_sum(function(*args, 8.0))
        return tape.gradient(value, args)

    def second(*args):
        with tf.GradientTape() as tape:
            tape.watch(args)
            total = tf.add_n([tf.reduce_sum(g) for g in gradient(*args)])
        return tape.gradient(total, args)

    found = (tf.function(second) if traced else second)(theta, log_sigma2)
    # Elements are independent: one step moves all of them.
    for index in range(2):
        step = [0.0, 0.0]
        step[index] = 1e-3
        above = gradient(theta + step[0], log_sigma2 + step[1])
        below = gradient(theta - step[0], log_sigma2 - step[1])
        expected = (tf.add_n(above) - tf.add_n(below)) / 2e-3
        # The second derivative by theta itself is steep near zero.
        near = np.abs(theta) > 0.1
        np.testing.assert_allclose(
            found[index][near], expected[near], rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("persistent", [False, True])
def test_gradient_of_a_huge_variance_that_is_clipped_is_zero(persistent):
    log_sigma2 = tf.constant([100.0, 1e4, -1e4])
    with tf.GradientTape(persistent=persistent) as tape:
        tape.watch(log_sigma2)
        variance = vd._clipped_variance(tf.ones(3), log_sigma2, 8.0)
    np.testing.assert_array_equal(tape.gradient(variance, log_sigma2), [0] * 3)


def test_penalty_of_many_normals():
    generator = np.random.default_rng(10)
    theta, log_sigma2 = generator.normal(size=(2, 256, 128))
    wrapper = wrap(keras.layers.Dense(128), (None, 256))
    (weight,) = wrapper.sparse_weights
    weight.variable.assign(theta)
    weight.state["log_sigma2"].assign(log_sigma2)
    penalty = wrapper.penalty(weight)
    assert penalty.shape == ()
    assert float(penalty) == pytest.approx(
        numpy_kl(theta, log_sigma2), rel=1e-5
    )


# Evaluation.


def test_evaluation_removes_by_log_alpha_unclipped():
    layer = keras.layers.Dense(4, use_bias=False)
    wrapper = wrap(layer, (None, 1), clip_log_alpha=2.0, threshold=3.0)
    layer.kernel.assign([[1.0, -2.0, 0.5, 0.0]])
    log_square = np.log(np.array([1.0, 4.0, 0.25, 0.0]) + 1e-8)
    log_alpha = np.array([2.99, 3.01, 9.0, -5.0])
    techniques.state(wrapper, "log_sigma2").assign([log_alpha + log_square])
    one = np.ones((1, 1), np.float32)
    # Clipped to 2, none would reach the threshold.
    assert wrapper(one).numpy().tolist() == [[1.0, 0.0, 0.0, 0.0]]
    wrapper.threshold = 3.02
    assert wrapper(one).numpy().tolist() == [[1.0, -2.0, 0.0, 0.0]]
    wrapper.threshold = 10
    assert wrapper(one).numpy().tolist() == [[1.0, -2.0, 0.5, 0.0]]


def test_weight_at_the_threshold_is_removed():
    layer = keras.layers.Dense(1, use_bias=False)
    wrapper = wrap(layer, (None, 1), log_sigma2=3.0)
    layer.kernel.assign([[1.0]])  # log(1 + epsilon) is 0 in float32
    wrapper.threshold = 3.0
    assert wrapper(np.ones((1, 1), np.float32)).numpy() == 0.0


def test_weight_of_nan_in_evaluation_stays_nan():
    layer = keras.layers.Dense(2, use_bias=False)
    wrapper = wrap(layer, (None, 2), log_sigma2=-10.0)
    layer.kernel.assign([[1.0, np.nan], [1e-9, 2.0]])
    model = keras.Sequential([keras.Input((2,)), wrapper])
    (found,) = wrapper.evaluation_weights().values()
    np.testing.assert_array_equal(found, [[1.0, np.nan], [0.0, 2.0]])
    assert sos.sparsity_report(model).sparsity == 0.25
    assert np.isnan(model(np.ones((1, 2), np.float32))[0, 1])


@pytest.mark.parametrize("value", [1000, "8", 0, -1.0, 80.5, float("nan")])
def test_limits_of_log_alpha_without_a_float32_exponential(value):
    with pytest.raises(ValueError, match=r"\(0, 80\].*Received: clip_log_al"):
        wrap(keras.layers.Dense(2), (None, 2), clip_log_alpha=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_initial_log_sigma2_must_be_finite(value):
    with pytest.raises(ValueError, match="Received: initial_log_sigma2="):
        wrap(keras.layers.Dense(2), (None, 2), initial_log_sigma2=value)


@pytest.mark.parametrize("name", PLAIN)
def test_evaluation_is_deterministic_and_sets_the_plain_layers_zeros(name):
    layer, shape = PLAIN[name]()
    wrapper = wrap(layer, (None, *shape), threshold=-2.0)
    x = inputs_for(name, shape)
    found = wrapper(x).numpy()
    np.testing.assert_array_equal(found, wrapper(x))
    zeros = 0
    for weight in wrapper.sparse_weights:
        theta = np.float64(weight.value)
        log_sigma2 = np.float64(weight.state["log_sigma2"])
        kept = log_sigma2 - np.log(theta**2 + 1e-8) < -2.0
        zeros += (~kept).sum()
        weight.variable.assign(theta * kept)
    assert zeros
    np.testing.assert_allclose(found, layer(x), rtol=1e-5, atol=1e-6)


def test_threshold_changes_without_a_new_trace():
    wrapper = wrap(keras.layers.Dense(3), (None, 4))
    evaluate = tf.function(lambda x: wrapper(x, training=False))
    x = techniques.normal(2, 4)
    dense = evaluate(x).numpy()
    wrapper.threshold = -100.0
    bias = wrapper.layer.bias.numpy()
    np.testing.assert_array_equal(evaluate(x), [bias, bias])
    wrapper.threshold = 100.0
    np.testing.assert_array_equal(evaluate(x), dense)
    assert evaluate.experimental_get_tracing_count() == 1


# Mixed precision.


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_parameters_and_penalty_in_float32(policy):
    layer = keras.layers.Dense(3, dtype=policy)
    wrapper = wrap(layer, (None, 4))
    techniques.bind(wrapper)
    assert techniques.state(wrapper, "log_sigma2").dtype == "float32"
    assert wrapper(techniques.normal(2, 4), training=True).dtype == policy[6:]
    theta, log_sigma2, _ = in_and_out_of_range(wrapper)
    (penalty,) = wrapper.losses
    assert penalty.dtype == tf.float32
    expected = numpy_kl(theta, log_sigma2)
    assert float(penalty) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_mixed_precision_has_the_right_variance(policy, size):
    layer = keras.layers.Dense(2_000, use_bias=False, dtype=policy)
    wrapper = wrap(layer, (None, 8), log_sigma2=-8.0, clip_log_alpha=None)
    layer.kernel.assign(tf.zeros((8, 2_000)))
    techniques.bind(wrapper)
    x = techniques.normal(3, 8, scale=size)
    outputs = np.float64(tf.cast(wrapper(x, training=True), tf.float32))
    expected = np.exp(-8.0) * (x**2).sum(1) + 1e-8
    found = (outputs**2).mean(1)
    np.testing.assert_allclose(found / expected, 1, atol=0.2)


@pytest.mark.parametrize("small", [0.0, 1e-3, 1.0])
def test_float16_stands_small_variances_and_large_inputs(small):
    layer = keras.layers.Dense(64, dtype="mixed_float16")
    wrapper = wrap(layer, (None, 32), log_sigma2=-15.0, seed=1)
    layer.kernel.assign(layer.kernel * 1e-3)
    techniques.bind(wrapper)
    x = techniques.normal(16, 32)
    x *= 2e4 / np.abs(x).max()
    x[3] = small  # a quiet example; 0 as after a ReLU

    def loss():
        outputs = wrapper(x, training=True)
        assert np.isfinite(outputs.numpy()).all()
        return tf.reduce_mean(tf.cast(outputs, tf.float32))

    for gradient in gradients(wrapper, loss):
        assert np.isfinite(gradient).all()
