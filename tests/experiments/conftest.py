"""A study that takes seconds: few examples, few steps, the real network."""

import dataclasses

import pytest

from configs import fashion_mnist as config_file
from models import convnet
from sos.datasets import fashion_mnist
from sos.experiments import runs as runs_lib
from sos.experiments import training

TRAIN, TEST = 256, 100


@pytest.fixture(scope="session")
def data():
    full = fashion_mnist.load()
    return dataclasses.replace(
        full,
        x_train=full.x_train[:TRAIN],
        y_train=full.y_train[:TRAIN],
        x_test=full.x_test[:TEST],
        y_test=full.y_test[:TEST],
    )


@pytest.fixture
def config():
    """The shipped config, cut down to a few steps and runs."""
    config = config_file.get_config().lock()
    config.steps = 6
    config.batch_size = 32
    for name in ("magnitude", "random"):
        config[name].sparsities = (0.5, 0.9)
    for name in ("variational_dropout", "l0"):
        config[name].penalties = (0.1, 1.0)
    return config


@pytest.fixture
def expand():
    """Makes the runs of a config."""

    def call(config):
        return runs_lib.expand(
            config,
            model="convnet",
            dataset="fashion_mnist",
            train_examples=TRAIN,
        )

    return call


@pytest.fixture
def make_trainer(data):
    """Makes a trainer for a run."""
    return lambda run: training.Trainer(run, data, convnet.build)
