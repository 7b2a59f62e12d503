"""L0 regularisation with hard-concrete gates."""

import math
from typing import Any

import keras
import tensorflow as tf

from sos import noise
from sos.arguments import check_number
from sos.registry import register
from sos.uses import LinearMap, LookUp
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


def sample_gate(log_alpha: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Draws hard-concrete gates (Louizos et al. 2018, equations 10 and 11).

    Args:
        log_alpha: Locations, float32 of any shape.
        key: Key of the noise, int32 of shape [2].

    Returns:
        Gates in [0, 1], float32 of the same shape.
    """
    u = noise.uniform(tf.shape(log_alpha), key)
    # u is a multiple of 2^-23, and 1 - u is exact: half a step up keeps both
    # logarithms finite and the distribution symmetric.
    u = u + 2.0**-24
    logit = tf.math.log(u) - tf.math.log1p(-u)
    s = tf.sigmoid((logit + log_alpha) / BETA)
    return tf.clip_by_value(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def mean_gate(log_alpha: tf.Tensor) -> tf.Tensor:
    """The deterministic gate of evaluation (Louizos et al. 2018, equation 13).

    It is exactly zero for log alpha <= log(-gamma / zeta) = -2.39790.

    Args:
        log_alpha: Locations, float32 of any shape.

    Returns:
        Gates in [0, 1], float32 of the same shape.
    """
    s = tf.sigmoid(log_alpha)
    return tf.clip_by_value(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def expected_l0(log_alpha: tf.Tensor) -> tf.Tensor:
    """P(gate != 0) (Louizos et al. 2018, equation 12).

    Args:
        log_alpha: Locations, float32 of any shape.

    Returns:
        Probabilities, float32 of the same shape.
    """
    return tf.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


@register
class L0Regularization(PenalizedWrapper):
    """Learns gates that are exactly zero, under a penalty on their number.

    Every weight is multiplied by a hard-concrete gate (Louizos et al. 2018)
    with beta 2/3, gamma -0.1 and zeta 1.1. In training one gate is drawn for
    each weight and step and shared by the batch; a look-up draws one for each
    occurrence, as in Gale et al. 2019. In evaluation the gate is
    deterministic. The penalty is the expected number of nonzero gates.

    Args:
        layer: The layer to wrap.
        initial_log_alpha: Mean of the initial log alpha, whose standard
            deviation is 0.01. The default is the authors': a gate is dropped
            with probability 0.1 before it is stretched.
        **kwargs: As for `PenalizedWrapper`: `num_examples` or `penalty_weight`,
            `ramp`, `begin_step`, `end_step`, `seed`.
    """

    has_posterior = True
    # 1 / N, the authors' default on ImageNet and WMT'14.
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
        """The weight times this step's gates."""
        gate = sample_gate(
            weight.state["log_alpha"].value, self.noise_key(weight, "gate")
        )
        return tf.cast(weight.value, tf.float32) * gate

    def evaluation_weight(self, weight: SparseWeight) -> tf.Tensor:
        """The weight times its deterministic gate."""
        gate = mean_gate(weight.state["log_alpha"].value)
        return tf.cast(weight.value, tf.float32) * gate

    def penalty(self, weight: SparseWeight) -> tf.Tensor:
        """The expected number of nonzero gates."""
        return tf.reduce_sum(expected_l0(weight.state["log_alpha"].value))

    def use_output(
        self, weight: SparseWeight, use: LinearMap | LookUp
    ) -> tf.Tensor | None:
        """Draws a gate per occurrence for a look-up, else per weight."""
        if not isinstance(use, LookUp):
            return None
        theta, log_alpha = use.rows(
            weight.value, weight.state["log_alpha"].value
        )
        key = self.noise_key(weight, "occurrence", per_call=True)
        return use.finish(theta * sample_gate(log_alpha, key))

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, which `from_config` takes."""
        return {
            **super().get_config(),
            "initial_log_alpha": self.initial_log_alpha,
        }
