"""A small residual network for small images."""

from collections.abc import Sequence

import keras
import numpy as np

WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 3
# Two in each block, a projection where the width changes, the first convolution
# and the dense layer at the end.
_WEIGHT_LAYERS = 2 * BLOCKS_PER_STAGE * len(WIDTHS) + len(WIDTHS) - 1 + 2


def build(
    input_shape: Sequence[int],
    classes: int,
    seed: int,
    *,
    synchronized_batch_norm: bool = False,
) -> keras.Model:
    """Builds the ResNet-20 of He et al. 2016 (arXiv 1512.03385, section 4.2).

    A 3x3 convolution, three stages of three blocks with 16, 32 and 64 filters,
    global average pooling and a dense layer. As in the larger networks of that
    paper, and in the ResNet-50 of the authors, shortcuts that change the width
    are 1x1 convolutions. On images of 28 x 28 x 1 it has 273,754
    weights, moving statistics included.

    Args:
        input_shape: Height, width and channels of the images.
        classes: Number of classes.
        seed: Seed of the initial weights.
        synchronized_batch_norm: Whether batch statistics are computed over all
            replicas of a distribution strategy, or over each one's.

    Returns:
        A model from float images of shape [batch, *input_shape] to logits of
        shape [batch, classes].
    """
    layers = keras.layers
    # A seed for each layer with weights.
    seeds = iter(
        np.random.SeedSequence(seed).generate_state(_WEIGHT_LAYERS).tolist()
    )

    def convolution(
        x: keras.KerasTensor, name: str, filters: int, size: int, strides: int
    ) -> keras.KerasTensor:
        """Applies a convolution without bias, and batch normalization."""
        # Rules and noise depend on the paths of weights, and Keras numbers
        # unnamed layers across the process.
        x = layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding="same",
            use_bias=False,
            kernel_initializer=keras.initializers.HeNormal(seed=next(seeds)),
            name=name,
        )(x)
        # Keras's default of 0.99 averages over more steps than short runs have.
        return layers.BatchNormalization(
            momentum=0.9,
            epsilon=1e-5,
            synchronized=synchronized_batch_norm,
            name=f"{name}_norm",
        )(x)

    def block(
        x: keras.KerasTensor, name: str, filters: int, strides: int
    ) -> keras.KerasTensor:
        shortcut = x
        if strides > 1 or x.shape[-1] != filters:
            shortcut = convolution(x, f"{name}_shortcut", filters, 1, strides)
        x = convolution(x, f"{name}_conv1", filters, 3, strides)
        x = layers.ReLU(name=f"{name}_relu1")(x)
        x = convolution(x, f"{name}_conv2", filters, 3, 1)
        x = layers.Add(name=f"{name}_add")([x, shortcut])
        return layers.ReLU(name=f"{name}_relu2")(x)

    inputs = layers.Input(tuple(input_shape), name="images")
    x = convolution(inputs, "conv1", WIDTHS[0], 3, 1)
    x = layers.ReLU(name="relu1")(x)
    for i, filters in enumerate(WIDTHS):
        for j in range(BLOCKS_PER_STAGE):
            strides = 2 if i > 0 and j == 0 else 1
            x = block(x, f"stage{i + 1}_block{j + 1}", filters, strides)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = layers.Dense(
        classes,
        kernel_initializer=keras.initializers.HeNormal(seed=next(seeds)),
        name="logits",
    )(x)
    return keras.Model(inputs, outputs, name="residual")
