"""Accuracies on an axis with a log scale of the error."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from sos.experiments.figures.curves import Curve, accuracy, draw_bars
from sos.experiments.figures.style import log_axis, set_least_range
from sos.experiments.results import FinishedRun

_ACCURACIES = (
    *(0, 20, 30, 40, 50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94),
    *(95, 96, 97, 98, 99, 99.5),
)
# Error at which a model without errors is drawn.
_LEAST_ERROR = 1e-3
# Of the limits of errors.
_LEAST_RANGE = 1.05

#: Returns the place of a run on the x axis; None if it has none.
Position = Callable[[FinishedRun], float | None]


def accuracy_axis(axes: Axes) -> None:
    """Makes the y axis one of accuracies."""
    log_axis(axes, "y", _ACCURACIES)


def widen_accuracy_axis(axes: Axes) -> None:
    """Keeps equal accuracies together. Call it when all are drawn."""
    set_least_range(axes, "y", _LEAST_RANGE)


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
        lambda run: accuracy(run) is not None and position(run) is not None
    )


def draw_dense(axes: Axes, curve: Curve) -> None:
    """Draws the mean of dense models as a line, their range as a band."""
    errors = [_error(run) for point in curve.points for run in point]
    axes.axhline(
        np.mean(errors),
        color=curve.style.colour,
        linestyle=curve.style.line,
        linewidth=1.2,
        zorder=1.6,
        label=curve.label,
    )
    if min(errors) < max(errors):
        axes.axhspan(
            min(errors),
            max(errors),
            color=curve.style.colour,
            alpha=0.15,
            linewidth=0,
            zorder=1.5,
        )


def draw_accuracies(axes: Axes, curve: Curve, position: Position) -> None:
    """Draws a curve of the means over seeds, with bars over their ranges.

    Args:
        axes: The axes.
        curve: The curve, whose runs can be drawn.
        position: As for `drawable`.
    """
    points = []
    for runs in curve.points:
        positions = [position(run) for run in runs]
        errors = [_error(run) for run in runs]
        # The mean of the logarithms, as drawn.
        x = math.exp(np.mean(np.log(positions)))
        points.append((x, positions, np.mean(errors), errors))
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


def _error(run: FinishedRun) -> float:
    return max(1 - accuracy(run), _LEAST_ERROR)
