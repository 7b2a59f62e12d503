"""What the benchmarks share: the machine, and how figures are printed."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping

import rich.console
import rich.table


def cpu_model() -> str:
    """Returns the processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """Returns what the figures depend on."""
    packages = ("numpy", "tensorflow", "keras", "tensorflow-model-optimization")
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def print_report(
    title: str, report: Mapping[str, object], as_json: bool
) -> None:
    """Prints a benchmark's figures as a table or as one JSON object.

    Args:
        title: Title of the table.
        report: What was measured. Its key `results` holds a dictionary of
            figures for each contestant, all with the same keys.
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
    for name, figures in rows.items():
        table.add_row(name, *(f"{figure:,.2f}" for figure in figures.values()))
    console = rich.console.Console()
    console.print(table)
    for key, value in report["machine"].items():
        console.print(f"{key}: {value}", highlight=False)
