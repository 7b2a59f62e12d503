import csv
import dataclasses
import errno
import json
import os
import shutil

import pytest

import sos
from sos import registry
from sos.errors import StorageError, UsageError
from sos.experiments import results
from sos.experiments.config import run_name
from tests.support.results import make_study, make_toy_run

OWN_TECHNIQUE = """
import sos
from tests.support.toy_experiment import ToyExperiment as Task

@sos.extend.register
class OwnTechnique(sos.FixedMask):
    pass
"""


def read_table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_collect_returns_runs_in_the_order_of_techniques(finished):
    runs = results.collect(finished)
    labels = [(run.label, run.config["seed"]) for run in runs]
    assert labels[:2] == [("dense", 0), ("dense", 1)]
    assert len(labels) == 6
    assert labels[::2] == [(label, 0) for label, _ in labels[::2]]
    assert {label for label, _ in labels} == {
        "dense",
        "magnitude pruning",
        "variational dropout",
    }


def test_collect_named_runs_only(finished, toy_configs):
    names = [run_name(config) for config in toy_configs[2:4]]
    runs = results.collect(finished, names)
    assert [run.name for run in runs] == names


def test_collect_unfinished_run_is_left_out(copy):
    runs = results.collect(copy)
    (copy / runs[0].name / "result.json").unlink()
    (copy / "something else").mkdir()
    (copy / "results.csv").write_text("name,label\n")
    assert results.collect(copy) == runs[1:]


def test_collect_unknown_technique_is_registered_by_its_task(
    copy, tmp_path, monkeypatch
):
    (tmp_path / "own_technique.py").write_text(OWN_TECHNIQUE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_techniques", sos.extend.techniques())
    run = results.collect(copy)[0]
    config = {
        **run.config,
        "task": "own_technique:Task",
        "sparsity": {"technique": "OwnTechnique", "rules": []},
    }
    (copy / run.name / "config.json").write_text(json.dumps(config))
    assert results.collect(copy)[-1].label == "own technique"
    config["sparsity"]["technique"] = "Nowhere"
    (copy / run.name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="Nowhere"):
        results.collect(copy)


def test_point_is_the_same_for_seeds_and_whatever_is_kept(finished):
    first, second, other = results.collect(finished)[:3]
    kept = dataclasses.replace(second, config={**second.config, "keep": "all"})
    assert first.point == second.point == kept.point != other.point


def test_point_is_the_same_whatever_entries_the_task_ignores(finished):
    run = results.collect(finished)[0]
    ignored = dataclasses.replace(run.result, ignored_entries=("data.path",))
    for result, equal in ((ignored, True), (run.result, False)):
        points = {
            dataclasses.replace(
                run,
                result=result,
                config={**run.config, "data": {"path": path}},
            ).point
            for path in ("/here", "/there")
        }
        assert (len(points) == 1) is equal


@pytest.fixture
def with_branches(copy):
    """A directory with a branch of each pruned run; its trunk, the branch."""

    def read():
        runs = {run.label: run for run in results.collect(copy)}
        return runs["magnitude pruning"], runs["scratch-e"]

    for run in results.collect(copy)[2:4]:
        config = {
            **run.config,
            "sparsity": {"technique": "FixedMask", "rules": []},
            "branch": {"name": "scratch", "multiplier": 1},
            "label": "scratch-e",
            # Its place when the branch was trained.
            "parent": f"/elsewhere/{run.name}",
            "seed": run.config["seed"] + 1000,
        }
        directory = shutil.copytree(
            copy / run.name, copy / f"branch_{run.config['seed']}"
        )
        (directory / "config.json").write_text(json.dumps(config))
    return copy, read


def test_collect_branch_has_its_parent_and_its_target(with_branches):
    copy, read = with_branches
    trunk, branch = read()
    assert branch.parent == trunk
    assert (trunk.branch, branch.branch) == (None, "scratch")
    assert branch.target_sparsity == trunk.target_sparsity == 0.8
    assert branch.hyperparameters == trunk.hyperparameters == "0.8"
    assert branch.directory == str(copy / branch.name)
    assert results.collect(copy)[-1] == branch


def test_target_sparsity_of_a_branch_is_that_of_its_parent():
    trunk = make_toy_run("l0", 0.8, 0, 0.9)
    profile = make_toy_run("magnitude", 0.8, 0, 0.5)
    assert profile.target_sparsity == 0.5
    profile = dataclasses.replace(profile, parent=trunk)
    assert profile.target_sparsity is None
    assert profile.hyperparameters == trunk.hyperparameters == "0.001"


def test_mean_frame_has_a_row_for_each_point():
    runs = make_study(spread=0.01)
    table = results.mean_frame(runs)
    assert len(table) == len(runs) / 2
    assert set(table["seeds"]) == {2}
    first = table.iloc[0]
    assert first["accuracy"] == pytest.approx(0.875)
    assert (first["label"], first["train_steps"]) == ("dense", 12)
    # They differ.
    assert not {"seed", "name"} & set(table.columns)


def test_mean_frame_numbers_that_differ_between_seeds_are_means():
    runs = make_study(branches=False)[2:4]
    for cost, run in zip((100, 300), runs, strict=True):
        object.__setattr__(run.result, "multiply_adds", cost)
    # The first one lacks a metric.
    runs[1].result.metrics["top5"] = 0.9
    (row,) = results.mean_frame(runs).to_dict("records")
    assert (row["multiply_adds"], row["top5"]) == (200, 0.9)


def test_frame_of_no_runs_has_the_first_columns():
    assert list(results.frame([]).columns) == ["name", "label"]


def test_point_of_branches_is_the_same_for_seeds_of_parents(with_branches):
    copy, _ = with_branches
    *_, first, second = results.collect(copy)
    assert first.parent.name != second.parent.name
    assert first.point == second.point != first.parent.point


def test_collect_branch_without_its_parent_is_read(with_branches):
    copy, read = with_branches
    shutil.rmtree(copy / read()[0].name)
    shutil.rmtree(copy / results.collect(copy)[2].name)
    branch = results.collect(copy)[-1]
    assert branch.parent is branch.target_sparsity is None
    assert branch.hyperparameters == ""


def test_collect_several_directories_has_each_run_once(finished, copy):
    runs = results.collect(finished)
    shutil.rmtree(copy / runs[0].name)
    assert results.collect([copy, finished]) == [
        dataclasses.replace(run, directory=str(directory / run.name))
        for run, directory in zip(runs, [finished] + 5 * [copy], strict=True)
    ]


def test_collect_damaged_result_raises(copy):
    run = results.collect(copy)[3]
    (copy / run.name / "result.json").write_text("{")
    with pytest.raises(StorageError, match=run.name):
        results.collect(copy)


@pytest.mark.parametrize("value", ["null", '"0.5"', "true"])
def test_collect_wrong_number_raises(copy, value):
    run = results.collect(copy)[0]
    path = copy / run.name / "result.json"
    content = json.loads(path.read_text())
    content["metrics"]["accuracy"] = json.loads(value)
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="accuracy"):
        results.collect(copy)


def test_collect_empty_directory_returns_nothing(tmp_path):
    assert results.collect(tmp_path) == []
    assert results.collect(tmp_path / "absent") == []


def test_write_table_has_a_row_for_each_run(finished, tmp_path):
    runs = results.collect(finished)
    path = tmp_path / "results.csv"
    results.write_table(path, runs)
    table = read_table(path)
    assert [row["name"] for row in table] == [run.name for run in runs]
    last = runs[-1]
    row = table[-1]
    assert float(row["accuracy"]) == last.result.metrics["accuracy"]
    assert float(row["achieved_sparsity"]) == last.result.sparsity
    assert row["seed"] == "1"
    assert row["sparsity.technique"] == last.technique
    assert row["model.units"] == "16"
    # A dense network has neither.
    assert table[0]["achieved_sparsity"] == ""
    assert table[0]["sparsity.penalty_weight"] == ""
    # Again, over its own file.
    results.write_table(path, runs[:1])
    assert len(read_table(path)) == 1


def test_write_table_other_file_raises_and_keeps_it(finished, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("mine\n1\n")
    with pytest.raises(StorageError, match=str(path)):
        results.write_table(path, results.collect(finished))
    assert path.read_text() == "mine\n1\n"


def test_write_table_without_room_raises_and_keeps_the_file(
    finished, tmp_path, monkeypatch
):
    runs = results.collect(finished)
    path = tmp_path / "results.csv"
    results.write_table(path, runs)
    before = path.read_text()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"results\.csv .*No space"):
        results.write_table(path, runs[:1])
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["results.csv", "tradeoff.png"])
def test_check_outputs_files_of_something_else_raise(tmp_path, name):
    results.check_outputs(tmp_path, ["tradeoff.png"])
    (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match=name):
        results.check_outputs(tmp_path, ["tradeoff.png"])
    assert os.listdir(tmp_path) == [name]


def test_check_outputs_own_files_pass(finished, tmp_path):
    results.write_table(tmp_path / "results.csv", results.collect(finished))
    shutil.copy(tmp_path / "results.csv", tmp_path / "tradeoff.png")
    results.check_outputs(tmp_path, ["tradeoff.png"])
