"""The networks that benchmarks train, dense or with any technique."""

from typing import Any

import keras

import sos
from models import convnet

DENSE = "dense"

# By name: the images' shape and the number of classes. The small ones are for
# trying a benchmark out; "attention" has weights inside of a composite layer
# and a table that is looked up and multiplied by.
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
        name: Its name.
        technique: The name of a registered technique, or "dense".
        hyperparameters: Hyperparameters of any techniques, of which this one
            takes those that it has.
        size: Height and width of the images; None for the network's usual one.

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
