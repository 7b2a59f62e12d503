import json
import os
import subprocess
import sys

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

# isort: split
# After `sos.schedules`, which keeps tfmot from changing the environment.
from sos import masks, schedules
from sos.errors import UsageError

# isort: split
import tensorflow_model_optimization as tfmot
import tf_keras


@keras.saving.register_keras_serializable(package="schedules_test")
class Halving(schedules.PruningSchedule):
    """A registered schedule of a user's own, with plain config."""

    def __init__(self, begin_step, end_step, frequency=10):
        self.begin_step = begin_step
        self.end_step = end_step
        self.frequency = frequency

    def __call__(self, step):
        due = self._should_prune_in_step(
            step, self.begin_step, self.end_step, self.frequency
        )
        late = step - self.begin_step >= 20
        return due, tf.where(late, tf.constant(0.9), tf.constant(0.45))

    def get_config(self):
        return {
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "frequency": self.frequency,
        }


@keras.saving.register_keras_serializable(package="schedules_test")
class Squared(schedules.PolynomialDecay):
    """Inherits everything from tfmot, its unreadable config too."""

    def __call__(self, step):
        due, sparsity = super().__call__(step)
        return due, sparsity**2


@keras.saving.register_keras_serializable(package="schedules_test")
class OwnFromConfig(Halving):
    """Reads back what it wrote, in tfmot's nested form."""

    def get_config(self):
        return {"class_name": "OwnFromConfig", "config": super().get_config()}

    @classmethod
    def from_config(cls, config):
        return cls(**config["config"])


class Unregistered(Halving):
    pass


SCHEDULES = [
    schedules.PolynomialDecay(0.0, 0.9, 0, 100, frequency=10),
    schedules.PolynomialDecay(0.1, 0.7, 13, 200, power=2, frequency=7),
    schedules.PolynomialDecay(0.5, 0.5, 5, 6, power=1, frequency=100),
    schedules.PolynomialDecay(0.0, 0.98, 0, 97, power=0.5, frequency=1),
    schedules.ConstantSparsity(0.8, 20),
    schedules.ConstantSparsity(0.8, 3, 150, frequency=11),
    schedules.ConstantSparsity(0.0, 0, -1, frequency=1),
]
USERS = [
    Halving(5, 47),
    Halving(0, -1),
    Squared(0.1, 0.9, 10, 105, frequency=10),
    OwnFromConfig(3, 33),
]


def name(inner):
    return repr(schedules.Schedule(inner))


@pytest.mark.oldest
def test_import_leaves_the_environment_alone():
    # `event_file_test.py` has a process in which the user made a choice.
    code = (
        "import os; before = dict(os.environ); import sos.schedules;"
        "assert dict(os.environ) == before, os.environ;"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ;"
        "import tensorflow as tf, keras;"
        "assert tf.keras.__version__ == keras.__version__;"
        "assert tf.keras.layers.Dense is keras.layers.Dense;"
        "from tensorflow_model_optimization.python.core.keras import compat;"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_schedules_module_has_the_classes_of_tfmot():
    assert schedules.PolynomialDecay is tfmot.sparsity.keras.PolynomialDecay
    assert schedules.ConstantSparsity is tfmot.sparsity.keras.ConstantSparsity
    assert schedules.PruningSchedule is tfmot.sparsity.keras.PruningSchedule


@pytest.mark.parametrize("inner", SCHEDULES + USERS, ids=name)
def test_due_and_sparsity_equal_tfmots(inner):
    schedule = schedules.Schedule(inner)
    for step in [*range(210), 1000, 12345]:
        due, sparsity = inner(tf.constant(step, tf.int64))
        assert schedule.sparsity(step) == pytest.approx(
            float(sparsity), abs=2e-7
        )
        assert schedule.due(step) == bool(due) or step == inner.end_step
    if schedule.end_step is not None:
        assert schedule.due(schedule.end_step)


@pytest.mark.parametrize("inner", SCHEDULES + USERS, ids=name)
def test_due_steps_are_the_steps_that_are_due(inner):
    schedule = schedules.Schedule(inner)
    due = [step for step in range(220) if schedule.due(step)]
    for after, until in [(-1, 219), (0, 100), (4, 5), (96, 97), (99, 150)]:
        expected = [step for step in due if after < step <= until]
        assert schedule.due_steps(after, until) == expected
    assert schedule.due_steps(50, 50) == []
    assert schedule.due_steps(60, 50) == []


@pytest.mark.parametrize(
    ("begin", "achieved"),
    [
        (0, 0.899993),
        (100_000, 0.899986),
        (200_000, 0.899967),
        (300_000, 0.899889),
        (400_000, 0.899101),
    ],
)
def test_schedule_with_an_end_off_the_grid_updates_at_the_end(begin, achieved):
    end = 500_000
    schedule = schedules.Schedule(
        schedules.PolynomialDecay(0.0, 0.9, begin, end, frequency=10_000)
    )
    # What the authors' runs reached, which never saw the final step.
    lost = schedule.sparsity(end - 10_000)
    fraction = 10_000 / (end - begin)
    assert lost == pytest.approx(0.9 * (1 - fraction**3), abs=1e-12)
    assert lost == pytest.approx(achieved, abs=2e-6)
    # What is reached here.
    assert schedule.due_steps(end - 10_000, end) == [end]
    assert schedule.sparsity(end) == 0.9
    assert schedule.sparsity(end + 1) == 0.9


def test_schedule_that_ends_off_the_grid_is_due_there():
    schedule = schedules.Schedule(
        schedules.PolynomialDecay(0.0, 0.9, 0, 105, frequency=10)
    )
    assert schedule.due(105)
    assert schedule.due_steps(90, 200) == [100, 105]
    assert not bool(schedule.inner(tf.constant(105))[0])


def test_schedule_of_length_zero_is_due_once():
    inner = schedules.PolynomialDecay(0.0, 0.9, 10, 10)
    schedule = schedules.Schedule(inner)
    assert schedule.due_steps(0, 500) == [10]
    assert schedule.sparsity(10) == 0.9
    assert schedule.sparsity(9) == 0.0


def test_sparsity_of_a_users_schedule_is_the_shortest_decimal():
    schedule = schedules.Schedule(Halving(0, 100))
    assert schedule.sparsity(0) == 0.45
    assert schedule.sparsity(50) == 0.9

    @tf.function
    def traced():
        assert schedule.due(50)  # evaluated eagerly even here
        return tf.constant(schedule.sparsity(50))

    assert float(traced()) == np.float32(0.9)


def test_sparsity_of_a_users_schedule_out_of_range_raises():
    class Wrong(Halving):
        def __call__(self, step):
            return True, 90.0

    with pytest.raises(ValueError, match="sparsity=90.0 at step=7"):
        schedules.Schedule(Wrong(0, 10)).sparsity(7)


def test_properties():
    schedule = schedules.Schedule(SCHEDULES[1])
    assert (schedule.begin_step, schedule.end_step) == (13, 200)
    assert (schedule.frequency, schedule.target_sparsity) == (7, 0.7)
    endless = schedules.Schedule(schedules.ConstantSparsity(0.8, 20))
    assert (endless.end_step, endless.target_sparsity) == (None, 0.8)
    assert schedules.Schedule(Halving(0, 50)).target_sparsity == 0.9
    assert schedules.Schedule(Halving(0, -1)).target_sparsity is None

    class Bare(schedules.PruningSchedule):
        def __call__(self, step):
            return step > 2, 0.5

        def get_config(self):
            return {}

    bare = schedules.Schedule(Bare())
    assert (bare.begin_step, bare.end_step, bare.frequency) == (0, None, None)
    assert bare.due_steps(0, 5) == [3, 4, 5]
    bare.check_steps_per_execution(1000)


def test_check_block():
    schedule = schedules.Schedule(schedules.ConstantSparsity(0.5, 0))
    schedule.check_steps_per_execution(1)
    schedule.check_steps_per_execution(100)
    with pytest.raises(ValueError, match="steps=101, frequency=100"):
        schedule.check_steps_per_execution(101)


def test_with_sparsity_of_a_schedule_changes_that_alone():
    decay = schedules.Schedule(SCHEDULES[1])
    other = decay.with_sparsity(0.3)
    assert other.inner.get_config()["config"] == {
        **decay.inner.get_config()["config"],
        "final_sparsity": 0.3,
    }
    assert decay.target_sparsity == 0.7
    constant = schedules.Schedule(schedules.ConstantSparsity(0.5, 3, 9, 2))
    assert constant.with_sparsity(0.6) == schedules.Schedule(
        schedules.ConstantSparsity(0.6, 3, 9, 2)
    )
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="Received: sparsity="):
            decay.with_sparsity(wrong)
    with pytest.raises(TypeError, match="cannot be replaced"):
        schedules.Schedule(Halving(0, 10)).with_sparsity(0.5)


@pytest.mark.parametrize("inner", SCHEDULES + USERS, ids=name)
def test_schedules_survive_serialisation(inner):
    schedule = schedules.Schedule(inner)
    config = json.loads(json.dumps(schedule.get_config()))
    copies = [schedules.Schedule.from_config(config)]
    data = keras.saving.serialize_keras_object(schedule)
    data = json.loads(json.dumps(data))
    copies.append(keras.saving.deserialize_keras_object(data))
    for copy in copies:
        assert copy == schedule
        assert hash(copy) == hash(schedule)
        assert type(copy.inner) is type(inner)
        assert copy.get_config() == schedule.get_config()
        assert [copy.sparsity(t) for t in range(0, 60, 7)] == [
            schedule.sparsity(t) for t in range(0, 60, 7)
        ]


def test_numpy_arguments_are_saved_as_plain_numbers():
    inner = schedules.PolynomialDecay(
        0.0, np.float64(0.5), np.int32(1), np.int64(9)
    )
    schedule = schedules.Schedule(inner)
    config = json.loads(json.dumps(schedule.get_config()))
    assert schedules.Schedule.from_config(config) == schedule


def test_unregistered_schedules_train_but_are_not_saved():
    schedule = schedules.Schedule(Unregistered(0, 10))
    assert schedule.due(10)
    assert schedule == schedules.Schedule(Unregistered(0, 10))
    with pytest.raises(ValueError, match="register_keras_serializable"):
        schedule.get_config()
    with keras.saving.custom_object_scope({"Unregistered": Unregistered}):
        config = schedule.get_config()
        assert schedules.Schedule.from_config(config) == schedule
    with pytest.raises(ValueError, match="named 'Unregistered'"):
        schedules.Schedule.from_config(config)


def test_schedules_are_equal_by_class_and_config():
    first = schedules.Schedule(schedules.ConstantSparsity(0.5, 10))
    assert first == schedules.Schedule(schedules.ConstantSparsity(0.5, 10))
    assert first != schedules.Schedule(schedules.ConstantSparsity(0.5, 11))
    assert first != schedules.Schedule(Halving(10, -1))
    assert schedules.Schedule(Halving(3, 33)) != schedules.Schedule(
        OwnFromConfig(3, 33)
    )
    assert first != "schedule"
    assert "ConstantSparsity(target_sparsity=0.5" in repr(first)


def test_as_schedule():
    inner = schedules.ConstantSparsity(0.5, 10)
    schedule = schedules.as_schedule(inner)
    assert schedule.inner is inner
    assert schedules.as_schedule(schedule) is schedule
    for wrong in (0.9, None, "constant", schedules.ConstantSparsity):
        with pytest.raises(TypeError, match="PolynomialDecay.*Received"):
            schedules.as_schedule(wrong)
    with pytest.raises(TypeError, match="Received: inner=0.9"):
        schedules.Schedule(0.9)


@pytest.mark.parametrize("shape", [(8, 16), (7, 13), (50, 61)])
def test_masks_equal_tfmots_over_a_whole_schedule(shape):
    inner = schedules.PolynomialDecay(0.0, 0.95, 4, 100, frequency=4)
    layer = tfmot.sparsity.keras.prune_low_magnitude(
        tf_keras.layers.Dense(shape[1]), pruning_schedule=inner
    )
    layer.build((None, shape[0]))
    size = shape[0] * shape[1]
    weights = np.random.default_rng(3).permutation(size) + 1.0
    weights = weights * np.where(np.arange(size) % 3, 1.0, -1.0) / size
    weights = weights.reshape(shape).astype(np.float32)
    kernel, mask, _ = layer.pruning_vars[0]
    schedule = schedules.Schedule(inner)
    compared = 0
    steps = schedule.due_steps(0, 100)
    for step in steps:
        kernel.assign(weights)
        layer.pruning_step.assign(step)
        layer.pruning_obj.conditional_mask_update()
        k = masks.keep_count(size, schedule.sparsity(step))
        sparsity = inner(tf.constant(step))[1]
        # tfmot rounds in float32, and keeps one weight at least.
        float32_k = max(
            int(tf.round(tf.constant(size, tf.float32) * (1 - sparsity))), 1
        )
        if k != float32_k:
            continue
        compared += 1
        np.testing.assert_array_equal(
            mask.numpy(), masks.top_k_mask_host(np.abs(weights), k)
        )
    assert compared >= 0.9 * len(steps)
    assert len(steps) == 25


@st.composite
def numbers(draw):
    begin = draw(st.integers(0, 10**6))
    sparsity = st.floats(0, 1, exclude_max=True)
    return {
        "sparsity": draw(sparsity),
        "initial_sparsity": draw(sparsity),
        "begin_step": begin,
        "end_step": begin + draw(st.integers(0, 10**6)),
        "frequency": draw(st.integers(1, 10**4)),
        "power": draw(st.floats(0, 10)),
    }


@hypothesis.given(numbers())
def test_make_schedule_with_an_end_is_polynomial_decay(numbers):
    schedule = schedules.make_schedule(**numbers)
    assert schedule == schedules.Schedule(
        schedules.PolynomialDecay(
            numbers["initial_sparsity"],
            numbers["sparsity"],
            numbers["begin_step"],
            numbers["end_step"],
            power=numbers["power"],
            frequency=numbers["frequency"],
        )
    )
    assert schedule is schedules.make_schedule(
        **json.loads(json.dumps(numbers))
    )
    assert schedule.target_sparsity == numbers["sparsity"]


@hypothesis.given(numbers())
def test_make_schedule_by_the_name_constant_is_constant(numbers):
    numbers = {
        name: numbers[name] for name in ("sparsity", "begin_step", "frequency")
    }
    schedule = schedules.make_schedule("constant", **numbers)
    assert schedule == schedules.Schedule(
        schedules.ConstantSparsity(
            numbers["sparsity"],
            numbers["begin_step"],
            frequency=numbers["frequency"],
        )
    )
    assert schedule.end_step is None
    begin = numbers["begin_step"]
    assert not schedule.due(begin - 1)
    assert schedule.due(begin) and schedule.due(begin + numbers["frequency"])
    assert schedule.sparsity(begin) == numbers["sparsity"]


def test_make_schedule_of_numpy_numbers_equals_python_numbers():
    schedule = schedules.make_schedule(
        sparsity=np.float64(0.5),
        begin_step=np.int64(2),
        end_step=np.int32(9),
        power=2,
    )
    assert schedule is schedules.make_schedule(
        sparsity=0.5, begin_step=2, end_step=9, power=2.0
    )
    json.dumps(schedule.get_config())


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"sparsity": 1.0}, r"`sparsity` must be .*\[0, 1\).*sparsity=1.0"),
        ({"sparsity": -0.1}, "Received: sparsity=-0.1"),
        ({"sparsity": float("nan")}, "Received: sparsity=nan"),
        ({"sparsity": "0.9"}, "Received: sparsity='0.9'"),
        ({"sparsity": True}, "Received: sparsity=True"),
        ({"sparsity": 90}, "Received: sparsity=90"),
        ({"initial_sparsity": 1}, "Received: initial_sparsity=1"),
        ({"begin_step": -1}, "`begin_step` must be an integer >= 0"),
        ({"begin_step": 0.5}, "Received: begin_step=0.5"),
        ({"end_step": 10.0}, "Received: end_step=10.0"),
        ({"end_step": -1}, "Received: end_step=-1"),
        ({"end_step": True}, "Received: end_step=True"),
        ({"frequency": 0}, "`frequency` must be an integer >= 1"),
        ({"frequency": "x"}, "Received: frequency='x'"),
        ({"power": -1}, r"`power` must be .*\[0, inf\)"),
        (
            {"begin_step": 11},
            "`begin_step` must not be after `end_step`.*begin_step=11, end_ste",
        ),
        (
            {"schedule": "constant"},
            "`end_step`.*schedule='constant', end_step=10",
        ),
        (
            {"schedule": "constant", "end_step": None, "power": 1.0},
            "`power`.*power=1.0",
        ),
        ({"schedule": "cubic"}, "'polynomial', 'constant'.*schedule='cubic'"),
    ],
)
def test_make_schedule_of_wrong_numbers_raises(numbers, message):
    with pytest.raises(UsageError, match=message) as error:
        schedules.make_schedule(**{"sparsity": 0.5, "end_step": 10, **numbers})
    assert "\n" not in str(error.value)


# Schedules that are laid over the training.


def polynomial(step, begin, end, initial=0.0, final=0.9, power=3.0):
    """Zhu and Gupta 2017, equation 1."""
    p = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
    return final + (initial - final) * (1 - p) ** power


@pytest.mark.parametrize("start", [0, 17])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 100, 1000, 12345])
def test_relative_schedule_over_a_training_ends_at_three_quarters(steps, start):
    relative = schedules.make_schedule(sparsity=0.9)
    assert not relative.resolved
    assert relative.target_sparsity == 0.9
    schedule = relative.over(steps, start=start)
    assert schedule.resolved
    assert schedule.over(10**6, start=3) is schedule
    end = start + round(0.75 * steps)
    assert (schedule.begin_step, schedule.end_step) == (start, end)
    due = schedule.due_steps(-1, start + steps)
    assert (due[0], due[-1]) == (start, end)
    assert len(due) <= 135
    assert len(due) >= min(66, end - start + 1)
    for step in due[::10]:
        expected = polynomial(step, start, end)
        assert schedule.sparsity(step) == pytest.approx(expected, abs=1e-12)
        if end > start:
            inner = schedules.PolynomialDecay(0.0, 0.9, start, end)
            tfmots = inner(tf.constant(step))[1]
            assert float(tfmots) == pytest.approx(expected, abs=1e-6)
    assert schedule.sparsity(end) == 0.9


def test_relative_schedule_keeps_the_numbers_that_it_was_given():
    schedule = schedules.make_schedule(
        sparsity=0.8, initial_sparsity=0.2, begin_step=10, frequency=7, power=1
    ).over(100, start=4)
    assert schedule == schedules.Schedule(
        schedules.PolynomialDecay(0.2, 0.8, 10, 79, power=1.0, frequency=7)
    )


def test_relative_schedule_with_an_end_needs_no_training_steps():
    relative = schedules.make_schedule(
        sparsity=0.9, begin_step=100, end_step=1100
    )
    for schedule in (relative, relative.over(None), relative.over(5)):
        assert schedule.frequency == 10
        assert schedule.sparsity(600) == pytest.approx(0.7875)
        assert schedule.due_steps(1080, 2000) == [1090, 1100]
    schedule = relative.over(None, steps_per_execution=32)
    assert schedule.frequency == 32
    schedule.check_steps_per_execution(32)


@pytest.mark.parametrize("train_steps", [4, 100, 1000])
def test_relative_schedule_is_not_finer_than_an_execution(train_steps):
    for name, end in (("polynomial", round(0.75 * train_steps)), *CONSTANT):
        relative = schedules.make_schedule(name, sparsity=0.9)
        schedule = relative.over(train_steps, steps_per_execution=128)
        schedule.check_steps_per_execution(128)
        assert schedule.end_step == end
    assert relative.over(train_steps).frequency == 100


CONSTANT = [("constant", None)]


def test_relative_schedule_of_unknown_length_raises_when_it_is_read():
    relative = schedules.make_schedule(sparsity=0.9)
    for read in (
        lambda: relative.over(None),
        lambda: relative.sparsity(3),
        lambda: relative.due(3),
        lambda: relative.due_steps(0, 3),
        lambda: relative.end_step,
    ):
        with pytest.raises(UsageError, match="train_steps=None") as error:
            read()
        for way in ("SparsityCallback", "SparsityUpdater", "config"):
            assert way in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 90}, "sparsity=90"),
        ({"sparsity": 0.9, "begin_step": -1}, "begin_step=-1"),
        ({"sparsity": 0.9, "schedule": "linear"}, "schedule='linear'"),
        (
            {"sparsity": 0.9, "schedule": "constant", "end_step": 4},
            "end_step=4",
        ),
    ],
)
def test_relative_schedule_of_invalid_numbers_raises(arguments, message):
    with pytest.raises(UsageError, match=message):
        schedules.RelativeSchedule(**arguments)


@pytest.mark.parametrize(
    "numbers, steps, message",
    [
        ({}, 0, "train_steps=0"),
        ({}, 2.5, "train_steps=2.5"),
        ({"begin_step": 77}, 100, "begin_step=77, train_steps=100"),
    ],
)
def test_relative_schedule_over_unfit_steps_raises(numbers, steps, message):
    relative = schedules.make_schedule(sparsity=0.9, **numbers)
    with pytest.raises(UsageError, match=message):
        relative.over(steps)


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"begin_step": 3, "power": 1.0},
        {"end_step": 50},
        {"schedule": "constant"},
    ],
)
def test_relative_schedule_comes_back_from_its_config(numbers):
    relative = schedules.make_schedule(sparsity=0.9, **numbers)
    assert not relative.resolved
    config = keras.saving.serialize_keras_object(relative)
    config = json.loads(json.dumps(config))
    again = keras.saving.deserialize_keras_object(config)
    assert again == relative and hash(again) == hash(relative)
    assert again is schedules.make_schedule(sparsity=0.9, **numbers)
    other = relative.with_sparsity(0.5)
    assert other.target_sparsity == 0.5 and other != relative
    assert other.with_sparsity(0.9) is relative
    laid_out = relative.over(100)
    assert laid_out is again.over(100)
    assert laid_out != relative and relative != laid_out


def test_relative_schedule_at_known_steps_keeps_its_own_numbers():
    def steps(**numbers):
        relative = schedules.make_schedule(sparsity=0.9, **numbers)
        return relative.at(10, 70, 3).steps()

    assert steps() == (10, 70, 3)
    assert steps(frequency=5) == (10, 70, 5)
    assert steps(end_step=100) == (0, 100, 3)
