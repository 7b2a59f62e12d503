import numpy as np
import pytest

from sos.experiments.figures.layerwise_map import draw_layerwise_map
from sos.experiments.figures.study import Study
from tests.support.figures import LAYERS, check_texts, replaced, weights

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def _plots(figure):
    """The plots by title, without the scale of colours."""
    return {
        axes.get_title().replace("\n", " "): axes
        for axes in figure.axes
        if axes.get_visible() and axes.get_title()
    }


def test_draw_layerwise_map_cells_are_means_over_seeds(runs):
    figure = draw_layerwise_map(Study(runs))
    check_texts(figure)
    plots = _plots(figure)
    assert list(plots) == [
        "magnitude pruning",
        "magnitude, first layer dense",
        "random pruning",
        "variational dropout",
        "L0",
    ]
    first = plots["magnitude pruning"]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["conv1  144", "hidden  131k", "logits  1,280"]
    columns = [label.get_text() for label in first.get_xticklabels()]
    assert columns == ["50%", "90%"]
    axes = plots["L0"]
    (image,) = axes.images
    # Densities; a layer without weights is drawn at the end of the scale.
    expected = np.array([[0.75, 0.75], [0.001, 0.001], [0.5, 0.5]])
    np.testing.assert_allclose(image.get_array(), expected)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["25", "25", "100", "100", "50", "50"]


def test_draw_layerwise_map_has_one_scale_from_dense_to_sparse(runs):
    figure = draw_layerwise_map(Study(runs))
    norms = {axes.images[0].norm for axes in _plots(figure).values()}
    assert len(norms) == 1
    bar = figure.axes[-1]
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert labels[0] == "0%"
    assert labels[-1] == "≥ 99.9%"
    # Lighter colours for denser layers, also in grey.
    image = next(iter(_plots(figure).values())).images[0]
    rgb = image.cmap(image.norm(np.geomspace(1e-3, 1, 50)))[:, :3]
    grey = rgb @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > 0).all()


def test_draw_layerwise_map_texts_contrast_with_their_cells(runs):
    figure = draw_layerwise_map(Study(runs))
    for axes in _plots(figure).values():
        image = axes.images[0]
        colours = image.cmap(image.norm(image.get_array())).reshape(-1, 4)
        for colour, text in zip(colours, axes.texts, strict=True):
            grey = colour[:3] @ [0.299, 0.587, 0.114]
            light = text.get_color() == "white"
            assert abs(light - grey) > 0.4


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_draw_layerwise_map_of_one_run_is_drawn(runs, sparsity):
    run = next(r for r in runs if r.technique == "RandomPruning")
    run = replaced(run, sparsity=sparsity, weights=weights(3 * [sparsity]))
    figure = draw_layerwise_map(Study([run]))
    check_texts(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == 3 * [f"{100 * sparsity:.0f}"]


def test_draw_layerwise_map_of_many_layers_has_legible_names(runs):
    layers = {f"stage{i}_block10_conv2/kernel": 9216 for i in range(54)}
    many = [replaced(run, weights=weights(54 * [0.9], layers)) for run in runs]
    check_texts(draw_layerwise_map(Study(many)))


def test_draw_layerwise_map_without_a_layer_leaves_its_cells_empty(runs):
    names = list(LAYERS)
    fewer = [
        replaced(run, weights=run.result.weights[1:])
        if run.technique == "RandomPruning"
        else run
        for run in runs
    ]
    axes = _plots(draw_layerwise_map(Study(fewer)))["random pruning"]
    image = axes.images[0].get_array()
    assert image.shape == (len(names), 2)
    assert image.mask[0].all()
    assert not image.mask[1:].any()
    assert len(axes.texts) == 4


def test_draw_layerwise_map_without_layers_is_none(runs):
    bare = [replaced(run, weights=()) for run in runs]
    assert draw_layerwise_map(Study(bare)) is None
