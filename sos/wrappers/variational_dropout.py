"""Sparse variational dropout."""

import math
from typing import Any

import keras
import tensorflow as tf

from sos import noise, processor
from sos.arguments import check_number, format_values
from sos.errors import UsageError
from sos.registry import register
from sos.traced import traced
from sos.uses import LinearMap, LookUp
from sos.wrappers.hyperparameters import Hyperparameter
from sos.wrappers.normal_sampling import (
    EPSILON,
    deviate_linear_map,
    sample,
)
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

VARIANCE_DTYPES = (None, "float32", "bfloat16")

# Constants of Molchanov et al. 2017, equation 14.
K1 = 0.63576
K2 = 1.8732
K3 = 1.48695


def log_alpha_of(theta: tf.Tensor, log_sigma2: tf.Tensor) -> tf.Tensor:
    """Returns log alpha = log sigma^2 - log(theta^2 + epsilon).

    Args:
        theta: Means, float32 of any shape.
        log_sigma2: Logarithms of the variances, float32 of the same shape.

    Returns:
        Logarithms of the dropout rates, float32 of the same shape.
    """
    return log_sigma2 - tf.math.log(tf.square(theta) + EPSILON)


def log_sigma2_of(theta: tf.Tensor, log_alpha: tf.Tensor) -> tf.Tensor:
    """Returns log sigma^2 = log alpha + log(theta^2 + epsilon).

    Args:
        theta: Means, float32 of any shape.
        log_alpha: Logarithms of the dropout rates, float32 of the same shape.

    Returns:
        Logarithms of the variances, float32 of the same shape.
    """
    return log_alpha + tf.math.log(tf.square(theta) + EPSILON)


def kl_divergence(log_alpha: tf.Tensor) -> tf.Tensor:
    """Returns the KL divergence from the log-uniform prior, up to a constant.

    It is the approximation of Molchanov et al. 2017, equation 14:
    KL = k1 - k1 sigmoid(k2 + k3 log alpha) + 0.5 log(1 + 1 / alpha).

    Args:
        log_alpha: Logarithms of the dropout rates, float32 of any shape.

    Returns:
        Divergences, float32 of the same shape; positive, and 0 at log alpha =
        infinity.
    """
    return K1 * tf.sigmoid(-K2 - K3 * log_alpha) + 0.5 * tf.nn.softplus(
        -log_alpha
    )


@traced
def _clipped_variance(
    theta: tf.Tensor, log_sigma2: tf.Tensor, limit: float
) -> tf.Tensor:
    """Returns sigma^2 with log alpha clipped to [-limit, limit].

    Where it is clipped, sigma^2 is theta^2 times a constant: log sigma^2 gets
    no gradient, theta does. The gradient is written by hand, as automatic
    differentiation computes three times as many tensors.
    """

    @tf.custom_gradient
    def clip(theta: tf.Tensor, log_sigma2: tf.Tensor) -> tuple:
        # Finite, as second-order gradients multiply it by zero.
        exact = tf.exp(tf.minimum(log_sigma2, 80.0))
        # Clipping sigma^2 needs no logarithms, unlike clipping log alpha.
        square = tf.square(theta) + EPSILON
        least, most = math.exp(-limit) * square, math.exp(limit) * square
        variance = tf.minimum(tf.maximum(exact, least), most)

        def gradient(upstream: tf.Tensor) -> tuple:
            # The derivative of a variance by its logarithm is itself.
            of_log = upstream * variance
            of_log_sigma2 = tf.where(
                variance == exact, of_log, tf.zeros_like(of_log)
            )
            of_log_square = of_log - of_log_sigma2
            return of_log_square * _log_square_slope(
                theta, square
            ), of_log_sigma2

        return variance, gradient

    return clip(theta, log_sigma2)


@traced
def _clipped_divergence(
    theta: tf.Tensor, log_sigma2: tf.Tensor, limit: float
) -> tf.Tensor:
    """Returns the sum of KL divergences, with log alpha clipped.

    Where it is clipped, the gradient is zero. It is written by hand, as that of
    `_clipped_variance`.
    """

    @tf.custom_gradient
    def divergence(theta: tf.Tensor, log_sigma2: tf.Tensor) -> tuple:
        square = tf.square(theta) + EPSILON
        exact = log_sigma2 - tf.math.log(square)
        log_alpha = tf.clip_by_value(exact, -limit, limit)
        # The two terms of `kl_divergence`.
        sigmoid = tf.sigmoid(-K2 - K3 * log_alpha)
        softplus = tf.nn.softplus(-log_alpha)
        total = K1 * tf.reduce_sum(sigmoid) + 0.5 * tf.reduce_sum(softplus)

        def gradient(upstream: tf.Tensor) -> tuple:
            slope = (K1 * K3 * upstream) * (tf.square(sigmoid) - sigmoid)
            slope -= (0.5 * upstream) * tf.sigmoid(-log_alpha)
            of_log_sigma2 = tf.where(
                log_alpha == exact, slope, tf.zeros_like(slope)
            )
            of_theta = -of_log_sigma2 * _log_square_slope(theta, square)
            return of_theta, of_log_sigma2

        return total, gradient

    return divergence(theta, log_sigma2)


def _log_square_slope(theta: tf.Tensor, square: tf.Tensor) -> tf.Tensor:
    """Returns the derivative of log(theta^2 + epsilon)."""
    return 2 * theta / square


@register
class VariationalDropout(PenalizedWrapper):
    """Learns a variance for each weight and removes noisy weights.

    Sparse variational dropout (Molchanov et al. 2017) as in Gale et al. 2019:
    each weight has a normal distribution with mean theta, which is the dense
    weight, and variance sigma^2. Of linear maps and look-ups
    (`sos.extend.register_use`), also inside attention and other layers, the
    outputs are sampled (local reparameterisation), with independent noise for
    each output element. Other weights are sampled once per step. In evaluation
    a weight is theta where log alpha = log(sigma^2 / theta^2) is below the
    threshold, and zero elsewhere.

    Difference from the authors' code: dense layers on inputs of rank 3 or more
    draw independent noise for each position; theirs share it over positions.

    Args:
        layer: The layer to wrap.
        initial_log_sigma2: Initial log sigma^2.
        threshold: Evaluation removes weights with log alpha >= threshold. It
            may be set at any time.
        clip_log_alpha: Limit of |log alpha| in training, in (0, 80]; None for
            no limit.
        variance_dtype: Dtype in which variances of outputs are computed in
            training, "float32" or "bfloat16". By default the layer's compute
            dtype; but bfloat16 for layers of Keras in float32, where there is
            no accelerator and the CPU multiplies bfloat16 natively: products
            take about 0.6 times as long. The rounding errors of a variance have
            no bias and a standard deviation of 0.2 % (at most 1.2 %); means of
            outputs stay exact. Set "float32" for the same results on all CPUs.
        **kwargs: As for `PenalizedWrapper`: `num_examples` or `penalty_weight`,
            `ramp`, `begin_step`, `end_step`, `seed`.

    Raises:
        UsageError: If a number is out of range, or `variance_dtype` invalid.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(model, "VariationalDropout", num_examples=60_000)
    >>> sos.set_hyperparameters(sparse, threshold=-100.0)
    >>> sos.sparsity_report(sparse).sparsity
    1.0
    """

    has_posterior = True
    # The authors use 1 / N on ImageNet and WMT'14.
    default_penalty = 1.0
    # Local reparameterisation: one with the means, one with the variances.
    training_products = 2
    threshold = Hyperparameter("float32")

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        initial_log_sigma2: float = -10.0,
        threshold: float = 3.0,
        clip_log_alpha: float | None = 8.0,
        variance_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        if clip_log_alpha is not None:
            clip_log_alpha = check_number(
                "clip_log_alpha",
                clip_log_alpha,
                "(0, 80]",
                " (exp(89) is not a float32), or None for no limit",
            )
        initial_log_sigma2 = check_number(
            "initial_log_sigma2", initial_log_sigma2
        )
        if variance_dtype not in VARIANCE_DTYPES:
            raise UsageError(
                "`variance_dtype` must be one of "
                f"{format_values(VARIANCE_DTYPES)}. "
                f"Received: variance_dtype={variance_dtype!r}"
            )
        super().__init__(layer, **kwargs)
        self.initial_log_sigma2 = initial_log_sigma2
        self.threshold = threshold
        self.clip_log_alpha = clip_log_alpha
        self.variance_dtype = variance_dtype

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds log sigma^2."""
        self.add_penalized_state(
            weight,
            "log_sigma2",
            initializer=keras.initializers.Constant(self.initial_log_sigma2),
        )

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns a sample of the weight, equal for all calls in a step."""
        theta, log_sigma2 = self._parameters(weight)
        variance = self._variance(theta, log_sigma2)
        return sample(theta, variance, self.noise_key(weight, "weight"))

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns theta where unclipped log alpha < threshold, else 0."""
        theta, log_sigma2 = self._parameters(weight)
        # Compared so that NaN is kept, not removed.
        removed = log_alpha_of(theta, log_sigma2) >= self.hyperparameter(
            "threshold"
        )
        return tf.where(removed, 0.0, theta)

    def penalty(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the sum of the KL divergences, with log alpha clipped."""
        theta, log_sigma2 = self._parameters(weight)
        limit = self.clip_log_alpha
        return _clipped_divergence(
            theta, log_sigma2, math.inf if limit is None else limit
        )

    def use_output(
        self, weight: SparseWeight, use: LinearMap | LookUp
    ) -> tf.Tensor:
        """Returns sampled outputs, with independent noise for each element.

        For a linear map f this is local reparameterisation (Kingma et al. 2015,
        equation 6): outputs are normally distributed with mean f(x; theta) and
        variance f(x^2; sigma^2). For a look-up, each row is sampled anew.

        Args:
            weight: The weight.
            use: The use of the weight by the call.

        Returns:
            The outputs of the call.
        """
        theta, log_sigma2 = self._parameters(weight)
        if isinstance(use, LookUp):
            theta, log_sigma2 = use.rows(theta, log_sigma2)
            variance = self._variance(theta, log_sigma2)
            key = self.noise_key(weight, "rows", per_call=True)
            return use.finish(sample(theta, variance, key))
        variance = self._variance(theta, log_sigma2)
        mean = use(theta, use.inputs)
        key = self.noise_key(weight, "output", per_call=True)
        deviation = self._deviation(use, variance, key)
        return use.finish(mean + tf.cast(deviation, mean.dtype))

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's configuration, for `from_config`."""
        return {
            **super().get_config(),
            "initial_log_sigma2": self.initial_log_sigma2,
            "clip_log_alpha": self.clip_log_alpha,
            "variance_dtype": self.variance_dtype,
        }

    def _parameters(self, weight: SparseWeight) -> tuple[tf.Tensor, tf.Tensor]:
        theta = tf.cast(weight.value, tf.float32)
        return theta, tf.convert_to_tensor(weight.state["log_sigma2"].value)

    def _variance(self, theta: tf.Tensor, log_sigma2: tf.Tensor) -> tf.Tensor:
        if self.clip_log_alpha is None:
            return tf.exp(log_sigma2)
        return _clipped_variance(theta, log_sigma2, self.clip_log_alpha)

    def _deviation(
        self, use: LinearMap, variance: tf.Tensor, key: tf.Tensor
    ) -> tf.Tensor:
        """Returns the noise that is added to the means of outputs."""
        dtype, spread_dtype = use.inputs.dtype, self._spread_dtype(use)
        if spread_dtype != tf.float16:
            return deviate_linear_map(
                use,
                use.inputs,
                variance,
                key,
                spread_dtype=spread_dtype,
                dtype=dtype,
            )
        # Without scaling, variances below e^-10 underflow, and squares
        # overflow. The outputs do not depend on the scales.
        largest = tf.reduce_max(tf.abs(use.inputs)) + tf.cast(1e-4, dtype)
        largest = tf.stop_gradient(largest)
        # Not zero, where no weight has a variance.
        widest = tf.maximum(tf.sqrt(tf.reduce_max(variance)), 1e-12)
        widest = tf.stop_gradient(widest)
        scale = tf.cast(largest, tf.float32) * widest
        deviation = deviate_linear_map(
            use,
            use.inputs / largest,
            variance / tf.square(widest),
            key,
            epsilon=EPSILON / tf.square(scale),
            spread_dtype=spread_dtype,
            dtype=tf.float32,
        )
        return scale * deviation

    def _spread_dtype(self, use: LinearMap) -> tf.DType:
        """Returns the dtype in which variances of outputs are computed."""
        if self.variance_dtype is not None:
            return tf.as_dtype(self.variance_dtype)
        dtype = use.inputs.dtype
        fast = use.fast_in_bfloat16 and processor.multiplies_bfloat16()
        # With an accelerator, the CPU's abilities do not matter.
        if fast and dtype == tf.float32 and not noise.redraws():
            return tf.bfloat16
        return dtype
