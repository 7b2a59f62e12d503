"""Techniques that learn what to remove, under a penalty in the loss."""

from typing import Any

import keras
import tensorflow as tf

from sos.ramps import Ramp, as_ramp
from sos.wrappers.base import SparseWrapper
from sos.wrappers.settings import Setting
from sos.wrappers.sparse_weight import SparseWeight


class PenalizedWrapper(SparseWrapper):
    """Adds `penalty_weight * ramp(step) * sum of penalties` to the loss.

    The penalty stands in `model.losses`, as the loss of a weight regulariser
    does, so that `fit` adds it by itself and a custom loop adds
    `sum(model.losses)`. It is counted once per step however often the layer is
    called, and belongs to training alone: while no driver is bound, and in the
    validation within `fit`, it is zero.

    Args:
        layer: The layer to wrap.
        penalty_weight: Factor of the penalty, at least 0. Gale et al. 2019 use
            a multiple of 1 / (number of training examples).
        ramp: A `sos.Ramp` that raises the penalty with the step; by default the
            penalty is constant.
        seed: Seed of the noise, an integer. Streams differ by the weights'
            paths, so name layers that are to draw the same noise again.
        **kwargs: As for `SparseWrapper`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If `ramp` is not a ramp.
    """

    penalty_weight = Setting("float32", minimum=0.0)
    seed = Setting("int32")

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        penalty_weight: float,
        ramp: Ramp | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        ramp = as_ramp(ramp)
        super().__init__(layer, **kwargs)
        self.penalty_weight = penalty_weight
        self.seed = seed
        self.ramp = ramp

    def penalty(self, weight: SparseWeight) -> tf.Tensor:
        """The penalty of one weight before it is weighted, a float32 scalar.

        Args:
            weight: The weight.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `penalty`."
        )

    def weighted_penalty(self, weight: SparseWeight) -> tf.Tensor:
        """The penalty of one weight as it stands in the loss.

        Args:
            weight: The weight.

        Returns:
            A float32 scalar, zero while no driver is bound.
        """
        if not self.clock.bound:
            return tf.zeros(())
        factor = self.setting("penalty_weight") * self.ramp(self.clock.step)
        return factor * self.penalty(weight)

    def add_penalized_state(
        self, weight: SparseWeight, name: str, **kwargs: Any
    ) -> keras.Variable:
        """Adds the trainable variable that carries a weight's penalty.

        Args:
            weight: The weight.
            name: As for `add_weight_state`.
            **kwargs: As for `add_weight_state`.

        Returns:
            The variable.
        """
        return self.add_weight_state(
            weight,
            name,
            trainable=True,
            regularizer=_Penalty(self, weight),
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, which `from_config` takes."""
        return {
            **super().get_config(),
            "ramp": keras.saving.serialize_keras_object(self.ramp),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "PenalizedWrapper":
        """Makes the layer from its configuration."""
        config = dict(config)
        config["ramp"] = keras.saving.deserialize_keras_object(
            config["ramp"], custom_objects
        )
        return super().from_config(config, custom_objects)


class _Penalty(keras.Regularizer):
    """Hands a wrapper's penalty to Keras as the regulariser of a variable.

    A loss that is added in `call` instead would be counted once per call of a
    shared layer, and a rematerialised block would drop its gradient in silence.
    """

    def __init__(self, wrapper: PenalizedWrapper, weight: SparseWeight) -> None:
        self._wrapper = wrapper
        self._weight = weight

    def __call__(self, variable: Any) -> tf.Tensor:
        del variable  # The technique reads all of the weight's variables.
        return self._wrapper.weighted_penalty(self._weight)
