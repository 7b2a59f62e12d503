"""Warnings about training that does not do what was asked for."""

import sys
import warnings

# Frames of these packages are not the user's.
_PACKAGES = ("sos", "keras", "tensorflow", "contextlib")


class SparsityWarning(UserWarning):
    """Training goes on, but its sparsity is not what was asked for."""


def warn(message: str) -> None:
    """Warns with a `SparsityWarning`, at the line of the user's program.

    Args:
        message: What happens, why, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SparsityWarning, stacklevel=level)


def _is_library(variables: dict) -> bool:
    return variables.get("__name__", "").partition(".")[0] in _PACKAGES
