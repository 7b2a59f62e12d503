"""Terminal output of a sweep: progress, time left, and a summary."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from sos.experiments import config as config_lib
from sos.experiments.results import FinishedRun
from sos.experiments.runs import Result
from sos.training.reporting import ProgressBar, Summary, format_duration

# Seconds between two lines where there is no terminal to draw a bar on.
_LINE_INTERVAL = 15.0


class SweepProgress:
    """Shows the progress of a sweep: a line for each finished run, and a bar.

    Use it as a context while runs are trained. Where the output is no terminal,
    a line every few seconds takes the place of the bar.

    Args:
        console: Where to write; by default the standard output.
        quiet: Whether to show nothing.
        clock: Returns the time in seconds, from any origin.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Labels and paths may hold brackets.
        self.console = console or Console(
            highlight=False, markup=False, quiet=quiet
        )
        self._clock = clock
        self._configs: dict[str, Mapping[str, Any]] = {}
        self._steps: dict[str, int] = {}
        self._finished: set[str] = set()
        self._running: dict[str, None] = {}
        self._waiting = False

    def add(
        self, config: Mapping[str, Any], result: Result | None = None
    ) -> None:
        """Adds a run of the sweep, before it begins.

        Args:
            config: Its resolved config.
            result: Its result if it was finished before.
        """
        name = config_lib.run_name(config)
        self._configs[name] = config
        self._steps[name] = 0
        if result is not None:
            self._steps[name] = result.step
            self._finished.add(name)

    def __enter__(self) -> "SweepProgress":
        """Begins to measure time."""
        total, done = len(self._configs), len(self._finished)
        if done:
            self.console.print(
                f"{done} of {total} runs were finished before"
                f"{'.' if done < total else ': nothing to train.'}"
            )
        self._bar = ProgressBar(self.console)
        self._begin = self._line_time = self._clock()
        self._steps_before = self._done_steps()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the bar; the lines stay."""
        self._bar.close()

    def begin(self, name: str, step: int = 0) -> None:
        """Shows that a run is being trained.

        Args:
            name: The run.
            step: The step that it is resumed from.
        """
        self._running[name] = None
        # They were made before, and say nothing of the speed.
        self._steps_before += step - self._steps[name]
        self._steps[name] = step
        self._show()

    def update(self, name: str, summary: Summary) -> None:
        """Shows how far a run is.

        Args:
            name: The run.
            summary: That of its last loop.
        """
        if summary.kind == "train":
            self._steps[name] = summary.step
            self._show()

    def finish(self, name: str, result: Result) -> None:
        """Shows that a run is finished.

        Args:
            name: The run.
            result: Its result.
        """
        self._steps[name] = result.step
        self._finished.add(name)
        self._running.pop(name, None)
        width = max(len(self._describe(other)) for other in self._configs)
        parts = [
            f"{len(self._finished):{len(str(len(self._configs)))}d}"
            f"/{len(self._configs)}  {self._describe(name):<{width}}"
        ]
        if "accuracy" in result.metrics:
            parts.append(f"accuracy {result.metrics['accuracy']:6.2%}")
        elif "loss" in result.metrics:
            parts.append(f"loss {result.metrics['loss']:.4f}")
        if result.sparsity is not None:
            parts.append(f"sparsity {result.sparsity:6.2%}")
        self.console.print("  ".join(parts), soft_wrap=True, markup=False)
        self._line_time = self._clock()
        self._show()

    def fail(self, name: str, reason: str) -> None:
        """Shows that a run failed.

        Args:
            name: The run.
            reason: The message of the error.
        """
        self._running.pop(name, None)
        self.console.print(
            f"{self._describe(name)} failed: {reason}",
            soft_wrap=True,
            markup=False,
        )

    def wait(self, name: str) -> None:
        """Shows, once, that another process trains a run of this sweep."""
        self._running.pop(name, None)
        if not self._waiting:
            self._waiting = True
            self.console.print(
                "Another process trains runs of this sweep. This one waits for "
                "those that are left."
            )

    def seconds_left(self) -> float | None:
        """Estimates the time left in seconds; None as long as it is unknown."""
        made = self._done_steps() - self._steps_before
        if made < 1:
            return None
        elapsed = self._clock() - self._begin
        return elapsed / made * (self._total_steps() - self._done_steps())

    def _total_steps(self) -> int:
        return sum(config["train_steps"] for config in self._configs.values())

    def _done_steps(self) -> int:
        return sum(self._steps.values())

    def _describe(self, name: str) -> str:
        return describe(self._configs[name])

    def _show(self) -> None:
        left = self.seconds_left()
        running = ", ".join(self._describe(name) for name in self._running)
        self._bar.update(
            self._done_steps(),
            self._total_steps(),
            f"{len(self._finished)} of {len(self._configs)} runs",
            seconds_left=left,
        )
        now = self._clock()
        if (
            not self.console.is_terminal
            and now - self._line_time > _LINE_INTERVAL
        ):
            self._line_time = now
            text = f"{self._done_steps():,} of {self._total_steps():,} steps"
            if left is not None:
                text += f", {format_duration(left)} left"
            self.console.print(
                f"{text}: {running}", soft_wrap=True, markup=False
            )


def describe(config: Mapping[str, Any]) -> str:
    """Returns a run as text for people: label, hyperparameters and seed."""
    parts = [config_lib.label(config)]
    parts += [
        config_lib.value_text(config["sparsity"][name])
        for name in config_lib.required_hyperparameters(config["sparsity"])
    ]
    return f"{' '.join(parts)}, seed {config['seed']}"


def summary_table(runs: Sequence[FinishedRun]) -> Table:
    """Returns a table of finished runs, the mean over the seeds of each point.

    Args:
        runs: Finished runs, in the order of the table.

    Returns:
        A table for `rich` to print.
    """
    points: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        points.setdefault(run.point, []).append(run)
    counts = sorted({len(group) for group in points.values()})
    caption = None
    if counts and counts[-1] > 1:
        number = " to ".join(str(n) for n in sorted({counts[0], counts[-1]}))
        caption = f"mean of {number} seeds ± half their range"
    table = Table(
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
        caption=caption,
        caption_justify="left",
    )
    table.add_column("technique", no_wrap=True)
    # The final sparsity, or the weight of the penalty.
    table.add_column("target", no_wrap=True)
    for heading in ("sparsity", "accuracy", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for group in points.values():
        first = group[0]
        if last not in (None, first.label):
            table.add_section()
        table.add_row(
            "" if first.label == last else first.label,
            first.hyperparameters,
            _percent([run.result.sparsity for run in group]),
            _percent([run.result.metrics.get("accuracy") for run in group]),
            f"{sum(run.result.seconds for run in group) / len(group):.1f} s",
        )
        last = first.label
    return table


def _percent(values: Sequence[float | None]) -> str:
    """Returns the mean and, of several values, half their range, in percent."""
    if any(value is None for value in values):
        return ""
    text = f"{sum(values) / len(values):.2%}"
    if len(values) == 1:
        return text
    return f"{text} ± {50 * (max(values) - min(values)):.2f}"
