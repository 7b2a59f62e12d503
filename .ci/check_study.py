"""Checks what `make study` left behind: a table, figures and a report."""

import argparse
import csv
import pathlib
import sys

import matplotlib.image
import numpy as np

from sos.experiments.figures import FIGURES

# Branches that the study must have, each with its trunk.
BRANCHES = ("scratch-e", "lottery ticket")


def check_results(path, runs):
    """Raises `ValueError` unless the table has `runs` well-formed rows."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if len(set(header)) != len(header) or not all(header):
        raise ValueError(
            f"{path} must start with distinct names. Received: {header}"
        )
    if len(rows) != runs:
        raise ValueError(
            f"{path} must have {runs} rows, one a run. Received: {len(rows)}"
        )
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"{path}:{number} must have {len(header)} values. "
                f"Received: {row}"
            )
    if len({tuple(row) for row in rows}) != len(rows):
        raise ValueError(f"{path} must not have the same row twice.")


def check_figure(path):
    """Raises `ValueError` unless the file is a PNG that shows something."""
    if not path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is not a PNG file.")
    try:
        pixels = matplotlib.image.imread(path)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    height, width, *_ = pixels.shape
    if min(height, width) < 200:
        raise ValueError(
            f"{path} must have at least 200 by 200 pixels. "
            f"Received: {width} by {height}"
        )
    colours = np.unique(pixels.reshape(height * width, -1), axis=0)
    # Axes and text alone have shades of grey; curves add colours to them.
    saturation = colours[:, :3].max(axis=1) - colours[:, :3].min(axis=1)
    if len(colours) < 16 or saturation.max() < 0.2:
        raise ValueError(
            f"{path} must show coloured curves. Received: {len(colours)} "
            f"colours, the strongest of saturation {saturation.max():.2f}"
        )


def check_report(path, runs):
    """Raises `ValueError` unless the report has all runs and figures."""
    text = path.read_text("utf-8")
    for what, expected, found in (
        ("one row a run", runs, text.count("<tr data-label=")),
        ("one element for each figure", len(FIGURES), text.count("<figure ")),
    ):
        if found != expected:
            raise ValueError(
                f"{path} must have {what}, {expected}. Received: {found}"
            )
    for words in BRANCHES:
        if f'<tr data-label="{words}">' not in text:
            raise ValueError(f"{path} must have a run of {words!r}.")
    if '<span class="verdict' not in text:
        raise ValueError(f"{path} must have conclusions.")


def main():
    """Checks the folder named on the command line; exits with 1 if wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument(
        "--runs", type=int, required=True, help="expected number of runs"
    )
    options = parser.parse_args()
    try:
        check_results(options.workdir / "results.csv", options.runs)
        for figure in FIGURES:
            check_figure(options.workdir / f"{figure.name}.png")
        check_report(options.workdir / "report.html", options.runs)
    except (OSError, ValueError) as error:
        sys.exit(f"The study's output is wrong: {error}")
    print(f"{options.runs} runs, their figures and their report: correct.")


if __name__ == "__main__":
    main()
