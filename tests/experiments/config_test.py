import json

import hypothesis
import hypothesis.strategies as st
import pytest

import sos
from configs import fashion_mnist, fashion_mnist_full
from sos.errors import UsageError
from sos.experiments import config as config_lib
from sos.experiments import sweeps
from sos.experiments.run_files import write_config
from tests.support import toy_experiment
from tests.support.toy_experiment import ToyExperiment

FILES = (fashion_mnist, fashion_mnist_full)


def resolved(technique="dense", **overrides):
    return config_lib.resolve(toy_experiment.config(technique, **overrides))


def add_default(monkeypatch, name, value):
    """Adds an entry to the task's schema, or changes a default."""
    default_config = ToyExperiment.default_config.__func__

    def changed(cls):
        config = default_config(cls)
        section, _, entry = name.rpartition(".")
        (config[section] if section else config)[entry] = value
        return config

    monkeypatch.setattr(ToyExperiment, "default_config", classmethod(changed))


# Resolving.


def test_resolve_partial_config_takes_defaults_of_task_and_technique():
    config = resolved("magnitude", seed=3)
    assert (config.seed, config.batch_size, config.model.units) == (3, 8, 16)
    assert config.sparsity.begin_step == 0
    assert config.sparsity.frequency == 2
    assert set(config.sparsity) == {
        "technique",
        "rules",
        *sos.extend.hyperparameters("MagnitudePruning"),
    }
    with pytest.raises(AttributeError):
        config.learning = 1


def test_resolve_resolved_config_changes_nothing():
    for technique in toy_experiment.TECHNIQUES:
        config = resolved(technique)
        stored = json.loads(json.dumps(config_lib.plain(config)))
        again = config_lib.resolve(stored)
        assert config_lib.plain(again) == stored
        assert config_lib.run_name(again) == config_lib.run_name(config)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"train_step": 3}, ["'train_step'", "train_steps"]),
        ({"batch_size": 0}, ["config.batch_size", "Received: 0"]),
        ({"train_steps": 2.5}, ["config.train_steps", "2.5"]),
        ({"seed": -1}, ["config.seed", "-1"]),
        ({"seed": True}, ["config.seed", "True"]),
        ({"keep": "some"}, ["config.keep", "trunk", "some"]),
        ({"dtype_policy": "half"}, ["config.dtype_policy", "half"]),
        ({"model": 3}, ["config.model", "3"]),
        ({"sparsity": None}, ["config.sparsity", "None"]),
        ({"label": 3}, ["config.label", "3"]),
        ({"parent": 3}, ["config.parent", "3"]),
        ({"branch": 3}, ["config.branch", "3"]),
        ({"keep_steps": 3}, ["config.keep_steps", "3"]),
        ({"keep_steps": [13]}, ["config.keep_steps", "[13]"]),
        ({"model": {"units": object()}}, ["object"]),
        ({"model": {"rate": float("nan")}}, ["NaN", "nan"]),
        ({"model": {"a.b": 1}}, ["dots", "a.b"]),
        ({"task": "nowhere:Task"}, ["config.task", "nowhere:Task"]),
        ({"task": "json:JSONEncoder"}, ["config.task", "ExperimentTask"]),
        ({"task": ""}, ["config.task", "''"]),
        ({"task": ".nowhere:Task"}, ["config.task", ".nowhere:Task"]),
        ({"sparsity": {"technique": "Magic"}}, ["Magic", "MagnitudePruning"]),
        (
            {"sparsity": {"technique": "MagnitudePruning"}},
            ["config.sparsity.sparsity"],
        ),
        (
            {"sparsity": {"technique": "L0Regularization"}},
            [
                "config.sparsity.penalty_weight` or",
                "config.sparsity.num_examples",
            ],
        ),
        (
            {"sparsity": {"technique": "MagnitudePruning", "penalty": 1.0}},
            ["'penalty'", "sparsity"],
        ),
        ({"sparsity": {"technique": None, "sparsity": 0.5}}, ["'sparsity'"]),
        (
            {
                "sparsity": {
                    "technique": "MagnitudePruning",
                    "sparsity": 0.5,
                    "end_step": 13,
                }
            },
            ["end_step=13", "train_steps=12"],
        ),
    ],
)
def test_resolve_invalid_entry_raises(overrides, parts):
    with pytest.raises(UsageError) as error:
        resolved(**overrides)
    for part in parts:
        assert part in str(error.value)


def test_resolve_default_technique_of_the_task_can_be_replaced(monkeypatch):
    add_default(
        monkeypatch, "sparsity", {"rules": (), **toy_experiment.MAGNITUDE}
    )
    default = config_lib.resolve(toy_experiment.CONFIG)
    assert config_lib.fingerprint(default) == toy_experiment.CONFIG
    replaced = resolved("l0")
    assert replaced.sparsity.penalty_weight == 0.01
    assert "sparsity" not in replaced.sparsity
    names = {config_lib.run_name(c) for c in (default, replaced, resolved())}
    assert len(names) == 3


def test_load_task_module_with_missing_import_shows_the_cause(
    tmp_path, monkeypatch
):
    (tmp_path / "broken_task.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        config_lib.load_task("broken_task:Task")


# Fingerprint.


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"technique": None}, []),
        ({"technique": "RandomPruning", "sparsity": 0.5}, ["sparsity"]),
        (
            {"technique": "L0Regularization", "penalty_weight": 0.5},
            ["penalty_weight"],
        ),
        (
            {"technique": "VariationalDropout", "num_examples": 500},
            ["num_examples"],
        ),
    ],
)
def test_required_hyperparameters_are_those_that_the_config_had_to_give(
    given, names
):
    config = resolved(sparsity=given)
    assert config_lib.required_hyperparameters(config.sparsity) == names
    for name in names:
        assert f"_{name}-{given[name]}_" in config_lib.run_name(config)


def test_fingerprint_holds_only_what_differs_from_defaults():
    assert config_lib.fingerprint(resolved()) == toy_experiment.CONFIG
    assert config_lib.fingerprint(resolved("l0", seed=2)) == {
        **toy_experiment.CONFIG,
        "seed": 2,
        "sparsity.technique": "L0Regularization",
        "sparsity.penalty_weight": 0.01,
    }
    # A default that is written out is a default.
    assert config_lib.fingerprint(resolved(model={"units": 16})) == (
        toy_experiment.CONFIG
    )


def test_fingerprint_holds_the_name_of_the_parent_not_its_path():
    branch = {"name": "lottery_ticket", "step": 0}
    first, second = (
        resolved(parent=parent, branch=branch, keep_steps=keep_steps)
        for parent, keep_steps in (("other", ()), ("/moved/other/", (6,)))
    )
    expected = {
        **toy_experiment.CONFIG,
        "parent": "other",
        "branch.name": "lottery_ticket",
    }
    for config in (first, second):
        assert config_lib.fingerprint(config) == expected
    assert config_lib.config_diff(config_lib.plain(first), second) == []


def test_run_name_differs_whenever_the_fingerprint_does():
    configs = [
        *(resolved(technique) for technique in toy_experiment.TECHNIQUES),
        resolved(seed=1),
        resolved(train_steps=13),
        resolved(model={"units": 8}),
        resolved(optimizer={"rate": 0.02, "momentum": None}),
        resolved(sparsity={"technique": None, "rules": [["a", None]]}),
        resolved(gradient_accumulation_steps=2),
        resolved(dtype_policy="mixed_bfloat16"),
        resolved(parent="runs/other"),
        resolved(parent="runs/another"),
        resolved(parent="runs/other", branch={"name": "scratch"}),
        resolved(parent="runs/other", branch={"name": "lottery_ticket"}),
        resolved(
            parent="runs/other", branch={"name": "lottery_ticket", "step": 1}
        ),
        resolved(task="tests.support.toy_experiment:Failing"),
    ]
    names = [config_lib.run_name(config) for config in configs]
    assert len(set(names)) == len(names)
    assert names[0].startswith("dense_seed-0_")
    assert names[1].startswith("magnitude_pruning_sparsity-0.8_seed-0_")


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (1, 1.0),
        ([1, {"a": 2}], (1.0, {"a": 2.0})),
    ],
)
def test_run_name_form_of_a_value_does_not_matter(one, same):
    first, second = (resolved(model={"x": value}) for value in (one, same))
    assert config_lib.run_name(first) == config_lib.run_name(second)
    assert config_lib.config_diff(config_lib.plain(first), second) == []


def test_run_name_boolean_is_no_number():
    names = {
        config_lib.run_name(resolved(model={"x": value}))
        for value in (0, 1, False, True, None, "1")
    }
    assert len(names) == 6


def test_run_name_whole_hyperparameter_is_the_same_as_integer_and_float():
    first, second = (
        resolved(sparsity={**toy_experiment.TECHNIQUES["l0"], **penalty})
        for penalty in ({"penalty_weight": 2}, {"penalty_weight": 2.0})
    )
    assert config_lib.run_name(first) == config_lib.run_name(second)


def test_run_name_rules_as_mapping_and_as_pairs_are_the_same():
    rules = {"^a.*/": None, "^b": {"sparsity": 0.5}}
    first, second = (
        resolved(sparsity={**toy_experiment.MAGNITUDE, "rules": form})
        for form in (rules, tuple(rules.items()))
    )
    assert config_lib.run_name(first) == config_lib.run_name(second)
    assert config_lib.config_diff(config_lib.plain(first), second) == []


def test_run_name_ignores_label_and_keep():
    name = config_lib.run_name(resolved())
    assert config_lib.run_name(resolved(label="x", keep="none")) == name


def test_run_name_new_entry_with_default_stays(monkeypatch):
    name = config_lib.run_name(resolved("magnitude"))
    add_default(monkeypatch, "model.depth", 2)
    config = resolved("magnitude")
    assert config.model.depth == 2
    assert config_lib.run_name(config) == name
    other = resolved("magnitude", model={"depth": 3})
    assert config_lib.run_name(other) != name


@hypothesis.given(
    st.dictionaries(
        st.sampled_from(["seed", "train_steps", "batch_size"]),
        st.integers(1, 1000),
    )
)
def test_run_name_does_not_depend_on_order(values):
    forward = resolved(**values)
    backward = resolved(**dict(reversed(values.items())))
    assert config_lib.run_name(forward) == config_lib.run_name(backward)


# Differences.


def test_config_diff_missing_entry_is_no_difference(monkeypatch):
    stored = config_lib.plain(resolved("magnitude"))
    add_default(monkeypatch, "model.depth", 2)
    assert config_lib.config_diff(stored, resolved("magnitude")) == []


def test_config_diff_changed_default_is_a_difference(monkeypatch):
    stored = config_lib.plain(resolved("magnitude"))
    add_default(monkeypatch, "model.units", 32)
    config = resolved("magnitude")
    # The name is the same: only the stored config shows it.
    (line,) = config_lib.config_diff(stored, config)
    assert "model.units" in line
    assert "16" in line and "32" in line


def test_config_diff_label_is_no_difference():
    stored = config_lib.plain(resolved(label="old"))
    assert config_lib.config_diff(stored, resolved(label="new")) == []


# Arguments of config files.


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("", ("none", {})),
        ("l0", ("l0", {})),
        ("l0,seed=2", ("l0", {"seed": 2})),
        ("seed=2,rate=1e-3", ("none", {"seed": 2, "rate": 1e-3})),
        ("l0,ramp=cubic", ("l0", {"ramp": "cubic"})),
    ],
)
def test_parse_argument_returns_name_and_values(argument, expected):
    assert config_lib.parse_argument(argument, default="none") == expected


@pytest.mark.parametrize("argument", ["a,b", "a,b=1,b=2", "a,=1", "a,b c=1"])
def test_parse_argument_invalid_raises(argument):
    with pytest.raises(UsageError, match="key=value"):
        config_lib.parse_argument(argument)


# The files in configs/.


@pytest.mark.parametrize("file", FILES)
def test_config_file_every_argument_has_a_run_of_its_own(file):
    names = [
        config_lib.run_name(config_lib.resolve(file.get_config(argument)))
        for name in fashion_mnist.TECHNIQUES
        for argument in (name, f"{name},seed=1")
    ]
    assert len(set(names)) == len(names)


def test_config_file_argument_and_sweep_give_the_same_run():
    one = fashion_mnist.get_config("magnitude,sparsity=0.95,seed=1")
    names = names_of(fashion_mnist)
    assert len(names) == 86
    assert config_lib.run_name(config_lib.resolve(one)) in names


def names_of(file):
    base = file.get_config()
    configs = sweeps.expand(base, file.sweep(base))
    return [config_lib.run_name(config) for config in configs]


def test_config_file_runs_without_parent_keep_their_names():
    names = names_of(fashion_mnist)
    # Users have their results.
    assert names[0] == "dense_seed-0_7621fcbf"
    assert names[50] == (
        "l0_regularization_penalty_weight-0.0015_seed-0_d0c8208e"
    )


@pytest.mark.parametrize(
    ("file", "seeds", "profiles"),
    [(fashion_mnist, 2, 4), (fashion_mnist_full, 3, 0)],
)
def test_config_file_sweep_has_branches_of_three_trunks_for_each_seed(
    file, seeds, profiles
):
    base = file.get_config()
    configs = sweeps.expand(base, file.sweep(base))
    by_name = {config_lib.run_name(config): config for config in configs}
    branches = {}
    for config in configs:
        if config.parent is not None:
            # Of the same sweep.
            trunk = by_name[config.parent]
            branches.setdefault(config.label, []).append((trunk, config))
    labels = [
        "scratch-e",
        "scratch-b",
        "lottery ticket",
        "augmented init",
        "random mask",
    ]
    for label in labels:
        pairs = branches.pop(label)
        assert {trunk.label for trunk, _ in pairs} == {
            "magnitude, first layer dense"
        }
        assert [trunk.sparsity.sparsity for trunk, _ in pairs] == [
            value for value in (0.8, 0.9, 0.95) for _ in range(seeds)
        ]
        factor = 2 if label == "scratch-b" else 1
        for _, config in pairs:
            assert config.train_steps == factor * base.train_steps
    assert sum(len(pairs) for pairs in branches.values()) == profiles


def test_config_file_argument_of_a_branch_gives_the_run_of_the_sweep(tmp_path):
    trunk = config_lib.resolve(
        fashion_mnist.get_config("magnitude_dense_first,sparsity=0.8,seed=1")
    )
    directory = tmp_path / config_lib.run_name(trunk)
    write_config(config_lib.plain(trunk), str(directory))
    config = fashion_mnist.get_config(
        f"scratch,multiplier=2,parent={directory}"
    )
    assert config.parent == str(directory)
    assert (config.label, config.train_steps) == ("scratch-b", 1400)
    assert config_lib.run_name(config) in names_of(fashion_mnist)
    config = fashion_mnist.get_config(
        f"lottery_ticket,seed=5,parent={directory}"
    )
    assert config.seed == 5


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("magic,parent=x", ["x"]),
        ("scratch", ["parent=DIRECTORY", "'scratch'"]),
        ("scratch,parent=absent", ["directory", "absent"]),
    ],
)
def test_config_file_invalid_branch_raises(argument, parts):
    with pytest.raises(UsageError) as error:
        fashion_mnist.get_config(argument)
    for part in parts:
        assert part in str(error.value)


def test_config_file_argument_of_a_long_training_is_used():
    argument = "variational_dropout,initial_log_sigma2=-3.0"
    config = fashion_mnist_full.get_config(argument)
    assert config.sparsity.initial_log_sigma2 == -3.0


@pytest.mark.parametrize("file", FILES)
def test_config_file_sweep_of_one_technique_raises(file):
    config = file.get_config("l0")
    with pytest.raises(UsageError, match="L0Regularization"):
        list(file.sweep(config))


def test_config_file_unknown_technique_raises():
    with pytest.raises(UsageError, match="magnitude_dense_first"):
        fashion_mnist.get_config("magic")


def test_resolve_end_step_of_a_rule_after_training_raises():
    rules = [["^a/", {"end_step": 13}]]
    sparsity = {**toy_experiment.TECHNIQUES["magnitude"], "rules": rules}
    with pytest.raises(UsageError, match="end_step=13, train_steps=12"):
        resolved(sparsity=sparsity)


def test_label_of_rules_alone_is_not_dense():
    rules = [["^a/", toy_experiment.TECHNIQUES["magnitude"]]]
    config = resolved(sparsity={"technique": None, "rules": rules})
    assert config_lib.label(config) == "by rules"
    assert config_lib.label(resolved()) == "dense"
