"""What ends a training before its time, and how a program tells of it."""

import signal
from collections.abc import Sequence

from sos.training.checkpoints import CheckpointError


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
    expected = isinstance(error, (CheckpointError, NonFiniteLossError, OSError))
    refused = isinstance(error, (ValueError, RuntimeError)) and (
        _module_that_raised(error).split(".")[0] in packages
    )
    return str(error) if expected or refused else None


def _module_that_raised(error: Exception) -> str:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "")
