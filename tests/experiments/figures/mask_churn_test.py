import numpy as np
import pytest

from sos.experiments.figures.mask_churn import draw_mask_churn
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import technique_style
from tests.support.figures import check_texts, labelled_lines

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def test_draw_mask_churn_begins_with_the_first_change(stored):
    figure = draw_mask_churn(Study(stored))
    check_texts(figure)
    above, below = figure.axes
    for axes, values in ((above, [0.48, 0.5]), (below, [4 / 60, 0])):
        lines = labelled_lines(axes)
        forced = lines.pop("forced by the schedule", None)
        assert list(lines) == [
            "magnitude pruning (90.0%)",
            "magnitude, first layer dense (90.0%)",
            "random pruning (90.0%)",
        ]
        for line in lines.values():
            np.testing.assert_allclose(line.get_xdata(), [150, 200])
            np.testing.assert_allclose(line.get_ydata(), values)
        style = technique_style("RandomPruning")
        assert line.get_color() == style.colour
        assert (forced is None) == (axes is below)
        if forced is not None:
            np.testing.assert_allclose(forced.get_ydata(), [0.4, 0.5])


def test_draw_mask_churn_without_updates_is_none(runs, stored):
    assert draw_mask_churn(Study(runs)) is None
    others = [run for run in stored if "Pruning" not in str(run.technique)]
    assert draw_mask_churn(Study(others)) is None
