"""Keras optimizers, made from the entries of a config.

```
optimizer = make_optimizer(
    {"name": "adamw", "weight_decay": 0.01, "beta_2": 0.98},
    learning_rate=make_learning_rate(
        {"schedule": "cosine", "base": 1e-3}, train_steps=10_000
    ),
    multipliers=[(v, 10.0) for v in technique_variables(model)],
    no_weight_decay=technique_variables(model),
)
```
"""

import functools
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from sos import keras_compat
from sos.arguments import listed
from sos.errors import UsageError
from sos.weight_decay import technique_variables as technique_variables

#: Pairs of a variable and the factor of its learning rate. Keras's variables
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
    """Makes the optimizer that a config describes.

    Call it, and build the optimizer, in the scope of the distribution strategy.

    The weight decay of Keras's optimizers is decoupled from the gradient
    (Loshchilov and Hutter 2019, arXiv 1711.05101), also SGD's: it subtracts
    learning_rate * weight_decay * w from w. An L2 penalty is part of the loss
    instead: use `kernel_regularizer`.

    Args:
        config: `name`, the name of a class of `keras.optimizers` in any case,
            such as "sgd" or "adamw", and arguments of that class; see
            `defaults`.
        learning_rate: The learning rate or its schedule.
        multipliers: Pairs of a variable and the factor of its learning rate;
            see `with_multipliers`. Other variables have the factor 1.
        no_weight_decay: Variables without weight decay, such as biases.

    Returns:
        An optimizer of that class, not yet built; with multipliers an
        optimizer of a subclass.

    Raises:
        UsageError: If the name, an argument or a multiplier is invalid.
    """
    try:
        # A ConfigDict is not a `Mapping`.
        arguments = dict(config)
    except (TypeError, ValueError):
        raise UsageError(
            "An optimizer is described by entries such as {'name': 'adamw', "
            f"'weight_decay': 0.01}}. Received: {config!r} of type "
            f"{type(config).__name__}"
        ) from None
    name = arguments.pop("name", None)
    valid = defaults(name)
    unknown = sorted(set(arguments) - set(valid))
    if unknown:
        advice = (
            " The learning rate has a config of its own."
            if "learning_rate" in unknown
            else ""
        )
        raise UsageError(
            f"The optimizer {name!r} has the arguments {listed(valid)}."
            f"{advice} Received: {listed(unknown)}"
        )
    optimizer_class = _classes()[name.lower()]
    if _is_real(learning_rate):
        # Keras takes no integers.
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
    """Returns the names of all optimizers, in lower case."""
    return tuple(_classes())


def defaults(name: str) -> dict[str, Any]:
    """Returns the arguments of an optimizer with their default values.

    The learning rate and the optimizer's own name are not among them.

    Args:
        name: The name of an optimizer, in any case.

    Raises:
        UsageError: If there is no such optimizer.
    """
    classes = _classes()
    key = name.lower() if isinstance(name, str) else None
    if key not in classes:
        raise UsageError(
            f"`name` must be one of {listed(classes)}. Received: name={name!r}"
        )
    return _arguments(classes[key])


@functools.cache
def with_multipliers(
    optimizer_class: type[keras.optimizers.Optimizer],
) -> type[keras.optimizers.Optimizer]:
    """Derives an optimizer class with learning-rate factors per variable.

    The new class takes one more argument, `multipliers`: pairs of a variable
    and a factor greater than 0. A variable with the factor f is updated as if
    the learning rate were f * learning_rate, computed in float32.
    Everything else stays the same: clipping, moving averages and their
    overwrites, the optimizer's variables and their names.

    Decoupled weight decay is not multiplied: it uses the plain learning rate.
    Adafactor bounds its rate by 1 / sqrt(step) after it is multiplied.

    ```
    optimizer = with_multipliers(keras.optimizers.SGD)(
        learning_rate=0.1,
        momentum=0.9,
        multipliers=[(layer.bias, 2.0)],
    )
    ```

    Factors belong to variables, which a config cannot name: `get_config`
    raises `UsageError`. Save and restore such an optimizer with
    `tf.train.Checkpoint`, as the training engine does.

    Args:
        optimizer_class: A class of Keras optimizers that overrides
            `update_step` and uses the learning rate passed to it.

    Returns:
        A subclass of the same name. Calls with the same class return the same
        subclass.

    Raises:
        UsageError: If the class leaves the updates to other optimizers, as
            `LossScaleOptimizer` and `MultiOptimizer` do.
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
    """Returns the properties of an optimizer that a compiled step holds.

    Two optimizers of one class with equal properties make the same updates, up
    to the values of their variables.

    Args:
        optimizer: A built optimizer.
    """
    if isinstance(optimizer, _WithMultipliers):
        config = super(_WithMultipliers, optimizer).get_config()
        config["multipliers"] = optimizer.factors
    else:
        config = optimizer.get_config()
    # Not in the config: `exclude_from_weight_decay` was called after it.
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
        # In an object, as Keras would count variables that it finds in lists
        # of an optimizer as the optimizer's.
        self._multipliers = _Pairs(multipliers)
        #: The factors of the variables that it is built with, in their order.
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
        """Updates one variable, with its own learning rate."""
        # Under a strategy the variable is a replica's part of the one that
        # the optimizer was built with.
        factor = self.factors[self._get_variable_index(variable)]
        if factor != 1.0:
            learning_rate = learning_rate * factor
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """Raises `UsageError`: multipliers have no config."""
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
        seen = set()
        for variable, factor in self._pairs:
            if not _is_real(factor) or not 0.0 < factor < math.inf:
                raise UsageError(
                    "A learning-rate multiplier must be a finite number "
                    "greater than 0; to freeze a variable, set its "
                    f"`trainable` to False. Received: {factor!r} for "
                    f"{variable.path!r}"
                )
            if id(variable) in seen:
                raise UsageError(
                    "A variable must have one learning-rate multiplier. "
                    f"Received: two for {variable.path!r}"
                )
            seen.add(id(variable))

    def factors(self, variables: Sequence[keras.Variable]) -> tuple[float, ...]:
        """Returns the factors of variables, in their order."""
        trained = {id(variable) for variable in variables}
        for variable, _ in self._pairs:
            if id(variable) not in trained:
                raise UsageError(
                    "Learning-rate multipliers must be for variables that the "
                    "optimizer trains. Received: one for "
                    f"{variable.path!r}, with which it is not built"
                )
        factors = {id(variable): factor for variable, factor in self._pairs}
        return tuple(
            float(factors.get(id(variable), 1.0)) for variable in variables
        )


@functools.cache
def _classes() -> dict[str, type[keras.optimizers.Optimizer]]:
    """Returns the classes of `keras.optimizers` by name in lower case.

    Classes without a `learning_rate` wrap other optimizers and are left out.
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
