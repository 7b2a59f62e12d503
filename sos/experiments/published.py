"""The published results of Gale, Elsen and Hooker 2019 (arXiv 1902.09574).

The authors published tables of every run with their code. They are part of this
package, in `data/`, with a notice of their source, their licence and what was
changed.
"""

import csv
import dataclasses
import functools
import importlib.resources
import io
import lzma
from collections.abc import Mapping
from typing import Any

from sos.errors import UsageError
from sos.experiments.scores import ScoreMetric

#: Name of the packed file with all results, and of the table of the best.
RESULTS, BEST = "published.csv.xz", "published_best.csv"
_DATA = importlib.resources.files("sos.experiments").joinpath("data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A model of the paper.

    Attributes:
        name: Its name in the tables and on the command line.
        title: Model and data set.
        score: The score, and the metric of runs that is comparable with it.
        collapsed: Scores below this one are those of runs that learned nothing.

    Example:
    >>> from sos.experiments import published
    >>> published.REFERENCES["resnet50"].score.name
    'accuracy'
    """

    name: str
    title: str
    score: ScoreMetric
    collapsed: float


#: The models of the paper, by name.
REFERENCES = {
    reference.name: reference
    for reference in (
        Reference(
            name="resnet50",
            title="ResNet-50 on ImageNet",
            score=ScoreMetric(
                name="accuracy", label="top-1 accuracy", factor=100
            ),
            collapsed=1.0,
        ),
        Reference(
            name="transformer",
            title="Transformer on WMT 2014 English-German",
            # Not sacreBLEU, whose tokens are others.
            score=ScoreMetric(name="study_bleu", label="BLEU", factor=1),
            collapsed=1.0,
        ),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """One score of the authors' tables.

    Attributes:
        label: Name of the technique or of the branch, such as "scratch-e".
        technique: Name of the technique, which for a branch found the masks;
            empty for a dense model.
        branch: Name of the branch, such as "scratch"; otherwise empty.
        table: Name of the authors' table.
        row: Number of the row in this table, from 1. A row may have several
            scores: of repeated runs, or of thresholds of variational dropout.
        sparsity: Fraction of zeros in the sparse weights.
        score: Accuracy in percent, or BLEU.
        hyperparameters: All other entries of the row by name.

    Example:
    >>> from sos.experiments import published
    >>> score = published.load("transformer")[-1]
    >>> score.technique, score.hyperparameters["threshold"]
    ('VariationalDropout', '5.0')
    """

    label: str
    technique: str
    branch: str
    table: str
    row: int
    sparsity: float
    score: float
    hyperparameters: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """The best of the published scores at a sparsity, or a mean of several.

    Attributes:
        label: Name of the technique or of the branch, such as "scratch-e".
        technique: Name of the technique, which for a branch found the masks;
            empty for a dense model.
        branch: Name of the branch, such as "scratch"; otherwise empty.
        target_sparsity: Sparsity of the table, such as 0.9.
        sparsity: Sparsity of the best run, or mean sparsity.
        score: Accuracy in percent, or BLEU: the best, or the mean of repeated
            runs that did not collapse.
        sd: Standard deviation of repeated runs that did not collapse; None if
            the score is the best of different runs.
        runs: Number of repeated runs, or of runs of which this is the best.
        collapsed: Number of repeated runs that learned nothing.
        settings: Hyperparameters, such as "begin_step=40000 end_step=100000".
        source: Name of the authors' table, or "README".

    Example:
    >>> from sos.experiments import published
    >>> for point in published.best("transformer"):
    ...     if point.label == "lottery ticket":
    ...         print(point.target_sparsity, point.score, point.sd)
    0.5 24.003 0.497
    0.6 22.538 1.839
    0.7 23.261 0.378
    0.8 23.469 0.199
    0.9 21.772 0.175
    0.95 18.885 0.203
    0.98 13.384 0.395
    """

    label: str
    technique: str
    branch: str
    target_sparsity: float
    sparsity: float
    score: float
    sd: float | None
    runs: int
    collapsed: int
    settings: str
    source: str

    @property
    def nonuniform(self) -> bool:
        """Whether layers have different sparsities by hand."""
        return self.label.startswith("non-uniform")


def get_reference(name: str) -> Reference:
    """Returns a model of the paper.

    Args:
        name: One of `REFERENCES`.

    Returns:
        The model.

    Raises:
        UsageError: If there is no such model.

    Example:
    >>> from sos.experiments import published
    >>> published.get_reference("transformer").score.label
    'BLEU'
    """
    if name not in REFERENCES:
        raise UsageError(
            "The reference must be a model of the paper: "
            f"{' or '.join(REFERENCES)}. Received: {name!r}"
        )
    return REFERENCES[name]


@functools.cache
def load(model: str) -> tuple[PublishedScore, ...]:
    """Reads all published scores of a model.

    Args:
        model: One of `REFERENCES`.

    Returns:
        The scores, in the order of the tables.

    Raises:
        UsageError: If there is no such model.

    Example:
    >>> from sos.experiments import published
    >>> scores = published.load("resnet50")
    >>> max(s.score for s in scores if s.technique == "VariationalDropout")
    76.724
    """
    get_reference(model)
    text = lzma.decompress(_DATA.joinpath(RESULTS).read_bytes()).decode()
    scores = []
    for row in csv.DictReader(io.StringIO(text)):
        if row.pop("model") == model:
            scores.append(
                PublishedScore(
                    label=row.pop("label"),
                    technique=row.pop("technique"),
                    branch=row.pop("branch"),
                    table=row.pop("table"),
                    row=int(row.pop("row")),
                    sparsity=float(row.pop("sparsity") or 0),
                    score=float(row.pop("score")),
                    hyperparameters={k: v for k, v in row.items() if v},
                )
            )
    return tuple(scores)


@functools.cache
def best(model: str) -> tuple[PublishedPoint, ...]:
    """Reads the best published scores of a model.

    These are, at each sparsity, the best score of each technique among runs
    within 0.003 of this sparsity; the means of dense models and of branches,
    which were repeated; and non-uniform magnitude pruning of ResNet-50.

    Args:
        model: One of `REFERENCES`.

    Returns:
        The points.

    Raises:
        UsageError: If there is no such model.

    Example:
    >>> from sos.experiments import published
    >>> dense = published.best("resnet50")[0]
    >>> print(f"{dense.label}: {dense.score} ± {dense.sd}, {dense.runs} runs")
    dense: 76.687 ± 0.106, 3 runs
    """
    get_reference(model)
    text = _DATA.joinpath(BEST).read_text("utf-8")
    return tuple(
        _point(row)
        for row in csv.DictReader(io.StringIO(text))
        if row.pop("model") == model
    )


def _point(row: dict[str, Any]) -> PublishedPoint:
    numbers = {
        name: float(row.pop(name))
        for name in ("target_sparsity", "sparsity", "score")
    }
    sd = row.pop("sd")
    return PublishedPoint(
        **numbers,
        sd=float(sd) if sd else None,
        runs=int(row.pop("runs")),
        collapsed=int(row.pop("collapsed")),
        **row,
    )
