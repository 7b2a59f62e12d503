"""The task of ImageNet, on photographs and drawings in the same format."""

import json
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
import sos.export
from configs import imagenet_small
from models import imagenet, resnet
from sos.datasets import imagenet as images
from sos.errors import UsageError
from sos.experiments import config as config_lib
from sos.training import make_strategy, tpu_check
from sos.training.trainer import Trainer
from tests.support import photographs, processes

CLASSES = 7
EVAL_EXAMPLES = 23
WIDTH = 0.25
SIZE = 32


def _examples(count):
    """Pairs of a JPEG and a label: photographs and drawings in turn."""
    names = photographs.NAMES
    examples = []
    for number in range(count):
        if number % 2:
            pixels = photographs.drawing(number % CLASSES, CLASSES)
        else:
            name = names[number // 2 % len(names)]
            pixels = photographs.photograph(name, 60, 48)
        examples.append((photographs.encode(pixels), number % CLASSES))
    return examples


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A data directory with two data sets."""
    path = tmp_path_factory.mktemp("data")
    train, held_out = _examples(40), _examples(EVAL_EXAMPLES)
    photographs.write_dataset(
        path,
        {
            "train": [train[:20], train[20:]],
            # Files that hosts or batches do not divide evenly.
            "validation": [held_out[:5], [], held_out[5:]],
        },
        classes=CLASSES,
    )
    ten = [[photographs.encode(photographs.drawing(i)), i] for i in range(10)]
    photographs.write_dataset(path, {"train": [ten], "test": [ten]}, name="ten")
    return path


@pytest.fixture
def make_task(directory):
    """Makes a task of a technique on the small data set."""

    def make(arg="", policy="float32", **overrides):
        config = imagenet_small.get_config(arg)
        config.model.width = WIDTH
        config.batch_size = 8
        config.data.name = "small"
        config.data.directory = str(directory)
        config.data.image_size = SIZE
        config.dtype_policy = policy
        config.update(overrides)
        keras.config.set_dtype_policy(policy)
        return imagenet.ImageNet(config_lib.resolve(config))

    yield make
    keras.config.set_dtype_policy("float32")


# The recipe.


def test_default_config_is_the_published_recipe():
    config = imagenet.ImageNet.default_config()
    config.data.name = "synthetic"
    config.data.image_size = 64
    config.model.width = 0.25
    task = imagenet.ImageNet(config_lib.resolve(config))
    optimizer = task.build_optimizer(task.build_model())
    assert type(optimizer) is keras.optimizers.SGD
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert not optimizer.weight_decay
    assert config.batch_size * config.train_steps / 1_281_167 == pytest.approx(
        102.3, abs=0.05
    )
    epoch = 1_281_167 / 1024
    rates = []
    for epochs in (2.5, 6, 29, 31, 61, 81):
        optimizer.iterations.assign(int(epochs * epoch))
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(
        rates, [0.2, 0.4, 0.4, 0.04, 0.004, 0.0004], rtol=1e-3
    )


def test_loss_has_smoothed_labels_and_l2(make_task):
    task = make_task("dense")
    model = task.build_model()
    # One drop of penalty for each kernel.
    assert len(model.losses) == 22
    batch = next(iter(task.train_dataset(tf.distribute.InputContext(), 0)))
    assert batch["image"].dtype == tf.uint8
    metrics = task.compute_metrics(model, batch, training=False)
    logits = np.asarray(model(batch["image"], training=False), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.eye(CLASSES)[batch["label"]] * 0.9 + 0.1 / CLASSES
    loss, weight = metrics["loss"]
    assert float(weight) == 8
    assert float(loss) == pytest.approx(-(target * logs).sum(), rel=1e-5)


# Evaluation.


@pytest.fixture(scope="module")
def answers(directory):
    """A network and its top-1 and top-5 accuracies, one image at a time."""
    model = resnet.build((SIZE, SIZE, 3), CLASSES, 0, depth=18, width=WIDTH)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if len(variable.shape) == 1:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    correct = {1: 0, 5: 0}
    for content, label in _examples(EVAL_EXAMPLES):
        image = images.decode_eval(tf.constant(content), SIZE)
        logits = np.asarray(model(image[np.newaxis], training=False))[0]
        best = np.argsort(-logits, kind="stable")
        for k in correct:
            correct[k] += label in best[:k]
    weights = [np.asarray(v) for v in model.variables]
    return weights, {k: n / EVAL_EXAMPLES for k, n in correct.items()}


@pytest.mark.parametrize("strategy", ["one_device", "mirrored"])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_every_image_is_evaluated_once(
    make_task, answers, strategy, batch_size
):
    strategy = make_strategy(strategy)
    with strategy.scope():
        task = make_task("dense", data={"eval_batch_size": batch_size})
    trainer = Trainer(task, strategy=strategy)
    weights, expected = answers
    for variable, value in zip(trainer.model.variables, weights, strict=True):
        variable.assign(value)
    metrics = trainer.evaluate().metrics
    assert metrics["accuracy"] == pytest.approx(expected[1], abs=1e-6)
    assert metrics["top_5_accuracy"] == pytest.approx(expected[5], abs=1e-6)
    assert 0 < expected[1] < expected[5] < 1


# Accelerators.


@pytest.mark.parametrize("technique", list(imagenet_small.TECHNIQUES))
def test_training_step_is_accepted_by_a_tpu(make_task, technique):
    strategy = tpu_check.deviceless_strategy(2)
    with strategy.scope():
        task = make_task(technique, policy="mixed_bfloat16")
    trainer = Trainer(task, strategy=strategy)
    data = strategy.distribute_datasets_from_function(
        lambda context: task.train_dataset(context, 0)
    )
    steps = tf.TensorSpec((), tf.int32)
    updater = None
    if trainer.steps.sparse_weights:
        updater = sos.SparsityUpdater(trainer.model, trainer.optimizer)
        updater.resume()
    function = trainer.steps.train_function.get_concrete_function(
        iter(data), steps
    )
    assert not tpu_check.violations(function)
    if updater:
        updater.pause()


# Serving.


def test_serving_module_classifies_files_and_arrays(make_task, tmp_path):
    task = make_task("magnitude")
    model = sos.strip(task.build_model())
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if len(variable.shape) == 1:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    sos.export.export_model(task.serving(model), tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    files = [content for content, _ in _examples(5)]
    by_file = served.signatures["classify_files"](files=tf.constant(files))
    inputs = tf.stack(
        [images.decode_eval(tf.constant(file), SIZE) for file in files]
    )
    logits = np.asarray(model(inputs, training=False), np.float64)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(
        by_file["probabilities"], expected, rtol=1e-4, atol=1e-6
    )
    order = np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_array_equal(by_file["class_ids"], order[:, :5])
    photograph = photographs.photograph("coffee", 60, 48)[np.newaxis]
    by_array = served.signatures["serving_default"](
        images=tf.constant(photograph)
    )
    # Lossless, so that the pixels are the same.
    png = photographs.encode(photograph[0], "PNG")
    same = served.signatures["classify_files"](files=tf.constant([png]))
    np.testing.assert_array_equal(
        by_array["probabilities"], same["probabilities"]
    )
    for none in (
        served.signatures["classify_files"](files=tf.zeros([0], tf.string)),
        served.signatures["serving_default"](
            images=tf.zeros_like(photograph[:0])
        ),
    ):
        assert none["probabilities"].shape == (0, expected.shape[1])
        assert none["class_ids"].shape == (0, 5)
    one = served.signatures["classify_files"](files=tf.constant(files[:1]))
    np.testing.assert_allclose(
        one["probabilities"], expected[:1], rtol=1e-4, atol=1e-6
    )


# Mistakes.


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"model": {"depth": 42}}, ["config.model", "depth", "42"]),
        ({"data": {"name": "flowers"}}, ["config.data", "flowers"]),
        ({"data": {"min_area": 0.0}}, ["config.data", "min_area", "0.0"]),
        ({"loss": {"label_smoothing": 1.0}}, ["label_smoothing", "1.0"]),
        ({"loss": {"l2": -1.0}}, ["l2", "-1.0"]),
    ],
)
def test_config_that_does_not_fit_raises(make_task, overrides, parts):
    with pytest.raises(UsageError) as error:
        make_task("dense", **overrides).build_model()
    for part in parts:
        assert part in str(error.value)


# Learning.


@pytest.mark.slow
def test_ten_images_are_learned_and_a_kill_changes_no_bit(directory, tmp_path):
    steps = 200
    arguments = (
        "--config=configs/imagenet_small.py:magnitude,sparsity=0.5,"
        f"begin_step=20,end_step=100,frequency=10,train_steps={steps}",
        f"--config.data.directory={directory}",
        "--config.data.name=ten",
        f"--config.data.image_size={SIZE}",
        "--config.batch_size=10",
        "--config.learning_rate.base=0.1",
        "--config.learning_rate.base_batch_size=40",
        "--cpu_replicas=2",
        "--deterministic",
        "--save_checkpoints_steps=20",
        "--steps_per_loop=5",
    )

    def start(name):
        workdir = tmp_path / name
        return processes.Program(
            "models.train",
            *arguments,
            f"--workdir={workdir}",
            log=tmp_path / f"{name}.txt",
        )

    def run_directory(name):
        (config,) = pathlib.Path(tmp_path, name).glob("*/config.json")
        return config.parent

    def saved():
        found = list(pathlib.Path(tmp_path, "killed").glob("*/config.json"))
        return found and any(
            20 < step < steps
            for step in processes.checkpoint_steps(found[0].parent)
        )

    with start("whole") as whole:
        assert whole.wait() == 0, whole.output
    result = json.loads((run_directory("whole") / "result.json").read_text())
    assert result["metrics"]["accuracy"] == 1
    with start("killed") as program:
        program.wait_until(saved)
        program.kill()
    with start("killed") as program:
        assert program.wait() == 0, program.output
    whole, killed = (
        processes.checkpoint_values(run_directory(name), steps)
        for name in ("whole", "killed")
    )
    assert not processes.differences(whole, killed)


def test_synthetic_images_need_no_files():
    config = imagenet.ImageNet.default_config()
    config.data.update(name="synthetic", image_size=SIZE)
    config.model.width = 0.25
    config.batch_size = 4
    task = imagenet.ImageNet(config_lib.resolve(config))
    batch = next(iter(task.train_dataset(tf.distribute.InputContext(), 0)))
    assert batch["image"].shape == (4, SIZE, SIZE, 3)
    assert task.source.classes == 1000
    assert task.source.train_examples == imagenet.TRAIN_EXAMPLES


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_kinds_of_layers_are_those_of_their_kernels(depth):
    config = imagenet.ImageNet.default_config()
    config.data.name = "synthetic"
    config.model.depth = depth
    config.model.width = 0.125
    made = imagenet.ImageNet(config_lib.resolve(config))
    sizes = {
        (7, 7): "first convolution",
        (3, 3): "3x3 convolution",
        (1, 1): "1x1 convolution",
    }
    network = made.build_network()
    for layer in network.layers:
        if not hasattr(layer, "kernel"):
            continue
        # The kernel of a dense layer has no height and width.
        expected = sizes.get(tuple(layer.kernel.shape[:-2]), "classifier")
        found = next(
            name
            for name, expression in made.layer_kinds
            if re.search(expression, f"{layer.name}/kernel")
        )
        assert found == expected, layer.name
