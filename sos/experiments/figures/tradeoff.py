"""Scores against sparsity."""

import matplotlib
from matplotlib.figure import Figure

from sos.experiments.figures.curves import seeds_caption
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
    new_figure,
    share_legend,
)


def draw_tradeoff(study: Study) -> Figure | None:
    """Draws the score against achieved sparsity, a curve for each technique.

    Density, and the error if the score is an accuracy, have log scales, which
    resolve values close to one. With several seeds, the curves join the means,
    and bars, or a band for dense models, extend from the lowest to the highest
    value. Runs without a finite score and models without weights are omitted.

    Args:
        study: The study.

    Returns:
        The figure; None if there is nothing to draw.
    """
    curves = [
        drawn
        for curve in (*study.dense, *study.techniques)
        if (drawn := drawable(curve, density))
    ]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(6.4, 3.9)
        log_axis(axes, "x", SPARSITIES)
        score_axis(axes, study.score)
        for curve in curves:
            if curve.dense:
                draw_dense(axes, curve)
            else:
                draw_scores(axes, curve, density)
        if all(curve.dense for curve in curves):
            axes.set_xlim(1.1, 0.09)
        widen_score_axis(axes, study.score)
        axes.set_xlabel("Sparsity reached (density on a log scale)")
        axes.set_ylabel(score_axis_label(study.score))
        share_legend(figure, seeds_caption(curves))
    return figure
