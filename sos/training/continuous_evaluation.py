"""Evaluates the checkpoints of a training in another process."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from sos.errors import CheckpointError, DamagedCheckpointError, Stopped
from sos.training.checkpoints import Checkpoints
from sos.training.reporting import Summary
from sos.training.signals import StopRequest
from sos.training.trainer import Trainer

_POLL_SECONDS = 5.0


class ContinuousEvaluation:
    """Evaluates every checkpoint of a directory once, as they appear.

    Args:
        trainer: Evaluates; what it holds is replaced by each checkpoint.
        checkpoints: Those of the training.
        last_step: The step whose checkpoint is the last one.
        timeout: The number of seconds without a new checkpoint after which to
            give up; None to wait for ever.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        *,
        last_step: int,
        timeout: float | None = None,
    ) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._last_step = last_step
        self._timeout = timeout
        # Steps that the user was told of.
        self._passed_over: set[int] = set()

    def follow(
        self,
        done: set[int],
        *,
        on_summary: Callable[[Summary], Any],
        on_wait: Callable[[str], Any],
        stop: StopRequest,
    ) -> None:
        """Evaluates until the last checkpoint is evaluated.

        Args:
            done: The steps that were evaluated before; new ones are added.
            on_summary: Called with the record of each evaluation.
            on_wait: Called with a text when there is nothing to evaluate for
                the first time.
            stop: Tells when to stop before the end.

        Raises:
            CheckpointError: If the checkpoints are of another configuration, or
                none came for too long.
            Stopped: If it was asked to stop.
        """
        self._check_newest()
        waiting_since, told = time.monotonic(), False
        while True:
            for step in self._checkpoints.steps():
                if step in done or not self._evaluate(step, on_summary, stop):
                    continue
                waiting_since = time.monotonic()
                done.add(step)
                if stop.requested and self._last_step not in done:
                    raise Stopped(stop.requested, step, "evaluated")
            if self._last_step in done:
                return
            if not told:
                on_wait(
                    f"Waiting for checkpoints in {self._checkpoints.directory} "
                    f"up to step {self._last_step:,}."
                )
                told = True
            if stop.wait(self._seconds_to_wait(waiting_since)):
                raise Stopped(
                    stop.requested,
                    max(done, default=0),
                    "while waiting for the next checkpoint",
                )

    def _seconds_to_wait(self, since: float) -> float:
        if self._timeout is None:
            return _POLL_SECONDS
        left = since + self._timeout - time.monotonic()
        if left <= 0:
            raise CheckpointError(
                f"No new checkpoint in {self._checkpoints.directory} for "
                f"{self._timeout:g} seconds, and none of the last step, "
                f"{self._last_step}. Is the training running?"
            )
        return min(_POLL_SECONDS, left)

    def _check_newest(self) -> None:
        """Refuses checkpoints of something else, evaluated or not."""
        for step in self._checkpoints.steps()[-1:]:
            # What is damaged is passed over later.
            with contextlib.suppress(DamagedCheckpointError):
                self._checkpoints.check(
                    step, self._trainer.model, self._trainer.optimizer
                )

    def _evaluate(
        self, step: int, on_summary: Callable[[Summary], Any], stop: StopRequest
    ) -> bool:
        """Evaluates a checkpoint; False if it cannot be read, or not yet."""
        trainer = self._trainer
        try:
            self._checkpoints.restore_step(
                step, trainer.model, trainer.optimizer
            )
        except DamagedCheckpointError as error:
            # On an object store it may still be on its way.
            if step not in self._passed_over:
                self._passed_over.add(step)
                logging.warning(
                    "The checkpoint of step %d is damaged, not complete yet, "
                    "or was removed before it could be evaluated: %s",
                    step,
                    error,
                )
            return False
        on_summary(trainer.evaluate(self._last_step, stop=stop))
        return True
