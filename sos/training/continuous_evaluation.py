"""Evaluates the checkpoints that another process saves."""

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

from absl import logging

from sos.errors import CheckpointError, DamagedCheckpointError, Stopped
from sos.training.checkpoints import Checkpoints
from sos.training.reporting import Summary
from sos.training.signals import StopRequest
from sos.training.trainer import Trainer


class ContinuousEvaluation:
    """Evaluates every checkpoint of a directory once, as they appear.

    Args:
        trainer: Evaluates; its state is replaced by that of each checkpoint.
        checkpoints: The checkpoints of the training.
        last_step: Step of the last checkpoint.
        timeout: Seconds without a new checkpoint after which to give up; None
            to wait forever.
        poll_seconds: Seconds between two looks at the directory.
        clock: Returns the time in seconds, from any origin.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        *,
        last_step: int,
        timeout: float | None = None,
        poll_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._last_step = last_step
        self._timeout = timeout
        self._poll_seconds = poll_seconds
        self._clock = clock
        # Steps that a warning was logged for.
        self._passed_over: set[int] = set()

    def run(
        self,
        evaluated: Collection[int] = (),
        *,
        on_summary: Callable[[Summary], Any],
        on_wait: Callable[[str], Any] = lambda message: None,
        stop: StopRequest | None = None,
    ) -> None:
        """Evaluates until the checkpoint of the last step is evaluated.

        Args:
            evaluated: Steps that were evaluated before.
            on_summary: Called with the summary of each evaluation.
            on_wait: Called with a message the first time that there is nothing
                to evaluate.
            stop: Asks to stop before the end; its `wait` passes the time
                between two looks at the directory.

        Raises:
            CheckpointError: If the checkpoints are of another configuration, or
                no new one appeared within `timeout`.
            Stopped: If `stop` asked to stop.
        """
        stop = stop or StopRequest()
        done = set(evaluated)
        self._check_newest()
        waiting_since, announced = self._clock(), False
        while True:
            for step in self._checkpoints.steps():
                if step in done or not self._evaluate(step, on_summary, stop):
                    continue
                waiting_since = self._clock()
                done.add(step)
                if stop.requested and self._last_step not in done:
                    raise Stopped(stop.requested, step, "evaluated")
            if self._last_step in done:
                return
            if not announced:
                on_wait(
                    f"Waiting for checkpoints in {self._checkpoints.directory} "
                    f"up to step {self._last_step:,}."
                )
                announced = True
            if stop.wait(self._seconds_to_wait(waiting_since)):
                raise Stopped(
                    stop.requested,
                    max(done, default=0),
                    "while waiting for the next checkpoint",
                )

    def _seconds_to_wait(self, since: float) -> float:
        if self._timeout is None:
            return self._poll_seconds
        left = since + self._timeout - self._clock()
        if left <= 0:
            raise CheckpointError(
                f"No new checkpoint appeared in {self._checkpoints.directory} "
                f"for {self._timeout:g} seconds, and the last step, "
                f"{self._last_step}, has none. Check that training is running."
            )
        return min(self._poll_seconds, left)

    def _check_newest(self) -> None:
        """Raises for another configuration, even if all were evaluated."""
        for step in self._checkpoints.steps()[-1:]:
            # Damaged checkpoints are passed over later.
            with contextlib.suppress(DamagedCheckpointError):
                self._checkpoints.check(
                    step, self._trainer.model, self._trainer.optimizer
                )

    def _evaluate(
        self, step: int, on_summary: Callable[[Summary], Any], stop: StopRequest
    ) -> bool:
        """Evaluates a checkpoint; returns False if it cannot be read (yet)."""
        try:
            self._trainer.restore_step(self._checkpoints, step)
        except DamagedCheckpointError as error:
            # On an object store it may still be incomplete.
            if step not in self._passed_over:
                self._passed_over.add(step)
                logging.warning(
                    "The checkpoint of step %d is damaged, not complete yet, "
                    "or was removed before it could be evaluated: %s",
                    step,
                    error,
                )
            return False
        on_summary(self._trainer.evaluate(self._last_step, stop=stop))
        return True
