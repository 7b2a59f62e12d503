import dataclasses
import math

import numpy as np
import pytest

from sos.experiments import differences
from sos.experiments.differences import difference
from tests.support.results import make_study, make_toy_run


def _curve(*points, seed=0, technique="l0"):
    return [make_toy_run(technique, a, seed, s) for s, a in points]


def test_by_sparsity_is_linear_in_log_density():
    runs = _curve((0.601, 0.9), (0.901, 0.6))
    (value,) = differences.by_sparsity(runs, [0.8])[0.8].values()
    # From density 0.4 to 0.1 it falls by 30 points; 0.2 is in the middle.
    assert value == pytest.approx(75)


def test_by_sparsity_outside_of_the_range_is_missing():
    runs = _curve((0.601, 0.9), (0.901, 0.6))
    assert differences.by_sparsity(runs, [0.5, 0.95]) == {}
    # Within 10 % of the density, an end counts.
    assert differences.by_sparsity(runs, [0.905]) == {
        0.905: {0: pytest.approx(60)}
    }


def test_by_sparsity_equal_densities_are_averaged():
    runs = _curve((0.8, 0.9), (0.8, 0.7), technique="magnitude")
    assert differences.by_sparsity(runs, [0.8])[0.8] == {0: pytest.approx(80)}


def test_by_sparsity_runs_without_a_number_are_left_out():
    (lost,) = _curve((0.8, math.nan), technique="magnitude")
    dense = make_toy_run("dense", 0.9, 0)
    empty = dataclasses.replace(
        lost, result=dataclasses.replace(lost.result, sparsity=1.0)
    )
    without = dataclasses.replace(
        lost, result=dataclasses.replace(lost.result, metrics={})
    )
    runs = [lost, dense, empty, without]
    assert differences.by_sparsity(runs, [0.8]) == {}


def test_target_sparsities_without_targets_are_those_of_the_paper():
    assert differences.target_sparsities(make_study()) == [0.5, 0.9, 0.98]
    runs = _curve((0.6, 0.9))
    assert differences.target_sparsities(runs) == [*differences.SPARSITIES]


def test_seed_of_branch_is_that_of_its_trunk():
    run = make_study()[-1]
    assert (run.config["seed"], differences.seed_of(run)) == (1001, 1)


def test_difference_of_two_pairs_has_the_interval_of_three_resamples():
    # Differences 1 and 3: resampled means are 1, 2 and 3, enlarged by sqrt(2).
    result = difference([({0: 4.0, 1: 5.0}, {0: 3.0, 1: 2.0})])
    assert result.mean == 2
    assert result.interval == pytest.approx((2 - 2**0.5, 2 + 2**0.5))
    assert result.seeds == (2, 2)


def test_difference_of_many_seeds_has_the_normal_interval():
    generator = np.random.default_rng(1)
    values = dict(enumerate(generator.normal(5.0, 2.0, 400)))
    zeros = dict.fromkeys(values, 0.0)
    result = difference([(values, zeros)])
    sample = np.array([*values.values()])
    error = 1.96 * sample.std(ddof=1) / 20
    low, high = result.interval
    assert low == pytest.approx(sample.mean() - error, abs=0.02)
    assert high == pytest.approx(sample.mean() + error, abs=0.02)


def test_difference_of_pairs_ignores_what_seeds_have_in_common():
    first = {0: 10.0, 1: 50.0, 2: 90.0}
    second = {seed: value - 1 for seed, value in first.items()}
    assert difference([(first, second)]).interval == (1.0, 1.0)
    # Of other seeds, they cannot be paired.
    other = {seed + 5: value for seed, value in second.items()}
    low, high = difference([(first, other)]).interval
    assert low < -40 and high > 40


def test_difference_common_seeds_only_are_paired():
    first, second = {0: 1.0, 1: 2.0, 2: 99.0}, {0: 0.0, 1: 1.0}
    assert difference([(first, second)]).interval == (1.0, 1.0)


def test_difference_of_one_seed_has_no_interval():
    result = difference([({0: 4.0}, {0: 3.0}), ({0: 2.0}, {0: 3.0})])
    assert (result.mean, result.interval) == (0, None)
    assert difference([({0: 4.0}, {1: 3.0})]).interval is None


def test_difference_strata_of_one_seed_are_left_out_if_others_have_several():
    pair = ({0: 4.0, 1: 5.0}, {0: 3.0, 1: 4.0})
    result = difference([pair, ({0: 99.0}, {0: 0.0})])
    assert (result.mean, result.interval) == (1.0, (1.0, 1.0))


def test_difference_of_nothing_is_none():
    assert difference([]) is None
    assert difference([({0: 1.0}, {}), ({}, {0: 1.0})]) is None


def test_difference_is_the_same_every_time():
    strata = [({0: 1.0, 1: 3.0, 2: 4.5}, {0: 0.0, 1: 1.0, 2: 5.0})]
    assert difference(strata) == difference(strata)


@pytest.mark.parametrize(
    ("seeds", "sparsities", "expected"),
    [(2, 1, 0.61), (2, 5, 0.89), (5, 5, 0.94)],
)
def test_difference_interval_contains_the_true_difference(
    seeds, sparsities, expected, monkeypatch
):
    monkeypatch.setattr(differences, "_RESAMPLES", 400)
    generator = np.random.default_rng(3)
    repeats, hits = 300, 0
    for _ in range(repeats):
        # The mean over sparsities of the true differences is 2.
        strata = [
            (
                dict(enumerate(generator.normal(s + 2, 1.0, seeds))),
                dict(enumerate(generator.normal(s, 1.0, seeds))),
            )
            for s in range(sparsities)
        ]
        low, high = difference(strata).interval
        hits += low <= 2 <= high
    assert hits / repeats == pytest.approx(expected, abs=0.06)


def test_target_sparsities_beyond_one_are_left_out():
    (run,) = _curve((0.9, 0.8), technique="magnitude")
    sparsity = {**run.config["sparsity"], "sparsity": 90}
    run = dataclasses.replace(run, config={**run.config, "sparsity": sparsity})
    assert differences.target_sparsities([run]) == [*differences.SPARSITIES]
    assert differences.by_sparsity([run], [1.0]) == {}
