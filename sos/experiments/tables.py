"""Scores by technique and sparsity, as a table for readers."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from sos.experiments import differences
from sos.experiments.results import FinishedRun
from sos.experiments.scores import ScoreMetric, shared_score


@dataclasses.dataclass(frozen=True)
class Cell:
    """Scores of runs that differ only in their seeds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        text = f"{self.mean:.1f}"
        return f"{text} ({self.range})" if self.range else text

    @property
    def range(self) -> str:
        """The range as text; empty if its rounded ends are equal."""
        low, high = f"{self.low:.1f}", f"{self.high:.1f}"
        return "" if low == high else f"{low}–{high}"


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """Scores by technique and sparsity.

    Attributes:
        score: The score.
        sparsities: Headings of the columns, as texts.
        rows: A label, and a cell or None for each sparsity.
    """

    score: ScoreMetric
    sparsities: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        rows = [
            ["", *self.sparsities],
            ["---", *["---"] * len(self.sparsities)],
            *(
                [label, *(str(c or "") for c in cells)]
                for label, cells in self.rows
            ),
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def score_table(runs: Iterable[FinishedRun]) -> ScoreTable:
    """Returns the scores by technique and sparsity.

    Args:
        runs: Finished runs, in the order of the table.

    Returns:
        A table with a row for each label that has scores, and columns for
        dense networks and the sparsities of the study. A cell has the mean over
        seeds and the range. Between two points of a technique, the score is
        linear in the logarithm of the density.

    Raises:
        UsageError: If the runs have different scores.
    """
    runs = list(runs)
    sparsities = differences.target_sparsities(runs)
    labels: dict[str, list[FinishedRun]] = {}
    for run in runs:
        labels.setdefault(run.label, []).append(run)
    rows = []
    for label, group in labels.items():
        dense = [
            differences.score(r) for r in group if r.result.sparsity is None
        ]
        values = differences.by_sparsity(group, sparsities)
        columns = [
            [score for score in dense if score is not None],
            *([*values.get(s, {}).values()] for s in sparsities),
        ]
        if any(columns):
            rows.append((label, [*map(_cell, columns)]))
    return ScoreTable(
        shared_score(runs),
        ["dense", *(f"{100 * s:.4g} %" for s in sparsities)],
        rows,
    )


def _cell(values: Sequence[float]) -> Cell | None:
    if not values:
        return None
    return Cell(statistics.fmean(values), min(values), max(values))
