"""A small convolutional network for small images."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def build(input_shape: Sequence[int], classes: int, seed: int) -> keras.Model:
    """Builds a network of three strided 3x3 convolutions and two dense layers.

    On images of 28 x 28 x 1 it has 155,786 weights, biases included.

    Args:
        input_shape: Height, width and channels of the images.
        classes: Number of classes.
        seed: Seed of the initial weights.

    Returns:
        A model from float images of shape [batch, *input_shape] to logits of
        shape [batch, classes].
    """
    layers = keras.layers
    # A seed for each layer.
    seeds = iter(np.random.SeedSequence(seed).generate_state(5).tolist())

    def options(name: str) -> dict[str, Any]:
        # Rules and noise depend on the paths of weights, and Keras numbers
        # unnamed layers across the process.
        initializer = keras.initializers.GlorotUniform(seed=next(seeds))
        return {"name": name, "kernel_initializer": initializer}

    def convolution(name: str, filters: int) -> keras.Layer:
        return layers.Conv2D(
            filters,
            3,
            strides=2,
            padding="same",
            activation="relu",
            **options(name),
        )

    return keras.Sequential(
        [
            layers.Input(tuple(input_shape)),
            convolution("conv1", 16),
            convolution("conv2", 32),
            convolution("conv3", 64),
            layers.Flatten(name="flatten"),
            layers.Dense(128, activation="relu", **options("hidden")),
            layers.Dense(classes, **options("logits")),
        ],
        name="convnet",
    )
