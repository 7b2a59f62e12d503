"""The command line of `models.sweep`."""

import csv
import signal
import time

import matplotlib.image
import pytest

from tests.support import processes

ARGUMENTS = (
    "--config=configs/fashion_mnist.py:dense,train_steps=6",
    "--config.batch_size=32",
)
FILES = ("results.csv", "tradeoff.png", "layerwise.png", "report.html")
# And the three trunks of the tickets.
SELECTED = "--select=^(dense|lottery_ticket)_seed-0"
# What is wrong, and what the error has to name.
MISTAKES = [
    (["--select=nothing like it"], ["nothing like it", "dense_seed-0"]),
    (["--select=("], ["regular expression"]),
    (["--workers=0"], ["workers", "0"]),
    (["more"], ["only flags", "more"]),
    (["--workdir=gs://bucket/runs"], ["local", "gs://bucket/runs"]),
    (["--config=configs/fashion_mnist.py:l0"], ["L0Regularization"]),
    (["--config.sparsity.technique=None", "--config.seeds=1"], ["seeds"]),
]


def sweep(workdir, *arguments, **options):
    return processes.Program(
        "models.sweep",
        *ARGUMENTS,
        f"--workdir={workdir}",
        *arguments,
        log=workdir.parent / "output.txt",
        **options,
    )


def check_mistake(ended, parts):
    code, output = ended
    assert code == 1
    lines = [x for x in output.splitlines() if x.startswith("FATAL")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    for part in parts:
        assert part in lines[0]


def check_list(ended):
    code, output = ended
    assert code == 0, output
    lines = output.splitlines()
    assert len(lines) == len(set(lines)) == 86


def check_study(ended, workdir):
    code, output = ended
    assert code == 0, output
    with (workdir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["label"] for row in rows) == [
        "dense",
        *3 * ["lottery ticket"],
        *3 * ["magnitude, first layer dense"],
    ]
    assert {row["seed"] for row in rows} == {"0"}
    for name in FILES[1:-1]:
        height, width, _ = matplotlib.image.imread(workdir / name).shape
        assert min(height, width) > 500
    lines = output.splitlines()
    assert "7 runs in" in lines[0]
    assert "3 of them are not selected" in lines[0]
    assert "MB" in lines[0]
    assert sum("/7  " in line for line in lines) == 7
    assert all(f"Wrote {workdir / name}" in lines for name in FILES)
    assert "WARNING" not in output


def test_sweep_command_lines_do_what_they_ask_for(tmp_path):
    """One process for all: TensorFlow is imported once."""
    workdir, absent = tmp_path / "work", tmp_path / "absent"
    study = [*ARGUMENTS, f"--workdir={workdir}", SELECTED]
    tried = [*ARGUMENTS, f"--workdir={absent}"]
    listed, *mistakes, trained, again = processes.run_each(
        "models.sweep",
        [
            [*tried, "--list"],
            *([*tried, *arguments] for arguments, _ in MISTAKES),
            study,
            study,
        ],
    )
    check_list(listed)
    for ended, (_, parts) in zip(mistakes, MISTAKES, strict=True):
        check_mistake(ended, parts)
    assert not absent.exists()
    check_study(trained, workdir)
    # Finished runs are not repeated, and what they give is written again.
    code, output = again
    assert code == 0, output
    assert "nothing to train" in output
    lines = output.splitlines()
    assert all(f"Wrote {workdir / name}" in lines for name in FILES)
    for log in workdir.glob("*/train.jsonl"):
        steps = [r["step"] for r in processes.records(log.parent)]
        assert len(steps) == len(set(steps)) + 1


@pytest.mark.slow
def test_sweep_stopped_killed_and_started_again_repeats_nothing(tmp_path):
    workdir = tmp_path / "work"
    arguments = (
        "--select=^dense.*seed-0",
        "--config.train_steps=20000",
        "--save_checkpoints_steps=100000",
    )
    with sweep(workdir, *arguments) as program:
        program.wait_until(lambda: list(workdir.glob("*/train.jsonl")))
        program.stop(signal.SIGINT)
        assert program.wait() == 130, program.output
    (directory,) = workdir.glob("dense*")
    saved = processes.checkpoint_steps(directory)[-1]
    assert 0 < saved < 20000
    assert "Traceback" not in program.output
    with sweep(workdir, *arguments) as program:
        program.wait_until(
            lambda: len(processes.records(directory)) > saved // 100 + 2
        )
        program.kill()
    # No worker is left behind to write.
    log = directory / "train.jsonl"

    def size_is_stable():
        before = log.stat().st_size
        time.sleep(3)
        return log.stat().st_size == before

    assert any(size_is_stable() for _ in range(5))
    records = processes.records(directory)
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


@pytest.mark.slow
def test_sweep_two_programs_share_the_runs(tmp_path):
    workdir = tmp_path / "work"
    arguments = ("--select=^(dense|random.*0.9_).*", "--workers=1")
    with sweep(workdir, *arguments) as first:
        with sweep(workdir, *arguments) as second:
            assert second.wait() == 0, second.output
        assert first.wait() == 0, first.output
    logs = list(workdir.glob("*/train.jsonl"))
    assert len(logs) == 4
    for log in logs:
        steps = [r["step"] for r in processes.records(log.parent)]
        # Nothing was trained twice.
        assert len(steps) == len(set(steps)) + 1
    assert {name for name in FILES if (workdir / name).exists()} == set(FILES)
