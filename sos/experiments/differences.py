"""Compares techniques at equal sparsity, with bootstrap intervals over seeds.

A technique with a penalty reaches sparsities that nobody chose. Its curve is
therefore interpolated, linearly in the logarithm of the density, at the
sparsities of the study.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from sos.experiments.results import FinishedRun

#: Sparsities at which to compare if no technique of a study has a target.
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
# A curve counts beyond its ends up to this relative difference of the density:
# 97.8 % sparsity counts as 98 %, and 55 % as 50 %.
_END_TOLERANCE = 0.1
_RESAMPLES = 10_000
_CONFIDENCE = 0.95

#: Values by seed.
BySeed = Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference between two groups of runs.

    Attributes:
        mean: The mean, over strata, of the mean difference.
        interval: Its 95 % interval; None if no stratum has two seeds.
        seeds: Least and highest number of seeds in a stratum.
    """

    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, int]


def score(run: FinishedRun) -> float | None:
    """Returns the score of a run; None if it has none, or it is not finite."""
    return run.result.score_value


def target_sparsities(runs: Iterable[FinishedRun]) -> list[float]:
    """Returns the sparsities at which the techniques of a study compare.

    Args:
        runs: Finished runs.

    Returns:
        The target sparsities of the runs in ascending order, or `SPARSITIES`
        if there are none.
    """
    targets = {run.target_sparsity for run in runs} - {None}
    # A technique of a user may count sparsity in another unit.
    return sorted(t for t in targets if 0 <= t < 1) or list(SPARSITIES)


def seed_of(run: FinishedRun) -> int:
    """Returns the seed by which runs are paired: that of the first ancestor.

    Branches of one trunk belong together, whatever the seed of their weights.
    """
    while run.parent is not None:
        run = run.parent
    return run.config["seed"]


def by_sparsity(
    runs: Iterable[FinishedRun],
    sparsities: Sequence[float],
    value: Callable[[FinishedRun], float | None] = score,
) -> dict[float, dict[int, float]]:
    """Returns values of one technique at given sparsities.

    Args:
        runs: Runs that belong to one curve.
        sparsities: The sparsities.
        value: Returns the value of a run; runs for which it is None are left
            out.

    Returns:
        By sparsity, the values by seed. A seed whose runs do not reach a
        sparsity is missing, and a sparsity without seeds too.
    """
    curves: dict[int, dict[float, list[float]]] = {}
    for run in runs:
        y, sparsity = value(run), run.result.sparsity
        # A network without weights has no place on the axis.
        if y is not None and sparsity is not None and sparsity < 1:
            curve = curves.setdefault(seed_of(run), {})
            curve.setdefault(math.log1p(-sparsity), []).append(y)
    result: dict[float, dict[int, float]] = {}
    for sparsity in sparsities:
        if sparsity >= 1:
            continue
        x = math.log1p(-sparsity)
        for seed, curve in curves.items():
            ends = min(curve) - _END_TOLERANCE, max(curve) + _END_TOLERANCE
            if ends[0] <= x <= ends[1]:
                xs = sorted(curve)
                ys = [float(np.mean(curve[x])) for x in xs]
                values = result.setdefault(sparsity, {})
                values[seed] = float(np.interp(x, xs, ys))
    return result


def difference(
    strata: Iterable[tuple[BySeed, BySeed]],
) -> Difference | None:
    """Returns the mean difference of two groups, with a bootstrap interval.

    Seeds are resampled within each stratum, such as a sparsity, 10,000 times
    and always the same way. Where both groups have two or more common seeds,
    the differences of equal seeds are resampled, otherwise both groups
    independently. The resampled deviations from the mean are enlarged by
    sqrt(n / (n - 1)) for n seeds, because the variance of a resample is too
    small by its square. The interval has the 2.5 % and 97.5 % percentiles. If
    a stratum has several seeds, strata with one are left out.

    Args:
        strata: For each stratum, values of the first and of the second group
            by seed. A stratum in which either has none is left out.

    Returns:
        First minus second; None if there is nothing to compare.
    """
    samples = [_samples(*s) for s in strata if all(s)]
    if not samples:
        return None
    several = [s for s in samples if all(len(v) > 1 for _, v in s)]
    samples = several or samples
    counts = [len(values) for stratum in samples for _, values in stratum]
    mean = float(np.mean([sum(g * v.mean() for g, v in s) for s in samples]))
    interval = None
    if several:
        generator = np.random.default_rng(0)
        total = np.zeros(_RESAMPLES)
        for stratum in several:
            for sign, values in stratum:
                n = len(values)
                drawn = generator.choice(values, (_RESAMPLES, n)).mean(1)
                total += sign * math.sqrt(n / (n - 1)) * (drawn - values.mean())
        tail = (1 - _CONFIDENCE) / 2
        low, high = np.quantile(total / len(several), [tail, 1 - tail])
        interval = mean + float(low), mean + float(high)
    return Difference(mean, interval, (min(counts), max(counts)))


def _samples(first: BySeed, second: BySeed) -> list[tuple[int, np.ndarray]]:
    """Returns signs and values of what is resampled independently."""
    common = first.keys() & second.keys()
    if len(common) > 1 or len(first) == len(second) == len(common):
        return [(1, np.array([first[s] - second[s] for s in sorted(common)]))]
    return [
        (1, np.array([*first.values()])),
        (-1, np.array([*second.values()])),
    ]
