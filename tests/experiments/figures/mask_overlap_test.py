import math

import numpy as np
import pytest

from sos.experiments.figures.mask_overlap import (
    chance_overlap,
    draw_mask_overlap,
    overlap,
)
from sos.experiments.figures.study import Study
from tests.support.figures import check_texts

# Matplotlib warns of what it cannot draw.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def _random_masks(generator, kept, sizes):
    masks = {}
    for i, (k, size) in enumerate(zip(kept, sizes, strict=True)):
        mask = np.zeros(size, "uint8")
        mask[generator.permutation(size)[:k]] = 1
        masks[f"{i}/kernel"] = mask
    return masks


def test_chance_overlap_is_the_mean_of_random_masks():
    generator = np.random.default_rng(0)
    sizes = (400, 3000, 50)
    kept = (360, 150, 10), (100, 300, 25)
    samples = [
        [_random_masks(generator, counts, sizes) for counts in kept]
        for _ in range(200)
    ]
    drawn = [overlap(*pair) for pair in samples]
    error = np.std(drawn) / math.sqrt(len(drawn))
    expected = chance_overlap(*samples[0])
    assert abs(np.mean(drawn) - expected) < 4 * error
    assert error < 0.01 * expected
    # Not what the overall sparsities alone would give.
    flat = [{"all": np.concatenate([*m.values()])} for m in samples[0]]
    assert chance_overlap(*flat) < expected - 20 * error


def test_overlap_of_masks_in_shape_of_weights():
    one = {"a": np.array([[1, 1], [0, 0]], "uint8")}
    other = {"a": np.array([[1, 0], [1, 0]], "uint8")}
    assert overlap(one, one) == 1
    assert overlap(one, other) == 1 / 3
    assert chance_overlap(one, other) == 1 / 3
    # The other run has a dense weight more.
    more = {**other, "b": np.array([1, 0, 0, 1], "uint8")}
    assert overlap(one, more) == (1 + 2) / (3 + 4)
    assert chance_overlap(one, more) == (1 + 2) / (3 + 4)


def test_overlap_of_nothing_or_other_shapes_is_nan():
    zeros = {"a": np.zeros(3, "uint8")}
    assert math.isnan(overlap(zeros, zeros))
    assert math.isnan(chance_overlap({}, {}))
    assert math.isnan(overlap(zeros, {"a": np.zeros(4, "uint8")}))


def test_draw_mask_overlap_has_measured_and_chance_values(stored):
    study = Study(stored)
    figure = draw_mask_overlap(study)
    check_texts(figure)
    axes = figure.axes[0]
    values = axes.images[0].get_array()
    runs = [run for curve in study.compared for run in curve.points[0]]
    assert values.shape == (10, 10)
    for i, one in enumerate(runs):
        assert values.mask[i, i]
        for j, other in enumerate(runs[:i]):
            masks = study.masks(one), study.masks(other)
            assert values[i, j] == overlap(*masks)
            assert values[j, i] == chance_overlap(*masks)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "magnitude pruning 90.0%, seed 0"
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert len(axes.texts) == 90


def test_draw_mask_overlap_of_fewer_than_two_masks_is_none(runs, stored):
    assert draw_mask_overlap(Study(runs)) is None
    sparse = [run for run in stored if run.technique]
    assert draw_mask_overlap(Study(sparse[:1])) is None
    figure = draw_mask_overlap(Study(sparse[:2]))
    check_texts(figure)
