"""Scores on an axis: of accuracies, with a log scale of the error."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from sos.experiments.figures.curves import Curve, draw_bars
from sos.experiments.figures.style import log_axis, set_least_range
from sos.experiments.results import FinishedRun
from sos.experiments.scores import ScoreMetric

_ACCURACIES = (
    *(0, 20, 30, 40, 50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94),
    *(95, 96, 97, 98, 99, 99.5),
)
# Error at which a model without errors is drawn.
_LEAST_ERROR = 1e-3
# Quotient of the limits of errors, and difference of those of other scores.
_LEAST_RANGE = 1.05
_LEAST_DIFFERENCE = 1.0

#: Returns the place of a run on the x axis; None if it has none.
Position = Callable[[FinishedRun], float | None]


def score_axis(axes: Axes, score: ScoreMetric) -> None:
    """Makes the y axis one of scores: log of the error of a fraction."""
    if score.is_fraction:
        log_axis(axes, "y", _ACCURACIES)


def score_axis_label(score: ScoreMetric) -> str:
    """Returns the label of the y axis."""
    if score.is_fraction:
        return f"Test {score.label} (error on a log scale)"
    return score.title


def widen_score_axis(axes: Axes, score: ScoreMetric) -> None:
    """Keeps equal scores together. Call it when all are drawn."""
    if score.is_fraction:
        set_least_range(axes, "y", _LEAST_RANGE)
        return
    low, high = axes.get_ylim()
    margin = (_LEAST_DIFFERENCE - (high - low)) / 2
    if margin > 0:
        axes.set_ylim(low - margin, high + margin)


def density(run: FinishedRun) -> float | None:
    """Returns the density of a run; None if no weights are left."""
    sparsity = run.result.sparsity
    return None if sparsity == 1 else 1 - (sparsity or 0.0)


def drawable(curve: Curve, position: Position) -> Curve | None:
    """Returns a curve of the runs that can be drawn; None without any.

    Args:
        curve: The curve.
        position: Returns the place on the x axis, which has a log scale.
    """
    return curve.select(
        lambda run: (
            run.result.score_value is not None and position(run) is not None
        )
    )


def draw_dense(axes: Axes, curve: Curve) -> None:
    """Draws the mean of dense models as a line, their range as a band."""
    heights = [_height(run) for point in curve.points for run in point]
    axes.axhline(
        np.mean(heights),
        color=curve.style.colour,
        linestyle=curve.style.line,
        linewidth=1.2,
        zorder=1.6,
        label=curve.label,
    )
    if min(heights) < max(heights):
        axes.axhspan(
            min(heights),
            max(heights),
            color=curve.style.colour,
            alpha=0.15,
            linewidth=0,
            zorder=1.5,
        )


def draw_scores(axes: Axes, curve: Curve, position: Position) -> None:
    """Draws a curve of the means over seeds, with bars over their ranges.

    Args:
        axes: The axes.
        curve: The curve, whose runs can be drawn.
        position: As for `drawable`.
    """
    points = []
    for runs in curve.points:
        positions = [position(run) for run in runs]
        heights = [_height(run) for run in runs]
        # The mean of the logarithms, as drawn.
        x = math.exp(np.mean(np.log(positions)))
        points.append((x, positions, np.mean(heights), heights))
    points.sort(key=lambda point: -point[0])
    x, all_x, y, all_y = zip(*points, strict=True)
    draw_bars(axes, curve, x, y, along="x", values=all_x)
    draw_bars(axes, curve, x, y, along="y", values=all_y)
    axes.plot(
        x,
        y,
        **curve.style.plot_arguments,
        markersize=8 if curve.style.marker == "*" else 6,
        linewidth=1.5,
        label=curve.label,
        zorder=3,
    )


def _height(run: FinishedRun) -> float:
    """Returns the place of a run on the y axis."""
    value = run.result.score_value
    if run.result.score.is_fraction:
        return max(1 - value / 100, _LEAST_ERROR)
    return value
