"""What is trained: the model, its loss and its data."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import keras
import tensorflow as tf

from sos.errors import TaskError

#: A sum over examples and the sum of their weights, float32 scalars.
WeightedSum = tuple[tf.Tensor, tf.Tensor]


class Task:
    """A model, an optimizer, data, and what is measured of them.

    Subclass it and override what raises here. The engine knows nothing else
    of what it trains: sparse layers are found in the model.

    Attributes:
        batch_size: The number of examples in one optimizer step, over all
            replicas and micro-batches.
        metric_names: The names that `compute_metrics` returns, "loss" among them.
        eval_batches: The number of batches that `eval_dataset` gives each
            replica.
    """

    batch_size: int
    metric_names: tuple[str, ...] = ("loss",)
    eval_batches: int = 0

    def configuration(self) -> Mapping[str, Any]:
        """All settings that decide what is computed, by name.

        A checkpoint of another configuration is refused. The values must be
        JSON: texts, numbers, booleans, None, lists and dictionaries.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `configuration`."
        )

    def build_model(self) -> keras.Model:
        """Makes the model, built; called in the strategy's scope."""
        raise NotImplementedError(
            f"{type(self).__name__} must override `build_model`."
        )

    def build_optimizer(self, model: keras.Model) -> keras.optimizers.Optimizer:
        """Makes the optimizer of a model; called in the strategy's scope."""
        raise NotImplementedError(
            f"{type(self).__name__} must override `build_optimizer`."
        )

    def train_dataset(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """The training batches from a step on, without end.

        It must be a function of the step: what step 1,000 sees may not depend
        on where training began. `sos.training.inputs` makes such data sets.

        Args:
            context: Tells which share of the data this host reads. Batches are
                of `context.get_per_replica_batch_size(self.batch_size)`
                examples, one for each replica of the host in turn.
            step: The number of optimizer steps that were made before.

        Returns:
            Batches of static shape: a tensor, or a structure of tensors that
            all have the examples along their first axis.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `train_dataset`."
        )

    def eval_dataset(
        self, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        """The evaluation batches, `eval_batches` for each replica.

        Args:
            context: As for `train_dataset`.

        Returns:
            Batches of static shape; examples that only fill the last one up
            must have no weight in `compute_metrics`.
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
        """Measures a model on a batch; called on every replica.

        The loss that training descends is the mean over the whole batch of all
        replicas, plus `model.losses`, which are not to be counted here.

        Args:
            model: The model.
            batch: From one of the data sets.
            training: Whether to call the model as in training.

        Returns:
            By metric name, the sum over the examples (or tokens) and the sum
            of their weights; "loss" must be differentiable.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `compute_metrics`."
        )


def _refuse(task: Any, method: str, must: str, received: str) -> NoReturn:
    raise TaskError(
        f"`{type(task).__name__}.{method}` must {must}. Received: {received}"
    )


def _kind(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"


def check_model(task: Any, model: Any) -> None:
    """Raises `TaskError` if `build_model` returned no built Keras model."""
    if not isinstance(model, keras.Model):
        _refuse(task, "build_model", "return a model of Keras 3", _kind(model))
    if not model.built:
        _refuse(
            task,
            "build_model",
            "return a model that is built: give it a `keras.Input`, or call it "
            "on a batch",
            f"the model {model.name!r}, which is not built",
        )


def check_optimizer(task: Any, optimizer: Any) -> None:
    """Raises `TaskError` if `build_optimizer` returned no Keras optimizer."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        _refuse(
            task,
            "build_optimizer",
            "return an optimizer of Keras 3",
            _kind(optimizer),
        )


def check_configuration(task: Any, configuration: Any) -> None:
    """Raises `TaskError` if `configuration` returned no JSON values by name."""
    must = "return a dictionary of JSON values by name"
    if not isinstance(configuration, Mapping):
        _refuse(task, "configuration", must, _kind(configuration))
    try:
        json.dumps(dict(configuration))
    except (TypeError, ValueError) as error:
        _refuse(task, "configuration", must, f"{configuration!r} ({error})")


def train_dataset(
    task: Any, context: tf.distribute.InputContext, step: int
) -> tf.data.Dataset:
    """The task's training batches, checked.

    Args:
        task: The task.
        context: Which share of the data this host reads.
        step: The step to begin with.

    Returns:
        Batches that are known to have no end.

    Raises:
        TaskError: If they are no batches of static shape for one replica, or
            are known to end.
    """
    dataset = task.train_dataset(context, step)
    size = context.get_per_replica_batch_size(task.batch_size)
    _check_batches(task, "train_dataset", dataset, size)
    if (found := int(dataset.cardinality())) >= 0:
        refuse_end(task, f"a data set of {found} batches")
    # Otherwise workers ask each other at every step whether all have data.
    return dataset.apply(
        tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    )


def refuse_end(task: Any, received: str) -> NoReturn:
    """Raises `TaskError`, as `train_dataset` gave batches that end."""
    _refuse(
        task,
        "train_dataset",
        "give batches without end, in another order in each epoch",
        received,
    )


def eval_dataset(
    task: Any, context: tf.distribute.InputContext
) -> tf.data.Dataset:
    """The task's evaluation batches, checked, again and again.

    Args:
        task: The task.
        context: Which share of the data this host reads.

    Returns:
        Batches without end. Where their number was not known before, it is an
        error then if there are too few of them.

    Raises:
        TaskError: If they are no batches of static shape, or of another number
            than `eval_batches` for each replica.
    """
    dataset = task.eval_dataset(context)
    _check_batches(task, "eval_dataset", dataset)
    batches = task.eval_batches * (
        context.num_replicas_in_sync // context.num_input_pipelines
    )
    found = int(dataset.cardinality())
    if found >= 0 and found != batches:
        _refuse(
            task,
            "eval_dataset",
            "give `eval_batches` batches for each replica, so that every "
            f"example counts once: {batches} here",
            f"{found} batches",
        )
    # Repeated, as a strategy looks for a batch beyond the last.
    return dataset.apply(
        tf.data.experimental.assert_cardinality(batches)
    ).repeat()


def _check_batches(
    task: Any, method: str, dataset: Any, size: int | None = None
) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        _refuse(task, method, "return a tf.data.Dataset", _kind(dataset))
    for spec in tf.nest.flatten(dataset.element_spec):
        shape = tf.TensorShape(getattr(spec, "shape", None))
        first = shape[0] if shape.rank else None
        if not shape.is_fully_defined() or first is None:
            _refuse(
                task,
                method,
                "give batches of static shape (`drop_remainder=True`), with "
                "the examples along the first axis",
                f"{dataset.element_spec}",
            )
        if size is not None and first != size:
            _refuse(
                task,
                method,
                "give batches for one replica, of "
                "`context.get_per_replica_batch_size(batch_size)` examples: "
                f"{size} here",
                f"{dataset.element_spec}",
            )


# Its frames are then those of this file when it raises.
@tf.autograph.experimental.do_not_convert
def check_metrics(task: Any, measured: Any) -> None:
    """Raises `TaskError` if `compute_metrics` returned no pairs of scalars by name."""
    names = list(task.metric_names)
    if not isinstance(measured, Mapping) or set(measured) != set(names):
        _refuse(
            task,
            "compute_metrics",
            f"return a dictionary with the `metric_names` {names}",
            f"{list(measured)}"
            if isinstance(measured, Mapping)
            else _kind(measured),
        )
    for name, pair in measured.items():
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or any(tf.convert_to_tensor(x).shape.rank != 0 for x in pair)
        ):
            _refuse(
                task,
                "compute_metrics",
                f"give a pair of scalars for {name!r}: the sum over the "
                "examples, and the sum of their weights",
                f"{pair!r}",
            )
