import pathlib

import pytest

from sos.errors import UsageError
from sos.experiments import sweeps
from sos.experiments.config import run_name
from sos.experiments.runs import run_directory
from tests.support import toy_experiment

MAGNITUDE = toy_experiment.TECHNIQUES["magnitude"]


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
    assert "end_step" not in replaced.sparsity or (
        replaced.sparsity.end_step is None
    )
    assert len(replaced.sparsity.rules) == 0
    assert dense.sparsity.to_dict() == {"technique": None, "rules": []}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([], "at least one"),
        ([{"seed": 1}, {"seed": 1, "label": "x"}], "twice"),
        ([{"seeds": 1}], "'seeds'"),
    ],
)
def test_expand_invalid_sweep_raises(overrides, part):
    with pytest.raises(UsageError, match=part):
        sweeps.expand(toy_experiment.CONFIG, overrides)


def test_select_matches_names(toy_configs):
    selected = sweeps.select(toy_configs, "^l0.*seed-1")
    assert [run_name(config)[:18] for config in selected] == [
        "l0_regularization_"
    ]
    assert sweeps.select(toy_configs, "") == toy_configs


@pytest.mark.parametrize("pattern", ["(", "nothing like it"])
def test_select_without_match_raises(toy_configs, pattern):
    with pytest.raises(UsageError) as error:
        sweeps.select(toy_configs, pattern)
    assert repr(pattern) in str(error.value)


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
    assert taken / 2 < use.finished < 2 * taken


def test_disk_use_finished_runs_take_nothing_more(toy_configs, finished):
    use = sweeps.estimate_disk_use(toy_configs, finished, workers=2)
    assert use == sweeps.DiskUse(finished=0, training=0)


def test_disk_use_config_that_does_not_fit_raises(tmp_path):
    configs = sweeps.expand(
        toy_experiment.CONFIG,
        [{"sparsity": {**MAGNITUDE, "rules": (("^conv", None),)}}],
    )
    with pytest.raises(UsageError, match=r"config\.sparsity.*\^conv"):
        sweeps.estimate_disk_use(configs, tmp_path, workers=1)
