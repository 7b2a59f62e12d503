"""The controller: runs compiled loops, and the host's actions between them."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from sos.driver import Driver
from sos.errors import CheckpointError, NonFiniteLossError, Stopped
from sos.training.checkpoints import Checkpoints
from sos.training.reporting import Summary
from sos.training.signals import StopSource
from sos.training.steps import CompiledMaskUpdate, Steps
from sos.training.strategies import gather, is_chief
from sos.training.task import (
    Task,
    check_configuration,
    check_model,
    check_optimizer,
    eval_dataset,
    refuse_end,
    train_dataset,
)
from sos.wrappers.masked import update_masks

# What TensorFlow says of a data set that was to be without end.
_ENDED = "expected to contain an infinite number of elements"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """Something that the host does between two steps.

    It is done at most once: if the process ends after a checkpoint is saved and
    before the actions of its step, they are not made up for after a restart.

    Attributes:
        call: What is done; called with the trainer.
        every: Do it whenever this many more steps are done.
        at: Do it after these numbers of steps.
        at_end: Do it after the last step.

    Raises:
        ValueError: If `every` is below 1.
    """

    call: Callable[[Any], Any]
    every: int | None = None
    at: tuple[int, ...] = ()
    at_end: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"`every` must be at least 1. Received: every={self.every}"
            )

    def next_after(self, step: int) -> int | None:
        """The first step after a step at which it is due, but for the end."""
        steps = [s for s in self.at if s > step]
        if self.every is not None:
            steps.append((step // self.every + 1) * self.every)
        return min(steps, default=None)

    def due(self, step: int, last: int) -> bool:
        """Whether it is due after a step."""
        return self.next_after(step - 1) == step or (
            self.at_end and step == last
        )


class LoopLength:
    """Chooses the lengths of compiled loops, by how long a step takes.

    Nothing can interrupt a loop: neither a signal nor a save. So loops are
    bounded in steps and, once the duration of a step is known, in seconds. The
    first loop is of one step, and its duration, which includes tracing, says
    nothing; the second is of one step and measured.

    Args:
        max_steps: The number of steps in a loop, at most.
        max_seconds: The duration of a loop, at most and about.

    Attributes:
        traced: Whether a loop was made, so that durations mean something.

    Raises:
        ValueError: If a bound is not positive.
    """

    def __init__(self, *, max_steps: int, max_seconds: float) -> None:
        if max_steps < 1 or not max_seconds > 0:
            raise ValueError(
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
        """The step at which a loop that begins at a step ends, at the latest.

        Loops end at multiples of `max_steps`, wherever training began.
        """
        if self._step_seconds is None:
            limit = 1
        else:
            limit = max(1, int(self._max_seconds / self._step_seconds))
        return min(
            (step // self._max_steps + 1) * self._max_steps, step + limit
        )

    def measured(self, step_seconds: float) -> None:
        """Takes note of the last loop.

        Args:
            step_seconds: The duration of one of its steps.
        """
        if self.traced:
            self._step_seconds = step_seconds
        self.traced = True


class Trainer:
    """Trains and evaluates what a task describes, under a strategy.

    The model, the optimizer and the compiled functions are made once, in the
    strategy's scope. The host then lets the devices run up to `steps_per_loop`
    steps at a time and does between them what is due: mask updates, records,
    checkpoints, actions. Loops end exactly where something is due, so that how
    they are cut changes nothing of what is computed.

    Args:
        task: What is trained.
        strategy: Where; see `make_strategy`.
        gradient_accumulation_steps: The number of parts, computed one after the other, that
            each replica's batch is cut into to save memory. Their gradients are
            accumulated into one step.
        steps_per_loop: The number of steps, or batches of an evaluation, in a
            loop, at most.
        max_seconds_per_loop: Loops are kept so short that they take about this
            long, as nothing can interrupt one: neither a signal nor a save.

    Attributes:
        task: As given.
        strategy: As given.
        model: The model.
        optimizer: Its optimizer.
        steps: The compiled functions.
        seconds: The duration of all training loops, also of those before a
            restart.
        saved_step: The step of the checkpoint that was saved or restored last,
            None before.

    Raises:
        TaskError: If the task gives something that cannot be used.
        ValueError: If a number is out of range, the batch cannot be cut as
            asked, or the optimizer does what only the engine can do.
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
    ) -> None:
        self._train_loop_length, self._eval_loop_length = (
            LoopLength(
                max_steps=steps_per_loop, max_seconds=max_seconds_per_loop
            )
            for _ in range(2)
        )
        self.task = task
        self.strategy = strategy
        self._micro_batches = gradient_accumulation_steps
        self.seconds = 0.0
        self.saved_step: int | None = None
        # The step for which masks are known to be up to date.
        self._masks_step: int | None = None
        with strategy.scope():
            self.model = task.build_model()
            check_model(task, self.model)
            self.optimizer = task.build_optimizer(self.model)
            check_optimizer(task, self.optimizer)
            # Not left to the first step, which runs on the replicas, where
            # Keras 3.15 cannot make variables.
            if not self.optimizer.built:
                self.optimizer.build(self.model.trainable_variables)
            self.steps = Steps(
                task,
                self.model,
                self.optimizer,
                gradient_accumulation_steps=gradient_accumulation_steps,
            )
            self._update_masks = (
                CompiledMaskUpdate()
                if isinstance(strategy, tf.distribute.TPUStrategy)
                else update_masks
            )

    @property
    def step(self) -> int:
        """The number of completed optimizer steps."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def configuration(self) -> dict[str, Any]:
        """All settings that decide what is computed, by name."""
        configuration = self.task.configuration()
        check_configuration(self.task, configuration)
        return {
            **configuration,
            "gradient_accumulation_steps": self._micro_batches,
            "dtype_policy": keras.config.dtype_policy().name,
        }

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes files."""
        return is_chief(self.strategy)

    def restore(self, checkpoints: Checkpoints) -> int | None:
        """Restores the newest checkpoint that is not damaged.

        Args:
            checkpoints: Where to look.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            CheckpointError: If it is of another configuration, all are damaged,
                or workers do not see the same ones.
        """
        restored = checkpoints.restore(self.model, self.optimizer)
        step = None if restored is None else restored["step"]
        seen = gather(self.strategy, [-1 if step is None else step])[:, 0]
        if len(set(seen)) > 1:
            raise CheckpointError(
                "The workers must see the same checkpoints: the directory has "
                "to be one that they share. Received: steps "
                f"{[int(s) for s in seen]} in {checkpoints.directory}"
            )
        if restored is not None:
            self.seconds = restored["seconds"]
            self.saved_step = self._masks_step = step
            replicas = self.strategy.num_replicas_in_sync
            if restored["replicas"] != replicas:
                logging.warning(
                    "The checkpoint of step %d is of a training on %d "
                    "replicas, and this is one on %d: noise and batch "
                    "statistics go another way from here.",
                    step,
                    restored["replicas"],
                    replicas,
                )
        return step

    def restore_or_initialize(self, checkpoints: Checkpoints) -> int | None:
        """Shim: restores the newest checkpoint, or initializes the model."""
        step = self.restore(checkpoints)
        if step is None and hasattr(self.task, "initialize"):
            with self.strategy.scope():
                self.task.initialize(self.model)
        return step

    def export(self, path: str) -> None:
        """Shim: exports the model for serving."""
        from sos.export import export_saved_model

        export_saved_model(self.model, path)

    def save(self, checkpoints: Checkpoints) -> None:
        """Saves a checkpoint of this step; all workers must call it.

        Args:
            checkpoints: Where to.

        Raises:
            CheckpointError: If it cannot be written.
            NonFiniteLossError: If a weight is not finite: what is kept must be
                worth to go on from.
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
                "replicas": self.strategy.num_replicas_in_sync,
            },
            chief=self.is_chief,
        )
        self.saved_step = step

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
        """Trains until a number of steps is completed, from where it is.

        Args:
            steps: The number of steps, of the whole training.
            checkpoints: Where to save; after the last step and when training is
                asked to stop, at least.
            save_every: Save whenever this many more steps are done, too.
            actions: What else to do. At one step, a checkpoint is saved before
                they are called, in their order; not at the step at which
                training is asked to stop, as there may be no time. All workers
                must have actions at the same steps.
            on_summary: Called with a record after every loop.
            stop: Tells when to stop before the end.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite. No checkpoint
                was saved since.
            Stopped: If training was asked to stop.
            CheckpointError: If a checkpoint cannot be written.
        """
        save = Action(
            call=lambda trainer: trainer.save(checkpoints),
            every=save_every,
            at_end=True,
        )
        actions = [save, *actions] if checkpoints is not None else [*actions]
        dataset = self._distributed(
            lambda context: train_dataset(self.task, context, self.step)
        )
        # What an earlier training left when it failed.
        self.steps.take_train_metrics()
        self.steps.take_bad_step()
        with self._driving() as driver:
            iterator = iter(dataset)
            while (step := self.step) < steps:
                begin = time.perf_counter()
                end = self._loop_end(step, steps, actions)
                self._run(iterator, step, end, driver)
                record = self._record(step, end, steps, begin)
                for call in on_summary:
                    call(record)
                stopping = self._agree(
                    self._train_loop_length, record.seconds / (end - step), stop
                )
                if end == steps:
                    stopping = None
                if stopping is not None:
                    if checkpoints is None:
                        raise Stopped(
                            stopping, end, "not saved: there are no checkpoints"
                        )
                    self.save(checkpoints)
                    raise Stopped(stopping, end, "saved")
                for action in actions:
                    if action.due(end, steps):
                        self._act(action, checkpoints)

    def _act(self, action: Action, checkpoints: Checkpoints | None) -> None:
        try:
            action.call(self)
        except Stopped:
            # An evaluation, for one: the steps before it are to be kept.
            if checkpoints is not None and self.saved_step != self.step:
                self.save(checkpoints)
            raise

    def evaluate(
        self,
        total_steps: int | None = None,
        *,
        stop: StopSource | None = None,
    ) -> Summary:
        """Evaluates the model as it is now.

        Args:
            total_steps: For the record, the steps of the whole training.
            stop: Tells when to stop before the end.

        Returns:
            The record, of the kind "eval".

        Raises:
            ValueError: If the task has no evaluation data.
            Stopped: If it was asked to stop. As an action of `train` it is
                made up for by nobody after a restart.
        """
        if self.task.eval_batches < 1:
            raise ValueError(
                "The task has no evaluation data: its `eval_batches` must be "
                f"at least 1. Received: {self.task.eval_batches}"
            )
        begin = time.perf_counter()
        step = self.step
        # What an earlier evaluation left when it was stopped.
        self.steps.take_eval_metrics()
        if self.strategy.num_replicas_in_sync > 1:
            self.steps.share_statistics()
        self._evaluate_batches(step, stop)
        return Summary(
            step=step,
            total_steps=step if total_steps is None else total_steps,
            kind="eval",
            metrics=self.steps.take_eval_metrics(),
            seconds=time.perf_counter() - begin,
            **self._sparsity(),
        )

    def _evaluate_batches(self, step: int, stop: StopSource | None) -> None:
        iterator = iter(
            self._distributed(lambda context: eval_dataset(self.task, context))
        )
        batches, done = self.task.eval_batches, 0
        while done < batches:
            begin = time.perf_counter()
            end = min(batches, self._eval_loop_length.loop_end(done))
            self.steps.evaluate(iterator, tf.constant(end - done, tf.int32))
            self.steps.wait_for_evaluation()
            seconds = time.perf_counter() - begin
            stopping = self._agree(
                self._eval_loop_length, seconds / (end - done), stop
            )
            done = end
            if stopping is not None and done < batches:
                raise Stopped(
                    stopping,
                    step,
                    f"after {done:,} of {batches:,} batches of its evaluation",
                )

    def _distributed(
        self,
        make_dataset: Callable[[tf.distribute.InputContext], tf.data.Dataset],
    ) -> Any:
        return self.strategy.distribute_datasets_from_function(make_dataset)

    @contextlib.contextmanager
    def _driving(self) -> Iterator[Driver | None]:
        """Drives the sparse layers, if there are any."""
        if not self.steps.sparse_weights:
            yield None
            return
        driver = Driver(
            self.model, self.optimizer, update_masks=self._update_masks
        )
        # Not so if training was interrupted between a step and its update.
        step = self.step
        driver.start(up_to_date=step > 0 and step == self._masks_step)
        self._masks_step = step
        try:
            yield driver
        finally:
            driver.stop()

    def _loop_end(
        self, step: int, steps: int, actions: Sequence[Action]
    ) -> int:
        """The step at which the host has to look next."""
        ends = [
            steps,
            self._train_loop_length.loop_end(step),
            *(action.next_after(step) for action in actions),
        ]
        return min(end for end in ends if end is not None)

    def _run(
        self, iterator: Any, step: int, end: int, driver: Driver | None
    ) -> None:
        """Runs a loop, in parts between which masks are updated."""
        while step < end:
            update = None if driver is None else driver.next_update(end)
            part_end = update or end
            self._train_steps(iterator, part_end - step)
            self._check_loss()
            if update:
                # Otherwise NaN scores would be refused, with less to be told.
                self._check_weights()
            if driver is not None:
                driver.step()
            step = self._masks_step = part_end

    def _train_steps(self, iterator: Any, steps: int) -> None:
        try:
            self.steps.train(iterator, tf.constant(steps, tf.int32))
        except tf.errors.FailedPreconditionError as error:
            if _ENDED not in str(error):
                raise
            refuse_end(
                self.task, f"a data set that ended after step {self.step:,}"
            )

    def _check_loss(self) -> None:
        bad = self.steps.take_bad_step()
        if bad is not None:
            raise NonFiniteLossError(
                f"The loss became NaN or infinite in step {bad + 1:,}; "
                "checkpoints are of steps before. A lower learning rate or "
                "penalty may help.",
                bad,
            )

    def _check_weights(self) -> None:
        if not self.steps.weights_are_finite():
            raise NonFiniteLossError(
                f"A weight became NaN or infinite by step {self.step:,}; "
                "checkpoints are of steps before. A lower learning rate may "
                "help.",
                self.step,
            )

    def _record(self, step: int, end: int, steps: int, begin: float) -> Summary:
        metrics = self.steps.take_train_metrics()
        if math.isnan(metrics["loss"]):
            # It is finite in every step that has any weight. No error, as one
            # such batch would end a training for good.
            logging.warning(
                "The weights of the loss sum to 0 in the steps %d to %d, of "
                "which nothing is learned.",
                step + 1,
                end,
            )
        # The metrics are there: all steps are done, on any device.
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        pace = seconds / (end - step)
        traced = self._train_loop_length.traced
        rate = keras.ops.convert_to_numpy(self.optimizer.learning_rate)
        return Summary(
            step=end,
            total_steps=steps,
            metrics=metrics,
            learning_rate=float(rate),
            # Tracing says nothing of the pace.
            examples_per_second=(
                self.task.batch_size / pace if traced else None
            ),
            seconds=seconds,
            seconds_left=pace * (steps - end) if traced else None,
            **self._sparsity(),
        )

    def _sparsity(self) -> dict[str, Any]:
        """The sparsity and penalties of a record."""
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

    def _agree(
        self,
        loop_length: LoopLength,
        step_seconds: float,
        stop: StopSource | None,
    ) -> signal.Signals | None:
        """Sets the loop length and tells whether to stop, the same on all workers."""
        requested = stop.requested if stop is not None else None
        said = gather(self.strategy, [step_seconds, float(requested or 0)])
        loop_length.measured(float(said[:, 0].max()))
        signum = int(said[:, 1].max())
        return signal.Signals(signum) if signum else None
