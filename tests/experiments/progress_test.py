import dataclasses
import io

import pytest
from rich.console import Console

from sos.experiments import progress
from sos.experiments.results import Outcome, Results


def _outcome(**changes):
    return Outcome(
        **{
            "achieved_sparsity": 0.9,
            "model_sparsity": 0.89,
            "test_accuracy": 0.85,
            "test_loss": 0.4,
            "seconds": 12.0,
            "peak_memory": 812.5,
            "parameters_trained": 155_786,
            **changes,
        }
    )


def _text(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def runs(config, expand):
    config.techniques = "dense,magnitude_dense_first,l0"
    config.seeds = (0, 1)
    return expand(config)


def test_the_summary_has_a_row_for_each_setting(tmp_path, runs):
    results = Results(tmp_path, runs)
    for run in runs:
        results.add(
            run,
            _outcome(
                achieved_sparsity=0.9 + 0.002 * run.seed,
                test_accuracy=0.8 + 0.03 * run.seed,
                seconds=10.0 + run.seed,
            ),
        )
    text = _text(progress.summary(results))
    rows = [line for line in text.splitlines() if "81.50%" in line]
    assert len(rows) == 5
    assert "magnitude, first layer dense" in rows[1]
    # The technique is named once.
    assert "magnitude" not in rows[2]
    for row in rows:
        assert row.rstrip().endswith("90.10% ± 0.10  81.50% ± 1.50  10.5 s")
    assert "mean of 2 seeds ± half their range" in text


def test_the_summary_of_one_seed_is_plain(tmp_path, config, expand):
    config.techniques = "dense,l0"
    runs = expand(config)
    results = Results(tmp_path, runs)
    for run in runs[:2]:
        results.add(run, _outcome())
    text = _text(progress.summary(results))
    assert "±" not in text
    assert "seeds" not in text
    assert text.count("85.00%") == 2
    assert "0.1/N" in text


def test_a_setting_whose_seeds_are_not_all_finished(tmp_path, runs):
    results = Results(tmp_path, runs)
    for run in runs[:3]:
        results.add(run, _outcome())
    text = _text(progress.summary(results))
    assert "mean of 1 to 2 seeds" in text
    assert text.count("85.00%") == 2
    assert text.count("±") == 1 + 2


def test_the_pace_is_measured_where_many_steps_are_told_at_once(
    tmp_path, runs, monkeypatch
):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    run = dataclasses.replace(runs[2], steps=1000)
    results = Results(tmp_path, [run])
    recorder = progress.Progress(Console(file=io.StringIO()))
    with recorder.study(results):
        recorder.begin(run)
        guess = recorder.seconds_left()
        now += 60.0  # Restores a checkpoint, traces and compiles.
        recorder.step(500, 1.0)
        assert recorder.seconds_left() == pytest.approx(guess / 2)
        now += 10.0
        recorder.step(600, 1.0)
        # 400 steps of a tenth of a second.
        assert recorder.seconds_left() == pytest.approx(40.0)


def test_every_run_is_told_by_title_and_setting(tmp_path, runs):
    results = Results(tmp_path, runs)
    console = Console(file=io.StringIO(), width=120)
    recorder = progress.Progress(console)
    with recorder.study(results):
        for run in runs[2:4]:
            recorder.begin(run)
            results.add(run, _outcome())
            recorder.finish(run, _outcome())
    lines = console.file.getvalue().splitlines()
    assert "magnitude, first layer dense 50%  " in lines[0]
    assert "magnitude, first layer dense 50% seed 1" in lines[1]
    for line in lines:
        assert "85.00%" in line
        assert "90.00%" in line
        assert line.endswith("left")
