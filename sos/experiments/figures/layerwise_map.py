"""The sparsity of each layer at all sparsities."""

import math

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

from sos.experiments.figures.curves import Curve, mean_sparsity
from sos.experiments.figures.heat_maps import add_colour_bar, draw_cells
from sos.experiments.figures.layers import layer_names, layer_sizes
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import STYLE, new_grid, wrap

# Density at which a layer without weights is drawn, the end of the scale.
_LEAST_DENSITY = 1e-3
# Cells of a plot beside another; others go below.
_MAX_COLUMNS = 16
# For the label.
_MIN_COLUMNS = 3
_CELL_WIDTH, _CELL_HEIGHT = 0.44, 0.2
_SCALE = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.9)


def draw_layerwise_map(study: Study) -> Figure | None:
    """Draws the sparsity of each layer at each overall sparsity, as colours.

    There is a plot for each label. Colours follow the density on a log scale,
    down to a thousandth. Numbers are percentages, means over seeds.

    Args:
        study: The study.

    Returns:
        The figure; None without sparse models that have weights.
    """
    curves = study.techniques
    sizes = layer_sizes(curves)
    if not sizes:
        return None
    tables = {curve.label: _table(curve, list(sizes)) for curve in curves}
    rows = _rows({label: len(t[0]) for label, t in tables.items()})
    columns = max(map(len, rows))
    with matplotlib.rc_context(STYLE):
        widths = [
            max(
                max(len(tables[row[i]][0]), _MIN_COLUMNS)
                for row in rows
                if i < len(row)
            )
            for i in range(columns)
        ]
        names = layer_names(sizes, separator="  ")
        figure, grid = new_grid(
            0.9 + 0.07 * max(map(len, names)) + _CELL_WIDTH * sum(widths),
            0.8 + len(rows) * (0.7 + max(_CELL_HEIGHT * len(sizes), 1.2)),
            len(rows),
            columns,
            width_ratios=widths,
        )
        norm = colors.LogNorm(_LEAST_DENSITY, 1.0)
        for axes in grid.flat:
            axes.set_visible(False)
        for i, labels in enumerate(rows):
            for j, label in enumerate(labels):
                axes = grid[i, j]
                axes.set_visible(True)
                overall, layers = tables[label]
                image = draw_cells(
                    axes,
                    np.maximum(1 - layers, _LEAST_DENSITY),
                    norm,
                    [[_percent(value) for value in row] for row in layers],
                )
                axes.set_title(wrap(label, _CELL_WIDTH * widths[j]), size=9)
                axes.set_xticks(
                    range(len(overall)), [f"{_percent(x)}%" for x in overall]
                )
                axes.set_yticks(range(len(sizes)), names if j == 0 else [])
                axes.tick_params(labelsize=7.5)
        figure.supxlabel("Overall sparsity", size=10)
        bar = add_colour_bar(
            figure, image, list(grid.flat), "Sparsity of the layer"
        )
        labels = [f"{p:g}%" for p in _SCALE]
        labels[-1] = f"≥ {labels[-1]}"
        bar.set_ticks([1 - p / 100 for p in _SCALE], labels=labels)
        bar.minorticks_off()
        bar.ax.invert_yaxis()
        bar.ax.tick_params(labelsize=7.5)
    return figure


def _table(curve: Curve, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns overall sparsities, and those of layers: NaN without a layer.

    Returns:
        Arrays of shapes [points] and [layers, points], sorted.
    """
    points = sorted(curve.points, key=mean_sparsity)
    layers = np.full((len(paths), len(points)), math.nan)
    for column, runs in enumerate(points):
        for row, path in enumerate(paths):
            found = [
                weight.sparsity
                for run in runs
                for weight in run.result.weights
                if weight.path == path
            ]
            if found:
                layers[row, column] = np.mean(found)
    return np.array([mean_sparsity(runs) for runs in points]), layers


def _rows(widths: dict[str, int]) -> list[list[str]]:
    """Returns the labels of each row of plots."""
    rows: list[list[str]] = [[]]
    for label, width in widths.items():
        if rows[-1] and sum(widths[x] for x in rows[-1]) + width > _MAX_COLUMNS:
            rows.append([])
        rows[-1].append(label)
    return rows


def _percent(fraction: float) -> str:
    """Returns a percentage of at most four characters, below 100 if it is."""
    percent = 100 * fraction
    if percent < 99.5 or percent == 100:
        return f"{percent:.0f}"
    return f"{min(percent, 99.9):.1f}"
