import re

import keras
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import tensorflow as tf

import sos
from sos import noise
from sos.wrappers import l0
from tests.support import techniques
from tests.support.modes import MODES

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOG_ALPHAS = [-4.0, -1.5, 0.0, 0.8, 2.197, 4.0]


def gate_of(u, log_alpha):
    """The hard concrete as a function of its uniform noise, in float64."""
    s = scipy.special.expit((scipy.special.logit(u) + log_alpha) / BETA)
    return np.clip(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def probability_below(stretched, log_alpha):
    """P(s (zeta - gamma) + gamma <= stretched), from the logistic CDF."""
    s = (stretched - GAMMA) / (ZETA - GAMMA)
    return scipy.stats.logistic.cdf(
        BETA * scipy.special.logit(s), loc=log_alpha
    )


def moment(log_alpha, power):
    """The mean of gate^power, by quadrature over the uniform noise."""
    zero, below_one = (probability_below(z, log_alpha) for z in (0.0, 1.0))
    between, _ = scipy.integrate.quad(
        lambda u: gate_of(u, log_alpha) ** power, zero, below_one
    )
    return between + (1 - below_one)


def wrap(layer, shape, *, seed=0, log_alpha=None, **settings):
    """A built wrapper with random weights and log alpha."""
    # Noise is a function of paths, in which Keras numbers what was made before.
    for inner in layer._flatten_layers():
        inner.name = re.sub(r"_\d+$", "", inner.name)
    wrapper = sos.L0Regularization(layer, **{"penalty_weight": 1.0, **settings})
    wrapper.build(shape)
    for i, variable in enumerate(layer.weights):
        variable.assign(techniques.normal(*variable.shape, seed=seed + i))
    for weight in wrapper.sparse_weights:
        value = log_alpha
        if value is None:
            value = techniques.normal(
                *weight.variable.shape, seed=seed + 7, scale=4
            )
        variable = weight.state["log_alpha"]
        variable.assign(np.broadcast_to(value, variable.shape))
    return wrapper


# The distribution.


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_sampled_gates_are_hard_concrete(log_alpha):
    count = 200_000
    z = l0.sample_gate(tf.fill([count], log_alpha), [3, 4]).numpy()
    assert z.dtype == np.float32
    zero = probability_below(0.0, log_alpha)
    one = 1 - probability_below(1.0, log_alpha)
    for found, p in (((z == 0).mean(), zero), ((z == 1).mean(), one)):
        assert abs(found - p) < 5 * np.sqrt(p * (1 - p) / count)
    mean, square = (moment(log_alpha, n) for n in (1, 2))
    deviation = np.sqrt(max(square - mean**2, 1e-12))
    assert abs(z.mean() - mean) < 5 * deviation / np.sqrt(count) + 1e-6
    # Between the clips, against the logistic distribution.
    inner = z[(z > 0) & (z < 1)].astype(np.float64)
    within = (probability_below(inner, log_alpha) - zero) / (1 - one - zero)
    assert scipy.stats.kstest(within, "uniform").pvalue > 1e-3


KEY = tf.constant([3, 4])


def with_gradient(log_alpha, upstream=1.0):
    """Gates, and the gradient of their weighted sum by log alpha."""
    with tf.GradientTape() as tape:
        tape.watch(log_alpha)
        gate = l0.sample_gate(log_alpha, KEY)
    return gate, tape.gradient(
        gate, log_alpha, tf.fill([gate.shape[0]], upstream)
    )


@pytest.mark.parametrize("mode", MODES)
def test_sampled_gates_equal_the_formula_of_the_paper_in_float64(mode):
    count = 100_000
    log_alpha = techniques.normal(count, seed=1, scale=4)
    u = np.float64(noise.uniform([count], KEY))
    gate, gradient = mode(with_gradient)(tf.constant(log_alpha))
    expected = gate_of(u, np.float64(log_alpha))
    np.testing.assert_allclose(gate, expected, rtol=0, atol=3e-7)
    s = scipy.special.expit((scipy.special.logit(u) + log_alpha) / BETA)
    inside = (expected > 0) & (expected < 1)
    slope = np.where(inside, s * (1 - s) * (ZETA - GAMMA) / BETA, 0.0)
    # Rounding alone decides whether gates next to 0 and 1 are clipped.
    decided = np.minimum(abs(expected), abs(expected - 1)) > 1e-6
    decided |= ~inside
    np.testing.assert_allclose(
        gradient.numpy()[decided], slope[decided], rtol=0, atol=1e-6
    )
    assert 20_000 < inside.sum() < 80_000


@pytest.mark.parametrize("mode", MODES)
def test_sampled_gates_at_extreme_log_alpha_are_zero_and_one(mode):
    count = 10_000
    log_alpha = [-np.inf, -1e5, -88.0, 88.0, 1e5, np.inf]
    gate, gradient = mode(with_gradient)(
        tf.repeat(tf.constant(log_alpha, tf.float32), count)
    )
    np.testing.assert_array_equal(
        np.reshape(gate, [6, count])[:, 0], [0, 0, 0, 1, 1, 1]
    )
    assert np.ptp(np.reshape(gate, [6, count]), axis=1).max() == 0
    np.testing.assert_array_equal(gradient, np.zeros(6 * count))


@pytest.mark.parametrize("mode", MODES)
def test_sampled_gates_of_nan_and_of_nan_upstream_are_nan(mode):
    log_alpha = tf.constant([np.nan, 0.0], tf.float32)
    gate, gradient = mode(with_gradient)(log_alpha)
    np.testing.assert_array_equal(np.isnan(gate), [True, False])
    np.testing.assert_array_equal(np.isnan(gradient), [True, False])
    _, gradient = mode(with_gradient)(tf.zeros(1000), np.nan)
    inside = np.isnan(gradient)
    assert 100 < inside.sum() < 900


@pytest.mark.parametrize("mode", MODES)
def test_sampled_gates_second_derivative_equals_finite_differences(mode):
    log_alpha = techniques.normal(200, scale=1.5)
    upstream = techniques.normal(200, seed=1)

    @mode
    def second(log_alpha):
        with tf.GradientTape() as outer:
            outer.watch(log_alpha)
            with tf.GradientTape() as inner:
                inner.watch(log_alpha)
                square = l0.sample_gate(log_alpha, KEY) ** 2
            first = inner.gradient(square, log_alpha, upstream)
        return outer.gradient(first, log_alpha)

    u = np.float64(noise.uniform([200], KEY))
    centre, h = np.float64(log_alpha), 1e-4
    below, at, above = (
        gate_of(u, x) ** 2 for x in (centre - h, centre, centre + h)
    )
    expected = upstream * (above - 2 * at + below) / h**2
    # Differences across a clip are none of one derivative.
    smooth = ((above > 0) & (below < 1) & (below > 0) & (above < 1)) | (
        above == below
    )
    assert smooth.sum() > 190
    assert 50 < (expected != 0).sum() < 150
    found = second(tf.constant(log_alpha)).numpy()
    np.testing.assert_allclose(
        found[smooth], expected[smooth], rtol=1e-4, atol=2e-6
    )


def test_sampled_gates_third_derivative_is_that_of_the_gate():
    log_alpha = tf.zeros([50])
    u = np.float64(noise.uniform([50], KEY))
    derivatives = [l0.sample_gate]
    for _ in range(3):

        def derivative(log_alpha, key, function=derivatives[-1]):
            with tf.GradientTape() as tape:
                tape.watch(log_alpha)
                value = function(log_alpha, key)
            return tape.gradient(value, log_alpha)

        derivatives.append(derivative)
    # s' = s (1 - s) / beta, and so on by the chain rule.
    s = scipy.special.expit(scipy.special.logit(u) / BETA)
    z = gate_of(u, 0.0)
    third = s * (1 - s) * (1 - 6 * s + 6 * s**2) * (ZETA - GAMMA) / BETA**3
    expected = np.where((z > 0) & (z < 1), third, 0.0)
    found = derivatives[3](log_alpha, KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_sampled_gates_reads_nothing_but_the_gates():
    graph = tf.Graph()
    with graph.as_default():
        log_alpha = tf.compat.v1.placeholder(tf.float32, [100])
        upstream = tf.compat.v1.placeholder(tf.float32, [100])
        # Its operations, not a call of it.
        gate = l0._sample_gate.__wrapped__(log_alpha, KEY.numpy())
        forward = set(graph.get_operations())
        (gradient,) = tf.gradients(gate, log_alpha, upstream)
    read, queue = set(), [gradient.op]
    while queue:
        for tensor in queue.pop().inputs:
            if tensor.op not in forward:
                queue.append(tensor.op)
            elif tensor.shape.num_elements() > 1:
                read.add(tensor.op.type)
    # The gate is the larger of the stretched one and 0. Log alpha is read for
    # the second derivative alone, through identities.
    assert read <= {"Maximum", "Placeholder", "Identity"}
    assert "Maximum" in read


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_expected_l0_is_the_probability_of_a_nonzero_gate(log_alpha):
    found = float(l0.expected_l0(tf.constant(log_alpha)))
    expected = 1 - probability_below(0.0, log_alpha)
    assert found == pytest.approx(expected, rel=1e-6)
    shifted = scipy.special.expit(log_alpha + 1.598597)
    assert found == pytest.approx(shifted, rel=1e-5)


def test_mean_gate_is_zero_and_one_exactly_outside_the_limits():
    limit = np.log(11.0)  # of sigmoid(x) = 1.1 / 1.2, 2.39790
    log_alpha = np.array([-1e5, -9, -2.39791, -2.3978, 0, 2.3978, 2.39791, 9])
    found = l0.mean_gate(tf.constant(log_alpha, tf.float32)).numpy()
    assert abs(limit - 2.39790) < 1e-5
    assert (found[:3] == 0).all()
    assert (found[6:] == 1).all()
    assert ((found[3:6] > 0) & (found[3:6] < 1)).all()
    expected = np.clip(scipy.special.expit(log_alpha) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_initial_log_alpha():
    wrapper = techniques.wrap(
        "L0Regularization", keras.layers.Dense(300, name="a")
    )
    wrapper.build((None, 300))
    values = techniques.state(wrapper, "log_alpha").numpy().ravel()
    assert abs(values.mean() - 2.197) < 5 * 0.01 / np.sqrt(values.size)
    assert values.std() == pytest.approx(0.01, rel=0.02)
    assert scipy.stats.kstest((values - 2.197) / 0.01, "norm").pvalue > 1e-3
    other = techniques.wrap(
        "L0Regularization", keras.layers.Dense(300, name="a"), seed=1
    )
    other.build((None, 300))
    assert (
        techniques.state(other, "log_alpha").numpy().ravel() != values
    ).any()


def test_initial_log_alpha_can_be_chosen():
    wrapper = techniques.wrap(
        "L0Regularization", keras.layers.Dense(9), initial_log_alpha=-4.0
    )
    wrapper.build((None, 9))
    assert abs(techniques.state(wrapper, "log_alpha").numpy() + 4).max() < 0.06


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_initial_log_alpha_must_be_finite(value):
    with pytest.raises(ValueError, match="Received: initial_log_alpha="):
        wrap(keras.layers.Dense(2), (None, 2), initial_log_alpha=value)


# The layer in training.


def gates_of(wrapper, size):
    """One step's gates, shown by a dense layer of ones and unit inputs."""
    wrapper.layer.kernel.assign(tf.ones_like(wrapper.layer.kernel))
    return wrapper(np.eye(size, dtype=np.float32), training=True).numpy()


def test_gates_are_one_sample_per_step_for_the_whole_batch():
    wrapper = wrap(
        keras.layers.Dense(40, use_bias=False), (None, 30), log_alpha=0.0
    )
    optimizer = techniques.bind(wrapper)
    gates = gates_of(wrapper, 30)
    # Each example sees its own row; all of them together see the whole kernel.
    x = np.ones((3, 30), np.float32)
    outputs = wrapper(x, training=True).numpy()
    np.testing.assert_allclose(outputs, [gates.sum(0)] * 3, rtol=1e-5)
    optimizer.iterations.assign(1)
    other = gates_of(wrapper, 30)
    assert abs(np.corrcoef(gates.ravel(), other.ravel())[0, 1]) < 0.15
    zero = probability_below(0.0, 0.0)
    assert (gates == 0).mean() == pytest.approx(zero, abs=0.07)


def test_noise_scope_around_weight_gates_changes_nothing():
    wrapper = wrap(keras.layers.Dense(4), (None, 3), log_alpha=0.0)
    techniques.bind(wrapper)
    x = techniques.normal(2, 3)
    first = wrapper(x, training=True).numpy()
    with sos.noise_scope("again"):
        np.testing.assert_array_equal(first, wrapper(x, training=True))


def test_gates_over_many_steps_are_independent():
    wrapper = wrap(
        keras.layers.Dense(6, use_bias=False), (None, 5), log_alpha=0.0
    )
    optimizer = techniques.bind(wrapper)
    wrapper.layer.kernel.assign(tf.ones((5, 6)))

    @tf.function
    def gates(step):
        optimizer.iterations.assign(step)
        return wrapper(tf.eye(5), training=True)

    samples = np.array([gates(tf.constant(i)) for i in range(2_000)])
    samples = samples.reshape(2_000, -1)
    correlation = np.corrcoef(samples.T) - np.eye(30)
    assert np.abs(correlation).max() < 6 / np.sqrt(2_000)
    a, b = samples[1:].ravel(), samples[:-1].ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)
    error = np.abs(samples.mean(0) - moment(0.0, 1)) / samples.std(0)
    assert error.max() < 5 / np.sqrt(2_000)


def test_embedding_draws_for_each_occurrence():
    layer = keras.layers.Embedding(3, 4)
    log_alpha = np.array([[-1.0], [0.0], [1.0]])
    wrapper = wrap(layer, (None, None), log_alpha=log_alpha)
    optimizer = techniques.bind(wrapper)
    ids = np.tile([[2, 0, 2]], (5_000, 1))
    outputs = wrapper(ids, training=True).numpy()
    gates = outputs / layer.embeddings.numpy()[ids]
    for place, row in enumerate(ids[0]):
        p = probability_below(0.0, log_alpha[row, 0])
        found = (gates[:, place] == 0).mean(0)
        assert np.abs(found - p).max() < 5 * np.sqrt(p * (1 - p) / 5_000)
    flat = gates.reshape(5_000, -1)
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlation).max() < 6 / np.sqrt(5_000)
    np.testing.assert_array_equal(outputs, wrapper(ids, training=True))
    optimizer.iterations.assign(1)
    assert (wrapper(ids, training=True).numpy() != outputs).any()


PLAIN = {
    "dense": lambda: (keras.layers.Dense(3, activation="relu"), (4,)),
    "dense_rank_3": lambda: (keras.layers.Dense(2), (3, 4)),
    "conv": lambda: (keras.layers.Conv2D(4, 3, padding="same"), (5, 5, 2)),
    "embedding": lambda: (keras.layers.Embedding(7, 3), (6,)),
    "rnn": lambda: (keras.layers.SimpleRNN(3, return_sequences=True), (4, 2)),
    "lstm": lambda: (keras.layers.LSTM(3), (4, 2)),
}


def inputs_for(name, shape):
    if name == "embedding":
        return np.arange(6)[None]
    return techniques.normal(2, *shape, seed=3)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("training", [True, False])
def test_layer_with_open_gates_is_the_plain_one(name, training):
    layer, shape = PLAIN[name]()
    wrapper = wrap(layer, (None, *shape), log_alpha=1e5)
    techniques.bind(wrapper)
    x = inputs_for(name, shape)
    found = wrapper(x, training=training)
    np.testing.assert_allclose(found, layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_evaluation_uses_the_mean_gates(name):
    layer, shape = PLAIN[name]()
    wrapper = wrap(layer, (None, *shape))
    x = inputs_for(name, shape)
    found = wrapper(x).numpy()
    np.testing.assert_array_equal(found, wrapper(x))
    for weight in wrapper.sparse_weights:
        log_alpha = np.float64(weight.state["log_alpha"])
        gate = np.clip(scipy.special.expit(log_alpha) * 1.2 - 0.1, 0, 1)
        assert (gate == 0).any()
        weight.variable.assign(np.float64(weight.value) * gate)
    plain = techniques.call_plain(layer, x)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_recurrent_layer_keeps_one_sample_for_all_time_steps():
    layer = keras.layers.SimpleRNN(5, return_sequences=True)
    wrapper = wrap(layer, (None, 7, 2), include="/kernel", log_alpha=0.0)
    layer.cell.recurrent_kernel.assign(tf.zeros((5, 5)))
    optimizer = techniques.bind(wrapper)
    x = np.full((3, 7, 2), 0.1, np.float32)
    first = wrapper(x, training=True).numpy()
    np.testing.assert_allclose(first, first[:1, :1] + 0 * first, rtol=1e-5)
    optimizer.iterations.assign(1)
    assert np.abs(first - wrapper(x, training=True)).max() > 1e-3


# Gradients.


def test_gradients_of_the_output():
    layer = keras.layers.Dense(6, use_bias=False)
    wrapper = wrap(layer, (None, 5))
    techniques.bind(wrapper)
    theta = np.float64(layer.kernel)
    log_alpha = np.float64(techniques.state(wrapper, "log_alpha"))
    z = np.float64(wrapper(tf.eye(5), training=True)) / theta
    inside = (z > 0) & (z < 1)
    assert 3 < inside.sum() < 27
    # The noise, from gates that are not clipped; others have no gradient.
    s = (np.where(inside, z, 0.5) - GAMMA) / (ZETA - GAMMA)
    u = scipy.special.expit(BETA * scipy.special.logit(s) - log_alpha)
    h = 1e-5
    slope = (gate_of(u, log_alpha + h) - gate_of(u, log_alpha - h)) / (2 * h)
    upstream = techniques.normal(5, 6, seed=9)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(wrapper(tf.eye(5), training=True) * upstream)
    variables = [
        layer.kernel.value,
        techniques.state(wrapper, "log_alpha").value,
    ]
    by_theta, by_log_alpha = tape.gradient(loss, variables)
    np.testing.assert_allclose(by_theta, upstream * z, rtol=1e-4, atol=1e-6)
    expected = upstream * theta * slope * inside
    np.testing.assert_allclose(by_log_alpha, expected, rtol=2e-3, atol=1e-4)


def test_penalty_and_its_gradient():
    wrapper = wrap(keras.layers.Dense(6), (None, 5), penalty_weight=0.3)
    techniques.bind(wrapper)
    variable = techniques.state(wrapper, "log_alpha")

    def numpy_penalty(log_alpha):
        return 0.3 * (1 - probability_below(0.0, log_alpha))

    log_alpha = np.float64(variable)
    with tf.GradientTape() as tape:
        (penalty,) = wrapper.losses
    assert float(penalty) == pytest.approx(
        numpy_penalty(log_alpha).sum(), rel=1e-5
    )
    h = 1e-5
    above, below = numpy_penalty(log_alpha + h), numpy_penalty(log_alpha - h)
    np.testing.assert_allclose(
        tape.gradient(penalty, variable.value),
        (above - below) / (2 * h),
        rtol=1e-4,
        atol=1e-7,
    )


def test_penalty_of_many_normals():
    wrapper = wrap(keras.layers.Dense(128), (None, 256))
    log_alpha = np.random.default_rng(10).normal(size=(256, 128))
    techniques.state(wrapper, "log_alpha").assign(log_alpha)
    penalty = wrapper.penalty(wrapper.sparse_weights[0])
    assert penalty.shape == ()
    expected = scipy.special.expit(log_alpha - BETA * np.log(0.1 / 1.1)).sum()
    assert float(penalty) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_gates_and_penalty_in_float32(policy):
    layer = keras.layers.Dense(64, use_bias=False, dtype=policy)
    wrapper = wrap(layer, (None, 64))
    techniques.bind(wrapper)
    layer.kernel.assign(tf.ones((64, 64)))
    (weight,) = wrapper.sparse_weights
    assert weight.state["log_alpha"].dtype == "float32"
    assert wrapper(tf.eye(64), training=True).dtype == policy[6:]
    # Gates in 16 bits would have few different values.
    gates = wrapper.training_weight(weight)
    assert gates.dtype == tf.float32
    assert len(np.unique(gates)) > 1_000
    (penalty,) = wrapper.losses
    assert penalty.dtype == tf.float32
    log_alpha = np.float64(weight.state["log_alpha"])
    expected = (1 - probability_below(0.0, log_alpha)).sum()
    assert float(penalty) == pytest.approx(expected, rel=1e-6)
