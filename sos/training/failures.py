"""Which errors are told in one line, and which need their traceback."""

from collections.abc import Sequence

from sos.training.checkpoints import CheckpointError
from sos.training.trainer import NonFiniteLossError


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
