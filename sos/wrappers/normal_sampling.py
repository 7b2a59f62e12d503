"""Samples of normal distributions, with gradients written by hand.

They save what automatic differentiation would keep of a forward pass. On an
accelerator nothing is kept but the variance: noise and squares are computed
again in the backward pass (`noise.redraws`). On a CPU both are kept.

All gradients are functions of the arguments, so that gradients of gradients are
right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from sos import noise
from sos.traced import traced
from sos.uses import LinearMap

#: Added to variances, so that the gradient of their square root is finite.
EPSILON = 1e-8


def sample(mean: tf.Tensor, variance: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws from a normal distribution with variance `variance + EPSILON`.

    Args:
        mean: Means, float32 of any shape.
        variance: Variances, float32 of the same shape, at least 0.
        key: Key from `noise.key`.

    Returns:
        float32 tensor of that shape.
    """
    redraws = noise.redraws()

    @tf.custom_gradient
    def deviate(variance: tf.Tensor, key: tf.Tensor) -> tuple:
        drawn = _draw(variance, EPSILON, key)

        def gradient(upstream: tf.Tensor | tf.IndexedSlices) -> tuple:
            upstream = tf.convert_to_tensor(upstream)
            deviation, normal = drawn
            if redraws:
                later = _later(upstream)
                again = variance + tf.cast(later, variance.dtype)
                deviation, normal = _draw(again, EPSILON, key + later)
            return 0.5 * upstream * normal / deviation, None

        deviation, normal = drawn
        return deviation * normal, gradient

    return mean + deviate(variance, key)


def deviate_linear_map(
    use: LinearMap,
    inputs: tf.Tensor,
    variance: tf.Tensor,
    key: tf.Tensor,
    *,
    epsilon: tf.Tensor | float = EPSILON,
    spread_dtype: tf.DType,
    dtype: tf.DType,
) -> tf.Tensor:
    """Draws the deviations of a linear map's outputs from their means.

    For normal weights of the given variances and the linear map f, outputs have
    the variance f(variance, inputs^2). This is the noise of local
    reparameterisation (Kingma et al. 2015, equation 6).

    With the upstream gradient g, noise n and h = g n / sqrt(f(variance,
    inputs^2) + epsilon), the gradient of the inputs is inputs times the
    gradient of f's squared inputs for the upstream gradient h, and that of the
    variances is half of f's.

    Args:
        use: The linear map.
        inputs: Its inputs, of any shape and floating-point dtype.
        variance: Variances of the weights, of the shape of the weight.
        key: Key from `noise.key`.
        epsilon: Number or float32 scalar that is added to the variances of
            outputs.
        spread_dtype: Dtype in which these variances are computed.
        dtype: Dtype of the result.

    Returns:
        Tensor of the outputs' shape.
    """
    redraws = noise.redraws()
    # TensorFlow never frees what gradients refer to. A use refers to the layer,
    # with all its variables.
    function = use.function
    del use

    @tf.custom_gradient
    def deviate(
        inputs: tf.Tensor,
        variance: tf.Tensor,
        key: tf.Tensor,
        epsilon: tf.Tensor,
    ) -> tuple:
        product = _Product(function, inputs, variance, spread_dtype)
        spread = product.outputs
        drawn = _draw(spread, epsilon, key)

        def gradient(
            upstream: tf.Tensor | tf.IndexedSlices,
            variables: Sequence[tf.Variable] = (),
        ) -> tuple:
            # Where rows of the outputs are gathered, it is `IndexedSlices`.
            upstream = tf.convert_to_tensor(upstream)
            (deviation, normal), squared = drawn, product
            if redraws:
                later = _later(upstream)
                zero = tf.cast(later, spread.dtype)
                deviation, normal = _draw(spread + zero, epsilon, key + later)
                # Not of a map that reads variables, as they may have other
                # values outside of the layer's call.
                if not variables:
                    # Compilers drop the outputs, which nothing reads.
                    again = inputs + tf.cast(later, inputs.dtype)
                    squared = _Product(function, again, variance, spread_dtype)
            slope = tf.cast(upstream, tf.float32) * normal / deviation
            if spread.dtype == tf.float16:
                # Where all products are zero, so is the gradient. The slope may
                # overflow there, and would become NaN when multiplied by zero.
                slope = tf.where(spread > 0, slope, tf.zeros_like(slope))
            of_squares, *others = squared.gradients(
                tf.cast(slope, spread.dtype), variables
            )
            of_inputs = inputs * tf.cast(of_squares, inputs.dtype)
            of_variance, *of_variables = (0.5 * other for other in others)
            gradients = of_inputs, of_variance, None, None
            return (gradients, of_variables) if variables else gradients

        deviation, normal = drawn
        return tf.cast(deviation * normal, dtype), gradient

    return deviate(inputs, variance, key, tf.convert_to_tensor(epsilon))


class _Product:
    """The linear map of squared inputs and variances, and its gradients."""

    def __init__(
        self,
        function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        inputs: tf.Tensor,
        variance: tf.Tensor,
        dtype: tf.DType,
    ) -> None:
        if inputs.dtype != dtype:
            # Squared in the more precise of the two dtypes.
            inputs = tf.cast(inputs, tf.float32)
        self._squares = tf.cast(tf.square(inputs), dtype)
        self._variance = variance
        # Persistent, as a persistent outer tape calls `gradients` repeatedly.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([self._squares, variance])
            self.outputs = function(tf.cast(variance, dtype), self._squares)
        self._tape = tape

    def gradients(
        self, upstream: tf.Tensor, variables: Sequence[tf.Variable]
    ) -> list[Any]:
        """Returns those of squares, variances, and variables of the map."""
        return self._tape.gradient(
            self.outputs, [self._squares, self._variance, *variables], upstream
        )


@traced
def _draw(
    variance: tf.Tensor, epsilon: tf.Tensor | float, key: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns standard deviations and standard normal noise, in float32."""
    # Some algorithms of convolutions return small negative numbers.
    variance = tf.maximum(tf.cast(variance, tf.float32), 0.0)
    deviation = tf.sqrt(variance + epsilon)
    return deviation, noise.normal(tf.shape(variance), key)


def _later(upstream: tf.Tensor) -> tf.Tensor:
    """Returns an int32 zero that is not known before the upstream gradient.

    Numbers to which it is added are computed in the backward pass. Without it,
    a compiler would notice that the forward pass computes the same numbers, and
    keep them. No number is greater than infinity, also not NaN, but compilers
    do not simplify the comparison.
    """
    if upstream.shape.rank is None:
        upstream = tf.reshape(upstream, [-1])
    # The first number, if there is one.
    first = upstream[(slice(1),) * upstream.shape.rank]
    impossible = first > tf.constant(np.inf, first.dtype)
    return tf.cast(tf.reduce_any(impossible), tf.int32)
