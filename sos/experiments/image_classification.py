"""Image classification as a task."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from sos.experiments.task import ExperimentTask
from sos.training import inputs
from sos.training.learning_rates import make_learning_rate
from sos.training.optimizers import make_optimizer, technique_variables
from sos.training.task import WeightedSum


class ImageSource(Protocol):
    """Images and labels, wherever they come from.

    Attributes:
        image_shape: Height, width and channels.
        classes: Number of classes.
        train_examples: Number of training examples.
        eval_examples: Number of evaluation examples.
    """

    image_shape: Sequence[int]
    classes: int
    train_examples: int
    eval_examples: int

    def train(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns training batches, as `Task.train_dataset` does.

        Args:
            context: The share of the data that this host reads.
            step: The number of optimizer steps made before.

        Returns:
            Batches with "image", of shape [batch, *image_shape], and "label",
            int32 of shape [batch].
        """

    def eval(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Returns evaluation batches, as `Task.eval_dataset` does.

        Args:
            context: The share of the data that this host reads.

        Returns:
            Batches as those of training, and "weight", float32 of shape
            [batch], which is 0 for padding.
        """


class ArraySource:
    """Images and labels in memory, in another order in every epoch.

    Args:
        train: Arrays "image" and "label".
        eval: Arrays of the same names.
        classes: Number of classes.
        seed: Seed of the order.
        batch_size: Examples in one optimizer step.
        eval_batch_size: Examples in an evaluation batch, at most; it is lowered
            to a multiple of the number of replicas.
    """

    def __init__(
        self,
        train: Mapping[str, np.ndarray],
        eval: Mapping[str, np.ndarray],
        *,
        classes: int,
        seed: int,
        batch_size: int,
        eval_batch_size: int = 1000,
    ) -> None:
        self.image_shape = train["image"].shape[1:]
        self.classes = classes
        self.train_examples = len(train["label"])
        self.eval_examples = len(eval["label"])
        self._train, self._eval = train, eval
        self._seed = seed
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size

    def train(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns training batches."""
        return inputs.array_batches(
            self._train,
            seed=self._seed,
            batch_size=self._batch_size,
            step=step,
            context=context,
        )

    def eval(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Returns every evaluation example once."""
        replicas = context.num_replicas_in_sync
        size = max(1, self._eval_batch_size // replicas) * replicas
        return inputs.array_eval_batches(
            self._eval, batch_size=size, context=context
        )


class ImageClassification(ExperimentTask):
    """Trains a network to classify images.

    A subclass overrides `load_source` and `build_network`.

    Attributes:
        source: The images.
    """

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        super().__init__(config)
        self.source = self.load_source()

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns the entries of a config, with their defaults.

        - `learning_rate.technique_multiplier`: factor of the learning rate for
          the trainable variables that a technique adds.
        """
        config = super().default_config()
        config.optimizer.name = "adamw"
        config.optimizer.weight_decay = 0.0
        config.learning_rate.schedule = "cosine"
        config.learning_rate.base = 0.001
        config.learning_rate.technique_multiplier = 1.0
        return config

    def load_source(self) -> ImageSource:
        """Returns the images that `config.data` names."""
        raise NotImplementedError(
            f"{type(self).__name__} must override `load_source`."
        )

    def build_network(self) -> keras.Model:
        """Returns the dense network that `config.model` names, built.

        It maps a batch of images to logits of shape [batch, classes]. Layers
        need names, as noise and rules go by the paths of weights.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `build_network`."
        )

    def build_model(self) -> keras.Model:
        """Returns the network, sparse as `config.sparsity` says."""
        return self.sparsify(self.build_network())

    def build_optimizer(self, model: keras.Model) -> keras.optimizers.Optimizer:
        """Returns the optimizer that `config.optimizer` names.

        Decoupled weight decay is for weights of rank 2 or more, not for biases,
        norms and the variables that a technique adds.
        """
        rate = self.config.learning_rate.to_dict()
        multiplier = rate.pop("technique_multiplier")
        added = technique_variables(model)
        vectors = [v for v in model.trainable_variables if len(v.shape) < 2]
        optimizer = make_optimizer(
            self.config.optimizer.to_dict(),
            learning_rate=make_learning_rate(
                rate,
                train_steps=self.config.train_steps,
                batch_size=self.batch_size,
            ),
            multipliers=[(variable, multiplier) for variable in added],
            no_weight_decay=[*vectors, *added],
        )
        optimizer.build(model.trainable_variables)
        return optimizer

    def train_dataset(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns the training batches of the source."""
        return self.source.train(context, step)

    def eval_dataset(
        self, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        """Returns the evaluation batches of the source."""
        return self.source.eval(context)

    def compute_metrics(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, WeightedSum]:
        """Returns cross-entropy in nats and accuracy."""
        logits = model(batch["image"], training=training)
        return classification_metrics(
            logits, batch["label"], batch.get("weight")
        )


def classification_metrics(
    logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None = None
) -> dict[str, WeightedSum]:
    """Computes cross-entropy and accuracy, as `Task.compute_metrics` returns.

    Args:
        logits: Of shape [batch, classes].
        labels: Integers of shape [batch].
        weights: float32 of shape [batch]; None for ones.

    Returns:
        "loss", the cross-entropy in nats, and "accuracy", the fraction of
        right answers: each the sum over the examples and the sum of weights,
        float32.
    """
    logits = tf.cast(logits, tf.float32)
    labels = tf.cast(labels, tf.int32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    answers = tf.argmax(logits, axis=-1, output_type=labels.dtype)
    correct = tf.cast(answers == labels, tf.float32)
    if weights is None:
        weights = tf.ones_like(losses)
    total = tf.reduce_sum(weights)
    return {
        "loss": (tf.reduce_sum(weights * losses), total),
        "accuracy": (tf.reduce_sum(weights * correct), total),
    }
