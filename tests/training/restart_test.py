"""A training program, stopped, killed and hindered; see also `main_test`.

Whatever happens to it, starting it again ends with the bits of a training that
nothing happened to.
"""

import dataclasses
import re
import signal
import time

import numpy as np
import pytest

from tests.support import killing, processes

pytestmark = pytest.mark.slow

STEPS = killing.STEPS


# Few seconds, checkpoints of 250 kB. With noise, which a restart has to repeat.
JOB = killing.Job(
    "VariationalDropout",
    "tests.support.toy_train",
    (
        "--techniques=VariationalDropout",
        f"--train_steps={STEPS}",
        "--units=1000",
        "--step_seconds=0.01",
    ),
    folder="VariationalDropout",
)
# Larger than the program's logs, smaller than its checkpoints.
FILE_SIZE = 100_000


def saved(workdir):
    """The steps of the checkpoints of the job."""
    return processes.checkpoint_steps(JOB.directory(workdir))


def contents(workdir):
    """The bytes of all files of the checkpoints."""
    folder = JOB.directory(workdir) / "checkpoints"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start_and_train(workdir, step_seconds=0.05):
    """Starts the program and waits until it has made two loops more."""
    slow = (*JOB.arguments, f"--step_seconds={step_seconds}")
    program = dataclasses.replace(JOB, arguments=slow).start(workdir)
    program.wait_until(lambda: program.output.count("\nstep ") >= 2)
    return program


def stop_by_signal(workdir, signum, code):
    with start_and_train(workdir) as program:
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
    assert saved(workdir)[-1] == int(step)
    assert killing.printed_step(program) == int(step)
    assert "Traceback" not in program.output


def end_by_two_signals(workdir):
    # A loop takes seconds.
    with start_and_train(workdir, step_seconds=3) as program:
        program.stop()
        program.wait_until(lambda: "SIGTERM received" in program.output)
        time.sleep(0.3)
        program.stop()
        assert program.wait(2) == 143
    assert "Stopped" not in program.output
    folder = JOB.directory(workdir) / "checkpoints"
    assert not list(folder.glob(".writing-*"))


def fail_on_a_full_disk(workdir):
    before = contents(workdir)
    with JOB.start(workdir, file_size=FILE_SIZE) as program:
        assert program.wait() == 1, program.output
    assert "Traceback" not in program.output
    assert program.output.count("FATAL") == 1, program.output
    error = program.output[program.output.index("FATAL") :]
    assert re.search(r"The checkpoint of step \d+ could not be written", error)
    # The path, the reason, and nothing of the operation that failed.
    assert error.count("File too large. The newest checkpoint is of step") == 1
    assert "node" not in error
    assert "Free disk space" in error
    assert contents(workdir) == before


def damage_the_newest(workdir):
    """Returns the steps of the newest checkpoint and the one before."""
    before, newest = saved(workdir)[-2:]
    path = processes.checkpoint_path(JOB.directory(workdir), newest)
    data = path / "variables.data-00000-of-00001"
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    return newest, before


def test_training_disturbed_in_every_way_ends_with_the_same_bits(tmp_path):
    """One training, as each start imports TensorFlow for seconds."""
    expected, seconds = killing.uninterrupted(JOB, tmp_path / "whole")
    workdir, kills = tmp_path / "disturbed", []

    stop_by_signal(workdir, signal.SIGTERM, 75)
    fail_on_a_full_disk(workdir)
    stop_by_signal(workdir, signal.SIGINT, 130)
    end_by_two_signals(workdir)
    newest, before = damage_the_newest(workdir)
    found = killing.killed(
        JOB,
        workdir,
        moments=["training", "saving"],
        start_seconds=seconds,
        generator=np.random.default_rng(1),
        on_kill=kills.append,
    )
    assert [kill.moment for kill in kills] == ["training", "saving"]
    assert processes.differences(expected, found) == []
    output = (workdir / "output.txt").read_text()
    assert f"step-{newest:08d} is damaged and not used" in output
    assert f"Continuing from the checkpoint of step {before}." in output
    logged = processes.records(JOB.directory(tmp_path / "whole"))
    assert logged
    for record in logged:
        assert record["total_steps"] == STEPS
        assert np.isfinite(record["metrics"]["loss"])
        assert 0 <= record["sparsity"] <= 1
