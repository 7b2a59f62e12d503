"""Modules that are exported: what they hold, and how they are called."""

import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import StorageError, UsageError
from sos.export import ServingModule
from sos.wrappers.base import find_wrappers
from tests.support import techniques

SCHEDULE = sos.schedules.ConstantSparsity(0.75, begin_step=0, frequency=1)
WORDS = ["one", "two", "three"]


def dense(size=8):
    return keras.Sequential(
        [keras.Input((6,), name="features"), keras.layers.Dense(size)]
    )


def exported(module, path, **options):
    sos.export_model(module, path, **options)
    return tf.saved_model.load(path)


def stored_bytes(path):
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def assets(path):
    return sorted(p.name for p in (path / "assets").iterdir())


# What is exported.


def test_export_model_with_an_unknown_format_names_the_valid_ones(tmp_path):
    with pytest.raises(UsageError, match="'tf_saved_model'.*'tflite3'"):
        sos.export_model(dense(), tmp_path / "model", format="tflite3")
    assert not list(tmp_path.iterdir())


def test_serving_module_of_a_sparse_model_holds_the_plain_one(tmp_path):
    model = sos.sparsify(dense(), "MagnitudePruning", schedule=SCHEDULE)
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        pass
    module = ServingModule(model)
    x = techniques.normal(3, 6)
    np.testing.assert_allclose(module(x), model(x), rtol=1e-6)
    assert not find_wrappers(module.model)
    loaded = exported(module, tmp_path / "model")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6)
    assert [np.count_nonzero(w.numpy() == 0) for w in loaded.weights] == [36, 8]


def test_serving_module_takes_what_a_keras_model_does():
    with pytest.raises(TypeError, match="Keras 3 model"):
        ServingModule(tf.Module())
    with pytest.raises(UsageError, match="not built"):
        ServingModule(keras.Sequential([keras.layers.Dense(2)]))


class TwoWays(ServingModule):
    """Adds a signature that computes with the model in a way of its own."""

    def __init__(self, model):
        super().__init__(model)
        self.signatures["scaled"] = self.scaled

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 6], tf.float32, "x"),
            tf.TensorSpec([], tf.float32, "scale"),
        ]
    )
    def scaled(self, x, scale):
        return {"y": scale * self.model(x, training=False)}


def test_serving_module_subclass_adds_a_signature(tmp_path):
    model, path = dense(10_000), tmp_path / "model"
    module = TwoWays(model)
    loaded = exported(module, path)
    assert set(loaded.signatures) == {"serving_default", "scaled"}
    x, expected = techniques.normal(3, 6), model(techniques.normal(3, 6))
    scaled = loaded.signatures["scaled"](x=x, scale=tf.constant(2.0))["y"]
    served = loaded.signatures["serving_default"](features=x)["output_0"]
    for outputs in (loaded(x), served, scaled / 2, loaded.scaled(x, 1.0)["y"]):
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    # Variables are stored once, though the module has the model.
    raw = 4 * model.count_params()
    assert raw < stored_bytes(path) < 1.3 * raw
    # And it can be exported again, to another place.
    assert set(module.signatures) == {"serving_default", "scaled"}
    again = exported(module, tmp_path / "again")
    assert set(again.signatures) == {"serving_default", "scaled"}


class OwnCall(ServingModule):
    @tf.function(input_signature=[tf.TensorSpec([6], tf.float32)])
    def __call__(self, x):
        return self.model(x[tf.newaxis], training=False)[0]


def test_serving_module_subclass_replaces_the_call(tmp_path):
    model, x = dense(), techniques.normal(1, 6)
    module = OwnCall(model)
    loaded = exported(module, tmp_path / "model")
    for function in (module, loaded):
        np.testing.assert_allclose(function(x[0]), model(x)[0], rtol=1e-6)
    served = loaded.signatures["serving_default"](features=x)["output_0"]
    np.testing.assert_allclose(served, model(x), rtol=1e-6)


# Vocabularies and other assets.


def lookup_model(layer):
    model = keras.Sequential([keras.Input((1,), dtype="string"), layer])
    return model, tf.constant([["two"], ["nothing"]])


@pytest.mark.parametrize("from_file", [False, True])
def test_export_keeps_the_vocabulary_of_a_layer(from_file, tmp_path):
    file, path = tmp_path / "words.txt", tmp_path / "model"
    file.write_text("\n".join(WORDS) + "\n")
    model, text = lookup_model(
        keras.layers.StringLookup(vocabulary=str(file) if from_file else WORDS)
    )
    expected = model(text).numpy().tolist()
    sos.export_model(model, path)
    # The export has a copy.
    file.unlink()
    assert expected == [[2], [0]]
    assert tf.saved_model.load(path)(text).numpy().tolist() == expected


def test_export_of_a_sparse_model_keeps_its_vocabulary(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            keras.layers.TextVectorization(
                vocabulary=WORDS, output_sequence_length=4
            ),
            keras.layers.Embedding(5, 8),
        ]
    )
    sparse = sos.sparsify(model, "MagnitudePruning", schedule=SCHEDULE)
    text = tf.constant(["two", "one three two"])
    loaded = exported(sparse, tmp_path / "model")
    np.testing.assert_allclose(loaded(text), sparse(text))


@keras.saving.register_keras_serializable(package="serving_test")
class OwnTable(keras.layers.Layer):
    """A layer with a table, an asset and a variable that Keras ignores."""

    def __init__(self, file, **kwargs):
        super().__init__(**kwargs)
        self.asset = tf.saved_model.Asset(file)
        self.table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(WORDS, [1, 2, 3]), 0
        )
        self.offset = tf.Variable(10)

    def call(self, inputs):
        lines = tf.strings.split(tf.io.read_file(self.asset), "\n")
        return self.table.lookup(inputs) + self.offset + tf.size(lines)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, "int32")


def test_export_keeps_what_a_layer_holds_outside_of_keras(tmp_path):
    file, path = tmp_path / "lines.txt", tmp_path / "model"
    file.write_text("a\nb\nc")
    model, text = lookup_model(OwnTable(str(file)))
    sos.export_model(model, path)
    file.unlink()
    assert assets(path) == ["lines.txt"]
    assert tf.saved_model.load(path)(text).numpy().tolist() == [[15], [13]]


class Reverser(tf.Module):
    """Text in, text out: a module that has nothing of Keras."""

    def __init__(self, file):
        super().__init__()
        self.vocabulary = tf.saved_model.Asset(str(file))
        self.ids = tf.lookup.StaticHashTable(
            self._initializer(tf.string, tf.int64), -1
        )
        self.words = tf.lookup.StaticHashTable(
            self._initializer(tf.int64, tf.string), "?"
        )
        self.last = tf.Variable(len(WORDS) - 1, dtype=tf.int64)
        self.signatures = {"reverse": self.reverse}

    def _initializer(self, key, value):
        kinds = {
            tf.string: tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64: tf.lookup.TextFileIndex.LINE_NUMBER,
        }
        return tf.lookup.TextFileInitializer(
            self.vocabulary, key, kinds[key], value, kinds[value]
        )

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def reverse(self, text):
        words = tf.strings.split(text)
        ids = self.ids.lookup(words.flat_values)
        ids = tf.where(ids < 0, ids, self.last - ids)
        words = words.with_flat_values(self.words.lookup(ids))
        return {"text": tf.strings.reduce_join(words, axis=-1, separator=" ")}


@pytest.mark.parametrize("place", ["disk", "object store"])
def test_export_of_a_module_from_text_to_text(place, tmp_path):
    file, path = tmp_path / "words.txt", tmp_path / "model"
    file.write_text("\n".join(WORDS) + "\n")
    if place == "object store":
        path = "ram://serving_test/model"
    module = Reverser(file)
    sos.export_model(module, path)
    assert set(module.signatures) == {"reverse"}
    # The export has a copy, and does not know where it came from.
    file.unlink()
    if place == "disk":
        assert assets(path) == ["words.txt"]
        path = path.rename(tmp_path / "elsewhere")
    loaded = tf.saved_model.load(path)
    text = tf.constant(["one two", "three four one"])
    reversed_text = loaded.signatures["reverse"](text=text)["text"]
    assert reversed_text.numpy().tolist() == [b"three two", b"one ? three"]


# Invalid modules.


class WithSignatures(tf.Module):
    def __init__(self, signatures):
        super().__init__()
        self.signatures = signatures


@tf.function
def untyped(x):
    return x


@tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
def typed(x):
    return {"y": x + 1}


@pytest.mark.parametrize(
    "function", [typed, typed.get_concrete_function()], ids=["typed", "traced"]
)
def test_export_of_traced_or_typed_signatures_succeeds(function, tmp_path):
    loaded = exported(WithSignatures({"f": function}), tmp_path / "model")
    assert loaded.signatures["f"](x=tf.constant(1.0))["y"].numpy() == 2


@pytest.mark.parametrize(
    ("signatures", "message"),
    [
        ({}, "at least one entry"),
        ({"f": untyped}, r"tf\.function\(input_signature=.*'f'"),
        ({"f": len}, "Received: 'f': <built-in"),
    ],
)
def test_export_of_invalid_signatures_raises(signatures, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        sos.export_model(WithSignatures(signatures), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_export_of_a_module_without_signatures_raises(tmp_path):
    with pytest.raises(TypeError, match="`signatures`"):
        sos.export_model(tf.Module(), tmp_path / "model")


def test_export_of_a_module_takes_no_input_signature(tmp_path):
    spec = tf.TensorSpec([])
    with pytest.raises(UsageError, match="`input_signature`"):
        sos.export_model(
            WithSignatures({"f": typed}), tmp_path / "m", input_signature=spec
        )


def failing(x):
    raise RuntimeError("a bug in the task")


def test_export_lets_errors_of_a_signature_propagate(tmp_path):
    function = tf.function(failing, input_signature=[tf.TensorSpec([])])
    with pytest.raises(RuntimeError, match="a bug in the task"):
        sos.export_model(WithSignatures({"f": function}), tmp_path / "model")


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
def test_export_to_a_place_that_cannot_be_written_names_it():
    path = pathlib.Path("/dev/null/model")
    module = WithSignatures({"f": typed})
    with pytest.raises(StorageError) as error:
        sos.export_model(module, path)
    assert "\n" not in str(error.value)
    assert f"could not be exported to {path}: " in str(error.value)
    # It can still be exported somewhere else.
    assert set(module.signatures) == {"f"}
