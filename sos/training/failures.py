"""What ends a training before its time, and how a program tells of it."""

import signal
import sys
from collections.abc import Collection, Sequence

from sos.training.checkpoints import CheckpointError
from sos.training.contract import TaskError


class NonFiniteLossError(ArithmeticError):
    """The loss, a penalty or a weight became NaN or infinite.

    Attributes:
        step: The number of steps completed before it.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Stopped(Exception):
    """Training or an evaluation was asked to stop.

    Attributes:
        signal: What asked.
        step: The number of steps that are done.
    """

    def __init__(self, signum: signal.Signals, step: int, state: str) -> None:
        super().__init__(f"Stopped by {signum.name} at step {step}, {state}.")
        self.signal = signum
        self.step = step


def in_a_line(
    error: Exception, *, packages: Sequence[str] = ("sos",)
) -> str | None:
    """What a program says of an error when it gives up.

    Args:
        error: The error.
        packages: Those that say all that is to be known when they refuse
            something.

    Returns:
        What to tell in place of a traceback; None if the error may be a
        mistake in somebody's code, which only a traceback shows.
    """
    if isinstance(error, (CheckpointError, NonFiniteLossError, TaskError)):
        return str(error)
    if hasattr(error, "ag_error_metadata"):
        # AutoGraph made it of one that was raised in a function it traced.
        return None
    # Of others the text says enough if one of the packages refuses what it was
    # given, or could not read or write a file.
    if isinstance(error, OSError):
        refused = _raised_in(error, skip=sys.stdlib_module_names) in packages
    else:
        refused = isinstance(error, (ValueError, RuntimeError)) and (
            _raised_in(error) in packages
        )
    return str(error) if refused else None


def _raised_in(error: Exception, skip: Collection[str] = ()) -> str:
    """The package of the innermost frame that is not of some packages."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
        if name not in skip:
            found = name
        trace = trace.tb_next
    return found
