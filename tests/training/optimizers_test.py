import functools
import inspect
import json
import math

import keras
import ml_collections
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import UsageError
from sos.training import optimizers, tpu_check
from sos.training.checkpoints import canonical_path, variable_specs
from sos.training.optimizers import (
    make_optimizer,
    technique_variables,
    with_multipliers,
)
from tests.support import techniques

# Multiplied without rounding.
RATE, FACTOR = 2.0**-4, 4.0
SHAPES = {"matrix": (4, 3), "vector": (5,), "state": (4, 3)}
# The optimizers that decay weights by default.
NO_DECAY = {
    "adamw": {"weight_decay": 0.0},
    "muon": {"weight_decay": None, "adam_weight_decay": None},
}
SCHEDULE = keras.optimizers.schedules.CosineDecay


class Training:
    """Some steps of an optimizer on variables with gradients of their own.

    Args:
        factors: Learning-rate multipliers by the name of a variable.
        decayed: The names of variables with weight decay; all by default.
    """

    def __init__(
        self,
        config,
        *,
        factors=None,
        decayed=None,
        rate=RATE,
        strategy=None,
        jit_compile=False,
        names=tuple(SHAPES),
    ):
        self.strategy = strategy or tf.distribute.OneDeviceStrategy("CPU:0")
        with self.strategy.scope():
            self.variables = {
                name: keras.Variable(self.values(name), name=name)
                for name in names
            }
            self.optimizer = make_optimizer(
                config,
                learning_rate=rate,
                multipliers=[
                    (self.variables[name], factor)
                    for name, factor in (factors or {}).items()
                ],
                no_weight_decay=None
                if decayed is None
                else [v for k, v in self.variables.items() if k not in decayed],
            )
            self.optimizer.build(list(self.variables.values()))
        # Traced only where that is the point.
        self.step = (
            tf.function(self._step, jit_compile=jit_compile)
            if strategy or jit_compile
            else self._step
        )

    def values(self, name, step=None):
        """The initial value of a variable, or its gradient of a step."""
        seed = list(SHAPES).index(name) + (100 if step is None else 10 * step)
        return techniques.normal(*SHAPES[name], seed=seed)

    def gradients(self, step):
        return [tf.constant(self.values(name, step)) for name in self.variables]

    def _step(self, gradients):
        def on_replica(gradients):
            replicas = self.strategy.num_replicas_in_sync
            self.optimizer.apply(
                [g / replicas for g in gradients], list(self.variables.values())
            )

        self.strategy.run(on_replica, args=(gradients,))

    def run(self, steps=3, start=0):
        for step in range(start, start + steps):
            self.step(self.gradients(step))
        return self

    def __getitem__(self, name):
        return keras.ops.convert_to_numpy(self.variables[name])

    def state(self):
        variables = [*self.variables.values(), *self.optimizer.variables]
        return [keras.ops.convert_to_numpy(v) for v in variables]


def undecayed(name):
    return {"name": name, **NO_DECAY.get(name, {})}


def assert_same_state(training, other):
    for a, b in zip(training.state(), other.state(), strict=True):
        np.testing.assert_array_equal(a, b)


# All optimizers of Keras.


def test_names_are_all_optimizers_that_update_variables():
    found = {
        name.lower()
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value)
        and issubclass(value, keras.optimizers.Optimizer)
        and value.update_step is not keras.optimizers.Optimizer.update_step
    }
    assert found == set(optimizers.names())
    assert {"sgd", "adam", "adamw", "lamb", "muon"} <= found


@pytest.mark.parametrize("name", optimizers.names())
def test_factor_of_one_variable_equals_a_scaled_rate_of_it(name):
    """Of every optimizer: none reads the learning rate anywhere else."""
    run = functools.partial(Training, undecayed(name))
    found = run(factors={"state": FACTOR, "vector": FACTOR}).run()
    plain = run().run()
    scaled = run(rate=RATE * FACTOR).run()
    np.testing.assert_array_equal(found["matrix"], plain["matrix"])
    np.testing.assert_array_equal(found["state"], scaled["state"])
    np.testing.assert_array_equal(found["vector"], scaled["vector"])
    # Adafactor bounds the rate, but not here.
    assert (found["state"] != plain["state"]).any()


@pytest.mark.parametrize("name", optimizers.names())
def test_factors_of_one_change_no_bit(name):
    found = Training({"name": name}, factors=dict.fromkeys(SHAPES, 1.0))
    assert_same_state(found.run(), Training({"name": name}).run())


@pytest.mark.parametrize("name", optimizers.names())
def test_multipliers_change_no_name_of_a_variable(name):
    found = Training({"name": name}, factors={"state": FACTOR}).optimizer
    plain = Training({"name": name}).optimizer
    assert type(found) is not type(plain)
    assert isinstance(found, type(plain))
    assert [canonical_path(v.path) for v in found.variables] == [
        canonical_path(v.path) for v in plain.variables
    ]
    model = keras.Sequential()
    specs = variable_specs(model, found)
    assert specs == variable_specs(model, plain)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_multipliers_under_two_replicas_equal_one_device(name):
    arguments = {"config": {"name": name}, "factors": {"state": FACTOR}}
    found = Training(**arguments, strategy=techniques.two_replicas()).run()
    for a, b in zip(
        found.state(), Training(**arguments).run().state(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", optimizers.names())
def test_defaults_complete_a_config(name):
    completed = {"name": name, **optimizers.defaults(name)}
    assert json.loads(json.dumps(completed)) == completed
    assert_same_state(
        Training(completed).run(1), Training({"name": name}).run(1)
    )


# NumPy oracles.


def test_nesterov_sgd_equals_its_formula():
    config = {"name": "sgd", "momentum": 0.9, "nesterov": True}
    found = Training(config, factors={"state": 3.0}, rate=0.1).run(5)
    for name, rate in [("matrix", 0.1), ("state", 0.3)]:
        w = found.values(name).astype(np.float64)
        velocity = 0.0
        for step in range(5):
            gradient = found.values(name, step)
            velocity = 0.9 * velocity - rate * gradient
            w = w + 0.9 * velocity - rate * gradient
        np.testing.assert_allclose(found[name], w, rtol=1e-5, atol=1e-6)


def test_adam_equals_its_formula():
    config = {"name": "adam", "beta_2": 0.997, "epsilon": 1e-9}
    found = Training(config, factors={"state": 3.0}, rate=0.01).run(5)
    for name, rate in [("matrix", 0.01), ("state", 0.03)]:
        w = found.values(name).astype(np.float64)
        m = v = 0.0
        for step in range(5):
            gradient = found.values(name, step).astype(np.float64)
            m = 0.9 * m + 0.1 * gradient
            v = 0.997 * v + 0.003 * gradient**2
            correction = math.sqrt(1 - 0.997 ** (step + 1))
            correction /= 1 - 0.9 ** (step + 1)
            w = w - rate * correction * m / (np.sqrt(v) + 1e-9)
        np.testing.assert_allclose(found[name], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_weight_decay_is_not_multiplied_and_spares_excluded_variables(
    replicas,
):
    found = Training(
        {"name": "sgd", "weight_decay": 0.5},
        factors={"matrix": 3.0, "state": 3.0},
        decayed=["matrix", "vector"],
        rate=0.1,
        strategy=techniques.two_replicas() if replicas == 2 else None,
    ).run(1)
    for name, factor, decay in [
        ("matrix", 3.0, 0.5),
        ("vector", 1.0, 0.5),
        ("state", 3.0, 0.0),
    ]:
        w, gradient = found.values(name), found.values(name, 0)
        expected = w - 0.1 * decay * w - factor * 0.1 * gradient
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_no_weight_decay_of_a_variable_equals_an_optimizer_without(name):
    decay = {"weight_decay": 0.1}
    if name == "muon":
        decay["adam_weight_decay"] = 0.1
    found = Training({"name": name, **decay}, decayed=["matrix"]).run()
    plain = Training({"name": name, **decay}).run()
    without = Training({"name": name, **dict.fromkeys(decay, 0.0)}).run()
    np.testing.assert_array_equal(found["matrix"], plain["matrix"])
    np.testing.assert_array_equal(found["state"], without["state"])
    assert (plain["state"] != without["state"]).any()


@pytest.mark.parametrize(
    "clipping", [{"clipnorm": 0.5}, {"clipvalue": 0.5}, {"global_clipnorm": 1}]
)
def test_clipping_comes_before_multipliers(clipping):
    found = Training(
        {"name": "sgd", **clipping}, factors={"state": 3.0}, rate=0.1
    ).run(1)
    gradients = {name: found.values(name, 0) for name in SHAPES}
    total = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    for name, factor in [("matrix", 1.0), ("state", 3.0)]:
        gradient = gradients[name]
        if "clipvalue" in clipping:
            clipped = np.clip(gradient, -0.5, 0.5)
        elif "clipnorm" in clipping:
            clipped = gradient * 0.5 / np.linalg.norm(gradient)
        else:
            clipped = gradient / total
        expected = found.values(name) - factor * 0.1 * clipped
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_moving_averages_follow_multiplied_updates():
    found = Training(
        {
            "name": "sgd",
            "use_ema": True,
            "ema_momentum": 0.5,
            "ema_overwrite_frequency": 3,
        },
        factors={"state": 3.0},
        rate=0.1,
    ).run(3)
    for name, factor in [("matrix", 1.0), ("state", 3.0)]:
        w = found.values(name)
        average = 0.0
        for step in range(3):
            w = w - factor * 0.1 * found.values(name, step)
            average = w if step == 0 else 0.5 * average + 0.5 * w
        np.testing.assert_allclose(found[name], average, rtol=1e-5, atol=1e-6)


# Where it runs.


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_multipliers_in_a_step_compiled_by_xla_equal_those_without(name):
    arguments = {
        "config": {"name": name},
        "factors": {"state": 3.0},
        "rate": SCHEDULE(0.1, 10),
    }
    found = Training(**arguments, jit_compile=True).run()
    for a, b in zip(
        found.state(), Training(**arguments).run().state(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_multipliers_in_a_step_are_accepted_by_a_tpu(name):
    training = Training(
        {"name": name, "global_clipnorm": 1.0, "weight_decay": 0.1},
        factors={"state": 3.0},
        decayed=["matrix"],
        rate=SCHEDULE(0.1, 10),
        strategy=tpu_check.deviceless_strategy(2),
    )
    function = training.step.get_concrete_function(
        [tf.TensorSpec(SHAPES[name]) for name in training.variables]
    )
    assert not tpu_check.violations(function)


def test_multipliers_with_bfloat16_variables_keep_their_dtype():
    variable = keras.Variable(np.ones(3), dtype="bfloat16")
    optimizer = make_optimizer(
        {"name": "sgd"}, learning_rate=0.25, multipliers=[(variable, 2.0)]
    )
    optimizer.build([variable])
    optimizer.apply([tf.ones(3, tf.bfloat16)])
    assert variable.dtype == "bfloat16"
    np.testing.assert_array_equal(tf.cast(variable, "float32"), 0.5)


@pytest.mark.parametrize(
    ("saved", "restored"),
    [({}, {"state": FACTOR}), ({"state": FACTOR}, {})],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_checkpoint_of_a_plain_optimizer_is_interchangeable(
    saved, restored, replicas, tmp_path
):
    def training(factors):
        strategy = techniques.two_replicas() if replicas == 2 else None
        return Training({"name": "adam"}, factors=factors, strategy=strategy)

    first = training(saved).run()
    path = tf.train.Checkpoint(optimizer=first.optimizer).write(
        str(tmp_path / "checkpoint")
    )
    second = training(restored)
    status = tf.train.Checkpoint(optimizer=second.optimizer).read(path)
    status.assert_consumed()
    for a, b in zip(
        first.optimizer.variables, second.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_training_restored_from_a_checkpoint_goes_on_exactly(tmp_path):
    def training():
        return Training({"name": "adamw"}, factors={"state": 3.0})

    def checkpoint(training):
        return tf.train.Checkpoint(
            optimizer=training.optimizer,
            variables=list(training.variables.values()),
        )

    whole = training().run(6)
    first = training().run(3)
    path = checkpoint(first).write(str(tmp_path / "checkpoint"))
    second = training()
    checkpoint(second).read(path).assert_consumed()
    assert_same_state(second.run(3, start=3), whole)


def test_model_fitted_with_multipliers_trains_and_has_no_optimizer_config():
    model = techniques.mlp("L0Regularization")
    state = technique_variables(model)
    before = [keras.ops.convert_to_numpy(v) for v in state]
    optimizer = make_optimizer(
        {"name": "adam", "epsilon": 1e-12},
        learning_rate=0.01,
        multipliers=[(v, 10.0) for v in state],
    )
    model.compile(optimizer, "mse")
    model.fit(
        *techniques.batch(),
        epochs=1,
        verbose=0,
        callbacks=[sos.SparsityCallback()],
    )
    for variable, old in zip(state, before, strict=True):
        # The first step of Adam is the learning rate.
        change = np.abs(keras.ops.convert_to_numpy(variable) - old)
        np.testing.assert_allclose(change, 0.1, rtol=1e-2)
    with pytest.raises(UsageError, match="save_weights"):
        optimizer.get_config()


def test_with_multipliers_takes_an_optimizer_of_the_user():
    class SignDescent(keras.optimizers.Optimizer):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, learning_rate * tf.sign(gradient))

    variable = keras.Variable([1.0, 2.0])
    scaled = with_multipliers(SignDescent)
    assert scaled is with_multipliers(SignDescent)
    optimizer = scaled(learning_rate=0.25, multipliers=[(variable, 2.0)])
    optimizer.apply([tf.constant([3.0, -3.0])], [variable])
    np.testing.assert_array_equal(variable, [0.5, 2.5])


# Configs.


def test_make_optimizer_without_multipliers_returns_the_class_of_keras():
    for multipliers in (None, []):
        optimizer = make_optimizer(
            {"name": "AdamW"}, learning_rate=1, multipliers=multipliers
        )
        assert type(optimizer) is keras.optimizers.AdamW
        assert float(optimizer.learning_rate) == 1.0
        assert not optimizer.built


@pytest.mark.parametrize(
    "make", [dict, ml_collections.ConfigDict, ml_collections.FrozenConfigDict]
)
def test_make_optimizer_takes_any_mapping(make):
    config = make({"name": "muon", "exclude_layers": ["head"], "ns_steps": 3})
    optimizer = make_optimizer(config, learning_rate=0.1)
    assert list(optimizer.exclude_layers) == ["head"]
    assert optimizer.ns_steps == 3


def test_make_optimizer_uses_the_schedule():
    schedule = SCHEDULE(0.5, 10)
    optimizer = make_optimizer({"name": "sgd"}, learning_rate=schedule)
    optimizer.iterations.assign(5)
    assert float(optimizer.learning_rate) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["name=None", "'adamw'", "'sgd'"]),
        ({"name": "lossscaleoptimizer"}, ["'lossscaleoptimizer'", "'adam'"]),
        ({"name": ["sgd"]}, ["name=['sgd']"]),
        ("sgd", ["'sgd' of type str"]),
        ({"name": "sgd", "beta_1": 0.9}, ["'beta_1'", "'momentum'"]),
        (
            {"name": "sgd", "learning_rate": 0.1},
            ["'learning_rate'", "its own config"],
        ),
        ({"name": "sgd", "momentum": 2.0}, ["'sgd'", "`momentum`"]),
        ({"name": "sgd", "clipnorm": 1, "clipvalue": 1}, ["Only one of"]),
    ],
)
def test_make_optimizer_of_an_invalid_config_raises(config, words):
    with pytest.raises(UsageError) as error:
        make_optimizer(config, learning_rate=0.1)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, True, "2"])
def test_make_optimizer_of_an_invalid_multiplier_raises(factor):
    variable = keras.Variable(1.0, name="scale")
    with pytest.raises(UsageError, match="'scale'"):
        make_optimizer(
            {"name": "sgd"},
            learning_rate=0.1,
            multipliers=[(variable, factor)],
        )


def test_make_optimizer_of_two_multipliers_of_a_variable_raises():
    variable = keras.Variable(1.0, name="scale")
    with pytest.raises(UsageError, match="'scale'"):
        make_optimizer(
            {"name": "sgd"},
            learning_rate=0.1,
            multipliers=[(variable, 2.0), (variable, 3.0)],
        )


def test_multiplier_of_an_untrained_variable_raises_when_built():
    trained, other = keras.Variable(1.0), keras.Variable(1.0, name="other")
    optimizer = make_optimizer(
        {"name": "sgd"}, learning_rate=0.1, multipliers=[(other, 2.0)]
    )
    with pytest.raises(UsageError, match="'other'"):
        optimizer.build([trained])


@pytest.mark.parametrize(
    "optimizer_class",
    [
        keras.optimizers.LossScaleOptimizer,
        keras.optimizers.MultiOptimizer,
        keras.optimizers.Optimizer,
    ],
)
def test_with_multipliers_of_a_wrapper_of_optimizers_raises(optimizer_class):
    with pytest.raises(UsageError, match="optimizer"):
        with_multipliers(optimizer_class)


# Techniques.


@pytest.mark.parametrize("technique", techniques.NAMES)
def test_technique_variables_are_those_that_a_dense_model_lacks(technique):
    model = techniques.mlp(technique)
    found = technique_variables(model)
    dense = [
        variable
        for wrapper in sos.wrappers.base.find_wrappers(model)
        for variable in (wrapper.layer.kernel, wrapper.layer.bias)
    ]
    assert sorted(id(v) for v in [*found, *dense]) == sorted(
        id(v) for v in model.trainable_variables
    )
    if technique in ("L0Regularization", "VariationalDropout"):
        assert [v.shape for v in found] == [(6, 8), (8, 2)]


def test_technique_variables_of_a_dense_model_are_none():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert technique_variables(model) == []
