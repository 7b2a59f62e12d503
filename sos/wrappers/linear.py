"""What is linear in its weight: which layers, and how to call them so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from sos.wrappers.base import SparseWrapper
from sos.wrappers.selection import why_dense

_LINEAR = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)


def is_linear(wrapper: SparseWrapper) -> bool:
    """Whether the output is `f(inputs; weight) + bias`, then an activation.

    Here f is linear in the inputs and in the one weight that is made sparse.

    Args:
        wrapper: A wrapper that is built.

    Returns:
        True for dense and convolutional layers, also inside TimeDistributed,
        whose `call` is not overridden and whose only other weight is a bias.
    """
    layer = _core(wrapper.layer)
    return _calls_like(layer, _LINEAR) and _has_one_table(wrapper, layer)


def is_embedding(wrapper: SparseWrapper) -> bool:
    """Whether the wrapped layer is a look-up in the weight made sparse.

    Args:
        wrapper: A wrapper that is built.

    Returns:
        True for an Embedding whose `call` is not overridden.
    """
    layer = wrapper.layer
    return _calls_like(layer, (keras.layers.Embedding,)) and _has_one_table(
        wrapper, layer
    )


def biases(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights of a linear layer other than its kernel."""
    return [v for v in layer.weights if why_dense(v) is not None]


@contextmanager
def without_activation(layer: keras.layers.Layer) -> Iterator[Any]:
    """Takes a linear layer's activation out for the calls inside the scope.

    Args:
        layer: A layer for which `is_linear` holds.

    Yields:
        The activation, a function or None.
    """
    layer = _core(layer)
    activation = layer.activation
    layer.activation = None
    try:
        yield activation
    finally:
        layer.activation = activation


def look_up(indices: Any, *tables: tf.Tensor) -> list[tf.Tensor]:
    """Gathers the rows of tables in float32.

    Args:
        indices: Indices, of any shape and numeric dtype.
        *tables: Tensors of shape [vocabulary, units].

    Returns:
        For each table a float32 tensor of shape [*indices.shape, units].
    """
    indices = keras.ops.cast(indices, "int32")
    return [tf.cast(tf.gather(table, indices), tf.float32) for table in tables]


def _core(layer: keras.layers.Layer) -> keras.layers.Layer:
    while type(layer) is keras.layers.TimeDistributed:
        layer = layer.layer
    return layer


def _calls_like(layer: keras.layers.Layer, classes: tuple) -> bool:
    return isinstance(layer, classes) and any(
        type(layer).call is cls.call for cls in classes
    )


def _has_one_table(wrapper: SparseWrapper, layer: keras.layers.Layer) -> bool:
    kernels = [v for v in layer.weights if why_dense(v) is None]
    chosen = [weight.variable for weight in wrapper.sparse_weights]
    return len(chosen) == len(kernels) == 1 and chosen[0] is kernels[0]
