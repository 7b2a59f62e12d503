"""The program itself, in a process of its own."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = (
    "--config.steps=3",
    "--config.seeds=0,",
    "--config.techniques=dense,magnitude",
    "--config.magnitude.sparsities=0.5,0.9",
)


def _command(*arguments):
    config = "--config=configs/fashion_mnist.py"
    return [sys.executable, "-m", "models.study", config, *arguments]


def _run(*arguments):
    return subprocess.run(
        _command(*arguments), cwd=ROOT, capture_output=True, text=True
    )


def test_trains_once_and_writes_everything(tmp_path):
    for time_of_run in ("first", "second"):
        result = _run(f"--workdir={tmp_path}", *QUICK)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        for figure in ("tradeoff.png", "layerwise.png"):
            assert str(tmp_path / figure) in result.stdout
            assert (tmp_path / figure).stat().st_size > 5_000
        assert ("nothing to train" in result.stdout) == (
            time_of_run == "second"
        )
        with (tmp_path / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["sparsity"] for row in rows] == ["", "0.5", "0.9"]


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--config.stepz=3", ["stepz", "Valid names", "steps"]),
        ("--config.l0.penalty=3", ["config.l0", "'penalty'", "penalties"]),
        ("--config.steps.x=3", ["config.steps", "is a value"]),
        ("--config.steps=many", ["config.steps", "many"]),
        ("--config.steps=0", ["config.steps", "Received: 0"]),
        ("--config=nowhere.py", ["nowhere.py"]),
        ("--wurkdir=x", ["wurkdir"]),
        ("something", ["something"]),
        ("--workdir=/dev/null/x", ["/dev/null/x"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, argument, parts):
    workdir = tmp_path / "workdir"
    result = _run(f"--workdir={workdir}", argument)
    assert result.returncode == 1
    lines = [
        line
        for line in result.stderr.splitlines()
        if line and not line.startswith("Pass --help")
    ]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("FATAL")
    for part in parts:
        assert part in lines[0]
    assert not workdir.exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_ends_it_with_one_line(tmp_path):
    process = subprocess.Popen(
        _command(f"--workdir={tmp_path}", "--config.steps=100000"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    lines = stderr.strip().splitlines()
    assert len(lines) == 2, stderr
    assert "SIGINT received" in lines[0]
    assert "same command" in lines[1]
    assert list((tmp_path / "checkpoints").glob("dense*/step-*"))
