"""Warnings shown at the line of the user's program."""

import sys
import warnings

# Frames of these packages are skipped.
_PACKAGES = ("sos", "keras", "tensorflow", "contextlib")


class SparsityWarning(UserWarning):
    """Warns that training continues with another sparsity than requested.

    Example:
    >>> import warnings
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(model, "MagnitudePruning", sparsity=0.5)
    >>> sparse.compile("sgd", "mse")
    >>> x, y = keras.ops.ones((8, 4)), keras.ops.ones((8, 2))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", sos.SparsityWarning)
    ...     history = sparse.fit(
    ...         x, y, verbose=0, callbacks=[sos.SparsityCallback()]
    ...     )
    """


def warn(message: str) -> None:
    """Issues a `SparsityWarning` at the line of the user's program.

    Args:
        message: Text that says what happens, why, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SparsityWarning, stacklevel=level)


def _is_library(variables: dict) -> bool:
    return variables.get("__name__", "").partition(".")[0] in _PACKAGES
