"""Figures of a study."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import sos
from sos.experiments.results import FinishedRun
from sos.experiments.runs import Result
from sos.files import atomic_write, storage_errors

# Colours that people with any kind of colour blindness can distinguish (Okabe
# and Ito 2008), each with a marker for prints in grey.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
# For variants of one technique, such as those with other rules.
_LINES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)))
_DENSE_COLOUR = "#444444"
# Ticks in percent. Both figures draw density on a log scale, where 90, 95 and
# 98 % sparsity are as far apart as 50, 75 and 90 %.
_SPARSITIES = (0, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
# Density at which a layer without weights is drawn, the end of the axis.
_LEAST_DENSITY = 1e-3
_ACCURACIES = (
    *(0, 20, 30, 40, 50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94),
    *(95, 96, 97, 98, 99, 99.5),
)
# Error at which a model without errors is drawn.
_LEAST_ERROR = 1e-3
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],  # It comes with matplotlib.
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.title_fontsize": 8,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.7,
    "savefig.dpi": 250,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
}
# The names of more layers are drawn at an angle.
_MAX_HORIZONTAL_NAMES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Curve:
    """The results of runs of one label, and their style.

    Attributes:
        label: Label in the legend.
        dense: Whether the models are dense.
        points: For each point, the results of its seeds.
        colour: Colour of lines and markers.
        marker: Marker of matplotlib.
        filled: Whether markers are filled; those of variants are not.
        line: Line style of matplotlib.
    """

    label: str
    dense: bool
    points: Sequence[Sequence[Result]]
    colour: Any
    marker: str
    filled: bool
    line: Any


def save_tradeoff(path: Path, runs: Iterable[FinishedRun]) -> None:
    """Draws accuracy against achieved sparsity, a curve for each label.

    Density and error have log scales, which resolve sparsities and accuracies
    close to one. With several seeds, the curves join the means, and bars, or a
    band for dense models, extend from the lowest to the highest value. Models
    without weights are omitted.

    Args:
        path: The PNG file, written atomically.
        runs: Finished runs with the metric "accuracy".

    Raises:
        StorageError: If the file cannot be written.
    """
    curves = _curves(runs)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(6.4, 4.4)
        _log_axis(axes, "x", _SPARSITIES)
        _log_axis(axes, "y", _ACCURACIES)
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
                title=_seeds_caption(curves),
                alignment="left",
            )
        _save(figure, path)


def save_layerwise(
    path: Path, runs: Iterable[FinishedRun], sparsity: float
) -> None:
    """Draws the sparsity of each layer, a curve for each label.

    Draws those runs of each label whose mean sparsity over seeds is nearest to
    `sparsity`; the legend shows their sparsity. With several seeds, the points
    are means, and bars extend from the lowest to the highest value. Layers are
    in the order of the network. Densities below a thousandth are drawn as a
    thousandth.

    Args:
        path: The PNG file, written atomically.
        runs: Finished runs.
        sparsity: Overall sparsity at which to compare, in [0, 1].

    Raises:
        StorageError: If the file cannot be written.
    """
    curves = [
        dataclasses.replace(curve, points=[_nearest(curve.points, sparsity)])
        for curve in _curves(runs)
        if not curve.dense
    ]
    sizes = {
        weight.path: weight.size
        for curve in curves
        for result in curve.points[0]
        for weight in result.weights
    }
    with matplotlib.rc_context(_STYLE):
        long = len(sizes) > _MAX_HORIZONTAL_NAMES
        width = max(6.4, 1.0 + 0.36 * len(sizes))
        figure, axes = _new_figure(width, 5.6 if long else 4.8)
        _log_axis(axes, "y", _SPARSITIES)
        for i, curve in enumerate(curves):
            # Side by side, to not hide each other.
            shift = 0.15 * (i - (len(curves) - 1) / 2)
            _draw_profile(axes, curve, sizes, shift, 4.5 if long else 5.5)
        _end_at_a_tick(axes)
        axes.set_ylabel("Sparsity of the layer (density on a log scale)")
        axes.set_xlabel("Layer, with its number of weights")
        axes.set_xlim(-0.5, max(len(sizes), 1) - 0.5)
        axes.grid(visible=False, axis="x")
        _name_layers(axes, sizes)
        if sizes:
            caption = _seeds_caption(curves)
            figure.legend(
                loc="outside upper center",
                ncols=3 if long else 2,
                title="Overall sparsity in brackets"
                + (f". {caption}" if caption else ""),
            )
        _save(figure, path)


def _curves(runs: Iterable[FinishedRun]) -> list[_Curve]:
    """Groups runs into curves, in the order of the runs."""
    points: dict[str, dict[tuple, list[Result]]] = {}
    first: dict[str, FinishedRun] = {}
    for run in runs:
        first.setdefault(run.label, run)
        label_points = points.setdefault(run.label, {})
        label_points.setdefault(run.point, []).append(run.result)
    registered = list(sos.extend.techniques())
    variants: dict[str | None, int] = {}
    curves = []
    for label, run in first.items():
        dense = run.result.sparsity is None
        # The same style in every study. Runs with rules but no technique come
        # after all techniques.
        index = len(registered)
        if run.technique in registered:
            index = registered.index(run.technique)
        variant = variants.setdefault(run.technique, 0)
        variants[run.technique] += 1
        colour = _COLOURS[index % len(_COLOURS)]
        curves.append(
            _Curve(
                label=label,
                dense=dense,
                points=list(points[label].values()),
                colour=_DENSE_COLOUR if dense else _lighter(colour, variant),
                marker="" if dense else _MARKERS[index % len(_MARKERS)],
                filled=variant == 0,
                line=_LINES[variant % len(_LINES)],
            )
        )
    return curves


def _marker_style(curve: _Curve) -> dict[str, Any]:
    """Returns the arguments of `Axes.plot` for markers."""
    style = {"marker": curve.marker}
    if not curve.filled:
        style |= {
            "markerfacecolor": "white",
            "markeredgecolor": curve.colour,
            "markeredgewidth": 1.2,
        }
    return style


def _lighter(colour: str, variant: int) -> tuple[float, float, float]:
    """Returns the colour of a variant; later variants are lighter."""
    fraction = 1 - 0.72**variant
    return tuple(c + (1 - c) * fraction for c in colors.to_rgb(colour))


def _draw_dense(axes: Axes, curve: _Curve) -> None:
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


def _draw_curve(axes: Axes, curve: _Curve) -> None:
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
    _draw_bars(axes, curve, x, y, along="x", values=all_x)
    _draw_bars(axes, curve, x, y, along="y", values=all_y)
    axes.plot(
        x,
        y,
        color=curve.colour,
        linestyle=curve.line,
        **_marker_style(curve),
        markersize=6,
        linewidth=1.5,
        label=curve.label,
        zorder=3,
    )


def _draw_profile(
    axes: Axes,
    curve: _Curve,
    sizes: Mapping[str, int],
    shift: float,
    markersize: float,
) -> None:
    (group,) = curve.points
    densities: dict[str, list[float]] = {}
    for result in group:
        for weight in result.weights:
            density = max(1 - weight.sparsity, _LEAST_DENSITY)
            densities.setdefault(weight.path, []).append(density)
    if not densities:
        return
    positions = {path: i + shift for i, path in enumerate(sizes)}
    x = [positions[path] for path in densities]
    y = [np.mean(values) for values in densities.values()]
    _draw_bars(axes, curve, x, y, along="y", values=densities.values())
    overall = np.mean([result.sparsity for result in group])
    axes.plot(
        x,
        y,
        color=curve.colour,
        linestyle=curve.line,
        **_marker_style(curve),
        markersize=markersize,
        linewidth=1.0,
        label=f"{curve.label} ({overall:.1%})",
        zorder=3,
    )


def _draw_bars(
    axes: Axes,
    curve: _Curve,
    x: Sequence[float],
    y: Sequence[float],
    *,
    along: str,
    values: Iterable[Sequence[float]],
) -> None:
    """Draws bars over the range of values, along x or y, below the points.

    Omits bars of length 0.
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
                ecolor=curve.colour,
                elinewidth=1.0,
                capsize=2.5,
                capthick=1.0,
                zorder=2.5,
            )


def _error(result: Result) -> float:
    return max(1 - result.metrics["accuracy"], _LEAST_ERROR)


def _nearest(
    points: Iterable[Sequence[Result]], sparsity: float
) -> Sequence[Result]:
    """Returns the results of the point with the nearest mean sparsity."""
    return min(
        points,
        key=lambda group: abs(
            np.mean([result.sparsity for result in group]) - sparsity
        ),
    )


def _seeds_caption(curves: Iterable[_Curve]) -> str | None:
    """Returns the meaning of points and bars, if there are several seeds."""
    counts = {len(g) for curve in curves for g in curve.points}
    if not counts or max(counts) == 1:
        return None
    low, high = min(counts), max(counts)
    number = str(high) if low == high else f"{low} to {high}"
    return f"Mean and range of {number} seeds"


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Without pyplot, which holds figures and may need a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _log_axis(axes: Axes, name: str, percents: Sequence[float]) -> None:
    """Sets a log scale of 1 - p with ticks of p, the highest last."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_inverted(True)
    axis.set_major_locator(ticker.FixedLocator([1 - p / 100 for p in percents]))
    axis.set_major_formatter(lambda value, _: f"{100 * (1 - value):.4g}%")
    axis.set_minor_locator(ticker.NullLocator())


def _end_at_a_tick(axes: Axes) -> None:
    """Moves the upper end of the y axis to a tick."""
    bottom, _ = axes.get_ylim()
    ticks = axes.get_yticks()
    # The least density that is drawn; infinite without curves.
    least = axes.dataLim.y0
    top = max((tick for tick in ticks if tick <= least), default=ticks[-1])
    labels = [f"{100 * (1 - tick):.4g}%" for tick in ticks]
    labels[-1] = f"≥ {labels[-1]}"
    axes.set_yticks(ticks, labels)
    # Leaves room for half a marker.
    axes.set_ylim(bottom, 0.93 * top)


def _name_layers(axes: Axes, sizes: Mapping[str, int]) -> None:
    horizontal = len(sizes) <= _MAX_HORIZONTAL_NAMES
    labels = []
    for path, size in sizes.items():
        count = f"{size:,}" if size < 10_000 else f"{size / 1000:,.0f}k"
        separator = "\n" if horizontal else "  "
        labels.append(f"{path.removesuffix('/kernel')}{separator}{count}")
    axes.set_xticks(range(len(labels)), labels)
    if not horizontal:
        axes.tick_params(axis="x", labelrotation=55, labelsize=7.5)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _save(figure: Figure, path: Path) -> None:
    with (
        storage_errors(f"{path} could not be written"),
        atomic_write(path) as temporary,
    ):
        figure.savefig(temporary, format="png")
