"""Variational dropout inside of layers that hold layers.

Ten equal tokens get noise of their own in every position, with the means and
variances of the theory. The closed forms are written down in NumPy, or follow
from the derivatives of the plain layer.
"""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.wrappers.base import find_wrappers
from tests.support import techniques

TOKENS, WIDTH, HEADS = 10, 8, 2
# Log sigma^2 of weights that are to be as good as certain.
SILENT = -100.0


def mha(**kwargs):
    return keras.layers.MultiHeadAttention(
        HEADS, 3, value_dim=5, name="composite", **kwargs
    )


def encoder(**kwargs):
    return keras_hub.layers.TransformerEncoder(
        12, HEADS, normalize_first=True, name="composite", **kwargs
    )


def decoder(**kwargs):
    return keras_hub.layers.TransformerDecoder(
        12, HEADS, normalize_first=True, name="composite", **kwargs
    )


def embedding(**kwargs):
    return keras_hub.layers.TokenAndPositionEmbedding(
        5, TOKENS, WIDTH, name="composite", **kwargs
    )


COMPOSITES = (mha, encoder, decoder, embedding)


def plain_model(make, dtype="float32"):
    """A model of one composite, the weights of which are normal."""
    keras.utils.set_random_seed(0)
    layer = make(dtype=dtype)
    if make is embedding:
        inputs = keras.Input((TOKENS,), dtype="int32")
        outputs = layer(inputs)
    else:
        inputs = keras.Input((TOKENS, WIDTH))
        outputs = layer(inputs, inputs) if make is mha else layer(inputs)
    model = keras.Model(inputs, outputs, name="model")
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(techniques.normal(*variable.shape, seed=i, scale=0.7))
    return model


def equal_tokens(make, batch):
    if make is embedding:
        return np.full((batch, TOKENS), 3, "int32")
    return np.tile(techniques.normal(1, 1, WIDTH, seed=9), (batch, TOKENS, 1))


def sparsify(model):
    return sos.sparsify(
        model,
        sos.VariationalDropout,
        penalty_weight=1.0,
        initial_log_sigma2=SILENT,
        clip_log_alpha=None,
    )


def weights(model):
    """The sparse weights of a model by path."""
    return {
        weight.path: weight
        for wrapper in find_wrappers(model)
        for weight in wrapper.sparse_weights
    }


def the_only(named, end):
    (found,) = [value for path, value in named.items() if path.endswith(end)]
    return found


def make_noisy(model, *ends, seed=20):
    """Gives some weights variances, and returns these as float64."""
    found = []
    for i, end in enumerate(ends):
        weight = the_only(weights(model), end)
        variance = np.random.default_rng(seed + i).uniform(
            0.1, 0.5, weight.variable.shape
        )
        weight.state["log_sigma2"].assign(np.log(variance))
        found.append(np.exp(np.float64(weight.state["log_sigma2"])))
    return found


def values(model, *ends):
    named = {v.path: v for v in model.weights}
    return [np.float64(the_only(named, end)) for end in ends]


def sample(model, inputs, **kwargs):
    """Outputs of one training call, as float32."""
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        function = tf.function(lambda x: model(x, training=True), **kwargs)
        return np.float32(tf.cast(function(inputs), tf.float32))


def samples(model, inputs, steps):
    """Outputs of a training call at each of many steps, as float64."""
    optimizer = keras.optimizers.SGD()
    inputs = tf.constant(inputs)
    function = tf.function(lambda: model(inputs, training=True))
    found = []
    with sos.SparsityUpdater(model, optimizer) as updater:
        for _ in range(steps):
            found.append(function().numpy())
            optimizer.iterations.assign_add(1)
            updater.step()
    return np.float64(found)


def distinct(rows):
    return len(np.unique(rows, axis=0))


def assert_moments(found, mean, variance, bias=0.0):
    """Compares samples [n, ...] with exact means and variances.

    The bounds are those of n independent normal numbers.
    """
    n = len(found)
    error = np.abs(found.mean(0) - mean)
    assert (error < 5.5 * np.sqrt(variance / n) + bias).all()
    ratio = found.var(0) / variance
    assert np.abs(ratio - 1).max() < 6.5 * np.sqrt(2 / n)


# Equal tokens.


@pytest.mark.parametrize("make", COMPOSITES)
def test_composite_of_equal_tokens_draws_noise_for_each(make):
    model = sparsify(plain_model(make))
    for path in weights(model):
        make_noisy(model, path)
    if make is embedding:
        # The sum with the noise of the positions would hide equal rows.
        the_only(weights(model), "position_embedding/embeddings").state[
            "log_sigma2"
        ].assign(np.full((TOKENS, WIDTH), SILENT))
    x = equal_tokens(make, 3)
    outputs, after = samples(model, x, 2)
    plain = np.float64(plain_model(make)(x))
    if make is embedding:
        outputs, after, plain = outputs - plain, after - plain, plain - plain
    assert np.ptp(plain.reshape(-1, WIDTH), axis=0).max() < 1e-3
    assert distinct(np.round(outputs.reshape(-1, WIDTH), 2)) == 3 * TOKENS
    assert np.abs(after - outputs).min() > 0


def replicas(model, strategy, inputs):
    """Outputs of a training call on each of two replicas."""
    optimizer = keras.optimizers.SGD()
    with strategy.scope():
        optimizer.build(model.trainable_variables)

    @tf.function
    def run(x):
        return strategy.run(lambda x: model(x, training=True), args=(x,))

    with sos.SparsityUpdater(model, optimizer):
        outputs = run(tf.constant(inputs))
    return [np.array(x) for x in strategy.experimental_local_results(outputs)]


@pytest.mark.parametrize(
    "make",
    [mha, *(pytest.param(c, marks=pytest.mark.slow) for c in COMPOSITES[1:])],
)
def test_composite_of_equal_tokens_on_replicas_draws_noise_for_each(make):
    strategy = techniques.two_replicas()
    with strategy.scope():
        model = sparsify(plain_model(make))
        for path in weights(model):
            if "position" not in path:
                make_noisy(model, path)
    x = equal_tokens(make, 1)
    outputs = replicas(model, strategy, x)
    assert len(outputs) == 2
    outputs = np.concatenate(outputs)
    if make is embedding:
        outputs = outputs - np.float32(plain_model(make)(x))
    rows = np.round(outputs.reshape(-1, WIDTH), 2)
    assert distinct(rows) == 2 * TOKENS


# Closed forms.


def attention_moments(model, value_variance, output_variance):
    """Mean, variance and covariance between tokens of an attention's outputs.

    Queries and keys are equal, so that all positions have one weight: the
    values' mean of T independent ones, m + e / T with e ~ N(0, T x^2 sigma^2).
    """
    x = np.float64(equal_tokens(mha, 1)[0, 0])
    kernel, bias, projection, last = values(
        model, "value/kernel", "value/bias", "output/kernel", "output/bias"
    )
    mean = np.einsum("d,dhv->hv", x, kernel) + bias
    variance = np.einsum("d,dhv->hv", x**2, value_variance) / TOKENS
    outputs = np.einsum("hv,hvd->d", mean, projection) + last
    shared = np.einsum("hv,hvd->d", variance, projection**2)
    own = np.einsum("hv,hvd->d", mean**2 + variance, output_variance)
    return outputs, shared + own, shared


@pytest.mark.parametrize(
    "dtype, loaded, jit_compile",
    [
        pytest.param("float32", True, False, id="loaded"),
        pytest.param(
            "mixed_bfloat16",
            False,
            False,
            id="bfloat16",
            marks=pytest.mark.slow,
        ),
        pytest.param("mixed_float16", False, False, id="float16"),
        pytest.param("float32", True, True, id="jit", marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", True, True, id="jit bfloat16"),
        pytest.param(
            "mixed_float16",
            True,
            True,
            id="jit float16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_attention_has_the_moments_of_the_theory(
    dtype, loaded, jit_compile, tmp_path
):
    plain = plain_model(mha, dtype)
    model = sparsify(plain)
    variances = make_noisy(model, "value/kernel", "output/kernel")
    if loaded:
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    batch = 4_000
    outputs = sample(model, equal_tokens(mha, batch), jit_compile=jit_compile)
    mean, variance, covariance = attention_moments(plain, *variances)
    # Of kernels in bfloat16, which have 8 bits.
    bias = 0.0 if dtype == "float32" else 0.03
    for token in (0, TOKENS - 1):
        assert_moments(np.float64(outputs[:, token]), mean, variance, bias)
    first, last = np.float64(outputs[:, 0]), np.float64(outputs[:, -1])
    found = ((first - first.mean(0)) * (last - last.mean(0))).mean(0)
    # Var of a product of two correlated normal numbers.
    error = np.sqrt((variance**2 + covariance**2) / batch)
    assert (np.abs(found - covariance) < 5.5 * error).all()


def test_attention_over_many_steps_has_the_moments_of_the_theory():
    plain = plain_model(mha)
    model = sparsify(plain)
    variances = make_noisy(model, "value/kernel", "output/kernel")
    outputs = samples(model, equal_tokens(mha, 1), 500)[:, 0, 0]
    mean, variance, _ = attention_moments(plain, *variances)
    assert_moments(outputs, mean, variance)
    # One step knows nothing of the next.
    noise = (outputs - mean) / np.sqrt(variance)
    lagged = (noise[1:] * noise[:-1]).mean(0)
    assert np.abs(lagged).max() < 5.5 / np.sqrt(len(noise))


def slope_squares(model, x, end):
    """Outputs of a plain model, and squared derivatives by one weight."""
    variable = the_only({v.path: v for v in model.trainable_variables}, end)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x)[0]
    slopes = tape.jacobian(outputs, variable.value, experimental_use_pfor=False)
    return np.float64(outputs), np.float64(slopes) ** 2


@pytest.mark.parametrize(
    "make", [encoder, pytest.param(decoder, marks=pytest.mark.slow)]
)
def test_block_has_the_moments_of_the_theory(make):
    """The last kernel is added to the residual stream, linear to the end."""
    plain = plain_model(make)
    model = sparsify(plain)
    end = "feedforward_output_dense/kernel"
    (variance,) = make_noisy(model, end)
    mean, squares = slope_squares(plain, equal_tokens(make, 1), end)
    outputs = np.float64(sample(model, equal_tokens(make, 4_000)))
    expected = np.einsum("tdij,ij->td", squares, variance)
    assert_moments(outputs, mean, expected)
    noise = (outputs - mean) / np.sqrt(expected)
    correlation = np.einsum("ntd,nsd->ts", noise, noise) / noise[:, 0].size
    # Tokens of their own noise: nothing beside the diagonal.
    beside = correlation - np.diag(np.diag(correlation))
    assert np.abs(beside).max() < 6 / np.sqrt(noise[:, 0].size)


def test_decoder_averages_the_noise_of_the_tokens_before():
    """A causal mean of t + 1 equal values has 1 / (t + 1) of the variance."""
    plain = plain_model(decoder)
    for end in ("output_dense/kernel", "output_dense/bias"):
        variable = the_only({v.path: v for v in plain.weights}, end)
        variable.assign(np.zeros(variable.shape))
    model = sparsify(plain)
    end = "self_attention/value/kernel"
    (variance,) = make_noisy(model, end)
    x = equal_tokens(decoder, 1)
    outputs = np.float64(sample(model, equal_tokens(decoder, 4_000)))
    gamma, beta, projection = values(
        plain,
        "self_attention_layer_norm/gamma",
        "self_attention_layer_norm/beta",
        "self_attention/attention_output/kernel",
    )
    token = np.float64(x[0, 0])
    normed = gamma * (token - token.mean()) / np.sqrt(token.var() + 1e-5)
    normed += beta
    of_values = np.einsum("d,dhv->hv", normed**2, variance)
    of_one = np.einsum("hv,hvd->d", of_values, projection**2)
    expected = of_one / np.arange(1, TOKENS + 1)[:, None]
    assert_moments(outputs, np.float64(plain(x)[0]), expected)


def test_token_and_position_embedding_has_the_moments_of_the_theory():
    plain = plain_model(embedding)
    model = sparsify(plain)
    (tokens,) = make_noisy(model, "token_embedding/embeddings")
    ids = np.tile([[3, 1, 3, 3, 0, 2, 4, 1, 3, 3]], (4_000, 1))
    outputs = np.float64(sample(model, ids.astype("int32")))
    mean = np.float64(plain(ids[:1])[0])
    assert_moments(outputs, mean, tokens[ids[0]])
    # Places 0 and 2 hold the same row.
    noise = (outputs - mean) / np.sqrt(tokens[ids[0]])
    assert np.abs((noise[:, 0] * noise[:, 2]).mean(0)).max() < 0.1


def test_positions_read_directly_are_sampled_as_a_weight():
    """All sequences of a step share them, and steps have the right moments."""
    plain = plain_model(embedding)
    model = sparsify(plain)
    (variance,) = make_noisy(model, "position_embedding/embeddings")
    ids = equal_tokens(embedding, 2)
    found = samples(model, ids, 700)
    # But for the deviation of 1e-4 that epsilon leaves to the tokens.
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=2e-3)
    assert_moments(found[:, 0], np.float64(plain(ids)[0]), variance)


# Evaluation and multiply-adds.


@pytest.mark.parametrize("make", COMPOSITES)
def test_composite_evaluates_as_its_plain_one_with_zeros(make):
    plain = plain_model(make)
    model = sparsify(plain)
    x = equal_tokens(make, 2)
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-6, atol=1e-6)
    named = {v.path.partition("/")[2]: v for v in plain.weights}
    assert weights(model)
    for path, weight in weights(model).items():
        theta = weight.variable.numpy()
        removed = np.random.default_rng(0).random(theta.shape) < 0.5
        weight.state["log_sigma2"].assign(np.where(removed, 9.0, SILENT))
        variable = the_only(named, path.rpartition("composite/")[2])
        variable.assign(np.where(removed, 0.0, theta))
    np.testing.assert_array_equal(model(x), plain(x))


def test_multiply_adds_are_counted_inside_of_composites():
    model = sparsify(plain_model(encoder))
    rows = sos.sparsity_report(model).rows
    counted = {row["weight"]: row for row in rows if row["technique"]}
    assert len(counted) == 6
    for name, row in counted.items():
        assert row["multiply_adds"] == TOKENS * row["size"], name


@pytest.mark.parametrize(
    "cls",
    [keras.layers.ReversibleEmbedding, keras_hub.layers.ReversibleEmbedding],
)
def test_tied_table_counts_its_product_and_not_its_look_up(cls):
    layer = cls(50, WIDTH)
    tokens = keras.Input((6,), dtype="int32")
    model = keras.Model(tokens, layer(layer(tokens), reverse=True))
    (row,) = sos.sparsity_report(sparsify(model)).rows
    assert row["multiply_adds"] == 6 * 50 * WIDTH
    looked_up = keras.Model(tokens, cls(50, WIDTH)(tokens))
    (row,) = sos.sparsity_report(sparsify(looked_up)).rows
    assert row["multiply_adds"] == 0
