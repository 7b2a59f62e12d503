"""Experiments: configs, runs, sweeps, and tables and figures of results."""

from sos.errors import MissingPackageError

try:
    import jinja2 as jinja2
    import matplotlib as matplotlib
    import ml_collections as ml_collections
    import pandas as pandas
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"`sos.experiments` cannot import {error.name}. Install what it needs: "
        "pip install 'state-of-sparsity[study]'"
    ) from error

from sos.experiments.branches import branch
from sos.experiments.config import base_config, parse_argument
from sos.experiments.image_classification import ImageClassification
from sos.experiments.results import collect
from sos.experiments.runs import Result, run
from sos.experiments.sweeps import expand, run_sweep
from sos.experiments.task import ExperimentTask

__all__ = [
    "ExperimentTask",
    "ImageClassification",
    "Result",
    "base_config",
    "branch",
    "collect",
    "expand",
    "parse_argument",
    "run",
    "run_sweep",
]
