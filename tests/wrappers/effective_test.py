"""Effective weights of calls, frozen weights and posterior samples."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from keras import layers

import sos
from sos.errors import UsageError
from sos.wrappers.base import find_wrappers
from tests.support import techniques

INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


@keras.saving.register_keras_serializable(package="effective_test")
class TiedModel(keras.Model):
    """Reads its table directly, and has entry points beside `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(9, 4, name="table")
        self.dense = layers.Dense(4, name="dense")

    def build(self, shape):
        self.table.build(shape)
        self.dense.build((*shape, 4))

    def encode(self, tokens):
        return self.dense(self.table(tokens))

    def logits(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.table.embeddings))

    def call(self, tokens):
        return self.logits(self.encode(tokens))


def tied(technique="MagnitudePruning", **kwargs):
    keras.utils.set_random_seed(3)
    model = TiedModel()
    model.build((None, 3))
    sparse = sos.sparsify(
        model, technique, **techniques.arguments(technique, **kwargs)
    )
    techniques.make_zeros(sparse)
    return sparse


TOKENS = np.array([[1, 2, 2], [0, 8, 1]])


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_direct_read_in_a_call_is_the_evaluation_weight(technique):
    sparse = tied(technique)
    plain = sos.strip(sparse)
    np.testing.assert_array_equal(sparse(TOKENS), plain(TOKENS))
    np.testing.assert_array_equal(sparse.encode(TOKENS), plain.encode(TOKENS))


def test_direct_read_inside_frozen_is_the_evaluation_weight():
    sparse = tied()
    plain = sos.strip(sparse)
    x = tf.ones((2, 4))
    assert np.any(sparse.logits(x) != plain.logits(x))
    with sos.frozen(sparse):
        np.testing.assert_array_equal(sparse.logits(x), plain.logits(x))
    assert np.any(sparse.logits(x) != plain.logits(x))


def test_table_under_dropout_has_noise_for_each_look_up_and_one_for_reads():
    sparse = tied("VariationalDropout", initial_log_sigma2=0.0)
    optimizer = keras.optimizers.SGD()
    optimizer.build(sparse.trainable_variables)
    tokens = np.full((1, 3), 2)
    with sos.SparsityUpdater(sparse, optimizer) as updater:
        rows = np.asarray(sparse.table(tokens, training=True))[0]
        outputs = np.asarray(sparse(tokens, training=True))[0]
        optimizer.iterations.assign_add(1)
        updater.step()
    assert len(np.unique(rows, axis=0)) == 3
    assert len(np.unique(outputs, axis=0)) == 3


@pytest.mark.oldest
@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_frozen_model_in_a_loop_has_equal_outputs_and_computes_once(technique):
    sparse = tied(technique)

    def decode(tokens, length):
        total = tf.zeros((2, 3, 9))
        for _ in tf.range(length):
            total += sparse(tokens)
        return total

    @tf.function
    def frozen(tokens, length):
        with sos.frozen(sparse):
            return decode(tokens, length)

    expected = tf.function(decode)(TOKENS, tf.constant(3))
    np.testing.assert_allclose(
        frozen(TOKENS, tf.constant(3)), expected, rtol=1e-6
    )
    graph = frozen.get_concrete_function(TOKENS, tf.constant(3)).graph
    state = [
        variable
        for technique in find_wrappers(sparse)
        for weight in technique.sparse_weights
        for variable in weight.state.values()
    ]
    names = [f"/{v.name}" for v in state]
    loop = [
        f
        for f in graph.as_graph_def().library.function
        if "while" in f.signature.name and "body" in f.signature.name
    ]
    reads = [node.name for f in loop for node in f.node_def]
    assert loop
    assert not any(name in read for name in names for read in reads)


def test_frozen_weights_stay_as_they_were_until_the_scope_closes():
    sparse = sos.MagnitudePruning(layers.Dense(3), sparsity=0.5)
    before = sparse(INPUTS)
    with sos.frozen(sparse):
        sparse.set_masks([np.zeros((4, 3))])
        np.testing.assert_array_equal(sparse(INPUTS), before)
    np.testing.assert_array_equal(sparse(INPUTS), np.zeros((5, 3)))


@pytest.mark.parametrize("scope", [sos.frozen, lambda m: sos.sampled(m, 1)])
def test_function_traced_inside_an_eager_scope_raises(scope):
    sparse = tied("VariationalDropout")
    with scope(sparse), pytest.raises(UsageError, match="inside the function"):
        tf.function(sparse)(TOKENS)
    tf.function(sparse)(TOKENS)


@pytest.mark.parametrize("scope", [sos.frozen, lambda m: sos.sampled(m, 1)])
def test_training_inside_a_scope_of_inference_raises(scope):
    sparse = tied("VariationalDropout")
    with scope(sparse), pytest.raises(UsageError, match="training=True"):
        sparse(TOKENS, training=True)


def test_sampled_weights_of_dropout_are_normal_around_theta():
    keras.utils.set_random_seed(0)
    sparse = sos.sparsify(
        keras.Sequential([keras.Input((4,)), layers.Dense(3)]),
        "VariationalDropout",
        penalty_weight=0.0,
        initial_log_sigma2=-1.0,
        clip_log_alpha=None,
    )
    dense = sparse.layers[0]
    theta = np.asarray(dense.kernel)
    samples = []
    for seed in range(120):
        with sos.sampled(sparse, seed=seed):
            samples.append(np.asarray(dense.kernel.value))
            outputs = sparse(INPUTS)
            # One network: all examples see the same weights.
            np.testing.assert_allclose(
                outputs, INPUTS @ samples[-1], rtol=1e-4, atol=1e-5
            )
    standard = (np.array(samples) - theta) / np.exp(-0.5)
    assert scipy.stats.kstest(standard.ravel(), "norm").pvalue > 1e-3
    assert len(np.unique(standard[:, 0, 0])) == 120


def test_sampled_gates_have_the_mean_of_hard_concrete_gates():
    sparse = sos.L0Regularization(
        layers.Dense(50, use_bias=False), penalty_weight=0.0
    )
    sparse(np.ones((1, 40), "float32"))
    sparse.layer.kernel.assign(np.ones((40, 50)))
    (weight,) = sparse.sparse_weights
    weight.state["log_alpha"].assign(np.zeros((40, 50)))
    gates = []
    for seed in range(5):
        with sos.sampled(sparse, seed=seed):
            gates.append(np.asarray(sparse.layer.kernel.value))
    # Log alpha 0 makes them symmetric around 1/2; P(0) = P(1) by equation 12.
    zero = scipy.stats.logistic.cdf(2 / 3 * np.log(0.1 / 1.1))
    assert np.mean(gates) == pytest.approx(0.5, abs=0.02)
    assert np.mean(np.array(gates) == 0) == pytest.approx(zero, abs=0.02)


def test_sampled_with_one_seed_gives_one_network():
    sparse = tied("VariationalDropout", initial_log_sigma2=0.0)
    outputs = []
    for seed in (1, 1, 2):
        with sos.sampled(sparse, seed=seed):
            outputs.append(np.asarray(sparse(TOKENS)))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.any(outputs[0] != outputs[2])

    @tf.function
    def sample(seed):
        with sos.sampled(sparse, seed=seed):
            return sparse(TOKENS)

    np.testing.assert_allclose(sample(tf.constant(2)), outputs[2], rtol=1e-5)


def test_sampled_model_of_masks_raises():
    with pytest.raises(UsageError, match="needs a technique with a posterior"):
        with sos.sampled(tied(), seed=0):
            pass


def test_sampled_outside_of_replicas_raises():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    sparse = tied("VariationalDropout")
    with (
        strategy.scope(),
        pytest.raises(UsageError, match="strategy.run"),
        sos.sampled(sparse, seed=0),
    ):
        pass


def test_assignment_to_a_sampled_weight_raises():
    class Clipped(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(4, 3), name="kernel")

        def call(self, inputs):
            self.kernel.assign(tf.clip_by_value(self.kernel.value, -0.1, 0.1))
            return inputs @ self.kernel

    sparse = sos.L0Regularization(Clipped(), penalty_weight=0.0)
    with pytest.raises(UsageError, match="assigns to its weight"):
        sparse(INPUTS)
    pruned = sos.MagnitudePruning(Clipped(), sparsity=0.5)
    pruned(INPUTS)
    pruned.layer.kernel.assign(np.full((4, 3), 5.0))
    mask = np.arange(12).reshape(4, 3) % 2
    pruned.set_masks([mask])
    pruned(INPUTS)
    expected = np.where(mask, np.float32(0.1), 5)
    np.testing.assert_array_equal(pruned.layer.kernel, expected)
