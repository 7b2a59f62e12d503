"""A small task for the tests of the engine, with any technique or none."""

import keras
import numpy as np
import tensorflow as tf

import sos
from sos.training import inputs
from sos.training.task import Task
from tests import toys

EXAMPLES = 48
EVAL_EXAMPLES = 20


class ToyTask(Task):
    """Classifies points of six coordinates into three classes.

    Args:
        technique: The name of a registered technique, None for a dense model.
        batch_size: The global batch size.
        seed: Seed of weights, data order and noise.
        batch_norm: Whether the model has batch normalisation.
        optimizer: Makes the optimizer; Adam by default.
        overrides: Other arguments of the technique.
    """

    metric_names = ("loss", "accuracy")

    def __init__(
        self,
        technique=None,
        *,
        batch_size=8,
        seed=0,
        batch_norm=False,
        dropout=0.0,
        optimizer=None,
        **overrides,
    ):
        self.technique = technique
        self.batch_size = batch_size
        self.seed = seed
        self.batch_norm = batch_norm
        self.dropout = dropout
        self.overrides = overrides
        self.make_optimizer = optimizer or (
            lambda: keras.optimizers.Adam(
                keras.optimizers.schedules.CosineDecay(0.02, 100)
            )
        )
        generator = np.random.default_rng(7)
        points = generator.normal(size=(EXAMPLES + EVAL_EXAMPLES, 6))
        labels = np.argmax(points[:, :3] + 0.1 * points[:, 3:], axis=1)
        self.points = points.astype(np.float32)
        self.labels = labels.astype(np.int32)
        self.eval_batches = inputs.evaluation_batch_count(
            EVAL_EXAMPLES, batch_size
        )

    def configuration(self):
        return {
            "technique": self.technique,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{k: repr(v) for k, v in self.overrides.items()},
        }

    def build_model(self):
        keras.utils.set_random_seed(self.seed)
        layers = [
            keras.Input((6,)),
            keras.layers.Dense(16, name="a"),
            keras.layers.ReLU(name="relu"),
            keras.layers.Dense(3, name="b"),
        ]
        if self.batch_norm:
            layers.insert(2, keras.layers.BatchNormalization(name="norm"))
        if self.dropout:
            layers.insert(-1, keras.layers.Dropout(self.dropout, name="drop"))
        model = keras.Sequential(layers, name="toy")
        if self.technique is None:
            return model
        return sos.sparsify(
            model,
            sos.techniques()[self.technique],
            **{**toys.settings(self.technique), **self.overrides},
        )

    def build_optimizer(self, model):
        return self.make_optimizer()

    def train_dataset(self, context, step):
        return inputs.array_batches(
            self._arrays(slice(None, EXAMPLES)),
            seed=self.seed,
            batch_size=self.batch_size,
            step=step,
            context=context,
        )

    def eval_dataset(self, context):
        return inputs.evaluation_batches(
            self._arrays(slice(EXAMPLES, None)),
            batch_size=self.batch_size,
            context=context,
        )

    def measure(self, model, batch, training):
        logits = model(batch["x"], training=training)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["y"], logits
        )
        correct = tf.argmax(logits, axis=-1, output_type=tf.int32) == batch["y"]
        weight = batch.get("weight", tf.ones_like(losses))
        total = tf.reduce_sum(weight)
        return {
            "loss": (tf.reduce_sum(weight * losses), total),
            "accuracy": (
                tf.reduce_sum(weight * tf.cast(correct, tf.float32)),
                total,
            ),
        }

    def _arrays(self, part):
        return {"x": self.points[part], "y": self.labels[part]}


def values(trainer):
    """Copies of all variables of a trainer's model and optimizer.

    By place and shape: Keras numbers names through all of a process.
    """
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    return {
        f"{i} {v.path.split('/')[-1]}": keras.ops.convert_to_numpy(v).copy()
        for i, v in enumerate(variables)
    }
