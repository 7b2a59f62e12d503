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
from sos.errors import UsageError
from sos.wrappers.base import find_wrappers
from tests.support import techniques
from tests.support.layers import (
    CASES,
    ROW,
    STEPS,
    Block,
    DefaultBuild,
    MaskReader,
    OwnLayer,
    attention,
    inputs_for,
)

# One layer of each use of a weight.
USES = {
    "Dense",
    "Conv2D",
    "Embedding mask_zero",
    "LSTM masked",
    "MultiHeadAttention",
    "own layer",
    "subclassed model",
}

# In the fast tests, one layer for each use of a weight. The slow tests add all
# layers of three techniques; others with masks run the code of the first.
FAST = {
    sos.MagnitudePruning: USES,
    sos.RandomPruning: {"Dense"},
    sos.FixedMask: {"Dense"},
    sos.VariationalDropout: USES,
    sos.L0Regularization: USES,
}
SLOW = {sos.RandomPruning: set(), sos.FixedMask: set()}

# Traced in the fast tests, beside those of `test_all_layers_train_in_a_trace`.
TRACED = {"Dense", "LSTM masked", "own layer"}


def around(name, layer):
    """A functional model of the layer and of the mask that leaves it."""
    case = CASES[name]
    inputs = inputs_for(case.arrays())
    outputs = case.call(layer, *inputs)
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


def is_refused(technique, name):
    """Whether the layer assigns to a weight of which there is a sample."""
    return technique.has_posterior and name.startswith("SpectralNorm")


def each_case():
    cases = []
    for technique in techniques.TECHNIQUES:
        fast = FAST.get(technique, USES)
        for name in fast | SLOW.get(technique, CASES.keys()):
            if not is_refused(technique, name):
                case = pytest.param(
                    technique,
                    name,
                    marks=pytest.mark.oldest
                    if name in fast
                    else pytest.mark.slow,
                    id=f"{technique.__name__}-{name}",
                )
                cases.append(case)
    # The processes of a test run have to find the same order.
    return sorted(cases, key=lambda case: case.id)


def assert_same(a, b, exact=True):
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        if exact:
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "technique", [t for t in techniques.TECHNIQUES if t.has_posterior]
)
def test_layer_that_assigns_to_a_sampled_weight_raises(technique):
    name = "SpectralNormalization"
    layer = techniques.wrap(technique, CASES[name].make())
    with pytest.raises(UsageError, match="kernel"):
        techniques.train(around(name, layer), CASES[name].arrays())


@pytest.mark.parametrize("technique, name", each_case())
def test_wrapped_layer_trains_evaluates_and_is_saved(technique, name, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = CASES[name].arrays()
    layer = techniques.wrap(technique, CASES[name].make())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = around(name, layer)
        before = [w.variable.numpy() for w in layer.sparse_weights]
        (loss,) = techniques.train(model, inputs, traced=name in TRACED)
    assert np.isfinite(loss)
    for weight, value in zip(layer.sparse_weights, before, strict=True):
        assert np.any(weight.variable.numpy() != value), weight.path

    techniques.make_zeros(model)
    plain_layer = CASES[name].make()
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


@pytest.mark.slow
def test_wrapped_layers_in_one_trace_train():
    """Under variational dropout; `identity_test.py` has them under masks."""
    technique = sos.VariationalDropout
    keras.utils.set_random_seed(0)
    inputs, outputs, wrappers = [], [], []
    arrays = []
    for name, case in CASES.items():
        if is_refused(technique, name):
            continue
        wrappers.append(techniques.wrap(technique, case.make()))
        own = inputs_for(case.arrays())
        outputs += keras.tree.flatten(case.call(wrappers[-1], *own))
        inputs += own
        arrays += case.arrays()
    model = keras.Model(inputs, outputs)
    weights = [w for x in wrappers for w in x.sparse_weights]
    before = [w.variable.numpy() for w in weights]
    (loss,) = techniques.train(model, arrays, traced=True)
    assert np.isfinite(loss)
    for weight, value in zip(weights, before, strict=True):
        assert np.any(weight.variable.numpy() != value), weight.path


def test_padding_under_a_wrapper_stays_out_of_the_loss():
    """A layer that supports masking but swallows the mask, as an LSTM does."""
    inputs = CASES["LSTM masked last"].arrays()[0]
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
def test_wrapped_layer_in_training_updates_its_state(technique):
    keras.utils.set_random_seed(0)
    (inputs,) = CASES["subclassed model"].arrays()
    layer = techniques.wrap(technique, Block())
    layer(inputs)
    before = {v.path: v.numpy() for v in layer.layer.non_trainable_variables}
    techniques.train(layer, inputs)
    for variable in layer.layer.non_trainable_variables:
        assert np.any(variable.numpy() != before[variable.path]), variable.path


def test_wrapped_layer_in_training_updates_its_state_as_a_plain_one():
    (inputs,) = CASES["subclassed model"].arrays()
    plain = Block()
    plain(inputs)
    layer = techniques.wrap(sos.MagnitudePruning, Block())
    layer(inputs)
    for old, new in zip(plain.variables, layer.layer.variables, strict=True):
        new.assign(old)
    optimizer = keras.optimizers.SGD(0.01)
    with sos.SparsityUpdater(layer, optimizer):
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
def test_wrapped_dropout_in_training_receives_the_flag(technique):
    model = keras.Sequential(
        [keras.Input((4,)), techniques.wrap(technique, OwnLayer(64))]
    )
    inputs = np.ones((2, 4), "float32")
    assert np.all(model(inputs).numpy() != 0)
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        zeros = np.mean(model(inputs, training=True).numpy() == 0)
    assert 0.3 < zeros < 0.7


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_wrapper_inside_time_distributed_trains_and_is_saved(
    technique, tmp_path
):
    (inputs,) = CASES["Dense rank 3"].arrays()
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
def test_wrapper_that_is_shared_counts_once(technique, tmp_path):
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


def test_wrapper_called_with_names_gives_the_same_outputs():
    query, value = CASES["MultiHeadAttention"].arrays()
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
def test_wrapper_in_a_checkpoint_has_stable_names(make, tmp_path):
    """Keras numbers layers; a checkpoint must not depend on the numbers."""
    inputs = [np.ones((4, *ROW), "float32")]
    if make is attention:
        inputs = [np.ones((4, *STEPS), "float32")] * 2
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
