"""One style for all figures: colours, markers and axes."""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import sos
from sos.experiments import branch_registry

# Colours that people with any kind of colour blindness can distinguish (Okabe
# and Ito 2008), each with a marker for prints in grey.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
# Place of models that are sparse by rules alone, after the techniques of the
# package.
_RULES = 5
# For variants of one technique, such as those with other rules.
_LINES = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)))
# Those of branches, which are drawn beside techniques: far from the colours of
# these (7B5CD6 to 8C564B differ from them by 11 or more in CIELAB, also as seen
# by the colour-blind), and light enough for a dark page.
_BRANCH_COLOURS = ("#7B5CD6", "#D4A6C8", "#9C2E6E", "#999933", "#8C564B")
_BRANCH_MARKERS = ("*", "d", "<", "p", ">", "8")
_BRANCH_LINES = ((0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1, 1, 1)), (0, (1, 1)))
# Colours that figures in a page of HTML take from its theme, and its CSS
# variables.
INK, GRID, PAPER, DENSE = "#222222", "#e4e4e4", "#fffffe", "#444444"
CSS_COLOURS = {INK: "--ink", GRID: "--grid", PAPER: "--paper", DENSE: "--ink"}
# Ticks in percent. Figures draw density on a log scale, where 90, 95 and 98 %
# sparsity are as far apart as 50, 75 and 90 %.
_ROUND = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
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
    "text.parse_math": False,  # Labels may have dollar signs.
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
    index = _RULES
    if technique is not None:
        index = _index(technique, sos.extend.techniques())
        # Techniques of users come after it.
        index += index >= _RULES
    return _style(index, variant, _COLOURS, _MARKERS, _LINES)


def branch_style(name: str, variant: int = 0) -> Style:
    """Returns the style of a branch, the same in every figure.

    Args:
        name: The name with which the branch is registered.
        variant: Number of the variant, such as one with other options. Those
            from 1 on are lighter, with open markers and other lines.
    """
    index = _index(name, branch_registry.branches())
    return _style(
        index, variant, _BRANCH_COLOURS, _BRANCH_MARKERS, _BRANCH_LINES
    )


def _index(name: str | None, registered: Iterable[str]) -> int:
    """Returns the place of a name; names that are not registered are last."""
    names = list(registered)
    return names.index(name) if name in names else len(names)


def _style(
    index: int,
    variant: int,
    colours: Sequence[str],
    markers: Sequence[str],
    lines: Sequence[Any],
) -> Style:
    return Style(
        colour=_lighter(colours[index % len(colours)], variant),
        marker=markers[index % len(markers)],
        filled=variant == 0,
        line=lines[variant % len(lines)],
    )


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Makes a figure of one plot; the size is in inches."""
    figure, ((axes,),) = new_grid(width, height, 1, 1)
    return figure, axes


def new_grid(
    width: float, height: float, rows: int, columns: int, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Makes a figure of several plots.

    Args:
        width: Width in inches.
        height: Height in inches.
        rows: Number of rows.
        columns: Number of columns.
        **options: As for `Figure.subplots`.

    Returns:
        The figure, and its axes in an array of shape [rows, columns].
    """
    # Without pyplot, which holds figures and may need a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def share_legend(figure: Figure, title: str | None = None) -> None:
    """Adds a legend of all plots above them, with each label once.

    The figure grows by the height of the legend.

    Args:
        figure: The figure.
        title: Title of the legend.
    """
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(
            *axes.get_legend_handles_labels(), strict=True
        ):
            handles.setdefault(label, handle)
    # The width of a handle, and of letters.
    handle, letter = 0.55, 0.069
    width = figure.get_figwidth()
    # Between margins.
    widest = int((width - handle - 0.3) / letter)
    labels = [textwrap.fill(label, widest) for label in handles]
    inches = handle + letter * min(max(map(len, handles)), widest)
    columns = max(1, min(len(labels), int(width / inches)))
    if columns > 1:
        lines = -(-len(labels) // columns)
    else:
        lines = sum(label.count("\n") + 1 for label in labels)
    lines += bool(title)
    figure.set_figheight(figure.get_figheight() + 0.19 * lines + 0.1)
    figure.legend(
        [*handles.values()],
        labels,
        loc="outside upper center",
        ncols=columns,
        title=title,
    )


def wrap(text: str, inches: float) -> str:
    """Breaks a title of size 9 into lines of a width in inches."""
    width = max(1, int(inches / 0.082))
    return textwrap.fill(text, width, break_long_words=False)


class _PercentLocator(ticker.Locator):
    """Chooses ticks of percentages p on a log scale of 1 - p.

    They are as far apart as their labels need. Round ones come first.
    """

    def __init__(self, percents: Sequence[float]) -> None:
        self._percents = [p for p in percents if p in _ROUND]
        self._percents += [p for p in percents if p not in _ROUND]

    def __call__(self) -> list[float]:
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        low, high = sorted((vmin, vmax))
        candidates = [1 - p / 100 for p in self._percents]
        candidates = [x for x in candidates if low <= x <= high]
        ticks = self._apart(candidates, low, high)
        if len(ticks) < 3:
            # A narrow range, where the scale is almost linear.
            locator = ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
            ticks = 1 - locator.tick_values(1 - high, 1 - low)
            # A margin may go beyond 0 %.
            ticks = ticks[(ticks >= low) & (ticks <= min(high, 1))]
            ticks = self._apart(ticks, low, high)
        return ticks

    def _apart(
        self, candidates: Iterable[float], low: float, high: float
    ) -> list[float]:
        horizontal = self.axis.axis_name == "x"
        box = self.axis.axes.bbox
        inches = (
            box.width if horizontal else box.height
        ) / self.axis.figure.dpi
        needed = (0.42 if horizontal else 0.17) / inches * math.log(high / low)
        ticks: list[float] = []
        for x in candidates:
            if all(abs(math.log(x / other)) >= needed for other in ticks):
                ticks.append(float(x))
        return sorted(ticks)


def log_axis(axes: Axes, name: str, percents: Sequence[float]) -> None:
    """Sets a log scale of 1 - p with ticks of p, the highest last.

    Args:
        axes: The axes.
        name: "x" or "y".
        percents: Values of p that may have a tick, in percent. In a narrow
            range without them others have.
    """
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_inverted(True)
    axis.set_major_locator(_PercentLocator(percents))
    axis.set_major_formatter(lambda value, _: f"{100 * (1 - value):.4g}%")
    axis.set_minor_locator(ticker.NullLocator())


def set_least_range(axes: Axes, name: str, factor: float) -> None:
    """Widens the limits of a log axis that are too near to each other.

    Values that differ only in their last digits would be drawn far apart.

    Args:
        axes: The axes, with all data.
        name: "x" or "y".
        factor: Least quotient of the limits.
    """
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    if high < factor * low:
        margin = math.sqrt(factor * low / high)
        limits = low / margin, high * margin
        if axis.get_inverted():
            limits = limits[::-1]
        axes.set(**{f"{name}lim": limits})


def _lighter(colour: str, variant: int) -> str:
    """Returns the colour of a variant; later variants are lighter."""
    fraction = 1 - 0.72**variant
    rgb = (c + (1 - c) * fraction for c in colors.to_rgb(colour))
    return colors.to_hex(tuple(rgb))
