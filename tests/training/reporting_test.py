import io
import json
import math

import numpy as np
import pytest
import rich.console
import tensorflow as tf

from sos.training.reporting import (
    Console,
    JsonLines,
    Summary,
    TensorBoard,
    describe,
)
from tests.support import techniques


def record(step=200, **fields):
    fields = {"metrics": {"loss": 2.5}, "seconds": 4.0, **fields}
    return Summary(step=step, total_steps=32_000, **fields)


FULL = record(
    12_000,
    metrics={"accuracy": 0.5125, "loss": 2.30258509},
    learning_rate=0.1,
    sparsity=0.4567,
    penalty=12.5,
    weight_sparsity={"a/kernel": 0.5, "b/kernel": 0.25},
    weight_penalty={"a/kernel": 12.5},
    examples_per_second=1234.5,
    seconds_left=3725.2,
)
EVAL = record(
    12_000, kind="eval", metrics={"accuracy": 0.5}, sparsity=0.4567, seconds=75
)


# Console.


def test_a_line_has_everything_with_the_loss_in_front():
    assert describe(FULL) == (
        "step 12,000/32,000  loss 2.303  accuracy 0.5125  learning rate 0.1  "
        "sparsity 45.67%  penalty 12.5  1,234 examples/s  1:02:05 left"
    )


def test_what_is_not_known_is_left_out():
    assert describe(record()) == "step 200/32,000  loss 2.5"
    assert "penalty" not in describe(record(penalty=0.0))
    assert "sparsity 0.00%" in describe(record(sparsity=0.0))
    assert "loss nan" in describe(record(metrics={"loss": math.nan}))


def test_evaluations_are_named_so():
    assert describe(EVAL) == (
        "eval  step 12,000/32,000  accuracy 0.5  sparsity 45.67%  took 1:15"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.6, "1:00"),
        (3599.7, "1:00:00"),
        (360_061, "100:01:01"),
    ],
)
def test_times_are_rounded_to_seconds(seconds, text):
    assert describe(record(seconds_left=seconds)).endswith(f"  {text} left")


def test_without_a_terminal_there_is_one_plain_line_a_record(capsys):
    console = Console()
    long = record(metrics={f"metric_{i}": 0.5 for i in range(20)})
    for given in (FULL, EVAL, long):
        console(given)
        # Each is there at once, and whole however long it is.
        assert capsys.readouterr().out == describe(given) + "\n"
    console.close()
    assert capsys.readouterr().out == ""


def test_names_of_metrics_are_no_markup(capsys):
    given = record(metrics={"[red]top[5]": 1.0})
    Console()(given)
    assert capsys.readouterr().out == describe(given) + "\n"


def test_on_a_terminal_a_bar_stands_below_the_lines():
    file = io.StringIO()
    console = Console(
        rich.console.Console(
            file=file,
            force_terminal=True,
            force_interactive=True,
            width=100,
            _environ={"TERM": "xterm"},
        )
    )
    console(FULL)
    shown = file.getvalue()
    line, bar = describe(FULL), "12,000 of 32,000 steps"
    assert shown.count(line) == 1
    assert shown.rindex(line) < shown.rindex(bar)
    assert "38%" in shown and shown.endswith(" 1:02:05 left")
    # A process that is killed now leaves the cursor visible.
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert shown.rindex(show) > shown.rindex(hide)
    console(EVAL)
    console(record(24_000, seconds_left=60.0))
    shown = file.getvalue()
    assert describe(EVAL) in shown
    assert "24,000 of 32,000 steps" in shown and "75%" in shown
    console.close()
    console.close()
    length = len(file.getvalue())
    console(record(32_000))
    assert describe(record(32_000)) in file.getvalue()[length:]
    console.close()


# JsonLines.


def read(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON.")

    return [
        json.loads(line, parse_constant=refuse)
        for line in path.read_text().splitlines()
    ]


def write(path, *records, **settings):
    lines = JsonLines(path, **settings)
    for given in records:
        lines(given)
    lines.close()


def test_records_are_objects_with_their_fields(tmp_path):
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


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "log.jsonl"
    values = {
        "a": math.nan,
        "b": -math.inf,
        "c": np.float32("nan"),
        "d": np.float32(0.5),
        "e": np.int64(3),
    }
    write(path, record(metrics=values, penalty=math.inf))
    (line,) = read(path)
    assert line["metrics"] == {
        "a": None,
        "b": None,
        "c": None,
        "d": 0.5,
        "e": 3,
    }
    assert line["penalty"] is None


def test_resuming_drops_the_lines_of_later_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, *map(record, (100, 200)), record(200, kind="eval"), record(300))
    write(path, record(250), resume_step=200)
    assert [line["step"] for line in read(path)] == [100, 200, 200, 250]
    write(path, resume_step=0)
    assert read(path) == []
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_step_all_lines_are_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, record(100), record(200))
    write(path, record(100))
    assert [line["step"] for line in read(path)] == [100, 200, 100]


def test_a_line_that_was_cut_off_anywhere_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, record(100), FULL)
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for length in (1, 2, 9, len(second) // 2, len(second) - 2):
        path.write_bytes(first + second[:length])
        write(path, record(300), resume_step=20_000)
        assert [line["step"] for line in read(path)] == [100, 300]
    # Only the end of the line is missing.
    path.write_bytes(whole[:-1])
    write(path, record(300))
    assert [line["step"] for line in read(path)] == [100, 12_000, 300]


def test_a_file_with_nothing_to_drop_is_not_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, record(100))
    before = path.stat()
    write(path, resume_step=100)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", '{"step": 1}\nhalf\n{"step": 2}\n', "[1]\n", "{}\n"]
)
def test_a_file_of_another_kind_is_left_alone(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="Line [12] of .*log.jsonl is not a"):
        JsonLines(path, resume_step=0)
    assert path.read_text() == text


def test_other_file_systems_go_through_tensorflow():
    path = "ram://reporting/log.jsonl"
    write(path)
    assert tf.io.gfile.exists(path)
    write(path, record(100), record(200))
    with tf.io.gfile.GFile(path, "a") as file:
        file.write('{"step": 3')
    write(path, record(150), resume_step=100)
    with tf.io.gfile.GFile(path) as file:
        assert [json.loads(x)["step"] for x in file] == [100, 150]


# TensorBoard.


def test_tensorboard_shows_training_and_evaluation_as_two_runs(tmp_path):
    board = TensorBoard(tmp_path)
    board(record(100))
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
    }
    assert techniques.scalars(tmp_path / "eval") == {
        "accuracy": [(12_000, 0.5)],
        "sparsity": [(12_000, f(0.4567))],
    }
    board.close()
    board.close()
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2


def test_resuming_hides_the_later_steps(tmp_path):
    board = TensorBoard(tmp_path)
    for step in (100, 200, 300, 400):
        board(record(step, metrics={"loss": step}))
    # As if killed: not closed.
    resumed = TensorBoard(tmp_path, resume_step=200)
    resumed(record(250, metrics={"loss": 1.0}))
    resumed.close()
    expected = [(100, 100.0), (200, 200.0), (250, 1.0)]
    assert techniques.scalars(tmp_path / "train") == {"loss": expected}
    board.close()
    # Without a step nothing is hidden.
    other = TensorBoard(tmp_path)
    other(record(300, metrics={"loss": 2.0}))
    other.close()
    expected.append((300, 2.0))
    assert techniques.scalars(tmp_path / "train") == {"loss": expected}
