"""Prints the results of finished runs as a table.

Reads one or several work directories, filters and sorts their runs, and writes
them to CSV and Parquet files.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

# Columns that are printed by default, where a table has them.
_COLUMNS = (
    "label",
    "target_sparsity",
    "achieved_sparsity",
    "accuracy",
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
        help="a directory of runs; a run that several contain counts once",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="keep the runs that meet a condition, as of pandas.DataFrame."
        "query: \"technique == 'MagnitudePruning' and sparsity >= 0.9\"",
    )
    parser.add_argument(
        "--columns",
        metavar="NAMES",
        type=_names,
        help="columns to print, separated by commas",
    )
    parser.add_argument(
        "--sort",
        metavar="NAMES",
        type=_names,
        default=[],
        help="sort by these columns, separated by commas; from the highest "
        "value if - precedes the name (--sort=-accuracy)",
    )
    parser.add_argument(
        "--mean",
        action="store_true",
        help="print and write the means over seeds",
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
        "--table",
        choices=["markdown"],
        help="print accuracy by technique and sparsity",
    )
    parser.add_argument(
        "--findings",
        action="store_true",
        help="print what the runs say of each finding of the paper",
    )
