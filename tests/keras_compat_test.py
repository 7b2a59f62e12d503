"""What `sos` relies on in Keras beyond its public interface.

Each of these tests fails when a release of Keras changes it.
"""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from sos import keras_compat
from tests.support import techniques

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


def test_add_training_argument_of_a_layer_lets_models_hand_it_on():
    given = []

    class Quiet(layers.Layer):
        def call(self, inputs):
            return inputs

    layer = Quiet()
    keras_compat.add_training_argument(layer)

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


def test_only_infers_shapes_in_symbolic_calls_alone():
    seen = []

    class Watch(layers.Layer):
        def call(self, inputs):
            seen.append(keras_compat.only_infers_shapes())
            return inputs

    watch = Watch()
    model = keras.Sequential([keras.Input((2,)), watch])
    assert seen and all(seen)
    seen.clear()
    model(np.ones((1, 2)))
    tf.function(watch)(tf.ones((1, 2)))
    assert len(seen) == 2 and not any(seen)


def test_new_name_counts_begin_at_0_and_end_as_before():
    layers.Dense(1)
    policy = keras.config.dtype_policy()
    with keras_compat.new_name_counts():
        names = [layers.Dense(1).name for _ in range(2)]
        assert keras.config.dtype_policy() is policy
    assert names == ["dense", "dense_1"]
    assert layers.Dense(1).name not in names[:1]


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


def test_no_other_module_has_private_names_of_keras():
    """`self._x` is one's own; what follows another name is somebody else's."""
    root = pathlib.Path(__file__).resolve().parent.parent
    private = re.compile(
        r"(?!self\b|cls\b|other\b|sys\b|os\b)\b\w+[\])]*\._[a-z]\w*"
    )
    for folder in ("sos", "models", "configs"):
        for path in (root / folder).rglob("*.py"):
            if path.name == "keras_compat.py":
                continue
            text = path.read_text("utf-8")
            assert "keras.src" not in text, path
            found = set(private.findall(text))
            # Of named tuples, they are public.
            public = ("._replace", "._asdict", "._fields")
            assert not {n for n in found if not n.endswith(public)}, path


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(layers.Dense(4), (None, 3)), (layers.Embedding(7, 3), (None, 2))],
    ids=["dense", "embedding"],
)
def test_copy_adapter_enables_lora_as_in_the_other_layer(layer, shape):
    other = type(layer).from_config(layer.get_config())
    for each in (layer, other):
        each.build(shape)
        assert keras_compat.adapter(each) is None
    keras_compat.copy_adapter(None, other)
    assert not other.lora_enabled
    layer.enable_lora(2, lora_alpha=3)
    keras_compat.copy_adapter(keras_compat.adapter(layer), other)
    assert keras_compat.adapter(other) == [2, 3]
    # Once is enough.
    keras_compat.copy_adapter([4, 4], other)
    assert keras_compat.adapter(other) == [2, 3]


def test_copy_remat_mode_of_a_layer_made_in_a_scope():
    with keras.RematScope(mode="full"):
        source = layers.Dense(2)
    target = layers.Dense(2)
    assert source._remat_mode is not None and target._remat_mode is None
    keras_compat.copy_remat_mode(source, target)
    assert target._remat_mode == source._remat_mode


def test_set_mask_reaches_the_next_layer():
    class Masking(layers.Layer):
        supports_masking = True

        def call(self, inputs, mask=None):
            outputs = inputs + 1.0
            keras_compat.set_mask(outputs, tf.constant([[True, False]]))
            return outputs

    lstm = layers.LSTM(2)
    inputs = np.random.default_rng(0).normal(size=(1, 2, 3)).astype("float32")
    masked = lstm(Masking()(inputs))
    np.testing.assert_allclose(
        masked, lstm(inputs[:, :1] + 1.0), rtol=1e-5, atol=1e-6
    )


def test_pickle_state_of_a_layer_makes_it_again():
    layer = layers.Dense(2, name="dense")
    layer.build((None, 3))
    function, *arguments = keras_compat.pickle_state(layer.__reduce__())
    again = function(*arguments[0])
    assert (type(again), again.name) == (layers.Dense, "dense")
    np.testing.assert_array_equal(again.kernel, layer.kernel)


def test_without_compiled_functions_puts_them_back():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.predict(np.ones((1, 3)), verbose=0)
    function = model.predict_function
    assert function is not None
    with keras_compat.without_compiled_functions(model):
        assert model.predict_function is None
        model.predict(np.ones((1, 3)), verbose=0)
    assert model.predict_function is function


def test_is_distributed_of_variables_made_for_two_replicas():
    with techniques.two_replicas().scope():
        copies = keras.Variable(np.ones(2))
    assert keras_compat.is_distributed(copies)
    assert not keras_compat.is_distributed(keras.Variable(np.ones(2)))


def test_reading_stored_values_within_a_substitution():
    variable = keras.Variable(np.ones(2, "float32"))
    with Doubled(variable) as scope:
        assert keras_compat.substitution_scope() is scope
        with keras_compat.reading_stored():
            np.testing.assert_array_equal(variable.value, [1, 1])
        np.testing.assert_array_equal(variable.value, [2, 2])
    assert keras_compat.substitution_scope() is None
    with keras.StatelessScope():
        assert keras_compat.substitution_scope() is None


def test_inner_optimizers_are_those_that_update_variables():
    sgd = keras.optimizers.SGD()
    assert keras_compat.inner_optimizers(sgd) == [sgd]
    scaled = keras.optimizers.LossScaleOptimizer(sgd)
    assert keras_compat.inner_optimizers(scaled) == [sgd]


def test_exclude_from_weight_decay_adds_to_what_was_excluded():
    first, second, third = (keras.Variable(np.ones(2)) for _ in range(3))
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([first])
    optimizer.build([first, second, third])
    trained = keras_compat.trained_variables(optimizer)
    assert [id(v) for v in trained] == [id(first), id(second), id(third)]
    keras_compat.exclude_from_weight_decay(optimizer, [second])
    found = [keras_compat.decays(optimizer, v) for v in trained]
    assert found == [False, False, True]
    optimizer.apply([tf.zeros(2)] * 3)
    np.testing.assert_allclose(
        [v.numpy()[0] for v in trained], [1, 1, 0.95], rtol=1e-6
    )


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


def test_restore_call_undoes_add_training_argument():
    class Plain(layers.Layer):
        def call(self, inputs):
            return inputs

    layer, other = Plain(), Plain()
    before = keras_compat.add_training_argument(layer)
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
