"""The engine's training step of a network, as benchmarks measure it."""

import dataclasses
import gc
from typing import Any

import keras
import tensorflow as tf

import sos
from benchmarks import networks
from sos.experiments import ExperimentTask
from sos.training.steps import Steps
from sos.training.task import Task

# Hyperparameters of all techniques; each ignores those of others.
HYPERPARAMETERS = {
    "schedule": "constant",
    "sparsity": 0.9,
    "frequency": 100,
    "penalty_weight": 1e-7,
}


class Classification(Task):
    """Predicts labels: one of an image, one for each token of a sentence.

    A batch is a list of the model's inputs and, last, the labels.

    Args:
        batch_size: Number of examples in a batch, over all replicas.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def compute_metrics(
        self, model: keras.Model, batch: list[tf.Tensor], training: bool
    ) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """Computes cross-entropy and accuracy."""
        *inputs, labels = batch
        logits = model(*inputs, training=training)
        if logits.dtype != tf.float64:
            logits = tf.cast(logits, tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        predictions = tf.argmax(logits, axis=-1, output_type=tf.int32)
        correct = tf.cast(predictions == labels, tf.float32)
        count = tf.cast(tf.size(losses), tf.float32)
        return {
            "loss": (tf.reduce_sum(losses), count),
            "accuracy": (tf.reduce_sum(correct), count),
        }


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, its optimizer and the engine's compiled functions."""

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    steps: Steps
    updater: sos.SparsityUpdater | None

    def loss(self, batch: Any) -> tf.Tensor:
        """Runs one optimizer step on this replica and returns its mean loss."""
        totals, _ = self.steps.train_step(batch)
        return totals[0, 0] / totals[0, 1]


def prepare(
    name: str, technique: str, batch_size: int, size: int | None = None
) -> Training:
    """Builds a network and its training step, in the current strategy.

    Args:
        name: One of `networks.NETWORKS`.
        technique: Name of a technique, or "dense".
        batch_size: Number of examples in a batch, over all replicas.
        size: Size of the examples; by default that of the network.

    Returns:
        The training. Its updater, None for the dense network, is not started.
    """
    model = networks.build(name, technique, HYPERPARAMETERS, size=size)
    optimizer = networks.NETWORKS[name].optimizer()
    optimizer.build(model.trainable_variables)
    return _make_training(Classification(batch_size), model, optimizer)


def prepare_task(task: ExperimentTask) -> Training:
    """Builds the model and the training step of a run; see `prepare`."""
    model = task.build_model()
    steps = task.config.gradient_accumulation_steps
    return _make_training(
        task,
        model,
        task.build_optimizer(model),
        gradient_accumulation_steps=steps,
    )


def _make_training(
    task: Task,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    **options: Any,
) -> Training:
    steps = Steps(task, model, optimizer, **options)
    updater = None
    if steps.sparse_weights:
        updater = sos.SparsityUpdater(model, optimizer)
    return Training(model, optimizer, steps, updater)


def forget() -> None:
    """Frees the memory of models that nothing refers to, and of their graphs.

    Keras's dtype policy is reset.
    """
    keras.backend.clear_session()
    # Models and traced functions refer to each other.
    gc.collect()
