"""The command line of `models.sweep`."""

import csv
import shutil
import signal
import time

import matplotlib.image
import pytest

from tests.support import processes

ARGUMENTS = (
    "--config=configs/fashion_mnist.py:dense,train_steps=6",
    "--config.batch_size=32",
)
FILES = ("results.csv", "tradeoff.png", "layerwise.png")


def sweep(workdir, *arguments, **options):
    return processes.Program(
        "models.sweep",
        *ARGUMENTS,
        f"--workdir={workdir}",
        *arguments,
        log=workdir.parent / "output.txt",
        **options,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A work directory in which four runs are finished, and the output."""
    workdir = tmp_path_factory.mktemp("study") / "work"
    with sweep(workdir, "--select=(dense|sparsity-0.9_).*seed-0") as program:
        assert program.wait() == 0, program.output
        return workdir, program.output


def test_sweep_writes_table_and_figures(study):
    workdir, output = study
    with (workdir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [
        "dense",
        "magnitude pruning",
        "magnitude, first layer dense",
        "random pruning",
    ]
    assert {row["seed"] for row in rows} == {"0"}
    for name in FILES[1:]:
        height, width, _ = matplotlib.image.imread(workdir / name).shape
        assert min(height, width) > 500
    lines = output.splitlines()
    assert "4 runs in" in lines[0]
    assert "MB" in lines[0]
    assert sum("/4  " in line for line in lines) == 4
    assert [f"Wrote {workdir / name}" in lines for name in FILES] == 3 * [True]
    assert "WARNING" not in output


def test_sweep_finished_runs_are_not_repeated(study, tmp_path):
    workdir = shutil.copytree(study[0], tmp_path / "work")
    before = {
        path: path.stat().st_mtime_ns for path in workdir.glob("*/train.jsonl")
    }
    (workdir / "results.csv").unlink()
    for name in FILES[1:]:
        (workdir / name).unlink()
    with sweep(workdir, "--select=(dense|sparsity-0.9_).*seed-0") as program:
        assert program.wait() == 0, program.output
    assert "nothing to train" in program.output
    assert {name for name in FILES if (workdir / name).exists()} == set(FILES)
    after = {
        path: path.stat().st_mtime_ns for path in workdir.glob("*/train.jsonl")
    }
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)]
)
def test_sweep_stopped_and_started_again_continues(
    study, tmp_path, signum, code
):
    workdir = tmp_path / "work"
    arguments = (
        "--select=^dense.*seed-0",
        "--config.train_steps=20000",
        "--save_checkpoints_steps=100000",
    )
    with sweep(workdir, *arguments) as program:
        program.wait_until(lambda: list(workdir.glob("*/train.jsonl")))
        program.stop(signum)
        assert program.wait() == code, program.output
    (directory,) = workdir.glob("dense*")
    saved = processes.checkpoint_steps(directory)[-1]
    assert 0 < saved < 20000
    assert "Traceback" not in program.output
    # No worker is left behind to write.
    with sweep(workdir, *arguments) as program:
        program.wait_until(
            lambda: len(processes.records(directory)) > saved // 100 + 2
        )
    records = processes.records(directory)
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


@pytest.mark.slow
def test_sweep_two_programs_share_the_runs(tmp_path):
    workdir = tmp_path / "work"
    arguments = ("--select=^(dense|random).*", "--workers=1")
    with sweep(workdir, *arguments) as first:
        with sweep(workdir, *arguments) as second:
            assert second.wait() == 0, second.output
        assert first.wait() == 0, first.output
    logs = list(workdir.glob("*/train.jsonl"))
    assert len(logs) == 12
    for log in logs:
        steps = [r["step"] for r in processes.records(log.parent)]
        # Nothing was trained twice.
        assert len(steps) == len(set(steps)) + 1


@pytest.mark.slow
def test_sweep_killed_leaves_no_worker(tmp_path):
    workdir = tmp_path / "work"
    with sweep(
        workdir, "--select=^dense.*seed-0", "--config.train_steps=1000000"
    ) as program:
        program.wait_until(lambda: list(workdir.glob("*/train.jsonl")))
        program.kill()
    (log,) = workdir.glob("*/train.jsonl")

    def size_is_stable():
        before = log.stat().st_size
        time.sleep(3)
        return log.stat().st_size == before

    assert any(size_is_stable() for _ in range(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--select=nothing like it"], ["nothing like it", "dense_seed-0"]),
        (["--select=("], ["regular expression"]),
        (["--workers=0"], ["workers", "0"]),
        (["more"], ["only flags", "more"]),
        (["--workdir=gs://bucket/runs"], ["local", "gs://bucket/runs"]),
        (["--config=configs/fashion_mnist.py:l0"], ["L0Regularization"]),
        (["--config.sparsity.technique=None", "--config.seeds=1"], ["seeds"]),
    ],
)
def test_sweep_mistake_is_one_line(tmp_path, arguments, parts):
    with sweep(tmp_path / "work", *arguments) as program:
        assert program.wait() == 1
    lines = [x for x in program.output.splitlines() if x.startswith("FATAL")]
    assert len(lines) == 1, program.output
    assert "Traceback" not in program.output
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "work").exists()


def test_sweep_list_prints_names_only(tmp_path):
    with sweep(tmp_path / "work", "--list") as program:
        assert program.wait() == 0, program.output
    lines = program.output.splitlines()
    assert len(lines) == len(set(lines)) == 52
    assert not (tmp_path / "work").exists()
