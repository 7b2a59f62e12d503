import dataclasses
import json

import pytest

import sos
from configs import fashion_mnist, fashion_mnist_full
from sos.experiments.runs import Run
from sos.experiments.runs import expand as expand_config


def test_expands_in_a_stable_order(config, expand):
    config.seeds = (1, 0)
    runs = expand(config)
    assert len(runs) == 2 * (1 + 5 * 2)
    assert runs == expand(config)
    described = [(r.technique, r.sparsity, r.penalty, r.seed) for r in runs]
    assert described[:4] == [
        ("dense", None, None, 0),
        ("dense", None, None, 1),
        ("magnitude", 0.5, None, 0),
        ("magnitude", 0.5, None, 1),
    ]
    assert described[-1] == ("l0", None, 1.0, 1)


@pytest.mark.parametrize(
    ("config_file", "train_examples", "count"),
    [(fashion_mnist, 6_000, 52), (fashion_mnist_full, 60_000, 108)],
)
def test_the_shipped_configs_make_their_studies(
    config_file, train_examples, count
):
    config = config_file.get_config().lock()
    runs = expand_config(config, train_examples=train_examples)
    # As their descriptions have it.
    assert len(runs) == len({run.name for run in runs}) == count
    assert f"trains {count} networks" in config_file.__doc__
    settings = {}
    for run in runs:
        settings.setdefault(run.technique, set()).add(
            (run.sparsity, run.penalty)
        )
    assert len(settings.pop("dense")) == 1
    assert len(settings) == 5
    assert min(len(found) for found in settings.values()) >= 5
    assert settings["magnitude"] == settings["magnitude_dense_first"]


def test_fractions_become_steps(config, expand):
    config.steps = 1000
    config.techniques = "magnitude"
    config.magnitude.update(begin=0.1, end=0.6, frequency=0.02)
    run = expand(config)[0]
    assert (run.begin_step, run.end_step, run.frequency) == (100, 600, 20)
    schedule = run.technique_settings()["schedule"]
    assert schedule.final_sparsity == 0.5


def test_penalties_are_multiples_of_one_over_n(config, expand):
    config.techniques = "l0"
    run = expand(config)[0]
    assert run.technique_settings()["penalty_weight"] == 0.1 / 256


def test_the_technique_gets_all_settings_of_the_run(config, expand):
    config.steps = 1000
    config.seeds = (3,)
    config.techniques = "magnitude,random,variational_dropout,l0"
    for name in config.techniques.split(","):
        config[name].update(begin=0.1, end=0.6)
    for name in ("magnitude", "random"):
        config[name].frequency = 0.02
    settings = {
        run.technique: run.technique_settings()
        for run in expand(config)
        if run.wrapper and (run.sparsity == 0.9 or run.penalty == 1.0)
    }
    schedule = sos.Schedule(sos.PolynomialDecay(0.0, 0.9, 100, 600, 3, 20))
    for name in ("magnitude", "random"):
        assert sos.Schedule(settings[name]["schedule"]) == schedule
    for name in ("variational_dropout", "l0"):
        assert settings[name]["ramp"] == sos.LinearRamp(100, 600)
        assert settings[name]["penalty_weight"] == 1.0 / 256
    # Magnitude pruning draws nothing.
    seeds = {name: s.get("seed") for name, s in settings.items()}
    assert seeds.pop("magnitude") is None
    assert set(seeds.values()) == {3}


def test_only_sparsity_penalty_and_seed_share_a_shape(config, expand):
    config.seeds = (0, 1)
    runs = expand(config)
    shapes = {run.shape for run in runs}
    assert len(shapes) == 6
    assert {s.technique for s in shapes} == set(config.techniques.split(","))
    other = dataclasses.replace(runs[0], steps=7)
    assert other.shape not in shapes


def test_names_are_readable_and_distinct(config, expand):
    runs = expand(config)
    assert len({run.name for run in runs}) == len(runs)
    assert runs[2].name.startswith("magnitude_sparsity-0.9_seed-0_")
    changed = dataclasses.replace(runs[2], steps=7)
    assert changed.name != runs[2].name


def test_the_name_does_not_change_between_releases():
    run = Run(
        technique="magnitude",
        sparsity=0.9,
        seed=0,
        model="convnet",
        dataset="fashion_mnist",
        train_examples=6000,
        steps=700,
        batch_size=128,
        learning_rate=5e-3,
    )
    assert run.name == "magnitude_sparsity-0.9_seed-0_72011f83"


def test_a_title_is_for_people_and_decides_nothing(config, expand):
    config.techniques = "magnitude_dense_first,variational_dropout,l0"
    runs = expand(config)
    assert list(dict.fromkeys(run.title for run in runs)) == [
        "magnitude, first layer dense",
        "variational dropout",
        "L0",
    ]
    config.magnitude_dense_first.title = "another"
    renamed = expand(config)
    assert renamed[0].title == "another"
    assert renamed == runs
    assert [run.name for run in renamed] == [run.name for run in runs]
    assert hash(renamed[0]) == hash(runs[0])
    assert "title" not in runs[0].identity()
    assert {**runs[0].identity(), "title": "another"} == dataclasses.asdict(
        renamed[0]
    )


def test_each_technique_keeps_its_own_weights_dense(config, expand):
    kept = {run.technique: run.keep_dense for run in expand(config)}
    assert kept.pop("magnitude_dense_first") == "^conv1/"
    assert set(kept.values()) == {""}
    # The two have nothing else to tell them apart, and share no step.
    one, other = (
        run
        for run in expand(config)
        if run.technique.startswith("magnitude") and run.sparsity == 0.9
    )
    assert one.shape != other.shape
    same = dataclasses.replace(
        other, technique=one.technique, keep_dense="", title=""
    )
    assert same == one


def test_the_config_names_the_network_and_the_data(config, expand):
    config.model = "residual"
    config.dataset = "elsewhere"
    config.weight_decay = 1e-4
    run = expand(config)[0]
    assert (run.model, run.dataset) == ("residual", "elsewhere")
    assert run.weight_decay == 1e-4


def test_a_run_survives_json(config, expand):
    for run in expand(config):
        copy = Run(**json.loads(json.dumps(dataclasses.asdict(run))))
        assert copy == run
        assert copy.name == run.name


WRONG = [
    ("steps", 0, "config.steps"),
    ("batch_size", 0, "config.batch_size"),
    ("batch_size", 257, "256"),
    ("learning_rate", 0.0, "above 0"),
    ("learning_rate", float("nan"), "config.learning_rate"),
    ("seeds", (), "config.seeds"),
    ("seeds", (-1,), "config.seeds"),
    ("seeds", (0, 0), "different"),
    ("seeds", (0.5,), "integers"),
    ("techniques", "magnitude,magnitud", "dense,l0,magnitude,magnitude_dense_"),
    ("techniques", "", "names"),
    ("techniques", "dense,dense", "once"),
    ("techniques", "steps", "'steps'"),
    ("magnitude.sparsities", (1.5,), "config.magnitude.sparsities"),
    ("magnitude.sparsities", (1.0,), r"\[0, 1\)"),
    ("magnitude.sparsities", (-0.5,), "config.magnitude.sparsities"),
    ("magnitude.sparsities", (), "config.magnitude.sparsities"),
    ("magnitude.sparsities", ("0.5x",), "0.5x"),
    ("magnitude.frequency", 0.0, "config.magnitude.frequency"),
    ("magnitude.begin", 0.9, "config.magnitude.begin"),
    ("random.end", 1.5, "at most 1"),
    ("random.wrapper", "Nothing", "config.random.wrapper"),
    ("l0.penalties", (-1.0,), "not negative"),
    ("l0.penalties", (float("inf"),), "config.l0.penalties"),
    ("l0.begin", 0.95, "config.l0.begin"),
    ("l0.learning_rate_multiplier", 0.0, "learning_rate_multiplier"),
    ("weight_decay", -1e-4, "config.weight_decay"),
    ("model", "", "config.model"),
    ("layerwise_sparsity", 1.5, "config.layerwise_sparsity"),
    ("random.keep_dense", "conv(", "config.random.keep_dense"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_wrong_values_are_refused(config, expand, name, value, text):
    if name == "techniques" and value == "":
        text = "techniques"
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=text) as error:
        expand(config)
    assert "\n" not in str(error.value)


def test_wrong_arguments_of_a_technique_are_refused(config, expand):
    with config.unlocked():
        config.l0.arguments.initial_alpha = 1.0
    with pytest.raises(ValueError, match="config.l0.*initial_alpha"):
        expand(config)


def test_a_technique_from_elsewhere_joins_the_study(config, expand):
    @sos.register
    class SmallestPruning(sos.MagnitudePruning):
        def scores(self, weight):
            return -super().scores(weight)

    config.magnitude.wrapper = "SmallestPruning"
    config.techniques = "magnitude"
    assert expand(config)[0].wrapper == "SmallestPruning"
