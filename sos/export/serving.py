"""Modules for serving: variables, tables, assets and signatures."""

import re
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat
from sos.errors import UsageError
from sos.surgery import strip
from sos.wrappers.base import find_wrappers

# Resources of layers other than Keras variables.
_RESOURCES = (
    tf.Module,
    tf.Variable,
    tf.saved_model.Asset,
    tf.saved_model.experimental.TrackableResource,
)


class ServingModule(tf.Module):
    """A module that serves a Keras model and stores every variable once.

    `module(inputs)` runs inference with the model. The signature
    `serving_default` takes and returns tensors by name: inputs by the keys of a
    dictionary, else by the names of their `keras.Input`s (`inputs` or
    `input_0`, `input_1`, ... if they have none); outputs by the keys of a
    dictionary, else as `output_0`, `output_1`, ....

    Subclasses can add functions to `signatures`, and the files that these read
    as attributes of type `tf.saved_model.Asset`:

    ```python
    class Translator(sos.export.ServingModule):
        def __init__(self, model, vocabulary):
            super().__init__(model)
            self.vocabulary = tf.saved_model.Asset(vocabulary)
            self.table = tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(self.vocabulary, ...), 0
            )
            self.signatures["translate"] = self.translate

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def translate(self, text):
            return {"translation": ...}

    sos.export_model(Translator(model, "vocabulary.txt"), "exported")
    ```

    Args:
        model: A built Keras 3 model. A sparse one is stripped.
        input_signature: As for `sos.export_model`.

    Attributes:
        model: The plain model. It is not exported itself.
        weights: The TensorFlow variables of the model.
        resources: Tables, assets and other resources of the model's layers.
        signatures: Functions to export, by name.

    Raises:
        UsageError: If the model is not built, its inputs are unknown or nested,
            or two of them have the same name.
        TypeError: If `model` is not a Keras 3 model, or the signature holds
            anything other than `tf.TensorSpec`.

    Example:
    >>> import keras, sos.export
    >>> import tensorflow as tf
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> module = sos.export.ServingModule(model)
    >>> module(tf.ones((2, 8))).shape
    TensorShape([2, 4])
    >>> sorted(module.signatures["serving_default"](inputs=tf.ones((2, 8))))
    ['output_0']
    """

    def __init__(self, model: keras.Model, input_signature: Any = None) -> None:
        super().__init__()
        _check_model(model)
        if input_signature is None:
            input_signature = _signature_of(model)
        names = _input_names(input_signature)
        if find_wrappers(model):
            model = strip(model)
        # Hidden from tf.Module, which would store all variables twice.
        object.__setattr__(self, "model", model)
        self.weights = [variable.value for variable in model.variables]
        self.resources = _resources(model)

        def call(inputs: Any) -> Any:
            return model(inputs, training=False)

        self._call = tf.function(call, input_signature=[input_signature])
        self.signatures = {
            "serving_default": _named_function(
                self._call, input_signature, names
            )
        }

    @property
    def __call__(self) -> tf.types.experimental.PolymorphicFunction:
        """The function `module(inputs)`, exported under this name."""
        return self._call


def concrete_signatures(module: tf.Module) -> dict[str, Any]:
    """Traces the signatures of a module.

    Args:
        module: A module with an attribute `signatures`.

    Returns:
        Concrete functions by name.

    Raises:
        UsageError: If `signatures` is empty, or is not a mapping from names to
            concrete functions or to `tf.function`s with input signatures.
    """
    signatures = module.signatures
    if not isinstance(signatures, Mapping) or not signatures:
        raise UsageError(
            "`signatures` must be a dictionary of functions with at least one "
            f"entry, such as 'serving_default'. Received: {signatures!r}"
        )
    return {
        name: _concrete(name, function) for name, function in signatures.items()
    }


def _concrete(name: Any, function: Any) -> Any:
    types = tf.types.experimental
    if isinstance(name, str):
        if isinstance(function, types.ConcreteFunction):
            return function
        if (
            isinstance(function, types.PolymorphicFunction)
            and function.input_signature is not None
        ):
            return function.get_concrete_function()
    raise UsageError(
        "`signatures` must map names to concrete functions, or to functions "
        "of tf.function(input_signature=[...]). "
        f"Received: {name!r}: {function!r}"
    )


def _named_function(
    call: Any, input_signature: Any, names: list[str]
) -> tf.types.experimental.ConcreteFunction:
    """Returns a function that takes and returns tensors by name."""

    def serve(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = keras.tree.pack_sequence_as(
            input_signature, [tensors[name] for name in names]
        )
        outputs = call(inputs)
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


def _resources(model: keras.Model) -> list[Any]:
    """Returns tables, assets and other resources of a model's layers."""
    resources = {
        id(value): value
        for layer in keras_compat.all_layers(model)
        for value in vars(layer).values()
        if isinstance(value, _RESOURCES)
    }
    return list(resources.values())


def _signature_of(model: keras.Model) -> Any:
    """Returns specs of a model's `Input`s, with any batch size."""
    try:
        # A Sequential model has a list of one input.
        inputs = (
            model.inputs[0]
            if isinstance(model, keras.Sequential)
            else model.input
        )
    except (AttributeError, ValueError) as error:
        raise UsageError(
            f"The inputs of the model {model.name!r} of class "
            f"{type(model).__name__} are unknown: it has no `keras.Input`. "
            "Pass `input_signature`, such as "
            "tf.TensorSpec((None, 224, 224, 3))."
        ) from error
    return keras.tree.map_structure(
        lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype, x.name), inputs
    )


def _input_names(input_signature: Any) -> list[str]:
    """Returns names of the inputs, in the order of `keras.tree.flatten`."""
    specs = keras.tree.flatten(input_signature)
    is_structure = isinstance(input_signature, (dict, list, tuple))
    flat = input_signature if is_structure else [input_signature]
    flat = list(flat.values() if isinstance(flat, dict) else flat)
    if not specs or not all(isinstance(x, tf.TensorSpec) for x in specs):
        raise TypeError(
            "`input_signature` must be a tf.TensorSpec, or a list, tuple or "
            f"dictionary of them. Received: input_signature={input_signature!r}"
        )
    if len(flat) != len(specs):
        raise UsageError(
            "The inputs of an exported model must not be nested, because a "
            "signature takes tensors by name. Use a flat list or dictionary. "
            f"Received: input_signature={input_signature!r}"
        )
    if isinstance(input_signature, dict):
        # Keras flattens dictionaries in this order.
        names = sorted(input_signature)
    else:
        names = [
            _user_name(spec) or (f"input_{i}" if is_structure else "inputs")
            for i, spec in enumerate(specs)
        ]
    # Names of arguments must be identifiers.
    names = [re.sub(r"\W", "_", name) for name in names]
    if len(set(names)) < len(names):
        raise UsageError(
            "The inputs of a model must have different names to be exported. "
            f"Received: {names}"
        )
    return names


def _user_name(spec: tf.TensorSpec) -> str | None:
    """Returns a spec's name unless Keras generated it."""
    if spec.name and re.fullmatch(r"keras_tensor(_\d+)?", spec.name):
        return None
    return spec.name


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras 3 model. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not model.built:
        raise UsageError(
            f"The model {model.name!r} is not built, so it has no weights to "
            "export. Give it a `keras.Input`, or call it on a batch first."
        )
