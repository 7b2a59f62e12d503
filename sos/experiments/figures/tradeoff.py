"""Accuracy against sparsity."""

import math
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.curves import (
    Curve,
    draw_bars,
    group_curves,
    marker_style,
    seeds_caption,
)
from sos.experiments.figures.style import (
    SPARSITIES,
    STYLE,
    log_axis,
    new_figure,
)
from sos.experiments.results import FinishedRun
from sos.experiments.runs import Result

_ACCURACIES = (
    *(0, 20, 30, 40, 50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94),
    *(95, 96, 97, 98, 99, 99.5),
)
# Error at which a model without errors is drawn.
_LEAST_ERROR = 1e-3


def draw_tradeoff(runs: Iterable[FinishedRun]) -> Figure:
    """Draws accuracy against achieved sparsity, a curve for each label.

    Density and error have log scales, which resolve sparsities and accuracies
    close to one. With several seeds, the curves join the means, and bars, or a
    band for dense models, extend from the lowest to the highest value. Models
    without weights are omitted.

    Args:
        runs: Finished runs with the metric "accuracy".

    Returns:
        The figure.
    """
    curves = group_curves(runs)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(6.4, 4.4)
        log_axis(axes, "x", SPARSITIES)
        log_axis(axes, "y", _ACCURACIES)
        for curve in curves:
            if curve.dense:
                _draw_dense(axes, curve)
            else:
                _draw_curve(axes, curve)
        axes.set_xlabel("Sparsity reached (density on a log scale)")
        axes.set_ylabel("Test accuracy (error on a log scale)")
        # There is none if all models are without weights.
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="lower left",
                title=seeds_caption(curves),
                alignment="left",
            )
    return figure


def _draw_dense(axes: Axes, curve: Curve) -> None:
    errors = [_error(o) for group in curve.points for o in group]
    axes.axhline(
        np.mean(errors),
        color=curve.colour,
        linestyle=(0, (5, 3)),
        linewidth=1.2,
        zorder=1.6,
        label=curve.label,
    )
    if len(errors) > 1:
        axes.axhspan(
            min(errors),
            max(errors),
            color=curve.colour,
            alpha=0.15,
            linewidth=0,
            zorder=1.5,
        )


def _draw_curve(axes: Axes, curve: Curve) -> None:
    points = []
    for group in curve.points:
        group = [result for result in group if result.sparsity < 1]
        if group:
            densities = [1 - result.sparsity for result in group]
            errors = [_error(result) for result in group]
            # The mean of the logarithms, as drawn.
            density = math.exp(np.mean(np.log(densities)))
            points.append((density, densities, np.mean(errors), errors))
    if not points:
        return
    points.sort(key=lambda point: -point[0])
    x, all_x, y, all_y = zip(*points, strict=True)
    draw_bars(axes, curve, x, y, along="x", values=all_x)
    draw_bars(axes, curve, x, y, along="y", values=all_y)
    axes.plot(
        x,
        y,
        color=curve.colour,
        linestyle=curve.line,
        **marker_style(curve),
        markersize=6,
        linewidth=1.5,
        label=curve.label,
        zorder=3,
    )


def _error(result: Result) -> float:
    return max(1 - result.metrics["accuracy"], _LEAST_ERROR)
