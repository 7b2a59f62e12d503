"""What a training binary does: train, eval, train_and_eval, export."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import tensorflow as tf
from absl import logging

from sos.errors import CheckpointError, ReportedError, Stopped
from sos.export import export_saved_model
from sos.files import only_process
from sos.training.checkpoints import (
    Checkpoints,
    check_writable,
    remove_unfinished,
)
from sos.training.continuous_evaluation import ContinuousEvaluation
from sos.training.reporting import Console, JsonLines, Summary, TensorBoard
from sos.training.signals import StopRequest, exit_code
from sos.training.strategies import gather, several_processes
from sos.training.trainer import Action, Trainer

#: The names that `run` takes.
MODES = ("train", "eval", "train_and_eval", "export")

_CHECKPOINTS = "checkpoints"

# What TensorFlow raises in a worker when another one is gone.
_LOST_WORKER = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnavailableError,
)
_ABORTED = "Collective ops is aborted by: "

_Report = Callable[[Summary], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a training binary runs; none of it changes what is computed.

    Attributes:
        mode: "train"; "eval", which follows the checkpoints in `workdir` as
            they appear and evaluates each; "train_and_eval"; or "export", which
            writes the newest checkpoint as a SavedModel. The second and the
            last are for one process.
        workdir: The directory of everything that is written.
        train_steps: The number of steps of the whole training.
        save_checkpoints_steps: The number of steps between two checkpoints; one
            is also saved before every evaluation.
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
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1. "
                    f"Received: {name}={value!r}"
                )
        if self.eval_timeout is not None and not self.eval_timeout >= 0:
            raise ValueError(
                "`eval_timeout` must not be negative. "
                f"Received: eval_timeout={self.eval_timeout}"
            )
        kept, saved = (
            self.keep_checkpoint_every_n_steps,
            self.save_checkpoints_steps,
        )
        if kept is not None and kept % saved:
            raise ValueError(
                "`keep_checkpoint_every_n_steps` must be a multiple of "
                "`save_checkpoints_steps`, so that there is one. Received: "
                f"{kept} and {saved}"
            )
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 < first < last <= self.train_steps:
                raise ValueError(
                    "`profile_steps` must be two of the training's "
                    f"{self.train_steps} steps, the first below the last. "
                    f"Received: {first},{last}"
                )


def run(settings: Options, make_trainer: Callable[[], Trainer]) -> int:
    """Does what the mode says, and tells on the standard error what is wrong.

    Args:
        settings: How to run.
        make_trainer: Makes the trainer; called when the work directory is known
            to be usable.

    Returns:
        The exit code of the process: 0 when it is done; 75 when SIGTERM stopped
        it, 130 when Ctrl-C did, after everything was saved: the same command
        continues; 1 after an error that one line tells. In a job of several
        workers the process ends here after an error, with the code 1.

    Raises:
        Exception: What is no error of usage, the disk or the numbers, but a
            mistake in the task, whose traceback is needed to find it.
    """
    trainer = None
    try:
        check_writable(settings.workdir)
        trainer = make_trainer()
        session = _Session(settings, trainer)
        if settings.mode == "export":
            # A signal ends it at once, and what was there stays.
            session.export()
        else:
            # Made later than the strategy, which may take signals for itself.
            with StopRequest() as stop:
                session.run(stop)
    except Stopped as stopped:
        _say(f"{stopped} Run the same command again to continue.")
        return exit_code(stopped.signal)
    except KeyboardInterrupt:
        began = "" if settings.mode == "export" else " before training began"
        _say(f"Stopped by SIGINT{began}.")
        # At once, as TensorFlow may be waiting for other workers.
        os._exit(exit_code(signal.SIGINT))
    except Exception as error:
        in_a_job = _in_a_job(trainer)
        if in_a_job and _worker_is_lost(error):
            told = (
                "A worker of this job is gone, or cannot be reached: "
                f"{_reason(error)}. Start all workers again to continue from "
                "the last checkpoint."
            )
        else:
            told = str(error) if isinstance(error, ReportedError) else None
        if told is not None:
            logging.debug("Where it went wrong:", exc_info=True)
            _say(f"FATAL {told}")
        elif in_a_job:
            traceback.print_exc()
        else:
            raise
        if in_a_job:
            # At once, as the runtime would wait for the other workers.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        return 1
    return 0


class _Session:
    """One run of a binary."""

    def __init__(self, settings: Options, trainer: Trainer) -> None:
        if settings.mode in ("eval", "export") and _in_a_job(trainer):
            raise ValueError(
                f"The mode {settings.mode} is for one process. Run it with "
                "--strategy=one_device or mirrored, and without TF_CONFIG."
            )
        evaluates = settings.mode in ("eval", "train_and_eval")
        if evaluates and trainer.task.eval_batches < 1:
            raise ValueError(
                f"The mode {settings.mode} needs evaluation data, and the task "
                "has none: its `eval_batches` is "
                f"{trainer.task.eval_batches}. Use --mode=train."
            )
        self._settings = settings
        self._trainer = trainer
        self._checkpoints = Checkpoints(
            os.path.join(settings.workdir, _CHECKPOINTS),
            configuration=trainer.configuration(),
            keep=settings.keep_checkpoint_max,
            keep_every=settings.keep_checkpoint_every_n_steps,
        )

    def run(self, stop: StopRequest) -> None:
        """Trains or evaluates, as the mode says."""
        mode, workdir = self._settings.mode, self._settings.workdir
        if mode == "eval":
            with only_process(workdir, "eval"):
                self._follow(stop)
        else:
            with contextlib.ExitStack() as stack:
                if self._trainer.is_chief:
                    stack.enter_context(only_process(workdir, "train"))
                self._train(stop, evaluate=mode == "train_and_eval")

    def _train(self, stop: StopRequest, evaluate: bool) -> None:
        settings, trainer = self._settings, self._trainer
        if trainer.is_chief:
            remove_unfinished(self._checkpoints.directory)
        step = trainer.restore(self._checkpoints) or 0
        if step and trainer.is_chief:
            _say(
                f"Training is done: there is a checkpoint of step {step:,}."
                if step >= settings.train_steps
                else f"Going on from the checkpoint of step {step:,}."
            )
        with (
            self._reporter("train", step) as report,
            self._profile(step) as actions,
        ):
            if evaluate:
                evaluation = Action(
                    call=lambda trainer: self._save_and_evaluate(report, stop),
                    every=settings.steps_per_eval,
                    at_end=True,
                )
                # Its process may have ended after a save and before the rest.
                missed = (
                    step > 0
                    and evaluation.due(step, settings.train_steps)
                    and step not in self._evaluated("train")
                )
                # Which the chief alone can tell.
                if gather(trainer.strategy, [missed]).all():
                    report(trainer.evaluate(settings.train_steps, stop=stop))
                actions.append(evaluation)
            trainer.train(
                settings.train_steps,
                checkpoints=self._checkpoints,
                save_every=settings.save_checkpoints_steps,
                actions=actions,
                on_summary=[report],
                stop=stop,
            )

    def _save_and_evaluate(self, report: _Report, stop: StopRequest) -> None:
        trainer = self._trainer
        # First, so that an evaluation that is asked to stop can just end.
        if trainer.saved_step != trainer.step:
            trainer.save(self._checkpoints)
        report(trainer.evaluate(self._settings.train_steps, stop=stop))

    def _follow(self, stop: StopRequest) -> None:
        """Evaluates every checkpoint once, also those still to come."""
        settings = self._settings
        follower = ContinuousEvaluation(
            self._trainer,
            self._checkpoints,
            last_step=settings.train_steps,
            timeout=settings.eval_timeout,
        )
        with self._reporter("eval") as report:
            # The reporter has made or repaired the file.
            done = self._evaluated("eval")
            if settings.train_steps in done:
                _say("The checkpoint of the last step is evaluated already.")
            follower.follow(done, on_summary=report, on_wait=_say, stop=stop)

    def _evaluated(self, kind: str) -> set[int]:
        """The steps that were evaluated; none where no log is written."""
        steps: set[int] = set()
        if self._trainer.is_chief:
            with tf.io.gfile.GFile(self._log(kind)) as file:
                records = [json.loads(line) for line in file]
            steps = {r["step"] for r in records if r["kind"] == "eval"}
        return steps

    def export(self) -> None:
        """Writes the newest checkpoint as a SavedModel."""
        with only_process(self._settings.workdir, "export"):
            self._export()

    def _export(self) -> None:
        trainer = self._trainer
        step = trainer.restore(self._checkpoints)
        if step is None:
            raise CheckpointError(
                "There is no checkpoint to export in "
                f"{self._checkpoints.directory}."
            )
        # TensorFlow Serving takes the number for the version.
        path = os.path.join(self._settings.workdir, "export", str(step))
        export_saved_model(trainer.model, path)
        print(f"Wrote {path}")

    def _log(self, kind: str) -> str:
        return os.path.join(self._settings.workdir, f"{kind}.jsonl")

    @contextlib.contextmanager
    def _reporter(
        self, kind: str, resume_step: int | None = None
    ) -> Iterator[_Report]:
        """What takes the records; in processes that write no files, nothing."""
        with contextlib.ExitStack() as stack:
            if not self._trainer.is_chief:
                yield lambda record: None
                return
            workdir = self._settings.workdir
            reporters = [
                Console(),
                JsonLines(self._log(kind), resume_step=resume_step),
                TensorBoard(workdir, resume_step=resume_step),
            ]
            for reporter in reporters:
                stack.callback(reporter.close)

            def report(record: Summary) -> None:
                try:
                    for reporter in reporters:
                        reporter(record)
                except (OSError, tf.errors.OpError) as error:
                    raise OSError(
                        f"The record of step {record.step} could not be "
                        f"written to {workdir}: {_reason(error)}. Make room, "
                        "and run the same command again."
                    ) from error

            yield report

    @contextlib.contextmanager
    def _profile(self, step: int) -> Iterator[list[Action]]:
        """The actions that take a profile, if one is wanted."""
        window = self._settings.profile_steps
        if window is None or step >= window[1]:
            yield []
            return
        # TensorFlow names profiles by the second at which they end.
        directory = os.path.join(
            self._settings.workdir,
            "profile",
            f"step-{max(step, window[0]):08d}",
        )
        with contextlib.ExitStack() as running:
            # On all workers, as loops end where an action is due.
            def start(trainer: Trainer) -> None:
                if not trainer.is_chief:
                    return
                tf.profiler.experimental.start(directory)
                running.callback(tf.profiler.experimental.stop)

            if step >= window[0]:
                start(self._trainer)
            yield [
                Action(call=start, at=(window[0],)),
                Action(call=lambda _: running.close(), at=(window[1],)),
            ]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _worker_is_lost(error: Exception) -> bool:
    # The last of them is also raised for what is wrong with data.
    return isinstance(error, _LOST_WORKER) and (
        not isinstance(error, tf.errors.FailedPreconditionError)
        or _ABORTED in error.message
    )


def _in_a_job(trainer: Trainer | None) -> bool:
    """Whether other processes take part; known before they have met, too."""
    if trainer is None:
        return bool(os.environ.get("TF_CONFIG"))
    return several_processes(trainer.strategy)


def _reason(error: BaseException) -> str:
    """The line of an error that says most."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if _ABORTED in line:
            return line.split(_ABORTED, 1)[1].rstrip(".")
    # Headings of what TensorFlow says of compiled functions end in a colon.
    lines = [line for line in lines if not line.endswith(":")]
    return lines[0].rstrip(".") if lines else type(error).__name__
