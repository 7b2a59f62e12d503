"""The layers of networks."""

from collections.abc import Iterable, Mapping

from sos.experiments.figures.curves import Curve


def layer_sizes(curves: Iterable[Curve]) -> dict[str, int]:
    """Returns the number of elements of all weights, by path.

    Args:
        curves: The curves whose networks have the weights.
    """
    return {
        weight.path: weight.size
        for curve in curves
        for point in curve.points
        for run in point
        for weight in run.result.weights
    }


def layer_names(sizes: Mapping[str, int], *, separator: str) -> list[str]:
    """Returns the layers' names with their numbers of weights.

    Args:
        sizes: Numbers of weights by path.
        separator: Text between a name and a number.
    """
    names = []
    for path, size in sizes.items():
        count = f"{size:,}" if size < 10_000 else f"{size / 1000:,.0f}k"
        names.append(f"{path.removesuffix('/kernel')}{separator}{count}")
    return names
