"""Finished runs of a toy task, trained once for all tests that read them."""

import shutil

import pytest

from sos.experiments import sweeps
from sos.experiments.launchers import TrainerCache
from sos.experiments.runs import run
from tests.support import toy_experiment


@pytest.fixture(scope="session")
def toy_configs():
    """Runs of some techniques, of two seeds each."""
    return sweeps.expand(
        toy_experiment.CONFIG,
        [
            {"sparsity": toy_experiment.TECHNIQUES[technique], "seed": seed}
            for technique in toy_experiment.TRAINED
            for seed in (0, 1)
        ],
    )


@pytest.fixture(scope="session")
def finished(toy_configs, tmp_path_factory):
    """The directory of these runs; read it only."""
    workdir = tmp_path_factory.mktemp("finished")
    trainers = TrainerCache()
    for config in toy_configs:
        run(config, workdir, make_trainer=trainers, quiet=True)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that directory, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")
