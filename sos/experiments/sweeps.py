"""Sweeps: many runs of one config with different values."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from sos.errors import ReportedError, UsageError
from sos.experiments import config as config_lib
from sos.experiments.launchers import Launcher, LocalLauncher
from sos.experiments.progress import SweepProgress
from sos.experiments.run_files import read_config
from sos.experiments.runs import (
    Result,
    find_result,
    read_result,
    run_directory,
)
from sos.experiments.task import make_task
from sos.experiments.trunk import with_parent_directory
from sos.training import trainer
from sos.training.checkpoints import Checkpoints
from sos.training.signals import StopSource


class FailedRunsError(ReportedError):
    """Runs of a sweep failed; all others are finished.

    Attributes:
        failures: Error message by name of the run.
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        self.failures = dict(failures)
        super().__init__(
            f"{len(failures)} of the runs failed:"
            + "".join(f"\n  {name}: {text}" for name, text in failures.items())
        )


@dataclasses.dataclass(frozen=True)
class DiskUse:
    """Estimated disk use of the checkpoints of a sweep.

    Attributes:
        final_bytes: Bytes of the checkpoints that are kept.
        temporary_bytes: Maximum number of further bytes during training.
    """

    final_bytes: int
    temporary_bytes: int


def expand(
    config: Mapping[str, Any], overrides: Iterable[Mapping[str, Any]]
) -> list[ml_collections.ConfigDict]:
    """Makes the configs of a sweep.

    Args:
        config: The common config.
        overrides: For each run, the values that override those of the config,
            as nested mappings. A `sparsity` with a `technique` replaces the
            whole entry, because techniques have different hyperparameters.

    Returns:
        The resolved configs, in order.

    Raises:
        UsageError: If a config is invalid, two runs are the same, or there is
            no run.

    Example:
    >>> import sos.experiments
    >>> configs = sos.experiments.expand(
    ...     {"task": "models.fashion_mnist:FashionMnist"},
    ...     [{"seed": 0}, {"seed": 1, "learning_rate": {"base": 0.1}}],
    ... )
    >>> [(config.seed, config.learning_rate.base) for config in configs]
    [(0, 0.01), (1, 0.1)]
    """
    configs = {}
    for values in overrides:
        merged = _override(config_lib.plain(config), config_lib.plain(values))
        resolved = config_lib.resolve(merged)
        name = config_lib.run_name(resolved)
        if name in configs:
            raise UsageError(
                "The runs of a sweep must differ. Received: "
                f"{dict(values)} more than once"
            )
        configs[name] = resolved
    if not configs:
        raise UsageError("A sweep must have at least one run. Received: none")
    return list(configs.values())


def select(
    configs: Sequence[ml_collections.ConfigDict],
    pattern: str,
    workdir: str | os.PathLike,
) -> tuple[list[ml_collections.ConfigDict], list[ml_collections.ConfigDict]]:
    """Selects the runs whose names match a regular expression.

    Args:
        configs: Resolved configs.
        pattern: Searched for in `run_name(config)`.
        workdir: Directory of the runs.

    Returns:
        The runs that match, and those that do not match but must be trained
        before them: their unfinished parents.

    Raises:
        UsageError: If the expression is invalid or matches nothing.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            "The pattern that selects runs must be a regular expression "
            f"({error}). Received: {pattern!r}"
        ) from error
    by_name = {config_lib.run_name(config): config for config in configs}
    selected = {
        name: config
        for name, config in by_name.items()
        if expression.search(name)
    }
    if not selected:
        raise UsageError(
            f"The pattern {pattern!r} matches none of the {len(by_name)} runs "
            "of the sweep. Their names begin with "
            f"{', '.join(list(by_name)[:3])}"
        )
    needed: set[str] = set()
    for config in selected.values():
        while _needs_parent(config, workdir):
            parent = config_lib.parent_name(config)
            if parent not in by_name:
                break
            needed.add(parent)
            config = by_name[parent]
    parents = [
        by_name[name] for name in by_name if name in needed - {*selected}
    ]
    return list(selected.values()), parents


def estimate_disk_use(
    configs: Sequence[ml_collections.ConfigDict],
    workdir: str | os.PathLike,
    *,
    workers: int,
    keep_checkpoint_max: int = 5,
    save_checkpoints_steps: int = 1000,
) -> DiskUse:
    """Estimates the disk use of the runs that are not finished.

    Builds the model and the optimizer of every compile signature, so a config
    that does not fit the network raises an error before training begins.

    Args:
        configs: Resolved configs.
        workdir: Directory of the runs.
        workers: Number of runs that are trained at a time.
        keep_checkpoint_max: As in `sos.training.Options`.
        save_checkpoints_steps: As in `sos.training.Options`.

    Returns:
        The estimate.

    Raises:
        UsageError: If a config does not fit the network.
    """
    sizes: dict[str, int] = {}
    final_bytes, largest = 0, 0
    for config in configs:
        if _is_finished(config, workdir):
            continue
        task = make_task(_without_parent(config))
        signature = task.compile_signature()
        if signature not in sizes:
            sizes[signature] = Checkpoints.nbytes(*trainer.build(task))
        size = sizes[signature]
        begin = config_lib.first_step(config)
        ends = {begin, config.train_steps}
        steps = set(config.keep_steps)
        saves = 1 + -(-(config.train_steps - begin) // save_checkpoints_steps)
        saves += len(steps - ends)
        averaged = task.averaged_checkpoints
        keeps = {
            "all": saves,
            "trunk": min(saves, len(steps | ends) + averaged - 1),
            "none": len(steps),
        }[config.keep]
        final_bytes += keeps * size
        # A checkpoint is written before the oldest is removed.
        peak = min(saves, max(keep_checkpoint_max, averaged) + 2)
        largest = max(largest, max(0, peak - keeps) * size)
    return DiskUse(final_bytes=final_bytes, temporary_bytes=largest * workers)


def run_sweep(
    configs: Sequence[ml_collections.ConfigDict],
    workdir: str | os.PathLike,
    *,
    launcher: Launcher | None = None,
    progress: SweepProgress | None = None,
    stop: StopSource | None = None,
    **options: Any,
) -> list[Result]:
    """Trains all runs of a sweep that are not finished.

    Runs with a parent are trained after it.

    Several processes may train one sweep; they share the runs. The default
    launcher starts worker processes, which import the main module: call this
    function under `if __name__ == "__main__":`.

    Args:
        configs: Resolved configs, as from `expand`.
        workdir: Directory of the runs.
        launcher: Trains the runs. Default: worker processes on this machine.
        progress: Shows the progress. Default: nothing is shown.
        stop: Requests a stop; runs in progress are saved.
        **options: As for `sos.experiments.run`.

    Returns:
        The results, in the order of the configs.

    Raises:
        FailedRunsError: If runs failed. All others are finished.
        UsageError: If a run was started with another config, or the parent of a
            run is neither in the sweep nor finished.
        StorageError: If a file cannot be read or written.
        Stopped: If `stop` requested it. The same call continues.

    Example:
    >>> import sos.experiments
    >>> config = {
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ...     "train_steps": 2,
    ... }
    >>> configs = sos.experiments.expand(config, [{"seed": 0}])
    >>> results = sos.experiments.run_sweep(configs, "runs")
    >>> [result.step for result in results]
    [2]
    """
    launcher = launcher or LocalLauncher()
    progress = progress or SweepProgress(quiet=True)
    pending = []
    for config in configs:
        result = find_result(config, workdir)
        if result is None:
            pending.append(config)
        parent = None
        if config.parent is not None:
            parent = read_config(with_parent_directory(config, workdir).parent)
        progress.add(config, result, parent=parent)
    _check_parents(pending, workdir)
    with progress:
        failures = launcher.launch(
            _parents_first(pending),
            workdir,
            progress=progress,
            stop=stop,
            **options,
        )
    if failures:
        raise FailedRunsError(failures)
    return [read_result(run_directory(config, workdir)) for config in configs]


def _is_finished(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> bool:
    return read_result(run_directory(config, workdir)) is not None


def _needs_parent(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> bool:
    """Returns whether a run waits for a parent that is not finished."""
    if config.parent is None or _is_finished(config, workdir):
        return False
    return read_result(with_parent_directory(config, workdir).parent) is None


def _check_parents(
    pending: Sequence[ml_collections.ConfigDict], workdir: str | os.PathLike
) -> None:
    """Raises `UsageError` if a parent will not be there when it is needed."""
    trained = {config_lib.run_name(config) for config in pending}
    missing = dict.fromkeys(
        with_parent_directory(config, workdir).parent
        for config in pending
        if config_lib.parent_name(config) not in trained
        and _needs_parent(config, workdir)
    )
    if missing:
        raise UsageError(
            "The parent of a run must be in the sweep or finished. Add these "
            "runs to the sweep, train them before, or correct "
            f"`config.parent`: {', '.join(missing)}"
        )


def _parents_first(
    configs: Sequence[ml_collections.ConfigDict],
) -> list[ml_collections.ConfigDict]:
    """Returns the runs in order, but each one after its parent."""
    by_name = {config_lib.run_name(config): config for config in configs}
    ordered: dict[str, ml_collections.ConfigDict] = {}

    def add(name: str | None) -> None:
        if name in by_name and name not in ordered:
            add(config_lib.parent_name(by_name[name]))
            ordered[name] = by_name[name]

    for name in by_name:
        add(name)
    return list(ordered.values())


def _without_parent(
    config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
    """Returns the config of a run with the same variables and no parent."""
    values = {**config_lib.plain(config), "parent": None}
    values["branch"] = {"name": None}
    return config_lib.resolve(values)


def _override(
    config: dict[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    merged = _update(config, values)
    sparsity = values.get("sparsity")
    if isinstance(sparsity, Mapping) and "technique" in sparsity:
        merged["sparsity"] = dict(sparsity)
    return merged


def _update(
    config: dict[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    merged = dict(config)
    for name, value in values.items():
        old = config.get(name)
        both = isinstance(value, Mapping) and isinstance(old, dict)
        merged[name] = _update(old, value) if both else value
    return merged
