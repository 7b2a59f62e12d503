"""Prints, filters and exports the results of finished runs.

Reads one or several work directories. Prints a row for each run or, with
--mean, for each point over its seeds.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sos.commands.finished_runs import finished_runs
from sos.errors import UsageError, reason
from sos.files import atomic_write, storage_errors
from sos.report import as_text

if TYPE_CHECKING:
    import pandas as pd

# Columns that are printed by default, if a run has them. After them comes the
# score, such as accuracy.
_FIRST_COLUMNS = ("label", "sparsity", "achieved_sparsity")
_LAST_COLUMNS = (
    "loss",
    "seed",
    "seeds",
    "seconds",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "workdir",
        metavar="DIR",
        nargs="+",
        help="a work directory; a run that several contain counts once",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="keep the runs that meet a condition on columns, such as "
        "\"technique == 'MagnitudePruning' and sparsity >= 0.9\" (see "
        "pandas.DataFrame.query; names with dots in backticks)",
    )
    parser.add_argument(
        "--sort",
        metavar="NAMES",
        default="",
        help="sort by columns, separated by commas; a minus before a name "
        "sorts from the highest value on (--sort=-accuracy)",
    )
    parser.add_argument(
        "--columns",
        metavar="NAMES",
        default="",
        help="print these columns, separated by commas",
    )
    parser.add_argument(
        "--mean", action="store_true", help="take the means over seeds"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="write all columns to a file"
    )
    parser.add_argument(
        "--parquet",
        type=Path,
        metavar="OUT",
        help="write all columns to a Parquet file",
    )
    parser.add_argument(
        "--markdown",
        choices=("scores", "findings"),
        help="print in Markdown instead: scores by technique and sparsity, "
        "or what the runs say of the findings of the paper",
    )


def run(options: argparse.Namespace) -> str:
    """Prints and writes the results.

    Args:
        options: The arguments of the command.

    Returns:
        What is printed.

    Raises:
        UsageError: If an argument is invalid, or there are no finished runs.
        StorageError: If a run cannot be read or a file cannot be written.
    """
    from sos.experiments import results

    runs = finished_runs(*options.workdir)
    table = results.frame(runs)
    if options.where is not None:
        table = _query(table, options.where)
        runs = [runs[index] for index in table.index]
    if options.mean:
        table = results.mean_frame(runs)
    names, descending = [], []
    for name in _split(options.sort):
        names.append(name.removeprefix("-"))
        descending.append(name.startswith("-"))
    columns = _split(options.columns)
    _check_columns("--sort", names, table)
    _check_columns("--columns", columns, table)
    if names:
        table = table.sort_values(
            names, ascending=[not d for d in descending], kind="stable"
        )
    _write(table, options)
    if options.markdown is not None:
        return _markdown(options.markdown, runs)
    if not columns:
        names = dict.fromkeys(run.result.score.name for run in runs)
        columns = [
            name
            for name in (*_FIRST_COLUMNS, *names, *_LAST_COLUMNS)
            if name in table and table[name].notna().any()
        ]
    return as_text(_rich_table(table, columns))


def _query(table: "pd.DataFrame", condition: str) -> "pd.DataFrame":
    # A condition may raise any error, or give something else.
    try:
        meets = table.eval(condition, engine="python")
        is_condition = getattr(meets, "dtype", None) == "bool"
        why = "" if is_condition else "not a condition"
    except Exception as error:
        why = reason(error)
    if why:
        raise UsageError(
            "--where must be a condition on columns, such as "
            f'"sparsity >= 0.9" ({why}). Received: {condition!r}. '
            f"Columns: {', '.join(table)}"
        )
    if not meets.any():
        raise UsageError(
            f"none of the {len(table)} runs meets the condition "
            f"--where={condition!r}"
        )
    return table[meets]


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _check_columns(
    option: str, names: list[str], table: "pd.DataFrame"
) -> None:
    unknown = [name for name in names if name not in table]
    if unknown:
        raise UsageError(
            f"{option} must name columns. Received: {', '.join(unknown)}. "
            f"Columns: {', '.join(table)}"
        )


def _write(table: "pd.DataFrame", options: argparse.Namespace) -> None:
    if options.csv is not None:
        with (
            storage_errors(f"{options.csv} could not be written"),
            atomic_write(options.csv) as temporary,
        ):
            table.to_csv(temporary, index=False)
    if options.parquet is not None:
        # A column of a Parquet file has one type.
        mixed = {
            name: "string"
            for name, values in table.items()
            if values.map(type).nunique() > 1 and values.dtype == object
        }
        with (
            storage_errors(f"{options.parquet} could not be written"),
            atomic_write(options.parquet) as temporary,
        ):
            table.astype(mixed).to_parquet(temporary, index=False)


def _markdown(name: str, runs: list) -> str:
    from sos.experiments import conclusions, tables

    if name == "scores":
        return tables.score_table(runs).markdown()
    return conclusions.markdown(
        conclusions.findings(
            runs, eval_examples=conclusions.eval_examples(runs)
        )
    )


def _rich_table(table: "pd.DataFrame", columns: list[str]) -> Any:
    """Returns the columns as a table of `rich`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    printed = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    for name in columns:
        is_number = table[name].dtype.kind in "if"
        printed.add_column(
            name, justify="right" if is_number else "left", overflow="fold"
        )
    for row in table[columns].itertuples(index=False):
        printed.add_row(*map(_text, row))
    return printed


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
