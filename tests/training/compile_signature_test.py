import keras
import pytest

import sos
from sos.training.checkpoints import diff
from sos.training.compile_signature import compile_signature


def signature(model, optimizer=None):
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    return compile_signature(model, optimizer)


def equal(first, second):
    return not list(diff(first, second))


def dense(**kwargs):
    layers = [keras.Input((4,)), keras.layers.Dense(3, **kwargs)]
    return keras.Sequential(layers)


def product(factor):
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(4)(inputs) * factor
    return keras.Model(inputs, outputs)


def residual(skips_both):
    inputs = keras.Input((4,))
    first = keras.layers.Dense(4)(inputs)
    second = keras.layers.Dense(4)(first)
    skipped = inputs if skips_both else first
    return keras.Model(inputs, keras.layers.Add()([second, skipped]))


class Scaled(keras.layers.Dense):
    """Has an argument that the inherited `get_config` does not know."""

    def __init__(self, units, factor=1.0, **kwargs):
        super().__init__(units, **kwargs)
        self.factor = factor


class Applied(keras.layers.Layer):
    """Has no configuration, as Keras cannot serialize its argument."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


class Silent(keras.Model):
    """Keras does not record its argument."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.dense = keras.layers.Dense(3)

    def call(self, inputs):
        return self.factor * self.dense(inputs)


class Subclassed(Silent):
    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


def subclassed(factor, cls=Subclassed):
    model = cls(factor)
    model(keras.ops.ones((2, 4)))
    return model


class Deep(keras.Model):
    """A functional model made of arguments, one of them named `layers`."""

    def __init__(self, layers, **kwargs):
        inputs = outputs = keras.Input((4,))
        for _ in range(layers):
            outputs = keras.layers.Dense(4)(outputs)
        super().__init__(inputs, outputs, **kwargs)
        self.count = layers

    def get_config(self):
        return {"name": self.name, "layers": self.count}


def lstm(units=3, **kwargs):
    layers = [keras.Input((5, 4)), keras.layers.LSTM(units, **kwargs)]
    return keras.Sequential(layers)


@sos.extend.register
class SignaturePruning(sos.extend.PruningWrapper):
    """A user's technique, without a constructor of its own."""

    def scores(self, weight):
        return weight.value


def pruned(sparsity):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="a")]
    )
    return sos.sparsify(model, SignaturePruning, sparsity=sparsity, end_step=9)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda seed=0: dense(kernel_initializer=initial(seed)), {"seed": 1}),
        (lambda: product(0.5), {}),
        (lambda: residual(True), {}),
        (lambda factor=1.0: subclassed(factor), {}),
        (lambda: Deep(2), {}),
        (lambda seed=0: lstm(dropout=0.1, seed=seed), {"seed": 1}),
        (
            lambda sparsity=0.5: pruned(sparsity),
            {"sparsity": 0.9},
        ),
    ],
    ids=[
        "initializer",
        "product",
        "graph",
        "subclass",
        "functional_subclass",
        "seed",
        "schedule",
    ],
)
def test_compile_signature_of_other_values_is_equal(make, changes):
    assert equal(signature(make()), signature(make(**changes)))


def initial(seed):
    return keras.initializers.RandomNormal(seed=seed)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (dense, {}, {"activation": "relu"}),
        (dense, {}, {"dtype": "mixed_bfloat16"}),
        (dense, {}, {"trainable": False}),
        (product, {"factor": 0.5}, {"factor": 0.1}),
        (residual, {"skips_both": True}, {"skips_both": False}),
        (subclassed, {"factor": 0.5}, {"factor": 0.1}),
        (lstm, {}, {"recurrent_activation": "tanh"}),
        (Deep, {"layers": 1}, {"layers": 2}),
    ],
)
def test_compile_signature_of_another_network_differs(make, first, second):
    assert not equal(signature(make(**first)), signature(make(**second)))


@pytest.mark.parametrize(
    "make", [lambda: Scaled(3), lambda: Applied(lambda x: 2 * x)]
)
def test_compile_signature_of_unknown_arguments_equals_nothing(make):
    models = [
        keras.Sequential([keras.Input((4,)), make(), keras.layers.Dense(2)])
        for _ in range(2)
    ]
    assert not equal(*map(signature, models))


def test_compile_signature_of_a_model_without_config_equals_nothing():
    models = [subclassed(0.5, Silent) for _ in range(2)]
    assert not equal(*map(signature, models))


def adamw(*excluded):
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=list(excluded))
    return optimizer


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """Has no configuration."""

    def __call__(self, step):
        return 0.1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            lambda: keras.optimizers.SGD(0.1),
            lambda: keras.optimizers.SGD(0.5),
            True,
        ),
        (lambda: adamw("bias"), lambda: adamw("bias"), True),
        (lambda: adamw(), lambda: adamw("bias"), False),
        (
            lambda: keras.optimizers.Adam(0.1, beta_1=0.8),
            lambda: keras.optimizers.Adam(0.1),
            False,
        ),
        (
            lambda: keras.optimizers.SGD(Rate()),
            lambda: keras.optimizers.SGD(Rate()),
            False,
        ),
    ],
    ids=["learning_rate", "same", "weight_decay", "beta", "unknown"],
)
def test_compile_signature_of_optimizers(first, second, expected):
    signatures = [signature(dense(), make()) for make in (first, second)]
    assert equal(*signatures) == expected
