"""A task of the experiments that takes a second to train."""

import functools
import os
import time

import keras
import numpy as np
import tensorflow as tf

from sos.experiments import ExperimentTask
from sos.experiments.config import run_name
from sos.experiments.image_classification import classification_metrics
from sos.experiments.launchers import LocalLauncher, TrainerCache
from sos.experiments.runs import run
from sos.training import inputs

CONFIG = {"task": "tests.support.toy_experiment:ToyExperiment"}
MAGNITUDE = {
    "technique": "MagnitudePruning",
    "sparsity": 0.8,
    "end_step": 8,
    "frequency": 2,
}
TECHNIQUES = {
    "dense": {"technique": None},
    "magnitude": MAGNITUDE,
    "random": {
        "technique": "RandomPruning",
        "sparsity": 0.5,
        "end_step": 8,
        "frequency": 2,
    },
    "variational_dropout": {
        "technique": "VariationalDropout",
        "penalty_weight": 0.01,
        "initial_log_sigma2": -2.0,
    },
    "l0": {"technique": "L0Regularization", "penalty_weight": 0.01},
}
# Those of which tests have finished runs: without a technique, with masks,
# with noise and a penalty.
TRAINED = ("dense", "magnitude", "variational_dropout")
# The environment variable with the files that `Broken` waits for.
BROKEN_AFTER = "SOS_TEST_BROKEN_AFTER"


def after_seconds(seconds):
    """Makes a data set hand out each batch after so many seconds."""

    def sleep():
        time.sleep(seconds)
        return np.int64(0)

    def late(batch):
        with tf.control_dependencies([tf.numpy_function(sleep, [], tf.int64)]):
            return tf.nest.map_structure(tf.identity, batch)

    return lambda dataset: dataset.map(late)


class SerialLauncher:
    """A `LocalLauncher` that trains in this process, one run after another."""

    def __init__(self, workers=None):
        self.workers = LocalLauncher(workers).workers

    def launch(self, configs, workdir, *, progress, stop=None, **options):
        trainers = TrainerCache()
        for config in configs:
            name = run_name(config)
            progress.begin(name)
            result = run(
                config,
                workdir,
                make_trainer=trainers,
                on_summary=[functools.partial(progress.update, name)],
                stop=stop,
                quiet=True,
                **options,
            )
            progress.finish(name, result)
        return {}


class ToyExperiment(ExperimentTask):
    """Classifies points of six coordinates into three classes."""

    runtime_entries = (
        "seed",
        "sparsity.num_examples",
        "sparsity.penalty_weight",
        "sparsity.seed",
        "sparsity.sparsity",
    )

    @classmethod
    def default_config(cls):
        config = super().default_config()
        config.batch_size = 8
        config.train_steps = 12
        config.model.units = 16
        config.optimizer.rate = 0.02
        return config

    def __init__(self, config):
        super().__init__(config)
        generator = np.random.default_rng(7)
        points = generator.normal(size=(68, 6)).astype(np.float32)
        labels = np.argmax(points[:, :3], axis=1).astype(np.int32)
        self._train = {"x": points[:48], "y": labels[:48]}
        self._eval = {"x": points[48:], "y": labels[48:]}

    def build_model(self):
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(
                    self.config.model.units, activation="relu", name="a"
                ),
                keras.layers.Dense(3, name="b"),
            ],
            name="toy",
        )
        return self.sparsify(model)

    def build_optimizer(self, model):
        return keras.optimizers.Adam(self.config.optimizer.rate)

    def train_dataset(self, context, step):
        return inputs.array_batches(
            self._train,
            seed=self.config.seed,
            batch_size=self.batch_size,
            step=step,
            context=context,
        )

    def eval_dataset(self, context):
        return inputs.array_eval_batches(
            self._eval, batch_size=10, context=context
        )

    def compute_metrics(self, model, batch, training):
        return classification_metrics(
            model(batch["x"], training=training),
            batch["y"],
            batch.get("weight"),
        )


class Slow(ToyExperiment):
    """Takes a hundredth of a second for each step, and hardly computes."""

    def train_dataset(self, context, step):
        dataset = super().train_dataset(context, step)
        return dataset.apply(after_seconds(0.01))


class Failing(ToyExperiment):
    """Fails with a loss that is not finite."""

    def compute_metrics(self, model, batch, training):
        metrics = super().compute_metrics(model, batch, training)
        loss, weight = metrics["loss"]
        return {**metrics, "loss": (loss * float("nan"), weight)}


class WithoutEvaluation(ToyExperiment):
    """Has no evaluation data."""

    eval_dataset = ExperimentTask.eval_dataset


class Broken(ToyExperiment):
    """Has a bug, which shows itself once some files are there."""

    def build_model(self):
        paths = os.environ.get(BROKEN_AFTER, "").split(os.pathsep)
        while not all(map(os.path.exists, filter(None, paths))):
            time.sleep(0.05)
        raise ZeroDivisionError("a bug")


def config(technique="dense", **overrides):
    """A config of the toy task, not resolved."""
    return {**CONFIG, "sparsity": TECHNIQUES[technique], **overrides}
