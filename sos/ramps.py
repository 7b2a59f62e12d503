"""How fast the penalty of a regulariser grows with the training step.

Ramps are part of the training step, so they are built of TensorFlow operations.
"""

import operator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.configurable import Configurable


@keras.saving.register_keras_serializable(package="sos")
class Ramp(Configurable):
    """How the weight of a regulariser grows with the step, from 0 to 1.

    To write one, override `__call__`, and `get_config` if the constructor
    takes arguments, and register the class with
    `@keras.saving.register_keras_serializable()`. Ramps have no state: they
    are functions of the step, so that a resumed run goes on exactly.
    """

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the factor of the penalty at a step.

        Args:
            step: Integer scalar, the number of training steps done so far.

        Returns:
            float32 scalar tensor in [0, 1].
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `__call__(step)`."
        )


@keras.saving.register_keras_serializable(package="sos")
class ConstantRamp(Ramp):
    """The full penalty from the first step on."""

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns 1, whatever the step is."""
        return tf.constant(1.0, tf.float32)


@keras.saving.register_keras_serializable(package="sos")
class LinearRamp(Ramp):
    """min(max(0, t - begin) / (end - begin), 1).

    Args:
        begin_step: The last step at which the factor is 0; at least 0.
        end_step: The first step at which it is 1; after `begin_step`.

    Raises:
        ValueError: If the steps are out of range.
    """

    def __init__(self, begin_step: int, end_step: int):
        try:
            valid = 0 <= operator.index(begin_step) < operator.index(end_step)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(
                "A ramp needs integers with 0 <= begin_step < end_step; for "
                "the full penalty from the start use `ConstantRamp()`. "
                "Received: "
                f"begin_step={begin_step}, end_step={end_step}"
            )
        self.begin_step = int(begin_step)
        self.end_step = int(end_step)

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the factor at a step, as `Ramp.__call__` describes it."""
        return self._fraction(_integer_step(step))

    def _fraction(self, steps: tf.Tensor) -> tf.Tensor:
        """Returns the linear ramp at integer steps of any shape."""
        length = self.end_step - self.begin_step
        # Clipped as integers, so that large steps cost no precision.
        done = tf.clip_by_value(steps - self.begin_step, 0, length)
        return tf.cast(done, tf.float32) / float(length)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"begin_step": self.begin_step, "end_step": self.end_step}


# The authors' decay of the moving average, and how many steps of the past it
# is taken over here. As the ramp stays within [0, 1], the steps left out add
# up to at most _DECAY**_WINDOW = 1.7e-9. Rounding to float32 adds about 2e-7.
_DECAY = 0.9
_WINDOW = 192


@keras.saving.register_keras_serializable(package="sos")
class CubicRamp(LinearRamp):
    """min(1 - (1 - q)^3, 1), q = max(t - begin, 0) / (end - begin).

    The authors smooth it on the Transformer by a moving average that is kept
    in a variable, starts at 0 and is updated once per training step:
    a(t) = 0.1 * w(t) + 0.9 * a(t - 1). Theirs also moves whenever the model is
    evaluated; here it is a function of the step alone, for steps 0 to t.

    Args:
        begin_step: The last step at which the factor is 0; at least 0.
        end_step: The first step at which it is 1 (but for the average); after
            `begin_step`.
        moving_average: Whether to smooth as the authors do.

    Raises:
        ValueError: If the steps are out of range.
    """

    def __init__(
        self, begin_step: int, end_step: int, moving_average: bool = False
    ):
        super().__init__(begin_step, end_step)
        self.moving_average = bool(moving_average)

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the factor at a step, as `Ramp.__call__` describes it."""
        step = _integer_step(step)
        if not self.moving_average:
            return self._cubic(step)
        # a(t) = sum over i of 0.1 * 0.9^i * w(t - i); w is 0 before step 0.
        # Oldest, and so smallest, terms first: that rounds least.
        ages = np.arange(_WINDOW)[::-1]
        weights = (1.0 - _DECAY) * _DECAY**ages
        factors = self._cubic(step - tf.constant(ages, step.dtype))
        average = tf.reduce_sum(tf.constant(weights, tf.float32) * factors)
        return tf.minimum(average, 1.0)

    def _cubic(self, steps: tf.Tensor) -> tf.Tensor:
        """Returns the ramp at integer steps of any shape, not averaged."""
        # With q clipped to 1 the formula has the same values, as it exceeds 1
        # for q > 1 only, and cannot overflow. Written as q * (3 - 3q + q^2),
        # it loses no digits for small q, and is exactly 1 for q = 1.
        q = self._fraction(steps)
        return q * (3.0 - q * (3.0 - q))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "moving_average": self.moving_average,
        }


def _integer_step(step: tf.Tensor | int) -> tf.Tensor:
    """Returns the step as an int64 tensor, refusing fractions."""
    step = tf.convert_to_tensor(step)
    if not step.dtype.is_integer:
        raise TypeError(
            "`step` must be an integer, such as `optimizer.iterations`. "
            f"Received: step={step} of dtype {step.dtype.name}"
        )
    return tf.cast(step, tf.int64)


def as_ramp(ramp: Ramp | None) -> Ramp:
    """Returns the ramp itself, or for None the one that is always 1.

    Raises:
        TypeError: If it is neither.
    """
    if ramp is None:
        return ConstantRamp()
    if isinstance(ramp, Ramp):
        return ramp
    raise TypeError(
        "`ramp` must be None or a `Ramp`, such as `sos.LinearRamp(begin_step="
        "1000, end_step=5000)`; a function of your own becomes one by deriving "
        f"from `Ramp`. Received: ramp={ramp!r} of type {type(ramp).__name__}"
    )
