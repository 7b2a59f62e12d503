import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from models import residual
from tests.support import techniques


@pytest.fixture(scope="module")
def model():
    return residual.build((28, 28, 1), 10, seed=3)


def test_build_of_the_network_has_its_shapes_and_size(model):
    assert model.output_shape == (None, 10)
    # A 3x3 convolution on 1 channel; two for each of 3 blocks of 16, 32 and 64
    # filters; two projections; the last layer.
    convolutions = 9 * (16 + 6 * 16**2 + 16 * 32 + 5 * 32**2)
    convolutions += 9 * (32 * 64 + 5 * 64**2) + 16 * 32 + 32 * 64
    channels = 16 + 6 * (16 + 32 + 64) + 32 + 64
    assert model.count_params() == convolutions + 4 * channels + 650
    assert model.count_params() == 273_754


def test_build_of_the_network_orders_its_weight_layers(model):
    names = [
        weight.path.removesuffix("/kernel")
        for weight in model.weights
        if len(weight.shape) > 1
    ]
    assert len(names) == 22
    assert names[:3] == ["conv1", "stage1_block1_conv1", "stage1_block1_conv2"]
    assert names[-2:] == ["stage3_block3_conv2", "logits"]
    assert "stage1_block1_shortcut" not in names
    assert names.index("stage2_block1_shortcut") == 9


def test_build_of_the_network_halves_the_resolution_twice(model):
    shapes = {
        layer.name: layer.output.shape[1:]
        for layer in model.layers
        if layer.name.endswith("_relu2")
    }
    assert shapes["stage1_block3_relu2"] == (28, 28, 16)
    assert shapes["stage2_block1_relu2"] == (14, 14, 32)
    assert shapes["stage3_block3_relu2"] == (7, 7, 64)


def test_build_of_one_seed_gives_the_same_weights(model):
    same = residual.build((28, 28, 1), 10, seed=3)
    other = residual.build((28, 28, 1), 10, seed=4)
    kernels = []
    for a, b, c in zip(model.weights, same.weights, other.weights, strict=True):
        assert a.path == b.path == c.path
        np.testing.assert_array_equal(a, b)
        if len(a.shape) > 1:
            assert (np.asarray(a) != np.asarray(c)).mean() > 0.99
            kernels.append(np.asarray(a))
    # No two layers begin alike, and all as He et al. 2015 have it.
    assert len({kernel.ravel()[:9].tobytes() for kernel in kernels}) == 22
    for kernel in kernels:
        if kernel.size > 2000:
            fan_in = kernel[..., 0].size
            assert kernel.std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_block_of_zeros_returns_its_input():
    model = residual.build((28, 28, 1), 10, seed=0)
    # With its last normalization scaled to nothing, a block is the identity
    # on what is not negative.
    model.get_layer("stage1_block2_conv2_norm").gamma.assign(np.zeros(16))
    probe = keras.Model(
        model.input,
        [model.get_layer(f"stage1_block{i}_relu2").output for i in (1, 2, 3)],
    )
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    before, after, later = probe(images, training=False)
    np.testing.assert_array_equal(before, after)
    assert (np.asarray(later) != np.asarray(after)).any()


def test_build_with_synchronized_batch_norm_synchronizes_it():
    for synchronized in (False, True):
        model = residual.build(
            (8, 8, 1), 4, seed=0, synchronized_batch_norm=synchronized
        )
        norms = [
            layer
            for layer in model.layers
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        assert len(norms) == 21
        assert {norm.synchronized for norm in norms} == {synchronized}


def test_sparsify_of_the_network_reaches_every_kernel_and_trains(model):
    sparse = sos.sparsify(model, sos.FixedMask, sparsity=0.9)
    report = sos.sparsity_report(sparse)
    assert sum(row["technique"] == "FixedMask" for row in report.rows) == 22
    assert report.sparsity == pytest.approx(0.9, abs=1e-3)
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(sparse.trainable_variables)
    images = tf.random.stateless_uniform((2, 28, 28, 1), seed=(0, 1))
    before = techniques.values(sparse)
    # One step, not traced: that takes longer than the step.
    with (
        sos.SparsityUpdater(sparse, optimizer) as updater,
        tf.GradientTape() as tape,
    ):
        logits = sparse(images, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits([3, 5], logits)
        loss = tf.reduce_mean(losses)
        variables = sparse.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        updater.step()
    for variable, old in zip(sparse.variables, before, strict=True):
        moved = (np.asarray(variable) != old).any()
        assert moved == variable.trainable or "moving" in variable.path
