"""What calls of layers do with weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos import uses
from sos.errors import ArgumentError, UsageError

IMAGE = (2, 6, 6, 3)
SEQUENCE = (2, 6, 3)
CASES = {
    "Dense": (lambda: layers.Dense(4, activation="relu"), (2, 3)),
    "Dense no bias": (lambda: layers.Dense(4, use_bias=False), (2, 5, 3)),
    "EinsumDense": (
        lambda: layers.EinsumDense(
            "abc,cde->abde", (None, 2, 4), bias_axes="e"
        ),
        SEQUENCE,
    ),
    "Conv1D": (lambda: layers.Conv1D(4, 3, padding="same"), SEQUENCE),
    "Conv1D causal": (
        lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
        SEQUENCE,
    ),
    "Conv2D": (lambda: layers.Conv2D(4, 3, strides=2), IMAGE),
    "Conv2D groups": (
        lambda: layers.Conv2D(6, 3, groups=3, activation="tanh"),
        IMAGE,
    ),
    "Conv3D": (lambda: layers.Conv3D(4, 2), (2, 3, 3, 3, 2)),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 3, 2), SEQUENCE),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(
            4, 3, strides=2, padding="same", output_padding=1
        ),
        IMAGE,
    ),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(2, 2), (2, 3, 3, 3, 2)),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3), SEQUENCE),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        IMAGE,
    ),
    "TimeDistributed Dense": (
        lambda: layers.TimeDistributed(layers.Dense(4, activation="relu")),
        SEQUENCE,
    ),
    "TimeDistributed Conv2D": (
        lambda: layers.TimeDistributed(layers.Conv2D(4, 3)),
        (2, 3, 5, 5, 2),
    ),
}


def values(shape, seed=0):
    return tf.constant(
        np.random.default_rng(seed).normal(size=shape), tf.float32
    )


def indices(*shape):
    return tf.constant(np.random.default_rng(1).integers(0, 7, shape))


def adapted(layer, inputs):
    """The layer with a LoRA adapter that is not zero."""
    layer(inputs)
    layer.enable_lora(2)
    for variable in layer.trainable_variables:
        variable.assign(values(variable.shape, seed=3))
    return layer


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_description_of_a_keras_layer_is_its_call(name, policy):
    make, shape = CASES[name]
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        layer, inputs = make(), values(shape)
        layer(inputs)
        for variable in layer.weights:
            variable.assign(values(variable.shape, seed=2))
        sos.extend.check_use(layer, inputs)
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Embedding(7, 3),
        layers.ReversibleEmbedding(7, 3, mask_zero=True),
        layers.TimeDistributed(layers.Embedding(7, 3)),
    ],
    ids=lambda layer: layer.name,
)
def test_description_of_a_look_up_is_its_call(layer):
    sos.extend.check_use(layer, indices(2, 5, 3))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_description_of_a_product_with_a_table_is_its_call(tied, cap):
    layer = layers.ReversibleEmbedding(
        7, 3, tie_weights=tied, logit_soft_cap=cap
    )
    layer(indices(2, 5))
    for variable in layer.weights:
        variable.assign(values(variable.shape))
    sos.extend.check_use(layer, values((2, 5, 3)), reverse=True)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (layers.Dense(4), values((2, 3))),
        (
            layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"),
            values((2, 5, 3)),
        ),
        (layers.Conv2D(4, 3), values(IMAGE)),
        (layers.Embedding(7, 3), indices(2, 5)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_description_of_an_adapted_layer_is_its_call(layer, inputs):
    sos.extend.check_use(adapted(layer, inputs), inputs)


def test_look_up_of_a_masking_table_sets_the_mask():
    layer = layers.ReversibleEmbedding(7, 3, mask_zero=True)
    layer(indices(2, 5))
    (use,) = uses.describe(type(layer), layer, indices(2, 5))
    outputs = use.finish(use.rows(tf.convert_to_tensor(use.weight.value))[0])
    np.testing.assert_array_equal(outputs._keras_mask, indices(2, 5) != 0)


def test_describer_of_an_overridden_call_is_none():
    class Other(layers.Dense):
        def call(self, inputs):
            return -super().call(inputs)

    class Same(layers.Dense):
        pass

    assert uses.describer(Other) is None
    assert uses.describer(Same) is uses.describer(layers.Dense)


class Scaled(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")
        self.offset = self.add_weight(shape=(shape[-1], 4), name="offset")

    def call(self, inputs):
        return 2 * inputs @ self.kernel + tf.reduce_sum(self.offset)


def scaled_use(factor, function=lambda w, x: x @ w):
    def describe(layer, inputs):
        return sos.extend.LinearMap(
            layer.kernel,
            inputs=inputs,
            function=function,
            finish=lambda y: factor * y + tf.reduce_sum(layer.offset),
            positions=lambda: 1,
        )

    return describe


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(uses, "_describers", dict(uses._describers))


def test_registered_layer_under_dropout_has_noise_for_each_example(registry):
    sos.extend.register_use(Scaled)(scaled_use(2))
    sos.extend.check_use(Scaled(), values((2, 3)))
    sparse = sos.VariationalDropout(
        Scaled(),
        penalty_weight=0.0,
        initial_log_sigma2=-2.0,
        threshold=100.0,  # Evaluation removes no weight.
        clip_log_alpha=None,  # The variances of small weights, too.
        include="kernel",
    )
    inputs = tf.ones((2000, 3))
    sparse(inputs)
    optimizer = keras.optimizers.SGD()
    optimizer.build(sparse.trainable_variables)
    sparse.step_counter.bind(optimizer)
    outputs = sparse(inputs, training=True).numpy()
    # 2 x k + c, with independent noise of variance 4 * sum sigma^2.
    np.testing.assert_allclose(outputs.var(0), 12 * np.exp(-2.0), rtol=0.15)
    np.testing.assert_allclose(
        outputs.mean(0), sparse(inputs[:1]).numpy()[0], atol=0.15
    )


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (scaled_use(3), "outputs differ"),
        (
            scaled_use(2, lambda w, x: x @ w + 0 * x @ w + 1),
            "outputs differ|sum of two",
        ),
    ],
)
def test_check_use_of_a_wrong_description_raises(registry, describe, message):
    sos.extend.register_use(Scaled)(describe)
    layer = Scaled()
    layer(values((2, 3)))
    with pytest.raises(UsageError, match=message):
        sos.extend.check_use(layer, values((2, 3)))


def test_check_use_of_a_function_that_is_not_linear_raises(registry):
    class Squared(Scaled):
        def call(self, inputs):
            return tf.square(inputs) @ self.kernel

    @sos.extend.register_use(Squared)
    def describe(layer, inputs):
        return sos.extend.LinearMap(
            layer.kernel, inputs=inputs, function=lambda w, x: x**2 @ w
        )

    with pytest.raises(UsageError, match="sum of two inputs differ"):
        sos.extend.check_use(Squared(), values((2, 3)))


def test_check_use_of_an_unknown_layer_raises():
    with pytest.raises(UsageError, match="not described"):
        sos.extend.check_use(layers.BatchNormalization(), values((2, 3)))


def test_register_use_of_something_else_raises():
    with pytest.raises(ArgumentError, match="classes of Keras 3 layers"):
        sos.extend.register_use(dict)


def tied_model(length=6):
    tokens = keras.Input((length,), dtype="int32")
    table = layers.ReversibleEmbedding(50, 8, name="table")
    x = table(tokens)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    return keras.Model(tokens, table(x, reverse=True))


def test_multiply_adds_of_a_tied_table_are_those_of_its_product():
    rows = {
        row["weight"]: row["multiply_adds"]
        for row in sos.sparsity_report(tied_model()).rows
    }
    assert rows["table/embeddings"] == 6 * 50 * 8
    assert rows["attention/query/kernel"] == 6 * 8 * 8
    assert rows["attention/attention_output/kernel"] == 6 * 8 * 8


def test_multiply_adds_of_unknown_lengths_need_inputs():
    model = tied_model(None)
    totals = sos.sparsity_report(model).totals
    assert totals["multiply_adds"] == 0
    totals = sos.sparsity_report(model, np.zeros((3, 6), "int32")).totals
    known = sos.sparsity_report(tied_model()).totals
    assert totals["multiply_adds"] == known["multiply_adds"] > 0


def test_multiply_adds_leave_no_trace_in_the_model():
    model = tied_model()
    sos.sparsity_report(model)
    assert not any("call" in vars(layer) for layer in model.layers)
