"""The arguments of techniques: names, defaults and checks of values."""

import enum
import inspect
import json
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from sos.errors import UsageError


class _Required(enum.Enum):
    # Copying or pickling an enum's member returns the same object.
    REQUIRED = "sos.extend.REQUIRED"

    def __repr__(self) -> str:
        return self.value


#: Marks a hyperparameter without a default, whose value is required.
REQUIRED = _Required.REQUIRED


def defaults(technique: type, base: type) -> dict[str, Any]:
    """Returns the arguments of a technique's constructor with their defaults.

    Args:
        technique: A class derived from `base`.
        base: The class whose arguments are excluded.

    Returns:
        The defaults by name, those of the most distant base class first.
        `REQUIRED` marks an argument without a default.
    """
    by_class = []
    mro = technique.__mro__
    for cls in mro[: mro.index(base)]:
        if "__init__" not in vars(cls):
            continue
        # Without `self` and the layer, which are passed by position.
        parameters = list(inspect.signature(cls.__init__).parameters.values())
        by_class.append(
            {
                p.name: REQUIRED if p.default is p.empty else p.default
                for p in parameters[2:]
                if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
            }
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break  # It cannot pass arguments on to its base classes.
    merged: dict[str, Any] = {}
    for values in reversed(by_class):
        merged.update(values)
    return merged


def is_json(value: Any) -> bool:
    """Returns whether a value can be written as JSON, and so in a config."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def non_defaults(
    values: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns the values that differ from their defaults."""
    return {
        name: value
        for name, value in values.items()
        if name not in defaults
        # Types first: comparing arrays gives no single truth value.
        or type(value) is not type(defaults[name])
        or value != defaults[name]
    }


def format_arguments(values: dict[str, Any]) -> str:
    """Formats arguments for a message: a=1, b='c'."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def format_names(names: Iterable[str]) -> str:
    """Formats names for a message: `a`, `b`, `c`."""
    return ", ".join(f"`{name}`" for name in names)


def format_values(values: Iterable[Any]) -> str:
    """Formats values for a message: 'a', 'b', 1."""
    return ", ".join(map(repr, values))


def check_number(
    name: str, value: Any, interval: str = "(-inf, inf)", meaning: str = ""
) -> float:
    """Checks that an argument is a number in an interval.

    Args:
        name: The argument's name.
        value: Its value.
        interval: The valid values, such as "[0, 1)".
        meaning: Text that the error message adds after the interval.

    Returns:
        The value as a float.

    Raises:
        UsageError: If `value` is not a finite number in the interval.
    """
    least, most = map(float, interval[1:-1].split(","))
    valid = (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
        and not (interval[0] == "(" and value == least)
        and not (interval[-1] == ")" and value == most)
    )
    if not valid:
        within = "" if interval == "(-inf, inf)" else f" in {interval}"
        raise UsageError(
            f"`{name}` must be a finite number{within}{meaning}. "
            f"Received: {name}={value!r}"
        )
    return float(value)


def check_integer(name: str, value: Any, *, minimum: int = 0) -> int:
    """Checks that an argument is an integer, such as a training step.

    Args:
        name: The argument's name.
        value: Its value.
        minimum: The least valid value.

    Returns:
        The value as an int.

    Raises:
        UsageError: If `value` is not an integer or less than `minimum`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise UsageError(
            f"`{name}` must be an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )
    return number
