"""The base class of the tasks of experiments."""

import keras
import numpy as np
import pytest

from sos.errors import UsageError
from sos.experiments import ExperimentTask
from sos.experiments import config as config_lib
from sos.training.optimizers import technique_variables


class Line(ExperimentTask):
    """A dense layer."""

    @classmethod
    def default_config(cls):
        config = super().default_config()
        config.train_steps = 100
        config.batch_size = 8
        config.optimizer.name = "adam"
        config.optimizer.weight_decay = 0.5
        config.learning_rate.schedule = "constant"
        config.learning_rate.base = 0.1
        return config

    @classmethod
    def complete_config(cls, config):
        config["model"]["units"] = 3 * config["batch_size"]

    def build_model(self):
        layer = keras.layers.Dense(4, bias_initializer="ones")
        return self.sparsify(keras.Sequential([keras.Input((8,)), layer]))


def task_of(**entries):
    return Line(
        config_lib.resolve({"task": f"{__name__}:Line", **entries}),
    )


def test_weight_decay_leaves_out_vectors_and_technique_variables():
    sparsity = {"technique": "L0Regularization", "penalty_weight": 0.0}
    task = task_of(sparsity=sparsity)
    model = task.build_model()
    optimizer = task.build_optimizer(model)
    variables = model.trainable_variables
    before = [np.array(variable) for variable in variables]
    # Without gradients Adam changes nothing else.
    optimizer.apply([np.zeros_like(array) for array in before], variables)
    added = {id(variable) for variable in technique_variables(model)}
    kinds = set()
    for variable, old in zip(variables, before, strict=True):
        is_added, is_vector = id(variable) in added, old.ndim < 2
        decays = not (is_added or is_vector)
        kinds.add((is_added, is_vector))
        expected = old * (1 - 0.1 * 0.5) if decays else old
        np.testing.assert_allclose(variable, expected, rtol=1e-6)
    assert kinds == {(False, False), (False, True), (True, False)}


def test_technique_variables_have_a_learning_rate_of_their_own():
    sparsity = {"technique": "L0Regularization", "penalty_weight": 0.0}
    updates = []
    for multiplier in ({}, {"technique_multiplier": 7.0}):
        task = task_of(
            sparsity=sparsity,
            optimizer={"name": "sgd", "weight_decay": None},
            learning_rate=multiplier,
        )
        model = task.build_model()
        before = [np.array(v) for v in technique_variables(model)]
        optimizer = task.build_optimizer(model)
        variables = model.trainable_variables
        optimizer.apply([np.ones(v.shape) for v in variables], variables)
        after = [np.array(v) for v in technique_variables(model)]
        updates.append(np.subtract(after, before))
    np.testing.assert_allclose(updates[0], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates[1], -0.7, rtol=1e-4)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"optimizer": {"name": "best"}}, "`config.optimizer`: .*best"),
        (
            {"learning_rate": {"schedule": "zigzag"}},
            "`config.learning_rate`: .*zigzag",
        ),
        (
            {"learning_rate": {"schedule": "cosine", "warmup_steps": 100}},
            "`config.learning_rate`: `warmup_steps` must be less",
        ),
    ],
)
def test_errors_of_the_optimizer_name_the_entry(entries, message):
    task = task_of(**entries)
    with pytest.raises(UsageError, match=message):
        task.build_optimizer(task.build_model())


def test_completed_entries_are_part_of_the_name():
    first, second = (task_of(batch_size=size).config for size in (8, 16))
    assert (first.model.units, second.model.units) == (24, 48)
    assert config_lib.fingerprint(second)["model.units"] == 48
