"""Loss, score and sparsity during training."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import sos
from sos.experiments.figures.curves import Curve, mean_sparsity
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import (
    DENSE_STYLE,
    INK,
    STYLE,
    new_grid,
    wrap,
)
from sos.experiments.results import FinishedRun
from sos.training.reporting import Summary

_MAX_COLUMNS = 5
_WIDTH, _HEIGHT = 1.95, 1.4
# Of the part of training in which the network becomes sparse.
_WINDOW = {"color": INK, "alpha": 0.08, "linewidth": 0, "zorder": 0.5}

#: Steps and values.
_Series = tuple[list[int], list[float]]


def draw_training_curves(study: Study) -> Figure | None:
    """Draws loss, score and sparsity over the steps of training.

    There is a column for each label, with its runs whose sparsity is nearest to
    `study.layerwise_sparsity`: a line for the loops of each seed, and a marker
    for each evaluation. The steps in which the technique prunes or raises its
    penalty are shaded. One seed of dense models is drawn in every column.

    Args:
        study: The study.

    Returns:
        The figure; None if no run of a sparse model has a log.
    """
    curves = [
        logged
        for curve in study.compared
        if (logged := curve.select(lambda run: bool(study.log(run))))
    ]
    if not curves:
        return None
    # Dashed lines of several seeds would look like a solid one.
    dense = [point[0] for curve in study.dense for point in curve.points]
    quantities = _quantities(study, [*_runs(curves), *dense])
    blocks = -(-len(curves) // _MAX_COLUMNS)
    columns = -(-len(curves) // blocks)
    with matplotlib.rc_context(STYLE):
        figure, grid = new_grid(
            max(5.0, 0.8 + _WIDTH * columns),
            0.9 + blocks * (0.5 + _HEIGHT * len(quantities)),
            blocks * len(quantities),
            columns,
        )
        for axes in grid.flat:
            axes.set_visible(False)
        for i, curve in enumerate(curves):
            first = i // columns * len(quantities)
            column = grid[first : first + len(quantities), i % columns]
            _draw_column(study, column, curve, dense, quantities)
            for axes, name in zip(column, quantities, strict=True):
                axes.tick_params(labelleft=i % columns == 0)
                if i % columns == 0:
                    axes.set_ylabel(name)
        for row in range(len(quantities)):
            _share_limits(grid[row :: len(quantities)].flat)
        figure.align_ylabels()
        figure.supxlabel("Training step", size=10)
        _add_legend(figure, has_dense=bool(dense))
    return figure


def _quantities(
    study: Study, runs: Iterable[FinishedRun]
) -> dict[str, Callable[[FinishedRun, str], _Series]]:
    """Returns functions of a run and a kind of summary, by label."""
    metrics = {
        name
        for run in runs
        for summary in study.log(run)
        for name in summary.metrics
    }

    def metric(name: str) -> Callable[[FinishedRun, str], _Series]:
        def series(run: FinishedRun, kind: str) -> _Series:
            return _series(
                (s.step, s.metrics.get(name, math.nan))
                for s in study.log(run)
                if s.kind == kind
            )

        return series

    def sparsity(run: FinishedRun, kind: str) -> _Series:
        if kind != "train" or run.result.sparsity is None:
            return [], []
        return _series(_sparsities(study.log(run)))

    score = study.score
    quantities = {
        title: metric(name)
        for title, name in (("Loss", "loss"), (score.title, score.name))
        if name in metrics
    }
    return {**quantities, "Sparsity": sparsity}


def _sparsities(log: Iterable[Summary]) -> Iterable[tuple[int, float]]:
    """Yields steps and sparsities, with those of mask updates in between."""
    summaries = [s for s in log if s.sparsity is not None]
    updates = [u for s in summaries for u in s.mask_updates]
    # If all masks are updated together, an update has the overall sparsity.
    last = {u.step: 1 - u.kept / max(u.elements, 1) for u in updates}
    known = all(
        math.isclose(last[s.step], s.sparsity, abs_tol=1e-6)
        for s in summaries
        if s.step in last
    )
    values = {s.step: s.sparsity for s in summaries}
    return sorted({**(last if known else {}), **values}.items())


def _series(values: Iterable[tuple[int, float]]) -> _Series:
    steps, numbers = [], []
    for step, number in values:
        steps.append(step)
        numbers.append(number)
    return steps, numbers


def _draw_column(
    study: Study,
    column: Sequence[Axes],
    curve: Curve,
    dense: Sequence[FinishedRun],
    quantities: dict[str, Callable[[FinishedRun, str], _Series]],
) -> None:
    runs = _runs([curve])
    column[0].set_title(
        wrap(f"{curve.label} ({mean_sparsity(runs):.1%})", _WIDTH), size=9
    )
    window = pruning_window(runs[0])
    for axes, series in zip(column, quantities.values(), strict=True):
        axes.set_visible(True)
        axes.tick_params(labelbottom=axes is column[-1])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        if window is not None:
            axes.axvspan(*window, **_WINDOW)
        for run in dense:
            axes.plot(
                *series(run, "train"),
                **_thin(DENSE_STYLE.plot_arguments),
                zorder=1.8,
            )
        for run in runs:
            axes.plot(
                *series(run, "train"),
                **_thin(curve.style.plot_arguments),
                zorder=2.5,
            )
            axes.plot(
                *series(run, "eval"),
                **{**curve.style.plot_arguments, "linestyle": ""},
                markersize=5.5,
                zorder=3,
            )
        if axes is not column[0]:
            axes.sharex(column[0])
    fractions = {"Sparsity"}
    if study.score.is_fraction:
        fractions.add(study.score.title)
    for axes, name in zip(column, quantities, strict=True):
        if name in fractions:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, 0))
    column[0].set_xlim(0, runs[0].result.step * 1.03)


def _thin(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "marker": "", "linewidth": 1.2}


def _share_limits(row: Iterable[Axes]) -> None:
    shown = [axes for axes in row if axes.get_visible()]
    limits = np.array([axes.get_ylim() for axes in shown])
    for axes in shown:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def _add_legend(figure: Figure, *, has_dense: bool) -> None:
    handles = [
        Line2D([], [], color=INK, linewidth=1.2, label="training"),
        Line2D([], [], color=INK, linestyle="", marker="o", label="evaluation"),
        Patch(**_WINDOW, label="pruning, or growth of the penalty"),
    ]
    if has_dense:
        style = _thin(DENSE_STYLE.plot_arguments)
        handles.append(Line2D([], [], **style, label="dense, training"))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=2 if figure.get_figwidth() < 7 else len(handles),
    )


def _runs(curves: Iterable[Curve]) -> list[FinishedRun]:
    return [run for c in curves for point in c.points for run in point]


def pruning_window(run: FinishedRun) -> tuple[float, float] | None:
    """Returns the steps in which a technique makes a network sparser.

    Args:
        run: The run.

    Returns:
        The first and the last step of the schedule of pruning, or of the growth
        of the penalty; None without any, as with a constant penalty.
    """
    entries = run.config["sparsity"]
    technique = sos.extend.techniques().get(entries["technique"])
    if technique is None:
        return None
    hyperparameters = {
        name: value
        for name, value in entries.items()
        if name not in ("technique", "rules") and value is not None
    }
    resolved = technique.resolve_hyperparameters(hyperparameters)
    if "schedule" in resolved:
        steps = resolved["schedule"].over(run.config["train_steps"])
    else:
        steps = resolved.get("ramp")
    begin, end = (getattr(steps, f"{x}_step", None) for x in ("begin", "end"))
    if begin is None:
        return None
    return begin, run.config["train_steps"] if end is None else end
