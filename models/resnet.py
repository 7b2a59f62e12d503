"""Residual networks for ImageNet, as the authors trained them.

ResNet-18 to ResNet-200 of He et al. 2015 (arXiv 1512.03385) with two changes
that the authors' program took from Goyal et al. 2017 (arXiv 1706.02677): where
a bottleneck block halves the resolution, its 3x3 convolution has the stride;
and the scale of the last batch normalization of a block is initially 0, so that
every block begins as the identity.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from sos.errors import UsageError

#: By depth, whether blocks are bottlenecks, and the blocks of each group.
DEPTHS: dict[int, tuple[bool, tuple[int, int, int, int]]] = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
    200: (True, (3, 24, 36, 3)),
}
FILTERS = (64, 128, 256, 512)

# Of the training images of ImageNet, by channel; pixels are in [0, 255].
MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
STDDEV = tuple(255 * stddev for stddev in (0.229, 0.224, 0.225))


def build(
    input_shape: Sequence[int],
    classes: int,
    seed: int,
    *,
    depth: int = 50,
    width: float = 1.0,
    l2: float = 0.0,
    synchronized_batch_norm: bool = False,
) -> keras.Model:
    """Builds a residual network.

    ResNet-50 has 25,557,032 weights for 1,000 classes, moving statistics not
    counted, and takes 4.1e9 multiply-adds for an image of 224 x 224.

    The network normalizes the pixels itself, in float32, so that images can
    travel to an accelerator as bytes.

    Args:
        input_shape: Height, width and channels of the images: 3 channels.
        classes: Number of classes.
        seed: Seed of the initial weights.
        depth: Number of layers, one of `DEPTHS`.
        width: Factor of the number of filters of every convolution. Numbers of
            filters are rounded down.
        l2: Coefficient of an L2 penalty: half the sum of squares of every
            kernel of a convolution and of the last layer, times `l2`, is in
            `model.losses`. Of a sparse model it is that of the raw kernels,
            and of theta for techniques that add variables.
        synchronized_batch_norm: Whether batch statistics are computed over all
            replicas of a distribution strategy, or, as the authors', over each
            one's.

    Returns:
        A model from images with pixels in [0, 255], of shape [batch,
        *input_shape] and any dtype, to logits of shape [batch, classes].

    Raises:
        UsageError: If there is no such network.

    Example:
    >>> from models import resnet
    >>> network = resnet.build((32, 32, 3), 10, seed=0, depth=18, width=0.25)
    >>> network.output_shape
    (None, 10)
    """
    if depth not in DEPTHS:
        raise UsageError(
            "`depth` must be one of "
            f"{', '.join(map(str, DEPTHS))}. Received: depth={depth!r}"
        )
    if len(input_shape) != 3 or input_shape[-1] != len(MEAN):
        raise UsageError(
            "`input_shape` must be height, width and 3 channels. Received: "
            f"input_shape={tuple(input_shape)!r}"
        )
    if not int(FILTERS[0] * width) or l2 < 0:
        raise UsageError(
            f"`width` must be at least {1 / FILTERS[0]}, and `l2` at least 0. "
            f"Received: width={width!r}, l2={l2!r}"
        )
    bottleneck, blocks = DEPTHS[depth]
    layers = _Layers(seed, l2, synchronized_batch_norm)
    images = keras.Input(tuple(input_shape))
    x = keras.layers.Normalization(
        mean=MEAN,
        variance=tuple(stddev**2 for stddev in STDDEV),
        # bfloat16 would keep 8 bits of the result.
        dtype="float32",
        name="normalization",
    )(images)
    x = layers.convolution(x, "initial_conv", int(FILTERS[0] * width), 7, 2)
    x = layers.normalization(x, "initial_conv")
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="initial_pool")(x)
    for group, (filters, count) in enumerate(
        zip(FILTERS, blocks, strict=True), start=1
    ):
        for block in range(1, count + 1):
            strides = 2 if group > 1 and block == 1 else 1
            x = layers.block(
                x,
                f"block{group}_{block}",
                int(filters * width),
                strides,
                bottleneck=bottleneck,
                project=block == 1,
            )
    x = keras.layers.GlobalAveragePooling2D(name="final_pool")(x)
    logits = keras.layers.Dense(
        classes,
        kernel_initializer=keras.initializers.RandomNormal(
            stddev=0.01, seed=layers.next_seed()
        ),
        kernel_regularizer=layers.regularizer(),
        name="final_dense",
    )(x)
    return keras.Model(images, logits, name=f"resnet{depth}")


class _Layers:
    """Adds layers to a network.

    They have names, because rules and noise depend on the paths of weights, and
    Keras numbers unnamed layers across the process.

    Args:
        seed: Seed of all initial weights.
        l2: Coefficient of the L2 penalty.
        synchronized: Whether batch statistics are those of all replicas.
    """

    def __init__(self, seed: int, l2: float, synchronized: bool) -> None:
        self._seeds = np.random.SeedSequence(seed)
        self._l2 = l2
        self._synchronized = synchronized

    def next_seed(self) -> int:
        """Returns the seed of another layer."""
        return int(self._seeds.spawn(1)[0].generate_state(1)[0])

    def regularizer(self) -> keras.regularizers.Regularizer | None:
        """Returns the penalty of a kernel."""
        # Keras does not halve the sum of squares.
        return keras.regularizers.L2(self._l2 / 2) if self._l2 else None

    def convolution(
        self,
        x: keras.KerasTensor,
        name: str,
        filters: int,
        size: int,
        strides: int = 1,
    ) -> keras.KerasTensor:
        """Applies a convolution without bias.

        With strides, the padding does not depend on the size of the image, as
        "same" padding would.
        """
        before, after = (size - 1) // 2, size // 2
        if strides > 1 and size > 1:
            x = keras.layers.ZeroPadding2D(
                ((before, after), (before, after)), name=f"{name}_pad"
            )(x)
        return keras.layers.Conv2D(
            filters,
            size,
            strides=strides,
            padding="valid" if strides > 1 else "same",
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                seed=self.next_seed()
            ),
            kernel_regularizer=self.regularizer(),
            name=name,
        )(x)

    def normalization(
        self, x: keras.KerasTensor, name: str, **options: Any
    ) -> keras.KerasTensor:
        """Applies batch normalization, and by default ReLU."""
        relu = options.pop("relu", True)
        x = keras.layers.BatchNormalization(
            momentum=0.9,
            epsilon=1e-5,
            synchronized=self._synchronized,
            name=f"{name}_norm",
            **options,
        )(x)
        return keras.layers.ReLU(name=f"{name}_relu")(x) if relu else x

    def block(
        self,
        x: keras.KerasTensor,
        name: str,
        filters: int,
        strides: int,
        *,
        bottleneck: bool,
        project: bool,
    ) -> keras.KerasTensor:
        """Applies a block of two or, as a bottleneck, three convolutions."""
        # Filters, size and strides.
        convolutions = [(filters, 3, strides), (filters, 3, 1)]
        if bottleneck:
            convolutions = [
                (filters, 1, 1),
                (filters, 3, strides),
                (4 * filters, 1, 1),
            ]
        shortcut = x
        if project:
            shortcut = self.convolution(
                x, f"{name}_projection", convolutions[-1][0], 1, strides
            )
            shortcut = self.normalization(
                shortcut, f"{name}_projection", relu=False
            )
        for number, convolution in enumerate(convolutions, start=1):
            last = number == len(convolutions)
            x = self.convolution(x, f"{name}_conv{number}", *convolution)
            x = self.normalization(
                x,
                f"{name}_conv{number}",
                relu=not last,
                gamma_initializer="zeros" if last else "ones",
            )
        x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
        return keras.layers.ReLU(name=f"{name}_relu")(x)
