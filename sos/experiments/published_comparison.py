"""Compares the runs of a study with the published results of the paper."""

import csv
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import rich.box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from sos.errors import UsageError
from sos.experiments import published
from sos.experiments.published import PublishedPoint, Reference
from sos.experiments.results import FinishedRun
from sos.files import atomic_write, storage_errors
from sos.report import as_text

#: Sparsities within this distance count as equal, as in the published tables.
WINDOW = 0.003


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedPoint:
    """Runs that differ only in their seeds, and the published result.

    Attributes:
        label: Label of the runs.
        runs: Number of runs.
        sparsity: Their mean sparsity; 0 for dense models.
        score: Their mean score, in the unit of the published ones.
        published_label: Technique or branch of the published result; empty if
            there is none to compare with.
        published_score: The published score; None if there is none.
        published_sd: Its standard deviation; None unless it was repeated.
        match: How the published score was found, or why there is none.
    """

    label: str
    runs: int
    sparsity: float
    score: float
    published_label: str
    published_score: float | None
    published_sd: float | None
    match: str

    @property
    def difference(self) -> float | None:
        """Score minus the published one, in points."""
        if self.published_score is None:
            return None
        return self.score - self.published_score

    @property
    def deviations(self) -> float | None:
        """The difference in published standard deviations."""
        if self.difference is None or not self.published_sd:
            return None
        return self.difference / self.published_sd


#: Columns of the CSV file of a comparison.
FIELDS = (
    *(field.name for field in dataclasses.fields(ComparedPoint)),
    "difference",
    "deviations",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The points of a study beside the published ones; prints as a table.

    Attributes:
        reference: The model of the paper.
        points: The points.
        left_out: Number of runs without the metric.
    """

    reference: Reference
    points: Sequence[ComparedPoint]
    left_out: int = 0

    def save_csv(self, path: str | os.PathLike) -> None:
        """Writes the points to a CSV file, with the columns `FIELDS`.

        Args:
            path: The file. On an error it stays as it was.

        Raises:
            StorageError: If the file cannot be written.
        """
        with (
            storage_errors(f"{path} could not be written"),
            atomic_write(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            writer.writerows(
                [getattr(point, name) for name in FIELDS]
                for point in self.points
            )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Yields the table."""
        yield self._table()

    def __str__(self) -> str:
        """Returns the table as plain text."""
        return as_text(self)

    def _table(self) -> Table:
        caption = (
            "published: the result of Gale, Elsen and Hooker 2019, with its "
            "standard deviation (sd) where they repeated a run. distance: the "
            "mean of your runs minus the published result, in sd if there is "
            "one, otherwise in points. between: on the line that joins two "
            "published results."
        )
        if self.left_out:
            caption += f" Left out, without the metric: {self.left_out} runs."
        score = self.reference.score
        table = Table(
            title=f"{score.title_with_unit} of your runs, and of "
            f"{self.reference.title} in the paper",
            box=rich.box.SIMPLE_HEAD,
            show_edge=False,
            collapse_padding=True,
            caption=caption,
            caption_justify="left",
        )
        table.add_column("your runs", overflow="fold")
        for heading in ("runs", "sparsity", "yours", "published", "distance"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("compared with", overflow="fold")
        for point in self.points:
            table.add_row(*_cells(point))
        return table


def compare(
    runs: Iterable[FinishedRun], model: str, metric: str | None = None
) -> Comparison:
    """Compares runs with the published results of a model.

    A point is the mean of the runs that differ only in their seeds. It is
    compared with the published result of its technique or branch at its
    sparsity; between two published sparsities with the line that joins their
    scores over the logarithm of the density. Magnitude pruning with rules is
    compared with the published non-uniform one, if there is one.

    Args:
        runs: Finished runs.
        model: One of `sos.experiments.published.REFERENCES`.
        metric: Name of the metric; by default that of the model.

    Returns:
        The comparison.

    Raises:
        UsageError: If there is no such model, or no run has the metric.
    """
    reference = published.get_reference(model)
    runs = list(runs)
    scored = scored_runs(runs, reference, metric)
    groups: dict[tuple, list[tuple[FinishedRun, float]]] = {}
    for run, score in scored:
        groups.setdefault(run.point, []).append((run, score))
    points = []
    for group in groups.values():
        run, _ = group[0]
        sparsity = np.mean([run.result.sparsity or 0.0 for run, _ in group])
        known = published_points(run, published.best(model))
        found, sd, match = _at(known, float(sparsity))
        points.append(
            ComparedPoint(
                label=run.label,
                runs=len(group),
                sparsity=float(sparsity),
                score=float(np.mean([score for _, score in group])),
                published_label=known[0].label if known else "",
                published_score=found,
                published_sd=sd,
                match=match,
            )
        )
    # By label, in the order of the runs.
    order = list(dict.fromkeys(point.label for point in points))
    points.sort(key=lambda point: (order.index(point.label), point.sparsity))
    return Comparison(reference, points, len(runs) - len(scored))


def scored_runs(
    runs: Iterable[FinishedRun], reference: Reference, metric: str | None
) -> list[tuple[FinishedRun, float]]:
    """Returns runs with their scores, in the unit of the published ones.

    Args:
        runs: Finished runs. Those without a finite metric are left out.
        reference: The model that they are compared with.
        metric: Name of the metric; by default that of the model.

    Returns:
        Pairs of a run and its score.

    Raises:
        UsageError: If no run has the metric, or it is a percentage instead of
            a fraction.
    """
    score = reference.score
    if metric is not None:
        score = dataclasses.replace(score, name=metric)
    runs = list(runs)
    scored = [
        (run, value)
        for run in runs
        if (value := score.of(run.result.metrics)) is not None
    ]
    if not scored:
        names = sorted({name for run in runs for name in run.result.metrics})
        raise UsageError(
            f"No run has a finite metric {score.name!r}. Choose another one "
            f"with --metric. Metrics of the runs: {', '.join(names) or 'none'}"
        )
    greatest = max(value for _, value in scored)
    if score.is_fraction and greatest > 100:
        raise UsageError(
            f"The metric {score.name!r} must be a fraction in [0, 1], as it is "
            f"compared in percent. Received: {greatest / 100:g}"
        )
    return scored


def published_points(
    run: FinishedRun, points: Iterable[PublishedPoint]
) -> list[PublishedPoint]:
    """Returns the published results of a run's technique or branch.

    Args:
        run: A finished run.
        points: The published results of a model.

    Returns:
        Those of one label, in their order; empty if there are none.
    """
    if run.branch is not None:
        label = _branch_label(run)
        return [point for point in points if point.label == label]
    if run.technique is None and run.result.sparsity is not None:
        return []  # Sparse by rules alone.
    known = [
        point
        for point in points
        if not point.branch and point.technique == (run.technique or "")
    ]
    has_rules = bool(run.config["sparsity"]["rules"])
    return [p for p in known if p.nonuniform == has_rules] or known


def _branch_label(run: FinishedRun) -> str | None:
    """Returns the published label of a branch; None if there is none."""
    # All published masks are of magnitude pruning.
    if run.parent is not None and run.parent.technique != "MagnitudePruning":
        return None
    options = run.config["branch"]
    if run.branch == "lottery_ticket":
        return None if options.get("step") else "lottery ticket"
    if run.branch not in ("scratch", "augmented_init"):
        return None
    parts = ["augmented init"] * (run.branch == "augmented_init")
    schedule = options.get("learning_rate", "scale")
    if options.get("multiplier", 1) != 1 or schedule != "scale":
        parts.append("scratch-b")
        parts += [schedule] * (schedule != "scale")
    return ", ".join(parts) or "scratch-e"


def _at(
    points: Sequence[PublishedPoint], sparsity: float
) -> tuple[float | None, float | None, str]:
    """Returns the published score at a sparsity, its sd, and where it is from.

    Args:
        points: Points of one series, in the order of their sparsities.
        sparsity: The sparsity.
    """
    if not points:
        return None, None, "nothing of this kind"
    nearest = min(points, key=lambda point: abs(point.sparsity - sparsity))
    if abs(nearest.sparsity - sparsity) <= WINDOW:
        kind = "best" if nearest.sd is None else "mean"
        match = f"{kind} of {nearest.runs} runs"
        if nearest.runs == 1:
            match = "the only run"
        return nearest.score, nearest.sd, match
    for below, above in itertools.pairwise(points):
        if below.sparsity < sparsity < above.sparsity:
            break
    else:
        return None, None, "nothing at this sparsity"
    # Linear in the logarithm of the density, as in the figures.
    at = [np.log(1 - p.sparsity) for p in (below, above)]
    share = (np.log(1 - sparsity) - at[0]) / (at[1] - at[0])
    score = below.score + share * (above.score - below.score)
    sd = None
    if below.sd is not None:
        sd = float(below.sd + share * (above.sd - below.sd))
    low, high = (f"{100 * p.target_sparsity:.3g}%" for p in (below, above))
    return float(score), sd, f"between {low} and {high}"


def _cells(point: ComparedPoint) -> Iterator[str]:
    yield point.label
    yield str(point.runs)
    yield f"{point.sparsity:.1%}"
    yield f"{point.score:.2f}"
    if point.published_score is None:
        yield from ("–", "–")
    elif point.published_sd is None:
        yield f"{point.published_score:.2f}"
        yield f"{point.difference:+.2f}"
    else:
        yield f"{point.published_score:.2f} ± {point.published_sd:.2f}"
        yield f"{point.deviations:+.1f} sd"
    different = point.published_label not in ("", point.label)
    yield f"{point.match}: {point.published_label}" * different or point.match
