"""Reads the results of finished runs and writes them as a table."""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import tensorflow as tf

import sos
from sos.errors import StorageError
from sos.experiments import branch_registry
from sos.experiments import config as config_lib
from sos.experiments.run_files import Result, read_config, read_result
from sos.files import atomic_write, storage_errors

TABLE = "results.csv"
# Numbers of a result, besides metrics.
_MEASURED = (
    "sparsity",
    "achieved_sparsity",
    "model_sparsity",
    "seconds",
    "multiply_adds",
)
# First columns of every table. Other files are not replaced.
_FIRST_COLUMNS = ("name", "label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run, read from its directory.

    Attributes:
        name: Name of the directory.
        config: The complete config.
        result: The result.
        directory: Path of the directory.
        parent: The run that this one started from; None if it started from
            none, or that one is not finished in the same work directory.
    """

    name: str
    config: Mapping[str, Any]
    result: Result
    directory: str
    parent: "FinishedRun | None" = dataclasses.field(default=None, repr=False)

    @property
    def label(self) -> str:
        """Name in tables and figures, without seed and sparsity."""
        return config_lib.label(self.config)

    @property
    def technique(self) -> str | None:
        """Name of the technique; None for a dense network."""
        return self.config["sparsity"]["technique"]

    @property
    def branch(self) -> str | None:
        """Name of the branch; None for a run that starts from no other."""
        # Runs of older versions have no such entry.
        return self.config.get("branch", {}).get("name")

    @property
    def target_sparsity(self) -> float | None:
        """The sparsity that the technique had to reach.

        That of the parent for a branch, whose masks are the parent's. None if
        the technique has no required hyperparameter `sparsity`, as those with a
        penalty.
        """
        if self.parent is not None:
            return self.parent.target_sparsity
        sparsity = self.config["sparsity"]
        if "sparsity" not in config_lib.required_hyperparameters(sparsity):
            return None
        value = sparsity["sparsity"]
        # A technique may take another form of sparsity, such as "2:4".
        return value if isinstance(value, float | int) else None

    @property
    def point(self) -> tuple:
        """Key that is equal for runs that differ only in their seeds.

        The parents of such runs may differ in their seeds, too.
        """
        values = config_lib.flatten(self.config)
        ignored = (*config_lib.IGNORED_ENTRIES, *self.result.ignored_entries)
        for name in ("seed", *ignored):
            values.pop(name, None)
        if self.parent is not None:
            values["parent"] = self.parent.point
        # Without None: the default of entries that older runs lack.
        return (
            self.label,
            *(f"{k}={v}" for k, v in sorted(values.items()) if v is not None),
        )

    @property
    def hyperparameters(self) -> str:
        """Values of the required hyperparameters, for tables.

        Those of the parent for a branch.
        """
        if self.parent is not None:
            return self.parent.hyperparameters
        sparsity = self.config["sparsity"]
        names = config_lib.required_hyperparameters(sparsity)
        return ", ".join(
            config_lib.format_value(sparsity[name]) for name in names
        )


def collect(
    workdir: str | os.PathLike | Iterable[str | os.PathLike],
    names: Collection[str] | None = None,
) -> list[FinishedRun]:
    """Reads the finished runs in one or several directories.

    Args:
        workdir: Directory of the runs, or several; may be `gs://` paths.
        names: Names of the runs to read; by default all.

    Returns:
        A list of `sos.experiments.results.FinishedRun`, with `label`, `config`
        and `result`, ordered by technique (dense runs first, then in the order
        of registration, branches of other runs last), label, hyperparameters
        and seed. A run that several directories contain is there once, from
        the first of them.

    Raises:
        StorageError: If a file is damaged or cannot be read.
        UsageError: If a technique is not registered, and importing the task
            does not register it.

    Example:
    >>> import sos.experiments
    >>> config = {
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ...     "train_steps": 2,
    ... }
    >>> result = sos.experiments.run(config, "runs", quiet=True)
    >>> for run in sos.experiments.collect("runs"):
    ...     print(run.label, run.result.step)
    magnitude pruning 2
    """
    if isinstance(workdir, str | os.PathLike):
        workdir = [workdir]
    runs: dict[str, FinishedRun] = {}
    for path in workdir:
        for run in _collect(os.path.expanduser(os.fspath(path)), names):
            runs.setdefault(run.name, run)
    return sorted(runs.values(), key=_order)


def _collect(
    workdir: str, names: Collection[str] | None
) -> Iterator[FinishedRun]:
    """Yields the finished runs in a directory."""
    if names is None:
        names = []
        if tf.io.gfile.isdir(workdir):
            names = [n.rstrip("/") for n in tf.io.gfile.listdir(workdir)]

    @functools.cache
    def read(name: str) -> FinishedRun | None:
        directory = os.path.join(workdir, name)
        config, result = read_config(directory), read_result(directory)
        if config is None or result is None:
            return None
        if config["sparsity"]["technique"] not in (
            None,
            *sos.extend.techniques(),
        ):
            # The user's: importing the task registers it.
            config_lib.load_task(config["task"])
        # A name, or the path of a directory that may have moved since.
        parent = os.path.basename((config["parent"] or "").rstrip("/"))
        return FinishedRun(
            name=name,
            config=config,
            result=result,
            directory=directory,
            parent=read(parent) if parent else None,
        )

    return filter(None, map(read, names))


def _order(run: FinishedRun) -> tuple:
    sparsity = run.config["sparsity"]
    hyperparameters = [
        sparsity[name] for name in config_lib.required_hyperparameters(sparsity)
    ]
    return (
        # A branch of somebody's, which may not be registered, is the last.
        [None, *branch_registry.branches(), run.branch].index(run.branch),
        [None, *sos.extend.techniques()].index(run.technique),
        # Scratch-e before scratch-b.
        run.config["train_steps"] if run.branch else 0,
        run.label,
        hyperparameters,
        () if run.parent is None else _order(run.parent),
        run.config["seed"],
        run.name,
    )


def rows(runs: Iterable[FinishedRun]) -> list[dict[str, Any]]:
    """Returns the rows of a table, one for each run.

    Args:
        runs: Finished runs.

    Returns:
        Values by column: name, label, technique, branch, `sparsity` (the target
        or, without one, the achieved sparsity), metrics, `achieved_sparsity`
        and other fields of the result, and every entry of the config by dotted
        name.
    """
    return [
        {
            "name": run.name,
            "label": run.label,
            "technique": run.technique,
            "branch": run.branch,
            "sparsity": (
                run.result.sparsity
                if run.target_sparsity is None
                else run.target_sparsity
            ),
            **run.result.metrics,
            "achieved_sparsity": run.result.sparsity,
            "model_sparsity": run.result.model_sparsity,
            "seconds": run.result.seconds,
            "parameters": run.result.parameters,
            "multiply_adds": run.result.multiply_adds,
            "dense_multiply_adds": run.result.dense_multiply_adds,
            **{
                name: json.dumps(value) if isinstance(value, list) else value
                for name, value in config_lib.flatten(run.config).items()
                if name not in _FIRST_COLUMNS
            },
        }
        for run in runs
    ]


def frame(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """Returns a data frame with a row for each run.

    Args:
        runs: Finished runs.

    Returns:
        The values of `rows`. An entry that a run lacks is missing (`pandas.NA`
        or NaN).

    Example:
    >>> import sos.experiments
    >>> from sos.experiments.results import frame
    >>> config = {"task": "models.fashion_mnist:FashionMnist", "train_steps": 2}
    >>> result = sos.experiments.run(config, "runs", quiet=True)
    >>> frame(sos.experiments.collect("runs"))[["label", "train_steps"]].values
    array([['dense', 2]], dtype=object)
    """
    table = rows(runs)
    columns = dict.fromkeys(name for row in table for name in row)
    return pd.DataFrame(table, columns=[*columns] or [*_FIRST_COLUMNS])


def mean_frame(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """Returns a data frame with the means over seeds.

    Args:
        runs: Finished runs.

    Returns:
        A row for each point, runs that differ only in their seeds, with the
        columns of `frame`: means of metrics and other numbers of the result,
        and entries that the seeds share. `seeds` is the number of runs.
    """
    points: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        points.setdefault(run.point, []).append(run)
    means = []
    for group in points.values():
        table = frame(group)
        metrics = {name for run in group for name in run.result.metrics}
        measured = {*_MEASURED, *metrics}
        shared = {
            name: values.iloc[0]
            for name, values in table.items()
            if name in measured or values.nunique(dropna=False) == 1
        }
        numbers = table[[n for n in measured if n in table]].mean()
        means.append({**shared, **numbers, "seeds": len(group)})
    return pd.DataFrame(means)


def write_table(path: Path, runs: Sequence[FinishedRun]) -> None:
    """Writes a CSV file with a row for each run, atomically.

    Args:
        path: The file. Only a table of runs is replaced.
        runs: Finished runs.

    Raises:
        StorageError: If the file exists and is not a table of runs, or cannot
            be written.
    """
    _check_table(path)
    table = rows(runs)
    columns = dict.fromkeys(name for row in table for name in row)
    with (
        storage_errors(f"{path} could not be written"),
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [*columns] or _FIRST_COLUMNS)
        writer.writeheader()
        writer.writerows(table)


def check_outputs(workdir: Path, names: Iterable[str]) -> None:
    """Checks that the table and further files would replace only such files.

    Args:
        workdir: Directory of the runs and of the files.
        names: Names of the files that are written besides the table.

    Raises:
        StorageError: If another file would be replaced.
    """
    _check_table(workdir / TABLE)
    for name in names:
        path = workdir / name
        if path.exists() and not (workdir / TABLE).exists():
            raise _foreign_file_error(path, "a figure or report of runs")


def _check_table(path: Path) -> None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, csv.Error):
        header = []
    if tuple(header[: len(_FIRST_COLUMNS)]) != _FIRST_COLUMNS:
        raise _foreign_file_error(path, "a table of runs")


def _foreign_file_error(path: Path, kind: str) -> StorageError:
    return StorageError(
        f"{path} would be replaced, but is not {kind}. Choose another work "
        "directory, or move the file away."
    )
