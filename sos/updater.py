"""Updates masks and enables penalties while a model trains."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf

from sos import keras_compat
from sos.advice import warn
from sos.arguments import check_integer, format_values
from sos.held_masks import HeldMasks
from sos.schedules import as_schedule
from sos.weight_decay import decayed_techniques, exclude_techniques
from sos.wrappers.base import SparseWrapper, find_wrappers
from sos.wrappers.masked import (
    PruningWrapper,
    resolve_schedules,
    update_masks,
)
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight


class SparsityUpdater:
    """Updates masks and enables penalties in a custom training loop.

    Call `step` after every training step, as in the example; with `fit` use
    `sos.SparsityCallback` instead. Train only inside the `with` block: a
    `tf.function` that was traced there would not update masks outside of it.

    Techniques read the training step from the optimizer. `model.losses`
    contains the penalties while the updater runs. Between `pause` and `resume`
    they are zero, as for evaluation. Variables that techniques add, such as log
    alpha, are excluded from the optimizer's weight decay.

    Some mistakes raise an error or warn with a `SparsityWarning`, at the latest
    at the end of the block: an optimizer that makes no step, a second updater
    of the same layers, masks that a new optimizer would make dense (they are
    kept), a loss without the penalties.

    Args:
        model: A model with sparse layers, built.
        optimizer: The optimizer that trains it.
        train_steps: Number of optimizer steps of the training, from the
            optimizer's present step, for pruning schedules without an
            `end_step` (`sos.MagnitudePruning`); otherwise None. A
            `tf.train.Checkpoint` does not contain the steps of a schedule: to
            resume from one, pass an `end_step`.
        steps_per_execution: Largest number of optimizer steps between two calls
            of `step`.
        update_masks: Function that ranks weights and sets masks. It takes the
            sparsities by technique, of those that are due.

    Raises:
        TypeError: If `model` or `optimizer` is not a Keras 3 object.
        ValueError: If the model has no sparse layer or is not built, if weights
            share a path and so their noise, or if `train_steps` or
            `steps_per_execution` is below 1.

    Example:
    >>> import keras, sos
    >>> import tensorflow as tf
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(
    ...     model, "MagnitudePruning", sparsity=0.75, end_step=8, frequency=1
    ... )
    >>> optimizer = keras.optimizers.SGD()
    >>> @tf.function
    ... def train_step(x, y):
    ...     with tf.GradientTape() as tape:
    ...         loss = tf.reduce_mean((sparse(x, training=True) - y) ** 2)
    ...         loss += sum(sparse.losses)
    ...     gradients = tape.gradient(loss, sparse.trainable_variables)
    ...     optimizer.apply(gradients, sparse.trainable_variables)
    >>> optimizer.build(sparse.trainable_variables)
    >>> with sos.SparsityUpdater(sparse, optimizer) as updater:
    ...     for _ in range(8):
    ...         train_step(tf.ones((1, 4)), tf.ones((1, 2)))
    ...         updater.step()
    >>> sos.sparsity_report(sparse).sparsity
    0.75
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        optimizer: keras.optimizers.Optimizer,
        *,
        train_steps: int | None = None,
        steps_per_execution: int = 1,
        update_masks: Callable[
            [dict[PruningWrapper, float]], Any
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
                f"The model {model.name!r} has no sparse layer. Use "
                "`sos.sparsify`, or wrap its layers."
            )
        unbuilt = [wrapper.name for wrapper in wrappers if not wrapper.built]
        if unbuilt:
            raise ValueError(
                "All sparse layers must be built before training. Give the "
                "model an `Input` or call it on a batch first. "
                f"Received: unbuilt layers {unbuilt}"
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
        """Number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def start(self, *, up_to_date: bool = False) -> None:
        """Binds the step counters and updates the masks that are due now.

        Masks of ones get the sparsity of the schedule's last update, as a
        checkpoint may have been saved just before that update. Masks with more
        zeros than the schedule are kept until it reaches their sparsity, with a
        warning.

        Args:
            up_to_date: Whether the masks come from a checkpoint that was saved
                after the `step` of its optimizer step. Then nothing is due.

        Raises:
            RuntimeError: If another updater updates one of the layers.
            UsageError: If a schedule's `frequency` is below
                `steps_per_execution`, or it needs `train_steps`.
            ValueError: If a technique needs gradients before the first step.
        """
        resolve_schedules(
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
                # step, with the same result.
                self._update(step - 1, step)
            self._last = step
        except BaseException:
            # The traceback keeps the updater, and so the counters, bound.
            self.pause()
            raise

    def step(self) -> None:
        """Updates the masks that are due since the last call.

        Call it after every training step. It does nothing if the optimizer's
        `iterations` did not change (overflow under loss scaling, gradient
        accumulation).

        Raises:
            RuntimeError: If the updater is not started, if it is called in a
                `tf.function`, or if the optimizer went back or skipped a mask
                update since the last call.
        """
        if self._last is None:
            raise RuntimeError(
                "The updater is not started. Use it as "
                "`with sos.SparsityUpdater(model, optimizer) as updater:`."
            )
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`updater.step()` was called inside a `tf.function`, where it "
                "would run only while the function is traced. Call it in the "
                "Python loop, after the compiled step."
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
        # Scores may depend on the step. In `fit` the counters are bound only
        # while the training function runs.
        bound = all(wrapper.step_counter.bound for wrapper in self._wrappers)
        self.resume()
        try:
            self._update_masks(updates)
        finally:
            if not bound:
                self.pause()

    def next_update(self, until: int) -> int | None:
        """Returns the next step at which masks are updated.

        Args:
            until: The last step to consider.

        Returns:
            A step above `iterations` and at most `until`; None without one.
        """
        now = self.iterations
        # Each once, as layers share schedules. A user's schedule may have no
        # configuration to compare.
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
                f"{format_values(w.name for w in taken[:3])}"
                f"{' and more' * (len(taken) > 3)}. Use one at a time: "
                "`sos.SparsityCallback` with `fit`, or one "
                "`with sos.SparsityUpdater(model, optimizer)` around a loop. "
                "An updater without `with` ends at `updater.stop()`."
            )
        for wrapper in self._wrappers:
            wrapper.step_counter.bind(self.optimizer, owner=self)

    def pruning_wrappers(self) -> list[PruningWrapper]:
        """Returns the techniques whose masks follow a schedule."""
        return [w for w in self._wrappers if isinstance(w, PruningWrapper)]

    def updated_by_another(self) -> bool:
        """Returns whether another updater updates the layers."""
        return all(
            w.step_counter.bound_by_another(self) for w in self._wrappers
        )

    def forget_penalties(self) -> None:
        """Resets the records of which penalties were differentiated."""
        for wrapper in self._wrappers:
            wrapper.step_counter.penalty_trained = False

    def check_progress(self) -> None:
        """Checks that the optimizer made a step since the last check.

        Raises:
            RuntimeError: If it did not, although `step` was called often
                enough for an optimizer step.
        """
        progress = self._progress()
        if progress != self._mark:
            self._mark, self._calls = progress, 0
            return
        patience = keras_compat.gradient_accumulation_steps(self.optimizer)
        needed = any(wrapper.needs_step for wrapper in self._wrappers)
        if self._calls < patience or not needed:
            return
        raise RuntimeError(
            f"The optimizer that counts the steps, {self.optimizer.name!r} "
            f"({type(self.optimizer).__name__}), stood still at step "
            f"{self.iterations} through {self._calls} calls of the training "
            "step: masks and ramps did not change. Pass the optimizer that "
            "trains the sparse layers: `sos.SparsityUpdater(model, optimizer)` "
            "in a loop, `sos.SparsityCallback(optimizer=...)` in `fit`, whose "
            "default is `model.optimizer`. A model whose `train_step` uses "
            "other optimizers, such as a GAN, needs it."
        )

    def check_effect(self) -> None:
        """Warns of penalties without effect, and of decayed variables.

        Call it after some training steps.
        """
        without_effect = [
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
        if without_effect:
            warn(
                f"The penalties of {_names(without_effect)} have no effect: no "
                "gradient of them was computed. Add `sum(model.losses)` to the "
                "loss, also in an overridden `compute_loss` or `train_step`; "
                "for a `keras.distillation.Distiller`, `sum(student.losses)` "
                "in an overridden `compute_loss`. To train without penalties, "
                "set `penalty_weight=0`."
            )
        decayed = decayed_techniques(self.model, self.optimizer)
        if decayed:
            warn(
                f"The weight decay of the optimizer {self.optimizer.name!r} "
                f"acts on {format_values(v.path for v in decayed[:3])}"
                f"{' and more' * (len(decayed) > 3)}, which removes weights "
                "even without a penalty. These variables are excluded when "
                "training begins: call `optimizer.exclude_from_weight_decay`, "
                "or set `weight_decay`, before."
            )

    def stop(self) -> None:
        """Unbinds the step counters, so that training calls raise an error."""
        self.pause()
        self._last = None
        model = self.model
        # Functions that were traced with the counter bound would train without
        # mask updates, or evaluate with penalties in the loss.
        if getattr(model, "train_function", None) is not None:
            model.make_train_function(force=True)
        if getattr(model, "test_function", None) is not None:
            model.make_test_function(force=True)

    def __enter__(self) -> "SparsityUpdater":
        """Starts the updater."""
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops the updater.

        Raises:
            RuntimeError: If the optimizer made steps after the last `step`, or
                none although `step` was called.
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
        """Returns numbers that change when the optimizer is used."""
        optimizer = self.optimizer
        numbers = [self.iterations]
        # After an overflow only the loss scale changes.
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
        # Layers share schedules, and a user's schedule may be slow.
        due_of: dict[int, list[int]] = {}
        for wrapper in self.pruning_wrappers():
            schedule = wrapper.schedule
            if id(schedule) not in due_of:
                due_of[id(schedule)] = schedule.due_steps(after, until)
            due = due_of[id(schedule)]
            # The last step is due for any `frequency`.
            if len([step for step in due if step != schedule.end_step]) > 1:
                raise RuntimeError(
                    f"The optimizer moved from step {after} to {until} between "
                    "two calls of `updater.step()` and skipped mask updates "
                    f"that were due at {due}. Call `updater.step()` after "
                    "every training step, or choose a larger `frequency`."
                )
            if due and self._held and self._held.holds(wrapper, due[-1]):
                continue
            if due and until == 0 and wrapper.uses_gradient:
                raise ValueError(
                    f"{type(wrapper).__name__} ranks weights by gradients, "
                    "which do not exist before the first step. Use a schedule "
                    f"with `begin_step` >= 1. Received: {schedule}"
                )
            if due:
                updates[wrapper] = schedule.sparsity(due[-1])
        self._set_masks(updates)


def _names(wrappers: list[SparseWrapper]) -> str:
    shown = format_values(wrapper.name for wrapper in wrappers[:3])
    more = len(wrappers) - 3
    return f"{shown} and {more} more" if more > 0 else shown


def _is_dense(weight: SparseWeight) -> bool:
    return bool(tf.reduce_all(weight.state["mask"].value == 1))


def _check_streams(wrappers: list[SparseWrapper]) -> None:
    """Checks that no two weights share a path, and so random numbers."""
    paths = [
        weight.path
        for wrapper in wrappers
        if "seed" in wrapper.hyperparameter_variables.values()
        for weight in wrapper.sparse_weights
    ]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            "Several sparse weights have the same path, and would draw the "
            "same random numbers. Give their layers different names. "
            f"Received: {twice}"
        )


def set_hyperparameters(model: keras.layers.Layer, **values: Any) -> None:
    """Changes hyperparameters of all sparse layers that have them.

    Nothing is built or traced again.

    Args:
        model: A model with sparse layers.
        **values: Values by name, such as `threshold=2.5`,
            `penalty_weight=1e-5`, `seed=1` or `schedule=...`.

    Raises:
        TypeError: If `schedule` is not a schedule.
        ValueError: If no layer has the hyperparameter, or a value is invalid.
            Then nothing changes.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparse = sos.sparsify(model, "VariationalDropout", penalty_weight=1e-3)
    >>> sos.set_hyperparameters(sparse, threshold=2.5)
    >>> sparse.layers[0].techniques[0].threshold
    2.5
    """
    wrappers = find_wrappers(model)
    changes = []
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
        changes += [(wrapper, name, value) for wrapper in owners]
    for wrapper, name, value in changes:
        setattr(wrapper, name, value)


def _changeable(wrapper: SparseWrapper) -> set[str]:
    scheduled = isinstance(wrapper, PruningWrapper)
    return {
        *wrapper.hyperparameter_variables.values(),
        *(["schedule"] if scheduled else []),
    }
