"""Tasks: a model, its optimizer, its data and its metrics."""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import keras
import tensorflow as tf

from sos.errors import TaskError
from sos.export import ServingModule
from sos.training.checkpoints import Checkpoints

#: A weighted sum over examples and the sum of the weights, float32 scalars.
WeightedSum = tuple[tf.Tensor, tf.Tensor]

#: Evaluates a model on the host; returns metrics and texts by name.
Evaluator = Callable[[keras.Model], Mapping[str, float | str]]


class Task:
    """A model, its optimizer, its data and its metrics.

    Subclasses override the methods that raise `NotImplementedError`. A task
    need not mention sparsity outside of `build_model`: the engine finds the
    sparse layers in the model.

    Attributes:
        batch_size: Number of examples in one optimizer step, over all replicas
            and all parts of an accumulated gradient.

    Example:
    A sparse linear regression:
    >>> import keras, numpy as np, sos, sos.training, tensorflow as tf
    >>> x = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
    >>> data = {"x": x, "y": 2.0 * x}
    >>> class Line(sos.training.Task):
    ...     batch_size = 8
    ...
    ...     def configuration(self):
    ...         return {"batch_size": self.batch_size}
    ...
    ...     def build_model(self):
    ...         model = keras.Sequential(
    ...             [keras.Input((8,)), keras.layers.Dense(8, name="dense")]
    ...         )
    ...         return sos.sparsify(
    ...             model,
    ...             "MagnitudePruning",
    ...             sparsity=0.75,
    ...             begin_step=0,
    ...             end_step=2,
    ...             frequency=1,
    ...         )
    ...
    ...     def build_optimizer(self, model):
    ...         return keras.optimizers.SGD(0.1)
    ...
    ...     def train_dataset(self, context, step):
    ...         return sos.training.array_batches(
    ...             data, seed=0, batch_size=8, step=step, context=context
    ...         )
    ...
    ...     def eval_dataset(self, context):
    ...         return sos.training.array_eval_batches(
    ...             data, batch_size=8, context=context
    ...         )
    ...
    ...     def compute_metrics(self, model, batch, training):
    ...         y = model(batch["x"], training=training)
    ...         errors = tf.reduce_mean(tf.square(y - batch["y"]), axis=-1)
    ...         weights = batch.get("weight", tf.ones_like(errors))
    ...         total = tf.reduce_sum(weights * errors)
    ...         return {"loss": (total, tf.reduce_sum(weights))}
    >>> Line().has_evaluation
    True
    """

    batch_size: int

    def configuration(self) -> Mapping[str, Any]:
        """Returns all options that determine the result, by name.

        A checkpoint of another configuration cannot be restored.

        Returns:
            JSON values: strings, numbers, booleans, None, lists and
            dictionaries.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `configuration`."
        )

    def build_model(self) -> keras.Model:
        """Returns a new built model; called in the strategy's scope."""
        raise NotImplementedError(
            f"{type(self).__name__} must override `build_model`."
        )

    def build_optimizer(self, model: keras.Model) -> keras.optimizers.Optimizer:
        """Returns a new optimizer; called in the strategy's scope.

        Args:
            model: The model to train.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `build_optimizer`."
        )

    def initialize(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer
    ) -> None:
        """Sets initial values that `build_model` does not set.

        Called in the strategy's scope if there is no checkpoint to restore:
        load pretrained weights here, or the masks of a lottery ticket. Training
        begins at the step in `optimizer.iterations`. All workers must assign
        the same values, and a repeated call, after an interrupted start, too.
        Does nothing by default.

        Args:
            model: The model.
            optimizer: Its optimizer, built.
        """

    def train_dataset(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns the infinite training batches from a step on.

        They must be a function of the step: the batch of step 1,000 must not
        depend on the step at which training started. `sos.training.inputs`
        makes such data sets.

        Args:
            context: The share of the data that this host reads. Batches have
                `context.get_per_replica_batch_size(self.batch_size)` examples,
                one batch for each replica of the host in turn.
            step: Number of completed optimizer steps.

        Returns:
            Batches of static shape: a tensor, or a structure of tensors with
            the examples along their first axis.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `train_dataset`."
        )

    def eval_dataset(
        self, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        """Returns the evaluation batches.

        Without an override the task has no evaluation data.

        Args:
            context: As in `train_dataset`.

        Returns:
            Batches of static shape, the same number for every replica. The
            cardinality of the data set must be known. Examples that pad the
            last batch must have weight 0 in `compute_metrics`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `eval_dataset`."
        )

    @property
    def has_evaluation(self) -> bool:
        """Whether the task overrides `eval_dataset`."""
        method = getattr(self.eval_dataset, "__func__", None)
        return method is not Task.eval_dataset

    def compute_metrics(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, WeightedSum]:
        """Computes the loss and other metrics of a batch, on every replica.

        Training minimises the mean loss over the whole batch of all replicas,
        plus `model.losses`, which must not be added here.

        Args:
            model: The model.
            batch: A batch of one of the data sets.
            training: Whether to call the model with `training=True`.

        Returns:
            By name, the weighted sum of each metric over the examples (or
            tokens) and the sum of the weights. "loss" is required and must be
            differentiable. Training and evaluation may have different metrics,
            but each must always return the same ones.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `compute_metrics`."
        )

    def evaluators(
        self, checkpoints: Checkpoints | None
    ) -> Mapping[str, Evaluator]:
        """Returns evaluators, which run on the host, by name. Default: none.

        The engine calls this method for each evaluation. They run after the
        compiled evaluation, once and one after the other, in the chief's
        process. Examples are a BLEU score after decoding, and
        accuracies for several thresholds. Each is called with the model and
        returns metrics by name, such as `{"bleu": 27.3}`. Strings among them,
        such as the signature of a score, are printed and stored, but are not
        metrics. An evaluator must leave the model unchanged.

        Args:
            checkpoints: The checkpoints of this training up to the evaluated
                step, to score their average with `Checkpoints.average`. None if
                the model is evaluated without any.

        Returns:
            The evaluators by name. All workers call this method.
        """
        return {}

    def averaged_weights(
        self, model: keras.Model, checkpoints: Checkpoints | None
    ) -> contextlib.AbstractContextManager[tuple[int, ...]]:
        """Returns a scope in which a model has the weights to score and export.

        An export has the weights of this scope. An evaluator that is to score
        them enters it, too. By default it changes nothing.

        Args:
            model: A model of this task.
            checkpoints: The checkpoints of this training up to the step of the
                model; None to change nothing.

        Returns:
            A scope such as `checkpoints.average(model)`. It yields the steps of
            the averaged checkpoints, none if it changes nothing.
        """
        del model, checkpoints
        return contextlib.nullcontext(())

    def serving(self, model: keras.Model) -> tf.Module:
        """Returns the module to export, with its signatures and assets.

        Args:
            model: The trained model, stripped: plain Keras layers with the
                zeros in place.

        Returns:
            The module that `sos.export.export_model` writes. By default it
            calls the model.
        """
        return ServingModule(model)


def _raise(task: Any, method: str, must: str, received: str) -> NoReturn:
    raise TaskError(
        f"`{type(task).__name__}.{method}` must {must}. Received: {received}"
    )


def _with_type(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"


def check_model(task: Any, model: Any) -> None:
    """Raises `TaskError` unless `build_model` returned a built Keras model."""
    if not isinstance(model, keras.Model):
        _raise(task, "build_model", "return a Keras 3 model", _with_type(model))
    if not model.built:
        _raise(
            task,
            "build_model",
            "return a model that is built: give it a `keras.Input`, or call it "
            "on a batch",
            f"the model {model.name!r}, which is not built",
        )


def check_optimizer(task: Any, optimizer: Any) -> None:
    """Raises `TaskError` unless `build_optimizer` returned an optimizer."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        _raise(
            task,
            "build_optimizer",
            "return a Keras 3 optimizer",
            _with_type(optimizer),
        )


def check_configuration(task: Any, configuration: Any) -> None:
    """Raises `TaskError` unless `configuration` returned a JSON object."""
    must = "return a dictionary of JSON values by name"
    if not isinstance(configuration, Mapping):
        _raise(task, "configuration", must, _with_type(configuration))
    try:
        json.dumps(dict(configuration))
    except (TypeError, ValueError) as error:
        _raise(task, "configuration", must, f"{configuration!r} ({error})")


def train_dataset(
    task: Any, context: tf.distribute.InputContext, step: int
) -> tf.data.Dataset:
    """Returns the task's training batches after validating them.

    Args:
        task: The task.
        context: The share of the data that this host reads.
        step: Number of completed optimizer steps.

    Returns:
        Batches of infinite cardinality.

    Raises:
        TaskError: If they are not batches of static shape for one replica, or
            are known to be finite.
    """
    dataset = task.train_dataset(context, step)
    size = context.get_per_replica_batch_size(task.batch_size)
    _check_batches(task, "train_dataset", dataset, size)
    if (batches := int(dataset.cardinality())) >= 0:
        raise_end_of_data(task, f"a data set of {batches} batches")
    # Otherwise workers check at every step whether all of them have data.
    return dataset.apply(
        tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    )


def raise_end_of_data(task: Any, received: str) -> NoReturn:
    """Raises `TaskError` because the training batches ended."""
    _raise(
        task,
        "train_dataset",
        "return infinite batches, in another order in each epoch",
        received,
    )


def eval_dataset(
    task: Any, context: tf.distribute.InputContext
) -> tuple[tf.data.Dataset, int]:
    """Returns the task's evaluation batches after validating them.

    Args:
        task: The task.
        context: The share of the data that this host reads.

    Returns:
        The batches, repeated infinitely, and their number for each replica.

    Raises:
        TaskError: If they are not batches of static shape, their number is
            unknown or infinite, or the replicas of this host cannot share them
            evenly.
    """
    dataset = task.eval_dataset(context)
    _check_batches(task, "eval_dataset", dataset)
    batches = int(dataset.cardinality())
    if batches < 0:
        _raise(
            task,
            "eval_dataset",
            "return a data set whose number of batches is known: apply "
            "`tf.data.experimental.assert_cardinality(batches)` to it",
            "an infinite data set"
            if batches == tf.data.INFINITE_CARDINALITY
            else "a data set of unknown cardinality",
        )
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    if batches == 0 or batches % replicas:
        _raise(
            task,
            "eval_dataset",
            "return at least one batch, and the same number for each of the "
            f"{replicas} replicas of a host",
            f"a data set of {batches} batches",
        )
    # Repeated, because a strategy requests a batch after the last one.
    return dataset.repeat(), batches // replicas


def check_eval_batches(task: Any, batches: list[int]) -> int:
    """Returns the number of evaluation batches, the same on all hosts.

    Args:
        task: The task.
        batches: Number of batches for each replica, by host.

    Raises:
        TaskError: If the numbers differ.
    """
    if len(set(batches)) > 1:
        _raise(
            task,
            "eval_dataset",
            "return the same number of batches on every host: pad the shares "
            "of some hosts with examples of weight 0",
            f"{batches} batches for each replica, by host",
        )
    return batches[0]


def raise_wrong_cardinality(task: Any, received: str) -> NoReturn:
    """Raises `TaskError` because there were fewer batches than asserted."""
    _raise(
        task,
        "eval_dataset",
        "return as many batches as its cardinality",
        received,
    )


def _check_batches(
    task: Any, method: str, dataset: Any, size: int | None = None
) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        _raise(task, method, "return a tf.data.Dataset", _with_type(dataset))
    for spec in tf.nest.flatten(dataset.element_spec):
        shape = tf.TensorShape(getattr(spec, "shape", None))
        first = shape[0] if shape.rank else None
        if not shape.is_fully_defined() or first is None:
            _raise(
                task,
                method,
                "return batches of static shape (`drop_remainder=True`), with "
                "the examples along the first axis",
                f"{dataset.element_spec}",
            )
        if size is not None and first != size:
            _raise(
                task,
                method,
                "return batches for one replica, of "
                "`context.get_per_replica_batch_size(batch_size)` examples: "
                f"{size} here",
                f"{dataset.element_spec}",
            )


# AutoGraph would replace the error by another.
@tf.autograph.experimental.do_not_convert
def check_metrics(
    task: Any, metrics: Any, names: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """Validates the metrics that `compute_metrics` returned.

    Args:
        task: The task.
        metrics: The returned value.
        names: Names that another call in the same step returned, if any.

    Returns:
        The names of the metrics, sorted.

    Raises:
        TaskError: If the metrics are not pairs of scalars by name, lack "loss",
            or have other names than `names`.
    """
    if not isinstance(metrics, Mapping) or "loss" not in metrics:
        _raise(
            task,
            "compute_metrics",
            "return a dictionary of metrics by name, including 'loss'",
            f"{list(metrics)}"
            if isinstance(metrics, Mapping)
            else _with_type(metrics),
        )
    for name, pair in metrics.items():
        if not isinstance(name, str):
            _raise(
                task,
                "compute_metrics",
                "return metrics by name",
                _with_type(name),
            )
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or any(tf.convert_to_tensor(x).shape.rank != 0 for x in pair)
        ):
            _raise(
                task,
                "compute_metrics",
                f"return a pair of scalars for {name!r}: the weighted sum over "
                "the examples, and the sum of the weights",
                f"{pair!r}",
            )
    received = tuple(sorted(metrics))
    if names is not None and received != names:
        _raise(
            task,
            "compute_metrics",
            f"always return the same metrics, {list(names)}",
            f"{list(received)}",
        )
    return received


def check_evaluators(task: Any, evaluators: Any) -> Mapping[str, Evaluator]:
    """Validates the evaluators of a task.

    Args:
        task: The task.
        evaluators: The value that `Task.evaluators` returned.

    Returns:
        The evaluators.

    Raises:
        TaskError: If they are not callables by name.
    """
    if not isinstance(evaluators, Mapping) or not all(
        isinstance(name, str) and callable(evaluator)
        for name, evaluator in evaluators.items()
    ):
        _raise(
            task,
            "evaluators",
            "return a dictionary of callables by name",
            _with_type(evaluators),
        )
    return evaluators


def check_evaluator_results(
    task: Any, evaluator: str, results: Any, others: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Validates what an evaluator returned.

    Args:
        task: The task.
        evaluator: Name of the evaluator.
        results: The returned value.
        others: Names that exist already.

    Returns:
        The metrics, as Python floats, and the texts, both by name.

    Raises:
        TaskError: If the results are not numbers and strings by name, or a
            name is also in `others`.
    """
    where = f"evaluators()[{evaluator!r}]"
    must = "return a dictionary of numbers and strings by name"
    if not isinstance(results, Mapping):
        _raise(task, where, must, _with_type(results))
    metrics: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in results.items():
        if not isinstance(name, str):
            _raise(task, where, must, _with_type(name))
        if isinstance(value, str):
            texts[name] = str(value)
            continue
        try:
            if isinstance(value, bytes):
                raise TypeError  # `float` parses it.
            metrics[name] = float(value)
        except (TypeError, ValueError):
            _raise(task, where, must, f"{_with_type(value)} for {name!r}")
    if duplicates := sorted(set(results) & set(others)):
        _raise(
            task,
            where,
            f"return other names than {sorted(others)}, which exist already",
            f"{duplicates}",
        )
    return metrics, texts


def check_averaged_weights(task: Any, scope: Any) -> None:
    """Raises `TaskError` unless `averaged_weights` returned a scope."""
    if not isinstance(scope, contextlib.AbstractContextManager):
        _raise(
            task,
            "averaged_weights",
            "return a context manager, such as `checkpoints.average(model)`",
            _with_type(scope),
        )


def check_serving(task: Any, module: Any) -> None:
    """Raises `TaskError` unless `serving` returned a module to export."""
    if not isinstance(module, tf.Module):
        _raise(task, "serving", "return a tf.Module", _with_type(module))
    if not hasattr(module, "signatures"):
        _raise(
            task,
            "serving",
            "return a module with `signatures`, functions by name, such as "
            "`sos.export.ServingModule`",
            f"a {type(module).__name__} without `signatures`",
        )
