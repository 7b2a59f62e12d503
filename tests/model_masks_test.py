"""Masks by path, and the layers that hold techniques."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import sos
from sos.errors import UsageError
from tests.support import techniques


def mlp(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="first"),
            layers.Dense(4, name="last"),
        ],
        name="net",
    )


def towers():
    """Two nested models whose layers have equal names."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    outputs = [
        keras.Sequential(
            [keras.Input((6,)), layers.Dense(5, name="dense")], name=name
        )(inputs)
        for name in ("left", "right")
    ]
    return keras.Model(inputs, outputs, name="net")


def recurrent():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((5, 6)), layers.LSTM(4, name="lstm")], name="net"
    )


MODELS = [mlp, towers, recurrent]


def random_masks(model, seed=0):
    generator = np.random.default_rng(seed)
    return {
        path: (generator.random(mask.shape) < 0.5).astype("uint8")
        for path, mask in sos.get_masks(model).items()
    }


def assert_same(received, expected):
    assert list(received) == list(expected)
    for path, mask in received.items():
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected[path])


def sparse_of(model, technique):
    return sos.sparsify(model, technique, **techniques.arguments(technique))


# get_masks


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_get_masks_any_technique_is_what_the_stripped_model_keeps(
    technique, make
):
    sparse = sparse_of(make(), technique)
    techniques.make_zeros(sparse)
    report = sos.sparsity_report(sparse)
    rows = [row for row in report.rows if row["technique"]]
    masks = sos.get_masks(sparse)
    assert list(masks) == [row["weight"] for row in rows]
    kept = [int(mask.sum()) for mask in masks.values()]
    assert kept == [row["nonzeros"] for row in rows]
    assert all(mask.dtype == np.uint8 for mask in masks.values())
    plain = [v for v in sos.strip(sparse).weights if v.name != "bias"]
    for mask, variable in zip(masks.values(), plain, strict=True):
        np.testing.assert_array_equal(mask, ops.convert_to_numpy(variable) != 0)


def test_get_masks_arrays_are_copies():
    sparse = sos.prune(mlp(), 0.5)
    masks = sos.get_masks(sparse)
    masks["first/kernel"][:] = 0
    assert sos.get_masks(sparse)["first/kernel"].any()


def test_get_masks_plain_model_is_empty():
    assert sos.get_masks(mlp()) == {}


def test_get_masks_equal_paths_are_numbered_as_in_the_report():
    inputs = keras.Input((6,))
    outputs = [
        sos.FixedMask(layers.Dense(5, name="dense"), sparsity=0.5, name=name)(
            inputs
        )
        for name in ("left", "right")
    ]
    model = keras.Model(inputs, outputs)
    masks = sos.get_masks(model)
    assert len(masks) == 2
    rows = sos.sparsity_report(model).rows
    assert list(masks) == [row["weight"] for row in rows if row["technique"]]


# set_masks


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    "technique", ["FixedMask", "MagnitudePruning", "RandomPruning"]
)
def test_set_masks_round_trip_saved_and_stripped_agree(
    technique, make, tmp_path
):
    sparse = sparse_of(make(), technique)
    masks = random_masks(sparse)
    sos.set_masks(sparse, masks)
    assert_same(sos.get_masks(sparse), masks)
    sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(sos.get_masks(loaded), masks)
    plain = sos.strip(loaded)
    assert sos.get_masks(plain) == {}
    again = sos.get_masks(sos.sparsify(plain, "FixedMask"))
    # Keras drops the names of nested models from the paths of a copy.
    assert_same(dict(zip(masks, again.values(), strict=True)), masks)


def test_set_masks_of_another_model_makes_a_lottery_ticket():
    model = mlp()
    initial = keras.models.clone_model(model)
    initial.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x = techniques.normal(32, 6)
    model.fit(x, x[:, :4], epochs=3, verbose=0)
    masks = sos.get_masks(sos.prune(model, 0.75))
    ticket = sos.sparsify(initial, "FixedMask")
    sos.set_masks(ticket, masks)
    assert_same(sos.get_masks(ticket), masks)
    expected = initial.layers[0].kernel * masks["first/kernel"]
    np.testing.assert_array_equal(sos.strip(ticket).layers[0].kernel, expected)
    ticket.compile("sgd", "mse")
    ticket.fit(x, x[:, :4], verbose=0, callbacks=[sos.SparsityCallback()])
    assert_same(sos.get_masks(ticket), masks)


def test_set_masks_some_paths_leaves_the_others():
    sparse = sos.prune(mlp(), 0.5)
    before = sos.get_masks(sparse)
    mask = np.eye(8, 4, dtype=bool)
    sos.set_masks(sparse, {"last/kernel": mask})
    assert_same(sos.get_masks(sparse), {**before, "last/kernel": mask})
    sos.set_masks(sparse, {})
    assert_same(sos.get_masks(sparse), {**before, "last/kernel": mask})


def test_set_masks_compiled_predict_uses_them_at_once():
    sparse = sos.prune(mlp(), 0.5)
    x = techniques.normal(3, 6)
    sparse.predict(x, verbose=0)
    sos.set_masks(sparse, {"last/kernel": np.zeros((8, 4))})
    np.testing.assert_array_equal(
        sparse.predict(x, verbose=0), np.zeros((3, 4))
    )


def test_set_masks_of_a_wrapper_by_hand_takes_paths_without_its_name():
    layer = layers.Dense(2, name="dense")
    wrapper = sos.FixedMask(layer, name="wrapper")
    wrapper.build((None, 3))
    masks = random_masks(wrapper)
    assert list(masks) == ["dense/kernel"]
    sos.set_masks(wrapper, masks)
    assert_same(sos.get_masks(wrapper), masks)


GOOD = np.ones((6, 8), "uint8")


@pytest.mark.parametrize(
    ("masks", "error", "match"),
    [
        ({"first": GOOD}, UsageError, "'first'.*'first/kernel'.*'last/kernel'"),
        ({"net/first/kernel": GOOD}, UsageError, "'net/first/kernel'"),
        ({0: GOOD}, UsageError, "0"),
        ({"last/bias": np.ones(4)}, UsageError, "'last/bias'"),
        ({"last/kernel": GOOD}, UsageError, r"last/kernel.*\(8, 4\).*\(6, 8\)"),
        ({"last/kernel": 0.5 * np.ones((8, 4))}, UsageError, "last/kernel"),
        ({"last/kernel": 2 * np.ones((8, 4))}, UsageError, "last/kernel"),
        ({"last/kernel": np.nan * np.ones((8, 4))}, UsageError, "last/kernel"),
        ({"last/kernel": None}, UsageError, "last/kernel"),
        ({"last/kernel": "ones"}, UsageError, "last/kernel"),
        ({"last/kernel": [[1, 0], [1]]}, UsageError, "last/kernel"),
        ([GOOD], TypeError, "masks="),
        (None, TypeError, "masks=None"),
    ],
)
def test_set_masks_wrong_masks_raise_and_change_none(masks, error, match):
    sparse = sos.prune(mlp(), 0.5)
    before = sos.get_masks(sparse)
    if isinstance(masks, dict):
        masks = {"first/kernel": 1 - before["first/kernel"], **masks}
    with pytest.raises(error, match=match):
        sos.set_masks(sparse, masks)
    assert_same(sos.get_masks(sparse), before)


def test_set_masks_technique_without_masks_raises():
    sparse = sos.sparsify(
        mlp(),
        "FixedMask",
        rules={"last": {"technique": "L0Regularization", "penalty_weight": 1}},
    )
    before = sos.get_masks(sparse)
    masks = {path: 1 - mask for path, mask in before.items()}
    with pytest.raises(UsageError, match="'last/kernel'.*L0Regularization"):
        sos.set_masks(sparse, masks)
    assert_same(sos.get_masks(sparse), before)


@pytest.mark.parametrize(
    "function",
    [sos.get_masks, sos.sparse_layers, lambda m: sos.set_masks(m, {})],
)
def test_masks_of_what_is_no_model_raise(function):
    with pytest.raises(TypeError, match="model='model'"):
        function("model")


# sparse_layers


def test_sparse_layers_every_weight_belongs_to_one_of_them():
    inputs = keras.Input((5, 6))
    shared = layers.Dense(6, name="shared")
    x = shared(shared(inputs))
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.LSTM(4, name="lstm")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    sparse = sos.sparsify(
        model,
        "MagnitudePruning",
        sparsity=0.5,
        rules={
            "recurrent": {"technique": "FixedMask", "sparsity": 0.5},
            "head": None,
        },
    )
    found = sos.sparse_layers(sparse)
    assert [layer.name for layer in found] == [
        "shared",
        "query",
        "key",
        "value",
        "attention_output",
        "lstm",
    ]
    paths = [w.path for layer in found for w in layer.sparse_weights]
    assert sorted(paths) == sorted(sos.get_masks(sparse))
    assert [len(layer.techniques) for layer in found] == [1] * 5 + [2]


def test_sparse_layers_own_weights_of_a_model_count_once():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def build(self, shape):
            self.matrix = self.add_weight(shape=(6, 6), name="matrix")
            self.dense.build(shape)

        def call(self, inputs):
            return self.dense(inputs @ self.matrix)

    model = Own()
    model.build((None, 6))
    sparse = sos.prune(model, 0.5, copy=False)
    found = sos.sparse_layers(sparse)
    assert found == [sparse, sparse.dense]
    assert [len(layer.sparse_weights) for layer in found] == [1, 1]


def test_sparse_layers_wrappers_have_themselves_as_technique(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            sos.FixedMask(layers.Dense(4), sparsity=0.5),
            layers.Dense(3),
            sos.L0Regularization(layers.Dense(2), penalty_weight=1.0),
        ]
    )
    found = sos.sparse_layers(model)
    assert found == [model.layers[0], model.layers[2]]
    for layer in found:
        assert layer.techniques == (layer,)
        (weight,) = layer.sparse_weights
        assert weight.technique is layer
    # Keras does not follow it when it saves.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(sos.get_masks(loaded), sos.get_masks(model))


def test_sparse_layers_plain_model_has_none():
    assert sos.sparse_layers(mlp()) == []
