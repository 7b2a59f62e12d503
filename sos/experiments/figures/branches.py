"""Branches against the runs that they start from."""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.curves import Curve, seeds_caption
from sos.experiments.figures.score_axes import (
    density,
    draw_dense,
    draw_scores,
    drawable,
    score_axis,
    score_axis_label,
    widen_score_axis,
)
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import (
    SPARSITIES,
    STYLE,
    log_axis,
    new_grid,
    share_legend,
    wrap,
)

_MAX_COLUMNS = 3
# Of a plot, in inches.
_WIDTH = 4.0
# Of the density beside branches. Trunks may go on.
_MARGIN = 1.25


def draw_branches(study: Study) -> Figure | None:
    """Draws scores against sparsity of trunks and their branches.

    There is a plot for each label of trunks, with the axes of `draw_tradeoff`
    over the sparsities of branches, and all dense models.

    Args:
        study: The study.

    Returns:
        The figure; None without branches that can be drawn.
    """
    plots = _plots(study)
    if not plots:
        return None
    dense = [d for curve in study.dense if (d := drawable(curve, density))]
    columns = min(len(plots), _MAX_COLUMNS)
    rows = -(-len(plots) // columns)
    with matplotlib.rc_context(STYLE):
        figure, grid = new_grid(
            max(6.4, _WIDTH * columns),
            0.4 + 3.4 * rows,
            rows,
            columns,
            sharex=True,
            sharey=True,
        )
        for axes in grid.flat[len(plots) :]:
            axes.set_visible(False)
        for axes, (title, curves) in zip(
            grid.flat, plots.items(), strict=False
        ):
            log_axis(axes, "x", SPARSITIES)
            score_axis(axes, study.score)
            _draw_plot(axes, [*dense, *curves])
            # Also above an empty place.
            axes.tick_params(labelbottom=True)
            axes.set_title(wrap(f"Trunk: {title}", _WIDTH - 0.3), size=9)
        densities = [
            density(run)
            for curves in plots.values()
            for curve in curves
            if curve.branch is not None
            for point in curve.points
            for run in point
        ]
        widen_score_axis(axes, study.score)
        axes.set_xlim(_MARGIN * max(densities), min(densities) / _MARGIN)
        figure.supxlabel("Sparsity reached (density on a log scale)", size=10)
        figure.supylabel(score_axis_label(study.score), size=10)
        everything = [*dense, *(c for curves in plots.values() for c in curves)]
        share_legend(figure, seeds_caption(everything))
    return figure


def _plots(study: Study) -> dict[str, list[Curve]]:
    """Returns the curves by the label of the trunks, the trunk's first."""
    plots: dict[str, list[Curve]] = {}
    for trunk in study.curves:
        branches = [
            drawn
            for curve in study.branches
            for own in curve.by_trunk()
            if _starts_from(own, trunk) and (drawn := drawable(own, density))
        ]
        if branches:
            drawn = drawable(trunk, density)
            plots[trunk.label] = [*([drawn] if drawn else []), *branches]
    return plots


def _starts_from(branch: Curve, trunk: Curve) -> bool:
    parent = branch.points[0][0].parent
    return parent is not None and (parent.label, parent.branch) == (
        trunk.label,
        trunk.branch,
    )


def _draw_plot(axes: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        if curve.dense:
            draw_dense(axes, curve)
        else:
            draw_scores(axes, curve, density)
