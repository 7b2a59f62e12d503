"""What `sos` relies on in Keras beyond its public interface.

Each of these tests fails when a release of Keras changes it.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from sos import keras_compat

pytestmark = pytest.mark.oldest


def test_all_layers_of_a_layer_has_those_inside_once():
    attention = layers.MultiHeadAttention(2, 4)
    attention.build((None, 3, 8), (None, 3, 8))
    found = keras_compat.all_layers(attention)
    assert found[0] is attention
    assert len({id(layer) for layer in found}) == len(found)
    names = {layer.name for layer in found}
    assert {"query", "key", "value", "attention_output"} <= names
    inner = keras_compat.sublayers(attention)
    assert all(any(x is layer for layer in found) for x in inner)


def test_own_variables_are_those_of_the_layer_alone():
    lstm = layers.LSTM(4)
    lstm.build((None, 3, 2))
    assert keras_compat.own_variables(lstm) == []
    names = [v.name for v in keras_compat.own_variables(lstm.cell)]
    assert names == ["kernel", "recurrent_kernel", "bias"]
    norm = layers.BatchNormalization()
    norm.build((None, 3))
    assert len(keras_compat.own_variables(norm)) == 4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Dense(4), (None, 3)),
        (layers.EinsumDense("ab,bc->ac", 4), (None, 3)),
        (layers.Conv2D(4, 3), (None, 5, 5, 3)),
        (layers.Embedding(7, 3), (None, 2)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_base_of_an_adapter_is_the_frozen_variable(layer, shape):
    layer.build(shape)
    (first, *_) = layer.trainable_weights
    assert keras_compat.lora_base(layer) is None
    layer.enable_lora(2)
    assert keras_compat.lora_base(layer) is first
    assert not first.trainable
    own = (
        keras_compat.embeddings(layer)
        if isinstance(layer, layers.Embedding)
        else keras_compat.kernel(layer)
    )
    assert own is first


def test_kernel_of_a_layer_without_adapters_is_its_variable():
    layer = layers.DepthwiseConv2D(3)
    layer.build((None, 5, 5, 2))
    assert keras_compat.kernel(layer) is layer.kernel


def test_accept_training_of_a_layer_lets_models_hand_it_on():
    given = []

    class Quiet(layers.Layer):
        def call(self, inputs):
            return inputs

    layer = Quiet()
    keras_compat.accept_training(layer)

    def call(inputs, training=None):
        given.append(training)
        return inputs

    layer.call = call
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layer(inputs))
    given.clear()
    model(np.ones((1, 2)), training=True)
    model(np.ones((1, 2)), training=False)
    assert given == [True, False]


def test_with_training_keeps_other_parameters():
    def call(inputs, *, mask=None, **kwargs):
        pass

    signature = keras_compat.with_training(inspect.signature(call))
    assert list(signature.parameters) == [
        "inputs",
        "mask",
        "training",
        "kwargs",
    ]


def test_training_of_call_is_that_of_the_call_around():
    found = []

    class Inner(layers.Layer):
        def call(self, inputs):
            found.append(keras_compat.training_of_call(self))
            return inputs

    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, inputs, training=None):
            return self.inner.call(self.inner(inputs))

    outer = Outer()
    outer.build((1, 2))
    found.clear()
    outer(np.ones((1, 2)), training=True)
    outer(np.ones((1, 2)), training=False)
    outer(np.ones((1, 2)))
    assert found == [True, True, False, False, False, False]
    found.clear()
    outer.inner.call(np.ones((1, 2)))
    assert found == [False]
    # No call is left open.
    outer(np.ones((1, 2)), training=True)
    assert found == [False, True, True]


def test_is_after_shapes_in_symbolic_calls_alone():
    seen = []

    class Watch(layers.Layer):
        def call(self, inputs):
            seen.append(keras_compat.is_after_shapes())
            return inputs

    watch = Watch()
    model = keras.Sequential([keras.Input((2,)), watch])
    assert seen and all(seen)
    seen.clear()
    model(np.ones((1, 2)))
    tf.function(watch)(tf.ones((1, 2)))
    assert len(seen) == 2 and not any(seen)


def test_unlocked_layer_takes_sublayers():
    layer = layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises(ValueError):
        layer.extra = layers.Dense(1)
    with keras_compat.unlocked(layer):
        layer.extra = layers.Dense(1)
    assert layer.extra in keras_compat.sublayers(layer)
    with pytest.raises(ValueError):
        layer.more = layers.Dense(1)


class Doubled(keras_compat.SubstitutionScope):
    def __init__(self, variable):
        super().__init__()
        self.variable = variable
        self.assigned = []

    def substitute(self, variable):
        if variable is self.variable:
            return 2 * keras_compat.stored_value(variable)

    def assigned_value(self, variable, value):
        self.assigned.append(variable)
        return value


def test_substitution_scope_changes_reads_and_passes_assignments_on():
    variable, other = (keras.Variable(np.ones(2, "float32")) for _ in "ab")
    with Doubled(variable) as scope:
        np.testing.assert_array_equal(variable.value, [2, 2])
        np.testing.assert_array_equal(other.value, [1, 1])
        other.assign([5, 6])
        variable.assign([3, 4])
        np.testing.assert_array_equal(other.value, [5, 6])
        np.testing.assert_array_equal(variable.value, [6, 8])
    assert [id(v) for v in scope.assigned] == [id(other), id(variable)]
    np.testing.assert_array_equal(variable.value, [3, 4])
    np.testing.assert_array_equal(other.value, [5, 6])


def test_substitution_scopes_nest_and_do_not_compound():
    variable = keras.Variable(np.ones(2, "float32"))
    with Doubled(variable), Doubled(variable):
        np.testing.assert_array_equal(variable.value, [2, 2])
        variable.assign([3, 3])
    np.testing.assert_array_equal(variable.value, [3, 3])


def test_substitution_scope_reads_through_a_stateless_scope_around():
    variable = keras.Variable(np.ones(2, "float32"))
    given = keras.StatelessScope(state_mapping=[(variable, tf.fill([2], 10.0))])
    with given:
        with Doubled(variable):
            np.testing.assert_array_equal(variable.value, [20, 20])
            variable.assign([1, 2])
        np.testing.assert_array_equal(variable.value, [1, 2])
    np.testing.assert_array_equal(variable.value, [1, 1])
    np.testing.assert_array_equal(given.get_current_value(variable), [1, 2])


def test_stored_value_of_a_layer_in_mixed_precision_is_not_cast():
    found = {}

    class Reader(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(2, 2), name="kernel")

        def call(self, inputs):
            with Doubled(self.kernel):
                found["stored"] = keras_compat.stored_value(self.kernel).dtype
                found["read"] = tf.convert_to_tensor(self.kernel.value).dtype
            return inputs

    Reader(dtype="mixed_bfloat16")(np.ones((1, 2)))
    assert found == {"stored": tf.float32, "read": tf.bfloat16}


def test_remove_sublayer_leaves_no_trace_in_a_built_layer():
    layer = layers.Dense(2)
    layer.build((None, 3))
    children = set(layer._trackable_children())
    weights = list(layer.weights)
    inner = layers.Dense(4)
    inner.build((None, 3))
    with keras_compat.unlocked(layer):
        layer.inner = inner
    assert len(layer.weights) == 4
    keras_compat.remove_sublayer(layer, "inner")
    assert not hasattr(layer, "inner")
    assert keras_compat.sublayers(layer) == []
    assert set(layer._trackable_children()) == children
    assert [id(v) for v in layer.weights] == [id(v) for v in weights]


def test_restore_call_undoes_accept_training():
    class Plain(layers.Layer):
        def call(self, inputs):
            return inputs

    layer, other = Plain(), Plain()
    before = keras_compat.accept_training(layer)
    assert layer._call_has_training_arg
    keras_compat.restore_call(layer, before)
    for name in before:
        assert getattr(layer, name) == getattr(other, name)


def test_uncompile_makes_a_model_as_before_compile():
    def make():
        return keras.Sequential([keras.Input((3,)), layers.Dense(2)])

    model, other = make(), make()
    x, y = np.ones((4, 3)), np.ones((4, 2))
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    keras_compat.uncompile(model)
    names = ("compiled", "loss", "metrics", "train_function", "test_function")
    for name in names:
        assert getattr(model, name) == getattr(other, name)
    assert not hasattr(model, "optimizer")
    assert model.get_compile_config() == other.get_compile_config()
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y, verbose=0)
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    keras_compat.uncompile(make())
