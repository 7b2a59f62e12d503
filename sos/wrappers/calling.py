"""How Keras is told to build and call a wrapper as it would the layer in it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat


def fully_built(layer: keras.layers.Layer) -> bool:
    """Whether a layer and all that it holds are built.

    A layer without a `build` method may call itself built before it was called
    and its sublayers have weights.
    """
    return all(inner.built for inner in keras_compat.all_layers(layer))


def call_like(
    wrapper: keras.layers.Wrapper, layer: keras.layers.Layer
) -> Callable[..., Any]:
    """A wrapper's `call` with the signature of the wrapped layer's.

    By the signature Keras tells tensors from flags among keyword arguments,
    and fills in masks.
    """
    call = functools.partial(type(wrapper).call, wrapper)
    call.__signature__ = keras_compat.with_training(
        inspect.signature(layer.call)
    )
    return call


def is_symbolic(args: tuple, kwargs: dict) -> bool:
    """Returns whether a call is one of those that make a functional model."""
    return any(
        isinstance(value, keras.KerasTensor)
        for value in keras.tree.flatten((args, kwargs))
    )


def build_symbolically(call: Callable, args: tuple, kwargs: dict) -> None:
    """Builds a layer, and what it holds, as a call of it would.

    Attention needs the shapes of all its inputs by name, and a layer without a
    `build` method gets its weights in its first call.

    Args:
        call: The layer, or its `__call__`.
        args: Arguments of the call.
        kwargs: Its keyword arguments.
    """
    call(
        *keras.tree.map_structure(_symbolic, args),
        **{
            name: keras.tree.map_structure(_symbolic, value)
            for name, value in kwargs.items()
            if name != "training"
        },
    )


def _symbolic(value: Any) -> Any:
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
