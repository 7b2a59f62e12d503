"""The trainer: compiled loops, with actions of the host between them."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from sos.errors import (
    CheckpointError,
    NonFiniteLossError,
    Stopped,
    TaskError,
    UsageError,
)
from sos.export import export_model
from sos.surgery import strip
from sos.training import inputs, strategies
from sos.training.checkpoints import (
    Checkpoints,
    assign,
    diff,
    variable_specs,
)
from sos.training.compile_signature import compile_signature
from sos.training.reporting import MaskUpdate, Summary
from sos.training.signals import StopSource
from sos.training.steps import CompiledMaskUpdate, Steps, Totals
from sos.training.task import (
    Task,
    check_averaged_weights,
    check_configuration,
    check_eval_batches,
    check_evaluator_results,
    check_evaluators,
    check_model,
    check_optimizer,
    check_serving,
    eval_dataset,
    raise_end_of_data,
    raise_wrong_cardinality,
    train_dataset,
)
from sos.updater import SparsityUpdater
from sos.weight_decay import exclude_techniques
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import (
    PruningWrapper,
    resolve_schedules,
    update_masks,
)

# Part of TensorFlow's error about a data set that ends early.
_ENDED = "expected to contain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """A callable that the host runs after certain steps.

    It runs at most once per step: if the process ends after saving a checkpoint
    and before the actions of that step, they do not run when training resumes.

    Attributes:
        call: The callable. Its argument is the trainer.
        every: Interval in steps, or None.
        at: Further steps after which to run.
        at_end: Whether to run after the last step.

    Raises:
        UsageError: If `every` is below 1.

    Example:
    >>> import sos.training
    >>> action = sos.training.Action(
    ...     call=lambda trainer: print(trainer.step), every=100, at_end=True
    ... )
    >>> action.next_after(150)
    200
    >>> action.due(250, last=250)
    True
    """

    call: Callable[["Trainer"], Any]
    every: int | None = None
    at: tuple[int, ...] = ()
    at_end: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UsageError(
                f"`every` must be at least 1. Received: every={self.every}"
            )

    def next_after(self, step: int) -> int | None:
        """Returns the next step when the action is due, without `at_end`."""
        steps = [s for s in self.at if s > step]
        if self.every is not None:
            steps.append((step // self.every + 1) * self.every)
        return min(steps, default=None)

    def due(self, step: int, last: int) -> bool:
        """Returns whether the action is due after `step` of `last` steps."""
        return self.next_after(step - 1) == step or (
            self.at_end and step == last
        )


class LoopLength:
    """Chooses the lengths of compiled loops by the duration of a step.

    Nothing can interrupt a loop, neither a signal nor a save. Therefore loops
    are bounded in steps and, once the duration of a step is known, in seconds.
    The first two loops have one step each. The duration of the first includes
    tracing and is ignored.

    Args:
        max_steps: Maximum number of steps in a loop.
        max_seconds: Approximate maximum duration of a loop, in seconds.

    Attributes:
        traced: Whether the first loop is complete, so that durations do not
            include tracing.

    Raises:
        UsageError: If a bound is not positive.
    """

    def __init__(self, *, max_steps: int, max_seconds: float) -> None:
        if max_steps < 1 or not max_seconds > 0:
            raise UsageError(
                "`steps_per_loop` must be at least 1 and "
                "`max_seconds_per_loop` positive. Received: "
                f"steps_per_loop={max_steps}, "
                f"max_seconds_per_loop={max_seconds}"
            )
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._step_seconds: float | None = None
        self.traced = False

    def loop_end(self, step: int) -> int:
        """Returns the step at which a loop that begins at `step` ends.

        Loops end at multiples of `max_steps`, wherever training began.
        """
        if self._step_seconds is None:
            limit = 1
        else:
            limit = max(1, int(self._max_seconds / self._step_seconds))
        return min(
            (step // self._max_steps + 1) * self._max_steps, step + limit
        )

    def update(self, step_seconds: float) -> None:
        """Records the duration of one step of the last loop.

        Args:
            step_seconds: Duration in seconds.
        """
        if self.traced:
            self._step_seconds = step_seconds
        self.traced = True


class Trainer:
    """Trains and evaluates the model of a task under a strategy.

    The model, the optimizer and the compiled functions are created once, in
    the strategy's scope. The devices run up to `steps_per_loop` steps at a
    time. Between two loops the host updates masks, reports summaries, saves
    checkpoints and runs actions. Loops end exactly where one of these is due,
    so the length of loops does not change the result.

    Args:
        task: The task.
        strategy: The strategy; see `make_strategy`.
        gradient_accumulation_steps: Number of parts into which each replica's
            batch is split to save memory. They are computed one after the
            other, and their gradients are accumulated into one step.
        steps_per_loop: Maximum number of steps, or evaluation batches, in one
            compiled loop.
        max_seconds_per_loop: Approximate maximum duration of a loop in seconds.
            Nothing can interrupt a loop, neither a signal nor a save.
        jit_compile: Whether to compile the training and evaluation steps with
            XLA, which needs one device. Default: only on a GPU. The default for
            a GPU has not been tried on a GPU yet. A TPU always compiles.
        timer: Returns the time in seconds since any origin.
        gather: Gathers numbers from all processes; see
            `sos.training.strategies.gather`.

    Attributes:
        task: The task.
        strategy: The strategy.
        model: The model.
        optimizer: Its optimizer.
        steps: The compiled functions.
        seconds: Total training time in seconds, including time before restarts.
        saved_step: Step of the last checkpoint saved or restored, or None.

    Raises:
        TaskError: If a method of the task returns an invalid value.
        UsageError: If a number is out of range, the batch cannot be split, the
            optimizer accumulates gradients or scales the loss, or
            `jit_compile` is true for several replicas.

    Example:
    With the task `Line` of the example of `Task`:
    >>> import sos.training
    >>> trainer = sos.training.Trainer(
    ...     Line(), strategy=sos.training.make_strategy("one_device")
    ... )
    >>> checkpoints = sos.training.Checkpoints(
    ...     "line-checkpoints", configuration=trainer.configuration()
    ... )
    >>> trainer.restore_or_initialize(checkpoints)
    >>> trainer.train(3, checkpoints=checkpoints, save_every=2)
    >>> checkpoints.steps()
    [2, 3]
    >>> trainer.evaluate().sparsity
    0.75
    """

    def __init__(
        self,
        task: Task,
        *,
        strategy: tf.distribute.Strategy,
        gradient_accumulation_steps: int = 1,
        steps_per_loop: int = 100,
        max_seconds_per_loop: float = 10.0,
        jit_compile: bool | None = None,
        timer: Callable[[], float] = time.perf_counter,
        gather: Callable[
            [tf.distribute.Strategy, Sequence[float]], np.ndarray
        ] = strategies.gather,
    ) -> None:
        self.strategy = strategy
        self._gradient_accumulation_steps = gradient_accumulation_steps
        self._jit_compile = jit_compile
        self._make_loop_length = functools.partial(
            LoopLength,
            max_steps=steps_per_loop,
            max_seconds=max_seconds_per_loop,
        )
        self._timer = timer
        self._gather = functools.partial(gather, strategy)
        self._make_loop_length()  # Raises if a bound is not positive.
        self._set_task(task, *self._build(task))

    def _build(
        self, task: Task
    ) -> tuple[keras.Model, keras.optimizers.Optimizer]:
        """Returns a new built model and its built optimizer."""
        with self.strategy.scope():
            return build(task)

    def _set_task(
        self,
        task: Task,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        """Sets the task, a new model and new compiled functions."""
        with self.strategy.scope():
            # First, because it may raise: the attributes must match.
            self.steps = Steps(
                task,
                model,
                optimizer,
                gradient_accumulation_steps=self._gradient_accumulation_steps,
                jit_compile=self._jit_compile,
            )
            self._update_masks = (
                CompiledMaskUpdate()
                if isinstance(self.strategy, tf.distribute.TPUStrategy)
                else update_masks
            )
        self.task, self.model, self.optimizer = task, model, optimizer
        self._train_loop_length = self._make_loop_length()
        self._eval_loop_length = self._make_loop_length()
        self._reset_progress()

    def _reset_progress(self) -> None:
        self.seconds = 0.0
        self.saved_step: int | None = None
        # Step for which the masks are known to be up to date.
        self._masks_step: int | None = None
        self._mask_updates: list[MaskUpdate] = []
        self._host_copy: keras.Model | None = None

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files."""
        return strategies.is_chief(self.strategy)

    def configuration(self) -> dict[str, Any]:
        """Returns all options that determine the result, by name."""
        return configuration(
            self.task,
            gradient_accumulation_steps=self._gradient_accumulation_steps,
        )

    def restore_or_initialize(self, checkpoints: Checkpoints) -> int | None:
        """Restores the newest checkpoint, or calls `Task.initialize`.

        Args:
            checkpoints: The checkpoints.

        Returns:
            The step of the checkpoint; None if there was none, and the task
            initialized the model. Then `step` is where training begins.

        Raises:
            CheckpointError: As in `restore`.
        """
        step = self.restore(checkpoints)
        if step is None:
            with self.strategy.scope():
                self.task.initialize(self.model, self.optimizer)
        return step

    def restore(self, checkpoints: Checkpoints) -> int | None:
        """Restores the newest undamaged checkpoint.

        Args:
            checkpoints: The checkpoints.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            CheckpointError: If the checkpoint is of another configuration, all
                are damaged, or workers see different ones.
        """
        metadata = checkpoints.restore(self.model, self.optimizer)
        step = None if metadata is None else metadata["step"]
        steps = self._gather([-1 if step is None else step])[:, 0]
        if len(set(steps)) > 1:
            raise CheckpointError(
                "All workers must share the directory of checkpoints. "
                f"Received: {checkpoints.directory} with the newest steps "
                f"{[int(s) for s in steps]}, by worker"
            )
        if metadata is not None:
            self._set_progress(metadata)
            self._warn_of_changes(step, metadata)
        return step

    def restore_step(self, checkpoints: Checkpoints, step: int) -> None:
        """Restores the checkpoint of one step, to evaluate or export it.

        Args:
            checkpoints: The checkpoints.
            step: One of `checkpoints.steps()`.

        Raises:
            DamagedCheckpointError: If the checkpoint is damaged.
            CheckpointError: If it is of another configuration, or cannot be
                read at the moment.
        """
        self._set_progress(
            checkpoints.restore_step(step, self.model, self.optimizer)
        )

    def _set_progress(self, metadata: Mapping[str, Any]) -> None:
        """Sets the state that is not in variables."""
        # Another program may have saved the checkpoint without the seconds.
        self.seconds = metadata.get("seconds", 0.0)
        self.saved_step = self._masks_step = metadata["step"]
        self._mask_updates = []

    def _placement(self) -> dict[str, Any]:
        """Returns properties of the execution that affect the result."""
        return {
            "replicas": self.strategy.num_replicas_in_sync,
            "hosts": strategies.input_pipelines(self.strategy),
            "jit_compile": self.steps.jit_compile,
        }

    def _warn_of_changes(self, step: int, metadata: Mapping[str, Any]) -> None:
        consequences = {
            "replicas": "noise and batch statistics",
            "hosts": "the order of the examples",
            "jit_compile": "rounding",
        }
        for name, value in self._placement().items():
            if metadata.get(name, value) != value:
                logging.warning(
                    "The checkpoint of step %d was saved with %s=%s, and "
                    "training resumes with %s=%s: %s may differ from now on.",
                    step,
                    name,
                    metadata[name],
                    name,
                    value,
                    consequences[name],
                )

    def save(self, checkpoints: Checkpoints) -> None:
        """Saves a checkpoint of the current step; all workers must call it.

        Args:
            checkpoints: The checkpoints.

        Raises:
            CheckpointError: If the checkpoint cannot be written.
            NonFiniteLossError: If a weight is not finite.
        """
        self._check_weights()
        step = self.step
        checkpoints.save(
            step,
            self.model,
            self.optimizer,
            metadata={"seconds": self.seconds, **self._placement()},
            chief=self.is_chief,
        )
        self.saved_step = step

    def reset(self, task: Task) -> None:
        """Switches to another task, at less cost than a new trainer.

        All variables, optimizer slots, the step and the schedules of pruning
        techniques are set as in a new trainer. The compiled functions are
        reused if the compile signatures are equal: tasks may differ in seeds,
        initializers, schedules, and hyperparameters that are variables.
        Otherwise, for example for another network, ramp or optimizer, they are
        traced again.

        Reused functions call the old task's `compute_metrics`, which must do
        the same as the new task's.

        Args:
            task: The next task.

        Raises:
            TaskError: If a method of the task returns an invalid value.
        """
        model, optimizer = self._build(task)
        differences = list(
            diff(
                compile_signature(self.model, self.optimizer),
                compile_signature(model, optimizer),
            )
        )
        if task.batch_size != self.task.batch_size:
            differences.append("batch_size")
        if differences:
            logging.info(
                "Tracing the step again for another task: %s.",
                "; ".join(differences[:3]),
            )
            self._set_task(task, model, optimizer)
            return
        self.task = self.steps.task = task
        assign(self.model.variables, model.variables)
        assign(self.optimizer.variables, optimizer.variables)
        for wrapper, new in zip(
            find_wrappers(self.model), find_wrappers(model), strict=True
        ):
            if isinstance(wrapper, PruningWrapper):
                wrapper.schedule = new.schedule
                wrapper.ranking = new.ranking
        self._reset_progress()

    def train(
        self,
        steps: int,
        *,
        checkpoints: Checkpoints | None = None,
        save_every: int | None = None,
        actions: Sequence[Action] = (),
        on_summary: Sequence[Callable[[Summary], Any]] = (),
        stop: StopSource | None = None,
    ) -> None:
        """Trains from the current step until `steps` steps are completed.

        Args:
            steps: Total number of steps. The first call lays pruning schedules
                without an `end_step` over them, from step 0.
            checkpoints: Saves a checkpoint every `save_every` steps, after the
                last step, and when `stop` requests a stop.
            save_every: Steps between two checkpoints, or None.
            actions: Further actions. They run in order, after the checkpoint of
                the step is saved. They do not run if a stop is requested, when
                there may be no time. All workers must have actions at the same
                steps.
            on_summary: Called with the summary of each loop.
            stop: Requests a stop before the end.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite. Such a step is
                never saved.
            Stopped: If `stop` requested it.
            CheckpointError: If a checkpoint cannot be written.
        """
        save = Action(
            call=lambda trainer: trainer.save(checkpoints),
            every=save_every,
            at_end=True,
        )
        actions = [save, *actions] if checkpoints is not None else [*actions]
        dataset = self.strategy.distribute_datasets_from_function(
            lambda context: train_dataset(self.task, context, self.step)
        )
        with self._updating_masks(steps) as updater:
            iterator = iter(dataset)
            while (step := self.step) < steps:
                begin = self._timer()
                end = self._loop_end(step, steps, actions)
                totals = self._run(iterator, step, end, updater)
                seconds = self._timer() - begin
                summary = self._summarize(step, end, steps, totals, seconds)
                for call in on_summary:
                    call(summary)
                step_seconds, requested = self._exchange(
                    seconds / (end - step), stop
                )
                self._train_loop_length.update(step_seconds)
                if requested and end < steps:
                    self._stop(requested, checkpoints)
                for action in actions:
                    if action.due(end, steps):
                        self._run_action(action, checkpoints)

    def _stop(
        self, signum: signal.Signals, checkpoints: Checkpoints | None
    ) -> None:
        if checkpoints is None:
            raise Stopped(
                signum, self.step, "not saved: there are no checkpoints"
            )
        self.save(checkpoints)
        raise Stopped(signum, self.step, "saved")

    def _run_action(
        self, action: Action, checkpoints: Checkpoints | None
    ) -> None:
        try:
            action.call(self)
        except Stopped:
            # An evaluation may raise it: keep the steps before it.
            if checkpoints is not None and self.saved_step != self.step:
                self.save(checkpoints)
            raise

    def evaluate(
        self,
        total_steps: int | None = None,
        *,
        checkpoints: Checkpoints | None = None,
        stop: StopSource | None = None,
    ) -> Summary:
        """Evaluates the current model; all workers must call it.

        The compiled evaluation runs first, on all replicas, then the task's
        evaluators, in the chief's process.

        Args:
            total_steps: Total number of steps, for the summary.
            checkpoints: The checkpoints of this training. The evaluators get
                those up to the current step.
            stop: Requests a stop before the end.

        Returns:
            A summary of the kind "eval". Only the chief's has the results of
            the evaluators.

        Raises:
            UsageError: If the task has no evaluation data.
            TaskError: If the task's data or evaluators are invalid.
            CheckpointError: If an evaluator needs a checkpoint that cannot be
                read.
            Stopped: If `stop` requested it.
        """
        if not self.task.has_evaluation:
            raise UsageError(
                "The task has no evaluation data. Override `eval_dataset`. "
                f"Received: a task of type {type(self.task).__name__}"
            )
        begin = self._timer()
        step = self.step
        if self.strategy.num_replicas_in_sync > 1:
            self.steps.share_statistics()
        metrics = self._evaluate_batches(step, stop).means()
        if checkpoints is not None:
            # Later ones may exist: of the process that trains, or damaged.
            checkpoints = checkpoints.up_to(step)
        metrics, texts = self._run_evaluators(metrics, checkpoints, step, stop)
        return Summary(
            step=step,
            total_steps=step if total_steps is None else total_steps,
            kind="eval",
            metrics=metrics,
            texts=texts,
            seconds=self._timer() - begin,
            # Whether penalties are known depends on whether training goes on.
            **self._sparsity(with_penalties=False),
        )

    def _evaluate_batches(self, step: int, stop: StopSource | None) -> Totals:
        dataset, batches = self._eval_dataset()
        iterator = iter(dataset)
        parts: list[Totals] = []
        batch = 0
        while batch < batches:
            begin = self._timer()
            end = min(batches, self._eval_loop_length.loop_end(batch))
            try:
                with inputs.input_errors():
                    parts.append(self.steps.evaluate(iterator, end - batch))
            except tf.errors.FailedPreconditionError as error:
                if _ENDED not in error.message:
                    raise
                raise_wrong_cardinality(
                    self.task, f"a data set that ended after {batch} batches"
                )
            step_seconds, requested = self._exchange(
                (self._timer() - begin) / (end - batch), stop
            )
            self._eval_loop_length.update(step_seconds)
            batch = end
            if requested and batch < batches:
                raise Stopped(
                    requested,
                    step,
                    f"after {batch:,} of {batches:,} batches of its evaluation",
                )
        return Totals.concatenate(parts)

    def _eval_dataset(self) -> tuple[Any, int]:
        """Returns the distributed data set and its batches per replica."""
        counts: list[int] = []

        def make_dataset(
            context: tf.distribute.InputContext,
        ) -> tf.data.Dataset:
            dataset, batches = eval_dataset(self.task, context)
            counts.append(batches)
            return dataset

        dataset = self.strategy.distribute_datasets_from_function(make_dataset)
        batches = check_eval_batches(self.task, counts)
        per_worker = self._gather([batches])[:, 0]
        batches = check_eval_batches(self.task, [int(n) for n in per_worker])
        return dataset, batches

    def _run_evaluators(
        self,
        metrics: Mapping[str, float],
        checkpoints: Checkpoints | None,
        step: int,
        stop: StopSource | None,
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Returns metrics and texts, on the chief with the evaluators'."""
        metrics, texts = dict(metrics), {}
        evaluators = check_evaluators(
            self.task, self.task.evaluators(checkpoints)
        )
        if not evaluators:
            return metrics, texts
        # On all workers, because reading variables may involve all of them.
        model = self._model_on_host()
        for count, (name, evaluator) in enumerate(evaluators.items(), start=1):
            if self.is_chief:
                numbers, strings = check_evaluator_results(
                    self.task, name, evaluator(model), {*metrics, *texts}
                )
                metrics |= numbers
                texts |= strings
            # The other workers wait here for the chief.
            _, requested = self._exchange(0.0, stop)
            if requested and count < len(evaluators):
                raise Stopped(requested, step, f"after the evaluator {name!r}")
        return metrics, texts

    def export(
        self,
        path: str | os.PathLike,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """Exports the current model; all workers must call it.

        The chief writes `Task.serving` of the stripped model as a SavedModel.

        Args:
            path: The directory to write.
            checkpoints: The checkpoints of this training. If given, the export
                has the weights of `Task.averaged_weights`.

        Raises:
            TaskError: If `Task.serving` or `Task.averaged_weights` returns an
                invalid value.
            CheckpointError: If a checkpoint to be averaged cannot be read.
            StorageError: If the directory cannot be written.
        """
        model = self._model_on_host()
        if not self.is_chief:
            return
        if checkpoints is not None:
            checkpoints = checkpoints.up_to(self.step)
        scope = self.task.averaged_weights(model, checkpoints)
        check_averaged_weights(self.task, scope)
        with scope:
            if find_wrappers(model):
                model = strip(model)
            module = self.task.serving(model)
            check_serving(self.task, module)
            export_model(module, path)

    def _model_on_host(self) -> keras.Model | None:
        """Returns a model that can be called outside of `strategy.run`.

        On one device this is the model itself, else a copy on this host. All
        workers must call it, because reading some variables involves all of
        them. Only the chief gets a model.
        """
        if not (
            self.strategy.num_replicas_in_sync > 1
            or strategies.several_processes(self.strategy)
            or isinstance(self.strategy, tf.distribute.TPUStrategy)
        ):
            return self.model
        values = [
            keras.ops.convert_to_numpy(variable)
            for variable in self.model.variables
        ]
        if not self.is_chief:
            return None
        if self._host_copy is None:
            model = self.task.build_model()
            lines = list(diff(_specs(self.model), _specs(model)))
            if lines:
                raise TaskError(
                    f"`{type(self.task).__name__}.build_model` must return a "
                    "model with the same variables each time. Received: "
                    f"{'; '.join(lines[:3])}"
                )
            self._host_copy = model
        assign(self._host_copy.variables, values)
        return self._host_copy

    @contextlib.contextmanager
    def _updating_masks(
        self, train_steps: int
    ) -> Iterator[SparsityUpdater | None]:
        """Yields the updater of the sparse layers; None if there are none."""
        if not self.steps.sparse_weights:
            yield None
            return
        # From step 0, so that a resumed training has the same schedules.
        resolve_schedules(find_wrappers(self.model), train_steps)
        updater = SparsityUpdater(
            self.model, self.optimizer, update_masks=self._record_update
        )
        step = self.step
        try:
            # Masks are not up to date if an interrupt preceded their update.
            updater.start(up_to_date=step > 0 and step == self._masks_step)
            self._masks_step = step
            yield updater
        finally:
            updater.stop()

    def _record_update(self, updates: dict[PruningWrapper, float]) -> None:
        """Updates masks, and records what changes for the next summary."""
        changes = self._update_masks(updates)
        if changes is not None:
            self._mask_updates.append(
                MaskUpdate(step=self.step, **dataclasses.asdict(changes))
            )

    def _loop_end(
        self, step: int, steps: int, actions: Sequence[Action]
    ) -> int:
        """Returns the next step at which the host has work."""
        ends = [
            steps,
            self._train_loop_length.loop_end(step),
            *(action.next_after(step) for action in actions),
        ]
        return min(end for end in ends if end is not None)

    def _run(
        self,
        iterator: Any,
        step: int,
        end: int,
        updater: SparsityUpdater | None,
    ) -> Totals:
        """Runs a loop in parts, between which masks are updated."""
        parts: list[Totals] = []
        while step < end:
            update = None if updater is None else updater.next_update(end)
            part_end = update or end
            totals = self._train_steps(iterator, part_end - step)
            parts.append(totals)
            self._check_loss(step, totals)
            if update:
                # Before the ranking, whose error would not name the step.
                self._check_weights()
            if updater is not None:
                updater.step()
            step = self._masks_step = part_end
        return Totals.concatenate(parts)

    def _train_steps(self, iterator: Any, steps: int) -> Totals:
        try:
            with inputs.input_errors():
                return self.steps.train(iterator, steps)
        except tf.errors.FailedPreconditionError as error:
            if _ENDED not in error.message:
                raise
            raise_end_of_data(
                self.task, f"a data set that ended after step {self.step:,}"
            )

    def _check_loss(self, step: int, totals: Totals) -> None:
        index = totals.first_non_finite()
        if index is not None:
            raise NonFiniteLossError(
                f"The loss became NaN or infinite in step {step + index + 1:,};"
                " all checkpoints are of earlier steps. Try a lower learning "
                "rate or a lower penalty weight.",
                step + index,
            )

    def _check_weights(self) -> None:
        if not self.steps.weights_are_finite():
            raise NonFiniteLossError(
                f"A weight became NaN or infinite by step {self.step:,}; "
                "all checkpoints are of earlier steps. Try a lower learning "
                "rate.",
                self.step,
            )

    def _summarize(
        self, step: int, end: int, steps: int, totals: Totals, seconds: float
    ) -> Summary:
        metrics = totals.means()
        if math.isnan(metrics["loss"]):
            # Not an error: one such batch should not end training.
            logging.warning(
                "The weights of the loss sum to 0 in the steps %d to %d: these "
                "steps learn nothing.",
                step + 1,
                end,
            )
        self.seconds += seconds
        step_seconds = seconds / (end - step)
        # The duration of the first loop includes tracing.
        traced = self._train_loop_length.traced
        learning_rate = keras.ops.convert_to_numpy(self.optimizer.learning_rate)
        mask_updates, self._mask_updates = tuple(self._mask_updates), []
        return Summary(
            step=end,
            total_steps=steps,
            metrics=metrics,
            learning_rate=float(learning_rate),
            examples_per_second=(
                self.task.batch_size / step_seconds if traced else None
            ),
            seconds=seconds,
            seconds_left=step_seconds * (steps - end) if traced else None,
            mask_updates=mask_updates,
            **self._sparsity(with_penalties=True),
        )

    def _sparsity(self, *, with_penalties: bool) -> dict[str, Any]:
        """Returns the sparsity of a summary, and penalties on request."""
        if not self.steps.sparse_weights:
            return {}
        zeros, penalties = self.steps.summary()
        sizes = {
            weight.path: weight.variable.value.shape.num_elements()
            for _, weight in self.steps.sparse_weights
        }
        fields = {
            "sparsity": sum(zeros.values()) / max(sum(sizes.values()), 1),
            "weight_sparsity": {
                path: count / max(sizes[path], 1)
                for path, count in zeros.items()
            },
        }
        if with_penalties and penalties:
            fields["penalty"] = sum(penalties.values())
            fields["weight_penalty"] = penalties
        return fields

    def _exchange(
        self, step_seconds: float, stop: StopSource | None
    ) -> tuple[float, signal.Signals | None]:
        """Shares a duration and a request to stop between all workers.

        Returns:
            The longest duration, and the signal if any worker has one.
        """
        requested = stop.requested if stop is not None else None
        per_worker = self._gather([step_seconds, float(requested or 0)])
        signum = int(per_worker[:, 1].max())
        return (
            float(per_worker[:, 0].max()),
            signal.Signals(signum) if signum else None,
        )


def build(
    task: Task,
) -> tuple[keras.Model, keras.optimizers.Optimizer]:
    """Builds the model and the optimizer of a task.

    Call it in the strategy's scope.

    Args:
        task: The task.

    Returns:
        A new built model and its built optimizer.

    Raises:
        TaskError: If a method of the task returns an invalid value.
    """
    model = task.build_model()
    check_model(task, model)
    optimizer = task.build_optimizer(model)
    check_optimizer(task, optimizer)
    # Before a step is traced.
    exclude_techniques(model, optimizer)
    # The first step runs on the replicas, where Keras 3.15 cannot create
    # variables.
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    return model, optimizer


def configuration(
    task: Task, *, gradient_accumulation_steps: int
) -> dict[str, Any]:
    """Returns everything that determines the result of a training, by name.

    Args:
        task: The task.
        gradient_accumulation_steps: As for `Trainer`.

    Returns:
        JSON values, for `Checkpoints`.

    Raises:
        TaskError: If `Task.configuration` returns an invalid value.
    """
    values = task.configuration()
    check_configuration(task, values)
    return {
        **values,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "dtype_policy": keras.config.dtype_policy().name,
    }


def _specs(model: keras.Model) -> dict[str, str]:
    """Returns the specs of a model's variables by position and path."""
    specs = variable_specs(model).items()
    return {f"{i} {path}": spec for i, (path, spec) in enumerate(specs)}
