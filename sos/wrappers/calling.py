"""How Keras is told to build and call a wrapper as it would the layer in it."""

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

import keras
import tensorflow as tf


def fully_built(layer: keras.layers.Layer) -> bool:
    """Whether a layer and all that it holds are built.

    A layer without a `build` method may call itself built before it was called
    and its sublayers have weights.
    """
    return all(inner.built for inner in layer._flatten_layers())


def call_like(
    wrapper: keras.layers.Wrapper, layer: keras.layers.Layer
) -> Callable[..., Any]:
    """A wrapper's `call` with the signature of the wrapped layer's.

    By the signature Keras tells tensors from flags among keyword arguments,
    and fills in masks.
    """
    signature = inspect.signature(layer.call)
    parameters = list(signature.parameters.values())
    if "training" not in signature.parameters:
        last = bool(parameters) and parameters[-1].kind == Parameter.VAR_KEYWORD
        training = Parameter("training", Parameter.KEYWORD_ONLY, default=False)
        parameters.insert(len(parameters) - last, training)
    call = functools.partial(type(wrapper).call, wrapper)
    call.__signature__ = signature.replace(parameters=parameters)
    return call


def symbolic(value: Any) -> Any:
    """A symbolic tensor like a tensor or array; anything else as it is."""
    if (
        isinstance(value, keras.KerasTensor)
        or tf.is_tensor(value)
        or (hasattr(value, "__array__") and hasattr(value, "shape"))
    ):
        return keras.KerasTensor(
            tuple(value.shape),
            dtype=keras.backend.standardize_dtype(value.dtype),
        )
    return value
