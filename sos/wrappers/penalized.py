"""Techniques that learn which weights to remove, with a penalty in the loss."""

import types
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from sos import arguments
from sos.arguments import check_integer
from sos.errors import ArgumentError
from sos.ramps import Ramp, make_ramp, takes_steps
from sos.step_counter import StepCounter
from sos.wrappers.base import SparseWrapper
from sos.wrappers.hyperparameters import Hyperparameter
from sos.wrappers.sparse_weight import SparseWeight

# The hyperparameters that, with a name, define a ramp.
_STEPS = ("begin_step", "end_step")


class PenalizedWrapper(SparseWrapper):
    """Base class of techniques with a penalty in the loss.

    `penalty_weight * ramp(step) * (sum of penalties)` is added to
    `model.losses`, like the loss of a weight regulariser: `fit` includes it,
    and a custom loop adds `sum(model.losses)`. It counts once per step, however
    often the layer is called. It is zero outside of training: in validation,
    and while no updater is bound.

    A technique overrides `penalty`, and creates its variables with
    `add_penalized_state`.

    Args:
        layer: The layer to wrap.
        penalty_weight: Factor of the penalty, at least 0. Gale et al. 2019 use
            multiples of 1 / (number of training examples).
        num_examples: Number of training examples N, for the authors' default
            penalty weight `default_penalty` / N, if the loss is a mean over
            examples. Pass either this or `penalty_weight`.
        ramp: Growth of the penalty from `begin_step` to `end_step`: "linear",
            "cubic" or "smoothed_cubic"; or "constant" for the full penalty from
            the first step, without these two; or a `sos.ramps.Ramp`.
        begin_step: The last training step without a penalty.
        end_step: The first training step with the full penalty.
        seed: Seed of the noise, an integer. Noise also depends on the paths of
            the weights: name the layers to get the same noise again.
        **kwargs: As for `SparseWrapper`.

    Raises:
        UsageError: If a number is out of range, or the steps do not fit the
            ramp.
        TypeError: If `ramp` is not a ramp, or if neither or both of
            `penalty_weight` and `num_examples` are passed.

    Example:
    >>> import keras, sos
    >>> layer = sos.L0Regularization(
    ...     keras.layers.Dense(8),
    ...     penalty_weight=1e-5,
    ...     ramp="linear",
    ...     begin_step=100,
    ...     end_step=1000,
    ... )
    >>> layer.ramp
    LinearRamp(begin_step=100, end_step=1000)
    >>> layer = sos.L0Regularization(keras.layers.Dense(8), num_examples=50_000)
    >>> layer.penalty_weight
    2e-05
    """

    #: The authors' default penalty weight, in units of 1 / `num_examples`.
    default_penalty = 1.0

    needs_one_of = ("penalty_weight", "num_examples")

    penalty_weight = Hyperparameter("float32", minimum=0.0)
    seed = Hyperparameter("int32")

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        penalty_weight: float | None = None,
        num_examples: int | None = None,
        ramp: Ramp | str = "constant",
        begin_step: int = 0,
        end_step: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        ramp = self._make_ramp(
            {"ramp": ramp, "begin_step": begin_step, "end_step": end_step}
        )
        penalty_weight = self._make_weight(
            {"penalty_weight": penalty_weight, "num_examples": num_examples}
        )
        super().__init__(layer, **kwargs)
        self.penalty_weight = penalty_weight
        self.seed = seed
        self.ramp = ramp

    @classmethod
    def resolve_hyperparameters(
        cls,
        hyperparameters: Mapping[str, Any],
        inherited: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> dict[str, Any]:
        """Creates a `Ramp` and the penalty weight from hyperparameters."""
        if any(
            hyperparameters.get(name) is not None for name in cls.needs_one_of
        ):
            inherited = {
                name: value
                for name, value in inherited.items()
                if name not in cls.needs_one_of
            }
        if "ramp" in hyperparameters and not takes_steps(
            hyperparameters["ramp"]
        ):
            inherited = {
                name: value
                for name, value in inherited.items()
                if name not in _STEPS
            }
        resolved = super().resolve_hyperparameters(hyperparameters, inherited)
        defaults = arguments.defaults(cls, SparseWrapper)
        # A technique may compute its penalty weight itself.
        if "num_examples" in defaults:
            weights = {k: resolved.pop(k, None) for k in cls.needs_one_of}
            weight = cls._make_weight(weights)
            resolved["penalty_weight"] = weight
        names = ("ramp", *_STEPS)
        values = {k: v for k, v in resolved.items() if k in names}
        # A technique without a ramp may use the steps itself.
        if "ramp" not in values and not takes_steps(defaults.get("ramp")):
            return resolved
        defaults = {k: v for k, v in defaults.items() if k in names}
        ramp = cls._make_ramp({**defaults, **values})
        others = {k: v for k, v in resolved.items() if k not in names}
        return {**others, "ramp": ramp}

    @classmethod
    def _make_weight(cls, values: dict[str, Any]) -> float:
        """Returns the penalty weight, computed from `num_examples` if given."""
        # A subclass may have a default penalty weight.
        default = arguments.defaults(cls, SparseWrapper).get("penalty_weight")
        default = None if default is arguments.REQUIRED else default
        weight, examples = values["penalty_weight"], values["num_examples"]
        if examples is not None and weight in (None, default):
            examples = check_integer("num_examples", examples, minimum=1)
            return cls.default_penalty / examples
        weight = default if weight is None else weight
        if weight is not None and examples is not None:
            raise ArgumentError(
                "`penalty_weight` and `num_examples` exclude each other: "
                "`num_examples` sets the penalty weight to "
                f"{cls.default_penalty:g} / num_examples. "
                f"Received: {arguments.format_arguments(values)}"
            )
        if weight is None:
            raise ArgumentError(
                f"{cls.__name__} needs `num_examples`, the number of training "
                "examples, for the default penalty weight "
                f"{cls.default_penalty:g} / num_examples, or another "
                "`penalty_weight`. Received: "
                f"{arguments.format_arguments(values)}"
            )
        return weight

    @classmethod
    def _make_ramp(cls, values: dict[str, Any]) -> Ramp:
        """Creates a ramp from a name or object, and steps."""
        steps = {name: values[name] for name in _STEPS if name in values}
        if not takes_steps(values["ramp"]):
            # Without the default steps of a subclass.
            defaults = arguments.defaults(cls, SparseWrapper)
            steps = arguments.non_defaults(steps, defaults)
        return make_ramp(values["ramp"], **steps)

    def penalty(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the penalty of one weight, without the penalty weight.

        Args:
            weight: The weight.

        Returns:
            A float32 scalar.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `penalty`."
        )

    def weighted_penalty(self, weight: SparseWeight) -> tf.Tensor:
        """Returns the penalty that one weight adds to the loss.

        Args:
            weight: The weight.

        Returns:
            A float32 scalar; zero while no updater is bound.
        """
        if not self.step_counter.bound:
            return tf.zeros(())
        factor = self.hyperparameter("penalty_weight") * self.ramp(
            self.step_counter.step
        )
        return _watch_gradient(factor * self.penalty(weight), self.step_counter)

    def add_penalized_state(
        self, weight: SparseWeight, name: str, **kwargs: Any
    ) -> keras.Variable:
        """Adds a trainable variable, with the weight's penalty as regulariser.

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
        """Returns the layer's configuration, for `from_config`."""
        return {
            **super().get_config(),
            "ramp": keras.saving.serialize_keras_object(self.ramp),
        }

    @classmethod
    def arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Turns entries of a configuration into arguments."""
        config = super().arguments_from_config(config)
        config["ramp"] = keras.saving.deserialize_keras_object(config["ramp"])
        return config


def _watch_gradient(penalty: tf.Tensor, step_counter: StepCounter) -> tf.Tensor:
    """Returns the penalty, and records whether its gradient is computed.

    It is if the loss contains the penalty, not if the penalty is only logged.
    """

    @tf.custom_gradient
    def identity(value: tf.Tensor) -> tuple:
        def grad(upstream: tf.Tensor) -> tf.Tensor:
            # At trace time, so that the compiled step does not change.
            step_counter.penalty_trained = True
            return upstream

        return tf.identity(value), grad

    return identity(penalty)


class _Penalty(keras.Regularizer):
    """Makes a weight's penalty the regulariser of a variable.

    With `add_loss` in `call`, the penalty of a shared layer would count once
    per call, and a rematerialised block would silently drop its gradient.
    """

    def __init__(self, wrapper: PenalizedWrapper, weight: SparseWeight) -> None:
        self._wrapper = wrapper
        self._weight = weight

    def __call__(self, variable: Any) -> tf.Tensor:
        del variable  # The technique reads all of the weight's variables.
        return self._wrapper.weighted_penalty(self._weight)
