"""How often each weight of a model is used for one example."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from sos.wrappers.base import core
from sos.wrappers.selection import why_dense

_CONV = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_RECURRENT = (
    keras.layers.SimpleRNN,
    keras.layers.LSTM,
    keras.layers.GRU,
)
_CONV_TRANSPOSE = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def uses_by_variable(
    model: keras.Model, layers: list[keras.layers.Layer]
) -> dict[int, int]:
    """How many multiply-adds each element of a weight takes part in.

    A layer that is called several times counts several times. Borders are
    counted as if they were not padded away, as is usual.

    Args:
        model: A Sequential or functional model.
        layers: The layers in it, or in models in it, to look at.

    Returns:
        The numbers for one example by `id` of the weight, without those that
        are not known: of layers of an unknown kind, or for inputs of unknown
        size.
    """
    result: dict[int, int | None] = {}

    def count(layer: Any, inputs: list, outputs: Any) -> None:
        for variable in layer.weights:
            if why_dense(variable) is not None:
                continue
            before = result.get(id(variable), 0)
            times = _known_uses(layer, variable, inputs, outputs)
            known = times is not None and before is not None
            result[id(variable)] = before + times if known else None

    # With a batch size of its own, as Keras would else take the shapes that it
    # remembers and not go through the layers.
    inputs = [
        keras.KerasTensor((1, *x.shape[1:]), dtype=x.dtype)
        for x in model.inputs
    ]
    try:
        with _observed(layers, count):
            model.compute_output_spec(inputs)
    except (ValueError, TypeError):
        # A model whose operations have another batch size written into them.
        return {}
    return {key: times for key, times in result.items() if times is not None}


@contextmanager
def _observed(
    layers: list[keras.layers.Layer], count: Callable
) -> Iterator[None]:
    """Hands the shapes of every symbolic call of a layer to `count`."""

    def observe(layer: keras.layers.Layer) -> Callable:
        compute = layer.compute_output_spec
        signature = inspect.signature(core(layer).call)

        def observed(*args: Any, **kwargs: Any) -> Any:
            outputs = compute(*args, **kwargs)
            kwargs.pop("training", None)
            given = signature.bind(*args, **kwargs).arguments.values()
            count(core(layer), [_shapes(x) for x in given], _shapes(outputs))
            return outputs

        return observed

    try:
        for layer in layers:
            layer.compute_output_spec = observe(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("compute_output_spec", None)


def _shapes(value: Any) -> Any:
    return keras.tree.map_structure(lambda x: getattr(x, "shape", None), value)


def _known_uses(
    layer: keras.layers.Layer, variable: Any, inputs: list, outputs: Any
) -> int | None:
    try:
        return _uses(layer, variable, inputs, outputs)
    except (TypeError, IndexError, AttributeError):
        # A None among the sizes, or shapes of another form than foreseen.
        return None


def _uses(
    layer: keras.layers.Layer, variable: Any, inputs: list, outputs: Any
) -> int | None:
    """The number for one call; `inputs` are the shapes by argument."""
    if isinstance(layer, keras.layers.Embedding):
        return 0
    if isinstance(layer, _CONV_TRANSPOSE):
        return math.prod(_positions(layer, inputs[0]))
    if isinstance(layer, _CONV):
        return math.prod(_positions(layer, outputs))
    if isinstance(layer, keras.layers.Dense):
        return math.prod(outputs[1:-1])
    if isinstance(layer, keras.layers.EinsumDense):
        data, _, kernel = layer.equation.partition("->")[0].partition(",")
        head, _, tail = data.partition("...")
        between = len(inputs[0]) - len(head) - len(tail)
        axes = [*head, *["..."] * between, *tail]
        return math.prod(
            size
            for axis, size in list(zip(axes, inputs[0], strict=True))[1:]
            if axis not in kernel
        )
    if isinstance(layer, keras.layers.TimeDistributed):
        inner = [_without_time(inputs[0])]
        each = _uses(layer.layer, variable, inner, _without_time(outputs))
        return None if each is None else inputs[0][1] * each
    if isinstance(layer, keras.layers.MultiHeadAttention):
        of_value = any(
            f"/{name}/" in variable.path for name in ("key", "value")
        )
        return math.prod(inputs[1 if of_value else 0][1:-1])
    if isinstance(layer, keras.layers.Bidirectional):
        layer = layer.forward_layer
    if isinstance(layer, _RECURRENT):
        return inputs[0][1]
    return None


def _positions(layer: Any, shape: tuple) -> tuple:
    if layer.data_format == "channels_first":
        return shape[2:]
    return shape[1:-1]


def _without_time(shape: tuple) -> tuple:
    return (shape[0], *shape[2:])
