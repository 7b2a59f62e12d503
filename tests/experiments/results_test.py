import csv
import dataclasses
import json
import os

import pytest

import sos
from models import convnet
from sos.experiments.results import (
    COLUMNS,
    Outcome,
    Results,
    WeightSparsity,
    weight_sparsities,
)

OUTCOME = Outcome(
    achieved_sparsity=0.9,
    model_sparsity=0.89,
    test_accuracy=0.85,
    test_loss=0.4,
    seconds=12.5,
    peak_memory=812.5,
    parameters_trained=155_786,
    weights=(
        WeightSparsity(path="conv1/kernel", size=144, sparsity=0.25),
        WeightSparsity(path="hidden/kernel", size=131_072, sparsity=0.95),
    ),
)


@pytest.fixture
def runs(config, expand):
    config.techniques = "dense,magnitude"
    return expand(config)


def _rows(results):
    with results.table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_what_is_finished_in_the_order_of_runs(tmp_path, runs):
    results = Results(tmp_path / "new" / "folder", runs)
    # What a refused start finds there stays.
    assert not results.table.exists()
    results.add(runs[2], OUTCOME)
    results.add(runs[0], OUTCOME)
    rows = _rows(results)
    assert list(rows[0]) == list(COLUMNS)
    assert [row["name"] for row in rows] == [runs[0].name, runs[2].name]
    assert float(rows[1]["sparsity"]) == 0.9
    assert float(rows[1]["test_accuracy"]) == 0.85
    assert rows[0]["sparsity"] == ""
    assert results.pending == [runs[1]]


def test_a_row_says_all_that_a_reader_asks_for(tmp_path, runs):
    results = Results(tmp_path, runs)
    results.add(runs[2], OUTCOME)
    (row,) = _rows(results)
    asked = {
        "technique": "magnitude",
        "keep_dense": "",
        "begin_step": "0",
        "seed": "0",
        "sparsity": "0.9",
        "achieved_sparsity": "0.9",
        "test_accuracy": "0.85",
        "steps": "6",
        "seconds": "12.5",
        "peak_memory": "812.5",
        "parameters_trained": "155786",
    }
    assert {name: row[name] for name in asked} == asked
    # Those are in the run's own file.
    assert "weights" not in row
    content = json.loads(results.path(runs[2]).read_text())
    assert content["outcome"]["weights"][0] == {
        "path": "conv1/kernel",
        "size": 144,
        "sparsity": 0.25,
    }


def test_weights_are_those_of_rank_two_in_the_networks_order():
    dense = convnet.build((28, 28, 1), 10, seed=0)
    sparse = sos.sparsify(
        dense,
        sos.FixedMask,
        sparsity=0.75,
        rules={"^conv1/": None},
    )
    weights = weight_sparsities(sos.sparsity_report(sparse))
    assert [(w.path, w.size) for w in weights] == [
        ("conv1/kernel", 144),
        ("conv2/kernel", 4_608),
        ("conv3/kernel", 18_432),
        ("hidden/kernel", 131_072),
        ("logits/kernel", 1_280),
    ]
    assert [w.sparsity for w in weights] == [0.0] + 4 * [0.75]


def test_finished_runs_are_found_again(tmp_path, runs):
    first = Results(tmp_path, runs)
    first.add(runs[1], OUTCOME)
    before = first.table.read_bytes()
    again = Results(tmp_path, runs)
    assert again.outcomes == {runs[1]: OUTCOME}
    assert again.table.read_bytes() == before


def test_the_table_is_made_anew_from_the_runs(tmp_path, runs):
    results = Results(tmp_path, runs)
    results.add(runs[1], OUTCOME)
    before = results.table.read_bytes()
    results.table.write_text(before.decode()[:-20])
    again = Results(tmp_path, runs)
    again.write_table()
    assert again.table.read_bytes() == before


def test_a_table_of_somebody_else_is_kept(tmp_path, runs):
    (tmp_path / "runs").mkdir()
    (tmp_path / "results.csv").write_text("mine\n1\n")
    with pytest.raises(ValueError, match="would be lost"):
        Results(tmp_path, runs)
    assert (tmp_path / "results.csv").read_text() == "mine\n1\n"


def test_a_half_written_file_is_no_result(tmp_path, runs):
    results = Results(tmp_path, runs)
    path = results.path(runs[0])
    path.with_name(f".{path.stem}.abc.json").write_text('{"run": {"tec')
    again = Results(tmp_path, runs)
    assert again.outcomes == {}
    assert again.others == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"run": {}, "outcome": {}}']
)
def test_damaged_files_are_named_and_kept(tmp_path, runs, content):
    results = Results(tmp_path, runs)
    results.path(runs[0]).write_text(content)
    with pytest.raises(ValueError, match=runs[0].name):
        Results(tmp_path, runs)
    assert results.path(runs[0]).read_text() == content


@pytest.mark.parametrize("value", [None, "0.5", True])
def test_wrong_numbers_are_refused(tmp_path, runs, value):
    results = Results(tmp_path, runs)
    results.add(runs[0], OUTCOME)
    path = results.path(runs[0])
    content = json.loads(path.read_text())
    content["outcome"]["test_accuracy"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="test_accuracy"):
        Results(tmp_path, runs)


@pytest.mark.parametrize(
    "weights",
    [
        None,
        [{"path": "conv1/kernel"}],
        [{"path": "conv1/kernel", "size": 144, "sparsity": "0.5"}],
    ],
)
def test_wrong_weights_are_refused(tmp_path, runs, weights):
    results = Results(tmp_path, runs)
    results.add(runs[0], OUTCOME)
    path = results.path(runs[0])
    content = json.loads(path.read_text())
    content["outcome"]["weights"] = weights
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        Results(tmp_path, runs)


def test_a_title_can_be_changed_afterwards(tmp_path, runs):
    Results(tmp_path, runs).add(runs[2], OUTCOME)
    renamed = [dataclasses.replace(run, title="another") for run in runs]
    assert Results(tmp_path, renamed).outcomes == {runs[2]: OUTCOME}


def test_the_file_of_another_run_is_refused(tmp_path, runs):
    results = Results(tmp_path, runs)
    results.add(runs[1], OUTCOME)
    results.path(runs[1]).rename(results.path(runs[2]))
    with pytest.raises(ValueError, match="another run"):
        Results(tmp_path, runs)


def test_runs_of_another_config_are_left_alone(tmp_path, runs, config, expand):
    Results(tmp_path, runs).add(runs[1], OUTCOME)
    config.steps = 7
    others = expand(config)
    results = Results(tmp_path, others)
    assert results.pending == others
    assert results.others == 1
    results.add(others[0], OUTCOME)
    assert [row["steps"] for row in _rows(results)] == ["7"]
    assert Results(tmp_path, runs).outcomes == {runs[1]: OUTCOME}


@pytest.mark.parametrize(
    "name", ["results.csv", "tradeoff.png", "layerwise.png"]
)
def test_files_of_something_else_are_not_overwritten(tmp_path, runs, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        Results(tmp_path, runs)
    assert (tmp_path / name).read_text() == "mine"
    assert os.listdir(tmp_path) == [name]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path, runs):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Results(tmp_path / "file" / "workdir", runs)
