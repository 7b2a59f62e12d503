"""Finished runs to draw, as if they had been trained."""

import pytest

from configs import fashion_mnist
from sos.experiments import sweeps
from tests.support.figures import weights
from tests.support.results import make_run


@pytest.fixture(scope="package")
def runs():
    """Two seeds; penalties of 0.1 and 1 lead to 60 and 94 % or so."""
    config = fashion_mnist.get_config()
    grid = fashion_mnist.make_sweep(
        config,
        seeds=(0, 1),
        sparsities=(0.5, 0.9),
        variational_dropout=(0.1, 1.0),
        l0=(0.1, 1.0),
    )
    found = []
    for expanded in sweeps.expand(config, grid):
        seed, wanted = expanded.seed, expanded.sparsity
        sparsity = wanted.get("sparsity", 0.0)
        if "penalty_weight" in wanted:
            small = wanted.penalty_weight < 0.5 / 6000
            sparsity = (0.6 if small else 0.94) + 0.02 * seed
        layers = (sparsity, sparsity, sparsity)
        if wanted.technique == "L0Regularization":
            layers = (0.2 + 0.1 * seed, 1.0, 0.5)
        found.append(
            make_run(
                expanded,
                sparsity=sparsity if wanted.technique else None,
                accuracy=0.88 - 0.1 * sparsity + 0.02 * seed,
                weights=weights(layers),
            )
        )
    return found
