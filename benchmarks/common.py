"""Helpers of benchmarks: the description of the machine, and the report."""

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping

import rich.console
import rich.table

import sos
from benchmarks.networks import DENSE
from sos.experiments.machine import processor


def machine() -> dict[str, object]:
    """Returns properties of the machine that affect measurements."""
    packages = ("numpy", "tensorflow", "keras", "tensorflow-model-optimization")
    return {
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def integers(text: str) -> list[int]:
    """Parses integers that are separated by commas, the value of a flag.

    Repetitions are left out.
    """
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def techniques(text: str) -> list[str]:
    """Parses techniques that are separated by commas, the value of a flag.

    Repetitions are left out.

    Raises:
        argparse.ArgumentTypeError: If one is unknown.
    """
    known = [DENSE, *sos.extend.techniques()]
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"must be some of {','.join(known)}. Received: {unknown[0]!r}"
        )
    return list(dict.fromkeys(names))


def console() -> rich.console.Console:
    """Returns a console for tables; 110 columns wide if it is no terminal."""
    terminal = rich.console.Console()
    if terminal.is_terminal:
        return terminal
    return rich.console.Console(width=max(terminal.width, 110))


def print_report(
    title: str, report: Mapping[str, object], as_json: bool
) -> None:
    """Prints the results of a benchmark as a table or as one JSON object.

    Args:
        title: Title of the table.
        report: The report. Its key `results` holds a dictionary of measurements
            for each contestant, all with the same keys.
        as_json: Whether to print JSON.
    """
    report = {**report, "machine": machine()}
    if as_json:
        print(json.dumps(report))
        return
    rows = report["results"]
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for key in next(iter(rows.values())):
        table.add_column(key.replace("_", " "), justify="right")
    for name, values in rows.items():
        table.add_row(name, *map(_format, values.values()))
    output = console()
    output.print(table)
    for key, value in report["machine"].items():
        output.print(f"{key}: {value}", highlight=False)


def _format(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
