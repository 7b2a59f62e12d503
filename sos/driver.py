"""Drives the clock of a model's sparse layers while it trains."""

from types import TracebackType
from typing import Any

import keras

from sos.schedules import Schedule
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import PruningWrapper, update_masks


class Driver:
    """Binds a model's sparse layers to an optimizer and updates their masks.

    For a custom training loop:

    ```
    with sos.Driver(model, optimizer) as driver:
        for batch in data:
            train_step(batch)
            driver.step()
    ```

    `fit` uses `sos.SparsityCallback` in its place. Call the training step
    inside the scope only: a `tf.function` that was traced there and is called
    outside trains on with the masks that it finds. `model.losses` holds the
    penalties while the driver runs; between `pause` and `resume` they are zero,
    as the loss of an evaluation should have it.

    Args:
        model: A model with sparse layers, built.
        optimizer: The optimizer that trains it.
        steps_per_block: The number of optimizer steps between two calls of
            `step`, at most.

    Raises:
        TypeError: If `optimizer` is not a Keras 3 optimizer.
        ValueError: If the model has no sparse layer or is not built.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        optimizer: keras.optimizers.Optimizer,
        *,
        steps_per_block: int = 1,
    ) -> None:
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`optimizer` must be a Keras 3 optimizer, as its `iterations` "
                "are the clock. "
                f"Received: optimizer={optimizer!r} of type "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        wrappers = find_wrappers(model)
        if not wrappers:
            raise ValueError(
                f"The model {model.name!r} holds no sparse layer to drive. Use "
                "`sos.sparsify`, or wrap its layers."
            )
        unbuilt = [wrapper.name for wrapper in wrappers if not wrapper.built]
        if unbuilt:
            raise ValueError(
                "All sparse layers must be built before training, so that "
                "masks can be set. Give the model an `Input` or call it on a "
                f"batch first. Received: unbuilt layers {unbuilt}"
            )
        self.model = model
        self.optimizer = optimizer
        self._steps_per_block = steps_per_block
        self._wrappers = wrappers
        self._last: int | None = None

    @property
    def iterations(self) -> int:
        """The number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def start(self) -> None:
        """Binds the clocks and makes the mask update of this step, if due.

        Raises:
            ValueError: If a schedule is finer than `steps_per_block`.
        """
        for wrapper in self._pruning_wrappers():
            wrapper.schedule.check_block(self._steps_per_block)
        self.resume()
        self._last = self.iterations
        # After a restart this repeats the update of the checkpoint's step: the
        # same weights give the same masks.
        self._update(self._last - 1, self._last)

    def step(self) -> None:
        """Makes the mask updates that are due since the last call.

        Call it after every training step. While the optimizer's `iterations`
        stand still (overflow under loss scaling, accumulation) it does nothing.

        Raises:
            RuntimeError: If the driver is not started, or the optimizer went
                back or passed over a mask update since the last call.
        """
        if self._last is None:
            raise RuntimeError(
                "The driver is not started. Use it as "
                "`with sos.Driver(model, optimizer) as driver:`."
            )
        last, now = self._last, self.iterations
        if now == last:
            return
        if now < last:
            raise RuntimeError(
                f"The optimizer went back from step {last} to {now}. Restore "
                "checkpoints before the driver starts."
            )
        self._last = now
        self._update(last, now)

    def pause(self) -> None:
        """Unbinds the clocks: penalties are zero until `resume`."""
        for wrapper in self._wrappers:
            wrapper.clock.unbind()

    def resume(self) -> None:
        """Binds the clocks to the optimizer."""
        for wrapper in self._wrappers:
            wrapper.clock.bind(self.optimizer, owner=self)

    def stop(self) -> None:
        """Unbinds the clocks: training calls raise from now on."""
        self.pause()
        self._last = None
        model = self.model
        if getattr(model, "train_function", None) is not None:
            # The compiled step of `fit` was traced with the clock bound and
            # would train on in silence, without mask updates.
            model.make_train_function(force=True)

    def __enter__(self) -> "Driver":
        """Starts."""
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops.

        Raises:
            RuntimeError: If the optimizer moved after the last `step`.
        """
        missed = self.iterations - self._last
        self.stop()
        if error is None and missed:
            raise RuntimeError(
                f"The optimizer made {missed} steps after the last "
                "`driver.step()`, whose mask updates are lost. Call "
                "`driver.step()` after every training step."
            )

    def _pruning_wrappers(self) -> list[PruningWrapper]:
        return [w for w in self._wrappers if isinstance(w, PruningWrapper)]

    def _update(self, after: int, until: int) -> None:
        updates: dict[PruningWrapper, float] = {}
        due_of: dict[int, tuple[Schedule, list[int]]] = {}
        for wrapper in self._pruning_wrappers():
            schedule = wrapper.schedule
            if id(schedule) not in due_of:
                due = schedule.due_steps(after, until)
                due_of[id(schedule)] = (schedule, due)
            due = due_of[id(schedule)][1]
            # The schedule's last step is due whatever its frequency.
            if len([step for step in due if step != schedule.end_step]) > 1:
                raise RuntimeError(
                    f"The optimizer moved from step {after} to {until} between "
                    "two calls of `driver.step()` and passed over mask updates "
                    f"that were due at {due}. Call `driver.step()` after every "
                    "training step, or choose a larger `frequency`."
                )
            if due:
                updates[wrapper] = schedule.sparsity(due[-1])
        update_masks(updates)


def set_all(model: keras.layers.Layer, **values: Any) -> None:
    """Changes settings of all sparse layers of a model that have them.

    Nothing is built or traced again.

    Args:
        model: A model with sparse layers.
        **values: For example `threshold=2.5`, `penalty_weight=1e-5`, `seed=1`
            or `schedule=...`.

    Raises:
        ValueError: If no layer has a setting of that name.
    """
    wrappers = find_wrappers(model)
    for name, value in values.items():
        owners = [w for w in wrappers if hasattr(type(w), name)]
        if not owners:
            raise ValueError(
                f"No sparse layer of {model.name!r} has the setting {name!r}."
            )
        for wrapper in owners:
            setattr(wrapper, name, value)
