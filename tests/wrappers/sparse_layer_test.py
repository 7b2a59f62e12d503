"""Calls of sparse layers, from wherever they are made."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    ("technique", "arguments"),
    [
        ("FixedMask", {"sparsity": 0.75}),
        ("L0Regularization", {"penalty_weight": 1.0}),
    ],
)
def test_layer_inside_of_unit_called_by_itself_reads_sparse(
    technique, arguments
):
    model = keras.Sequential(
        [
            keras.Input((3, 5)),
            layers.LSTM(4, return_sequences=True, name="lstm"),
            layers.TimeDistributed(layers.Dense(6), name="distributed"),
        ]
    )
    sparse = sos.sparsify(model, technique, **arguments)
    plain = sos.strip(sparse)
    states = [tf.ones((2, 4)), tf.ones((2, 4))]
    for name, inner, args in [
        ("lstm", "cell", (inputs(2, 5), states)),
        ("distributed", "layer", (inputs(2, 4),)),
    ]:
        received, expected = (
            tf.nest.flatten(getattr(m.get_layer(name), inner)(*args))[0]
            for m in (sparse, plain)
        )
        np.testing.assert_array_equal(received, expected)


def test_time_distributed_shared_layer_noise_differs_by_timestep():
    x = keras.Input((4, 3))
    shared = layers.Dense(5, name="shared")
    both = [layers.TimeDistributed(shared)(x), shared(x[:, 0])]
    sparse = sos.sparsify(
        keras.Model(x, both),
        "VariationalDropout",
        copy=False,
        penalty_weight=1.0,
        initial_log_sigma2=0.0,
    )
    with sos.SparsityUpdater(sparse, keras.optimizers.SGD()):
        outputs, _ = sparse(np.ones((1, 4, 3), "float32"), training=True)
    assert len(np.unique(np.round(outputs[0, :, 0], 5))) == 4


@pytest.mark.parametrize(
    "technique", ["VariationalDropout", "L0Regularization"]
)
def test_look_up_negative_indices_counts_from_the_end(technique):
    layer = layers.Embedding(6, 3)
    wrapper = getattr(sos, technique)(layer, penalty_weight=1.0)
    wrapper(np.array([[0]]))
    layer.embeddings.assign(1e3 * (1 + np.arange(18.0).reshape(6, 3)))
    with sos.SparsityUpdater(wrapper, keras.optimizers.SGD()):
        received = wrapper(np.array([[-1]]), training=True)[0, 0]
        expected = wrapper(np.array([[5]]), training=True)[0, 0]
    np.testing.assert_array_equal(received, expected)


def test_reversible_embedding_float32_inputs_of_mixed_policy_keep_dtype():
    layer = layers.ReversibleEmbedding(6, 3, dtype="mixed_bfloat16")
    wrapper = sos.VariationalDropout(layer, penalty_weight=1.0)
    wrapper(np.array([[0]]))
    expected = layer(inputs(1, 2, 3), reverse=True).dtype
    with sos.SparsityUpdater(wrapper, keras.optimizers.SGD()):
        received = wrapper(inputs(1, 2, 3), reverse=True, training=True).dtype
    assert received == expected == tf.float32


def variational() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    return sos.sparsify(
        model,
        "VariationalDropout",
        penalty_weight=1.0,
        initial_log_sigma2=0.0,
    )


def test_sampled_predict_compiled_before_raises_and_is_kept():
    model = variational()
    before = model.predict(inputs(2, 4), verbose=0)
    function = model.predict_function
    with (
        pytest.raises(ValueError, match="traced inside `sos.sampled`"),
        sos.sampled(model, seed=1),
    ):
        model.predict(inputs(2, 4), verbose=0)
    assert model.predict_function is function
    after = model.predict(inputs(2, 4), verbose=0)
    np.testing.assert_array_equal(before, after)


def test_sampled_predict_that_runs_eagerly_samples():
    model = variational()
    model.compile(run_eagerly=True)
    mean = model.predict(inputs(2, 4), verbose=0)
    with sos.sampled(model, seed=1):
        received = model.predict(inputs(2, 4), verbose=0)
        expected = model(inputs(2, 4))
    np.testing.assert_allclose(received, expected, rtol=1e-6)
    assert np.abs(received - mean).max() > 0.1


def test_sampled_model_on_replicas_raises_outside_of_them():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = variational()
    with (
        pytest.raises(ValueError, match="on the replicas"),
        sos.sampled(model, seed=1),
    ):
        model.predict(inputs(2, 4), verbose=0)


def test_sampled_on_replicas_draws_one_model():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = variational()

    def call() -> tf.Tensor:
        with sos.sampled(model, seed=1):
            return model(inputs(2, 4))

    first, second = tf.function(strategy.run)(call).values
    np.testing.assert_array_equal(first, second)


def test_described_call_without_training_parameter_is_sampled():
    class Doubled(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 4))

        def call(self, inputs, training=None):
            return 2 * keras.ops.matmul(inputs, self.kernel)

    @sos.extend.register_use(Doubled)
    def describe(layer, inputs):
        return sos.extend.LinearMap(
            layer.kernel,
            inputs=inputs,
            function=lambda kernel, x: keras.ops.matmul(x, kernel),
            finish=lambda outputs: 2 * outputs,
            positions=lambda: 1,
        )

    wrapper = sos.VariationalDropout(Doubled(), penalty_weight=1.0)
    wrapper(inputs(1, 3))
    with sos.SparsityUpdater(wrapper, keras.optimizers.SGD()):
        outputs = wrapper(np.ones((5, 3), "float32"), training=True)
    assert len(np.unique(outputs[:, 0])) == 5


def test_layer_from_config_of_other_weights_raises_when_called():
    sparse = sos.sparsify(
        keras.Sequential([keras.Input((3,)), layers.Dense(2)]),
        "FixedMask",
        sparsity=0.5,
    ).layers[0]
    config = sparse.get_config()
    config["sparse"]["techniques"][0]["paths"] = {"2": "dense/missing"}
    layer = type(sparse).from_config(config)
    with pytest.raises(ValueError, match="dense/missing"):
        layer(inputs(1, 3))
    with pytest.raises(ValueError, match="dense/missing"):
        layer(keras.Input((3,)))


def test_save_inside_of_frozen_saves_dense_weights(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4)])
    model = sos.sparsify(model, "FixedMask", sparsity=0.5)
    expected = model.layers[0].kernel.numpy()
    with sos.frozen(model):
        model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.layers[0].kernel, expected)


def test_call_positional_training_is_training():
    model = variational()
    layer = model.layers[0]
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        outputs = layer.call(tf.ones((5, 4)), True)
    assert len(np.unique(outputs[:, 0])) == 5


@pytest.mark.parametrize("name", ["techniques", "sparse_weights"])
def test_sparsify_layer_with_attribute_of_its_own_raises(name):
    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)
            setattr(self, name, ["mine"])

        def build(self, shape):
            self.dense.build(shape)

        def call(self, inputs):
            return self.dense(inputs)

    model = keras.Sequential([keras.Input((3,)), Outer()])
    with pytest.raises(ValueError, match=f"attribute `{name}`"):
        sos.sparsify(model, "FixedMask", copy=False)


def test_report_keeps_a_call_of_the_instance():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    layer = model.layers[0]
    object.__setattr__(layer, "call", lambda inputs: inputs)
    call = layer.call
    sos.sparsity_report(model)
    assert layer.call is call


@keras.saving.register_keras_serializable("sparse_layer_test")
class Block(layers.Layer):
    """A layer without `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(3)
        self.second = layers.Dense(4)

    def call(self, inputs):
        return self.second(self.first(inputs))


@keras.saving.register_keras_serializable("sparse_layer_test")
class Blocks(keras.Model):
    """A model without `build`, with a layer that is never called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(), Block()]
        self.logits = layers.Dense(2)
        self.unused = layers.Dense(5)

    def call(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return self.logits(inputs)


def test_model_without_build_is_saved_and_copied(tmp_path):
    model = Blocks()
    x = inputs(2, 4)
    model(x)
    sparse = sos.sparsify(model, "FixedMask", sparsity=0.5)
    sparse.save(tmp_path / "model.keras")
    for other in (
        keras.saving.load_model(tmp_path / "model.keras"),
        copy.deepcopy(sparse),
    ):
        assert len(sos.get_masks(other)) == 5
        np.testing.assert_array_equal(other(x), sparse(x))


def test_report_time_distributed_composite_is_sampled_as_a_whole():
    inside = keras.Sequential([keras.Input((3,)), layers.Dense(4)])
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.TimeDistributed(inside),
            layers.TimeDistributed(layers.Dense(2)),
        ]
    )
    sparse = sos.sparsify(model, "VariationalDropout", penalty_weight=1.0)
    notes = [row["reason"] for row in sos.sparsity_report(sparse).rows]
    assert notes == ["sampled as a whole", "rank 1", "", "rank 1"]


def test_sparse_classes_are_no_registered_subclasses():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    sparse = sos.sparsify(model, "FixedMask", sparsity=0.5)
    cls = type(sparse.layers[0])
    assert keras.saving.get_registered_name(cls) == "sos>SparseLayer"
    # KerasHub takes any of them that derives from the class it looks for.
    assert cls not in keras.saving.get_custom_objects().values()
