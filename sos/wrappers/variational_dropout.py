"""Sparse variational dropout."""

import math
from typing import Any

import keras
import tensorflow as tf

from sos import noise
from sos.arguments import check_number
from sos.registry import register
from sos.uses import LinearMap, LookUp
from sos.wrappers.hyperparameters import Hyperparameter
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

EPSILON = 1e-8

# Constants of the approximation, Molchanov et al. 2017, equation 14.
K1 = 0.63576
K2 = 1.8732
K3 = 1.48695


def log_alpha_of(theta: tf.Tensor, log_sigma2: tf.Tensor) -> tf.Tensor:
    """log alpha = log sigma^2 - log(theta^2 + epsilon).

    Args:
        theta: Means, float32 of any shape.
        log_sigma2: Logarithms of the variances, float32 of the same shape.

    Returns:
        A float32 tensor of the same shape.
    """
    return log_sigma2 - tf.math.log(tf.square(theta) + EPSILON)


def log_sigma2_of(theta: tf.Tensor, log_alpha: tf.Tensor) -> tf.Tensor:
    """log sigma^2 = log alpha + log(theta^2 + epsilon).

    Args:
        theta: Means, float32 of any shape.
        log_alpha: Logarithms of the dropout rates, float32 of the same shape.

    Returns:
        A float32 tensor of the same shape.
    """
    return log_alpha + tf.math.log(tf.square(theta) + EPSILON)


def kl_divergence(log_alpha: tf.Tensor) -> tf.Tensor:
    """KL of the posterior from the log-uniform prior, up to a constant.

    The approximation of Molchanov et al. 2017, equation 14:
    KL = k1 - k1 sigmoid(k2 + k3 log alpha) + 0.5 log(1 + 1 / alpha).

    Args:
        log_alpha: Logarithms of the dropout rates, float32 of any shape.

    Returns:
        A float32 tensor of the same shape, positive, 0 at log alpha = infinity.
    """
    return K1 * tf.sigmoid(-K2 - K3 * log_alpha) + 0.5 * tf.nn.softplus(
        -log_alpha
    )


@register
class VariationalDropout(PenalizedWrapper):
    """Learns a variance for each weight and removes the noisy ones.

    Sparse variational dropout (Molchanov et al. 2017) as in Gale et al. 2019:
    every weight is a Gaussian with mean theta, which is the wrapped layer's
    weight, and variance sigma^2. Linear maps and look-ups
    (`sos.extend.register_use`), also inside attention and other layers, are
    sampled through their outputs (local reparameterisation), with noise of its
    own for each output element; other weights are sampled as a whole, once per
    step. In evaluation a weight is theta where log alpha = log(sigma^2 /
    theta^2) is below the threshold, and zero elsewhere.

    Difference from the authors' code: dense layers on inputs of rank 3 or more
    draw noise for every position; theirs share it over all positions.

    Args:
        layer: The layer to wrap.
        initial_log_sigma2: Initial log sigma^2.
        threshold: Log alpha from which on weights are removed in evaluation.
            It may be set at any time.
        clip_log_alpha: In training log alpha is clipped to this and its
            negative; None for no limit.
        **kwargs: As for `PenalizedWrapper`: `num_examples` or `penalty_weight`,
            `ramp`, `begin_step`, `end_step`, `seed`.

    Raises:
        UsageError: If a number is out of range.
    """

    has_posterior = True
    # 1 / N, the authors' default on ImageNet and WMT'14.
    default_penalty = 1.0
    threshold = Hyperparameter("float32")

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        initial_log_sigma2: float = -10.0,
        threshold: float = 3.0,
        clip_log_alpha: float | None = 8.0,
        **kwargs: Any,
    ) -> None:
        if clip_log_alpha is not None:
            clip_log_alpha = check_number(
                "clip_log_alpha",
                clip_log_alpha,
                "(0, 80]",
                " (exp(88) is not a float32), or None for no limit",
            )
        initial_log_sigma2 = check_number(
            "initial_log_sigma2", initial_log_sigma2
        )
        super().__init__(layer, **kwargs)
        self.initial_log_sigma2 = initial_log_sigma2
        self.threshold = threshold
        self.clip_log_alpha = clip_log_alpha

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds log sigma^2."""
        self.add_penalized_state(
            weight,
            "log_sigma2",
            initializer=keras.initializers.Constant(self.initial_log_sigma2),
        )

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """A sample of the weight, the same for every call in one step."""
        theta, log_sigma2 = self._parameters(weight)
        sigma = tf.sqrt(self._variance(theta, log_sigma2) + EPSILON)
        key = self.noise_key(weight, "weight")
        sample = noise.normal(tf.shape(theta), key)
        return theta + sigma * sample

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Theta where log alpha, not clipped, is below the threshold."""
        theta, log_sigma2 = self._parameters(weight)
        # Written so that a weight of NaN stays one, and is not removed.
        removed = log_alpha_of(theta, log_sigma2) >= self.hyperparameter(
            "threshold"
        )
        return tf.where(removed, 0.0, theta)

    def penalty(self, weight: SparseWeight) -> tf.Tensor:
        """The sum of the KL divergences, with log alpha clipped."""
        log_alpha = log_alpha_of(*self._parameters(weight))
        limit = self.clip_log_alpha
        if limit is not None:
            log_alpha = tf.clip_by_value(log_alpha, -limit, limit)
        return tf.reduce_sum(kl_divergence(log_alpha))

    def use_output(
        self, weight: SparseWeight, use: LinearMap | LookUp
    ) -> tf.Tensor:
        """Samples outputs: noise of its own for every one of them.

        For a linear map f that is local reparameterisation (Kingma et al. 2015,
        equation 6): the outputs are normal with mean f(x; theta) and variance
        f(x^2; sigma^2).
        """
        theta, log_sigma2 = self._parameters(weight)
        if isinstance(use, LookUp):
            theta, log_sigma2 = use.rows(theta, log_sigma2)
            variance = self._variance(theta, log_sigma2)
            return use.finish(self._sample(weight, "rows", theta, variance))
        variance = self._variance(theta, log_sigma2)
        inputs, scale = use.inputs, 1.0
        if inputs.dtype == tf.float16:
            # Variances of e^-10 and less would underflow, squares overflow.
            largest = tf.reduce_max(tf.abs(inputs)) + tf.cast(1e-4, tf.float16)
            largest = tf.stop_gradient(largest)
            deviation = tf.stop_gradient(tf.sqrt(tf.reduce_max(variance)))
            squares = tf.square(inputs / largest)
            scale = tf.square(tf.cast(largest, tf.float32) * deviation)
            variance = variance / tf.square(deviation)
        else:
            squares = tf.square(inputs)
        mean = use(theta, inputs)
        spread = use(variance, squares)
        # No signal, no gradient: that of the root is so steep at zero that it
        # would be infinite in float16, and times the squares' zeros NaN.
        spread = tf.where(spread > 0, spread, tf.zeros_like(spread))
        outputs = self._sample(
            weight,
            "output",
            tf.cast(mean, tf.float32),
            tf.cast(spread, tf.float32) * scale,
        )
        return use.finish(tf.cast(outputs, mean.dtype))

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, which `from_config` takes."""
        return {
            **super().get_config(),
            "initial_log_sigma2": self.initial_log_sigma2,
            "clip_log_alpha": self.clip_log_alpha,
        }

    def _parameters(self, weight: SparseWeight) -> tuple[tf.Tensor, tf.Tensor]:
        theta = tf.cast(weight.value, tf.float32)
        return theta, weight.state["log_sigma2"].value

    def _variance(self, theta: tf.Tensor, log_sigma2: tf.Tensor) -> tf.Tensor:
        """Sigma^2 such that log alpha is within its limits.

        Outside of them it is theta^2 times a constant, so that log sigma^2 gets
        no gradient and theta does.
        """
        limit = self.clip_log_alpha
        if limit is None:
            return tf.exp(log_sigma2)
        # An infinite variance would be clipped, but have a gradient of NaN.
        variance = tf.exp(tf.minimum(log_sigma2, 80.0))
        # Clipping the variance itself saves the logarithms of clipping log
        # alpha.
        square = tf.square(theta) + EPSILON
        least, most = math.exp(-limit) * square, math.exp(limit) * square
        return tf.minimum(tf.maximum(variance, least), most)

    def _sample(
        self,
        weight: SparseWeight,
        kind: str,
        mean: tf.Tensor,
        variance: tf.Tensor,
    ) -> tf.Tensor:
        key = self.noise_key(weight, kind, per_call=True)
        sample = noise.normal(tf.shape(mean), key)
        return mean + tf.sqrt(variance + EPSILON) * sample
