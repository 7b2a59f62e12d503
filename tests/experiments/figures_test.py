import dataclasses

import matplotlib.image
import numpy as np
import pytest

from sos.experiments import figures
from sos.experiments.training import Outcome


def _outcome(sparsity, accuracy):
    return Outcome(
        achieved_sparsity=sparsity,
        model_sparsity=sparsity,
        test_accuracy=accuracy,
        test_loss=0.4,
        train_loss=0.3,
        seconds=1.0,
    )


@pytest.fixture
def results(config, expand):
    config.seeds = (0, 1)
    return [
        (run, _outcome(run.sparsity or 0.4, 0.8 + 0.01 * run.seed))
        for run in expand(config)
    ]


def _colours(path):
    pixels = matplotlib.image.imread(path)[..., :3]
    return {tuple(c) for c in np.round(255 * pixels.reshape(-1, 3)).astype(int)}


def test_every_technique_has_its_colour(tmp_path, results):
    path = tmp_path / "tradeoff.png"
    figures.save_tradeoff(path, results)
    colours = _colours(path)
    for colour in figures._COLOURS[:4]:
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert rgb in colours
    assert [p.name for p in tmp_path.iterdir()] == ["tradeoff.png"]


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_extreme_sparsities_can_be_drawn(tmp_path, results, sparsity):
    same = [
        (run, dataclasses.replace(outcome, achieved_sparsity=sparsity))
        for run, outcome in results
    ]
    figures.save_tradeoff(tmp_path / "tradeoff.png", same)
    assert (tmp_path / "tradeoff.png").stat().st_size > 5_000


def test_more_techniques_than_colours_can_be_drawn(tmp_path, results):
    many = [
        (dataclasses.replace(run, technique=f"technique {i}"), outcome)
        for i in range(15)
        for run, outcome in results
        if run.wrapper is not None
    ]
    figures.save_tradeoff(tmp_path / "tradeoff.png", many)
