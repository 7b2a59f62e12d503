"""How often each weight of a layer is used for one example."""

import math
from typing import Any

import keras

_CONV = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_CONV_TRANSPOSE = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def uses(
    layer: keras.layers.Layer,
    variable: keras.Variable,
    inputs: Any,
    outputs: Any,
) -> int | None:
    """How many multiply-adds each element of a weight takes part in.

    Borders are counted as if they were not padded away, as is usual.

    Args:
        layer: The layer, not wrapped.
        variable: One of its weights.
        inputs: Shape of its input with the batch axis, or a list of shapes.
        outputs: Shape of its output.

    Returns:
        The number for one example; None if the layer is of an unknown kind or
        a size is not known.
    """
    try:
        return _uses(layer, variable, inputs, outputs)
    except (TypeError, IndexError, AttributeError):
        # A None among the sizes, or shapes of another form than foreseen.
        return None


def _uses(
    layer: keras.layers.Layer, variable: Any, inputs: Any, outputs: Any
) -> int | None:
    if isinstance(layer, keras.layers.Embedding):
        return 0
    if isinstance(layer, _CONV_TRANSPOSE):
        return math.prod(_positions(layer, inputs))
    if isinstance(layer, _CONV):
        return math.prod(_positions(layer, outputs))
    if isinstance(layer, keras.layers.Dense):
        return math.prod(outputs[1:-1])
    if isinstance(layer, keras.layers.EinsumDense):
        terms, result = layer.equation.split("->")
        kernel = terms.split(",")[1]
        sizes = dict(zip(kernel, variable.shape, strict=True))
        own = math.prod(sizes.get(axis, 1) for axis in result)
        return math.prod(outputs[1:]) // own
    if isinstance(layer, keras.layers.TimeDistributed):
        each = _uses(
            layer.layer, variable, _without_time(inputs), _without_time(outputs)
        )
        return None if each is None else inputs[1] * each
    if isinstance(layer, keras.layers.MultiHeadAttention):
        of_value = any(
            f"/{name}/" in variable.path for name in ("key", "value")
        )
        shapes = inputs if isinstance(inputs, list) else [inputs, inputs]
        return math.prod(shapes[1 if of_value else 0][1:-1])
    if isinstance(layer, keras.layers.RNN | keras.layers.Bidirectional):
        return math.prod(inputs[1:2])
    return None


def _positions(layer: Any, shape: tuple) -> tuple:
    if layer.data_format == "channels_first":
        return shape[2:]
    return shape[1:-1]


def _without_time(shape: tuple) -> tuple:
    return (shape[0], *shape[2:])
