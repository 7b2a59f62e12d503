"""Tables of numbers as colours."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

# Its lightness grows evenly, so that it is readable in grey and for the
# colour-blind.
_MAP = "viridis"
# Width of a scale of colours, in inches.
_BAR = 0.13


def draw_cells(
    axes: Axes,
    values: np.ndarray,
    norm: colors.Normalize,
    texts: Sequence[Sequence[str]] | None = None,
    *,
    fontsize: float = 7.0,
) -> AxesImage:
    """Draws a table of cells, with texts in them.

    Args:
        axes: The axes.
        values: Array of shape [rows, columns]; cells of NaN stay empty.
        norm: The scale of colours.
        texts: Texts of the cells; None for no texts.
        fontsize: Size of the texts in points.

    Returns:
        The image.
    """
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=_MAP,
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if texts is not None and np.isfinite(value):
            red, green, blue, _ = image.cmap(norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                column,
                row,
                texts[row][column],
                ha="center",
                va="center",
                size=fontsize,
                color="black" if light else "white",
            )
    return image


def add_colour_bar(
    figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str
) -> Colorbar:
    """Adds the scale of colours to the right of some axes."""
    width, height = figure.get_size_inches()
    bar = figure.colorbar(
        image,
        ax=axes,
        fraction=_BAR / width,
        pad=0.1 / width,
        aspect=0.8 * height / _BAR,
    )
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar
