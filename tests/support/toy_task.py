"""Small tasks for the tests of the engine, with any technique or none."""

import keras
import numpy as np
import tensorflow as tf

import sos
from sos.training import inputs
from sos.training.task import Task
from tests.support import techniques

EXAMPLES = 48
EVAL_EXAMPLES = 20


class ToyTask(Task):
    """Classifies points of six coordinates into three classes.

    Args:
        technique: The name of a registered technique, None for a dense model.
        batch_size: The global batch size.
        seed: Seed of weights, data order and noise.
        batch_norm: Whether the model has batch normalisation.
        dropout: Rate of a dropout layer; none if it is 0.
        optimizer: Returns the optimizer; Adam by default.
        overrides: Other arguments of the technique.
    """

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

    def configuration(self):
        return {
            "technique": self.technique,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{k: _text(v) for k, v in self.overrides.items()},
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
            sos.extend.techniques()[self.technique],
            **techniques.arguments(self.technique, **self.overrides),
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
        return inputs.array_eval_batches(
            self._arrays(slice(EXAMPLES, None)),
            batch_size=self.batch_size,
            context=context,
        )

    def compute_metrics(self, model, batch, training):
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


def _text(value):
    """Returns a text that is the same in every process."""
    if isinstance(value, sos.schedules.PruningSchedule):
        value = sos.schedules.Schedule(value)
    return repr(value)


class OrderedTask(Task):
    """Regression on examples in their order: step k has the k-th batch.

    Args:
        make_model: Returns the model of `x`.
        make_optimizer: Returns its optimizer.
        arrays: Examples by name: "x", "y" of the shape of the outputs, and, if
            they are not all ones, "weight".
        batch_size: The global batch size.
    """

    def __init__(self, make_model, make_optimizer, arrays, *, batch_size):
        self.make_model = make_model
        self.make_optimizer = make_optimizer
        self.arrays = {
            "weight": np.ones(len(arrays["x"]), np.float32),
            **arrays,
        }
        self.batch_size = batch_size
        #: If it is a list, each training call of `compute_metrics` appends a
        #: dictionary with the step, the replica, the batch and the outputs.
        self.calls = None

    def configuration(self):
        return {"batch_size": self.batch_size}

    def build_model(self):
        keras.utils.set_random_seed(0)
        return self.make_model()

    def build_optimizer(self, model):
        self.optimizer = self.make_optimizer()
        return self.optimizer

    def train_dataset(self, context, step):
        batches = self._batches(context).repeat()
        return batches.skip(step * context.num_replicas_in_sync)

    def eval_dataset(self, context):
        return self._batches(context)

    def rows(self, step):
        """The examples of a step."""
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return {name: array[part] for name, array in self.arrays.items()}

    def losses(self, outputs, batch):
        """The squared errors, one of each example."""
        errors = tf.square(tf.cast(outputs, tf.float32) - batch["y"])
        return tf.reduce_mean(tf.reshape(errors, [len(errors), -1]), axis=1)

    def compute_metrics(self, model, batch, training):
        outputs = model(batch["x"], training=training)
        if training and self.calls is not None:
            self._record(batch, outputs)
        losses, weight = self.losses(outputs, batch), batch["weight"]
        return {
            # Not weighted, so that the two have other means.
            "error": (
                tf.reduce_sum(tf.sqrt(losses)),
                tf.cast(len(losses), tf.float32),
            ),
            "loss": (tf.reduce_sum(weight * losses), tf.reduce_sum(weight)),
        }

    def _batches(self, context):
        return tf.data.Dataset.from_tensor_slices(self.arrays).batch(
            context.get_per_replica_batch_size(self.batch_size),
            drop_remainder=True,
        )

    def _record(self, batch, outputs):
        context = tf.distribute.get_replica_context()

        def record(step, replica, outputs, *values):
            self.calls.append(
                {
                    "step": int(step),
                    "replica": int(replica),
                    "outputs": outputs,
                    **dict(zip(batch, values, strict=True)),
                }
            )
            return np.int32(0)

        tf.numpy_function(
            record,
            [
                keras.ops.convert_to_tensor(self.optimizer.iterations),
                context.replica_id_in_sync_group,
                tf.cast(outputs, tf.float32),
                *batch.values(),
            ],
            tf.int32,
        )


def values(trainer):
    """Returns copies of all variables of a trainer's model and optimizer.

    The keys are positions and short names, as Keras numbers the names of
    layers through all of a process.
    """
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    return {
        f"{i} {v.path.split('/')[-1]}": keras.ops.convert_to_numpy(v).copy()
        for i, v in enumerate(variables)
    }
