"""Training with `fit`."""

import math
import sys
from typing import Any

import keras

from sos import keras_compat
from sos.advice import warn
from sos.errors import ArgumentError, UsageError
from sos.event_file import EventFile
from sos.held_masks import mask_zeros
from sos.report import report_without_costs
from sos.schedules import Schedule
from sos.updater import SparsityUpdater
from sos.wrappers.masked import PruningWrapper, resolve_schedules


class SparsityCallback(keras.callbacks.Callback):
    """Updates masks and enables penalties while `fit` trains a model.

    Masks are updated at the steps of their schedules. With
    `steps_per_execution=n` an update takes place at the end of the n steps that
    contain its step. Pruning schedules without an `end_step` end after 75 % of
    the first `fit` (`sos.MagnitudePruning`), and do not change in a second one.
    In a loop that calls `fit` for one epoch at a time, pass `end_step`.

    The logs of every epoch contain `sparsity`, the fraction of zeros in all
    sparse weights, for `History`, the progress bar and later callbacks such as
    `keras.callbacks.TensorBoard`.

    Some mistakes raise an error or warn with a `SparsityWarning`:

    - If the optimizer makes no step in an epoch, `fit` raises an error.
    - If masks have more zeros than the schedule at the optimizer's step, as
      after `compile` with a new optimizer, they are kept until the schedule
      reaches their sparsity, with a warning.
    - If the loss does not contain the penalties, it warns after an epoch.
    - If `EarlyStopping` restores weights of a less sparse epoch, or
      `ModelCheckpoint` saved such weights as the best, it warns at the end.

    Args:
        log_dir: Directory to write the sparsity of each weight to after every
            epoch, for TensorBoard; None to write nothing.
        optimizer: The optimizer that counts the steps, for models with several
            optimizers; by default `model.optimizer`.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(
    ...     model, "MagnitudePruning", sparsity=0.75, frequency=1
    ... )
    >>> sparse.compile("sgd", "mse")
    >>> history = sparse.fit(
    ...     keras.ops.ones((8, 4)),
    ...     keras.ops.ones((8, 2)),
    ...     batch_size=1,
    ...     verbose=0,
    ...     callbacks=[sos.SparsityCallback()],
    ... )
    >>> history.history["sparsity"]
    [0.75]
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
        """Creates the updater and appends a callback that runs last.

        Raises:
            UsageError: If there are several callbacks of this class.
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
            # Its inner optimizers are known only when it is built.
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
            # The user's list may still have the last callback of another `fit`.
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
        """Starts the updater, and guards the training function.

        It does so in the first epoch: only now its number is known, and other
        callbacks have restored their state.

        Raises:
            UsageError: If a schedule needs the number of training steps, which
                `fit` does not know, or does not fit into it.
        """
        if self._started:
            return
        updater = self._updater
        schedules = [(w, w.schedule) for w in updater.pruning_wrappers()]
        resolve_schedules(
            updater.pruning_wrappers(),
            self._train_steps(epoch),
            start=updater.iterations,
            steps_per_execution=self.model.steps_per_execution,
        )
        updater.start()
        self._guard_train_function(schedules)
        self._started = True

    def _train_steps(self, first_epoch: int) -> int | None:
        """Returns the optimizer steps of this `fit`, None if unknown."""
        params = self.params or {}
        epochs, batches = params.get("epochs"), params.get("steps")
        if epochs is None or batches is None:
            return None
        per_step = keras_compat.gradient_accumulation_steps(
            self._updater.optimizer
        )
        return (epochs - first_epoch) * batches // per_step

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Allows the guarded training function to run."""
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
            RuntimeError: If the optimizer made no step.
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
        """Stops the updater."""
        self._updater.stop()
        self._updater = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if not self._last_callback.listed:
            self._last_callback.on_train_end(logs)

    def _guard_train_function(
        self, schedules: list[tuple[PruningWrapper, Schedule]]
    ) -> None:
        """Binds the step counters only while the training function runs.

        So evaluation has no penalties in its loss, and a later `fit` without
        this callback raises an error, although it would reuse the compiled
        function. (`on_train_end` does not run if an error or Ctrl-C ends
        `fit`.)

        Args:
            schedules: Techniques and their schedules from before this `fit`.
                They get them back if its first execution fails, as the next
                `fit` may have another length (smaller batches, after an
                out-of-memory error).
        """
        model = self.model
        # Without the guard of an interrupted `fit`.
        train_function = getattr(
            model.train_function, "unguarded", model.train_function
        )
        if train_function is model.train_function:
            # A new trace shows whether the loss contains the penalties.
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
                    "`sos.SparsityCallback` and is now trained without it: its "
                    "masks would not be updated. Pass "
                    "`callbacks=[sos.SparsityCallback()]` to every `fit`."
                )
            self._batch_begun = False
            updater.resume()
            try:
                return train_function(iterator)
            except BaseException:
                if not self._trained:
                    for wrapper, schedule in schedules:
                        wrapper.schedule = schedule
                raise
            finally:
                updater.pause()

        guarded.unguarded = train_function
        model.train_function = guarded


class _LastCallback(keras.callbacks.Callback):
    """Warns if the model is less sparse at the end than before.

    It is the last in the list of callbacks, as others restore weights at the
    end of training.

    Args:
        updater: The updater of the model's sparse layers.
        callbacks: The list of callbacks that is running, None if unknown.
    """

    def __init__(
        self,
        updater: SparsityUpdater,
        callbacks: keras.callbacks.CallbackList | None,
    ) -> None:
        super().__init__()
        #: Whether it is in a list, so that Keras calls it.
        self.listed = callbacks is not None
        self._updater = updater
        self._last_zeros = 0
        self._checkpoints = [
            callback
            for callback in (callbacks.callbacks if callbacks else ())
            if isinstance(callback, keras.callbacks.ModelCheckpoint)
            and callback.save_best_only
        ]
        self._best = [callback.best for callback in self._checkpoints]
        # Epoch and number of zeros of saved weights, by position of callback.
        self._saves: dict[int, tuple[int, int]] = {}

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Records the zeros of the masks, and of saved weights."""
        self._last_zeros, _ = self._zeros()
        for index, callback in enumerate(self._checkpoints):
            if callback.best != self._best[index]:
                self._best[index] = callback.best
                self._saves[index] = (epoch, self._last_zeros)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Compares the zeros with those after the last epoch."""
        zeros, size = self._zeros()
        if not size:
            return
        target = self._target()
        reached = f"{self._last_zeros / size:.2%} zeros"
        if target is not None:
            reached += f" (target {target / size:.2%})"
        advice = (
            "Let the schedule end first. Use "
            "`EarlyStopping(restore_best_weights=True)` and "
            "`ModelCheckpoint(save_best_only=True)` in a second `fit`, or only "
            "after its end (`EarlyStopping(start_from_epoch=...)`)."
        )
        if zeros < self._last_zeros:
            warn(
                "Weights of an earlier epoch were restored at the end of "
                f"training: the masks have {zeros / size:.2%} zeros, but had "
                f"reached {reached}. {advice}"
            )
        elif self._stopped_early(zeros, target):
            warn(
                "Training was stopped before the schedule ended: the masks "
                f"have {reached}. {advice}"
            )
        for epoch, zeros_saved in self._saves.values():
            if zeros_saved < zeros:
                warn(
                    "The best weights that `ModelCheckpoint` saved are those "
                    f"of epoch {epoch + 1}, with {zeros_saved / size:.2%} "
                    f"zeros in their masks; training reached {reached}. "
                    f"{advice}"
                )

    def _zeros(self) -> tuple[int, int]:
        return mask_zeros(self._updater.pruning_wrappers())

    def _target(self) -> float | None:
        """Returns the zeros at the end of the schedules, None if unknown."""
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

    It is found in the call stack, as a callback has no reference to it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        callbacks = frame.f_locals.get("self")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        frame = frame.f_back
    return None
