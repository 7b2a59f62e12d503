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

# Colours that people with any kind of colour blindness can tell apart (Okabe
# and Ito 2008), each with a marker, so that grey prints do as well.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
# Variants of one technique, such as those with other rules.
_LINES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)))
_DENSE_COLOUR = "#444444"
# In percent. Both figures draw sparsity by the logarithm of the density, on
# which 90, 95 and 98 % are as far from each other as 50, 75 and 90 %.
_SPARSITIES = (0, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
# A layer without any weight left is drawn here, where the axis ends.
_LEAST_DENSITY = 1e-3
_ACCURACIES = (
    *(0, 20, 30, 40, 50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94),
    *(95, 96, 97, 98, 99, 99.5),
)
# A model without a mistake is drawn here.
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
# More layers than these have their names at an angle.
_LEVEL_NAMES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Technique:
    """The runs of one technique, and how they are drawn.

    Attributes:
        label: Its name.
        dense: Whether it makes nothing sparse.
        points: For each point, the results of its seeds.
        colour: Colour of lines and markers.
        marker: Marker, as matplotlib calls it.
        filled: Whether markers are filled; those of variants are not.
        line: Line style, as matplotlib calls it.
    """

    label: str
    dense: bool
    points: Sequence[Sequence[Result]]
    colour: Any
    marker: str
    filled: bool
    line: Any


def save_tradeoff(path: Path, runs: Iterable[FinishedRun]) -> None:
    """Draws accuracy against achieved sparsity, a curve for each technique.

    Sparsity is drawn by the logarithm of the density, and accuracy by that of
    the error, so that what is close to one can be told apart. Where there are
    several seeds, the curves join the means, and bars, or a band for dense
    models, reach from the lowest to the highest value. A model without any
    weight left has no place there.

    Args:
        path: The PNG file; it is complete or, on an error, as it was before.
        runs: Finished runs, with the metric "accuracy".

    Raises:
        StorageError: If the file cannot be written.
    """
    techniques = _techniques(runs)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(6.4, 4.4)
        _log_axis(axes, "x", _SPARSITIES)
        _log_axis(axes, "y", _ACCURACIES)
        for technique in techniques:
            if technique.dense:
                _draw_dense(axes, technique)
            else:
                _draw_curve(axes, technique)
        axes.set_xlabel("Sparsity reached (density on a log scale)")
        axes.set_ylabel("Test accuracy (error on a log scale)")
        # Of models without any weight left there is none.
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="lower left",
                title=_seeds_note(techniques),
                alignment="left",
            )
        _save(figure, path)


def save_layerwise(
    path: Path, runs: Iterable[FinishedRun], sparsity: float
) -> None:
    """Draws how sparse each technique makes each layer.

    Of every technique the point is drawn whose sparsity, in the mean over
    seeds, is nearest to the one that is asked for; the legend says what it is.
    Where there are several seeds, the points are means, and bars reach from
    the lowest to the highest value. Layers are in the order of the network;
    one with less than a thousandth of its weights left is drawn as if it had
    a thousandth.

    Args:
        path: The PNG file; it is complete or, on an error, as it was before.
        runs: Finished runs.
        sparsity: The overall sparsity at which to compare, in [0, 1].

    Raises:
        StorageError: If the file cannot be written.
    """
    techniques = [
        dataclasses.replace(
            technique, points=[_nearest(technique.points, sparsity)]
        )
        for technique in _techniques(runs)
        if not technique.dense
    ]
    sizes = {
        weight.path: weight.size
        for technique in techniques
        for result in technique.points[0]
        for weight in result.weights
    }
    with matplotlib.rc_context(_STYLE):
        long = len(sizes) > _LEVEL_NAMES
        width = max(6.4, 1.0 + 0.36 * len(sizes))
        figure, axes = _new_figure(width, 5.6 if long else 4.8)
        _log_axis(axes, "y", _SPARSITIES)
        for i, technique in enumerate(techniques):
            # Side by side, so that they do not hide each other.
            shift = 0.15 * (i - (len(techniques) - 1) / 2)
            _draw_profile(axes, technique, sizes, shift, 4.5 if long else 5.5)
        _end_at_a_tick(axes)
        axes.set_ylabel("Sparsity of the layer (density on a log scale)")
        axes.set_xlabel("Layer, with its number of weights")
        axes.set_xlim(-0.5, max(len(sizes), 1) - 0.5)
        axes.grid(visible=False, axis="x")
        _name_layers(axes, sizes)
        if sizes:
            note = _seeds_note(techniques)
            figure.legend(
                loc="outside upper center",
                ncols=3 if long else 2,
                title="Overall sparsity in brackets"
                + (f". {note}" if note else ""),
            )
        _save(figure, path)


def _techniques(runs: Iterable[FinishedRun]) -> list[_Technique]:
    """The techniques in the order of the results, with colours and markers."""
    points: dict[str, dict[tuple, list[Result]]] = {}
    first: dict[str, FinishedRun] = {}
    for run in runs:
        first.setdefault(run.label, run)
        of_technique = points.setdefault(run.label, {})
        of_technique.setdefault(run.point, []).append(run.result)
    registered = list(sos.extend.techniques())
    variants: dict[str | None, int] = {}
    techniques = []
    for label, run in first.items():
        dense = run.result.sparsity is None
        # The same in every study, whatever other techniques are in it. Rules
        # alone come after all techniques.
        place = len(registered)
        if run.technique in registered:
            place = registered.index(run.technique)
        variant = variants.setdefault(run.technique, 0)
        variants[run.technique] += 1
        colour = _COLOURS[place % len(_COLOURS)]
        techniques.append(
            _Technique(
                label=label,
                dense=dense,
                points=list(points[label].values()),
                colour=_DENSE_COLOUR if dense else _lighter(colour, variant),
                marker="" if dense else _MARKERS[place % len(_MARKERS)],
                filled=variant == 0,
                line=_LINES[variant % len(_LINES)],
            )
        )
    return techniques


def _marker_style(technique: _Technique) -> dict[str, Any]:
    """The arguments of `Axes.plot` that say how markers look."""
    style = {"marker": technique.marker}
    if not technique.filled:
        style |= {
            "markerfacecolor": "white",
            "markeredgecolor": technique.colour,
            "markeredgewidth": 1.2,
        }
    return style


def _lighter(colour: str, variant: int) -> tuple[float, float, float]:
    """The colour of a technique's variant: lighter, the later it comes."""
    share = 1 - 0.72**variant
    return tuple(c + (1 - c) * share for c in colors.to_rgb(colour))


def _draw_dense(axes: Axes, technique: _Technique) -> None:
    errors = [_error(o) for group in technique.points for o in group]
    axes.axhline(
        np.mean(errors),
        color=technique.colour,
        linestyle=(0, (5, 3)),
        linewidth=1.2,
        zorder=1.6,
        label=technique.label,
    )
    if len(errors) > 1:
        axes.axhspan(
            min(errors),
            max(errors),
            color=technique.colour,
            alpha=0.15,
            linewidth=0,
            zorder=1.5,
        )


def _draw_curve(axes: Axes, technique: _Technique) -> None:
    points = []
    for group in technique.points:
        group = [result for result in group if result.sparsity < 1]
        if group:
            densities = [1 - result.sparsity for result in group]
            errors = [_error(result) for result in group]
            # The mean as it is drawn, of the logarithms.
            density = math.exp(np.mean(np.log(densities)))
            points.append((density, densities, np.mean(errors), errors))
    if not points:
        return
    points.sort(key=lambda point: -point[0])
    x, all_x, y, all_y = zip(*points, strict=True)
    _draw_bars(axes, technique, x, y, along="x", values=all_x)
    _draw_bars(axes, technique, x, y, along="y", values=all_y)
    axes.plot(
        x,
        y,
        color=technique.colour,
        linestyle=technique.line,
        **_marker_style(technique),
        markersize=6,
        linewidth=1.5,
        label=technique.label,
        zorder=3,
    )


def _draw_profile(
    axes: Axes,
    technique: _Technique,
    sizes: Mapping[str, int],
    shift: float,
    markersize: float,
) -> None:
    (group,) = technique.points
    densities: dict[str, list[float]] = {}
    for result in group:
        for weight in result.weights:
            density = max(1 - weight.sparsity, _LEAST_DENSITY)
            densities.setdefault(weight.path, []).append(density)
    if not densities:
        return
    positions = {path: i + shift for i, path in enumerate(sizes)}
    x = [positions[path] for path in densities]
    y = [np.mean(found) for found in densities.values()]
    _draw_bars(axes, technique, x, y, along="y", values=densities.values())
    overall = np.mean([result.sparsity for result in group])
    axes.plot(
        x,
        y,
        color=technique.colour,
        linestyle=technique.line,
        **_marker_style(technique),
        markersize=markersize,
        linewidth=1.0,
        label=f"{technique.label} ({overall:.1%})",
        zorder=3,
    )


def _draw_bars(
    axes: Axes,
    technique: _Technique,
    x: Sequence[float],
    y: Sequence[float],
    *,
    along: str,
    values: Iterable[Sequence[float]],
) -> None:
    """Draws bars over all values, along x or y, under the points.

    Where there is one value, or all are equal, a bar would be a dash.
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
                ecolor=technique.colour,
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
    """The results of the point whose mean sparsity is the nearest."""
    return min(
        points,
        key=lambda group: abs(
            np.mean([result.sparsity for result in group]) - sparsity
        ),
    )


def _seeds_note(techniques: Iterable[_Technique]) -> str | None:
    """Says what points and bars are, if there are several seeds."""
    counts = {len(g) for technique in techniques for g in technique.points}
    if not counts or max(counts) == 1:
        return None
    low, high = min(counts), max(counts)
    number = str(high) if low == high else f"{low} to {high}"
    return f"Mean and range of {number} seeds"


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Without pyplot, which keeps figures and may ask for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _log_axis(axes: Axes, name: str, percents: Sequence[float]) -> None:
    """Draws 1 - p by its logarithm, where ticks say the p, the highest last."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_inverted(True)
    axis.set_major_locator(ticker.FixedLocator([1 - p / 100 for p in percents]))
    axis.set_major_formatter(lambda value, _: f"{100 * (1 - value):.4g}%")
    axis.set_minor_locator(ticker.NullLocator())


def _end_at_a_tick(axes: Axes) -> None:
    """Moves the upper end of the layers' axis to a tick, for its label."""
    bottom, _ = axes.get_ylim()
    ticks = axes.get_yticks()
    # The least density that is drawn; of nothing it is infinite.
    least = axes.dataLim.y0
    top = max((tick for tick in ticks if tick <= least), default=ticks[-1])
    labels = [f"{100 * (1 - tick):.4g}%" for tick in ticks]
    labels[-1] = f"≥ {labels[-1]}"
    axes.set_yticks(ticks, labels)
    # With room for half a marker.
    axes.set_ylim(bottom, 0.93 * top)


def _name_layers(axes: Axes, sizes: Mapping[str, int]) -> None:
    level = len(sizes) <= _LEVEL_NAMES
    labels = []
    for path, size in sizes.items():
        count = f"{size:,}" if size < 10_000 else f"{size / 1000:,.0f}k"
        between = "\n" if level else "  "
        labels.append(f"{path.removesuffix('/kernel')}{between}{count}")
    axes.set_xticks(range(len(labels)), labels)
    if not level:
        axes.tick_params(axis="x", labelrotation=55, labelsize=7.5)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _save(figure: Figure, path: Path) -> None:
    with (
        storage_errors(f"{path} could not be written"),
        atomic_write(path) as temporary,
    ):
        figure.savefig(temporary, format="png")
