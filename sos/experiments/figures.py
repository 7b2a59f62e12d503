"""Figures of a study."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sos.experiments.runs import Run, title
from sos.experiments.training import Outcome
from sos.files import atomic_write

# Colours that people with any kind of colour blindness can tell apart (Okabe
# and Ito 2008), each with a marker, so that grey prints do as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MORE_MARKERS = ("X", "<", ">", "p", "h")
_DENSE_COLOUR = "#444444"
_SPARSITY_TICKS = (0, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)


def save_tradeoff(path: Path, results: Iterable[tuple[Run, Outcome]]) -> None:
    """Draws accuracy against achieved sparsity, a curve for each technique.

    Sparsity is drawn by the logarithm of the density, so that 90, 95
    and 98 % can be told apart. Where there are several seeds, the
    curves join the means. A model without any weight left has no place there.

    Args:
        path: The PNG file; it is complete or, on an error, as it was before.
        results: The runs and what they gave.
    """
    by_technique: dict[str, list[tuple[Run, Outcome]]] = {}
    for run, outcome in results:
        by_technique.setdefault(run.technique, []).append((run, outcome))
    # Without pyplot, which keeps figures and may ask for a display.
    figure = Figure(figsize=(6.4, 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Beyond six techniques the pairs differ, though not both parts of them.
    styles = zip(
        itertools.cycle(_COLOURS),
        itertools.cycle((*_MARKERS, *_MORE_MARKERS)),
        strict=False,
    )
    for technique, members in by_technique.items():
        if members[0][0].wrapper is None:
            _draw_dense(axes, technique, members)
        else:
            _draw_technique(axes, technique, members, *next(styles))
    _style(axes)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_dense(
    axes: Axes, technique: str, members: Sequence[tuple[Run, Outcome]]
) -> None:
    accuracy = np.mean([outcome.test_accuracy for _, outcome in members])
    axes.axhline(
        100 * accuracy,
        color=_DENSE_COLOUR,
        linestyle=(0, (5, 3)),
        linewidth=1.2,
        zorder=1,
        label=title(technique),
    )


def _draw_technique(
    axes: Axes,
    technique: str,
    members: Sequence[tuple[Run, Outcome]],
    colour: str,
    marker: str,
) -> None:
    points: dict[tuple, list[tuple[float, float]]] = {}
    for run, outcome in members:
        density = 1 - outcome.achieved_sparsity
        if density > 0:
            points.setdefault((run.sparsity, run.penalty), []).append(
                (density, 100 * outcome.test_accuracy)
            )
    if not points:
        return
    # Densities are averaged as they are drawn, by their logarithms.
    means = sorted(
        (
            math.exp(np.mean([math.log(density) for density, _ in group])),
            np.mean([accuracy for _, accuracy in group]),
        )
        for group in points.values()
    )
    axes.plot(
        *zip(*means, strict=True),
        color=colour,
        marker=marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=1.6,
        label=title(technique),
        zorder=3,
    )
    if any(len(group) > 1 for group in points.values()):
        single = [point for group in points.values() for point in group]
        axes.plot(
            *zip(*single, strict=True),
            color=colour,
            marker=marker,
            markersize=3,
            alpha=0.5,
            linestyle="none",
            zorder=2,
        )


def _style(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("achieved sparsity (density on a logarithmic scale)")
    axes.set_ylabel("test accuracy")
    axes.xaxis.set_major_locator(
        matplotlib.ticker.FixedLocator([1 - s / 100 for s in _SPARSITY_TICKS])
    )
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * (1 - x):.4g}%")
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}%")
    axes.grid(color="#e4e4e4", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
