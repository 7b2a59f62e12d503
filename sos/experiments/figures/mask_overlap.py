"""How much the masks of two runs have in common."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.heat_maps import add_colour_bar, draw_cells
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import INK, PAPER, STYLE, new_figure, wrap
from sos.experiments.results import FinishedRun

# Runs of one label.
_MAX_SEEDS = 3
_CELL = 0.4
# Of a few runs, beside which the label of the colours has its place.
_LEAST_SIZE = 1.6
# In a line of a name; three lines are as high as a cell.
_LETTERS = 46

#: Masks of one run by the paths of the weights.
Masks = Mapping[str, np.ndarray]


def draw_mask_overlap(study: Study) -> Figure | None:
    """Draws the overlap of masks between seeds and techniques, as a matrix.

    It has the runs of each label whose sparsity is nearest to
    `study.layerwise_sparsity`, at most three. Below the diagonal is the
    intersection over union of the kept elements, above it what two random masks
    with the same number of kept elements in each weight would have.

    Args:
        study: The study.

    Returns:
        The figure; None if fewer than two runs have masks.
    """
    groups = {
        curve.label: found[:_MAX_SEEDS]
        for curve in study.compared
        if (found := [run for run in curve.points[0] if study.masks(run)])
    }
    runs = [run for group in groups.values() for run in group]
    if len(runs) < 2:
        return None
    table = np.full((len(runs), len(runs)), math.nan)
    for i, one in enumerate(runs):
        for j, other in enumerate(runs[:i]):
            masks = study.masks(one), study.masks(other)
            table[i, j], table[j, i] = overlap(*masks), chance_overlap(*masks)
    names = [
        textwrap.fill(
            f"{run.label} {run.result.sparsity:.1%}, seed {run.config['seed']}",
            _LETTERS,
        )
        for run in runs
    ]
    size = max(_CELL * len(runs), _LEAST_SIZE)
    label = 0.068 * max(len(line) for n in names for line in n.splitlines())
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size + label + 1.3, size + label + 0.5)
        greatest = np.nanmax(table, initial=0.01)
        image = draw_cells(
            axes,
            table,
            colors.Normalize(0, greatest),
            [[f"{value:.2f}" for value in row] for row in table],
        )
        axes.set_aspect("equal")
        axes.set_xticks(range(len(runs)), names)
        axes.set_yticks(range(len(runs)), names)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="x", labelrotation=90)
        _separate(axes, groups.values())
        title = "Below the diagonal: measured. Above: by chance"
        axes.set_title(wrap(title, size + 0.8), size=9, loc="left")
        add_colour_bar(figure, image, [axes], "Intersection over union")
    return figure


def overlap(one: Masks, other: Masks) -> float:
    """Returns the intersection over union of the kept elements of two masks.

    Args:
        one: Arrays of zeros and ones by path.
        other: Those of another run. A path that only one of them has is a dense
            weight of the other.

    Returns:
        A number in [0, 1]; NaN if no element is kept or shapes differ.
    """
    return _ratio(one, other, lambda a, b: _kept(a & b))


def chance_overlap(one: Masks, other: Masks) -> float:
    """Returns the overlap of two random masks of the same sparsities.

    Of a weight of n elements, independent masks that keep a and b of them have
    a * b / n in common on average. The sum over the weights takes the place of
    the intersection in `overlap`.

    Args:
        one: Arrays of zeros and ones by path.
        other: Those of another run.

    Returns:
        A number in [0, 1]; NaN if no element is kept or shapes differ.
    """
    return _ratio(
        one,
        other,
        lambda a, b: _kept(a) * _kept(b) / max(a.size, 1),
    )


def _ratio(
    one: Masks,
    other: Masks,
    intersection: Callable[[np.ndarray, np.ndarray], float],
) -> float:
    common = total = 0.0
    for path in {**one, **other}:
        a, b = one.get(path), other.get(path)
        a = np.ones_like(b) if a is None else a
        b = np.ones_like(a) if b is None else b
        if a.shape != b.shape:
            return math.nan
        common += intersection(a, b)
        total += _kept(a) + _kept(b)
    return common / (total - common) if total else math.nan


def _kept(mask: np.ndarray) -> int:
    # NumPy counts Booleans several times faster than other numbers.
    return np.count_nonzero(mask.view(bool))


def _separate(axes: Axes, groups: Iterable[list[FinishedRun]]) -> None:
    """Draws lines between labels, and along the diagonal."""
    end = 0
    for group in groups:
        end += len(group)
        for line in (axes.axhline, axes.axvline):
            line(end - 0.5, color=PAPER, linewidth=2.5)
    axes.plot([-0.5, end - 0.5], [-0.5, end - 0.5], color=INK, linewidth=0.8)
    axes.set(xlim=(-0.5, end - 0.5), ylim=(end - 0.5, -0.5))
