import keras
import numpy as np
import pytest
import tensorflow as tf

from sos.errors import in_a_line
from sos.training import contract
from sos.training.strategies import make_strategy
from sos.training.task import TaskError
from sos.training.trainer import Trainer
from tests.support import techniques
from tests.support.toy_task import ToyTask


def refused(call, match):
    """The error of a task, which is told in one line."""
    with pytest.raises(TaskError, match=match) as error:
        call()
    text = in_a_line(error.value)
    assert text == str(error.value)
    assert "\n" not in text
    return text


def trainer_of(replicas=1, **methods):
    """A trainer of a toy task with some other methods."""
    task = type("Mine", (ToyTask,), methods)()
    strategy = (
        techniques.two_replicas()
        if replicas == 2
        else make_strategy("one_device")
    )
    return Trainer(task, strategy=strategy)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            None,
            "Mine.build_model` must return a model.*: None of type NoneType",
        ),
        (keras.layers.Dense(1), "must return a model of Keras 3.*type Dense"),
        (
            keras.Sequential([keras.layers.Dense(1)], name="mine"),
            "that is built.*'mine', which is not built",
        ),
    ],
)
def test_models(model, text):
    refused(lambda: trainer_of(build_model=lambda self: model), text)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_optimizers(optimizer):
    refused(
        lambda: trainer_of(build_optimizer=lambda self, model: optimizer),
        f"Mine.build_optimizer` must return an optim.*: {optimizer!r} of type",
    )


@pytest.mark.parametrize(
    ("configuration", "text"),
    [
        (None, "return a dictionary.*Received: None of type NoneType"),
        ([("a", 1)], "return a dictionary.*of type list"),
        ({"rate": np.float32(1)}, "of JSON values.*float32.*serializable"),
        ({(1, 2): 3}, "of JSON values.*keys must be str"),
    ],
)
def test_configurations(configuration, text):
    trainer = trainer_of(configuration=lambda self: configuration)
    refused(trainer.configuration, f"Mine.configuration` must .*{text}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda dataset: [1, 2], r"return a tf.data.Dataset.*\[1, 2\] of type"),
        (
            lambda dataset: dataset.take(30).apply(
                tf.data.experimental.assert_cardinality(30)
            ),
            "without end.*set of 30 batches",
        ),
        (
            lambda dataset: dataset.unbatch().batch(4),
            "static shape .`drop_remainder=True`",
        ),
        (
            lambda dataset: dataset.unbatch().batch(3, drop_remainder=True),
            "batches for one replica.*examples: 4 here.*shape=.3, 6",
        ),
        (
            lambda dataset: dataset.map(lambda b: {**b, "n": tf.constant(1)}),
            "with the examples along the first axis",
        ),
    ],
)
def test_training_data(change, text):
    def train_dataset(self, context, step):
        return change(ToyTask.train_dataset(self, context, step))

    trainer = trainer_of(2, train_dataset=train_dataset)
    refused(lambda: trainer.train(2), f"Mine.train_dataset` must .*{text}")
    assert trainer.step == 0


@pytest.mark.parametrize("replicas", [1, 2])
def test_training_data_that_end_where_nobody_knew(replicas):
    def train_dataset(self, context, step):
        return ToyTask.train_dataset(self, context, step).take(6)

    trainer = trainer_of(replicas, train_dataset=train_dataset)
    text = refused(lambda: trainer.train(20), "Mine.train_dataset` must .*end")
    assert "after step" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda dataset: [1, 2], "return a tf.data.Dataset"),
        (lambda dataset: dataset.unbatch().batch(4), "static shape"),
        (lambda dataset: dataset.take(2), "3 here. Received: 2 batches"),
    ],
)
def test_evaluation_data(change, text):
    def eval_dataset(self, context):
        return change(ToyTask.eval_dataset(self, context))

    trainer = trainer_of(eval_dataset=eval_dataset)
    refused(trainer.evaluate, f"Mine.eval_dataset` must .*{text}")


PAIR = (tf.constant(1.0), tf.constant(2.0))


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (None, "a dictionary with the `metric_names`.*None of type"),
        ({"loss": PAIR}, r"\['loss', 'accuracy'\]. Received: \['loss'\]"),
        (
            {"loss": tf.constant(1.0), "accuracy": PAIR},
            "give a pair of scalars for 'loss': the sum over",
        ),
        (
            {"loss": PAIR, "accuracy": (tf.ones(4), tf.constant(4.0))},
            "give a pair of scalars for 'accuracy'",
        ),
        (
            {"loss": PAIR, "accuracy": (1.0,)},
            "a pair of scalars for 'accuracy'",
        ),
    ],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_is_measured(measured, text, replicas):
    trainer = trainer_of(
        replicas, measure=lambda self, model, batch, training: measured
    )
    for call in (lambda: trainer.train(1), trainer.evaluate):
        refused(call, f"Mine.measure` must .*{text}")


def test_python_numbers_are_scalars():
    contract.check_metrics(ToyTask(), {"loss": (1.0, 2), "accuracy": [0, 1]})


def test_a_binary_tells_it_in_one_line(tmp_path, capfd):
    code = main.run(
        main.Options(mode="train", workdir=str(tmp_path), train_steps=3),
        lambda: trainer_of(measure=lambda self, model, batch, training: {}),
    )
    assert code == 1
    (line,) = [
        x for x in capfd.readouterr().err.splitlines() if x.startswith("FATAL")
    ]
    assert line.endswith("Received: []")


def test_other_mistakes_in_a_traced_function_keep_their_traceback(tmp_path):
    """AutoGraph makes other errors of them."""

    def compute_metrics(self, model, batch, training):
        if training:
            raise ValueError("mine")
        return ToyTask.compute_metrics(self, model, batch, training)

    with pytest.raises(ValueError, match="in user code") as error:
        trainer_of(measure=measure).train(1)
    assert in_a_line(error.value) is None
    # Of a layer, too.
    wrong = tf.ones((8, 5))
    with pytest.raises(ValueError, match="in user code") as error:
        trainer_of(
            measure=lambda self, model, batch, training: model(wrong)
        ).train(1)
    assert in_a_line(error.value) is None
