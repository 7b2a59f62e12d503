"""Updates masks and adds penalties while a model trains."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf

from sos.advice import warn
from sos.arguments import check_integer, listed
from sos.held_masks import HeldMasks
from sos.schedules import as_schedule
from sos.weight_decay import decayed_techniques, exclude_techniques
from sos.wrappers.base import SparseWrapper, find_wrappers
from sos.wrappers.masked import (
    PruningWrapper,
    lay_out_schedules,
    update_masks,
)
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight


class SparsityUpdater:
    """Binds a model's sparse layers to an optimizer and updates their masks.

    For a custom training loop:

    ```
    with sos.SparsityUpdater(model, optimizer) as updater:
        for batch in data:
            train_step(batch)
            updater.step()
    ```

    `fit` uses `sos.SparsityCallback` instead. Without `end_step` a pruning
    schedule needs `train_steps`: it is laid over that many steps from the first
    `start` on, and stays so (`sos.MagnitudePruning`). Call the training step
    inside the scope only: a `tf.function` that was traced there and is called
    outside trains on with the masks that it finds. `model.losses` holds the
    penalties while the updater runs; between `pause` and `resume` they are
    zero, as the loss of an evaluation should have it.

    Training that would not count is an error or a `SparsityWarning`, at the
    latest when the scope ends: an optimizer that stands still, a second updater
    of the same layers, masks that a new optimizer's counter would make dense
    (they are kept), penalties that are in no loss. The variables that
    techniques add, such as log alpha, are excluded from the optimizer's weight
    decay.

    Args:
        model: A model with sparse layers, built.
        optimizer: The optimizer that trains it.
        train_steps: The number of optimizer steps that the training makes; None
            if all schedules have an `end_step`, were laid out before, or are
            constant.
        steps_per_execution: The number of optimizer steps between two calls of
            `step`, at most.
        update_masks: What ranks the weights and sets the masks: called with
            the sparsity to reach, by wrapper, of the layers that are due.

    Raises:
        TypeError: If `model` or `optimizer` is not one of Keras 3.
        ValueError: If the model has no sparse layer or is not built, weights
            share a path and so their noise, or `train_steps` or
            `steps_per_execution` is below 1.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        optimizer: keras.optimizers.Optimizer,
        *,
        train_steps: int | None = None,
        steps_per_execution: int = 1,
        update_masks: Callable[
            [dict[PruningWrapper, float]], None
        ] = update_masks,
    ) -> None:
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`optimizer` must be a Keras 3 optimizer, as its `iterations` "
                "are the training step. "
                f"Received: optimizer={optimizer!r} of type "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(
                "`model` must be a Keras 3 model or layer. "
                f"Received: model={model!r} of type {type(model).__name__}"
            )
        if not steps_per_execution >= 1:
            raise ValueError(
                "`steps_per_execution` must be at least 1. "
                f"Received: steps_per_execution={steps_per_execution!r}"
            )
        if train_steps is not None:
            check_integer("train_steps", train_steps, minimum=1)
        wrappers = find_wrappers(model)
        if not wrappers:
            raise ValueError(
                f"The model {model.name!r} holds no sparse layer. Use "
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
        self._train_steps = train_steps
        self._steps_per_execution = steps_per_execution
        self._update_masks = update_masks
        self._wrappers = wrappers
        self._last: int | None = None
        self._held: HeldMasks | None = None
        self._mark: tuple[float, ...] = ()
        self._calls = 0
        self._moved = False

    @property
    def iterations(self) -> int:
        """The number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def start(self, *, up_to_date: bool = False) -> None:
        """Binds the step counters and updates the masks if this step is due.

        Masks of ones are brought to what the schedule had for the last update
        before this step: a checkpoint may have been saved just before it. Masks
        with more zeros than the schedule has yet are kept until it reaches
        their sparsity, with a warning.

        Args:
            up_to_date: Whether the masks, and gradients that were gathered for
                them, come from a checkpoint that was saved after the `step` of
                its optimizer step. Nothing is due then.

        Raises:
            RuntimeError: If another updater updates one of the layers.
            UsageError: If a schedule is finer than `steps_per_execution`, or
                needs `train_steps`.
            ValueError: If a technique needs gradients before the first step.
        """
        lay_out_schedules(
            self._wrappers,
            self._train_steps,
            start=self.iterations,
            steps_per_execution=self._steps_per_execution,
        )
        for wrapper in self.pruning_wrappers():
            wrapper.schedule.check_steps_per_execution(
                self._steps_per_execution
            )
        self.resume()
        try:
            exclude_techniques(self.model, self.optimizer)
            step = self.iterations
            self._mark, self._calls = self._progress(), 0
            self._moved, self._held = False, None
            if not up_to_date:
                self._catch_up(step)
                self._held = HeldMasks(self.pruning_wrappers(), step)
                # After a restart this repeats the update of the checkpoint's
                # step: the same weights give the same masks.
                self._update(step - 1, step)
            self._last = step
        except BaseException:
            # Otherwise the traceback would hold the layers.
            self.pause()
            raise

    def step(self) -> None:
        """Makes the mask updates that are due since the last call.

        Call it after every training step. While the optimizer's `iterations`
        stand still (overflow under loss scaling, accumulation) it does nothing.

        Raises:
            RuntimeError: If the updater is not started, or the optimizer went
                back or passed over a mask update since the last call.
        """
        if self._last is None:
            raise RuntimeError(
                "The updater is not started. Use it as "
                "`with sos.SparsityUpdater(model, optimizer) as updater:`."
            )
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`updater.step()` was called inside a `tf.function`, where it "
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
                "checkpoints before the updater starts; in `fit`, before the "
                "first epoch begins."
            )
        self._last, self._moved = now, True
        self._update(last, now)

    def _set_masks(self, updates: dict[PruningWrapper, float]) -> None:
        # `fit` binds the counters in its compiled step only; scores may be a
        # function of the step too.
        bound = all(wrapper.step_counter.bound for wrapper in self._wrappers)
        self.resume()
        try:
            self._update_masks(updates)
        finally:
            if not bound:
                self.pause()

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
            id(w.schedule.inner): w.schedule for w in self.pruning_wrappers()
        }
        due = [
            steps[0]
            for schedule in schedules.values()
            if (steps := schedule.due_steps(now, until))
        ]
        return min(due, default=None)

    def pause(self) -> None:
        """Unbinds the step counters: penalties are zero until `resume`."""
        for wrapper in self._wrappers:
            wrapper.step_counter.unbind(owner=self)

    def resume(self) -> None:
        """Binds the step counters to the optimizer.

        Raises:
            RuntimeError: If another updater has bound one of them.
        """
        taken = [
            w for w in self._wrappers if w.step_counter.bound_by_another(self)
        ]
        if taken:
            raise RuntimeError(
                "The masks and penalties of these layers are updated by "
                "another `sos.SparsityUpdater`, which has not stopped: "
                f"{listed(w.name for w in taken[:3])}"
                f"{' and more' * (len(taken) > 3)}. Use one at a time: "
                "`sos.SparsityCallback` with `fit`, or one "
                "`with sos.SparsityUpdater(model, optimizer)` around a loop. "
                "An updater without `with` ends at `updater.stop()`."
            )
        for wrapper in self._wrappers:
            wrapper.step_counter.bind(self.optimizer, owner=self)

    def pruning_wrappers(self) -> list[PruningWrapper]:
        """Returns the layers whose masks follow a schedule."""
        return [w for w in self._wrappers if isinstance(w, PruningWrapper)]

    def updated_by_another(self) -> bool:
        """Returns whether another updater updates the layers."""
        return all(
            w.step_counter.bound_by_another(self) for w in self._wrappers
        )

    def forget_penalties(self) -> None:
        """Forgets which penalties took part in training until now."""
        for wrapper in self._wrappers:
            wrapper.step_counter.penalty_trained = False

    def check_progress(self) -> None:
        """Raises if the optimizer stood still since the last check.

        Raises:
            RuntimeError: If it stood still although `step` was called often
                enough for a step of the optimizer.
        """
        progress = self._progress()
        if progress != self._mark:
            self._mark, self._calls = progress, 0
            return
        patience = self.optimizer.gradient_accumulation_steps or 1
        needed = any(wrapper.needs_step for wrapper in self._wrappers)
        if self._calls < patience or not needed:
            return
        raise RuntimeError(
            f"The optimizer that counts the steps, {self.optimizer.name!r} "
            f"({type(self.optimizer).__name__}), stood still at step "
            f"{self.iterations} through {self._calls} calls of the training "
            "step, so that nothing was pruned or ramped. Name the optimizer "
            "that trains the sparse layers: `sos.SparsityUpdater(model, "
            "optimizer)` in a loop, `sos.SparsityCallback(optimizer=...)` in "
            "`fit`, which counts the steps of `model.optimizer` by default. A "
            "model whose `train_step` uses optimizers of its own, as GANs do, "
            "needs it."
        )

    def check_effect(self) -> None:
        """Warns of penalties without effect and of decayed variables.

        Call it after some steps of training.
        """
        silent = [
            wrapper
            for wrapper in self._wrappers
            if isinstance(wrapper, PenalizedWrapper)
            and wrapper.penalty_weight > 0
            and not wrapper.step_counter.penalty_trained
            and any(
                variable.trainable
                for weight in wrapper.sparse_weights
                for variable in weight.state.values()
            )
        ]
        if silent:
            warn(
                f"The penalties of {_names(silent)} have no effect: no "
                "gradient of them was computed. Add `sum(model.losses)` to the "
                "loss. A model with a `compute_loss` or `train_step` of its "
                "own has to do so, too; a `keras.distillation.Distiller` adds "
                "`sum(student.losses)` in an overridden `compute_loss`. With "
                "`penalty_weight=0` there is no penalty."
            )
        decayed = decayed_techniques(self.model, self.optimizer)
        if decayed:
            warn(
                f"The weight decay of the optimizer {self.optimizer.name!r} "
                f"acts on {listed(v.path for v in decayed[:3])}"
                f"{' and more' * (len(decayed) > 3)}, which pulls weights to "
                "zero without any penalty. They were excluded when training "
                "began: call `optimizer.exclude_from_weight_decay`, or set a "
                "`weight_decay`, before."
            )

    def stop(self) -> None:
        """Unbinds the step counters: training calls raise from now on."""
        self.pause()
        self._last = None
        model = self.model
        # What was traced with the counter bound would train on in silence,
        # without mask updates, or evaluate with penalties in the loss.
        if getattr(model, "train_function", None) is not None:
            model.make_train_function(force=True)
        if getattr(model, "test_function", None) is not None:
            model.make_test_function(force=True)

    def __enter__(self) -> "SparsityUpdater":
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
        if self.iterations == last:
            self.check_progress()
        missed = self.iterations - last
        if missed > 0:
            raise RuntimeError(
                f"The optimizer made {missed} steps after the last "
                "`updater.step()`, whose mask updates are lost. Call "
                "`updater.step()` after every training step."
            )
        if self._moved:
            self.check_effect()

    def _progress(self) -> tuple[float, ...]:
        """Returns numbers that differ if the optimizer was used in between."""
        optimizer = self.optimizer
        numbers = [self.iterations]
        # Overflows hold the counter back, but change the scale.
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            numbers.append(optimizer.built)
            if optimizer.built:
                numbers.append(optimizer.dynamic_scale)
                numbers.append(optimizer.step_counter)
        return tuple(
            float(keras.ops.convert_to_numpy(number)) for number in numbers
        )

    def _pruning_wrappers(self) -> list[PruningWrapper]:
        return [w for w in self._wrappers if isinstance(w, PruningWrapper)]

    def _catch_up(self, now: int) -> None:
        updates = {}
        for wrapper in self.pruning_wrappers():
            if wrapper.schedule.due(now):
                continue
            if all(_is_dense(weight) for weight in wrapper.sparse_weights):
                due = wrapper.schedule.due_steps(-1, now - 1)
                if due and (sparsity := wrapper.schedule.sparsity(due[-1])):
                    updates[wrapper] = sparsity
        self._set_masks(updates)

    def _update(self, after: int, until: int) -> None:
        updates: dict[PruningWrapper, float] = {}
        # Layers share schedules, and asking a user's own one may be slow.
        due_of: dict[int, list[int]] = {}
        for wrapper in self.pruning_wrappers():
            schedule = wrapper.schedule
            if id(schedule) not in due_of:
                due_of[id(schedule)] = schedule.due_steps(after, until)
            due = due_of[id(schedule)]
            # The schedule's last step is due whatever its frequency.
            if len([step for step in due if step != schedule.end_step]) > 1:
                raise RuntimeError(
                    f"The optimizer moved from step {after} to {until} between "
                    "two calls of `updater.step()` and passed over mask "
                    f"updates that were due at {due}. Call `updater.step()` "
                    "after every training step, or choose a larger `frequency`."
                )
            if due and self._held and self._held.holds(wrapper, due[-1]):
                continue
            if due and until == 0 and wrapper.uses_gradient:
                raise ValueError(
                    f"{type(wrapper).__name__} ranks weights by gradients, and "
                    "there is none before the first step. Use a schedule with "
                    f"a `begin_step` of at least 1. Received: {schedule}"
                )
            if due:
                updates[wrapper] = schedule.sparsity(due[-1])
        self._set_masks(updates)


def _names(wrappers: list[SparseWrapper]) -> str:
    shown = listed(wrapper.name for wrapper in wrappers[:3])
    more = len(wrappers) - 3
    return f"{shown} and {more} more" if more > 0 else shown


def _is_dense(weight: SparseWeight) -> bool:
    return bool(tf.reduce_all(weight.state["mask"].value == 1))


def _check_streams(wrappers: list[SparseWrapper]) -> None:
    """Refuses paths that would give two weights the same random numbers."""
    paths = [
        weight.path
        for wrapper in wrappers
        if "seed" in wrapper.hyperparameter_variables.values()
        for weight in wrapper.sparse_weights
    ]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            "Several sparse weights have the same path, so that they would "
            "draw the same random numbers. Give their layers different names. "
            f"Received: {twice}"
        )


def set_hyperparameters(model: keras.layers.Layer, **values: Any) -> None:
    """Changes hyperparameters of all sparse layers that have them.

    Nothing is built or traced again.

    Args:
        model: A model with sparse layers.
        **values: For example `threshold=2.5`, `penalty_weight=1e-5`, `seed=1`
            or `schedule=...`.

    Raises:
        TypeError: If a schedule is not one.
        ValueError: If no layer has such a hyperparameter, or a value is wrong;
            nothing is changed then.
    """
    wrappers = find_wrappers(model)
    jobs = []
    for name, value in values.items():
        owners = [w for w in wrappers if name in _changeable(w)]
        if not owners:
            valid = sorted({n for w in wrappers for n in _changeable(w)})
            raise ValueError(
                f"No sparse layer of {model.name!r} has the hyperparameter "
                f"{name!r}. Valid names: {valid}"
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
    return {
        *wrapper.hyperparameter_variables.values(),
        *(["schedule"] if scheduled else []),
    }
