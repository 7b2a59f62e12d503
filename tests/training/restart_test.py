"""A training program, stopped, killed and hindered; see also `main_test`.

Whatever happens to it, starting it again ends with the bits of a training that
nothing happened to.
"""

import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests.support import killing, processes
from tests.support.processes import Program

pytestmark = pytest.mark.slow

STEPS = killing.STEPS


def make_job(technique):
    """A job of a few seconds with checkpoints of 250 kB."""
    return killing.Job(
        technique,
        "tests.support.toy_train",
        (
            f"--techniques={technique}",
            f"--train_steps={STEPS}",
            "--units=2000",
            "--step_seconds=0.01",
        ),
        folder=technique,
    )


JOBS = {
    name: make_job(name) for name in ("MagnitudePruning", "VariationalDropout")
}
JOB = JOBS["MagnitudePruning"]
# Larger than the program's logs, smaller than its checkpoints.
FILE_SIZE = 150_000


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
    """A copy of a finished training without its last checkpoint."""
    path = tmp_path / "work"
    shutil.copytree(finished(JOB.name)[0], path)
    shutil.rmtree(processes.checkpoint_path(JOB.directory(path), STEPS))
    return path


def saved(workdir):
    """The steps of the checkpoints of the job."""
    return processes.checkpoint_steps(JOB.directory(workdir))


def go_on(workdir, expected):
    """Trains to the end, which must be the expected one."""
    with JOB.start(workdir) as program:
        assert program.wait() == 0, program.output
    assert processes.differences(JOB.values(workdir), expected) == []
    logged = processes.records(JOB.directory(workdir))
    steps = [record["step"] for record in logged]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    return program.output


def contents(workdir):
    """The bytes of all files of the checkpoints."""
    folder = JOB.directory(workdir) / "checkpoints"
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


def test_trainings_of_two_techniques_differ(finished):
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
        with JOB.start(tmp_path) as program:
            program.wait_until(lambda p=program: killing.printed_step(p) >= 2)
            before = killing.printed_step(program)
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
        assert saved(tmp_path)[-1] == int(step)
        assert killing.printed_step(program) == int(step)
        assert "Traceback" not in program.output
    output = go_on(tmp_path, expected)
    assert f"Continuing from the checkpoint of step {step}." in output


def test_a_second_signal_ends_it_at_once(tmp_path):
    # A loop of three steps takes nine seconds.
    with Program(
        JOB.module,
        "--techniques=L0Regularization",
        "--mode=train",
        "--strategy=one_device",
        "--save_checkpoints_steps=3",
        "--step_seconds=3",
        f"--workdir={tmp_path}",
        log=tmp_path / "output.txt",
    ) as program:
        checkpoint = processes.checkpoint_path(tmp_path / "L0Regularization", 3)
        program.wait_until(lambda: checkpoint.exists())
        program.stop()
        program.wait_until(lambda: "SIGTERM received" in program.output)
        time.sleep(0.3)
        program.stop()
        assert program.wait(2) == 143
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert "Stopped" not in program.output


# Hindered.


def test_a_full_disk_leaves_the_checkpoints(workdir):
    before = contents(workdir)
    with JOB.start(workdir, file_size=FILE_SIZE) as program:
        error = fatal(program)
    assert f"The checkpoint of step {STEPS} could not be written" in error
    # The path, the reason, and nothing of the operation that failed.
    assert error.count("large. The newest checkpoint is of step 228.") == 1
    assert "node" not in error
    assert "Free disk space" in error
    assert contents(workdir) == before


def test_a_damaged_checkpoint_is_not_used(finished, workdir):
    _, expected, _ = finished(JOB.name)
    before, newest = saved(workdir)[-2:]
    path = processes.checkpoint_path(JOB.directory(workdir), newest)
    data = path / "variables.data-00000-of-00001"
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    output = go_on(workdir, expected)
    assert f"step-{newest:08d} is damaged and not used" in output
    assert f"Continuing from the checkpoint of step {before}." in output


def test_a_checkpoint_of_another_configuration_is_left_alone(workdir):
    before = contents(workdir)
    with Program(
        JOB.module,
        *JOB.arguments,
        "--learning_rate=0.5",
        "--gradient_accumulation_steps=2",
        f"--workdir={workdir}",
        log=workdir / "other.txt",
    ) as program:
        error = fatal(program)
    assert "is of another configuration" in error
    assert "learning_rate: not saved, 0.5 now" in error
    assert "gradient_accumulation_steps: 1 saved, 2 now" in error
    # And no others.
    assert error.count(" saved, ") == 2, error
    assert contents(workdir) == before


def test_the_log_holds_numbers_of_every_loop(finished):
    path, _, _ = finished(JOB.name)
    logged = processes.records(JOB.directory(path))
    assert logged
    for record in logged:
        assert record["total_steps"] == STEPS
        assert np.isfinite(record["metrics"]["loss"])
        assert 0 <= record["sparsity"] <= 0.81
