"""Writes figures as PNG files and as SVG for pages of HTML."""

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from sos.experiments.figures.style import CSS_COLOURS
from sos.files import atomic_write, storage_errors

# Verdana's letters are as wide as those of DejaVu Sans, which few have.
_FONTS = "'DejaVu Sans', Verdana, sans-serif"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


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
    and `--paper`, so that a page can have a dark theme. Texts stay texts.

    Args:
        figure: The figure.
        name: Makes the identifiers in the element unique to it: letters,
            digits, hyphens and underscores.

    Returns:
        The element, beginning with `<svg`.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=_NO_METADATA
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Equal in all figures: `figure_1`, `axes_1`, ...
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("'DejaVu Sans'", _FONTS)
    for colour, variable in CSS_COLOURS.items():
        text = re.sub(colour, f"var({variable}, {colour})", text)
    return text
