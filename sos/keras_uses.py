"""Registers how the calls of Keras's layers use their weights."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat, uses
from sos.uses import LinearMap, LookUp, Use, register_use

_layers = keras.layers


def _product(sizes: Any) -> int | None:
    """Returns the product of sizes, None if one is unknown."""
    sizes = list(sizes)
    return None if None in sizes else math.prod(sizes)


def _spatial(layer: Any, shape: tuple) -> int | None:
    channels_first = layer.data_format == "channels_first"
    return _product(shape[2:] if channels_first else shape[1:-1])


def _finish(layer: Any, adapter: Callable[[], Any] | None = None) -> Callable:
    """Returns a function that adds adapter and bias, then the activation."""

    def finish(outputs: Any) -> Any:
        if adapter is not None:
            outputs = keras.ops.add(outputs, adapter())
        if layer.bias is not None:
            bias = layer.bias
            if getattr(layer, "data_format", "") == "channels_first":
                ones = (1,) * (len(outputs.shape) - 2)
                bias = keras.ops.reshape(bias, (1, -1, *ones))
            outputs = keras.ops.add(outputs, bias)
        if layer.activation is not None:
            outputs = layer.activation(outputs)
        return outputs

    return finish


def _low_rank(layer: Any, first: Any, second: Any) -> Any:
    scale = layer.lora_alpha / layer.lora_rank
    product = scale * keras.ops.matmul(first, second)
    return keras.ops.cast(product, layer.compute_dtype)


def _kernel_use(
    layer: Any,
    inputs: Any,
    function: Callable[[Any, Any], Any],
    positions: Callable[[], int | None],
    *,
    fast_in_bfloat16: bool = True,
) -> Use:
    if getattr(layer, "quantization_mode", None) is not None:
        return None
    inputs = keras.ops.cast(inputs, layer.compute_dtype)
    adapter = None
    if getattr(layer, "lora_enabled", False):

        def adapter() -> Any:
            kernel = _low_rank(layer, layer.lora_kernel_a, layer.lora_kernel_b)
            return function(kernel, inputs)

    return LinearMap(
        keras_compat.kernel(layer),
        inputs=inputs,
        function=function,
        finish=_finish(layer, adapter),
        fast_in_bfloat16=fast_in_bfloat16,
        positions=positions,
    )


@register_use(_layers.Dense)
def _dense(layer: Any, inputs: Any, **kwargs: Any) -> Use:
    return _kernel_use(
        layer,
        inputs,
        lambda kernel, x: keras.ops.matmul(x, kernel),
        lambda: _product(inputs.shape[1:-1]),
    )


@register_use(_layers.EinsumDense)
def _einsum_dense(layer: Any, inputs: Any, **kwargs: Any) -> Use:
    equation = layer.equation

    def positions() -> int | None:
        data, _, kernel = equation.partition("->")[0].partition(",")
        head, _, tail = data.partition("...")
        between = len(inputs.shape) - len(head) - len(tail)
        axes = [*head, *["..."] * between, *tail]
        pairs = list(zip(axes, inputs.shape, strict=True))[1:]
        return _product(size for axis, size in pairs if axis not in kernel)

    return _kernel_use(
        layer,
        inputs,
        lambda kernel, x: keras.ops.einsum(equation, x, kernel),
        positions,
    )


def _output_positions(layer: Any, inputs: Any) -> Callable[[], int | None]:
    return lambda: _spatial(
        layer, layer.compute_output_shape(tuple(inputs.shape))
    )


def _arguments(layer: Any, *names: str) -> dict[str, Any]:
    """Returns arguments of a convolution.

    Functions must not refer to the layer, as `LinearMap.function` says.
    """
    names = ("padding", "data_format", *names)
    arguments = {name: getattr(layer, name) for name in names}
    return {**arguments, "strides": list(layer.strides)}


@register_use(_layers.Conv1D, _layers.Conv2D, _layers.Conv3D)
def _convolution(layer: Any, inputs: Any, **kwargs: Any) -> Use:
    arguments = _arguments(layer, "dilation_rate")
    widths = None
    if layer.padding == "causal":
        before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        widths = [[0, 0], [before, 0], [0, 0]]
        if layer.data_format == "channels_first":
            widths = [[0, 0], [0, 0], [before, 0]]
        arguments["padding"] = "valid"

    def function(kernel: Any, x: Any) -> Any:
        if widths is not None:
            x = keras.ops.pad(x, widths)
        return keras.ops.conv(x, kernel, **arguments)

    return _kernel_use(
        layer, inputs, function, _output_positions(layer, inputs)
    )


@register_use(
    _layers.Conv1DTranspose, _layers.Conv2DTranspose, _layers.Conv3DTranspose
)
def _transposed_convolution(layer: Any, inputs: Any, **kwargs: Any) -> Use:
    arguments = _arguments(layer, "dilation_rate", "output_padding")
    return _kernel_use(
        layer,
        inputs,
        lambda kernel, x: keras.ops.conv_transpose(x, kernel, **arguments),
        lambda: _spatial(layer, inputs.shape),
    )


@register_use(_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)
def _depthwise_convolution(layer: Any, inputs: Any, **kwargs: Any) -> Use:
    arguments = _arguments(layer, "dilation_rate")
    arguments["strides"] = layer.strides
    # oneDNN does not compute these: bfloat16 takes as long as float32.
    return _kernel_use(
        layer,
        inputs,
        lambda kernel, x: keras.ops.depthwise_conv(x, kernel, **arguments),
        _output_positions(layer, inputs),
        fast_in_bfloat16=False,
    )


@register_use(_layers.SeparableConv1D, _layers.SeparableConv2D)
def _separable_convolution(layer: Any, inputs: Any, **kwargs: Any) -> list[Use]:
    # Multiplies two weights: the outputs would not be normally distributed.
    positions = _output_positions(layer, inputs)
    return [
        Use(layer.depthwise_kernel, positions),
        Use(layer.pointwise_kernel, positions),
    ]


@register_use(_layers.Embedding)
def _embedding(layer: Any, inputs: Any, **kwargs: Any) -> Use:
    if layer.quantization_mode is not None:
        return None
    indices = keras.ops.cast(inputs, "int32")

    def finish(rows: Any) -> Any:
        if layer.lora_enabled:
            first = keras.ops.take(layer.lora_embeddings_a, indices, axis=0)
            rows = rows + tf.cast(
                _low_rank(layer, first, layer.lora_embeddings_b), rows.dtype
            )
        return keras.ops.cast(rows, layer.compute_dtype)

    return LookUp(
        keras_compat.embeddings(layer), indices=indices, finish=finish
    )


@register_use(_layers.ReversibleEmbedding)
def _reversible_embedding(
    layer: Any, inputs: Any, reverse: bool = False, **kwargs: Any
) -> Use:
    if layer.quantization_mode is not None:
        return None
    if not reverse:
        look_up = _embedding(layer, inputs)

        def finish_rows(rows: Any) -> Any:
            outputs = look_up.finish(rows)
            # This layer computes its mask in `call`.
            mask = _layers.Embedding.compute_mask(layer, inputs)
            if mask is not None:
                keras_compat.set_mask(outputs, mask)
            return outputs

        return LookUp(
            look_up.weight, indices=look_up.indices, finish=finish_rows
        )
    tied = layer.tie_weights
    if tied and layer.lora_enabled:
        return Use(
            keras_compat.embeddings(layer),
            lambda: _product(inputs.shape[1:-1]),
        )

    def function(table: Any, x: Any) -> Any:
        return keras.ops.matmul(
            x, keras.ops.transpose(table) if tied else table
        )

    def finish(logits: Any) -> Any:
        cap = layer.logit_soft_cap
        if cap is None:
            return logits
        return keras.ops.multiply(
            keras.ops.tanh(keras.ops.divide(logits, cap)), cap
        )

    dtype = layer.reverse_dtype
    if dtype is None:
        # This layer does not cast its inputs.
        dtype = keras.backend.result_type(inputs.dtype, layer.compute_dtype)
    return LinearMap(
        keras_compat.embeddings(layer) if tied else layer.reverse_embeddings,
        inputs=keras.ops.cast(inputs, dtype),
        function=function,
        finish=finish,
        fast_in_bfloat16=True,
        positions=lambda: _product(inputs.shape[1:-1]),
    )


@register_use(_layers.TimeDistributed)
def _time_distributed(
    layer: Any, inputs: Any, mask: Any = None, **kwargs: Any
) -> Use | list[Use] | None:
    """Describes the inner layer for all timesteps at once.

    The inner layer itself would draw the same noise at all timesteps.
    """
    inner = layer.layer
    cls = getattr(inner, "plain_class", type(inner))
    steps = inputs.shape[1]
    masked = (
        mask is not None and "mask" in inspect.signature(inner.call).parameters
    )
    if masked or steps is None and None in inputs.shape[2:]:
        return None
    per_step = uses.describe(cls, inner, inputs[:, 0])

    def positions(use: Use) -> Callable[[], int | None]:
        return lambda: _product([steps, use.positions()])

    if len(per_step) != 1 or not isinstance(per_step[0], LinearMap | LookUp):
        return [Use(use.weight, positions(use)) for use in per_step]
    times = keras.ops.shape(inputs)[:2]

    def flat(x: Any) -> Any:
        return keras.ops.reshape(x, (-1, *x.shape[2:]))

    def unflat(x: Any) -> Any:
        return keras.ops.reshape(x, (*times, *x.shape[1:]))

    (use,) = uses.describe(cls, inner, flat(inputs))
    if isinstance(use, LookUp):
        return LookUp(
            use.weight,
            indices=unflat(use.indices),
            finish=lambda rows: unflat(use.finish(flat(rows))),
        )
    function = use.function
    return LinearMap(
        use.weight,
        inputs=unflat(use.inputs),
        function=lambda weight, x: unflat(function(weight, flat(x))),
        finish=lambda outputs: unflat(use.finish(flat(outputs))),
        fast_in_bfloat16=use.fast_in_bfloat16,
        positions=positions(per_step[0]),
    )


@register_use(_layers.SimpleRNN, _layers.LSTM, _layers.GRU)
def _recurrent(layer: Any, sequences: Any, **kwargs: Any) -> list[Use]:
    # All timesteps share one weight: only the weight itself can be sampled.
    return [
        Use(variable, lambda: sequences.shape[1])
        for variable in (layer.cell.kernel, layer.cell.recurrent_kernel)
    ]
