import inspect
import signal

import pytest
import tensorflow as tf

from sos import errors
from sos.errors import (
    DamagedCheckpointError,
    DirectoryInUseError,
    NonFiniteLossError,
    ReportedError,
    Stopped,
    StorageError,
    TaskError,
    WorkerLostError,
    reason,
)

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, ReportedError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_reported_error_prints_its_message_alone(kind):
    arguments = (3,) if kind is NonFiniteLossError else ()
    assert str(kind("it is full", *arguments)) == "it is full"


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (TaskError, ValueError),
        (StorageError, OSError),
        (DirectoryInUseError, StorageError),
        (DamagedCheckpointError, errors.CheckpointError),
        (WorkerLostError, RuntimeError),
        (NonFiniteLossError, ArithmeticError),
    ],
)
def test_reported_error_is_also_the_builtin_error(kind, base):
    assert issubclass(kind, base)
    assert issubclass(kind, ReportedError)


def test_reported_error_in_a_traced_function_keeps_its_class():
    @tf.function
    def traced(x):
        raise TaskError("wrong batch")

    with pytest.raises(TaskError) as error:
        traced(tf.constant(1.0))
    # AutoGraph would replace it by one with a page of frames.
    assert str(error.value) == "wrong batch"


def test_stopped_names_signal_and_step_and_is_no_error():
    stopped = Stopped(signal.SIGTERM, 12, "saved")
    assert str(stopped) == "Stopped by SIGTERM at step 12, saved."
    assert (stopped.signal, stopped.step) == (signal.SIGTERM, 12)
    assert not isinstance(stopped, ReportedError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left"), "[Errno 28] No space left"),
        (ValueError("first.\nsecond"), "first"),
        (ValueError(" \n\n second. "), "second"),
        (KeyError(), "KeyError"),
        (
            tf.errors.NotFoundError(
                None, None, "{{function_node x}} no file [Op:ReadFile] name: "
            ),
            "no file",
        ),
        (
            tf.errors.UnavailableError(
                None,
                None,
                "Graph execution error:\n\nDetected at node x defined at:\n"
                "Collective ops is aborted by: Socket closed\nAdditional GRPC",
            ),
            "Socket closed",
        ),
        (
            tf.errors.InternalError(
                None, None, "Graph execution error:\n\nout of order"
            ),
            "out of order",
        ),
        (
            tf.errors.DataLossError(
                None,
                None,
                "Graph execution error:\n\nDetected at node while/GetNext "
                'defined at (most recent call last):\n  File "a.py", line 27, '
                "in <module>\n\ncorrupted record at 189\n\t [[{{node "
                "while/GetNext}}]] [Op:__inference_g_66]",
            ),
            "corrupted record at 189",
        ),
        (tf.errors.InternalError(None, None, ""), "InternalError"),
    ],
    ids=repr,
)
def test_reason_is_the_line_that_names_the_cause(error, expected):
    assert reason(error) == expected
