"""Runs, grouped into curves."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes

from sos.experiments import branch_registry
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

    @property
    def branch(self) -> str | None:
        """Name of the branch; None for a technique."""
        return self.points[0][0].branch

    def select(self, keep: Callable[[FinishedRun], bool]) -> "Curve | None":
        """Returns the curve of some of the runs; None without any.

        Args:
            keep: Returns whether to keep a run.
        """
        points = [[run for run in point if keep(run)] for point in self.points]
        points = [point for point in points if point]
        return dataclasses.replace(self, points=points) if points else None

    def by_trunk(self) -> "list[Curve]":
        """Returns a curve of the same label for each label of parents."""
        trunks: dict[tuple | None, list[Sequence[FinishedRun]]] = {}
        for point in self.points:
            parent = point[0].parent
            key = parent and (parent.label, parent.branch)
            trunks.setdefault(key, []).append(point)
        return [
            dataclasses.replace(self, points=points)
            for points in trunks.values()
        ]

    def nearest(self, sparsity: float) -> "Curve":
        """Returns the point whose mean sparsity over seeds is nearest.

        Args:
            sparsity: Overall sparsity in [0, 1].
        """
        point = min(
            self.points,
            key=lambda runs: abs(mean_sparsity(runs) - sparsity),
        )
        return dataclasses.replace(self, points=[point])


def group_curves(runs: Iterable[FinishedRun]) -> list[Curve]:
    """Groups runs into curves, in the order of the runs."""
    points: dict[tuple, dict[tuple, list[FinishedRun]]] = {}
    for run in runs:
        label_points = points.setdefault((run.label, run.branch), {})
        label_points.setdefault(run.point, []).append(run)
    # Branches with other options than the defaults are variants, also if they
    # come first.
    first = {key: [*groups.values()][0][0] for key, groups in points.items()}
    variants: collections.Counter[tuple] = collections.Counter()
    styles = {}
    for key in sorted(points, key=lambda key: _has_options(first[key])):
        run = first[key]
        # The technique of a branch may be that of its trunk, or one that only
        # keeps a mask.
        kind = (run.branch, None if run.branch else run.technique)
        if run.result.sparsity is None:
            styles[key] = DENSE_STYLE
        elif run.branch:
            styles[key] = branch_style(run.branch, variants[kind])
        else:
            styles[key] = technique_style(run.technique, variants[kind])
        variants[kind] += 1
    return [
        Curve(label=key[0], points=[*groups.values()], style=styles[key])
        for key, groups in points.items()
    ]


def _has_options(run: FinishedRun) -> bool:
    """Returns whether a branch has other options than the defaults."""
    if run.branch not in branch_registry.branches():
        return False
    defaults = branch_registry.options(run.branch)
    entries = {**defaults, **run.config["branch"]}
    return any(entries[name] != value for name, value in defaults.items())


def mean_sparsity(runs: Iterable[FinishedRun]) -> float:
    """Returns the mean overall sparsity of runs."""
    return float(np.mean([run.result.sparsity for run in runs]))


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
        curve: The curve, for its style.
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
