import numpy as np
import pytest

from sos.experiments.figures import layerwise
from sos.experiments.figures.layerwise import draw_layerwise
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import technique_style
from sos.experiments.figures.tradeoff import draw_tradeoff
from tests.support.figures import (
    check_texts,
    error_bars,
    labelled_lines,
    replaced,
    weights,
)

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture
def axes(runs):
    figure = draw_layerwise(Study(runs, 0.9))
    check_texts(figure)
    (axes,) = figure.axes
    return axes


def test_draw_layerwise_layers_are_in_the_order_of_the_network(axes):
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["conv1\n144", "hidden\n131k", "logits\n1,280"]
    lines = labelled_lines(axes)
    for i, line in enumerate(lines.values()):
        shifts = line.get_xdata() - [0, 1, 2]
        np.testing.assert_allclose(shifts, 0.15 * (i - 2))
    densities = {
        label: line.get_ydata().tolist() for label, line in lines.items()
    }
    assert densities["magnitude pruning (90.0%)"] == pytest.approx(3 * [0.1])
    # Of the points at 61 and 95 % it is the nearer one.
    assert densities["variational dropout (95.0%)"] == pytest.approx(3 * [0.05])
    # Nothing is left of the second layer.
    expected = [0.75, layerwise._LEAST_DENSITY, 0.5]
    assert densities["L0 (95.0%)"] == pytest.approx(expected)
    assert axes.get_yticklabels()[-1].get_text() == "≥ 99.9%"


def test_draw_layerwise_point_follows_the_sparsity(runs):
    labels = labelled_lines(draw_layerwise(Study(runs, 0.55)).axes[0])
    assert "magnitude pruning (50.0%)" in labels
    assert "L0 (61.0%)" in labels


def test_draw_layerwise_two_seeds_draws_bars_over_their_range(axes):
    # Of the first layer alone: the others are alike in both.
    bars = error_bars(axes, technique_style("L0Regularization").colour)
    np.testing.assert_allclose(bars[..., 1], [(0.7, 0.8)])


def test_draw_layerwise_long_networks_have_legible_names(runs):
    layers = {f"stage{i}_block1_conv1/kernel": 9216 for i in range(22)}
    long = [replaced(run, weights=weights(22 * [0.9], layers)) for run in runs]
    figure = draw_layerwise(Study(long))
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) == 22
    # They end one beside the other, more than a line apart.
    ends = np.array([box.x1 for box in boxes])
    height = 7.5 / 72 * figure.dpi
    assert np.diff(ends).min() > height
    # And inside the figure.
    assert min(box.y0 for box in boxes) > 0
    assert min(box.x0 for box in boxes) > 0


def test_draw_layerwise_labels_have_the_style_of_the_tradeoff(runs, axes):
    tradeoff = labelled_lines(draw_tradeoff(Study(runs)).axes[0])
    lines = labelled_lines(axes)
    assert len(lines) == 5
    for label, line in lines.items():
        other = tradeoff[label.partition(" (")[0]]
        assert line.get_color() == other.get_color()
        assert line.get_marker() == other.get_marker()
        assert line.get_linestyle() == other.get_linestyle()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_draw_layerwise_extreme_sparsities_are_drawn(runs, sparsity):
    same = [
        replaced(
            run,
            sparsity=run.technique and sparsity,
            weights=weights(3 * (sparsity,)),
        )
        for run in runs
    ]
    check_texts(draw_layerwise(Study(same)))


def test_draw_layerwise_without_layers_is_none(runs):
    bare = [replaced(run, weights=()) for run in runs]
    assert draw_layerwise(Study(bare)) is None
    dense = [run for run in runs if run.technique is None]
    assert draw_layerwise(Study(dense)) is None
    assert draw_layerwise(Study([])) is None
