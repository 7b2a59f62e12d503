"""How much masks change at each update."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.curves import Curve, mean_sparsity, seeds_caption
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import INK, STYLE, new_grid, share_legend
from sos.experiments.results import FinishedRun
from sos.training.reporting import MaskUpdate


def draw_mask_churn(study: Study) -> Figure | None:
    """Draws which part of the masks changes at each update.

    Draws the runs of each label whose sparsity is nearest to
    `study.layerwise_sparsity`. Above is the fraction of elements that change,
    with what the schedule alone forces: the elements that must go. Below is the
    fraction of the kept elements that were pruned before the update.

    Args:
        study: The study.

    Returns:
        The figure; None if no log has mask updates. Techniques with penalties
        have none, and older versions did not record them.
    """
    drawn = []
    for curve in study.compared:
        logs = [_updates(study, run) for run in curve.points[0]]
        logs = [log for log in logs if log]
        if logs:
            drawn.append((curve, logs))
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure, ((above,), (below,)) = new_grid(6.4, 4.6, 2, 1, sharex=True)
        above.set_yscale("log", nonpositive="mask")
        forced = set()
        for i, (curve, logs) in enumerate(drawn):
            _draw(above, curve, logs, lambda update: update.churn, i)
            _draw(below, curve, logs, _new_fraction, i)
            forced.add(_means(logs, lambda update: update.least_churn))
        for steps, values in forced:
            above.plot(
                steps,
                values,
                color=INK,
                linestyle=(0, (1, 1.2)),
                linewidth=1.6,
                zorder=4,
                label="forced by the schedule",
            )
        above.set_ylabel("Elements that change")
        above.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_minor_locator(ticker.NullLocator())
        below.set_ylabel("Kept elements that are new")
        below.set_ylim(bottom=0)
        below.set_xlabel("Training step of the update")
        for axes in (above, below):
            axes.yaxis.set_major_formatter(
                lambda value, _: f"{100 * value:.3g}%"
            )
        share_legend(figure, seeds_caption(curve for curve, _ in drawn))
    return figure


def _updates(study: Study, run: FinishedRun) -> list[MaskUpdate]:
    """Returns the updates of a run from the first that changes a mask."""
    updates = [u for s in study.log(run) for u in s.mask_updates]
    changing = [i for i, update in enumerate(updates) if update.churn]
    return updates[changing[0] :] if changing else []


def _draw(
    axes: Axes,
    curve: Curve,
    logs: Sequence[Sequence[MaskUpdate]],
    value: Callable[[MaskUpdate], float],
    index: int,
) -> None:
    """Draws the mean over seeds, and a band over their range."""
    values = _values(logs, value)
    # There may be many updates, and curves that lie on each other.
    interval = max(1, len(values) // 12)
    if len(logs) > 1:
        axes.fill_between(
            list(values),
            [min(group) for group in values.values()],
            [max(group) for group in values.values()],
            color=curve.style.colour,
            alpha=0.2,
            linewidth=0,
        )
    axes.plot(
        *_means(logs, value),
        **curve.style.plot_arguments,
        markersize=4.5,
        markevery=(index % interval, interval),
        linewidth=1.4,
        label=f"{curve.label} ({mean_sparsity(curve.points[0]):.1%})",
        zorder=3,
    )


def _new_fraction(update: MaskUpdate) -> float:
    return update.regrown / max(update.kept, 1)


def _values(
    logs: Sequence[Sequence[MaskUpdate]], value: Callable[[MaskUpdate], float]
) -> dict[int, list[float]]:
    """Returns the values of all seeds by step."""
    values: dict[int, list[float]] = {}
    for log in logs:
        for update in log:
            values.setdefault(update.step, []).append(value(update))
    return dict(sorted(values.items()))


def _means(
    logs: Sequence[Sequence[MaskUpdate]], value: Callable[[MaskUpdate], float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    values = _values(logs, value)
    means = (float(np.mean(group)) for group in values.values())
    return tuple(values), tuple(means)
