"""Finished runs to draw, as if they had been trained."""

import dataclasses

import numpy as np
import pytest

from configs import fashion_mnist
from sos.experiments import sweeps
from sos.experiments.branches import branch
from sos.experiments.config import resolve
from sos.training.reporting import JsonLines, MaskUpdate, Summary
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
        branched=(),
        profiles={},
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


@pytest.fixture(scope="package")
def with_branches(runs):
    """These runs, and branches of those of magnitude pruning and L0."""
    found = list(runs)
    for run in runs:
        if run.label not in ("magnitude pruning", "L0"):
            continue
        # The longer one first, which is no reason for another style.
        for i, (name, options) in enumerate(
            (
                ("scratch", {"multiplier": 2}),
                ("scratch", {}),
                ("lottery_ticket", {}),
            )
        ):
            found.append(
                make_run(
                    resolve(branch(run.config, name, **options)),
                    parent=run,
                    sparsity=run.result.sparsity,
                    accuracy=run.result.metrics["accuracy"] - 0.01 * (i + 1),
                )
            )
    return found


@pytest.fixture(scope="package")
def stored(runs, tmp_path_factory):
    """Those of 90 % or so, with logs and masks, and a dense one."""
    workdir = tmp_path_factory.mktemp("stored")
    found = []
    for run in runs:
        if run.technique and run.result.sparsity < 0.9:
            continue
        run = dataclasses.replace(run, directory=str(workdir / run.name))
        _write_log(run)
        if run.technique:
            generator = np.random.default_rng(len(found))
            masks = {
                path: generator.random(size) < 0.1
                for path, size in (("a/kernel", 4000), ("b/kernel", 500))
            }
            np.savez(
                f"{run.directory}/masks.npz",
                **{path: mask.astype("uint8") for path, mask in masks.items()},
            )
        found.append(run)
    return found


def _write_log(run):
    """Three loops, of which the second has mask updates, and evaluations."""
    updates = ()
    if "Pruning" in (run.technique or ""):
        updates = (
            MaskUpdate(step=0, elements=100, kept=100, pruned=0, regrown=0),
            MaskUpdate(step=150, elements=100, kept=60, pruned=44, regrown=4),
            MaskUpdate(step=200, elements=100, kept=10, pruned=50, regrown=0),
        )
    log = JsonLines(f"{run.directory}/train.jsonl")
    for step in (100, 200, 700):
        metrics = {"loss": 2.0 - step / 700, "accuracy": 0.5 + step / 2000}
        sparse = run.technique is not None
        log(
            Summary(
                step=step,
                total_steps=700,
                metrics=metrics,
                sparsity=min(step / 200, 1.0) * 0.9 if sparse else None,
                mask_updates=updates if step == 200 else (),
                seconds=1.0,
            )
        )
    log(
        Summary(
            step=700, total_steps=700, kind="eval", metrics=metrics, seconds=1.0
        )
    )
    log.close()
