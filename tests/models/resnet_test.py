"""ResNets: sizes from the paper, and a forward pass written in NumPy."""

import keras
import numpy as np
import pytest

import sos
from models import resnet
from sos.errors import UsageError
from tests.support import techniques


def _weights(model):
    """Returns the arrays of a model by path."""
    return {variable.path: np.asarray(variable) for variable in model.variables}


class _Reference:
    """The forward pass in evaluation, from the published description.

    Args:
        weights: Arrays by path.
        blocks: Number of blocks in each group.
        bottleneck: Whether they have three convolutions.
    """

    def __init__(self, weights, blocks, bottleneck):
        self.weights = weights
        self.blocks = blocks
        self.bottleneck = bottleneck

    def __call__(self, images):
        mean = np.array([0.485, 0.456, 0.406]) * 255
        stddev = np.array([0.229, 0.224, 0.225]) * 255
        x = self.unit((images - mean) / stddev, "initial_conv", 2, (3, 3))
        x = np.maximum(x, 0)
        # "Same" padding of a 3x3 window with stride 2 on an even size: one row
        # at the end.
        x = np.pad(
            x,
            ((0, 0), (0, 1), (0, 1), (0, 0)),
            constant_values=-np.inf,
        )
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        x = windows[:, ::2, ::2].max((-2, -1))
        for group, count in enumerate(self.blocks, start=1):
            for block in range(1, count + 1):
                name = f"block{group}_{block}"
                stride = 2 if group > 1 and block == 1 else 1
                shortcut = x
                if block == 1:
                    shortcut = self.unit(x, f"{name}_projection", stride)
                if self.bottleneck:
                    x = np.maximum(self.unit(x, f"{name}_conv1"), 0)
                    x = self.unit(x, f"{name}_conv2", stride, (1, 1))
                    x = np.maximum(x, 0)
                    x = self.unit(x, f"{name}_conv3")
                else:
                    x = self.unit(x, f"{name}_conv1", stride, (1, 1))
                    x = np.maximum(x, 0)
                    x = self.unit(x, f"{name}_conv2", 1, (1, 1))
                x = np.maximum(x + shortcut, 0)
        x = x.mean((1, 2)) @ self.weights["final_dense/kernel"]
        return x + self.weights["final_dense/bias"]

    def unit(self, x, name, stride=1, padding=(0, 0)):
        """Convolves with zeros around the image, and normalizes."""
        kernel = self.weights[f"{name}/kernel"]
        x = np.pad(x, ((0, 0), padding, padding, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(
            x, kernel.shape[:2], (1, 2)
        )[:, ::stride, ::stride]
        x = np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True)
        gamma, beta, mean, variance = (
            self.weights[f"{name}_norm/{part}"]
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


@pytest.fixture(scope="module")
def resnet50():
    return resnet.build((224, 224, 3), 1000, seed=0)


def test_resnet50_has_the_weights_of_the_paper(resnet50):
    kernels = [w for w in resnet50.trainable_weights if len(w.shape) > 1]
    sizes = {w.path: int(np.prod(w.shape)) for w in kernels}
    assert len(kernels) == 53 + 1
    assert sum(sizes.values()) == 25_502_912
    assert sizes["initial_conv/kernel"] == 9_408
    assert sizes["final_dense/kernel"] == 2_048_000
    trainable = sum(int(np.prod(w.shape)) for w in resnet50.trainable_weights)
    assert trainable == 25_557_032
    assert (
        sos.sparsity_report(resnet50).totals["multiply_adds"] == 4_089_184_256
    )


@pytest.mark.parametrize(
    ("depth", "weights"),
    # Of torchvision's networks, which have no projection in the first group of
    # basic blocks: 64 x 64 weights and 2 x 64 of batch normalization.
    [
        (18, 11_689_512 + 4224),
        (34, 21_797_672 + 4224),
        (101, 44_549_160),
        (152, 60_192_808),
    ],
)
def test_other_depths_have_their_weights(depth, weights):
    model = resnet.build((224, 224, 3), 1000, seed=0, depth=depth)
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert trainable == weights


@pytest.mark.parametrize(
    ("depth", "width", "size"), [(18, 1.0, 64), (50, 0.3, 64), (34, 0.25, 96)]
)
def test_forward_pass_equals_numpy(depth, width, size):
    model = resnet.build((size, size, 3), 7, seed=1, depth=depth, width=width)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if len(variable.shape) == 1:
            # Positive, as variances must be.
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    images = rng.integers(0, 256, (2, size, size, 3), np.uint8)
    bottleneck, blocks = resnet.DEPTHS[depth]
    reference = _Reference(_weights(model), blocks, bottleneck)
    expected = reference(images.astype(np.float64))
    actual = np.asarray(model(images, training=False))
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_begin_as_the_identity(depth):
    model = resnet.build((64, 64, 3), 10, seed=0, depth=depth, width=0.25)
    probe = keras.Model(
        model.input,
        [
            model.get_layer(f"block1_{i + 1}_relu").output
            for i in range(resnet.DEPTHS[depth][1][0])
        ],
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3))
    first, *others = probe(images, training=True)
    assert others
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_batch_norm_has_the_constants_of_the_study(resnet50):
    norms = [
        layer
        for layer in resnet50.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) == 53
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.9, 1e-5)}


def test_initial_kernels_have_the_published_distributions(resnet50):
    weights = _weights(resnet50)
    assert weights["final_dense/kernel"].std() == pytest.approx(0.01, rel=0.01)
    assert not weights["final_dense/bias"].any()
    for name in ("block1_1_conv2", "block4_3_conv1", "block3_1_projection"):
        kernel = weights[f"{name}/kernel"]
        stddev = (1 / kernel[..., 0].size) ** 0.5
        assert kernel.std() == pytest.approx(stddev, rel=0.02)
        # Cut off at two standard deviations of what is cut off.
        assert np.abs(kernel).max() < 2 * stddev / 0.8796 + 1e-6
    for name, array in weights.items():
        if name.endswith("gamma"):
            last = name.endswith("_conv3_norm/gamma")
            assert (array == (0 if last else 1)).all(), name


def test_seeds_determine_the_weights():
    def kernels(seed):
        model = resnet.build((32, 32, 3), 10, seed=seed, depth=18, width=0.25)
        return [np.asarray(w) for w in model.weights if len(w.shape) > 1]

    first, same, other = kernels(3), kernels(3), kernels(4)
    for a, b, c in zip(first, same, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).mean() > 0.99
    assert len({kernel.ravel()[:9].tobytes() for kernel in first}) == 22


def test_pixels_are_normalized_in_float32_also_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = resnet.build((32, 32, 3), 10, 0, depth=18, width=0.25)
    finally:
        keras.config.set_dtype_policy("float32")
    probe = keras.Model(model.input, model.get_layer("normalization").output)
    images = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    normalized = np.asarray(probe(images))
    assert normalized.dtype == np.float32
    mean, stddev = np.array(resnet.MEAN), np.array(resnet.STDDEV)
    np.testing.assert_allclose(
        normalized, (images - mean) / stddev, rtol=1e-5, atol=1e-6
    )
    assert model(images).dtype == "bfloat16"


@pytest.mark.parametrize("technique", [None, *techniques.NAMES])
def test_l2_is_half_the_squares_of_raw_kernels(technique):
    model = resnet.build((32, 32, 3), 10, 0, depth=18, width=0.25, l2=1e-3)
    expected = 1e-3 * sum(
        0.5 * np.sum(np.square(np.asarray(w, np.float64)))
        for w in model.weights
        if w.path.endswith("/kernel")
    )
    if technique is not None:
        arguments = techniques.arguments(technique)
        if "penalty_weight" in arguments:
            arguments["penalty_weight"] = 0.0
        model = sos.sparsify(model, technique, copy=False, **arguments)
        if technique.endswith(("Pruning", "Mask")):
            masks = sos.get_masks(model)
            sos.set_masks(
                model, {k: np.zeros_like(m) for k, m in masks.items()}
            )
    losses = [float(loss) for loss in model.losses]
    assert sum(losses) == pytest.approx(expected, rel=1e-5)
    assert len([loss for loss in losses if loss]) == 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 42}, "`depth` must be one of 18, 34"),
        ({"width": 0.01}, "`width` must be at least 0.015625"),
        ({"l2": -1.0}, "`l2` at least 0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(UsageError, match=message):
        resnet.build((32, 32, 3), 10, 0, **options)


def test_grey_images_raise():
    with pytest.raises(UsageError, match=r"3 channels.*\(28, 28, 1\)"):
        resnet.build((28, 28, 1), 10, 0)
