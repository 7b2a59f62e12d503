"""Stripping in place, and what `sparsify` undoes when it fails."""

import gc
import json
import weakref
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import sos
from sos.errors import UsageError
from sos.wrappers import sparse_layer
from sos.wrappers.base import find_wrappers
from tests.support import techniques
from tests.support.small_models import branches, mlp


@keras.saving.register_keras_serializable(package="strip_test")
class Subclassed(keras.Model):
    """Owns a weight, a layer and a model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(5, name="dense")
        self.inner = mlp()

    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(6, 6), name="matrix")
        self.dense.build(input_shape)

    def call(self, inputs):
        inputs = ops.matmul(inputs, self.matrix)
        return self.dense(inputs), self.inner(inputs)


def subclassed():
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model.build((None, 6))
    return model


MODELS = {
    "mlp": (mlp, (3, 6)),
    "branches": (branches, (3, 5, 6)),
    "subclassed": (subclassed, (3, 6)),
}


def sparse_of(make, technique, copy=False):
    sparse = sos.sparsify(
        make(), technique, copy=copy, **techniques.arguments(technique)
    )
    techniques.make_zeros(sparse)
    return sparse


def outputs(model, inputs):
    return [
        ops.convert_to_numpy(x)
        for x in keras.tree.flatten(model(inputs, training=False))
    ]


def assert_same(received, expected):
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def state_of(layer):
    """Returns what Keras and TensorFlow track of a layer and its sublayers."""
    found = []
    for inner in layer._flatten_layers():
        signature = str(inner._call_signature)
        attributes = sorted(set(vars(inner)) - {"sparsity_reasons"})
        children = sorted(
            name
            for name in inner._trackable_children()
            if not name.startswith("_self")
        )
        found.append(
            (
                type(inner),
                inner.name,
                attributes,
                signature,
                list(inner.call_signature_parameters),
                inner._call_has_training_arg,
                dict(inner._call_has_context_arg),
                children,
                [x.name for x in inner._layers],
                [v.path for v in inner.weights],
            )
        )
    return found


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_strip_in_place_leaves_nothing_of_the_techniques(
    technique, case, tmp_path
):
    make, shape = MODELS[case]
    model = make()
    inputs = techniques.normal(*shape)
    model(inputs)
    before = state_of(model)
    variables = {id(v) for v in model.variables}
    sparse = sos.sparsify(
        model, technique, copy=False, **techniques.arguments(technique)
    )
    techniques.make_zeros(sparse)
    expected = outputs(model, inputs)
    zeros = sos.sparsity_report(model).model_sparsity
    copied = sos.strip(model)
    assert sos.strip(model, copy=False) is model
    assert state_of(model) == before
    assert {id(v) for v in model.variables} == variables
    assert_same(outputs(model, inputs), expected)
    assert_same(model.get_weights(), copied.get_weights())
    report = sos.sparsity_report(model)
    assert report.model_sparsity == zeros > 0
    assert {row["technique"] for row in report.rows} == {""}
    path = tmp_path / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json").decode()
        assert b"technique" not in archive.read("model.weights.h5")
    assert "sos" not in json.dumps(config)
    loaded = keras.models.load_model(path)
    assert not find_wrappers(loaded)
    assert_same(outputs(loaded, inputs), expected)
    # It can be made sparse again.
    assert len(sos.get_masks(sos.prune(model, 0.5, copy=False))) > 1


# A full collection can take long at the end of many tests.
@pytest.mark.slow
def test_strip_in_place_frees_the_variables_of_the_techniques():
    sparse = sparse_of(mlp, "VariationalDropout")
    references = [
        weakref.ref(variable)
        for layer in sos.sparse_layers(sparse)
        for weight in layer.sparse_weights
        for variable in weight.state.values()
    ]
    sos.strip(sparse, copy=False)
    gc.collect()
    assert all(reference() is None for reference in references)


@pytest.mark.parametrize("technique", ["FixedMask", "VariationalDropout"])
def test_strip_in_place_compiled_model_must_be_compiled_again(
    technique, tmp_path
):
    model = sparse_of(mlp, technique)
    x, y = techniques.normal(16, 6), techniques.normal(16, 4)
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, y, verbose=0, callbacks=[sos.SparsityCallback()])
    expected = model.predict(x, verbose=0)
    sos.strip(model, copy=False)
    assert not model.compiled
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert b"adam" not in archive.read("model.weights.h5")
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, y, verbose=0)
    # As a new optimizer's: two variables of its own, two for each weight.
    assert len(model.optimizer.variables) == 2 + 2 * 4
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {
        "loss",
        "mae",
    }
    keras.models.load_model(tmp_path / "model.keras")


def test_strip_in_place_loaded_model_builds_as_before(tmp_path):
    sparse_of(mlp, "MagnitudePruning").save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    inputs = techniques.normal(3, 6)
    expected = outputs(model, inputs)
    sos.strip(model, copy=False)
    assert [type(layer) for layer in model.layers] == [layers.Dense] * 2
    assert_same(outputs(model, inputs), expected)
    # A saved model wraps the `build` of its layers.
    for layer in model.layers:
        assert "complete" not in layer.build.__code__.co_names


def test_strip_in_place_weights_and_checkpoints_are_those_of_a_plain_model(
    tmp_path,
):
    model = sos.strip(sparse_of(branches, "L0Regularization"), copy=False)
    plain = branches()
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    assert_same(plain.get_weights(), model.get_weights())
    prefix = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    names = [name for name, _ in tf.train.list_variables(prefix)]
    assert names
    assert not any("technique" in name for name in names)


def test_strip_in_place_inside_frozen_raises():
    model = sparse_of(mlp, "FixedMask")
    inputs = techniques.normal(3, 6)
    expected = outputs(model, inputs)
    with (
        sos.frozen(model),
        pytest.raises(UsageError, match=r"sos\.frozen.*copy=False"),
    ):
        sos.strip(model, copy=False)
    assert_same(outputs(model, inputs), expected)
    assert_same(outputs(sos.strip(model, copy=False), inputs), expected)


def test_strip_in_place_submodel_leaves_the_rest_sparse():
    model = sparse_of(branches, "FixedMask")
    inputs = techniques.normal(3, 5, 6)
    expected = outputs(model, inputs)
    sos.strip(model.get_layer("inner"), copy=False)
    assert_same(outputs(model, inputs), expected)
    assert "deep" not in [x.name for x in sos.sparse_layers(model)]
    assert len(sos.get_masks(model)) == 8


def test_strip_in_place_sublayer_leaves_outer_layers_without_its_masks(
    tmp_path,
):
    @keras.saving.register_keras_serializable("strip_test")
    class Outer(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.Dense(6, name="inner")
            self.logits = layers.Dense(4, name="logits")

        def build(self, input_shape):
            self.inner.build(input_shape)
            self.logits.build(input_shape)

        def call(self, x):
            # The outer layer's own call reads the weight, too.
            return self.logits(self.inner(x) + x @ self.inner.kernel)

    model = Outer()
    model.build((None, 6))
    sos.prune(model, 0.75, copy=False)
    inputs = techniques.normal(3, 6)
    expected = outputs(model, inputs)
    sos.strip(model.inner, copy=False)
    assert_same(outputs(model, inputs), expected)
    assert list(sos.get_masks(model)) == ["logits/kernel"]
    model.inner.kernel.assign(keras.ops.ones((6, 6)))
    for _ in range(2):
        dense = inputs @ np.ones((6, 6), "float32")
        np.testing.assert_allclose(
            model(inputs), model.logits(2 * dense), rtol=1e-5
        )
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("copy", [True, False])
def test_strip_again_changes_nothing(copy):
    plain = sos.strip(sparse_of(mlp, "FixedMask"))
    plain.compile("sgd", "mse")
    inputs = techniques.normal(3, 6)
    again = sos.strip(plain, copy=copy)
    assert (again is plain) == (not copy)
    assert plain.compiled
    assert not find_wrappers(again)
    assert_same(outputs(again, inputs), outputs(plain, inputs))
    if copy:
        assert not {id(v) for v in again.variables} & {
            id(v) for v in plain.variables
        }


def test_strip_plain_model_that_is_not_built_returns_a_copy():
    model = keras.Sequential([layers.Dense(2, name="dense")], name="net")
    plain = sos.strip(model)
    assert plain is not model
    assert plain.get_config() == model.get_config()
    assert sos.strip(model, copy=False) is model


def test_strip_layer_loaded_but_not_built_is_plain():
    config = keras.layers.serialize(sparse_of(mlp, "FixedMask").layers[0])
    config.pop("build_config", None)
    for copy in (True, False):
        layer = keras.layers.deserialize(config)
        assert not layer.built
        plain = sos.strip(layer, copy=copy)
        assert type(plain) is layers.Dense
        plain.build((None, 6))
        assert len(plain.weights) == 2


def by_hand():
    return keras.Sequential(
        [
            keras.Input((6,)),
            techniques.wrap("FixedMask", layers.Dense(4, name="inside")),
            layers.Dense(2),
        ]
    )


def test_strip_in_place_wrapper_raises_and_changes_nothing():
    model = by_hand()
    masks = sos.get_masks(model)
    for each in (model, model.layers[0]):
        with pytest.raises(UsageError, match="'inside'.*copy=True"):
            sos.strip(each, copy=False)
    assert_same(sos.get_masks(model).values(), masks.values())
    assert not find_wrappers(sos.strip(model))


def test_strip_in_place_while_it_trains_raises_and_changes_nothing():
    model = sparse_of(mlp, "VariationalDropout")
    with (
        sos.SparsityUpdater(model, keras.optimizers.SGD()),
        pytest.raises(UsageError, match="'first'.*SparsityUpdater"),
    ):
        sos.strip(model, copy=False)
    assert len(sos.sparse_layers(model)) == 2
    sos.strip(model, copy=False)
    assert sos.sparse_layers(model) == []


def test_strip_what_is_no_model_raises():
    with pytest.raises(TypeError, match="model='model'"):
        sos.strip("model", copy=False)


# What `sparsify` undoes.


@pytest.mark.parametrize("place", ["bind", "attach"])
@pytest.mark.parametrize("case", MODELS)
def test_sparsify_in_place_failing_late_leaves_the_model_as_it_was(
    case, place, monkeypatch
):
    make, shape = MODELS[case]
    model = make()
    inputs = techniques.normal(*shape)
    expected = outputs(model, inputs)
    before = state_of(model)
    function = getattr(sparse_layer, place)
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        result = function(*args, **kwargs)
        if place == "bind" or len(calls) == 2:
            raise UsageError("late")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(f"sos.surgery.{place}", fail)
        with pytest.raises(UsageError, match="late"):
            sos.prune(model, 0.5, copy=False)
    assert state_of(model) == before
    assert_same(outputs(model, inputs), expected)
    sos.prune(model, 0.5, copy=False)
    assert sos.sparse_layers(model)


def test_sparsify_in_place_holder_with_an_attribute_of_ours_is_unchanged():
    class Holder(layers.Layer):
        techniques = ("of its own",)

        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, inputs):
            return self.dense(inputs)

    inputs = keras.Input((6,))
    model = keras.Model(inputs, Holder()(inputs))
    before = state_of(model)
    with pytest.raises(UsageError, match="`techniques`"):
        sos.sparsify(model, "MagnitudePruning", sparsity=0.5, copy=False)
    assert state_of(model) == before
    assert sos.sparse_layers(model) == []
