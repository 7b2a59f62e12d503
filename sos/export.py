"""Exports trained models for serving."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from sos.files import atomic_directory
from sos.surgery import strip
from sos.wrappers.base import find_wrappers


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    input_signature: Any = None,
) -> None:
    """Writes a model as a SavedModel that needs neither `sos` nor Keras.

    Sparse layers are stripped first, so that the zeros are in place. Every
    variable is stored once. What `tf.saved_model.load` returns is called with
    the inputs as the model takes them, and computes as in inference. Its
    signature `serving_default`, which TensorFlow Serving uses, has the inputs
    and outputs by name: by the keys of dictionaries, else the inputs by the
    names of their `keras.Input`, or `inputs` for one without a name, and the
    outputs as `output_0`, `output_1` and so on.

    Args:
        model: A Keras 3 model that is built, sparse or not.
        path: The directory to write, by one process at a time, of which nothing
            is seen before it is complete. A SavedModel that is there is
            replaced then; on an object store such as `gs://`, where directories
            cannot be renamed, it is removed before the new one is uploaded.
        input_signature: What the model takes as its first argument, as a
            `tf.TensorSpec` or a list, tuple or dictionary of them. By default
            that of the model's `Input`s, with a batch of any size; subclassed
            models have none.

    Raises:
        TypeError: If `model` is not a Keras 3 model, or the signature holds
            something else than `tf.TensorSpec`.
        ValueError: If the model is not built, its inputs are not known or
            nested, or two of them have one name.
        FileExistsError: If there is something else at `path`.
    """
    _check_model(model)
    path = os.fspath(path)
    _check_path(path)
    if input_signature is None:
        input_signature = _signature_of(model)
    names = _input_names(input_signature)
    if find_wrappers(model):
        model = strip(model)
    module = _Servable(model, input_signature)
    put = _upload if "://" in path else atomic_directory
    with put(path) as temporary:
        tf.saved_model.save(
            module,
            os.fspath(temporary),
            signatures=_by_name(module, input_signature, names),
        )


class _Servable(tf.Module):
    """Holds the variables of a model, and not the model itself.

    As an attribute the model would be stored too, with its variables a second
    time.
    """

    def __init__(self, model: keras.Model, input_signature: Any) -> None:
        super().__init__()
        self.weights = [variable.value for variable in model.variables]
        # Of layers such as StringLookup.
        self.tables = [
            layer.lookup_table
            for layer in model._flatten_layers()
            if hasattr(layer, "lookup_table")
        ]

        def call(inputs: Any) -> Any:
            return model(inputs, training=False)

        self.__call__ = tf.function(call, input_signature=[input_signature])


def _by_name(module: _Servable, input_signature: Any, names: list[str]) -> Any:
    """The function that takes and returns tensors by name."""

    def serve(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = keras.tree.pack_sequence_as(
            input_signature, [tensors[name] for name in names]
        )
        outputs = module.__call__(inputs)
        if isinstance(outputs, dict):
            return outputs
        outputs = keras.tree.flatten(outputs)
        return {f"output_{i}": output for i, output in enumerate(outputs)}

    specs = {
        name: tf.TensorSpec(spec.shape, spec.dtype, name)
        for name, spec in zip(
            names, keras.tree.flatten(input_signature), strict=True
        )
    }
    return tf.function(serve).get_concrete_function(**specs)


def _signature_of(model: keras.Model) -> Any:
    """What the `Input`s of a model take, with a batch of any size."""
    try:
        # Keras gives the list alone for a Sequential model.
        inputs = (
            model.inputs[0]
            if isinstance(model, keras.Sequential)
            else model.input
        )
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"What the model {model.name!r} of class {type(model).__name__} "
            "takes is not known, as it has no `keras.Input`. Pass "
            "`input_signature`, such as tf.TensorSpec((None, 224, 224, 3))."
        ) from error
    return keras.tree.map_structure(
        lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype, x.name), inputs
    )


def _input_names(input_signature: Any) -> list[str]:
    """The names of the inputs, in the order of `keras.tree.flatten`."""
    specs = keras.tree.flatten(input_signature)
    several = isinstance(input_signature, (dict, list, tuple))
    flat = input_signature if several else [input_signature]
    flat = list(flat.values() if isinstance(flat, dict) else flat)
    wrong = [spec for spec in specs if not isinstance(spec, tf.TensorSpec)]
    if wrong or not specs:
        raise TypeError(
            "`input_signature` must be a tf.TensorSpec, or a list, tuple or "
            f"dictionary of them. Received: input_signature={input_signature!r}"
        )
    if len(flat) != len(specs):
        raise ValueError(
            "A signature has its inputs by name, so that a model with nested "
            "inputs cannot be exported. Give it a flat list or dictionary of "
            f"inputs. Received: {input_signature!r}"
        )
    if isinstance(input_signature, dict):
        # As Keras flattens them.
        names = sorted(input_signature)
    else:
        names = [
            _own_name(spec) or (f"input_{i}" if several else "inputs")
            for i, spec in enumerate(specs)
        ]
    # They become names of arguments.
    names = [re.sub(r"\W", "_", name) for name in names]
    if len(set(names)) < len(names):
        raise ValueError(
            "The inputs of a model must have different names to be exported. "
            f"Received: {names}"
        )
    return names


def _own_name(spec: tf.TensorSpec) -> str | None:
    """The name that somebody gave, rather than one that Keras counted up."""
    if spec.name and re.fullmatch(r"keras_tensor(_\d+)?", spec.name):
        return None
    return spec.name


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`export_saved_model` takes a model of Keras 3. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so that it has no weights "
            "to export. Give it an `Input`, or call it on a batch, first."
        )


def _check_path(path: str) -> None:
    gfile = tf.io.gfile
    if not gfile.exists(path) or tf.saved_model.contains_saved_model(path):
        return
    if gfile.isdir(path) and not gfile.listdir(path):
        return
    raise FileExistsError(
        "Only a SavedModel is replaced by an export, and this is something "
        f"else. Move it away or choose another path. Received: path={path!r}"
    )


@contextmanager
def _upload(path: str) -> Iterator[str]:
    """Gives a local directory that is copied to `path` on success.

    An object store has no directories to rename. What makes a SavedModel of a
    directory, its `saved_model.pb`, goes first and comes last.
    """
    gfile = tf.io.gfile
    with tempfile.TemporaryDirectory() as temporary:
        yield temporary
        if gfile.exists(path):
            if tf.saved_model.contains_saved_model(path):
                gfile.remove(f"{path}/saved_model.pb")
            gfile.rmtree(path)
        files = [file for file in Path(temporary).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda x: x.name == "saved_model.pb"):
            new = f"{path}/{file.relative_to(temporary).as_posix()}"
            gfile.makedirs(os.path.dirname(new))
            gfile.copy(str(file), new)
