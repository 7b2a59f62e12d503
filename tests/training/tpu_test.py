"""TPU compatibility of every technique's steps.

The engine's functions, with their host loops and input, are traced under a
TPUStrategy without a TPU. Nothing is run.
"""

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import UsageError
from sos.training import inputs, tpu_check
from sos.training.steps import CompiledMaskUpdate
from sos.training.task import Task
from sos.training.trainer import Trainer
from tests.support import techniques

EXAMPLES = 32


@sos.extend.register
class TpuSaliency(sos.extend.PruningWrapper):
    """What a user may write: ranks by gradients, which replicas gather."""

    uses_gradient = True
    cumulative = True

    def scores(self, weight):
        return tf.abs(weight.value * weight.state["gradient"].value)


@keras.saving.register_keras_serializable(package="tpu_test")
class SortedTogether(sos.extend.Ranking):
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

    The model has convolutions, batch normalisation, dropout, attention, a
    recurrent layer, and a table that is looked up and multiplied by; a small
    one has a convolution, a dense layer and the table.
    """

    def __init__(
        self, technique, replicas, *, small=False, optimizer=None, **overrides
    ):
        self.technique = technique
        self.small = small
        self.batch_size = 2 * replicas
        self.optimizer = optimizer
        self.overrides = overrides
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
        table = layers.ReversibleEmbedding(11, 6, name="table")
        y = table(words)
        if self.small:
            y = layers.GlobalAveragePooling1D(name="mean")(y)
        else:
            x = layers.DepthwiseConv2D(3, name="depthwise")(x)
            y = layers.MultiHeadAttention(2, 3, name="attention")(y, y)
            y = layers.LSTM(6, name="lstm")(y)
        x = layers.Flatten(name="flatten")(x)
        z = table(y, reverse=True)
        both = layers.Concatenate(name="both")([x, y, z])
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
        return inputs.array_eval_batches(
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


def traces(trainer, only=None):
    """The engine's functions, traced, by name: all, or one of them."""
    steps, strategy = trainer.steps, trainer.strategy
    one = tf.TensorSpec((), tf.int32)
    train_data = strategy.distribute_datasets_from_function(
        # Not validated, so that the check meets batches of dynamic shape.
        lambda context: trainer.task.train_dataset(context, 0)
    )
    eval_data = strategy.distribute_datasets_from_function(
        trainer.task.eval_dataset
    )
    functions = {
        "train": lambda: steps.train_function.get_concrete_function(
            iter(train_data), one
        ),
        "evaluate": lambda: steps.eval_function.get_concrete_function(
            iter(eval_data), one
        ),
        "finite": steps.finite_function.get_concrete_function,
    }
    wrappers = dict.fromkeys(wrapper for wrapper, _ in steps.sparse_weights)
    pruning = [w for w in wrappers if isinstance(w, sos.extend.PruningWrapper)]
    if wrappers:
        functions["summary"] = functools.partial(
            steps.summary_function.get_concrete_function, True
        )
    if pruning:
        assert isinstance(trainer._update_masks, CompiledMaskUpdate)
        count = sum(len(wrapper.sparse_weights) for wrapper in pruning)
        update = trainer._update_masks.compile(dict.fromkeys(pruning, 0.5))
        functions["masks"] = functools.partial(
            update.get_concrete_function, tf.TensorSpec((count,), tf.int32)
        )
    with contextlib.ExitStack() as stack:
        if wrappers:
            # Bound, but without the mask update that starting makes.
            updater = sos.SparsityUpdater(trainer.model, trainer.optimizer)
            updater.resume()
            stack.callback(updater.pause)
        return {
            name: trace()
            for name, trace in functions.items()
            if only in (None, name)
        }


def assert_accepted(functions):
    violations = {
        f"{name}: {line}"
        for name, function in functions.items()
        for line in tpu_check.violations(function)
    }
    assert not violations


def uses_masks_alone(technique):
    """Whether every layer uses a technique's weights in one way: masked."""
    cls = sos.extend.techniques()[technique]
    return issubclass(cls, sos.extend.MaskedWrapper)


CASES = [
    *(
        pytest.param(
            technique,
            "mixed_bfloat16",
            # One technique with masks stands for all in the other layers.
            technique is None
            or uses_masks_alone(technique)
            and technique != "MagnitudePruning",
            marks=[pytest.mark.oldest] * (technique == "VariationalDropout"),
        )
        for technique in [None, *techniques.NAMES]
    ),
    ("VariationalDropout", "float32", True),
]


@pytest.mark.parametrize(("technique", "dtype", "small"), CASES)
def test_step_of_every_technique_is_accepted_by_a_tpu(
    technique, dtype, small, policy
):
    policy(dtype)
    trainer = make_trainer(Captions(technique, 2, small=small), 2)
    functions = traces(trainer)
    assert_accepted(functions)
    # Nothing that should be looked at was left out.
    assert {"train", "evaluate", "finite"} <= set(functions)
    if technique is not None:
        assert "summary" in functions
        assert len(trainer.steps.sparse_weights) == (3 if small else 10)
        pruning = issubclass(
            sos.extend.techniques()[technique], sos.extend.PruningWrapper
        )
        assert ("masks" in functions) == pruning


def test_step_of_what_users_write_is_accepted_by_a_tpu(policy):
    policy("mixed_bfloat16")
    task = Captions(
        "TpuSaliency",
        2,
        small=True,
        schedule=techniques.SCHEDULE,
        ranking=SortedTogether(),
    )
    functions = traces(make_trainer(task, 2))
    assert_accepted(functions)
    assert "masks" in functions


def test_step_of_accumulated_clipped_gradients_is_accepted_by_a_tpu():
    task = Captions(
        "VariationalDropout",
        2,
        small=True,
        optimizer=lambda: keras.optimizers.AdamW(1e-3, global_clipnorm=1.0),
        ramp=sos.ramps.CubicRamp(0, 100, moving_average=True),
    )
    trainer = make_trainer(task, 2, gradient_accumulation_steps=2)
    assert_accepted(traces(trainer, only="train"))


class Wordy(Captions):
    """Violates in the loss of training, inside the loops of the host."""

    def compute_metrics(self, model, batch, training):
        metrics = super().compute_metrics(model, batch, training)
        if training:
            total, weight = metrics["loss"]
            length = tf.strings.length(tf.as_string(batch["label"]))
            length = tf.cast(tf.reduce_sum(length), tf.float32)
            metrics["loss"] = (total + length, weight)
        return metrics


class Ragged(Captions):
    """Has a last batch of another size."""

    def train_dataset(self, context, step):
        dataset = super().train_dataset(context, step)
        return dataset.unbatch().batch(2)


@pytest.mark.parametrize(
    ("task", "expected"),
    [(Wordy, ["AsString", "StringLength"]), (Ragged, ["(None, 8, 8, 3)"])],
)
def test_violations_of_a_task_are_listed(task, expected):
    task = task("MagnitudePruning", 2, small=True)
    functions = traces(make_trainer(task, 2))
    violations = tpu_check.violations(functions["train"])
    for part in expected:
        assert any(part in line for line in violations)
    del functions["train"]
    assert_accepted(functions)


def test_jit_compile_on_a_tpu_raises():
    with pytest.raises(UsageError, match="jit_compile"):
        make_trainer(Captions(None, 2, small=True), 2, jit_compile=True)
    assert not make_trainer(Captions(None, 1, small=True), 1).steps.jit_compile
