"""The runs that figures show."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sos.experiments.figures.curves import Curve, group_curves
from sos.experiments.results import FinishedRun
from sos.experiments.run_files import read_masks
from sos.experiments.scores import ScoreMetric, shared_score
from sos.training.reporting import Summary, read_summaries

# Of processes that train, and of those that only evaluate.
_LOGS = ("train.jsonl", "eval.jsonl")


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """The finished runs of a study.

    Attributes:
        runs: The runs.
        layerwise_sparsity: Overall sparsity at which to compare layers, masks
            and training curves, in [0, 1].
    """

    runs: Sequence[FinishedRun]
    layerwise_sparsity: float = 0.9

    @functools.cached_property
    def score(self) -> ScoreMetric:
        """The score by which the runs are compared.

        Raises:
            UsageError: If they have different scores.
        """
        return shared_score(self.runs)

    @functools.cached_property
    def curves(self) -> list[Curve]:
        """The runs by label, with the style of each label."""
        return group_curves(self.runs)

    @property
    def techniques(self) -> list[Curve]:
        """The curves of sparse models that start from no other run."""
        return [c for c in self.curves if not c.dense and c.branch is None]

    @property
    def branches(self) -> list[Curve]:
        """The curves of runs that start from another run."""
        return [curve for curve in self.curves if curve.branch is not None]

    @property
    def dense(self) -> list[Curve]:
        """The curves of dense models."""
        return [curve for curve in self.curves if curve.dense]

    @property
    def compared(self) -> list[Curve]:
        """The point of each technique nearest to `layerwise_sparsity`."""
        return [c.nearest(self.layerwise_sparsity) for c in self.techniques]

    def masks(self, run: FinishedRun) -> dict[str, np.ndarray] | None:
        """Returns the masks of a run by path; None if it stored none."""
        return self._read(read_masks, run.directory)

    def log(self, run: FinishedRun) -> list[Summary]:
        """Returns the summaries of a run; empty if it has no log."""
        return [
            summary
            for name in _LOGS
            for summary in self._read(
                read_summaries, os.path.join(run.directory, name)
            )
        ]

    @functools.cached_property
    def _files(self) -> dict[tuple, Any]:
        return {}

    def _read(self, read: Callable[[str], Any], path: str) -> Any:
        """Reads a file once."""
        key = (read, path)
        if key not in self._files:
            self._files[key] = read(path)
        return self._files[key]
