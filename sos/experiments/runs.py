"""One run: a resolved config and a directory."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from sos import keras_compat
from sos.errors import CheckpointError, DirectoryInUseError, UsageError
from sos.experiments import config as config_lib
from sos.experiments.machine import describe_machine
from sos.experiments.run_files import (
    RESULT,
    Result,
    WeightSparsity,
    read_config,
    read_result,
    write_config,
    write_result,
)
from sos.experiments.run_files import read_masks as read_masks
from sos.experiments.task import make_task
from sos.experiments.trunk import with_parent_directory
from sos.files import check_writable, lock_directory
from sos.model_masks import get_masks
from sos.report import SparsityReport, sparsity_report
from sos.training import main
from sos.training.checkpoints import CHECKPOINTS, Checkpoints
from sos.training.reporting import Summary
from sos.training.signals import StopRequest, StopSource
from sos.training.strategies import make_strategy, several_processes
from sos.training.trainer import Trainer
from sos.version import __version__

#: Makes the trainer of a resolved config.
MakeTrainer = Callable[[ml_collections.ConfigDict], Trainer]


def run(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    mode: str = "train_and_eval",
    make_trainer: MakeTrainer | None = None,
    on_summary: Sequence[Callable[[Summary], Any]] = (),
    stop: StopSource | None = None,
    **options: Any,
) -> Result | None:
    """Trains a run, resumes it, or returns the result if it is finished.

    The run has its own directory in `workdir`, named `run_name(config)`, with
    `config.json` (the complete config), `checkpoints/`, `train.jsonl`, event
    files for TensorBoard and, once the run is finished, `masks.npz` (unless the
    model is dense) and `result.json`; and what `ExperimentTask.write_files`
    writes.

    Args:
        config: The config. Missing entries take their defaults; see
            `base_config`.
        workdir: Directory of several runs.
        mode: One of `sos.training.main.MODES`. The modes "train" and "eval", in
            two processes, together do what "train_and_eval" does. "export"
            exports the newest checkpoint, or the mean of
            `ExperimentTask.averaged_checkpoints`, for serving.
        make_trainer: Makes the trainer of a resolved config. By default it uses
            the strategy of `sos.training.make_strategy()`.
        on_summary: Called with the summary of every loop and evaluation.
        stop: Requests a stop between two loops. By default SIGTERM and Ctrl-C
            do, if called in the main thread. In mode "eval" it must be a
            `StopRequest`.
        **options: Fields of `sos.training.Options`, such as
            `save_checkpoints_steps`. None of them changes the result.

    Returns:
        The result; None if the run is not finished, as in mode "train" of a
        task with evaluation data, and in mode "export".

    Raises:
        UsageError: If the config is invalid, or the run was started with
            another one.
        StorageError: If a file cannot be read or written, or another process
            trains this run.
        CheckpointError: If a checkpoint cannot be written, read or exported.
        NonFiniteLossError: If the loss is not finite.
        Stopped: If a stop was requested. The run is saved, and the same call
            resumes it.

    Example:
    >>> import sos.experiments
    >>> config = {
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ...     "train_steps": 2,
    ... }
    >>> result = sos.experiments.run(config, "runs", quiet=True)
    >>> result.step
    2
    """
    config = config_lib.resolve(config)
    directory = run_directory(config, workdir)
    options = main.Options(
        mode=mode,
        workdir=directory,
        train_steps=config.train_steps,
        **_checkpoints_to_keep(config, options),
    )
    result = find_result(config, workdir)
    trains = mode in ("train", "train_and_eval")
    # An evaluation would wait forever for a last checkpoint that was removed.
    no_work_left = trains or (
        mode == "eval" and last_step(directory) < config.train_steps
    )
    if result is not None and no_work_left:
        if not options.quiet:
            path = os.path.join(directory, RESULT)
            print(f"The run is finished: {path}", file=sys.stderr, flush=True)
        return result
    with (
        config_lib.dtype_policy(config.dtype_policy),
        # Paths of weights name masks, and random numbers depend on them.
        keras_compat.new_name_counts(),
    ):
        # For initializers and layers without a seed.
        keras.utils.set_random_seed(config.seed)
        named = with_parent_directory(config, workdir)
        if mode == "export":
            task_class = config_lib.load_task(config.task)
            named = task_class.with_files(named, directory)
        trainer = (make_trainer or _make_trainer)(named)
        if mode == "export":
            path = main.export(trainer, options)
            if not options.quiet:
                print(f"Wrote {path}", flush=True)
            return None
        trainer.task.prepare()
        options = _keep_averaged(options, trainer.task.averaged_checkpoints)
        with contextlib.ExitStack() as stack:
            if stop is None:
                # After creating the strategy, which may install signal
                # handlers.
                stop = stack.enter_context(StopRequest())
            if mode == "eval":
                return _evaluate(trainer, config, options, stop, on_summary)
            if trainer.is_chief:
                # Now: a config that does not fit the task leaves no directory.
                check_writable(directory)
                stack.enter_context(lock_directory(directory, "run"))
                if not several_processes(trainer.strategy):
                    # Another process may have finished it in the meantime.
                    result = read_result(directory)
                    if result is not None:
                        return result
                write_config(config_lib.plain(config), directory)
                trainer.task.write_files(directory)
            return _train(trainer, config, options, stop, on_summary)


def find_result(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> Result | None:
    """Returns the result of a config's run; None if it is not finished.

    Updates the label and new entries in the stored config of a finished run.

    Args:
        config: A resolved config.
        workdir: Directory of several runs.

    Raises:
        UsageError: If the run of this name was started with another config.
        StorageError: If a file is damaged, or cannot be read or written.
    """
    directory = run_directory(config, workdir)
    _check_config(config, directory)
    result = read_result(directory)
    if result is not None:
        write_config(config_lib.plain(config), directory)
    return result


def run_directory(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> str:
    """Returns the directory of a run.

    Args:
        config: A resolved config.
        workdir: Directory of several runs.

    Raises:
        UsageError: If `workdir` is empty.
    """
    workdir = os.path.expanduser(os.fspath(workdir))
    if not workdir:
        raise UsageError("`workdir` must be a directory. Received: workdir=''")
    return os.path.join(workdir, config_lib.run_name(config))


def last_step(directory: str) -> int:
    """Returns the step of the newest checkpoint of a run; 0 without one.

    Args:
        directory: Directory of the run.
    """
    steps = _checkpoints(directory).steps()
    return steps[-1] if steps else 0


def _make_trainer(config: ml_collections.ConfigDict) -> Trainer:
    strategy = make_strategy()
    with strategy.scope():
        task = make_task(config)
    return Trainer(
        task,
        strategy=strategy,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )


def _check_config(config: ml_collections.ConfigDict, directory: str) -> None:
    """Raises `UsageError` if a run was started with another config."""
    stored = read_config(directory)
    lines = [] if stored is None else config_lib.config_diff(stored, config)
    if lines:
        raise UsageError(
            f"The run in {directory} was started with another config. Use the "
            "same config and the same version of the task, or another work "
            "directory. Differences:" + "".join(f"\n  {line}" for line in lines)
        )


def _checkpoints_to_keep(
    config: ml_collections.ConfigDict, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options with those for `config.keep`."""
    options = dict(options)
    options["keep_checkpoint_steps"] = (
        *options.get("keep_checkpoint_steps", ()),
        *config.keep_steps,
        *([] if config.keep == "none" else [config_lib.first_step(config)]),
    )
    if config.keep == "all":
        options["keep_checkpoint_max"] = sys.maxsize
    return options


def _keep_averaged(options: main.Options, count: int) -> main.Options:
    """Returns the options, which keep at least the averaged checkpoints."""
    return dataclasses.replace(
        options,
        keep_checkpoint_max=max(options.keep_checkpoint_max, count),
    )


def _train(
    trainer: Trainer,
    config: ml_collections.ConfigDict,
    options: main.Options,
    stop: StopSource,
    on_summary: Sequence[Callable[[Summary], Any]],
) -> Result | None:
    """Trains a run; writes the result unless another process evaluates."""
    directory = options.workdir
    averaged = trainer.task.averaged_checkpoints
    summary = main.train(trainer, options, stop=stop, on_summary=on_summary)
    if summary is None and trainer.task.has_evaluation:
        result = read_result(directory)
        if result is not None and trainer.is_chief:
            _remove_checkpoints(config, directory, averaged)
        return result
    result = _make_result(trainer, config, summary, trainer.seconds)
    # On all workers, because reading variables may involve all of them.
    masks = get_masks(trainer.model)
    if trainer.is_chief:
        # Before the result, because a finished run removes none. A run that is
        # killed in between needs those that are scored.
        _remove_checkpoints(config, directory, averaged, finished=False)
        write_result(result, masks, directory)
        _remove_checkpoints(config, directory, averaged)
    return result


def _evaluate(
    trainer: Trainer,
    config: ml_collections.ConfigDict,
    options: main.Options,
    stop: StopRequest,
    on_summary: Sequence[Callable[[Summary], Any]],
) -> Result | None:
    """Evaluates a run that another process trains; writes the result."""
    directory = options.workdir
    summary = main.evaluate_continuously(
        trainer, options, stop=stop, on_summary=on_summary
    )
    checkpoints = Checkpoints(
        os.path.join(directory, CHECKPOINTS),
        configuration=trainer.configuration(),
    )
    if config.train_steps not in checkpoints.steps():
        return None
    # An earlier process may have evaluated it.
    metadata = checkpoints.restore_step(
        config.train_steps, trainer.model, trainer.optimizer
    )
    result = _make_result(trainer, config, summary, metadata["seconds"])
    write_result(result, get_masks(trainer.model), directory)
    # If the training process has not ended, it removes them.
    with (
        contextlib.suppress(CheckpointError, DirectoryInUseError),
        lock_directory(directory, "run"),
    ):
        _remove_checkpoints(
            config, directory, trainer.task.averaged_checkpoints
        )
    return result


def _make_result(
    trainer: Trainer,
    config: ml_collections.ConfigDict,
    summary: Summary | None,
    seconds: float,
) -> Result:
    """Returns the result of a run that is trained and evaluated."""
    # On all workers, because reading variables may involve all of them.
    report = sparsity_report(trainer.model)
    # Rules may name techniques as well.
    sparse = any(row["technique"] for row in report.rows)
    dense = config.sparsity.technique is None and not sparse
    totals = report.totals if _multiply_adds_known(report) else {}
    return Result(
        step=trainer.step,
        metrics={} if summary is None else dict(summary.metrics),
        texts={} if summary is None else dict(summary.texts),
        sparsity=None if dense else report.sparsity,
        model_sparsity=report.model_sparsity,
        seconds=seconds,
        parameters=sum(
            int(np.prod(v.shape)) for v in trainer.model.trainable_variables
        ),
        weights=_weight_sparsities(report, trainer.task.layer_kinds),
        versions={
            "sos": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
        multiply_adds=totals.get("sparse_multiply_adds"),
        dense_multiply_adds=totals.get("multiply_adds"),
        machine=describe_machine(trainer.strategy),
        score=trainer.task.score,
        ignored_entries=tuple(trainer.task.ignored_entries),
    )


def _remove_checkpoints(
    config: ml_collections.ConfigDict,
    directory: str,
    averaged: int,
    *,
    finished: bool = True,
) -> None:
    """Removes the checkpoints that `config.keep` does not keep.

    Args:
        config: A resolved config.
        directory: Directory of the run.
        averaged: Number of newest checkpoints whose mean is scored.
        finished: Whether the result is written. Until then, these are kept.
    """
    if config.keep == "all":
        return
    checkpoints = _checkpoints(directory)
    steps = checkpoints.steps()
    kept = set(config.keep_steps)
    if config.keep == "trunk":
        kept.add(config_lib.first_step(config))
    if config.keep == "trunk" or not finished:
        kept.update(steps[-averaged:])
    for step in steps:
        if step not in kept:
            checkpoints.remove(step)


def _weight_sparsities(
    report: SparsityReport, kinds: Sequence[tuple[str, str]]
) -> tuple[WeightSparsity, ...]:
    return tuple(
        WeightSparsity(
            path=row["weight"],
            size=row["size"],
            sparsity=row["sparsity"],
            kind=_kind(row["weight"], kinds),
        )
        for row in report.rows
        if row["rank"] >= 2
    )


def _kind(path: str, kinds: Sequence[tuple[str, str]]) -> str | None:
    """Returns the first kind whose expression occurs in a path."""
    for name, expression in kinds:
        if re.search(expression, path):
            return name
    return None


def _multiply_adds_known(report: SparsityReport) -> bool:
    return all(
        row["multiply_adds"] is not None
        for row in report.rows
        if row["rank"] >= 2 and row["reason"] != "bias"
    )


def _checkpoints(directory: str) -> Checkpoints:
    """Returns the checkpoints of a run, to list and remove them."""
    return Checkpoints(os.path.join(directory, CHECKPOINTS), configuration={})
