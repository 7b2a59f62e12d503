"""Modules that serve a model: variables, tables, assets and signatures."""

import re
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat
from sos.errors import UsageError
from sos.surgery import strip
from sos.wrappers.base import find_wrappers

# What layers may hold besides Keras's own variables.
_RESOURCES = (
    tf.Module,
    tf.Variable,
    tf.saved_model.Asset,
    tf.saved_model.experimental.TrackableResource,
)


class ServingModule(tf.Module):
    """Serves a Keras model, without Keras's copy of every variable.

    `module(inputs)` computes as the model in inference. The signature
    `serving_default` takes and returns tensors by name: inputs by the keys of a
    dictionary, else by the names of their `keras.Input`s (`inputs` or
    `input_0`, `input_1`, ... where they have none); outputs by the keys of a
    dictionary, else as `output_0`, `output_1`, ....

    Add signatures to `signatures`, and files that they read as attributes of
    type `tf.saved_model.Asset`:

    ```
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
        model: The plain model. It is not exported; the next two are.
        weights: Its variables, as TensorFlow's.
        resources: Tables, assets and the like that its layers hold.
        signatures: Functions by the names under which they are exported.

    Raises:
        UsageError: If the model is not built, its inputs are unknown or nested,
            or two of them have the same name.
        TypeError: If `model` is not a Keras 3 model, or the signature holds
            anything other than `tf.TensorSpec`.
    """

    def __init__(self, model: keras.Model, input_signature: Any = None) -> None:
        super().__init__()
        _check_model(model)
        if input_signature is None:
            input_signature = _signature_of(model)
        names = _input_names(input_signature)
        if find_wrappers(model):
            model = strip(model)
        # Not as other attributes, which are stored: that would store all
        # variables a second time.
        object.__setattr__(self, "model", model)
        self.weights = [variable.value for variable in model.variables]
        self.resources = _resources(model)

        def call(inputs: Any) -> Any:
            return model(inputs, training=False)

        self._call = tf.function(call, input_signature=[input_signature])
        self.signatures = {
            "serving_default": _by_name(self._call, input_signature, names)
        }

    @property
    def __call__(self) -> tf.types.experimental.PolymorphicFunction:
        """The function `module(inputs)`, which is exported by this name."""
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
        "`signatures` must map names to concrete functions or to functions "
        "made with tf.function(input_signature=[...]). "
        f"Received: {name!r}: {function!r}"
    )


def _by_name(
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
    """Returns tables, assets and the like that a model's layers hold."""
    found = {
        id(value): value
        for layer in keras_compat.all_layers(model)
        for value in vars(layer).values()
        if isinstance(value, _RESOURCES)
    }
    return list(found.values())


def _signature_of(model: keras.Model) -> Any:
    """Returns specs of a model's `Input`s, with a batch of any size."""
    try:
        # Keras gives the list alone for a Sequential model.
        inputs = (
            model.inputs[0]
            if isinstance(model, keras.Sequential)
            else model.input
        )
    except (AttributeError, ValueError) as error:
        raise UsageError(
            f"The inputs of the model {model.name!r} of class "
            f"{type(model).__name__} are unknown, as it has no `keras.Input`. "
            "Pass `input_signature`, such as "
            "tf.TensorSpec((None, 224, 224, 3))."
        ) from error
    return keras.tree.map_structure(
        lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype, x.name), inputs
    )


def _input_names(input_signature: Any) -> list[str]:
    """Returns names of the inputs, in the order of `keras.tree.flatten`."""
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
        raise UsageError(
            "A signature takes tensors by name, so the inputs of an exported "
            "model cannot be nested. Use a flat list or dictionary. "
            f"Received: input_signature={input_signature!r}"
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
        raise UsageError(
            "The inputs of a model must have different names to be exported. "
            f"Received: {names}"
        )
    return names


def _own_name(spec: tf.TensorSpec) -> str | None:
    """Returns a spec's name unless it is one that Keras counted up."""
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
            "export. Give it a `keras.Input`, or call it on a batch, first."
        )
