"""Modes of a training program: train, eval, train_and_eval, export."""

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

import tensorflow as tf
from absl import logging

from sos.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ReportedError,
    Stopped,
    UsageError,
)
from sos.files import check_writable, lock_directory, storage_errors
from sos.training.checkpoints import (
    CHECKPOINTS,
    Checkpoints,
    remove_unfinished,
)
from sos.training.continuous_evaluation import ContinuousEvaluation
from sos.training.reporting import (
    Console,
    JsonLines,
    Summary,
    TensorBoard,
    read_summaries,
)
from sos.training.signals import (
    EXIT_RESTART,
    StopRequest,
    StopSource,
    exit_code,
)
from sos.training.strategies import (
    gather,
    lost_worker_errors,
    several_processes,
    several_workers,
)
from sos.training.trainer import Action, Trainer

#: The values of `Options.mode`.
MODES = ("train", "eval", "train_and_eval", "export")

_OnSummary = Callable[[Summary], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a training program. None of them changes the result.

    Attributes:
        mode: "train"; "eval": evaluate every checkpoint in `workdir` as it
            appears; "train_and_eval"; or "export": export the newest
            checkpoint, or the mean of several, for serving. "eval" and "export"
            run in one process.
        workdir: Directory of all output files.
        train_steps: Total number of optimizer steps.
        save_checkpoints_steps: Steps between two checkpoints. Another one is
            saved before every evaluation and after the last step.
        keep_checkpoint_max: Number of newest checkpoints that are kept.
        keep_checkpoint_every_n_steps: Checkpoints whose step is a multiple of
            this number are kept as well; None to keep no others.
        keep_checkpoint_steps: Steps at which a checkpoint is saved and kept.
            That of the first step, 0 unless `Task.initialize` sets another one,
            holds the initial weights.
        steps_per_eval: Steps between two evaluations in "train_and_eval". The
            last step is always evaluated; None to evaluate only that.
        eval_timeout: Seconds that "eval" waits for a new checkpoint; None to
            wait forever.
        profile_steps: First and last step of a profile for TensorBoard; None
            for no profile.
        quiet: Whether to hide summaries, progress bar and messages. Errors are
            always printed.

    Raises:
        UsageError: If a value is invalid.

    Example:
    >>> import sos.training
    >>> options = sos.training.Options(workdir="run", train_steps=1000)
    >>> options.mode, options.save_checkpoints_steps
    ('train_and_eval', 1000)
    """

    mode: str = "train_and_eval"
    workdir: str
    train_steps: int
    save_checkpoints_steps: int = 1000
    keep_checkpoint_max: int = 5
    keep_checkpoint_every_n_steps: int | None = None
    keep_checkpoint_steps: Collection[int] = ()
    steps_per_eval: int | None = None
    eval_timeout: float | None = None
    profile_steps: tuple[int, int] | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                f"`mode` must be one of {', '.join(MODES)}. "
                f"Received: mode={self.mode!r}"
            )
        if not self.workdir:
            raise UsageError(
                "`workdir` must be a directory. "
                f"Received: workdir={self.workdir!r}"
            )
        optional = ("keep_checkpoint_every_n_steps", "steps_per_eval")
        for name in (
            "train_steps",
            "save_checkpoints_steps",
            "keep_checkpoint_max",
            *optional,
        ):
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise UsageError(
                    f"`{name}` must be an integer of at least 1. "
                    f"Received: {name}={value!r}"
                )
        if self.eval_timeout is not None and not self.eval_timeout >= 0:
            raise UsageError(
                "`eval_timeout` must not be negative. "
                f"Received: eval_timeout={self.eval_timeout}"
            )
        every, saved = (
            self.keep_checkpoint_every_n_steps,
            self.save_checkpoints_steps,
        )
        if every is not None and every % saved:
            raise UsageError(
                "`keep_checkpoint_every_n_steps` must be a multiple of "
                "`save_checkpoints_steps`. Received: "
                f"keep_checkpoint_every_n_steps={every}, "
                f"save_checkpoints_steps={saved}"
            )
        steps = sorted(self.keep_checkpoint_steps)
        if steps and not 0 <= steps[0] <= steps[-1] <= self.train_steps:
            raise UsageError(
                "`keep_checkpoint_steps` must be steps from 0 to `train_steps`="
                f"{self.train_steps}. Received: keep_checkpoint_steps={steps}"
            )
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 < first < last <= self.train_steps:
                raise UsageError(
                    "`profile_steps` must be two steps from 1 to `train_steps`="
                    f"{self.train_steps}, the first one smaller. "
                    f"Received: profile_steps={first},{last}"
                )


def run(options: Options, make_trainer: Callable[[], Trainer]) -> int:
    """Runs the selected mode; prints errors to stderr.

    Args:
        options: Options.
        make_trainer: Returns the trainer; called if the work directory is
            writable.

    Returns:
        The exit code, as from `exit_code_of`. Pass it to `end_process`.

    Example:
    With the task `Line` of the example of `Task`:
    >>> import sos.training
    >>> def make_trainer():
    ...     strategy = sos.training.make_strategy("one_device")
    ...     return sos.training.Trainer(Line(), strategy=strategy)
    >>> options = sos.training.Options(
    ...     workdir="line", train_steps=2, quiet=True
    ... )
    >>> sos.training.run(options, make_trainer)
    0
    """

    def call() -> None:
        check_writable(options.workdir)
        trainer = make_trainer()
        if options.mode == "export":
            # A signal ends the process at once. An earlier export is unchanged.
            path = export(trainer, options)
            if not options.quiet:
                print(f"Wrote {path}", flush=True)
            return
        # After creating the strategy, which may install signal handlers.
        with StopRequest() as stop:
            if options.mode == "eval":
                evaluate_continuously(trainer, options, stop=stop)
            else:
                train(trainer, options, stop=stop)

    return exit_code_of(call, several_workers=several_workers())


def train(
    trainer: Trainer,
    options: Options,
    *,
    stop: StopSource | None = None,
    on_summary: Sequence[_OnSummary] = (),
) -> Summary | None:
    """Trains from the newest checkpoint in `workdir` to the last step.

    Writes checkpoints, `train.jsonl` and event files for TensorBoard.

    Args:
        trainer: The trainer.
        options: Options. The mode "train" evaluates nothing.
        stop: Requests a stop before the end.
        on_summary: Called with every summary of training and evaluation, in
            every process.

    Returns:
        The summary of the evaluation of the last step, even if an earlier
        process evaluated it; None in the mode "train".

    Raises:
        UsageError: If the mode evaluates, and the task has no evaluation data.
        StorageError: If a file cannot be written, or another process trains in
            the work directory.
        CheckpointError: If a checkpoint cannot be saved, the newest one is of
            another configuration, or all are damaged.
        NonFiniteLossError: If the loss, a penalty or a weight is not finite.
        Stopped: If `stop` requested it. All completed steps are saved.
    """
    evaluates = options.mode != "train"
    if evaluates:
        _check_evaluation(trainer, options.mode)
    check_writable(options.workdir)
    checkpoints = _checkpoints(trainer, options)
    evaluations = []
    with contextlib.ExitStack() as stack:
        if trainer.is_chief:
            stack.enter_context(lock_directory(options.workdir, "train"))
            remove_unfinished(checkpoints.directory)
        step = _restore_or_initialize(trainer, checkpoints, options)
        report = stack.enter_context(
            _reporting(trainer, options, "train", on_summary, resume_step=step)
        )

        def evaluate(trainer: Trainer) -> None:
            # Saved first, so that a stop can simply end the evaluation.
            _save(trainer, checkpoints)
            summary = trainer.evaluate(
                options.train_steps, checkpoints=checkpoints, stop=stop
            )
            report(summary)
            evaluations.append(summary)

        actions = stack.enter_context(_profiling(trainer, options, step))
        actions.append(
            Action(
                call=lambda trainer: _save(trainer, checkpoints),
                at=tuple(options.keep_checkpoint_steps),
            )
        )
        if evaluates:
            evaluation = Action(
                call=evaluate, every=options.steps_per_eval, at_end=True
            )
            # An earlier process may have ended between a save and its
            # evaluation. Only the chief has the log.
            missed = (
                trainer.is_chief
                and step > 0
                and evaluation.due(step, options.train_steps)
                and _evaluation(options, "train", step) is None
            )
            if gather(trainer.strategy, [missed]).any():
                evaluate(trainer)
            actions.append(evaluation)
        trainer.train(
            options.train_steps,
            checkpoints=checkpoints,
            save_every=options.save_checkpoints_steps,
            actions=actions,
            on_summary=[report],
            stop=stop,
        )
    if not evaluates:
        return None
    if evaluations and evaluations[-1].step == options.train_steps:
        return evaluations[-1]
    return _evaluation(options, "train", options.train_steps)


def evaluate_continuously(
    trainer: Trainer,
    options: Options,
    *,
    stop: StopRequest | None = None,
    on_summary: Sequence[_OnSummary] = (),
) -> Summary | None:
    """Evaluates every checkpoint in the work directory as it appears.

    Ends after the checkpoint of the last step. The trainer then holds that
    checkpoint, unless it was removed or damaged in the meantime. Writes
    `eval.jsonl` and event files for TensorBoard.

    Args:
        trainer: The trainer, in a single process.
        options: Options.
        stop: Requests a stop before the end.
        on_summary: Called with every summary.

    Returns:
        The summary of the evaluation of the last step, even if an earlier
        process evaluated it.

    Raises:
        UsageError: If the task has no evaluation data, or there are several
            processes.
        StorageError: If a file cannot be written, or another process evaluates
            in the work directory.
        CheckpointError: If the checkpoints are of another configuration, or no
            new one appeared within `eval_timeout`.
        Stopped: If `stop` requested it.
    """
    _check_one_process(trainer, "eval")
    _check_evaluation(trainer, "eval")
    check_writable(options.workdir)
    checkpoints = _checkpoints(trainer, options)
    evaluation = ContinuousEvaluation(
        trainer,
        checkpoints,
        last_step=options.train_steps,
        timeout=options.eval_timeout,
    )
    with (
        lock_directory(options.workdir, "eval"),
        _reporting(trainer, options, "eval", on_summary) as report,
    ):
        evaluated = {summary.step for summary in _summaries(options, "eval")}
        if options.train_steps in evaluated:
            _print_message(
                options,
                "The checkpoint of the last step is already evaluated.",
            )
        evaluation.run(
            evaluated,
            on_summary=report,
            on_wait=lambda message: _print_message(options, message),
            stop=stop,
        )
        if trainer.step != options.train_steps:
            # An earlier process evaluated it.
            with contextlib.suppress(DamagedCheckpointError):
                trainer.restore_step(checkpoints, options.train_steps)
        return _evaluation(options, "eval", options.train_steps)


def export(trainer: Trainer, options: Options) -> str:
    """Exports the newest checkpoint in the work directory for serving.

    If the task averages checkpoints, it has their mean; see
    `Task.averaged_weights`.

    Args:
        trainer: The trainer, in a single process.
        options: Options.

    Returns:
        The path of the export, `WORKDIR/export/STEP`.

    Raises:
        UsageError: If there are several processes.
        StorageError: If the export cannot be written, or another process
            exports from the work directory.
        CheckpointError: If there is no checkpoint, it is of another
            configuration, or one to be averaged cannot be read.
    """
    _check_one_process(trainer, "export")
    with lock_directory(options.workdir, "export"):
        checkpoints = _checkpoints(trainer, options)
        step = trainer.restore(checkpoints)
        if step is None:
            raise CheckpointError(
                f"There is no checkpoint to export in {checkpoints.directory}. "
                "Train first, or choose another work directory."
            )
        # TensorFlow Serving uses the number as the version.
        path = os.path.join(options.workdir, "export", str(step))
        trainer.export(path, checkpoints)
        return path


def exit_code_of(
    call: Callable[[], Any], *, several_workers: bool = False
) -> int:
    """Runs a function; prints errors and converts them to exit codes.

    Args:
        call: The function. It may return an exit code.
        several_workers: Whether the process is one of several workers; see
            `sos.training.strategies.several_workers`.

    Returns:
        0 after success; 1 after a `ReportedError` or, with several workers, any
        error; 75 after SIGTERM and 130 after Ctrl-C: everything is saved, and
        the same command continues.

    Raises:
        Exception: Any other exception, which is a bug: its traceback is needed.
            With several workers the traceback is printed instead.

    Example:
    >>> import sos.training
    >>> sos.training.exit_code_of(lambda: print("trained"))
    trained
    0
    """
    errors = (
        lost_worker_errors() if several_workers else contextlib.nullcontext()
    )
    try:
        with errors:
            code = call()
    except Stopped as stopped:
        _print_error(f"{stopped} Run the same command again to continue.")
        return exit_code(stopped.signal)
    except KeyboardInterrupt:
        # Outside of training no `StopRequest` handles signals.
        _print_error("Stopped by SIGINT.")
        return exit_code(signal.SIGINT)
    except ReportedError as error:
        logging.debug("The error was raised here:", exc_info=True)
        _print_error(f"FATAL {error}")
        return 1
    except Exception:
        if not several_workers:
            raise
        # Raising would end in `sys.exit`; see `end_process`.
        traceback.print_exc()
        return 1
    return code if type(code) is int else 0


def end_process(code: int) -> NoReturn:
    """Ends the process with an exit code.

    After an error with several workers it ends at once: during a normal exit
    TensorFlow's runtime would wait for the other workers, which wait for this
    one.

    Args:
        code: The exit code.

    Raises:
        SystemExit: Unless it ends at once.

    Example:
    >>> import sos.training
    >>> sos.training.end_process(75)
    Traceback (most recent call last):
    SystemExit: 75
    """
    if several_workers() and code not in (0, EXIT_RESTART):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _check_evaluation(trainer: Trainer, mode: str) -> None:
    if not trainer.task.has_evaluation:
        raise UsageError(
            f"The mode {mode} needs evaluation data, and the task "
            f"{type(trainer.task).__name__} has none. Override its "
            "`eval_dataset`, or use the mode train."
        )


def _check_one_process(trainer: Trainer, mode: str) -> None:
    if several_processes(trainer.strategy):
        raise UsageError(
            f"The mode {mode} runs in one process. Run it with "
            "--strategy=one_device or mirrored, and without TF_CONFIG."
        )


def _checkpoints(trainer: Trainer, options: Options) -> Checkpoints:
    return Checkpoints(
        os.path.join(options.workdir, CHECKPOINTS),
        configuration=trainer.configuration(),
        keep=options.keep_checkpoint_max,
        keep_every=options.keep_checkpoint_every_n_steps,
        keep_steps=options.keep_checkpoint_steps,
    )


def _restore_or_initialize(
    trainer: Trainer, checkpoints: Checkpoints, options: Options
) -> int:
    """Returns the step at which training begins or resumes."""
    step = trainer.restore_or_initialize(checkpoints)
    if step is None:
        step = trainer.step
        if step in options.keep_checkpoint_steps:
            trainer.save(checkpoints)
        return step
    if trainer.is_chief and step > 0:
        _print_message(
            options,
            f"Training is complete: there is a checkpoint of step {step:,}."
            if step >= options.train_steps
            else f"Continuing from the checkpoint of step {step:,}.",
        )
    return step


def _save(trainer: Trainer, checkpoints: Checkpoints) -> None:
    if trainer.saved_step != trainer.step:
        trainer.save(checkpoints)


def _log(options: Options, kind: str) -> str:
    return os.path.join(options.workdir, f"{kind}.jsonl")


def _evaluation(options: Options, kind: str, step: int) -> Summary | None:
    """Returns the logged summary of the evaluation of a step."""
    summaries = [
        summary
        for summary in _summaries(options, kind)
        if summary.kind == "eval" and summary.step == step
    ]
    return summaries[-1] if summaries else None


def _summaries(options: Options, kind: str) -> list[Summary]:
    path = _log(options, kind)
    with storage_errors(f"{path} could not be read"):
        return read_summaries(path)


@contextlib.contextmanager
def _reporting(
    trainer: Trainer,
    options: Options,
    kind: str,
    on_summary: Sequence[_OnSummary],
    *,
    resume_step: int | None = None,
) -> Iterator[_OnSummary]:
    """Yields a function that reports a summary; only the chief writes it."""
    workdir = options.workdir
    with contextlib.ExitStack() as stack:
        reporters = []
        if trainer.is_chief:
            if not options.quiet:
                reporters.append(Console())
            with storage_errors(f"{_log(options, kind)} could not be opened"):
                reporters += [
                    JsonLines(_log(options, kind), resume_step=resume_step),
                    TensorBoard(workdir, resume_step=resume_step),
                ]
        for reporter in reporters:
            # After a disk error, closing raises again.
            stack.callback(
                storage_errors(f"The logs in {workdir} could not be closed")(
                    reporter.close
                )
            )

        def report(summary: Summary) -> None:
            with storage_errors(
                f"The summary of step {summary.step} could not be written to "
                f"{workdir}"
            ):
                for reporter in reporters:
                    reporter(summary)
            for call in on_summary:
                call(summary)

        yield report


@contextlib.contextmanager
def _profiling(
    trainer: Trainer, options: Options, step: int
) -> Iterator[list[Action]]:
    """Yields the actions that write the profile, if there is one."""
    window = options.profile_steps
    if window is None or step >= window[1]:
        yield []
        return
    # TensorFlow names profiles by the second at which they end.
    directory = os.path.join(
        options.workdir, "profile", f"step-{max(step, window[0]):08d}"
    )
    with contextlib.ExitStack() as profile:
        # All workers have the actions, because loops end where one is due.
        def start(trainer: Trainer) -> None:
            if trainer.is_chief:
                tf.profiler.experimental.start(directory)
                profile.callback(tf.profiler.experimental.stop)

        if step >= window[0]:
            start(trainer)
        yield [
            Action(call=start, at=(window[0],)),
            Action(call=lambda _: profile.close(), at=(window[1],)),
        ]


def _print_message(options: Options, message: str) -> None:
    if not options.quiet:
        print(message, file=sys.stderr, flush=True)


def _print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
