"""Registry of techniques by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

import keras

from sos.errors import UsageError

_techniques: dict[str, type] = {}

T = TypeVar("T", bound=type)


def register(technique: T) -> T:
    """Registers a technique, so that `sos.sparsify` finds it by its name.

    Use it as a decorator on a subclass of `sos.extend.SparseWrapper`. It also
    registers the class with Keras, so that saved models load without
    `custom_objects`.

    Args:
        technique: The class. Its name is the name of the technique.

    Returns:
        The class, unchanged.

    Raises:
        UsageError: If a class of another module is registered under that name.

    Example: pruning by the distance from the mean of the tensor.
    >>> import keras, sos
    >>> @sos.extend.register
    ... class DeviationPruning(sos.extend.PruningWrapper):
    ...     def scores(self, weight):
    ...         mean = keras.ops.mean(weight.value)
    ...         return keras.ops.abs(weight.value - mean)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(model, "DeviationPruning", sparsity=0.5)
    """
    name = technique.__name__
    known = _techniques.get(name)
    # A class may be defined again, as in a notebook cell.
    if known is not None and (known.__module__ != technique.__module__):
        raise UsageError(
            f"A technique named {name!r} is registered already, by "
            f"{known.__module__}. Give the class another name."
        )
    _techniques[name] = technique
    keras.saving.register_keras_serializable(package="sos")(technique)
    return technique


def techniques() -> dict[str, type]:
    """Returns the registered techniques by name, in order of registration.

    Example:
    >>> import sos
    >>> sos.extend.techniques()["MagnitudePruning"] is sos.MagnitudePruning
    True
    """
    return dict(_techniques)


def get_technique(technique: str | type) -> type:
    """Returns a registered technique.

    Args:
        technique: The class or its name.

    Returns:
        The class.

    Raises:
        UsageError: If it is not registered.
    """
    if isinstance(technique, str) and technique in _techniques:
        return _techniques[technique]
    if any(technique is known for known in _techniques.values()):
        return technique
    raise UsageError(
        "The technique must be a registered class or its name: one of "
        f"{sorted(_techniques)}, or a class decorated with "
        f"`@sos.extend.register`. Received: technique={technique!r}"
    )


def hyperparameters(technique: str | type | None) -> dict[str, Any]:
    """Returns the hyperparameters of a technique with their defaults.

    They are the arguments of the technique's constructor that can be written as
    JSON, and so in a config. `sos.sparsify` takes them.

    Args:
        technique: The registered class or its name; None for a dense model,
            which has none.

    Returns:
        The defaults by name. `sos.extend.REQUIRED` marks a hyperparameter
        without a default.

    Raises:
        UsageError: If the technique is not registered.

    Example:
    >>> import sos
    >>> sos.extend.hyperparameters("FixedMask")
    {'sparsity': None, 'seed': 0}
    >>> sos.extend.hyperparameters("MagnitudePruning")["sparsity"]
    sos.extend.REQUIRED
    """
    if technique is None:
        return {}
    return get_technique(technique).hyperparameters()


def select_hyperparameters(
    technique: str | type | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entries of `values` that are hyperparameters of a technique.

    Code that applies every technique, such as tests and benchmarks, uses it.

    Args:
        technique: The registered class or its name; None for a dense model.
        values: Hyperparameters of any techniques by name.

    Returns:
        The hyperparameters of this technique by name.

    Raises:
        UsageError: If the technique is not registered.

    Example:
    >>> import sos
    >>> values = {"sparsity": 0.9, "frequency": 10, "penalty_weight": 1e-3}
    >>> sos.extend.select_hyperparameters("MagnitudePruning", values)
    {'sparsity': 0.9, 'frequency': 10}
    >>> sos.extend.select_hyperparameters("L0Regularization", values)
    {'penalty_weight': 0.001}
    """
    return {
        name: values[name]
        for name in hyperparameters(technique)
        if name in values
    }
