import collections
import dataclasses

import numpy as np
import pytest
from matplotlib.colors import same_color

from sos.errors import UsageError
from sos.experiments import published
from sos.experiments.figures.published import (
    draw_all_scores,
    draw_branches,
    draw_runs,
    pareto_front,
)
from sos.experiments.figures.style import branch_style, technique_style
from tests.support.figures import check_texts, labelled_lines, replaced

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

MODELS = list(published.REFERENCES)
TECHNIQUES = {
    "magnitude pruning": "MagnitudePruning",
    "random pruning": "RandomPruning",
    "variational dropout": "VariationalDropout",
    "L0 regularization": "L0Regularization",
}


@pytest.fixture(scope="module", params=MODELS)
def all_scores(request):
    return request.param, draw_all_scores(request.param)


@pytest.fixture(scope="module", params=MODELS)
def branches(request):
    return request.param, draw_branches(request.param)


def means(axes):
    """The lines of means with bars, by their labels."""
    return {c.get_label(): c.lines[0] for c in axes.containers}


def data(line):
    """Its positions; with error bars, matplotlib keeps them as objects."""
    return np.array(line.get_data(), float)


def note(figure):
    return " ".join(figure.get_supxlabel().split())


def test_draw_all_scores_has_a_faint_point_for_every_score(all_scores):
    model, figure = all_scores
    (axes,) = figure.axes
    points = collections.Counter()
    for line in axes.lines:
        if line.get_linestyle() == "None" and line.get_alpha() == 0.25:
            points[line.get_color()] += len(line.get_xdata())
    # Runs with random masks.
    for branch in ("scratch", "augmented_init"):
        count = points.pop(branch_style(branch).colour, 0)
        assert count == (12 if model == "resnet50" else 0)
    scores = [s for s in published.load(model) if s.technique and not s.branch]
    assert points == {
        technique_style(technique).colour: sum(
            s.technique == technique for s in scores
        )
        for technique in TECHNIQUES.values()
    }
    assert (
        sum(points.values()) == {"resnet50": 1008, "transformer": 6156}[model]
    )


def test_draw_all_scores_joins_the_fronts(all_scores):
    model, figure = all_scores
    lines = labelled_lines(figure.axes[0])
    for label, technique in TECHNIQUES.items():
        (line,) = (
            line
            for text, line in lines.items()
            if text.startswith(f"{label} (")
        )
        style = technique_style(technique)
        assert line.get_color() == style.colour
        assert line.get_marker() == style.marker
        scores = line.get_ydata()
        assert (np.diff(scores) > 0).all()
        top = max(
            s.score
            for s in published.load(model)
            if s.technique == technique and not s.branch
        )
        assert scores[-1] == top


def test_draw_all_scores_draws_branches_as_means(all_scores):
    model, figure = all_scores
    found = means(figure.axes[0])
    best = [p for p in published.best(model) if p.branch]
    assert list(found) == list(dict.fromkeys(p.label for p in best))
    for label, line in found.items():
        expected = [p.score for p in best if p.label == label]
        np.testing.assert_allclose(data(line)[1], expected)


def test_draw_all_scores_counts_what_is_below_the_axis(all_scores):
    model, figure = all_scores
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    if model == "resnet50":
        assert (low, round(high)) == (36, 78)
        assert "322 scores of L0 regularization (308 of them below 1)" in note(
            figure
        )
        assert "24 runs with random masks" in note(figure)
    else:
        assert (low, round(high)) == (8, 28)
        assert "86 scores of magnitude pruning (45 of" in note(figure)
        assert "868 scores of variational dropout (649 of" in note(figure)
        assert "random masks" not in note(figure)


def test_draw_all_scores_has_the_dense_models_and_their_spread(all_scores):
    model, figure = all_scores
    (axes,) = figure.axes
    dense = published.best(model)[0]
    line = labelled_lines(axes)[f"dense ({dense.runs})"]
    assert set(line.get_ydata()) == {dense.score}
    (band,) = axes.patches
    assert band.get_height() == pytest.approx(2 * dense.sd)


def test_draw_all_scores_has_readable_texts(all_scores):
    _, figure = all_scores
    check_texts(figure)


def test_draw_branches_draws_scores_and_differences(branches):
    model, figure = branches
    above, below = figure.axes
    pruned = labelled_lines(above)["magnitude pruning"]
    assert pruned.get_color() == technique_style("MagnitudePruning").colour
    best = [p for p in published.best(model) if p.label == "lottery ticket"]
    line = means(above)["lottery ticket"]
    assert same_color(line.get_color(), branch_style("lottery_ticket").colour)
    x, y = [1 - p.sparsity for p in best], [p.score for p in best]
    np.testing.assert_allclose(data(line), [x, y])
    line = below.containers[-1].lines[0]
    # Both have the same sparsities.
    expected = y - data(pruned)[1]
    np.testing.assert_allclose(data(line)[1], expected, atol=1e-9)
    assert (expected < 0).all()


def test_draw_branches_says_how_often_runs_were_repeated(branches):
    model, figure = branches
    if model == "resnet50":
        assert "of 9 or 3 runs" in note(figure)
        assert "left out" not in note(figure)
    else:
        assert "of 25 runs" in note(figure)
        assert "3 runs with a BLEU below 1 are left out" in note(figure)


def test_draw_branches_has_readable_texts(branches):
    _, figure = branches
    check_texts(figure)


def test_draw_runs_draws_them_over_the_best_scores(runs):
    figure = draw_runs("resnet50", runs)
    check_texts(figure)
    (axes,) = figure.axes
    lines = labelled_lines(axes)
    yours, theirs = lines["L0"], lines["scratch-e (paper)"]
    # In percent; the mean of two seeds.
    np.testing.assert_allclose(yours.get_ydata(), [82.9, 79.5])
    assert same_color(
        yours.get_color(), technique_style("L0Regularization").colour
    )
    assert yours.get_linewidth() > theirs.get_linewidth()
    assert set(lines["dense"].get_ydata()) == {89.0}
    # The paper's line of a technique that has runs needs no label.
    assert "magnitude pruning (paper)" not in lines
    colour = technique_style("MagnitudePruning").colour
    assert sum(line.get_color() == colour for line in axes.lines) == 2


def test_draw_runs_far_from_the_paper_shows_them(runs):
    far = [
        replaced(run, sparsity=0.998, metrics={"accuracy": 0.1})
        for run in runs
        if run.result.sparsity is not None
    ]
    (axes,) = draw_runs("resnet50", far).axes
    assert axes.get_xlim()[1] < 0.002
    assert axes.get_ylim()[0] < 10


def test_draw_runs_in_the_style_of_the_published_variant(runs):
    (run, *_) = (r for r in runs if "first" in r.label)
    figure = draw_runs("resnet50", [run])
    line = labelled_lines(figure.axes[0])[run.label]
    style = technique_style("MagnitudePruning", 1)
    assert same_color(line.get_color(), style.colour)


def test_draw_runs_of_empty_models_omits_them(runs):
    empty = [replaced(run, sparsity=1.0) for run in runs if run.technique]
    lines = labelled_lines(draw_runs("resnet50", empty).axes[0])
    assert all(label.endswith("(paper)") for label in lines)


@pytest.mark.parametrize("draw", [draw_all_scores, draw_branches])
def test_draw_unknown_model_raises(draw):
    with pytest.raises(UsageError, match="'vgg'"):
        draw("vgg")


def test_pareto_front_leaves_out_what_others_exceed():
    score = published.load("transformer")[0]
    pairs = [(0.5, 20), (0.6, 19), (0.55, 18), (0.6000001, 17), (0.4, 20)]
    front = pareto_front(
        dataclasses.replace(score, sparsity=sparsity, score=value)
        for sparsity, value in pairs
    )
    assert [(s.sparsity, s.score) for s in front] == [(0.6, 19), (0.5, 20)]
