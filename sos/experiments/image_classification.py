"""Image classification tasks."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from sos.errors import UsageError
from sos.experiments.task import ExperimentTask
from sos.training import inputs
from sos.training.task import WeightedSum


class ImageSource(Protocol):
    """Protocol of data sets of images and labels.

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
        """Returns training batches, like `Task.train_dataset`.

        Args:
            context: The share of the data that this host reads.
            step: Number of completed optimizer steps.

        Returns:
            Batches with "image", of shape [batch, *image_shape], and "label",
            int32 of shape [batch].
        """

    def eval(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Returns evaluation batches, like `Task.eval_dataset`.

        Args:
            context: The share of the data that this host reads.

        Returns:
            Batches as in training, with "weight", float32 of shape [batch],
            which is 0 for padding.
        """


class ArraySource:
    """Images and labels in memory, in a different order in every epoch.

    Args:
        train: Training examples: "image", of shape [examples, height, width,
            channels], and "label", integers of shape [examples].
        eval: Evaluation examples of the same names.
        classes: Number of classes.
        seed: Seed of the order.
        batch_size: Number of examples in one optimizer step.
        eval_batch_size: Maximum number of examples in an evaluation batch. It
            is lowered to a multiple of the number of replicas.
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
        """Returns evaluation batches with every example once."""
        size = inputs.whole_batch(self._eval_batch_size, context)
        return inputs.array_eval_batches(
            self._eval, batch_size=size, context=context
        )


class ImageClassification(ExperimentTask):
    """A task that classifies images.

    Subclasses override `load_source` and `build_network`.

    Attributes:
        source: The images.
        top_k: If set, metrics include the fraction of examples whose label is
            among the `top_k` most probable classes.

    Example:
    >>> import keras, numpy as np, sos.experiments
    >>> from sos.experiments.image_classification import ArraySource
    >>> class Noise(sos.experiments.ImageClassification):
    ...     def load_source(self):
    ...         images = np.random.default_rng(0).normal(size=(8, 4, 4, 1))
    ...         examples = {"image": images, "label": np.arange(8) % 2}
    ...         return ArraySource(
    ...             examples, examples, classes=2, seed=0, batch_size=8
    ...         )
    ...
    ...     def build_network(self):
    ...         return keras.Sequential(
    ...             [
    ...                 keras.Input(self.source.image_shape),
    ...                 keras.layers.Flatten(),
    ...                 keras.layers.Dense(self.source.classes, name="logits"),
    ...             ]
    ...         )
    >>> task = Noise(Noise.default_config())
    >>> task.build_model().output_shape
    (None, 2)
    """

    top_k: int | None = None

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        super().__init__(config)
        smoothing = config.loss.label_smoothing
        if not 0 <= smoothing < 1:
            raise UsageError(
                "`config.loss.label_smoothing` must be in [0, 1). Received: "
                f"{smoothing!r}"
            )
        self.source = self.load_source()
        self.eval_examples = self.source.eval_examples

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns the entries of a config, with their defaults.

        Adds:

        - `learning_rate.technique_multiplier`: Factor of the learning rate of
          trainable variables that a technique adds.
        - `loss.label_smoothing`: Part of the target's probability that is
          shared equally by all classes, in training and evaluation.
        """
        config = super().default_config()
        config.loss = {"label_smoothing": 0.0}
        config.optimizer.name = "adamw"
        config.optimizer.weight_decay = 0.0
        config.learning_rate.schedule = "cosine"
        config.learning_rate.base = 0.001
        config.learning_rate.technique_multiplier = 1.0
        return config

    def load_source(self) -> ImageSource:
        """Returns the images selected by `config.data`."""
        raise NotImplementedError(
            f"{type(self).__name__} must override `load_source`."
        )

    def build_network(self) -> keras.Model:
        """Returns the built dense network selected by `config.model`.

        It maps a batch of images to logits of shape [batch, classes]. Layers
        need names, because noise and rules depend on the paths of weights.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `build_network`."
        )

    def build_model(self) -> keras.Model:
        """Returns the network, made sparse according to `config.sparsity`."""
        return self.sparsify(self.build_network())

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
            logits,
            batch["label"],
            batch.get("weight"),
            label_smoothing=self.config.loss.label_smoothing,
            top_k=self.top_k,
        )


def classification_metrics(
    logits: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    top_k: int | None = None,
) -> dict[str, WeightedSum]:
    """Computes cross-entropy and accuracy for `Task.compute_metrics`.

    Args:
        logits: Floats of shape [batch, classes].
        labels: Integers of shape [batch].
        weights: float32 of shape [batch]; ones by default.
        label_smoothing: Part e of the target's probability that is shared
            equally by all C classes: the label's is 1 - e + e / C, the others'
            e / C (Szegedy et al. 2015, arXiv 1512.00567, section 7).
        top_k: Adds "top_K_accuracy", the fraction of examples whose label has
            one of the `top_k` largest logits; of equal logits the first count
            as larger.

    Returns:
        "loss", the cross-entropy in nats, and "accuracy", the fraction of
        correct predictions. Each is the weighted sum over the examples and the
        sum of the weights, float32 scalars.

    Example:
    >>> from sos.experiments import image_classification
    >>> metrics = image_classification.classification_metrics(
    ...     [[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [2, 2], top_k=2
    ... )
    >>> [float(metrics[name][0]) for name in ("accuracy", "top_2_accuracy")]
    [1.0, 2.0]
    """
    logits = tf.cast(logits, tf.float32)
    labels = tf.cast(labels, tf.int32)
    if label_smoothing:
        targets = tf.one_hot(
            labels,
            logits.shape[-1],
            on_value=1 - label_smoothing + label_smoothing / logits.shape[-1],
            off_value=label_smoothing / logits.shape[-1],
        )
        losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
    else:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    predictions = tf.argmax(logits, axis=-1, output_type=labels.dtype)
    values = {
        "loss": losses,
        "accuracy": tf.cast(predictions == labels, tf.float32),
    }
    if top_k is not None:
        larger = _larger_logits(logits, labels)
        values[f"top_{top_k}_accuracy"] = tf.cast(larger < top_k, tf.float32)
    if weights is None:
        weights = tf.ones_like(losses)
    total = tf.reduce_sum(weights)
    return {
        name: (tf.reduce_sum(weights * value), total)
        for name, value in values.items()
    }


def _larger_logits(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Counts the classes that are more probable than the label's.

    Not `tf.math.in_top_k`, with which the label of equal logits, such as those
    of a network that has lost all its weights, is always among the largest.
    """
    label_logits = tf.gather(logits, labels, axis=-1, batch_dims=1)
    label_logits = label_logits[:, tf.newaxis]
    classes = tf.range(logits.shape[-1])
    # NaN is not smaller.
    smaller = (logits < label_logits) | (
        (logits == label_logits) & (classes >= labels[:, tf.newaxis])
    )
    return tf.reduce_sum(tf.cast(~smaller, tf.int32), axis=-1)
