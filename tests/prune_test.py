"""Pruning a model at once, by magnitude."""

import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from keras import layers, ops

import sos
from sos.errors import UsageError
from tests.support import techniques
from tests.support.small_models import branches, mlp


def oracle(values, sparsity):
    """The mask that keeps the largest magnitudes, the first of equal ones."""
    values = np.abs(np.asarray(values, "float64")).ravel()
    kept = max(round(values.size * (1 - sparsity)), min(1, values.size))
    mask = np.zeros(values.size, "uint8")
    mask[np.argsort(-values, kind="stable")[:kept]] = 1
    return mask


def assert_pruned(pruned, dense, sparsity):
    """Compares all masks with the oracle, and the values with the dense ones.

    Args:
        pruned: The pruned model.
        dense: The weights before, by path.
        sparsity: The sparsity, or sparsities by path.
    """
    masks = sos.get_masks(pruned)
    for path, mask in masks.items():
        value = np.asarray(dense[path], "float64")
        target = sparsity if isinstance(sparsity, float) else sparsity[path]
        np.testing.assert_array_equal(mask.ravel(), oracle(value, target))
        assert mask.shape == value.shape
    effective = {
        w.path: np.asarray(ops.convert_to_numpy(x), "float64")
        for layer in sos.sparse_layers(pruned)
        for technique in layer.techniques
        for w, x in technique.evaluation_weights().items()
    }
    assert effective.keys() == masks.keys()
    for path, value in effective.items():
        np.testing.assert_array_equal(
            value, np.where(masks[path], np.asarray(dense[path]), 0)
        )


def weights_of(model):
    return {
        v.path.removeprefix(f"{model.name}/"): ops.convert_to_numpy(v).copy()
        for v in model.weights
    }


@keras.saving.register_keras_serializable(package="prune_test")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(5, name="first")
        self.last = layers.Dense(2, name="last")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.last.build((None, 5))

    def call(self, inputs):
        return self.last(self.first(inputs))


def subclassed():
    keras.utils.set_random_seed(0)
    model = Subclassed(name="net")
    model.build((None, 6))
    return model


MODELS = {
    "mlp": (mlp, (3, 6)),
    "bfloat16": (lambda: mlp("bfloat16"), (3, 6)),
    "mixed_bfloat16": (lambda: mlp("mixed_bfloat16"), (3, 6)),
    "float64": (lambda: mlp("float64"), (3, 6)),
    "branches": (branches, (3, 5, 6)),
    "subclassed": (subclassed, (3, 6)),
}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_prune_any_model_keeps_the_largest_magnitudes(case, copy, tmp_path):
    make, shape = MODELS[case]
    model = make()
    dense = weights_of(model)
    pruned = sos.prune(model, 0.7, copy=copy)
    assert (pruned is model) == (not copy)
    assert type(pruned).__name__.removeprefix("Sparse") == type(
        make()
    ).__name__.removeprefix("Sparse")
    assert_pruned(pruned, dense, 0.7)
    # The dense values stay, in the original too.
    for each in (model, pruned):
        for path, value in dense.items():
            np.testing.assert_array_equal(weights_of(each)[path], value)
    inputs = techniques.normal(*shape)
    plain = sos.strip(pruned)
    outputs = ops.convert_to_numpy(pruned(inputs))
    np.testing.assert_array_equal(ops.convert_to_numpy(plain(inputs)), outputs)
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.models.load_model(tmp_path / "pruned.keras")
    assert_pruned(loaded, dense, 0.7)
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(inputs)), outputs)


MODEL = keras.Sequential(
    [keras.Input((4,)), layers.Dense(5, name="hidden", use_bias=False)],
    name="net",
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    values=hnp.arrays(
        "float32",
        (4, 5),
        elements=st.floats(-4, 4, width=32)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-40]),
    ),
    sparsity=st.floats(0, 1, exclude_max=True),
)
def test_prune_any_values_agrees_with_numpy(values, sparsity):
    MODEL.set_weights([values])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = sos.get_masks(sos.prune(MODEL, sparsity))["hidden/kernel"]
    if (np.abs(values) == np.abs(values).flat[0]).all():
        assert mask.all() or round(20 * (1 - sparsity)) == 0
    else:
        np.testing.assert_array_equal(mask.ravel(), oracle(values, sparsity))


def test_prune_rules_change_sparsities_and_leave_weights_dense():
    model = branches()
    dense = weights_of(model)
    pruned = sos.prune(
        model,
        0.5,
        rules={
            "shared": None,
            "recurrent": {"sparsity": 0.25},
            "query/kernel": {"sparsity": 0},
        },
    )
    masks = sos.get_masks(pruned)
    assert "shared/kernel" not in masks
    sparsities = dict.fromkeys(masks, 0.5)
    sparsities["lstm/lstm_cell/recurrent_kernel"] = 0.25
    sparsities["attention/query/kernel"] = 0.0
    assert sparsities.keys() == masks.keys()
    assert_pruned(pruned, dense, sparsities)
    rows = {row["weight"]: row for row in sos.sparsity_report(pruned).rows}
    assert rows["shared/kernel"]["reason"] == "left dense by rule 'shared'"
    assert masks["attention/query/kernel"].all()


def test_prune_agrees_with_one_update_of_magnitude_pruning():
    model = branches()
    sparse = sos.sparsify(
        model,
        "MagnitudePruning",
        schedule=sos.schedules.ConstantSparsity(0.6, 0, frequency=1),
    )
    with sos.SparsityUpdater(sparse, keras.optimizers.SGD()):
        pass
    expected = sos.get_masks(sparse)
    received = sos.get_masks(sos.prune(model, 0.6))
    assert list(received) == list(expected)
    for path, mask in received.items():
        np.testing.assert_array_equal(mask, expected[path])


@pytest.mark.parametrize("copy", [True, False])
def test_prune_fine_tuned_by_fit_keeps_masks_and_trains_the_rest(copy):
    model = mlp()
    pruned = sos.prune(model, 0.5, copy=copy)
    masks = sos.get_masks(pruned)
    before = weights_of(pruned)
    pruned.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x = techniques.normal(32, 6)
    pruned.fit(
        x, x[:, :4], epochs=2, verbose=0, callbacks=[sos.SparsityCallback()]
    )
    after = weights_of(pruned)
    for path, mask in sos.get_masks(pruned).items():
        np.testing.assert_array_equal(mask, masks[path])
        assert (after[path] == before[path])[mask == 0].all()
        assert (after[path] != before[path])[mask == 1].any()
    assert sos.sparsity_report(sos.strip(pruned)).model_sparsity > 0.3


def test_prune_zero_sparsity_changes_no_output():
    model = mlp()
    inputs = techniques.normal(3, 6)
    expected = model(inputs)
    pruned = sos.prune(model, 0)
    assert all(mask.all() for mask in sos.get_masks(pruned).values())
    np.testing.assert_array_equal(pruned(inputs), expected)


def test_prune_zeros_of_the_model_that_are_kept_stay_trainable():
    model = mlp()
    kernel = np.zeros((6, 8), "float32")
    kernel[0] = 1.0
    model.layers[0].kernel.assign(kernel)
    mask = sos.get_masks(sos.prune(model, 0.5))["first/kernel"]
    np.testing.assert_array_equal(mask.ravel(), oracle(kernel, 0.5))
    assert mask.sum() == 24


def test_prune_clone_with_copied_weights_has_the_masks():
    pruned = sos.prune(mlp(), 0.5)
    clone = keras.models.clone_model(pruned)
    clone.set_weights(pruned.get_weights())
    for path, mask in sos.get_masks(pruned).items():
        np.testing.assert_array_equal(sos.get_masks(clone)[path], mask)


def test_prune_compiled_model_predicts_with_masks():
    model = mlp()
    model.compile("sgd", "mse")
    inputs = techniques.normal(3, 6)
    dense = model.predict(inputs, verbose=0)
    sos.prune(model, 0.5, copy=False)
    received = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(received, sos.strip(model)(inputs), rtol=1e-5)
    assert (received != dense).any()


# Warnings, as of MagnitudePruning.


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_prune_equal_magnitudes_stay_dense_and_warn(value):
    model = mlp()
    signs = np.where(np.arange(48) % 2, 1.0, -1.0).reshape(6, 8)
    model.layers[0].kernel.assign(value * signs)
    with pytest.warns(sos.SparsityWarning, match="first/kernel") as caught:
        pruned = sos.prune(model, 0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    masks = sos.get_masks(pruned)
    assert masks["first/kernel"].all()
    assert masks["last/kernel"].sum() == 16


def test_prune_sparsity_that_leaves_none_keeps_one_and_warns():
    with pytest.warns(sos.SparsityWarning, match="0.995.*last/kernel"):
        pruned = sos.prune(mlp(), 0.995, rules={"first": None})
    assert sos.get_masks(pruned)["last/kernel"].sum() == 1


def test_prune_without_need_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sos.prune(branches(), 0.9)


# Errors, which change nothing.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((1,), UsageError, "sparsity=1"),
        ((-0.1,), UsageError, "sparsity=-0.1"),
        ((90,), UsageError, "sparsity=90"),
        ((float("nan"),), UsageError, "sparsity=nan"),
        (("0.9",), UsageError, "sparsity='0.9'"),
        ((None,), UsageError, "sparsity=None"),
        ((0.5, {"last": {"sparsity": 1}}), UsageError, "last.*sparsity=1"),
        ((0.5, {"last": {"sparsity": 2}}), UsageError, "last.*sparsity=2"),
        ((0.5, {"last": {"sparsity": None}}), UsageError, "last.*=None"),
        ((0.5, {"last": {"seed": 3}}), UsageError, "last.*seed"),
        ((0.5, {"last": {"begin_step": 3}}), TypeError, "last.*begin_step=3"),
        ((0.5, {"last": "MagnitudePruning"}), TypeError, "last.*sparsity"),
        (
            (0.5, {"last": {"technique": "L0Regularization"}}),
            TypeError,
            "penalty_weight",
        ),
        ((0.5, {"last": "RandomPruning"}), TypeError, "last.*sparsity"),
        ((0.5, {"last": "FixedMask"}), UsageError, None),
        ((0.5, {"conv": None}), UsageError, "conv"),
        ((0.5, {"kernel": None}), UsageError, "FixedMask"),
        ((0.5, {"last": None, "kernel": None}), UsageError, "last/kernel"),
        ((0.5, "last"), TypeError, "rules='last'"),
    ],
)
def test_prune_wrong_arguments_raise_before_anything_changes(
    arguments, error, match
):
    model = mlp()
    sparsity, rules = (*arguments, None)[:2]
    if match is None:
        # The name of the technique alone changes nothing.
        sos.prune(model, sparsity, rules=rules)
        return
    with pytest.raises(error, match=match):
        sos.prune(model, sparsity, rules=rules, copy=False)
    assert sos.sparse_layers(model) == []
    assert [type(layer) for layer in model.layers] == [layers.Dense] * 2


@pytest.mark.parametrize("copy", [True, False])
def test_prune_nan_raises_with_its_path_and_changes_nothing(copy):
    model = mlp()
    kernel = model.layers[1].kernel
    kernel.assign(
        ops.where(ops.arange(32) == 7, np.nan, 1.0).numpy().reshape(8, 4)
    )
    with pytest.raises(UsageError, match="NaN in 'last/kernel'"):
        sos.prune(model, 0.5, copy=copy)
    assert sos.sparse_layers(model) == []


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: "model", TypeError, "'model'"),
        (lambda: layers.Dense(2), TypeError, "Dense"),
        (lambda: keras.Sequential([layers.Dense(2)]), UsageError, "prune"),
        (lambda: sos.prune(mlp(), 0.5), UsageError, "net"),
    ],
)
def test_prune_what_is_no_dense_model_raises(make, error, match):
    with pytest.raises(error, match=match):
        sos.prune(make(), 0.5)
