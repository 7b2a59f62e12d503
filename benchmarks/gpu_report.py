"""The report of what `gpu_step_worker` measured."""

import json
import pathlib
import statistics
from typing import Any

import rich.table

from benchmarks.common import console, machine
from benchmarks.compilers import OutOfMemory
from benchmarks.gpu_modules import CHECKS, COPY

# Headers and formats of columns, by the name of the figure.
COLUMNS = {
    "milliseconds": ("ms", ",.2f"),
    "times_base": ("times", ",.3f"),
    "memory_gib": ("GiB", ",.4g"),
    "memory_times_base": ("times", ",.2f"),
    "gigabytes": ("GB moved", ",.4g"),
    "kernels": ("kernels", ",d"),
    "compile_s": ("compile s", ",.1f"),
    "largest": ("largest", ".1e"),
    "median": ("median", ".1e"),
    "bound": ("bound", ".1e"),
    "bounded": ("bounded", ""),
}


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the report of a folder's results.

    Raises:
        SystemExit: If there are none.
    """
    try:
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
        results = json.loads((folder / "results.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing. Write the modules with --export, "
            "and run gpu_step_worker.py of that folder on a machine with a GPU."
        ) from None
    report = {
        "benchmark": "gpu_step",
        "model": plan["model"],
        "size": plan["size"],
        "action": plan["action"],
        "device": plan["gpu"],
        "compiler": plan["compiler"],
        "results": {},
        "mask_update": {},
        "out_of_memory": {},
        "errors": {},
    }
    for name, row in plan["rows"].items():
        result = results.get(name, {"error": "was not reached"})
        label = row["label"]
        report["device"] = result.get("device", report["device"])
        if "error" in result:
            full = OutOfMemory.code in result["error"]
            kind = "out_of_memory" if full else "errors"
            report[kind][label] = result["error"]
        elif plan["action"] == "check":
            check = CHECKS[row["policy"]]
            difference = result[check.statistic]
            report["results"][label] = {
                "largest": result["largest"],
                "median": result["median"],
                "bound": check.bound,
                "bounded": check.statistic,
            }
            if not difference <= check.bound:
                report["errors"][label] = (
                    f"the {check.statistic} difference from TensorFlow is "
                    f"{difference:.1e}, more than {check.bound:.1e}"
                )
        else:
            base = results.get(row["base"], {})
            timed = plan["action"] == "run"
            report[row["table"]][label] = figures(result, base, timed)
            rounds = len(result.get("rounds_ms", []))
            if result.get("equal") is False:
                report["errors"][label] = "differs from the masks of the host"
            elif timed and rounds < plan["rounds"]:
                report["errors"][label] = (
                    f"was cut off after {rounds} of {plan['rounds']} rounds"
                )
    return report


def figures(
    result: dict[str, Any], base: dict[str, Any], timed: bool
) -> dict[str, float | None]:
    """Returns the figures of a module to print, by name.

    Args:
        result: What the worker measured.
        base: The same of the module with which it is compared, or an empty
            dictionary.
        timed: Whether to include times, None if it was cut off before these.
    """
    printed = {}
    if timed:
        rounds = result.get("rounds_ms", [])
        # Within a round both ran at the same clock.
        ratios = [
            ours / theirs
            for ours, theirs in zip(
                rounds, base.get("rounds_ms", []), strict=False
            )
        ]
        printed["milliseconds"] = _median(rounds)
        printed["times_base"] = _median(ratios)
    printed["memory_gib"] = round(result["total"] / 2**30, 6)
    printed["memory_times_base"] = (
        round(result["total"] / base["total"], 3) if "total" in base else None
    )
    printed["gigabytes"] = round(result["bytes"] / 1e9, 6)
    printed["kernels"] = result["kernels"]
    printed["compile_s"] = round(result["compile_s"], 1)
    return printed


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def print_tables(report: dict[str, Any]) -> None:
    """Prints a report as tables."""
    output = console()
    where = {
        "run": f"on {report['device']}",
        "compile": f"compiled for {report['device']}",
        "check": "on the CPU: differences from TensorFlow, relative to a "
        "step's change",
    }[report["action"]]
    for key, title, base in (
        (
            "results",
            f"training step of {report['model']}, size {report['size']}",
            "the dense model",
        ),
        ("mask_update", f"mask update of {report['model']}", COPY),
    ):
        rows = report[key]
        if not rows:
            continue
        title = f"One {title}, {where}"
        if report["action"] != "check":
            title += f'; "times" compares the column before it with {base}'
        table = rich.table.Table(title=title, title_justify="left")
        table.add_column(
            "technique, batch" if key == "results" else "", no_wrap=True
        )
        for column in next(iter(rows.values())):
            table.add_column(COLUMNS[column][0], justify="right")
        for label, values in rows.items():
            table.add_row(
                label,
                *(
                    "" if value is None else format(value, COLUMNS[column][1])
                    for column, value in values.items()
                ),
            )
        output.print(table)
    for label in report["out_of_memory"]:
        output.print(f"{label}: does not fit the memory", highlight=False)
    for name, value in {"compiler": report["compiler"], **machine()}.items():
        # Without markup, which brackets in a requirement would be.
        output.print(f"{name}: {value}", highlight=False, markup=False)
