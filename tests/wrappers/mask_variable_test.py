"""What a mask takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import UsageError
from sos.wrappers.mask_variable import MaskVariable
from tests.support import techniques

ONES = np.ones((3, 2))
HALF = np.array([[1, 0], [0, 1], [1, 0]])


@pytest.fixture
def mask():
    layer = sos.FixedMask(keras.layers.Dense(2, name="a"))
    keras.Sequential([keras.Input((3,)), layer])
    return techniques.state(layer, "mask")


@pytest.mark.parametrize("name", techniques.NAMES)
def test_masks_of_all_techniques_are_checked(name):
    model = techniques.mlp(name)
    if issubclass(sos.extend.techniques()[name], sos.extend.MaskedWrapper):
        for wrapper in model.layers:
            variable = techniques.state(wrapper, "mask")
            assert isinstance(variable, MaskVariable)
            assert variable.dtype == "uint8"


@pytest.mark.parametrize(
    "make",
    [
        lambda: HALF,
        lambda: HALF.tolist(),
        lambda: HALF.astype(bool),
        lambda: HALF.astype("float32"),
        lambda: tf.constant(HALF, "uint8"),
        lambda: tf.constant(HALF, "float16"),
        lambda: tf.constant(HALF, "bfloat16"),
        lambda: tf.constant(HALF, "bool"),
        lambda: tf.Variable(HALF),
        lambda: keras.Variable(HALF, dtype="uint8"),
        # Sums of weights that are 1 but for their rounding.
        lambda: sum(0.1 * HALF for _ in range(10)),
    ],
)
def test_zeros_and_ones_of_any_kind_are_assigned(mask, make):
    mask.assign(make())
    np.testing.assert_array_equal(mask, HALF)
    mask.assign(tf.function(lambda: tf.constant(HALF, "uint8"))())
    np.testing.assert_array_equal(mask, HALF)


@pytest.mark.parametrize(
    "value", [0.99, 0.01, -1, 2, 255, 0.9999, np.nan, np.inf, 256]
)
@pytest.mark.parametrize("tensor", [False, True])
def test_other_values_raise_and_change_nothing(mask, value, tensor):
    wrong = HALF.astype("float64")
    wrong[0, 0] = value
    if tensor:
        wrong = tf.constant(wrong)
    mask.assign(HALF)
    with pytest.raises(
        UsageError, match=f"kernel_mask.*1 other values of 6, such as {value}"
    ):
        mask.assign(wrong)
    np.testing.assert_array_equal(mask, HALF)


def test_integers_other_than_0_and_1_raise(mask):
    for dtype in ("uint8", "int32"):
        with pytest.raises(UsageError, match="must hold zeros and ones"):
            mask.assign(2 * HALF.astype(dtype))
        with pytest.raises(UsageError, match="must hold zeros and ones"):
            mask.assign(tf.constant(2 * HALF, dtype))


def test_sums_are_checked(mask):
    mask.assign(ONES)
    with pytest.raises(UsageError, match="such as 2"):
        mask.assign_add(tf.ones((3, 2), "uint8"))
    mask.assign_sub(tf.ones((3, 2), "uint8"))
    assert not mask.numpy().any()


def test_floats_in_a_traced_function_raise(mask):
    @tf.function
    def soft_update(value):
        mask.assign(0.01 * value + 0.99 * mask)

    with pytest.raises(UsageError, match="float32 values in a traced"):
        soft_update(tf.ones((3, 2)))

    @tf.function
    def assign(value):
        mask.assign(tf.cast(value, tf.uint8))

    assign(tf.constant(HALF))
    np.testing.assert_array_equal(mask, HALF)


def test_replicas_are_checked():
    strategy = techniques.two_replicas()
    with strategy.scope():
        layer = sos.FixedMask(keras.layers.Dense(2, name="a"))
        model = keras.Sequential([keras.Input((3,)), layer])
    mask = techniques.state(layer, "mask")
    weights = model.get_weights()
    model.set_weights(weights)
    mask.assign(HALF)
    for value in mask.value.values:
        np.testing.assert_array_equal(value, HALF)
    with pytest.raises(UsageError, match="zeros and ones"):
        model.set_weights([0.5 * weight for weight in weights])

    @tf.function
    def step():
        strategy.run(lambda: mask.assign(0.5 * tf.ones((3, 2))))

    with pytest.raises(UsageError, match="traced"):
        step()


# Averages of models.


def trained(seed):
    model = techniques.mlp("MagnitudePruning", seed=seed)
    model.compile("adam", "mse")
    x, y = techniques.batch(16)
    model.fit(x, y, verbose=0, callbacks=[sos.SparsityCallback()])
    return model


def test_mask_updated_by_fractions_raises():
    online, target = trained(0), trained(1)
    pairs = zip(online.get_weights(), target.get_weights(), strict=True)
    with pytest.raises(UsageError, match="average their `trainable_variables`"):
        target.set_weights([0.01 * a + 0.99 * b for a, b in pairs])
    assert sos.sparsity_report(target).sparsity == 0.5
    for a, b in zip(online.weights, target.weights, strict=True):
        if isinstance(b, MaskVariable):
            with pytest.raises(UsageError, match="zeros and ones"):
                b.assign(a * 0.01 + b * 0.99)
    # As the message says.
    for a, b in zip(
        online.trainable_variables, target.trainable_variables, strict=True
    ):
        b.assign(a * 0.01 + b * 0.99)
    assert sos.sparsity_report(target).sparsity == 0.5


def test_models_with_equal_masks_are_averaged():
    model = trained(0)
    weights = [model.get_weights() for _ in range(10)]
    means = [
        sum(0.1 * value for value in values)
        for values in zip(*weights, strict=True)
    ]
    masks = [
        mean
        for mean, variable in zip(means, model.weights, strict=True)
        if isinstance(variable, MaskVariable)
    ]
    # Truncated, they would be zeros.
    assert [mask.max() for mask in masks] == [sum([0.1] * 10)] * 2
    model.set_weights(means)
    assert sos.sparsity_report(model).sparsity == 0.5


def test_masks_are_saved_and_loaded(tmp_path):
    model, other = trained(0), trained(1)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a, b)
        assert type(a) is type(b)
