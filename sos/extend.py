"""For authors of techniques, rankings, ramps, schedules and layers.

A technique is a class derived from `PruningWrapper` (masks updated on a
schedule), `PenalizedWrapper` (learned, with a penalty in the loss),
`MaskedWrapper` or `SparseWrapper`, and decorated with `register`. Techniques
learn from `register_use` how the call of a layer uses its weights.
"""

from sos.arguments import REQUIRED
from sos.ramps import Ramp
from sos.rankings import PerTensorRanking, Ranking
from sos.registry import (
    hyperparameters,
    register,
    select_hyperparameters,
    techniques,
)
from sos.schedules import PruningSchedule, Schedule
from sos.uses import LinearMap, LookUp, Use, check_use, register_use
from sos.wrappers.base import SparseWrapper
from sos.wrappers.hyperparameters import Hyperparameter
from sos.wrappers.masked import MaskedWrapper, PruningWrapper
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.sparse_weight import SparseWeight

__all__ = [
    "REQUIRED",
    "Hyperparameter",
    "LinearMap",
    "LookUp",
    "MaskedWrapper",
    "PenalizedWrapper",
    "PerTensorRanking",
    "PruningSchedule",
    "PruningWrapper",
    "Ramp",
    "Ranking",
    "Schedule",
    "SparseWeight",
    "SparseWrapper",
    "Use",
    "check_use",
    "hyperparameters",
    "register",
    "register_use",
    "select_hyperparameters",
    "techniques",
]
