import threading

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import sos
from sos import noise
from tests.support import techniques

NOISY = ["L0Regularization", "VariationalDropout"]


def key(seed=0, name="a", step=0):
    return noise.key(tf.constant(seed), name, tf.constant(step)).numpy()


def test_keys_differ_by_seed_name_and_step_and_repeat():
    keys = {
        tuple(key(seed, name, step))
        for seed in (-1, 0, 1, 2**31 - 1)
        for name in ("", "a", "b")
        for step in range(50)
    }
    assert len(keys) == 4 * 3 * 50
    np.testing.assert_array_equal(key(3, "b", 7), key(3, "b", 7))


@pytest.mark.oldest
def test_text_id_is_the_same_in_every_process():
    # Unlike `hash`: the number is BLAKE2s's for the empty text.
    assert noise.text_id("") == 1188227382
    assert noise.text_id("kernel") != noise.text_id("kernel ")
    assert 0 <= min(noise.text_id(str(i)) for i in range(999))


def test_uniform_and_normal_have_their_distributions():
    u = noise.uniform([200_000], key()).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    # An odd size, as normal numbers are drawn in pairs.
    z = noise.normal(tf.constant([3, 66_667]), key()).numpy()
    assert z.shape == (3, 66_667)
    assert z.dtype == np.float32
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(z) - np.eye(3)).max() < 6 / np.sqrt(66_667)
    # The two of a pair are dependent neither in sign nor in size.
    flat = z.ravel()[:200_000]
    for values in (flat, np.abs(flat)):
        halves = np.corrcoef(values[:100_000], values[100_000:])
        assert abs(halves[0, 1]) < 5 / np.sqrt(100_000)
    assert noise.normal(tf.constant([0, 4]), key()).shape == (0, 4)


@pytest.mark.oldest
@pytest.mark.parametrize("function", [noise.uniform, noise.normal])
def test_numbers_are_the_same_with_and_without_xla(function):
    compiled = tf.function(function, jit_compile=True)
    for seed in (-5, 0, 12):
        k = tf.constant(key(seed))
        np.testing.assert_allclose(
            function([1001], k), compiled([1001], k), rtol=1e-5, atol=1e-6
        )


def test_streams_of_neighbouring_keys_are_independent():
    streams = [
        noise.normal([20_000], key(seed, name, step)).numpy()
        for seed, name, step in (
            (0, "a", 0),
            (1, "a", 0),
            (0, "b", 0),
            (0, "a", 1),
            (1, "a", 1),
        )
    ]
    correlation = np.corrcoef(streams) - np.eye(5)
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_noise_scopes_nest_and_close():
    assert noise.current_noise_scope() == ""
    with sos.noise_scope("a"):
        first = noise.current_noise_scope()
        with sos.noise_scope("b"):
            nested = noise.current_noise_scope()
        assert noise.current_noise_scope() == first
    with pytest.raises(KeyError), sos.noise_scope("c"):
        raise KeyError
    assert noise.current_noise_scope() == ""
    with sos.noise_scope("b"):
        assert len({"", first, nested, noise.current_noise_scope()}) == 4


def test_noise_scope_belongs_to_one_thread():
    seen = []
    with sos.noise_scope("here"):
        thread = threading.Thread(
            target=lambda: seen.append(noise.current_noise_scope())
        )
        thread.start()
        thread.join()
    assert seen == [""]


def two_layers(name, seed=0):
    """Two wrappers alike but for the paths of their weights."""
    layers = []
    for path in ("x", "y"):
        layer = techniques.wrap(
            name,
            keras.layers.Dense(
                40, use_bias=False, name=path, kernel_initializer="ones"
            ),
            seed=seed,
        )
        layer.build((None, 40))
        for variable in layer.sparse_weights[0].state.values():
            variable.assign(tf.zeros_like(variable))
        layers.append(layer)
    return layers


def outputs(layer, step):
    techniques.bind(layer, step)
    return np.ravel(layer(tf.eye(40), training=True))


@pytest.mark.parametrize("name", NOISY)
def test_layers_draw_by_seed_weight_and_step(name):
    streams = []
    for seed in (0, 1):
        for layer in two_layers(name, seed):
            for step in (0, 1):
                streams.append(outputs(layer, step))
    # L0 shows its gates on the ones of the kernel, variational dropout its
    # noise around them; all elements have equal moments.
    correlation = np.corrcoef(streams) - np.eye(8)
    assert np.abs(correlation).max() < 5.5 / 40
    again = outputs(two_layers(name)[0], 0)
    np.testing.assert_array_equal(again, streams[0])


@pytest.mark.parametrize("name", NOISY)
def test_replicas_draw_for_themselves(name):
    strategy = techniques.two_replicas()
    with strategy.scope():
        layer, _ = two_layers(name)
        optimizer = keras.optimizers.SGD()
        optimizer.build(layer.trainable_variables)
    layer.step_counter.bind(optimizer)

    @tf.function
    def call():
        return strategy.run(lambda: layer(tf.eye(40), training=True))

    first, second = [
        np.ravel(v) for v in strategy.experimental_local_results(call())
    ]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 40
    repeated = strategy.experimental_local_results(call())
    np.testing.assert_array_equal(np.ravel(repeated[1]), second)


@pytest.mark.parametrize("name", NOISY)
def test_noise_scope_separates_the_uses_of_an_embedding(name):
    layer = techniques.wrap(name, keras.layers.Embedding(50, 20))
    layer.build((None,))
    techniques.bind(layer)
    for variable in layer.sparse_weights[0].state.values():
        variable.assign(tf.zeros_like(variable))
    layer.layer.embeddings.assign(tf.ones((50, 20)))
    ids = np.arange(50)
    unlabelled = np.ravel(layer(ids, training=True))
    np.testing.assert_array_equal(
        unlabelled, np.ravel(layer(ids, training=True))
    )
    with sos.noise_scope("decoder"):
        labelled = np.ravel(layer(ids, training=True))
    assert abs(np.corrcoef(unlabelled, labelled)[0, 1]) < 5 / np.sqrt(1000)
