import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import sos
from tests.support import techniques


def sparse_dense(units=6, inputs=8, seed=0):
    """A dense layer with zeros in about half of its weights."""
    layer = keras.layers.Dense(units)
    layer.build((None, inputs))
    kernel = techniques.normal(inputs, units, seed=seed)
    layer.kernel.assign(kernel * (techniques.normal(inputs, units, seed=9) > 0))
    return layer


def test_zeros_stay_zero_in_training_without_an_updater():
    layer = sparse_dense(inputs=6, units=2)
    before = layer.kernel.numpy()
    zeros = before == 0
    assert 0 < zeros.sum() < zeros.size
    wrapper = sos.FixedMask(layer)
    model = keras.Sequential([keras.Input((6,)), wrapper])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(*techniques.batch(32), epochs=3, verbose=0)
    after = layer.kernel.numpy()
    assert (after[zeros] == 0).all()
    assert (after[~zeros] != before[~zeros]).all()
    np.testing.assert_array_equal(techniques.state(wrapper, "mask"), ~zeros)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.901, 1.0])
def test_random_mask_is_exact(sparsity):
    wrapper = sos.FixedMask(keras.layers.Dense(11), sparsity=sparsity)
    wrapper.build((None, 13))
    mask = techniques.state(wrapper, "mask").numpy()
    assert mask.dtype == np.uint8
    assert mask.sum() == round(143 * (1 - sparsity))
    assert wrapper.target_sparsity() == sparsity
    outputs = wrapper(tf.eye(13), training=True)
    expected = wrapper.layer.kernel.numpy() * mask
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


def random_mask(seed, name="dense"):
    layer = keras.layers.Dense(10, name=name)
    wrapper = sos.FixedMask(layer, sparsity=0.7, seed=seed)
    wrapper.build((None, 20))
    return techniques.state(wrapper, "mask").numpy()


def test_random_masks_are_uniform_and_depend_on_seed_and_weight():
    runs = 200
    count = sum(random_mask(seed).astype(int) for seed in range(runs))
    variance = runs * 0.3 * 0.7 * 200 / 199
    statistic = ((count - runs * 0.3) ** 2 / variance).sum()
    assert 1e-3 < scipy.stats.chi2.sf(statistic, 199) < 1 - 1e-3
    np.testing.assert_array_equal(random_mask(3), random_mask(3))
    assert (random_mask(3, "a") != random_mask(3, "b")).any()


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 90, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="Received: sparsity="):
        sos.FixedMask(keras.layers.Dense(2), sparsity=sparsity)


def built():
    wrapper = sos.FixedMask(keras.layers.LSTM(2))
    wrapper.build((None, 4, 3))
    return wrapper


def test_set_masks_sets_them_in_order():
    wrapper = built()
    masks = [
        (techniques.normal(*w.variable.shape, seed=i) > 0)
        for i, w in enumerate(wrapper.sparse_weights)
    ]
    wrapper.set_masks(masks)
    for weight, mask in zip(wrapper.sparse_weights, masks, strict=True):
        np.testing.assert_array_equal(weight.state["mask"], mask)
        effective = wrapper.evaluation_weights()[weight]
        np.testing.assert_array_equal(effective, weight.value * mask)


WRONG = {
    "count": (lambda good: good[:1], "has 2 masked weights. Received: 1"),
    "shape": (
        lambda good: [good[0], good[1].T],
        r"Received: an array of shape",
    ),
    "value": (lambda good: [good[0], good[1] * 0.5], "zeros and ones"),
    "nan": (lambda good: [good[0], good[1] * np.nan], "zeros and ones"),
    "negative": (lambda good: [good[0], -good[1]], "zeros and ones"),
}


@pytest.mark.parametrize("case", WRONG)
def test_set_masks_refuses_wrong_masks_and_changes_none(case):
    wrapper = built()
    good = [np.zeros((3, 8)), np.ones((2, 8))]
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        wrapper.set_masks(change(good))
    for weight in wrapper.sparse_weights:
        assert weight.state["mask"].numpy().all()


def test_sparsify_takes_the_zeros_of_the_model():
    layer = sparse_dense()
    model = keras.Sequential([keras.Input((8,)), layer])
    sparse = sos.sparsify(model, sos.FixedMask)
    (wrapper,) = sparse.layers
    mask = techniques.state(wrapper, "mask").numpy()
    np.testing.assert_array_equal(mask, layer.kernel.numpy() != 0)
