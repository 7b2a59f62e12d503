import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
import rich.console
import tensorflow as tf

from sos.errors import StorageError
from sos.training.reporting import (
    Console,
    JsonLines,
    MaskUpdate,
    ProgressBar,
    Summary,
    TensorBoard,
    format_duration,
    format_summary,
    read_summaries,
)
from tests.support import techniques


def make_summary(step=200, **fields):
    fields = {"metrics": {"loss": 2.5}, "seconds": 4.0, **fields}
    return Summary(step=step, total_steps=32_000, **fields)


FULL = make_summary(
    12_000,
    metrics={"accuracy": 0.5125, "loss": 2.30258509},
    learning_rate=0.1,
    sparsity=0.4567,
    penalty=12.5,
    weight_sparsity={"a/kernel": 0.5, "b/kernel": 0.25},
    weight_penalty={"a/kernel": 12.5},
    mask_updates=(
        MaskUpdate(step=11_950, elements=1000, kept=800, pruned=60, regrown=10),
        MaskUpdate(step=12_000, elements=1000, kept=750, pruned=50, regrown=0),
    ),
    examples_per_second=1234.5,
    seconds_left=3725.2,
)
EVAL = make_summary(
    12_000, kind="eval", metrics={"accuracy": 0.5}, sparsity=0.4567, seconds=75
)


# Console.


def test_format_summary_has_everything_with_the_loss_in_front():
    assert format_summary(FULL) == (
        "step 12,000/32,000  loss 2.303  accuracy 0.5125  learning rate 0.1  "
        "sparsity 45.67%  penalty 12.5  1,234 examples/s  1:02:05 left"
    )


def test_format_summary_leaves_out_what_is_not_known():
    assert format_summary(make_summary()) == "step 200/32,000  loss 2.5"
    assert "penalty" not in format_summary(make_summary(penalty=0.0))
    assert "sparsity 0.00%" in format_summary(make_summary(sparsity=0.0))
    assert "loss nan" in format_summary(
        make_summary(metrics={"loss": math.nan})
    )


def test_format_summary_of_an_evaluation_names_it_so():
    assert format_summary(EVAL) == (
        "eval  step 12,000/32,000  accuracy 0.5  sparsity 45.67%  took 1:15"
    )


def test_summary_with_texts_prints_and_stores_them(tmp_path):
    summary = dataclasses.replace(
        EVAL, texts={"bleu_signature": "nrefs:1|case:mixed"}
    )
    assert format_summary(summary) == (
        format_summary(EVAL) + "  bleu_signature nrefs:1|case:mixed"
    )
    assert Summary.from_json(summary.to_json()) == summary
    # They are no scalars.
    report = TensorBoard(tmp_path)
    report(summary)
    report.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.6, "1:00"),
        (3599.7, "1:00:00"),
        (360_061, "100:01:01"),
    ],
)
def test_format_duration_rounds_to_seconds(seconds, text):
    assert format_duration(seconds) == text
    assert format_summary(make_summary(seconds_left=seconds)).endswith(
        f"  {text} left"
    )


def test_console_without_a_terminal_prints_one_line_a_summary(capsys):
    console = Console()
    long = make_summary(metrics={f"metric_{i}": 0.5 for i in range(20)})
    for summary in (FULL, EVAL, long):
        console(summary)
        # Each is there at once, and whole however long it is.
        assert capsys.readouterr().out == format_summary(summary) + "\n"
    console.close()
    assert capsys.readouterr().out == ""


def test_console_takes_names_of_metrics_literally(capsys):
    summary = make_summary(metrics={"[red]top[5]": 1.0})
    Console()(summary)
    assert capsys.readouterr().out == format_summary(summary) + "\n"


def terminal():
    """A terminal of 100 columns whose output can be read."""
    return rich.console.Console(
        file=io.StringIO(),
        force_terminal=True,
        force_interactive=True,
        width=100,
        _environ={"TERM": "xterm"},
    )


def test_console_on_a_terminal_draws_a_bar_below_the_lines():
    console = Console(terminal())
    file = console.console.file
    console(FULL)
    shown = file.getvalue()
    line, bar = format_summary(FULL), "12,000 of 32,000 steps"
    assert shown.count(line) == 1
    assert shown.rindex(line) < shown.rindex(bar)
    assert "38%" in shown and shown.endswith(" 1:02:05 left")
    # A process that is killed now leaves the cursor visible.
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert shown.rindex(show) > shown.rindex(hide)
    console(EVAL)
    console(make_summary(24_000, seconds_left=60.0))
    shown = file.getvalue()
    assert format_summary(EVAL) in shown
    assert "24,000 of 32,000 steps" in shown and "75%" in shown
    console.close()
    console.close()
    length = len(file.getvalue())
    console(make_summary(32_000))
    assert format_summary(make_summary(32_000)) in file.getvalue()[length:]
    console.close()


# Progress bars.


def test_progress_bar_on_a_terminal_shows_its_state():
    with ProgressBar(terminal()) as bar:
        file = bar.console.file
        bar.update(1, 4, "1 of 4 runs [red]", seconds_left=75.0)
        assert "1 of 4 runs [red]" in file.getvalue()
        assert " 25% 1:15 left" in file.getvalue()
        bar.console.print("a line")
        bar.update(2.5, 5, "half")
        shown = file.getvalue()
        assert shown.index("a line") < shown.index("half")
        assert "50%" in shown
        assert shown.count(" left") == shown.count("1:15 left")


def test_progress_bar_closed_is_gone_and_can_be_drawn_again():
    bar = ProgressBar(terminal())
    # Before any update, and twice.
    bar.close()
    bar.update(1, 4, "first")
    bar.close()
    bar.close()
    file = bar.console.file
    # Its line was erased.
    assert file.getvalue().endswith("\x1b[2K")
    bar.update(2, 4, "second")
    assert file.getvalue().rindex("second") > file.getvalue().rindex("first")
    bar.close()


def test_progress_bar_without_a_terminal_shows_nothing(capsys):
    with ProgressBar() as bar:
        bar.update(1, 4, "1 of 4 runs", seconds_left=75.0)
    assert capsys.readouterr().out == ""


# Summaries.


def test_summary_without_optional_figures_has_none_and_shares_none():
    first, second = (
        Summary(step=1, total_steps=2, seconds=1.0) for _ in range(2)
    )
    assert (first.kind, first.sparsity, first.penalty) == ("train", None, None)
    assert first.metrics == first.weight_sparsity == first.weight_penalty == {}
    assert first.weight_sparsity is not second.weight_sparsity


def test_summary_cannot_be_changed():
    summary = make_summary()
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.step = 2


@pytest.mark.parametrize(
    "summary",
    [FULL, EVAL, Summary(step=1, total_steps=2, seconds=1.0)],
    ids=["full", "eval", "empty"],
)
def test_summary_from_json_is_what_to_json_wrote(summary):
    text = summary.to_json()
    assert "\n" not in text
    assert Summary.from_json(text) == summary
    assert Summary.from_json(text.encode()) == summary


def test_summary_from_json_of_null_is_nan():
    text = make_summary(
        metrics={"loss": math.inf, "accuracy": 0.5}, penalty=math.nan
    ).to_json()
    summary = Summary.from_json(text)
    assert math.isnan(summary.metrics["loss"])
    assert summary.metrics["accuracy"] == 0.5
    assert math.isnan(summary.penalty)
    assert summary.sparsity is None


def test_summary_from_json_ignores_unknown_keys():
    values = {**json.loads(FULL.to_json()), "of_a_later_version": [1]}
    for update in values["mask_updates"]:
        update["of_a_later_version"] = 1
    assert values["mask_updates"]
    assert Summary.from_json(json.dumps(values)) == FULL


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        '{"step": 1}',
        '{"step": "1", "total_steps": 2, "seconds": 1}',
        '{"step": 1, "total_steps": 2, "seconds": 1, "mask_updates": [{}]}',
    ],
)
def test_summary_from_json_of_something_else_raises(text):
    with pytest.raises(ValueError, match="Received: "):
        Summary.from_json(text)


def test_mask_update_least_churn_is_that_of_the_nearest_mask():
    size = 6
    masks = np.array(list(itertools.product((0, 1), repeat=size)))
    for old, new in itertools.product(masks[::5], masks[::3]):
        update = MaskUpdate(
            step=1,
            elements=size,
            kept=int(new.sum()),
            pruned=int((old > new).sum()),
            regrown=int((old < new).sum()),
        )
        assert update.churn == np.mean(old != new)
        allowed = masks[masks.sum(axis=1) == new.sum()]
        assert update.least_churn == (allowed != old).mean(axis=1).min()


# JsonLines.


def read(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON.")

    return [
        json.loads(line, parse_constant=refuse)
        for line in path.read_text().splitlines()
    ]


def write(path, *summaries, **arguments):
    lines = JsonLines(path, **arguments)
    for summary in summaries:
        lines(summary)
    lines.close()


def test_json_lines_are_objects_with_their_fields(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    lines = JsonLines(path)
    lines(FULL)
    # A process that is killed now has written it.
    assert read(path) == [
        {
            "step": 12_000,
            "total_steps": 32_000,
            "kind": "train",
            "metrics": {"accuracy": 0.5125, "loss": 2.30258509},
            "learning_rate": 0.1,
            "sparsity": 0.4567,
            "penalty": 12.5,
            "weight_sparsity": {"a/kernel": 0.5, "b/kernel": 0.25},
            "weight_penalty": {"a/kernel": 12.5},
            "mask_updates": [
                {
                    "step": step,
                    "elements": 1000,
                    "kept": kept,
                    "pruned": pruned,
                    "regrown": regrown,
                }
                for step, kept, pruned, regrown in (
                    (11_950, 800, 60, 10),
                    (12_000, 750, 50, 0),
                )
            ],
            "examples_per_second": 1234.5,
            "seconds": 4.0,
            "seconds_left": 3725.2,
        }
    ]
    lines(EVAL)
    lines.close()
    assert read(path)[1] == {
        "step": 12_000,
        "total_steps": 32_000,
        "kind": "eval",
        "metrics": {"accuracy": 0.5},
        "sparsity": 0.4567,
        "seconds": 75,
    }


def test_json_lines_of_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "log.jsonl"
    values = {
        "a": math.nan,
        "b": -math.inf,
        "c": np.float32("nan"),
        "d": np.float32(0.5),
        "e": np.int64(3),
    }
    write(path, make_summary(metrics=values, penalty=math.inf))
    (line,) = read(path)
    assert line["metrics"] == {
        "a": None,
        "b": None,
        "c": None,
        "d": 0.5,
        "e": 3,
    }
    assert line["penalty"] is None


def test_json_lines_resumed_drop_later_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    write(
        path,
        *map(make_summary, (100, 200)),
        make_summary(200, kind="eval"),
        make_summary(300),
    )
    write(path, make_summary(250), resume_step=200)
    assert [line["step"] for line in read(path)] == [100, 200, 200, 250]
    write(path, resume_step=0)
    assert read(path) == []
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_without_a_step_keep_all(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, make_summary(100), make_summary(200))
    write(path, make_summary(100))
    assert [line["step"] for line in read(path)] == [100, 200, 100]


def test_json_lines_drop_a_line_cut_off_anywhere(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, make_summary(100), FULL)
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for length in (1, 2, 9, len(second) // 2, len(second) - 2):
        path.write_bytes(first + second[:length])
        write(path, make_summary(300), resume_step=20_000)
        assert [line["step"] for line in read(path)] == [100, 300]
    # Only the end of the line is missing.
    path.write_bytes(whole[:-1])
    write(path, make_summary(300))
    assert [line["step"] for line in read(path)] == [100, 12_000, 300]


def test_json_lines_with_nothing_to_drop_are_not_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, make_summary(100))
    before = path.stat()
    write(path, resume_step=100)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", '{"step": 1}\nhalf\n{"step": 2}\n', "[1]\n", "{}\n"]
)
def test_json_lines_over_another_file_raise_and_leave_it(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    for call in (
        lambda: JsonLines(path, resume_step=0),
        lambda: read_summaries(path),
    ):
        with pytest.raises(StorageError, match="Line [12] of .*log.jsonl"):
            call()
    assert path.read_text() == text


def test_read_summaries_returns_what_was_written(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_summaries(path) == []
    write(path, FULL, EVAL)
    assert read_summaries(path) == [FULL, EVAL]


def test_read_summaries_while_a_line_is_written_ignores_it(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, FULL, EVAL)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert read_summaries(path) == [FULL]
    # Unlike `JsonLines`, reading leaves the file alone.
    assert path.read_bytes() == whole[:-20]


def test_json_lines_on_another_file_system_go_through_tensorflow():
    path = "ram://reporting/log.jsonl"
    write(path)
    assert tf.io.gfile.exists(path)
    write(path, make_summary(100), make_summary(200))
    with tf.io.gfile.GFile(path, "a") as file:
        file.write('{"step": 3')
    write(path, make_summary(150), resume_step=100)
    assert [summary.step for summary in read_summaries(path)] == [100, 150]


# TensorBoard.


def test_tensorboard_shows_training_and_evaluation_as_two_runs(tmp_path):
    board = TensorBoard(tmp_path)
    board(make_summary(100))
    board(FULL)
    board(EVAL)
    # A process that is killed now has written them.
    f = np.float32
    assert techniques.scalars(tmp_path / "train") == {
        "loss": [(100, 2.5), (12_000, f(2.30258509))],
        "accuracy": [(12_000, f(0.5125))],
        "learning_rate": [(12_000, f(0.1))],
        "sparsity": [(12_000, f(0.4567))],
        "penalty": [(12_000, 12.5)],
        "examples_per_second": [(12_000, 1234.5)],
        "sparsity/a/kernel": [(12_000, 0.5)],
        "sparsity/b/kernel": [(12_000, 0.25)],
        "penalty/a/kernel": [(12_000, 12.5)],
        "mask_churn": [(11_950, f(0.07)), (12_000, f(0.05))],
    }
    assert techniques.scalars(tmp_path / "eval") == {
        "accuracy": [(12_000, 0.5)],
        "sparsity": [(12_000, f(0.4567))],
    }
    board.close()
    board.close()
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2


def test_tensorboard_resumed_hides_later_steps(tmp_path):
    board = TensorBoard(tmp_path)
    for step in (100, 200, 300, 400):
        board(make_summary(step, metrics={"loss": step}))
    # As if killed: not closed.
    resumed = TensorBoard(tmp_path, resume_step=200)
    resumed(make_summary(250, metrics={"loss": 1.0}))
    resumed.close()
    expected = [(100, 100.0), (200, 200.0), (250, 1.0)]
    assert techniques.scalars(tmp_path / "train") == {"loss": expected}
    board.close()
    # Without a step nothing is hidden.
    other = TensorBoard(tmp_path)
    other(make_summary(300, metrics={"loss": 2.0}))
    other.close()
    expected.append((300, 2.0))
    assert techniques.scalars(tmp_path / "train") == {"loss": expected}
