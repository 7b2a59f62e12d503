"""The training binary, stopped, killed and hindered in every way.

Whatever happens to it, starting it again ends with the bits of a training that
nothing happened to.
"""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests.support import killing, processes
from tests.support.processes import Program

pytestmark = pytest.mark.slow

JOBS = {
    job.name: job
    for job in killing.jobs()
    if job.name in ("magnitude", "variational_dropout")
}
JOB = JOBS["magnitude"]
STEPS = killing.STEPS
# Larger than the program's logs, smaller than its checkpoints.
FILE_SIZE = 300_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Work directories of uninterrupted trainings, made when asked for."""
    made = {}

    def make(name):
        if name not in made:
            workdir = tmp_path_factory.mktemp(name)
            values, seconds = killing.uninterrupted(JOBS[name], workdir)
            made[name] = workdir, values, seconds
        return made[name]

    return make


@pytest.fixture
def workdir(finished, tmp_path):
    """That of a training that has ended, but for its last checkpoint."""
    path = tmp_path / "work"
    shutil.copytree(finished(JOB.name)[0], path)
    shutil.rmtree(processes.checkpoint_path(path, STEPS))
    return path


def start_and_train(path, *, until=1, **options):
    """Starts the training and waits until it has made some steps."""
    program = JOB.start(path, **options)
    program.wait_until(lambda: killing.steps_told(program) >= until)
    return program


def go_on(path, expected):
    """Trains to the end, which must be the expected one."""
    with JOB.start(path) as program:
        assert program.wait() == 0, program.output
    assert processes.differences(JOB.values(path), expected) == []
    steps = [record["step"] for record in processes.records(path)]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    return program.output


def contents(folder):
    """The bytes of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fatal(program):
    """The one error that a program ended with."""
    assert program.wait() == 1, program.output
    assert "Traceback" not in program.output
    assert program.output.count("FATAL") == 1, program.output
    return program.output[program.output.index("FATAL") :]


# Killed.


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_training_ends_with_the_same_bits(finished, name, tmp_path):
    _, expected, seconds = finished(name)
    kills = []
    found = killing.killed(
        JOBS[name],
        tmp_path,
        moments=["training", "saving"],
        start_seconds=seconds,
        generator=np.random.default_rng(len(name)),
        on_kill=kills.append,
    )
    assert [kill.moment for kill in kills] == ["training", "saving"]
    assert processes.differences(expected, found) == []


def test_two_trainings_of_different_seeds_differ(finished):
    # Or else equal bits would show nothing.
    first, second = (finished(name)[1] for name in JOBS)
    kernels = {
        name
        for name in first.keys() & second.keys()
        if first[name].shape == second[name].shape and first[name].ndim > 1
    }
    assert kernels
    assert any(np.any(first[name] != second[name]) for name in kernels)


# Stopped.


def test_signals_stop_it_and_it_goes_on(finished, tmp_path):
    _, expected, _ = finished(JOB.name)
    for signum, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        with start_and_train(tmp_path, until=2) as program:
            before = killing.steps_told(program)
            program.stop(signum)
            assert program.wait() == code, program.output
        (step,) = re.findall(
            rf"^Stopped by {signum.name} at step (\d+), saved\. Run the same "
            "command again to continue",
            program.output,
            re.MULTILINE,
        )
        # The loop that was running was the last one.
        assert before <= int(step) < STEPS
        assert processes.checkpoint_steps(tmp_path)[-1] == int(step)
        assert killing.steps_told(program) == int(step)
        assert "Traceback" not in program.output
    output = go_on(tmp_path, expected)
    assert f"Going on from the checkpoint of step {step}." in output


def test_a_second_signal_ends_it_at_once(tmp_path):
    def start(name, *arguments):
        return Program(
            "tests.support.toy_train",
            "--techniques=L0Regularization",
            "--mode=train",
            "--deterministic",
            "--strategy=one_device",
            "--save_checkpoints_steps=3",
            f"--workdir={tmp_path}/{name}",
            *arguments,
            log=tmp_path / f"{name}.txt",
        )

    def values(name):
        path = tmp_path / name / "L0Regularization" / "values.npz"
        with np.load(path) as file:
            return dict(file)

    checkpoint = processes.checkpoint_path(
        tmp_path / "stopped" / "L0Regularization", 3
    )
    # A loop of three steps takes nine seconds.
    with start("stopped", "--step_seconds=3") as program:
        program.wait_until(lambda: checkpoint.exists())
        program.stop()
        program.wait_until(lambda: "SIGTERM received" in program.output)
        time.sleep(0.3)
        program.stop()
        assert program.wait(2) == 143
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert "Stopped" not in program.output

    for name in ("stopped", "uninterrupted"):
        with start(name) as program:
            assert program.wait() == 0, program.output
        assert ("checkpoint of step 3." in program.output) == (
            name == "stopped"
        )
    assert (
        processes.differences(values("stopped"), values("uninterrupted")) == []
    )


# Hindered.


def test_a_full_disk(finished, workdir):
    _, expected, _ = finished(JOB.name)
    before = contents(workdir / "checkpoints")
    with JOB.start(workdir, file_size=FILE_SIZE) as program:
        error = fatal(program)
    assert f"The checkpoint of step {STEPS} could not be written" in error
    # The path, the reason, and nothing of the operation that failed.
    assert error.count("File too large. That of step 228 is the last") == 1
    assert "node" not in error
    assert "Make room" in error
    assert contents(workdir / "checkpoints") == before
    go_on(workdir, expected)


def test_a_full_disk_from_the_beginning(tmp_path):
    with JOB.start(tmp_path, file_size=FILE_SIZE) as program:
        error = fatal(program)
    assert "The checkpoint of step 12 could not be written" in error
    assert list((tmp_path / "checkpoints").iterdir()) == []


def flip_a_bit(checkpoint):
    path = checkpoint / "variables.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(checkpoint):
    path = checkpoint / "variables.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_index(checkpoint):
    (checkpoint / "variables.index").unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, remove_index])
def test_a_damaged_checkpoint_is_not_used(finished, workdir, damage):
    _, expected, _ = finished(JOB.name)
    before, newest = processes.checkpoint_steps(workdir)[-2:]
    damage(processes.checkpoint_path(workdir, newest))
    output = go_on(workdir, expected)
    assert f"step-{newest:08d} is damaged and not used" in output
    assert f"Going on from the checkpoint of step {before}." in output


def test_all_checkpoints_are_damaged(workdir):
    for step in processes.checkpoint_steps(workdir):
        cut_in_half(processes.checkpoint_path(workdir, step))
    before = contents(workdir / "checkpoints")
    with JOB.start(workdir) as program:
        error = fatal(program)
    assert "All checkpoints in" in error
    assert contents(workdir / "checkpoints") == before


def test_a_checkpoint_of_another_configuration(workdir):
    before = contents(workdir / "checkpoints")
    with Program(
        JOB.module,
        *JOB.arguments,
        "--config.learning_rate=0.02",
        "--config.magnitude.frequency=0.05",
        "--gradient_accumulation_steps=2",
        f"--workdir={workdir}",
        log=workdir / "other.txt",
    ) as program:
        error = fatal(program)
    assert "is of another configuration" in error
    assert "learning_rate: 0.01 there, 0.02 now" in error
    assert "frequency: 5 there, 12 now" in error
    assert "gradient_accumulation_steps: 1 there, 2 now" in error
    # And no others.
    assert error.count(" there, ") == 3, error
    assert contents(workdir / "checkpoints") == before


def test_a_work_directory_that_cannot_be_written(tmp_path):
    # Where permissions hold nobody back, as when root runs the tests, no
    # directory can be made below a file.
    (tmp_path / "file").write_text("in the way")
    with Program(
        JOB.module,
        *JOB.arguments,
        f"--workdir={tmp_path}/file/work",
        log=tmp_path / "output.txt",
    ) as program:
        error = fatal(program)
    assert f"The work directory {tmp_path}/file/work cannot be written" in error
    assert not re.search("^step", program.output, re.MULTILINE)


def test_a_loss_that_is_not_finite(tmp_path):
    with Program(
        JOB.module,
        *JOB.arguments,
        "--config.learning_rate=1e30",
        "--save_checkpoints_steps=1",
        "--mode=train",
        f"--workdir={tmp_path}",
        log=tmp_path / "output.txt",
    ) as program:
        error = fatal(program)
    match = re.search(r"(?:in|by) step (\d+)", error)
    assert match, error
    # What was saved is of before, and finite.
    saved = processes.checkpoint_steps(tmp_path)
    assert all(step <= int(match[1]) for step in saved)
    for step in saved:
        for name, value in processes.checkpoint_values(tmp_path, step).items():
            assert np.isfinite(value).all(), name


def test_the_log_holds_numbers_of_every_loop(finished):
    path, _, _ = finished(JOB.name)
    lines = (path / "train.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record["total_steps"] == STEPS
        assert np.isfinite(record["metrics"]["loss"])
        assert 0 <= record["sparsity"] <= 0.91
