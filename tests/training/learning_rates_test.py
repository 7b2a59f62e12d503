import fractions
import json
import math

import hypothesis
import keras
import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from sos.errors import UsageError
from sos.training import learning_rates, tpu_check
from sos.training.learning_rates import make_learning_rate
from tests.support import techniques

# Of the authors' recipe for ResNet-50.
IMAGES = 1_281_167
PUBLISHED = [6256, 37534, 75068, 100091]
RESNET = {
    "schedule": "piecewise",
    "base": 0.1,
    "base_batch_size": 256,
    "warmup_steps": PUBLISHED[0],
    "boundaries": PUBLISHED[1:],
    "factors": [0.1, 0.01, 0.001],
    "reference_steps": 128_000,
}
TRANSFORMER = {"schedule": "rsqrt", "base": 2.0, "hidden_size": 512}

EXAMPLES = {
    "constant": {"schedule": "constant", "base": 0.3, "warmup_steps": 7},
    "cosine": {"schedule": "cosine", "base": 0.3, "alpha": 0.1},
    "cosine after warm-up": {
        "schedule": "cosine",
        "base": 0.3,
        "warmup_steps": 7,
    },
    "piecewise": {
        "schedule": "piecewise",
        "base": 0.3,
        "warmup_steps": 3.5,
        "boundaries": [10, 20],
        "factors": [0.1, 0.5],
        "reference_steps": 30,
    },
    "rsqrt": {
        "schedule": "rsqrt",
        "base": 2.0,
        "warmup_steps": 9,
        "hidden_size": 16,
    },
}


def rates(config, steps, *, train_steps=100, batch_size=None):
    schedule = make_learning_rate(
        config, train_steps=train_steps, batch_size=batch_size
    )
    values = [schedule(tf.constant(step, tf.int64)) for step in steps]
    assert all(value.dtype == tf.float32 for value in values)
    return np.array([float(value) for value in values])


def assert_rates(config, steps, expected, **arguments):
    found = rates(config, steps, **arguments)
    np.testing.assert_allclose(found, expected, rtol=3e-7)


# Closed forms.


def test_constant_is_the_base_at_every_step():
    config = {"schedule": "constant", "base": 0.3}
    found = rates(config, [0, 1, 99, 10**9])
    np.testing.assert_array_equal(found, np.float32(0.3))


def test_constant_with_warmup_grows_linearly_from_zero():
    config = {"schedule": "constant", "base": 0.3, "warmup_steps": 4}
    expected = [0.0, 0.075, 0.15, 0.225, 0.3, 0.3]
    assert_rates(config, range(6), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_cosine_without_warmup_equals_its_formula(alpha):
    steps = np.arange(0, 120)
    fraction = np.minimum(steps / 100, 1.0)
    expected = 0.3 * (
        alpha + (1 - alpha) * 0.5 * (1 + np.cos(np.pi * fraction))
    )
    found = rates({"schedule": "cosine", "base": 0.3, "alpha": alpha}, steps)
    # Close to zero the float32 cosine has an absolute error.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=3e-8)
    assert found[0] == np.float32(0.3)
    assert found[100] == pytest.approx(0.3 * alpha, rel=1e-7, abs=0)


def test_cosine_with_warmup_equals_its_formula():
    config = {"schedule": "cosine", "base": 0.3, "warmup_steps": 20}
    steps = np.arange(0, 120)
    fraction = np.clip((steps - 20) / 80, 0.0, 1.0)
    expected = np.where(
        steps < 20,
        0.3 * steps / 20,
        0.3 * 0.5 * (1 + np.cos(np.pi * fraction)),
    )
    found = rates(config, steps)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=3e-8)
    assert found[0] == 0.0
    assert found[20] == np.float32(0.3)
    assert found[100] == 0.0


def test_cosine_is_a_schedule_of_keras():
    config = {"schedule": "cosine", "base": 0.3}
    schedule = make_learning_rate(config, train_steps=10)
    assert type(schedule) is keras.optimizers.schedules.CosineDecay


def test_rsqrt_equals_its_formula():
    steps = np.array([0, 1, 100, 7999, 8000, 8001, 10_000, 499_999])
    expected = (
        2.0
        * np.minimum(1.0, steps / 8000)
        * np.maximum(steps, 8000) ** -0.5
        * 512**-0.5
    )
    assert_rates(TRANSFORMER, steps, expected, train_steps=500_000)


def test_rsqrt_of_the_transformer_peaks_at_the_end_of_its_warmup():
    steps = np.arange(7990, 8011)
    found = rates(TRANSFORMER, steps)
    assert steps[np.argmax(found)] == 8000
    assert found.max() == np.float32(2.0 / math.sqrt(8000 * 512))
    assert found.max() == pytest.approx(9.88e-4, rel=1e-3)


# Piecewise.


def test_piecewise_drops_exactly_at_the_published_boundaries():
    steps = [b + offset for b in PUBLISHED for offset in (-1, 0)]
    found = rates(RESNET, steps, train_steps=128_000, batch_size=1024)
    expected = [0.4 * 6255 / 6256, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004, 0.0004]
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    np.testing.assert_array_equal(
        found[1::2], np.float32([0.4, 0.04, 0.004, 0.0004])
    )


@pytest.mark.parametrize(
    ("batch_size", "train_steps"), [(1024, 128_000), (4096, 32_000)]
)
def test_piecewise_in_epochs_equals_the_authors_rule(batch_size, train_steps):
    epoch = IMAGES / 1024
    config = {
        **RESNET,
        "warmup_steps": 5 * epoch,
        "boundaries": [30 * epoch, 60 * epoch, 80 * epoch],
    }
    near = [
        math.floor(number * IMAGES / batch_size) + offset
        for number in (5, 30, 60, 80)
        for offset in (-1, 0, 1, 2)
    ]
    steps = np.array([0, 1, 1000, *near, train_steps - 1])
    # The authors compare epochs, so that an epoch need not be whole steps.
    epochs = steps / (IMAGES / batch_size)
    factor = np.where(epochs < 5, epochs / 5, 1.0)
    for start, value in [(30, 0.1), (60, 0.01), (80, 0.001)]:
        factor = np.where(epochs >= start, value, factor)
    assert_rates(
        config,
        steps,
        0.1 * batch_size / 256 * factor,
        train_steps=train_steps,
        batch_size=batch_size,
    )


def test_piecewise_of_twice_the_length_drops_at_twice_the_step():
    schedule = make_learning_rate(RESNET, train_steps=256_000, batch_size=1024)
    assert schedule.warmup_steps == 2 * PUBLISHED[0]
    assert schedule.boundaries == [2 * b for b in PUBLISHED[1:]]


def test_piecewise_without_reference_steps_is_not_scaled():
    config = {**RESNET, "reference_steps": None}
    schedule = make_learning_rate(config, train_steps=50, batch_size=1024)
    assert [schedule.warmup_steps, *schedule.boundaries] == PUBLISHED


@hypothesis.given(
    boundary=st.integers(1, 10**6),
    reference=st.integers(1, 10**6),
    train_steps=st.integers(1, 10**6),
)
def test_piecewise_boundary_is_scaled_and_rounded_up(
    boundary, reference, train_steps
):
    schedule = make_learning_rate(
        {
            "schedule": "piecewise",
            "base": 1.0,
            "boundaries": [boundary],
            "factors": [0.1],
            "reference_steps": reference,
        },
        train_steps=train_steps,
    )
    (found,) = schedule.boundaries
    exact = fractions.Fraction(boundary * train_steps, reference)
    assert found - 1 < exact <= found


def test_piecewise_boundaries_that_coincide_use_the_last_factor():
    found = rates(RESNET, range(4), train_steps=4, batch_size=256)
    np.testing.assert_allclose(found[1:], [0.1, 0.1 * 0.1, 0.1 * 0.01])
    found = rates(RESNET, [1], train_steps=1, batch_size=256)
    np.testing.assert_allclose(found, [0.1 * 0.001])


def test_piecewise_at_large_steps_compares_exactly():
    boundary = 2**40 + 1
    config = {
        "schedule": "piecewise",
        "base": 1.0,
        "boundaries": [boundary],
        "factors": [0.5],
    }
    found = rates(config, [boundary - 1, boundary])
    np.testing.assert_array_equal(found, [1.0, 0.5])


# Configs.


@pytest.mark.parametrize("name", EXAMPLES)
def test_schedule_survives_serialization(name):
    schedule = make_learning_rate(EXAMPLES[name], train_steps=100)
    config = keras.optimizers.schedules.serialize(schedule)
    restored = keras.optimizers.schedules.deserialize(
        json.loads(json.dumps(config))
    )
    assert type(restored) is type(schedule)
    for step in (0, 3, 9, 50, 100):
        np.testing.assert_array_equal(restored(step), schedule(step))


@pytest.mark.parametrize(
    "make", [dict, ml_collections.ConfigDict, ml_collections.FrozenConfigDict]
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_make_learning_rate_takes_any_mapping(name, make):
    config = make(EXAMPLES[name])
    np.testing.assert_array_equal(
        rates(config, [1, 50]), rates(EXAMPLES[name], [1, 50])
    )


@pytest.mark.parametrize("schedule", learning_rates.names())
def test_defaults_complete_a_config(schedule):
    required = {"schedule": schedule, "base": 0.5}
    if schedule == "rsqrt":
        required["hidden_size"] = 4
    completed = {**learning_rates.defaults(schedule), **required}
    assert set(json.loads(json.dumps(completed))) == set(completed)
    np.testing.assert_array_equal(
        rates(completed, [0, 9, 9000]), rates(required, [0, 9, 9000])
    )


def test_defaults_returns_a_copy():
    learning_rates.defaults("constant")["base"] = 1.0
    assert learning_rates.defaults("constant")["base"] is None


def test_base_batch_size_scales_the_base_with_the_batch_size():
    config = {"schedule": "constant", "base": 0.1, "base_batch_size": 256}
    found = rates(config, [0], batch_size=1024)
    np.testing.assert_array_equal(found, np.float32(0.4))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "rsqrt"])
def test_reference_steps_scale_the_warmup(schedule):
    entries = {"schedule": schedule, "base": 1.0}
    if schedule == "rsqrt":
        entries["hidden_size"] = 1
    scaled = {**entries, "warmup_steps": 10, "reference_steps": 100}
    steps = [0, 5, 10, 20, 40, 150]
    np.testing.assert_array_equal(
        rates(scaled, steps, train_steps=200),
        rates({**entries, "warmup_steps": 20}, steps, train_steps=200),
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["schedule=None", "'constant'", "'rsqrt'"]),
        ({"schedule": "linear"}, ["'linear'", "'piecewise'"]),
        ({"schedule": ["cosine"]}, ["schedule=['cosine']"]),
        (0.1, ["0.1", "'base'"]),
        (
            {**EXAMPLES["constant"], "alpha": 1},
            ["'alpha'", "'reference_steps', 'warmup_steps'"],
        ),
        ({"schedule": "constant"}, ["`base`", "base=None"]),
        ({"schedule": "constant", "base": 0.0}, ["(0, inf)"]),
        ({"schedule": "constant", "base": True}, ["base=True"]),
        ({"schedule": "constant", "base": "0.1"}, ["base='0.1'"]),
        ({"schedule": "constant", "base": math.nan}, ["base=nan"]),
        ({"schedule": "constant", "base": math.inf}, ["base=inf"]),
        ({**EXAMPLES["constant"], "warmup_steps": -1}, ["[0, inf)"]),
        ({**EXAMPLES["cosine"], "alpha": 1.5}, ["[0, 1]", "alpha=1.5"]),
        ({**EXAMPLES["cosine"], "warmup_steps": 100}, ["`train_steps`"]),
        ({**EXAMPLES["rsqrt"], "warmup_steps": 0}, ["(0, inf)"]),
        ({**EXAMPLES["rsqrt"], "hidden_size": None}, ["`hidden_size`"]),
        ({**EXAMPLES["rsqrt"], "hidden_size": 0.5}, ["hidden_size=0.5"]),
        ({**EXAMPLES["piecewise"], "factors": [0.1]}, ["one number for each"]),
        ({**EXAMPLES["piecewise"], "factors": 0.1}, ["list", "factors=0.1"]),
        ({**EXAMPLES["piecewise"], "boundaries": "ab"}, ["boundaries='ab'"]),
        ({**EXAMPLES["piecewise"], "boundaries": [20, 10]}, ["increasing"]),
        ({**EXAMPLES["piecewise"], "boundaries": [0, 10]}, ["after 0"]),
        ({**EXAMPLES["piecewise"], "warmup_steps": 11}, ["exceed the first"]),
        ({**EXAMPLES["piecewise"], "reference_steps": 0}, ["(0, inf)"]),
        ({**EXAMPLES["constant"], "base_batch_size": 256}, ["`batch_size`"]),
    ],
)
def test_make_learning_rate_of_an_invalid_config_raises(config, words):
    with pytest.raises(UsageError) as error:
        make_learning_rate(config, train_steps=100)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("train_steps", [0, 1.5, True, None])
def test_make_learning_rate_of_invalid_train_steps_raises(train_steps):
    with pytest.raises(UsageError, match="train_steps"):
        make_learning_rate(EXAMPLES["cosine"], train_steps=train_steps)


# Compiled steps.


# A longer training.

THREE_DROPS = {
    "schedule": "piecewise",
    "base": 0.4,
    "warmup_steps": 5,
    "boundaries": [30, 60, 80],
    "factors": [0.1, 0.01, 0.001],
}
# The same in other units.
IN_EPOCHS = {
    **THREE_DROPS,
    "warmup_steps": 0.5,
    "boundaries": [3, 6, 8],
    "reference_steps": 10.0,
}


def longer_rates(config, steps, *, train_steps=100, multiplier=2, variant):
    entries = learning_rates.lengthen(
        config,
        train_steps=train_steps,
        multiplier=multiplier,
        variant=variant,
    )
    return rates(entries, steps, train_steps=round(multiplier * train_steps))


@pytest.mark.parametrize("config", [THREE_DROPS, IN_EPOCHS])
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (
            "scale",
            {
                5: 0.2,
                10: 0.4,
                59: 0.4,
                60: 0.04,
                119: 0.04,
                120: 0.004,
                159: 0.004,
                160: 0.0004,
                199: 0.0004,
            },
        ),
        ("hold", {4: 0.32, 29: 0.4, 30: 0.04, 79: 4e-3, 80: 4e-4, 199: 4e-4}),
        (
            "drop",
            {
                4: 0.32,
                30: 0.04,
                80: 4e-4,
                109: 4e-4,
                110: 4e-5,
                139: 4e-5,
                140: 4e-6,
                170: 4e-7,
                199: 4e-7,
            },
        ),
        (
            "drop_from_start",
            {
                0: 0.4,
                29: 0.4,
                30: 0.04,
                60: 0.004,
                90: 4e-4,
                120: 4e-5,
                150: 4e-6,
                179: 4e-6,
                180: 4e-7,
                199: 4e-7,
            },
        ),
    ],
)
def test_lengthen_piecewise_equals_rates_by_hand(config, variant, expected):
    found = longer_rates(config, list(expected), variant=variant)
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"schedule": "constant", "base": 0.3, "warmup_steps": 10},
            {0: 0.0, 10: 0.15, 20: 0.3, 199: 0.3},
        ),
        ({"schedule": "cosine", "base": 0.3}, {0: 0.3, 100: 0.15, 200: 0.0}),
        (
            {
                "schedule": "cosine",
                "base": 0.3,
                "alpha": 0.1,
                "warmup_steps": 5,
                "reference_steps": 50,
            },
            {10: 0.15, 20: 0.3, 110: 0.165, 200: 0.03},
        ),
        (
            {
                "schedule": "rsqrt",
                "base": 2.0,
                "warmup_steps": 9,
                "hidden_size": 4,
            },
            {9: 1 / 6, 18: 1 / 3, 72: 1 / 6},
        ),
    ],
)
def test_lengthen_scaled_schedule_has_the_rate_of_half_the_step(
    config, expected
):
    steps = list(expected)
    found = longer_rates(config, steps, variant="scale")
    np.testing.assert_allclose(
        found, list(expected.values()), rtol=1e-5, atol=1e-7
    )
    steps = range(0, 101, 10)
    doubled = longer_rates(config, [2 * n for n in steps], variant="scale")
    np.testing.assert_allclose(
        doubled, rates(config, steps), rtol=1e-5, atol=1e-7
    )


def test_lengthen_held_constant_keeps_its_warmup():
    config = {
        "schedule": "constant",
        "base": 0.3,
        "warmup_steps": 1,
        "reference_steps": 10,
    }
    found = longer_rates(config, [5, 10, 199], variant="hold")
    np.testing.assert_allclose(found, [0.15, 0.3, 0.3], rtol=1e-6)


def test_lengthen_recipe_in_epochs_drops_every_thirty_epochs():
    epoch = IMAGES / 1024
    recipe = {
        **RESNET,
        "warmup_steps": 5 * epoch,
        "boundaries": [30 * epoch, 60 * epoch, 80 * epoch],
    }
    longer = learning_rates.lengthen(
        recipe, train_steps=128_000, multiplier=2, variant="drop"
    )
    epochs = [30, 60, 80, 110, 140, 170, 200]
    assert longer["boundaries"] == [math.ceil(n * epoch) for n in epochs]
    np.testing.assert_allclose(
        longer["factors"], [0.1**n for n in range(1, 8)], rtol=1e-9
    )
    assert longer["base_batch_size"] == 256


@pytest.mark.parametrize("variant", ["hold", "drop"])
def test_lengthen_original_length_keeps_its_rates(variant):
    # The next drop would be at step 30.
    config = {**THREE_DROPS, "boundaries": [10, 15, 20]}
    steps = range(100)
    found = longer_rates(config, steps, variant=variant)
    np.testing.assert_array_equal(found, rates(config, steps))
    last = longer_rates(config, [100], variant=variant)[0]
    assert last == pytest.approx({"hold": 4e-4, "drop": 4e-5}[variant])


def test_lengthen_drops_that_coincide_use_the_last_factor():
    config = {**THREE_DROPS, "boundaries": [30, 60, 61], "reference_steps": 100}
    del config["warmup_steps"]
    found = longer_rates(config, [5, 6, 7, 19], train_steps=10, variant="hold")
    np.testing.assert_allclose(found, [0.04, 0.004, 4e-4, 4e-4], rtol=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_lengthen_once_the_length_changes_nothing(name):
    entries = {**EXAMPLES[name], "technique_multiplier": 3.0}
    given = dict(entries)
    longer = learning_rates.lengthen(
        ml_collections.ConfigDict(entries),
        train_steps=100,
        multiplier=1,
        variant="scale",
    )
    assert longer == entries == given


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "best"}, ["variant", "'drop_from_start'", "'best'"]),
        ({"multiplier": 0.5}, ["multiplier", "0.5"]),
        ({"train_steps": 0}, ["train_steps", "0"]),
        ({"entries": {}}, ["schedule", "None"]),
        ({"entries": {**THREE_DROPS, "base": -1}}, ["base", "-1"]),
        (
            {"entries": EXAMPLES["cosine"]},
            ["'hold'", "'constant' or 'piecewise'", "'scale'", "'cosine'"],
        ),
        ({"entries": EXAMPLES["rsqrt"]}, ["'hold'", "'rsqrt'"]),
        (
            {"entries": EXAMPLES["constant"], "variant": "drop"},
            ["'drop'", "'piecewise'", "'constant'"],
        ),
        # Nothing to go on with: no drop, a rise, a rate of 0.
        (
            {
                "entries": {"schedule": "piecewise", "base": 1},
                "variant": "drop",
            },
            ["boundaries=[]"],
        ),
        ({"entries": EXAMPLES["piecewise"], "variant": "drop"}, ["0.5"]),
        (
            {
                "entries": {**THREE_DROPS, "factors": [0, 0, 0]},
                "variant": "drop_from_start",
            },
            ["factors=[0]"],
        ),
    ],
)
def test_lengthen_invalid_argument_raises(changes, words):
    arguments = {
        "entries": THREE_DROPS,
        "train_steps": 100,
        "multiplier": 2,
        "variant": "hold",
        **changes,
    }
    with pytest.raises(UsageError) as error:
        learning_rates.lengthen(arguments.pop("entries"), **arguments)
    for word in words:
        assert word in str(error.value)


def step_function(config, strategy, jit_compile=False):
    """A function that subtracts the rate from a variable, and the variable."""
    with strategy.scope():
        variable = keras.Variable(np.float32(0.0))
        optimizer = keras.optimizers.SGD(
            make_learning_rate(config, train_steps=100)
        )
        optimizer.build([variable])
    replicas = strategy.num_replicas_in_sync

    def on_replica():
        optimizer.apply([tf.constant(1.0 / replicas)], [variable])

    @tf.function(jit_compile=jit_compile)
    def step():
        strategy.run(on_replica)

    return step, variable


@pytest.mark.parametrize("where", ["one device", "XLA", "two replicas"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_schedule_in_a_compiled_step_equals_eager_values(name, where):
    strategy = (
        techniques.two_replicas()
        if where == "two replicas"
        else tf.distribute.OneDeviceStrategy("CPU:0")
    )
    step, variable = step_function(
        EXAMPLES[name], strategy, jit_compile=where == "XLA"
    )
    for _ in range(30):
        step()
    expected = -rates(EXAMPLES[name], range(30)).sum()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(variable), expected, rtol=1e-5
    )
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_schedule_in_a_step_is_accepted_by_a_tpu(name):
    step, _ = step_function(EXAMPLES[name], tpu_check.deviceless_strategy(2))
    assert not tpu_check.violations(step.get_concrete_function())
