"""Event files for TensorBoard, written without the package `tensorboard`."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

# Later than any step.
_NO_STEP = 2**62


class EventFile:
    """A new event file of scalars in a log directory of TensorBoard.

    Scalars are written as `simple_value`, as Estimator does. `tf.summary` is
    not used: it needs the package `tensorboard` to write scalars, and cannot
    mark the step at which training resumed.

    Args:
        directory: The log directory, created if needed; may be a `gs://` path.
        resume_step: Step at which training resumes. TensorBoard then hides what
            earlier files in the directory hold for later steps. By default it
            shows everything.
    """

    def __init__(
        self, directory: str | os.PathLike, *, resume_step: int | None = None
    ) -> None:
        directory = os.fspath(directory)
        tf.io.gfile.makedirs(directory)
        # TensorBoard requires this form and reads files in the order of their
        # names.
        name = (
            f"events.out.tfevents.{time.time():017.6f}."
            f"{socket.gethostname()}.{os.getpid()}"
        )
        self._writer = tf.io.TFRecordWriter(os.path.join(directory, name))
        self._event(file_version="brain.Event:2")
        # At every such event but the first of a run, TensorBoard drops what it
        # has for this step and later ones.
        step = _NO_STEP if resume_step is None else resume_step + 1
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._event(step=step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars.

        Args:
            step: Number of completed optimizer steps.
            scalars: Values by tag.
        """
        value = tf.compat.v1.Summary.Value
        summary = tf.compat.v1.Summary(
            value=[value(tag=t, simple_value=v) for t, v in scalars.items()]
        )
        self._event(step=step, summary=summary)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _event(self, **fields: Any) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
