"""All layers of Keras, and layers of users, each in a small case.

`CASES` holds the layers with weights of rank 2 or more, `VECTORS` those whose
weights stay dense by default, `WITHOUT_WEIGHTS` the rest, `LEFT_OUT` what is
in `keras.layers` and cannot be tried, with the reason.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

BATCH = 4

# Shapes of inputs, without the batch.
ROW, STEPS, LINE = (6,), (5, 3), (8, 4)
IMAGE, FRAMES, SOUND = (6, 6, 4), (3, 6, 6, 2), (64, 1)
VOLUME, LINES, VOLUMES = (4, 4, 4, 2), (3, 6, 2), (2, 4, 4, 4, 2)
PHOTO = "photo"

TOKENS = np.array([[1, 2, 0, 0], [3, 6, 6, 0], [5, 0, 0, 0], [4, 1, 2, 3]])
WORDS = np.array([["cat"], ["dog"], ["bird"], ["cat"]], "object")


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer with its inputs.

    Attributes:
        make: Makes the layer.
        inputs: Shapes of its inputs without the batch, or names of `array`.
        call: Calls the layer on its inputs.
    """

    make: Callable[[], keras.layers.Layer]
    inputs: Sequence[Any]
    call: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)

    def arrays(self) -> list[np.ndarray]:
        """Returns one batch of inputs."""
        return [array(spec) for spec in self.inputs]


def array(spec: Any) -> np.ndarray:
    """Returns a batch of inputs; the same one for equal arguments.

    Args:
        spec: A shape without the batch; or "tokens"; "words"; "photo", with
            values from 0 to 255; "padded", steps that end in zeros; "mask".
    """
    generator = np.random.default_rng(0)
    if spec == "tokens":
        return TOKENS.astype("int32")
    if spec == "words":
        return WORDS
    if spec == "photo":
        return generator.uniform(0, 255, (BATCH, 8, 8, 3)).astype("float32")
    if spec == "mask":
        return np.tril(np.ones((BATCH, 5, 5), "float32"))
    shape = STEPS if spec == "padded" else spec
    values = generator.normal(size=(BATCH, *shape)).astype("float32")
    if spec == "padded":
        values[0, 3:] = 0
        values[2, 1:] = 0
    return values


def inputs_for(arrays: Sequence[np.ndarray], **kwargs: Any) -> list:
    """Returns a symbolic input for each array."""
    return [
        keras.Input(
            x.shape[1:],
            dtype="string" if x.dtype == "object" else x.dtype,
            **kwargs,
        )
        for x in arrays
    ]


def public_classes() -> dict[str, type]:
    """Returns the classes of `keras.layers`, each by one of its names."""
    classes = {
        cls: name
        for name, cls in sorted(vars(layers).items())
        if inspect.isclass(cls) and issubclass(cls, layers.Layer)
    }
    return {name: cls for cls, name in classes.items()}


@keras.saving.register_keras_serializable(package="support")
class MaskReader(layers.Layer):
    """Makes the mask that arrives visible: twos where there is none."""

    supports_masking = True

    def call(self, inputs, mask=None):
        shape = tf.shape(inputs)[:2]
        return tf.fill(shape, 2.0) if mask is None else tf.cast(mask, "float32")

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[:2])


@keras.saving.register_keras_serializable(package="support")
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


@keras.saving.register_keras_serializable(package="support")
class DefaultBuild(layers.Layer):
    """No `build`: Keras builds the sublayer by calling this one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


@keras.saving.register_keras_serializable(package="support")
class DirectRead(layers.Layer):
    """Reads the weight of a sublayer without calling that layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        norm = tf.reduce_sum(tf.square(self.dense.kernel), axis=0)
        return self.dense(inputs) + inputs @ self.dense.kernel / (1 + norm)


@keras.saving.register_keras_serializable(package="support")
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


@keras.saving.register_keras_serializable(package="support")
class Cell(layers.Layer):
    """A recurrent cell of a user."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = self.output_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units), name="kernel"
        )
        self.recurrent = self.add_weight(
            shape=(self.units, self.units), name="recurrent"
        )

    def call(self, inputs, states, training=False):
        outputs = tf.tanh(inputs @ self.kernel + states[0] @ self.recurrent)
        return outputs, [outputs]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def _attend(layer, query, value):
    return layer(query, value)


def _attend_by_name(layer, query, value, key):
    return layer(query, value=value, key=key)


def _attend_with_mask(layer, query, mask):
    return layer(query, query, attention_mask=mask > 0, use_causal_mask=True)


def _attend_on_list(layer, query, value):
    return layer([query, value])


def _with_state(layer, x, h, c):
    return layer(x, initial_state=[h, c])


def _step(layer, x, *states):
    return layer(x, list(states))


def _masked(layer, x):
    return layer(layers.Masking()(x))


def _both_ways(layer, tokens):
    return layer(layer(tokens), reverse=True)


def attention() -> keras.layers.Layer:
    """Returns a small attention."""
    return layers.MultiHeadAttention(2, 3)


#: Layers whose weights of rank 2 or more are made sparse by default.
CASES = {
    "Dense": Case(lambda: layers.Dense(3, "relu"), [ROW]),
    "Dense rank 3": Case(lambda: layers.Dense(3), [STEPS]),
    "EinsumDense": Case(
        lambda: layers.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="e"),
        [STEPS],
    ),
    "Conv1D": Case(lambda: layers.Conv1D(3, 3, padding="causal"), [LINE]),
    "Conv2D": Case(lambda: layers.Conv2D(4, 3, 2, groups=2), [IMAGE]),
    "Conv3D": Case(lambda: layers.Conv3D(2, 2), [VOLUME]),
    "Conv1DTranspose": Case(lambda: layers.Conv1DTranspose(3, 3, 2), [LINE]),
    "Conv2DTranspose": Case(lambda: layers.Conv2DTranspose(3, 3, 2), [IMAGE]),
    "Conv3DTranspose": Case(lambda: layers.Conv3DTranspose(2, 2), [VOLUME]),
    "DepthwiseConv1D": Case(
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), [LINE]
    ),
    "DepthwiseConv2D": Case(
        lambda: layers.DepthwiseConv2D(3, 2, "same"), [IMAGE]
    ),
    "SeparableConv1D": Case(lambda: layers.SeparableConv1D(3, 3), [LINE]),
    "SeparableConv2D": Case(lambda: layers.SeparableConv2D(3, 3), [IMAGE]),
    "Embedding": Case(lambda: layers.Embedding(7, 3), ["tokens"]),
    "Embedding mask_zero": Case(
        lambda: layers.Embedding(7, 3, mask_zero=True), ["tokens"]
    ),
    "ReversibleEmbedding": Case(
        lambda: layers.ReversibleEmbedding(7, 3, logit_soft_cap=5.0),
        ["tokens"],
        _both_ways,
    ),
    "ReversibleEmbedding untied": Case(
        lambda: layers.ReversibleEmbedding(7, 3, tie_weights=False),
        ["tokens"],
        _both_ways,
    ),
    "SimpleRNN": Case(lambda: layers.SimpleRNN(3), [STEPS]),
    "LSTM masked": Case(
        lambda: layers.LSTM(3, return_sequences=True), ["padded"], _masked
    ),
    "LSTM masked last": Case(lambda: layers.LSTM(3), ["padded"], _masked),
    "LSTM initial_state": Case(
        lambda: layers.LSTM(3, return_state=True),
        [STEPS, (3,), (3,)],
        _with_state,
    ),
    "GRU": Case(
        lambda: layers.GRU(3, return_sequences=True, dropout=0.3), [STEPS]
    ),
    "RNN": Case(lambda: layers.RNN(Cell(), return_sequences=True), [STEPS]),
    "StackedRNNCells": Case(
        lambda: layers.RNN(
            layers.StackedRNNCells(
                [layers.GRUCell(3, dropout=0.3), layers.LSTMCell(2)]
            )
        ),
        [STEPS],
    ),
    "SimpleRNNCell": Case(lambda: layers.SimpleRNNCell(3), [ROW, (3,)], _step),
    "GRUCell": Case(lambda: layers.GRUCell(3), [ROW, (3,)], _step),
    "LSTMCell": Case(lambda: layers.LSTMCell(3), [ROW, (3,), (3,)], _step),
    "ConvLSTM1D": Case(
        lambda: layers.ConvLSTM1D(2, 3, recurrent_dropout=0.3), [LINES]
    ),
    "ConvLSTM2D": Case(lambda: layers.ConvLSTM2D(2, 3), [FRAMES]),
    "ConvLSTM3D": Case(lambda: layers.ConvLSTM3D(2, 2), [VOLUMES]),
    "Bidirectional": Case(
        lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
        ["padded"],
        _masked,
    ),
    "TimeDistributed Dense": Case(
        lambda: layers.TimeDistributed(layers.Dense(3, "relu")),
        ["padded"],
        _masked,
    ),
    "TimeDistributed Conv2D": Case(
        lambda: layers.TimeDistributed(layers.Conv2D(3, 3)), [FRAMES]
    ),
    "MultiHeadAttention": Case(attention, [STEPS, (7, 6)], _attend),
    "MultiHeadAttention by name": Case(
        attention, [STEPS, (7, 6), (7, 2)], _attend_by_name
    ),
    "MultiHeadAttention masks": Case(
        attention, [STEPS, "mask"], _attend_with_mask
    ),
    "GroupQueryAttention": Case(
        lambda: layers.GroupQueryAttention(3, 4, 2, dropout=0.2),
        [STEPS, (7, 3)],
        _attend,
    ),
    "SpectralNormalization": Case(
        lambda: layers.SpectralNormalization(layers.Dense(3)), [ROW]
    ),
    "SpectralNormalization Conv2D": Case(
        lambda: layers.SpectralNormalization(layers.Conv2D(3, 3)), [IMAGE]
    ),
    "Pipeline": Case(
        lambda: layers.Pipeline([layers.Dense(3), layers.Dropout(0.5)]), [ROW]
    ),
    "STFTSpectrogram": Case(
        lambda: layers.STFTSpectrogram(
            frame_length=16, frame_step=8, fft_length=16
        ),
        [SOUND],
    ),
    "own layer": Case(OwnLayer, [ROW]),
    "default build": Case(DefaultBuild, [ROW]),
    "direct read": Case(DirectRead, [ROW]),
    "subclassed model": Case(Block, [ROW]),
    "Sequential": Case(
        lambda: keras.Sequential([layers.Dense(3, "relu"), layers.Dense(2)]),
        [ROW],
    ),
}

#: Layers whose weights stay dense by default.
VECTORS = {
    "PReLU": Case(layers.PReLU, [IMAGE]),
    "PReLU row": Case(layers.PReLU, [ROW]),
    "Attention": Case(
        lambda: layers.Attention(use_scale=True, score_mode="concat"),
        [STEPS, (7, 3)],
        _attend_on_list,
    ),
    "AdditiveAttention": Case(
        layers.AdditiveAttention, [STEPS, (7, 3)], _attend_on_list
    ),
    "BatchNormalization": Case(layers.BatchNormalization, [IMAGE]),
    "BatchNormalization masked": Case(
        layers.BatchNormalization, ["padded"], _masked
    ),
    "LayerNormalization": Case(
        lambda: layers.LayerNormalization(axis=[1, 2]), [STEPS]
    ),
    "GroupNormalization": Case(lambda: layers.GroupNormalization(2), [IMAGE]),
    "RMSNormalization": Case(
        lambda: layers.RMSNormalization(axis=[1, 2]), [STEPS]
    ),
    "Normalization": Case(lambda: normalization(), [ROW]),
}


def normalization() -> keras.layers.Layer:
    """Returns a `Normalization` that is adapted to other data."""
    layer = layers.Normalization()
    layer.adapt(3 + 2 * array((50, 6)).reshape(-1, 6))
    return layer


def _discretization() -> keras.layers.Layer:
    layer = layers.Discretization(num_bins=4)
    layer.adapt(array(ROW))
    return layer


def _string_lookup() -> keras.layers.Layer:
    layer = layers.StringLookup()
    layer.adapt(WORDS)
    return layer


def _text_vectorization() -> keras.layers.Layer:
    layer = layers.TextVectorization(output_sequence_length=2)
    layer.adapt(WORDS)
    return layer


def _integer_lookup() -> keras.layers.Layer:
    layer = layers.IntegerLookup(output_mode="multi_hot")
    layer.adapt(TOKENS)
    return layer


def _of(cls: type, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: cls(*args, **kwargs)


def _merge(layer, *inputs):
    return layer(list(inputs))


def _without_weights() -> dict[str, Case]:
    cases = {
        "Activation": Case(_of(layers.Activation, "tanh"), [ROW]),
        "ActivityRegularization": Case(
            _of(layers.ActivityRegularization, l2=0.1), [ROW]
        ),
        "CategoryEncoding": Case(_of(layers.CategoryEncoding, 7), ["tokens"]),
        "Discretization": Case(_discretization, [ROW]),
        "Hashing": Case(_of(layers.Hashing, 5), ["words"]),
        "HashedCrossing": Case(
            _of(layers.HashedCrossing, 5), ["words", "words"], _merge
        ),
        "IntegerLookup": Case(_integer_lookup, ["tokens"]),
        "StringLookup": Case(_string_lookup, ["words"]),
        "TextVectorization": Case(_text_vectorization, ["words"]),
        "Lambda": Case(_of(layers.Lambda, keras.activations.tanh), [ROW]),
        "Masking": Case(layers.Masking, ["padded"]),
        "MelSpectrogram": Case(
            _of(
                layers.MelSpectrogram,
                fft_length=16,
                sequence_stride=8,
                sampling_rate=100,
                num_mel_bins=4,
                max_freq=40,
            ),
            [(64,)],
        ),
        "Permute": Case(_of(layers.Permute, (2, 1)), [LINE]),
        "RepeatVector": Case(_of(layers.RepeatVector, 2), [ROW]),
        "Rescaling": Case(_of(layers.Rescaling, 1 / 255), ["photo"]),
        "Reshape": Case(_of(layers.Reshape, (2, 3)), [ROW]),
        "Flatten": Case(layers.Flatten, [LINE]),
        "Dot": Case(_of(layers.Dot, 1), [ROW, ROW], _merge),
    }
    for name in ("AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise"):
        cases[name] = Case(_of(getattr(layers, name), 0.3), [ROW])
    for name in (
        "ELU",
        "Identity",
        "LeakyReLU",
        "ReLU",
        "Softmax",
        "UnitNormalization",
    ):
        cases[name] = Case(getattr(layers, name), [ROW])
    for name in (
        "Add",
        "Average",
        "Concatenate",
        "Maximum",
        "Minimum",
        "Multiply",
        "Subtract",
    ):
        cases[name] = Case(getattr(layers, name), [ROW, ROW], _merge)
    for rank, shape in ((1, LINE), (2, IMAGE), (3, VOLUME)):
        for name, args in (
            ("AdaptiveAveragePooling{}D", [2]),
            ("AdaptiveMaxPooling{}D", [2]),
            ("AveragePooling{}D", [2]),
            ("Cropping{}D", []),
            ("GlobalAveragePooling{}D", []),
            ("GlobalMaxPooling{}D", []),
            ("MaxPooling{}D", [2]),
            ("SpatialDropout{}D", [0.3]),
            ("UpSampling{}D", []),
            ("ZeroPadding{}D", []),
        ):
            name = name.format(rank)
            cases[name] = Case(_of(getattr(layers, name), *args), [shape])
    for name, args in (
        ("AutoContrast", []),
        ("CenterCrop", [4, 4]),
        ("ContrastLimitedAdaptiveHistogramEqualization", []),
        ("CutMix", []),
        ("MixUp", []),
        ("RandAugment", []),
        ("RandomBrightness", [0.2]),
        ("RandomColorDegeneration", [0.2]),
        ("RandomColorJitter", []),
        ("RandomContrast", [0.2]),
        ("RandomCrop", [8, 8]),
        ("RandomElasticTransform", []),
        ("RandomErasing", []),
        ("RandomFlip", []),
        ("RandomGaussianBlur", []),
        ("RandomGrayscale", []),
        ("RandomHue", [0.2]),
        ("RandomInvert", []),
        ("RandomPerspective", []),
        ("RandomPosterization", [4]),
        ("RandomRotation", [0.2]),
        ("RandomSaturation", [0.2]),
        ("RandomSharpness", [0.2]),
        ("RandomTranslation", [0.2, 0.2]),
        ("RandomZoom", [0.2]),
        ("Resizing", [4, 4]),
        ("Solarization", [0.2]),
    ):
        cases[name] = Case(_of(getattr(layers, name), *args), ["photo"])
    return cases


#: Layers that other layers with weights stand beside.
WITHOUT_WEIGHTS = _without_weights()

#: Layers that cannot stand in a functional model here, and why.
LEFT_OUT = {
    "Layer": "a base class",
    "Wrapper": "a base class",
    "InputLayer": "the input of each of these models",
    "FlaxLayer": "of another backend",
    "JaxLayer": "of another backend",
    "TorchModuleWrapper": "of another backend",
    "TFSMLayer": "computes with the variables of its SavedModel",
    "AugMix": "draws numbers that no seed of the layer determines",
    "RandomShear": "its configuration does not make it again",
    "Equalization": "Keras makes a cycle of it in a functional model",
    "MaxNumBoundingBoxes": "takes boxes alone",
}


def classes_in(cases: dict[str, Case]) -> set[str]:
    """Returns the names of the Keras classes that cases make."""
    by_class = {cls: name for name, cls in public_classes().items()}
    found = set()
    for case in cases.values():
        for layer in case.make()._flatten_layers():
            found.add(by_class.get(type(layer)))
    return found - {None}
