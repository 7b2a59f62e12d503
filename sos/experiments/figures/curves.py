"""Results of runs, grouped into curves."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import colors
from matplotlib.axes import Axes

from sos.experiments.figures.style import (
    DENSE_COLOUR,
    LINES,
    PAPER,
    technique_style,
)
from sos.experiments.results import FinishedRun
from sos.experiments.runs import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
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


def group_curves(runs: Iterable[FinishedRun]) -> list[Curve]:
    """Groups runs into curves, in the order of the runs."""
    points: dict[str, dict[tuple, list[Result]]] = {}
    first: dict[str, FinishedRun] = {}
    for run in runs:
        first.setdefault(run.label, run)
        label_points = points.setdefault(run.label, {})
        label_points.setdefault(run.point, []).append(run.result)
    variants: dict[str | None, int] = {}
    curves = []
    for label, run in first.items():
        dense = run.result.sparsity is None
        colour, marker = technique_style(run.technique)
        variant = variants.setdefault(run.technique, 0)
        variants[run.technique] += 1
        curves.append(
            Curve(
                label=label,
                dense=dense,
                points=list(points[label].values()),
                colour=DENSE_COLOUR if dense else lighter(colour, variant),
                marker="" if dense else marker,
                filled=variant == 0,
                line=LINES[variant % len(LINES)],
            )
        )
    return curves


def marker_style(curve: Curve) -> dict[str, Any]:
    """Returns the arguments of `Axes.plot` for markers."""
    style = {"marker": curve.marker}
    if not curve.filled:
        style |= {
            "markerfacecolor": PAPER,
            "markeredgecolor": curve.colour,
            "markeredgewidth": 1.2,
        }
    return style


def lighter(colour: str, variant: int) -> tuple[float, float, float]:
    """Returns the colour of a variant; later variants are lighter."""
    fraction = 1 - 0.72**variant
    return tuple(c + (1 - c) * fraction for c in colors.to_rgb(colour))


def draw_bars(
    axes: Axes,
    curve: Curve,
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


def seeds_caption(curves: Iterable[Curve]) -> str | None:
    """Returns the meaning of points and bars, if there are several seeds."""
    counts = {len(g) for curve in curves for g in curve.points}
    if not counts or max(counts) == 1:
        return None
    low, high = min(counts), max(counts)
    number = str(high) if low == high else f"{low} to {high}"
    return f"Mean and range of {number} seeds"
