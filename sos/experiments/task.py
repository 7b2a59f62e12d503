"""Tasks made from a config."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import ml_collections

import sos
from sos.errors import ReportedError, UsageError
from sos.experiments import branch_registry
from sos.experiments import config as config_lib
from sos.experiments.scores import ACCURACY, ScoreMetric
from sos.experiments.trunk import Trunk
from sos.training.checkpoints import Checkpoints
from sos.training.learning_rates import make_learning_rate
from sos.training.optimizers import make_optimizer, technique_variables
from sos.training.task import Task
from sos.wrappers.base import find_wrappers
from sos.wrappers.masked import resolve_schedules


class ExperimentTask(Task):
    """A task that a config describes.

    Subclasses override `default_config` and the methods of
    `sos.training.Task`. `sparsify` makes a model sparse according to
    `config.sparsity`, and `initialize` starts from another run according to
    `config.branch`.

    Args:
        config: A resolved config. It must determine the result of the task. To
            start from another run, `parent` must be its directory.

    Attributes:
        config: The config.
        runtime_entries: Dotted names of config entries on which compiled steps
            do not depend: entries that only determine values of variables, data
            or work of the host. Runs that differ only in these share one
            compiled step, so list an entry only if neither `compute_metrics`
            nor the model's graph uses it. Hyperparameters that are a
            `sos.extend.Hyperparameter` or belong to a pruning schedule
            qualify. `parent` and `branch` always do.
        ignored_entries: Dotted names of config entries that do not change the
            result, such as the path of a file whose content is in
            `configuration`. They are not in the fingerprint of a run.
        eval_examples: Number of evaluation examples, if known. Conclusions of
            a study compare differences to the standard error that it gives an
            accuracy.
        score: The metric by which runs are compared in tables and figures. By
            default that of the name "accuracy", a fraction.
        averaged_checkpoints: Number of newest checkpoints whose mean is
            exported, and scored by evaluators that enter `averaged_weights`. A
            finished run keeps them all if it keeps its last one.
        layer_kinds: Pairs of a name, such as "attention output", and a regular
            expression, for the figure of sparsity by kind of layer. A weight is
            of the first kind whose expression occurs in its path. By default
            there are no kinds, and no such figure.

    Raises:
        UsageError: If `config.parent` is set, but neither `config.branch` nor
            an overridden `initialize` uses it.

    Example:
    >>> import keras, sos.experiments
    >>> class Line(sos.experiments.ExperimentTask):
    ...     runtime_entries = ("seed",)
    ...
    ...     @classmethod
    ...     def default_config(cls):
    ...         config = super().default_config()
    ...         config.train_steps = 100
    ...         config.model.units = 8
    ...         config.sparsity.technique = "MagnitudePruning"
    ...         config.sparsity.sparsity = 0.9
    ...         return config
    ...
    ...     def build_model(self):
    ...         units = self.config.model.units
    ...         model = keras.Sequential(
    ...             [keras.Input((8,)), keras.layers.Dense(units)]
    ...         )
    ...         return self.sparsify(model)
    >>> task = Line(Line.default_config())
    >>> len(sos.sparsity_report(task.build_model()).rows)
    2
    """

    runtime_entries: tuple[str, ...] = ()
    ignored_entries: tuple[str, ...] = ()
    eval_examples: int | None = None
    score: ScoreMetric = ACCURACY
    averaged_checkpoints: int = 1
    layer_kinds: Sequence[tuple[str, str]] = ()

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self._branch = branch_registry.make(config.branch.to_dict())
        if (
            config.parent is not None
            and self._branch is None
            and type(self).initialize is ExperimentTask.initialize
        ):
            raise UsageError(
                "`config.parent` requires `config.branch`, which says how to "
                "start from that run, or a task that overrides `initialize`. "
                f"Received: parent={config.parent!r} and no branch, for "
                f"{type(self).__name__}"
            )
        self.config = config
        self.batch_size = config.batch_size

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns all entries of the task's configs, with their defaults.

        Override it to change defaults and to add entries, in `model`, `data`
        or at the top level. It must always return the same entries, because a
        run's fingerprint is its difference from them.
        """
        config = config_lib.base_config()
        config.task = f"{cls.__module__}:{cls.__qualname__}"
        return config

    @classmethod
    def complete_config(cls, config: dict[str, Any]) -> None:
        """Sets entries that follow from others. Default: does nothing.

        It is called when a config is resolved, before the run gets its name.
        Override it for what is not in the config, but determines the result,
        such as the content of a file.

        Args:
            config: The entries, to be changed in place.
        """
        del config

    def prepare(self) -> None:
        """Prepares for training and evaluation. Default: does nothing.

        `sos.experiments.run` calls it before it makes the directory of a run,
        so that an error leaves none, and not to export a run. Override it to
        load data, rather than in the constructor: a sweep also makes the tasks
        of all its runs to compare them.
        """

    def write_files(self, directory: str) -> None:
        """Writes files to the directory of a run. Default: writes none.

        `sos.experiments.run` calls it in the chief's process before training,
        also to resume a run. Override it for what belongs to the checkpoints,
        such as a vocabulary. These are not verified yet, so raise an error
        rather than replace a file of other content.

        Args:
            directory: The directory of the run.
        """
        del directory

    @classmethod
    def with_files(
        cls, config: ml_collections.ConfigDict, directory: str
    ) -> ml_collections.ConfigDict:
        """Returns a config that names the files of `write_files`.

        `sos.experiments.run` exports a run with it, which then needs no data.
        Default: returns `config`.

        Args:
            config: A resolved config.
            directory: The directory of its run.
        """
        del directory
        return config

    def configuration(self) -> Mapping[str, Any]:
        """Returns the fingerprint of the run."""
        return config_lib.fingerprint(self.config)

    def averaged_weights(
        self, model: keras.Model, checkpoints: Checkpoints | None
    ) -> contextlib.AbstractContextManager[tuple[int, ...]]:
        """Returns a scope with the mean of `averaged_checkpoints`.

        The checkpoint of the initial weights is not averaged. For a single
        checkpoint the scope changes nothing. See `sos.training.Task`.
        """
        if checkpoints is None or self.averaged_checkpoints == 1:
            return contextlib.nullcontext(())
        return checkpoints.average(
            model,
            last=self.averaged_checkpoints,
            after=config_lib.first_step(self.config),
        )

    def compile_signature(self) -> str:
        """Returns equal strings for runs that share a compiled step."""
        return json.dumps(
            {
                name: value
                for name, value in self.configuration().items()
                if name not in self.runtime_entries
                # They determine values, and work of the host.
                and name.partition(".")[0] not in ("branch", "parent")
            },
            sort_keys=True,
        )

    def initialize(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer
    ) -> None:
        """Starts from the run `config.parent` according to `config.branch`.

        Args:
            model: The model.
            optimizer: Its optimizer, built.

        Raises:
            UsageError: If the parent is not finished, does not fit the model,
                or lacks a checkpoint. Then no value changes.
            StorageError: If a file of the parent is damaged.
            CheckpointError: If its checkpoint cannot be read.
        """
        if self._branch is not None:
            self._branch.initialize(
                Trunk(self.config.parent),
                model,
                optimizer,
                config=self.config,
            )

    def learning_rate_entries(self) -> dict[str, Any]:
        """Returns the schedule and its entries, for `build_optimizer`.

        Override it to derive some of them. `technique_multiplier`, if there is
        one, is the factor of the learning rate of trainable variables that a
        technique adds.
        """
        return self.config.learning_rate.to_dict()

    def build_optimizer(self, model: keras.Model) -> keras.optimizers.Optimizer:
        """Returns the optimizer that the config describes.

        `config.optimizer` is as for `sos.training.make_optimizer`. Decoupled
        weight decay applies to weights of rank 2 or more, except variables that
        a technique adds.

        Raises:
            UsageError: If entries of the optimizer or the learning rate do not
                fit.
        """
        entries = self.learning_rate_entries()
        multiplier = entries.pop("technique_multiplier", 1.0)
        try:
            rate = make_learning_rate(
                entries,
                train_steps=self.config.train_steps,
                batch_size=self.config.batch_size,
            )
        except ReportedError as error:
            raise UsageError(f"`config.learning_rate`: {error}") from error
        added = technique_variables(model)
        vectors = [v for v in model.trainable_variables if len(v.shape) < 2]
        try:
            optimizer = make_optimizer(
                self.config.optimizer.to_dict(),
                learning_rate=rate,
                multipliers=[(variable, multiplier) for variable in added],
                no_weight_decay=[*vectors, *added],
            )
        except ReportedError as error:
            raise UsageError(f"`config.optimizer`: {error}") from error
        optimizer.build(model.trainable_variables)
        return optimizer

    def sparsify(self, model: keras.Model) -> keras.Model:
        """Makes a model sparse according to `config.sparsity`.

        Pruning schedules without an `end_step` are laid over
        `config.train_steps`.

        Args:
            model: The dense model.

        Returns:
            The sparse model; `model` itself if the config has neither a
            technique nor rules.

        Raises:
            UsageError: If the config does not fit the model.
        """
        arguments = config_lib.plain(self.config.sparsity)
        if arguments["technique"] is None and not arguments["rules"]:
            return model
        if "seed" in arguments and arguments["seed"] is None:
            arguments["seed"] = self.config.seed
        if self._branch is not None:
            arguments = self._branch.sparsify_arguments(
                Trunk(self.config.parent), arguments
            )
        try:
            sparse = sos.sparsify(model, copy=False, **arguments)
            resolve_schedules(find_wrappers(sparse), self.config.train_steps)
            return sparse
        except ReportedError as error:
            raise UsageError(f"`config.sparsity`: {error}") from error


def make_task(config: ml_collections.ConfigDict) -> ExperimentTask:
    """Makes the task of a config. Call it in the scope of the strategy.

    Args:
        config: A resolved config.

    Returns:
        The task.

    Raises:
        UsageError: If the config does not fit the task.
    """
    return config_lib.load_task(config.task)(config)
