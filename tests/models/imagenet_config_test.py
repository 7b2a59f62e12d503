"""configs/imagenet.py, against the tables that the authors published."""

import collections
import json
import math
import pathlib
import re

import pytest

from configs import imagenet
from sos.errors import UsageError
from sos.experiments import config as config_lib
from sos.experiments import expand, published, sweeps
from sos.experiments.task import make_task
from sos.training import make_learning_rate
from sos.wrappers.base import find_wrappers

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "imagenet.md"
IMAGES = 1_281_167
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Runs in the authors' tables.
ROWS = {
    "MagnitudePruning": 236,
    "RandomPruning": 288,
    "VariationalDropout": 161,
    "L0Regularization": 323,
}
PRUNING = {"magnitude": "MagnitudePruning", "random": "RandomPruning"}
# Overrides for a network that is built in a second.
SMALL = {
    "data": {"name": "synthetic", "image_size": 32},
    "model": {"depth": 18, "width": 0.1},
    "batch_size": 4,
}


def config_of(argument):
    return config_lib.resolve(imagenet.get_config(argument))


def rows(technique):
    """Returns the rows of a technique's table."""
    return [
        score
        for score in published.load("resnet50")
        if score.technique == technique and not score.branch
    ]


def best(technique, sparsity, window):
    """Returns the row with the best score near a sparsity."""
    near = [s for s in rows(technique) if abs(s.sparsity - sparsity) <= window]
    top, *others = sorted(near, key=lambda score: -score.score)
    assert not others or others[0].score < top.score
    return top


def row_of(config):
    """Returns what the authors' table of the config's technique has."""
    sparsity = config.sparsity
    common = (sparsity.begin_step, sparsity.end_step)
    smoothing = config.loss.label_smoothing
    if sparsity.technique in PRUNING.values():
        return (sparsity.sparsity, *common, sparsity.frequency, smoothing)
    weight = f"{sparsity.penalty_weight:.8g}"
    if sparsity.technique == "VariationalDropout":
        return (*common, weight, smoothing)
    decay = f"{config.loss.l2:.8g}"
    return (weight, sparsity.initial_log_alpha, smoothing, decay)


def published_row(score):
    """Returns the same of a row of a table."""
    row = score.hyperparameters
    smoothing = float(row["label_smoothing"])
    if score.technique in PRUNING.values():
        names = ("begin_step", "end_step", "frequency")
        return (score.sparsity, *(int(row[n]) for n in names), smoothing)
    weight = f"{float(row['penalty_weight']):.8g}"
    if score.technique == "VariationalDropout":
        names = ("ramp_begin_step", "ramp_end_step")
        return (*(int(row[n]) for n in names), weight, smoothing)
    log_alpha = float(row["initial_log_alpha"])
    decay = f"{float(row['weight_decay']):.8g}"
    return (weight, log_alpha, smoothing, decay)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", PRUNING)
def test_get_config_of_pruning_has_the_best_published_setting(name, sparsity):
    config = config_of(f"{name},sparsity={sparsity}")
    assert config.sparsity.technique == PRUNING[name]
    assert row_of(config) == published_row(best(PRUNING[name], sparsity, 0))
    assert config.loss.l2 == 1e-4
    assert (config.batch_size, config.train_steps) == (1024, 128_000)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_get_config_of_variational_dropout_has_the_best_published_setting(
    sparsity,
):
    config = config_of(f"variational_dropout,sparsity={sparsity}")
    technique = "VariationalDropout"
    if sparsity == 0.7:
        # No run is in the window.
        expected = min(rows(technique), key=lambda s: abs(s.sparsity - 0.7))
        assert 0.003 < expected.sparsity - 0.7 < 0.004
        assert expected.score == pytest.approx(76.21, abs=0.005)
    else:
        expected = best(technique, sparsity, 0.003)
    assert config.sparsity.technique == technique
    assert row_of(config) == published_row(expected)
    assert config.sparsity.ramp == "linear"
    assert config.sparsity.initial_log_sigma2 == -15
    assert config.sparsity.threshold == 0.5
    assert config.sparsity.clip_log_alpha == 8
    assert config.loss.l2 == 1e-4


def test_get_config_of_l0_has_the_best_published_row():
    config = config_of("l0")
    (top,) = (
        s for s in rows("L0Regularization") if s.score == pytest.approx(40.504)
    )
    assert top.score == max(s.score for s in rows("L0Regularization"))
    assert top.sparsity == 0
    assert row_of(config) == published_row(top)
    assert config.sparsity.technique == "L0Regularization"
    assert config.sparsity.ramp == "linear"


def test_get_config_of_l0_corrects_the_weight_decay():
    decays = {
        float(score.hyperparameters["initial_log_alpha"]): float(
            score.hyperparameters["weight_decay"]
        )
        for score in rows("L0Regularization")
        if score.hyperparameters["weight_decay"] != "0"
    }
    assert sorted(decays) == [0.847, 2.197, 2.95, 4.6]
    for log_alpha, decay in decays.items():
        config = config_of(f"l0,initial_log_alpha={log_alpha}")
        gate = 1 / (1 + math.exp(-log_alpha))
        assert config.loss.l2 == pytest.approx(1e-4 / gate)
        assert config.loss.l2 == pytest.approx(decay, rel=1e-8)


# From the authors' README, which has no others of this kind: the sparsity of
# most layers and of all weights, and the sizes of the layers of ResNet-50.
EXTENDED = {0.8: 0.79970, 0.91: 0.90083, 0.96: 0.94680, 0.98: 0.96518}
FIRST, LAST, ALL = 9_408, 2_048_000, 25_502_912


@pytest.mark.parametrize(
    ("sparsity", "point"),
    list(
        zip(
            EXTENDED,
            (p for p in published.best("resnet50") if p.nonuniform),
            strict=True,
        )
    ),
)
def test_get_config_of_extended_magnitude_has_the_published_setting(
    sparsity, point
):
    config = config_of(f"extended_magnitude,sparsity={sparsity}")
    assert config.sparsity.technique == "MagnitudePruning"
    names = ("begin_step", "end_step", "frequency")
    setting = [f"{name}={config.sparsity[name]}" for name in names]
    setting.append(f"label_smoothing={config.loss.label_smoothing:g}")
    assert " ".join(setting) == point.settings
    # 1.5 times as many images as usual.
    assert (config.batch_size, config.train_steps) == (4096, 48_000)
    zeros = 0.8 * LAST + sparsity * (ALL - FIRST - LAST)
    assert zeros / ALL == pytest.approx(EXTENDED[sparsity], abs=5e-6)
    assert zeros / ALL == pytest.approx(point.sparsity, abs=0.0035)


def test_extended_magnitude_leaves_the_first_layer_dense():
    config = imagenet.get_config("extended_magnitude,sparsity=0.91")
    config.update(SMALL)
    model = make_task(config_lib.resolve(config)).build_model()
    paths = [variable.path for variable in model.trainable_variables]
    assert "initial_conv/kernel" in paths
    targets = {w.layer.name: w.target_sparsity() for w in find_wrappers(model)}
    # All others of ResNet-18.
    assert len(targets) == 21
    assert "initial_conv" not in targets
    assert targets.pop("final_dense") == 0.8
    assert set(targets.values()) == {0.91}


def rate(argument, step):
    config = config_of(argument)
    entries = config.learning_rate.to_dict()
    del entries["technique_multiplier"]
    schedule = make_learning_rate(
        entries, train_steps=config.train_steps, batch_size=config.batch_size
    )
    return float(schedule(step))


@pytest.mark.parametrize(
    ("argument", "batch", "stretch"),
    [
        ("magnitude", 1024, 1),
        ("l0", 1024, 1),
        ("extended_magnitude", 4096, 1.5),
        ("dense,train_steps=64000", 1024, 0.5),
    ],
)
def test_learning_rate_drops_after_epochs(argument, batch, stretch):
    peak = 0.1 * batch / 256
    drops = [stretch * epochs * IMAGES / batch for epochs in (5, 30, 60, 80)]
    warmup, *drops = drops
    middle = math.floor(warmup / 2)
    assert rate(argument, 0) == 0
    assert rate(argument, middle) == pytest.approx(peak * middle / warmup)
    assert rate(argument, math.ceil(warmup)) == pytest.approx(peak)
    for count, drop in enumerate(drops):
        before, after = peak * 0.1**count, peak * 0.1 ** (count + 1)
        assert rate(argument, math.floor(drop)) == pytest.approx(before)
        assert rate(argument, math.ceil(drop)) == pytest.approx(after)


def test_learning_rate_at_steps_of_both_recipes():
    # 5, 30, 60 and 80 epochs, and 1.5 times as many.
    for argument, steps in (
        ("dense", (6_256, 37_535, 75_069, 100_092)),
        ("extended_magnitude", (2_346, 14_076, 28_151, 37_535)),
    ):
        peak = {"dense": 0.4, "extended_magnitude": 1.6}[argument]
        for step, factor in zip(steps, (1, 0.1, 0.01, 0.001), strict=True):
            assert rate(argument, step) == pytest.approx(peak * factor)
            assert rate(argument, step - 1) != pytest.approx(peak * factor)


def test_docstring_has_the_published_accuracies():
    text = imagenet.__doc__
    for name, technique in [*PRUNING.items(), ("variational_dropout", None)]:
        (line,) = re.findall(rf"^    {name} +([\d. ]+)$", text, re.MULTILINE)
        shown = [float(number) for number in line.split()]
        for sparsity, accuracy in zip(SPARSITIES, shown, strict=True):
            if technique is not None:
                score = best(technique, sparsity, 0).score
            elif sparsity == 0.7:
                score = min(
                    rows("VariationalDropout"),
                    key=lambda s: abs(s.sparsity - 0.7),
                ).score
            else:
                score = best("VariationalDropout", sparsity, 0.003).score
            assert accuracy == pytest.approx(score, abs=0.0051)
    (line,) = re.findall(r"^    extended_magnitude +([\d. ]+)$", text, re.M)
    points = [p.score for p in published.best("resnet50") if p.nonuniform]
    assert [float(number) for number in line.split()] == points
    (line,) = re.findall(r"^    of all weights +([\d. ]+)$", text, re.M)
    overall = [round(sparsity, 3) for sparsity in EXTENDED.values()]
    assert [float(number) for number in line.split()] == overall


def setting_of(cell):
    """Returns the numbers of a setting such as "40k, 100k, 0.05, 0"."""
    return [
        1000 * float(part[:-1]) if part.endswith("k") else float(part)
        for part in cell.replace(",000", "k").replace(",500", ".5k").split(", ")
    ]


def test_docs_have_the_settings_of_the_config():
    lines = re.findall(r"^\| (0[.\d]+) \| (.*) \|$", PAGE.read_text(), re.M)
    tables = {len(cells.split(" | ")): {} for _, cells in lines}
    for sparsity, cells in lines:
        cells = cells.split(" | ")
        tables[len(cells)][float(sparsity)] = cells
    assert tuple(tables[6]) == SPARSITIES
    assert tuple(tables[3]) == tuple(EXTENDED)
    names = [*PRUNING, "variational_dropout"]
    for sparsity, cells in tables[6].items():
        for name, cell in zip(names, cells[1::2], strict=True):
            config = config_of(f"{name},sparsity={sparsity}")
            third = config.sparsity.get("frequency")
            if third is None:
                third = config.sparsity.penalty_weight * IMAGES
            expected = (
                *(config.sparsity.begin_step, config.sparsity.end_step, third),
                config.loss.label_smoothing,
            )
            assert setting_of(cell) == pytest.approx(expected)
    points = [p for p in published.best("resnet50") if p.nonuniform]
    for (sparsity, cells), point in zip(tables[3].items(), points, strict=True):
        assert float(cells[0]) == round(EXTENDED[sparsity], 3)
        assert float(cells[1]) == point.score
        config = config_of(f"extended_magnitude,sparsity={sparsity}")
        assert setting_of(cells[2]) == [
            config.sparsity.begin_step,
            config.sparsity.end_step,
            config.sparsity.frequency,
            config.loss.label_smoothing,
        ]
    accuracies = re.findall(
        r"^    (?:magnitude|random|variational_dropout) +(.*)$",
        imagenet.__doc__,
        re.M,
    )
    for cells, *shown in zip(
        tables[6].values(), *map(str.split, accuracies), strict=True
    ):
        assert [cell.split(" at ")[0] for cell in cells[::2]] == shown


def test_train_steps_scale_the_steps_of_techniques():
    config = config_of("magnitude,sparsity=0.9,train_steps=12800,seed=3")
    sparsity = config.sparsity
    steps = (sparsity.begin_step, sparsity.end_step, sparsity.frequency)
    assert steps == (4000, 7600, 200)
    assert (config.train_steps, config.seed) == (12_800, 3)
    config = config_of("extended_magnitude,train_steps=24000")
    assert (config.train_steps, config.batch_size) == (24_000, 4096)
    assert config.sparsity.end_step == 18_000
    for name in imagenet.TECHNIQUES:
        shortest = config_of(f"{name},train_steps=1")
        assert shortest.train_steps == 1


def test_values_replace_published_ones():
    config = config_of("magnitude,sparsity=0.9,begin_step=8000")
    sparsity = config.sparsity
    assert (sparsity.begin_step, sparsity.end_step) == (8000, 76_000)
    config = config_of("variational_dropout,penalty_weight=1e-6,threshold=3.0")
    assert config.sparsity.penalty_weight == 1e-6
    assert config.sparsity.threshold == 3
    config = config_of(
        "random,sparsity=0.85,begin_step=1,end_step=50,frequency=7"
    )
    assert row_of(config) == (0.85, 1, 50, 7, 0.1)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("magnitude,sparsity=0.85", ["0.5, 0.7", "begin_step=40000", "0.85"]),
        ("magnitude,sparsity=0.85,begin_step=1", ["end_step", "frequency"]),
        ("random,sparsity=x", ["0.98", "'x'"]),
        ("random,sparsity=[1]", ["0.98", "[1]"]),
        ("extended_magnitude,sparsity=0.9", ["0.91", "those of 0.91"]),
        ("variational_dropout,sparsity=0.6", ["penalty_weight", "0.6"]),
        ("l0,sparsity=0.9", ["penalty_weight", "0.9"]),
        ("l0,initial_log_alpha=x", ["initial_log_alpha", "'x'"]),
        (
            "magnitude,sparsity=0.85,train_steps=1280",
            ["1280 steps", "begin_step=400,end_step=1000,frequency=20"],
        ),
        ("dense,train_steps=x", ["train_steps", "integer", "'x'"]),
        ("dense,seed=-1", ["seed", "integer", "-1"]),
        ("dense,sparsity=0.9", ["config.sparsity", "sparsity"]),
        ("vgg", ["extended_magnitude", "vgg"]),
        ("l0,magic=1", ["magic"]),
    ],
)
def test_get_config_with_a_mistake_names_it(argument, parts):
    with pytest.raises(UsageError) as error:
        config_of(argument)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture(scope="module")
def runs():
    config = imagenet.get_config()
    return expand(config, imagenet.sweep(config))


def test_sweep_has_every_published_run_once(runs):
    grid = collections.defaultdict(list)
    for config in runs:
        # Extended runs are in no table.
        if config.seed == 0 and config.batch_size == 1024:
            grid[config.sparsity.technique].append(config)
    assert len(grid.pop(None)) == 1
    # The best of variational dropout and of L0 are in the tables, too.
    assert {name: len(configs) for name, configs in grid.items()} == ROWS
    for technique, configs in grid.items():
        expected = collections.Counter(map(published_row, rows(technique)))
        assert collections.Counter(map(row_of, configs)) == expected


def test_sweep_selects_the_best_settings_by_their_seed(runs, tmp_path):
    selected, parents = sweeps.select(runs, "_seed-1_", tmp_path)
    assert not parents
    names = {config_lib.run_name(config) for config in selected}
    expected = {
        config_lib.run_name(config_of(f"{argument},seed=1"))
        for argument in (
            "dense",
            "l0",
            *(f"extended_magnitude,sparsity={s}" for s in EXTENDED),
            *(
                f"{name},sparsity={sparsity}"
                for name in (*PRUNING, "variational_dropout")
                for sparsity in SPARSITIES
            ),
        )
    }
    assert names == expected
    assert len(names) == 24
    assert collections.Counter(config.seed for config in runs) == {
        0: 1008 + 5,
        1: 24,
        2: 24,
    }


def test_sweep_of_a_short_training_has_different_runs():
    config = imagenet.get_config("dense,train_steps=16")
    config.batch_size = 8
    made = expand(config, imagenet.sweep(config))
    assert len(made) > 500
    extended = [c for c in made if c.label == "extended magnitude"]
    assert {(c.batch_size, c.train_steps) for c in extended} == {(32, 6)}


def test_sweep_with_a_technique_raises():
    config = imagenet.get_config("magnitude")
    with pytest.raises(UsageError, match="MagnitudePruning"):
        list(imagenet.sweep(config))


def test_get_config_with_a_parent_branches_from_it(tmp_path):
    parent = imagenet.get_config("extended_magnitude,sparsity=0.96,seed=2")
    parent = config_lib.resolve(parent)
    directory = tmp_path / config_lib.run_name(parent)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_lib.plain(parent)))
    config = config_of(f"scratch,multiplier=2,parent={directory}")
    assert config.label == "scratch-b"
    assert config.train_steps == 96_000
    assert config.batch_size == 4096
    assert config.seed == 1002
    assert config.branch.multiplier == 2
