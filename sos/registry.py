"""The techniques that `sos` knows, its own and those registered with it."""

from typing import TypeVar

import keras

_techniques: dict[str, type] = {}

T = TypeVar("T", bound=type)


def register(technique: T) -> T:
    """Makes a technique known to `sparsify`, the report and saved models.

    Use it as a decorator on a subclass of `sos.SparseWrapper` or
    `sos.MaskedWrapper`. It also registers the class with Keras, so that models
    that contain it load without `custom_objects`.

    Args:
        technique: The class. Its name is the name of the technique.

    Returns:
        The class, unchanged.

    Raises:
        ValueError: If another class is registered under the same name.
    """
    name = technique.__name__
    known = _techniques.get(name)
    # A class that is defined again, as in a notebook cell, replaces itself.
    if known is not None and (known.__module__ != technique.__module__):
        raise ValueError(
            f"A technique named {name!r} is registered already, by "
            f"{known.__module__}. Give the class another name."
        )
    _techniques[name] = technique
    keras.saving.register_keras_serializable(package="sos")(technique)
    return technique


def techniques() -> dict[str, type]:
    """The registered techniques by name, in order of registration."""
    return dict(_techniques)


def get_technique(technique: str | type) -> type:
    """Finds a registered technique.

    Args:
        technique: The class or its name.

    Returns:
        The class.

    Raises:
        ValueError: If it is not registered.
    """
    if isinstance(technique, str) and technique in _techniques:
        return _techniques[technique]
    if technique in _techniques.values():
        return technique
    raise ValueError(
        "The technique must be a registered class or its name: one of "
        f"{sorted(_techniques)}, or a class of your own decorated with "
        f"`@sos.register`. Received: technique={technique!r}"
    )
