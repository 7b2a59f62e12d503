"""Trunks: finished runs that other runs start from."""

import functools
import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from sos import keras_compat
from sos.errors import CheckpointError, DamagedCheckpointError, UsageError
from sos.experiments import config as config_lib
from sos.experiments.config import run_name
from sos.experiments.run_files import (
    read_config,
    read_masks,
    read_result,
)
from sos.training import trainer
from sos.training.checkpoints import (
    CHECKPOINTS,
    Checkpoints,
    diff,
    format_differences,
    format_spec,
    named_variables,
)
from sos.wrappers.base import find_wrappers, weights_by_path


class Values(NamedTuple):
    """Values of a checkpoint by canonical path.

    Without those of techniques and of a constant learning rate.

    Attributes:
        model: Arrays of the model: weights, batch statistics, random states.
        optimizer: Arrays of the optimizer: `iterations` and slots.
    """

    model: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]


class Trunk:
    """A finished run that other runs start from.

    Args:
        directory: Directory of the run. It is read when something is needed.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        """The resolved config of the run.

        Raises:
            UsageError: If there is no finished run in the directory, or as
                `read_resolved_config`.
        """
        config = read_resolved_config(self.directory)
        if config is None or read_result(self.directory) is None:
            raise UsageError(
                "`config.parent` must be a finished run: its name, if it is in "
                "the same work directory, or its directory. "
                f"There is no finished run in {self.directory}"
            )
        # Not `normpath`, which would change "gs://".
        workdir = os.path.dirname(self.directory.rstrip("/"))
        return with_parent_directory(config, workdir)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in ascending order."""
        return self._checkpoints({}).steps()

    @functools.cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """The final masks, uint8 arrays by the path of the weight.

        Raises:
            UsageError: If the run is not finished, or has no sparse weights.
            StorageError: If the file of the masks is damaged.
        """
        technique = self.config.sparsity.technique
        masks = read_masks(self.directory)
        if masks is None:
            raise UsageError(
                "`config.parent` must be a run with sparse weights, which "
                "stores its masks when it is finished. There are no masks in "
                f"{self.directory}, a run with technique={technique!r}"
            )
        return masks

    def masks_for(self, model: keras.Model) -> dict[str, np.ndarray]:
        """Returns the masks after comparing them to a model.

        Args:
            model: A sparse model.

        Raises:
            UsageError: If the model has other sparse weights.
        """
        ours = {p: format_spec(m.shape, "mask") for p, m in self.masks.items()}
        theirs = {
            path: format_spec(weight.variable.shape, "mask")
            for path, weight in weights_by_path(model).items()
        }
        self._check("masks", diff(ours, theirs))
        return self.masks

    def values_for(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> list[tuple[keras.Variable, np.ndarray]]:
        """Returns the values of a checkpoint for the variables of a model.

        Args:
            step: Step of the checkpoint.
            model: A model.
            optimizer: Its optimizer, built.

        Returns:
            Pairs of a variable and its value: all variables of the model,
            except those of techniques, and the variables of the optimizer that
            the trunk's has, too, except the learning rate.

        Raises:
            UsageError: If there is no checkpoint of the step, or the model has
                other variables.
            CheckpointError: If the checkpoint is damaged or cannot be read.
        """
        values = self.values(step)
        variables, slots = _variables(model, optimizer)
        lines = diff(_specs(values.model), _specs(variables))
        self._check("variables", lines)
        specs = _specs(values.optimizer)
        return [
            *((variables[name], array) for name, array in values.model.items()),
            *(
                (slot, values.optimizer[name])
                for name, slot in slots.items()
                if format_spec(slot.shape, slot.dtype) == specs.get(name)
            ),
        ]

    def values(self, step: int) -> Values:
        """Reads a checkpoint.

        Builds the run's own model and optimizer for it, in the current scope of
        a strategy.

        Args:
            step: Step of the checkpoint.

        Raises:
            UsageError: If there is no checkpoint of the step.
            CheckpointError: If the checkpoint is damaged or cannot be read.
        """
        config = self.config
        if step not in self.steps:
            raise UsageError(
                f"The run {self.directory} has no checkpoint of step {step}, "
                f"only those of the steps {self.steps}. Move its directory "
                "away and train it again with the config entry `keep='trunk'`, "
                "which keeps the first and the last one, "
                f"`keep_steps=({step},)` or `keep='all'`."
            )
        with config_lib.dtype_policy(config.dtype_policy):
            task = config_lib.load_task(config.task)(config)
            model, optimizer = trainer.build(task)
            configuration = trainer.configuration(
                task,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            )
        checkpoints = self._checkpoints(configuration)
        try:
            checkpoints.restore_step(step, model, optimizer)
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"The checkpoint {checkpoints.path(step)} is damaged: {error}. "
                "Move the directory of the run away and repeat the run."
            ) from error
        variables, slots = _variables(model, optimizer)
        return Values(_arrays(variables), _arrays(slots))

    def _checkpoints(self, configuration: dict) -> Checkpoints:
        return Checkpoints(
            os.path.join(self.directory, CHECKPOINTS),
            configuration=configuration,
        )

    def _check(self, kind: str, differences: Iterable[str]) -> None:
        lines = list(differences)
        if lines:
            raise UsageError(
                f"The {kind} of {self.directory} are of another model. Use the "
                "same entries `model`, and `sparsity` for the same weights. "
                f"Differences:{format_differences(lines)}"
            )


def read_resolved_config(directory: str) -> ml_collections.ConfigDict | None:
    """Reads and resolves the config of a run that others start from.

    Args:
        directory: Directory of the run.

    Returns:
        The config; None if there is no run.

    Raises:
        UsageError: If the config does not fit the present version of its task,
            or the directory does not have the name of the run.
        StorageError: If the file is damaged or cannot be read.
    """
    stored = read_config(directory)
    if stored is None:
        return None
    try:
        config = config_lib.resolve(stored)
    except UsageError as error:
        raise UsageError(
            f"The run {directory} cannot be the parent of others, because its "
            f"config does not fit this version of its task. {error}"
        ) from error
    name, expected = os.path.basename(directory.rstrip("/")), run_name(config)
    # The name is all that the names of its branches have of it: they would take
    # the results of another run's for theirs.
    if name != expected:
        raise UsageError(
            "The directory of a parent must be named after its config: "
            f"{expected}. Received: {directory}. Rename it, or train the run "
            "with this version of its task."
        )
    return config


def with_parent_directory(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> ml_collections.ConfigDict:
    """Returns a config whose `parent` is a directory.

    Args:
        config: A resolved config.
        workdir: Directory of the run and, if `parent` is a name or a directory
            that is gone, its parent.
    """
    if config.parent is None:
        return config
    parent = os.path.expanduser(config.parent)
    workdir = os.path.expanduser(os.fspath(workdir))
    sibling = os.path.join(workdir, config_lib.parent_name(config))
    is_name = "/" not in parent
    if is_name or (
        tf.io.gfile.isdir(sibling) and not tf.io.gfile.isdir(parent)
    ):
        parent = sibling
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.parent = parent
    return changed.lock()


def _variables(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> tuple[dict[str, keras.Variable], dict[str, keras.Variable]]:
    """Returns the variables of a model and its optimizer by canonical path.

    Without the variables of techniques, and a constant learning rate, which
    belongs to the config.
    """
    others = {
        id(variable)
        for technique in find_wrappers(model)
        for variable in keras_compat.own_variables(technique)
    }
    others |= {
        id(inner.learning_rate)
        for inner in (optimizer, *keras_compat.inner_optimizers(optimizer))
    }
    named = named_variables(model, optimizer)

    def select(variables: Collection[keras.Variable]) -> dict:
        chosen = {id(variable) for variable in variables} - others
        return {n: v for n, v in named.items() if id(v) in chosen}

    return select(model.variables), select(optimizer.variables)


def _specs(values: dict[str, keras.Variable | np.ndarray]) -> dict[str, str]:
    return {name: format_spec(v.shape, v.dtype) for name, v in values.items()}


def _arrays(variables: dict[str, keras.Variable]) -> dict[str, np.ndarray]:
    return {
        name: keras.ops.convert_to_numpy(variable)
        for name, variable in variables.items()
    }
