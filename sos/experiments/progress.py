"""Shows a study in the terminal: progress, time left, and the summary."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import rich.box
import rich.progress
from rich.console import Console
from rich.table import Table

from sos.experiments.results import Outcome, Results
from sos.experiments.runs import Run

# A step with a penalty takes about two plain ones, until it is measured.
_PENALIZED_STEP = 2.0
_PLAIN_STEP_SECONDS = 0.015
# Where there is no terminal to draw on: seconds between two lines.
_LINE_INTERVAL = 15.0


class Progress:
    """Live bars in a terminal, plain lines elsewhere.

    The time left is that of the steps still to do, each at the pace measured
    for its technique, in earlier sessions too.

    Args:
        console: Where to write; by default the standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live: rich.progress.Progress | None = None
        self._results: Results | None = None
        self._run: Run | None = None

    @contextlib.contextmanager
    def study(self, results: Results) -> Iterator[None]:
        """Shows progress within the scope.

        Args:
            results: The results of the study.
        """
        self._results = results
        self._total = sum(self._cost(run) for run in results.runs)
        self._width = max(len(describe(run)) for run in results.runs)
        self._line_time = time.monotonic()
        done, total = len(results.outcomes), len(results.runs)
        if done:
            self.console.print(
                f"{done} of {total} runs were finished before"
                f"{'.' if done < total else ': nothing to train.'}"
            )
        if not self.console.is_terminal or done == total:
            yield
            return
        self._live = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[note]}", justify="right"),
            console=self.console,
            refresh_per_second=4,
            expand=True,
            transient=True,
        )
        self._overall = self._live.add_task("", total=None, note="")
        self._current = self._live.add_task("", total=None, note="")
        with self._live:
            yield
        self._live = None

    def begin(self, run: Run) -> None:
        """Announces the run that comes next."""
        self._run = run
        self._step = 0
        self._first: tuple[int, float] | None = None
        self._show(None)

    def step(self, step: int, loss: float) -> None:
        """Tells how many steps of the current run are done.

        Args:
            step: The number of steps done; one or many more than last time, or
                many at once where a run is continued.
            loss: The loss of the last one.
        """
        self._step = step
        if self._first is None:
            # What comes before is traced and compiled, and says nothing.
            self._first = step, time.monotonic()
        self._show(loss)

    def finish(self, run: Run, outcome: Outcome) -> None:
        """Tells that a run is finished."""
        self._run = None
        results = self._results
        line = (
            f"{len(results.outcomes):{len(str(len(results.runs)))}d}"
            f"/{len(results.runs)}  {describe(run):<{self._width}}  "
            f"accuracy {outcome.test_accuracy:6.2%}  "
            f"sparsity {outcome.achieved_sparsity:6.2%}"
        )
        if self._live is None:
            line += f"  {_duration(self.seconds_left())} left"
        self.console.print(line, soft_wrap=True)
        self._line_time = time.monotonic()

    def seconds_left(self) -> float:
        """An estimate of the seconds that the study still takes."""
        return sum(
            self._step_seconds(run)
            * (run.steps - (self._step if run == self._run else 0))
            for run in self._results.pending
        )

    def _show(self, loss: float | None) -> None:
        run, results = self._run, self._results
        done, total = len(results.outcomes), len(results.runs)
        left = _duration(self.seconds_left())
        step = f"step {self._step:,} of {run.steps:,}"
        if loss is not None:
            step += f", loss {loss:.3f}"
        if self._live is not None:
            cost = sum(self._cost(run) for run in results.outcomes)
            cost += self._cost(run) * self._step / run.steps
            self._live.update(
                self._overall,
                description=f"[bold]{done} of {total} runs",
                completed=cost,
                total=self._total,
                note=f"{left} left",
            )
            self._live.update(
                self._current,
                description=describe(run),
                completed=self._step,
                total=run.steps,
                note=step,
            )
        elif time.monotonic() - self._line_time > _LINE_INTERVAL:
            self.console.print(
                f"{describe(run)}: {step}, {left} left", soft_wrap=True
            )
            self._line_time = time.monotonic()

    def _step_seconds(self, run: Run) -> float:
        """The pace of a run's technique, measured or guessed."""
        if self._run is not None and run.technique == self._run.technique:
            first_step, first_time = self._first or (0, 0.0)
            if self._first and self._step - first_step >= 19:
                elapsed = time.monotonic() - first_time
                return elapsed / (self._step - first_step)
        outcomes = self._results.outcomes
        measured = {
            other.technique: outcome.seconds / other.steps
            for other, outcome in outcomes.items()
        }
        if run.technique in measured:
            return measured[run.technique]
        plain = [
            outcome.seconds / other.steps / _relative_cost(other)
            for other, outcome in outcomes.items()
        ]
        pace = sum(plain) / len(plain) if plain else _PLAIN_STEP_SECONDS
        return pace * _relative_cost(run)

    def _cost(self, run: Run) -> float:
        return run.steps * _relative_cost(run)


def describe(run: Run) -> str:
    """The technique and setting of a run, as text for people."""
    text = f"{run.title} {run.setting}".strip()
    return f"{text} seed {run.seed}" if run.seed else text


def summary(results: Results) -> Table:
    """The table of all finished runs, one row for each setting.

    Where a setting has several seeds, a row holds their means, and behind them
    half the distance from the lowest to the highest value.

    Args:
        results: The results of the study.

    Returns:
        A table for `rich` to print.
    """
    settings: dict[Run, list[Outcome]] = {}
    for run, outcome in results.ordered():
        setting = dataclasses.replace(run, seed=0)
        settings.setdefault(setting, []).append(outcome)
    counts = {len(outcomes) for outcomes in settings.values()}
    caption = None
    if max(counts, default=1) > 1:
        number = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        caption = f"mean of {number} seeds ± half their range"
    table = Table(
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
        caption=caption,
        caption_justify="left",
    )
    table.add_column("technique", no_wrap=True)
    table.add_column("setting", no_wrap=True)
    for heading in ("sparsity", "accuracy", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for run, outcomes in settings.items():
        if last not in (None, run.technique):
            table.add_section()
        table.add_row(
            "" if run.technique == last else run.title,
            run.setting,
            _percent([outcome.achieved_sparsity for outcome in outcomes]),
            _percent([outcome.test_accuracy for outcome in outcomes]),
            f"{sum(o.seconds for o in outcomes) / len(outcomes):.1f} s",
        )
        last = run.technique
    return table


def _percent(values: Sequence[float]) -> str:
    """The mean and, of several values, half their range, in percent."""
    text = f"{sum(values) / len(values):.2%}"
    if len(values) == 1:
        return text
    return f"{text} ± {50 * (max(values) - min(values)):.2f}"


def _relative_cost(run: Run) -> float:
    return 1.0 if run.penalty is None else _PENALIZED_STEP


def _duration(seconds: float) -> str:
    """Minutes and seconds, as in 3:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
