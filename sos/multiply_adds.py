"""Counts the multiply-adds of each weight of a model."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from sos import keras_compat, uses
from sos.wrappers.sparse_layer import is_unit, plain_class, plain_weights


def uses_by_variable(
    model: keras.layers.Layer, inputs: Any = None
) -> dict[int, int]:
    """Counts the multiply-adds per element of each weight, for one example.

    The counts come from the functions registered by `sos.extend.register_use`.
    Each call of a layer counts, also inside other layers. Products with padding
    count too, as is usual.

    Args:
        model: A model that knows its inputs, or was built from shapes.
        inputs: Inputs to count for, of any batch size; by default of the shapes
            of the model's own inputs.

    Returns:
        The counts by `id` of the weight. Unknown ones are left out: those of
        layers without a registered use, or for inputs of unknown size.
    """
    result: dict[int, int | None] = {}

    def count(call_uses: list[uses.Use]) -> None:
        for use in call_uses:
            before = result.get(id(use.weight), 0)
            times = use.positions()
            if times is not None and before is not None:
                result[id(use.weight)] = before + times
            else:
                result[id(use.weight)] = None

    try:
        with _observe_calls(model, count):
            _trace(model, inputs)
    except Exception:
        # The code of a model may fail on a batch of one, or on a guessed dtype.
        # A count is not worth an error.
        return {}
    return {key: times for key, times in result.items() if times is not None}


def _trace(model: keras.layers.Layer, inputs: Any) -> None:
    """Calls a model symbolically on one example."""
    if inputs is None:
        inputs = getattr(model, "input", None)
    if inputs is not None:
        inputs = keras.tree.map_structure(_single_example, inputs)
        # The method of `keras.Operation` runs all calls, unlike the model's.
        keras.Operation.compute_output_spec(model, inputs)
        return
    shapes = model.get_build_config()
    if not shapes:
        return
    names = list(inspect.signature(model.call).parameters)
    if list(shapes) == ["input_shape"]:
        shapes = {names[0]: shapes["input_shape"]}
    arguments = {
        name.removesuffix("_shape"): _single_example(keras.KerasTensor(shape))
        for name, shape in shapes.items()
    }
    keras.Operation.compute_output_spec(model, **arguments)


def _single_example(tensor: Any) -> keras.KerasTensor:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.KerasTensor((1, *tensor.shape[1:]), dtype=dtype)


@contextmanager
def _observe_calls(
    model: keras.layers.Layer, count: Callable
) -> Iterator[None]:
    """Passes the uses of all calls in a model to `count`."""
    layers = list(_units(model, set()))
    before = {id(layer): vars(layer).get("call") for layer in layers}

    def observe(layer: keras.layers.Layer, call: Callable) -> Callable:
        @functools.wraps(call)
        def observed(*args: Any, **kwargs: Any) -> Any:
            count(uses.describe(plain_class(layer), layer, *args, **kwargs))
            return call(*args, **kwargs)

        return observed

    try:
        for layer in layers:
            object.__setattr__(layer, "call", observe(layer, layer.call))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)
            if before[id(layer)] is not None:
                object.__setattr__(layer, "call", before[id(layer)])


def _units(
    layer: keras.layers.Layer, seen: set[int]
) -> Iterator[keras.layers.Layer]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if uses.describer(plain_class(layer)) is not None and plain_weights(layer):
        yield layer
    if not is_unit(layer):
        for inner in keras_compat.sublayers(layer):
            yield from _units(inner, seen)
