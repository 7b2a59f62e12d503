import dataclasses
import io

import pytest
from rich.console import Console

from sos.experiments import branch, progress
from sos.experiments.config import plain, resolve, run_name
from sos.training.reporting import Summary
from tests.support.results import in_bleu, make_result, make_run


def _text(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def _summary(step, **changes):
    return Summary(
        **{
            "step": step,
            "total_steps": 12,
            "metrics": {"loss": 1.0},
            "seconds": 1.0,
            **changes,
        }
    )


def test_summary_table_has_the_mean_over_seeds(toy_configs):
    runs = [
        make_run(
            config,
            sparsity=0.9 + 0.002 * config.seed,
            accuracy=0.8 + 0.03 * config.seed,
            seconds=10.0 + config.seed,
        )
        for config in toy_configs
    ]
    text = _text(progress.summary_table(runs))
    rows = [line for line in text.splitlines() if "81.50%" in line]
    assert len(rows) == 3
    for row in rows:
        assert row.rstrip().endswith("90.10% ± 0.10  81.50% ± 1.50  10.5 s")
    assert " 0.8 " in rows[1]
    assert " 0.01 " in rows[2]
    assert max(map(len, text.splitlines())) <= 80
    assert "mean of 2 seeds ± half their range" in text


def test_summary_table_of_one_seed_is_plain(toy_configs):
    runs = [make_run(config) for config in toy_configs[::2]]
    text = _text(progress.summary_table(runs))
    assert "±" not in text
    assert "seeds" not in text
    assert text.count("85.00%") == 3


def test_summary_table_long_label_is_wrapped(toy_configs):
    label = "magnitude pruning, profile of variational dropout"
    config = resolve({**plain(toy_configs[2]), "label": label})
    text = _text(progress.summary_table(2 * [make_run(config)]))
    first, second = text.splitlines()[2:4]
    assert first.startswith(" magnitude pruning, profile of")
    assert first.rstrip().endswith("90.00% ± 0.00  85.00% ± 0.00  12.5 s")
    assert second.strip() == "variational dropout"


def test_summary_table_some_seeds_missing(toy_configs):
    runs = [make_run(config) for config in toy_configs[:3]]
    text = _text(progress.summary_table(runs))
    assert "mean of 1 to 2 seeds" in text
    assert text.count("±") == 1 + 2


def test_summary_table_task_without_accuracy(toy_configs):
    runs = [make_run(toy_configs[0], metrics={"bleu": 27.0}, sparsity=None)]
    assert "dense" in _text(progress.summary_table(runs))


@pytest.fixture
def sweep(toy_configs):
    """Progress of these runs on no terminal, and what it writes."""
    console = Console(file=io.StringIO(), width=120)
    shown = progress.SweepProgress(console)
    for config in toy_configs:
        shown.add(config)
    return shown, console.file


def test_sweep_progress_has_a_line_for_each_run(sweep, toy_configs):
    shown, output = sweep
    with shown:
        for config in toy_configs[:2]:
            shown.begin(run_name(config))
            shown.finish(run_name(config), make_result(sparsity=None))
        name = run_name(toy_configs[2])
        shown.finish(name, make_result())
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert "1/6  dense, seed 0" in lines[0]
    assert "2/6  dense, seed 1" in lines[1]
    assert "magnitude pruning 0.8, seed 0" in lines[2]
    assert "accuracy 85.00%  sparsity 90.00%" in lines[2]


def test_sweep_progress_branch_of_a_run_outside_has_its_hyperparameters(
    toy_configs,
):
    trunk = toy_configs[2]
    config = resolve(branch(trunk, "scratch"))
    console = Console(file=io.StringIO(), width=120)
    shown = progress.SweepProgress(console)
    shown.add(config, parent=plain(trunk))
    with shown:
        shown.finish(run_name(config), make_result())
    assert "scratch-e 0.8, seed 1000" in console.file.getvalue()


def test_sweep_progress_names_what_was_finished_before(toy_configs):
    console = Console(file=io.StringIO(), width=120)
    shown = progress.SweepProgress(console)
    for config in toy_configs:
        shown.add(config, make_result())
    with shown:
        pass
    assert "6 of 6 runs are already finished" in console.file.getvalue()


def test_sweep_progress_time_left_is_that_of_the_steps_left(toy_configs):
    now = 1000.0
    shown = progress.SweepProgress(quiet=True, timer=lambda: now)
    for config in toy_configs:
        shown.add(config)
    name = run_name(toy_configs[0])
    with shown:
        assert shown.seconds_left() is None
        shown.begin(name, step=4)
        now += 5.0
        shown.update(name, _summary(6))
        assert shown.seconds_left() == pytest.approx(5.0 / 2 * (72 - 6))
        now += 5.0
        shown.finish(name, make_result())
        assert shown.seconds_left() == pytest.approx(10.0 / 8 * 60)
        # Another process is at step 10 of the next run, and this one waits.
        for _ in range(3):
            shown.begin(run_name(toy_configs[1]), step=10)
            shown.wait(run_name(toy_configs[1]))
        assert shown.seconds_left() == pytest.approx(10.0 / 8 * 50)


def test_sweep_progress_rewound_run_has_only_its_own_steps_left(toy_configs):
    now = 1000.0
    shown = progress.SweepProgress(quiet=True, timer=lambda: now)
    trunk = {**plain(toy_configs[2]), "keep_steps": [8]}
    ticket = resolve(branch(trunk, "lottery_ticket", step=8))
    for config in (toy_configs[2], ticket):
        shown.add(config)
    with shown:
        shown.begin(run_name(toy_configs[2]))
        now += 6.0
        shown.update(run_name(toy_configs[2]), _summary(6))
        assert shown.seconds_left() == pytest.approx(6 + 4)


def test_sweep_progress_label_with_brackets_is_shown(toy_configs):
    console = Console(file=io.StringIO(), width=120)
    shown = progress.SweepProgress(console)
    config = resolve({**plain(toy_configs[0]), "label": "N:M [/2:4]"})
    shown.add(config)
    with shown:
        shown.begin(run_name(config))
        shown.finish(run_name(config), make_result())
    assert "N:M [/2:4], seed 0" in console.file.getvalue()


def test_run_title_hyperparameter_may_be_a_text(toy_configs, monkeypatch):
    config = plain(toy_configs[2])
    config["sparsity"]["sparsity"] = "2:4"
    assert progress.run_title(config) == "magnitude pruning 2:4, seed 0"
    run = make_run(toy_configs[2])
    run = dataclasses.replace(run, config=config)
    assert run.hyperparameters == "2:4"


def test_sweep_progress_branch_has_the_hyperparameters_of_its_parent(
    toy_configs,
):
    console = Console(file=io.StringIO(), width=120)
    shown = progress.SweepProgress(console)
    trunk = toy_configs[2]
    ticket = resolve(branch(trunk, "lottery_ticket"))
    alone = resolve({**plain(ticket), "parent": "absent"})
    for config in (trunk, ticket, alone):
        shown.add(config)
    with shown:
        for config in (ticket, alone):
            shown.finish(run_name(config), make_result())
    first, second = console.file.getvalue().splitlines()
    assert "1/3  lottery ticket 0.8, seed 0  " in first
    assert "2/3  lottery ticket, seed 0  " in second


def test_sweep_progress_failures_are_shown(sweep, toy_configs):
    shown, output = sweep
    with shown:
        shown.fail(run_name(toy_configs[0]), "no [red]room")
        shown.wait(run_name(toy_configs[1]))
        shown.wait(run_name(toy_configs[2]))
    text = output.getvalue()
    assert "dense, seed 0 failed: no [red]room" in text
    assert text.count("Another process") == 1


def test_summary_table_of_bleu_has_no_percent(toy_configs):
    runs = in_bleu(
        [
            make_run(config, accuracy=0.8 + 0.1 * config.seed)
            for config in toy_configs[2:4]
        ]
    )
    text = _text(progress.summary_table(runs))
    assert "BLEU" in text and "accuracy" not in text
    assert "25.50 ± 1.50 " in text


def test_sweep_progress_of_bleu_has_no_percent(sweep, toy_configs):
    shown, output = sweep
    (run,) = in_bleu([make_run(toy_configs[2])])
    with shown:
        shown.finish(run_name(toy_configs[2]), run.result)
    assert "  BLEU  25.50  sparsity 90.00%" in output.getvalue()
