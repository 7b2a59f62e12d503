"""Errors that a program reports in one line, without a traceback."""

import re
import signal
from typing import Any

# Heads the cause where a worker gives up a collective operation.
ABORTED = "Collective ops is aborted by: "
# Begin the lines that say where in a graph an operation is.
_FRAMES = ('File "', "Detected at node", "[[{{node")
_OPERATION = re.compile(r"^\{\{\S+ \S+\}\} ?| ?\[Op:\w+\].*$")


class ReportedError(Exception):
    """An error whose message says what is wrong and what to do.

    Programs print the message alone. Any other exception is a bug, in this
    package or in a task, and is shown with its traceback.
    """

    # Otherwise AutoGraph replaces it, with a page of frames, when it is raised
    # while a function is traced.
    ag_pass_through = True


class UsageError(ReportedError, ValueError):
    """An argument, a flag, a config or the environment is invalid."""


class ArgumentError(ReportedError, TypeError):
    """An argument is unknown, missing, or excludes another one."""


class BackendError(ReportedError, ImportError):
    """Keras uses a backend that `sos` does not support."""


class TaskError(UsageError):
    """A task returned something that the engine cannot use."""


class StorageError(ReportedError, OSError):
    """A file or directory cannot be read or written."""


class DirectoryInUseError(StorageError):
    """Another process works in the same directory."""


class CheckpointError(ReportedError):
    """A checkpoint could not be written, or none could be restored."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read."""


class WorkerLostError(ReportedError, RuntimeError):
    """Another worker of the job ended or cannot be reached."""


class NonFiniteLossError(ReportedError, ArithmeticError):
    """The loss, a penalty or a weight became NaN or infinite.

    Attributes:
        step: The number of steps completed before it.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to unpickle the error, for other processes."""
        return type(self), (str(self), self.step)


class Stopped(Exception):
    """A signal stopped training or an evaluation. Not an error.

    Attributes:
        signal: The signal.
        step: The number of completed steps; None where several runs were
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
        """Returns how to unpickle the exception, for other processes."""
        return type(self), (self.signal, self.step, self._state)


def reason(error: BaseException) -> str:
    """Returns the line of an error's message that names the cause.

    Leaves out TensorFlow's headings and names of operations.

    Args:
        error: Any exception, for example a `tf.errors.OpError`.

    Returns:
        One line without a full stop; the name of the class if the message is
        empty.
    """
    # The text of TensorFlow's errors also has the traceback of the operation.
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
