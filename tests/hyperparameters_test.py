"""Hyperparameters as plain numbers and names, as configs give them."""

import copy
import itertools
import json
import pickle

import hypothesis
import keras
import ml_collections
import numpy as np
import pytest
from hypothesis import strategies as st

import sos
from sos import arguments, ramps, registry, schedules
from sos.errors import UsageError
from sos.wrappers.base import find_wrappers
from tests.support import techniques


@sos.extend.register
class OwnArguments(sos.extend.PruningWrapper):
    """Arguments of its own, one of which is not a hyperparameter."""

    def __init__(
        self,
        layer,
        temperature=2.0,
        *,
        steps=(1, 2),
        label=None,
        function=np.abs,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.temperature = temperature
        self.steps = steps
        self.function = function

    def scores(self, weight):
        return weight.value * self.temperature


@sos.extend.register
class OwnDefaults(sos.extend.PruningWrapper):
    """Other defaults than its family."""

    def __init__(
        self,
        layer,
        *,
        sparsity=0.25,
        frequency=7,
        schedule="constant",
        **kwargs,
    ):
        super().__init__(
            layer,
            sparsity=sparsity,
            frequency=frequency,
            schedule=schedule,
            **kwargs,
        )

    def scores(self, weight):
        return weight.value


@sos.extend.register
class OwnSchedule(sos.extend.PruningWrapper):
    """A schedule that nobody else chooses."""

    def __init__(self, layer, *, start=3, **kwargs):
        super().__init__(
            layer,
            schedule="constant",
            sparsity=0.5,
            begin_step=start,
            frequency=100,
            **kwargs,
        )

    def scores(self, weight):
        return weight.value


@sos.extend.register
class ScheduleAlone(sos.extend.PruningWrapper):
    """Passes nothing else on to its base class."""

    def __init__(self, layer, schedule, paths=None):
        super().__init__(layer, schedule=schedule, paths=paths)

    def scores(self, weight):
        return weight.value


@sos.extend.register
class OwnRamp(techniques.Shift):
    """Other defaults than its family."""

    def __init__(self, layer, *, ramp="linear", end_step=10, **kwargs):
        super().__init__(layer, ramp=ramp, end_step=end_step, **kwargs)


@sos.extend.register
class FixedRamp(techniques.Shift):
    """A ramp that nobody else chooses."""

    def __init__(self, layer, *, begin_step=1, penalty_weight, **kwargs):
        ramp = sos.ramps.LinearRamp(begin_step, begin_step + 1)
        super().__init__(
            layer, penalty_weight=penalty_weight, ramp=ramp, **kwargs
        )


EXTERNAL = [
    OwnArguments,
    OwnDefaults,
    OwnSchedule,
    ScheduleAlone,
    OwnRamp,
    FixedRamp,
]


@pytest.fixture(autouse=True, scope="module")
def forget_external_techniques():
    yield
    for technique in EXTERNAL:
        del registry._techniques[technique.__name__]


def dense():
    return keras.layers.Dense(4, name="dense")


def model_of(**units):
    units = units or {"first": 8, "last": 4}
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(keras.layers.Dense(n, name=name) for name, n in units.items()),
        ],
        name="model",
    )


PRUNING = {
    "sparsity": sos.extend.REQUIRED,
    "initial_sparsity": 0.0,
    "begin_step": 0,
    "end_step": None,
    "frequency": None,
    "power": 3.0,
    "schedule": "polynomial",
}
PENALIZED = {
    "penalty_weight": None,
    "num_examples": None,
    "ramp": "constant",
    "begin_step": 0,
    "end_step": None,
    "seed": 0,
}


# What there is.


@pytest.mark.parametrize(
    "technique, expected",
    [
        (None, {}),
        ("MagnitudePruning", PRUNING),
        ("RandomPruning", {**PRUNING, "seed": 0}),
        ("FixedMask", {"sparsity": None, "seed": 0}),
        ("L0Regularization", {**PENALIZED, "initial_log_alpha": 2.197}),
        (
            "VariationalDropout",
            {
                **PENALIZED,
                "initial_log_sigma2": -10.0,
                "threshold": 3.0,
                "clip_log_alpha": 8.0,
                "variance_dtype": None,
            },
        ),
        (
            OwnArguments,
            {**PRUNING, "temperature": 2.0, "steps": (1, 2), "label": None},
        ),
        (
            OwnDefaults,
            {
                **PRUNING,
                "sparsity": 0.25,
                "frequency": 7,
                "schedule": "constant",
            },
        ),
        (OwnSchedule, {**PRUNING, "start": 3}),
        (ScheduleAlone, {}),
        (OwnRamp, {**PENALIZED, "ramp": "linear", "end_step": 10}),
        (
            FixedRamp,
            {
                **PENALIZED,
                "penalty_weight": sos.extend.REQUIRED,
                "begin_step": 1,
            },
        ),
    ],
)
def test_hyperparameters_of_a_technique_are_its_json_arguments(
    technique, expected
):
    found = sos.extend.hyperparameters(technique)
    assert found == expected
    assert list(found) == list(expected)
    if technique is not None:
        assert (
            sos.extend.hyperparameters(registry.get_technique(technique))
            == found
        )


def test_hyperparameters_of_an_unknown_technique_raises():
    with pytest.raises(UsageError, match="'FixedMask'.*Received: .*'Magnit'"):
        sos.extend.hyperparameters("Magnit")
    with pytest.raises(UsageError, match="Received: technique=3"):
        sos.extend.select_hyperparameters(3, {})


def test_hyperparameters_returns_copies():
    @sos.extend.register
    class Listing(sos.extend.MaskedWrapper):
        def __init__(self, layer, *, sizes=[1], **kwargs):  # noqa: B006
            super().__init__(layer, **kwargs)

    try:
        sos.extend.hyperparameters(Listing)["sizes"].append(2)
        assert sos.extend.hyperparameters(Listing) == {"sizes": [1]}
    finally:
        del registry._techniques["Listing"]


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_defaults_of_each_technique_are_valid(technique):
    chosen = dict.fromkeys(technique.needs_one_of[:1], 0.5)
    values = {
        name: 0.5 if default is sos.extend.REQUIRED else default
        for name, default in sos.extend.hyperparameters(technique).items()
    } | chosen
    values = json.loads(json.dumps(values))
    short = {
        name: 0.5
        for name, default in sos.extend.hyperparameters(technique).items()
        if default is sos.extend.REQUIRED
    } | chosen
    configs = [
        [layer.get_config() for layer in find_wrappers(sparse)]
        for sparse in (
            sos.sparsify(model_of(), technique, **values),
            sos.sparsify(model_of(), technique, **short),
        )
    ]
    assert configs[0] == configs[1]


def test_select_hyperparameters_keeps_those_of_the_technique():
    values = {"seed": 3, "sparsity": 0.9, "penalty_weight": 1.0, "other": 2}
    select = sos.extend.select_hyperparameters
    assert select(None, values) == {}
    assert select("RandomPruning", values) == {"sparsity": 0.9, "seed": 3}
    assert select(sos.MagnitudePruning, values) == {"sparsity": 0.9}
    assert select("FixedMask", {}) == {}


def test_required_is_one_object_with_a_readable_name():
    assert repr(sos.extend.REQUIRED) == "sos.extend.REQUIRED"
    for same in (
        copy.copy(sos.extend.REQUIRED),
        copy.deepcopy({"a": sos.extend.REQUIRED})["a"],
        pickle.loads(pickle.dumps(sos.extend.REQUIRED)),
    ):
        assert same is sos.extend.REQUIRED
    with pytest.raises(TypeError):
        json.dumps(sos.extend.REQUIRED)


def test_defaults_are_written_down_once_in_effect():
    constructor = arguments.defaults(
        sos.extend.PruningWrapper, sos.extend.SparseWrapper
    )
    for name, default in schedules.make_schedule.__kwdefaults__.items():
        assert constructor[name] == default
    constructor = arguments.defaults(
        sos.extend.PenalizedWrapper, sos.extend.SparseWrapper
    )
    for name, default in ramps.make_ramp.__kwdefaults__.items():
        assert constructor[name] == default


# Numbers and names are the objects that they describe.

PAIRS = [
    (
        {"sparsity": 0.75, "schedule": "constant"},
        {"schedule": sos.schedules.ConstantSparsity(0.75, 0, frequency=100)},
    ),
    (
        {
            "schedule": "constant",
            "sparsity": 0.75,
            "begin_step": 1,
            "frequency": 2,
        },
        {"schedule": sos.schedules.ConstantSparsity(0.75, 1, frequency=2)},
    ),
    (
        {"sparsity": 0.75, "end_step": 3, "frequency": 1},
        {
            "schedule": sos.schedules.PolynomialDecay(
                0.0, 0.75, 0, 3, frequency=1
            )
        },
    ),
    (
        {
            "sparsity": 0.5,
            "initial_sparsity": 0.125,
            "begin_step": 1,
            "end_step": 4,
            "frequency": 2,
            "power": 1,
        },
        {"schedule": sos.schedules.PolynomialDecay(0.125, 0.5, 1, 4, 1, 2)},
    ),
]


@pytest.mark.parametrize("technique", ["MagnitudePruning", "RandomPruning"])
@pytest.mark.parametrize("numbers, objects", PAIRS)
def test_sparsify_with_numbers_gives_the_bits_of_objects(
    technique, numbers, objects
):
    states = []
    for values in (json.loads(json.dumps(numbers)), objects):
        keras.utils.set_random_seed(0)
        sparse = sos.sparsify(model_of(), technique, **values)
        seen = []
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(sparse.trainable_variables)
        step = techniques.train_step(sparse, optimizer)
        x, _ = techniques.batch()
        with sos.SparsityUpdater(sparse, optimizer) as updater:
            for _ in range(5):
                step(x, techniques.normal(8, 4))
                updater.step()
                seen.append(techniques.sparse_state(sparse))
        states.append(seen)
    assert any(not mask.all() for masks in states[0] for mask in masks.values())
    for numbered, made in zip(*states, strict=True):
        assert numbered.keys() == made.keys()
        for path, mask in numbered.items():
            np.testing.assert_array_equal(mask, made[path])


RAMPS = [
    ({}, sos.ramps.ConstantRamp()),
    ({"ramp": "constant"}, sos.ramps.ConstantRamp()),
    ({"ramp": "linear", "end_step": 4}, sos.ramps.LinearRamp(0, 4)),
    (
        {"ramp": "cubic", "begin_step": 1, "end_step": 4},
        sos.ramps.CubicRamp(1, 4),
    ),
    (
        {"ramp": "smoothed_cubic", "end_step": 4},
        sos.ramps.CubicRamp(0, 4, moving_average=True),
    ),
]


@pytest.mark.parametrize(
    "technique", ["L0Regularization", "VariationalDropout"]
)
@pytest.mark.parametrize("numbers, ramp", RAMPS)
def test_ramp_by_name_gives_the_penalties_of_the_object(
    technique, numbers, ramp
):
    penalties = []
    for values in (numbers, {"ramp": ramp}):
        keras.utils.set_random_seed(0)
        sparse = sos.sparsify(model_of(), technique, penalty_weight=2, **values)
        assert all(w.ramp == ramp for w in find_wrappers(sparse))
        seen = []
        for step in range(6):
            for wrapper in find_wrappers(sparse):
                techniques.bind(wrapper, step)
            seen.append(float(sum(sparse.losses)))
        penalties.append(seen)
    assert penalties[0] == penalties[1]
    assert penalties[0][-1] > 0


@pytest.mark.parametrize(
    "technique, values",
    [
        (name, values)
        for name in ("MagnitudePruning", "RandomPruning")
        for values, _ in PAIRS
    ]
    + [
        (name, {"penalty_weight": 0.5, **values})
        for name in ("L0Regularization", "VariationalDropout")
        for values, _ in RAMPS
    ]
    + [
        ("FixedMask", {"sparsity": 0.5, "seed": 3}),
        (OwnArguments, {"sparsity": 0.5}),
        (OwnDefaults, {}),
        (OwnDefaults, {"sparsity": 0.5, "begin_step": 9, "frequency": 3}),
        (OwnRamp, {"penalty_weight": 0.5}),
        (OwnRamp, {"penalty_weight": 0.5, "ramp": "constant"}),
        (OwnRamp, {"penalty_weight": 0.5, "ramp": "cubic", "end_step": 4}),
    ],
)
def test_wrapper_of_numbers_comes_back_from_its_config(technique, values):
    technique = registry.get_technique(technique)
    layer = technique(dense(), **values)
    layer.build((None, 6))
    config = json.loads(json.dumps(layer.get_config()))
    again = technique.from_config(config)
    again.build((None, 6))
    found = json.loads(json.dumps(again.get_config()))
    # How the wrapped layer was built is written differently before and after.
    assert found | {"layer": None} == config | {"layer": None}
    for name in ("schedule", "ramp"):
        assert getattr(again, name, None) == getattr(layer, name, None)


def test_saved_model_of_numbers_trains_on(tmp_path):
    sparse = sos.sparsify(model_of(), "MagnitudePruning", sparsity=0.75)
    sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(find_wrappers(sparse), find_wrappers(loaded), strict=True):
        assert a.schedule == b.schedule


def test_layers_with_the_same_numbers_share_one_schedule():
    numbers = {"sparsity": 0.5, "begin_step": 2, "end_step": 20}
    sparse = sos.sparsify(
        model_of(a=3, b=3, c=3, d=3),
        "MagnitudePruning",
        **numbers,
        rules={
            "b/": {"sparsity": 0.75},
            "c/": {"power": 3},
            "d/": {"technique": "RandomPruning", **numbers},
        },
    )
    a, b, c, d = (wrapper.schedule for wrapper in find_wrappers(sparse))
    assert a is c is d
    assert a is not b and b.with_sparsity(0.5) == a
    assert sos.MagnitudePruning(dense(), **numbers).schedule is a


def test_layers_share_the_schedule_object_of_a_rule():
    sparse = sos.sparsify(
        model_of(a=3, b=3, c=3),
        "MagnitudePruning",
        schedule=sos.schedules.ConstantSparsity(0.5, 0),
        rules={"b|c": {"sparsity": 0.75}},
    )
    a, b, c = (wrapper.schedule for wrapper in find_wrappers(sparse))
    assert b is c and a is not b


# Arguments that do not go together.


@pytest.mark.parametrize(
    "technique, values, error, message",
    [
        ("MagnitudePruning", {}, TypeError, "needs `sparsity`.*neither"),
        (
            "MagnitudePruning",
            {"sparsity": None, "end_step": 3},
            TypeError,
            "MagnitudePruning needs `sparsity`.*Received: end_step=3",
        ),
        (
            "RandomPruning",
            {"schedule": techniques.SCHEDULE, "end_step": 5, "power": 1.0},
            TypeError,
            "object excludes `end_step`, `power`.*Received: end_step=5",
        ),
        (
            "MagnitudePruning",
            {"sparsity": 0.5, "end_step": 4, "begin_step": 5},
            UsageError,
            "begin_step=5, end_step=4",
        ),
        ("MagnitudePruning", {"sparsity": [0.5]}, UsageError, r"\[0.5\]"),
        (
            "MagnitudePruning",
            {"sparsity": np.ones(2), "schedule": techniques.SCHEDULE},
            UsageError,
            "`sparsity` must be a finite number",
        ),
        (
            "L0Regularization",
            {"penalty_weight": 1.0, "ramp": "fast"},
            UsageError,
            "no ramp named 'fast'",
        ),
        (
            "L0Regularization",
            {"penalty_weight": 1.0, "initial_log_alpha": "2"},
            UsageError,
            "Received: initial_log_alpha='2'",
        ),
        (
            "VariationalDropout",
            {"penalty_weight": 1.0, "end_step": 10},
            UsageError,
            "do not fit ramp='constant'.*linear",
        ),
        (
            "VariationalDropout",
            {"penalty_weight": 1.0, "clip_log_alpha": 0},
            UsageError,
            r"\(0, 80\].*float32.*clip_log_alpha=0",
        ),
        ("FixedMask", {"sparsity": 1.5}, UsageError, r"\[0, 1\].*1.5"),
        ("FixedMask", {"seed": 0.5}, UsageError, "Received: seed=0.5"),
    ],
)
def test_wrong_arguments_raise_in_constructor_and_sparsify(
    technique, values, error, message
):
    for make in (
        lambda: registry.get_technique(technique)(dense(), **values),
        lambda: sos.sparsify(model_of(), technique, **values),
    ):
        with pytest.raises(error, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_schedule_with_a_sparsity_ends_with_it():
    schedule = sos.schedules.PolynomialDecay(0.0, 0.9, 0, 10)
    layer = sos.MagnitudePruning(dense(), schedule=schedule, sparsity=0.5)
    assert layer.schedule == sos.schedules.Schedule(
        sos.schedules.PolynomialDecay(0.0, 0.5, 0, 10)
    )
    sparse = sos.sparsify(
        model_of(), "MagnitudePruning", schedule=schedule, sparsity=0.5
    )
    for wrapper in find_wrappers(sparse):
        assert wrapper.schedule == layer.schedule


# Rules.


def schedules_of(**values):
    sparse = sos.sparsify(model_of(), "MagnitudePruning", **values)
    return [wrapper.schedule for wrapper in find_wrappers(sparse)]


NUMBERS = {"sparsity": 0.5, "begin_step": 1, "end_step": 9, "frequency": 2}


@pytest.mark.parametrize(
    "rule, expected",
    [
        (
            {"sparsity": 0.75},
            sos.schedules.PolynomialDecay(0.0, 0.75, 1, 9, 3, 2),
        ),
        (
            {"end_step": 20},
            sos.schedules.PolynomialDecay(0.0, 0.5, 1, 20, 3, 2),
        ),
        (
            {"initial_sparsity": 0.25, "power": 1.0},
            sos.schedules.PolynomialDecay(0.25, 0.5, 1, 9, 1, 2),
        ),
        (
            {"schedule": "constant"},
            sos.schedules.ConstantSparsity(0.5, 1, frequency=2),
        ),
        ({"schedule": techniques.SCHEDULE}, techniques.SCHEDULE),
        (
            {"schedule": techniques.SCHEDULE, "sparsity": 0.75},
            sos.schedules.ConstantSparsity(0.75, 1, frequency=1),
        ),
        (
            {"technique": "MagnitudePruning", "frequency": 3},
            sos.schedules.PolynomialDecay(0.0, 0.5, 1, 9, 3, 3),
        ),
        (
            "MagnitudePruning",
            sos.schedules.PolynomialDecay(0.0, 0.5, 1, 9, 3, 2),
        ),
        ({}, sos.schedules.PolynomialDecay(0.0, 0.5, 1, 9, 3, 2)),
    ],
)
def test_rule_inherits_the_hyperparameters_that_it_does_not_change(
    rule, expected
):
    first, last = schedules_of(**NUMBERS, rules={"last": rule})
    assert first == sos.schedules.Schedule(
        sos.schedules.PolynomialDecay(0.0, 0.5, 1, 9, 3, 2)
    )
    assert last == sos.schedules.Schedule(expected)


def test_rule_changes_the_sparsity_of_a_schedule_alone():
    schedule = sos.schedules.PolynomialDecay(0.0, 0.5, 1, 9)
    first, last = schedules_of(
        schedule=schedule, rules={"last": {"sparsity": 0.75}}
    )
    assert first.inner is schedule
    assert last == first.with_sparsity(0.75)
    with pytest.raises(
        TypeError, match="rule 'last': A `schedule` object exclu"
    ):
        schedules_of(schedule=schedule, rules={"last": {"end_step": 3}})


@pytest.mark.parametrize(
    "rule, expected",
    [
        ({"penalty_weight": 3.0}, sos.ramps.LinearRamp(1, 9)),
        ({"end_step": 4}, sos.ramps.LinearRamp(1, 4)),
        ({"ramp": "cubic"}, sos.ramps.CubicRamp(1, 9)),
        ({"ramp": "constant"}, sos.ramps.ConstantRamp()),
        ({"ramp": sos.ramps.CubicRamp(2, 3)}, sos.ramps.CubicRamp(2, 3)),
    ],
)
def test_rule_inherits_the_ramp_that_it_does_not_change(rule, expected):
    sparse = sos.sparsify(
        model_of(),
        "L0Regularization",
        penalty_weight=2.0,
        ramp="linear",
        begin_step=1,
        end_step=9,
        rules={"last": rule},
    )
    first, last = find_wrappers(sparse)
    assert (first.ramp, first.penalty_weight) == (
        sos.ramps.LinearRamp(1, 9),
        2.0,
    )
    assert last.ramp == expected
    assert last.penalty_weight == rule.get("penalty_weight", 2.0)


def test_rule_with_another_technique_inherits_nothing():
    with pytest.raises(TypeError, match="rule 'last': RandomPruning needs"):
        schedules_of(**NUMBERS, rules={"last": "RandomPruning"})


def test_rule_with_technique_none_leaves_the_weight_dense():
    sparse = sos.sparsify(
        model_of(),
        "MagnitudePruning",
        **NUMBERS,
        rules={"last": {"technique": None}},
    )
    assert not isinstance(sparse.layers[-1], sos.extend.SparseWrapper)
    with pytest.raises(UsageError, match="there is no technique"):
        schedules_of(
            **NUMBERS, rules={"last": {"technique": None, "sparsity": 0.5}}
        )


def test_rules_as_pairs_equal_rules_as_a_mapping():
    rules = {"first": None, r"^last/kernel$": {"sparsity": 0.75}}
    pairs = json.loads(json.dumps(list(rules.items())))
    found = [
        sos.sparsity_report(
            sos.sparsify(model_of(), "MagnitudePruning", sparsity=0.5, rules=r)
        ).rows
        for r in (rules, pairs, tuple(rules.items()))
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("rules", [None, {}, [], ()])
def test_sparsify_with_empty_rules_applies_none(rules):
    assert len(schedules_of(sparsity=0.5, rules=rules)) == 2
    with pytest.raises(UsageError, match="left to make sparse"):
        sos.sparsify(model_of(), rules=rules)


def test_config_entry_of_a_technique_gives_the_arguments_of_sparsify():
    config = ml_collections.ConfigDict(
        {
            "sparsity": {
                "technique": "MagnitudePruning",
                "sparsity": 0.5,
                "end_step": 9,
                "rules": (
                    (r"first/.*", {"sparsity": 0.75}),
                    ("last", {"technique": "FixedMask", "sparsity": 0.25}),
                ),
            },
            "mapping": {
                "technique": "RandomPruning",
                "sparsity": 0.5,
                "rules": {"last": {"sparsity": 0.75}, "first": None},
            },
        }
    )
    first, last = find_wrappers(sos.sparsify(model_of(), **config.sparsity))
    assert first.target_sparsity() == 0.75
    assert (type(last), last.sparsity) == (sos.FixedMask, 0.25)
    (last,) = find_wrappers(sos.sparsify(model_of(), **config.mapping))
    assert last.target_sparsity() == 0.75


# Techniques from outside.


def test_external_technique_takes_its_own_hyperparameters():
    sparse = sos.sparsify(
        model_of(),
        "OwnArguments",
        sparsity=0.5,
        temperature=4.0,
        rules={"last": {"temperature": 8.0, "function": np.negative}},
    )
    first, last = find_wrappers(sparse)
    assert (first.temperature, last.temperature) == (4.0, 8.0)
    assert (first.function, last.function) == (np.abs, np.negative)
    assert first.schedule is last.schedule
    with pytest.raises(TypeError, match=r"`temprature`.*'temperature'.*'func"):
        sos.sparsify(model_of(), "OwnArguments", sparsity=0.5, temprature=1.0)


def test_external_technique_keeps_its_own_defaults():
    def only(technique, **values):
        sparse = sos.sparsify(model_of(only=4), technique, **values)
        return find_wrappers(sparse)[0]

    constant = sos.schedules.ConstantSparsity
    for values, expected in (
        ({}, constant(0.25, 0, frequency=7)),
        ({"sparsity": 0.75}, constant(0.75, 0, frequency=7)),
        ({"begin_step": 3}, constant(0.25, 3, frequency=7)),
        ({"frequency": 100}, constant(0.25, 0, frequency=100)),
        ({"schedule": techniques.SCHEDULE}, techniques.SCHEDULE),
    ):
        expected = sos.schedules.Schedule(expected)
        assert only("OwnDefaults", **values).schedule == expected
        assert OwnDefaults(dense(), **values).schedule == expected
    for values, expected in (
        ({}, sos.ramps.LinearRamp(0, 10)),
        ({"begin_step": 3}, sos.ramps.LinearRamp(3, 10)),
        ({"ramp": "cubic"}, sos.ramps.CubicRamp(0, 10)),
        ({"ramp": "constant"}, sos.ramps.ConstantRamp()),
        ({"ramp": sos.ramps.CubicRamp(1, 2)}, sos.ramps.CubicRamp(1, 2)),
    ):
        assert only("OwnRamp", penalty_weight=1, **values).ramp == expected
        assert OwnRamp(dense(), penalty_weight=1, **values).ramp == expected
    layer = only("OwnSchedule", start=5)
    assert layer.schedule == sos.schedules.Schedule(constant(0.5, 5))
    layer = only("ScheduleAlone", schedule=techniques.SCHEDULE)
    assert layer.schedule.inner is techniques.SCHEDULE
    with pytest.raises(TypeError, match=r"ScheduleAlone needs `schedule`"):
        only("ScheduleAlone")
    layer = only("FixedRamp", penalty_weight=1, begin_step=4)
    assert layer.ramp == sos.ramps.LinearRamp(4, 5)


# Properties.

VALUES = {
    "sparsity": st.sampled_from([0.25, 0.5]),
    "initial_sparsity": st.sampled_from([0.0, 0.125]),
    "begin_step": st.integers(0, 5),
    "end_step": st.one_of(st.none(), st.integers(5, 9)),
    "frequency": st.integers(1, 3),
    "power": st.sampled_from([1.0, 3.0]),
}
CHANGES = st.fixed_dictionaries({}, optional=VALUES)


def outcome(call):
    try:
        return call()
    except UsageError as error:
        return str(error)


@hypothesis.given(CHANGES, CHANGES)
def test_rule_of_any_values_equals_the_merged_hyperparameters(values, changes):
    values = {"sparsity": 0.75, **values}
    resolve = sos.MagnitudePruning.resolve_hyperparameters
    merged = outcome(lambda: resolve({**values, **changes}))
    assert outcome(lambda: resolve(changes, values)) == merged
    made = outcome(
        lambda: sos.MagnitudePruning(dense(), **{**values, **changes}).schedule
    )
    if isinstance(merged, str):
        assert made == merged
    else:
        assert made is merged["schedule"]
        assert resolve(merged) == merged


def test_select_hyperparameters_of_each_pair_takes_the_same():
    values = {"sparsity": 0.5, "penalty_weight": 1e-3, "seed": 3}
    for one, other in itertools.permutations(techniques.TECHNIQUES, 2):
        sparse = sos.sparsify(
            model_of(),
            one,
            **sos.extend.select_hyperparameters(one, values),
            rules=[
                (
                    "last",
                    {
                        "technique": other.__name__,
                        **sos.extend.select_hyperparameters(other, values),
                    },
                )
            ],
        )
        assert [type(w) for w in find_wrappers(sparse)] == [one, other]


# Keys of rules that are no expressions.


def nested_model():
    inner = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="one"),
            keras.layers.Dense(8, name="two"),
        ],
        name="inner",
    )
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            inner,
            keras.layers.Reshape((2, 4)),
            keras.layers.LSTM(3, name="lstm"),
        ],
        name="outer",
    )


def targets(sparse):
    return {
        row["weight"]: row["target"]
        for row in sos.sparsity_report(sparse).rows
        if row["technique"]
    }


@pytest.mark.parametrize("copy", [True, False])
def test_rule_of_a_layer_is_for_its_weights_and_those_below(copy):
    model = nested_model()
    rules = {
        model.get_layer("inner"): {"sparsity": 0.75},
        model.get_layer("first"): None,
    }
    sparse = sos.sparsify(
        model, "MagnitudePruning", sparsity=0.5, rules=rules, copy=copy
    )
    found = targets(sparse)
    by_expression = targets(
        sos.sparsify(
            nested_model(),
            "MagnitudePruning",
            sparsity=0.5,
            rules={"one|two": {"sparsity": 0.75}, "^first/": None},
        )
    )
    assert found == by_expression
    assert sorted(found.values()) == [0.5, 0.5, 0.75, 0.75]
    reasons = {
        row["weight"]: row["reason"] for row in sos.sparsity_report(sparse).rows
    }
    assert reasons["first/kernel"] == "left dense by rule layer 'first'"


def test_rule_of_a_variable_is_for_it_alone():
    model = nested_model()
    cell = model.get_layer("lstm").cell
    sparse = sos.sparsify(
        model,
        "MagnitudePruning",
        sparsity=0.5,
        rules=[
            (cell.recurrent_kernel, {"sparsity": 0.25}),
            ("one/", None),
            (model.get_layer("first"), "FixedMask"),
        ],
    )
    found = targets(sparse)
    assert [t for w, t in found.items() if "recurrent" in w] == [0.25]
    assert [t for w, t in found.items() if w == "lstm/lstm_cell/kernel"] == [
        0.5
    ]
    assert found["first/kernel"] is None
    assert not any("one" in path for path in found)


def other_layer():
    layer = keras.layers.Dense(2, name="other")
    layer.build((None, 6))
    return layer


@pytest.mark.parametrize(
    "make_rules, message",
    [
        (lambda m: {other_layer(): None}, "model 'model'.*layer 'other'"),
        (
            lambda m: [(other_layer().kernel, None)],
            "model 'model'.*variable 'other/kernel'",
        ),
        (
            lambda m: [(m.layers[0].bias, None)],
            r"variable 'first/bias'.*\(rank 1\).*'first/kernel'",
        ),
        (
            lambda m: {m.get_layer("relu"): None},
            "layer 'relu'.*'first/kernel'",
        ),
        (
            lambda m: {"^first": None, m.layers[0]: None},
            "'first/kernel': '\\^first', layer 'first'",
        ),
        (
            lambda m: [(m.layers[0], None), (m.layers[0].kernel, None)],
            "'first/kernel': layer 'first', variable 'first/kernel'",
        ),
        (
            lambda m: [(m.layers[0], None), (m.layers[0], "FixedMask")],
            "Received twice: layer 'first'",
        ),
        (
            lambda m: [(m.layers[0].kernel, None)] * 2,
            "Received twice: variable 'first/kernel'",
        ),
        (lambda m: {3: None}, "(?i)a key of `rules`.*Received: 3"),
        (lambda m: {"(": None}, "a key of `rules`.*Received: '\\('"),
        (
            lambda m: {m.layers[0]: {"sparsty": 0.5}},
            "rule layer 'first'.*`sparsty`",
        ),
    ],
)
def test_rule_with_a_wrong_key_raises(make_rules, message):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(3, name="first"),
            keras.layers.ReLU(name="relu"),
            keras.layers.Dense(2, name="last"),
        ],
        name="model",
    )
    before = model.get_config()
    with pytest.raises((UsageError, TypeError), match=message) as error:
        sos.sparsify(
            model,
            "MagnitudePruning",
            sparsity=0.5,
            rules=make_rules(model),
            copy=False,
        )
    assert "\n" not in str(error.value)
    assert model.get_config() == before


def test_expressions_search_the_path_that_the_report_prints():
    """Also where the weight's own path begins with the name of a model."""

    class Named(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first = keras.layers.Dense(4, name="first")

        def call(self, inputs):
            return self.first(inputs)

    def model():
        model = Named(name="named")
        model(keras.Input((6,)))
        return model

    assert model().first.kernel.path == "named/first/kernel"
    sparse = sos.sparsify(
        model(), rules={"^first/": {"technique": "FixedMask", "sparsity": 0.5}}
    )
    assert list(targets(sparse)) == ["first/kernel"]
    with pytest.raises(UsageError, match="'named/'"):
        sos.sparsify(model(), "FixedMask", rules={"named/": None})
    # A wrapper does not know yet which model will hold it.
    layers = [
        sos.FixedMask(
            keras.layers.Dense(3, name=name),
            sparsity=0.5,
            include=f"^{name}/kernel$",
        )
        for name in ("one", "two")
    ]
    built_inside = keras.Sequential([keras.Input((6,)), layers[0]], name="m")
    assert layers[0].layer.kernel.path == "m/one/kernel"
    inputs = keras.Input((6,))
    built_before = keras.Model(inputs, layers[1](inputs), name="m")
    assert layers[1].layer.kernel.path == "two/kernel"
    assert list(targets(built_inside)) == ["one/kernel"]
    assert list(targets(built_before)) == ["two/kernel"]


# The penalty weight.


@pytest.mark.parametrize(
    "technique", ["L0Regularization", "VariationalDropout"]
)
def test_num_examples_gives_the_weight_of_one_example(technique):
    one = sos.sparsify(model_of(), technique, num_examples=60_000)
    other = sos.sparsify(model_of(), technique, penalty_weight=1 / 60_000)
    for a, b in zip(find_wrappers(one), find_wrappers(other), strict=True):
        assert a.penalty_weight == pytest.approx(1 / 60_000, rel=1e-6)
        assert a.get_config() == b.get_config()
    again = type(a).from_config(
        registry.get_technique(technique)(dense(), num_examples=8).get_config()
    )
    assert again.penalty_weight == 0.125


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({}, TypeError, "penalty_weight=None, num_examples=None"),
        (
            {"penalty_weight": None, "num_examples": None},
            TypeError,
            "penalty_weight=None, num_examples=None",
        ),
        (
            {"penalty_weight": 0.1, "num_examples": 10},
            TypeError,
            "penalty_weight=0.1, num_examples=10",
        ),
        ({"num_examples": 0}, UsageError, "num_examples=0"),
        ({"num_examples": 1.5}, UsageError, "num_examples=1.5"),
    ],
)
def test_penalty_weight_that_is_not_given_once_raises(values, error, message):
    rules = {"last": {"technique": "L0Regularization", **values}}
    for make, place in (
        (lambda: sos.L0Regularization(dense(), **values), ""),
        (lambda: sos.sparsify(model_of(), "L0Regularization", **values), ""),
        (lambda: sos.sparsify(model_of(), rules=rules), "rule 'last'.*"),
    ):
        with pytest.raises(error, match=place + message):
            make()


@pytest.mark.parametrize(
    "default, change, expected",
    [
        ({"num_examples": 4}, {"penalty_weight": 0.5}, [0.25, 0.5]),
        ({"penalty_weight": 0.5}, {"num_examples": 4}, [0.5, 0.25]),
        ({"num_examples": 4}, {"seed": 1}, [0.25, 0.25]),
        (
            {"penalty_weight": 0.5, "num_examples": None},
            {"penalty_weight": None, "num_examples": 4},
            [0.5, 0.25],
        ),
    ],
)
def test_rule_with_another_penalty_weight_replaces_either(
    default, change, expected
):
    sparse = sos.sparsify(
        model_of(), "L0Regularization", **default, rules={"last": change}
    )
    found = [w.penalty_weight for w in find_wrappers(sparse)]
    assert found == expected


def test_num_examples_replaces_a_techniques_own_default():
    class Own(techniques.Shift):
        def __init__(self, layer, *, penalty_weight=0.5, **kwargs):
            super().__init__(layer, penalty_weight=penalty_weight, **kwargs)

    sos.extend.register(Own)
    try:
        for values, expected in (
            ({}, 0.5),
            ({"num_examples": 4}, 0.25),
            ({"penalty_weight": 2}, 2),
        ):
            sparse = sos.sparsify(model_of(only=3), "Own", **values)
            assert find_wrappers(sparse)[0].penalty_weight == expected
        with pytest.raises(TypeError, match="penalty_weight=2, num_exampl"):
            Own(dense(), penalty_weight=2, num_examples=4)
    finally:
        del registry._techniques["Own"]
