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
    with pytest.raises(NotImplementedError, match="Task must override"):
        call(Task())


def test_task_has_no_evaluation_by_default():
    assert not Task().has_evaluation
    assert ToyTask().has_evaluation
    assert dict(Task().evaluators()) == {}
    assert Task().initialize(None) is None


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
            "Mine.build_model` must return a Keras 3 m.*: None of type NoneT",
        ),
        (keras.layers.Dense(1), "must return a Keras 3 model.*type Dense"),
        (
            keras.Sequential([keras.layers.Dense(1)], name="mine"),
            "that is built.*'mine', which is not built",
        ),
    ],
)
def test_trainer_of_an_invalid_model_raises(model, text):
    check_raises(lambda: trainer_of(build_model=lambda self: model), text)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_trainer_of_an_invalid_optimizer_raises(optimizer):
    check_raises(
        lambda: trainer_of(build_optimizer=lambda self, model: optimizer),
        "Mine.build_optimizer` must return a Keras 3 optimizer.*: "
        f"{optimizer!r} of type",
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
def test_check_configuration_of_invalid_ones_raises(configuration, text):
    check_raises(
        lambda: task_lib.check_configuration(ToyTask(), configuration),
        f"ToyTask.configuration` must .*{text}",
    )


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
def test_train_dataset_of_invalid_data_raises(change, text):
    class Mine(ToyTask):
        def train_dataset(self, context, step):
            return change(super().train_dataset(context, step))

    context = tf.distribute.InputContext(num_replicas_in_sync=2)
    check_raises(
        lambda: task_lib.train_dataset(Mine(), context, 0),
        f"Mine.train_dataset` must .*{text}",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_train_on_data_that_end_raises(replicas):
    def train_dataset(self, context, step):
        return ToyTask.train_dataset(self, context, step).take(6)

    trainer = trainer_of(replicas, train_dataset=train_dataset)
    text = check_raises(
        lambda: trainer.train(20), "Mine.train_dataset` must .*end"
    )
    assert "after step" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda dataset: [1, 2], "return a tf.data.Dataset"),
        (lambda dataset: dataset.unbatch().batch(4), "static shape"),
        (
            lambda dataset: dataset.filter(lambda batch: True),
            "assert_cardinality.*Received: a data set of unknown cardinality",
        ),
        (
            lambda dataset: dataset.repeat(),
            "assert_cardinality.*Received: an infinite data set",
        ),
        (lambda dataset: dataset.take(0), "one batch.*a data set of 0 batches"),
        (
            lambda dataset: dataset.take(3),
            "each of the 2 replicas of a host.*a data set of 3 batches",
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
        f"Mine.eval_dataset` must .*{text}",
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
        r"same number of batches on every host.*Received: \[3, 4\] batches",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluate_with_fewer_batches_than_announced_raises(replicas):
    def eval_dataset(self, context):
        dataset = ToyTask.eval_dataset(self, context)
        return dataset.filter(lambda batch: True).apply(
            tf.data.experimental.assert_cardinality(20)
        )

    trainer = trainer_of(replicas, eval_dataset=eval_dataset)
    check_raises(trainer.evaluate, "as many batches as its cardinality")


PAIR = (tf.constant(1.0), tf.constant(2.0))
METRICS = [
    (None, "a dictionary of metrics by name, with 'loss'.*None of type"),
    ({"accuracy": PAIR}, r"with 'loss' among them. Received: \['accuracy'\]"),
    ({"loss": PAIR, 3: PAIR}, "return metrics by name. Received: 3 of type"),
    (
        {"loss": tf.constant(1.0), "accuracy": PAIR},
        "return a pair of scalars for 'loss': the sum over",
    ),
    (
        {"loss": PAIR, "accuracy": (tf.ones(4), tf.constant(4.0))},
        "return a pair of scalars for 'accuracy'",
    ),
    ({"loss": PAIR, "accuracy": (1.0,)}, "a pair of scalars for 'accuracy'"),
]


@pytest.mark.parametrize(("metrics", "text"), METRICS)
def test_check_metrics_of_invalid_ones_raises(metrics, text):
    check_raises(
        lambda: task_lib.check_metrics(ToyTask(), metrics),
        f"ToyTask.compute_metrics` must .*{text}",
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_train_and_evaluate_with_invalid_metrics_raise(replicas):
    trainer = trainer_of(
        replicas, compute_metrics=lambda self, model, batch, training: {}
    )
    for call in (lambda: trainer.train(1), trainer.evaluate):
        check_raises(call, r"Mine.compute_metrics` must .*Received: \[\]")


def test_check_metrics_of_python_numbers_returns_their_names():
    names = task_lib.check_metrics(
        ToyTask(), {"loss": (1.0, 2), "accuracy": [0, 1]}
    )
    assert names == ("accuracy", "loss")
    check_raises(
        lambda: task_lib.check_metrics(ToyTask(), {"loss": (1, 1)}, names),
        r"always return the same metrics, \['accuracy', 'loss'\]",
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
        f"ToyTask.evaluators` must return a dictionary of callables.*{text}",
    )


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        (27.3, "a dictionary of numbers by name. Received: 27.3 of type float"),
        ({3: 1.0}, "numbers by name. Received: 3 of type int"),
        ({"bleu": "high"}, "'high' of type str for 'bleu'"),
        ({"loss": 1.0, "bleu": 2.0}, r"names that no metric.*: \['loss'\]$"),
    ],
)
def test_check_figures_of_invalid_ones_raises(figures, text):
    check_raises(
        lambda: task_lib.check_figures(
            ToyTask(), "bleu", figures, {"loss": 0.5}
        ),
        rf"ToyTask.evaluators\(\)\['bleu'\]` must return .*{text}",
    )


def test_check_figures_of_arrays_returns_python_floats():
    figures = task_lib.check_figures(
        ToyTask(), "a", {"x": np.float32(0.5), "y": tf.constant(2)}, {}
    )
    assert figures == {"x": 0.5, "y": 2.0}
    assert all(type(value) is float for value in figures.values())


def test_check_serving_of_no_module_raises():
    task = ToyTask()
    task_lib.check_serving(task, task.serving(task.build_model()))
    check_raises(
        lambda: task_lib.check_serving(task, len),
        "ToyTask.serving` must return a tf.Module",
    )
    check_raises(
        lambda: task_lib.check_serving(task, tf.Module()),
        "ToyTask.serving` must return a module with `signatures`",
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
