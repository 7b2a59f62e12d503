"""Every technique around every kind of layer.

Each case is a small functional model around one layer; the same model around
the layer without a wrapper is the oracle.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.wrappers.base import find_wrappers
from tests.support import techniques

# All run in the slow tests. The fast ones leave out what runs the same code:
# pruning is a mask, and L0 differs from it for embeddings alone.
FAST = {
    sos.RandomPruning: ("Dense",),
    sos.FixedMask: ("Dense",),
    sos.L0Regularization: ("Dense", "Embedding", "LSTM masked", "own layer"),
}


@keras.saving.register_keras_serializable(package="layers_test")
class MaskReader(layers.Layer):
    """Makes the mask that arrives visible: ones where there is none."""

    supports_masking = True

    def call(self, inputs, mask=None):
        shape = tf.shape(inputs)[:2]
        return tf.fill(shape, 2.0) if mask is None else tf.cast(mask, "float32")

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[:2])


@keras.saving.register_keras_serializable(package="layers_test")
class OwnLayer(layers.Layer):
    """Unnamed weights, sublayers in a list with names made by Keras."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.branches = [layers.Dense(units), layers.Dense(units)]
        self.dropout = layers.Dropout(0.5)

    def build(self, input_shape):
        shape = (input_shape[-1], self.units)
        self.a = self.add_weight(shape=shape)
        self.b = self.add_weight(shape=shape)
        self.twice = [self.add_weight(shape=shape, name="w") for _ in "ab"]
        for branch in self.branches:
            branch.build(input_shape)

    def call(self, inputs, training=False):
        outputs = inputs @ self.a + tf.tanh(inputs @ self.b)
        outputs += inputs @ self.twice[0] + tf.sigmoid(inputs @ self.twice[1])
        for branch in self.branches:
            outputs += branch(inputs)
        return self.dropout(outputs, training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="layers_test")
class DefaultBuild(layers.Layer):
    """No `build`: Keras builds the sublayer by calling this one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


@keras.saving.register_keras_serializable(package="layers_test")
class Block(keras.Model):
    """A subclassed model with state that training updates."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(
            4, activation="relu", activity_regularizer="l2"
        )
        self.norm = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.5)
        self.out = layers.Dense(2)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build((None, 4))
        self.out.build((None, 4))

    def call(self, inputs, training=False):
        x = self.norm(self.dense(inputs), training=training)
        return self.out(self.dropout(x, training=training))


def attend(layer, query, value):
    return layer(query, value)


def attend_by_name(layer, query, value, key):
    return layer(query, value=value, key=key)


def attend_with_mask(layer, query, mask):
    return layer(query, query, attention_mask=mask > 0, use_causal_mask=True)


def with_state(layer, x, h, c):
    return layer(x, initial_state=[h, c])


def masked(layer, x):
    return layer(layers.Masking()(x))


def attention():
    return layers.MultiHeadAttention(2, 3)


VECTORS, STEPS, LINE = (4, 6), (4, 5, 3), (2, 8, 4)
IMAGE, VOLUME = (2, 6, 6, 4), (1, 4, 4, 4, 2)

# name: layer, shapes of its inputs (or an array), how it is called.
CASES = {
    "Dense": (lambda: layers.Dense(3, "relu"), [VECTORS]),
    "Dense rank 3": (lambda: layers.Dense(3), [STEPS]),
    "EinsumDense": (
        lambda: layers.EinsumDense(
            "abc,cde->abde", (None, 2, 3), bias_axes="e"
        ),
        [STEPS],
    ),
    "Conv1D": (lambda: layers.Conv1D(3, 3, padding="causal"), [LINE]),
    "Conv2D": (lambda: layers.Conv2D(4, 3, 2, groups=2), [IMAGE]),
    "Conv3D": (lambda: layers.Conv3D(2, 2), [VOLUME]),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 3, 2), [LINE]),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 3, 2), [IMAGE]),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(2, 2), [VOLUME]),
    "DepthwiseConv1D": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        [LINE],
    ),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3, 2, "same"), [IMAGE]),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(3, 3), [LINE]),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(3, 3), [IMAGE]),
    "Embedding": (lambda: layers.Embedding(7, 3), ["tokens"]),
    "Embedding mask_zero": (
        lambda: layers.Embedding(7, 3, mask_zero=True),
        ["tokens"],
    ),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), [STEPS]),
    "LSTM masked": (
        lambda: layers.LSTM(3, return_sequences=True),
        ["padded"],
        masked,
    ),
    "LSTM masked last": (lambda: layers.LSTM(3), ["padded"], masked),
    "LSTM initial_state": (
        lambda: layers.LSTM(3, return_state=True),
        [STEPS, (4, 3), (4, 3)],
        with_state,
    ),
    "GRU": (
        lambda: layers.GRU(3, return_sequences=True, dropout=0.3),
        [STEPS],
    ),
    "Bidirectional": (
        lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
        ["padded"],
        masked,
    ),
    "TimeDistributed Dense": (
        lambda: layers.TimeDistributed(layers.Dense(3, "relu")),
        ["padded"],
        masked,
    ),
    "TimeDistributed Conv2D": (
        lambda: layers.TimeDistributed(layers.Conv2D(3, 3)),
        [(2, 3, 6, 6, 2)],
    ),
    "MultiHeadAttention": (attention, [STEPS, (4, 7, 6)], attend),
    "MultiHeadAttention by name": (
        attention,
        [STEPS, (4, 7, 6), (4, 7, 2)],
        attend_by_name,
    ),
    "MultiHeadAttention masks": (
        attention,
        [STEPS, (4, 5, 5)],
        attend_with_mask,
    ),
    "own layer": (OwnLayer, [VECTORS]),
    "default build": (DefaultBuild, [VECTORS]),
    "subclassed model": (Block, [VECTORS]),
    "Sequential": (
        lambda: keras.Sequential([layers.Dense(3, "relu"), layers.Dense(2)]),
        [VECTORS],
    ),
}


def call_plainly(layer, *inputs):
    return layer(*inputs)


def arrays(name):
    generator = np.random.default_rng(0)
    result = []
    for spec in CASES[name][1]:
        if spec == "tokens":
            array = np.array([[1, 2, 0, 0], [3, 6, 6, 0]], "int32")
        else:
            array = generator.normal(size=STEPS if spec == "padded" else spec)
            array = array.astype("float32")
        if spec == "padded":
            array[0, 3:] = 0
        result.append(array)
    return result


def around(name, layer):
    """A functional model of the layer and of the mask that leaves it."""
    call = (*CASES[name], call_plainly)[2]
    inputs = [keras.Input(x.shape[1:], dtype=x.dtype) for x in arrays(name)]
    outputs = call(layer, *inputs)
    first = keras.tree.flatten(outputs)[0]
    return keras.Model(inputs, [outputs, MaskReader()(first)])


def predict(model, inputs):
    return keras.tree.map_structure(
        keras.ops.convert_to_numpy, model(inputs, training=False)
    )


def unbuilt(config):
    """A configuration without what only a built layer has."""
    if not isinstance(config, dict):
        return config
    return {k: unbuilt(v) for k, v in config.items() if k != "build_config"}


def each_case(*classes):
    return [
        pytest.param(
            technique,
            name,
            marks=[pytest.mark.slow] * (name not in FAST.get(technique, CASES)),
            id=f"{technique.__name__}-{name}",
        )
        for technique in classes or techniques.TECHNIQUES
        for name in CASES
    ]


def assert_same(a, b, exact=True):
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        if exact:
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("technique, name", each_case())
def test_trains_evaluates_and_is_saved(technique, name, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = arrays(name)
    layer = techniques.wrap(technique, CASES[name][0]())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = around(name, layer)
        before = [w.variable.numpy() for w in layer.sparse_weights]
        (loss,) = techniques.train(model, inputs)
    assert np.isfinite(loss)
    for weight, value in zip(layer.sparse_weights, before, strict=True):
        assert np.any(weight.variable.numpy() != value), weight.path

    techniques.make_zeros(model)
    plain_layer = CASES[name][0]()
    plain = around(name, plain_layer)
    techniques.assign_evaluation_weights(layer, plain_layer)
    outputs = predict(model, inputs)
    # The mask that leaves the layer is the last output.
    assert_same(outputs, predict(plain, inputs))

    again = technique.from_config(layer.get_config())
    assert unbuilt(again.get_config()) == unbuilt(layer.get_config())
    assert_same(
        keras.tree.map_structure(lambda x: x.shape, outputs),
        keras.tree.map_structure(
            lambda x: x.shape, predict(around(name, again), inputs)
        ),
    )

    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert_same(outputs, predict(loaded, inputs))
    assert len(loaded.variables) == len(model.variables)


def test_masks_of_padding_stay_out_of_the_loss():
    """A layer that supports masking but swallows the mask, as an LSTM does."""
    inputs = arrays("LSTM masked last")[0]
    models = []
    for wrap in (
        lambda layer: layer,
        lambda x: techniques.wrap(sos.FixedMask, x),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(inputs.shape[1:]),
                layers.Masking(),
                wrap(layers.LSTM(3)),
                layers.Dense(1),
            ]
        )
        model.compile(loss="mse")
        models.append(model)
    plain, sparse = models
    sparse.layers[1].set_masks(
        [np.ones(w.variable.shape) for w in sparse.layers[1].sparse_weights]
    )
    targets = np.ones((len(inputs), 1), "float32")
    assert sparse.evaluate(inputs, targets, verbose=0) == plain.evaluate(
        inputs, targets, verbose=0
    )


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_state_of_the_wrapped_layer_advances(technique):
    keras.utils.set_random_seed(0)
    (inputs,) = arrays("subclassed model")
    layer = techniques.wrap(technique, Block())
    layer(inputs)
    before = {v.path: v.numpy() for v in layer.layer.non_trainable_variables}
    techniques.train(layer, inputs)
    for variable in layer.layer.non_trainable_variables:
        assert np.any(variable.numpy() != before[variable.path]), variable.path


def test_state_advances_as_in_the_plain_layer():
    (inputs,) = arrays("subclassed model")
    plain = Block()
    plain(inputs)
    layer = techniques.wrap(sos.MagnitudePruning, Block())
    layer(inputs)
    for old, new in zip(plain.variables, layer.layer.variables, strict=True):
        new.assign(old)
    optimizer = keras.optimizers.SGD(0.01)
    with sos.Driver(layer, optimizer):
        for block in (plain, layer.layer):
            block.dropout.seed_generator.state.assign([0, 7])
        for weight in layer.sparse_weights:
            weight.state["mask"].assign(np.ones(weight.variable.shape))
        for _ in range(2):
            assert_same(
                layer(inputs, training=True), plain(inputs, training=True)
            )
            assert_same(layer.losses, plain.losses)
    assert_same(techniques.values(plain), techniques.values(layer.layer))


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_training_flag_reaches_dropout(technique):
    model = keras.Sequential(
        [keras.Input((4,)), techniques.wrap(technique, OwnLayer(64))]
    )
    inputs = np.ones((2, 4), "float32")
    assert np.all(model(inputs).numpy() != 0)
    with sos.Driver(model, keras.optimizers.SGD()):
        zeros = np.mean(model(inputs, training=True).numpy() == 0)
    assert 0.3 < zeros < 0.7


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_wrapped_inside_time_distributed(technique, tmp_path):
    (inputs,) = arrays("Dense rank 3")
    layer = techniques.wrap(technique, layers.Dense(3))
    model = keras.Sequential(
        [keras.Input(inputs.shape[1:]), layers.TimeDistributed(layer)]
    )
    before = layer.layer.kernel.numpy()
    assert np.isfinite(techniques.train(model, inputs)).all()
    assert np.any(layer.layer.kernel.numpy() != before)
    techniques.make_zeros(model)
    (kernel,) = layer.evaluation_weights().values()
    outputs = model(inputs).numpy()
    np.testing.assert_allclose(
        outputs, inputs @ kernel + layer.layer.bias, rtol=1e-5, atol=1e-6
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(outputs, loaded(inputs))


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_shared_layers_count_once(technique, tmp_path):
    a, b = keras.Input((3,)), keras.Input((3,))
    layer = techniques.wrap(technique, layers.Dense(3))
    model = keras.Model([a, b], [layer(a), layer(layer(b))])
    inputs = [np.ones((2, 3), "float32"), np.zeros((2, 3), "float32")]
    penalties = len(model.losses)
    assert np.isfinite(techniques.train(model, inputs, steps=2)).all()
    assert len(model.losses) == penalties
    assert len(find_wrappers(model)) == 1
    outputs = predict(model, inputs)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(outputs, predict(loaded, inputs))


def test_first_argument_by_name():
    query, value = arrays("MultiHeadAttention")
    layer = techniques.wrap(sos.FixedMask, attention())
    outputs = layer(query=query, value=value)
    assert_same(outputs, layer(query, value))


def attribute_names(layer):
    return [
        name
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable) and not name.startswith("_")
    ]


@pytest.mark.parametrize("make", [OwnLayer, Block, attention, DefaultBuild])
def test_names_in_checkpoints_are_stable(make, tmp_path):
    """Keras numbers layers; a checkpoint must not depend on the numbers."""
    inputs = [np.ones(VECTORS, "float32")]
    if make is attention:
        inputs = [np.ones(STEPS, "float32")] * 2
    first, second = (
        techniques.wrap(sos.MagnitudePruning, make()) for _ in "ab"
    )
    first(*inputs), second(*inputs)
    names = attribute_names(first)
    assert names == attribute_names(second)
    assert len(names) == len(first.sparse_weights)
    techniques.make_zeros(first)
    path = tf.train.Checkpoint(model=first).save(str(tmp_path / "ckpt"))
    status = tf.train.Checkpoint(model=second).restore(path)
    status.assert_existing_objects_matched()
    for a, b in zip(first.sparse_weights, second.sparse_weights, strict=True):
        assert_same(a.state["mask"], b.state["mask"])
