"""Figures of a study."""

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from sos.experiments.figures.layerwise import draw_layerwise
from sos.experiments.figures.style import CSS_COLOURS
from sos.experiments.figures.tradeoff import draw_tradeoff
from sos.experiments.results import FinishedRun
from sos.files import atomic_write, storage_errors


@dataclasses.dataclass(frozen=True)
class Study:
    """The finished runs of a study.

    Attributes:
        runs: The runs.
        layerwise_sparsity: Overall sparsity at which to compare layers.
    """

    runs: Sequence[FinishedRun]
    layerwise_sparsity: float = 0.9


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """A figure that can be drawn of a study.

    Attributes:
        name: Name of its file, without suffix.
        title: Title in reports.
        caption: What it shows, a sentence or two.
        draw: Returns the figure; None if the study has nothing to show in it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Study], Figure | None]


def _tradeoff(study: Study) -> Figure | None:
    # A task may lack this metric.
    if not all("accuracy" in run.result.metrics for run in study.runs):
        return None
    return draw_tradeoff(study.runs)


#: All figures, in the order of a report.
FIGURES = (
    FigureSpec(
        "tradeoff",
        "Accuracy against sparsity",
        "Curves join the means over seeds; bars extend from the lowest to the "
        "highest.",
        _tradeoff,
    ),
    FigureSpec(
        "layerwise",
        "Sparsity of each layer",
        "Layers in the order of the network, at about one overall sparsity.",
        lambda study: draw_layerwise(study.runs, study.layerwise_sparsity),
    ),
)


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file, atomically.

    Args:
        figure: The figure.
        path: The file.

    Raises:
        StorageError: If the file cannot be written.
    """
    with (
        storage_errors(f"{path} could not be written"),
        atomic_write(path) as temporary,
    ):
        figure.savefig(temporary, format="png", dpi=250)


def svg(figure: Figure, name: str) -> str:
    """Returns a figure as an SVG element for a page of HTML.

    The colours of ink, grid and paper are the CSS variables `--ink`, `--grid`
    and `--paper`, so that a page can have a dark theme.

    Args:
        figure: The figure.
        name: Makes the identifiers of the element unique in the page.

    Returns:
        The element, beginning with `<svg`.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in CSS_COLOURS.items():
        text = re.sub(colour, f"var({variable}, {colour})", text)
    return text
