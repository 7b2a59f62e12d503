"""Training with `fit`."""

import math
import sys
from typing import Any

import keras

from sos.advice import warn
from sos.errors import ArgumentError, UsageError
from sos.event_file import EventFile
from sos.held_masks import mask_zeros
from sos.report import report_without_costs
from sos.updater import SparsityUpdater
from sos.wrappers.masked import lay_out_schedules


class SparsityCallback(keras.callbacks.Callback):
    """Updates masks and adds penalties while `fit` trains a model.

    Pruning schedules without an `end_step` are laid over the epochs of the
    first `fit` (`sos.MagnitudePruning`); a second `fit` finds them laid out and
    leaves them. In a loop of calls of `fit` with one epoch each, give
    `end_step`.

    It updates masks as their schedules say and adds `sparsity`, that of all
    sparse weights together, to the logs of every epoch, where `History`, the
    progress bar and `keras.callbacks.TensorBoard` find it if they come later in
    the list of callbacks. With `steps_per_execution=n` a mask update
    lands at the end of the block of n steps that contains its step.

    Training that would not count is an error or a `SparsityWarning`, at the
    latest after the first epoch:

    - If the optimizer stands still through an epoch, `fit` raises.
    - If masks have more zeros than their schedule has at the optimizer's step,
      as after `compile` with a new optimizer, they are kept until the schedule
      reaches their sparsity, with a warning.
    - If the loss does not contain the penalties, a warning says so.
    - If `EarlyStopping` restores, or `ModelCheckpoint` saved as the best,
      weights of a less sparse epoch, a warning says so at the end.

    Args:
        log_dir: A directory for TensorBoard, which then gets the sparsity of
            each weight after every epoch; None for none.
        optimizer: The optimizer whose steps count, for models with optimizers
            of their own; by default `model.optimizer`.

    Example:
    >>> import sos
    >>> callback = sos.SparsityCallback()
    >>> # A model whose `train_step` uses `self.generator_optimizer`:
    >>> # sos.SparsityCallback(optimizer=gan.generator_optimizer)
    """

    def __init__(
        self,
        log_dir: str | None = None,
        *,
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> None:
        super().__init__()
        self.log_dir = log_dir
        self.optimizer = optimizer
        self._updater: SparsityUpdater | None = None
        self._last_callback: _LastCallback | None = None
        self._events: EventFile | None = None
        self._started = False
        self._batch_begun = False
        self._trained = False
        self._checked = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the optimizer that counts, and the other callbacks.

        Raises:
            UsageError: If the list of callbacks has another one of this class.
            TypeError: If there is no optimizer.
        """
        callbacks = _running_callbacks()
        count = sum(
            isinstance(callback, SparsityCallback)
            for callback in (callbacks.callbacks if callbacks else ())
        )
        if count > 1:
            raise UsageError(
                "`fit` takes one `sos.SparsityCallback`, which updates all "
                f"sparse layers of the model. Received: {count}"
            )
        model = self.model
        optimizer = self.optimizer
        if optimizer is None:
            optimizer = model.optimizer
        if optimizer is None:
            raise ArgumentError(
                f"The model {model.name!r} was compiled without an optimizer. "
                "Name the one that trains the sparse layers: "
                "`sos.SparsityCallback(optimizer=...)`."
            )
        if (
            isinstance(optimizer, keras.optimizers.MultiOptimizer)
            and optimizer is model.optimizer
            and not optimizer.built
        ):
            # Only now it knows the optimizers inside.
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)
        self._updater = SparsityUpdater(
            model, optimizer, steps_per_execution=model.steps_per_execution
        )
        self._started = False
        self._trained = self._checked = False
        self._last_callback = _LastCallback(self._updater, callbacks)
        self._last_callback.set_model(model)
        if callbacks is not None:
            # A list of the user's may still have that of another `fit`.
            others = [
                callback
                for callback in callbacks.callbacks
                if not isinstance(callback, _LastCallback)
            ]
            callbacks.callbacks[:] = [*others, self._last_callback]
        if self.log_dir is not None:
            self._events = EventFile(self.log_dir)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Makes the mask update of this step, if due, and guards training.

        It does so in the first epoch, whose number is known only now, and by
        when other callbacks have restored what they saved.

        Raises:
            UsageError: If a schedule needs the number of training steps, which
                `fit` does not know, or does not fit into it.
        """
        if self._started:
            return
        updater = self._updater
        lay_out_schedules(
            updater.pruning_wrappers(),
            self._train_steps(epoch),
            start=updater.iterations,
            steps_per_execution=self.model.steps_per_execution,
        )
        updater.start()
        self._guard_train_function()
        self._started = True

    def _train_steps(self, first_epoch: int) -> int | None:
        """Returns the optimizer steps of this `fit`, None if unknown."""
        params = self.params or {}
        epochs, batches = params.get("epochs"), params.get("steps")
        if epochs is None or batches is None:
            return None
        accumulated = self._updater.optimizer.gradient_accumulation_steps or 1
        return (epochs - first_epoch) * batches // accumulated

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Lets the compiled step run."""
        self._batch_begun = True

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Updates the masks that are due."""
        self._trained = True
        self._updater.step()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Logs the sparsity.

        Raises:
            RuntimeError: If the optimizer stood still.
        """
        self._updater.check_progress()
        if self._trained and not self._checked:
            self._updater.check_effect()
            self._checked = True
        report = report_without_costs(self.model)
        if logs is not None:
            logs["sparsity"] = report.sparsity
        if self._events is not None:
            scalars = {"sparsity": report.sparsity} | {
                f"sparsity/{row['weight']}": row["sparsity"]
                for row in report.rows
                if row["technique"]
            }
            self._events.write(self._updater.iterations, scalars)
        if not self._last_callback.listed:
            self._last_callback.on_epoch_end(epoch, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops updating masks and adding penalties."""
        self._updater.stop()
        self._updater = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if not self._last_callback.listed:
            self._last_callback.on_train_end(logs)

    def _guard_train_function(self) -> None:
        """Binds the step counters while the compiled step runs.

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
        if train_function is model.train_function:
            # It will be traced anew, and shows whether its loss has penalties.
            self._updater.forget_penalties()
        updater = self._updater
        updater.pause()
        self._batch_begun = False

        def guarded(iterator: Any) -> Any:
            if not self._batch_begun:
                if updater.updated_by_another():
                    # A loop around `train_on_batch`.
                    return train_function(iterator)
                raise RuntimeError(
                    f"The model {model.name!r} was trained with "
                    "`sos.SparsityCallback` and is now trained without it, so "
                    "that its masks are not updated. Pass "
                    "`callbacks=[sos.SparsityCallback()]` to every `fit`."
                )
            self._batch_begun = False
            updater.resume()
            try:
                return train_function(iterator)
            finally:
                updater.pause()

        guarded.unguarded = train_function
        model.train_function = guarded


class _LastCallback(keras.callbacks.Callback):
    """Warns if training ends with a model that is less sparse than it was.

    It comes last in the list of callbacks, as others restore weights at the
    very end.

    Args:
        updater: The updater of the model's sparse layers.
        callbacks: The running list of callbacks, None if it was not found.
    """

    def __init__(
        self,
        updater: SparsityUpdater,
        callbacks: keras.callbacks.CallbackList | None,
    ) -> None:
        super().__init__()
        #: Whether Keras calls it.
        self.listed = callbacks is not None
        self._updater = updater
        self._reached = 0
        self._checkpoints = [
            callback
            for callback in (callbacks.callbacks if callbacks else ())
            if isinstance(callback, keras.callbacks.ModelCheckpoint)
            and callback.save_best_only
        ]
        self._best = [callback.best for callback in self._checkpoints]
        # Where a checkpoint was saved: the epoch and the number of zeros.
        self._saved: dict[int, tuple[int, int]] = {}

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Records the zeros that were reached, and those of saved weights."""
        self._reached, _ = self._zeros()
        for index, callback in enumerate(self._checkpoints):
            if callback.best != self._best[index]:
                self._best[index] = callback.best
                self._saved[index] = (epoch, self._reached)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Compares the zeros with those that were reached."""
        zeros, size = self._zeros()
        if not size:
            return
        target = self._target()
        reached = f"{self._reached / size:.2%} zeros"
        if target is not None:
            reached += f" (target {target / size:.2%})"
        advice = (
            "Let the schedule end first, and use "
            "`EarlyStopping(restore_best_weights=True)` and "
            "`ModelCheckpoint(save_best_only=True)` in a second `fit`, or from "
            "an epoch after its end on (`EarlyStopping(start_from_epoch=...)`)."
        )
        if zeros < self._reached:
            warn(
                "Weights of an earlier moment were restored at the end of "
                f"training: the masks have {zeros / size:.2%} zeros, and had "
                f"reached {reached}. {advice}"
            )
        elif self._stopped_early(zeros, target):
            warn(
                "Training was stopped before the schedule ended: the masks "
                f"have {reached}. {advice}"
            )
        for epoch, saved in self._saved.values():
            if saved < zeros:
                warn(
                    "The best weights that `ModelCheckpoint` saved are those "
                    f"of epoch {epoch + 1}, with {saved / size:.2%} zeros in "
                    f"their masks, and training reached {reached}. {advice}"
                )

    def _zeros(self) -> tuple[int, int]:
        return mask_zeros(self._updater.pruning_wrappers())

    def _target(self) -> float | None:
        """Returns the zeros that the schedules end with, None if unknown."""
        target = 0.0
        for wrapper in self._updater.pruning_wrappers():
            sparsity = wrapper.target_sparsity()
            if sparsity is None:
                return None
            for weight in wrapper.sparse_weights:
                target += sparsity * math.prod(weight.variable.shape)
        return target

    def _stopped_early(self, zeros: int, target: float | None) -> bool:
        if target is None or not getattr(self.model, "stop_training", False):
            return False
        step = self._updater.iterations
        wrappers = self._updater.pruning_wrappers()
        weights = sum(len(wrapper.sparse_weights) for wrapper in wrappers)
        return zeros < target - weights and any(
            wrapper.schedule.end_step is None
            or wrapper.schedule.end_step > step
            for wrapper in wrappers
        )


def _running_callbacks() -> keras.callbacks.CallbackList | None:
    """Returns the list of callbacks whose method is running.

    A callback does not know the others.
    """
    frame = sys._getframe(1)
    while frame is not None:
        callbacks = frame.f_locals.get("self")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        frame = frame.f_back
    return None
