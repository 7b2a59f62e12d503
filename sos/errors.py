"""Errors that a program reports in one line, without a traceback."""

import re
import signal
from typing import Any

# Precedes the cause when a worker aborts a collective operation.
ABORTED = "Collective ops is aborted by: "
# Lines that locate an operation in a graph begin with one of these.
_FRAMES = ('File "', "Detected at node", "[[{{node")
_OPERATION = re.compile(r"^\{\{\S+ \S+\}\} ?| ?\[Op:\w+\].*$")


class ReportedError(Exception):
    """An error whose message says what is wrong and what to do.

    Programs print only the message. Any other exception is a bug, in this
    package or in a task, and is shown with its traceback.
    """

    # Otherwise AutoGraph replaces an error that is raised during tracing by one
    # with a page of frames.
    ag_pass_through = True


class UsageError(ReportedError, ValueError):
    """An argument, a flag, a config or the environment is invalid."""


class ArgumentError(ReportedError, TypeError):
    """An argument is unknown, missing, or excludes another."""


class BackendError(ReportedError, ImportError):
    """Keras uses a backend that `sos` does not support."""


class MissingPackageError(ReportedError, ImportError):
    """An optional package is not installed."""


class TaskError(UsageError):
    """A task returned something that the engine cannot use."""


class StorageError(ReportedError, OSError):
    """A file or directory cannot be read or written."""


class DirectoryInUseError(StorageError):
    """Another process is working in the same directory."""


class CheckpointError(ReportedError):
    """A checkpoint could not be written, or none could be restored."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read."""


class WorkerLostError(ReportedError, RuntimeError):
    """Another worker ended or cannot be reached."""


class NonFiniteLossError(ReportedError, ArithmeticError):
    """The loss, a penalty or a weight became NaN or infinite.

    Attributes:
        step: Number of completed optimizer steps.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes the error picklable, to send it to other processes."""
        return type(self), (str(self), self.step)


class Stopped(Exception):
    """A signal stopped training or an evaluation. This is not an error.

    Attributes:
        signal: The signal.
        step: Number of completed optimizer steps; None if several runs were
            stopped.
    """

    def __init__(
        self, signum: signal.Signals, step: int | None, state: str
    ) -> None:
        place = "" if step is None else f" at step {step}"
        super().__init__(f"Stopped by {signum.name}{place}, {state}.")
        self.signal = signum
        self.step = step
        self._state = state

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes the exception picklable, to send it to other processes."""
        return type(self), (self.signal, self.step, self._state)


def reason(error: BaseException) -> str:
    """Returns the line of an error message that names the cause.

    Omits TensorFlow's headings and operation names.

    Args:
        error: Any exception, for example a `tf.errors.OpError`.

    Returns:
        One line without a final period; the name of the class if the message
        is empty.
    """
    # `str` of TensorFlow's errors includes the traceback of the operation.
    text = str(getattr(error, "message", None) or error)
    lines = [_OPERATION.sub("", line.strip()) for line in text.splitlines()]
    for line in lines:
        if ABORTED in line:
            return line.split(ABORTED, 1)[1].rstrip(".")
    for line in lines:
        # Headings end in a colon, such as "Graph execution error:".
        if line and not line.endswith(":") and not line.startswith(_FRAMES):
            return line.rstrip(".")
    return type(error).__name__
