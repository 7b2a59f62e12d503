"""One style for all figures: colours, markers and axes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import sos

# Colours that people with any kind of colour blindness can distinguish (Okabe
# and Ito 2008), each with a marker for prints in grey.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
# For variants of one technique, such as those with other rules.
_LINES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)))
# Those of branches, which are drawn beside techniques: far from the colours of
# these (7B5CD6 to 8C564B differ from them by 11 or more in CIELAB, also as seen
# by the colour-blind), and light enough for a dark page.
_BRANCH_COLOURS = ("#7B5CD6", "#D4A6C8", "#9C2E6E", "#999933", "#8C564B")
_BRANCH_MARKERS = ("*", "d", "<", "p", ">", "8")
_BRANCH_LINES = ((0, (6, 1.5, 1.2, 1.5)), (0, (3, 1.2, 1.2, 1.2)), (0, (1, 1)))
# Colours that figures in a page of HTML take from its theme, and its CSS
# variables.
INK, GRID, PAPER, DENSE = "#222222", "#e4e4e4", "#fffffe", "#444444"
CSS_COLOURS = {INK: "--ink", GRID: "--grid", PAPER: "--paper", DENSE: "--ink"}
# Ticks in percent. Figures draw density on a log scale, where 90, 95 and 98 %
# sparsity are as far apart as 50, 75 and 90 %.
SPARSITIES = (0, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],  # It comes with matplotlib.
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.title_fontsize": 8,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
}


@dataclasses.dataclass(frozen=True)
class Style:
    """Look of a curve.

    Attributes:
        colour: Colour of lines and markers.
        marker: Marker of matplotlib; empty for none.
        filled: Whether markers are filled; those of variants are not.
        line: Line style of matplotlib.
    """

    colour: str
    marker: str
    filled: bool = True
    line: Any = "-"

    @property
    def plot_arguments(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        arguments = {
            "color": self.colour,
            "linestyle": self.line,
            "marker": self.marker,
        }
        if not self.filled:
            arguments |= {
                "markerfacecolor": PAPER,
                "markeredgecolor": self.colour,
                "markeredgewidth": 1.2,
            }
        return arguments


DENSE_STYLE = Style(DENSE, "", line=(0, (5, 3)))


def technique_style(technique: str | None, variant: int = 0) -> Style:
    """Returns the style of a technique, the same in every figure.

    Args:
        technique: Its name; None for models that are sparse by rules alone.
        variant: Number of the variant, such as one with other rules. Those
            from 1 on are lighter, with open markers and other lines.
    """
    registered = list(sos.extend.techniques())
    index = len(registered)
    if technique in registered:
        index = registered.index(technique)
    return Style(
        colour=_lighter(_COLOURS[index % len(_COLOURS)], variant),
        marker=_MARKERS[index % len(_MARKERS)],
        filled=variant == 0,
        line=_LINES[variant % len(_LINES)],
    )


def branch_style(name: str, variant: int = 0) -> Style:
    """Returns the style of a branch, the same in every figure.

    Args:
        name: The name with which the branch is registered.
        variant: Number of the variant, such as one with other options. Those
            from 1 on are lighter, with open markers and other lines.
    """
    registered = (
        "scratch",
        "augmented_init",
        "lottery_ticket",
        "random_mask",
        "transferred_profile",
    )
    index = len(registered)
    if name in registered:
        index = registered.index(name)
    return Style(
        colour=_lighter(_BRANCH_COLOURS[index % len(_BRANCH_COLOURS)], variant),
        marker=_BRANCH_MARKERS[index % len(_BRANCH_MARKERS)],
        filled=variant == 0,
        line=_BRANCH_LINES[variant % len(_BRANCH_LINES)],
    )


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Makes a figure of one plot; the size is in inches."""
    # Without pyplot, which holds figures and may need a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def log_axis(axes: Axes, name: str, percents: Sequence[float]) -> None:
    """Sets a log scale of 1 - p with ticks of p, the highest last.

    Args:
        axes: The axes.
        name: "x" or "y".
        percents: Values of p with a tick, in percent.
    """
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_inverted(True)
    axis.set_major_locator(ticker.FixedLocator([1 - p / 100 for p in percents]))
    axis.set_major_formatter(lambda value, _: f"{100 * (1 - value):.4g}%")
    axis.set_minor_locator(ticker.NullLocator())


def _lighter(colour: str, variant: int) -> str:
    """Returns the colour of a variant; later variants are lighter."""
    fraction = 1 - 0.72**variant
    rgb = (c + (1 - c) * fraction for c in colors.to_rgb(colour))
    return colors.to_hex(tuple(rgb))
