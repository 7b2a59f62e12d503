"""The techniques that `sos` knows, its own and those registered with it."""

from collections.abc import Mapping
from typing import Any, TypeVar

import keras

from sos.errors import UsageError

_techniques: dict[str, type] = {}

T = TypeVar("T", bound=type)


def register(technique: T) -> T:
    """Makes a technique known to `sparsify`, the report and saved models.

    Use it as a decorator on a subclass of `sos.extend.SparseWrapper` or
    `sos.extend.MaskedWrapper`. It also registers the class with Keras, so that
    models that contain it load without `custom_objects`.

    Args:
        technique: The class. Its name is the name of the technique.

    Returns:
        The class, unchanged.

    Raises:
        UsageError: If another class is registered under the same name.
    """
    name = technique.__name__
    known = _techniques.get(name)
    # A class that is defined again, as in a notebook cell, replaces itself.
    if known is not None and (known.__module__ != technique.__module__):
        raise UsageError(
            f"A technique named {name!r} is registered already, by "
            f"{known.__module__}. Give the class another name."
        )
    _techniques[name] = technique
    keras.saving.register_keras_serializable(package="sos")(technique)
    return technique


def techniques() -> dict[str, type]:
    """Returns the registered techniques by name, in order of registration."""
    return dict(_techniques)


def get_technique(technique: str | type) -> type:
    """Finds a registered technique.

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
        f"{sorted(_techniques)}, or a class of your own decorated with "
        f"`@sos.extend.register`. Received: technique={technique!r}"
    )


def hyperparameters(technique: str | type | None) -> dict[str, Any]:
    """Returns all hyperparameters of a technique with their defaults.

    They are the arguments of `sos.sparsify` and of the technique's constructor
    that JSON can hold, so that a config can give them.

    Args:
        technique: The registered class or its name; None for a dense model,
            which has none.

    Returns:
        The defaults by name. `sos.extend.REQUIRED` marks a hyperparameter
        without one.

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

    It serves code that makes a model sparse with every technique, such as tests
    and benchmarks.

    Args:
        technique: The registered class or its name; None for a dense model.
        values: Hyperparameters of any techniques by name.

    Returns:
        Those that the technique has.

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
