"""Measures the quality of the noise that techniques draw.

    python -m tests.support.noise_quality [--numbers=10_000_000] [--keys=300]

Each statistic of the words, uniform and normal numbers of `sos.noise` is a z
score, which is standard normal for true random numbers. The bound of all scores
is the one that true random numbers pass with probability 1 - 1e-6. Prints the
scores by group, and exits with 1 if one is out of bounds. Takes about five
minutes and 2 GB on two cores.
"""

import argparse
import collections
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table
import scipy.fft
import scipy.stats

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    from sos import noise

    tf.config.list_physical_devices()

# Neighbours, powers of two, and strides of images and activations: widths,
# areas, and those times numbers of channels.
LAGS = [
    *(1, 2, 3, 4, 5, 7, 8, 9, 16, 27, 32, 56, 64, 112, 128, 224, 256, 512),
    *(784, 1000, 1024, 2048, 3136, 3584, 4096, 8000, 12544, 16384, 50176),
    *(65536, 131072, 200704, 262144, 524288, 802816, 1048576),
]
# What is correlated: dependence may show in sizes alone.
VIEWS = {
    "numbers": lambda x: x,
    "squares": np.square,
    "absolute values": np.abs,
}
# Lengths of the last axis.
COLUMNS = (1, 3, 64, 1000)
# Chi-squared tests of 2^16 cells need several numbers in each.
MIN_NUMBERS = 400_000
# Probability that true random numbers fail.
FALSE_ALARM = 1e-6


class Score(NamedTuple):
    """A statistic of a group."""

    group: str
    name: str
    z: float


def bound(count: int) -> float:
    """Returns the |z| that `count` scores of true noise do not exceed."""
    return scipy.stats.norm.isf(FALSE_ALARM / count / 2)


@functools.cache
def normal_moment(power: int) -> float:
    """Returns the exact mean of `noise.normal(...) ** power`.

    Radius and angle are independent and have 2^16 values each, so that the mean
    over all 2^32 words is a product of two means.
    """
    halves = np.arange(2**16)
    radius = np.sqrt(-2 * np.log((halves + 0.5) * 2.0**-16))
    sine = np.sin(halves * (2 * math.pi * 2.0**-16))
    return float(np.mean(radius**power) * np.mean(sine**power))


def uniform_moment(power: int) -> float:
    """Returns the mean of a power of a uniform number in (0, 1)."""
    return 1 / (power + 1)


# Statistics. Each yields names and z scores.

Scores = Iterator[tuple[str, float]]


def moments(values: np.ndarray, expected: Callable[[int], float]) -> Scores:
    """Scores the first six moments by the first twelve expected ones."""
    values = np.float64(values)
    powers = np.ones_like(values)
    for k in range(1, 7):
        powers *= values
        variance = (expected(2 * k) - expected(k) ** 2) / values.size
        yield f"moment {k}", (powers.mean() - expected(k)) / variance**0.5


def distribution(values: np.ndarray, name: str) -> Scores:
    """Scores Kolmogorov's and Smirnov's distance from a distribution."""
    p = scipy.stats.kstest(values, name, method="asymp").pvalue
    yield f"Kolmogorov-Smirnov, {name}", scipy.stats.norm.isf(p)


def chi_squared(statistic: np.ndarray, freedom: int) -> np.ndarray:
    """Returns the z scores of chi^2 (Wilson and Hilferty 1931)."""
    variance = 2 / (9 * freedom)
    root = (statistic / freedom) ** (1 / 3)
    return (root - (1 - variance)) / variance**0.5


def frequencies(cells: np.ndarray) -> float:
    """Returns the z score of 16-bit numbers with equal frequencies."""
    counts = np.bincount(cells, minlength=2**16)
    expected = cells.size / counts.size
    statistic = np.square(counts - expected).sum() / expected
    return chi_squared(statistic, counts.size - 1)


def family(scores: np.ndarray) -> Scores:
    """Scores many z scores by the largest and by the sum of squares."""
    largest = np.abs(scores).max()
    p = min(1.0, scores.size * 2 * scipy.stats.norm.sf(largest))
    yield f"largest of {scores.size:,}", scipy.stats.norm.isf(p / 2)
    yield (
        f"spread of {scores.size:,}",
        chi_squared(np.square(scores).sum(), scores.size),
    )


def standardized(values: np.ndarray) -> np.ndarray:
    """Returns float64 values with mean 0 and variance 1 along the last axis."""
    values = np.float64(values)
    values = values - values.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # Equal values give NaN, which fails.
        return values / values.std(-1, keepdims=True)


def correlations_at_all_shifts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns z scores of a[i] b[i + shift] along the last axis, circular."""
    a, b = (scipy.fft.rfft(standardized(x)) for x in (a, b))
    size = (a.shape[-1] - 1) * 2  # an even number of values
    return scipy.fft.irfft(np.conj(a) * b, size) / size**0.5


def lags(values: np.ndarray, at: list[int]) -> Scores:
    """Scores correlations of neighbours, and of all pairs of positions."""
    for view, function in VIEWS.items():
        x = standardized(function(values))
        for lag in at:
            if lag <= x.size // 2:
                z = x[:-lag] @ x[lag:] / (x.size - lag) ** 0.5
                yield f"{view} at lag {lag}", z
        x = x[: x.size // 2 * 2]
        # Circular correlations of lag and -lag are equal.
        z = correlations_at_all_shifts(x, x)[1 : x.size // 2]
        for name, score in family(z):
            yield f"{view} at all lags, {name}", score


def words_of(words: np.ndarray) -> Scores:
    """Scores halves and bytes of words, and bytes of neighbours."""
    yield "high halves", frequencies(words >> 16)
    yield "low halves", frequencies(words & 0xFFFF)
    parts = [(words >> (8 * i)) & 0xFF for i in range(4)]
    for i, j in itertools.combinations(range(4), 2):
        yield f"bytes {i} and {j}", frequencies(parts[i] << 8 | parts[j])
    for lag in (1, 2, 1024, 2048):
        for i, part in enumerate(parts):
            cells = part[:-lag] << 8 | part[lag:]
            yield f"pairs of byte {i} at lag {lag}", frequencies(cells)


def bits_of(words: np.ndarray) -> Scores:
    """Scores single bits, and pairs of bits of one word and of neighbours."""
    count = np.zeros(32)
    pairs = {lag: np.zeros((32, 32)) for lag in (0, 1, 2)}
    for chunk in np.array_split(words, math.ceil(words.size / 2**18)):
        ones = np.unpackbits(chunk.view(np.uint8)).reshape(-1, 32)
        signs = 1 - 2 * np.float32(ones)
        count += signs.sum(0)
        for lag, products in pairs.items():
            products += signs[: chunk.size - lag].T @ signs[lag:]
    root = words.size**0.5
    for name, score in family(count / root):
        yield f"bits, {name}", score
    upper = np.triu_indices(32, 1)
    for lag, products in pairs.items():
        z = (products[upper] if lag == 0 else products.ravel()) / root
        for name, score in family(z):
            yield f"pairs of bits at lag {lag}, {name}", score


def independence(rows: np.ndarray) -> Scores:
    """Scores rows against each other, and each column over the rows.

    Args:
        rows: Standard normal numbers, of shape [streams, positions].
    """
    streams, positions = rows.shape
    upper = np.triu_indices(streams, 1)
    for view, function in VIEWS.items():
        x = standardized(function(rows))
        z = (x @ x.T)[upper] / positions**0.5
        for name, score in family(z):
            yield f"{view} of two streams, {name}", score
    rows = rows / normal_moment(2) ** 0.5
    for axis, what in ((0, "position over streams"), (1, "stream")):
        count = rows.shape[axis]
        for name, z in (
            ("sum", rows.sum(axis) / count**0.5),
            ("sum of squares", chi_squared(np.square(rows).sum(axis), count)),
        ):
            for suffix, score in family(z):
                yield f"{name} of a {what}, {suffix}", score


def shared_words(rows: list[np.ndarray]) -> Scores:
    """Scores how many words streams share, as shifted or thinned copies do.

    Args:
        rows: Words of each stream, none of which a stream has twice.
    """
    words = np.sort(np.concatenate(rows))
    within = sum(math.comb(row.size, 2) for row in rows)
    expected = (math.comb(words.size, 2) - within) / 2**32
    equal = np.count_nonzero(words[1:] == words[:-1])
    yield "shared words", (equal - expected) / expected**0.5


def shifted(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Scores:
    """Scores correlations of pairs of streams at all shifts."""
    for view, function in VIEWS.items():
        z = np.stack(
            [
                correlations_at_all_shifts(function(a), function(b))
                for a, b in pairs
            ]
        )
        for name, score in family(z):
            yield f"{view}, {name}", score


def over_time(rows: np.ndarray) -> Scores:
    """Scores the numbers that each position gets step after step.

    Args:
        rows: Standard normal numbers, of shape [steps, positions].
    """
    yield from distribution(np.ravel(rows), "norm")
    columns = rows[: len(rows) // 2 * 2].T
    for view, function in VIEWS.items():
        x = function(columns)
        z = correlations_at_all_shifts(x, x)[:, 1 : x.shape[1] // 2]
        for name, score in family(z):
            yield f"{view} of two steps, {name}", score
        x = standardized(x)
        z = (x @ x.T)[np.triu_indices(len(x), 1)] / x.shape[1] ** 0.5
        for name, score in family(z):
            yield f"{view} of two positions, {name}", score


# Streams.


def key(seed: int, name: str, step: int | tf.Tensor) -> tf.Tensor:
    """Returns the key of one stream."""
    return noise.key(tf.convert_to_tensor(seed), name, step)


def grid(count: int) -> list[tuple[int, str, int]]:
    """Returns at least `count` seeds, names and steps that are neighbours.

    The names are of two weights, two scopes of one, and a posterior sample's.
    """
    names = ("a/kernel:gate:", "b/kernel:gate:", "b/kernel:gate:/x")
    names += ("b/kernel:gate:/y", "b/kernel:gate:posterior")
    steps = math.ceil(count / (2 * len(names)))
    return list(itertools.product((0, 1), names, range(steps)))


def named(group: str, found: Scores) -> Iterator[Score]:
    """Yields the scores of a group."""
    return (Score(group, name, float(z)) for name, z in found)


def one_stream(shape: list[int], step: int) -> Iterator[Score]:
    """Computes the scores of words and numbers of one key."""
    k = key(0, "kernel", step)
    words = noise.bits(shape, k).numpy().ravel()
    yield from named(f"words {shape}", words_of(words))
    yield from named(f"bits {shape}", bits_of(words))
    uniform = noise.uniform(shape, k).numpy().ravel()
    yield from named(f"uniform {shape}", moments(uniform, uniform_moment))
    yield from named(f"uniform {shape}", distribution(uniform, "uniform"))
    normal = noise.normal(shape, k).numpy().ravel()
    yield from named(f"normal {shape}", moments(normal, normal_moment))
    yield from named(f"normal {shape}", distribution(normal, "norm"))
    yield from named(f"correlations {shape}", lags(normal, LAGS))


def many_streams(numbers: int, keys: int) -> Iterator[Score]:
    """Computes the scores of streams of different keys."""
    places = grid(keys)
    rows = [noise.normal([numbers // keys], key(*place)) for place in places]
    yield from named("streams", independence(np.float64(rows)))
    length = min(numbers // 10, 2**17)
    rows = [noise.bits([length], key(*place)).numpy() for place in places]
    yield from named("streams", shared_words(rows))
    length = min(numbers, 2**20) // 2 * 2
    streams = [noise.normal([length], key(*place)) for place in grid(20)]
    pairs = list(zip(streams, streams[1:], strict=False))
    yield from named("streams at all shifts", shifted(pairs))
    draw = tf.function(lambda step: noise.normal([64], key(0, "kernel", step)))
    rows = np.stack([draw(tf.constant(step)) for step in range(10 * keys)])
    yield from named("steps of a position", over_time(rows))


def scores(numbers: int, keys: int) -> list[Score]:
    """Computes all z scores.

    Args:
        numbers: How many numbers each statistic takes.
        keys: How many streams are compared with each other; the numbers of a
            position are those of ten times as many steps.
    """
    # One row, one column, and those of activations and kernels.
    rows = [numbers // columns for columns in COLUMNS]
    shapes = [[numbers], *map(list, zip(rows, COLUMNS, strict=True))]
    found = [one_stream(shape, step) for step, shape in enumerate(shapes)]
    return [*itertools.chain(*found), *many_streams(numbers, keys)]


def failures(found: list[Score]) -> list[Score]:
    """Returns the scores out of bounds."""
    limit = bound(len(found))
    # NaN fails, too.
    return [score for score in found if not abs(score.z) <= limit]


def table(found: list[Score]) -> rich.table.Table:
    """Returns the number of scores and the largest one of each group."""
    groups = collections.defaultdict(list)
    for score in found:
        groups[score.group].append(score)
    result = rich.table.Table(title=f"bound of |z|: {bound(len(found)):.2f}")
    result.add_column("group")
    result.add_column("scores", justify="right")
    result.add_column("largest |z|", justify="right")
    result.add_column("of")
    for group, members in groups.items():
        worst = max(members, key=lambda score: np.nan_to_num(abs(score.z)))
        result.add_row(
            group, str(len(members)), f"{abs(worst.z):.2f}", worst.name
        )
    return result


def main(argv: list[str] | None = None) -> None:
    """Prints the scores, and exits with 1 if one is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--numbers", type=int, default=10_000_000, help="of each stream"
    )
    parser.add_argument("--keys", type=int, default=300, help="of streams")
    options = parser.parse_args(argv)
    if not MIN_NUMBERS <= options.numbers <= 2**25:
        parser.error(
            f"--numbers must be from {MIN_NUMBERS:,} to {2**25:,}. "
            f"Received: {options.numbers}"
        )
    if not 10 <= options.keys <= options.numbers // 1000:
        parser.error(
            "--keys must be from 10 to a thousandth of --numbers. "
            f"Received: {options.keys}"
        )
    found = scores(options.numbers, options.keys)
    console = rich.console.Console(highlight=False)
    console.print(table(found))
    wrong = failures(found)
    for score in wrong:
        console.print(
            f"{score.group}: {score.name}: z = {score.z:.2f}", soft_wrap=True
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
