import json
import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops

import sos
from sos.errors import UsageError
from sos.wrappers.base import find_wrappers
from tests.support import techniques

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCHEDULE = sos.schedules.ConstantSparsity(0.5, begin_step=0, frequency=1)


@keras.saving.register_keras_serializable(package="surgery_test")
class Subclassed(keras.Model):
    """With `get_config` and `build`."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="relu")
        self.norm = layers.BatchNormalization()
        self.last = layers.Dense(2)

    def build(self, input_shape):
        self.first.build(input_shape)
        self.norm.build((None, self.units))
        self.last.build((None, self.units))

    def call(self, inputs, training=False):
        return self.last(self.norm(self.first(inputs), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="surgery_test")
class WithoutBuild(keras.Model):
    """Built by its first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


class WithoutConfig(keras.Model):
    """An argument that `get_config` does not know of."""

    def __init__(self, units):
        super().__init__()
        self.dense = layers.Dense(units)

    def call(self, inputs):
        return self.dense(inputs)


def sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="first"),
            layers.Dropout(0.2),
            layers.Dense(4, name="last"),
        ]
    )


def image():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )


def functional():
    """Several inputs and outputs, lists, shared layers and operations."""
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    shared = layers.Dense(6, activation="tanh", name="shared")
    x, y = shared(a), shared(shared(b))
    both = layers.Concatenate()([x, y])
    both = ops.relu(both) * 2.0 + ops.mean(both, axis=-1, keepdims=True)
    both = layers.Add()([layers.Dense(6)(both), a])
    return keras.Model(
        {"a": a, "b": b}, {"u": layers.Dense(2, name="u")(both), "v": both + y}
    )


def nested():
    inner_input = keras.Input((8,))
    inner = keras.Model(
        inner_input,
        layers.Add()([layers.Dense(8, name="deep")(inner_input), inner_input]),
        name="inner",
    )
    block = keras.Sequential([layers.Dense(8), layers.ReLU()], name="block")
    inputs = keras.Input((6,))
    x = block(inputs)
    x = inner(inner(x))
    return keras.Model(inputs, layers.Dense(2)(x), name="outer")


def with_lambda():
    inputs = keras.Input((6,))
    x = layers.Lambda(lambda x: x * 2.0)(layers.Dense(4)(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))


def recurrent():
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, mask_zero=True),
            layers.LSTM(4, name="lstm"),
            layers.Dense(2),
        ]
    )


def transformer():
    inputs = keras.Input((5, 4))
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs, use_causal_mask=True)
    x = layers.LayerNormalization()(inputs + x)
    return keras.Model(inputs, layers.Dense(2)(x))


def subclassed():
    model = Subclassed()
    model.build((None, 6))
    return model


def without_build():
    model = WithoutBuild()
    model(np.ones((2, 6), "float32"))
    return model


def subclass_inside():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(2)(Subclassed()(inputs)))


MODELS = [
    sequential,
    image,
    functional,
    nested,
    with_lambda,
    recurrent,
    transformer,
    subclassed,
    without_build,
    subclass_inside,
]


def inputs_of(model):
    generator = np.random.default_rng(0)

    def array(tensor):
        shape = (3, *tensor.shape[1:])
        if tensor.dtype == "int32":
            return generator.integers(0, 7, shape).astype("int32")
        return generator.normal(size=shape).astype("float32")

    if isinstance(model, Subclassed | WithoutBuild):
        return generator.normal(size=(3, 6)).astype("float32")
    if isinstance(model, keras.Sequential):
        return array(model.inputs[0])
    return keras.tree.map_structure(array, model.input)


def predict(model, inputs):
    return keras.tree.map_structure(
        keras.ops.convert_to_numpy, model(inputs, training=False)
    )


def assert_same(a, b, **tolerance):
    compare = (
        np.testing.assert_allclose
        if tolerance
        else np.testing.assert_array_equal
    )
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        compare(x, y, **tolerance)


def sparse_of(model, technique=sos.MagnitudePruning, **kwargs):
    return sos.sparsify(
        model, technique, **techniques.arguments(technique, **kwargs)
    )


# sparsify


@pytest.mark.parametrize("make", MODELS)
def test_sparsify_copies_and_leaves_the_original_alone(make):
    model = make()
    inputs = inputs_of(model)
    outputs, before = predict(model, inputs), techniques.values(model)
    sparse = sparse_of(model)
    assert sparse.name == model.name
    assert_same(predict(sparse, inputs), outputs)
    assert not {id(v) for v in sparse.variables} & {
        id(v) for v in model.variables
    }
    assert not {id(x) for x in sparse._flatten_layers()} & {
        id(x) for x in model._flatten_layers()
    }
    losses = techniques.train(sparse, inputs, steps=2)
    assert np.isfinite(losses).all()
    report = sos.sparsity_report(sparse)
    assert 0.45 < report.sparsity < 0.55
    assert_same(techniques.values(model), before)
    assert_same(predict(model, inputs), outputs)
    assert model.trainable


@pytest.mark.parametrize("make", MODELS)
def test_sparsify_without_copy_shares_variables(make):
    model = make()
    inputs = inputs_of(model)
    outputs = predict(model, inputs)
    sparse = sparse_of(model, copy=False)
    assert {id(v) for v in model.variables} <= {id(v) for v in sparse.variables}
    assert_same(predict(sparse, inputs), outputs)
    before = techniques.values(model)
    techniques.train(sparse, inputs)
    assert any(
        np.any(a != b)
        for a, b in zip(before, techniques.values(model), strict=True)
    )


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("make", "technique"),
    [
        (make, technique)
        for make in (functional, nested, recurrent, subclassed)
        for technique in techniques.TECHNIQUES
        # These run the code of magnitude pruning.
        if make in (functional, recurrent)
        or technique not in (sos.RandomPruning, sos.FixedMask)
    ],
)
def test_sparse_model_of_each_technique_trains_saves_and_strips(
    make, technique, tmp_path
):
    model = make()
    inputs = inputs_of(model)
    sparse = sparse_of(model, technique)
    losses = techniques.train(
        sparse,
        inputs,
        steps=2,
        traced=make is functional and technique is sos.VariationalDropout,
    )
    assert np.isfinite(losses).all()
    techniques.make_zeros(sparse)
    outputs = predict(sparse, inputs)
    sparse.save(tmp_path / "sparse.keras")
    loaded = keras.models.load_model(tmp_path / "sparse.keras")
    assert_same(predict(loaded, inputs), outputs)
    for source in (sparse, loaded):
        assert_same(predict(sos.strip(source), inputs), outputs)


def test_sparsify_with_rules_applies_them_by_path():
    keras.utils.set_random_seed(0)
    model = recurrent()
    sparse = sos.sparsify(
        model,
        sos.MagnitudePruning,
        schedule=SCHEDULE,
        rules={
            "embedding": {
                "technique": "VariationalDropout",
                "penalty_weight": 1,
            },
            r"lstm_cell/kernel": {"sparsity": 0.75},
            r"recurrent_kernel": {
                "technique": "L0Regularization",
                "penalty_weight": 0.1,
            },
            r"dense.*/kernel": None,
        },
    )
    lstm = sparse.get_layer("lstm")
    kinds = {type(technique) for technique in lstm.techniques}
    assert kinds == {sos.MagnitudePruning, sos.L0Regularization}
    rows = [r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1]
    assert [row["technique"] for row in rows] == [
        "VariationalDropout",
        "MagnitudePruning",
        "L0Regularization",
        "",
    ]
    inputs = inputs_of(model)
    assert np.isfinite(techniques.train(sparse, inputs, steps=2)).all()
    rows = [r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1]
    assert rows[1]["sparsity"] == rows[1]["target"] == 0.75
    assert "left dense by rule 'dense.*/kernel'" == rows[3]["reason"]
    techniques.make_zeros(sparse)
    plain = sos.strip(sparse)
    assert_same(predict(plain, inputs), predict(sparse, inputs))


def test_sparsify_with_a_technique_as_a_rule_applies_it():
    sparse = sparse_of(
        sequential(),
        sos.MagnitudePruning,
        rules={"first": sos.FixedMask, "last": "MagnitudePruning"},
    )
    rows = [r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1]
    assert [row["technique"] for row in rows] == [
        "FixedMask",
        "MagnitudePruning",
    ]


def test_sparsify_with_sparsities_of_one_layer_keeps_them_in_files(tmp_path):
    keras.utils.set_random_seed(0)
    model = recurrent()
    sparse = sparse_of(
        model, rules={r"lstm_cell/kernel": {"sparsity": 0.25}, "bedd": None}
    )
    inputs = inputs_of(model)
    techniques.train(sparse, inputs, steps=2)
    rows = [r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1]
    assert [row["sparsity"] for row in rows] == [0, 0.25, 0.5, 0.5]
    path = tmp_path / "model.keras"
    sparse.save(path)
    loaded = keras.models.load_model(path)
    assert_same(predict(loaded, inputs), predict(sparse, inputs))
    assert sos.sparsity_report(loaded).sparsity == (
        sos.sparsity_report(sparse).sparsity
    )


def test_sparsify_with_rules_of_two_layers_applies_each():
    sparse = sparse_of(
        sequential(), rules={"first": None, "last": {"sparsity": 0.8}}
    )
    first, last = (r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1)
    assert (first["technique"], first["target"]) == ("", None)
    assert (last["technique"], last["target"]) == ("MagnitudePruning", 0.8)
    assert type(sparse.get_layer("first")) is layers.Dense


def test_sparsify_with_techniques_in_rules_alone_leaves_the_rest_dense():
    sparse = sos.sparsify(
        sequential(),
        rules={"last": {"technique": "FixedMask", "sparsity": 0.25}},
    )
    first, last = (r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1)
    assert first["reason"] == "left dense by no rule"
    assert last["sparsity"] == 0.25


def test_report_of_a_sparse_model_accounts_for_every_weight():
    model = image()
    model.layers[0].trainable = False
    sparse = sparse_of(model, rules={"depthwise": None})
    rows = sos.sparsity_report(sparse).rows
    assert len(rows) == len(model.weights)
    for row in rows:
        assert bool(row["technique"]) != bool(row["reason"]), row
    notes = {row["weight"]: row["reason"] for row in rows}
    assert notes["conv/kernel"] == "not trainable"
    assert not sparse.get_layer("conv").trainable


def test_report_of_a_recurrent_cell_says_that_whole_weights_are_sampled():
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.RNN(layers.LSTMCell(4, name="cell")),
            layers.Dense(2, name="dense"),
        ]
    )
    sparse = sos.sparsify(model, "VariationalDropout", penalty_weight=1e-3)
    rows = sos.sparsity_report(sparse).rows
    notes = [row["reason"] for row in rows if row["technique"]]
    assert notes == ["sampled as a whole"] * 2 + [""]


def test_sparsify_of_frozen_layers_keeps_them_frozen():
    model = sequential()
    model.get_layer("last").trainable = False
    sparse = sparse_of(model)
    assert len(sparse.trainable_variables) == 2


@pytest.mark.oldest
def test_sparsify_of_a_compiled_model_trains():
    model = sequential()
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 4)), verbose=0)
    sparse = sparse_of(model)
    sparse.compile("sgd", "mse")
    sparse.fit(
        np.ones((4, 6)),
        np.ones((4, 4)),
        callbacks=[sos.SparsityCallback()],
        verbose=0,
    )
    assert sos.sparsity_report(sparse).sparsity == 0.5


def test_fine_tuning_starts_from_the_dense_accuracy():
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(256, 6)).astype("float32")
    y = np.argmax(x[:, :4], axis=1)
    model = sequential()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=8, verbose=0)
    dense = model.evaluate(x, y, verbose=0)
    assert dense[1] > 0.9
    schedule = sos.schedules.PolynomialDecay(0, 0.5, 0, 16, frequency=4)
    sparse = sos.sparsify(model, "MagnitudePruning", schedule=schedule)
    sparse.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    np.testing.assert_allclose(
        sparse.evaluate(x, y, verbose=0), dense, rtol=1e-5
    )
    sparse.fit(x, y, epochs=6, callbacks=[sos.SparsityCallback()], verbose=0)
    assert sos.sparsity_report(sparse).sparsity == 0.5
    assert sparse.evaluate(x, y, verbose=0)[1] > dense[1] - 0.05


# Names.


@pytest.mark.parametrize("name", [None, "net"])
def test_rules_and_report_leave_out_the_models_own_name(name):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, name="first"),
            layers.Dense(4, name="last"),
        ],
        name=name,
    )
    assert model.weights[0].path == f"{model.name}/first/kernel"
    sparse = sparse_of(model, rules={r"^first/": None})
    rows = [r for r in sos.sparsity_report(sparse).rows if r["rank"] > 1]
    assert [row["weight"] for row in rows] == ["first/kernel", "last/kernel"]
    assert [bool(row["technique"]) for row in rows] == [False, True]


def towers():
    """Two nested models whose layers have equal names."""

    def tower(name):
        inputs = keras.Input((6,))
        outputs = layers.Dense(40, name="dense")(inputs)
        return keras.Model(inputs, outputs, name=name)

    inputs = keras.Input((6,))
    outputs = [tower("left")(inputs), tower("right")(inputs)]
    return keras.Model(inputs, outputs)


def test_equal_names_in_nested_models_get_random_masks_of_their_own(tmp_path):
    sparse = sparse_of(towers(), sos.RandomPruning)
    sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    found = []
    for model in (sparse, loaded):
        with sos.SparsityUpdater(model, keras.optimizers.SGD()):
            left, right = (
                np.ravel(wrapper.sparse_weights[0].state["mask"])
                for wrapper in find_wrappers(model)
            )
        assert abs(np.corrcoef(left, right)[0, 1]) < 6 / np.sqrt(240)
        found.append((left, right))
    assert_same(*found)


def test_equal_names_in_nested_models_get_noise_of_their_own():
    sparse = sparse_of(towers(), sos.L0Regularization, initial_log_alpha=0.0)
    with sos.SparsityUpdater(sparse, keras.optimizers.SGD()):
        left, right = (
            np.ravel(wrapper.training_weight(weight) / weight.value)
            for wrapper in find_wrappers(sparse)
            for weight in wrapper.sparse_weights
        )
    assert abs(np.corrcoef(left, right)[0, 1]) < 6 / np.sqrt(240)


# What is kept, and what is refused.


def test_sparsify_of_rematerialised_layers_keeps_that():
    with keras.RematScope(mode="full"):
        model = sequential()
    sparse = sparse_of(model)
    modes = [layer._remat_mode for layer in sparse.layers]
    assert [mode.mode for mode in modes] == ["full"] * 3


@keras.saving.register_keras_serializable(package="surgery_test")
class Tied(layers.Layer):
    """Multiplies by the matrix of an embedding."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def call(self, inputs):
        return ops.matmul(inputs, ops.transpose(self.embedding.embeddings))


def tied():
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(7, 4, name="embedding")
    x = embedding(inputs)
    return keras.Model(inputs, Tied(embedding, name="tied")(x))


class OwnLoss(Subclassed):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def own_loss():
    model = OwnLoss()
    model.build((None, 6))
    return model


class OwnTrainStep(Subclassed):
    def train_step(self, data):
        return super().train_step(data)


def own_train_step():
    model = OwnTrainStep()
    model.build((None, 6))
    return model


MAGNITUDE = {"technique": sos.MagnitudePruning, "schedule": SCHEDULE}


@pytest.mark.parametrize(
    "make, arguments, error, message",
    [
        (
            sequential,
            {**MAGNITUDE, "rules": {"conv": None}},
            UsageError,
            r"'conv' matches none.*first/kernel.*last/kernel",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"last": None, "kernel": None}},
            UsageError,
            r"More than one rule matches.*last/kernel",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"(": None}},
            UsageError,
            r"regular expression.*Received: '\('",
        ),
        (
            sequential,
            {**MAGNITUDE, "sparsty": 0.3},
            TypeError,
            r"hyperparameter `sparsty`.*'sparsity'.*'schedule'.*=0.3",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"last": {"treshold": 3}}},
            TypeError,
            r"rule 'last'.*no hyperparameter `treshold`.*Received: treshold=3",
        ),
        (
            sequential,
            {"technique": sos.VariationalDropout, "penalty_weight": -1},
            UsageError,
            r"Received: penalty_weight=-1",
        ),
        (
            sequential,
            {"technique": sos.MagnitudePruning, "end_step": 9},
            TypeError,
            "needs `sparsity`.*or a schedule.*Received: end_step=9",
        ),
        (
            sequential,
            {"technique": "L0Regularization", "seed": 9},
            TypeError,
            "needs `num_examples`.*penalty_weight=None, num_examples=None",
        ),
        (
            sequential,
            {"technique": "L0Regularization"},
            TypeError,
            "needs `num_examples`.*penalty_weight=None, num_examples=None",
        ),
        (sequential, {"schedule": SCHEDULE}, TypeError, "need a `technique`"),
        (
            sequential,
            {"technique": "Magnitude"},
            UsageError,
            r"'FixedMask'.*Received: technique='Magnitude'",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"last": {"sparsity": 2}}},
            UsageError,
            "rule 'last': `sparsity` must be .*Received: sparsity=2",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"last": 0.8}},
            TypeError,
            r"rule 'last'.*Received: 0.8",
        ),
        (
            sequential,
            {"rules": {"last": {"sparsity": 0.8}}},
            UsageError,
            "add the key 'technique'",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"kernel": None}},
            UsageError,
            "left to make sparse",
        ),
        (
            sequential,
            {**MAGNITUDE, "begin_step": 0},
            TypeError,
            r"object excludes `begin_step`.*Received: begin_step=0,",
        ),
        (
            sequential,
            {**MAGNITUDE, "include": "first"},
            TypeError,
            r"Received: \['include'\]",
        ),
        (
            sequential,
            {**MAGNITUDE, "name": "sparse", "paths": {0: "first/kernel"}},
            TypeError,
            r"Received: \['name', 'paths'\]",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"last": {"include": "last"}}},
            TypeError,
            r"Received: \['include'\]",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": ["last"]},
            TypeError,
            r"`rules` must be a dictionary.*Received: rules=\['last'\]",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": ["ab", "cd"]},
            TypeError,
            r"list of such pairs.*Received: rules=\['ab', 'cd'\]",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": [("last", None), ["last", "FixedMask"]]},
            UsageError,
            "Received twice: 'last'",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": [(1, None)]},
            TypeError,
            "regular expression.*layer.*variable.*Received: 1",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": {"last": "Magnitude"}},
            UsageError,
            "rule 'last': The technique must be .*Received: .*'Magnitude'",
        ),
        (
            sequential,
            {**MAGNITUDE, "rules": "last"},
            TypeError,
            "Received: rules='last'",
        ),
        (
            lambda: keras.Sequential([layers.Dense(2)]),
            MAGNITUDE,
            UsageError,
            "not built",
        ),
        (
            lambda: sparse_of(sequential()),
            MAGNITUDE,
            UsageError,
            "sparse layers already",
        ),
        (lambda: layers.Dense(2), MAGNITUDE, TypeError, "Wrap a single layer"),
        (lambda: "model", MAGNITUDE, TypeError, "takes a model of Keras 3"),
    ],
)
def test_sparsify_with_wrong_arguments_raises_before_it_changes_anything(
    make, arguments, error, message
):
    model = make()
    before = len(getattr(model, "variables", ()))
    with pytest.raises(error, match=message):
        sos.sparsify(model, copy=False, **arguments)
    assert len(getattr(model, "variables", ())) == before
    # Nothing is left behind: a right call works afterwards.
    if make is sequential:
        sparse_of(model, copy=False)


def test_sparsify_of_a_model_without_a_config_raises():
    model = WithoutConfig(3)
    model(np.ones((2, 6), "float32"))
    with pytest.raises(TypeError, match=r"get_config.*copy=False"):
        sparse_of(model)
    sparse = sparse_of(model, copy=False)
    techniques.train(sparse, np.ones((2, 6), "float32"))
    assert sos.sparsity_report(sparse).sparsity == 0.5


def test_sparsify_of_a_layer_whose_copy_differs_raises():
    @keras.saving.register_keras_serializable(package="surgery_test")
    class Forgetful(layers.Dense):
        def get_config(self):
            return {**super().get_config(), "units": 5}

    model = keras.Sequential([keras.Input((6,)), Forgetful(3)])
    with pytest.raises(ValueError, match="has other variables than the layer"):
        sparse_of(model)


def test_sparsify_of_keras_2_raises():
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
    with pytest.raises(TypeError, match=r"tf_keras.*Keras 2"):
        sos.sparsify(model, **MAGNITUDE)
    with pytest.raises(TypeError, match=r"tf_keras.*Keras 2"):
        sos.MagnitudePruning(tf_keras.layers.Dense(1), schedule=SCHEDULE)
    for function in (sos.strip, sos.sparsity_report):
        with pytest.raises(TypeError, match="tf_keras"):
            function(model)


# strip


def config_of(path):
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("config.json"))


def load_elsewhere(path, inputs, folder):
    """Predictions by a process that never imports `sos`."""
    np.save(folder / "inputs.npy", inputs)
    program = (
        "import sys, keras, numpy\n"
        f"model = keras.models.load_model({str(path)!r})\n"
        f"outputs = model(numpy.load({str(folder / 'inputs.npy')!r}))\n"
        f"numpy.save({str(folder / 'outputs.npy')!r}, outputs)\n"
        "assert 'sos' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    return np.load(folder / "outputs.npy")


@pytest.mark.parametrize("make", MODELS)
def test_strip_of_each_model_is_plain_with_equal_outputs(make, tmp_path):
    model = make()
    inputs = inputs_of(model)
    sparse = sparse_of(model)
    techniques.make_zeros(sparse)
    plain = sos.strip(sparse)
    assert type(plain) is type(model)
    assert not find_wrappers(plain)
    if make not in (subclassed, without_build):
        names = [[x.name for x in m.layers] for m in (model, sparse, plain)]
        assert names[0] == names[1] == names[2]
    assert_same(predict(plain, inputs), predict(sparse, inputs))
    assert len(plain.weights) == len(model.weights)
    # Traces take most of the time.
    compiled = (False, True) if make in (image, transformer) else ()
    for jit_compile in compiled:
        for each in (plain, sparse):
            each.compile(jit_compile=jit_compile)
        assert_same(
            plain.predict(inputs, verbose=0),
            sparse.predict(inputs, verbose=0),
            rtol=1e-5,
            atol=1e-6,
        )
    plain.save(tmp_path / "plain.keras")
    assert "sos" not in json.dumps(config_of(tmp_path / "plain.keras")).replace(
        "surgery_test", ""
    )
    # A model that was stripped can be made sparse again.
    assert find_wrappers(sparse_of(plain))


@pytest.mark.oldest
def test_strip_saved_loads_without_sos(tmp_path):
    model = transformer()
    inputs = inputs_of(model)
    sparse = sparse_of(model, sos.VariationalDropout)
    techniques.make_zeros(sparse)
    path = tmp_path / "plain.keras"
    sos.strip(sparse).save(path)
    np.testing.assert_allclose(
        load_elsewhere(path, inputs, tmp_path),
        predict(sparse, inputs),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_strip_of_a_wrapper_returns_the_plain_layer(technique):
    layer = techniques.wrap(technique, layers.LSTM(3, name="lstm"))
    inputs = np.ones((2, 4, 3), "float32")
    layer(inputs)
    techniques.make_zeros(layer)
    plain = sos.strip(layer)
    assert type(plain) is layers.LSTM
    assert plain.name == "lstm"
    assert_same(plain(inputs), layer(inputs))


def test_strip_of_wrappers_by_hand_returns_plain_layers():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            techniques.wrap(sos.MagnitudePruning, layers.Dense(4)),
            techniques.wrap(sos.L0Regularization, layers.Dense(4)),
        ]
    )
    techniques.make_zeros(model)
    inputs = inputs_of(model)
    assert_same(predict(sos.strip(model), inputs), predict(model, inputs))


def test_strip_keeps_what_is_not_sparse():
    model = image()
    model.layers[1].moving_mean.assign([1, 2, 3, 4])
    model.get_layer("conv").trainable = False
    plain = sos.strip(sparse_of(model))
    assert_same(plain.layers[1].moving_mean, model.layers[1].moving_mean)
    assert not plain.get_layer("conv").trainable


def test_strip_of_what_it_cannot_do_raises():
    with pytest.raises(TypeError, match="takes a Keras 3 model"):
        sos.strip("model")

    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = techniques.wrap(sos.FixedMask, layers.Dense(3))

        def call(self, inputs):
            return self.dense(inputs)

    inputs = keras.Input((6,))
    model = keras.Model(inputs, Holder()(inputs))
    with pytest.raises(ValueError, match=r"Holder.*only its own code"):
        sos.strip(model)
