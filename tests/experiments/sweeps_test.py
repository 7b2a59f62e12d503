import os
import pathlib
import shutil

import keras
import pytest

from sos.errors import UsageError
from sos.experiments import branch, results, sweeps
from sos.experiments.config import run_name
from sos.experiments.runs import run_directory
from tests.experiments.config_test import add_default
from tests.support import toy_experiment

MAGNITUDE = toy_experiment.MAGNITUDE


def test_expand_override_replaces_values():
    first, second = sweeps.expand(
        {**toy_experiment.CONFIG, "model": {"units": 4}},
        [{"seed": 1}, {"seed": 2, "model": {"units": 8}}],
    )
    assert (first.seed, first.model.units) == (1, 4)
    assert (second.seed, second.model.units) == (2, 8)


def test_expand_technique_replaces_all_of_sparsity():
    base = {
        **toy_experiment.CONFIG,
        "sparsity": {**MAGNITUDE, "rules": (("^a/", None),)},
    }
    changed, replaced, dense = sweeps.expand(
        base,
        [
            {"sparsity": {"sparsity": 0.5}},
            {"sparsity": toy_experiment.TECHNIQUES["l0"]},
            {"sparsity": {"technique": None}},
        ],
    )
    assert (changed.sparsity.sparsity, changed.sparsity.end_step) == (0.5, 8)
    assert len(changed.sparsity.rules) == 1
    assert replaced.sparsity.technique == "L0Regularization"
    assert replaced.sparsity.end_step is None
    assert len(replaced.sparsity.rules) == 0
    assert dense.sparsity.to_dict() == {"technique": None, "rules": []}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([], "at least one"),
        ([{"seed": 1}, {"seed": 1, "label": "x"}], "'seed': 1"),
        ([{"seeds": 1}], "'seeds'"),
    ],
)
def test_expand_invalid_sweep_raises(overrides, part):
    with pytest.raises(UsageError, match=part):
        sweeps.expand(toy_experiment.CONFIG, overrides)


def test_select_matches_names(toy_configs):
    selected, parents = sweeps.select(toy_configs, "^magn.*seed-1", "absent")
    assert [run_name(config)[:18] for config in selected] == [
        "magnitude_pruning_"
    ]
    assert parents == []
    assert sweeps.select(toy_configs, "", "absent") == (toy_configs, [])


@pytest.fixture
def family(toy_configs):
    """A run that is finished in `finished`, its branch, and a branch of it."""
    runs = [toy_configs[2]]
    for seed in (10, 20):
        runs += sweeps.expand({}, [branch(runs[-1], "scratch", seed=seed)])
    return runs


def test_select_adds_parents_that_are_not_finished(family, finished, tmp_path):
    trunk, branch, last = family
    assert sweeps.select(family, "seed-20", tmp_path) == (
        [last],
        [trunk, branch],
    )
    assert sweeps.select(family, "seed-20", finished) == ([last], [branch])
    assert sweeps.select(family, "seed-10", finished) == ([branch], [])
    # One that matches is not added again.
    assert sweeps.select(family, "seed-(0|20)", tmp_path) == (
        [trunk, last],
        [branch],
    )
    # Nor one that is finished elsewhere.
    directory = run_directory(trunk, finished)
    (moved,) = sweeps.expand(branch, [{"parent": directory}])
    assert sweeps.select([trunk, moved], "seed-10", tmp_path) == ([moved], [])
    # Nor one that the sweep does not have.
    assert sweeps.select([last], "", tmp_path) == ([last], [])


@pytest.mark.parametrize("pattern", ["(", "nothing like it"])
def test_select_without_match_raises(toy_configs, pattern):
    with pytest.raises(UsageError) as error:
        sweeps.select(toy_configs, pattern, "absent")
    assert repr(pattern) in str(error.value)


class NoLauncher:
    """A launcher that expects nothing to train."""

    def launch(self, configs, workdir, *, progress, stop=None, **options):
        assert configs == []
        return {}


def test_run_sweep_finished_runs_are_returned(toy_configs, finished):
    made = sweeps.run_sweep(toy_configs, finished, launcher=NoLauncher())
    assert [result.step for result in made] == 6 * [12]


class OrderLauncher:
    """A launcher that keeps the order of the runs and fails them."""

    def launch(self, configs, workdir, *, progress, stop=None, **options):
        self.names = [run_name(config) for config in configs]
        return dict.fromkeys(self.names, "not trained")


def test_run_sweep_parents_come_first(family, finished, tmp_path):
    names = [run_name(config) for config in family]
    launcher = OrderLauncher()
    for workdir, expected in ((tmp_path, names), (finished, names[1:])):
        with pytest.raises(sweeps.FailedRunsError):
            sweeps.run_sweep(family[::-1], workdir, launcher=launcher)
        assert launcher.names == expected


def test_run_sweep_parent_elsewhere_must_be_finished(
    family, finished, tmp_path
):
    _, first, last = family
    launcher = OrderLauncher()
    with pytest.raises(UsageError, match="in the sweep or finished") as error:
        sweeps.run_sweep([last, first], tmp_path, launcher=launcher)
    # Only what is missing, and once.
    assert str(error.value).count(first.parent) == 1
    assert last.parent not in str(error.value)
    assert not hasattr(launcher, "names")
    directory = os.path.join(finished, first.parent)
    (moved,) = sweeps.expand({}, [branch(directory, "scratch")])
    with pytest.raises(sweeps.FailedRunsError):
        sweeps.run_sweep([moved], tmp_path, launcher=launcher)
    assert launcher.names == [run_name(moved)]


class FailingLauncher:
    """A launcher of which the last run fails."""

    def launch(self, configs, workdir, *, progress, stop=None, **options):
        return {run_name(configs[-1]): "a reason"}


def test_run_sweep_failed_run_raises_with_the_reason(toy_configs, copy):
    shutil.rmtree(run_directory(toy_configs[-1], copy))
    with pytest.raises(sweeps.FailedRunsError, match="a reason") as error:
        sweeps.run_sweep(toy_configs, copy, launcher=FailingLauncher())
    assert list(error.value.failures) == [run_name(toy_configs[-1])]


def test_run_sweep_changed_default_raises(toy_configs, copy, monkeypatch):
    add_default(monkeypatch, "model.units", 32)
    configs = sweeps.expand(toy_experiment.CONFIG, [{}])
    with pytest.raises(UsageError, match=r"model\.units: 16 saved, 32 now"):
        sweeps.run_sweep(configs, copy, launcher=NoLauncher())


def test_run_sweep_new_label_and_entry_reach_the_results(copy, monkeypatch):
    add_default(monkeypatch, "model.depth", 1)
    configs = sweeps.expand(toy_experiment.CONFIG, [{"label": "plain"}])
    sweeps.run_sweep(configs, copy, launcher=NoLauncher())
    (found,) = results.collect(copy, [run_name(configs[0])])
    assert found.label == "plain"
    assert found.config["model"] == {"units": 16, "depth": 1}


def test_disk_use_does_not_change_the_dtype_policy(toy_configs, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        sweeps.estimate_disk_use(toy_configs[:1], tmp_path, workers=1)
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


def test_disk_use_estimate_is_near_the_truth(toy_configs, finished, tmp_path):
    use = sweeps.estimate_disk_use(toy_configs, tmp_path, workers=2)
    taken = sum(
        path.stat().st_size
        for config in toy_configs
        for path in pathlib.Path(
            run_directory(config, finished), "checkpoints"
        ).rglob("*")
        if path.is_file()
    )
    assert taken / 2 < use.final_bytes < 2 * taken


def test_disk_use_parents_are_not_needed(toy_configs, tmp_path):
    trunk = toy_configs[2]
    names = ("scratch", "lottery_ticket", "transferred_profile")
    branches = sweeps.expand({}, [branch(trunk, name) for name in names])
    alone = sweeps.estimate_disk_use([trunk], tmp_path, workers=1)
    use = sweeps.estimate_disk_use(branches, tmp_path, workers=1)
    # A pruned network has a threshold for each mask.
    assert use.final_bytes == pytest.approx(3 * alone.final_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("step", "overrides", "kept", "further"),
    [
        (0, {}, 2, 1),
        # Saved at 5, 6 and 12.
        (5, {}, 2, 1),
        (0, {"keep_steps": (5, 12)}, 3, 1),
        (0, {"keep": "none", "keep_steps": (5, 12)}, 2, 2),
        (0, {"keep": "all", "keep_steps": (5, 12)}, 4, 0),
    ],
)
def test_disk_use_counts_the_steps_that_are_kept(
    step, overrides, kept, further, toy_configs, tmp_path
):
    (trunk,) = sweeps.expand(toy_configs[2], [{"keep_steps": (5,)}])
    ticket = branch(trunk, "lottery_ticket", step=step)
    one, several = (
        sweeps.estimate_disk_use(
            sweeps.expand(ticket, [changes]),
            tmp_path,
            workers=1,
            save_checkpoints_steps=6,
        )
        for changes in ({"keep_steps": (5,), "keep": "none"}, overrides)
    )
    assert several.final_bytes == kept * one.final_bytes
    assert several.temporary_bytes == further * one.final_bytes


def test_disk_use_counts_the_checkpoints_that_are_averaged(
    toy_configs, tmp_path, monkeypatch
):
    def estimate():
        return sweeps.estimate_disk_use(
            toy_configs[:1], tmp_path, workers=1, save_checkpoints_steps=1
        )

    one = estimate()
    task = toy_experiment.ToyExperiment
    monkeypatch.setattr(task, "averaged_checkpoints", 8)
    several = estimate()
    # The first one as well.
    assert several.final_bytes == one.final_bytes // 2 * 9
    assert several.temporary_bytes == one.final_bytes // 2


def test_disk_use_finished_runs_take_nothing_more(toy_configs, finished):
    use = sweeps.estimate_disk_use(toy_configs, finished, workers=2)
    assert use == sweeps.DiskUse(final_bytes=0, temporary_bytes=0)


def test_disk_use_config_that_does_not_fit_raises(tmp_path):
    configs = sweeps.expand(
        toy_experiment.CONFIG,
        [{"sparsity": {**MAGNITUDE, "rules": (("^conv", None),)}}],
    )
    with pytest.raises(UsageError, match=r"config\.sparsity.*\^conv"):
        sweeps.estimate_disk_use(configs, tmp_path, workers=1)
