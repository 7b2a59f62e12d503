import errno
import os
import re
import xml.etree.ElementTree

import matplotlib.image
import numpy as np
import pytest

from sos.errors import StorageError
from sos.experiments import figures
from sos.experiments.figures.style import CSS_COLOURS, technique_style

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(scope="module")
def study(runs):
    return figures.Study(runs)


@pytest.fixture(scope="module")
def tradeoff(study):
    return figures.FIGURES[0].draw(study)


def _colours(path):
    pixels = np.round(255 * matplotlib.image.imread(path)[..., :3]).astype(int)
    values = np.unique(pixels @ [1 << 16, 1 << 8, 1])
    return {f"#{value:06x}" for value in values.tolist()}


def test_figures_have_unique_names_and_captions():
    names = [spec.name for spec in figures.FIGURES]
    assert len(set(names)) == len(names)
    for spec in figures.FIGURES:
        assert re.fullmatch(r"[a-z_]+", spec.name)
        assert spec.caption.endswith(".")
        assert not spec.title.endswith(".")


@pytest.mark.parametrize("spec", figures.FIGURES, ids=lambda spec: spec.name)
def test_figures_of_nothing_are_none(spec):
    assert spec.draw(figures.Study([])) is None


def test_save_png_has_the_colours_of_techniques(tmp_path, study, tradeoff):
    path = tmp_path / "figure.png"
    figures.save_png(tradeoff, path)
    colours = _colours(path)
    for technique in {run.technique for run in study.runs} - {None}:
        assert technique_style(technique).colour in colours
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_save_png_without_room_raises(tradeoff, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"figure\.png .*No space"):
        figures.save_png(tradeoff, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_svg_takes_colours_from_the_page(tradeoff):
    text = figures.svg(tradeoff, "one")
    for colour, variable in CSS_COLOURS.items():
        assert f"var({variable}, {colour})" in text
        assert not re.search(rf"(?<!, ){colour}", text)


def test_svg_twice_in_a_page_has_unique_ids_and_texts(tradeoff):
    one, two = (figures.svg(tradeoff, name) for name in ("one", "two"))
    found = []
    for text in (one, two):
        root = xml.etree.ElementTree.fromstring(text)
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert len(set(ids)) == len(ids)
        # All that is referred to is there.
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
        assert used
        assert {a or b for a, b in used} <= set(ids)
        found.append(set(ids))
    assert not found[0] & found[1]
    assert "magnitude pruning</text>" in one
    assert set(re.findall('font-family: ([^;"]*)', one)) == {
        "'DejaVu Sans', Verdana, sans-serif"
    }
    assert figures.svg(tradeoff, "one") == one
