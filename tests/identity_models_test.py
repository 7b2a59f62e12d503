"""A sparse model is of its class, and what copies it copies all of it."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.wrappers.base import find_wrappers
from tests.support.layers import BATCH, array

pytest.register_assert_rewrite("tests.support.identity")

from tests.support.identity import (  # noqa: E402
    assert_bits,
    assert_identity,
    assert_same,
    assert_same_state,
    compile_model,
    equalize_seeds,
    fit,
    halves,
    masked_values,
    ones,
    own_variables,
    save_and_load,
    two_batches,
    without_number,
)


def sparse_weights(model):
    return [w for x in find_wrappers(model) for w in x.sparse_weights]


def rows():
    return array((8,))


def chain():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(6, "relu", name="a"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="b"),
        ],
        name="chain",
    )


def shared_layer():
    """One layer that is called twice."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    twice = layers.Dense(8, "tanh", name="twice")
    outputs = layers.Dense(2, name="out")(twice(twice(inputs)))
    return keras.Model(inputs, outputs, name="shared_layer")


def shared_in_submodels():
    """One layer in two submodels, and one submodel called twice."""
    keras.utils.set_random_seed(0)
    shared = layers.Dense(8, "tanh", name="shared")
    first = keras.Sequential(
        [keras.Input((8,)), shared, layers.Dense(8, name="of_first")],
        name="first",
    )
    second = keras.Sequential([keras.Input((8,)), shared], name="second")
    inputs = keras.Input((8,))
    x = layers.Add(name="add")([first(inputs), second(first(inputs))])
    outputs = layers.Dense(2, name="out")(x)
    return keras.Model(inputs, outputs, name="shared_in_submodels")


def nested():
    """A functional model in a Sequential one in a functional one."""
    keras.utils.set_random_seed(0)
    a = keras.Input((8,))
    hidden = layers.Dense(6, "relu", name="hidden")(a)
    inner = keras.Model(
        a, layers.Concatenate(name="join")([a, hidden]), name="inner"
    )
    middle = keras.Sequential(
        [
            keras.Input((8,)),
            inner,
            layers.Dense(4, name="middle_dense"),
            layers.Dropout(0.3, name="drop"),
        ],
        name="middle",
    )
    b = keras.Input((8,))
    outputs = layers.Dense(2, name="out")(middle(b))
    return keras.Model(b, outputs, name="nested")


@pytest.mark.parametrize(
    "make", [chain, shared_layer, shared_in_submodels, nested]
)
def test_model_under_ones_equals_dense(make, tmp_path):
    dense = make()
    # Keras itself does not load a layer that stands in two submodels.
    directory = None if make is shared_in_submodels else tmp_path
    sparse = assert_identity(dense, two_batches(rows()), directory)
    assert type(sparse) is type(dense)
    assert len(sparse_weights(sparse)) == sum(
        len(v.shape) == 2 for v in dense.trainable_variables
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "jit_compile"),
    [
        (chain, True),
        (shared_layer, False),
        (shared_in_submodels, False),
        (nested, True),
    ],
)
def test_model_under_ones_in_traced_steps_equals_dense(
    make, jit_compile, tmp_path
):
    dense = make()
    sparse = ones(dense)
    for model in (dense, sparse):
        model.compile("adam", "mse", jit_compile=jit_compile)
    data = two_batches(rows())
    assert_same(fit, dense, sparse, data)
    assert_same_state(dense, sparse)


def test_layer_called_twice_is_one_layer_in_copies_and_files(tmp_path):
    dense = shared_layer()
    sparse = halves(dense)
    loaded = save_and_load(sparse, tmp_path)
    for model in (sparse, loaded, sos.strip(loaded)):
        assert len(own_variables(model)) == len(dense.variables)
        assert_bits(sparse(rows()), model(rows()))
    assert len(sparse_weights(loaded)) == len(sparse_weights(sparse)) == 2


def test_layer_in_two_submodels_is_one_layer_in_copies():
    dense = shared_in_submodels()
    sparse = halves(dense)
    assert len(sparse_weights(sparse)) == 3
    for model in (sparse, sos.strip(sparse)):
        assert len(own_variables(model)) == len(dense.variables)
        first, second = model.get_layer("first"), model.get_layer("second")
        assert first.get_layer("shared") is second.get_layer("shared")
        assert_bits(sparse(rows()), model(rows()))


def test_several_inputs_and_outputs_under_ones_equal_dense(tmp_path):
    keras.utils.set_random_seed(0)
    a, b = keras.Input((8,), name="a"), keras.Input((3,), name="b")
    hidden = layers.Dense(6, "tanh", name="hidden")
    both = layers.Concatenate(name="both")([hidden(a), b])
    outputs = {
        "x": layers.Dense(2, name="x")(both),
        "y": layers.Dense(1, name="y")(hidden(a)),
    }
    dense = keras.Model({"a": a, "b": b}, outputs)
    sparse = ones(dense)
    values = {"a": array((8,)), "b": array((3,))}
    targets = {"x": array((2,)), "y": array((1,))}
    weights = {"x": np.arange(BATCH), "y": np.ones(BATCH)}
    data = tf.data.Dataset.from_tensors((values, targets, weights)).repeat(2)
    for model in (dense, sparse):
        compile_model(
            model,
            eager=True,
            loss={"x": "mse", "y": "mae"},
            loss_weights={"x": 1.0, "y": 0.5},
            weighted_metrics={"x": ["mae"], "y": []},
        )
    assert sparse.output_names == dense.output_names
    assert_same(fit, dense, sparse, data)
    assert_same_state(dense, sparse)
    loaded = save_and_load(sparse, tmp_path)
    assert_bits(dense(values), loaded(values))
    assert_bits(dense(values), sos.strip(sparse)(values))


@keras.saving.register_keras_serializable(package="identity_models_test")
class Coder(keras.Model):
    """A user's model with several entry points and a training of its own."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, "tanh")
        self.recur = layers.Dense(units, use_bias=False)
        self.second = layers.Dense(2)
        self.drop = layers.Dropout(0.3)
        self.seen = keras.metrics.Mean(name="seen")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.recur.build((None, self.units))
        self.second.build((None, self.units))

    def encode(self, inputs):
        return self.first(inputs)

    def step(self, inputs, state):
        return tf.tanh(self.first(inputs) + self.recur(state))

    def call(self, inputs, training=False):
        state = self.step(inputs, self.encode(inputs))
        return self.second(self.drop(state, training=training))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = tf.reduce_mean(tf.abs(outputs - y))
            loss += tf.reduce_mean(tf.square(self.encode(x)))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.seen.update_state(loss)
        return {"own_loss": loss, "seen": self.seen.result()}

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def coder():
    keras.utils.set_random_seed(0)
    model = Coder(name="coder")
    model(rows())
    return model


@pytest.mark.parametrize("eager", [True, False])
def test_users_model_with_its_own_train_step_under_ones_equals_dense(
    eager, tmp_path
):
    dense = coder()
    data = two_batches(rows())
    sparse = assert_identity(dense, data, tmp_path, eager=eager)
    assert len(sparse_weights(sparse)) == 3
    assert set(fit(sparse, data)) == {"own_loss", "seen"}


def test_entry_points_of_a_users_model_see_the_zeros(tmp_path):
    sparse = halves(coder())
    assert isinstance(sparse, Coder)
    oracle = coder()
    for variable, value in zip(
        oracle.variables, masked_values(sparse), strict=True
    ):
        variable.assign(value)
    plain, loaded = sos.strip(sparse), save_and_load(sparse, tmp_path)
    assert type(plain) is Coder and isinstance(loaded, Coder)
    state = array((4,))
    for model in (sparse, plain, loaded):
        assert_bits(model.encode(rows()), oracle.encode(rows()))
        assert_bits(model.step(rows(), state), oracle.step(rows(), state))
        assert_bits(model(rows()), oracle(rows()))
        traced = tf.function(model.encode)
        assert_bits(traced(rows()), tf.function(oracle.encode)(rows()))


@keras.saving.register_keras_serializable(package="identity_models_test")
class Generator(keras.Model):
    """A functional model with a method of its own, as KerasHub's are."""

    def __init__(self, units=8, **kwargs):
        inputs = keras.Input((8,))
        hidden = layers.Dense(units, name="hidden")(inputs)
        outputs = layers.Dense(2, name="out")(hidden)
        super().__init__(inputs, outputs, **kwargs)
        self.units = units
        self.hidden = self.get_layer("hidden")

    def get_config(self):
        return {"name": self.name, "units": self.units}

    def generate(self, x):
        return self.hidden(self(x) @ tf.ones((2, 8))) * 2


def generator():
    keras.utils.set_random_seed(0)
    return Generator(name="generator")


def test_functional_subclass_under_ones_equals_dense(tmp_path):
    dense = generator()
    sparse = assert_identity(dense, two_batches(rows()), tmp_path)
    assert_bits(dense.generate(rows()), sparse.generate(rows()))
    loaded = save_and_load(sparse, tmp_path)
    assert isinstance(loaded, Generator)
    assert_bits(dense.generate(rows()), loaded.generate(rows()))


@pytest.mark.parametrize("copied", [True, False])
def test_functional_subclass_keeps_its_methods(copied, tmp_path):
    sparse = halves(generator(), copy=copied)
    assert isinstance(sparse, Generator)
    oracle = generator()
    for variable, value in zip(
        oracle.variables, masked_values(sparse), strict=True
    ):
        variable.assign(value)
    loaded = save_and_load(sparse, tmp_path)
    plain = sos.strip(sparse)
    assert type(plain) is Generator
    for model in (sparse, loaded, plain):
        # The attribute is the layer of the graph, not a dense copy of it.
        assert model.hidden is model.get_layer("hidden")
        assert_bits(model.generate(rows()), oracle.generate(rows()))


@keras.saving.register_keras_serializable(package="identity_models_test")
class Projection(layers.Layer):
    """A product with the table of another layer, whose variable it holds."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def build(self, input_shape):
        if not self.embedding.built:
            self.embedding.build(None)
        self.table = self.embedding.embeddings
        self.matrix = self.add_weight(
            shape=(input_shape[-1], self.table.shape[-1]), name="matrix"
        )

    def call(self, inputs):
        return (inputs @ self.matrix) @ tf.transpose(self.table)


@keras.saving.register_keras_serializable(package="identity_models_test")
class Tied(keras.Model):
    """Two layers that share a table."""

    def __init__(self, units=3, **kwargs):
        embedding = layers.Embedding(7, units, name="embedding")
        tokens = keras.Input((4,), dtype="int32")
        x = layers.GlobalAveragePooling1D(name="mean")(embedding(tokens))
        x = layers.Dense(5, "tanh", name="dense")(x)
        outputs = Projection(embedding, name="projection")(x)
        super().__init__(tokens, outputs, **kwargs)
        self.units = units

    def get_config(self):
        return {"name": self.name, "units": self.units}


@keras.saving.register_keras_serializable(package="identity_models_test")
class TiedSubclass(keras.Model):
    """As `Tied`, without a graph of layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(7, 3)
        self.dense = layers.Dense(5, "tanh")
        self.projection = Projection(self.embedding)

    def build(self, input_shape):
        self.embedding.build(input_shape)
        self.dense.build((None, 3))
        self.projection.build((None, 5))

    def call(self, tokens):
        x = tf.reduce_mean(self.embedding(tokens), axis=1)
        return self.projection(self.dense(x))


def tied(cls):
    keras.utils.set_random_seed(0)
    model = cls(name="tied")
    model(array("tokens"))
    return model


@pytest.mark.parametrize("cls", [Tied, TiedSubclass])
def test_layers_that_share_a_table_under_ones_equal_dense(cls, tmp_path):
    dense = tied(cls)
    data = two_batches(array("tokens"), 7)
    sparse = assert_identity(dense, data, tmp_path)
    assert len(sparse_weights(sparse)) == 3
    assert len(own_variables(sparse)) == len(dense.variables)


@pytest.mark.parametrize("cls", [Tied, TiedSubclass])
def test_layers_that_share_a_table_see_the_same_zeros(cls, tmp_path):
    sparse = halves(tied(cls))
    values = masked_values(sparse)
    assert len(values) == 4
    oracle = tied(cls)
    for variable, value in zip(oracle.variables, values, strict=True):
        variable.assign(value)
    tokens = array("tokens")
    for model in (sparse, save_and_load(sparse, tmp_path), sos.strip(sparse)):
        np.testing.assert_allclose(
            model(tokens), oracle(tokens), rtol=1e-6, atol=1e-7
        )
        projection = next(
            x for x in model._flatten_layers() if isinstance(x, Projection)
        )
        assert projection.table is projection.embedding.embeddings


def masks_of(model):
    return [w.state["mask"].numpy() for w in sparse_weights(model)]


def assert_is_copy(new, model):
    assert isinstance(new, type(model))
    assert not {id(v) for v in new.variables} & {id(v) for v in model.variables}
    assert_bits(masks_of(new), masks_of(model), "masks")
    assert [w.path for w in sparse_weights(new)] == [
        w.path for w in sparse_weights(model)
    ]
    equalize_seeds(model, new)
    assert_same_state(model, new)
    assert_bits(model(rows()), new(rows()))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


MODELS = [chain, nested, shared_layer, coder, generator]


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", MODELS)
def test_copies_by_python_keep_sparsity(make, how):
    model = halves(make())
    assert all(0 < mask.mean() < 1 for mask in masks_of(model))
    assert_is_copy(how(model), model)


def test_copies_of_one_sparse_layer_keep_sparsity():
    model = halves(chain())
    layer = model.get_layer("a")
    for new in (
        copy.deepcopy(layer),
        pickled(layer),
        sos.FixedMask(layers.Dense(6), sparsity=0.5),
    ):
        if not new.built:
            new.build((None, 8))
            new = copy.deepcopy(new)
        (weight,) = sparse_weights(new)
        assert weight.state["mask"].numpy().mean() == 0.5
        zeros = weight.state["mask"].numpy() == 0
        expected = np.where(zeros, 0, weight.variable.numpy())
        bias = keras.ops.convert_to_numpy(own_variables(new)[1])
        outputs = rows() @ expected + bias
        if new.name == "a":
            outputs = np.maximum(outputs, 0)
        np.testing.assert_allclose(new(rows()), outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [chain, nested, shared_layer])
def test_clone_model_keeps_sparsity(make):
    model = halves(make())
    new = keras.models.clone_model(model)
    assert len(sparse_weights(new)) == len(sparse_weights(model)) > 1
    new.set_weights(model.get_weights())
    assert_is_copy(new, model)


def test_submodel_of_a_sparse_model_keeps_sparsity(tmp_path):
    model = halves(chain())
    part = keras.Model(model.inputs, model.get_layer("norm").output)
    assert len(sparse_weights(part)) == 1
    loaded = save_and_load(part, tmp_path)
    assert_is_copy(loaded, part)
    # As a layer of a new model.
    outer = keras.Sequential([keras.Input((8,)), part, layers.Dense(2)])
    assert len(sparse_weights(outer)) == 1
    loaded = save_and_load(outer, tmp_path)
    assert_is_copy(loaded, outer)
    compile_model(outer, eager=True)
    fit(outer, two_batches(rows()))
    assert_bits(sos.strip(outer)(rows()), outer(rows()))


def test_weights_file_keeps_masks(tmp_path):
    for make in MODELS:
        model, other = halves(make()), ones(make())
        path = tmp_path / "model.weights.h5"
        model.save_weights(path)
        other.load_weights(path)
        assert_bits(masks_of(model), masks_of(other))
        assert_bits(model(rows()), other(rows()))


@pytest.mark.parametrize("make", MODELS)
def test_report_counts_the_parameters_of_the_dense_model(make):
    dense = make()
    sparse = halves(dense)
    report = sos.sparsity_report(sparse)
    assert report.totals["size"] == dense.count_params()
    assert len(report.rows) == len(dense.weights)
    assert sum(int(np.prod(v.shape)) for v in sparse.trainable_weights) == sum(
        int(np.prod(v.shape)) for v in dense.trainable_weights
    )
    assert sos.strip(sparse).count_params() == dense.count_params()


@pytest.mark.parametrize("make", MODELS)
def test_sparse_layers_are_of_their_classes(make):
    dense = make()
    before = type(dense)
    sparse = halves(dense)
    assert isinstance(sparse, before)
    if before in (keras.Sequential, keras.Model):
        assert type(sparse) is before
    for old, new in zip(dense.layers, sparse.layers, strict=True):
        assert isinstance(new, type(old))
        assert without_number(new.name) == without_number(old.name)
    # The model that was given stays what it was.
    assert type(dense) is before and not find_wrappers(dense)
    plain = sos.strip(sparse)
    for old, new in zip(dense.layers, plain.layers, strict=True):
        assert type(new) is type(old)


@pytest.mark.parametrize("make", MODELS)
def test_sparsify_without_copy_makes_the_model_itself_sparse(make):
    model = make()
    variables = {id(v) for v in model.variables}
    outputs = model.predict(rows(), verbose=0)
    sparse = ones(model, copy=False)
    assert sparse is model
    assert variables < {id(v) for v in sparse.variables}
    assert_bits(outputs, sparse.predict(rows(), verbose=0))
    # What was traced before knows the plain calls.
    weights = sparse_weights(sparse)
    for weight in weights:
        weight.state["mask"].assign(np.zeros(weight.variable.shape))
    after = sparse.predict(rows(), verbose=0)
    assert np.all(after == after[:1]), "no input reaches the outputs"
