"""The published results of the paper, alone and with the runs of a study."""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments import published
from sos.experiments.figures.curves import Curve, draw_bars, group_curves
from sos.experiments.figures.style import (
    DENSE_STYLE,
    INK,
    SPARSITIES,
    STYLE,
    Style,
    branch_style,
    log_axis,
    new_figure,
    technique_style,
)
from sos.experiments.published import PublishedPoint, PublishedScore, Reference
from sos.experiments.published_comparison import published_points, scored_runs
from sos.experiments.results import FinishedRun

# Lowest score of the axis, by model. Lower ones are counted in a note.
_LOWEST = {"resnet50": 36.0, "transformer": 8.0}
# Variants of branches, by the ends of their labels.
_VARIANTS = ("", "scratch-b", "hold")
# Step between branches of one sparsity, which are drawn side by side, as a part
# of the density.
_STEP = 0.03

T = TypeVar("T", PublishedPoint, PublishedScore)


def draw_all_scores(model: str) -> Figure:
    """Draws all published scores of a model against sparsity.

    Each score of a technique is a faint point, and lines join those that no
    other score of the technique exceeds at this sparsity or a higher one. What
    was repeated (dense models, scratch runs, lottery tickets) is drawn as its
    mean and standard deviation. A note counts the scores below the axis.

    Args:
        model: One of `sos.experiments.published.REFERENCES`.

    Returns:
        The figure.

    Raises:
        UsageError: If there is no such model.
    """
    reference = published.get_reference(model)
    scores = published.load(model)
    techniques = _by_label(s for s in scores if s.technique and not s.branch)
    points = _by_label(published.best(model))
    # Branches that were not repeated: of random masks.
    single = [s for s in scores if s.branch and s.label not in points]
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_axes(reference)
        dense = points["dense"]
        _draw_dense(axes, dense, f"dense ({dense[0].runs})")
        # The longest first, not to cover the others.
        for series in sorted(techniques.values(), key=len, reverse=True):
            _draw_points(axes, series)
            _draw_front(axes, series)
        for series in _by_label(single).values():
            _draw_points(axes, series)
        for series in points.values():
            if series[0].nonuniform:
                _draw_line(axes, series)
        for shift, series in _branches(points):
            _draw_means(axes, series, shift, markersize=6, linestyle="")
        lowest = _LOWEST[model]
        highest = axes.dataLim.y1
        axes.set_ylim(lowest, highest + 0.02 * (highest - lowest))
        _add_legend(figure, "In brackets:\nnumber of scores")
        _add_note(figure, _note(techniques, len(single), reference))
    return figure


def draw_branches(model: str) -> Figure:
    """Draws the published scratch runs and lottery tickets of a model.

    Their means and standard deviations, without collapsed runs, beside the best
    magnitude pruning, whose masks they have; above the scores, below the
    differences from magnitude pruning.

    Args:
        model: One of `sos.experiments.published.REFERENCES`.

    Returns:
        The figure.

    Raises:
        UsageError: If there is no such model.
    """
    reference = published.get_reference(model)
    points = _by_label(published.best(model))
    pruned = {p.target_sparsity: p.score for p in points["magnitude pruning"]}
    branches = _branches(points)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_axes(reference, height=7.0)
        grid = figure.add_gridspec(2, 1, height_ratios=(3, 2))
        axes.set_subplotspec(grid[0])
        below = figure.add_subplot(grid[1], sharex=axes)
        _draw_dense(axes, points["dense"], "dense")
        _draw_line(axes, points["magnitude pruning"])
        below.axhline(0, color=_style(points["magnitude pruning"][0]).colour)
        for shift, series in branches:
            _draw_means(axes, series, 1.0)
            differences = [
                dataclasses.replace(
                    p, score=p.score - pruned[p.target_sparsity]
                )
                for p in series
            ]
            _draw_means(below, differences, shift, linestyle="", label=None)
        axes.set_xlim(0.57, 0.0165)
        axes.tick_params(labelbottom=False)
        below.set_xlabel(axes.get_xlabel())
        axes.set_xlabel(None)
        below.set_ylabel("Difference (points)")
        _add_legend(figure)
        _add_note(figure, _repeats([s for _, s in branches], reference))
    return figure


def draw_runs(
    model: str, runs: Iterable[FinishedRun], metric: str | None = None
) -> Figure:
    """Draws runs over the best published scores of a model.

    With several seeds, the points of the runs are means, and bars extend from
    the lowest to the highest value.

    Args:
        model: One of `sos.experiments.published.REFERENCES`.
        runs: Finished runs.
        metric: Name of their metric; by default that of the model.

    Returns:
        The figure.

    Raises:
        UsageError: If there is no such model, or no run has the metric.
    """
    reference = published.get_reference(model)
    # A model without weights has no place on an axis of densities.
    scored = [
        (run, score)
        for run, score in scored_runs(runs, reference, metric)
        if run.result.sparsity != 1
    ]
    scores = {run.directory: score for run, score in scored}
    points = published.best(model)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_axes(reference)
        drawn = []
        for curve in group_curves(run for run, _ in scored):
            # In the style of the published variant, unless it is taken.
            same = published_points(curve.points[0][0], points)
            style = _style(same[0]) if same else curve.style
            if style in drawn:
                style = curve.style
            drawn.append(style)
            curve = dataclasses.replace(curve, style=style)
            _draw_curve(axes, curve, scores)
        for series in _by_label(points).values():
            label = f"{series[0].label} (paper)"
            if not series[0].technique:
                _draw_dense(axes, series, label)
                continue
            # A label for each style.
            if _style(series[0]) in drawn:
                label = None
            _draw_line(axes, series, markersize=3, linewidth=0.9, label=label)
        _, least = axes.get_xlim()
        axes.set_xlim(right=min(least, 0.8 * axes.dataLim.x0))
        _add_legend(figure, "Bold: your runs\nThin: the paper")
    return figure


def _by_label(items: Iterable[T]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def _branches(
    points: Mapping[str, Sequence[PublishedPoint]],
) -> list[tuple[float, Sequence[PublishedPoint]]]:
    """Returns the branches, with the factors by which to shift densities."""
    branches = [series for series in points.values() if series[0].branch]
    middle = (len(branches) - 1) / 2
    return [
        (1 + _STEP * (middle - i), series) for i, series in enumerate(branches)
    ]


def _add_legend(figure: Figure, title: str | None = None) -> None:
    figure.legend(loc="outside right upper", title=title, alignment="left")


def _add_note(figure: Figure, note: str) -> None:
    figure.supxlabel(textwrap.fill(note, 145), fontsize=7.5)


def _new_axes(reference: Reference, height: float = 4.8) -> tuple[Figure, Axes]:
    figure, axes = new_figure(8.4, height)
    log_axis(axes, "x", SPARSITIES)
    axes.set_xlim(1.15, 0.0085)
    axes.set_xlabel("Sparsity (density on a log scale)")
    axes.set_ylabel(reference.score.title_with_unit)
    axes.set_title(reference.title, fontsize=10)
    return figure, axes


def _style(item: PublishedPoint | PublishedScore) -> Style:
    if not item.technique:
        return DENSE_STYLE
    if not item.branch:
        variant = int(item.label.startswith("non-uniform"))
        return technique_style(item.technique, variant)
    ends = [item.label.endswith(variant) for variant in _VARIANTS]
    return branch_style(item.branch, variant=max(np.flatnonzero(ends)))


def _draw_dense(
    axes: Axes, points: Sequence[PublishedPoint], label: str
) -> None:
    (dense,) = points
    axes.axhline(
        dense.score,
        color=DENSE_STYLE.colour,
        linestyle=DENSE_STYLE.line,
        linewidth=1.2,
        zorder=1.6,
        label=label,
    )
    axes.axhspan(
        dense.score - dense.sd,
        dense.score + dense.sd,
        color=DENSE_STYLE.colour,
        alpha=0.15,
        linewidth=0,
        zorder=1.5,
    )


def _draw_points(axes: Axes, scores: Sequence[PublishedScore]) -> None:
    style = _style(scores[0])
    axes.plot(
        [1 - score.sparsity for score in scores],
        [score.score for score in scores],
        color=style.colour,
        linestyle="",
        marker="o",
        markersize=2.2,
        markeredgewidth=0,
        alpha=0.25,
        zorder=1.8,
    )


def _draw_front(axes: Axes, scores: Sequence[PublishedScore]) -> None:
    style = _style(scores[0])
    front = pareto_front(scores)
    axes.plot(
        [1 - score.sparsity for score in front],
        [score.score for score in front],
        **style.plot_arguments,
        markersize=4,
        markevery=0.03,
        linewidth=1.5,
        zorder=3,
        label=f"{scores[0].label} ({len(scores):,})",
    )


def pareto_front(scores: Iterable[PublishedScore]) -> list[PublishedScore]:
    """Returns the scores that none at the same or a higher sparsity exceeds.

    Args:
        scores: Scores. Sparsities are compared to a thousandth, as runs of one
            target differ in the last weights.

    Returns:
        Those on the front, by falling sparsity.
    """
    front: list[PublishedScore] = []
    for score in sorted(
        scores, key=lambda s: (-round(s.sparsity, 3), -s.score)
    ):
        if not front or score.score > front[-1].score:
            front.append(score)
    return front


def _draw_line(
    axes: Axes, points: Sequence[PublishedPoint], **arguments: Any
) -> None:
    axes.plot(
        [1 - point.sparsity for point in points],
        [point.score for point in points],
        **_style(points[0]).plot_arguments,
        **{
            "markersize": 5,
            "linewidth": 1.5,
            "label": points[0].label,
            **arguments,
        },
        zorder=3,
    )


def _draw_means(
    axes: Axes,
    points: Sequence[PublishedPoint],
    shift: float,
    **arguments: Any,
) -> None:
    style = _style(points[0])
    axes.errorbar(
        [shift * (1 - point.sparsity) for point in points],
        [point.score for point in points],
        yerr=[point.sd for point in points],
        **{
            "markersize": 7,
            "markeredgewidth": 0.5,
            "label": points[0].label,
            **style.plot_arguments,
            **arguments,
        },
        linewidth=1.2,
        elinewidth=1.0,
        capsize=2,
        zorder=3.5,
    )


def _draw_curve(axes: Axes, curve: Curve, scores: Mapping[str, float]) -> None:
    y = [[scores[run.directory] for run in group] for group in curve.points]
    means = [float(np.mean(values)) for values in y]
    if curve.dense:
        axes.axhline(
            np.mean(means),
            color=INK,
            linewidth=1.6,
            zorder=3.6,
            label=curve.label,
        )
        return
    x = [[1 - run.result.sparsity for run in group] for group in curve.points]
    centres = [math.exp(np.mean(np.log(values))) for values in x]
    draw_bars(axes, curve, centres, means, along="x", values=x)
    draw_bars(axes, curve, centres, means, along="y", values=y)
    order = np.argsort(centres)[::-1]
    axes.plot(
        np.take(centres, order),
        np.take(means, order),
        **{**curve.style.plot_arguments, "markeredgecolor": INK},
        markersize=8,
        linewidth=1.8,
        zorder=4,
        label=curve.label,
    )


def _note(
    techniques: Mapping[str, Sequence[PublishedScore]],
    single: int,
    reference: Reference,
) -> str:
    """Returns a note of what is drawn, and what not."""
    lowest = _LOWEST[reference.name]
    parts = []
    for label, scores in techniques.items():
        below = sum(score.score < lowest for score in scores)
        collapsed = sum(score.score < reference.collapsed for score in scores)
        if below:
            part = f"{below} scores of {label}"
            if collapsed:
                part += f" ({collapsed} of them below {reference.collapsed:g})"
            parts.append(part)
    note = (
        "Points are all scores of a technique, lines join those that none at "
        "the same or a higher sparsity exceeds. Symbols with bars are means "
        "and standard deviations of repeated runs, side by side. "
    )
    if single:
        note += f"Points in their colours are {single} runs with random masks. "
    return f"{note}Below the axis are {', '.join(parts)}."


def _repeats(
    groups: Iterable[Sequence[PublishedPoint]], reference: Reference
) -> str:
    """Returns a note of the numbers of runs."""
    points = [point for group in groups for point in group]
    runs = sorted({point.runs for point in points}, reverse=True)
    note = (
        "Means and standard deviations of "
        f"{' or '.join(map(str, runs))} runs, and the best runs of magnitude "
        "pruning. Below: differences from it, side by side."
    )
    collapsed = sum(point.collapsed for point in points)
    if collapsed:
        note += (
            f" {collapsed} runs with a {reference.score.label} below "
            f"{reference.collapsed:g} are left out."
        )
    return note
