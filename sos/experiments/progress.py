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
from sos.experiments.scores import shared_score
from sos.training.reporting import ProgressBar, Summary, format_duration

# Seconds between two lines if the output is not a terminal.
_LINE_INTERVAL = 15.0
# Steps after which the time left is estimated, if 1 % of all steps is more.
_STEPS_TO_ESTIMATE = 1000


class SweepProgress:
    """Shows the progress of a sweep: a line for each finished run, and a bar.

    Use it as a context manager while runs are trained. If the output is not a
    terminal, it prints a line every few seconds instead of the bar.

    Args:
        console: Console to print to; stdout by default.
        quiet: Whether to print nothing.
        timer: Returns the time in seconds since any origin.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        # No markup: labels and paths may contain brackets.
        self.console = console or Console(
            highlight=False, markup=False, quiet=quiet
        )
        self._timer = timer
        self._configs: dict[str, Mapping[str, Any]] = {}
        self._parents: dict[str, Mapping[str, Any] | None] = {}
        self._steps: dict[str, int] = {}
        self._finished: set[str] = set()
        self._running: dict[str, None] = {}
        self._waiting = False

    def add(
        self,
        config: Mapping[str, Any],
        result: Result | None = None,
        *,
        parent: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a run of the sweep, before it begins.

        Args:
            config: Resolved config.
            result: Result of the run if it is already finished.
            parent: Config of the run that it starts from, unless that one is
                added, too.
        """
        name = config_lib.run_name(config)
        self._configs[name] = config
        self._steps[name] = config_lib.first_step(config)
        if result is not None:
            self._steps[name] = result.step
            self._finished.add(name)
        self._parents[name] = parent

    def __enter__(self) -> "SweepProgress":
        """Starts measuring time."""
        total, finished = len(self._configs), len(self._finished)
        if finished:
            self.console.print(
                f"{finished} of {total} runs are already finished"
                f"{'.' if finished < total else ': nothing to train.'}"
            )
        self._bar = ProgressBar(self.console)
        self._begin = self._line_time = self._timer()
        self._steps_before = self._completed_steps()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the bar, but not the lines."""
        self._bar.close()

    def begin(self, name: str, step: int = 0) -> None:
        """Shows that a run is being trained.

        Args:
            name: Name of the run.
            step: Step at which it resumes.
        """
        self._running[name] = None
        # Earlier steps are not part of the speed.
        self._steps_before += step - self._steps[name]
        self._steps[name] = step
        self._show()

    def update(self, name: str, summary: Summary) -> None:
        """Shows the step of a run.

        Args:
            name: Name of the run.
            summary: Summary of its last loop.
        """
        if summary.kind == "train":
            self._steps[name] = summary.step
            self._show()

    def finish(self, name: str, result: Result) -> None:
        """Shows that a run is finished.

        Args:
            name: Name of the run.
            result: Result of the run.
        """
        self._steps[name] = result.step
        self._finished.add(name)
        self._running.pop(name, None)
        width = max(len(self._title(other)) for other in self._configs)
        parts = [
            f"{len(self._finished):{len(str(len(self._configs)))}d}"
            f"/{len(self._configs)}  {self._title(name):<{width}}"
        ]
        if (value := result.score_value) is not None:
            text = f"{value:.2f}{result.score.unit}"
            parts.append(f"{result.score.label} {text:>6}")
        elif "loss" in result.metrics:
            parts.append(f"loss {result.metrics['loss']:.4f}")
        if result.sparsity is not None:
            parts.append(f"sparsity {result.sparsity:6.2%}")
        self.console.print("  ".join(parts), soft_wrap=True, markup=False)
        self._line_time = self._timer()
        self._show()

    def fail(self, name: str, reason: str) -> None:
        """Shows that a run failed.

        Args:
            name: Name of the run.
            reason: Error message.
        """
        self._running.pop(name, None)
        self.console.print(
            f"{self._title(name)} failed: {reason}",
            soft_wrap=True,
            markup=False,
        )

    def wait(self, name: str) -> None:
        """Shows, once, that another process trains a run of this sweep.

        Args:
            name: Name of the run.
        """
        self._running.pop(name, None)
        if not self._waiting:
            self._waiting = True
            self.console.print(
                "Another process is training runs of this sweep. Waiting for "
                "the remaining ones."
            )

    def seconds_left(self) -> float | None:
        """Estimates the time left in seconds; None while it is unknown."""
        steps = self._completed_steps() - self._steps_before
        # The first steps take long, as functions are traced.
        enough = (self._total_steps() - self._steps_before) // 100
        if steps < min(max(enough, 1), _STEPS_TO_ESTIMATE):
            return None
        elapsed = self._timer() - self._begin
        return elapsed / steps * (self._total_steps() - self._completed_steps())

    def _total_steps(self) -> int:
        return sum(config["train_steps"] for config in self._configs.values())

    def _completed_steps(self) -> int:
        return sum(self._steps.values())

    def _title(self, name: str) -> str:
        config = self._configs[name]
        parent = self._configs.get(config_lib.parent_name(config))
        return run_title(config, parent or self._parents[name])

    def _show(self) -> None:
        seconds_left = self.seconds_left()
        running = ", ".join(self._title(name) for name in self._running)
        self._bar.update(
            self._completed_steps(),
            self._total_steps(),
            f"{len(self._finished)} of {len(self._configs)} runs",
            seconds_left=seconds_left,
        )
        now = self._timer()
        if (
            not self.console.is_terminal
            and now - self._line_time > _LINE_INTERVAL
        ):
            self._line_time = now
            text = (
                f"{self._completed_steps():,} of {self._total_steps():,} steps"
            )
            if seconds_left is not None:
                text += f", {format_duration(seconds_left)} left"
            self.console.print(
                f"{text}: {running}", soft_wrap=True, markup=False
            )


def run_title(
    config: Mapping[str, Any], parent: Mapping[str, Any] | None = None
) -> str:
    """Returns the label, required hyperparameters and seed of a run.

    Args:
        config: Resolved config.
        parent: Resolved config of the run that it starts from, whose
            hyperparameters are shown if it requires none itself.

    Returns:
        For example "magnitude pruning 0.9, seed 0".
    """
    parts = [config_lib.label(config)]
    for sparsity in [c["sparsity"] for c in (config, parent) if c is not None]:
        names = config_lib.required_hyperparameters(sparsity)
        if names:
            parts += [config_lib.format_value(sparsity[n]) for n in names]
            break
    return f"{' '.join(parts)}, seed {config['seed']}"


def summary_table(runs: Sequence[FinishedRun]) -> Table:
    """Returns a table of finished runs, averaged over seeds.

    Args:
        runs: Finished runs, in the order of the table.

    Returns:
        A table that `rich` prints.
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
    # Long labels are wrapped, numbers never.
    table.add_column("technique")
    # Final sparsity or penalty weight.
    table.add_column("target", no_wrap=True)
    score = shared_score(runs)
    for heading in ("sparsity", score.label, "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for group in points.values():
        first = group[0]
        if last not in (None, first.label):
            table.add_section()
        table.add_row(
            "" if first.label == last else first.label,
            first.hyperparameters,
            _mean([run.result.sparsity for run in group], 100, "%"),
            _mean([run.result.score_value for run in group], 1, score.unit),
            f"{sum(run.result.seconds for run in group) / len(group):.1f} s",
        )
        last = first.label
    return table


def _mean(values: Sequence[float | None], factor: float, unit: str) -> str:
    """Returns the mean, with half the range of several values."""
    if any(value is None for value in values):
        return ""
    text = f"{factor * sum(values) / len(values):.2f}{unit}"
    if len(values) == 1:
        return text
    return f"{text} ± {factor * (max(values) - min(values)) / 2:.2f}"
