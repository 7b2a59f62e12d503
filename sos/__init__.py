"""State of Sparsity: neural networks that become sparse while they train."""

from sos import startup

# This module imports TensorFlow, Keras and tensorflow-model-optimization.
with startup.quiet():
    from sos import schedules

from sos import extend, ramps

# Registers what the calls of Keras's layers do with their weights.
from sos import keras_uses as keras_uses
from sos.advice import SparsityWarning
from sos.callbacks import SparsityCallback
from sos.export import export_model
from sos.model_masks import get_masks, set_masks
from sos.noise import noise_scope
from sos.report import sparsity_report
from sos.surgery import prune, sparsify, strip
from sos.updater import SparsityUpdater, set_hyperparameters
from sos.version import __version__
from sos.wrappers.base import sparse_layers
from sos.wrappers.effective import frozen, sampled
from sos.wrappers.fixed_mask import FixedMask
from sos.wrappers.l0 import L0Regularization
from sos.wrappers.magnitude import MagnitudePruning
from sos.wrappers.random_pruning import RandomPruning
from sos.wrappers.variational_dropout import VariationalDropout

__all__ = [
    "FixedMask",
    "L0Regularization",
    "MagnitudePruning",
    "RandomPruning",
    "SparsityCallback",
    "SparsityUpdater",
    "SparsityWarning",
    "VariationalDropout",
    "__version__",
    "export_model",
    "extend",
    "frozen",
    "get_masks",
    "noise_scope",
    "prune",
    "ramps",
    "sampled",
    "schedules",
    "set_hyperparameters",
    "set_masks",
    "sparse_layers",
    "sparsify",
    "sparsity_report",
    "strip",
]
