"""What is trained: the model, its loss and its data."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

#: A sum over examples and the sum of their weights, float32 scalars.
Measure = tuple[tf.Tensor, tf.Tensor]


class Task:
    """A model, an optimizer, data, and what is measured of them.

    Subclass it and override what raises here. The engine knows nothing else
    of what it trains: sparse layers are found in the model.

    Attributes:
        batch_size: The number of examples in one optimizer step, over all
            replicas and micro-batches.
        metric_names: The names that `measure` returns, "loss" among them.
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
            must have no weight in `measure`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `eval_dataset`."
        )

    def measure(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, Measure]:
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
            f"{type(self).__name__} must override `measure`."
        )
