"""Hyperparameters of techniques that can change during training."""

import math
from typing import Any, Protocol

import keras
import tensorflow as tf

from sos.errors import UsageError


class Hyperparameter:
    """A hyperparameter that can change after the layer is built.

    It is an attribute of the technique's class, and a Python number on a layer.
    Compiled steps read it from a variable, so that a change needs no new trace,
    and runs that differ in its value share one compiled step.

    Args:
        dtype: "float32" or "int32".
        minimum: The least valid value, None for no limit.

    Example:
    >>> import keras, sos
    >>> @sos.extend.register
    ... class Scaled(sos.extend.SparseWrapper):
    ...     needs_step = False
    ...     factor = sos.extend.Hyperparameter("float32", minimum=0.0)
    ...
    ...     def __init__(self, layer, *, factor=1.0, **kwargs):
    ...         super().__init__(layer, **kwargs)
    ...         self.factor = factor
    ...
    ...     def training_weight(self, weight):
    ...         return self.hyperparameter("factor") * weight.value
    >>> layer = Scaled(keras.layers.Dense(1, kernel_initializer="ones"))
    >>> layer.factor = 3.0
    >>> float(layer(keras.ops.ones((1, 2)))[0, 0])
    6.0
    """

    def __init__(self, dtype: str, minimum: float | None = None) -> None:
        self.dtype = dtype
        self.minimum = minimum

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, owner_type: type | None = None) -> Any:
        if owner is None:
            return self
        try:
            return owner.hyperparameter_variables.get(self.name)
        except KeyError as error:
            raise AttributeError(self.name) from error

    def __set__(self, owner: Any, value: float) -> None:
        owner.hyperparameter_variables.set(self, self.check(value))

    def check(self, value: Any) -> float:
        """Checks a value.

        Args:
            value: The value.

        Returns:
            The value as a Python number.

        Raises:
            UsageError: If it is not a number, not finite or out of range.
        """
        number = int if self.dtype == "int32" else float
        try:
            valid = (
                not isinstance(value, bool | str)
                and number(value) == value
                and abs(value) < (2**31 if number is int else math.inf)
                and (self.minimum is None or value >= self.minimum)
            )
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            kind = "a 32-bit integer" if number is int else "a finite number"
            least = "" if self.minimum is None else f" >= {self.minimum}"
            raise UsageError(
                f"`{self.name}` must be {kind}{least}. "
                f"Received: {self.name}={value!r}"
            )
        return number(value)


class _StatefulLayer(Protocol):
    def add_state(
        self, name: str, shape: tuple, *, dtype: str, initializer: Any
    ) -> keras.Variable: ...


class HyperparameterVariables:
    """Holds the `Hyperparameter` values of one layer.

    They are Python numbers before the layer is built, variables afterwards.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, Hyperparameter] = {}
        self._values: dict[str, float] = {}
        self._variables: dict[str, keras.Variable] = {}

    def get(self, name: str) -> float:
        """Returns a value as a Python number."""
        if name not in self._variables:
            return self._values[name]
        value = keras.ops.convert_to_numpy(self._variables[name])[()]
        # The shortest decimal of the float32: 0.1, not 0.10000000149.
        return int(value) if value.dtype.kind == "i" else float(str(value))

    def set(self, hyperparameter: Hyperparameter, value: float) -> None:
        """Sets a value, also for compiled steps."""
        self._descriptors[hyperparameter.name] = hyperparameter
        self._values[hyperparameter.name] = value
        if hyperparameter.name in self._variables:
            self._variables[hyperparameter.name].assign(value)

    def values(self) -> dict[str, float]:
        """Returns all values by name."""
        return {name: self.get(name) for name in self._values}

    def tensor(self, name: str) -> tf.Tensor:
        """Returns a value as a scalar tensor."""
        return tf.convert_to_tensor(self._variables[name].value)

    def build(self, layer: _StatefulLayer) -> None:
        """Creates the variables.

        Args:
            layer: The layer that owns them.
        """
        for name, value in self._values.items():
            self._variables[name] = layer.add_state(
                f"{name}_value",
                (),
                dtype=self._descriptors[name].dtype,
                initializer=keras.initializers.Constant(value),
            )
