"""configs/wmt.py, against the tables that the authors published."""

import collections
import json
import pathlib
import re

import ml_collections
import pytest

from configs import wmt
from sos.errors import UsageError
from sos.experiments import config as config_lib
from sos.experiments import expand, published, sweeps

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "translation.md"
PAIRS = 4_500_000
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# Networks in the authors' tables; each of variational dropout has 11 scores.
ROWS = {
    "MagnitudePruning": 504,
    "RandomPruning": 630,
    "VariationalDropout": 372,
    "L0Regularization": 930,
}
TECHNIQUES = {
    "magnitude": "MagnitudePruning",
    "random": "RandomPruning",
    "variational_dropout": "VariationalDropout",
    "l0": "L0Regularization",
}
PRUNING = ("MagnitudePruning", "RandomPruning")
EVERY_POINT = [(name, s) for name in TECHNIQUES for s in SPARSITIES]


def config_of(argument):
    return config_lib.resolve(wmt.get_config(argument))


def rows(technique):
    """Returns the scores of a technique's table."""
    return [
        score
        for score in published.load("transformer")
        if score.technique == technique and not score.branch
    ]


def best(technique, sparsity):
    """Returns the best score of those near a sparsity."""
    near = [s for s in rows(technique) if abs(s.sparsity - sparsity) <= 0.003]
    top, *others = sorted(near, key=lambda score: -score.score)
    assert not others or others[0].score < top.score
    return top


def row_of(config):
    """Returns what the authors' table of the config's technique has."""
    sparsity = config.sparsity
    common = (sparsity.begin_step, sparsity.end_step, config.regularization)
    if sparsity.technique in PRUNING:
        return (sparsity.sparsity, *common, sparsity.frequency)
    return (f"{sparsity.penalty_weight:.6g}", sparsity.ramp, *common)


def published_row(score):
    """Returns the same of a row of a table."""
    row = score.hyperparameters
    regularization = row["regularization"]
    if score.technique in PRUNING:
        begin, end = int(row["begin_step"]), int(row["end_step"])
        # The table has the sparsity that was reached; it is a little less than
        # the target if pruning ended with training.
        target = min(SPARSITIES, key=lambda s: abs(s - score.sparsity))
        assert abs(target - score.sparsity) < 0.001
        return (target, begin, end, regularization, int(row["frequency"]))
    ramp = {"linear": "linear", "cubic": "smoothed_cubic"}[row["ramp"]]
    return (
        f"{float(row['penalty_weight']):.6g}",
        ramp,
        int(row["ramp_begin_step"]),
        int(row["ramp_end_step"]),
        regularization,
    )


@pytest.mark.parametrize(("name", "sparsity"), EVERY_POINT)
def test_get_config_has_the_best_published_setting(name, sparsity):
    config = config_of(f"{name},sparsity={sparsity}")
    expected = best(TECHNIQUES[name], sparsity)
    assert config.sparsity.technique == TECHNIQUES[name]
    assert row_of(config) == published_row(expected)
    assert (config.batch_size, config.train_steps) == (2048, 500_000)
    if name == "variational_dropout":
        threshold = float(expected.hyperparameters["threshold"])
        assert config.sparsity.threshold == threshold
        assert config.sparsity.initial_log_sigma2 == -10
        assert config.sparsity.clip_log_alpha == 8
        assert list(config.decode.thresholds) == list(wmt.THRESHOLDS)
    else:
        assert not config.decode.thresholds
    # The published table of the best agrees.
    (point,) = (
        p
        for p in published.best("transformer")
        if p.technique == TECHNIQUES[name]
        and not p.branch
        and p.target_sparsity == sparsity
    )
    assert point.score == expected.score


def test_thresholds_are_those_of_the_table():
    found = {
        float(score.hyperparameters["threshold"])
        for score in rows("VariationalDropout")
    }
    assert sorted(found) == list(wmt.THRESHOLDS)


def test_dense_config_has_the_recipe_of_the_study():
    config = config_of("dense")
    assert config.sparsity.technique is None
    assert config.model.to_dict() == {
        "width": 512,
        "hidden_width": 2048,
        "heads": 8,
        "layers": 6,
        "split_heads": False,
        "target_spaces": 32,
    }
    assert config.regularization == "dropout+label_smoothing"
    assert config.optimizer.to_dict() == {
        "name": "adam",
        "beta_2": 0.997,
        "epsilon": 1e-9,
    }
    rate = config.learning_rate
    assert (rate.schedule, rate.base, rate.warmup_steps) == ("rsqrt", 2, 8000)
    assert config.data.vocabulary_size == 33_288
    assert (config.data.source_length, config.data.target_length) == (256, 256)
    assert (config.decode.beam, config.decode.alpha) == (4, 0.6)


def test_docstring_has_the_published_scores():
    for name, technique in TECHNIQUES.items():
        (line,) = re.findall(rf"^    {name} +([\d. ]+)$", wmt.__doc__, re.M)
        shown = [float(number) for number in line.split()]
        assert shown == [best(technique, s).score for s in SPARSITIES]
    dense = published.best("transformer")[0]
    assert f"{dense.score:.2f}, a mean of five" in " ".join(wmt.__doc__.split())
    assert f"deviation {dense.sd:.2f}" in wmt.__doc__


def test_docs_have_the_settings_of_the_config():
    lines = re.findall(r"^\| (0\.\d+) \| (.*) \|$", PAGE.read_text(), re.M)
    found = set()
    shown = collections.defaultdict(list)
    for sparsity, cells in lines:
        cells = cells.split(" | ")
        for name, score, setting in zip(
            TECHNIQUES, cells[::2], cells[1::2], strict=True
        ):
            config = config_of(f"{name},sparsity={sparsity}")
            found.add((name, float(sparsity)))
            shown[name].append(score.split(" at ")[0])
            assert setting == setting_of(config)
    assert found == set(EVERY_POINT)
    for name, scores in shown.items():
        (line,) = re.findall(rf"^    {name} +([\d. ]+)$", wmt.__doc__, re.M)
        assert line.split() == scores


def setting_of(config):
    """Returns the text of a setting on the page."""
    sparsity = config.sparsity
    regularization = {
        "none": "none",
        "label_smoothing": "LS",
        "dropout+label_smoothing": "D+LS",
    }[config.regularization]
    steps = [
        f"{step / 1000:g}k" if step >= 1000 else str(step)
        for step in (sparsity.begin_step, sparsity.end_step)
    ]
    if sparsity.technique in PRUNING:
        parts = [*steps, f"{sparsity.frequency / 1000:g}k", regularization]
    else:
        ramp = sparsity.ramp.removeprefix("smoothed_")
        weight = f"{sparsity.penalty_weight * PAIRS:.3g}"
        parts = [weight, ramp, *steps, regularization]
    if sparsity.technique == "VariationalDropout":
        parts.append(f"{sparsity.threshold:g}")
    return ", ".join(parts)


def test_train_steps_scale_the_steps_of_techniques():
    config = config_of("magnitude,sparsity=0.8,train_steps=50000,seed=3")
    sparsity = config.sparsity
    steps = (sparsity.begin_step, sparsity.end_step, sparsity.frequency)
    assert steps == (20_000, 40_000, 1000)
    assert (config.train_steps, config.seed) == (50_000, 3)
    # The rate falls with the square root of the step, whatever the length.
    assert config.learning_rate == config_of("dense").learning_rate
    for name in wmt.TECHNIQUES:
        shortest = config_of(f"{name},train_steps=1")
        assert shortest.train_steps == 1
        if name in ("magnitude", "random"):
            assert shortest.sparsity.begin_step < shortest.sparsity.end_step
            assert shortest.sparsity.frequency >= 1


def test_values_replace_published_ones():
    config = config_of("magnitude,sparsity=0.9,begin_step=8000")
    sparsity = config.sparsity
    assert (sparsity.begin_step, sparsity.end_step) == (8000, 400_000)
    config = config_of("variational_dropout,penalty_weight=1e-6,threshold=3.0")
    assert config.sparsity.penalty_weight == 1e-6
    assert config.sparsity.threshold == 3
    config = config_of(
        "random,sparsity=0.85,begin_step=1,end_step=50,frequency=7,"
        "regularization=none"
    )
    assert row_of(config) == (0.85, 1, 50, "none", 7)


def rules_of(config):
    return config_lib.plain(config.sparsity)["rules"]


def test_options_change_the_network_and_the_label():
    config = config_of("dense,split_heads=True,regularization=none")
    assert config.model.split_heads
    assert config.regularization == "none"
    assert config.label == "dense, split heads"
    config = config_of("l0,dense_embedding=True,split_heads=True")
    assert rules_of(config) == [["^embedding/", None]]
    assert config.label == "L0, split heads, embedding dense"
    config = config_of("random,sparsity=0.9,embedding_sparsity=0.5")
    assert rules_of(config) == [["^embedding/", {"sparsity": 0.5}]]
    assert config.label == "random pruning, embedding 0.5"
    config = config_of("magnitude,size=tiny,split_heads=True")
    assert config.model.to_dict() == {
        **wmt.Translation.default_config().model.to_dict(),
        "width": 128,
        "hidden_width": 512,
        "heads": 4,
        "layers": 2,
        "split_heads": True,
    }
    assert config.learning_rate.hidden_size == 128
    assert config.label == "magnitude pruning, tiny, split heads"
    assert config_of("magnitude").label == ""
    assert config_of("l0").label == "L0"


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("magnitude,sparsity=0.85", ["0.5, 0.6", "begin_step=200000", "0.85"]),
        (
            "magnitude,sparsity=0.85",
            ["frequency=10000,regularization=label_smoothing"],
        ),
        ("magnitude,sparsity=0.85,begin_step=1", ["end_step", "frequency"]),
        ("random,sparsity=x", ["0.98", "'x'"]),
        ("random,sparsity=[1]", ["0.98", "[1]"]),
        ("variational_dropout,sparsity=0.65", ["penalty_weight", "0.65"]),
        ("l0,sparsity=0.65", ["penalty_weight", "0.65"]),
        ("dense,split_heads=1", ["split_heads", "True or False", "1"]),
        ("dense,size=big", ["size", "base, tiny", "big"]),
        ("dense,dense_embedding=True", ["dense_embedding=True"]),
        ("l0,embedding_sparsity=0.5", ["embedding_sparsity", "l0"]),
        ("magnitude,embedding_sparsity=2", ["embedding_sparsity", "[0, 1)"]),
        (
            "magnitude,embedding_sparsity=0.5,dense_embedding=True",
            ["takes one", "embedding_sparsity=0.5"],
        ),
        ("magnitude,dense_embedding=True,rules=()", ["other `rules`"]),
        ("dense,train_steps=x", ["train_steps", "integer", "'x'"]),
        ("dense,seed=-1", ["seed", "integer", "-1"]),
        ("dense,sparsity=0.9", ["config.sparsity", "sparsity"]),
        ("extended_magnitude", ["random", "extended_magnitude"]),
        ("l0,magic=1", ["magic"]),
    ],
)
def test_get_config_with_a_mistake_names_it(argument, parts):
    with pytest.raises(UsageError) as error:
        config_of(argument)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture(scope="module")
def overrides():
    return list(wmt.sweep(wmt.get_config()))


def test_sweep_has_every_published_run_once(overrides):
    grid = collections.defaultdict(list)
    for values in overrides:
        if values["seed"] == 0:
            # Faster than complete configs.
            run = ml_collections.ConfigDict(values)
            grid[run.sparsity.technique].append(run)
    assert len(grid.pop(None)) == 1
    # The best settings are in the tables, too.
    assert {name: len(configs) for name, configs in grid.items()} == ROWS
    for technique, configs in grid.items():
        assert collections.Counter(map(row_of, configs)) == (
            collections.Counter({published_row(s) for s in rows(technique)})
        )


def test_sweep_selects_the_best_settings_by_their_seed(overrides, tmp_path):
    # The others take time.
    some = [
        values
        for index, values in enumerate(overrides)
        if values["seed"] > 0 or index % 50 == 0
    ]
    runs = expand(wmt.get_config(), some)
    selected, parents = sweeps.select(runs, "_seed-1_", tmp_path)
    assert not parents
    names = {config_lib.run_name(config) for config in selected}
    expected = {
        config_lib.run_name(config_of(f"{argument},seed=1"))
        for argument in (
            "dense",
            *(f"{name},sparsity={s}" for name, s in EVERY_POINT),
        )
    }
    assert names == expected
    assert len(names) == 29
    assert collections.Counter(values["seed"] for values in overrides) == {
        0: sum(ROWS.values()) + 1,
        1: 29,
        2: 29,
        3: 1,
        4: 1,
    }


@pytest.mark.slow
def test_sweep_has_different_runs(overrides):
    # Raises if two have one name.
    expand(wmt.get_config(), overrides)


def test_sweep_of_a_short_training_has_different_runs():
    config = wmt.get_config("dense,train_steps=16")
    made = [json.dumps(overrides) for overrides in wmt.sweep(config)]
    assert 300 < len(made) < sum(ROWS.values())
    assert len(set(made)) == len(made)


def test_sweep_with_a_technique_raises():
    config = wmt.get_config("magnitude")
    with pytest.raises(UsageError, match="MagnitudePruning"):
        list(wmt.sweep(config))


def test_get_config_with_a_parent_branches_from_it(tmp_path):
    parent = config_lib.resolve(wmt.get_config("magnitude,sparsity=0.8,seed=2"))
    directory = tmp_path / config_lib.run_name(parent)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_lib.plain(parent)))
    config = config_of(f"scratch,multiplier=2,parent={directory}")
    assert config.label == "scratch-b"
    assert config.train_steps == 1_000_000
    assert config.seed == 1002
    assert config.branch.multiplier == 2
