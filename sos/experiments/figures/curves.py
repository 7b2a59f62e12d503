"""Runs, grouped into curves."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from sos.experiments.figures.style import (
    DENSE_STYLE,
    Style,
    branch_style,
    technique_style,
)
from sos.experiments.results import FinishedRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The runs of one label, and their style.

    Attributes:
        label: Label in the legend.
        points: For each point, its runs, which differ only in their seeds.
        style: Style of the label in all figures of a study.
    """

    label: str
    points: Sequence[Sequence[FinishedRun]]
    style: Style

    @property
    def dense(self) -> bool:
        """Whether the models are dense."""
        return self.points[0][0].result.sparsity is None


def group_curves(runs: Iterable[FinishedRun]) -> list[Curve]:
    """Groups runs into curves, in the order of the runs."""
    points: dict[str, dict[tuple, list[FinishedRun]]] = {}
    for run in runs:
        label_points = points.setdefault(run.label, {})
        label_points.setdefault(run.point, []).append(run)
    variants: collections.Counter[tuple] = collections.Counter()
    curves = []
    for label, groups in points.items():
        groups = list(groups.values())
        run = groups[0][0]
        if run.result.sparsity is None:
            style = DENSE_STYLE
        else:
            # The technique of a branch may be that of its trunk, or one that
            # only keeps its mask.
            key = (run.branch, None if run.branch else run.technique)
            style = (
                branch_style(run.branch, variants[key])
                if run.branch
                else technique_style(run.technique, variants[key])
            )
            variants[key] += 1
        curves.append(Curve(label=label, points=groups, style=style))
    return curves


def accuracy(run: FinishedRun) -> float | None:
    """Returns the accuracy of a run; None if it has none or it is NaN."""
    value = run.result.metrics.get("accuracy", math.nan)
    return value if math.isfinite(value) else None


def draw_bars(
    axes: Axes,
    curve: Curve,
    x: Sequence[float],
    y: Sequence[float],
    *,
    along: str,
    values: Iterable[Sequence[float]],
) -> None:
    """Draws bars over the range of values, below the points.

    Omits bars of length 0.

    Args:
        axes: The axes.
        curve: The curve.
        x: Positions of its points.
        y: Positions of its points.
        along: "x" or "y".
        values: For each point, the values over which its bar extends.
    """
    for i, group in enumerate(values):
        centre = x[i] if along == "x" else y[i]
        below, above = centre - min(group), max(group) - centre
        if min(group) < max(group):
            axes.errorbar(
                x[i],
                y[i],
                **{f"{along}err": [[max(below, 0.0)], [max(above, 0.0)]]},
                fmt="none",
                ecolor=curve.style.colour,
                elinewidth=1.0,
                capsize=2.5,
                capthick=1.0,
                zorder=2.5,
            )


def seeds_caption(curves: Iterable[Curve]) -> str | None:
    """Returns the meaning of points and bars, if there are several seeds."""
    counts = {len(group) for curve in curves for group in curve.points}
    if not counts or max(counts) == 1:
        return None
    low, high = min(counts), max(counts)
    number = str(high) if low == high else f"{low} to {high}"
    return f"Mean and range of {number} seeds"
