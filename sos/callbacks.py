"""Training with `fit`."""

import importlib.util
from typing import Any

import keras
import tensorflow as tf

from sos.driver import Driver
from sos.report import sparsity_report


class SparsityCallback(keras.callbacks.Callback):
    """Drives the sparse layers of a model in `fit`.

    It updates masks as their schedules say and adds `sparsity`, that of all
    sparse weights together, to the logs of every epoch, where `History`, the
    progress bar and `keras.callbacks.TensorBoard` find it if they come later in
    the list of callbacks. With `steps_per_execution=n` a mask update
    lands at the end of the block of n steps that contains its step.

    Args:
        log_dir: A directory for TensorBoard, which then gets the sparsity of
            each weight after every epoch; None for none.

    Raises:
        ImportError: If there is a `log_dir` and TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        if log_dir is not None and not importlib.util.find_spec("tensorboard"):
            raise ImportError(
                "Writing summaries for TensorBoard needs the package "
                "`tensorboard`: pip install tensorboard. "
                f"Received: log_dir={log_dir!r}"
            )
        self.log_dir = log_dir
        self._driver: Driver | None = None
        self._writer: tf.summary.SummaryWriter | None = None
        self._batch_pending = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Binds the clocks."""
        self._driver = Driver(
            self.model,
            self.model.optimizer,
            steps_per_block=self.model.steps_per_execution,
        )
        self._driver.start()
        self._guard_train_function()
        if self.log_dir is not None:
            self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Updates the masks that are due."""
        self._batch_pending = False
        self._driver.step()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Logs the sparsity."""
        report = sparsity_report(self.model)
        if logs is not None:
            logs["sparsity"] = report.sparsity
        if self._writer is not None:
            step = self._driver.iterations
            with self._writer.as_default(step=step):
                tf.summary.scalar("sparsity", report.sparsity)
                for row in report.rows:
                    if row["technique"]:
                        tf.summary.scalar(
                            f"sparsity/{row['weight']}", row["sparsity"]
                        )
            self._writer.flush()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes the penalties out of the validation loss."""
        if self._driver is not None:
            self._driver.pause()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Goes on after a validation within `fit`."""
        if self._driver is not None:
            self._driver.resume()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Unbinds the clocks."""
        self._driver.stop()
        self._driver = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _guard_train_function(self) -> None:
        """Makes the compiled step refuse to run without this callback.

        `on_train_end` is not called when an error or Ctrl-C ends `fit`. A later
        `fit` without the callback would use the compiled step again and train
        on in silence, without mask updates.
        """
        model = self.model
        # A guard that an interrupted `fit` left behind is taken off.
        train_function = getattr(
            model.train_function, "unguarded", model.train_function
        )
        self._batch_pending = False

        def guarded(iterator: Any) -> Any:
            if self._batch_pending:
                raise RuntimeError(
                    f"The model {model.name!r} was trained with "
                    "`sos.SparsityCallback` and is now trained without it, so "
                    "that its masks are not updated. Pass "
                    "`callbacks=[sos.SparsityCallback()]` to every `fit`."
                )
            self._batch_pending = True
            return train_function(iterator)

        guarded.unguarded = train_function
        model.train_function = guarded
