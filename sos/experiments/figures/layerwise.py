"""The sparsity of each layer."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sos.experiments.figures.curves import (
    Curve,
    draw_bars,
    mean_sparsity,
    seeds_caption,
)
from sos.experiments.figures.layers import layer_names, layer_sizes
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import (
    SPARSITIES,
    STYLE,
    log_axis,
    new_figure,
    share_legend,
)

# Density at which a layer without weights is drawn, the end of the axis.
_LEAST_DENSITY = 1e-3
# The names of more layers are drawn at an angle.
_MAX_HORIZONTAL_NAMES = 8


def draw_layerwise(study: Study) -> Figure | None:
    """Draws the sparsity of each layer, a curve for each label.

    Draws those runs of each label whose mean sparsity over seeds is nearest to
    `study.layerwise_sparsity`; the legend shows their sparsity. With several
    seeds, the points are means, and bars extend from the lowest to the highest
    value. Layers are in the order of the network. Densities below a thousandth
    are drawn as a thousandth.

    Args:
        study: The study.

    Returns:
        The figure; None without sparse models.
    """
    curves = study.compared
    sizes = layer_sizes(curves)
    if not sizes:
        return None
    with matplotlib.rc_context(STYLE):
        long = len(sizes) > _MAX_HORIZONTAL_NAMES
        width = max(6.4, 1.0 + 0.36 * len(sizes))
        figure, axes = new_figure(width, 4.9 if long else 4.1)
        log_axis(axes, "y", SPARSITIES)
        for i, curve in enumerate(curves):
            # Side by side, to not hide each other.
            shift = 0.15 * (i - (len(curves) - 1) / 2)
            _draw_profile(axes, curve, sizes, shift, 4.5 if long else 5.5)
        _end_at_a_tick(axes)
        axes.set_ylabel("Sparsity of the layer (density on a log scale)")
        axes.set_xlabel("Layer, with its number of weights")
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.grid(visible=False, axis="x")
        _name_layers(axes, sizes)
        caption = seeds_caption(curves)
        share_legend(
            figure,
            "Overall sparsity in brackets"
            + (f". {caption}" if caption else ""),
        )
    return figure


def _draw_profile(
    axes: Axes,
    curve: Curve,
    sizes: Mapping[str, int],
    shift: float,
    markersize: float,
) -> None:
    (group,) = curve.points
    densities: dict[str, list[float]] = {}
    for run in group:
        for weight in run.result.weights:
            density = max(1 - weight.sparsity, _LEAST_DENSITY)
            densities.setdefault(weight.path, []).append(density)
    if not densities:
        return
    positions = {path: i + shift for i, path in enumerate(sizes)}
    x = [positions[path] for path in densities]
    y = [np.mean(values) for values in densities.values()]
    draw_bars(axes, curve, x, y, along="y", values=densities.values())
    overall = mean_sparsity(group)
    axes.plot(
        x,
        y,
        **curve.style.plot_arguments,
        markersize=markersize,
        linewidth=1.0,
        label=f"{curve.label} ({overall:.1%})",
        zorder=3,
    )


def _end_at_a_tick(axes: Axes) -> None:
    """Moves the upper end of the y axis to a tick."""
    bottom, _ = axes.get_ylim()
    ticks = [1 - p / 100 for p in SPARSITIES]
    # The least density that is drawn.
    least = axes.dataLim.y0
    top = max((tick for tick in ticks if tick <= least), default=ticks[-1])
    labels = [f"{p:.4g}%" for p in SPARSITIES]
    labels[-1] = f"≥ {labels[-1]}"
    axes.set_yticks(ticks, labels)
    # Leaves room for half a marker.
    axes.set_ylim(bottom, 0.93 * top)


def _name_layers(axes: Axes, sizes: Mapping[str, int]) -> None:
    horizontal = len(sizes) <= _MAX_HORIZONTAL_NAMES
    labels = layer_names(sizes, separator="\n" if horizontal else "  ")
    axes.set_xticks(range(len(labels)), labels)
    if not horizontal:
        axes.tick_params(axis="x", labelrotation=55, labelsize=7.5)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
