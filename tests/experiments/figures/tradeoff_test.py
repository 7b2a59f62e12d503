import dataclasses
import math

import matplotlib.colors
import numpy as np
import pytest

from sos.experiments.figures import FIGURES
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import technique_style
from sos.experiments.figures.tradeoff import draw_tradeoff
from tests.support.figures import (
    check_texts,
    error_bars,
    labelled_lines,
    replaced,
    texts,
    weights,
)
from tests.support.results import in_bleu

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture
def axes(runs):
    figure = draw_tradeoff(Study(runs))
    check_texts(figure)
    (axes,) = figure.axes
    return axes


def test_draw_tradeoff_two_seeds_joins_the_means(axes):
    lines = labelled_lines(axes)
    assert list(lines) == [
        "dense",
        "magnitude pruning",
        "magnitude, first layer dense",
        "random pruning",
        "variational dropout",
        "L0",
    ]
    # The axes hold densities and errors.
    x, y = lines["magnitude pruning"].get_data()
    np.testing.assert_allclose(x, [0.5, 0.1])
    np.testing.assert_allclose(y, [0.16, 0.20])
    x, y = lines["L0"].get_data()
    np.testing.assert_allclose(x, [(0.4 * 0.38) ** 0.5, (0.06 * 0.04) ** 0.5])
    np.testing.assert_allclose(y, [0.171, 0.205])
    np.testing.assert_allclose(lines["dense"].get_ydata(), 0.11)


def test_draw_tradeoff_two_seeds_draws_bars_over_their_range(axes):
    # Magnitude pruning has bars of accuracy only: its sparsity does not vary.
    bars = error_bars(axes, technique_style("MagnitudePruning").colour)
    np.testing.assert_allclose(bars[..., 0], [(0.5, 0.5), (0.1, 0.1)])
    np.testing.assert_allclose(bars[..., 1], [(0.15, 0.17), (0.19, 0.21)])
    bars = error_bars(axes, technique_style("L0Regularization").colour)
    assert len(bars) == 4
    np.testing.assert_allclose(bars[:2, :, 0], [(0.38, 0.4), (0.04, 0.06)])
    np.testing.assert_allclose(bars[2:, :, 1], [(0.162, 0.18), (0.196, 0.214)])
    (band,) = axes.patches
    assert np.ptp(band.get_extents().get_points()[:, 1]) > 10
    assert "2 seeds" in axes.figure.legends[0].get_title().get_text()


def test_draw_tradeoff_one_seed_has_neither_bars_nor_a_band(runs):
    one = [run for run in runs if run.config["seed"] == 0]
    (axes,) = draw_tradeoff(Study(one)).axes
    assert len(axes.patches) == 0
    for technique in {run.technique for run in runs} - {None}:
        assert len(error_bars(axes, technique_style(technique).colour)) == 0
    assert axes.figure.legends[0].get_title().get_text() == ""


def test_draw_tradeoff_high_sparsities_are_far_apart(axes):
    positions = [
        axes.transAxes.inverted().transform(
            axes.transData.transform((1 - sparsity, 0.2))
        )[0]
        for sparsity in (0.5, 0.9, 0.95)
    ]
    assert positions == sorted(positions)
    assert positions[2] - positions[1] > 0.2
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert {"50%", "90%", "95%"} <= set(labels)
    accuracies = [label.get_text() for label in axes.get_yticklabels()]
    assert {"80%", "90%"} <= set(accuracies)


def test_draw_tradeoff_every_technique_has_its_colour(runs, axes):
    lines = labelled_lines(axes)
    for run in runs:
        if run.technique and "first" not in run.label:
            line, style = lines[run.label], technique_style(run.technique)
            assert line.get_color() == style.colour
            assert line.get_marker() == style.marker


@pytest.mark.parametrize("kept", [[None], ["L0Regularization"]])
def test_draw_tradeoff_few_techniques_keep_their_colours(runs, axes, kept):
    few = [run for run in runs if run.technique in kept]
    (alone,) = draw_tradeoff(Study(few)).axes
    ((label, line),) = labelled_lines(alone).items()
    other = labelled_lines(axes)[label]
    assert line.get_color() == other.get_color()
    assert line.get_marker() == other.get_marker()


def test_draw_tradeoff_of_dense_models_has_no_negative_sparsities(runs):
    (axes,) = draw_tradeoff(Study([r for r in runs if not r.technique])).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels and not any("-" in label for label in labels)


def test_draw_tradeoff_long_labels_stay_within_the_figure(runs):
    long = [
        dataclasses.replace(
            run, config={**run.config, "label": f"{run.label} {'word ' * 20}"}
        )
        for run in runs
    ]
    figure = draw_tradeoff(Study(long))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_draw_tradeoff_extreme_accuracies_are_drawn(runs, sparsity, accuracy):
    same = [
        replaced(
            run,
            sparsity=run.technique and sparsity,
            metrics={"accuracy": accuracy},
            weights=weights(3 * (sparsity,)),
        )
        for run in runs
    ]
    figure = draw_tradeoff(Study(same))
    check_texts(figure)
    assert len(labelled_lines(figure.axes[0])) == 6


def test_draw_tradeoff_runs_without_accuracy_or_weights_are_omitted(runs):
    def changed(changes):
        return [
            replaced(run, **changes) if run.technique in kept else run
            for run in runs
        ]

    kept = {run.technique for run in runs}
    for changes in (
        {"metrics": {"loss": 0.3}},
        {"metrics": {"accuracy": math.nan}},
        {"sparsity": 1.0},
    ):
        assert draw_tradeoff(Study(changed(changes))) is None
    kept = {"L0Regularization"}
    (axes,) = draw_tradeoff(
        Study(changed({"metrics": {"accuracy": math.nan}}))
    ).axes
    assert len(labelled_lines(axes)) == 5
    assert draw_tradeoff(Study([])) is None


def test_technique_style_variants_differ():
    styles = [
        technique_style(technique, variant)
        for technique in ("MagnitudePruning", "L0Regularization", None)
        for variant in range(3)
    ]
    assert len({(s.colour, s.marker, s.line) for s in styles}) == 9
    assert [style.filled for style in styles] == 3 * [True, False, False]
    lightness = [sum(matplotlib.colors.to_rgb(s.colour)) for s in styles[:3]]
    assert lightness == sorted(lightness)


@pytest.mark.parametrize(("low", "high"), [(0.952, 0.958), (0.05, 0.998)])
def test_draw_tradeoff_any_range_of_accuracies_has_legible_ticks(
    runs, low, high
):
    changed = [
        replaced(run, metrics={"accuracy": low if i % 2 else high})
        for i, run in enumerate(runs)
    ]
    figure = draw_tradeoff(Study(changed))
    check_texts(figure)
    (axes,) = figure.axes
    limits = sorted(axes.get_ylim())
    ticks = [y for y in axes.get_yticks() if limits[0] <= y <= limits[1]]
    assert 3 <= len(ticks) <= 16


def test_draw_tradeoff_of_bleu_has_a_linear_axis(runs):
    figure = draw_tradeoff(Study(in_bleu(runs)))
    check_texts(figure)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "BLEU"
    assert axes.get_yscale() == "linear" and not axes.yaxis_inverted()
    lines = labelled_lines(axes)
    accuracies = labelled_lines(draw_tradeoff(Study(runs)).axes[0])
    for label, line in lines.items():
        errors = np.asarray(accuracies[label].get_ydata())
        np.testing.assert_allclose(line.get_ydata(), 30 * (1 - errors))


def test_draw_tradeoff_of_equal_bleu_keeps_them_together(runs):
    same = [
        replaced(run, metrics={"accuracy": 0.9 + 1e-5 * run.config["seed"]})
        for run in runs
    ]
    (axes,) = draw_tradeoff(Study(in_bleu(same))).axes
    low, high = axes.get_ylim()
    assert (low + high) / 2 == pytest.approx(27, abs=1e-3)
    assert high - low == pytest.approx(1)


@pytest.mark.parametrize("spec", FIGURES, ids=lambda spec: spec.name)
def test_draw_figures_of_bleu_have_no_accuracy(spec, with_branches, stored):
    # Logs and masks are there for some.
    runs = in_bleu(stored if "mask" in spec.name else with_branches)
    figure = spec.draw(Study(runs))
    named = spec.named(runs[0].result.score)
    assert "ccuracy" not in named.title + named.caption
    assert "{" not in named.title + named.caption
    if figure is not None:
        check_texts(figure)
        assert not [t for t, _ in texts(figure) if "ccuracy" in t.get_text()]
