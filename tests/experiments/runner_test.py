import dataclasses
import json
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from sos.errors import NonFiniteLossError, Stopped
from sos.experiments.results import Outcome
from sos.experiments.runner import Runner


def _numbers(outcome):
    numbers = dataclasses.asdict(outcome)
    for measured in ("seconds", "peak_memory"):
        assert numbers.pop(measured) > 0
    return numbers


def _traces(runner):
    steps = runner.trainer.steps
    return [
        function.experimental_get_tracing_count()
        for function in (steps.train, steps.evaluate)
    ]


class _StopAt:
    """Asks to stop when the record of a step has come."""

    def __init__(self, step):
        self.requested = None
        self._step = step

    def __call__(self, record):
        if record.step >= self._step:
            self.requested = signal.SIGTERM


@pytest.fixture(
    params=["dense", "magnitude", "random", "variational_dropout", "l0"]
)
def runs(request, config, expand):
    """Two settings with two seeds each of one technique."""
    config.techniques = request.param
    config.seeds = (0, 1)
    return expand(config)


def test_a_shared_step_gives_what_a_fresh_one_gives(runs, make_runner):
    shared = make_runner(runs[0])
    together = {run: _numbers(shared.train(run)) for run in runs}
    again = _numbers(shared.train(runs[0]))
    assert again == together[runs[0]]
    assert _traces(shared) == [1, 1]
    alone = make_runner(runs[-1]).train(runs[-1])
    assert _numbers(alone) == together[runs[-1]]
    different = {json.dumps(numbers) for numbers in together.values()}
    assert len(different) == len(runs)


def test_a_stopped_run_goes_on_to_the_same_numbers(runs, make_runner, tmp_path):
    run = runs[-1]
    uninterrupted = _numbers(make_runner(run).train(run))
    directory = tmp_path / "checkpoints"
    stop = _StopAt(2)
    with pytest.raises(Stopped) as stopped:
        make_runner(run, steps_per_loop=2).train(
            run, checkpoints=directory, on_summary=stop, stop=stop
        )
    assert 2 <= stopped.value.step < run.steps
    assert directory.exists()
    steps = []
    outcome = make_runner(run).train(
        run,
        checkpoints=directory,
        on_summary=lambda record: steps.append(record.step),
    )
    assert steps[0] > stopped.value.step
    assert steps[-1] == run.steps
    assert _numbers(outcome) == uninterrupted
    # So that nothing is lost before the outcome is written.
    again = make_runner(run).train(
        run, checkpoints=directory, on_summary=lambda record: 1 / 0
    )
    assert _numbers(again) == uninterrupted


def test_networks_may_have_random_layers(config, expand, data):
    """Keras counts their generators through all of a process."""

    def build(input_shape, classes, seed):
        return keras.Sequential(
            [
                keras.Input(input_shape),
                keras.layers.Flatten(name="flat"),
                keras.layers.Dropout(0.2, seed=seed, name="drop"),
                keras.layers.Dense(
                    classes,
                    kernel_initializer=keras.initializers.HeNormal(seed=seed),
                    name="logits",
                ),
            ]
        )

    config.techniques = "magnitude"
    run = expand(config)[0]
    runner = Runner(run, data, build)
    assert _numbers(runner.train(run)) == _numbers(runner.train(run))


def test_networks_without_names_are_refused(config, expand, data):
    def build(input_shape, classes, seed):
        names = next(layers), next(layers)
        return keras.Sequential(
            [
                keras.Input(input_shape),
                keras.layers.Flatten(name=names[0]),
                keras.layers.Dense(classes, name=names[1]),
            ]
        )

    layers = iter("abcdef")
    config.techniques = "dense"
    (run,) = expand(config)
    with pytest.raises(ValueError, match="the same names.*/b/k.*/d/k"):
        Runner(run, data, build).train(run)


def test_masks_reach_the_sparsity_of_the_run(config, expand, make_runner):
    config.techniques = "magnitude_dense_first"
    config.magnitude_dense_first.sparsities = (0.9,)
    # The last update follows the last step.
    config.magnitude_dense_first.end = 1.0
    (run,) = expand(config)
    runner = make_runner(run)
    outcome = runner.train(run)
    assert outcome.achieved_sparsity == pytest.approx(0.9, abs=1e-4)
    assert 0.89 < outcome.model_sparsity < outcome.achieved_sparsity
    weights = {weight.path: weight for weight in outcome.weights}
    assert list(weights) == [
        f"{layer}/kernel"
        for layer in ("conv1", "conv2", "conv3", "hidden", "logits")
    ]
    assert weights["conv1/kernel"].sparsity == 0
    assert weights["hidden/kernel"].sparsity == pytest.approx(0.9, abs=1e-4)
    assert weights["hidden/kernel"].size == 4 * 4 * 64 * 128


def test_the_outcome_counts_what_was_trained(config, expand, make_runner):
    counts = {}
    for technique in ("dense", "magnitude", "l0"):
        config.techniques = technique
        run = expand(config)[0]
        counts[technique] = make_runner(run).train(run).parameters_trained
    assert counts["dense"] == counts["magnitude"] == 155_786
    # A gate for every weight but the biases.
    assert counts["l0"] == 155_786 + 155_786 - (16 + 32 + 64 + 128 + 10)


def test_the_loss_falls(config, expand, make_runner):
    config.techniques = "dense"
    config.steps = 40
    (run,) = expand(config)
    records = []
    outcome = make_runner(run).train(run, on_summary=records.append)
    steps = np.diff([0, *(record.step for record in records)])
    losses = [record.metrics["loss"] for record in records]
    assert steps.sum() == 40
    assert losses[-1] < 0.6 * losses[0]
    assert outcome.test_accuracy > 0.4


def test_the_learning_rate_falls_as_a_cosine_to_zero(
    config, expand, make_runner
):
    config.techniques = "dense"
    (run,) = expand(config)
    trainer = make_runner(run).trainer
    optimizer = trainer.optimizer
    for fraction, factor in ((1, 0), (0, 1), (1 / 2, 1 / 2), (1 / 3, 3 / 4)):
        optimizer.iterations.assign(round(fraction * run.steps))
        found = float(optimizer.learning_rate)
        expected = factor * config.learning_rate
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def _moved(runner, run):
    """How far each variable went in the training of a run."""
    runner._reset(run)
    variables = runner.trainer.model.trainable_variables
    before = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    runner.train(run)
    return {
        v.path: np.abs(keras.ops.convert_to_numpy(v) - old).max()
        for v, old in zip(variables, before, strict=True)
    }


def test_the_multiplier_scales_what_the_technique_adds(
    config, expand, make_runner
):
    moved = []
    for factor in (1.0, 10.0):
        config.techniques = "l0"
        config.l0.learning_rate_multiplier = factor
        run = expand(config)[0]
        run = dataclasses.replace(run, steps=1, begin_step=0, end_step=1)
        moved.append(_moved(make_runner(run), run))
    for path in moved[0]:
        factor = 10.0 if "log_alpha" in path else 1.0
        assert moved[1][path] == pytest.approx(
            factor * moved[0][path], rel=1e-2
        ), path


def test_weight_decay_is_for_weights_alone(config, expand, make_runner):
    config.techniques = "l0"
    config.steps = 1
    config.l0.end = 1.0
    moved = []
    for weight_decay in (0.0, 50.0):
        config.weight_decay = weight_decay
        run = expand(config)[0]
        moved.append(_moved(make_runner(run), run))
    for path in moved[0]:
        decayed = moved[1][path] > 1.2 * moved[0][path]
        assert decayed == path.endswith("/kernel"), path


def test_a_loss_that_is_not_finite_ends_the_run(config, expand, make_runner):
    config.techniques = "dense"
    config.learning_rate = 1e30
    config.steps = 20
    (run,) = expand(config)
    with pytest.raises(NonFiniteLossError, match=r"lower learning rate"):
        make_runner(run).train(run)


def test_runs_of_another_shape_are_refused(config, expand, make_runner):
    runs = expand(config)
    with pytest.raises(ValueError, match="shape"):
        make_runner(runs[0]).train(runs[1])


_ALONE = """
import dataclasses, json, sys
from tests.experiments import conftest as fixtures
from models import convnet
from sos.experiments import runner, runs
data = fixtures.data.__wrapped__()
run = runs.Run(**json.loads(sys.argv[1]))
outcome = runner.Runner(run, data, convnet.build).train(run)
print(json.dumps(dataclasses.asdict(outcome)))
"""


@pytest.mark.slow
def test_another_process_gives_the_same_numbers(config, expand, make_runner):
    config.techniques = "variational_dropout"
    run = expand(config)[1]
    result = subprocess.run(
        [sys.executable, "-c", _ALONE, json.dumps(run.identity())],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    alone = Outcome(**json.loads(result.stdout.splitlines()[-1]))
    here = make_runner(run).train(run)
    for name in ("test_loss", "achieved_sparsity"):
        assert getattr(alone, name) == pytest.approx(
            getattr(here, name), rel=1e-5
        )
