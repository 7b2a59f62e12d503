"""Under masks of ones, any layer is its dense self, bit for bit."""

import pathlib
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.wrappers.base import find_wrappers
from tests.support import layers as table

pytest.register_assert_rewrite("tests.support.identity")

from tests.support.identity import (  # noqa: E402
    assert_bits,
    assert_identity,
    assert_same,
    assert_same_state,
    compile_model,
    equalize_seeds,
    evaluate,
    fit,
    halves,
    ones,
    own_variables,
    save_and_load,
    two_batches,
)

# Tracing takes most of the time.
EAGER_OR_TRACED = [True, pytest.param(False, marks=pytest.mark.slow)]

WITH_WEIGHTS = {**table.CASES, **table.VECTORS}


@keras.saving.register_keras_serializable(package="identity_test")
class Join(layers.Layer):
    """Makes one matrix of outputs of any shape and dtype, and their masks."""

    supports_masking = True

    def call(self, inputs, mask=None):
        masks = [] if mask is None else keras.tree.flatten(mask)
        return keras.ops.concatenate(
            [
                # Photos and tokens would outweigh all else.
                keras.ops.softsign(
                    keras.ops.reshape(
                        keras.ops.cast(x, "float32"), (table.BATCH, -1)
                    )
                )
                for x in [*inputs, *(m for m in masks if m is not None)]
            ],
            axis=-1,
        )

    def compute_mask(self, inputs, previous_mask=None):
        return None


def around(cases, wrap=lambda layer: layer):
    """A model with all cases side by side, and one batch of its inputs."""
    keras.utils.set_random_seed(0)
    specs = {str(s): s for case in cases.values() for s in case.inputs}
    arrays = [table.array(spec) for spec in specs.values()]
    inputs = table.inputs_for(arrays, batch_size=table.BATCH)
    input_of = dict(zip(specs, inputs, strict=True))
    outputs = []
    for i, case in enumerate(cases.values()):
        arguments = [input_of[str(spec)] for spec in case.inputs]
        layer = case.make()
        layer.name = f"case_{i}"
        outputs += keras.tree.flatten(case.call(wrap(layer), *arguments))
    head = layers.Dense(2, name="head")(Join()(outputs))
    return keras.Model(inputs, head, name="model"), arrays


def check(cases, directory, wrap=None, **kwargs):
    """Checks all cases in one model, and names those that fail alone."""
    try:
        model, arrays = around(cases)
        if wrap is not None:
            kwargs["sparse"], _ = around(cases, wrap)
            pairs = own_variables(model), own_variables(kwargs["sparse"])
            for old, new in zip(*pairs, strict=True):
                new.assign(old)
        return assert_identity(model, two_batches(arrays), directory, **kwargs)
    except Exception as error:
        kwargs.pop("sparse", None)
        if len(cases) > 1:
            names = fail_alone(cases, wrap=wrap, **kwargs)
            error.add_note(f"Alone, these fail: {names}")
        raise


def fail_alone(cases, **kwargs):
    """The names of the cases that fail in a model of their own."""
    names = []
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            try:
                check({name: case}, pathlib.Path(directory), **kwargs)
            except Exception:
                names.append(name)
    return names


def sparse_weights(model):
    return [w for x in find_wrappers(model) for w in x.sparse_weights]


def row_model(*chain, size=8):
    """A chain of layers on rows of 8 numbers."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((size,)), *chain])


def rows(size=8):
    return table.array((size,))


def test_table_holds_every_layer_of_keras():
    public = table.public_classes()
    known = table.classes_in({**WITH_WEIGHTS, **table.WITHOUT_WEIGHTS})
    unknown = sorted(set(public) - known - set(table.LEFT_OUT))
    assert not unknown, (
        f"Add cases for {unknown} to `tests/support/layers.py`: to `CASES`, "
        "`VECTORS`, `WITHOUT_WEIGHTS` or, with a reason, `LEFT_OUT`."
    )
    assert not set(table.LEFT_OUT) - set(public)


# The layers stand side by side in one model: the outputs of each are compared
# by the outputs of the head, the loss and all variables, bit for bit, after
# training and in files. The slow tests also train what was loaded.
@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_layers_with_weights_under_ones_equal_dense(thorough, tmp_path):
    sparse = check(WITH_WEIGHTS, tmp_path, thorough=thorough)
    for i, name in enumerate(WITH_WEIGHTS):
        found = sparse_weights(sparse.get_layer(f"case_{i}"))
        assert bool(found) == (name in table.CASES), name


def test_layers_without_weights_beside_ones_equal_dense(tmp_path):
    sparse = check(table.WITHOUT_WEIGHTS, tmp_path, thorough=False)
    assert len(sparse_weights(sparse)) == 1, "the head alone"


@pytest.mark.slow
def test_layers_in_traced_steps_under_ones_equal_dense():
    # Files do not depend on how a step was run.
    check(WITH_WEIGHTS, None, eager=False, thorough=False)


@pytest.mark.slow
def test_wrapped_layers_under_ones_equal_dense(tmp_path):
    check(table.CASES, tmp_path, wrap=lambda x: sos.FixedMask(x, sparsity=0.0))


def stateful_layers():
    kwargs = {"stateful": True, "return_sequences": True}
    return {
        "SimpleRNN": (layers.SimpleRNN(3, **kwargs), (5, 3)),
        "LSTM": (layers.LSTM(3, **kwargs), (5, 3)),
        "GRU": (layers.GRU(3, **kwargs), (5, 3)),
        "RNN": (layers.RNN(table.Cell(), **kwargs), (5, 3)),
        "Bidirectional": (
            layers.Bidirectional(layers.LSTM(3, **kwargs)),
            (5, 3),
        ),
        "ConvLSTM1D": (layers.ConvLSTM1D(2, 3, **kwargs), table.LINES),
    }


def stateful_model():
    keras.utils.set_random_seed(0)
    steps = keras.Input(batch_shape=(table.BATCH, *table.STEPS))
    lines = keras.Input(batch_shape=(table.BATCH, *table.LINES))
    outputs = {
        name: layer(steps if shape == (5, 3) else lines)
        for name, (layer, shape) in stateful_layers().items()
    }
    return keras.Model(
        [steps, lines],
        [layers.Identity(name=name)(x) for name, x in outputs.items()],
    )


def recurrent(model):
    return [x for x in model.layers if hasattr(x, "reset_state")]


def states(model):
    """The values of all states, which are in no list of a layer."""
    found = []
    for layer in recurrent(model):
        parts = [layer]
        if isinstance(layer, layers.Bidirectional):
            parts = [layer.forward_layer, layer.backward_layer]
        for part in parts:
            values = keras.tree.flatten(part.states)
            found += [keras.ops.convert_to_numpy(v).copy() for v in values]
    return found


def test_stateful_rnns_under_ones_keep_and_reset_states(tmp_path):
    dense = stateful_model()
    sparse = ones(dense)
    assert len(recurrent(sparse)) == len(recurrent(dense)) == 6
    x = [table.array(table.STEPS), table.array(table.LINES)]

    def outputs(model):
        return model.predict(x, batch_size=table.BATCH, verbose=0)

    first, second = outputs(dense), outputs(dense)
    for name, a, b in zip(stateful_layers(), first, second, strict=True):
        assert np.any(a != b), name
    assert_bits(first, outputs(sparse))
    assert_bits(second, outputs(sparse))
    assert_bits(states(dense), states(sparse), "states")
    for layer in recurrent(sparse):
        layer.reset_state()
    assert_bits(first, outputs(sparse), "after reset_state()")
    loaded = [save_and_load(model, tmp_path) for model in (dense, sparse)]
    assert_same(outputs, *loaded)
    assert_same(outputs, *loaded)


@pytest.mark.parametrize("name", ["LSTM", "ConvLSTM1D", "Bidirectional"])
def test_stateful_rnn_in_training_under_ones_equals_dense(name, tmp_path):
    keras.utils.set_random_seed(0)
    layer, shape = stateful_layers()[name]
    dense = keras.Sequential(
        [
            keras.Input(batch_shape=(table.BATCH, *shape)),
            layer,
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    sparse = ones(dense)
    data = two_batches(table.array(shape))
    for model in (dense, sparse):
        compile_model(model, eager=True)
    assert_same(fit, dense, sparse, data)
    assert_same_state(dense, sparse)
    assert any(np.any(state) for state in states(dense))
    assert_bits(states(dense), states(sparse), "states")
    assert_same(evaluate, dense, sparse, data)
    assert_bits(states(dense), states(sparse), "states")


@keras.saving.register_keras_serializable(package="identity_test")
class Clipped(layers.Layer):
    """Clips its own weights in each training call."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 4), name="kernel")

    def call(self, inputs, training=False):
        if training:
            self.kernel.assign(tf.clip_by_value(self.kernel.value, -0.1, 0.1))
        return inputs @ self.kernel


@pytest.mark.parametrize("eager", [True, False])
def test_layer_that_assigns_to_its_weights_under_ones_equals_dense(
    eager, tmp_path
):
    dense = row_model(Clipped())
    data = two_batches(rows(), 4)
    sparse = assert_identity(dense, data, tmp_path, eager=eager)
    sparse(rows(), training=True)
    assert abs(sparse.trainable_variables[0].numpy()).max() <= np.float32(0.1)


def assigned(sparse, wrapped):
    """The weight, mask and value before training of a sparse layer."""
    (weight,) = sparse_weights(wrapped)
    before = weight.variable.numpy()
    compile_model(sparse, eager=True, rate=0.0)
    fit(sparse, two_batches(rows(), 4).take(1))
    return before, weight.state["mask"].numpy(), weight.variable.numpy()


def under_half_a_mask(layer, how):
    """A model with a mask of which half is zero."""
    if how == "sparsify":
        return halves(row_model(layer))
    return row_model(sos.FixedMask(layer, sparsity=0.5))


@pytest.mark.parametrize("how", ["sparsify", "wrapper"])
def test_assignment_in_call_leaves_pruned_positions_alone(how):
    sparse = under_half_a_mask(Clipped(), how)
    before, mask, after = assigned(sparse, sparse)
    assert 0 < mask.mean() < 1 and np.any(abs(before[mask == 0]) > 0.1)
    expected = np.where(mask == 1, np.clip(before, -0.1, 0.1), before)
    assert_bits(expected, after)


@pytest.mark.parametrize("how", ["sparsify", "wrapper"])
def test_spectral_normalization_leaves_pruned_positions_alone(how):
    sparse = under_half_a_mask(
        layers.SpectralNormalization(layers.Dense(4)), how
    )
    oracle = row_model(layers.SpectralNormalization(layers.Dense(4)))
    for old, new in zip(
        own_variables(sparse), own_variables(oracle), strict=True
    ):
        new.assign(old)
    before, mask, after = assigned(sparse, sparse)
    kernel = oracle.layers[0].layer.kernel
    kernel.assign(before * mask)
    oracle(rows(), training=True)
    assert np.any(kernel.numpy() != before * mask)
    assert_bits(np.where(mask == 1, kernel.numpy(), before), after)
    assert_bits(
        oracle.layers[0].vector_u,
        next(v for v in own_variables(sparse) if v.name == "vector_u"),
    )


@keras.saving.register_keras_serializable(package="identity_test")
class Measuring(layers.Layer):
    """Has all kinds of losses, and a metric of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(
            3, kernel_regularizer="l2", activity_regularizer="l1"
        )
        self.out = layers.Dense(2)
        self.seen = keras.metrics.Mean(name="seen")

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.out.build((*input_shape[:-1], 3))

    def call(self, inputs):
        hidden = self.dense(inputs)
        self.seen.update_state(tf.reduce_mean(tf.abs(hidden)))
        self.add_loss(0.1 * tf.reduce_mean(tf.square(hidden)))
        return self.out(hidden)


@pytest.mark.parametrize("eager", EAGER_OR_TRACED)
def test_losses_and_metrics_inside_layers_count_once(eager, tmp_path):
    dense = row_model(
        layers.Dense(6, activity_regularizer="l2", kernel_regularizer="l1"),
        Measuring(activity_regularizer="l2"),
    )
    data = two_batches(rows())
    sparse = assert_identity(
        dense, data, tmp_path, eager=eager, metrics=["mae"]
    )
    logs = [fit(model, data) for model in (dense, sparse)]
    assert "seen" in logs[0] and np.isfinite(logs[0]["seen"][0])
    assert_bits(*logs)
    for model in (dense, sparse):
        model(rows())
    # Four of calls, two of weights.
    assert len(dense.losses) == len(sparse.losses) == 6
    assert_bits(
        sorted(float(x) for x in dense.losses),
        sorted(float(x) for x in sparse.losses),
    )


@keras.saving.register_keras_serializable(package="identity_test")
class Composite(layers.Layer):
    """Two dense layers, a matrix of its own, and noise."""

    def __init__(self, freeze=False, **kwargs):
        super().__init__(**kwargs)
        self.freeze = freeze
        self.a = layers.Dense(5, "tanh", trainable=not freeze)
        self.b = layers.Dense(2)
        self.dropout = layers.Dropout(0.5)

    def build(self, input_shape):
        self.a.build(input_shape)
        self.b.build((*input_shape[:-1], 5))
        self.matrix = self.add_weight(
            shape=(5, 5), initializer="identity", name="matrix"
        )

    def call(self, inputs, training=False):
        hidden = self.a(inputs) @ self.matrix
        return self.b(self.dropout(hidden, training=training))

    def get_config(self):
        return {**super().get_config(), "freeze": self.freeze}


def flags(layer):
    return [(v.name, v.trainable) for v in own_variables(layer)]


def frozen_models():
    by_class = row_model(Composite(freeze=True))
    part = row_model(Composite(), layers.Dense(2))
    part.layers[0].a.trainable = False
    variable = row_model(Composite(), layers.Dense(2))
    variable.layers[0].matrix.trainable = False
    layer = row_model(layers.Dense(3, trainable=False), layers.Dense(2))
    return {
        "by class": by_class,
        "part": part,
        "variable": variable,
        "layer": layer,
    }


@pytest.mark.parametrize("how", ["by class", "part", "variable", "layer"])
def test_frozen_parts_under_ones_stay_frozen(how, tmp_path):
    dense = frozen_models()[how]
    before = flags(dense)
    assert len({trainable for _, trainable in before}) == 2
    sparse = ones(dense)
    frozen = {id(w.variable) for w in sparse_weights(sparse)}
    assert all(v.trainable for v in sparse.variables if id(v) in frozen)
    data = two_batches(rows())
    for model in (dense, sparse):
        compile_model(model, eager=True)
    assert_same_state(dense, sparse)
    assert_same(fit, dense, sparse, data)
    assert_same_state(dense, sparse)
    assert flags(dense) == flags(sparse) == before
    plain = sos.strip(sparse)
    assert flags(plain) == before
    assert_bits(
        plain.predict(rows(), verbose=0), dense.predict(rows(), verbose=0)
    )
    # Keras itself saves the flags of layers that it makes, not of their parts.
    loaded = [save_and_load(model, tmp_path) for model in (dense, sparse)]
    assert flags(loaded[1]) == flags(loaded[0])
    assert (flags(loaded[1]) == before) == (how in ("by class", "layer"))
    equalize_seeds(*loaded)
    assert_same_state(*loaded)


def test_dropout_in_a_composite_under_ones_draws_the_same_noise():
    dense = row_model(Composite(), layers.Dropout(0.5, seed=3))
    sparse = ones(dense)

    def outputs(model):
        return [model(rows(), training=True) for _ in range(3)]

    first = outputs(dense)
    assert np.any(first[0] != first[1])
    assert_bits(first, outputs(sparse))
    assert_same_state(dense, sparse)
    assert_bits(outputs(dense), outputs(sos.strip(sparse)))


def masked_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True),
            layers.LSTM(4, return_sequences=True),
            layers.TimeDistributed(layers.Dense(3)),
            layers.Dense(1),
        ]
    )


def test_masks_of_padding_under_ones_stay_out_of_the_loss():
    dense = masked_model()
    sparse = ones(dense)
    x = table.array("tokens")
    y = table.array((4, 1))
    for model in (dense, sparse):
        compile_model(model, eager=True)

    def losses(model, x, y):
        return [model.train_on_batch(x, y) for _ in range(2)]

    first = losses(dense, x, y)
    assert_bits(first, losses(sparse, x, y))
    assert_same_state(dense, sparse)
    # What is padding does not count.
    z = np.where(x[..., None] == 0, 100.0, y)
    assert_bits(
        dense.test_on_batch(x, y), sparse.test_on_batch(x, z.astype("float32"))
    )


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_rematerialisation_under_ones_equals_dense(mode, tmp_path):
    with keras.RematScope(mode=mode):
        inner = layers.Dense(6, "relu"), layers.Dense(2)
    dense = row_model(*inner)
    assert dense.layers[0]._remat_mode is not None
    # TensorFlow traces no rematerialised call with `training`.
    eager = mode == "full"
    sparse = assert_identity(dense, two_batches(rows()), tmp_path, eager=eager)
    assert [x._remat_mode for x in sparse.layers] == [
        x._remat_mode for x in dense.layers
    ]


@pytest.mark.parametrize(
    ("policy", "eager"),
    [
        ("mixed_bfloat16", True),
        ("mixed_float16", True),
        ("float64", True),
        # With a scaled loss, whose steps are the longest.
        pytest.param("mixed_float16", False, marks=pytest.mark.slow),
    ],
)
def test_dtype_policy_under_ones_equals_dense(policy, eager, tmp_path):
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        dense = keras.Sequential(
            [
                keras.Input(table.STEPS),
                layers.Dense(4, "relu"),
                layers.LSTM(3, return_sequences=True),
                layers.BatchNormalization(),
                layers.Conv1D(3, 2),
                layers.Flatten(),
                layers.Dense(2, dtype="float32"),
            ]
        )
    finally:
        keras.config.set_dtype_policy(before)
    sparse = assert_identity(
        dense, two_batches(table.array(table.STEPS)), tmp_path, eager=eager
    )
    loaded = save_and_load(sparse, tmp_path)
    for model in (sparse, loaded):
        assert [x.dtype_policy.name for x in model.layers] == [
            x.dtype_policy.name for x in dense.layers
        ]


def test_policies_of_inner_layers_survive_sparsify_and_strip():
    """A composite makes its layers under whichever policy is the default."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        dense = Composite()
        dense.build((None, 8))
    finally:
        keras.config.set_dtype_policy(before)
    dense = row_model(dense, layers.Dense(2))
    sparse = ones(dense)
    for inner in ("a", "b"):
        for model in (sparse, sos.strip(sparse)):
            found = getattr(model.layers[0], inner).compute_dtype
            assert found == "bfloat16", inner
    assert_bits(dense(rows()), sparse(rows()))


def preprocessing_model():
    """All kinds of state that a layer derives from data."""
    keras.utils.set_random_seed(0)
    names = (
        "Discretization",
        "IntegerLookup",
        "StringLookup",
        "TextVectorization",
        "Rescaling",
        "RandomFlip",
        "RandomRotation",
    )
    cases = {name: table.WITHOUT_WEIGHTS[name] for name in names}
    cases["Normalization"] = table.VECTORS["Normalization"]
    return around(cases)


@pytest.mark.parametrize("sparsify", [ones, halves])
def test_adapted_preprocessing_survives_copies_and_export(sparsify, tmp_path):
    dense, x = preprocessing_model()
    x = [tf.constant(value) for value in x]
    sparse = sparsify(dense)

    def outputs(model):
        return model(x, training=False)

    if sparsify is ones:
        assert_same(outputs, dense, sparse)
    before = outputs(sparse)
    assert_bits(before, outputs(sos.strip(sparse)), "strip")
    assert_bits(before, outputs(save_and_load(sparse, tmp_path)), "load_model")
    for model in (sparse, sos.strip(sparse)):
        sos.export_model(model, tmp_path / "exported")
        exported = tf.saved_model.load(tmp_path / "exported")
        assert_bits(before, exported(x), "export_model")
    assert_bits(before, outputs(sparse), "nothing has changed it")


def lora_model():
    return row_model(layers.Dense(6, name="a"), layers.Dense(2, name="b"))


def enable_lora(model):
    keras.utils.set_random_seed(5)
    for layer in model.layers:
        layer.enable_lora(2)


def sparse_lora(dense, order, **kwargs):
    """The dense model with adapters, and a sparse one made in an order."""
    if order == "LoRA first":
        enable_lora(dense)
        return sos.sparsify(dense, **kwargs)
    sparse = sos.sparsify(dense, **kwargs)
    enable_lora(dense)
    enable_lora(sparse)
    return sparse


ORDERS = ["LoRA first", "sparsify first"]


@pytest.mark.parametrize("order", ORDERS)
def test_lora_under_ones_equals_dense(order):
    dense = lora_model()
    sparse = sparse_lora(dense, order, technique="FixedMask", sparsity=0.0)
    data = two_batches(rows())
    for model in (dense, sparse):
        compile_model(model, eager=True)
    assert_same_state(dense, sparse)
    assert_same(fit, dense, sparse, data)
    assert_same_state(dense, sparse)
    assert_same(evaluate, dense, sparse, data)
    assert any(np.any(v) for v in dense.variables if "lora_kernel_b" in v.name)
    assert_bits(sos.strip(sparse)(rows()), dense(rows()))


@pytest.mark.parametrize("order", ORDERS)
def test_saving_a_sparse_layer_with_lora_changes_nothing(order, tmp_path):
    sparse = sparse_lora(
        lora_model(),
        order,
        technique="MagnitudePruning",
        sparsity=0.5,
        frequency=1,
    )
    compile_model(sparse, eager=True)
    fit(sparse, two_batches(rows()))
    rows_of = {r["weight"]: r for r in sos.sparsity_report(sparse).rows}
    adapters = [r for name, r in rows_of.items() if "lora_kernel" in name]
    assert len(adapters) == 4
    assert {r["reason"] for r in adapters} == {"LoRA adapter"}
    kernels = [r for name, r in rows_of.items() if name.endswith("/kernel")]
    assert [r["sparsity"] for r in kernels] == [0.5, 0.5]
    before = sparse(rows())
    loaded = save_and_load(sparse, tmp_path)
    assert_bits(before, loaded(rows()))
    assert_bits(before, sparse(rows()))
    # Not merged into the kernel, where the adapters' part would be masked.
    assert_same_state(sparse, loaded)
    assert_bits(before, sos.strip(loaded)(rows()))


@keras.saving.register_keras_serializable(package="identity_test")
class DirectRead(layers.Layer):
    """Reads a sublayer's weights in three ways, also without calling it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)
        self.table = layers.Embedding(8, 2)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.table.build(None)

    def call(self, inputs):
        direct = tf.matmul(inputs, self.dense.kernel)
        rows = keras.ops.convert_to_tensor(self.table.embeddings)
        value = inputs @ self.table.embeddings.value
        return self.dense(inputs) + direct + inputs @ rows + 2 * value


def test_direct_reads_of_a_sparse_weight_see_its_zeros():
    sparse = halves(row_model(DirectRead()))
    kernel, embeddings = (
        w.variable.numpy() * w.state["mask"].numpy()
        for w in sparse_weights(sparse)
    )
    if kernel.shape != (8, 2):
        kernel, embeddings = embeddings, kernel
    x = rows()
    np.testing.assert_allclose(
        sparse(x), 2 * x @ kernel + 3 * x @ embeddings, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("sizes", [(0.0, 0.0), (0.5, 0.25)])
def test_layer_under_two_techniques_has_both(sizes, tmp_path):
    keras.utils.set_random_seed(0)
    dense = keras.Sequential(
        [keras.Input((5, 3)), layers.LSTM(4), layers.Dense(2)]
    )
    how = {
        "technique": "FixedMask",
        "sparsity": sizes[0],
        "rules": {"recurrent": {"sparsity": sizes[1], "seed": 1}},
    }
    sparse = sos.sparsify(dense, **how)
    by_path = {w.path: w for w in sparse_weights(sparse)}
    assert len(by_path) == 3 and len(find_wrappers(sparse)) == 3
    loaded = save_and_load(sparse, tmp_path)
    for model in (sparse, loaded, sos.sparsify(sos.strip(sparse), "FixedMask")):
        zeros = {
            w.path.split("/")[-1]: 1 - w.state["mask"].numpy().mean()
            for w in sparse_weights(model)
            if "lstm" in w.path
        }
        assert zeros == {"kernel": sizes[0], "recurrent_kernel": sizes[1]}
    if sizes == (0.0, 0.0):
        data = two_batches(table.array((5, 3)))
        assert_identity(
            dense, data, tmp_path, sparse=sos.sparsify(dense, **how)
        )


def test_layer_that_trains_by_default_is_put_together_without_an_updater(
    tmp_path,
):
    """`Pipeline.call` has `training=True`, also in symbolic calls."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    pipeline = layers.Pipeline([layers.Dense(3), layers.Dropout(0.5)])
    dense = keras.Model(inputs, pipeline(inputs))
    sparse = sos.sparsify(dense, "MagnitudePruning", sparsity=0.5)
    loaded = save_and_load(sparse, tmp_path)
    assert_bits(dense(rows(), training=False), loaded(rows(), training=False))
    with pytest.raises(RuntimeError, match="SparsityCallback"):
        loaded(rows())


def test_layer_of_a_saved_model_stays_dense(tmp_path):
    """It computes with the variables of the file, so that no mask would act."""
    row_model(layers.Dense(4)).export(tmp_path / "exported", verbose=False)
    sparse = sos.sparsify(
        row_model(
            layers.TFSMLayer(tmp_path / "exported", call_endpoint="serve"),
            layers.Dense(2, name="out"),
        ),
        "FixedMask",
        sparsity=0.5,
        copy=False,
    )
    report = {r["weight"]: r for r in sos.sparsity_report(sparse).rows}
    assert [w.path for w in sparse_weights(sparse)] == ["out/kernel"]
    notes = [r["reason"] for r in report.values() if not r["technique"]]
    assert notes == ["read by its SavedModel", "rank 1", "rank 1"]
