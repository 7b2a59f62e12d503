"""Training with `fit`."""

from typing import Any

import keras

from sos.driver import Driver
from sos.event_file import EventFile
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
    """

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        self.log_dir = log_dir
        self._driver: Driver | None = None
        self._events: EventFile | None = None
        self._batch_begun = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Makes the mask update of this step, if due, and guards training."""
        self._driver = Driver(
            self.model,
            self.model.optimizer,
            steps_per_block=self.model.steps_per_execution,
        )
        self._driver.start()
        self._guard_train_function()
        if self.log_dir is not None:
            self._events = EventFile(self.log_dir)

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Lets the compiled step run."""
        self._batch_begun = True

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Updates the masks that are due."""
        self._driver.step()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Logs the sparsity."""
        report = sparsity_report(self.model)
        if logs is not None:
            logs["sparsity"] = report.sparsity
        if self._events is not None:
            scalars = {"sparsity": report.sparsity} | {
                f"sparsity/{row['weight']}": row["sparsity"]
                for row in report.rows
                if row["technique"]
            }
            self._events.write(self._driver.iterations, scalars)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Unbinds the clocks."""
        self._driver.stop()
        self._driver = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _guard_train_function(self) -> None:
        """Binds the clocks while the compiled step runs, and only then.

        So nothing but a batch of this `fit` can train: neither an evaluation,
        whose loss is to hold no penalties, nor a later `fit` without this
        callback, which would use the compiled step again. (`on_train_end` is
        not called when an error or Ctrl-C ends `fit`.)
        """
        model = self.model
        # A guard that an interrupted `fit` left behind is taken off.
        train_function = getattr(
            model.train_function, "unguarded", model.train_function
        )
        self._driver.pause()
        self._batch_begun = False

        def guarded(iterator: Any) -> Any:
            if not self._batch_begun:
                raise RuntimeError(
                    f"The model {model.name!r} was trained with "
                    "`sos.SparsityCallback` and is now trained without it, so "
                    "that its masks are not updated. Pass "
                    "`callbacks=[sos.SparsityCallback()]` to every `fit`."
                )
            self._batch_begun = False
            self._driver.resume()
            try:
                return train_function(iterator)
            finally:
                self._driver.pause()

        guarded.unguarded = train_function
        model.train_function = guarded
