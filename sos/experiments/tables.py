"""Tables of a study for readers."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from sos.experiments import comparisons
from sos.experiments.results import FinishedRun


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        headings: Headings of the columns.
        rows: The rows; the first text of each is its heading.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)]]
        return "\n".join(
            "| " + " | ".join(row) + " |" for row in [*lines, *self.rows]
        )


def accuracy_table(runs: Iterable[FinishedRun]) -> Table:
    """Returns the accuracy by technique and sparsity.

    Args:
        runs: Finished runs, in the order of the table.

    Returns:
        A table with a row for each label, and columns for dense networks and
        the sparsities of the study. A cell has the mean over seeds and, of
        several, the range, in percent. Between two points of a technique
        accuracy is linear in the logarithm of the density.
    """
    runs = list(runs)
    sparsities = comparisons.target_sparsities(runs)
    labels: dict[str, list[FinishedRun]] = {}
    for run in runs:
        labels.setdefault(run.label, []).append(run)
    rows = []
    for label, group in labels.items():
        dense = [
            accuracy
            for run in group
            if run.result.sparsity is None
            and (accuracy := comparisons.accuracy(run)) is not None
        ]
        values = comparisons.by_sparsity(group, sparsities)
        cells = [dense, *([*values.get(s, {}).values()] for s in sparsities)]
        rows.append([label, *map(_mean_and_range, cells)])
    headings = ["technique", "dense", *(f"{100 * s:.4g} %" for s in sparsities)]
    return Table(headings, rows)


def _mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{statistics.fmean(values):.1f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.1f}–{max(values):.1f})"
