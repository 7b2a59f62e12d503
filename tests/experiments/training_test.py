import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from sos.experiments import training


def _numbers(outcome):
    numbers = dataclasses.asdict(outcome)
    del numbers["seconds"]
    return numbers


@pytest.fixture(
    params=["dense", "magnitude", "random", "variational_dropout", "l0"]
)
def runs(request, config, expand):
    """Two settings with two seeds each of one technique."""
    config.techniques = request.param
    config.seeds = (0, 1)
    return expand(config)


def test_a_shared_step_gives_what_a_fresh_one_gives(runs, make_trainer):
    shared = make_trainer(runs[0])
    together = {run: _numbers(shared.train(run)) for run in runs}
    again = _numbers(shared.train(runs[0]))
    assert again == together[runs[0]]
    assert shared.train_step.experimental_get_tracing_count() == 1
    assert shared.evaluation_step.experimental_get_tracing_count() == 1
    alone = make_trainer(runs[-1]).train(runs[-1])
    assert _numbers(alone) == together[runs[-1]]
    different = {tuple(numbers.items()) for numbers in together.values()}
    assert len(different) == len(runs)


def test_masks_reach_the_sparsity_of_the_run(config, expand, make_trainer):
    config.techniques = "magnitude"
    config.magnitude.sparsities = (0.9,)
    config.magnitude.end = 1.0  # The last update follows the last step.
    (run,) = expand(config)
    trainer = make_trainer(run)
    outcome = trainer.train(run)
    assert outcome.achieved_sparsity == pytest.approx(0.9, abs=1e-4)
    assert 0.89 < outcome.model_sparsity < outcome.achieved_sparsity
    kernel = next(w for w in trainer.model.weights if "conv1/kernel" in w.path)
    assert np.count_nonzero(kernel) == kernel.shape.num_elements()


def test_the_loss_falls(config, expand, make_trainer):
    config.techniques = "dense"
    config.steps = 40
    (run,) = expand(config)
    losses = []
    trainer = make_trainer(run)
    outcome = trainer.train(run, lambda step, loss: losses.append(loss))
    assert len(losses) == 40
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert outcome.train_loss == pytest.approx(np.mean(losses[-4:]))
    assert outcome.test_accuracy > 0.4


def test_the_learning_rate_falls_as_a_cosine_to_zero(
    config, expand, make_trainer
):
    config.techniques = "dense"
    (run,) = expand(config)
    trainer = make_trainer(run)
    trainer.train(run)
    optimizer = trainer.optimizer
    assert int(optimizer.iterations) == run.steps
    for fraction, factor in ((1, 0), (0, 1), (1 / 2, 1 / 2), (1 / 3, 3 / 4)):
        optimizer.iterations.assign(round(fraction * run.steps))
        found = float(optimizer.learning_rate)
        expected = factor * config.learning_rate
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_multiplier_scales_what_the_technique_adds(
    config, expand, make_trainer
):
    moved = []
    for factor in (1.0, 10.0):
        config.techniques = "l0"
        config.l0.learning_rate_multiplier = factor
        run = expand(config)[0]
        run = dataclasses.replace(run, steps=1, begin_step=0, end_step=1)
        trainer = make_trainer(run)
        trainer.train(run)
        after = [v.numpy() for v in trainer.model.trainable_variables]
        trainer._reset(run)
        moved.append(
            {
                v.path: np.abs(old - v.numpy()).max()
                for old, v in zip(
                    after, trainer.model.trainable_variables, strict=True
                )
            }
        )
    for path in moved[0]:
        factor = 10.0 if "log_alpha" in path else 1.0
        assert moved[1][path] == pytest.approx(
            factor * moved[0][path], rel=1e-2
        ), path


def test_every_epoch_sees_every_example_once(config, expand):
    run = expand(config)[0]  # 8 batches of 32 are an epoch.
    epochs = [
        np.concatenate(
            [training.batch_indices(run, 8 * e + i) for i in range(8)]
        )
        for e in range(2)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(256))
    assert (epochs[0] != epochs[1]).any()
    other = dataclasses.replace(run, seed=1)
    assert (training.batch_indices(other, 0) != epochs[0][:32]).numpy().any()


def test_a_loss_that_is_not_finite_ends_the_run(config, expand, make_trainer):
    config.techniques = "dense"
    config.learning_rate = 1e30
    config.steps = 20
    (run,) = expand(config)
    with pytest.raises(FloatingPointError, match=r"lower learning rate"):
        make_trainer(run).train(run)


def test_runs_of_another_shape_are_refused(config, expand, make_trainer):
    runs = expand(config)
    with pytest.raises(ValueError, match="shape"):
        make_trainer(runs[0]).train(runs[1])


_ALONE = """
import dataclasses, json, sys
from tests.experiments import conftest as fixtures
from models import convnet
from sos.experiments import runs, training
data = fixtures.data.__wrapped__()
run = runs.Run(**json.loads(sys.argv[1]))
outcome = training.Trainer(run, data, convnet.build).train(run)
print(json.dumps(dataclasses.asdict(outcome)))
"""


@pytest.mark.slow
def test_another_process_gives_the_same_numbers(config, expand, make_trainer):
    config.techniques = "variational_dropout"
    run = expand(config)[1]
    result = subprocess.run(
        [sys.executable, "-c", _ALONE, json.dumps(dataclasses.asdict(run))],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    alone = training.Outcome(**json.loads(result.stdout.splitlines()[-1]))
    here = make_trainer(run).train(run)
    assert _numbers(alone) == pytest.approx(_numbers(here), rel=1e-5)
