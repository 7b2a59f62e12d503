"""Networks of benchmarks, dense or with any technique."""

from typing import Any

import keras

import sos
from models import convnet

DENSE = "dense"

# Shape of the images and number of classes, by name. The small networks are for
# quick trials. "attention" has weights in a composite layer, and a table for
# look-up and matrix multiplication.
NETWORKS = {
    "attention": ((28, 28, 1), 10),
    "convnet": ((28, 28, 1), 10),
    "resnet50": ((224, 224, 3), 1000),
}


def build(
    name: str,
    technique: str = DENSE,
    hyperparameters: dict[str, Any] | None = None,
    *,
    size: int | None = None,
) -> keras.Model:
    """Builds one of `NETWORKS`.

    Args:
        name: Name of the network.
        technique: Name of a registered technique, or "dense".
        hyperparameters: Hyperparameters of any techniques. Those of other
            techniques are ignored.
        size: Height and width of the images; by default that in `NETWORKS`.

    Returns:
        A built model that returns logits.
    """
    shape, classes = NETWORKS[name]
    if size is not None:
        shape = (size, size, shape[-1])
    if name == "convnet":
        model = convnet.build(shape, classes, seed=0)
    elif name == "attention":
        model = _attention(shape, classes)
    else:
        model = keras.applications.ResNet50(
            weights=None,
            input_shape=shape,
            classes=classes,
            classifier_activation=None,
        )
    if technique == DENSE:
        return model
    selected = sos.extend.select_hyperparameters(
        technique, hyperparameters or {}
    )
    return sos.sparsify(model, technique, copy=False, **selected)


def _attention(shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Attends over the rows of an image, each with its brightness as a word."""
    rows, columns, channels = shape
    images = keras.Input(shape)
    table = keras.layers.ReversibleEmbedding(classes, 32, name="table")
    brightness = keras.ops.mean(images, axis=(2, 3)) * classes
    words = keras.ops.clip(brightness, 0, classes - 1)
    x = keras.layers.Reshape((rows, columns * channels))(images)
    x = keras.layers.Dense(32, name="projection")(x)
    x = x + table(keras.ops.cast(words, "int32"))
    attention = keras.layers.MultiHeadAttention(2, 16, name="attention")
    x = keras.layers.LayerNormalization(name="norm")(x + attention(x, x))
    x = keras.layers.GlobalAveragePooling1D(name="pooling")(x)
    return keras.Model(images, table(x, reverse=True))
