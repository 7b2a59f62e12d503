"""L0 regularisation with hard-concrete gates."""

import math
from typing import Any

import keras
import tensorflow as tf

from sos import noise
from sos.arguments import check_number
from sos.registry import register
from sos.traced import traced
from sos.uses import LinearMap, LookUp
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


def sample_gate(log_alpha: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws hard-concrete gates (Louizos et al. 2018, equations 10 and 11).

    With beta = 2/3 the sigmoid of equation 10 is 1 / (1 + r^1.5), where
    r = (1 - u) / (u exp(log alpha)), without a logarithm. It differs from the
    equation in float64 by at most 3e-7.

    Args:
        log_alpha: Locations, float32 of any shape. Infinite ones give gates of
            0 and 1, NaN gives NaN.
        key: Key of the noise, int32 of shape [2].

    Returns:
        Gates in [0, 1], float32 of the same shape. Gradients of any order keep
        the gates, and nothing else, in memory.
    """
    return _sample_gate(tf.convert_to_tensor(log_alpha), key)


@traced
def _sample_gate(log_alpha: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    u = noise.uniform(tf.shape(log_alpha), key)
    r = (1.0 - u) / (u * tf.exp(tf.stop_gradient(log_alpha)))
    # Each operation is a pass over memory without XLA, so that s is not
    # computed by itself: s (zeta - gamma) is the quotient.
    stretched = (ZETA - GAMMA) / (1.0 + r * tf.sqrt(r)) + GAMMA
    return _differentiable(tf.clip_by_value(stretched, 0.0, 1.0), log_alpha)


@tf.custom_gradient
def _differentiable(gate: tf.Tensor, log_alpha: tf.Tensor) -> tuple:
    """Returns gates with their gradient, a function of the gates alone.

    A gate z within (0, 1) is s (zeta - gamma) + gamma, and s has the derivative
    s (1 - s) / beta. So that of z is (z - gamma) (zeta - z) / (zeta - gamma) /
    beta.
    """

    def gradient(upstream: tf.Tensor) -> tuple:
        # As a function of log alpha again, for the second derivative; of copies
        # in the graph of this gradient, as that one cannot reach others.
        z = _differentiable(tf.identity(gate), tf.identity(log_alpha))
        slope = (z - GAMMA) * (ZETA - z) * (1 / (ZETA - GAMMA) / BETA)
        # NaN is not clipped.
        clipped = (gate <= 0.0) | (gate >= 1.0)
        return None, tf.where(clipped, 0.0, upstream * slope)

    return gate, gradient


def mean_gate(log_alpha: tf.Tensor) -> tf.Tensor:
    """Returns the gates of evaluation (Louizos et al. 2018, equation 13).

    A gate is exactly zero for log alpha <= log(-gamma / zeta) = -2.39790.

    Args:
        log_alpha: Locations, float32 of any shape.

    Returns:
        Gates in [0, 1], float32 of the same shape.
    """
    s = tf.sigmoid(log_alpha)
    return tf.clip_by_value(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def expected_l0(log_alpha: tf.Tensor) -> tf.Tensor:
    """Returns P(gate != 0) (Louizos et al. 2018, equation 12).

    Args:
        log_alpha: Locations, float32 of any shape.

    Returns:
        Probabilities, float32 of the same shape.
    """
    return tf.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


@register
class L0Regularization(PenalizedWrapper):
    """Learns gates in [0, 1], and penalizes the number of nonzero gates.

    Each weight is multiplied by a hard-concrete gate (Louizos et al. 2018) with
    beta 2/3, gamma -0.1 and zeta 1.1. In training one gate per weight is drawn
    at each step and shared by the batch; a look-up draws one per occurrence, as
    in Gale et al. 2019. In evaluation the gate is deterministic, and may be
    exactly zero. The penalty is the expected number of nonzero gates.

    Args:
        layer: The layer to wrap.
        initial_log_alpha: Mean of the initial log alpha, with a standard
            deviation of 0.01. The authors' default is a dropout rate of 0.1:
            log(0.9 / 0.1) = 2.197.
        **kwargs: As for `PenalizedWrapper`: `num_examples` or `penalty_weight`,
            `ramp`, `begin_step`, `end_step`, `seed`.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(model, "L0Regularization", num_examples=60_000)
    >>> (weight,) = sparse.layers[0].sparse_weights
    >>> list(weight.state)
    ['log_alpha']
    """

    has_posterior = True
    # The authors use 1 / N on ImageNet and WMT'14.
    default_penalty = 1.0

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        initial_log_alpha: float = 2.197,
        **kwargs: Any,
    ) -> None:
        initial_log_alpha = check_number("initial_log_alpha", initial_log_alpha)
        super().__init__(layer, **kwargs)
        self.initial_log_alpha = initial_log_alpha

    def build_weight(self, weight: SparseWeight) -> None:
        """Adds log alpha."""
        self.add_penalized_state(
            weight,
            "log_alpha",
            initializer=keras.initializers.RandomNormal(
                self.initial_log_alpha,
                0.01,
                seed=noise.text_id(f"{self.seed}:{weight.path}:log_alpha"),
            ),
        )

    def training_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the weight times the gates of this step."""
        gate = sample_gate(
            weight.state["log_alpha"].value, self.noise_key(weight, "gate")
        )
        return tf.cast(weight.value, tf.float32) * gate

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the weight times its deterministic gates."""
        gate = mean_gate(weight.state["log_alpha"].value)
        return tf.cast(weight.value, tf.float32) * gate

    def penalty(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the expected number of nonzero gates."""
        return tf.reduce_sum(expected_l0(weight.state["log_alpha"].value))

    def use_output(
        self, weight: SparseWeight, use: LinearMap | LookUp
    ) -> tf.Tensor | None:
        """Returns the outputs of a look-up, with one gate per occurrence.

        Args:
            weight: The weight.
            use: The use of the weight by the call.

        Returns:
            The outputs of the call; None for a linear map, whose weight
            `training_weight` samples.
        """
        if not isinstance(use, LookUp):
            return None
        theta, log_alpha = use.rows(
            weight.value, weight.state["log_alpha"].value
        )
        key = self.noise_key(weight, "occurrence", per_call=True)
        return use.finish(theta * sample_gate(log_alpha, key))

    def get_config(self) -> dict[str, Any]:
        """Returns the layer's configuration, for `from_config`."""
        return {
            **super().get_config(),
            "initial_log_alpha": self.initial_log_alpha,
        }
