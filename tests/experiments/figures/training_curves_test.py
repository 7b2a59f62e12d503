import dataclasses

import numpy as np
import pytest

from sos.experiments.figures.study import Study
from sos.experiments.figures.style import DENSE_STYLE
from sos.experiments.figures.training_curves import (
    draw_training_curves,
    pruning_window,
)
from tests.support.figures import check_texts

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def _lines(axes, *, dense=False):
    return [
        line.get_data()
        for line in axes.lines
        if (line.get_color() == DENSE_STYLE.colour) == dense
        and line.get_linestyle() != "None"
    ]


def test_draw_training_curves_has_a_column_for_each_label(stored):
    figure = draw_training_curves(Study(stored))
    check_texts(figure)
    grid = np.array(figure.axes).reshape(3, 5)
    titles = [axes.get_title().replace("\n", " ") for axes in grid[0]]
    assert titles == [
        "magnitude pruning (90.0%)",
        "magnitude, first layer dense (90.0%)",
        "random pruning (90.0%)",
        "variational dropout (95.0%)",
        "L0 (95.0%)",
    ]
    labels = [axes.get_ylabel() for axes in grid[:, 0]]
    assert labels == ["Loss", "Accuracy", "Sparsity"]
    # Of two seeds, in the same limits.
    for row, values in ((0, [13 / 7, 12 / 7, 1.0]), (1, [0.55, 0.6, 0.85])):
        for axes in grid[row]:
            assert axes.get_ylim() == grid[row, 0].get_ylim()
            for number, lines in (
                (2, _lines(axes)),
                (1, _lines(axes, dense=True)),
            ):
                assert len(lines) == number
                for x, y in lines:
                    np.testing.assert_allclose(x, [100, 200, 700])
                    np.testing.assert_allclose(y, values)
            last = [x for x in axes.lines if x.get_linestyle() == "None"]
            assert [list(x.get_xdata()) for x in last] == [[700], [700]]


def test_draw_training_curves_sparsity_includes_mask_updates(stored):
    figure = draw_training_curves(Study(stored))
    sparsities = figure.axes[10:]
    for axes in sparsities[:3]:
        for x, y in _lines(axes):
            np.testing.assert_allclose(x, [0, 100, 150, 200, 700])
            np.testing.assert_allclose(y, [0, 0.45, 0.4, 0.9, 0.9])
    for axes in sparsities[3:]:
        for x, y in _lines(axes):
            np.testing.assert_allclose(x, [100, 200, 700])
            np.testing.assert_allclose(y, [0.45, 0.9, 0.9])


def test_draw_training_curves_shades_the_window(stored):
    study = Study(stored)
    figure = draw_training_curves(study)
    for axes, curve in zip(figure.axes[:5], study.compared, strict=True):
        (shade,) = axes.patches
        begin, end = pruning_window(curve.points[0][0])
        assert shade.get_x() == begin
        assert shade.get_x() + shade.get_width() == end


def test_draw_training_curves_without_logs_is_none(runs, stored):
    assert draw_training_curves(Study(runs)) is None
    dense = [run for run in stored if run.technique is None]
    assert draw_training_curves(Study(dense)) is None


def _with(run, **changes):
    sparsity = {**run.config["sparsity"], **changes}
    return dataclasses.replace(run, config={**run.config, "sparsity": sparsity})


def test_pruning_window_follows_the_config(runs):
    by_label = {run.label: run for run in runs}
    run = by_label["magnitude pruning"]
    window = {"begin_step": 20, "end_step": 300}
    assert pruning_window(_with(run, **window)) == (20, 300)
    # The schedule is laid over the training.
    begin, end = pruning_window(_with(run, end_step=None, frequency=None))
    assert 0 <= begin < end <= 700
    constant = {"schedule": "constant", "begin_step": 5, "end_step": None}
    assert pruning_window(_with(run, **constant, frequency=10)) == (5, 700)
    run = by_label["L0"]
    assert pruning_window(_with(run, **window, ramp="linear")) == (20, 300)
    changes = {"ramp": "constant", "begin_step": 0, "end_step": None}
    assert pruning_window(_with(run, **changes)) is None
    assert pruning_window(by_label["dense"]) is None
