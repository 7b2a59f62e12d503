"""Compares the runs of a study with the published results of the paper.

For every technique and sparsity, prints the distance of the mean over seeds
from the result of Gale, Elsen and Hooker 2019.
"""

import argparse
from pathlib import Path
from typing import Any

from sos.commands.finished_runs import finished_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "workdir", metavar="DIR", help="the work directory of the runs"
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        required=True,
        help="resnet50 or transformer",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="metric of the runs (default: accuracy for resnet50, "
        "study_bleu for transformer)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="also write the rows to a file"
    )


def run(options: argparse.Namespace) -> Any:
    """Compares the runs, and writes the CSV file.

    Args:
        options: The arguments of the command.

    Returns:
        The `sos.experiments.published_comparison.Comparison`.

    Raises:
        UsageError: If an argument is invalid, or there are no finished runs.
        StorageError: If a run cannot be read or the file cannot be written.
    """
    from sos.experiments.published_comparison import compare

    runs = finished_runs(options.workdir)
    compared = compare(runs, options.reference, options.metric)
    if options.csv is not None:
        compared.save_csv(options.csv)
    return compared
