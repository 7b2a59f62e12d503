"""One run: a resolved config and a directory."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from sos.errors import (
    CheckpointError,
    DirectoryInUseError,
    StorageError,
    UsageError,
)
from sos.experiments import config as config_lib
from sos.experiments.task import make_task
from sos.files import check_writable, lock_directory, write_text
from sos.report import SparsityReport, sparsity_report
from sos.training import main
from sos.training.checkpoints import Checkpoints
from sos.training.reporting import Summary
from sos.training.signals import StopRequest, StopSource
from sos.training.strategies import make_strategy, several_processes
from sos.training.trainer import Trainer
from sos.version import __version__

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
RESULT = "result.json"

#: Makes the trainer of a resolved config.
MakeTrainer = Callable[[ml_collections.ConfigDict], Trainer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSparsity:
    """Sparsity of one weight of a trained network.

    Attributes:
        path: Path of the weight in the dense network.
        size: Number of elements.
        sparsity: Fraction of zeros in evaluation.
    """

    path: str
    size: int
    sparsity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a finished run, stored in `result.json`.

    Attributes:
        step: Number of optimizer steps.
        metrics: Metrics of the last evaluation by name; empty if the task has
            no evaluation data.
        sparsity: Fraction of zeros in the sparse weights, in evaluation; None
            for a dense model.
        model_sparsity: Fraction of zeros in all weights of the model.
        seconds: Total training time in seconds, including time before
            restarts, and tracing unless the run shared a compiled step.
        parameters: Number of elements of all trainable variables, including
            those that the technique adds.
        weights: All weights of rank 2 or more, in the order of the network.
        versions: Versions of the packages by name.

    Example:
    >>> import sos.experiments
    >>> config = {
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ...     "train_steps": 2,
    ... }
    >>> result = sos.experiments.run(config, "runs", quiet=True)
    >>> sorted(result.metrics)
    ['accuracy', 'loss']
    >>> result.weights[0].path, result.weights[0].size
    ('conv1/kernel', 144)
    """

    step: int
    metrics: Mapping[str, float]
    sparsity: float | None
    model_sparsity: float
    seconds: float
    parameters: int
    weights: tuple[WeightSparsity, ...]
    versions: Mapping[str, str]


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
    files for TensorBoard and, once the run is finished, `result.json`.

    Args:
        config: The config. Missing entries take their defaults; see
            `base_config`.
        workdir: Directory of several runs.
        mode: One of `sos.training.main.MODES`. The modes "train" and "eval", in
            two processes, together do what "train_and_eval" does. "export"
            exports the newest checkpoint for serving.
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
    with _dtype_policy(config.dtype_policy):
        # For initializers and layers without a seed.
        keras.utils.set_random_seed(config.seed)
        trainer = (make_trainer or _make_trainer)(config)
        if mode == "export":
            path = main.export(trainer, options)
            if not options.quiet:
                print(f"Wrote {path}", flush=True)
            return None
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
                _write_config(config, directory)
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
        _write_config(config, directory)
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
    """Returns the step at which a run would resume.

    Args:
        directory: Directory of the run.
    """
    steps = _checkpoints(directory).steps()
    return steps[-1] if steps else 0


def read_config(directory: str) -> dict[str, Any] | None:
    """Returns the stored config of a run; None if there is none.

    Args:
        directory: Directory of the run.

    Raises:
        StorageError: If the file is damaged or cannot be read.
    """
    config = _read_json(os.path.join(directory, CONFIG))
    if config is not None and not isinstance(config, dict):
        raise _damaged_file_error(
            os.path.join(directory, CONFIG), "not a mapping"
        )
    return config


def read_result(directory: str) -> Result | None:
    """Returns the result of a run; None if it is not finished.

    Args:
        directory: Directory of the run.

    Raises:
        StorageError: If the file is damaged or cannot be read.
    """
    path = os.path.join(directory, RESULT)
    content = _read_json(path)
    if content is None:
        return None
    try:
        weights = tuple(WeightSparsity(**w) for w in content.pop("weights"))
        result = Result(**content, weights=weights)
        _check_result(result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_file_error(
            path, f"{type(error).__name__}: {error}"
        ) from error
    return result


def _check_result(result: Result) -> None:
    """Raises `ValueError` if a value is not a number."""
    numbers = {
        "step": result.step,
        "model_sparsity": result.model_sparsity,
        "seconds": result.seconds,
        "parameters": result.parameters,
        **result.metrics,
        **{weight.path: weight.sparsity for weight in result.weights},
    }
    if result.sparsity is not None:
        numbers["sparsity"] = result.sparsity
    for name, value in numbers.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}")


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


def _write_config(config: ml_collections.ConfigDict, directory: str) -> None:
    values = config_lib.plain(config)
    if read_config(directory) != values:
        write_text(os.path.join(directory, CONFIG), _to_json(values))


def _checkpoints_to_keep(
    config: ml_collections.ConfigDict, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options with those for `config.keep`."""
    options = dict(options)
    if config.keep != "none":
        steps = options.get("keep_checkpoint_steps", ())
        options["keep_checkpoint_steps"] = (0, *steps)
    if config.keep == "all":
        options["keep_checkpoint_max"] = sys.maxsize
    return options


def _train(
    trainer: Trainer,
    config: ml_collections.ConfigDict,
    options: main.Options,
    stop: StopSource,
    on_summary: Sequence[Callable[[Summary], Any]],
) -> Result | None:
    """Trains a run; writes the result unless another process evaluates."""
    directory = options.workdir
    summary = main.train(trainer, options, stop=stop, on_summary=on_summary)
    if summary is None and trainer.task.has_evaluation:
        result = read_result(directory)
        if result is not None and trainer.is_chief:
            _remove_checkpoints(config, directory)
        return result
    result = _make_result(trainer, config, summary, trainer.seconds)
    if trainer.is_chief:
        # Before the result, because a finished run removes none. A run that is
        # killed in between needs the last one.
        _remove_checkpoints(config, directory, except_step=config.train_steps)
        _write_result(result, directory)
        _remove_checkpoints(config, directory)
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
    _write_result(result, directory)
    # If the training process has not ended, it removes them.
    with (
        contextlib.suppress(CheckpointError, DirectoryInUseError),
        lock_directory(directory, "run"),
    ):
        _remove_checkpoints(config, directory)
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
    return Result(
        step=trainer.step,
        metrics={} if summary is None else dict(summary.metrics),
        sparsity=None if dense else report.sparsity,
        model_sparsity=report.model_sparsity,
        seconds=seconds,
        parameters=sum(
            int(np.prod(v.shape)) for v in trainer.model.trainable_variables
        ),
        weights=_weight_sparsities(report),
        versions={
            "sos": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
    )


def _write_result(result: Result, directory: str) -> None:
    write_text(
        os.path.join(directory, RESULT), _to_json(dataclasses.asdict(result))
    )


def _remove_checkpoints(
    config: ml_collections.ConfigDict,
    directory: str,
    *,
    except_step: int | None = None,
) -> None:
    """Removes the checkpoints that `config.keep` does not keep."""
    if config.keep == "all":
        return
    kept = {0, config.train_steps} if config.keep == "trunk" else set()
    checkpoints = _checkpoints(directory)
    for step in checkpoints.steps():
        if step not in kept and step != except_step:
            checkpoints.remove(step)


def _weight_sparsities(report: SparsityReport) -> tuple[WeightSparsity, ...]:
    return tuple(
        WeightSparsity(
            path=row["weight"], size=row["size"], sparsity=row["sparsity"]
        )
        for row in report.rows
        if row["rank"] >= 2
    )


def _checkpoints(directory: str) -> Checkpoints:
    """Returns the checkpoints of a run, to list and remove them."""
    return Checkpoints(os.path.join(directory, CHECKPOINTS), configuration={})


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Sets the dtype policy of layers that are made in the scope."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _read_json(path: str) -> Any:
    """Returns the content of a JSON file; None if it does not exist."""
    try:
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path) as file:
            return json.loads(file.read())
    except ValueError as error:
        raise _damaged_file_error(path, str(error)) from error
    except (tf.errors.OpError, OSError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _damaged_file_error(path: str, reason: str) -> StorageError:
    return StorageError(
        f"{path} is damaged or not a file of a run ({reason}). Move the "
        "directory away to repeat the run."
    )


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
