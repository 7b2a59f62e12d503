import dataclasses

import numpy as np
import pytest

from sos import registry
from sos.experiments import branch_registry
from sos.experiments.figures.branches import draw_branches
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import branch_style, technique_style
from sos.experiments.figures.tradeoff import draw_tradeoff
from tests.support.figures import check_texts, labelled_lines, replaced

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(scope="module")
def figure(with_branches):
    return draw_branches(Study(with_branches))


def test_draw_branches_plots_have_a_trunk_its_branches_and_the_dense(figure):
    check_texts(figure)
    magnitude, l0 = figure.axes
    assert magnitude.get_title() == "Trunk: magnitude pruning"
    assert l0.get_title() == "Trunk: L0"
    names = ["scratch-b", "scratch-e", "lottery ticket"]
    for axes, trunk in ((magnitude, "magnitude pruning"), (l0, "L0")):
        lines = labelled_lines(axes)
        assert list(lines) == ["dense", trunk, *names]
        assert len(axes.patches) == 1  # The band.
        # Masks, and so sparsities, are the trunk's.
        x, y = lines[trunk].get_data()
        for i, name in enumerate(names):
            np.testing.assert_allclose(lines[name].get_xdata(), x)
            expected = y + 0.01 * (i + 1)
            np.testing.assert_allclose(lines[name].get_ydata(), expected)
        # Over the sparsities of all branches, the highest last.
        assert axes.get_xlim() == pytest.approx((1.25 * 0.5, 0.04 / 1.25))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dense", "magnitude pruning", *names, "L0"]


def test_draw_branches_curves_have_the_style_of_the_branch(figure):
    for axes in figure.axes:
        lines = labelled_lines(axes)
        for label, style in {
            "scratch-e": branch_style("scratch"),
            "scratch-b": branch_style("scratch", 1),
            "lottery ticket": branch_style("lottery_ticket"),
        }.items():
            assert lines[label].get_color() == style.colour
            assert lines[label].get_marker() == style.marker
            # Not that of the technique that keeps the masks.
            assert style.colour != technique_style("FixedMask").colour


def test_draw_branches_without_branches_is_none(runs, with_branches):
    assert draw_branches(Study(runs)) is None
    without = [replaced(run, metrics={"loss": 1.0}) for run in with_branches]
    assert draw_branches(Study(without)) is None
    # Those of trunks in another directory have no plot.
    orphans = [dataclasses.replace(r, parent=None) for r in with_branches]
    assert draw_branches(Study(orphans)) is None


def test_draw_tradeoff_draws_no_branches(with_branches):
    (axes,) = draw_tradeoff(Study(with_branches)).axes
    assert not {"scratch-e", "lottery ticket"} & {*labelled_lines(axes)}


def test_branch_style_differs_between_branches_and_from_techniques():
    names = branch_registry.branches()
    branches = [branch_style(name) for name in names]
    variants = [branch_style(name, i) for name in names for i in range(3)]
    techniques = [
        technique_style(name)
        for name in ("MagnitudePruning", "RandomPruning", "FixedMask")
        + ("VariationalDropout", "L0Regularization", None)
    ]
    markers = {style.marker for style in (*branches, *techniques)}
    colours = {style.colour for style in (*branches, *techniques)}
    assert len(markers) == len(colours) == len(branches) + len(techniques)
    assert len({(s.colour, s.marker, s.line) for s in variants}) == len(
        variants
    )
    assert not {s.line for s in variants} & {s.line for s in techniques}


def test_technique_style_of_a_users_technique_leaves_the_others(monkeypatch):
    own = [
        name
        for name, cls in registry.techniques().items()
        if cls.__module__.startswith("sos.")
    ]
    monkeypatch.setattr(registry, "_techniques", dict.fromkeys(own, object))
    before = {name: technique_style(name) for name in (*own, None)}
    monkeypatch.setitem(registry._techniques, "Mine", object)
    assert technique_style("Mine") not in before.values()
    assert {name: technique_style(name) for name in before} == before


def test_branch_style_of_a_users_branch_leaves_the_others(monkeypatch):
    before = {name: branch_style(name) for name in branch_registry.branches()}
    unknown = branch_style("mine")
    monkeypatch.setitem(branch_registry._branches, "mine", object)
    assert branch_style("mine") == unknown
    assert unknown not in before.values()
    assert {name: branch_style(name) for name in before} == before
