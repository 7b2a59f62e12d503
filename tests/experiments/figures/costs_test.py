import dataclasses

import numpy as np
import pytest

from sos.experiments.branches import branch
from sos.experiments.config import resolve
from sos.experiments.figures.costs import (
    draw_costs,
    inference_cost,
    training_cost,
)
from sos.experiments.figures.study import Study
from tests.support.figures import check_texts, labelled_lines, replaced
from tests.support.results import make_run

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
# Of training the network: 700 steps, 128 examples, three products.
TRAINING = 700 * 128 * 3 * 1000


def _counted(run, parent=None):
    """A run of a network of 1,000 multiply-adds."""
    density = 1 - (run.result.sparsity or 0)
    run = replaced(
        run,
        step=run.config["train_steps"],
        multiply_adds=round(1000 * density),
        dense_multiply_adds=1000,
    )
    return dataclasses.replace(run, parent=parent or run.parent)


@pytest.fixture(scope="module")
def study(with_branches):
    counted = {run.name: _counted(run) for run in with_branches}
    return Study(
        [
            dataclasses.replace(run, parent=counted[run.parent.name])
            if run.parent
            else run
            for run in counted.values()
        ]
    )


def test_training_cost_counts_products_and_trunks(study):
    costs = {run.label: training_cost(run) for run in study.runs}
    assert costs == {
        "dense": TRAINING,
        "magnitude pruning": TRAINING,
        "magnitude, first layer dense": TRAINING,
        "random pruning": TRAINING,
        "variational dropout": 2 * TRAINING,
        "L0": TRAINING,
        "scratch-e": 2 * TRAINING,
        "scratch-b": 3 * TRAINING,
        "lottery ticket": 2 * TRAINING,
    }


def test_training_cost_of_a_rewound_ticket_counts_its_own_steps(study):
    trunk = next(r for r in study.runs if r.label == "magnitude pruning")
    kept = {**trunk.config, "keep_steps": [175]}
    config = resolve(branch(kept, "lottery_ticket", step=175))
    run = _counted(make_run(config, sparsity=0.9), trunk)
    assert training_cost(run) == 1.75 * TRAINING


def test_training_cost_that_is_not_known_is_none(study):
    by_label = {run.label: run for run in study.runs}
    dense = by_label["dense"]
    assert training_cost(replaced(dense, dense_multiply_adds=None)) is None
    scratch = by_label["scratch-e"]
    assert training_cost(dataclasses.replace(scratch, parent=None)) is None
    assert inference_cost(replaced(dense, multiply_adds=None)) is None
    # Nothing is left of the network.
    assert inference_cost(replaced(dense, multiply_adds=0)) is None


def test_draw_costs_places_runs_at_their_costs(study):
    figure = draw_costs(study)
    check_texts(figure)
    left, right = figure.axes
    for axes, places in (
        (left, {"magnitude pruning": [500, 100], "scratch-b": [500, 100]}),
        (
            right,
            {
                "magnitude pruning": [TRAINING],
                "variational dropout": [2 * TRAINING],
                "scratch-b": [3 * TRAINING],
            },
        ),
    ):
        lines = labelled_lines(axes)
        for label, x in places.items():
            # Branches of L0 are another line, the last.
            line = next(o for o in axes.lines if o.get_label() == label)
            np.testing.assert_allclose(line.get_xdata(), x)
        # The place of the dense network, on the line of its accuracy.
        (dense,) = (line for line in axes.lines if line.get_marker() == "8")
        assert dense.get_ydata() == pytest.approx([0.11])
        np.testing.assert_allclose(lines["dense"].get_ydata(), 0.11)
    assert "90%" in right.get_xlabel()


@pytest.mark.parametrize("label", ["dense", "variational dropout"])
def test_draw_costs_of_equal_costs_has_ticks_and_points(study, label):
    figure = draw_costs(Study([r for r in study.runs if r.label == label]))
    check_texts(figure)
    for axes in figure.axes:
        for ticks, limits in (
            (axes.get_xticks(), axes.get_xlim()),
            (axes.get_yticks(), axes.get_ylim()),
        ):
            low, high = sorted(limits)
            assert high >= 1.04 * low
            assert sum(low <= tick <= high for tick in ticks) >= 2
        inside = axes.transAxes.inverted().transform(
            axes.transData.transform(axes.lines[-1].get_xydata())
        )
        assert np.all((inside > 0.01) & (inside < 0.99))


def test_draw_costs_without_multiply_adds_is_none(runs):
    assert draw_costs(Study(runs)) is None
