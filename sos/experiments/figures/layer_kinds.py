"""The sparsity of each kind of layer."""

import math
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.curves import (
    Curve,
    draw_bars,
    seeds_caption,
)
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import (
    INK,
    SPARSITIES,
    STYLE,
    log_axis,
    new_grid,
    set_least_range,
    share_legend,
    wrap,
)
from sos.experiments.results import FinishedRun

# Density at which a kind without weights is drawn, the end of the axis.
_LEAST_DENSITY = 1e-3
_MAX_COLUMNS = 5
# Of a plot, in inches.
_WIDTH, _HEIGHT = 1.85, 2.4
# Relative difference of densities that count as equal.
_TOLERANCE = 0.02
_HORIZONTAL_MARGIN = 1.25
# Quotient of the limits of densities: one overall sparsity needs a scale, too.
_LEAST_RANGE = 4.0


def draw_layer_kinds(study: Study) -> Figure | None:
    """Draws the sparsity of each kind of layer against overall sparsity.

    There is a plot for each kind that the task names, with its part of the
    weights, and a curve for each label. On the dotted diagonal a kind is as
    sparse as the network. Labels whose kinds are always equally sparse, as
    those of pruning without rules, would hide each other there: the legend
    names them for the diagonal instead. With several seeds, points are means,
    and bars extend from the lowest to the highest value. Densities below a
    thousandth are drawn as a thousandth.

    Args:
        study: The study.

    Returns:
        The figure; None if no sparse model has two kinds of layers.
    """
    curves = [
        drawn
        for curve in study.techniques
        if (drawn := curve.select(lambda run: len(kind_densities(run)) > 1))
    ]
    sizes = _sizes(_runs(curves))
    if not sizes:
        return None
    uniform = [curve for curve in curves if _is_uniform(curve)]
    rows = -(-len(sizes) // _MAX_COLUMNS)
    columns = -(-len(sizes) // rows)
    with matplotlib.rc_context(STYLE):
        figure, grid = new_grid(
            max(4.6, 0.6 + _WIDTH * columns),
            0.3 + _HEIGHT * rows,
            rows,
            columns,
            sharex=True,
            sharey=True,
        )
        for axes in grid.flat[len(sizes) :]:
            axes.set_visible(False)
        total = sum(sizes.values())
        for axes, (kind, size) in zip(grid.flat, sizes.items(), strict=False):
            log_axis(axes, "x", SPARSITIES)
            log_axis(axes, "y", SPARSITIES)
            for curve in curves:
                if curve not in uniform:
                    _draw_curve(axes, curve, kind)
            part = f"{_percent(size / total)} of weights"
            title = wrap(kind[:1].upper() + kind[1:], _WIDTH - 0.1)
            axes.set_title(f"{title}\n{part}", size=9)
            # Also above an empty place.
            axes.tick_params(labelbottom=True)
        _set_limits(axes, curves)
        if len(uniform) == len(curves):
            # No curve has set them.
            axes.set_ylim(axes.get_xlim())
        equal = ", ".join(curve.label for curve in uniform)
        for axes in grid.flat[: len(sizes)]:
            _draw_diagonal(axes, f"all kinds alike: {equal}" if equal else None)
        figure.supxlabel("Overall sparsity (density on a log scale)", size=10)
        figure.supylabel("Sparsity of the layers", size=10)
        share_legend(figure, seeds_caption(curves))
    return figure


def kind_densities(run: FinishedRun) -> dict[str, float]:
    """Returns the density of each kind of layer, in the order of the network.

    Args:
        run: The run.

    Returns:
        The fraction of nonzeros in all weights of the kind; empty if the task
        names no kinds.
    """
    kept: dict[str, float] = {}
    for weight in run.result.weights:
        if weight.kind is not None:
            count = (1 - weight.sparsity) * weight.size
            kept[weight.kind] = kept.get(weight.kind, 0.0) + count
    sizes = _sizes([run])
    return {kind: count / sizes[kind] for kind, count in kept.items()}


def _sizes(runs: Iterable[FinishedRun]) -> dict[str, int]:
    """Returns the number of weights of each kind, as in the first run."""
    sizes: dict[str, int] = {}
    for run in runs:
        own: dict[str, int] = {}
        for weight in run.result.weights:
            if weight.kind is not None:
                own[weight.kind] = own.get(weight.kind, 0) + weight.size
        for kind, size in own.items():
            sizes.setdefault(kind, size)
    return sizes


def _is_uniform(curve: Curve) -> bool:
    """Returns whether all kinds are as sparse as the network in all runs."""
    return all(
        math.isclose(density, _overall(run), rel_tol=_TOLERANCE)
        for run in _runs([curve])
        for density in kind_densities(run).values()
    )


def _draw_curve(axes: Axes, curve: Curve, kind: str) -> None:
    points = []
    for runs in curve.points:
        runs = [run for run in runs if kind in kind_densities(run)]
        if not runs:
            continue
        densities = [
            max(kind_densities(run)[kind], _LEAST_DENSITY) for run in runs
        ]
        overall = [_overall(run) for run in runs]
        # The mean of the logarithms, as drawn.
        x = math.exp(np.mean(np.log(overall)))
        points.append((x, np.mean(densities), densities))
    if not points:
        return
    points.sort(key=lambda point: -point[0])
    x, y, all_y = zip(*points, strict=True)
    draw_bars(axes, curve, x, y, along="y", values=all_y)
    axes.plot(
        x,
        y,
        **curve.style.plot_arguments,
        markersize=5,
        linewidth=1.2,
        label=curve.label,
        zorder=3,
    )


def _overall(run: FinishedRun) -> float:
    return max(1 - run.result.sparsity, _LEAST_DENSITY)


def _set_limits(axes: Axes, curves: Sequence[Curve]) -> None:
    """Sets the limits of all plots, with room for the markers."""
    overall = [_overall(run) for run in _runs(curves)]
    axes.set_xlim(
        max(overall) * _HORIZONTAL_MARGIN, min(overall) / _HORIZONTAL_MARGIN
    )
    set_least_range(axes, "x", _LEAST_RANGE)
    set_least_range(axes, "y", _LEAST_RANGE)


def _draw_diagonal(axes: Axes, label: str | None) -> None:
    low, high = sorted(axes.get_xlim())
    bottom, top = axes.get_ylim()
    axes.plot(
        [low, high],
        [low, high],
        color=INK,
        linestyle=(0, (1, 1.5)),
        linewidth=1.2,
        zorder=1.7,
        label=label or "as sparse as the network",
    )
    axes.set_ylim(bottom, top)


def _runs(curves: Iterable[Curve]) -> list[FinishedRun]:
    return [run for c in curves for point in c.points for run in point]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g}%"
