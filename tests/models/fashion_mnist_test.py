import numpy as np
import pytest
import tensorflow as tf

from configs import fashion_mnist as config_file
from models.fashion_mnist import FashionMnist
from sos.errors import UsageError
from sos.experiments import config as config_lib
from sos.experiments.image_classification import classification_metrics


def task(arg="", **overrides):
    config = config_file.get_config(arg)
    config.update(overrides)
    return FashionMnist(config_lib.resolve(config))


@pytest.mark.parametrize("technique", list(config_file.TECHNIQUES))
def test_fashion_mnist_every_technique_builds(technique):
    made = task(technique)
    model = made.build_model()
    assert model.count_params() >= 155_786
    optimizer = made.build_optimizer(model)
    assert optimizer.built
    assert made.batch_size == 128


def test_fashion_mnist_rules_leave_the_first_layer_dense():
    model = task("magnitude_dense_first").build_model()
    paths = [v.path for v in model.variables if "mask" in v.path]
    assert len(paths) == 4
    assert not any("conv1" in path for path in paths)


def test_fashion_mnist_technique_variables_learn_at_their_own_rate():
    made = task("l0")
    model = made.build_model()
    optimizer = made.build_optimizer(model)
    before = {v.path: v.numpy() for v in model.trainable_variables}
    ones = [tf.ones(v.shape) for v in model.trainable_variables]
    optimizer.apply(ones, model.trainable_variables)
    moved = {
        v.path: float(np.abs(v.numpy() - before[v.path]).mean())
        for v in model.trainable_variables
    }
    gates = [value for path, value in moved.items() if "log_alpha" in path]
    weights = [v for path, v in moved.items() if path.endswith("kernel")]
    assert len(gates) == 5
    np.testing.assert_allclose(gates, 10 * np.mean(weights), rtol=1e-3)


def test_fashion_mnist_residual_network_builds():
    made = task(model={"name": "residual", "synchronized_batch_norm": True})
    assert made.build_model().name == "residual"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"model": {"name": "vgg"}}, ["config.model.name", "convnet", "vgg"]),
        ({"model": {"depth": 3}}, ["config.model", "depth"]),
        (
            {"model": {"synchronized_batch_norm": True}},
            ["convnet", "synchronise"],
        ),
        ({"data": {"name": "mnist"}}, ["config.data.name", "mnist"]),
        ({"batch_size": 6001}, ["config.batch_size", "6000", "6001"]),
        ({"optimizer": {"name": "best"}}, ["best"]),
        ({"learning_rate": {"schedule": "best"}}, ["best"]),
        ({"sparsity": {"rules": (("^x", None),)}}, ["config.sparsity", "^x"]),
    ],
)
def test_fashion_mnist_config_that_does_not_fit_raises(overrides, parts):
    config = config_file.get_config("magnitude")
    with config.unlocked():
        config.update(overrides)
    with pytest.raises(UsageError) as error:
        made = FashionMnist(config_lib.resolve(config))
        made.build_optimizer(made.build_model())
    for part in parts:
        assert part in str(error.value)


def test_fashion_mnist_batches_have_every_test_image_once():
    made = task()
    context = tf.distribute.InputContext(num_replicas_in_sync=3)
    labels, weights = [], []
    for batch in made.eval_dataset(context):
        labels.append(batch["label"].numpy())
        weights.append(batch["weight"].numpy())
    weights = np.concatenate(weights)
    assert weights.sum() == 4000
    counts = np.bincount(np.concatenate(labels)[weights > 0])
    assert counts.sum() == 4000


def test_classification_metrics_are_sums_and_weights():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 2, 1, 1, 0], np.int32)
    weights = np.array([1, 1, 0, 2, 1], np.float32)
    exp = np.exp(logits.astype(np.float64))
    log_p = np.log(exp / exp.sum(1, keepdims=True))[np.arange(5), labels]
    right = logits.argmax(1) == labels
    metrics = classification_metrics(logits, labels, weights)
    np.testing.assert_allclose(metrics["loss"], [-(weights * log_p).sum(), 5])
    np.testing.assert_allclose(
        metrics["accuracy"], [(weights * right).sum(), 5]
    )
    metrics = classification_metrics(
        tf.cast(logits, tf.bfloat16), tf.constant(labels)
    )
    np.testing.assert_allclose(metrics["loss"], [-log_p.sum(), 5], rtol=1e-2)
