"""Drives the clock of a model's sparse layers while it trains."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf

from sos.schedules import as_schedule
from sos.wrappers.base import SparseWrapper, find_wrappers
from sos.wrappers.masked import PruningWrapper, update_masks
from sos.wrappers.sparse_weight import SparseWeight


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
        update_masks: What ranks the weights and sets the masks: called with
            the sparsity to reach, by wrapper, of the layers that are due.

    Raises:
        TypeError: If `model` or `optimizer` is not one of Keras 3.
        ValueError: If the model has no sparse layer or is not built, weights
            share a path and so their noise, or `steps_per_block` is below 1.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        optimizer: keras.optimizers.Optimizer,
        *,
        steps_per_block: int = 1,
        update_masks: Callable[
            [dict[PruningWrapper, float]], None
        ] = update_masks,
    ) -> None:
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`optimizer` must be a Keras 3 optimizer, as its `iterations` "
                "are the clock. "
                f"Received: optimizer={optimizer!r} of type "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(
                "`model` must be a Keras 3 model or layer. "
                f"Received: model={model!r} of type {type(model).__name__}"
            )
        if not steps_per_block >= 1:
            raise ValueError(
                "`steps_per_block` must be at least 1. "
                f"Received: steps_per_block={steps_per_block!r}"
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
        _check_streams(wrappers)
        self.model = model
        self.optimizer = optimizer
        self._steps_per_block = steps_per_block
        self._update_masks = update_masks
        self._wrappers = wrappers
        self._last: int | None = None
        self._first: int | None = None
        self._calls = 0

    @property
    def iterations(self) -> int:
        """The number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def start(self, *, up_to_date: bool = False) -> None:
        """Binds the clocks and makes the mask update of this step, if due.

        Masks of ones are brought to what the schedule had for the last update
        before this step: a checkpoint may have been saved just before it.

        Args:
            up_to_date: Whether the masks, and gradients that were gathered for
                them, come from a checkpoint that was saved after the `step` of
                its optimizer step. Nothing is due then.

        Raises:
            ValueError: If a schedule is finer than `steps_per_block`, or a
                technique needs gradients before the first step.
        """
        for wrapper in self._pruning_wrappers():
            wrapper.schedule.check_block(self._steps_per_block)
        self.resume()
        self._last = self.iterations
        self._first, self._calls = self._last, 0
        if up_to_date:
            return
        self._catch_up(self._last)
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
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`driver.step()` was called inside a `tf.function`, where it "
                "would run once, when the function is traced. Call it after "
                "the compiled step, in the Python loop."
            )
        self._calls += 1
        last, now = self._last, self.iterations
        if now == last:
            return
        if now < last:
            raise RuntimeError(
                f"The optimizer went back from step {last} to {now}. Restore "
                "checkpoints before the driver starts; in `fit`, list "
                "`BackupAndRestore` before `SparsityCallback`."
            )
        self._last = now
        self._update(last, now)

    def next_update(self, until: int) -> int | None:
        """The next step at which masks are to be updated.

        Args:
            until: The last step that is asked for.

        Returns:
            A number of completed steps above `iterations` and at most `until`,
            or None.
        """
        now = self.iterations
        # Layers share them. Not by their configurations, which a user's own
        # ones need not have.
        schedules = {
            id(w.schedule.inner): w.schedule for w in self._pruning_wrappers()
        }
        due = [
            steps[0]
            for schedule in schedules.values()
            if (steps := schedule.due_steps(now, until))
        ]
        return min(due, default=None)

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
        # What was traced with the clock bound would train on in silence,
        # without mask updates, or evaluate with penalties in the loss.
        if getattr(model, "train_function", None) is not None:
            model.make_train_function(force=True)
        if getattr(model, "test_function", None) is not None:
            model.make_test_function(force=True)

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
            RuntimeError: If the optimizer moved after the last `step`, or never
                moved although `step` was called.
        """
        last = self._last
        self.stop()
        if error is not None or last is None:
            return
        missed = self.iterations - last
        patience = self.optimizer.gradient_accumulation_steps or 1
        scaled = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        # Under loss scaling, overflows may hold the optimizer back for long.
        if self._calls >= patience and last == self._first and not scaled:
            raise RuntimeError(
                f"The optimizer stood still at step {last} through "
                f"{self._calls} calls of `driver.step()`, so that nothing was "
                "pruned or ramped. Give `sos.Driver` the optimizer that trains "
                "the model."
            )
        if missed > 0:
            raise RuntimeError(
                f"The optimizer made {missed} steps after the last "
                "`driver.step()`, whose mask updates are lost. Call "
                "`driver.step()` after every training step."
            )

    def _pruning_wrappers(self) -> list[PruningWrapper]:
        return [w for w in self._wrappers if isinstance(w, PruningWrapper)]

    def _catch_up(self, now: int) -> None:
        updates = {}
        for wrapper in self._pruning_wrappers():
            if wrapper.schedule.due(now):
                continue
            if all(_is_dense(weight) for weight in wrapper.sparse_weights):
                due = wrapper.schedule.due_steps(-1, now - 1)
                if due and (sparsity := wrapper.schedule.sparsity(due[-1])):
                    updates[wrapper] = sparsity
        self._update_masks(updates)

    def _update(self, after: int, until: int) -> None:
        updates: dict[PruningWrapper, float] = {}
        # Layers share schedules, and asking a user's own one may be slow.
        due_of: dict[int, list[int]] = {}
        for wrapper in self._pruning_wrappers():
            schedule = wrapper.schedule
            if id(schedule) not in due_of:
                due_of[id(schedule)] = schedule.due_steps(after, until)
            due = due_of[id(schedule)]
            # The schedule's last step is due whatever its frequency.
            if len([step for step in due if step != schedule.end_step]) > 1:
                raise RuntimeError(
                    f"The optimizer moved from step {after} to {until} between "
                    "two calls of `driver.step()` and passed over mask updates "
                    f"that were due at {due}. Call `driver.step()` after every "
                    "training step, or choose a larger `frequency`."
                )
            if due and until == 0 and wrapper.uses_gradient:
                raise ValueError(
                    f"{type(wrapper).__name__} ranks weights by gradients, and "
                    "there is none before the first step. Use a schedule with "
                    f"a `begin_step` of at least 1. Received: {schedule}"
                )
            if due:
                updates[wrapper] = schedule.sparsity(due[-1])
        self._update_masks(updates)


def _is_dense(weight: SparseWeight) -> bool:
    return bool(tf.reduce_all(weight.state["mask"].value == 1))


def _check_streams(wrappers: list[SparseWrapper]) -> None:
    """Refuses paths that would give two weights the same random numbers."""
    paths = [
        weight.path
        for wrapper in wrappers
        if "seed" in wrapper.settings.values()
        for weight in wrapper.sparse_weights
    ]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            "Several sparse weights have the same path, so that they would "
            "draw the same random numbers. Give their layers different names. "
            f"Received: {twice}"
        )


def set_all(model: keras.layers.Layer, **values: Any) -> None:
    """Changes settings of all sparse layers of a model that have them.

    Nothing is built or traced again.

    Args:
        model: A model with sparse layers.
        **values: For example `threshold=2.5`, `penalty_weight=1e-5`, `seed=1`
            or `schedule=...`.

    Raises:
        TypeError: If a schedule is not one.
        ValueError: If no layer has a setting of that name, or a value is wrong;
            nothing is changed then.
    """
    wrappers = find_wrappers(model)
    jobs = []
    for name, value in values.items():
        owners = [w for w in wrappers if name in _changeable(w)]
        if not owners:
            valid = sorted({n for w in wrappers for n in _changeable(w)})
            raise ValueError(
                f"No sparse layer of {model.name!r} has the setting {name!r}. "
                f"Valid names: {valid}"
            )
        if name == "schedule":
            value = as_schedule(value)
        else:
            value = getattr(type(owners[0]), name).check(value)
        jobs += [(wrapper, name, value) for wrapper in owners]
    for wrapper, name, value in jobs:
        setattr(wrapper, name, value)


def _changeable(wrapper: SparseWrapper) -> set[str]:
    scheduled = isinstance(wrapper, PruningWrapper)
    return {*wrapper.settings.values(), *(["schedule"] if scheduled else [])}
