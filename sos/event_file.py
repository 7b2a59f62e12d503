"""Files that TensorBoard shows, written without the package `tensorboard`."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

# Later than any.
_NO_STEP = 2**62


class EventFile:
    """A new file of scalars in a log directory of TensorBoard.

    The values are of Estimator's kind (`simple_value`). It is not
    `tf.summary`, which needs TensorBoard's package to write scalars and has no
    way to say that training goes on from a step.

    Args:
        directory: The log directory; created if needed. `gs://` works too.
        resume_step: The step that training goes on from: what earlier files in
            the directory hold of later steps is no longer shown. By default all
            is.
    """

    def __init__(
        self, directory: str | os.PathLike, *, resume_step: int | None = None
    ) -> None:
        directory = os.fspath(directory)
        tf.io.gfile.makedirs(directory)
        # The form of the name is TensorBoard's, which reads files in the order
        # of their names.
        name = (
            f"events.out.tfevents.{time.time():017.6f}."
            f"{socket.gethostname()}.{os.getpid()}"
        )
        self._writer = tf.io.TFRecordWriter(os.path.join(directory, name))
        self._event(file_version="brain.Event:2")
        # TensorBoard forgets what it has of this step and later ones, if it is
        # not the first such event of a run.
        step = _NO_STEP if resume_step is None else resume_step + 1
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._event(step=step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step, by tag."""
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
