import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.wrappers.masked import update_masks
from tests.support import techniques


def wrap(layer, shape, sparsity=0.5):
    wrapper = sos.MagnitudePruning(layer, schedule=techniques.SCHEDULE)
    wrapper.build(shape)
    if sparsity:
        update_masks({wrapper: sparsity})
    return wrapper


LAYERS = {
    "dense": lambda: (keras.layers.Dense(3), (4,)),
    "conv": lambda: (keras.layers.Conv2D(4, 3, groups=2), (5, 5, 2)),
    "transpose": lambda: (keras.layers.Conv1DTranspose(2, 3), (4, 2)),
    "embedding": lambda: (keras.layers.Embedding(7, 3), (6,)),
    "lstm": lambda: (keras.layers.LSTM(3), (4, 2)),
    "separable": lambda: (keras.layers.SeparableConv2D(3, 2), (4, 4, 2)),
    "bidirectional": lambda: (
        keras.layers.Bidirectional(keras.layers.GRU(2)),
        (4, 2),
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_the_plain_layer_with_the_largest_weights(name, training):
    layer, shape = LAYERS[name]()
    wrapper = wrap(layer, (None, *shape), 0.4)
    techniques.bind(wrapper)
    x = techniques.normal(2, *shape)
    if name == "embedding":
        x = np.arange(6)[None]
    found = wrapper(x, training=training).numpy()
    for weight in wrapper.sparse_weights:
        raw = weight.value.numpy()
        kept = np.zeros(raw.size, bool)
        order = np.argsort(-np.abs(raw).ravel(), kind="stable")
        kept[order[: round(raw.size * 0.6)]] = True
        weight.variable.assign(raw * kept.reshape(raw.shape))
    np.testing.assert_allclose(found, layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.905, 0.99, 1.0])
def test_exactly_k_weights_are_kept(sparsity):
    wrapper = wrap(keras.layers.Dense(11), (None, 13), None)
    ties = np.ones((13, 11))
    ties[0, 0] = 0.5
    wrapper.layer.kernel.assign(ties)
    update_masks({wrapper: sparsity})
    mask = techniques.state(wrapper, "mask").numpy()
    assert mask.dtype == np.uint8
    assert mask.sum() == round(143 * (1 - sparsity))


def test_masked_weights_get_exactly_zero_gradient_and_others_the_plain_one():
    layer = keras.layers.Dense(5, activation="tanh")
    wrapper = wrap(layer, (None, 6))
    techniques.bind(wrapper)
    x, upstream = techniques.normal(7, 6), techniques.normal(7, 5, seed=1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(wrapper(x, training=True) * upstream)
    found = tape.gradient(loss, layer.kernel.value).numpy()
    mask = techniques.state(wrapper, "mask").numpy()
    layer.kernel.assign(layer.kernel * mask)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(techniques.call_plain(layer, x) * upstream)
    plain = tape.gradient(loss, layer.kernel.value).numpy()
    assert (found[mask == 0] == 0).all()
    assert (plain[mask == 0] != 0).all()
    np.testing.assert_allclose(found, plain * mask, rtol=1e-5, atol=1e-6)


def test_raw_weights_are_ranked_and_pruned_ones_come_back():
    layer = keras.layers.Dense(4, use_bias=False)
    wrapper = wrap(layer, (None, 1), None)
    layer.kernel.assign([[0.1, -4.0, 3.0, 0.2]])
    update_masks({wrapper: 0.5})
    assert techniques.state(wrapper, "mask").numpy().tolist() == [[0, 1, 1, 0]]
    # The raw weight is left alone, and its rank counts.
    np.testing.assert_allclose(layer.kernel, [[0.1, -4.0, 3.0, 0.2]])
    layer.kernel.assign([[-3.5, -4.0, 3.0, 0.2]])
    update_masks({wrapper: 0.5})
    assert techniques.state(wrapper, "mask").numpy().tolist() == [[1, 1, 0, 0]]
    outputs = wrapper(np.ones((1, 1), np.float32))
    np.testing.assert_allclose(outputs, [[-3.5, -4.0, 0, 0]])


def test_pruned_weights_keep_their_value_and_feel_decay_and_momentum():
    regularizer = keras.regularizers.L2(0.1)
    layer = keras.layers.Dense(
        4, use_bias=False, kernel_regularizer=regularizer
    )
    wrapper = wrap(layer, (None, 3))
    techniques.bind(wrapper)
    raw = layer.kernel.numpy()
    mask = techniques.state(wrapper, "mask").numpy()
    with tf.GradientTape() as tape:
        wrapper(techniques.normal(2, 3), training=True)
        (decay,) = wrapper.losses
    expected = 0.1 * (raw.astype(np.float64) ** 2).sum()
    assert float(decay) == pytest.approx(expected, rel=1e-6)
    gradient = tape.gradient(decay, layer.kernel.value)
    np.testing.assert_allclose(gradient, 0.2 * raw, rtol=1e-6)
    assert (raw[mask == 0] != 0).all()


def test_tensors_are_ranked_each_for_itself():
    large = keras.layers.Dense(4)
    small = keras.layers.Dense(4)
    wrappers = [
        sos.MagnitudePruning(layer, schedule=techniques.SCHEDULE)
        for layer in (large, small)
    ]
    for wrapper in wrappers:
        wrapper.build((None, 4))
    small.kernel.assign(1e-3 * large.kernel)
    update_masks({wrapper: 0.75 for wrapper in wrappers})
    assert [techniques.state(w, "mask").numpy().sum() for w in wrappers] == [
        4,
        4,
    ]


def test_nan_weights_are_refused_by_name_and_no_mask_changes():
    good = wrap(keras.layers.Dense(4, name="good"), (None, 3), None)
    bad = wrap(keras.layers.Dense(4, name="bad"), (None, 3), None)
    bad.layer.kernel.assign(tf.fill((3, 4), np.nan))
    with pytest.raises(ValueError, match="bad/kernel.*NaN"):
        update_masks({good: 0.5, bad: 0.5})
    assert techniques.state(good, "mask").numpy().all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_ranks_the_stored_float32(policy):
    layer = keras.layers.Dense(4, use_bias=False, dtype=policy)
    wrapper = wrap(layer, (None, 1), None)
    # Equal in 16 bits, where the first would win the tie.
    layer.kernel.assign([[1.0, 1.0 + 2**-20, 1.0 + 2**-19, 0.5]])
    update_masks({wrapper: 0.5})
    assert techniques.state(wrapper, "mask").numpy().tolist() == [[0, 1, 1, 0]]
    assert wrapper(np.ones((1, 1), np.float32)).dtype == policy[6:]


def test_wrong_arguments_raise():
    dense = keras.layers.Dense(2)
    with pytest.raises(TypeError, match="Received: schedule=0.9"):
        sos.MagnitudePruning(dense, schedule=0.9)
    with pytest.raises(TypeError, match="Received: ranking='global'"):
        sos.MagnitudePruning(
            dense, schedule=techniques.SCHEDULE, ranking="global"
        )
    with pytest.raises(TypeError, match="no argument 'sparsty'.*'sparsity'"):
        sos.MagnitudePruning(dense, sparsty=0.5, sparsity=0.5)


def test_schedule_can_be_replaced_and_names_the_target():
    wrapper = wrap(keras.layers.Dense(2), (None, 2), None)
    assert wrapper.target_sparsity() == 0.5
    wrapper.schedule = sos.schedules.PolynomialDecay(0.0, 0.9, 0, 10)
    assert wrapper.target_sparsity() == 0.9
    with pytest.raises(TypeError, match="Received: schedule=3"):
        wrapper.schedule = 3
