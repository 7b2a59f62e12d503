"""Tasks that are made from a config."""

import json
from collections.abc import Mapping
from typing import Any

import keras
import ml_collections

import sos
from sos.errors import ReportedError, UsageError
from sos.experiments import config as config_lib
from sos.training.task import Task
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import lay_out_schedules


class ExperimentTask(Task):
    """A task that a config describes.

    Args:
        config: A resolved config. All that the task computes must follow from
            it.

    Raises:
        UsageError: If `config.parent` is set, and the task does not override
            `initialize`, which would have to read it.

    Attributes:
        config: The config.
        runtime_entries: The dotted names of config entries that compiled steps
            do not depend on: they decide the values of variables, the data, or
            what the host does. Runs that differ in these alone share one
            compiled step, so name one only if `compute_metrics` and the
            model's graph do not use it. Hyperparameters may be named that are
            a `sos.extend.Hyperparameter`, and those of a pruning schedule.
    """

    runtime_entries: tuple[str, ...] = ()

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        if (
            config.parent is not None
            and type(self).initialize is Task.initialize
        ):
            raise UsageError(
                "`config.parent` is for a task that overrides `initialize` to "
                f"start from another run. {type(self).__name__} does not. "
                f"Received: {config.parent!r}"
            )
        self.config = config
        self.batch_size = config.batch_size

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns all entries of the task's configs, with their defaults.

        Override it to change defaults and to add entries, in `model`, `data`
        or at the top. It must always return the same: a run is named by what
        differs from it.
        """
        config = config_lib.base_config()
        config.task = f"{cls.__module__}:{cls.__qualname__}"
        return config

    def configuration(self) -> Mapping[str, Any]:
        """Returns what identifies the run."""
        return config_lib.identity(self.config)

    def compile_signature(self) -> str:
        """Returns a text that is equal for runs which share a compiled step."""
        return json.dumps(
            {
                name: value
                for name, value in self.configuration().items()
                if name not in self.runtime_entries
            },
            sort_keys=True,
        )

    def sparsify(self, model: keras.Model) -> keras.Model:
        """Makes a model sparse as `config.sparsity` says.

        Pruning schedules without an `end_step` are laid over
        `config.train_steps`.

        Args:
            model: The dense model.

        Returns:
            The sparse model; `model` itself if there is neither a technique
            nor a rule.

        Raises:
            UsageError: If the config does not fit the model.
        """
        arguments = config_lib.plain(self.config.sparsity)
        if arguments["technique"] is None and not arguments["rules"]:
            return model
        if "seed" in arguments and arguments["seed"] is None:
            arguments["seed"] = self.config.seed
        try:
            sparse = sos.sparsify(model, copy=False, **arguments)
            lay_out_schedules(find_wrappers(sparse), self.config.train_steps)
            return sparse
        except ReportedError as error:
            raise UsageError(f"`config.sparsity`: {error}") from error


def make_task(config: ml_collections.ConfigDict) -> ExperimentTask:
    """Makes the task of a config, in the scope of the strategy if there is one.

    Args:
        config: A resolved config.

    Returns:
        The task.

    Raises:
        UsageError: If the config does not fit the task.
    """
    return config_lib.load_task(config.task)(config)
