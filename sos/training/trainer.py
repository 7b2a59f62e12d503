"""The controller: compiled loops, and actions of the host between them."""

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
from sos.training.checkpoints import Checkpoints, canonical_path, diff
from sos.training.compile_signature import compile_signature
from sos.training.reporting import Summary
from sos.training.signals import StopSource
from sos.training.steps import CompiledMaskUpdate, Steps, Totals
from sos.training.task import (
    Task,
    check_configuration,
    check_eval_batches,
    check_evaluators,
    check_figures,
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
    lay_out_schedules,
    update_masks,
)

# From TensorFlow's error about a data set with fewer batches than asserted.
_ENDED = "expected to contain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """A callable that the host runs after certain steps.

    It runs at most once per step: if the process ends after a checkpoint is
    saved and before the actions of its step, they do not run after a restart.

    Attributes:
        call: The callable; its argument is the trainer.
        every: Run it after each multiple of this number of steps.
        at: Run it after these numbers of steps.
        at_end: Run it after the last step.

    Raises:
        UsageError: If `every` is below 1.
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
        """Returns the next step at which the action is due, except `at_end`."""
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

    Nothing can interrupt a loop, neither a signal nor a save, so loops are
    bounded in steps and, once the duration of a step is known, in seconds. The
    first loop has one step; its duration includes tracing and is ignored. The
    second loop has one step, too, and is measured.

    Args:
        max_steps: Maximum number of steps in a loop.
        max_seconds: Approximate maximum duration of a loop, in seconds.

    Attributes:
        traced: Whether the first loop is over, so that durations are those of
            computation.

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
        """Takes the duration of one step of the last loop into account.

        Args:
            step_seconds: The duration in seconds.
        """
        if self.traced:
            self._step_seconds = step_seconds
        self.traced = True


class Trainer:
    """Trains and evaluates the model of a task under a strategy.

    The model, the optimizer and the compiled functions are created once, in
    the strategy's scope. The devices then run up to `steps_per_loop` steps at
    a time. Between two loops the host does what is due: mask updates,
    summaries, checkpoints, actions. Loops end exactly where something is due,
    so their length does not change the result.

    ```
    trainer = Trainer(MyTask(), strategy=make_strategy())
    checkpoints = Checkpoints(
        "checkpoints", configuration=trainer.configuration()
    )
    trainer.restore_or_initialize(checkpoints)
    trainer.train(10_000, checkpoints=checkpoints, save_every=1000)
    print(trainer.evaluate().metrics)
    ```

    Args:
        task: The task.
        strategy: The strategy; see `make_strategy`.
        gradient_accumulation_steps: Number of parts, computed one after the
            other, into which each replica's batch is split to save memory.
            Their gradients are accumulated into one step.
        steps_per_loop: Maximum number of steps, or evaluation batches, in one
            compiled loop.
        max_seconds_per_loop: Approximate maximum duration of a loop. Nothing
            can interrupt a loop, neither a signal nor a save.
        jit_compile: Whether to compile the training and evaluation steps with
            XLA, which needs one device. By default they are compiled on a GPU
            and not on a CPU. The default for a GPU has not been tried on a GPU
            yet. A TPU compiles every step by itself.
        clock: Returns the time in seconds.
        gather: Shares numbers between the processes of a job; see
            `sos.training.strategies.gather`.

    Attributes:
        task: The task.
        strategy: The strategy.
        model: The model.
        optimizer: Its optimizer.
        steps: The compiled functions.
        seconds: Total training time in seconds, including time before restarts.
        saved_step: The step of the checkpoint saved or restored last, or None.

    Raises:
        TaskError: If the task returns something invalid.
        UsageError: If a number is out of range, the batch cannot be split, the
            optimizer accumulates gradients or scales the loss, or
            `jit_compile` is true for several replicas.
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
        clock: Callable[[], float] = time.perf_counter,
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
        self._clock = clock
        self._gather = functools.partial(gather, strategy)
        self._make_loop_length()  # Raises if a bound is not positive.
        self._use(task, *self._build(task))

    def _build(
        self, task: Task
    ) -> tuple[keras.Model, keras.optimizers.Optimizer]:
        """Returns a new model and its optimizer, built."""
        with self.strategy.scope():
            model = task.build_model()
            check_model(task, model)
            optimizer = task.build_optimizer(model)
            check_optimizer(task, optimizer)
            # Before a step is traced.
            exclude_techniques(model, optimizer)
            # Not left to the first step, which runs on the replicas, where
            # Keras 3.15 cannot create variables.
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
        return model, optimizer

    def _use(
        self,
        task: Task,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        """Takes a new model, with new compiled functions."""
        with self.strategy.scope():
            # First, as it may raise: the others would not belong to it.
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
        # The step for which masks are known to be up to date.
        self._masks_step: int | None = None
        self._host_copy: keras.Model | None = None

    @property
    def step(self) -> int:
        """The number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files of its job."""
        return strategies.is_chief(self.strategy)

    def configuration(self) -> dict[str, Any]:
        """Returns all options that determine the result, by name."""
        configuration = self.task.configuration()
        check_configuration(self.task, configuration)
        return {
            **configuration,
            "gradient_accumulation_steps": self._gradient_accumulation_steps,
            "dtype_policy": keras.config.dtype_policy().name,
        }

    def restore_or_initialize(self, checkpoints: Checkpoints) -> int | None:
        """Restores the newest checkpoint, or calls `Task.initialize`.

        Args:
            checkpoints: The checkpoints.

        Returns:
            The step of the checkpoint, or None if there was none and the task
            initialized the model.

        Raises:
            CheckpointError: As `restore` does.
        """
        step = self.restore(checkpoints)
        if step is None:
            with self.strategy.scope():
                self.task.initialize(self.model)
        return step

    def restore(self, checkpoints: Checkpoints) -> int | None:
        """Restores the newest checkpoint that is not damaged.

        Args:
            checkpoints: The checkpoints.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            CheckpointError: If it is of another configuration, all are damaged,
                or workers see different ones.
        """
        metadata = checkpoints.restore(self.model, self.optimizer)
        step = None if metadata is None else metadata["step"]
        steps = self._gather([-1 if step is None else step])[:, 0]
        if len(set(steps)) > 1:
            raise CheckpointError(
                "All workers must see the same checkpoints, in a directory "
                "that they share. Received: steps "
                f"{[int(s) for s in steps]} in {checkpoints.directory}"
            )
        if metadata is not None:
            self._take_over(metadata)
            self._warn_of_changes(step, metadata)
        return step

    def restore_step(self, checkpoints: Checkpoints, step: int) -> None:
        """Restores the checkpoint of one step, to evaluate or export it.

        Args:
            checkpoints: The checkpoints.
            step: One of `checkpoints.steps()`.

        Raises:
            DamagedCheckpointError: If it is damaged.
            CheckpointError: If it is of another configuration, or cannot be
                read at the moment.
        """
        self._take_over(
            checkpoints.restore_step(step, self.model, self.optimizer)
        )

    def _take_over(self, metadata: Mapping[str, Any]) -> None:
        """Sets what a trainer holds besides the values of variables."""
        # A checkpoint may have been saved by another loop than this one.
        self.seconds = metadata.get("seconds", 0.0)
        self.saved_step = self._masks_step = metadata["step"]

    def _placement(self) -> dict[str, Any]:
        """Returns options of execution that affect the result."""
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
                    "training continues with %s=%s: %s may differ from here "
                    "on.",
                    step,
                    name,
                    metadata[name],
                    name,
                    value,
                    consequences[name],
                )

    def save(self, checkpoints: Checkpoints) -> None:
        """Saves a checkpoint of this step; all workers must call it.

        Args:
            checkpoints: The checkpoints.

        Raises:
            CheckpointError: If it cannot be written.
            NonFiniteLossError: If a weight is not finite.
        """
        self._check_weights()
        step = self.step
        checkpoints.save(
            step,
            self.model,
            self.optimizer,
            metadata={
                "seconds": self.seconds,
                "examples_seen": step * self.task.batch_size,
                **self._placement(),
            },
            chief=self.is_chief,
        )
        self.saved_step = step

    def reset(self, task: Task) -> None:
        """Takes another task, as a new trainer would, at less cost.

        All variables, the optimizer's slots, the step and the schedules of
        pruning techniques are set as a new trainer would have them. The
        compiled functions are kept if they would be traced to the same again:
        tasks may differ in seeds, initializers, schedules, and hyperparameters
        that are variables. Otherwise they are traced anew, for another network,
        ramp or optimizer for example.

        Kept functions hold the old task's `compute_metrics`, which must do the
        same as the new task's.

        Args:
            task: The task to train next.

        Raises:
            TaskError: If the task returns something invalid.
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
                "The step is traced anew for another task: %s.",
                "; ".join(differences[:3]),
            )
            self._use(task, model, optimizer)
            return
        self.task = self.steps.task = task
        _assign(self.model.variables, model.variables)
        _assign(self.optimizer.variables, optimizer.variables)
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
            steps: Number of steps of the whole training. Pruning schedules
                without an `end_step` are laid over them, from step 0, in the
                first call.
            checkpoints: Where to save a checkpoint: after the last step, when
                `stop` requests a stop, and every `save_every` steps.
            save_every: Number of steps between two checkpoints, or None.
            actions: Further actions. After a step, the checkpoint is saved
                before they run, in their order. They do not run at the step at
                which a stop is requested, as there may be no time. All workers
                must have actions at the same steps.
            on_summary: Callables that take the summary of each loop.
            stop: Requests a stop before the end.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite. No checkpoint
                was saved since.
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
                begin = self._clock()
                end = self._loop_end(step, steps, actions)
                totals = self._run(iterator, step, end, updater)
                seconds = self._clock() - begin
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
                        self._act(action, checkpoints)

    def _stop(
        self, signum: signal.Signals, checkpoints: Checkpoints | None
    ) -> None:
        if checkpoints is None:
            raise Stopped(
                signum, self.step, "not saved: there are no checkpoints"
            )
        self.save(checkpoints)
        raise Stopped(signum, self.step, "saved")

    def _act(self, action: Action, checkpoints: Checkpoints | None) -> None:
        try:
            action.call(self)
        except Stopped:
            # By an evaluation, for example: keep the steps before it.
            if checkpoints is not None and self.saved_step != self.step:
                self.save(checkpoints)
            raise

    def evaluate(
        self,
        total_steps: int | None = None,
        *,
        stop: StopSource | None = None,
    ) -> Summary:
        """Evaluates the model as it is now; all workers must call it.

        The compiled evaluation runs first, on all replicas, then the task's
        evaluators, in the chief's process.

        Args:
            total_steps: Number of steps of the whole training, for the summary.
            stop: Requests a stop before the end.

        Returns:
            A summary of the kind "eval". The evaluators' figures are in the
            chief's only.

        Raises:
            UsageError: If the task has no evaluation data.
            TaskError: If the task's data or evaluators are invalid.
            Stopped: If `stop` requested it.
        """
        if not self.task.has_evaluation:
            raise UsageError(
                "The task has no evaluation data. Override `eval_dataset`. "
                f"Received: a task of type {type(self.task).__name__}"
            )
        begin = self._clock()
        step = self.step
        if self.strategy.num_replicas_in_sync > 1:
            self.steps.share_statistics()
        metrics = self._evaluate_batches(step, stop).means()
        metrics = self._run_evaluators(metrics, step, stop)
        return Summary(
            step=step,
            total_steps=step if total_steps is None else total_steps,
            kind="eval",
            metrics=metrics,
            seconds=self._clock() - begin,
            **self._sparsity(),
        )

    def _evaluate_batches(self, step: int, stop: StopSource | None) -> Totals:
        dataset, batches = self._eval_dataset()
        iterator = iter(dataset)
        parts: list[Totals] = []
        done = 0
        while done < batches:
            begin = self._clock()
            end = min(batches, self._eval_loop_length.loop_end(done))
            try:
                with inputs.input_errors():
                    parts.append(self.steps.evaluate(iterator, end - done))
            except tf.errors.FailedPreconditionError as error:
                if _ENDED not in error.message:
                    raise
                raise_wrong_cardinality(
                    self.task, f"a data set that ended after {done} batches"
                )
            step_seconds, requested = self._exchange(
                (self._clock() - begin) / (end - done), stop
            )
            self._eval_loop_length.update(step_seconds)
            done = end
            if requested and done < batches:
                raise Stopped(
                    requested,
                    step,
                    f"after {done:,} of {batches:,} batches of its evaluation",
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
        self, metrics: dict[str, float], step: int, stop: StopSource | None
    ) -> dict[str, float]:
        """Returns the metrics and, on the chief, the evaluators' figures."""
        evaluators = check_evaluators(self.task, self.task.evaluators())
        if not evaluators:
            return metrics
        # Also the other workers, which take part in reading the variables.
        model = self._model_on_host()
        for count, (name, evaluator) in enumerate(evaluators.items(), start=1):
            if self.is_chief:
                metrics = {
                    **metrics,
                    **check_figures(self.task, name, evaluator(model), metrics),
                }
            # Other workers wait here for the chief.
            _, requested = self._exchange(0.0, stop)
            if requested and count < len(evaluators):
                raise Stopped(requested, step, f"after the evaluator {name!r}")
        return metrics

    def export(self, path: str | os.PathLike) -> None:
        """Exports the model as it is now; all workers must call it.

        The chief writes `Task.serving` of the stripped model as a SavedModel.

        Args:
            path: The directory to write.

        Raises:
            TaskError: If `Task.serving` returns something invalid.
            StorageError: If it cannot be written.
        """
        model = self._model_on_host()
        if not self.is_chief:
            return
        if find_wrappers(model):
            model = strip(model)
        module = self.task.serving(model)
        check_serving(self.task, module)
        export_model(module, path)

    def _model_on_host(self) -> keras.Model | None:
        """Returns a model that can be called outside of `strategy.run`.

        On one device that is the model itself, else a copy on this host. All
        workers must call it, as reading some variables takes all of them. Only
        the chief gets a model.
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
            changes = diff(_specs(self.model), _specs(model))
            if lines := list(changes):
                raise TaskError(
                    f"`{type(self.task).__name__}.build_model` must return a "
                    "model with the same variables each time. Received: "
                    f"{'; '.join(lines[:3])}"
                )
            self._host_copy = model
        _assign(self._host_copy.variables, values)
        return self._host_copy

    @contextlib.contextmanager
    def _updating_masks(
        self, train_steps: int
    ) -> Iterator[SparsityUpdater | None]:
        """Yields the updater of the sparse layers, if there are any."""
        if not self.steps.sparse_weights:
            yield None
            return
        # From step 0, so that a resumed training has the same schedules.
        lay_out_schedules(find_wrappers(self.model), train_steps)
        updater = SparsityUpdater(
            self.model, self.optimizer, update_masks=self._update_masks
        )
        step = self.step
        try:
            # Not up to date after an interrupt between a step and its update.
            updater.start(up_to_date=step > 0 and step == self._masks_step)
            self._masks_step = step
            yield updater
        finally:
            updater.stop()

    def _loop_end(
        self, step: int, steps: int, actions: Sequence[Action]
    ) -> int:
        """Returns the step at which the host has something to do."""
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
        """Runs a loop, in parts between which masks are updated."""
        parts: list[Totals] = []
        while step < end:
            update = None if updater is None else updater.next_update(end)
            part_end = update or end
            totals = self._train_steps(iterator, part_end - step)
            parts.append(totals)
            self._check_loss(step, totals)
            if update:
                # Before the ranking, whose error would name no step.
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
                " checkpoints are of steps before. Try a lower learning rate "
                "or a lower penalty weight.",
                step + index,
            )

    def _check_weights(self) -> None:
        if not self.steps.weights_are_finite():
            raise NonFiniteLossError(
                f"A weight became NaN or infinite by step {self.step:,}; "
                "checkpoints are of steps before. Try a lower learning rate.",
                self.step,
            )

    def _summarize(
        self, step: int, end: int, steps: int, totals: Totals, seconds: float
    ) -> Summary:
        metrics = totals.means()
        if math.isnan(metrics["loss"]):
            # Not an error: one such batch should not end a training.
            logging.warning(
                "The weights of the loss sum to 0 in the steps %d to %d: "
                "nothing is learned from them.",
                step + 1,
                end,
            )
        self.seconds += seconds
        step_seconds = seconds / (end - step)
        # The first loop's duration includes tracing.
        traced = self._train_loop_length.traced
        learning_rate = keras.ops.convert_to_numpy(self.optimizer.learning_rate)
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
            **self._sparsity(),
        )

    def _sparsity(self) -> dict[str, Any]:
        """Returns the sparsity and penalties for a summary."""
        if not self.steps.sparse_weights:
            return {}
        zeros, penalties = self.steps.summary()
        sizes = {
            weight.path: weight.variable.value.shape.num_elements()
            for _, weight in self.steps.sparse_weights
        }
        return {
            "sparsity": sum(zeros.values()) / max(sum(sizes.values()), 1),
            "penalty": sum(penalties.values()) if penalties else None,
            "weight_sparsity": {
                path: count / max(sizes[path], 1)
                for path, count in zeros.items()
            },
            "weight_penalty": penalties,
        }

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


def _assign(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(keras.ops.convert_to_tensor(value))


def _specs(model: keras.Model) -> dict[str, str]:
    """Returns dtype and shape of a model's variables, by canonical path."""
    return {
        f"{index} {canonical_path(variable.path)}": (
            f"{variable.dtype} {tuple(variable.shape)}"
        )
        for index, variable in enumerate(model.variables)
    }
