"""Accuracy against sparsity."""

import dataclasses
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.curves import (
    Curve,
    accuracy,
    draw_bars,
    seeds_caption,
)
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import (
    SPARSITIES,
    STYLE,
    log_axis,
    new_figure,
)
from sos.experiments.results import FinishedRun

_ACCURACIES = (
    *(0, 20, 30, 40, 50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94),
    *(95, 96, 97, 98, 99, 99.5),
)
# Error at which a model without errors is drawn.
_LEAST_ERROR = 1e-3


def draw_tradeoff(study: Study) -> Figure | None:
    """Draws accuracy against achieved sparsity, a curve for each label.

    Density and error have log scales, which resolve sparsities and accuracies
    close to one. With several seeds, the curves join the means, and bars, or a
    band for dense models, extend from the lowest to the highest value. Runs
    without a finite accuracy and models without weights are omitted.

    Args:
        study: The study.

    Returns:
        The figure; None if there is nothing to draw.
    """
    curves = [c for curve in study.curves if (c := _drawn(curve)).points]
    if not curves:
        return None
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
        axes.legend(
            loc="lower left", title=seeds_caption(curves), alignment="left"
        )
    return figure


def _drawn(curve: Curve) -> Curve:
    """Returns a curve without the runs that cannot be drawn."""
    points = [
        [
            run
            for run in group
            if accuracy(run) is not None and run.result.sparsity != 1
        ]
        for group in curve.points
    ]
    return dataclasses.replace(
        curve, points=[group for group in points if group]
    )


def _draw_dense(axes: Axes, curve: Curve) -> None:
    errors = [_error(run) for group in curve.points for run in group]
    axes.axhline(
        np.mean(errors),
        color=curve.style.colour,
        linestyle=curve.style.line,
        linewidth=1.2,
        zorder=1.6,
        label=curve.label,
    )
    if len(errors) > 1:
        axes.axhspan(
            min(errors),
            max(errors),
            color=curve.style.colour,
            alpha=0.15,
            linewidth=0,
            zorder=1.5,
        )


def _draw_curve(axes: Axes, curve: Curve) -> None:
    points = []
    for group in curve.points:
        densities = [1 - run.result.sparsity for run in group]
        errors = [_error(run) for run in group]
        # The mean of the logarithms, as drawn.
        density = math.exp(np.mean(np.log(densities)))
        points.append((density, densities, np.mean(errors), errors))
    points.sort(key=lambda point: -point[0])
    x, all_x, y, all_y = zip(*points, strict=True)
    draw_bars(axes, curve, x, y, along="x", values=all_x)
    draw_bars(axes, curve, x, y, along="y", values=all_y)
    axes.plot(
        x,
        y,
        **curve.style.plot_arguments,
        markersize=6,
        linewidth=1.5,
        label=curve.label,
        zorder=3,
    )


def _error(run: FinishedRun) -> float:
    return max(1 - accuracy(run), _LEAST_ERROR)
