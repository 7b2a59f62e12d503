"""How fast the penalty of a regulariser grows with the training step.

Ramps are part of the training step, so they are built of TensorFlow operations.
"""

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.arguments import check_integer
from sos.configurable import Configurable
from sos.errors import ArgumentError, UsageError


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
        UsageError: If the steps are out of range.
    """

    def __init__(self, begin_step: int, end_step: int):
        try:
            self.begin_step = check_integer("begin_step", begin_step)
            self.end_step = check_integer("end_step", end_step)
            valid = self.begin_step < self.end_step
        except UsageError:
            valid = False
        if not valid:
            raise UsageError(
                "A ramp needs integers with 0 <= begin_step < end_step; for "
                "the full penalty from the start use `ConstantRamp()`. "
                "Received: "
                f"begin_step={begin_step}, end_step={end_step}"
            )

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
        end_step: The first step at which it is 1 (without the average); after
            `begin_step`.
        moving_average: Whether to smooth as the authors do.

    Raises:
        UsageError: If the steps are out of range.
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
    """Returns the step as an int64 tensor; raises if it is a fraction."""
    step = tf.convert_to_tensor(step)
    if not step.dtype.is_integer:
        raise ArgumentError(
            "`step` must be an integer, such as `optimizer.iterations`. "
            f"Received: step={step} of dtype {step.dtype.name}"
        )
    return tf.cast(step, tf.int64)


# The ramps that have a name, as configs give it, and what makes each.
_RAMPS = {
    "constant": ConstantRamp,
    "linear": LinearRamp,
    "cubic": CubicRamp,
    "smoothed_cubic": functools.partial(CubicRamp, moving_average=True),
}


def takes_steps(ramp: Ramp | str) -> bool:
    """Returns whether a ramp is a name that goes with steps."""
    return isinstance(ramp, str) and ramp != "constant"


def make_ramp(
    ramp: Ramp | str, *, begin_step: int = 0, end_step: int | None = None
) -> Ramp:
    """Returns the ramp that a name and numbers describe.

    Args:
        ramp: "constant", "linear", "cubic", "smoothed_cubic" (a `CubicRamp`
            with the authors' moving average) or a `Ramp`, which is returned.
        begin_step: The last training step at which the factor is 0.
        end_step: The first training step at which it is 1. All names except
            "constant" need one.

    Returns:
        A `Ramp`.

    Raises:
        UsageError: If the name is unknown, or the steps do not fit the ramp.
        TypeError: If `ramp` is neither a name nor a `Ramp`.

    Example:
    >>> make_ramp("linear", begin_step=100, end_step=300)
    LinearRamp(begin_step=100, end_step=300)
    >>> make_ramp("constant")
    ConstantRamp()
    """
    if not isinstance(ramp, Ramp | str):
        raise ArgumentError(
            f"`ramp` must be one of {sorted(_RAMPS)} or a `Ramp`, such as "
            "`sos.ramps.LinearRamp(begin_step=1000, end_step=5000)`; a "
            "function of your own becomes one by deriving from `Ramp`. "
            f"Received: ramp={ramp!r} of type {type(ramp).__name__}"
        )
    if isinstance(ramp, str) and ramp not in _RAMPS:
        raise UsageError(
            f"There is no ramp named {ramp!r}. `ramp` must be one of "
            f"{sorted(_RAMPS)}, or a `Ramp`. Received: ramp={ramp!r}"
        )
    received = (
        f"Received: ramp={ramp!r}, begin_step={begin_step!r}, "
        f"end_step={end_step!r}"
    )
    if takes_steps(ramp):
        if end_step is None:
            raise UsageError(
                f"The ramp {ramp!r} needs an `end_step`, the training step at "
                f"which the penalty is complete. {received}"
            )
        return _RAMPS[ramp](begin_step, end_step)
    if (begin_step, end_step) != (0, None):
        raise UsageError(
            f"`begin_step` and `end_step` do not fit ramp={ramp!r}: "
            + (
                "a `Ramp` has its own steps. Leave them out, or name a ramp "
                if isinstance(ramp, Ramp)
                else "its penalty is complete from the first step on. Leave "
                "them out, or choose another ramp "
            )
            + f"({', '.join(filter(takes_steps, _RAMPS))}). {received}"
        )
    return ramp if isinstance(ramp, Ramp) else _RAMPS[ramp]()
