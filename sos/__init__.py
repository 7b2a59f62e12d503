"""State of Sparsity: neural networks that become sparse while they train."""

from sos import startup

# This module imports TensorFlow, Keras and tensorflow-model-optimization.
with startup.quiet():
    from sos.schedules import (
        ConstantSparsity,
        PolynomialDecay,
        PruningSchedule,
        Schedule,
    )

from sos import keras_uses as keras_uses
from sos.advice import SparsityWarning
from sos.arguments import REQUIRED
from sos.callbacks import SparsityCallback
from sos.driver import Driver, set_all
from sos.export import export_model
from sos.noise import call_label
from sos.ramps import ConstantRamp, CubicRamp, LinearRamp, Ramp
from sos.rankings import PerTensorRanking, Ranking
from sos.registry import (
    hyperparameters,
    register,
    select_hyperparameters,
    techniques,
)
from sos.report import SparsityReport, sparsity_report
from sos.surgery import sparsify, strip
from sos.uses import LinearMap, LookUp, Use, check_use, register_use
from sos.version import __version__
from sos.wrappers.base import SparseWrapper
from sos.wrappers.effective import frozen, sampled
from sos.wrappers.fixed_mask import FixedMask
from sos.wrappers.l0 import L0Regularization
from sos.wrappers.magnitude import MagnitudePruning
from sos.wrappers.masked import MaskedWrapper, PruningWrapper
from sos.wrappers.penalized import PenalizedWrapper
from sos.wrappers.random_pruning import RandomPruning
from sos.wrappers.settings import Setting
from sos.wrappers.sparse_weight import SparseWeight
from sos.wrappers.variational_dropout import VariationalDropout

__all__ = [
    "REQUIRED",
    "ConstantRamp",
    "ConstantSparsity",
    "CubicRamp",
    "Driver",
    "FixedMask",
    "L0Regularization",
    "LinearMap",
    "LinearRamp",
    "LookUp",
    "MagnitudePruning",
    "MaskedWrapper",
    "PenalizedWrapper",
    "PerTensorRanking",
    "PolynomialDecay",
    "PruningSchedule",
    "PruningWrapper",
    "Ramp",
    "RandomPruning",
    "Ranking",
    "Schedule",
    "Setting",
    "SparseWeight",
    "SparseWrapper",
    "SparsityCallback",
    "SparsityReport",
    "SparsityWarning",
    "Use",
    "VariationalDropout",
    "__version__",
    "call_label",
    "check_use",
    "export_model",
    "frozen",
    "hyperparameters",
    "register",
    "register_use",
    "sampled",
    "select_hyperparameters",
    "set_all",
    "sparsify",
    "sparsity_report",
    "strip",
    "techniques",
]
