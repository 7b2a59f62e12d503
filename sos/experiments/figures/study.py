"""The runs that figures show."""

import dataclasses
import functools
from collections.abc import Sequence

from sos.experiments.figures.curves import Curve, group_curves
from sos.experiments.results import FinishedRun


@dataclasses.dataclass(frozen=True)
class Study:
    """The finished runs of a study.

    Attributes:
        runs: The runs.
        layerwise_sparsity: Overall sparsity at which to compare layers, in
            [0, 1].
    """

    runs: Sequence[FinishedRun]
    layerwise_sparsity: float = 0.9

    @functools.cached_property
    def curves(self) -> list[Curve]:
        """The runs by label, with the style of each label."""
        return group_curves(self.runs)
