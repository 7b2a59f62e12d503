"""The score by which the runs of a study are compared."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sos.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMetric:
    """The metric by which runs are compared; higher is better.

    A task names it, and `result.json` stores it: tables, figures and
    conclusions need no task.

    Attributes:
        name: Name of the metric, such as "accuracy" or "bleu".
        label: Name in texts, such as "accuracy" or "BLEU".
        factor: Factor from the metric to the score: 100 for a fraction in
            [0, 1], which is shown in percent, otherwise 1.

    Raises:
        UsageError: If `factor` is neither 1 nor 100.

    Example:
    >>> from sos.experiments.scores import ScoreMetric
    >>> bleu = ScoreMetric(name="bleu", label="BLEU", factor=1)
    >>> bleu.of({"loss": 1.2, "bleu": 27.3})
    27.3
    """

    name: str
    label: str
    factor: float

    def __post_init__(self) -> None:
        if self.factor not in (1, 100):
            raise UsageError(
                "`factor` must be 100, for a fraction that is shown in "
                f"percent, or 1. Received: factor={self.factor!r}"
            )

    @property
    def is_fraction(self) -> bool:
        """Whether the metric is a fraction, and the score in percent."""
        return self.factor == 100

    @property
    def unit(self) -> str:
        """The unit of the score: "%", or empty."""
        return "%" if self.is_fraction else ""

    @property
    def title(self) -> str:
        """The label with a capital letter, for the beginning of a line."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def title_with_unit(self) -> str:
        """The title of an axis or of a column, such as "Accuracy (%)"."""
        return f"{self.title} (%)" if self.is_fraction else self.title

    def of(self, metrics: Mapping[str, float]) -> float | None:
        """Returns the score in its unit; None if it is missing or not finite.

        Args:
            metrics: Metrics by name.
        """
        value = metrics.get(self.name, math.nan)
        return self.factor * value if math.isfinite(value) else None


#: The fraction of correct predictions, the score of image classification.
ACCURACY = ScoreMetric(name="accuracy", label="accuracy", factor=100)
#: BLEU from 0 to 100, the score of translation.
BLEU = ScoreMetric(name="bleu", label="BLEU", factor=1)


def shared_score(runs: Iterable[Any]) -> ScoreMetric:
    """Returns the score by which runs are compared.

    Args:
        runs: Finished runs.

    Returns:
        Their score; `ACCURACY` without any run.

    Raises:
        UsageError: If they have different scores.

    Example:
    >>> from sos.experiments import scores
    >>> scores.shared_score([]).title_with_unit
    'Accuracy (%)'
    """
    metrics = [*dict.fromkeys(run.result.score for run in runs)]
    if len(metrics) > 1:
        raise UsageError(
            "Runs can only be compared by one score. Select the runs of one "
            "task. Received: runs with the scores "
            f"{', '.join(metric.label for metric in metrics)}"
        )
    return metrics[0] if metrics else ACCURACY
