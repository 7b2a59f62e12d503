"""Reading the results of finished runs, and writing them as a table."""

import csv
import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

import sos
from sos.errors import StorageError
from sos.experiments import config as config_lib
from sos.experiments.runs import Result, read_config, read_result
from sos.files import atomic_write, storage_errors

TABLE = "results.csv"
TRADEOFF = "tradeoff.png"
LAYERWISE = "layerwise.png"
# Of every table, so that a file of something else is not replaced.
_FIRST_COLUMNS = ("name", "label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run, as its directory holds it.

    Attributes:
        name: Name of the directory.
        config: The whole config.
        result: Outcome of the run.
    """

    name: str
    config: Mapping[str, Any]
    result: Result

    @property
    def label(self) -> str:
        """Name in tables and figures, without seed and sparsity."""
        return config_lib.label(self.config)

    @property
    def technique(self) -> str | None:
        """Name of the technique; None for a dense network."""
        return self.config["sparsity"]["technique"]

    @property
    def point(self) -> tuple:
        """A key that is the same for runs which differ in their seeds alone."""
        values = config_lib.flatten(self.config)
        for name in ("seed", *config_lib.NOT_IDENTIFYING):
            values.pop(name, None)
        return (self.label, *(f"{k}={v}" for k, v in sorted(values.items())))

    @property
    def hyperparameters(self) -> str:
        """Values of the hyperparameters without a default, for people."""
        sparsity = self.config["sparsity"]
        return ", ".join(
            config_lib.value_text(sparsity[name])
            for name in config_lib.required_hyperparameters(sparsity)
        )


def collect(
    workdir: str | os.PathLike, names: Collection[str] | None = None
) -> list[FinishedRun]:
    """Reads the finished runs of a directory.

    ```python
    for run in sos.experiments.collect("runs/fashion_mnist"):
        print(run.label, run.result.sparsity, run.result.metrics["accuracy"])
    ```

    Args:
        workdir: Directory of runs; `gs://` works too.
        names: Names of the runs to read; by default all.

    Returns:
        The runs: dense ones, then technique by technique in the order of their
        registration, by label, hyperparameters and seed.

    Raises:
        StorageError: If a file is damaged or cannot be read.
        UsageError: If a technique is not registered, and importing the task
            does not register it.
    """
    workdir = os.path.expanduser(os.fspath(workdir))
    if names is None:
        names = []
        if tf.io.gfile.isdir(workdir):
            names = [n.rstrip("/") for n in tf.io.gfile.listdir(workdir)]
    runs = []
    for name in names:
        directory = os.path.join(workdir, name)
        config, result = read_config(directory), read_result(directory)
        if config is not None and result is not None:
            run = FinishedRun(name=name, config=config, result=result)
            if run.technique not in (None, *sos.extend.techniques()):
                # One of the user's own.
                config_lib.load_task(config["task"])
            runs.append(run)
    return sorted(runs, key=_order)


def _order(run: FinishedRun) -> tuple:
    sparsity = run.config["sparsity"]
    hyperparameters = [
        sparsity[name] for name in config_lib.required_hyperparameters(sparsity)
    ]
    return (
        [None, *sos.extend.techniques()].index(run.technique),
        run.label,
        hyperparameters,
        run.config["seed"],
        run.name,
    )


def rows(runs: Iterable[FinishedRun]) -> list[dict[str, Any]]:
    """Returns the rows of a table, one for each run.

    Args:
        runs: Finished runs.

    Returns:
        By column: name and label, the metrics, `achieved_sparsity` and other
        figures of the result, and every entry of the config by its dotted name.
    """
    return [
        {
            "name": run.name,
            "label": run.label,
            **run.result.metrics,
            "achieved_sparsity": run.result.sparsity,
            "model_sparsity": run.result.model_sparsity,
            "seconds": run.result.seconds,
            "parameters": run.result.parameters,
            **{
                name: json.dumps(value) if isinstance(value, list) else value
                for name, value in config_lib.flatten(run.config).items()
                if name not in _FIRST_COLUMNS
            },
        }
        for run in runs
    ]


def write_table(path: Path, runs: Sequence[FinishedRun]) -> None:
    """Writes a CSV file with a row for each run.

    Args:
        path: The file; it is complete or, on an error, as it was before.
        runs: Finished runs.

    Raises:
        StorageError: If there is a file that is not such a table, or it cannot
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


def check_outputs(workdir: Path) -> None:
    """Raises `StorageError` if files of something else would be replaced.

    Args:
        workdir: Directory of runs, where a table and figures are to be written.
    """
    _check_table(workdir / TABLE)
    for name in (TRADEOFF, LAYERWISE):
        path = workdir / name
        if path.exists() and not (workdir / TABLE).exists():
            raise _not_ours(path, "a figure of runs")


def _check_table(path: Path) -> None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, csv.Error):
        header = []
    if tuple(header[: len(_FIRST_COLUMNS)]) != _FIRST_COLUMNS:
        raise _not_ours(path, "a table of runs")


def _not_ours(path: Path, kind: str) -> StorageError:
    return StorageError(
        f"{path} is not {kind}, and would be lost. Choose another work "
        "directory, or move the file away."
    )
