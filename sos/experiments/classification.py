"""Image classification as a task of the training engine."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from sos.experiments.runs import Run
from sos.surgery import sparsify
from sos.training import inputs
from sos.training.task import Task, WeightedSum
from sos.wrappers.base import find_wrappers

#: Makes a network from the shape of an image, the number of classes and a seed.
BuildModel = Callable[[Sequence[int], int, int], keras.Model]


class Data(Protocol):
    """Images and labels, as `sos.datasets.fashion_mnist.load` gives them."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: Sequence[str]


class Classification(Task):
    """A network that learns to classify images that fit into memory.

    Args:
        run: What is trained.
        data: The examples.
        build_model: Makes the dense network. Its layers must have names, as
            noise and rules go by the paths of weights.
        eval_batch_size: The number of examples in an evaluation batch, at most;
            it is lowered to a multiple of the number of replicas.
        settings: Settings of the network that the run does not hold; a part of
            the configuration.

    Attributes:
        run: As given. It may be replaced by another run of the same shape.
    """

    metric_names = ("loss", "accuracy")

    def __init__(
        self,
        run: Run,
        data: Data,
        build_model: BuildModel,
        *,
        eval_batch_size: int = 1000,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.batch_size = run.batch_size
        self._train = {"image": data.x_train, "label": data.y_train}
        self._test = {"image": data.x_test, "label": data.y_test}
        self._classes = len(data.class_names)
        self._build_dense = build_model
        self._settings = dict(settings or {})
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self._eval_batch_size = max(1, eval_batch_size // replicas) * replicas
        self.eval_batches = math.ceil(len(data.y_test) / self._eval_batch_size)

    def configuration(self) -> dict[str, Any]:
        """The fields that tell runs apart, and the network's settings."""
        return {**self.run.identity(), **self._settings}

    def build_model(self) -> keras.Model:
        """Makes the network, with the technique of the run."""
        run = self.run
        model = self._build_dense(
            self._train["image"].shape[1:], self._classes, run.seed
        )
        if run.wrapper is None:
            return model
        return sparsify(
            model,
            run.wrapper,
            rules={run.keep_dense: None} if run.keep_dense else None,
            **run.technique_settings(),
        )

    def build_optimizer(self, model: keras.Model) -> keras.optimizers.Optimizer:
        """Adam under a cosine, with a rate of its own for a technique's state.

        Weight decay is for the weights alone, not for biases, norms and what
        the technique adds.
        """
        run = self.run
        added = [
            variable
            for wrapper in find_wrappers(model)
            for weight in wrapper.sparse_weights
            for variable in weight.state.values()
            if variable.trainable
        ]
        optimizer = ScaledAdamW(
            {id(v): run.learning_rate_multiplier for v in added},
            learning_rate=keras.optimizers.schedules.CosineDecay(
                run.learning_rate, run.steps
            ),
            weight_decay=run.weight_decay,
        )
        vectors = [v for v in model.trainable_variables if len(v.shape) < 2]
        optimizer.exclude_from_weight_decay(var_list=[*vectors, *added])
        optimizer.build(model.trainable_variables)
        return optimizer

    def train_dataset(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Batches in an order of their own in every epoch."""
        return inputs.array_batches(
            self._train,
            seed=self.run.seed,
            batch_size=self.batch_size,
            step=step,
            context=context,
        )

    def eval_dataset(
        self, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        """All test examples once."""
        return inputs.array_eval_batches(
            self._test, batch_size=self._eval_batch_size, context=context
        )

    def compute_metrics(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, WeightedSum]:
        """Cross-entropy in nats, and the fraction classified correctly."""
        labels = batch["label"]
        logits = tf.cast(model(batch["image"], training=training), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        correct = tf.argmax(logits, axis=-1, output_type=labels.dtype) == labels
        weights = batch.get("weight", tf.ones_like(losses))
        total = tf.reduce_sum(weights)
        correct = tf.cast(correct, tf.float32)
        return {
            "loss": (tf.reduce_sum(weights * losses), total),
            "accuracy": (tf.reduce_sum(weights * correct), total),
        }


class ScaledAdamW(keras.optimizers.AdamW):
    """AdamW with a learning rate of its own for some variables.

    What a technique adds, such as log alpha, is no weight of a network: it has
    another scale and other distances to go.

    Args:
        multipliers: Factors of the learning rate, by the id of a variable.
        **kwargs: As for AdamW.
    """

    def __init__(self, multipliers: dict[int, float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._multipliers = multipliers
        self._factors: list[float] = []

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the slots."""
        super().build(variables)
        self._factors = [self._multipliers.get(id(v), 1.0) for v in variables]

    def update_step(
        self, gradient: Any, variable: keras.Variable, learning_rate: Any
    ) -> None:
        """Updates one variable at its own rate."""
        # What comes here is a replica's part of a variable.
        factor = self._factors[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * factor)
