import multiprocessing
import re
import sys
import threading

import pytest

from benchmarks import train_step
from tests.support import benchmarks


class End:
    """An end of a pipe that both threads share, so that neither closes it."""

    def __init__(self, end):
        self.send, self.recv = end.send, end.recv

    def close(self):
        pass


class Threads:
    """Threads instead of processes, which would import TensorFlow."""

    Process = threading.Thread

    @staticmethod
    def Pipe():
        return [End(end) for end in multiprocessing.Pipe()]


@pytest.mark.parametrize(
    "process", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_train_step_prints_one_report_of_the_techniques(process, monkeypatch):
    if not process:
        monkeypatch.setattr(
            train_step.multiprocessing, "get_context", lambda kind: Threads
        )
    report = benchmarks.run(
        "train_step",
        "--model=convnet",
        "--technique=VariationalDropout,VariationalDropout",
        "--repeats=1",
        "--batch_size=2",
        process=process,
    )
    assert list(report["results"]) == ["dense", "VariationalDropout"]
    for figures in report["results"].values():
        assert figures["median_ms"] > 0
        assert figures["peak_gib"] > 0
        assert figures["trace_s"] > 0
    assert report["results"]["dense"]["times_dense"] == 1


def test_train_step_of_a_transformer_takes_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr(
        train_step.multiprocessing, "get_context", lambda kind: Threads
    )
    report = benchmarks.run(
        "train_step",
        "--model=transformer_tiny",
        "--technique=dense",
        "--repeats=1",
        "--tokens=12",
    )
    assert list(report["results"]) == ["dense"]
    assert (report["batch"], report["size"]) == (3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=transformer_tiny", "--tokens=6"], "multiple.*, 4 tok.*=6"),
        (["--model=transformer", "--tokens=0"], "multiple.*--tokens=0"),
        (["--model=convnet", "--tokens=8"], "--batch_size.*--model=convnet"),
        (
            ["--model=transformer", "--tokens=64", "--batch_size=2"],
            "exclude each other.*--tokens=64 --batch_size=2",
        ),
    ],
)
def test_train_step_with_a_wrong_number_of_tokens_says_why(
    arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments])
    with pytest.raises(SystemExit) as error:
        train_step.main()
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--technique=dense,Magnitude", "MagnitudePruning.*'Magnitude'"),
        ("--repeats=0", "--repeats must be at least 1. Received: 0"),
        ("--size=8", "--size must be at least 32. Received: 8"),
        ("--batch_size=0", "--batch_size must be at least 1. Received: 0"),
        ("--model=vgg", "convnet"),
    ],
)
def test_train_step_with_a_wrong_flag_names_it(
    argument, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["train_step", argument])
    with pytest.raises(SystemExit) as error:
        train_step.main()
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
