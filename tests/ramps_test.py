import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from sos import ramps
from sos.errors import UsageError

RAMPS = [
    ramps.ConstantRamp(),
    ramps.LinearRamp(0, 10),
    ramps.LinearRamp(5, 300),
    ramps.CubicRamp(0, 1),
    ramps.CubicRamp(5, 300),
    ramps.CubicRamp(0, 10, moving_average=True),
    ramps.CubicRamp(5, 300, moving_average=True),
    ramps.CubicRamp(0, 1, moving_average=True),
]


def ramp_oracle(ramp, last):
    """The formulas of the paper's code in float64, at steps 0 to last."""
    values, average = [], 0.0
    for t in range(last + 1):
        if isinstance(ramp, ramps.ConstantRamp):
            value = 1.0
        else:
            length = ramp.end_step - ramp.begin_step
            value = min(max(0, t - ramp.begin_step) / length, 1)
        if isinstance(ramp, ramps.CubicRamp):
            q = max(t - ramp.begin_step, 0) / length
            value = min(1 - (1 - q) ** 3, 1)
            if ramp.moving_average:
                average = 0.1 * value + 0.9 * average
                value = average
        values.append(value)
    return values


@pytest.mark.parametrize("jit_compile", [None, False, True])
@pytest.mark.parametrize("ramp", RAMPS, ids=repr)
def test_ramps_follow_their_formulas(ramp, jit_compile):
    function = ramp
    if jit_compile is not None:
        function = tf.function(ramp.__call__, jit_compile=jit_compile)
    expected = ramp_oracle(ramp, 600)
    for step in [*range(25), *range(25, 600, 23), 299, 300, 301]:
        value = function(tf.constant(step))
        assert value.dtype == tf.float32
        assert value.shape == ()
        assert float(value) == pytest.approx(expected[step], abs=3e-7)
        assert 0.0 <= float(value) <= 1.0


@pytest.mark.parametrize("ramp", RAMPS, ids=repr)
def test_ramps_end_at_one(ramp):
    for step in (10**6, 2**31 - 1, 2**40):
        value = float(ramp(tf.constant(step, tf.int64)))
        assert value == pytest.approx(1.0, abs=2e-7)
        if not getattr(ramp, "moving_average", False):
            assert value == 1.0


def test_late_and_long_ramps_keep_their_precision():
    ramp = ramps.LinearRamp(2**30, 2**30 + 100)
    assert float(ramp(2**30 + 1)) == np.float32(0.01)
    cubic = ramps.CubicRamp(0, 10**6)
    assert float(cubic(1)) == pytest.approx(3e-6, rel=1e-5)


def test_ramps_take_keras_variables_and_refuse_fractions():
    optimizer = keras.optimizers.SGD()
    ramp = ramps.LinearRamp(0, 4)
    assert float(ramp(optimizer.iterations)) == 0.0
    optimizer.iterations.assign(3)
    assert float(ramp(optimizer.iterations)) == 0.75
    with pytest.raises(TypeError, match="float32"):
        ramp(1.5)


@pytest.mark.parametrize("cls", [ramps.LinearRamp, ramps.CubicRamp])
@pytest.mark.parametrize(
    "steps", [(-1, 5), (5, 5), (5, 4), (0.9, 10.7), (0, 10.0), ("0", 10)]
)
def test_ramps_validate_their_steps(cls, steps):
    with pytest.raises(ValueError, match=f"begin_step={steps[0]}, end_step"):
        cls(*steps)


@pytest.mark.parametrize("ramp", RAMPS, ids=repr)
def test_ramps_survive_serialisation(ramp):
    assert type(ramp).from_config(ramp.get_config()) == ramp
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(ramp)))
    copy = keras.saving.deserialize_keras_object(config)
    assert copy == ramp
    assert hash(copy) == hash(ramp)


def test_ramps_are_equal_by_class_and_config():
    assert len(set(RAMPS)) == len(RAMPS)
    assert ramps.LinearRamp(0, 5) != ramps.CubicRamp(0, 5)


def test_ramp_without_a_factor_raises():
    with pytest.raises(NotImplementedError, match="must override"):
        ramps.Ramp()(0)


def test_make_ramp_of_names_and_steps_gives_their_ramps():
    steps = {"begin_step": 3, "end_step": 9}
    assert ramps.make_ramp("constant") == ramps.ConstantRamp()
    assert ramps.make_ramp("linear", **steps) == ramps.LinearRamp(3, 9)
    assert ramps.make_ramp("cubic", **steps) == ramps.CubicRamp(3, 9)
    assert ramps.make_ramp("smoothed_cubic", **steps) == ramps.CubicRamp(
        3, 9, moving_average=True
    )
    assert ramps.make_ramp("linear", end_step=9) == ramps.LinearRamp(0, 9)


def test_make_ramp_of_a_ramp_returns_it():
    ramp = ramps.LinearRamp(0, 5)
    assert ramps.make_ramp(ramp) is ramp


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"ramp": "sqrt"}, UsageError, "'constant', 'cubic', .*Received.*sqrt"),
        ({"ramp": 0.5}, TypeError, "LinearRamp.*Received: ramp=0.5"),
        ({"ramp": None}, TypeError, "'constant'.*Received: ramp=None"),
        ({"ramp": "linear"}, UsageError, "needs an `end_step`.*end_step=None"),
        ({"ramp": "constant", "end_step": 9}, UsageError, "Leave them out"),
        ({"ramp": "constant", "begin_step": 9}, UsageError, "linear, cubic"),
        (
            {"ramp": ramps.LinearRamp(0, 5), "end_step": 5},
            UsageError,
            "has its own steps",
        ),
        (
            {"ramp": "cubic", "begin_step": 9, "end_step": 3},
            UsageError,
            "0 <= begin_step < end_step.*begin_step=9, end_step=3",
        ),
        ({"ramp": "cubic", "end_step": True}, UsageError, "end_step=True"),
        ({"ramp": "cubic", "end_step": "9"}, UsageError, "end_step=9"),
    ],
)
def test_make_ramp_of_wrong_arguments_raises(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        ramps.make_ramp(**arguments)
    assert "\n" not in str(caught.value)
