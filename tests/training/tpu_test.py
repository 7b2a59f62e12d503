"""Every technique's steps, as a TPU would get them.

They are the engine's own, with its host loops and its input, traced under a
TPUStrategy that has no TPU. Nothing is run.
"""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.training import inputs, tpu_check
from sos.training.steps import CompiledMaskUpdate
from sos.training.task import Task
from sos.training.trainer import Trainer
from tests.support import techniques

EXAMPLES = 32


@sos.register
class TpuSaliency(sos.PruningWrapper):
    """What a user may write: ranks by gradients, which replicas gather."""

    uses_gradient = True
    cumulative = True

    def scores(self, weight):
        return tf.abs(weight.value * weight.state["gradient"].value)


@keras.saving.register_keras_serializable(package="tpu_test")
class SortedTogether(sos.Ranking):
    """What a user may write: ranks all weights together, by a sort."""

    def get_config(self):
        return {}

    def masks(self, scores, sparsities):
        flat = tf.concat([tf.reshape(score, [-1]) for score in scores], 0)
        place = int(flat.shape[0] * (1 - sparsities[0])) - 1
        threshold = tf.sort(flat, direction="DESCENDING")[place]
        return [tf.cast(score >= threshold, tf.uint8) for score in scores]


class Captions(Task):
    """Classifies images with a few words each.

    The model has convolutions, batch normalisation, dropout, an embedding and
    a recurrent layer.
    """

    metric_names = ("loss", "accuracy")

    def __init__(self, technique, replicas, optimizer=None, **overrides):
        self.technique = technique
        self.batch_size = 2 * replicas
        self.optimizer = optimizer
        self.overrides = overrides
        self.eval_batches = inputs.evaluation_batch_count(
            EXAMPLES, self.batch_size
        )
        self.arrays = {
            "image": np.zeros((EXAMPLES, 8, 8, 3), np.float32),
            "words": np.zeros((EXAMPLES, 5), np.int32),
            "label": np.zeros(EXAMPLES, np.int32),
        }

    def build_model(self):
        layers = keras.layers
        image = keras.Input((8, 8, 3), name="image")
        words = keras.Input((5,), dtype="int32", name="words")
        x = layers.Conv2D(4, 3, name="conv")(image)
        x = layers.BatchNormalization(name="norm")(x)
        x = layers.Dropout(0.1, name="dropout")(layers.ReLU(name="relu")(x))
        x = layers.DepthwiseConv2D(3, name="depthwise")(x)
        x = layers.Flatten(name="flatten")(x)
        y = layers.Embedding(11, 6, name="embedding")(words)
        y = layers.LSTM(4, name="lstm")(y)
        both = layers.Concatenate(name="both")([x, y])
        logits = layers.Dense(3, dtype="float32", name="logits")(both)
        model = keras.Model({"image": image, "words": words}, logits)
        if self.technique is None:
            return model
        return sos.sparsify(
            model,
            self.technique,
            **techniques.arguments(self.technique, **self.overrides),
        )

    def build_optimizer(self, model):
        del model
        if self.optimizer is not None:
            return self.optimizer()
        rate = keras.optimizers.schedules.CosineDecay(0.1, 100)
        return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)

    def train_dataset(self, context, step):
        return inputs.array_batches(
            self.arrays,
            seed=0,
            batch_size=self.batch_size,
            step=step,
            context=context,
        )

    def eval_dataset(self, context):
        return inputs.evaluation_batches(
            self.arrays, batch_size=self.batch_size, context=context
        )

    def compute_metrics(self, model, batch, training):
        logits = model(
            {"image": batch["image"], "words": batch["words"]},
            training=training,
        )
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["label"], logits
        )
        weight = batch.get("weight", tf.ones_like(losses))
        right = keras.metrics.sparse_categorical_accuracy(
            batch["label"], logits
        )
        total = tf.reduce_sum(weight)
        return {
            "loss": (tf.reduce_sum(weight * losses), total),
            "accuracy": (tf.reduce_sum(weight * right), total),
        }


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def make_trainer(task, replicas, **arguments):
    strategy = tpu_check.deviceless_strategy(replicas)
    return Trainer(task, strategy=strategy, **arguments)


def traces(trainer):
    """The engine's functions, traced, by name."""
    steps = trainer.steps
    one = tf.TensorSpec((), tf.int32)
    train_data = trainer._distributed(
        # Not checked, as batches without a static shape are to be found.
        lambda context: trainer.task.train_dataset(context, 0)
    )
    eval_data = trainer._distributed(trainer.task.eval_dataset)
    functions = {}
    with contextlib.ExitStack() as stack:
        if steps.sparse_weights:
            # Bound, but without the mask update that starting makes.
            driver = sos.Driver(trainer.model, trainer.optimizer)
            driver.resume()
            stack.callback(driver.pause)
            functions["summary"] = steps._summarize.get_concrete_function(True)
        functions["train"] = steps.train.get_concrete_function(
            iter(train_data), one
        )
        wrappers = [
            wrapper
            for wrapper in dict.fromkeys(w for w, _ in steps.sparse_weights)
            if isinstance(wrapper, sos.PruningWrapper)
        ]
        if wrappers:
            assert isinstance(trainer._update_masks, CompiledMaskUpdate)
            counts = sum(len(wrapper.sparse_weights) for wrapper in wrappers)
            functions["masks"] = trainer._update_masks._compile(
                dict.fromkeys(wrappers, 0.5)
            ).get_concrete_function(tf.TensorSpec((counts,), tf.int32))
    functions["evaluate"] = steps.evaluate.get_concrete_function(
        iter(eval_data), one
    )
    functions["finite"] = steps._finite.get_concrete_function()
    return functions


def assert_accepted(functions):
    found = {
        f"{name}: {line}"
        for name, function in functions.items()
        for line in tpu_check.violations(function)
    }
    assert not found


@pytest.mark.parametrize(
    ("replicas", "dtype"), [(2, "float32"), (8, "mixed_bfloat16")]
)
@pytest.mark.parametrize("technique", [None, *techniques.NAMES])
def test_a_tpu_accepts_every_step(technique, replicas, dtype, policy):
    policy(dtype)
    trainer = make_trainer(Captions(technique, replicas), replicas)
    functions = traces(trainer)
    assert_accepted(functions)
    # Nothing that should be looked at was left out.
    assert {"train", "evaluate", "finite"} <= set(functions)
    if technique is not None:
        assert "summary" in functions
        assert len(trainer.steps.sparse_weights) == 6
        pruning = issubclass(sos.techniques()[technique], sos.PruningWrapper)
        assert ("masks" in functions) == pruning


def test_a_tpu_accepts_what_users_write(policy):
    policy("mixed_bfloat16")
    task = Captions(
        "TpuSaliency",
        2,
        schedule=techniques.SCHEDULE,
        ranking=SortedTogether(),
    )
    functions = traces(make_trainer(task, 2))
    assert_accepted(functions)
    assert "masks" in functions


def test_a_tpu_accepts_micro_batches_and_clipping():
    task = Captions(
        "VariationalDropout",
        2,
        optimizer=lambda: keras.optimizers.AdamW(1e-3, global_clipnorm=1.0),
        ramp=sos.CubicRamp(0, 100, moving_average=True),
    )
    trainer = make_trainer(task, 2, gradient_accumulation_steps=2)
    assert_accepted({"train": traces(trainer)["train"]})


class Wordy(Captions):
    """Violates in the loss of training, inside the loops of the host."""

    def compute_metrics(self, model, batch, training):
        measured = super().compute_metrics(model, batch, training)
        if training:
            total, weight = measured["loss"]
            length = tf.strings.length(tf.as_string(batch["label"]))
            length = tf.cast(tf.reduce_sum(length), tf.float32)
            measured["loss"] = (total + length, weight)
        return measured


class Ragged(Captions):
    """Has a last batch of another size."""

    def train_dataset(self, context, step):
        dataset = super().train_dataset(context, step)
        return dataset.unbatch().batch(2)


@pytest.mark.parametrize(
    ("task", "expected"),
    [(Wordy, ["AsString", "StringLength"]), (Ragged, ["(None, 8, 8, 3)"])],
)
def test_what_a_task_does_wrong_is_caught(task, expected):
    functions = traces(make_trainer(task("MagnitudePruning", 2), 2))
    found = tpu_check.violations(functions["train"])
    for part in expected:
        assert any(part in line for line in found)
    del functions["train"]
    assert_accepted(functions)
