"""A study that takes seconds: few examples, few steps, the real network."""

import dataclasses

import pytest

from configs import fashion_mnist as config_file
from models import convnet
from sos.datasets import fashion_mnist
from sos.experiments import runner
from sos.experiments import runs as runs_lib

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
    config.seeds = (0,)
    config.steps = 6
    config.batch_size = 32
    for name in ("magnitude", "magnitude_dense_first", "random"):
        config[name].sparsities = (0.5, 0.9)
    for name in ("variational_dropout", "l0"):
        config[name].penalties = (0.1, 1.0)
    return config


@pytest.fixture
def expand():
    """Makes the runs of a config."""

    return lambda config: runs_lib.expand(config, train_examples=TRAIN)


@pytest.fixture
def make_runner(data):
    """Makes a runner for the shape of a run."""
    return lambda run, **options: runner.Runner(
        run, data, convnet.build, **options
    )
