"""Continuous evaluation of the checkpoints that another process saves."""

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
    """Evaluates every checkpoint in a directory once, as it appears.

    Args:
        trainer: Evaluates the checkpoints. Its state is replaced by each.
        checkpoints: The checkpoints.
        last_step: Step of the last checkpoint.
        timeout: Seconds to wait for a new checkpoint before raising an error;
            None to wait forever.
        poll_seconds: Seconds between two listings of the directory.
        timer: Returns the time in seconds since any origin.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        *,
        last_step: int,
        timeout: float | None = None,
        poll_seconds: float = 5.0,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._last_step = last_step
        self._timeout = timeout
        self._poll_seconds = poll_seconds
        self._timer = timer
        # Steps for which a warning was logged.
        self._warned_steps: set[int] = set()

    def run(
        self,
        evaluated: Collection[int] = (),
        *,
        on_summary: Callable[[Summary], Any],
        on_wait: Callable[[str], Any] = lambda message: None,
        stop: StopRequest | None = None,
    ) -> None:
        """Evaluates checkpoints until that of the last step is evaluated.

        Args:
            evaluated: Steps that were evaluated before.
            on_summary: Called with the summary of each evaluation.
            on_wait: Called with a message the first time there is nothing to
                evaluate.
            stop: Requests a stop before the end; its `wait` sleeps between two
                listings of the directory.

        Raises:
            CheckpointError: If the checkpoints are of another configuration, or
                no new one appeared within `timeout`.
            Stopped: If `stop` requested it.
        """
        stop = stop or StopRequest()
        steps = set(evaluated)
        self._check_newest()
        waiting_since, announced = self._timer(), False
        while True:
            for step in self._checkpoints.steps():
                if step in steps or not self._evaluate(step, on_summary, stop):
                    continue
                waiting_since = self._timer()
                steps.add(step)
                if stop.requested and self._last_step not in steps:
                    raise Stopped(stop.requested, step, "evaluated")
            if self._last_step in steps:
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
                    max(steps, default=0),
                    "while waiting for the next checkpoint",
                )

    def _seconds_to_wait(self, since: float) -> float:
        if self._timeout is None:
            return self._poll_seconds
        remaining = since + self._timeout - self._timer()
        if remaining <= 0:
            raise CheckpointError(
                f"No new checkpoint appeared in {self._checkpoints.directory} "
                f"within {self._timeout:g} seconds, and the last step, "
                f"{self._last_step}, has none. Check that training is running."
            )
        return min(self._poll_seconds, remaining)

    def _check_newest(self) -> None:
        """Raises `CheckpointError` if the configuration differs."""
        for step in self._checkpoints.steps()[-1:]:
            # `run` skips damaged checkpoints.
            with contextlib.suppress(DamagedCheckpointError):
                self._checkpoints.check(
                    step, self._trainer.model, self._trainer.optimizer
                )

    def _evaluate(
        self, step: int, on_summary: Callable[[Summary], Any], stop: StopRequest
    ) -> bool:
        """Evaluates a checkpoint; returns False if it cannot be read yet."""
        try:
            self._trainer.restore_step(self._checkpoints, step)
            summary = self._trainer.evaluate(
                self._last_step, checkpoints=self._checkpoints, stop=stop
            )
        except DamagedCheckpointError as error:
            # On an object store it may still be incomplete.
            if step not in self._warned_steps:
                self._warned_steps.add(step)
                logging.warning(
                    "The checkpoint of step %d is damaged, not complete yet, "
                    "or was removed before it could be evaluated: %s",
                    step,
                    error,
                )
            return False
        on_summary(summary)
        return True
