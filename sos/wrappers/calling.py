"""Makes Keras build and call a wrapper like the layer that it wraps."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat


def fully_built(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer and all its sublayers are built.

    A layer without a `build` method may be marked as built before its sublayers
    have weights.
    """
    return all(inner.built for inner in keras_compat.all_layers(layer))


def call_like(
    wrapper: keras.layers.Wrapper, layer: keras.layers.Layer
) -> Callable[..., Any]:
    """Returns a wrapper's `call` with the signature of the wrapped layer's.

    From the signature Keras infers which keyword arguments are tensors, and
    which masks to pass.
    """
    call = functools.partial(type(wrapper).call, wrapper)
    call.__signature__ = keras_compat.with_training(
        inspect.signature(layer.call)
    )
    return call


def is_symbolic(args: tuple, kwargs: dict) -> bool:
    """Returns whether a call has symbolic arguments (functional models)."""
    return any(
        isinstance(value, keras.KerasTensor)
        for value in keras.tree.flatten((args, kwargs))
    )


def build_symbolically(call: Callable, args: tuple, kwargs: dict) -> None:
    """Builds a layer and its sublayers by a symbolic call.

    Attention needs the shapes of all its inputs by name, and a layer without a
    `build` method creates its weights in its first call.

    Args:
        call: The layer, or its `__call__`.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
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
    """Converts a tensor or array to a symbolic tensor; returns others as is."""
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
