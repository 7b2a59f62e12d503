"""Ramps: how the factor of a penalty grows with the training step.

Ramps run in the training step, so they are built of TensorFlow operations.
"""

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sos.arguments import check_integer
from sos.configurable import Configurable
from sos.errors import ArgumentError, UsageError

__all__ = ["ConstantRamp", "CubicRamp", "LinearRamp", "Ramp", "make_ramp"]


@keras.saving.register_keras_serializable(package="sos")
class Ramp(Configurable):
    """Function of the step from 0 to 1, by which a penalty is multiplied.

    To write a ramp, override `__call__`, and `get_config` if the constructor
    takes arguments, and register the class with
    `@keras.saving.register_keras_serializable()`. A ramp has no state, so that
    a resumed run continues exactly.

    Example:
    >>> import keras, sos
    >>> @keras.saving.register_keras_serializable()
    ... class StepRamp(sos.ramps.Ramp):
    ...     def __call__(self, step):
    ...         return keras.ops.cast(step >= 1000, "float32")
    >>> layer = sos.L0Regularization(
    ...     keras.layers.Dense(8), penalty_weight=1e-5, ramp=StepRamp()
    ... )
    """

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the factor of the penalty at a step.

        Args:
            step: Number of completed training steps, an integer scalar.

        Returns:
            float32 scalar tensor in [0, 1].
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `__call__(step)`."
        )


@keras.saving.register_keras_serializable(package="sos")
class ConstantRamp(Ramp):
    """Constant ramp: the full penalty from the first step.

    Example:
    >>> import sos
    >>> float(sos.ramps.ConstantRamp()(0))
    1.0
    """

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns 1 at every step."""
        return tf.constant(1.0, tf.float32)


@keras.saving.register_keras_serializable(package="sos")
class LinearRamp(Ramp):
    """Linear ramp: min(max(t - begin, 0) / (end - begin), 1) at step t.

    Args:
        begin_step: The last step at which the factor is 0, at least 0.
        end_step: The first step at which it is 1, after `begin_step`.

    Raises:
        UsageError: If the steps are out of range.

    Example:
    >>> import sos
    >>> ramp = sos.ramps.LinearRamp(begin_step=100, end_step=300)
    >>> [float(ramp(step)) for step in (100, 150, 300)]
    [0.0, 0.25, 1.0]
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
        """Returns the factor at a step, a float32 scalar."""
        return self._fraction(_integer_step(step))

    def _fraction(self, steps: tf.Tensor) -> tf.Tensor:
        """Returns the linear ramp at integer steps of any shape."""
        length = self.end_step - self.begin_step
        # Clipped as integers, so that large steps lose no precision.
        elapsed = tf.clip_by_value(steps - self.begin_step, 0, length)
        return tf.cast(elapsed, tf.float32) / float(length)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"begin_step": self.begin_step, "end_step": self.end_step}


# The authors' decay of the moving average, and the number of steps over which
# it is computed here. As the ramp is at most 1, earlier steps would contribute
# at most _DECAY**_WINDOW = 1.7e-9. Rounding to float32 adds about 2e-7.
_DECAY = 0.9
_WINDOW = 192


@keras.saving.register_keras_serializable(package="sos")
class CubicRamp(LinearRamp):
    """Cubic ramp: w(t) = 1 - (1 - q)^3 at step t.

    Here q = min(max(t - begin, 0) / (end - begin), 1).

    For the Transformer, Gale et al. 2019 smooth it by a moving average
    a(t) = 0.1 * w(t) + 0.9 * a(t - 1) that starts at 0. Their code keeps it in
    a variable, which is also updated in each evaluation. Here it is a function
    of the step.

    Args:
        begin_step: The last step at which the factor is 0, at least 0.
        end_step: The first step at which it is 1 (without the average), after
            `begin_step`.
        moving_average: Whether to return a(t) instead of w(t).

    Raises:
        UsageError: If the steps are out of range.

    Example:
    >>> import sos
    >>> ramp = sos.ramps.CubicRamp(begin_step=0, end_step=200)
    >>> [float(ramp(step)) for step in (0, 100, 200)]
    [0.0, 0.875, 1.0]
    """

    def __init__(
        self, begin_step: int, end_step: int, moving_average: bool = False
    ):
        super().__init__(begin_step, end_step)
        self.moving_average = bool(moving_average)

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the factor at a step, a float32 scalar."""
        step = _integer_step(step)
        if not self.moving_average:
            return self._cubic(step)
        # a(t) = sum over i of 0.1 * 0.9^i * w(t - i); w is 0 before step 0.
        # The oldest terms, which are the smallest, come first: less rounding.
        ages = np.arange(_WINDOW)[::-1]
        weights = (1.0 - _DECAY) * _DECAY**ages
        factors = self._cubic(step - tf.constant(ages, step.dtype))
        average = tf.reduce_sum(tf.constant(weights, tf.float32) * factors)
        return tf.minimum(average, 1.0)

    def _cubic(self, steps: tf.Tensor) -> tf.Tensor:
        """Returns w(t) at integer steps of any shape."""
        # 1 - (1 - q)^3 = q * (3 - 3q + q^2), which loses no digits for small q
        # and is exactly 1 for q = 1.
        q = self._fraction(steps)
        return q * (3.0 - q * (3.0 - q))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "moving_average": self.moving_average,
        }


def _integer_step(step: tf.Tensor | int) -> tf.Tensor:
    """Returns the step as an int64 tensor.

    Raises:
        TypeError: If its dtype is not an integer.
    """
    step = tf.convert_to_tensor(step)
    if not step.dtype.is_integer:
        raise ArgumentError(
            "`step` must be an integer, such as `optimizer.iterations`. "
            f"Received: step={step} of dtype {step.dtype.name}"
        )
    return tf.cast(step, tf.int64)


# Constructors of ramps by their names in configs.
_RAMPS = {
    "constant": ConstantRamp,
    "linear": LinearRamp,
    "cubic": CubicRamp,
    "smoothed_cubic": functools.partial(CubicRamp, moving_average=True),
}


def takes_steps(ramp: Ramp | str) -> bool:
    """Returns whether a ramp is a name that needs `begin_step`, `end_step`."""
    return isinstance(ramp, str) and ramp != "constant"


def make_ramp(
    ramp: Ramp | str, *, begin_step: int = 0, end_step: int | None = None
) -> Ramp:
    """Creates a ramp from its name and steps.

    Args:
        ramp: "constant", "linear", "cubic", "smoothed_cubic" (a `CubicRamp`
            with the authors' moving average) or a `Ramp`, which is returned.
        begin_step: The last training step at which the factor is 0.
        end_step: The first training step at which it is 1. All names except
            "constant" need one.

    Returns:
        The ramp.

    Raises:
        UsageError: If the name is unknown, or the steps do not fit the ramp.
        TypeError: If `ramp` is neither a name nor a `Ramp`.

    Example:
    >>> import sos
    >>> sos.ramps.make_ramp("linear", begin_step=100, end_step=300)
    LinearRamp(begin_step=100, end_step=300)
    >>> sos.ramps.make_ramp("constant")
    ConstantRamp()
    """
    if not isinstance(ramp, Ramp | str):
        raise ArgumentError(
            f"`ramp` must be one of {sorted(_RAMPS)} or a `Ramp`, such as "
            "`sos.ramps.LinearRamp(begin_step=1000, end_step=5000)`. For "
            "another function, derive a class from `Ramp`. "
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
                f"The ramp {ramp!r} needs an `end_step`, the first training "
                f"step with the full penalty. {received}"
            )
        return _RAMPS[ramp](begin_step, end_step)
    if (begin_step, end_step) != (0, None):
        raise UsageError(
            f"`begin_step` and `end_step` do not fit ramp={ramp!r}: "
            + (
                "a `Ramp` has its own steps. Leave them out, or pass a name "
                if isinstance(ramp, Ramp)
                else "the full penalty begins at the first step. Leave them "
                "out, or choose another ramp "
            )
            + f"({', '.join(filter(takes_steps, _RAMPS))}). {received}"
        )
    return ramp if isinstance(ramp, Ramp) else _RAMPS[ramp]()
