"""What a training binary does: train, eval, train_and_eval, export."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from sos.export import export_saved_model
from sos.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    check_writable,
    remove_unfinished,
)
from sos.training.records import Record
from sos.training.reporting import Console, JsonLines, TensorBoard
from sos.training.signals import StopRequest, exit_code
from sos.training.strategies import several_processes
from sos.training.trainer import (
    Action,
    NonFiniteLossError,
    Stopped,
    Trainer,
)

#: The names that `run` takes.
MODES = ("train", "eval", "train_and_eval", "export")

_CHECKPOINTS = "checkpoints"
_POLL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a training binary runs; none of it changes what is computed.

    Attributes:
        mode: "train"; "eval", which follows the checkpoints in `workdir` as
            they appear and evaluates each; "train_and_eval"; or "export", which
            writes the newest checkpoint as a SavedModel.
        workdir: The directory of everything that is written.
        train_steps: The number of steps of the whole training.
        save_checkpoints_steps: The number of steps between two checkpoints.
        keep_checkpoint_max: The number of newest checkpoints that are kept.
        keep_checkpoint_every_n_steps: Keep for good those whose step is a
            multiple of it; None for none.
        steps_per_eval: In "train_and_eval", the number of steps between two
            evaluations; one follows the last step, too.
        eval_timeout: In "eval", the number of seconds without a new checkpoint
            after which to give up; None to wait for ever.
        profile_steps: The first and last step of a profile for TensorBoard;
            None for none.
    """

    mode: str
    workdir: str
    train_steps: int
    save_checkpoints_steps: int = 1000
    keep_checkpoint_max: int = 5
    keep_checkpoint_every_n_steps: int | None = None
    steps_per_eval: int = 1000
    eval_timeout: float | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"`mode` must be one of {', '.join(MODES)}. "
                f"Received: mode={self.mode!r}"
            )
        if not self.workdir:
            raise ValueError(
                "`workdir` must name a directory. Received: an empty text"
            )
        for name in ("train_steps", "save_checkpoints_steps", "steps_per_eval"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1. "
                    f"Received: {name}={getattr(self, name)}"
                )
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 < first < last <= self.train_steps:
                raise ValueError(
                    "`profile_steps` must be two steps of the training, the "
                    f"first below the last. Received: {first},{last}"
                )


def run(settings: Settings, make_trainer: Callable[[], Trainer]) -> int:
    """Does what the mode says, and tells on the standard error what is wrong.

    Args:
        settings: How to run.
        make_trainer: Makes the trainer; called when the work directory is known
            to be usable.

    Returns:
        The exit code of the process: 0 when it is done; 75 when SIGTERM stopped
        it, 130 when Ctrl-C did, after everything was saved: the same command
        continues; 1 after an error.
    """
    try:
        if settings.mode != "eval":
            check_writable(settings.workdir)
        trainer = make_trainer()
        session = _Session(settings, trainer)
        # Made later than the strategy, which may take signals for itself.
        with StopRequest() as stop:
            try:
                session.run(stop)
            except Stopped as stopped:
                _say(f"{stopped} Run the same command again to continue.")
                return exit_code(stopped.signal)
    except (
        CheckpointError,
        NonFiniteLossError,
        ValueError,
        RuntimeError,
        OSError,
    ) as error:
        _say(f"FATAL {error}")
        return 1
    except tf.errors.OpError as error:
        # Anything else that TensorFlow fails with is no news of another worker.
        if not several_processes(trainer.strategy):
            raise
        _say(
            "FATAL A worker of this job is gone, or cannot be reached: "
            f"{_first_line(error)}\nStart all workers again to continue from "
            "the last checkpoint."
        )
        # At once, as the runtime would wait for the other workers.
        sys.stderr.flush()
        os._exit(1)
    return 0


class _Session:
    """One run of a binary."""

    def __init__(self, settings: Settings, trainer: Trainer) -> None:
        self._settings = settings
        self._trainer = trainer
        self._checkpoints = Checkpoints(
            os.path.join(settings.workdir, _CHECKPOINTS),
            configuration=trainer.configuration(),
            keep=settings.keep_checkpoint_max,
            keep_every=settings.keep_checkpoint_every_n_steps,
        )

    def run(self, stop: StopRequest) -> None:
        mode = self._settings.mode
        if mode == "eval":
            self._evaluate_all(stop)
        elif mode == "export":
            self._export()
        else:
            self._train(stop, evaluate=mode == "train_and_eval")

    def _train(self, stop: StopRequest, evaluate: bool) -> None:
        settings, trainer = self._settings, self._trainer
        if trainer.is_chief:
            remove_unfinished(self._checkpoints.directory)
        step = trainer.restore(self._checkpoints) or 0
        if step and trainer.is_chief:
            _say(f"Going on from the checkpoint of step {step:,}.")
        with self._reporters("train", step) as reporters:

            def evaluate_now(trainer: Trainer) -> None:
                _report(reporters, trainer.evaluate(settings.train_steps))

            actions = list(self._profile())
            if evaluate:
                actions.append(
                    Action(
                        call=evaluate_now,
                        every=settings.steps_per_eval,
                        at_end=True,
                    )
                )
            trainer.train(
                settings.train_steps,
                checkpoints=self._checkpoints,
                save_every=settings.save_checkpoints_steps,
                actions=actions,
                on_record=reporters,
                stop=stop,
            )

    def _evaluate_all(self, stop: StopRequest) -> None:
        """Evaluates every checkpoint once, also those still to come."""
        settings = self._settings
        waited, said = 0.0, False
        with self._reporters("eval") as reporters:
            # The reporter has made or repaired the file.
            done = self._evaluated()
            while True:
                new = [s for s in self._checkpoints.steps() if s not in done]
                for step in new:
                    self._evaluate_one(step, reporters)
                    done.add(step)
                    if stop.requested:
                        raise Stopped(stop.requested, step, saved=True)
                if settings.train_steps in done:
                    return
                waited = 0.0 if new else waited + _POLL_SECONDS
                timeout = settings.eval_timeout
                if timeout is not None and waited > timeout:
                    raise CheckpointError(
                        f"No new checkpoint in {self._checkpoints.directory} "
                        f"for {timeout:g} seconds, and none of the last step, "
                        f"{settings.train_steps}. Is the training running?"
                    )
                if not said:
                    _say(
                        f"Waiting for checkpoints in "
                        f"{self._checkpoints.directory} up to step "
                        f"{settings.train_steps:,}."
                    )
                    said = True
                if stop.wait(_POLL_SECONDS):
                    raise Stopped(
                        stop.requested, max(done, default=0), saved=True
                    )

    def _evaluate_one(
        self, step: int, reporters: Sequence[Callable[[Record], Any]]
    ) -> None:
        trainer = self._trainer
        try:
            self._checkpoints.restore_step(
                step, trainer.model, trainer.optimizer
            )
        except CheckpointError as error:
            if step in self._checkpoints.steps():
                raise
            logging.warning(
                "The checkpoint of step %d was removed before it could be "
                "evaluated; keep more of them (--keep_checkpoint_max). (%s)",
                step,
                error,
            )
            return
        _report(reporters, trainer.evaluate(self._settings.train_steps))

    def _evaluated(self) -> set[int]:
        """The steps that an earlier process has evaluated."""
        with tf.io.gfile.GFile(self._log("eval")) as file:
            return {json.loads(line)["step"] for line in file}

    def _export(self) -> None:
        trainer = self._trainer
        step = trainer.restore(self._checkpoints)
        if step is None:
            raise CheckpointError(
                "There is no checkpoint to export in "
                f"{self._checkpoints.directory}."
            )
        path = os.path.join(
            self._settings.workdir, "export", f"step-{step:08d}"
        )
        export_saved_model(trainer.model, path)
        print(f"Wrote {path}")

    def _log(self, kind: str) -> str:
        return os.path.join(self._settings.workdir, f"{kind}.jsonl")

    @contextlib.contextmanager
    def _reporters(
        self, kind: str, resume_step: int | None = None
    ) -> Iterator[list[Callable[[Record], Any]]]:
        """What takes the records; nothing in processes that write no files."""
        with contextlib.ExitStack() as stack:
            if not self._trainer.is_chief:
                yield []
                return
            reporters = [
                Console(),
                JsonLines(self._log(kind), resume_step=resume_step),
                TensorBoard(self._settings.workdir, resume_step=resume_step),
            ]
            for reporter in reporters:
                stack.callback(reporter.close)
            yield reporters

    def _profile(self) -> Iterator[Action]:
        window = self._settings.profile_steps
        if window is None or not self._trainer.is_chief:
            return
        directory = os.path.join(self._settings.workdir, "profile")
        yield Action(
            call=lambda _: tf.profiler.experimental.start(directory),
            at=(window[0],),
        )
        yield Action(
            call=lambda _: tf.profiler.experimental.stop(), at=(window[1],)
        )


def _report(
    reporters: Sequence[Callable[[Record], Any]], record: Record
) -> None:
    for reporter in reporters:
        reporter(record)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
