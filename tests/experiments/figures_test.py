import dataclasses
import errno
import os

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

import sos
from configs import fashion_mnist
from sos.errors import StorageError
from sos.experiments import figures, sweeps
from sos.experiments.config import plain, run_name
from sos.experiments.results import FinishedRun
from sos.experiments.runs import WeightSparsity
from tests.support.results import make_result

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

LAYERS = {"conv1/kernel": 144, "hidden/kernel": 131_072, "logits/kernel": 1280}


def _weights(sparsities):
    return tuple(
        WeightSparsity(path=path, size=size, sparsity=sparsity)
        for (path, size), sparsity in zip(
            LAYERS.items(), sparsities, strict=True
        )
    )


def _colour(technique, variant=0):
    """The colour of a technique, as hexadecimal text."""
    place = list(sos.extend.techniques()).index(technique)
    rgb = figures._lighter(figures._COLOURS[place], variant)
    return matplotlib.colors.to_hex(rgb)


@pytest.fixture(scope="module")
def results():
    """Two seeds; penalties of 0.1 and 1 lead to 60 and 94 % or so."""
    config = fashion_mnist.get_config()
    grid = fashion_mnist.make_sweep(
        config,
        seeds=(0, 1),
        sparsities=(0.5, 0.9),
        variational_dropout=(0.1, 1.0),
        l0=(0.1, 1.0),
    )
    runs = []
    for expanded in sweeps.expand(config, grid):
        seed, wanted = expanded.seed, expanded.sparsity
        sparsity = wanted.get("sparsity", 0.0)
        if "penalty_weight" in wanted:
            small = wanted.penalty_weight < 0.5 / 6000
            sparsity = (0.6 if small else 0.94) + 0.02 * seed
        layers = (sparsity, sparsity, sparsity)
        if wanted.technique == "L0Regularization":
            layers = (0.2 + 0.1 * seed, 1.0, 0.5)
        runs.append(
            FinishedRun(
                name=run_name(expanded),
                config=plain(expanded),
                result=make_result(
                    sparsity=sparsity if wanted.technique else None,
                    accuracy=0.88 - 0.1 * sparsity + 0.02 * seed,
                    weights=_weights(layers),
                ),
            )
        )
    return runs


def _replaced(run, **changes):
    result = dataclasses.replace(run.result, **changes)
    return dataclasses.replace(run, result=result)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws, and returns the figure itself."""
    saved = []
    save = figures._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)

    def call(function, *args):
        function(tmp_path / "figure.png", *args)
        assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
        return saved.pop()

    return call


def _curves(figure):
    """The labelled curves of a figure, by label."""
    (axes,) = figure.axes
    return {
        line.get_label(): line
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def _bars(figure, colour):
    """Beginnings and ends of the error bars of a colour, of shape (n, 2, 2)."""
    (axes,) = figure.axes
    segments = []
    for collection in axes.collections:
        found = matplotlib.colors.to_hex(collection.get_edgecolor()[0])
        if found.upper() == colour.upper():
            segments += collection.get_segments()
    return np.array(segments)


def _colours(path):
    pixels = np.round(255 * matplotlib.image.imread(path)[..., :3]).astype(int)
    values = np.unique(pixels @ [1 << 16, 1 << 8, 1])
    return {(v >> 16, v >> 8 & 255, v & 255) for v in values.tolist()}


@pytest.mark.parametrize(
    "draw_figure",
    [
        figures.save_tradeoff,
        lambda path, results: figures.save_layerwise(path, results, 0.9),
    ],
)
def test_figures_of_all_techniques_have_their_colours(
    tmp_path, results, draw_figure
):
    path = tmp_path / "figure.png"
    draw_figure(path, results)
    colours = _colours(path)
    for technique in {run.technique for run in results} - {None}:
        colour = _colour(technique)
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert rgb in colours
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_tradeoff_curves_join_the_means_over_seeds(draw, results):
    curves = _curves(draw(figures.save_tradeoff, results))
    assert list(curves) == [
        "dense",
        "magnitude pruning",
        "magnitude, first layer dense",
        "random pruning",
        "variational dropout",
        "L0",
    ]
    # The axes hold densities and errors.
    x, y = curves["magnitude pruning"].get_data()
    np.testing.assert_allclose(x, [0.5, 0.1])
    np.testing.assert_allclose(y, [0.16, 0.20])
    x, y = curves["L0"].get_data()
    np.testing.assert_allclose(x, [(0.4 * 0.38) ** 0.5, (0.06 * 0.04) ** 0.5])
    np.testing.assert_allclose(y, [0.171, 0.205])
    np.testing.assert_allclose(curves["dense"].get_ydata(), 0.11)


def test_tradeoff_bars_reach_from_the_lowest_to_the_highest_seed(draw, results):
    figure = draw(figures.save_tradeoff, results)
    # Magnitude pruning has bars of accuracy only: its sparsity does not vary.
    bars = _bars(figure, _colour("MagnitudePruning"))
    np.testing.assert_allclose(bars[..., 0], [(0.5, 0.5), (0.1, 0.1)])
    np.testing.assert_allclose(bars[..., 1], [(0.15, 0.17), (0.19, 0.21)])
    bars = _bars(figure, _colour("L0Regularization"))
    assert len(bars) == 4
    np.testing.assert_allclose(bars[:2, :, 0], [(0.38, 0.4), (0.04, 0.06)])
    np.testing.assert_allclose(bars[2:, :, 1], [(0.162, 0.18), (0.196, 0.214)])
    (axes,) = figure.axes
    (band,) = axes.patches
    assert np.ptp(band.get_extents().get_points()[:, 1]) > 10
    assert "2 seeds" in axes.get_legend().get_title().get_text()


def test_tradeoff_of_one_seed_has_neither_bars_nor_a_band(draw, results):
    one = [run for run in results if run.config["seed"] == 0]
    figure = draw(figures.save_tradeoff, one)
    (axes,) = figure.axes
    assert len(axes.patches) == 0
    for technique in {run.technique for run in results} - {None}:
        assert len(_bars(figure, _colour(technique))) == 0
    assert axes.get_legend().get_title().get_text() == ""


def test_tradeoff_of_high_sparsities_sets_them_far_apart(draw, results):
    figure = draw(figures.save_tradeoff, results)
    (axes,) = figure.axes
    positions = [
        axes.transAxes.inverted().transform(
            axes.transData.transform((1 - sparsity, 0.2))
        )[0]
        for sparsity in (0.5, 0.9, 0.95)
    ]
    assert positions == sorted(positions)
    assert positions[2] - positions[1] > 0.2
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert {"90%", "95%", "98%"} <= set(labels)
    accuracies = [label.get_text() for label in axes.get_yticklabels()]
    assert {"80%", "90%"} <= set(accuracies)


def test_layerwise_draws_layers_in_the_order_of_the_network(draw, results):
    figure = draw(figures.save_layerwise, results, 0.9)
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["conv1\n144", "hidden\n131k", "logits\n1,280"]
    curves = _curves(figure)
    for i, curve in enumerate(curves.values()):
        shifts = curve.get_xdata() - [0, 1, 2]
        np.testing.assert_allclose(shifts, 0.15 * (i - 2))
    densities = {
        label: curve.get_ydata().tolist() for label, curve in curves.items()
    }
    assert densities["magnitude pruning (90.0%)"] == pytest.approx(3 * [0.1])
    # Of the points at 61 and 95 % it is the nearer one.
    assert densities["variational dropout (95.0%)"] == pytest.approx(3 * [0.05])
    # Nothing is left of the second layer.
    expected = [0.75, figures._LEAST_DENSITY, 0.5]
    assert densities["L0 (95.0%)"] == pytest.approx(expected)
    assert axes.get_yticklabels()[-1].get_text() == "≥ 99.9%"


def test_layerwise_point_follows_the_sparsity(draw, results):
    labels = _curves(draw(figures.save_layerwise, results, 0.55))
    assert "magnitude pruning (50.0%)" in labels
    assert "L0 (61.0%)" in labels


def test_layerwise_bars_reach_over_the_seeds(draw, results):
    figure = draw(figures.save_layerwise, results, 0.9)
    # Of the first layer alone: the others are alike in both.
    bars = _bars(figure, _colour("L0Regularization"))
    np.testing.assert_allclose(bars[..., 1], [(0.7, 0.8)])


def test_layerwise_of_long_networks_has_legible_names(draw, results):
    weights = tuple(
        WeightSparsity(
            path=f"stage{i}_block1_conv1/kernel", size=9216, sparsity=0.9
        )
        for i in range(22)
    )
    long = [_replaced(run, weights=weights) for run in results]
    figure = draw(figures.save_layerwise, long, 0.9)
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


def test_figures_of_the_same_runs_use_the_same_colours(draw, results):
    tradeoff = _curves(draw(figures.save_tradeoff, results))
    layerwise = _curves(draw(figures.save_layerwise, results, 0.9))
    assert len(layerwise) == 5
    for label, curve in layerwise.items():
        other = tradeoff[label.partition(" (")[0]]
        assert curve.get_color() == other.get_color()
        assert curve.get_marker() == other.get_marker()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_tradeoff_of_extreme_sparsities_is_drawn(draw, results, sparsity):
    same = [
        _replaced(
            run,
            sparsity=sparsity,
            metrics={"accuracy": accuracy},
            weights=_weights(3 * (sparsity,)),
        )
        for run in results
        for accuracy in (0.0, 1.0)
    ]
    draw(figures.save_tradeoff, same)
    draw(figures.save_layerwise, same, 0.9)


@pytest.mark.parametrize("kept", [[], [None], ["L0Regularization"]])
def test_figures_of_few_techniques_are_drawn(draw, results, kept):
    few = [run for run in results if run.technique in kept]
    draw(figures.save_tradeoff, few)
    draw(figures.save_layerwise, few, 0.9)


def test_figure_without_room_raises(results, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"figure\.png .*No space"):
        figures.save_tradeoff(tmp_path / "figure.png", results)
    assert not list(tmp_path.iterdir())


def test_layerwise_without_layers_is_drawn(draw, results):
    bare = [_replaced(run, weights=()) for run in results]
    draw(figures.save_layerwise, bare, 0.9)


def test_figures_of_some_techniques_use_the_colours_of_all(draw, results):
    everything = _curves(draw(figures.save_tradeoff, results))
    some = [run for run in results if run.technique == "L0Regularization"]
    (curve,) = _curves(draw(figures.save_tradeoff, some)).values()
    assert curve.get_color() == everything["L0"].get_color()
    assert curve.get_marker() == everything["L0"].get_marker()


def test_figures_of_variants_of_one_technique_differ(draw, results):
    many = [
        dataclasses.replace(run, config={**run.config, "label": f"{label} {i}"})
        for i in range(3)
        for run in results
        if (label := run.label) != "dense" and "first" not in label
    ]
    curves = _curves(draw(figures.save_tradeoff, many))
    styles = {
        (c.get_color(), c.get_marker(), c.get_linestyle())
        for c in curves.values()
    }
    assert len(styles) == len(curves) == 12
