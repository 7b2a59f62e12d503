"""Export of a model to one of several formats."""

import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from sos.errors import UsageError
from sos.export import saved_model
from sos.export.serving import ServingModule

# Functions that write a `tf.Module` with signatures to a path, by name.
_FORMATS: dict[str, Callable[[tf.Module, str], None]] = {
    "tf_saved_model": saved_model.write,
}


def export_model(
    model: keras.Model | tf.Module,
    path: str | os.PathLike,
    *,
    format: str = "tf_saved_model",
    input_signature: Any = None,
) -> None:
    """Exports a model for serving, atomically.

    Sparse layers are stripped: pruned weights are zeros. Every variable is
    stored once.

    The format `"tf_saved_model"` is a TensorFlow SavedModel, which requires
    neither `sos` nor Keras. `tf.saved_model.load` returns an object that is
    called like the model and runs inference. Its signature `serving_default`,
    which TensorFlow Serving uses, takes and returns tensors by name. See
    `sos.export.ServingModule`, which can also have further signatures and
    assets. A SavedModel at `path` is replaced when the new one is complete. On
    an object store such as `gs://`, where directories cannot be renamed, it is
    removed before the new one is uploaded. Only one process at a time may write
    to a path.

    Args:
        model: A built Keras 3 model, sparse or dense; or a `tf.Module` with an
            attribute `signatures`, a mapping from names to `tf.function`s that
            have an `input_signature`, or to concrete functions.
        path: The directory to write.
        format: Name of the format.
        input_signature: Spec of the first argument of a Keras model: a
            `tf.TensorSpec`, or a list, tuple or dictionary of them. Default:
            the model's `keras.Input`s, with any batch size. Required for
            subclassed models.

    Raises:
        UsageError: If the format is unknown, the model is not built, its inputs
            are unknown or nested, two of them have the same name, or
            `signatures` is invalid.
        StorageError: If `path` holds anything other than a SavedModel, or
            cannot be written.
        TypeError: If `model` or `input_signature` has the wrong type.

    Example:
    >>> import keras, sos
    >>> import tensorflow as tf
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> sparse = sos.sparsify(model, "MagnitudePruning", sparsity=0.5)
    >>> sos.export_model(sparse, "exported")
    >>> loaded = tf.saved_model.load("exported")
    >>> loaded(tf.ones((2, 8))).shape
    TensorShape([2, 4])
    """
    if format not in _FORMATS:
        raise UsageError(
            f"`format` must be one of {', '.join(map(repr, _FORMATS))}. "
            f"Received: format={format!r}"
        )
    if isinstance(model, keras.Model):
        model = ServingModule(model, input_signature)
    elif not isinstance(model, tf.Module) or not hasattr(model, "signatures"):
        raise TypeError(
            "`model` must be a Keras 3 model or a tf.Module with an attribute "
            f"`signatures`. Received: model={model!r} of type "
            f"{type(model).__name__}"
        )
    elif input_signature is not None:
        raise UsageError(
            "`input_signature` is for Keras models. A tf.Module has its own "
            f"`signatures`. Received: model={model!r}, "
            f"input_signature={input_signature!r}"
        )
    _FORMATS[format](model, os.fspath(path))
