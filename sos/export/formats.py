"""The formats that a model can be exported to."""

import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from sos.errors import UsageError
from sos.export import saved_model
from sos.export.serving import ServingModule

# By name, a function that writes a `tf.Module` with signatures to a path.
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
    """Exports a model to be served, complete or not at all.

    Sparse layers are stripped first, so that the zeros are in place. Every
    variable is stored once.

    The format `"tf_saved_model"` is a TensorFlow SavedModel that needs neither
    `sos` nor Keras. `tf.saved_model.load` returns an object that is called as
    the model and computes as in inference. Its signature `serving_default`,
    which TensorFlow Serving uses, takes and returns tensors by name: see
    `sos.export.ServingModule`, which also shows how to add signatures and
    assets. A SavedModel at `path` is replaced once the new one is complete. On
    an object store such as `gs://`, where directories cannot be renamed, it is
    removed before the new one is uploaded. Only one process at a time may write
    to a path.

    ```
    sos.export_model(model, "exported")
    loaded = tf.saved_model.load("exported")
    outputs = loaded(inputs)
    ```

    Args:
        model: A built Keras 3 model, sparse or not; or a `tf.Module` with an
            attribute `signatures`, a mapping from names to `tf.function`s that
            have an `input_signature`, or to concrete functions.
        path: Where to write.
        format: The name of the format.
        input_signature: The first argument of a Keras model, as a
            `tf.TensorSpec` or a list, tuple or dictionary of them. Default: the
            model's `keras.Input`s, with a batch of any size. Subclassed models
            have none.

    Raises:
        UsageError: If the format is unknown, the model is not built, its inputs
            are unknown or nested, two of them have the same name, or
            `signatures` is invalid.
        StorageError: If `path` holds anything other than a SavedModel, or
            cannot be written.
        TypeError: If `model` or `input_signature` has the wrong type.
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
            "`input_signature` is for Keras models. The signatures of a "
            f"tf.Module are its own. Received: model={model!r} and "
            f"input_signature={input_signature!r}"
        )
    _FORMATS[format](model, os.fspath(path))
