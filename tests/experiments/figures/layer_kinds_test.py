import math

import numpy as np
import pytest

from sos.experiments.figures.layer_kinds import draw_layer_kinds, kind_densities
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import technique_style
from sos.experiments.run_files import WeightSparsity
from tests.support.figures import (
    check_texts,
    error_bars,
    labelled_lines,
    replaced,
)

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

# Paths, sizes and kinds.
LAYERS = (
    ("table", 600, "embedding"),
    ("encoder/value", 100, "value"),
    ("decoder/value", 100, "value"),
    ("hidden", 200, "feed-forward"),
)


def with_kinds(run, layers=LAYERS, names=None):
    """A run whose value layers are twice as dense as it should be for L0."""
    sparsity = run.result.sparsity
    if sparsity is None:
        return run
    factors = {"value": 2.0} if run.technique == "L0Regularization" else {}
    weights = tuple(
        WeightSparsity(
            path=path,
            size=size,
            sparsity=1 - min(1.0, factors.get(kind, 1.0) * (1 - sparsity)),
            kind=(names or {}).get(kind, kind),
        )
        for path, size, kind in layers
    )
    total = sum(size for _, size, _ in layers)
    sparsity = sum(w.size * w.sparsity for w in weights) / total
    return replaced(run, weights=weights, sparsity=sparsity)


@pytest.fixture
def kinds(runs):
    return [with_kinds(run) for run in runs]


def test_draw_layer_kinds_has_a_plot_for_each_kind(kinds):
    figure = draw_layer_kinds(Study(kinds))
    check_texts(figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "Embedding\n60% of weights",
        "Value\n20% of weights",
        "Feed-forward\n20% of weights",
    ]
    lines = labelled_lines(figure.axes[1])
    (points,) = [line for name, line in lines.items() if name == "L0"]
    # Over both seeds, from the sparser network; means of both layers.
    own = [run for run in kinds if run.label == "L0"]
    by_point = {}
    for run in own:
        by_point.setdefault(run.point, []).append(run)
    expected = sorted(
        (
            (
                math.prod(1 - r.result.sparsity for r in group) ** 0.5,
                np.mean([kind_densities(r)["value"] for r in group]),
            )
            for group in by_point.values()
        ),
        reverse=True,
    )
    np.testing.assert_allclose(points.get_xydata(), expected)


def test_draw_layer_kinds_names_equal_techniques_for_the_diagonal(kinds):
    figure = draw_layer_kinds(Study(kinds))
    for axes in figure.axes:
        lines = labelled_lines(axes)
        assert set(lines) == {"L0", *(n for n in lines if ":" in n)}
        (diagonal,) = [line for name, line in lines.items() if ":" in name]
        assert diagonal.get_label().startswith("all kinds alike: ")
        assert "random pruning" in diagonal.get_label()
        assert "variational dropout" in diagonal.get_label()
        x, y = diagonal.get_data()
        np.testing.assert_array_equal(x, y)
        assert sorted(axes.get_xlim()) == pytest.approx(sorted(x))


def test_draw_layer_kinds_of_equal_techniques_alone_shows_the_line(kinds):
    figure = draw_layer_kinds(Study([r for r in kinds if r.label != "L0"]))
    for axes in figure.axes:
        assert axes.get_ylim() == pytest.approx(axes.get_xlim())
        (diagonal,) = labelled_lines(axes).values()
        assert diagonal.get_label().startswith("all kinds alike: ")


def test_draw_layer_kinds_without_equal_techniques_explains_the_line(kinds):
    figure = draw_layer_kinds(Study([r for r in kinds if r.label == "L0"]))
    assert "as sparse as the network" in labelled_lines(figure.axes[0])
    # Two seeds, of other densities.
    colour = technique_style("L0Regularization").colour
    assert len(error_bars(figure.axes[0], colour)) == 2


def test_draw_layer_kinds_of_a_kind_without_weights_is_at_the_end(kinds):
    runs = []
    for run in kinds:
        if run.label == "L0":
            weights = [
                WeightSparsity(path="a", size=9, sparsity=1.0, kind="empty"),
                *run.result.weights,
            ]
            runs.append(replaced(run, weights=tuple(weights)))
    figure = draw_layer_kinds(Study(runs))
    check_texts(figure)
    line = labelled_lines(figure.axes[0])["L0"]
    assert set(line.get_ydata()) == {1e-3}


@pytest.mark.parametrize("count", [2, 4, 6, 11])
def test_draw_layer_kinds_of_any_number_has_legible_texts(runs, count):
    layers = [(f"layer{i}", 10**i, f"kind of layer {i}") for i in range(count)]
    study = Study([with_kinds(run, layers) for run in runs])
    figure = draw_layer_kinds(study)
    check_texts(figure)
    assert sum(axes.get_visible() for axes in figure.axes) == count


def test_draw_layer_kinds_without_two_kinds_is_none(runs, kinds):
    assert draw_layer_kinds(Study(runs)) is None
    assert draw_layer_kinds(Study([])) is None
    one = {"value": "all", "embedding": "all", "feed-forward": "all"}
    runs = [with_kinds(run, names=one) for run in runs]
    assert draw_layer_kinds(Study(runs)) is None
    dense = [run for run in kinds if run.result.sparsity is None]
    assert draw_layer_kinds(Study(dense)) is None


def test_kind_densities_of_some_kinds_leaves_out_other_weights(kinds):
    run = next(run for run in kinds if run.label == "L0")
    weights = [
        WeightSparsity(path="x", size=100, sparsity=0.5, kind="a"),
        WeightSparsity(path="y", size=300, sparsity=0.9, kind="a"),
        WeightSparsity(path="z", size=50, sparsity=0.1),
    ]
    run = replaced(run, weights=tuple(weights))
    assert kind_densities(run) == {"a": pytest.approx(80 / 400)}
