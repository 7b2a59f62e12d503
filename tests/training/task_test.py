import keras
import numpy as np
import pytest
import tensorflow as tf

from sos.errors import ReportedError, TaskError, UsageError
from sos.training import task as task_lib
from sos.training.strategies import make_strategy
from sos.training.task import Task
from sos.training.trainer import Trainer
from tests.support import techniques
from tests.support.toy_task import ToyTask


def check_raises(call, match):
    """Checks the error of a task, whose message is one line."""
    with pytest.raises(TaskError, match=match) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def trainer_of(replicas=1, **methods):
    """A trainer of a toy task with some other methods."""
    task = type("Mine", (ToyTask,), methods)()
    strategy = (
        techniques.two_replicas()
        if replicas == 2
        else make_strategy("one_device")
    )
    return Trainer(task, strategy=strategy)


# Defaults.


@pytest.mark.parametrize(
    "call",
    [
        lambda task: task.configuration(),
        lambda task: task.build_model(),
        lambda task: task.build_optimizer(None),
        lambda task: task.train_dataset(None, 0),
        lambda task: task.eval_dataset(None),
        lambda task: task.compute_metrics(None, None, True),
    ],
)
def test_task_without_an_override_raises(call):
    with pytest.raises(NotImplementedError, match="override"):
        call(Task())


def test_task_has_no_evaluation_by_default():
    assert not Task().has_evaluation
    assert ToyTask().has_evaluation
    assert dict(Task().evaluators(None)) == {}
    assert Task().initialize(None, None) is None


def test_task_serving_by_default_calls_the_model():
    model = ToyTask().build_model()
    module = Task().serving(model)
    x = np.ones((2, 6), np.float32)
    np.testing.assert_allclose(module(x), model(x), rtol=1e-6)


# Validation.


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            None,
            "Mine.build_model`.*: None of type NoneType",
        ),
        (keras.layers.Dense(1), "Mine.build_model`.*type Dense"),
        (
            keras.Sequential([keras.layers.Dense(1)], name="mine"),
            "Mine.build_model`.*'mine'",
        ),
    ],
)
def test_trainer_of_an_invalid_model_raises(model, text):
    check_raises(lambda: trainer_of(build_model=lambda self: model), text)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_trainer_of_an_invalid_optimizer_raises(optimizer):
    check_raises(
        lambda: trainer_of(build_optimizer=lambda self, model: optimizer),
        f"Mine.build_optimizer`.*: {optimizer!r} of type",
    )


@pytest.mark.parametrize(
    ("configuration", "text"),
    [
        (None, "Received: None of type NoneType"),
        ([("a", 1)], "of type list"),
        ({"rate": np.float32(1)}, "float32"),
        ({(1, 2): 3}, "keys"),
    ],
)
def test_check_configuration_of_invalid_ones_raises(configuration, text):
    check_raises(
        lambda: task_lib.check_configuration(ToyTask(), configuration),
        f"ToyTask.configuration`.*{text}",
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda dataset: [1, 2], r"\[1, 2\] of type"),
        (
            lambda dataset: dataset.take(30).apply(
                tf.data.experimental.assert_cardinality(30)
            ),
            "30 batches",
        ),
        (
            lambda dataset: dataset.unbatch().batch(4),
            "drop_remainder=True",
        ),
        (
            lambda dataset: dataset.unbatch().batch(3, drop_remainder=True),
            "4 .*shape=.3, 6",
        ),
        (
            lambda dataset: dataset.map(lambda b: {**b, "n": tf.constant(1)}),
            "first axis",
        ),
    ],
)
def test_train_dataset_of_invalid_data_raises(change, text):
    class Mine(ToyTask):
        def train_dataset(self, context, step):
            return change(super().train_dataset(context, step))

    context = tf.distribute.InputContext(num_replicas_in_sync=2)
    check_raises(
        lambda: task_lib.train_dataset(Mine(), context, 0),
        f"Mine.train_dataset`.*{text}",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_train_on_data_that_end_raises(replicas):
    def train_dataset(self, context, step):
        return ToyTask.train_dataset(self, context, step).take(6)

    trainer = trainer_of(replicas, train_dataset=train_dataset)
    text = check_raises(lambda: trainer.train(20), "Mine.train_dataset`.*end")
    assert "after step" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda dataset: [1, 2], "tf.data.Dataset"),
        (lambda dataset: dataset.unbatch().batch(4), "static shape"),
        (
            lambda dataset: dataset.filter(lambda batch: True),
            "assert_cardinality.*Received: .*unknown",
        ),
        (
            lambda dataset: dataset.repeat(),
            "assert_cardinality.*Received: .*infinite",
        ),
        (lambda dataset: dataset.take(0), "Received: .* 0 batches"),
        (
            lambda dataset: dataset.take(3),
            "2 replicas.*Received: .* 3 batches",
        ),
    ],
)
def test_eval_dataset_of_invalid_data_raises(change, text):
    class Mine(ToyTask):
        def eval_dataset(self, context):
            return change(super().eval_dataset(context))

    context = tf.distribute.InputContext(num_replicas_in_sync=2)
    check_raises(
        lambda: task_lib.eval_dataset(Mine(), context),
        f"Mine.eval_dataset`.*{text}",
    )


@pytest.mark.parametrize(
    ("hosts", "replicas", "expected"), [(1, 1, 6), (1, 2, 3), (2, 4, 3)]
)
def test_eval_dataset_counts_batches_for_each_replica(
    hosts, replicas, expected
):
    class Mine(ToyTask):
        def eval_dataset(self, context):
            return tf.data.Dataset.range(6).batch(1, drop_remainder=True)

    context = tf.distribute.InputContext(hosts, 0, replicas)
    dataset, batches = task_lib.eval_dataset(Mine(), context)
    assert batches == expected
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY


def test_check_eval_batches_that_differ_between_hosts_raises():
    assert task_lib.check_eval_batches(ToyTask(), [3, 3]) == 3
    check_raises(
        lambda: task_lib.check_eval_batches(ToyTask(), [3, 4]),
        r"every host.*Received: \[3, 4\]",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluate_with_fewer_batches_than_announced_raises(replicas):
    def eval_dataset(self, context):
        dataset = ToyTask.eval_dataset(self, context)
        return dataset.filter(lambda batch: True).apply(
            tf.data.experimental.assert_cardinality(20)
        )

    trainer = trainer_of(replicas, eval_dataset=eval_dataset)
    check_raises(trainer.evaluate, "Mine.eval_dataset`.*cardinality")


PAIR = (tf.constant(1.0), tf.constant(2.0))
METRICS = [
    (None, "'loss'.*None of type"),
    ({"accuracy": PAIR}, r"'loss'.*Received: \['accuracy'\]"),
    ({"loss": PAIR, 3: PAIR}, "Received: 3 of type"),
    (
        {"loss": tf.constant(1.0), "accuracy": PAIR},
        "pair .*'loss'",
    ),
    (
        {"loss": PAIR, "accuracy": (tf.ones(4), tf.constant(4.0))},
        "pair .*'accuracy'",
    ),
    ({"loss": PAIR, "accuracy": (1.0,)}, "pair .*'accuracy'"),
]


@pytest.mark.parametrize(("metrics", "text"), METRICS)
def test_check_metrics_of_invalid_ones_raises(metrics, text):
    check_raises(
        lambda: task_lib.check_metrics(ToyTask(), metrics),
        f"ToyTask.compute_metrics`.*{text}",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_train_and_evaluate_with_invalid_metrics_raise(replicas):
    trainer = trainer_of(
        replicas, compute_metrics=lambda self, model, batch, training: {}
    )
    for call in (lambda: trainer.train(1), trainer.evaluate):
        check_raises(call, r"Mine.compute_metrics`.*Received: \[\]")


def test_check_metrics_of_python_numbers_returns_their_names():
    names = task_lib.check_metrics(
        ToyTask(), {"loss": (1.0, 2), "accuracy": [0, 1]}
    )
    assert names == ("accuracy", "loss")
    check_raises(
        lambda: task_lib.check_metrics(ToyTask(), {"loss": (1, 1)}, names),
        r"\['accuracy', 'loss'\]",
    )


@pytest.mark.parametrize(
    ("evaluators", "text"),
    [
        (None, "None of type NoneType"),
        ([len], "of type list"),
        ({"bleu": 27.3}, "{'bleu': 27.3} of type dict"),
        ({3: len}, "of type dict"),
    ],
)
def test_check_evaluators_of_invalid_ones_raises(evaluators, text):
    check_raises(
        lambda: task_lib.check_evaluators(ToyTask(), evaluators),
        f"ToyTask.evaluators`.*{text}",
    )


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        (27.3, "Received: 27.3 of type float"),
        ({3: 1.0}, "Received: 3 of type int"),
        ({"bleu": b"27.3"}, "b'27.3' of type bytes for 'bleu'"),
        ({"bleu": None}, "None of type NoneType for 'bleu'"),
        ({"loss": 1.0, "bleu": 2.0}, r": \['loss'\]$"),
        ({"loss": "nats"}, r": \['loss'\]$"),
    ],
)
def test_check_evaluator_results_of_invalid_ones_raises(figures, text):
    check_raises(
        lambda: task_lib.check_evaluator_results(
            ToyTask(), "bleu", figures, {"loss"}
        ),
        rf"ToyTask.evaluators\(\)\['bleu'\]`.*{text}",
    )


def test_check_evaluator_results_of_arrays_returns_python_values():
    metrics, texts = task_lib.check_evaluator_results(
        ToyTask(),
        "a",
        {
            "x": np.float32(0.5),
            "y": tf.constant(2),
            "s": "27.3",
            "t": np.str_("nrefs:1"),
        },
        (),
    )
    assert metrics == {"x": 0.5, "y": 2.0}
    assert all(type(value) is float for value in metrics.values())
    # Strings are texts, even those that look like numbers.
    assert texts == {"s": "27.3", "t": "nrefs:1"}
    assert all(type(value) is str for value in texts.values())


def test_check_serving_of_no_module_raises():
    task = ToyTask()
    task_lib.check_serving(task, task.serving(task.build_model()))
    check_raises(
        lambda: task_lib.check_serving(task, len),
        "ToyTask.serving`.*tf.Module",
    )
    check_raises(
        lambda: task_lib.check_serving(task, tf.Module()),
        "ToyTask.serving`.*`signatures`",
    )


def test_train_with_a_bug_in_the_task_raises_no_reported_error():
    def compute_metrics(self, model, batch, training):
        raise ValueError("mine")

    # Of a layer, too.
    wrong = tf.ones((8, 5))
    for method in (
        compute_metrics,
        lambda self, model, batch, training: model(wrong),
    ):
        with pytest.raises(ValueError, match="in user code") as error:
            trainer_of(compute_metrics=method).train(1)
        assert not isinstance(error.value, ReportedError)
    assert issubclass(TaskError, UsageError)
