"""Keras optimizers, made from the entries of a config."""

import functools
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from sos import keras_compat
from sos.arguments import format_values
from sos.errors import UsageError
from sos.weight_decay import technique_variables as technique_variables

#: Pairs of a variable and the factor of its learning rate. Keras variables
#: cannot be keys of a dictionary.
Multipliers = Iterable[tuple[keras.Variable, float]]

LearningRate = float | keras.optimizers.schedules.LearningRateSchedule


def make_optimizer(
    config: Mapping[str, Any],
    *,
    learning_rate: LearningRate,
    multipliers: Multipliers | None = None,
    no_weight_decay: Iterable[keras.Variable] | None = None,
) -> keras.optimizers.Optimizer:
    """Returns the optimizer that a config describes.

    Call it, and build the optimizer, in the scope of the distribution strategy.

    The weight decay of all Keras optimizers, including SGD, is decoupled from
    the gradient (Loshchilov and Hutter 2019, arXiv 1711.05101): it subtracts
    learning_rate * weight_decay * w from w. For an L2 penalty, which is part of
    the loss, use `kernel_regularizer`.

    Args:
        config: `name`, the name of a class of `keras.optimizers` in any case,
            such as "sgd" or "adamw", and arguments of that class; see
            `defaults`.
        learning_rate: Learning rate or schedule.
        multipliers: Pairs of a variable and the factor of its learning rate;
            see `with_multipliers`. Other variables have the factor 1.
        no_weight_decay: Variables without weight decay, such as biases.

    Returns:
        An unbuilt optimizer of that class or, with multipliers, of a subclass.

    Raises:
        UsageError: If the name, an argument or a multiplier is invalid.

    Example:
    >>> import keras, sos.training
    >>> layer = keras.layers.Dense(8)
    >>> layer.build((None, 8))
    >>> optimizer = sos.training.make_optimizer(
    ...     {"name": "adamw", "weight_decay": 0.01, "beta_2": 0.98},
    ...     learning_rate=1e-3,
    ...     multipliers=[(layer.bias, 10.0)],
    ...     no_weight_decay=[layer.bias],
    ... )
    >>> optimizer.build(layer.trainable_variables)
    >>> isinstance(optimizer, keras.optimizers.AdamW)
    True
    """
    try:
        # A ConfigDict is not a `Mapping`.
        arguments = dict(config)
    except (TypeError, ValueError):
        raise UsageError(
            "The config of an optimizer must be a mapping such as {'name': "
            f"'adamw', 'weight_decay': 0.01}}. Received: {config!r} of type "
            f"{type(config).__name__}"
        ) from None
    name = arguments.pop("name", None)
    valid = defaults(name)
    unknown = sorted(set(arguments) - set(valid))
    if unknown:
        advice = (
            " The learning rate has its own config."
            if "learning_rate" in unknown
            else ""
        )
        raise UsageError(
            f"The optimizer {name!r} has the arguments {format_values(valid)}."
            f"{advice} Received: {format_values(unknown)}"
        )
    optimizer_class = _classes()[name.lower()]
    if _is_real(learning_rate):
        # Keras rejects integers.
        learning_rate = float(learning_rate)
    multipliers = list(multipliers or ())
    if multipliers:
        optimizer_class = with_multipliers(optimizer_class)
        arguments["multipliers"] = multipliers
    try:
        optimizer = optimizer_class(learning_rate=learning_rate, **arguments)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"Keras cannot make the optimizer {name!r} with these arguments: "
            f"{error}"
        ) from error
    excluded = list(no_weight_decay or ())
    if excluded:
        optimizer.exclude_from_weight_decay(var_list=excluded)
    return optimizer


def names() -> tuple[str, ...]:
    """Returns the names of all optimizers, in lower case.

    Example:
    >>> from sos.training import optimizers
    >>> "adamw" in optimizers.names()
    True
    """
    return tuple(_classes())


def defaults(name: str) -> dict[str, Any]:
    """Returns the arguments of an optimizer with their default values.

    Omits the arguments `learning_rate` and `name`.

    Args:
        name: Name of an optimizer, in any case.

    Returns:
        Default values by argument.

    Raises:
        UsageError: If the name is unknown.

    Example:
    >>> from sos.training import optimizers
    >>> optimizers.defaults("sgd")["momentum"]
    0.0
    """
    classes = _classes()
    key = name.lower() if isinstance(name, str) else None
    if key not in classes:
        raise UsageError(
            f"`name` must be one of {format_values(classes)}. Received: "
            f"name={name!r}"
        )
    return _arguments(classes[key])


@functools.cache
def with_multipliers(
    optimizer_class: type[keras.optimizers.Optimizer],
) -> type[keras.optimizers.Optimizer]:
    """Derives an optimizer class with learning-rate factors per variable.

    The new class has an additional argument, `multipliers`: pairs of a variable
    and a factor greater than 0. A variable with the factor f is updated with
    the learning rate f * learning_rate, computed in float32. Everything else is
    unchanged: clipping, moving averages and their overwrites, the optimizer's
    variables and their names.

    Decoupled weight decay is not multiplied: it uses the base learning rate.
    Adafactor bounds its rate by 1 / sqrt(step) after the multiplication.

    Factors belong to variables, which a config cannot name: `get_config`
    raises `UsageError`. Save and restore such an optimizer with
    `tf.train.Checkpoint`, as the training engine does.

    Args:
        optimizer_class: A class of Keras optimizers that overrides
            `update_step` and uses the learning rate passed to it.

    Returns:
        A subclass of the same name, always the same for the same class.

    Raises:
        UsageError: If the class delegates updates to other optimizers, as
            `LossScaleOptimizer` and `MultiOptimizer` do.

    Example:
    >>> import keras
    >>> from sos.training import optimizers
    >>> layer = keras.layers.Dense(8)
    >>> layer.build((None, 8))
    >>> optimizer = optimizers.with_multipliers(keras.optimizers.SGD)(
    ...     learning_rate=0.1, multipliers=[(layer.bias, 2.0)]
    ... )
    >>> optimizer.build(layer.trainable_variables)
    >>> optimizer.factors
    (1.0, 2.0)
    """
    if optimizer_class.update_step is keras.optimizers.Optimizer.update_step:
        raise UsageError(
            f"`{optimizer_class.__name__}` does not update variables itself. "
            "Give the multipliers to the optimizers inside it."
        )
    # Keras names an optimizer, and so its variables, after its class.
    return type(
        optimizer_class.__name__,
        (_WithMultipliers, optimizer_class),
        {"__module__": __name__, "__doc__": optimizer_class.__doc__},
    )


def traced_config(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Returns the properties of an optimizer that become constants of a step.

    Two optimizers of one class with equal properties and equal variables make
    equal updates.

    Args:
        optimizer: A built optimizer.

    Returns:
        Properties by name.

    Example:
    >>> import keras
    >>> from sos.training import optimizers
    >>> optimizer = keras.optimizers.SGD(momentum=0.9)
    >>> optimizer.build([keras.Variable([0.0])])
    >>> optimizers.traced_config(optimizer)["momentum"]
    0.9
    """
    if isinstance(optimizer, _WithMultipliers):
        config = super(_WithMultipliers, optimizer).get_config()
        config["multipliers"] = optimizer.factors
    else:
        config = optimizer.get_config()
    # The config lacks the effect of `exclude_from_weight_decay`.
    decayed = [
        keras_compat.decays(optimizer, variable)
        for variable in keras_compat.trained_variables(optimizer)
    ]
    return {**config, "decayed": decayed}


class _WithMultipliers:
    """Multiplies the learning rate that `update_step` gets."""

    def __init__(
        self, *args: Any, multipliers: Multipliers, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # In an object, because Keras tracks variables in lists as the
        # optimizer's own.
        self._multipliers = _Pairs(multipliers)
        #: Factors of the variables passed to `build`, in their order.
        self.factors: tuple[float, ...] = ()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the optimizer's variables."""
        if self.built:
            return
        self.factors = self._multipliers.factors(variables)
        super().build(variables)

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """Updates one variable with its own learning rate."""
        # Under a strategy the variable is a replica's component of the one
        # that was passed to `build`.
        factor = self.factors[self._get_variable_index(variable)]
        if factor != 1.0:
            learning_rate = learning_rate * factor
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """Raises `UsageError`: multipliers cannot be serialized."""
        raise UsageError(
            f"The optimizer {self.name!r} has learning-rate multipliers, which "
            "belong to variables and cannot be serialized. Save its state with "
            "`tf.train.Checkpoint`, or the model alone with "
            "`model.save_weights`, and make a new optimizer."
        )


class _Pairs:
    """Variables and factors, hidden from Keras's tracking."""

    def __init__(self, multipliers: Multipliers) -> None:
        self._pairs = [(variable, factor) for variable, factor in multipliers]
        variables = set()
        for variable, factor in self._pairs:
            if not _is_real(factor) or not 0.0 < factor < math.inf:
                raise UsageError(
                    "A learning-rate multiplier must be a finite number "
                    "greater than 0; to freeze a variable, set its "
                    f"`trainable` to False. Received: {factor!r} for "
                    f"{variable.path!r}"
                )
            if id(variable) in variables:
                raise UsageError(
                    "A variable must have one learning-rate multiplier. "
                    f"Received: two for {variable.path!r}"
                )
            variables.add(id(variable))

    def factors(self, variables: Sequence[keras.Variable]) -> tuple[float, ...]:
        """Returns the factors of variables, in their order."""
        trained = {id(variable) for variable in variables}
        for variable, _ in self._pairs:
            if id(variable) not in trained:
                raise UsageError(
                    "Learning-rate multipliers must be for variables that the "
                    "optimizer trains. Received: one for "
                    f"{variable.path!r}, which it does not train"
                )
        factors = {id(variable): factor for variable, factor in self._pairs}
        return tuple(
            float(factors.get(id(variable), 1.0)) for variable in variables
        )


@functools.cache
def _classes() -> dict[str, type[keras.optimizers.Optimizer]]:
    """Returns the classes of `keras.optimizers` by name in lower case.

    Classes without a `learning_rate` wrap other optimizers and are omitted.
    """
    return {
        name.lower(): value
        for name, value in sorted(vars(keras.optimizers).items())
        if inspect.isclass(value)
        and issubclass(value, keras.optimizers.Optimizer)
        and "learning_rate" in inspect.signature(value).parameters
    }


def _arguments(
    optimizer_class: type[keras.optimizers.Optimizer],
) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(
            optimizer_class
        ).parameters.items()
        if name not in ("learning_rate", "name")
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
